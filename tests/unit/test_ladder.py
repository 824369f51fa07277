"""How a connection is drawn, and what is left out."""

from __future__ import annotations

import re

import pytest
from rich.text import Text
from scapy.layers.inet import ICMP, TCP, UDP, IPerror
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet
from scenes import CLIENT, GATEWAY_IN, GATEWAY_OUT, POINTS, ROUTED, SENT, SERVER, Scene, ip, talk

from testbed.connections import connections
from testbed.ladder import ladder
from testbed.trace import trace


def drawing(scene: Scene, width: int = 120, points: tuple[str, ...] = POINTS) -> Text:
    (connection,) = connections(trace(scene.frames))
    return ladder(connection, points, width)


def lines_of(scene: Scene, width: int = 120) -> list[str]:
    return [line.rstrip() for line in drawing(scene, width).plain.splitlines()]


def rows_of(scene: Scene) -> list[str]:
    """The packets' lines without their times."""
    return [line[10:] for line in lines_of(scene) if re.match(r" *(\d+\.\d{3}|⋮) ", line)]


def test_a_ladder_shows_each_packet_and_what_changed_at_each_hop() -> None:
    scene = Scene()
    talk(scene, (CLIENT, 1, 2), (GATEWAY_IN, 1, 2), (GATEWAY_OUT, 3, 2), (SERVER, 3, 2))
    assert (
        lines_of(scene, width=136)
        == """\
tcp 10.0.0.1:4000 → 10.0.0.2:80: 4 packets
  10.0.0.1:4000 → 10.0.0.2:80  at client:eth0, gateway:eth0
  10.0.0.3:4000 → 10.0.0.2:80  at gateway:eth1, server:eth0
      ms  packet                        client                  gateway                 gateway                 server
                                        eth0                    eth0                    eth1                    eth0
   0.000  → SYN                         ●──────────────────────▶●┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄▶①──────────────────────▶●
                                                                                        ① src 10.0.0.1→10.0.0.3
   0.040  ← SYN ACK                     ●◀──────────────────────②◀┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄●◀──────────────────────●
                                                                ② dst 10.0.0.3→10.0.0.1
   0.080  → PSH ACK 1:6                 ●──────────────────────▶●┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄▶①──────────────────────▶●
   0.120  ← RST                         ●◀──────────────────────②◀┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄●◀──────────────────────●
""".splitlines()
    )


def test_two_legs_stand_side_by_side() -> None:
    scene = Scene()
    first = (CLIENT, 1, 2), (GATEWAY_IN, 1, 2)
    scene.open(*first, port=4000)
    talk(scene, (GATEWAY_OUT, 1, 2), (SERVER, 1, 2), port=5000, seq=7000)
    scene.reset(*first, port=4000)
    assert lines_of(scene)[:3] == [
        "tcp 10.0.0.1:4000 → 10.0.0.2:80: 7 packets in 2 legs",
        "  A 10.0.0.1:4000 → 10.0.0.2:80  at client:eth0, gateway:eth0",
        "  B 10.0.0.1:5000 → 10.0.0.2:80  at gateway:eth1, server:eth0",
    ]
    assert rows_of(scene) == [
        "A → SYN                         ●─────────────────▶●",
        "A ← SYN ACK                     ●◀─────────────────●",
        "B → SYN                                                               ●─────────────────▶●",
        "B ← SYN ACK                                                           ●◀─────────────────●",
        "B → PSH ACK 1:6                                                       ●─────────────────▶●",
        "B ← RST                                                               ●◀─────────────────●",
        "A ← RST                         ●◀─────────────────●",
    ]


