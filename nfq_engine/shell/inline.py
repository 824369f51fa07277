"""Datapath `inline`: every packet of every connection comes here and is rewritten here.

Owns: the queue's callback with its hot path, and the counts that it keeps apart. Place in the path: between the queue
and `core.pipeline.Engine`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from nfq_engine import wire
from nfq_engine.core.conntrack import Connection, Direction, Stage
from nfq_engine.core.decision import Decision, Reason, Verdict
from nfq_engine.core.packet import FlowTuple, Hook
from nfq_engine.core.pipeline import Engine
from nfq_engine.shell import divert
from nfq_engine.shell.datapath import Datapath
from nfq_engine.shell.forms import flow_form
from nfq_engine.shell.interfaces import HostInterfaces
from nfq_engine.shell.queue import QueuedPacket, SliceOver
from nfq_engine.shell.untouched import Untouched

_clock: Final = time.monotonic
_PASSED: Final = Decision(Verdict.ACCEPT, Reason.ESTABLISHED)
_STAGES: Final = tuple(int(Stage.at(hook)) for hook in Hook)


class InlineDatapath(Datapath):
    """The engine rewrites."""

    layout = divert.INLINE

    def __init__(self, engine: Engine, interfaces: HostInterfaces, mark: int) -> None:
        super().__init__(engine, interfaces, mark)
        self._engine = engine
        self._untouched = Untouched()
        engine.on_complete = self._untouched.add
        engine.on_delete = self._untouched.remove
        # Packets that the hot path decided, by hook: rewritten, and let through as they were.
        self._translated = [0] * len(Hook)
        self._passed = [0] * len(Hook)

    def callback(self) -> Callable[[QueuedPacket], None]:
        """The hot path, and the way out of it. A closure, as its names cost least to look up."""
        translate, decide, clock, stages = self._engine.hot.translate, self._decide, _clock, _STAGES
        all_translated, all_passed = self._translated, self._passed

        def handle(packet: QueuedPacket) -> None:
            data = packet.get_payload()
            hook = packet.hook
            translated = translate(stages[hook], data, self.slice_begin)
            if translated is None:
                decide(packet, data)
            elif translated is data:
                all_passed[hook] += 1
                if self.is_traced:
                    self._show(packet, Hook(hook), data, _PASSED)
                packet.accept()
            else:
                all_translated[hook] += 1
                if self.is_traced:
                    self._show(packet, Hook(hook), data, Decision(Verdict.ACCEPT, Reason.TRANSLATED, translated))
                packet.set_payload(translated)
                packet.accept()
            if clock() > self.slice_end:
                raise SliceOver

        return handle

    def release(self) -> None:
        """No packet is held back; what need not come again is told now, for all of them at once."""
        self._untouched.flush()

    def close(self) -> None:
        """Close the socket."""
        self._untouched.close()

    def settle(self) -> None:
        """Hand what was counted here to the engine's counters."""
        for reason, packets in ((Reason.TRANSLATED, self._translated), (Reason.ESTABLISHED, self._passed)):
            for number, amount in enumerate(packets):
                if amount:
                    self._engine.counters.count(Hook(number), reason, amount)
                    packets[number] = 0

    def tick(self, now: float) -> None:
        """Forget the connections whose time is over."""
        super().tick(now)
        self._engine.expire(now)

    def connections(self) -> list[wire.Message]:
        """The engine's own table."""
        now = _clock()
        return [_connection_form(connection, now) for connection in self._engine.connections]

    def connection_count(self) -> int:
        """How many are in the engine's own table."""
        return len(self._engine.connections)

    def original(self, inside: FlowTuple) -> FlowTuple | None:
        """From the engine's own table."""
        entry = self._engine.connections.find(Stage.DESTINATION, inside.inverse())
        if entry is None or entry.direction is not Direction.REPLY or not entry.connection.is_mapped:
            return None
        return entry.connection.original

    def connection_of(self, hook: Hook, flow: FlowTuple) -> Connection | None:
        """From the engine's own table."""
        entry = self._engine.connections.find(Stage.at(hook), flow)
        return entry.connection if entry is not None else None

    def _decide(self, packet: QueuedPacket, data: bytes) -> None:
        """The slow path."""
        if self._is_for_later(packet, data):
            return
        hook = Hook(packet.hook)
        try:
            decision = self._engine.decide(self._arrival(packet, hook, data))
        except Exception:
            decision = self._fault(hook, data)
            self._engine.counters.count(hook, decision.reason)
        self._show(packet, hook, data, decision)
        self._give(packet, hook, decision)


def _connection_form(connection: Connection, now: float) -> wire.Message:
    """A connection as JSON."""
    packets_original, bytes_original = connection.traffic(Direction.ORIGINAL)
    packets_reply, bytes_reply = connection.traffic(Direction.REPLY)
    return {
        "id": connection.identifier,
        "protocol": connection.original.protocol.name.lower(),
        "state": connection.state.value,
        "original": flow_form(connection.original),
        "inside": flow_form(connection.inside),
        "final": flow_form(connection.final),
        "reply": flow_form(connection.reply),
        "is_mapped": connection.is_mapped,
        "is_marked": connection.is_marked,
        "rule": connection.rule,
        "packets": {"original": packets_original, "reply": packets_reply},
        "bytes": {"original": bytes_original, "reply": bytes_reply},
        "age": round(now - connection.created, 3),
        "expires_in": round(connection.expires - now, 3),
    }
