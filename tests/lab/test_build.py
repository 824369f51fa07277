"""Building: a plan becomes namespaces that pass traffic, or nothing."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from traffic_checks import gets_through

from testbed import build, rtnetlink
from testbed.build import Builder, BuildError
from testbed.impair import WIRE
from testbed.netns import Namespace
from testbed.nsid import Watch
from testbed.owner import namespace_mark
from testbed.plan import AddAddress, LoadRules, MakeNamespace, Operation, RunCommand, SetUp, plan
from testbed.shapes import chain
from testbed.topology import Topology
from testbed.topology_file import loads

pytestmark = pytest.mark.lab

SWITCHED = """
name: switched
nodes: {a: , s: {kind: bridge}, t: {kind: bridge}, b: , r: {kind: router}, c: }
links:
  - ends: [{node: a}, {node: s, addresses: []}]
  - ends: [{node: s, addresses: []}, {node: t, addresses: []}]
  - ends: [{node: b}, {node: t, addresses: []}]
  - ends: [{node: r}, {node: t, addresses: []}]
  - ends: [{node: r}, {node: c}]
"""
PATIENCE = 10.0  # seconds
PAIR = "name: pair\nnodes: {a: %s, b: }\nlinks: [{ends: [{node: a}, {node: b}]}]"


def run(namespace: Namespace, *command: str) -> str:
    return namespace.call(lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def addresses(topology: Topology, node: str) -> list[str]:
    return [str(address.ip) for end in topology.ends_of(node) for address in end.addresses]


@pytest.mark.parametrize(
    ("topology", "pairs"),
    [
        pytest.param(chain(2), [("n0", "n1")], id="two hosts"),
        pytest.param(chain(7), [("n0", "n6"), ("n6", "n0"), ("n2", "n5")], id="a chain of routers"),
        pytest.param(loads(SWITCHED), [("a", "b"), ("a", "c"), ("c", "b")], id="bridges and a router"),
    ],
)
def test_traffic_of_both_families_passes_at_once(topology: Topology, pairs: list[tuple[str, str]]) -> None:
    with Builder() as builder:
        builder.build(plan(topology))
        for source, destination in pairs:
            for address in addresses(topology, destination):
                assert gets_through(builder.namespace(source), builder.namespace(destination), address), address


def test_a_chain_is_ready_each_time() -> None:
    topology = chain(3)
    for _ in range(10):
        with Builder() as builder:
            builder.build(plan(topology))
            for address in addresses(topology, "n2"):
                assert gets_through(builder.namespace("n0"), builder.namespace("n2"), address, within=0.8), address


def test_two_builds_look_the_same() -> None:
    seen = []
    for _ in range(2):
        with Builder() as builder:
            builder.build(plan(chain(3)))
            links = json.loads(run(builder.namespace("n1"), "ip", "-json", "address"))
            facts = [(link["ifname"], link["ifindex"], link["address"], link["mtu"]) for link in links]
            local = [address["local"] for link in links for address in link["addr_info"]]
            seen.append((facts, local, run(builder.namespace("n1"), "ip", "-6", "route")))
    assert seen[0] == seen[1]


def test_every_namespace_says_whose_it_is() -> None:
    impaired = (PAIR % "").replace("{node: b}]", "{node: b}], impair: {loss: 5%}")
    with Builder() as builder:
        builder.build(plan(loads(impaired)))
        assert list(builder.sites) == ["a", "b", WIRE]
        assert {rtnetlink.marked(site.netlink) for site in builder.sites.values()} == {namespace_mark()}


def test_the_machine_sees_nothing_of_a_lab() -> None:
    def interfaces() -> set[str]:
        return {name for _, name in socket.if_nameindex()}

    before = interfaces()
    own = Namespace.current().identity
    with Builder() as builder:
        builder.build(plan(chain(3)))
        assert interfaces() == before
        assert Namespace.current().identity == own
        named = Path("/run/netns")
        names = {builder.namespace(node).identity[1] for node in ("n0", "n1", "n2")}
        assert not named.exists() or not names & {path.stat().st_ino for path in named.iterdir()}


def test_what_was_built_is_gone_when_it_is_closed() -> None:
    descriptors = open_descriptors()
    builder = Builder()
    builder.build(plan(chain(4)))
    with Watch({node: builder.namespace(node) for node in builder.sites}) as watch:
        assert len(watch.remaining(0)) == 4
        builder.close()
        assert watch.remaining(PATIENCE) == []
    assert open_descriptors() == descriptors


def refused_address() -> list[Operation]:
    return [*plan(chain(2)), AddAddress("n1", "left", ipaddress.ip_interface("10.0.0.2/24"))]


def refused_rules() -> list[Operation]:
    return [*plan(chain(2)), LoadRules("n0", ("nft", "-f", "-"), "add rule nowhere")]


def refused_setting() -> list[Operation]:
    return [MakeNamespace("a", ()), MakeNamespace("b", (("net.ipv4.no_such_setting", "1"),))]


def failed_command(*command: str) -> Callable[[], list[Operation]]:
    return lambda: [MakeNamespace("a", ()), RunCommand("a", command)]


@pytest.mark.parametrize(
    ("operations", "what"),
    [
        pytest.param(refused_address, "refused `n1: address 10.0.0.2/24 on left`: File exists", id="netlink"),
        pytest.param(refused_rules, "nft refused the rules of n0: .*Error", id="nft"),
        pytest.param(refused_setting, "net.ipv4.no_such_setting = 1 in b: .*No such file", id="sysctl"),
        pytest.param(failed_command("ip", "link", "set", "x", "up"), "'ip link set x up' of a failed: ", id="setup"),
        pytest.param(failed_command("sh", "-c", "exit 3"), "of a failed: exit status 3", id="silent setup"),
        pytest.param(
            failed_command("sh", "-c", r"printf '\377'; exit 3"), "of a failed: \ufffd", id="bytes of a setup"
        ),
        pytest.param(failed_command("no-such-program"), "of a failed: no-such-program: No such file", id="no program"),
    ],
)
def test_a_refused_operation_is_named_and_leaves_nothing(operations: Callable[[], list[Operation]], what: str) -> None:
    descriptors = open_descriptors()
    watches: list[Watch] = []

    def watch(namespace: Namespace) -> None:
        watches.append(Watch({"it": namespace}))

    builder = Builder(watch)
    with pytest.raises(BuildError, match=what):
        builder.build(operations())
    assert watches
    for each in watches:
        assert each.remaining(PATIENCE) == []
        each.close()
    assert open_descriptors() == descriptors


def test_every_refused_operation_of_a_batch_is_named() -> None:
    added = [AddAddress("n1", "left", ipaddress.ip_interface(f"10.0.0.{host}/24")) for host in (7, 2, 8, 7, 9)]
    with Builder() as builder, pytest.raises(BuildError) as raised:
        builder.build([*plan(chain(2)), *added])
    refused = [f"the kernel refused `n1: address 10.0.0.{host}/24 on left`: File exists" for host in (2, 7)]
    assert str(raised.value).splitlines() == refused


def test_a_link_that_is_never_operational_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_PATIENCE", 0.05)
    of_one_node = [each for each in plan(chain(2)) if each != SetUp("n1", "left")]
    with Builder() as builder, pytest.raises(BuildError, match=r"n0 is not ready after .*: right is not operational"):
        builder.build(of_one_node)


def test_when_descriptors_run_out_nothing_is_left_and_the_thread_is_back() -> None:
    before, limits = open_descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)
    here = Namespace.current().identity
    builder = Builder()
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 9, limits[1]))  # for some of the namespaces
    try:
        with pytest.raises(BuildError, match="Too many open files"):
            builder.build(plan(chain(10)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert open_descriptors() == before
    assert Namespace.current().identity == here


def test_what_was_made_when_somebody_interrupts_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(build.Site):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)
            if len(made) == 3:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.01)  # so that it comes while others are to be made

    made: list[build.Site] = []
    monkeypatch.setattr(build, "Site", Interrupting)
    before, here = open_descriptors(), Namespace.current().identity
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # who begins us in the background has it ignored
    with Builder() as builder:
        try:
            with pytest.raises(KeyboardInterrupt):
                builder.build(plan(chain(50)))
        finally:
            signal.signal(signal.SIGINT, handler)
        # Python may give up waiting for the thread that the signal found it waiting for.
        settle = time.monotonic() + PATIENCE
        while threading.active_count() > 1 and time.monotonic() < settle:
            time.sleep(0.01)
        assert len(made) < 10
        assert len(builder.sites) >= len(made) - 2
    del made[:]
    assert open_descriptors() <= before + 4
    assert Namespace.current().identity == here


def test_when_one_site_cannot_be_made_no_more_are_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(build.Site):
        def __init__(self) -> None:
            made.append(self)
            if len(made) == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().__init__()

    made: list[build.Site] = []
    monkeypatch.setattr(build, "Site", Failing)
    before = open_descriptors()
    builder = Builder()
    with pytest.raises(BuildError, match="No space left on device"):
        builder.build(plan(chain(50)))
    assert len(made) <= 6
    assert open_descriptors() == before


def test_when_a_thread_cannot_be_started_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        begin(thread)

    begin = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    before = open_descriptors()
    with pytest.raises(BuildError, match="can't start new thread"):
        Builder().build(plan(chain(50)))
    assert open_descriptors() == before


def test_without_the_right_to_make_namespaces_the_error_says_so() -> None:
    script = """