def test_a_packet_that_did_not_go_as_far_as_others_and_its_repetition_are_marked() -> None:
    scene = Scene()
    way = (CLIENT, 1, 2), (GATEWAY_IN, 1, 2), (GATEWAY_OUT, 1, 2), (SERVER, 1, 2)
    scene.open(*way)
    data = ip(1, 2, SENT) / TCP(sport=4000, dport=80, seq=1, ack=501, flags="PA") / b"lost"
    scene.go(*((point, data) for point in (CLIENT, GATEWAY_IN)))
    scene.wait(milliseconds=200)
    again = data.copy()
    again[TCP].options = [("Timestamp", (200, 0))]
    scene.go(*((point, again) for point, _, _ in way))
    assert rows_of(scene)[2:] == [
        "→ PSH ACK 1:5                 ●──────────────────▶✗",
        "→ PSH ACK 1:5 again           ●──────────────────▶●┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄▶●──────────────────▶●",
    ]


def test_what_was_lost_is_marked_although_most_were() -> None:
    scene = Scene()
    datagram = ip(1, 2, SENT) / UDP(sport=4000, dport=9)
    for number in range(5):
        data = datagram / bytes([number])
        scene.go(*((point, data) for point in ((CLIENT, SERVER) if number == 4 else (CLIENT,))))
    assert [row[-3:].count("✗") for row in rows_of(scene)] == [1, 1, 1, 1, 0]


def test_what_was_dropped_inside_is_marked_although_nobody_looked_at_the_far_end() -> None:
    scene = Scene()
    for number in range(10):
        data = ip(1, 2, SENT) / UDP(sport=4000, dport=9) / bytes([number])
        scene.go(*((point, data) for point in (CLIENT, GATEWAY_IN, GATEWAY_OUT)[: 2 if number == 9 else 3]))
    assert [row.count("✗") for row in rows_of(scene)[-1:]] == [1]


def test_what_only_carries_on_is_counted_and_what_is_special_is_shown() -> None:
    scene = Scene()
    way = (CLIENT, 1, 2), (SERVER, 1, 2)
    scene.open(*way)
    for number in range(20):
        scene.send(*way, seq=1 + 100 * number, payload=bytes(100))
        scene.acknowledge(*way, ack=101 + 100 * number)
    scene.reset(*way)
    assert [row[:44].rstrip() for row in rows_of(scene)] == [
        "→ SYN                         ●─────────────",
        "← SYN ACK                     ●◀────────────",
        "→ PSH ACK 1:101               ●─────────────",
        "← ACK ack 101                 ●◀────────────",
        "⋮ 38 more like these          → 19 with 1,90",
        "← RST                         ●◀────────────",
    ]
    assert "→ 19 with 1,900 bytes   ← 19" in drawing(scene).plain


def test_a_wrong_checksum_is_written_below_its_point() -> None:
    scene = Scene()
    right, wrong = ip(1, 2, SENT) / UDP(sport=1, dport=2), ip(1, 2, ROUTED) / UDP(sport=1, dport=2, chksum=1)
    scene.go((CLIENT, right), (GATEWAY_IN, right), (GATEWAY_OUT, wrong))
    assert [line.strip() for line in lines_of(scene, width=140)[-2:]] == ["UDP checksum is 0x0001, should", "be 0xebd8"]


def test_of_many_packets_that_all_show_something_the_first_and_the_last_are_drawn() -> None:
    scene = Scene()
    for number in range(300):
        wrong = ip(1, 2, SENT) / UDP(sport=1, dport=2, chksum=1) / f"{number}"
        scene.go((CLIENT, wrong), (GATEWAY_IN, wrong))
    rows = rows_of(scene)
    assert len(rows) == 121
    assert [row.strip() for row in rows if "⋮" in row] == ["⋮ 180 lines are not shown"]


def test_a_segment_in_pieces_says_so() -> None:
    scene = Scene()
    way = (CLIENT, 1, 2), (GATEWAY_OUT, 1, 2)
    scene.open(*way)
    scene.send((CLIENT, 1, 2), seq=1, payload=bytes(range(200)))
    for begin in (0, 100):
        segment = TCP(sport=4000, dport=80, flags="PA", seq=1 + begin, ack=501) / bytes(range(begin, begin + 100))
        scene.see(GATEWAY_OUT, ip(1, 2, ROUTED) / segment, outgoing=True)
    assert lines_of(scene)[-1].strip() == "① in 2 pieces"


