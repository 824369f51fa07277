"""tproxyd: joins the shell to the engine.

Owns: the order of starting and stopping, and the one loop. One thread does everything: packets, control requests,
closed sockets, timeouts; so no state is ever shared, and a decision is never out of date.
"""

from __future__ import annotations

import logging
import os
import random
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from nfq_engine import wire
from nfq_engine.core.conntrack import Stage
from nfq_engine.core.decision import Decision, Reason, Verdict
from nfq_engine.core.nat import PortRange
from nfq_engine.core.packet import Hook, claimed_length
from nfq_engine.core.pipeline import Arrival, Engine
from nfq_engine.core.rule_text import RuleError, restore
from nfq_engine.shell import divert, sockets
from nfq_engine.shell.answers import Answers
from nfq_engine.shell.control import Client, ControlSocket
from nfq_engine.shell.interfaces import HostInterfaces, local_port_range
from nfq_engine.shell.queue import CUT, LARGEST_COPY, PacketQueue, QueuedPacket, SliceOver

log: Final = logging.getLogger("tproxyd")

_SLICE: Final = 0.005  # seconds of packets between two looks at everything else
_TICK: Final = 1.0  # seconds between two looks at the timeouts
_DROPS_LOGGED: Final = 20  # a tick, so that a flood of bad packets is no flood of lines

_STAGES: Final = tuple(int(Stage.at(hook)) for hook in Hook)


class PacketHandler:
    """Gives each queued packet its verdict."""

    def __init__(self, engine: Engine, interfaces: HostInterfaces, mark: int) -> None:
        self._engine = engine
        self._interfaces = interfaces
        self._mark = mark
        # Packets that the hot path decided, by hook: rewritten, and let through as they were.
        self._translated = [0] * len(Hook)
        self._passed = [0] * len(Hook)
        self._drops_to_log = _DROPS_LOGGED
        self.slice_end = 0.0  # when to leave the rest of the queue for later
        self.handle_whole: Callable[[QueuedPacket], None] = lambda packet: packet.drop()

    def callback(self) -> Callable[[QueuedPacket], None]:
        """The queue's callback: the hot path, and the way out of it. A closure, as its names cost least to look up."""
        translate, decide, clock, stages = self._engine.hot.translate, self._decide, time.monotonic, _STAGES
        all_translated, all_passed = self._translated, self._passed

        def handle(packet: QueuedPacket) -> None:
            data = packet.get_payload()
            hook = packet.hook
            now = clock()
            translated = translate(stages[hook], data, now)
            if translated is None:
                decide(packet, data)
            elif translated is data:
                all_passed[hook] += 1
                packet.accept()
            else:
                all_translated[hook] += 1
                packet.set_payload(translated)
                packet.accept()
            if now > self.slice_end:
                raise SliceOver

        return handle

    def flush_counts(self) -> None:
        """Hand what was counted here to the engine's counters."""
        for hook in Hook:
            self._engine.counters.count(hook, Reason.TRANSLATED, self._translated[hook])
            self._engine.counters.count(hook, Reason.ESTABLISHED, self._passed[hook])
            self._translated[hook] = self._passed[hook] = 0

    def tick(self) -> None:
        """Allow the next drops to be logged."""
        if self._drops_to_log < 0:
            log.warning("%d more drops were not logged", -self._drops_to_log)
        self._drops_to_log = _DROPS_LOGGED

    def _decide(self, packet: QueuedPacket, data: bytes) -> None:
        """The slow path; an error of ours, whatever it is, drops the packet and is counted: none may get stuck."""
        if len(data) == CUT and claimed_length(data) > CUT:
            self.handle_whole(packet)
            return
        hook = Hook(packet.hook)
        try:
            decision = self._decision(packet, hook, data)
        except Exception:
            log.exception("a packet at %s was dropped: %s", hook.name, data[:64].hex())
            decision = Decision(Verdict.DROP, Reason.FAULT)
            self._engine.counters.count(hook, Reason.FAULT)
        if decision.verdict is Verdict.DROP:
            self._log_drop(hook, decision)
            packet.drop()
            return
        if decision.is_marked:
            packet.set_mark(packet.get_mark() | self._mark)
        if decision.payload is not None:
            packet.set_payload(decision.payload)
        packet.accept()

    def _decision(self, packet: QueuedPacket, hook: Hook, data: bytes) -> Decision:
        missing = claimed_length(data) - len(data) if len(data) >= LARGEST_COPY else 0
        arrival = Arrival(
            hook=hook,
            data=data + bytes(missing) if missing > 0 else data,
            in_interface=self._interfaces.name(packet.indev),
            out_interface=self._interfaces.name(packet.outdev),
            now=time.monotonic(),
            mark=packet.get_mark(),
            is_cut=missing > 0,
        )
        return self._engine.decide(arrival)

    def _log_drop(self, hook: Hook, decision: Decision) -> None:
        self._drops_to_log -= 1
        if self._drops_to_log >= 0:
            log.warning("dropped at %s: %s: %s", hook.name, decision.reason.value, decision.detail)


