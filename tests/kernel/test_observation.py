"""The rule of observation.py hides what it says, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from observation import Entry, Names, Observation, differences, observe
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from testbed.frames import Frame

pytestmark = pytest.mark.kernel

CLIENT, SERVER = "10.1.0.2", "10.2.0.2"
BLOCK = range(10_000, 10_040)
ENTRY = Entry("udp", (CLIENT, 10_002, SERVER, 10_000), (SERVER, 10_001, CLIENT, 10_002), "ASSURED")


def observed(*packets: Packet, entries: tuple[Entry, ...] = (), chosen_at: frozenset[str] = frozenset()) -> Observation:
    frames = [Frame("server:eth0", 0, bytes(Ether() / packet), outgoing=False) for packet in packets]
    return observe(frames, entries, Names(BLOCK, chosen_at))


def datagram(
    data: bytes = b"data", source: str = CLIENT, sport: int = 10_002, dport: int = 10_000, **ip: object
) -> Packet:
    return IP(src=source, dst=SERVER, **ip) / UDP(sport=sport, dport=dport) / Raw(data)


def segment(flags: str, seq: int, data: bytes = b"", **tcp: object) -> Packet:
    return IP(src=CLIENT, dst=SERVER) / TCP(sport=10_002, dport=10_000, flags=flags, seq=seq, **tcp) / Raw(data)


def with_wrong_checksum() -> Packet:
    whole = datagram()
    whole[UDP].chksum = 1
    return whole


SEEN = {
    "another source address": datagram(source="10.1.0.3"),
    "another source port": datagram(sport=10_003),
    "another port from outside the block": datagram(sport=40_000),
    "another destination port": datagram(dport=10_001),
    "other bytes": datagram(b"Data"),
    "fewer bytes": datagram(b"dat"),
    "another hop limit": datagram(ttl=63),
    "another traffic class": datagram(tos=4),
    "may not be cut": datagram(flags="DF"),
    "a wrong checksum": with_wrong_checksum(),
}


@pytest.mark.parametrize("other", SEEN.values(), ids=SEEN.keys())
def test_a_datagram_that_differs_is_seen(other: Packet) -> None:
    assert differences(observed(datagram()), observed(other), ("one", "other"))


def test_a_missing_and_a_doubled_datagram_are_seen() -> None:
    one = observed(datagram(b"1"), datagram(b"2"))
    assert differences(one, observed(datagram(b"1")), ("one", "other"))
    assert differences(one, observed(datagram(b"1"), datagram(b"2"), datagram(b"2")), ("one", "other"))
    assert differences(one, observed(datagram(b"2"), datagram(b"1")), ("one", "other"))


def test_fragments_count_as_what_they_make() -> None:
    whole = IP(src=CLIENT, dst=SERVER, id=9) / UDP(sport=10_002, dport=10_000) / Raw(b"x" * 3000)
    whole = IP(bytes(whole))
    parts = [IP(bytes(part)) for part in whole.fragment(1000)]
    assert not differences(observed(whole), observed(*reversed(parts)), ("one", "other"))
    assert differences(observed(whole), observed(*parts[1:]), ("one", "other"))


def test_a_port_that_nat_chose_is_the_same_whatever_it_is_but_not_for_two_connections() -> None:
    where = frozenset({CLIENT})
    one = observed(datagram(sport=40_000), datagram(sport=40_000), chosen_at=where)
    assert not differences(one, observed(*[datagram(sport=50_000)] * 2, chosen_at=where), ("one", "other"))
    assert differences(one, observed(datagram(sport=50_000), datagram(sport=50_001), chosen_at=where), ("one", "other"))
    assert differences(one, observed(*[datagram(sport=10_002)] * 2, chosen_at=where), ("one", "other"))


def test_segmentation_retransmission_and_sequence_numbers_are_hidden() -> None:
    one = observed(segment("S", 100), segment("PA", 101, b"hello"), segment("FA", 106))
    other = observed(
        segment("S", 7000),
        segment("A", 7001, b"he"),
        segment("A", 7001, b"he"),
        segment("A", 7003, b"llo"),
        segment("FA", 7006),
    )
    assert not differences(one, other, ("one", "other"))


STREAMS = {
    "other data": [segment("S", 100), segment("PA", 101, b"hallo"), segment("FA", 106)],
    "a hole": [segment("S", 100), segment("PA", 103, b"llo"), segment("FA", 106)],
    "no end": [segment("S", 100), segment("PA", 101, b"hello")],
    "a reset": [segment("S", 100), segment("PA", 101, b"hello"), segment("R", 106)],
    "another segment size": [
        segment("S", 100, options=[("MSS", 1000)]),
        segment("PA", 101, b"hello"),
        segment("FA", 106),
    ],
    "a second connection": [segment("S", 100), segment("PA", 101, b"hello"), segment("FA", 106), segment("S", 900)],
}


@pytest.mark.parametrize("other", STREAMS.values(), ids=STREAMS.keys())
def test_a_stream_that_differs_is_seen(other: list[Packet]) -> None:
    one = observed(segment("S", 100), segment("PA", 101, b"hello"), segment("FA", 106))
    assert differences(one, observed(*other), ("one", "other"))


def test_what_an_icmp_error_is_about_is_seen() -> None:
    def error(about: Packet) -> Packet:
        return IP(src=SERVER, dst=CLIENT) / ICMP(type=3, code=3) / about

    one = observed(error(datagram()))
    assert len(one) == 2, "the error concerns the scenario"
    assert differences(one, observed(error(datagram(dport=10_001))), ("one", "other"))
    assert differences(one, observed(error(datagram(source="10.1.0.3"))), ("one", "other"))


def test_what_belongs_to_an_earlier_scenario_is_left_out() -> None:
    assert observed(datagram(sport=9_999, dport=9_998)) == {"conntrack": ()}
    port_by_chance = Entry("udp", (CLIENT, 9_999, SERVER, 9_998), (SERVER, 9_998, "10.1.0.3", 10_028), "ASSURED")
    assert observed(entries=(port_by_chance,)) == {"conntrack": ()}


ENTRIES = {
    "another destination": replace(ENTRY, original=(CLIENT, 10_002, "10.2.0.3", 10_000)),
    "not translated": replace(ENTRY, reply=(SERVER, 10_000, CLIENT, 10_002)),
    "another state": replace(ENTRY, state="UNREPLIED"),
    "another protocol": replace(ENTRY, protocol="tcp", state="ESTABLISHED"),
}


@pytest.mark.parametrize("other", ENTRIES.values(), ids=ENTRIES.keys())
def test_a_conntrack_entry_that_differs_is_seen(other: Entry) -> None:
    assert differences(observed(entries=(ENTRY,)), observed(entries=(other,)), ("one", "other"))
    assert differences(observed(entries=(ENTRY,)), observed(), ("one", "other"))
