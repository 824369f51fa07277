"""Who may assign: CAP_NET_ADMIN at the time of each call, in the user namespace that owns the network or one above."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_lab import EngineLab, engine_lab
from supervisor_runs import ROOT, TIMEOUT

pytestmark = [pytest.mark.lab, pytest.mark.needs("seccomp-notify")]

RUN = ("tproxyctl", "run", "--")

# ASSIGN three times, each on a socket of its own, by the client or by setsockopt itself: at first, after a step
# that takes privileges away, and after one that gives them back. One line with the three results.
ASSIGN_THREE_TIMES = """
import ctypes, errno, os, socket, struct, sys, threading
from nfq_engine.client import Tproxy
way, step = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
client = Tproxy() if way == "client" else None
sockets = []

def assign():
    sockets.append(socket.socket())
    sockets[-1].bind(("127.0.0.1", 0))
    argument = struct.pack("=I4sH2x", 1, socket.inet_aton("192.0.2.7"), 0)
    try:
        if client is None:
            sockets[-1].setsockopt(socket.SOL_IP, 11274, argument)
        else:
            client.setsockopt(sockets[-1].fileno(), argument)
        return "OK"
    except OSError as problem:
        return errno.errorcode[problem.errno]

def set_effective(mask):
    '''capset(2) of this thread: permitted stays what it is.'''
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] = sets[1] & mask
    assert libc.capset(header, sets) == 0

NET_ADMIN = 1 << 12
results = [assign()]
match step:
    case "capability":
        set_effective(~NET_ADMIN)
        results.append(assign())
        set_effective(~0)
        results.append(assign())
    case "user":
        os.setresuid(0, 65534, 0)
        results.append(assign())
        os.setresuid(0, 0, 0)
        results.append(assign())
    case "thread":
        def in_thread():
            set_effective(~NET_ADMIN)
            results.append(assign())
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        results.append(assign())
print(*results)
"""


@pytest.fixture(scope="module", params=["inline", "kernel"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineLab]:
    with engine_lab(tmp_path_factory.mktemp("lab"), datapath=request.param) as running:
        yield running


@pytest.mark.parametrize(
    ("way", "step"),
    [
        pytest.param("client", "capability", id="client-capability"),
        pytest.param("client", "user", id="client-user", marks=pytest.mark.needs("other-users")),
        pytest.param("setsockopt", "capability", id="unmodified-capability"),
        pytest.param("setsockopt", "user", id="unmodified-user", marks=pytest.mark.needs("other-users")),
        pytest.param("setsockopt", "thread", id="unmodified-one-thread-of-two"),
    ],
)
def test_privileges_count_at_the_time_of_the_call(lab: EngineLab, way: str, step: str) -> None:
    prefix = RUN if way == "setsockopt" else ()
    result = lab.gateway.run([*prefix, sys.executable, "-c", ASSIGN_THREE_TIMES, way, step])
    assert result.stdout == "OK EPERM OK\n"


# In a user namespace with a network of its own: an engine, and who may assign there.
ROOTLESS = """
import os, subprocess, sys
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
reading, writing = os.pipe()
command = [sys.executable, "-m", "nfq_engine.daemon", "--datapath", sys.argv[1], "--notify-fd", str(writing)]
engine = subprocess.Popen(command, pass_fds=[writing])
os.close(writing)
try:
    assert os.read(reading, 1) == b"\\n", "the engine did not become ready"
    for way, prefix in ("client", []), ("setsockopt", [sys.executable, "-m", "nfq_engine.cli", "run", "--"]):
        for inner in [], ["unshare", "--user", "--map-root-user"]:
            program = [*prefix, *inner, sys.executable, "-c", sys.argv[2], way, "capability"]
            print(way, "inner" if inner else "owner", subprocess.check_output(program, text=True), end="")
finally:
    engine.terminate()
    engine.wait()
"""


@pytest.mark.parametrize("datapath", ["inline", "kernel"])
def test_administrators_of_the_namespace_s_own_user_namespace_may(datapath: str) -> None:
    """Without any privilege outside; but not those of a user namespace within, whom the network does not belong to."""
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", ROOTLESS]
    with subprocess.Popen(
        [*command, datapath, ASSIGN_THREE_TIMES],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=Path("/"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            output, errors = running.communicate(timeout=TIMEOUT)
        except BaseException:
            os.killpg(running.pid, signal.SIGKILL)  # its engine, too
            raise
    assert running.returncode == 0, errors
    assert output.splitlines() == [
        "client owner OK EPERM OK",
        "client inner EPERM EPERM EPERM",
        "setsockopt owner OK EPERM OK",
        "setsockopt inner EPERM EPERM EPERM",
    ]
