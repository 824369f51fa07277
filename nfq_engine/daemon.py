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
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, assert_never

import click

from nfq_engine import wire
from nfq_engine.cli_help import epilog
from nfq_engine.core.kernel_engine import KernelEngine
from nfq_engine.core.nat import PortRange
from nfq_engine.core.pipeline import Engine
from nfq_engine.core.rule_text import RuleError, restore
from nfq_engine.core.tproxy_table import Deletion
from nfq_engine.shell import divert, sockets
from nfq_engine.shell.answers import Answers
from nfq_engine.shell.control import Caller, Client, ControlSocket
from nfq_engine.shell.ctnetlink import KernelConntrack
from nfq_engine.shell.datapath import Datapath
from nfq_engine.shell.inline import InlineDatapath
from nfq_engine.shell.interfaces import HostInterfaces, local_port_range
from nfq_engine.shell.kernel_nat import KernelDatapath
from nfq_engine.shell.queue import PacketQueue

log: Final = logging.getLogger("tproxyd")

_SLICE: Final = 0.005  # seconds of packets between two looks at everything else
# Seconds after an answer in which the loop looks again and again instead of sleeping: who was answered asks again, and
# to be woken takes longer than to answer. Not where there is but one processor, which the asker needs.
_MOMENT: Final = 0.0001 if len(os.sched_getaffinity(0)) > 1 else 0.0
_TICK: Final = 1.0  # seconds between two looks at the timeouts


class DatapathKind(StrEnum):
    """Who rewrites."""

    INLINE = "inline"
    KERNEL = "kernel"


@dataclass(frozen=True, slots=True)
class Settings:
    """How an engine is to run; tproxyd's options tell what each means."""

    datapath: DatapathKind
    deletion: Deletion
    queue: int
    queue_length: int
    mark: int
    fail_open: bool
    ruleset: str


def _make_datapath(settings: Settings, interfaces: HostInterfaces) -> Datapath:
    """The engine, and what carries out its decisions."""
    chance, ports = random.SystemRandom(), PortRange(*local_port_range())
    match settings.datapath:
        case DatapathKind.INLINE:
            return InlineDatapath(Engine(interfaces, chance, ports, settings.deletion), interfaces, settings.mark)
        case DatapathKind.KERNEL:
            conntrack = KernelConntrack(settings.mark)
            engine = KernelEngine(interfaces, chance, ports, conntrack, settings.deletion)
            engine.adopt()
            return KernelDatapath(engine, interfaces, conntrack, settings.mark)
        case _:
            assert_never(settings.datapath)


