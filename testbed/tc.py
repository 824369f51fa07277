"""Messages of the kernel's traffic control: queueing disciplines that impair, and the wire between two interfaces.

Owns: the bytes of netem, tbf, and of the filter that hands whatever comes in here to an interface there. Must not know
which of them a link gets: plan.py. Facts: linux/pkt_sched.h, pkt_cls.h, tc_act/tc_mirred.h; tc-netem(8), tc-tbf(8).

By hand, as rtnetlink.py, and because pyroute2's netem knows neither the times in nanoseconds nor the seed.

What is asked of both is what impair_model.py means:

* netem has a rate of its own, but its queue is counted in packets, those that are merely delayed included, and it keeps
  the order: there would be no jitter with a rate. tbf, as netem's child, has a queue of so many bytes, and only that.
* netem puts `reorder` of the packets in front of those that wait when `gap` is 1; without a distribution its jitter is
  even. Differently from the stage, it delays first, then comes the rate; a packet that is lost and doubled arrives
  once; a flipped bit may be in the Ethernet header; and where it is, the seed does not tell.
* What waits in tbf alone is still charged to the socket that sent it, as at an interface of the sender's own: a sender
  may be kept waiting where the stage's queue, as one elsewhere in the network, would overflow.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from dataclasses import dataclass
from typing import Final

from testbed.impair_model import QUEUE
from testbed.rtnetlink import CREATE_REPLACE, Request, attribute, attributes, dump
from testbed.topology import Impairment

_TCMSG: Final = struct.Struct("=BxxxiIII")  # family, interface, handle, parent, info
MOST_JITTER: Final = 0x7FFFFFFF / 1e9  # seconds; netem takes more for that (net/sched/sch_netem.c, netem_change)
_NETEM: Final = struct.Struct("=6I")  # struct tc_netem_qopt: latency, limit, loss, gap, duplicate, jitter
_RATESPEC: Final = struct.Struct("=BBHhHI")  # cell_log, linklayer, overhead, cell_align, mpu, rate
_TBF: Final = struct.Struct("=12s12xIII")  # struct tc_tbf_qopt: rate, peak rate, limit, buffer, mtu
_MIRRED: Final = struct.Struct("=IIiiiiI")  # index, capab, action, refcnt, bindcnt, eaction, interface
_U32_SELECTOR: Final = struct.Struct("=BBBxHHhhI")  # flags, offshift, nkeys, offmask, off, offoff, hoff, hmask

_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_GETQDISC, _RTM_NEWTFILTER = 36, 37, 38, 44
_TCA_KIND, _TCA_OPTIONS, _TCA_STATS2 = 1, 2, 7
_TCA_STATS_BASIC, _TCA_STATS_QUEUE = 1, 3  # linux/gen_stats.h
_TCA_NETEM_REORDER, _TCA_NETEM_CORRUPT, _TCA_NETEM_LATENCY64, _TCA_NETEM_JITTER64 = 3, 4, 10, 11
_TCA_NETEM_PRNG_SEED: Final = 14  # Linux 6.7; older kernels pass over it
_TCA_TBF_PARMS, _TCA_TBF_RATE64, _TCA_TBF_BURST = 1, 4, 6
_TCA_U32_SEL, _TCA_U32_ACT, _TC_U32_TERMINAL = 5, 7, 1
_TCA_ACT_KIND, _TCA_ACT_OPTIONS, _TCA_MIRRED_PARMS = 1, 2, 2
_TC_ACT_STOLEN, _TCA_EGRESS_REDIR = 4, 1

_ROOT: Final = 0xFFFFFFFF
_INGRESS: Final = 0xFFFFFFF1
_INGRESS_HANDLE: Final = 0xFFFF0000
_NETEM_HANDLE: Final = 1 << 16
_NETEM_CLASS: Final = _NETEM_HANDLE | 1  # where netem's child hangs
_TBF_HANDLE: Final = 2 << 16
_ANY_FRAME: Final = 1 << 16 | 0x0300  # tcm_info: preference 1, ETH_P_ALL in network order
_ETHERNET: Final = 1  # TC_LINKLAYER_ETHERNET: the kernel needs no table of sending times
_LARGEST_32: Final = 0xFFFFFFFF

_UNDER_WAY: Final = 100_000  # packets that netem holds at most; the stage has no such bound
_HEADERS: Final = 14 + 2 * 4  # bytes of a frame beside its MTU: Ethernet, two VLAN tags
_LATE: Final = 0.004  # seconds that the timer may be late without loss of rate


@dataclass(frozen=True, slots=True)
class Queue:
    """What became of the packets of a discipline so far; `overtook`: netem put them before those that waited."""

    passed: int = 0
    waiting: int = 0
    dropped: int = 0
    overtook: int = 0


def netem(interface: int, impairment: Impairment, label: str) -> Request:
    """Delay, jitter, loss, duplication, reordering and corruption; the seed is made of `label`, the sender's."""
    chance = impairment.reorder
    seed = hashlib.sha256(label.encode()).digest()[:8]
    options = _NETEM.pack(0, _UNDER_WAY, _share(impairment.loss), 1 if chance else 0, _share(impairment.duplicate), 0)
    options += attribute(_TCA_NETEM_REORDER, struct.pack("=II", _share(chance), 0)) if chance else b""
    options += attribute(_TCA_NETEM_CORRUPT, struct.pack("=II", _share(impairment.corrupt), 0))
    options += attribute(_TCA_NETEM_LATENCY64, _nanoseconds(impairment.delay))
    options += attribute(_TCA_NETEM_JITTER64, _nanoseconds(impairment.jitter))
    options += attribute(_TCA_NETEM_PRNG_SEED, seed)
    return _discipline(interface, _NETEM_HANDLE, _ROOT, "netem", options)


