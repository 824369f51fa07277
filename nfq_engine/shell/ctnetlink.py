"""The kernel's conntrack over netlink: look-ups, dumps, deletions, and the news of new and gone entries.

Owns: the messages of ctnetlink (linux/netfilter/nfnetlink_conntrack.h). Must not know sockrefs or why anything is
asked. Only what carries the tproxy mark is of interest: dumps are filtered by the kernel, news by a socket filter, so
that the connections of everybody else cost nothing here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nfq_engine.core.conntrack import State
from nfq_engine.core.packet import Endpoint, FlowTuple, Protocol
from nfq_engine.core.tracked import Tracked, Traffic
from nfq_engine.shell.netlink import (
    BODY_AT,
    DONE,
    DUMP,
    ERROR,
    LARGEST_READ,
    REQUEST,
    attribute,
    attributes,
    error_of,
    listen,
    message,
    messages,
    nested,
    open_socket,
    refused,
)

_NEW: Final = 1 << 8 | 0  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW
_GET: Final = 1 << 8 | 1
_DELETE: Final = 1 << 8 | 2
_GROUPS: Final = (1, 3)  # NFNLGRP_CONNTRACK_NEW, NFNLGRP_CONNTRACK_DESTROY
_EVENTS: Final = Path("/proc/sys/net/netfilter/nf_conntrack_events")

# enum ctattr_type and those below it
_TUPLE_ORIGINAL, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT, _MARK = 1, 2, 3, 4, 7, 8
_COUNTERS_ORIGINAL, _COUNTERS_REPLY, _ID, _MARK_MASK = 9, 10, 12, 21
_IP, _PROTO = 1, 2
_SOURCE, _DESTINATION = 1, 2  # CTA_IP_V4_SRC and _DST; those of IPv6 are two more
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_PROTOINFO_TCP, _TCP_STATE = 1, 1
_PACKETS, _BYTES = 1, 2

# linux/netfilter/nf_conntrack_common.h
_IPS_SEEN_REPLY: Final = 1 << 1
_IPS_ASSURED: Final = 1 << 2

# enum tcp_conntrack (linux/netfilter/nf_conntrack_tcp.h)
_TCP_STATES: Final = (
    State.NONE,
    State.SYN_SENT,
    State.SYN_RECV,
    State.ESTABLISHED,
    State.FIN_WAIT,
    State.CLOSE_WAIT,
    State.LAST_ACK,
    State.TIME_WAIT,
    State.CLOSE,
    State.SYN_SENT2,
)

_NEWS_BUFFER: Final = 8 << 20
_SO_RCVBUFFORCE: Final = 33
_SO_ATTACH_FILTER: Final = 26
_PATIENCE: Final = struct.pack("@ll", 5, 0)  # struct timeval: for an answer that the kernel gives at once
_DELETIONS: Final = 256  # in one go, so that the errors fit into the receive buffer

_Range = tuple[int, int]
_U32: Final = struct.Struct("!I")


def tuple_attribute(kind: int, flow: FlowTuple) -> bytes:
    """CTA_TUPLE_ORIG or CTA_TUPLE_REPLY."""
    further = 0 if len(flow.source.address) == 4 else 2
    return nested(
        kind,
        nested(
            _IP,
            attribute(_SOURCE + further, flow.source.address),
            attribute(_DESTINATION + further, flow.destination.address),
        ),
        nested(
            _PROTO,
            attribute(_NUMBER, bytes((flow.protocol,))),
            attribute(_SOURCE_PORT, flow.source.port.to_bytes(2, "big")),
            attribute(_DESTINATION_PORT, flow.destination.port.to_bytes(2, "big")),
        ),
    )


def _family(flow: FlowTuple) -> int:
    return socket.AF_INET if len(flow.source.address) == 4 else socket.AF_INET6


def _number(data: bytes, where: _Range | None) -> int:
    """A number of four bytes; 0 when it is not there."""
    return int.from_bytes(data[where[0] : where[1]], "big") if where is not None else 0


def _flow(data: bytes, where: _Range) -> FlowTuple | None:
    """A tuple attribute; None when it is neither TCP nor UDP."""
    inner = attributes(data, *where)
    proto = attributes(data, *inner[_PROTO])
    number = data[proto[_NUMBER][0]]
    if number not in (Protocol.TCP, Protocol.UDP):
        return None
    ip = attributes(data, *inner[_IP])
    further = 0 if _SOURCE in ip else 2
    source, destination = ip[_SOURCE + further], ip[_DESTINATION + further]
    return FlowTuple(
        Protocol(number),
        Endpoint(data[source[0] : source[1]], _number(data, proto[_SOURCE_PORT])),
        Endpoint(data[destination[0] : destination[1]], _number(data, proto[_DESTINATION_PORT])),
    )


def _state(data: bytes, found: dict[int, _Range], protocol: Protocol) -> State:
    if protocol is Protocol.UDP:
        return State.ASSURED if _number(data, found.get(_STATUS)) & _IPS_ASSURED else State.UNREPLIED
    if _PROTOINFO in found:
        tcp = attributes(data, *attributes(data, *found[_PROTOINFO])[_PROTOINFO_TCP])
        if _TCP_STATE in tcp:
            return _TCP_STATES[data[tcp[_TCP_STATE][0]]]
    return State.NONE


def _traffic(data: bytes, where: _Range | None) -> Traffic | None:
    if where is None:
        return None
    counters = attributes(data, *where)
    return Traffic(_number(data, counters.get(_PACKETS)), _number(data, counters.get(_BYTES)))


def parse_entry(data: bytes, at: int, end: int) -> Tracked | None:
    """The entry in a message between two offsets; None when it is neither TCP nor UDP."""
    found = attributes(data, at + BODY_AT, end)
    original = _flow(data, found[_TUPLE_ORIGINAL])
    reply = _flow(data, found[_TUPLE_REPLY])
    if original is None or reply is None:
        return None
    return Tracked(
        original=original,
        reply=reply,
        identifier=_number(data, found.get(_ID)),
        mark=_number(data, found.get(_MARK)),
        state=_state(data, found, original.protocol),
        expires_in=_number(data, found.get(_TIMEOUT)),
        is_replied=bool(_number(data, found.get(_STATUS)) & _IPS_SEEN_REPLY),
        original_traffic=_traffic(data, found.get(_COUNTERS_ORIGINAL)),
        reply_traffic=_traffic(data, found.get(_COUNTERS_REPLY)),
    )


class KernelConntrack:
    """Asks and changes the conntrack of the network namespace that this was made in; a `core.tracked.Conntrack`."""

    def __init__(self, mark: int) -> None:
        self._mark = mark
        self._asking = open_socket()
        # Not `settimeout`, which would have every call wait with poll first.
        self._asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
        self._sequence = itertools.count(1)

    def find(self, flow: FlowTuple) -> Tracked | None:
        """The entry that packets with this tuple belong to, whichever direction of it they are."""
        sequence = next(self._sequence)
        self._asking.send(message(_GET, REQUEST, _family(flow), 0, tuple_attribute(_TUPLE_ORIGINAL, flow), sequence))
        for data, kind, at, end in self._answers(sequence):
            if kind == _NEW:
                return parse_entry(data, at, end)
            if kind == ERROR:
                if error_of(data, at) == errno.ENOENT:
                    return None
                raise refused(error_of(data, at))
        return None

    def delete(self, doomed: Iterable[Tracked]) -> None:
        """Delete entries; those that have gone by themselves are no error."""
        waiting = list(doomed)
        while waiting:
            batch, waiting = waiting[:_DELETIONS], waiting[_DELETIONS:]
            last = next(self._sequence)
            self._asking.send(b"".join(_deletion(entry, last) for entry in batch))
            self._drain()

    def ours(self, naming: bytes = b"") -> list[Tracked]:
        """The entries that carry the tproxy mark; with `naming`, only those with these address bytes in them."""
        mark, sequence = _U32.pack(self._mark), next(self._sequence)
        body = attribute(_MARK, mark) + attribute(_MARK_MASK, mark)
        self._asking.send(message(_GET, REQUEST | DUMP, socket.AF_UNSPEC, 0, body, sequence))
        found = []
        for data, kind, at, end in self._answers(sequence):
            if kind == ERROR:
                raise refused(error_of(data, at))
            if kind == _NEW and (not naming or naming in data[at:end]):
                entry = parse_entry(data, at, end)
                if entry is not None and entry.mark & self._mark == self._mark:
                    found.append(entry)
        return found

    def close(self) -> None:
        """Close the socket."""
        self._asking.close()

    def _answers(self, sequence: int) -> Iterator[tuple[bytes, int, int, int]]:
        """The messages that answer a request, to the last; those of an earlier one that failed are passed over."""
        while True:
            data = self._asking.recv(LARGEST_READ)
            for kind, answered, at, end in messages(data):
                if answered != sequence:
                    continue
                if kind == DONE:
                    return
                yield data, kind, at, end

    def _drain(self) -> None:
        """Read the errors that deletions left: the entries had gone (ENOENT), or were replaced (another id)."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._asking.recv(LARGEST_READ, socket.MSG_DONTWAIT)