class Daemon:
    """One engine in the current network namespace, from `__init__` to `close`."""

    def __init__(self, *, queue: int, queue_length: int, mark: int, fail_open: bool, ruleset: str) -> None:
        """Take the namespace: control socket first, as there must not be two engines; table last, as it diverts."""
        self._selector = selectors.DefaultSelector()
        self._interfaces = HostInterfaces()
        ports = PortRange(*local_port_range())
        self.engine = Engine(self._interfaces, random.SystemRandom(), ports)
        restore(ruleset, self.engine.ruleset)
        self._handler = PacketHandler(self.engine, self._interfaces, mark)
        self._destroyed = sockets.DestroyedSockets()
        self._answers = Answers(self.engine, self._settle, self._status)
        self._control = ControlSocket(self._answers)
        self._queue = PacketQueue(queue, self._handler.callback(), length=queue_length, fail_open=fail_open)
        self._handler.handle_whole = self._queue.handle_whole
        self._wake, self._signals = socket.socketpair()
        self._is_stopping = False
        self._watch(self._interfaces, self._interfaces.forget)
        self._watch(self._destroyed, self._forget_closed)
        self._watch(self._control, self._accept)
        self._watch(self._wake, self._stop)
        self._watch(self._queue, self._drain)
        self.datapath = divert.build(queue, mark, fail_open=fail_open)

    def run(self) -> None:
        """Work until SIGTERM or SIGINT."""
        self._signals.setblocking(False)
        signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        next_tick = time.monotonic() + _TICK
        while not self._is_stopping:
            waiting = [client for client in self._control.clients if client.has_request]
            timeout = 0.0 if waiting else max(0.0, next_tick - time.monotonic())
            for key, _ in self._selector.select(timeout):
                key.data()
            for client in waiting:
                self._serve(client)
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + _TICK
                self.engine.expire(time.monotonic())
                self._handler.tick()

    def close(self) -> None:
        """Give the namespace back: no new packets, then what is queued, then everything else."""
        divert.remove()
        self._queue.close()
        self._control.close()
        self._destroyed.close()
        self._interfaces.close()
        self._selector.close()

    def _watch(self, source: Any, act: Callable[[], object]) -> None:
        self._selector.register(source, selectors.EVENT_READ, act)

    def _drain(self) -> None:
        self._handler.slice_end = time.monotonic() + _SLICE
        self._queue.drain()

    def _stop(self) -> None:
        self._is_stopping = True

    def _accept(self) -> None:
        client = self._control.accept()
        if client is not None:
            self._watch(client, lambda: self._serve(client))

    def _serve(self, client: Client) -> None:
        """Serve one client, and wait for what it needs next: a request, or room for its reply."""
        if client not in self._control.clients:
            return
        if client.serve():
            events = selectors.EVENT_WRITE if client.wants_to_write else selectors.EVENT_READ
            self._selector.modify(client, events, lambda: self._serve(client))
        else:
            self._selector.unregister(client)
            self._control.drop(client)

    def _settle(self) -> None:
        """Take in all news, so that an answer is right now."""
        self._forget_closed()
        self._handler.flush_counts()

    def _forget_closed(self) -> None:
        """Unassign the sockets that were closed."""
        closed = self._destroyed.read()
        if closed is None:
            log.warning("news of closed sockets was lost: asking for all that live")
            alive = sockets.living()
            closed = {cookie for sockref in self.engine.sockrefs for cookie in sockref.cookies} - alive
        for cookie in closed:
            self._answers.socket_api.closed(cookie)

    def _status(self) -> wire.Message:
        status = self._queue.status()
        return {
            "queue": {
                "waiting": status.waiting,
                "dropped_full": status.dropped_full,
                "dropped_unread": status.dropped_unread,
            },
            "datapath": self.datapath,
        }


def _read_ruleset(path: Path | None) -> str:
    try:
        return path.read_text() if path is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"cannot read the ruleset {path}: {error}") from error


@click.command(epilog="Exit codes: 0 ended by SIGTERM or SIGINT, 1 could not start (stderr says why), 2 wrong options.")
@click.option(
    "--datapath",
    type=click.Choice(["inline"]),
    default="inline",
    show_default=True,
    help="Who rewrites: inline, the engine.",
)
@click.option(
    "--ruleset",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Rules to begin with, iptables-save text.",
)
@click.option(
    "--mark",
    type=click.IntRange(1, 0xFFFFFFFF),
    default=0x80000000,
    help="The mark bit of tproxied connections.  [default: 0x80000000]",
)
@click.option(
    "--queue-num",
    type=click.IntRange(0, 0xFFFF),
    default=11274,
    show_default=True,
    help="The NFQUEUE to use.",
)
@click.option(
    "--queue-length",
    type=click.IntRange(1, 1 << 20),
    default=8192,
    show_default=True,
    help="How many packets it holds.",
)
@click.option(
    "--fail-open",
    is_flag=True,
    help="When the queue is full or the engine dead, let packets pass untranslated instead of dropping them.",
)
@click.option(
    "--notify-fd",
    type=click.IntRange(min=3),
    help="Write a newline to this descriptor when ready, then close it.",
)
def main(
    datapath: str,
    ruleset: Path | None,
    mark: int,
    queue_num: int,
    queue_length: int,
    fail_open: bool,
    notify_fd: int | None,
) -> None:
    """Run the tproxy engine in the network namespace that this is started in, until SIGTERM."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    text = _read_ruleset(ruleset)
    try:
        daemon = Daemon(queue=queue_num, queue_length=queue_length, mark=mark, fail_open=fail_open, ruleset=text)
    except (OSError, divert.DivertError, RuleError) as error:
        raise click.ClickException(f"tproxyd cannot start: {error}") from error
    try:
        log.info("ready: datapath %s by %s, queue %d, mark %#x", datapath, daemon.datapath, queue_num, mark)
        if notify_fd is not None:
            os.write(notify_fd, b"\n")
            os.close(notify_fd)
        daemon.run()
    finally:
        daemon.close()
    log.info("ended")


if __name__ == "__main__":
    main()
