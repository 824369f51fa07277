"""What the demo claims, check by check.

Owns: the checks on what the demo's lab left. A check's docstring is the line that the demo prints; it yields what is
wrong. Pure: it reads what `Run` holds, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from testbed.checksums import checksum_errors
from testbed.frames import Frame, destination_of, endpoint, ip_of, source_of
from testbed.headers import TCP, UDP
from testbed.traffic import content

SIZE: Final = 1 << 20
FOREIGN: Final = {4: "198.51.100.7", 6: "2001:db8::7"}
DATAGRAMS: Final = 5
RELAY_PORT: Final = 50080


@dataclass(frozen=True, slots=True)
class Run:
    """What the lab left to be checked."""

    frames: list[Frame]
    fetched: dict[int, dict[str, Any]]
    asked: dict[int, dict[str, Any]]
    web_log: list[dict[str, Any]]
    gateway_sockets: set[tuple[str, int]]
    gateway_addresses: set[str]
    client: dict[int, str]
    server: dict[int, str]
    counters: dict[str, Any]
    connections: list[dict[str, Any]]
    rules_before: str
    rules_during: str
    rules_after: str

    def at(self, node: str, *protocols: int) -> list[Frame]:
        """The TCP or UDP frames at a node's interfaces."""
        return [
            frame
            for frame in self.frames
            if frame.point.startswith(f"{node}:") and frame.ip is not None and frame.ip.protocol in protocols
        ]


Check = Callable[[Run], Iterator[str]]
Conversation = tuple[str, int, frozenset[tuple[str, int | None]]]  # the point, the protocol, the two ends


def client_saw_only_the_server(run: Run) -> Iterator[str]:
    """the client only ever saw the server's address (and, for datagrams, the foreign one)"""
    allowed = {*run.server.values(), *FOREIGN.values()}
    for frame in run.at("client", TCP, UDP):
        peer = ip_of(frame).destination if frame.outgoing else ip_of(frame).source
        if peer not in allowed:
            yield f"{frame}"
    if not run.at("client", TCP):
        yield "no TCP was seen at the client"


def server_saw_the_client(run: Run) -> Iterator[str]:
    """the server only ever saw the client's address"""
    for frame in run.at("server", TCP):
        peer = ip_of(frame).destination if frame.outgoing else ip_of(frame).source
        if peer not in run.client.values():
            yield f"{frame}"
    peers = {line["peer"] for line in run.web_log if "peer" in line}
    if peers != set(run.client.values()):
        yield f"the web server's log names {sorted(peers)}, not {sorted(run.client.values())}"


def relay_has_local_addresses(run: Run) -> Iterator[str]:
    """the relay's sockets have local addresses (the kernel's socket tables, while it was working)"""
    inward = {address for address, port in run.gateway_sockets if port == RELAY_PORT}
    outward = {address for address, port in run.gateway_sockets if port != RELAY_PORT}
    for name, addresses in (("accepted", inward), ("outward", outward)):
        if not addresses:
            yield f"no {name} socket of the relay was seen"
        if strangers := addresses - run.gateway_addresses:
            yield f"{name} sockets have the addresses {sorted(strangers)}"


def bytes_are_identical(run: Run) -> Iterator[str]:
    """the bytes are identical: the file over IPv4 and IPv6, and every datagram"""
    right = hashlib.sha256(content(SIZE)).hexdigest()
    for version, result in run.fetched.items():
        if (result["sha256"], result["size"]) != (right, SIZE):
            yield f"IPv{version}: {result['size']} bytes with SHA-256 {result['sha256']}, not {SIZE} with {right}"
    for version, result in run.asked.items():
        if result["answered"] != DATAGRAMS or result["senders"] != [f"{FOREIGN[version]} 7"]:
            yield f"IPv{version}: {result}"


def every_packet_was_counted(run: Run) -> Iterator[str]:
    """the engine's counters agree with the captures, packet for packet"""
    seen = run.at("gateway", TCP, UDP)
    yield from wrong_hooks(run, Counter(frame.outgoing for frame in seen))
    for what, counted, frames in counts(run, seen):
        if counted != (captured := sizes(frames)):
            yield f"{what}: {counted} packets and bytes counted, {captured} captured"


def only_first_packets_were_counted(run: Run) -> Iterator[str]:
    """the engine saw of each connection what came before the first answer; conntrack's counters agree with captures"""
    seen = run.at("gateway", TCP, UDP)
    yield from wrong_hooks(run, Counter(frame.outgoing for frame in unanswered(seen)))
    for what, counted, frames in counts(run, seen):
        if counted != (captured := uncut(frames, counted[0])):
            yield f"{what}: {counted} packets and bytes counted, {captured} captured"