from testbed import build, rtnetlink
from testbed.build import Builder, BuildError
from testbed.plan import plan
from testbed.shapes import chain
try:
    Builder().build(plan(chain(2)))
except BuildError as error:
    print(error)
"""
    command = ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "unshare(CLONE_NEWNET): Operation not permitted" in done.stdout, done.stderr


def test_rules_and_settings_of_the_user_are_there() -> None:
    text = """
name: pair
nodes:
  a:
    sysctls: {net.ipv4.ip_default_ttl: 9, net.ipv4.conf.eth0.rp_filter: 2}
    nft: add table inet mine
    iptables: "*filter\\n-A INPUT -p tcp --dport 9 -j DROP\\nCOMMIT\\n"
    ip6tables: "*filter\\n-A INPUT -p tcp --dport 6 -j DROP\\nCOMMIT\\n"
  b:
links: [{ends: [{node: a}, {node: b}]}]
"""
    with Builder() as builder:
        builder.build(plan(loads(text)))
        inside = builder.namespace("a")
        assert "table inet mine" in run(inside, "nft", "list", "tables")
        assert "--dport 9 -j DROP" in run(inside, "iptables-save")
        assert "--dport 6 -j DROP" in run(inside, "ip6tables-save")
        assert inside.call(Path("/proc/sys/net/ipv4/ip_default_ttl").read_text) == "9\n"
        assert inside.call(Path("/proc/sys/net/ipv4/conf/eth0/rp_filter").read_text) == "2\n"


def test_settings_are_made_in_order_even_where_some_are_there_already() -> None:
    settings = (
        ("net.ipv6.conf.default.forwarding", "0"),  # as in any new namespace
        ("net.ipv6.conf.all.forwarding", "1"),  # which changes the one above, too
        ("net.ipv6.conf.default.forwarding", "0"),
    )
    with Builder() as builder:
        builder.build(
            [MakeNamespace("a", settings), MakeNamespace("b", settings[1:]), MakeNamespace("c", settings[:2])]
        )
        seen = [builder.namespace(node).call(forwarding) for node in ("a", "b", "c")]
    assert seen == [("1", "0"), ("1", "0"), ("1", "1")]


def forwarding() -> tuple[str, str]:
    """Whether this thread's namespace forwards IPv6, and whether what comes into it would."""
    return read_sysctl("net/ipv6/conf/all/forwarding"), read_sysctl("net/ipv6/conf/default/forwarding")


