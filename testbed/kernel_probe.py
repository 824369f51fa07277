"""Trying what the kernel can do, in a network namespace made for it.

Owns: one small trial for each kernel feature that labs use, and the few netlink messages these take. Must not know how
findings are told. Place in the path: `capabilities.py` only.

Rules that hold here:

* a trial does the thing itself: a module that can be loaded counts as present, one that is listed but refuses does not;
* a trial that fails raises OSError or ImportError, whose text is the finding;
* the messages are put together by hand, because the library for it is one of the things that may be missing.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CLONE_NEWNET: Final = 0x40000000
_NO_LAB: Final = "no lab, with or without an engine"
_CAP_NET_ADMIN: Final = 12
_CAP_SYS_ADMIN: Final = 21
_SYS_PIDFD_GETFD: Final = 438  # the same number on every machine

# linux/netlink.h
_NETLINK_ROUTE: Final = 0
_NETLINK_SOCK_DIAG: Final = 4
_NETLINK_NETFILTER: Final = 12
_NLMSG_ERROR: Final = 2
_NLM_F_REQUEST: Final = 0x1
_NLM_F_ACK: Final = 0x4
_NLM_F_DUMP: Final = 0x300
_NLM_F_REPLACE: Final = 0x100
_NLM_F_CREATE: Final = 0x400
_ANSWER_SECONDS: Final = 1.0

# linux/netfilter/nfnetlink.h, nf_tables.h
_NFNL_BATCH_BEGIN: Final = 16
_NFNL_BATCH_END: Final = 17
_NFNL_SUBSYS_NFTABLES: Final = 10
_NFT_NEWTABLE: Final = _NFNL_SUBSYS_NFTABLES << 8 | 0
_NFT_NEWCHAIN: Final = _NFNL_SUBSYS_NFTABLES << 8 | 3
_NFT_NEWRULE: Final = _NFNL_SUBSYS_NFTABLES << 8 | 6
_CTNETLINK_GET: Final = 1 << 8 | 1

_RTM_NEWLINK: Final = 16
_RTM_NEWQDISC: Final = 36
_RTM_NEWTFILTER: Final = 44
_LOOPBACK: Final = 1
_TC_H_ROOT: Final = 0xFFFFFFFF
_TC_H_INGRESS: Final = 0xFFFFFFF1
_TC_INGRESS_HANDLE: Final = 0xFFFF0000

# linux/sock_diag.h: SKNLGRP_INET_TCP_DESTROY to SKNLGRP_INET6_UDP_DESTROY, as a mask
_SOCKET_DESTROYED_GROUPS: Final = 0b1111


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of the kernel; `trial` uses it in the thread's own network namespace, or raises OSError."""

    name: str
    required: bool
    needed_for: str
    remedy: str
    cost: str
    trial: Callable[[], None]


def try_all() -> list[tuple[Feature, str | None]]:
    """Each feature with what went wrong, None when it works. Ends after the namespace when there is none to try in."""
    results: list[tuple[Feature, str | None]] = []
    thread = threading.Thread(target=_try_here, args=(results,), name="kernel probe")
    thread.start()
    thread.join()
    return results


def _try_here(results: list[tuple[Feature, str | None]]) -> None:
    for feature in FEATURES:
        failure = _failure(feature.trial)
        results.append((feature, failure))
        if failure is not None and feature.trial in (_hold_capabilities, _enter_own_namespace):
            return


def _failure(trial: Callable[[], None]) -> str | None:
    try:
        trial()
    except OSError as error:
        return error.strerror or str(error)
    except ImportError as error:
        return str(error)
    return None


# ---- the trials ----


def _hold_capabilities() -> None:
    status = Path("/proc/thread-self/status").read_text(encoding="ascii")
    held = int(status.partition("CapEff:")[2].split()[0], 16)
    for number, name in ((_CAP_NET_ADMIN, "CAP_NET_ADMIN"), (_CAP_SYS_ADMIN, "CAP_SYS_ADMIN")):
        if not held >> number & 1:
            raise PermissionError(f"{name} is not held")


