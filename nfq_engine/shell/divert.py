"""The engine's own nft table: which packets come to the queue, at which hooks, and where the kernel's NAT looks.

Owns: the table `nfq_tproxy` and nothing else; no table of the user's is read or changed. Must not know what happens to
the packets. The hooks and priorities, with conntrack at -200, nat at -100 and 100, the user's filter at 0:

    datapath inline: every packet
    PREROUTING   -300  after defragmentation (-400), before conntrack: conntrack sees inside addresses, always
    OUTPUT       -300  the same; the kernel routes again when the destination changed
    POSTROUTING   300  after everything: only the wire sees the foreign source

    datapath kernel: the first packet of a connection, that is, one whose conntrack entry is not confirmed yet
    PREROUTING   -130  after conntrack, where the original had its table; then our nat chain at -101
    OUTPUT       -130  the same
    POSTROUTING    98  then our nat chain at 99

With `inline`, packets that arrive on `lo` are left alone at PREROUTING: they have been at OUTPUT and POSTROUTING
already. The rules with `ct` carry the mark over to the connection and back; they are also what makes the kernel put
fragments together (it does so only in a namespace that uses conntrack).

With `kernel`, only what a rule or a sockref could want is diverted (narrowing.py). A packet that the engine has decided
on carries the mark when it comes to the nat chains, which look for its mapping in the maps only then. Their elements
are put in just before the packet is let go (kernel_nat.py). The map `redirect` stands behind the one by whole tuples:
what rules redirect at PREROUTING finds its endpoint there by interface, protocol and port, so one element does for many
connections, and stays until it is in somebody's way. Where rules look at interfaces and ports alone, the sets
`answered` keep the packets of such connections from the queue altogether (answered.py).

Datagrams for one-way listeners (UNIDIR) are diverted at -300, rewritten there, and kept from conntrack at -299, so that
no state is kept of them. The listener's foreign endpoint may be shared with sockrefs that are narrowed to one peer:
what has got a mapping there is in `tracked`, and left to conntrack. Where a one-way listener has no foreign endpoint,
and rules redirect to it, datagrams that these rules could want are diverted at -300 for the same reason, and then not
again at -130; the engine asks conntrack which of them belong to a connection.

Removing a base chain drops whatever is queued in the namespace, and removing the last nat chain ends all translation,
so the table is built once and stays until the end. A table left by an engine that was killed keeps diverting to a queue
that nobody reads: the packets are dropped, or pass untranslated with `fail_open`. The next engine takes it over as it
is, if it has the same layout, so that connections which the kernel translates go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nfq_engine.core.rule_values import BuiltinChain
from nfq_engine.shell import nftables
from nfq_engine.shell.nftables import NftError, NftSocket

# A queue message carries 65531 bytes of packet (queue.py); packets on lo have up to 65535. TCP is told to stay below,
# with 60 bytes of IPv6 and TCP header. nft only ever lowers a segment size (net/netfilter/nft_exthdr.c).
_LARGEST_SEGMENT: Final = 65531 - 60

TABLE: Final = "nfq_tproxy"
ANSWERED: Final = ("answered4", "answered6")  # what needs no question (answered.py)
UNTOUCHED: Final = ("untouched4", "untouched6")  # what POSTROUTING leaves alone (untouched.py)
TO_QUEUE: Final = "to_queue"
# The chains that follow the ruleset (narrowing.py); until they do, they want everything.
WANTED: Final = {BuiltinChain.PREROUTING: "wanted_prerouting", BuiltinChain.OUTPUT: "wanted_output"}
# The chains that follow the ruleset and the one-way listeners: what may be redirected to one of them is diverted before
# conntrack sees it, and then no second time; what has come to a listener's port is kept from conntrack.
ONE_WAY: Final = {BuiltinChain.PREROUTING: "one_way_prerouting", BuiltinChain.OUTPUT: "one_way_output"}
DECIDED: Final = {BuiltinChain.PREROUTING: "decided_prerouting", BuiltinChain.OUTPUT: "decided_output"}
UNTRACK: Final = "untrack_listeners"
_ICMP_ERRORS: Final = "destination-unreachable, source-quench, redirect, time-exceeded, parameter-problem"
_ICMPV6_ERRORS: Final = "destination-unreachable, packet-too-big, time-exceeded, parameter-problem"

# By kind and name, without the version: what is in it, {0} being an endpoint of the version.
_SETS: Final = {
    "set": {
        "foreign": "inet_proto . {0}",
        "local": "inet_proto . {0}",
        "one_way": "{0}",
        "one_way_local": "{0}",
        "tracked": "{0} . {0}",
        "answered": "iface_index . inet_service",
    },
    "map": {
        "destination": "inet_proto . {0} . {0} : {0}",
        "source": "inet_proto . {0} . {0} : {0}",
        "redirect": "iface_index . inet_proto . inet_service : {0}",
    },
}
REDIRECTS: Final = 4096  # elements of a map `redirect`
# Elements that are renewed while there is an engine. An answer must never outlive the redirect that it relies on.
REDIRECT_LIFE: Final = 120  # seconds
ANSWER_LIFE: Final = 60
_LASTING: Final = f"flags timeout; timeout {REDIRECT_LIFE}s; size {REDIRECTS}"
_COUNTING: Final = f"flags timeout; timeout {ANSWER_LIFE}s; size {REDIRECTS}; counter"
_PASSING: Final = "flags timeout; timeout 10s; size 65536"  # each is there for the packets of one turn
_UNCONFIRMED: Final = "ct status & 8 == 0"  # IPS_CONFIRMED: set when the first packet has passed all hooks
# An ICMP error of this host's own about a first packet that it could not forward shares that packet's conntrack entry,
# and the kernel does not queue such (nf_ct_drop_unconfirmed): unless it is about a mapped connection, it goes as it is.
_OWN_ERROR: Final = f"meta l4proto {{ icmp, ipv6-icmp }} {_UNCONFIRMED}"
_TUPLE: Final = "meta l4proto . {0} saddr . th sport . {0} daddr . th dport"
_REDIRECT: Final = "meta iif . meta l4proto . th dport"
_SYN: Final = "tcp flags & (fin | syn | rst | ack) == syn"
_PAIR: Final = "{0} saddr . udp sport . {0} daddr . udp dport"
_ONE_WAY: Final = f"{{1}} daddr . udp dport @one_way{{0}} {_PAIR.format('{1}')} != @tracked{{0}} {{2}}"


class DivertError(Exception):
    """The table could not be built; the message says what the kernel or nft said."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The chains and sets of a datapath. `name` is that of an empty chain by which a table left behind is recognised,
    so it must change with the chains, their hooks, or the sets; `text` makes the table for a mark."""

    name: str
    sets: tuple[str, ...]  # each with its kind: `set local4`
    text: Callable[[int], str]


def _inline_text(mark: int) -> str:
    return f"""
