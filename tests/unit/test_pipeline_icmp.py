"""ICMP errors: rewritten as the kernel's NAT does it, the embedded packet and the one outer address of each stage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from builders import ADDRESSES, endpoint, flow, icmp_error, packet
from dialogue import Dialogue

from nfq_engine.core.decision import Reason, Verdict
from nfq_engine.core.packet import FlowTuple, Hook, Protocol
from nfq_engine.core.sockref import Flag

PREROUTING, OUTPUT, POSTROUTING = Hook.PREROUTING, Hook.OUTPUT, Hook.POSTROUTING


Scene = dict[str, FlowTuple]  # the tuples of a connection, by name
SetUp = Callable[[Dialogue, int, Protocol], Scene]
Error = tuple[str, str, str]  # source, destination, what it is about: a tuple, ~ if it went the other way


def redirected(world: Dialogue, version: int, protocol: Protocol) -> Scene:
    world.rule(f"-A PREROUTING -p {protocol.name.lower()} --dport 80 -j TPROXY --on-port 50080")
    asked = flow(endpoint("client", 4000, version), endpoint("server", 80, version), protocol)
    world.send(PREROUTING, asked)
    return {"asked": asked, "inside": flow(asked.source, endpoint("gateway", 50080, version), protocol)}


def moved(world: Dialogue, version: int, protocol: Protocol) -> Scene:
    """A second connection from one client port to one proxy: its source port is another one inside."""
    redirected(world, version, protocol)
    asked = flow(endpoint("client", 4000, version), endpoint("foreign", 80, version), protocol)
    return {"asked": asked, "inside": world.send(PREROUTING, asked)[1]}


def redirected_elsewhere(world: Dialogue, version: int, protocol: Protocol) -> Scene:
    """The proxy is on another machine: the connection is forwarded to it."""
    proxy = endpoint("outside", 50080, version)
    name = ADDRESSES[version]["outside"]
    world.rule(f"-A PREROUTING -p {protocol.name.lower()} --dport 80 -j TPROXY --on-port 50080 --on-ip {name}")
    asked = flow(endpoint("client", 4000, version), endpoint("server", 80, version), protocol)
    inside = flow(asked.source, proxy, protocol)
    world.send(PREROUTING, asked)
    world.send(POSTROUTING, inside)
    return {"asked": asked, "inside": inside}


def foreign_connect(world: Dialogue, version: int, protocol: Protocol) -> Scene:
    local, foreign = endpoint("outside", 5000, version), endpoint("client", 4711, version)
    world.assign(local, foreign, Flag.CONNECT, protocol)
    inside = flow(local, endpoint("server", 8080, version), protocol)
    world.send(OUTPUT, inside)
    return {"inside": inside, "wire": world.send(POSTROUTING, inside)[1]}


def foreign_listen(world: Dialogue, version: int, protocol: Protocol) -> Scene:
    local, foreign = endpoint("gateway", 7007, version), endpoint("foreign", 7, version)
    world.assign(local, foreign, Flag.LISTEN, protocol)
    asked = flow(endpoint("client", 4000, version), foreign, protocol)
    return {"asked": asked, "inside": world.send(PREROUTING, asked)[1]}


# A scene, a hook, the error that comes there, the one that leaves; None: it is left as it is.
CASES: list[tuple[str, SetUp, Hook, Error, Error | None]] = [
    # The proxy's host refuses the client: it must look as if the server did.
    ("refused, output", redirected, OUTPUT, ("gateway", "client", "inside"), None),
    ("refused", redirected, POSTROUTING, ("gateway", "client", "inside"), ("server", "client", "asked")),
    ("refused after a move", moved, POSTROUTING, ("gateway", "client", "inside"), ("foreign", "client", "asked")),
    ("listener gone", foreign_listen, POSTROUTING, ("gateway", "client", "inside"), ("foreign", "client", "asked")),
    # A router between us and the client complains about what the proxy sent as the server.
    ("towards the client", redirected, PREROUTING, ("outside", "server", "~asked"), ("outside", "gateway", "~inside")),
    (
        "from a listener",
        foreign_listen,
        PREROUTING,
        ("outside", "foreign", "~asked"),
        ("outside", "gateway", "~inside"),
    ),
    # A router between us and the server complains about what a socket sent as the client.
    (
        "towards the server",
        foreign_connect,
        PREROUTING,
        ("foreign", "client", "wire"),
        ("foreign", "outside", "inside"),
    ),
    # We complain about what the server sent to the foreign address.
    ("no more there, output", foreign_connect, OUTPUT, ("outside", "server", "~inside"), None),
    ("no more there", foreign_connect, POSTROUTING, ("outside", "server", "~inside"), ("client", "server", "~wire")),
    # The proxy is elsewhere; a router on the way there complains. As with the kernel's NAT, it speaks as the server.
    ("on the way, prerouting", redirected_elsewhere, PREROUTING, ("foreign", "client", "inside"), None),
    ("on the way", redirected_elsewhere, POSTROUTING, ("foreign", "client", "inside"), ("server", "client", "asked")),
    (
        "on the way back",
        redirected_elsewhere,
        PREROUTING,
        ("gateway", "server", "~asked"),
        ("gateway", "outside", "~inside"),
    ),
    # Nothing of ours.
    ("about no connection", redirected, PREROUTING, ("outside", "client", "~inside"), None),
]


@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("protocol", list(Protocol), ids=["tcp", "udp"])
@pytest.mark.parametrize("kind", ["unreachable", "too-big", "time-exceeded"])
@pytest.mark.parametrize(
    ("set_up", "hook", "came", "left"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_errors(
    version: int, protocol: Protocol, kind: str, set_up: SetUp, hook: Hook, came: Error, left: Error | None
) -> None:
    world = Dialogue()
    scene = set_up(world, version, protocol)
    (*_, connection) = world.engine.connections
    before = (connection.state, connection.last_seen, len(world.engine.connections))
    decision = world.put(hook, error(scene, version, came, kind))
    reason = Reason.ICMP_PASSED if left is None else Reason.ICMP_TRANSLATED
    assert (decision.verdict, decision.reason) == (Verdict.ACCEPT, reason)
    assert decision.payload == (None if left is None else error(scene, version, left, kind))
    assert decision.is_marked is (left is not None)
    assert (connection.state, connection.last_seen, len(world.engine.connections)) == before


def error(scene: Scene, version: int, which: Error, kind: str) -> bytes:
    source, destination, name = which
    about = scene[name.lstrip("~")]
    about = about.inverse() if name.startswith("~") else about
    return icmp_error(
        packet(about, flags="A", payload=b"x" * 9),
        endpoint(source, 0, version).address,
        endpoint(destination, 0, version).address,
        kind=kind,
    )


@pytest.mark.parametrize("protocol", list(Protocol), ids=["tcp", "udp"])
def test_redirect_about_a_mapped_connection_is_dropped(protocol: Protocol) -> None:
    """As by the kernel's NAT: the client would send what is for the server past us."""
    world = Dialogue()
    scene = redirected_elsewhere(world, 4, protocol)
    decision = world.put(OUTPUT, error(scene, 4, ("gateway", "client", "inside"), "redirect"))
    assert (decision.verdict, decision.reason) == (Verdict.DROP, Reason.ICMP_REDIRECT)


def test_redirect_about_any_other_connection_passes() -> None:
    world = Dialogue()
    of = flow(endpoint("client", 4000), endpoint("server", 8080))
    world.send(PREROUTING, of)
    decision = world.put(OUTPUT, error({"asked": of}, 4, ("gateway", "client", "asked"), "redirect"))
    assert (decision.verdict, decision.reason, decision.payload) == (Verdict.ACCEPT, Reason.ICMP_PASSED, None)