def _enter_own_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _make_veth() -> None:
    kind = _attribute(1, b"veth\0")
    interface = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)
    _ask(_NETLINK_ROUTE, _message(_RTM_NEWLINK, _NLM_F_CREATE | _NLM_F_ACK, interface + _attribute(18, kind)))


def _make_netem() -> None:
    limit = struct.pack("=IIIIII", 0, 1000, 0, 0, 0, 0)  # struct tc_netem_qopt: no delay, no loss
    _make_discipline("netem", _TC_H_ROOT, limit)


def _make_tbf() -> None:
    # struct tc_tbf_qopt: a megabyte a second on Ethernet, up to 10,000 bytes waiting; and bursts of 2,000 bytes
    parameters = struct.pack("=BBHhHI12xIII", 0, 1, 0, 0, 0, 1_000_000, 10_000, 0, 0)
    _make_discipline("tbf", _TC_H_ROOT, _attribute(1, parameters) + _attribute(6, struct.pack("=I", 2000)))


def _make_redirect() -> None:
    _make_discipline("ingress", _TC_H_INGRESS, b"")
    # struct tc_mirred: what was received is gone from here, and leaves by lo
    mirred = _attribute(2, struct.pack("=IIiiiiI", 0, 0, 4, 0, 0, 1, _LOOPBACK))
    action = _attribute(1, b"mirred\0") + _attribute(2, mirred)
    everything = struct.pack("=B15x", 1)  # struct tc_u32_sel: terminal, no keys
    header = struct.pack("=BxxxiIII", socket.AF_UNSPEC, _LOOPBACK, 0, _TC_INGRESS_HANDLE, 1 << 16 | socket.htons(3))
    options = _attribute(5, everything) + _attribute(7, _attribute(1, action))
    body = header + _attribute(1, b"u32\0") + _attribute(2, options)
    _ask(_NETLINK_ROUTE, _message(_RTM_NEWTFILTER, _NLM_F_CREATE | _NLM_F_ACK, body))


def _make_discipline(kind: str, parent: int, options: bytes) -> None:
    qdisc = struct.pack("=BxxxiIII", socket.AF_UNSPEC, _LOOPBACK, 0, parent, 0)
    body = qdisc + _attribute(1, kind.encode() + b"\0") + _attribute(2, options)
    _ask(_NETLINK_ROUTE, _message(_RTM_NEWQDISC, _NLM_F_CREATE | _NLM_F_REPLACE | _NLM_F_ACK, body))


def _make_nft_chain() -> None:
    _commit_nft()


def _make_ct_rule() -> None:
    _commit_nft(_expression("ct", _attribute(1, struct.pack(">I", 1)) + _attribute(2, struct.pack(">I", 0))))


def _make_queue_rule() -> None:
    _commit_nft(_expression("queue", _attribute(1, struct.pack(">H", 0)) + _attribute(2, struct.pack(">H", 1))))


def _make_xt_queue_rule() -> None:
    # struct xt_NFQ_info_v3: queue number, queues in total, flags; padded as xtables pads every target
    target = struct.pack("=HHHxx", 0, 1, 0)
    body = _attribute(1, b"NFQUEUE\0") + _attribute(2, struct.pack(">I", 3)) + _attribute(3, target)
    _commit_nft(_expression("target", body))


def _make_any_queue_rule() -> None:
    if _failure(_make_queue_rule) is not None:
        _make_xt_queue_rule()


def _bind_queue() -> None:
    from netfilterqueue import NetfilterQueue

    queue = NetfilterQueue()
    queue.bind(0, lambda packet: packet.drop(), sock_len=64 << 10)  # the library warns where it may not have its usual
    queue.unbind()


def _list_connections() -> None:
    _ask(_NETLINK_NETFILTER, _message(_CTNETLINK_GET, _NLM_F_DUMP, struct.pack(">BBH", socket.AF_INET, 0, 0)))