def tbf(interface: int, rate: int, mtu: int, *, inside_netem: bool) -> Request:
    """At most `rate` bits a second, by itself or for what leaves netem."""
    each_second = max(1, rate // 8)
    burst = max(2 * (mtu + _HEADERS), int(each_second * _LATE))
    specification = _RATESPEC.pack(0, _ETHERNET, 0, 0, 0, min(each_second, _LARGEST_32))
    options = attribute(_TCA_TBF_PARMS, _TBF.pack(specification, QUEUE, 0, 0))
    options += attribute(_TCA_TBF_RATE64, struct.pack("=Q", each_second)) if each_second > _LARGEST_32 else b""
    options += attribute(_TCA_TBF_BURST, struct.pack("=I", burst))
    return _discipline(interface, _TBF_HANDLE, _NETEM_CLASS if inside_netem else _ROOT, "tbf", options)


def remove(interface: int) -> Request:
    """Take away what impairs an interface; ENOENT when nothing does."""
    return Request(_RTM_DELQDISC, 0, _TCMSG.pack(0, interface, 0, _ROOT, 0))


def ingress(interface: int) -> Request:
    """Let an interface have filters for what it receives."""
    return _discipline(interface, _INGRESS_HANDLE, _INGRESS, "ingress", b"")


def redirect(interface: int, to: int) -> Request:
    """A filter that sends every frame that one interface receives from another, as it is. It needs `ingress`."""
    mirred = attribute(_TCA_MIRRED_PARMS, _MIRRED.pack(0, 0, _TC_ACT_STOLEN, 0, 0, _TCA_EGRESS_REDIR, to))
    action = attribute(_TCA_ACT_KIND, b"mirred\0") + attribute(_TCA_ACT_OPTIONS, mirred)
    everything = _U32_SELECTOR.pack(_TC_U32_TERMINAL, 0, 0, 0, 0, 0, 0, 0)
    options = attribute(_TCA_U32_SEL, everything) + attribute(_TCA_U32_ACT, attribute(1, action))
    body = _TCMSG.pack(0, interface, 0, _INGRESS_HANDLE, _ANY_FRAME)
    body += attribute(_TCA_KIND, b"u32\0") + attribute(_TCA_OPTIONS, options)
    return Request(_RTM_NEWTFILTER, CREATE_REPLACE, body)


def queues(netlink: socket.socket) -> dict[tuple[int, str], Queue]:
    """The disciplines of a namespace, by interface and kind."""
    found = {}
    for body in dump(netlink, _RTM_GETQDISC, _RTM_NEWQDISC, _TCMSG.pack(0, 0, 0, 0, 0)):
        _, interface, *_ = _TCMSG.unpack_from(body)
        values = attributes(body[_TCMSG.size :])
        statistics = attributes(values[_TCA_STATS2])
        _, passed = struct.unpack_from("=QI", statistics[_TCA_STATS_BASIC])
        waiting, _, dropped, requeued, _ = struct.unpack("=5I", statistics[_TCA_STATS_QUEUE])
        kind = values[_TCA_KIND].rstrip(b"\0").decode()
        found[interface, kind] = Queue(passed, waiting, dropped, requeued)
    return found


def _discipline(interface: int, handle: int, parent: int, kind: str, options: bytes) -> Request:
    body = _TCMSG.pack(0, interface, handle, parent, 0) + attribute(_TCA_KIND, kind.encode() + b"\0")
    return Request(_RTM_NEWQDISC, CREATE_REPLACE, body + (attribute(_TCA_OPTIONS, options) if options else b""))


def _share(probability: float) -> int:
    """A probability as the kernel has it: a number up to 2^32 - 1, which is always."""
    return round(probability * _LARGEST_32)


def _nanoseconds(seconds: float) -> bytes:
    return struct.pack("=q", round(seconds * 1e9))
