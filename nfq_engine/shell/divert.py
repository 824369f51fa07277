"""The engine's own nft table: which packets come to the queue, and at which hooks.

Owns: the table `nfq_tproxy` and nothing else; no table of the user's is read or changed. Must not know what happens to
the packets.

The hooks and priorities, with conntrack at -200, nat at -100 and 100, the user's filter at 0:

    PREROUTING   -300  after defragmentation (-400), before conntrack: conntrack sees inside addresses, always
    OUTPUT       -300  the same; the kernel routes again when the destination changed
    POSTROUTING   300  after everything: only the wire sees the foreign source

Packets that arrive on `lo` are left alone at PREROUTING: they have been at OUTPUT and POSTROUTING already. The rules
with `ct` carry the mark over to the connection and back; they are also what makes the kernel put fragments together (it
does so only in a namespace that uses conntrack).

Removing a base chain drops whatever is queued in the namespace, so the table is built once and stays until the end.
A table left by an engine that was killed keeps diverting to a queue that nobody reads: the packets are dropped, or
pass untranslated with `fail_open`. The next engine replaces it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
from typing import Final

# A queue message carries 65531 bytes of packet (queue.py); packets on lo have up to 65535. TCP is told to stay below,
# with 60 bytes of IPv6 and TCP header. nft only ever lowers a segment size (net/netfilter/nft_exthdr.c).
_LARGEST_SEGMENT: Final = 65531 - 60

TABLE: Final = "nfq_tproxy"
_TO_QUEUE: Final = "to_queue"
_ICMP_ERRORS: Final = "destination-unreachable, source-quench, redirect, time-exceeded, parameter-problem"
_ICMPV6_ERRORS: Final = "destination-unreachable, packet-too-big, time-exceeded, parameter-problem"

# Netlink numbers: linux/netfilter/nfnetlink.h, nf_tables.h, nf_tables_compat.h, xt_NFQUEUE.h
_NETLINK_NETFILTER: Final = 12
_BATCH_BEGIN: Final = 16
_BATCH_END: Final = 17
_NFNL_SUBSYS_NFTABLES: Final = 10
_NFT_MSG_NEWRULE: Final = _NFNL_SUBSYS_NFTABLES << 8 | 6
_REQUEST: Final = 1
_ACK: Final = 4
_CREATE_APPEND: Final = 0x400 | 0x800
_NLA_F_NESTED: Final = 0x8000
_NFPROTO_INET: Final = 1
_NFQUEUE_REVISION: Final = 3
_NFQUEUE_BYPASS: Final = 1


class DivertError(Exception):
    """The table could not be built; the message says what the kernel or nft said."""


def table_text(mark: int) -> str:
    """The table in nft's language, but for the one rule of its chain `to_queue`."""
    return f"""
table inet {TABLE} {{
    chain {_TO_QUEUE} {{
    }}
    chain diverted {{
        tcp flags syn tcp option maxseg size set {_LARGEST_SEGMENT}
        meta l4proto {{ tcp, udp }} jump {_TO_QUEUE}
        icmp type {{ {_ICMP_ERRORS} }} jump {_TO_QUEUE}
        icmpv6 type {{ {_ICMPV6_ERRORS} }} jump {_TO_QUEUE}
    }}
    chain carry_mark {{
        meta mark & {mark:#x} == {mark:#x} ct mark & {mark:#x} == 0 ct mark set ct mark | {mark:#x}
        ct mark & {mark:#x} == {mark:#x} meta mark set meta mark | {mark:#x}
    }}
    chain prerouting {{
        type filter hook prerouting priority -300; policy accept;
        iif lo accept
        jump diverted
    }}
    chain output {{
        type filter hook output priority -300; policy accept;
        jump diverted
    }}
    chain postrouting {{
        type filter hook postrouting priority 300; policy accept;
        jump diverted
    }}
    chain mark_prerouting {{
        type filter hook prerouting priority -199; policy accept;
        jump carry_mark
    }}
    chain mark_output {{
        type filter hook output priority -199; policy accept;
        jump carry_mark
    }}
    chain mark_postrouting {{
        type filter hook postrouting priority 301; policy accept;
        jump carry_mark
    }}
}}
"""