def _hear_of_closed_sockets() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as listener:
        listener.bind((0, _SOCKET_DESTROYED_GROUPS))
        # The event for the first socket of a kind may have to wait for modprobe: tcp_diag, udp_diag.
        listener.settimeout(_ANSWER_SECONDS)
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            socket.socket(socket.AF_INET, kind).close()
            try:
                listener.recv(65536)
            except TimeoutError as error:
                raise TimeoutError(f"no event for a closed {kind.name}") from error


def _open_tun() -> None:
    os.close(os.open("/dev/net/tun", os.O_RDWR))


def _map_other_users() -> None:
    nobody = 65534
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text("ascii").splitlines()]
    if not any(first <= nobody < first + count for first, _, count in ranges):
        raise OSError("this user namespace has no other user")


def _offer_seccomp_notification() -> None:
    if "user_notif" not in Path("/proc/sys/kernel/seccomp/actions_avail").read_text(encoding="ascii").split():
        raise OSError("no action user_notif")
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(os.getpid())
    try:
        copy = libc.syscall(_SYS_PIDFD_GETFD, pidfd, pidfd, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        os.close(copy)
    finally:
        os.close(pidfd)


# ---- netlink ----


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags | _NLM_F_REQUEST, 0, 0) + body


def _expression(name: str, data: bytes) -> bytes:
    return _attribute(1, _attribute(1, name.encode() + b"\0") + _attribute(2, data))


def _commit_nft(*expressions: bytes) -> None:
    """A table with one chain at prerouting, and one rule if there are expressions, in one transaction."""
    table = _attribute(1, b"probe\0")
    hook = _attribute(1, struct.pack(">I", 0)) + _attribute(2, struct.pack(">i", -300))
    chain = table + _attribute(3, b"probe\0") + _attribute(4, hook) + _attribute(7, b"filter\0")
    messages = [(_NFT_NEWTABLE, table), (_NFT_NEWCHAIN, chain)]
    if expressions:
        messages.append((_NFT_NEWRULE, table + _attribute(2, b"probe\0") + _attribute(4, b"".join(expressions))))
    header = struct.pack(">BBH", socket.AF_INET, 0, 0)
    batch = struct.pack(">BBH", socket.AF_UNSPEC, 0, _NFNL_SUBSYS_NFTABLES)
    # Only the last is acknowledged: then one answer tells of all, whether it is that or an error before it.
    flags = [_NLM_F_CREATE] * (len(messages) - 1) + [_NLM_F_CREATE | _NLM_F_ACK]
    _ask(
        _NETLINK_NETFILTER,
        _message(_NFNL_BATCH_BEGIN, 0, batch)
        + b"".join(_message(kind, flag, header + body) for (kind, body), flag in zip(messages, flags, strict=True))
        + _message(_NFNL_BATCH_END, 0, batch),
    )


