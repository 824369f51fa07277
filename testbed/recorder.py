"""The recorder of a lab: listens to its engines and to the ends of its programs, for the report.

Owns: the subscriptions (as `tproxyctl monitor` and `tproxyctl trace` have them), what they brought, a thread. Must not
know which packet an event is about (decisions.py).

An engine that tells of every packet is slower for it. So only labs are recorded of which a report is likely, and every
packet is told only at first: each subscription ends with its share of events. After that, packets that go by an earlier
decision are as fast as ever, and decisions are told for much longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
from dataclasses import dataclass, field
from typing import Any, Final

from nfq_engine import wire
from testbed.journal import Entry
from testbed.netns import Namespace

_PATIENCE: Final = 10.0  # seconds for an engine to answer
_READ: Final = 1 << 18
_TRACE: Final[wire.Message] = {"call": "trace", "arguments": []}
# What is asked of an engine, and how many events of it are wanted.
_WANTED: Final[tuple[tuple[wire.Message, int], ...]] = (
    ({"call": "monitor"}, 10_000),
    (_TRACE, 1_000),
    ({**_TRACE, "decisions": True}, 10_000),
)
_BARRIER: Final[wire.Message] = {"call": "counters"}  # answered when all events before it have been sent

Event = dict[str, Any]


@dataclass(eq=False, slots=True)
class _Subscription:
    """What one connection to an engine brought so far: events, as they came, and how many answers."""

    node: str
    connection: socket.socket
    room: int  # for so many events
    lines: list[bytes] = field(default_factory=list)
    answers: int = 0
    rest: bytes = b""
    is_over: bool = False
    is_full: bool = False

    def take(self, data: bytes) -> None:
        """What the engine sent."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if b'"event":' in line:
                self.lines.append(line)
            else:
                self.answers += 1
        self.is_full = len(self.lines) >= self.room


@dataclass(frozen=True, slots=True)
class Recording:
    """What the engines told so far, each event with its node, in the order in which it came.

    `cut`: the nodes whose engines had more to tell than was recorded.
    """

    events: tuple[tuple[str, Event], ...] = ()
    cut: frozenset[str] = frozenset()


class Recorder:
    """Listens until it is closed."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._subscriptions: list[_Subscription] = []
        self._news = threading.Condition()
        self._waking, self._wake = socket.socketpair()
        self._selector.register(self._waking, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._listen, name="lab recorder", daemon=True)
        self._thread.start()

    def attach(self, node: str, namespace: Namespace) -> None:
        """Listen to the engine of a node from now on; OSError when there is none."""
        for request, room in _WANTED:
            connection = namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(_PATIENCE)
            try:
                connection.connect(wire.ADDRESS)
                connection.sendall(wire.encode(request))
                subscription = _Subscription(node, connection, room)
                while not subscription.answers:
                    if not (data := connection.recv(_READ)):
                        raise ConnectionResetError("the engine closed the connection")
                    subscription.take(data)
            except BaseException:
                connection.close()
                raise
            self._subscriptions.append(subscription)
            self._selector.register(connection, selectors.EVENT_READ, subscription)

    def watch(self, entry: Entry) -> None:
        """Notice the end of an entry's program when it comes."""
        assert entry.program is not None
        # Not reaped before we are asked to stop it, so the pid is no other's.
        self._selector.register(os.pidfd_open(entry.program.pid), selectors.EVENT_READ, entry)

    def recording(self) -> Recording:
        """All that the engines had to tell when this was called."""
        self._settle()
        with self._news:
            # A decision comes twice, in the same words, as long as all packets are told.
            told = dict.fromkeys((each.node, line) for each in self._subscriptions for line in each.lines)
            cut = {each.node for each in self._subscriptions if each.is_full}
        events = [(node, json.loads(line)) for node, line in told]
        cut |= {node for node, event in events if event["event"] == "lost"}
        timed = [(node, event) for node, event in events if "time" in event]
        return Recording(tuple(sorted(timed, key=lambda each: each[1]["time"])), frozenset(cut))

    def close(self) -> None:
        """Stop listening. What was recorded stays."""
        if not self._thread.is_alive():
            return
        self._wake.close()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            self._forget(key)
        self._selector.close()

    def _settle(self) -> None:
        """Wait until what the engines have told has been read; one that does not answer is not waited for."""
        with self._news:
            open_ = [each for each in self._subscriptions if not each.is_over]
            wanted = {id(each): each.answers + 1 for each in open_}
            for each in open_:
                with contextlib.suppress(OSError):
                    each.connection.send(wire.encode(_BARRIER))
            self._news.wait_for(
                lambda: all(each.is_over or each.answers >= wanted[id(each)] for each in open_), _PATIENCE
            )

    def _listen(self) -> None:
        """The thread."""
        while True:
            for key, _ in self._selector.select():
                match key.data:
                    case None:
                        return
                    case Entry() as entry:
                        with contextlib.suppress(ChildProcessError):  # reaped right now by who stops it, and says so
                            entry.look()
                        self._forget(key)
                    case _Subscription() as subscription:
                        self._read(key, subscription)

    def _read(self, key: selectors.SelectorKey, subscription: _Subscription) -> None:
        try:
            data = subscription.connection.recv(_READ)
        except OSError:
            data = b""
        with self._news:
            subscription.take(data)
            if not data or subscription.is_full:
                subscription.is_over = True
                self._forget(key)
            self._news.notify_all()

    def _forget(self, key: selectors.SelectorKey) -> None:
        """Listen to one thing no more, and close it."""
        self._selector.unregister(key.fileobj)
        match key.data:
            case None:
                self._waking.close()
            case Entry():
                os.close(key.fd)
            case _Subscription() as subscription:
                subscription.connection.close()
