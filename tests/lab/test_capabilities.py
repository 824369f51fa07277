"""The probe against what the machine's own commands say, and what it leaves; and a user namespace of one's own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from testbed import kernel_probe
from testbed.capabilities import Capabilities

pytestmark = pytest.mark.lab

ROOT = Path(__file__).resolve().parents[2]
ROOTLESS = str(ROOT / "scripts/rootless")
WITHOUT_PRIVILEGE = ["setpriv", "--bounding-set=-net_admin,-sys_admin"]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "TERM": "dumb", **environment}
    return subprocess.run(
        command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


CHAIN = "add table ip x; add chain ip x y { type filter hook prerouting priority -300; }; add rule ip x y"

TAKE_A_DESCRIPTOR = (
    "import ctypes, os; own = os.pidfd_open(os.getpid()); exit(ctypes.CDLL(None).syscall(438, own, own, 0) < 0)"
)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        pytest.param("veth", "ip link add name x type veth", id="veth"),
        pytest.param("nftables", "nft add table ip x", id="nftables"),
        pytest.param("nft-ct", f"nft '{CHAIN} ct state new accept'", id="nft-ct"),
        pytest.param("nft-queue", f"nft '{CHAIN} queue num 0'", id="nft-queue"),
        pytest.param("xt-nfqueue", "iptables-nft -t raw -A PREROUTING -j NFQUEUE --queue-num 0", id="xt-nfqueue"),
        pytest.param("ctnetlink", "conntrack -L", id="ctnetlink"),
        pytest.param("netem", "tc qdisc add dev lo root netem delay 1ms", id="netem"),
        pytest.param("tbf", "tc qdisc add dev lo root tbf rate 1mbit burst 2000 limit 9000", id="tbf"),
        pytest.param(
            "tc-redirect",
            "tc qdisc add dev lo ingress && "
            "tc filter add dev lo ingress u32 match u32 0 0 action mirred egress redirect dev lo",
            id="tc-redirect",
        ),
        pytest.param(
            "seccomp-notify",
            f"grep -qw user_notif /proc/sys/kernel/seccomp/actions_avail && {sys.executable} -c '{TAKE_A_DESCRIPTOR}'",
            id="seccomp-notify",
        ),
    ],
)
def test_the_probe_finds_what_the_command_finds(capabilities: Capabilities, name: str, command: str) -> None:
    outcome = run("unshare", "--net", "sh", "-c", command)
    assert capabilities.has(name) == (outcome.returncode == 0), outcome.stderr


UNDER_A_PROFILE = """\
import ctypes, os, runpy, struct
allow, refuse, number = 0x7FFF0000, 0x00050001, 438  # seccomp(2): ALLOW, ERRNO with EPERM; pidfd_getfd
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, refuse), (0x06, 0, 0, allow)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
program = ctypes.create_string_buffer(struct.pack("H6xQ", len(lines), ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0) == 0
runpy.run_module("testbed.capabilities", run_name="__main__")
"""


def test_a_container_that_lets_nobody_take_sockets_is_found() -> None:
    """Docker's profile allows pidfd_getfd only to who has SYS_PTRACE."""
    outcome = run(sys.executable, "-W", "ignore", "-c", UNDER_A_PROFILE)
    line = next(line for line in outcome.stdout.splitlines() if "seccomp-notify" in line)
    assert "Operation not permitted" in line
    assert "--cap-add SYS_PTRACE" in outcome.stdout


def test_every_feature_was_tried_once(capabilities: Capabilities) -> None:
    names = [capability.name for capability in capabilities]
    assert len(set(names)) == len(names)
    assert {feature.name for feature in kernel_probe.FEATURES} <= set(names)


def test_the_probe_is_fast_and_leaves_nothing() -> None:
    def state() -> tuple[object, ...]:
        interfaces = run("ip", "-oneline", "link").stdout
        rules = run("nft", "list", "ruleset").stdout
        here = Path("/proc/thread-self/ns/net").readlink()
        return sorted(Path("/proc/self/fd").iterdir()), threading.active_count(), here, interfaces, rules

    before = state()
    begun = time.process_time()  # of the processor: others may be busy
    kernel_probe.try_all()
    taken = time.process_time() - begun

    assert state() == before
    assert taken < 0.3


def test_a_kernel_that_first_loads_its_modules_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sock_diag is a module, its first event waits until modprobe has run; here, until a copy is closed too."""

    class Lingering(socket.socket):
        def close(self) -> None:
            if self.family == socket.AF_INET and self.fileno() >= 0:
                threading.Timer(0.3, os.close, [os.dup(self.fileno())]).start()
            super().close()

    monkeypatch.setattr(socket, "socket", Lingering)
    monkeypatch.setattr(kernel_probe, "_ANSWER_SECONDS", 10.0)  # a busy machine's timers are late
    failures = {feature.name: failure for feature, failure in kernel_probe.try_all()}
    assert failures["sock-destroy"] is None


def test_without_privilege_the_probe_says_so_and_fails() -> None:
    outcome = run(*WITHOUT_PRIVILEGE, sys.executable, "-m", "testbed.capabilities", COLUMNS="300")
    assert outcome.returncode == 1
    assert "CAP_NET_ADMIN is not held" in outcome.stdout
    assert "netem" not in outcome.stdout  # it could not be tried, so nothing is claimed about it


def test_capabilities_are_told_as_json_with_the_same_exit_code(capabilities: Capabilities) -> None:
    here = run(sys.executable, "-m", "testbed.capabilities", "--json")
    assert here.returncode == 0
    assert [each["name"] for each in json.loads(here.stdout)] == [each.name for each in capabilities]
    less = run(*WITHOUT_PRIVILEGE, sys.executable, "-m", "testbed.capabilities", "--json")
    assert less.returncode == 1
    assert {"root": False}.items() <= {each["name"]: each["present"] for each in json.loads(less.stdout)}.items()


def test_a_lab_test_without_privilege_is_skipped_with_the_reason() -> None:
    this = f"{Path(__file__).relative_to(ROOT)}::test_every_feature_was_tried_once"
    outcome = run(*WITHOUT_PRIVILEGE, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", this)
    assert outcome.returncode == 0
    assert "no lab here, missing root (CAP_NET_ADMIN is not held)" in outcome.stdout
    assert outcome.stdout.splitlines()[-1].strip("= ").startswith("1 skipped")


# ---- scripts/rootless ----


def test_rootless_nothing_warns_of_the_systems_limit_for_buffers() -> None:
    """Which a user namespace may not pass; distributions have 212992 bytes (net.core.rmem_max)."""
    outcome = run(ROOTLESS, sys.executable, "-W", "error", "-m", "testbed.capabilities")
    assert (outcome.returncode, outcome.stderr) == (0, "")


def test_rootless_gives_a_root_and_a_network_of_ones_own() -> None:
    here = str(Path("/proc/thread-self/ns/net").readlink())
    script = (
        "id -u; readlink /proc/self/ns/net; ls -A /run | wc -l; ip -brief link; nft add table ip mine && touch /run/x"
    )

    outcome = run(ROOTLESS, "sh", "-c", script)

    assert outcome.returncode == 0, outcome.stderr
    user, namespace, entries, *links = outcome.stdout.splitlines()
    assert (user, entries, len(links)) == ("0", "0", 1)
    assert namespace != here
    assert links[0].startswith("lo ")
    assert "LOWER_UP" in links[0]
    assert "table ip mine" not in run("nft", "list", "tables").stdout


def test_rootless_passes_arguments_and_the_exit_code_on() -> None:
    outcome = run(ROOTLESS, "sh", "-c", 'echo "$1"; exit 7', "sh", "two  words")
    assert (outcome.returncode, outcome.stdout) == (7, "two  words\n")


def test_rootless_has_all_that_a_lab_requires() -> None:
    outcome = run(ROOTLESS, sys.executable, "-m", "testbed.capabilities")
    assert outcome.returncode == 0, outcome.stdout
    assert "other-users" in outcome.stdout


def test_rootless_names_the_setting_that_forbids_it() -> None:
    forbid = 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"'
    outcome = run("unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh", ROOTLESS, "true")
    assert outcome.returncode == 1
    assert "sysctl -w user.max_user_namespaces=" in outcome.stderr