def _ask(protocol: int, messages: bytes) -> None:
    """Send to the kernel; raises the OSError that its first answer tells."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as kernel:
        kernel.settimeout(_ANSWER_SECONDS)
        kernel.bind((0, 0))
        kernel.send(messages)
        answer = kernel.recv(65536)
    _, kind, _, _, _ = struct.unpack_from("=IHHII", answer)
    error = -struct.unpack_from("=i", answer, 16)[0] if kind == _NLMSG_ERROR else 0
    if error:
        raise OSError(error, os.strerror(error))


# In the order in which they are tried: each stands on those before it.
FEATURES: Final = (
    Feature(
        name="root",
        required=True,
        needed_for="making namespaces and rules",
        remedy="run as root, or by scripts/rootless",
        cost="no lab",
        trial=_hold_capabilities,
    ),
    Feature(
        name="netns",
        required=True,
        needed_for="every node of a lab",
        remedy="CONFIG_NET_NS; in a container, allow unshare",
        cost="no lab",
        trial=_enter_own_namespace,
    ),
    Feature(
        name="veth",
        required=True,
        needed_for="every link of a lab",
        remedy="CONFIG_VETH",
        cost="no lab",
        trial=_make_veth,
    ),
    Feature(
        name="nftables",
        required=True,
        needed_for="the engine's own table",
        remedy="CONFIG_NF_TABLES, CONFIG_NF_TABLES_IPV4",
        cost=_NO_LAB,
        trial=_make_nft_chain,
    ),
    Feature(
        name="nft-ct",
        required=True,
        needed_for="putting fragments together before the engine",
        remedy="CONFIG_NFT_CT, CONFIG_NF_CONNTRACK",
        cost=_NO_LAB,
        trial=_make_ct_rule,
    ),
    Feature(
        name="nft-queue",
        required=False,
        needed_for="sending packets to the engine",
        remedy="CONFIG_NFT_QUEUE",
        cost="the NFQUEUE target in the engine's own table takes its place",
        trial=_make_queue_rule,
    ),
    Feature(
        name="xt-nfqueue",
        required=False,
        needed_for="sending packets to the engine where nft has no queue",
        remedy="CONFIG_NFT_COMPAT, CONFIG_NETFILTER_XT_TARGET_NFQUEUE",
        cost="nft-queue has no substitute",
        trial=_make_xt_queue_rule,
    ),
    Feature(
        name="queue-rule",
        required=True,
        needed_for="sending packets to the engine",
        remedy="either of nft-queue and xt-nfqueue",
        cost=_NO_LAB,
        trial=_make_any_queue_rule,
    ),
    Feature(
        name="nfqueue",
        required=True,
        needed_for="packets in user space",
        remedy="CONFIG_NETFILTER_NETLINK_QUEUE; apt install libnetfilter-queue1",
        cost=_NO_LAB,
        trial=_bind_queue,
    ),
    Feature(
        name="ctnetlink",
        required=False,
        needed_for="reading and deleting the kernel's connections",
        remedy="CONFIG_NF_CT_NETLINK",
        cost="no kernel datapath",
        trial=_list_connections,
    ),
    Feature(
        name="sock-destroy",
        required=False,
        needed_for="noticing that a socket was closed",
        remedy="CONFIG_INET_TCP_DIAG, CONFIG_INET_UDP_DIAG",
        cost="a socket closed without UNASSIGN keeps its foreign address",
        trial=_hear_of_closed_sockets,
    ),
    Feature(
        name="seccomp-notify",
        required=False,
        needed_for="the socket API of unmodified programs",
        remedy="CONFIG_SECCOMP_FILTER, Linux 5.6 or newer; in a container --cap-add SYS_PTRACE",
        cost="programs must use the Python client",
        trial=_offer_seccomp_notification,
    ),
    Feature(
        name="netem",
        required=False,
        needed_for="delay, loss and reordering on links, done by the kernel",
        remedy="CONFIG_NET_SCH_NETEM; on Ubuntu: apt install linux-modules-extra-$(uname -r)",
        cost="nothing: the testbed impairs links itself, in user space",
        trial=_make_netem,
    ),
    Feature(
        name="tbf",
        required=False,
        needed_for="limited rates on links, done by the kernel",
        remedy="CONFIG_NET_SCH_TBF",
        cost="nothing: the testbed impairs links itself, in user space",
        trial=_make_tbf,
    ),
    Feature(
        name="tc-redirect",
        required=False,
        needed_for="links impaired by the kernel",
        remedy="CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_U32, CONFIG_NET_ACT_MIRRED",
        cost="nothing: the testbed impairs links itself, in user space",
        trial=_make_redirect,
    ),
    Feature(
        name="tun",
        required=False,
        needed_for="interfaces that are not Ethernet, in tests",
        remedy="CONFIG_TUN; chmod 666 /dev/net/tun, as distributions have it",
        cost="tests with such interfaces are skipped",
        trial=_open_tun,
    ),
    Feature(
        name="other-users",
        required=False,
        needed_for="programs of unprivileged users in a lab",
        remedy="run as root, not by scripts/rootless",
        cost="tests with such programs are skipped",
        trial=_map_other_users,
    ),
)