table inet {TABLE} {{
    set {UNTOUCHED[0]} {{
        type inet_proto . ipv4_addr . inet_service . ipv4_addr . inet_service
    }}
    set {UNTOUCHED[1]} {{
        type inet_proto . ipv6_addr . inet_service . ipv6_addr . inet_service
    }}
    chain {TO_QUEUE} {{
    }}
    chain diverted {{
        tcp flags syn tcp option maxseg size set {_LARGEST_SEGMENT}
        meta l4proto {{ tcp, udp }} jump {TO_QUEUE}
        icmp type {{ {_ICMP_ERRORS} }} jump {TO_QUEUE}
        icmpv6 type {{ {_ICMPV6_ERRORS} }} jump {TO_QUEUE}
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
        {_OWN_ERROR} ct mark & {mark:#x} == 0 accept
        jump diverted
    }}
    chain postrouting {{
        type filter hook postrouting priority 300; policy accept;
        {_OWN_ERROR} ct mark & {mark:#x} == 0 accept
        {_TUPLE.format("ip")} @{UNTOUCHED[0]} accept
        {_TUPLE.format("ip6")} @{UNTOUCHED[1]} accept
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


def _kernel_text(mark: int) -> str:
    is_marked = f"meta mark & {mark:#x} == {mark:#x}"
    set_mark = f"meta mark set meta mark | {mark:#x}"
    is_first = f"{_UNCONFIRMED} meta l4proto {{ tcp, udp }}"  # in this order, as most packets fail at the first part
    return f"""
table inet {TABLE} {{
    {_sets_text()}
    chain {TO_QUEUE} {{
    }}
    chain {WANTED[BuiltinChain.PREROUTING]} {{
        jump {TO_QUEUE}
    }}
    chain {WANTED[BuiltinChain.OUTPUT]} {{
        jump {TO_QUEUE}
    }}
    chain to_foreign {{
        {_ONE_WAY.format(4, "ip", "accept")}
        {_ONE_WAY.format(6, "ip6", "accept")}
        {is_marked} ip daddr . udp dport @one_way4 accept
        {is_marked} ip6 daddr . udp dport @one_way6 accept
        meta l4proto . ip daddr . th dport @foreign4 jump {TO_QUEUE}
        meta l4proto . ip6 daddr . th dport @foreign6 jump {TO_QUEUE}
    }}
    chain from_local {{
        meta l4proto . ip saddr . th sport @local4 jump {TO_QUEUE}
        meta l4proto . ip6 saddr . th sport @local6 jump {TO_QUEUE}
    }}
    chain {ONE_WAY[BuiltinChain.PREROUTING]} {{
    }}
    chain {ONE_WAY[BuiltinChain.OUTPUT]} {{
    }}
    chain {DECIDED[BuiltinChain.PREROUTING]} {{
    }}
    chain {DECIDED[BuiltinChain.OUTPUT]} {{
    }}
    chain {UNTRACK} {{
    }}
    chain first_prerouting {{
        jump {DECIDED[BuiltinChain.PREROUTING]}
        jump to_foreign
        {_SYN} meta nfproto ipv4 meta iif . tcp dport @{ANSWERED[0]} {set_mark} accept
        {_SYN} meta nfproto ipv6 meta iif . tcp dport @{ANSWERED[1]} {set_mark} accept
        jump {WANTED[BuiltinChain.PREROUTING]}
    }}
    chain first_output {{
        jump {DECIDED[BuiltinChain.OUTPUT]}
        jump to_foreign
        jump from_local
        jump {WANTED[BuiltinChain.OUTPUT]}
    }}
    chain one_way {{
        {_ONE_WAY.format(4, "ip", f"jump {TO_QUEUE}")}
        {_ONE_WAY.format(6, "ip6", f"jump {TO_QUEUE}")}
        {_PAIR.format("ip")} @tracked4 accept
        {_PAIR.format("ip6")} @tracked6 accept
    }}
    chain raw_prerouting {{
        type filter hook prerouting priority -300; policy accept;
        meta l4proto != udp accept
        iif lo {is_marked} accept
        jump one_way
        jump {ONE_WAY[BuiltinChain.PREROUTING]}
    }}
    chain raw_output {{
        type filter hook output priority -300; policy accept;
        meta l4proto != udp accept
        jump one_way
        jump {ONE_WAY[BuiltinChain.OUTPUT]}
    }}
    chain untrack {{
        ip daddr . udp dport @one_way_local4 notrack
        ip6 daddr . udp dport @one_way_local6 notrack
        jump {UNTRACK}
    }}
    chain to_destination {{
        ct mark set ct mark | {mark:#x}
        dnat ip to {_TUPLE.format("ip")} map @destination4
        dnat ip6 to {_TUPLE.format("ip6")} map @destination6
        dnat ip to {_REDIRECT} map @redirect4
        dnat ip6 to {_REDIRECT} map @redirect6
    }}
    chain to_source {{
        ct mark set ct mark | {mark:#x}
        snat ip to {_TUPLE.format("ip")} map @source4
        snat ip6 to {_TUPLE.format("ip6")} map @source6
    }}
    {_base_chain("untrack_prerouting", "filter hook prerouting priority -299", f"{is_marked} jump untrack")}
    {_base_chain("untrack_output", "filter hook output priority -299", f"{is_marked} jump untrack")}
    chain prerouting {{
        type filter hook prerouting priority -130; policy accept;
        ct mark & {mark:#x} == {mark:#x} {set_mark}
        {is_first} jump first_prerouting
    }}
    chain output {{
        type filter hook output priority -130; policy accept;
        ct mark & {mark:#x} == {mark:#x} {set_mark}
        {is_first} jump first_output
    }}
    {_base_chain("postrouting", "filter hook postrouting priority 98", f"{is_first} jump from_local")}
    {_base_chain("nat_prerouting", "nat hook prerouting priority -101", f"{is_marked} jump to_destination")}
    {_base_chain("nat_output", "nat hook output priority -101", f"{is_marked} jump to_destination")}
    {_base_chain("nat_postrouting", "nat hook postrouting priority 99", f"{is_marked} jump to_source")}
}}
"""


def _base_chain(name: str, hook: str, rule: str) -> str:
    """A base chain with one rule."""
    return f"""chain {name} {{
        type {hook}; policy accept;
        {rule}
    }}"""


def _sets_text() -> str:
    """The sets and maps of datapath `kernel`; in the maps a packet's tuple leads to an endpoint."""
    text = ""
    for version in (4, 6):
        endpoint = f"ipv{version}_addr . inet_service"
        for name, key in _SETS["set"].items():
            text += f"""
    set {name}{version} {{
        type {key.format(endpoint)}
        {_COUNTING if name == "answered" else ""}
    }}"""
        for name, key in _SETS["map"].items():
            text += f"""
    map {name}{version} {{
        type {key.format(endpoint)}
        {_LASTING if name == "redirect" else _PASSING}
    }}"""
    return text


INLINE: Final = Layout("layout_inline_3", tuple(f"set {name}" for name in UNTOUCHED), _inline_text)
KERNEL: Final = Layout(
    "layout_kernel_4",
    tuple(f"{kind} {name}{version}" for kind, names in _SETS.items() for name in names for version in (4, 6)),
    _kernel_text,
)


def build(layout: Layout, queue: int, mark: int, *, fail_open: bool) -> str:
    """Build the table, or take over one of the same layout; tells which kind of queue rule the kernel took.

    One nft transaction makes the table, complete, where the kernel has the `queue` statement. Where it has not, the
    chain `to_queue` drops, and a second transaction puts the NFQUEUE target in the place of that.
    """
    text = _cleared(layout) + layout.text(mark) + f"add chain inet {TABLE} {layout.name}\n"
    to_queue = f"add rule inet {TABLE} {TO_QUEUE}"
    try:
        nftables.run(f"{text}{to_queue} queue {'flags bypass ' if fail_open else ''}to {queue}\n")
        return "nft queue statement"
    except NftError:
        pass  # there is no such statement, or else the next transaction fails as well
    try:
        nftables.run(f"{text}{to_queue} {'accept' if fail_open else 'drop'}\n")
    except NftError as error:
        raise DivertError(f"nft refused the table {TABLE}: {error}") from error
    nft = NftSocket(TABLE)
    try:
        nft.replace_by_target(TO_QUEUE, queue, bypass=fail_open)
    except OSError as error:
        remove()
        raise DivertError(
            "this kernel has neither nft's queue statement (CONFIG_NFT_QUEUE) nor the NFQUEUE target "
            f"(CONFIG_NETFILTER_XT_TARGET_NFQUEUE, CONFIG_NFT_COMPAT): {error.strerror}"
        ) from error
    finally:
        nft.close()
    return "NFQUEUE target"


def remove() -> None:
    """Remove the table, if it is there."""
    nftables.run(_REMOVAL)


_REMOVAL: Final = f"table inet {TABLE}\ndelete table inet {TABLE}\n"


def _cleared(layout: Layout) -> str:
    """nft text that empties a table of this layout, and removes one of another, whether or not there is one."""
    try:
        nftables.run(f"list chain inet {TABLE} {layout.name}\n")
    except NftError:
        return _REMOVAL
    return f"flush table inet {TABLE}\n" + "".join(
        f"flush {kind} inet {TABLE} {name}\n" for kind, name in (each.split() for each in layout.sets)
    )
