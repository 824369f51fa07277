"""The hot path gives the slow path's answer, or none. (Every test with a `Dialogue` compares the two, as well.)"""

from __future__ import annotations

import pytest
from builders import endpoint, flow, packet
from dialogue import Dialogue
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.packet import Packet

from nfq_engine.core.conntrack import Direction, Stage
from nfq_engine.core.hotpath import HotPath
from nfq_engine.core.packet import FlowTuple, Hook, Protocol

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
protocols = pytest.mark.parametrize("protocol", list(Protocol), ids=["tcp", "udp"])


def opened(version: int, protocol: Protocol) -> tuple[Dialogue, FlowTuple, FlowTuple]:
    """A redirected connection that both sides have spoken in; its tuple as it came, and inside."""
    world = Dialogue(f"-A PREROUTING -p {protocol.name.lower()} --dport 80 -j TPROXY --on-port 50080")
    asked = flow(endpoint("client", 4000, version), endpoint("server", 80, version), protocol)
    inside = world.send(Hook.PREROUTING, asked)[1]
    for hook in (Hook.OUTPUT, Hook.POSTROUTING):
        world.send(hook, inside.inverse(), "SA")
    world.send(Hook.PREROUTING, asked, "A")
    return world, asked, inside


def hot(world: Dialogue) -> HotPath:
    return world.twin.hot


@versions
@protocols
def test_it_takes_the_packets_of_an_open_connection(version: int, protocol: Protocol) -> None:
    """Two of four hooks rewrite; where nothing changes, the very same bytes come back."""
    world, asked, inside = opened(version, protocol)
    before = dict(world.twin.counters.packets)
    for hook, of, becomes in (
        (Hook.PREROUTING, asked, inside),
        (Hook.OUTPUT, inside.inverse(), inside.inverse()),
        (Hook.POSTROUTING, inside.inverse(), asked.inverse()),
    ):
        for flags, payload in (("A", b""), ("PA", b"odd"), ("PAU", b"even")):
            data = packet(of, flags=flags, payload=payload)
            translated = hot(world).translate(Stage.at(hook), data, world.now)
            assert translated == packet(becomes, flags=flags, payload=payload)
            assert (translated is data) is (of == becomes)
    assert world.twin.counters.packets == before, "it counts nothing by itself"
    (connection,) = world.twin.connections
    assert [connection.traffic(way)[0] for way in Direction] == [2 + 3, 1 + 3]


@versions
@protocols
def test_it_prolongs_the_connection(version: int, protocol: Protocol) -> None:
    world, asked, _ = opened(version, protocol)
    (connection,) = world.twin.connections
    hot(world).translate(Stage.DESTINATION, packet(asked, flags="A"), world.now + 77)
    assert connection.last_seen == world.now + 77


def layers(version: int, protocol: Protocol, **transport: object) -> Packet:
    """A packet of the open connection, as layers."""
    source, destination = ("10.0.0.1", "10.0.1.2") if version == 4 else ("fd00::1", "fd01::2")
    kind = TCP(sport=4000, dport=80, flags="A") if protocol is Protocol.TCP else UDP(sport=4000, dport=80)
    for name, value in transport.items():
        setattr(kind, name, value)
    network = IP if version == 4 else IPv6
    return network(src=source, dst=destination) / kind / b"data"


def with_options(version: int, protocol: Protocol) -> Packet:
    plain = layers(version, protocol)
    if version == 4:
        plain.options = [IPOption_NOP()] * 4
        return plain
    return IPv6(src=plain.src, dst=plain.dst) / IPv6ExtHdrDestOpt() / plain.payload


TCP4, UDP4, TCP6, UDP6 = ((version, protocol) for version in (4, 6) for protocol in Protocol)
LEFT = {
    **{f"flags {flags}": bytes(layers(*TCP4, flags=flags)) for flags in ("S", "SA", "FA", "R", "RA", "", "SFA", "PU")},
    **{f"flags {flags}, ipv6": bytes(layers(*TCP6, flags=flags)) for flags in ("S", "SA", "FA", "R", "RA", "", "SFA")},
    **{f"tcp offset {n}": bytes(layers(*TCP4, dataofs=n)) for n in (0, 4, 7)},
    **{f"tcp offset {n}, ipv6": bytes(layers(*TCP6, dataofs=n)) for n in (0, 4, 7)},
    **{f"udp length {n}": bytes(layers(*UDP4, len=n)) for n in (0, 7, 11, 13)},
    **{f"udp length {n}, ipv6": bytes(layers(*UDP6, len=n)) for n in (0, 7, 11, 13)},
    **{f"ip options, {each[1].name}": bytes(with_options(*each)) for each in (TCP4, UDP4)},
    **{f"extension header, {each[1].name}": bytes(with_options(*each)) for each in (TCP6, UDP6)},
    **{f"cut, {each[1].name} over {each[0]}": bytes(layers(*each))[:-1] for each in (TCP4, UDP4, TCP6, UDP6)},
    **{f"padded, {each[1].name} over {each[0]}": bytes(layers(*each)) + b"\0" for each in (TCP4, UDP4, TCP6, UDP6)},
    **{f"fragment, {each[1].name}": bytes(IP(bytes(layers(*each)), flags="MF")) for each in (TCP4, UDP4)},
    "version 5": b"\x55" + bytes(layers(*UDP4))[1:],
    "nothing": b"",
    "27 bytes": bytes(layers(*UDP4))[:27],
    "of no connection": bytes(layers(*UDP4, sport=4001)),
}


@pytest.mark.parametrize("data", LEFT.values(), ids=LEFT.keys())
def test_it_leaves_to_the_slow_path_what_is_not_plain(data: bytes) -> None:
    for version in (4, 6):
        for protocol in Protocol:
            world, _, _ = opened(version, protocol)
            for stage in Stage:
                assert hot(world).translate(stage, data, world.now) is None


@versions
def test_it_leaves_what_may_change_the_state(version: int) -> None:
    """Of TCP, all but what is established; of UDP, the first answer."""
    tcp = Dialogue()
    of = flow(endpoint("client", 4000, version), endpoint("server", 80, version))
    for way, flags in ((of, "S"), (of.inverse(), "SA")):
        tcp.send(Hook.PREROUTING, way, flags)
        assert hot(tcp).translate(Stage.DESTINATION, packet(way, flags="A"), 0.0) is None
    udp = Dialogue()
    asked = flow(of.source, of.destination, Protocol.UDP)
    udp.send(Hook.PREROUTING, asked)
    assert hot(udp).translate(Stage.DESTINATION, packet(asked), 0.0) is not None
    assert hot(udp).translate(Stage.DESTINATION, packet(asked.inverse()), 0.0) is None


@settings(max_examples=300)
@given(
    st.sampled_from([TCP4, UDP4, TCP6, UDP6]),
    st.sampled_from([Hook.PREROUTING, Hook.OUTPUT, Hook.POSTROUTING]),
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), max_size=3),
    st.integers(-3, 2),
)
def test_whatever_the_bytes_both_say_the_same(
    kind: tuple[int, Protocol], hook: Hook, changes: list[tuple[int, int]], longer: int
) -> None:
    """`Dialogue.put` compares."""
    world, asked, inside = opened(*kind)
    data = bytearray(packet(asked if hook is Hook.PREROUTING else inside.inverse(), flags="A", payload=b"data"))
    for at, value in changes:
        data[at % len(data)] = value
    world.put(hook, bytes(data[:longer] if longer < 0 else data + bytes(longer)))