def read_sysctl(key: str) -> str:
    return Path("/proc/sys", key).read_text().strip()


def test_an_interface_keeps_its_settings_when_the_default_changes() -> None:
    text = (
        (PAIR % "").replace("node: a}", "node: a, addresses: auto6}").replace("node: b}", "node: b, addresses: auto6}")
    )

    def change() -> str:
        Path("/proc/sys/net/ipv4/conf/default/rp_filter").write_text("1")
        return read_sysctl("net/ipv4/conf/eth0/rp_filter")

    with Builder() as builder:
        builder.build(plan(loads(text)))
        assert builder.namespace("a").call(change) == "0"


def test_commands_are_run_in_order_before_rules_that_need_what_they_make() -> None:
    text = """
name: pair
nodes:
  a:
    setup: [ip link add mine type bridge, ip link set mine up, "sh -c 'ip addr add 10.9.0.1/24 dev mine'"]
    nft: "table netdev t { chain c { type filter hook ingress device mine priority 0; }; }"
  b:
links: [{ends: [{node: a}, {node: b}]}]
"""
    with Builder() as builder:
        builder.build(plan(loads(text)))
        assert "10.9.0.1/24" in run(builder.namespace("a"), "ip", "-brief", "addr", "show", "mine")
        assert "mine" in run(builder.namespace("a"), "nft", "list", "table", "netdev", "t")
        assert "mine" not in run(builder.namespace("b"), "ip", "-brief", "link")


@pytest.mark.parametrize(("offload", "state"), [("false", "off"), ("true", "on")])
def test_checksums_are_whole_on_the_wire_unless_offload_is_asked_for(offload: str, state: str) -> None:
    with Builder() as builder:
        builder.build(plan(loads(PAIR % "{}" + f"\noffload: {offload}")))
        assert f"tx-checksumming: {state}" in run(builder.namespace("a"), "ethtool", "-k", "eth0")


def test_what_a_link_says_holds() -> None:
    text = """
name: pair
nodes: {a: , b: }
links: [{ends: [{node: a, interface: wan, mac: "02:00:00:00:aa:01"}, {node: b, addresses: auto4}], mtu: 1300}]
"""
    with Builder() as builder:
        builder.build(plan(loads(text)))
        (link,) = json.loads(run(builder.namespace("a"), "ip", "-details", "-json", "link", "show", "wan"))
        assert (link["address"], link["mtu"], link["operstate"]) == ("02:00:00:00:aa:01", 1300, "UP")
        assert (link["num_tx_queues"], link["num_rx_queues"]) == (1, 1)  # whatever the machine's processors
        assert "inet6" not in run(builder.namespace("b"), "ip", "address", "show", "eth0")


def test_labs_of_one_topology_do_not_meet() -> None:
    topology = chain(2)
    with Builder() as one, Builder() as other:
        one.build(plan(topology))
        other.build(plan(topology))
        assert gets_through(one.namespace("n0"), one.namespace("n1"), "10.0.0.2")
        assert not gets_through(one.namespace("n0"), other.namespace("n1"), "10.0.0.2", within=0.1)


def test_a_thread_is_where_it_was_after_building() -> None:
    seen = []

    def build_one() -> None:
        before = Namespace.current().identity
        with Builder() as builder:
            builder.build(plan(chain(2)))
            seen.append(Namespace.current().identity == before)

    thread = threading.Thread(target=build_one)
    thread.start()
    thread.join()
    assert seen == [True]