def _deletion(entry: Tracked, sequence: int) -> bytes:
    body = tuple_attribute(_TUPLE_ORIGINAL, entry.original) + attribute(_ID, _U32.pack(entry.identifier))
    return message(_DELETE, REQUEST, _family(entry.original), 0, body, sequence)


@dataclass(frozen=True, slots=True)
class Report:
    """Conntrack has a new entry, or has deleted one."""

    entry: Tracked
    is_new: bool


class ConntrackNews:
    """The reports of new and gone entries that carry the tproxy mark, while somebody wants them (`listen`)."""

    def __init__(self, mark: int) -> None:
        """OSError(EOPNOTSUPP) when conntrack is told to report nothing."""
        if _EVENTS.exists() and _EVENTS.read_text().strip() == "0":
            raise OSError(errno.EOPNOTSUPP, f"conntrack reports nothing: {_EVENTS} is 0, set it to 1 or 2")
        self._news = open_socket()
        self._news.setblocking(False)
        try:
            self._news.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _NEWS_BUFFER)
        except PermissionError:  # a user namespace may not
            self._news.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NEWS_BUFFER)
        _attach_mark_filter(self._news, mark)
        self._is_listening = False

    def fileno(self) -> int:
        """The descriptor that becomes readable when there is news."""
        return self._news.fileno()

    def listen(self, *, wanted: bool) -> None:
        """Get the reports of what happens from now on, or none any more.

        Where nobody listens, conntrack does not even write them (net.netfilter.nf_conntrack_events = 2).
        """
        if wanted is not self._is_listening:
            listen(self._news, _GROUPS, wanted=wanted)
            self._is_listening = wanted

    def read(self) -> tuple[list[Report], bool]:
        """The reports since the last call, in order, and whether that is all of them: else compare with conntrack."""
        reports: list[Report] = []
        is_complete = True
        while True:
            try:
                data = self._news.recv(LARGEST_READ)
            except BlockingIOError:
                return reports, is_complete
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                is_complete = False
                continue
            for kind, _, at, end in messages(data):
                entry = parse_entry(data, at, end) if kind in (_NEW, _DELETE) else None
                if entry is not None:
                    reports.append(Report(entry, is_new=kind == _NEW))

    def close(self) -> None:
        """Stop listening."""
        self._news.close()


def _attach_mark_filter(target: socket.socket, mark: int) -> None:
    """Let the kernel deliver only messages whose CTA_MARK has all bits of `mark` (linux/filter.h, classic BPF)."""
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x00, 0, 0, BODY_AT),  # A = where the attributes begin
            (0x01, 0, 0, _MARK),  # X = the attribute to find
            (0x20, 0, 0, 0xFFFFF000 + 12),  # A = where it is (SKF_AD_OFF + SKF_AD_NLATTR), 0 if nowhere
            (0x15, 4, 0, 0),  # nowhere: refuse
            (0x07, 0, 0, 0),  # X = A
            (0x40, 0, 0, 4),  # A = the value behind the attribute's header
            (0x54, 0, 0, mark),  # A &= mark
            (0x15, 1, 0, mark),  # all of it: accept
            (0x06, 0, 0, 0),  # refuse
            (0x06, 0, 0, 0xFFFFFFFF),  # accept
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, and a pointer to them
    target.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    )