def wrong_hooks(run: Run, expected: Counter[bool]) -> Iterator[str]:
    """Where the engine's counters differ from the packets that left the gateway (True) and that arrived (False)."""
    # Everything that leaves the gateway is its own: it relays, it does not route.
    for hook, leaves in (("PREROUTING", False), ("OUTPUT", True), ("POSTROUTING", True)):
        counted = sum(run.counters["hooks"].get(hook, {}).values())
        if counted != expected[leaves]:
            yield f"{counted} packets at {hook}, {expected[leaves]} {'left' if leaves else 'arrived'}"
    queue = run.counters["queue"]
    if queue["dropped_full"] or queue["dropped_unread"]:
        yield f"the queue lost packets: {queue}"


def unanswered(frames: list[Frame]) -> Iterator[Frame]:
    """The packets of each connection before the first that went the other way: what conntrack calls new."""
    began: dict[Conversation, bool] = {}
    answered = set()
    for frame in frames:
        who = conversation(frame)
        if began.setdefault(who, frame.outgoing) is not frame.outgoing:
            answered.add(who)
        if who not in answered:
            yield frame


def conversation(frame: Frame) -> Conversation:
    """Which conversation a frame belongs to, in either direction."""
    packet = ip_of(frame)
    ends = frozenset([(packet.source, packet.source_port), (packet.destination, packet.destination_port)])
    return frame.point, packet.protocol, ends


def counts(run: Run, seen: list[Frame]) -> Iterator[tuple[str, tuple[int, int], list[Frame]]]:
    """Each direction of each connection: its name, packets and bytes counted for it, and its frames at the gateway."""
    flows: dict[tuple[bool, str], list[Frame]] = {}
    for frame in seen:
        flows.setdefault((frame.outgoing, ends_of(frame)), []).append(frame)
    for connection in run.connections:
        for direction, flow, outgoing in wire_of(connection, run.gateway_addresses):
            what = f"{direction} of {flow_text(flow)}"
            counted = connection["packets"][direction], connection["bytes"][direction]
            yield what, counted, flows.pop((outgoing, flow_text(flow)), [])
    for (_, ends), frames in flows.items():
        yield f"{ends}, not listed", (0, 0), frames


def sizes(frames: list[Frame]) -> tuple[int, int]:
    """How many packets frames carry, and how many bytes, from the IP header on."""
    layouts = [ip_of(frame).layout for frame in frames]
    return len(frames), sum(layout.end - layout.start for layout in layouts)


def uncut(frames: list[Frame], packets: int) -> tuple[int, int]:
    """Packets and bytes of frames that were at most `packets` packets when conntrack counted them.

    What the gateway's own TCP sends is cut into segments behind conntrack, and each further one repeats the header.
    """
    captured, size = sizes(frames)
    if packets >= captured or not frames[0].outgoing:
        return captured, size
    with_data = [ip_of(frame) for frame in frames if ip_of(frame).payload]
    headers = [packet.layout.end - packet.layout.start - len(packet.payload) for packet in with_data]
    return packets, size - (captured - packets) * max(headers, default=0)


def wire_of(connection: dict[str, Any], gateway: set[str]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """How a link shows each direction of a connection: its name, the flow, and whether that leaves the gateway."""
    original, final, reply = connection["original"], connection["final"], connection["reply"]
    if original["source"]["address"] in gateway:
        yield "original", final, True
        yield "reply", reply, False
    else:
        yield "original", original, False
        yield "reply", {"source": original["destination"], "destination": original["source"]}, True


def flow_text(flow: dict[str, Any]) -> str:
    """A flow of the engine's as the ladder writes it."""
    return " → ".join(endpoint(end["address"], end["port"]) for end in (flow["source"], flow["destination"]))


def ends_of(frame: Frame) -> str:
    """The same of the packet in a frame."""
    return f"{source_of(ip_of(frame))} → {destination_of(ip_of(frame))}"


def checksums_are_right(run: Run) -> Iterator[str]:
    """every checksum on every link is right"""
    for frame in run.frames:
        for error in checksum_errors(frame):
            yield f"{frame}: {error}"


def rules_are_untouched(run: Run) -> Iterator[str]:
    """nft list ruleset (without the engine's own table) and iptables-save are byte for byte what they were"""
    for name, text in (("while the engine ran", run.rules_during), ("after it ended", run.rules_after)):
        if text != run.rules_before:
            yield f"{name}:\n{text}\nbefore:\n{run.rules_before}"


def checks(datapath: str) -> tuple[Check, ...]:
    """The checks, in the order in which they are told; what the engine counts depends on its datapath."""
    return (
        client_saw_only_the_server,
        server_saw_the_client,
        relay_has_local_addresses,
        bytes_are_identical,
        every_packet_was_counted if datapath == "inline" else only_first_packets_were_counted,
        checksums_are_right,
        rules_are_untouched,
    )