LONG = (
    "2001:db8:aaaa:bbbb:cccc:dddd:eeee:1",
    "2001:db8:aaaa:bbbb:cccc:dddd:eeee:2",
    "2001:db8:ffff:ffff:ffff:ffff:ffff:3",
)


@pytest.mark.parametrize("width", [120, 140, 160])
@pytest.mark.parametrize("amount", [4, 5, 6])
def test_no_line_is_wider_than_asked_with_the_longest_addresses_and_many_points(width: int, amount: int) -> None:
    points = tuple(f"node-{number}:eth{number % 2}" for number in range(amount))
    scene = Scene()
    for number, point in enumerate(points):
        source = LONG[0] if number < 2 else LONG[2]
        packet: Packet = IPv6(src=source, dst=LONG[1], hlim=64 - number) / UDP(sport=4000 + number, dport=65000) / b"x"
        scene.see(point, packet, outgoing=number % 2 == 0)
    lines = drawing(scene, width, points).plain.splitlines()
    grid = next(number for number, line in enumerate(lines) if "packet" in line and " ms " in line)
    assert max(len(line) for line in lines[grid:]) <= width
    assert sum("→" in line for line in lines) >= amount


def test_with_more_points_than_fit_those_without_changes_are_left_out() -> None:
    points = tuple(f"node{number}:eth0" for number in range(20))
    scene = Scene()
    for number, point in enumerate(points):
        scene.see(point, ip(1 if number < 11 else 3, 2, 64) / UDP(dport=9), outgoing=number % 2 == 0)
    lines = drawing(scene, 120, points).plain.splitlines()
    assert "14 points are not shown, for want of room" in lines
    head = next(line for line in lines if line.lstrip().startswith("ms")).split()
    assert [name for name in ("node0", "node11", "node19") if name in head] == ["node0", "node11", "node19"]


def test_colours_are_styles_and_not_characters() -> None:
    scene = Scene()
    talk(scene, (CLIENT, 1, 2), (SERVER, 1, 2))
    assert "\x1b" not in drawing(scene).plain
    assert drawing(scene).spans


def test_an_icmp_error_goes_back_to_its_cause() -> None:
    scene = Scene()
    datagram = ip(1, 2, SENT) / UDP(sport=4000, dport=9)
    scene.go((CLIENT, datagram), (SERVER, datagram))
    message = ip(2, 1, SENT) / ICMP(type=3, code=3) / IPerror(bytes(datagram))
    scene.go((SERVER, message), (CLIENT, message))
    assert [row.split("●")[0].strip() for row in rows_of(scene)] == ["→ 0 bytes", "← port unreachable"]


def test_what_happened_twice_at_one_point_is_all_written_below_it() -> None:
    scene = Scene()
    wrong = UDP(sport=4000, dport=9, chksum=1) / b"x"
    scene.see(CLIENT, ip(1, 2, SENT) / wrong, outgoing=True)
    scene.see(GATEWAY_IN, ip(1, 2, SENT) / wrong, outgoing=False)
    scene.see(GATEWAY_IN, ip(3, 2, ROUTED) / wrong, outgoing=True)
    text = "\n".join(lines_of(scene))
    assert text.count("UDP checksum") == 3
    assert "① src 10.0.0.1→10.0.0.3" in text


@pytest.mark.parametrize("width", [0, 20, 40, 41, 60])
def test_a_terminal_that_is_too_narrow_gets_a_ladder_with_two_points(width: int) -> None:
    scene = Scene()
    talk(scene, (CLIENT, 1, 2), (GATEWAY_IN, 1, 2), (GATEWAY_OUT, 3, 2), (SERVER, 3, 2))
    assert "2 points are not shown, for want of room" in lines_of(scene, width)
