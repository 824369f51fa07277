"""The user-space stage: carries the frames of impaired links from one veth pair to another.

Owns: the packet sockets, the clock and the frames under way, in a namespace of the testbed's own between the nodes.
Must not choose what becomes of a frame: impair_model.py does. Run by impair.py; ends with the lab. What it does to the
frames of a direction can be changed meanwhile, by datagrams to a socket that only this namespace has.

Every frame that comes is whole: one segment, its checksum done, since the nodes' ends have no offload (plan.py).
"""

from __future__ import annotations

import contextlib
import heapq
import json
import mmap
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Final

from testbed.impair_model import COUNTERS, Departure, Direction
from testbed.topology import Impairment

RECORD: Final = struct.Struct(f"={len(COUNTERS)}Q")  # the counters of a direction in the shared file
CONTROL: Final = "\0testbed-impairments"  # where changes come; an abstract name is of one network namespace (unix(7))
_DONE: Final = b"done"
_ETH_P_ALL: Final = 3
_ETH_P_8021Q: Final = 0x8100
_SO_RCVBUFFORCE: Final = 33
_SO_TIMESTAMPNS: Final = 35
_TIMESTAMP: Final = struct.Struct("@2l")  # struct timespec
_SOL_PACKET: Final = 263
_PACKET_STATISTICS: Final = 6
_PACKET_AUXDATA: Final = 8
_PACKET_IGNORE_OUTGOING: Final = 23
_AUXDATA: Final = struct.Struct("=3I2H2H")  # linux/if_packet.h, struct tpacket_auxdata: status first, TCI and TPID last
_STATUS_VLAN: Final = 1 << 4
_STATUS_VLAN_TYPE: Final = 1 << 6
_CONTROL: Final = socket.CMSG_SPACE(_AUXDATA.size) + socket.CMSG_SPACE(_TIMESTAMP.size)
_BUFFER: Final = 4 << 20
_LARGEST: Final = 1 << 17
_BURST: Final = 64  # frames read before those that are due are sent


class _Lane:
    """One direction: where its frames come in, where they go out."""

    def __init__(self, direction: Direction, source: socket.socket, target: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.target = target


def _open(interface: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    except PermissionError:  # rootless
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    opened.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
    opened.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)  # what we send must not take its room
    opened.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    opened.bind((interface, _ETH_P_ALL))
    opened.setblocking(False)
    return opened


def _open_control() -> socket.socket:
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    opened.bind(CONTROL)
    opened.setblocking(False)
    return opened


# What is to leave: when, a number that keeps the order of what leaves at the same time, and where.
_Waiting = tuple[float, int, _Lane, Departure]


def _change(control: socket.socket, lanes: Mapping[str, _Lane], waiting: list[_Waiting]) -> None:
    """Take over the change that came, `{"label": ..., "impairment": ...}`, for what waits as well."""
    data, sender = control.recvfrom(_LARGEST)
    change = json.loads(data)
    changed = lanes[change["label"]]
    at_new_rate = changed.direction.change(Impairment(**change["impairment"]), time.monotonic())
    for place, (_, number, lane, departure) in enumerate(waiting):
        if lane is changed:
            moved = at_new_rate(departure)
            waiting[place] = (moved.when, number, lane, moved)
    heapq.heapify(waiting)
    with contextlib.suppress(OSError):  # whoever asked is gone
        control.sendto(_DONE, sender)


def _carry(lanes: list[_Lane], counters: mmap.mmap, control: socket.socket) -> None:
    """Carry frames until the process is ended."""
    waiting: list[_Waiting] = []
    number = 0
    by_socket = {lane.source: (place, lane) for place, lane in enumerate(lanes)}
    by_label = {lane.direction.label: lane for lane in lanes}
    while True:
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        # poll() and epoll round up to milliseconds
        readable, _, _ = select.select((control, *by_socket), (), (), patience)
        if control in readable:
            readable.remove(control)
            _change(control, by_label, waiting)
        for source in readable:
            place, lane = by_socket[source]
            frames, dropped = _frames(source)
            lane.direction.counts.seen += dropped
            lane.direction.counts.overflowed += dropped
            for arrived, frame in frames:
                for departure in lane.direction.departures(arrived, frame):
                    number += 1
                    heapq.heappush(waiting, (departure.when, number, lane, departure))
            RECORD.pack_into(counters, place * RECORD.size, *astuple(lane.direction.counts))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, lane, departure = heapq.heappop(waiting)
            try:
                lane.target.send(departure.frame)
            except OSError as error:  # a full queue or an interface that is down loses it, as a wire would
                print(
                    f"a frame of {len(departure.frame)} bytes was not sent: {os.strerror(error.errno or 0)}", flush=True
                )


def _frames(source: socket.socket) -> tuple[list[tuple[float, bytes]], int]:
    """The frames that came in, some at most, as they were on the wire; and how many found no room since last time.

    Each with the moment when the kernel took it: that it waited for us is no delay of the link's.
    """
    found: list[tuple[float, bytes]] = []
    # Asked for each time: only a ring says with a frame that others were lost (net/packet/af_packet.c).
    _, dropped = struct.unpack("=2I", source.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    # Of the clock that the kernel's stamps are from. Whoever is interrupted between the two is late, not early.
    behind = time.time()
    ahead = time.monotonic() - behind
    while len(found) < _BURST:
        try:
            frame, messages, _, _ = source.recvmsg(_LARGEST, _CONTROL)
        except OSError:  # nothing more, or the interface went down: that is told once and over
            break
        control = {level: data for level, _, data in messages}
        status, *_, tag, tag_type = _AUXDATA.unpack(control[_SOL_PACKET])
        seconds, nanoseconds = _TIMESTAMP.unpack(control[socket.SOL_SOCKET])
        if status & _STATUS_VLAN:  # the kernel takes the tag off what it receives
            tag_type = tag_type if status & _STATUS_VLAN_TYPE else _ETH_P_8021Q
            frame = b"".join((frame[:12], struct.pack("!HH", tag_type, tag), frame[12:]))
        found.append((seconds + nanoseconds / 1e9 + ahead, frame))
    return found, dropped


def main() -> None:
    """`impair_stage CONFIG COUNTERS NOTIFY_FD`: both files as impair.py makes them."""
    config, shared, notify = sys.argv[1:]
    directions = json.loads(Path(config).read_text())
    sockets = {name: _open(name) for name in {direction["source"] for direction in directions}}
    lanes = [
        _Lane(
            Direction(Impairment(**direction["impairment"]), direction["label"]),
            sockets[direction["source"]],
            sockets[direction["target"]],
        )
        for direction in directions
    ]
    with Path(shared).open("r+b") as file:
        counters = mmap.mmap(file.fileno(), 0)
    control = _open_control()
    os.write(int(notify), b"\n")
    _carry(lanes, counters, control)


if __name__ == "__main__":
    main()
