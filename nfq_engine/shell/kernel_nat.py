"""Datapath `kernel`: first packets come here, mappings go into the table's maps, the kernel's NAT does the rest.

Owns: the queue's callback, the elements of the maps, the reports of conntrack. Must not decide anything
(`core.kernel_engine`). Place in the path: between the queue and the engine.

A packet whose connection is to be mapped is held back until its element is in a map (divert.py tells which), and only
then accepted: it goes on from our filter chain to our nat chain within that call, and finds the element. All packets of
one turn share one transaction. An element has done its work when its packet was accepted, so the next transaction takes
it out again; the timeout of the maps is for those of an engine that was killed. What cannot be put in is dropped and
counted: no packet goes on untranslated. What a rule redirects at PREROUTING mostly finds an element that others have
used before it (redirects.py), and is not held back, or does not come here at all (answered.py).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from nfq_engine import wire
from nfq_engine.core.conntrack import Connection, Stage
from nfq_engine.core.decision import Decision, Reason, Verdict
from nfq_engine.core.events import Event, unobserved
from nfq_engine.core.kernel_engine import FirstDecision, KernelEngine, Mapping
from nfq_engine.core.packet import Endpoint, FlowTuple, Hook, Protocol
from nfq_engine.core.tracked import Tracked, Traffic
from nfq_engine.shell import divert
from nfq_engine.shell.answered import Answered
from nfq_engine.shell.ctnetlink import ConntrackNews, KernelConntrack
from nfq_engine.shell.datapath import Datapath, Source, log
from nfq_engine.shell.forms import flow_form
from nfq_engine.shell.interfaces import HostInterfaces
from nfq_engine.shell.narrowing import Diversion, endpoint_key, protocol_key
from nfq_engine.shell.nftables import Element, NftSocket
from nfq_engine.shell.queue import QueuedPacket, SliceOver
from nfq_engine.shell.redirects import Key, Redirects, elements, key_of

_REASONS: Final = {errno.ENFILE: Reason.MAP_FULL}

_COUNTING: Final = 0.01  # how much of the time may go into counting connections, for whoever asks again and again
_PAIR4: Final = 2 * (4 + 4)  # bytes of two IPv4 endpoints in a key

_Held = tuple[QueuedPacket, Hook, bytes, Decision, Mapping, Key | None]  # the key: its element is for others as well


class KernelDatapath(Datapath):
    """The kernel's NAT rewrites."""

    layout = divert.KERNEL

    def __init__(self, engine: KernelEngine, interfaces: HostInterfaces, conntrack: KernelConntrack, mark: int) -> None:
        super().__init__(engine, interfaces, mark)
        self._engine = engine
        self._conntrack = conntrack
        self._news = ConntrackNews(mark)
        self._nft = NftSocket(divert.TABLE)
        self._held: list[_Held] = []
        self._spent: dict[str, list[bytes]] = {}  # keys by map, put in for packets that have been released
        self._answered = Answered(self._nft, partial(engine.counters.count, Hook.PREROUTING, Reason.REDIRECT))
        self._redirects = Redirects(self._nft, self._answered)
        self._chains: object = engine.ruleset.chains  # that the elements for redirects come of
        self._diversion = Diversion(engine, self._nft)
        self._tracked: set[bytes] = set()  # what the sets `tracked` have
        self._gone: set[bytes] = set()  # what they are to lose
        self._count = 0
        self._next_count = 0.0
        engine.on_forget = self._forget
        interfaces.on_change = self._forget_answers

    def callback(self) -> Callable[[QueuedPacket], None]:
        """Decide on a first packet; give its verdict now, or when its mapping is in place."""
        return self._handle

    def release(self) -> None:
        """Put the mappings of all packets that are held into place, and let the packets go."""
        held, self._held = self._held, []
        if not held:
            return
        failure = self._put(held)
        for each in held:
            packet, hook, data, decision, mapping, _ = each
            # One that is refused takes all of its transaction with it, so each gets another try by itself.
            problem = self._put([each]) if failure and len(held) > 1 else failure
            if problem:
                decision = Decision(
                    Verdict.DROP, _REASONS.get(problem, Reason.MAP_REFUSED), detail=f"{mapping.flow} to {mapping.to}"
                )
            self._engine.counters.count(hook, decision.reason)
            self._show(packet, hook, data, decision, mapping.after)
            self._give(packet, hook, decision)
        self._redirects.release()

    @property
    def sources(self) -> Iterable[tuple[Source, Callable[[], object]]]:
        """Conntrack's reports."""
        return ((self._news, self._read_news),)

    def settle(self) -> None:
        """Read conntrack's reports."""
        self._read_news()

    def collect(self) -> None:
        """Read what the kernel has counted where it answered."""
        self._answered.collect()

    def take_over(self) -> None:
        """Have the kernel answer nothing, which tells what it has counted; what comes meanwhile waits in the queue."""
        self._answered.withdraw()

    def adjust(self) -> None:
        """Divert what sockrefs and rules could want now."""
        if self._gone:
            self._untrack()
        self._news.listen(wanted=self._engine.awaits_reports or self._engine.observe is not unobserved)
        if self._engine.ruleset.chains is not self._chains:
            self._chains = self._engine.ruleset.chains
            self._redirects.clear()
        if self.is_traced:
            self._answered.withdraw()
        now = time.monotonic()
        self._redirects.adjust(now)  # first, as what is answered has to outlive nothing that it relies on
        self._answered.adjust(now)
        if self._answered:
            self._clear()  # nobody sees to it that a packet which is answered does not find what another one left
        self._diversion.adjust()

    def tick(self, now: float) -> None:
        """Forget decisions that came to nothing, and take the last elements out."""
        super().tick(now)
        self._engine.expire(now)
        self._clear()

    def close(self) -> None:
        """Close the sockets."""
        self._news.close()
        self._nft.close()
        self._conntrack.close()

    def connections(self) -> list[wire.Message]:
        """The kernel's conntrack entries that carry our mark."""
        return [self._form(entry) for entry in self._conntrack.ours()]

    def connection_count(self) -> int:
        """How many entries carry our mark, counted anew as seldom as it must be: the kernel walks its whole table."""
        begin = time.monotonic()
        if begin >= self._next_count:
            self._count = len(self._conntrack.ours())
            end = time.monotonic()
            self._next_count = end + (end - begin) / _COUNTING
        return self._count

    def original(self, inside: FlowTuple) -> FlowTuple | None:
        """From the kernel's conntrack."""
        reply = inside.inverse()
        entry = self._conntrack.find(reply)
        if entry is None or entry.reply != reply or not entry.is_mapped or not entry.mark & self._mark:
            return None
        return entry.original

    def connection_of(self, hook: Hook, flow: FlowTuple) -> Connection | None:
        """From the decisions whose connections conntrack has not reported yet."""
        return self._engine.waiting(Stage.at(hook), flow)

    def _handle(self, packet: QueuedPacket) -> None:
        data = packet.get_payload()
        if not self._pass_known(packet, data):
            self._decide(packet, data)
        if time.monotonic() > self.slice_end:
            raise SliceOver

    def _pass_known(self, packet: QueuedPacket, data: bytes) -> bool:
        """Let a packet go whose like has been redirected before, if the map leads it there already."""
        if packet.hook != Hook.PREROUTING or self.is_traced:
            return False
        known = self._engine.recall(self._interfaces.name(packet.indev), data)
        if known is None:
            return False
        if self._spent or not self._redirects.lead(key_of(packet.indev, Protocol.TCP, known.destination), known.to):
            return False
        if known.is_for_all:
            self._answered.propose(packet.indev, known)
        known.count(len(data))
        self._engine.counters.count(Hook.PREROUTING, Reason.REDIRECT)
        packet.set_mark(packet.get_mark() | self._mark)
        packet.accept()
        return True

    def _decide(self, packet: QueuedPacket, data: bytes) -> None:
        if self._is_for_later(packet, data):
            return
        hook = Hook(packet.hook)
        try:
            first = self._engine.decide(self._arrival(packet, hook, data))
        except Exception:
            first = FirstDecision(self._fault(hook, data))
        if first.mapping is not None:
            self._map(packet, hook, data, first.decision, first.mapping)
        else:
            self._leave(packet, hook, data, first)

    def _map(self, packet: QueuedPacket, hook: Hook, data: bytes, decision: Decision, mapping: Mapping) -> None:
        """Hold a packet back until its mapping is in place, unless it is already."""
        key = None
        is_redirect = decision.reason is Reason.REDIRECT and hook is Hook.PREROUTING
        if is_redirect and not self._is_kept_from_one_way(mapping):
            key = key_of(packet.indev, mapping.flow.protocol, mapping.flow.destination)
            if self._redirects.lead(key, mapping.to):
                self._clear()  # or the packet would find what another one with its tuple left
                self._engine.counters.count(hook, decision.reason)
                self._show(packet, hook, data, decision, mapping.after)
                self._give(packet, hook, decision)
                return
            if not self._redirects.claim(key, mapping.to):
                key = None
        self._held.append((packet, hook, data, decision, mapping, key))

    def _leave(self, packet: QueuedPacket, hook: Hook, data: bytes, first: FirstDecision) -> None:
        """Let a packet go that is not to be mapped, and see to it that the nat chain finds nothing for it."""
        decision = first.decision
        if first.flow is not None and (decision.is_marked or packet.get_mark() & self._mark):
            if self._is_spent(first.flow):
                self._clear()
            key = key_of(packet.indev, first.flow.protocol, first.flow.destination)
            if hook is Hook.PREROUTING and not self._redirects.keep_away(key):
                decision = Decision(Verdict.DROP, Reason.MAP_REFUSED, detail=f"{first.flow} as it is")
        self._engine.counters.count(hook, decision.reason)
        self._show(packet, hook, data, decision)
        self._give(packet, hook, decision)
        if first.of is not None and first.flow is not None:
            self._track(first.flow)

    def _read_news(self) -> None:
        reports, is_complete = self._news.read()
        for report in reports:
            if report.is_new:
                self._engine.appeared(report.entry)
                self._engine.observe(Event.NEW, report.entry)
                if report.entry.is_mapped:
                    self._engine.observe(Event.MAPPED, report.entry)
            else:
                self._engine.observe(Event.DELETED, report.entry)
                self._engine.went(report.entry)
        if not is_complete:
            log.warning("reports of conntrack were lost: comparing with all that it has")
            self._engine.resynchronise()

    def _forget_answers(self) -> None:
        """What rules said was about other interfaces."""
        self._engine.known.clear()
        self._answered.outdate()

    # The maps.

    def _put(self, held: Sequence[_Held]) -> int:
        """Put mappings in, in the place of those that have done their work; 0, or the errno of the refusal."""
        added: dict[str, dict[bytes, bytes]] = {}
        redirects: dict[Key, Endpoint] = {}
        tracked: set[bytes] = set()
        for *_, mapping, key in held:
            if key is not None:
                redirects[key] = mapping.to
            else:
                added.setdefault(_map_of(mapping), {})[_key(mapping.flow)] = endpoint_key(mapping.to)
            if self._is_kept_from_one_way(mapping):
                tracked.add(_pair(mapping.flow))
        wanted: dict[str, Iterable[Element]] = {name: inside.items() for name, inside in added.items()}
        wanted |= elements(redirects) | _by_version("tracked", tracked)
        in_the_way = self._redirects.in_the_way(redirects)
        if in_the_way and not self._answered.withdraw():
            return errno.EBUSY
        if problem := self._change(wanted, in_the_way):
            self._redirects.are_refused(redirects)
            return problem
        self._redirects.are_put(redirects)
        self._spent = {name: list(inside) for name, inside in added.items()}
        self._tracked |= tracked
        return 0

    def _change(self, added: dict[str, Iterable[Element]], removed: dict[str, list[bytes]]) -> int:
        """Change the maps, and take out what has done its work; 0, or the errno of the refusal."""
        try:
            self._nft.change(added, removed | self._spent)
        except OSError as error:
            if not self._spent or error.errno == errno.ETIMEDOUT:
                return error.errno or errno.EIO
            # Perhaps only what was to be taken out has timed out meanwhile.
            try:
                self._nft.change(added, removed)
            except OSError as second:
                return second.errno or errno.EIO
        return 0

    def _is_spent(self, flow: FlowTuple) -> bool:
        """Is there still an element for this tuple?"""
        return bool(self._spent) and any(_key(flow) in keys for keys in self._spent.values())

    def _clear(self) -> None:
        """Take the last elements out while nothing else is put in."""
        spent, self._spent = self._spent, {}
        if spent:
            try:
                self._nft.change({}, spent)
            except OSError as error:
                log.info("elements were gone before they were taken out: %s", error.strerror)

    # Connections to one-way endpoints (divert.py).

    def _is_kept_from_one_way(self, mapping: Mapping) -> bool:
        """Would the connection's packets be taken for datagrams of a one-way listener?"""
        flow = mapping.flow
        is_datagram = flow.protocol is Protocol.UDP and mapping.stage is Stage.DESTINATION
        return is_datagram and self._diversion.is_one_way(flow.destination)

    def _track(self, flow: FlowTuple) -> None:
        """Let further datagrams of a connection pass without a look."""
        pair = _pair(flow)
        if pair in self._tracked:
            return
        try:
            self._nft.change(_by_version("tracked", [pair]))
        except OSError as error:
            log.info("datagrams of %s come to the queue one by one: %s", flow, error.strerror)
        else:
            self._tracked.add(pair)

    def _forget(self, connection: Connection) -> None:
        if self._tracked:
            pairs = {_pair(connection.original), _pair(connection.final.inverse())}
            self._gone |= pairs & self._tracked

    def _untrack(self) -> None:
        """Let the packets of connections that have gone be taken for datagrams again."""
        gone, self._gone = self._gone, set()
        self._tracked -= gone
        try:
            self._nft.change(
                {}, {name: [key for key, _ in pairs] for name, pairs in _by_version("tracked", gone).items()}
            )
        except OSError as error:
            log.error("connections could not be taken out of the sets `tracked`: %s", error.strerror)

    # The listing.

    def _form(self, entry: Tracked) -> wire.Message:
        """An entry as JSON, in the shape of the inline datapath's connections."""
        original, reply = entry.original_traffic, entry.reply_traffic
        return {
            "id": entry.identifier,
            "protocol": entry.original.protocol.name.lower(),
            "state": entry.state.value,
            "original": flow_form(entry.original),
            "inside": flow_form(entry.inside),
            "final": flow_form(entry.final),
            "reply": flow_form(entry.reply),
            "is_mapped": entry.is_mapped,
            "is_marked": True,
            "rule": "" if self._engine.sockrefs_of(entry) or not entry.is_mapped else "TPROXY",
            "packets": {"original": _packets(original), "reply": _packets(reply)},
            "bytes": {"original": _bytes(original), "reply": _bytes(reply)},
            "age": None,
            "expires_in": entry.expires_in,
        }


def _packets(traffic: Traffic | None) -> int | None:
    return traffic.packets if traffic is not None else None


def _bytes(traffic: Traffic | None) -> int | None:
    return traffic.bytes if traffic is not None else None


def _map_of(mapping: Mapping) -> str:
    """The map that a mapping belongs to."""
    version = 4 if len(mapping.to.address) == 4 else 6
    match mapping.stage:
        case Stage.DESTINATION:
            return f"destination{version}"
        case Stage.SOURCE:
            return f"source{version}"


def _pair(flow: FlowTuple) -> bytes:
    """Source and destination, as the key of the sets `tracked`."""
    return endpoint_key(flow.source) + endpoint_key(flow.destination)


def _key(flow: FlowTuple) -> bytes:
    """A tuple as the key of the maps: protocol, source, destination."""
    return protocol_key(flow.protocol) + _pair(flow)


def _by_version(name: str, pairs: Iterable[bytes]) -> dict[str, list[Element]]:
    """Keys of two endpoints as elements of the sets for their families."""
    elements: dict[str, list[Element]] = {}
    for pair in pairs:
        version = 4 if len(pair) == _PAIR4 else 6
        elements.setdefault(f"{name}{version}", []).append((pair, b""))
    return elements