class Daemon:
    """One engine in the current network namespace, from `__init__` to `close`."""

    def __init__(self, settings: Settings) -> None:
        """Take the namespace: control socket first, as there must not be two engines; table last, as it diverts."""
        self._selector = selectors.DefaultSelector()
        self._control = ControlSocket(self._answer)
        self._interfaces = HostInterfaces()
        self._datapath = _make_datapath(settings, self._interfaces)
        restore(settings.ruleset, self._datapath.table.ruleset)
        self._destroyed = sockets.DestroyedSockets()
        self._answers = Answers(self._datapath, self._settle, self._status)
        self._queue = PacketQueue(
            settings.queue, self._datapath.callback(), length=settings.queue_length, fail_open=settings.fail_open
        )
        self._datapath.handle_whole = self._queue.handle_whole
        self._datapath.owner = self._queue.owner
        self._wake, self._signals = socket.socketpair()
        self._is_stopping = False
        self._answered = 0.0  # when the last request was
        self._hear_signals()  # before there is a table that would stay behind
        self._watch(self._interfaces, self._interfaces.forget)
        self._watch(self._destroyed, self._settle)
        self._watch(self._control, self._accept)
        self._watch(self._wake, self._stop)
        self._watch(self._queue, self._drain)
        for source, act in self._datapath.sources:
            self._watch(source, act)
        rule = divert.build(self._datapath.layout, settings.queue, settings.mark, fail_open=settings.fail_open)
        self._adjust()
        self.description = f"{settings.datapath} by {rule}"

    def run(self) -> None:
        """Work until SIGTERM or SIGINT."""
        now = time.monotonic()
        next_tick = now + _TICK
        while not self._is_stopping:
            waiting = [client for client in self._control.clients if client.has_work]
            is_awake = bool(waiting) or now < self._answered + _MOMENT
            ready = self._selector.select(0.0 if is_awake else max(0.0, next_tick - now))
            for key, _ in ready:
                key.data()
            if is_awake and not ready:
                os.sched_yield()  # to an asker on the same processor
            for client in waiting:
                self._serve(client)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + _TICK
                self._datapath.tick(now)
                self._destroyed.listen(wanted=self._has_sockets)
            self._adjust()

    def close(self) -> None:
        """Give the namespace back: no new packets, then what is queued, then everything else."""
        divert.remove()
        self._queue.close()
        self._datapath.close()
        self._control.close()
        self._destroyed.close()
        self._interfaces.close()
        self._selector.close()

    def _hear_signals(self) -> None:
        """Let SIGTERM and SIGINT end `run`."""
        self._signals.setblocking(False)
        signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def _watch(self, source: Any, act: Callable[[], object]) -> None:
        self._selector.register(source, selectors.EVENT_READ, act)

    def _drain(self) -> None:
        self._datapath.slice_begin = time.monotonic()
        self._datapath.slice_end = self._datapath.slice_begin + _SLICE
        self._queue.drain()
        self._datapath.release()

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
            key = self._selector.get_key(client)
            if key.events != events:
                self._selector.modify(client, events, key.data)
        else:
            self._selector.unregister(client)
            self._control.drop(client)
            self._answers.publisher.forget(client.caller)

    def _answer(self, caller: Caller, request: wire.Message, descriptor: int | None) -> wire.Message:
        """Answer a request; what it changed is in effect before the caller is told."""
        reply = self._answers(caller, request, descriptor)
        self._adjust()
        self._answered = time.monotonic()
        return reply

    def _adjust(self) -> None:
        """Let the kernel know what sockrefs and rules want now."""
        if self._has_sockets:
            self._destroyed.listen(wanted=True)
        if self._datapath.table.ruleset.looks_at_owners:
            self._queue.name_owners()
        self._datapath.adjust()

    @property
    def _has_sockets(self) -> bool:
        """Does the table know of any, so that news of closed ones is wanted?"""
        return bool(self._datapath.table.sockrefs or self._datapath.table.listeners)

    def _settle(self) -> None:
        """Take in all news, so that an answer is right now; connections first, as a closed socket deletes its own."""
        self._datapath.settle()
        self._forget_closed()

    def _forget_closed(self) -> None:
        """Unassign the sockets that were closed."""
        closed = self._destroyed.read()
        if closed is None:
            log.warning("news of closed sockets was lost: asking for all that live")
            alive = sockets.living()
            table = self._datapath.table
            known = {cookie for sockref in table.sockrefs for cookie in sockref.cookies}
            closed = (known | {listener.cookie for listener in table.listeners}) - alive
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
            "datapath": self.description,
        }


def _read_ruleset(path: Path | None) -> str:
    try:
        return path.read_text() if path is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"cannot read the ruleset {path}: {error}") from error


@click.command(
    epilog=epilog(
        "tproxyd",
        "",
        "--datapath kernel --ruleset rules.txt",
        "--queue-num 100 --fail-open",
        codes="0 ended by SIGTERM or SIGINT; 1 could not start (stderr says why); 2 wrong options.",
    )
)
@click.option(
    "--datapath",
    type=click.Choice([kind.value for kind in DatapathKind]),
    default=DatapathKind.INLINE.value,
    show_default=True,
    help="Who rewrites: inline, the engine, every packet; kernel, the kernel's NAT, after the engine saw the first.",
)
@click.option(
    "--deletion",
    type=click.Choice([way.value for way in Deletion]),
    default=Deletion.LINKED.value,
    show_default=True,
    help="How a sockref's connections are found to be deleted: on its list, or by a walk through all there are.",
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
    type=click.IntRange(0, 0xFFFE),
    default=11274,
    show_default=True,
    help="The NFQUEUE to use; the next one is used as well, for large packets.",
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
    deletion: str,
    ruleset: Path | None,
    mark: int,
    queue_num: int,
    queue_length: int,
    fail_open: bool,
    notify_fd: int | None,
) -> None:
    """Run the tproxy engine in the network namespace that this is started in, until SIGTERM."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    settings = Settings(
        datapath=DatapathKind(datapath),
        deletion=Deletion(deletion),
        queue=queue_num,
        queue_length=queue_length,
        mark=mark,
        fail_open=fail_open,
        ruleset=_read_ruleset(ruleset),
    )
    try:
        daemon = Daemon(settings)
    except (OSError, divert.DivertError, RuleError) as error:
        raise click.ClickException(f"tproxyd cannot start: {error}") from error
    try:
        log.info("ready: datapath %s, queue %d, mark %#x", daemon.description, queue_num, mark)
        if notify_fd is not None:
            os.write(notify_fd, b"\n")
            os.close(notify_fd)
        daemon.run()
    finally:
        daemon.close()
    log.info("ended")


if __name__ == "__main__":
    main()