def build(queue: int, mark: int, *, fail_open: bool) -> str:
    """Build the table, in the place of one that was left behind; tells which kind of queue rule the kernel took.

    One nft transaction makes the table, complete, where the kernel has the `queue` statement. Where it has not, the
    table is made with an empty `to_queue`, which diverts nothing yet, and a second transaction adds the NFQUEUE target.
    """
    text = _removal() + table_text(mark)
    statement = f"queue flags bypass to {queue}" if fail_open else f"queue to {queue}"
    if _nft(f"{text}add rule inet {TABLE} {_TO_QUEUE} {statement}\n") is None:
        return "nft queue statement"
    problem = _nft(text)
    if problem is not None:
        raise DivertError(f"nft refused the table {TABLE}: {problem}")
    try:
        _add_target(queue, fail_open=fail_open)
    except OSError as error:
        remove()
        raise DivertError(
            "this kernel has neither nft's queue statement (CONFIG_NFT_QUEUE) nor the NFQUEUE target "
            f"(CONFIG_NETFILTER_XT_TARGET_NFQUEUE, CONFIG_NFT_COMPAT): {error.strerror}"
        ) from error
    return "NFQUEUE target"


def remove() -> None:
    """Remove the table, if it is there."""
    _nft(_removal())


def _removal() -> str:
    """nft text that leaves no table of ours, whether or not there was one."""
    return f"table inet {TABLE}\ndelete table inet {TABLE}\n"


def _nft(text: str) -> str | None:
    """Run one nft transaction: None, or what nft complained of."""
    try:
        result = subprocess.run(["nft", "-f", "-"], input=text, text=True, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise DivertError("the command nft is missing: install the package nftables") from error
    return None if result.returncode == 0 else result.stderr.strip() or f"exit status {result.returncode}"


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _nested(kind: int, *inner: bytes) -> bytes:
    return _attribute(kind | _NLA_F_NESTED, b"".join(inner))


def _message(kind: int, flags: int, family: int, resource: int, body: bytes = b"") -> bytes:
    content = struct.pack("!BBH", family, 0, resource) + body
    return struct.pack("=IHHII", 16 + len(content), kind, flags, 0, 0) + content


def _add_target(queue: int, *, fail_open: bool) -> None:
    """Add the xtables target NFQUEUE, revision 3, as the one rule of `to_queue`; OSError as the kernel says."""
    info = struct.pack("=HHH2x", queue, 1, _NFQUEUE_BYPASS if fail_open else 0)
    target = _nested(
        2,  # NFTA_EXPR_DATA
        _attribute(1, b"NFQUEUE\0"),  # NFTA_TARGET_NAME
        _attribute(2, struct.pack("!I", _NFQUEUE_REVISION)),  # NFTA_TARGET_REV
        _attribute(3, info),  # NFTA_TARGET_INFO
    )
    rule = b"".join(
        (
            _attribute(1, TABLE.encode() + b"\0"),  # NFTA_RULE_TABLE
            _attribute(2, _TO_QUEUE.encode() + b"\0"),  # NFTA_RULE_CHAIN
            _nested(4, _nested(1, _attribute(1, b"target\0"), target)),  # NFTA_RULE_EXPRESSIONS, one NFTA_LIST_ELEM
        )
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.bind((0, 0))
        netlink.send(
            _message(_BATCH_BEGIN, _REQUEST, socket.AF_UNSPEC, _NFNL_SUBSYS_NFTABLES)
            + _message(_NFT_MSG_NEWRULE, _REQUEST | _ACK | _CREATE_APPEND, _NFPROTO_INET, 0, rule)
            + _message(_BATCH_END, _REQUEST, socket.AF_UNSPEC, _NFNL_SUBSYS_NFTABLES)
        )
        (code,) = struct.unpack_from("=i", netlink.recv(8192), 16)
    if code:
        raise OSError(-code, os.strerror(-code) if -code in errno.errorcode else f"error {-code}")
