"""Datapath kernel on live traffic: mappings, what of the user's they win over, deletion, crashes."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_lab import ANY, FOREIGN, PATIENCE, TCP, UDP, EngineLab, engine_lab, exchange, until

from nfq_engine.client import Flag
from testbed.topology import Readiness

pytestmark = pytest.mark.lab

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
deletions = pytest.mark.parametrize("deletion", ["linked", "scan"])
datapaths = pytest.mark.parametrize("datapath", ["inline", "kernel"])
SOCK_DIAG = "4"  # linux/netlink.h

USERS = """
table ip users {{
    chain prerouting {{
        type nat hook prerouting priority -100
        tcp dport {{ 80, 8080 }} dnat to {0}:9
        udp dport {{ 53, 5353 }} dnat to {0}:9
    }}
    chain postrouting {{
        type nat hook postrouting priority 100
        oifname "eth1" masquerade
    }}
}}
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[EngineLab]:
    with engine_lab(tmp_path) as running:
        yield running


def foreign_listener(lab: EngineLab, version: int, flags: Flag = Flag.LISTEN, port: int = 53) -> socket.socket:
    """A UDP socket of the gateway's that owns an address of nobody's."""
    listener = lab.bound(lab.gateway, UDP, lab.gateway.address(version, "eth0"), 7000)
    lab.tproxy.assign(listener, FOREIGN[version], port)
    lab.tproxy.set_flags(listener, flags)
    return listener


def peer_of(lab: EngineLab, version: int = 4, port: int = 53) -> socket.socket:
    """A UDP socket of the client's that talks to the foreign address."""
    sock = lab.open(lab.client, UDP, version)
    sock.connect((FOREIGN[version], port))
    return sock


def outward(
    lab: EngineLab, foreign: str, port: int = 0, flags: Flag = Flag.CONNECT, local_port: int = 0
) -> socket.socket:
    """A TCP socket of the gateway's that appears as somebody else."""
    version = 6 if ":" in foreign else 4
    sock = lab.bound(lab.gateway, TCP, lab.gateway.address(version, "eth1"), local_port, reuse=True)
    lab.tproxy.assign(sock, foreign, port)
    lab.tproxy.set_flags(sock, flags)
    return sock


# Mappings.


@versions
def test_established_packets_do_not_come_to_the_queue(lab: EngineLab, version: int) -> None:
    proxy = lab.bound(lab.gateway, TCP, ANY[version], 50080, listen=True)
    near = lab.open(lab.client, TCP, version)
    near.connect((lab.server.address(version), 80))
    far, _ = proxy.accept()
    with far:
        exchange(near, far, 1 << 20)
        assert lab.queued() == 1
        assert lab.reasons("PREROUTING") == {"redirect": 1}
        assert near.getpeername()[0] == lab.server.address(version)
        original = lab.tproxy.original_destination(far)
        assert str(original).strip("[]").startswith(lab.server.address(version))
        assert original.port == 80


def test_the_kernel_itself_knows_the_original_destination(lab: EngineLab) -> None:
    proxy = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    near = lab.open(lab.client, TCP)
    near.connect((lab.server.address(), 80))
    far, _ = proxy.accept()
    with far:
        so_original_dst = 80
        name = far.getsockopt(socket.SOL_IP, so_original_dst, 16)
    assert int.from_bytes(name[2:4], "big") == 80
    assert socket.inet_ntoa(name[4:8]) == lab.server.address()


def test_both_ends_of_one_connection_are_mapped(tmp_path: Path) -> None:
    """A local connection that a rule redirects, from a socket with a foreign address: one entry, two mappings."""
    with engine_lab(tmp_path) as lab:
        server = lab.bound(lab.gateway, TCP, "127.0.0.1", 50082, listen=True)
        near = lab.bound(lab.gateway, TCP, "127.0.0.1")
        lab.tproxy.assign(near, "127.0.0.77", 777)
        lab.tproxy.set_flags(near, Flag.CONNECT)
        near.connect(("127.0.0.1", 82))
        far, peer = server.accept()
        with far:
            exchange(near, far, 100_000)
            assert peer == ("127.0.0.77", 777)
            [entry] = lab.ask("connections")
            assert entry["original"]["destination"] == {"address": "127.0.0.1", "port": 82}
            assert entry["reply"]["source"] == {"address": "127.0.0.1", "port": 50082}
            assert entry["reply"]["destination"] == {"address": "127.0.0.77", "port": 777}


@versions
def test_a_foreign_port_that_was_left_open_is_told_afterwards(lab: EngineLab, version: int) -> None:
    server = lab.bound(lab.server, TCP, lab.server.address(version), 8000, listen=True)
    near = outward(lab, lab.client.address(version))
    assert lab.tproxy.query(near).port == 0
    near.connect((lab.server.address(version), 8000))
    far, peer = server.accept()
    far.close()
    assert peer[0] == lab.client.address(version)
    assert lab.tproxy.query(near).port == peer[1]


def test_an_open_foreign_port_is_none_that_a_sockref_owns(lab: EngineLab) -> None:
    """The connection's own port would be free, but the address with this port belongs to somebody."""
    server = lab.bound(lab.server, TCP, lab.server.address(), 8000, listen=True)
    owner = lab.bound(lab.gateway, TCP, lab.gateway.address(4, "eth1"), 7001)
    lab.tproxy.assign(owner, lab.client.address(), 45678)
    near = outward(lab, lab.client.address(), local_port=45678)
    near.connect((lab.server.address(), 8000))
    far, peer = server.accept()
    far.close()
    assert peer[0] == lab.client.address()
    assert peer[1] != 45678


def test_a_second_connection_with_the_same_tuple_is_dropped_and_counted(lab: EngineLab) -> None:
    server = lab.bound(lab.server, TCP, lab.server.address(), 8000, listen=True)
    first = outward(lab, lab.client.address(), 4444)
    first.connect((lab.server.address(), 8000))
    second = lab.bound(lab.gateway, TCP, lab.gateway.address(4, "eth1"), reuse=True)
    lab.tproxy.assign(second, lab.client.address(), 4444)
    lab.tproxy.set_flags(second, Flag.CONNECT)
    second.settimeout(0.3)
    with pytest.raises(TimeoutError):
        second.connect((lab.server.address(), 8000))
    assert lab.reasons("POSTROUTING")["clash"] >= 1
    server.accept()[0].close()


def test_a_foreign_port_may_be_used_again_while_its_last_connection_is_in_time_wait(lab: EngineLab) -> None:
    server = lab.bound(lab.server, TCP, lab.server.address(), 8000, listen=True, reuse=True)
    for _ in range(2):
        near = outward(lab, lab.client.address(), 4444)
        near.connect((lab.server.address(), 8000))
        far, peer = server.accept()
        assert peer == (lab.client.address(), 4444)
        near.close()
        assert far.recv(1) == b""
        far.close()
        until(lambda: bool(lab.tracked("TIME_WAIT")), "TIME_WAIT")


def test_the_mark_is_on_what_is_tproxied_and_nothing_else(lab: EngineLab) -> None:
    lab.gateway.run(
        [
            "nft",
            "add table ip filter; add chain ip filter forward { type filter hook forward priority 0; "
            "policy drop; }; add chain ip filter input { type filter hook input priority 0; policy drop; }; "
            "add rule ip filter input meta mark & 0x80000000 != 0 accept",
        ]
    )
    proxy = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    lab.bound(lab.gateway, TCP, ANY[4], 8080, listen=True)
    near = lab.open(lab.client, TCP)
    near.connect((lab.server.address(), 80))
    far, _ = proxy.accept()
    with far:
        exchange(near, far, 100_000)
    direct = lab.open(lab.client, TCP)
    direct.settimeout(0.2)
    with pytest.raises(TimeoutError):
        direct.connect((lab.gateway.address(), 8080))


# Beside the user's own rules.


def test_what_is_mapped_wins_over_the_users_nat_and_all_else_reaches_it(lab: EngineLab) -> None:
    lab.gateway.run(["nft", USERS.format(lab.server.address())])
    before = lab.gateway.run(["nft", "list", "table", "ip", "users"]).stdout
    proxy = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    listener = foreign_listener(lab, 4)
    near = lab.open(lab.client, TCP)
    near.connect((lab.server.address(), 80))
    proxy.accept()[0].close()
    asking = peer_of(lab)
    asking.send(b"?")
    assert listener.recvfrom(10)[0] == b"?"
    lab.bound(lab.server, TCP, lab.server.address(), 9, listen=True)
    for kind, port in ((TCP, 8080), (UDP, 5353)):
        other = lab.open(lab.client, kind)
        other.setblocking(False)
        assert other.connect_ex((FOREIGN[4], port)) in (0, 115)
        if kind == UDP:
            other.send(b"?")
        words = (f"dport={port}", "sport=9")
        until(functools.partial(lab.tracked, *words), f"the user's mapping of {port}")
    assert lab.gateway.run(["nft", "list", "table", "ip", "users"]).stdout == before


def test_a_foreign_source_wins_over_the_users_masquerade(lab: EngineLab) -> None:
    lab.gateway.run(["nft", USERS.format(lab.server.address())])
    server = lab.bound(lab.server, TCP, lab.server.address(), 8000, listen=True)
    near = outward(lab, lab.client.address(), 4444)
    near.connect((lab.server.address(), 8000))
    assert server.accept()[1] == (lab.client.address(), 4444)
    plain = lab.open(lab.client, TCP)
    plain.connect((lab.server.address(), 8000))
    assert server.accept()[1][0] == lab.gateway.address(4, "eth1")


# Narrowing.


def test_unrelated_connections_never_see_the_queue(lab: EngineLab) -> None:
    server = lab.bound(lab.server, TCP, lab.server.address(), 8000, listen=True)
    near = lab.open(lab.client, TCP)
    near.connect((lab.server.address(), 8000))
    server.accept()[0].close()
    foreign_listener(lab, 4)
    datagram = lab.open(lab.client, UDP)
    datagram.sendto(b"?", (lab.server.address(), 53))
    local = lab.open(lab.gateway, UDP)
    local.sendto(b"?", (lab.server.address(), 53))
    until(lambda: len(lab.tracked("udp", "dport=53")) == 2, "both datagrams")
    assert lab.queued() == 0


@pytest.mark.parametrize(
    ("rule", "comes"),
    [
        ("-p tcp -m tcp --dport 81", True),
        ("-p tcp -m tcp --dport 82", False),
        ("-p tcp -m tcp --dport 70:90", True),
        ("-p tcp", True),
        ("-i eth0 -p tcp", True),
        ("-i eth+ -p tcp", True),
        ("-i eth1 -p tcp", False),
        ("! -i eth1 -p tcp", True),
        ("! -i eth+ -p tcp", False),
        ("-p udp", False),
    ],
)
def test_what_a_rule_could_match_comes_to_the_queue(lab: EngineLab, rule: str, comes: bool) -> None:
    """Rules are changed while the engine runs; the next connection is decided by the new ones."""
    proxy = lab.bound(lab.gateway, TCP, ANY[4], 50081, listen=True)
    lab.rules("-F")
    target = "-j TPROXY --on-port 50081" if "tcp" in rule else "-j ACCEPT"
    lab.rules("-A", "PREROUTING", *rule.split(), *target.split())
    near = lab.open(lab.client, TCP)
    near.settimeout(0.5)
    near.connect_ex((lab.server.address(), 81))
    assert (lab.queued() == 1) is comes
    if comes:
        proxy.accept()[0].close()
    lab.rules("-F")
    again = lab.open(lab.client, TCP)
    with pytest.raises(ConnectionRefusedError):
        again.connect((lab.server.address(), 81))
    assert (lab.queued() == 1) is comes


def test_a_policy_of_drop_wants_everything(lab: EngineLab) -> None:
    lab.rules("-P", "PREROUTING", "DROP")
    near = lab.open(lab.client, TCP)
    near.settimeout(0.2)
    with pytest.raises(TimeoutError):
        near.connect((lab.server.address(), 8000))
    assert lab.reasons("PREROUTING")["rule-drop"] >= 1


def test_a_sockref_that_has_gone_wants_nothing_any_more(lab: EngineLab) -> None:
    listener = lab.bound(lab.gateway, UDP, lab.gateway.address(), 7000)
    lab.tproxy.assign(listener, lab.server.address(), 53)
    lab.tproxy.set_flags(listener, Flag.LISTEN)
    asking = lab.open(lab.client, UDP)
    asking.connect((lab.server.address(), 53))
    asking.send(b"?")
    listener.recv(10)
    listener.close()
    until(lambda: lab.ask("sockrefs") == [], "unassigned")
    for name in ("foreign4", "local4"):
        assert "elements" not in lab.gateway.run(["nft", "list", "set", "inet", "nfq_tproxy", name]).stdout
    asking.send(b"?")
    until(lambda: bool(lab.tracked("udp", "dport=53")), "passed by")
    assert lab.queued() == 1


# What a sockref's flags mean.


@datapaths
def test_once_serves_one_connection(tmp_path: Path, datapath: str) -> None:
    with engine_lab(tmp_path, datapath=datapath) as lab:
        server = lab.bound(lab.server, TCP, lab.server.address(), 8000, listen=True)
        proxy = lab.bound(lab.gateway, TCP, lab.gateway.address(), 7000, listen=True)
        lab.tproxy.assign(proxy, lab.server.address(), 8000)
        lab.tproxy.set_flags(proxy, Flag.LISTEN | Flag.ONCE)
        first, second = lab.open(lab.client, TCP), lab.open(lab.client, TCP)
        first.connect((lab.server.address(), 8000))
        second.connect((lab.server.address(), 8000))
        near, far = proxy.accept()[0], server.accept()[0]
        with near, far:
            exchange(first, near, 1000)
            exchange(second, far, 1000)


@datapaths
def test_call_that_fails_changes_nothing(tmp_path: Path, datapath: str) -> None:
    """Neither the sockref, nor the connections that it made: they go on."""
    with engine_lab(tmp_path, datapath=datapath) as lab:
        server = lab.bound(lab.server, TCP, lab.server.address(), 8000, listen=True)
        near = outward(lab, lab.client.address(), 4711)
        near.connect((lab.server.address(), 8000))
        far, _ = server.accept()
        other = lab.bound(lab.gateway, TCP, lab.gateway.address(4, "eth1"), reuse=True)
        lab.tproxy.assign(other, lab.client.address(), 4711)
        before, connections = lab.ask("sockrefs"), [each["id"] for each in lab.ask("connections")]
        unbound = lab.open(lab.gateway, TCP)
        calls: list[tuple[int, Callable[[], None]]] = [
            (errno.EINVAL, lambda: lab.tproxy.set_flags(near, Flag.ESTABLISHED)),
            (errno.EINVAL, lambda: lab.tproxy.set_flags(near, Flag.CONNECT | Flag.LISTEN)),
            (errno.EINVAL, lambda: lab.tproxy.set_flags(near, Flag.CONNECT | Flag.APPLIED)),
            (errno.EINVAL, lambda: lab.tproxy.set_flags(other, Flag.LISTEN)),
            (errno.EINVAL, lambda: lab.tproxy.alloc(near)),
            (errno.EINVAL, lambda: lab.tproxy.assign(near, FOREIGN[4])),
            (errno.EEXIST, lambda: lab.tproxy.assign(other, FOREIGN[4])),
            (errno.EINVAL, lambda: lab.tproxy.assign(unbound, FOREIGN[4])),
            (errno.ENOENT, lambda: lab.tproxy.unassign(unbound)),
            (errno.ENOENT, lambda: lab.tproxy.set_flags(unbound, Flag.LISTEN | Flag.UNIDIR)),
        ]
        with far:
            for expected, call in calls:
                with pytest.raises(OSError, match=re.escape(os.strerror(expected))) as failed:
                    call()
                assert failed.value.errno == expected
            assert lab.ask("sockrefs") == before
            assert [each["id"] for each in lab.ask("connections")] == connections
            exchange(near, far, 10_000)


@versions
@datapaths
def test_one_way_listener_keeps_no_state(tmp_path: Path, datapath: str, version: int) -> None:
    with engine_lab(tmp_path, datapath=datapath) as lab:
        listener = foreign_listener(lab, version, Flag.LISTEN | Flag.UNIDIR)
        asking = peer_of(lab, version)
        for number in range(3):
            asking.send(b"%d" % number)
            data, peer = listener.recvfrom(10)
            assert data == b"%d" % number
            assert peer[:2] == asking.getsockname()[:2]
        assert lab.reasons("PREROUTING")["unidir"] == 3
        assert lab.ask("connections") == []
        if datapath == "kernel":
            assert lab.tracked("udp") == []
        listener.sendto(b"!", peer)
        asking.settimeout(0.2)
        with pytest.raises(TimeoutError):
            asking.recv(10)  # it came from the listener's own address


@datapaths
def test_one_way_listener_and_sockets_for_single_peers(tmp_path: Path, datapath: str) -> None:
    """The UDP sequence of Zorp: a one-way listener, and for each new peer a second socket on the same address."""
    with engine_lab(tmp_path, datapath=datapath) as lab:
        listener = foreign_listener(lab, 4, Flag.LISTEN | Flag.UNIDIR)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        known, other = peer_of(lab), peer_of(lab)
        known.send(b"first")
        _, peer = listener.recvfrom(10)
        special = lab.bound(lab.gateway, UDP, lab.gateway.address(4, "eth0"), reuse=True)
        lab.tproxy.assign(special, FOREIGN[4], 53)
        lab.tproxy.connect(special, *peer)
        lab.tproxy.set_flags(special, Flag.ESTABLISHED)
        for number in range(3):
            known.send(b"to special")
            data, peer = special.recvfrom(10)
            assert data == b"to special"
            special.sendto(b"back %d" % number, peer)
            assert known.recv(10) == b"back %d" % number
        other.send(b"other")
        assert listener.recvfrom(10)[0] == b"other"
        if datapath == "kernel":
            assert lab.reasons("PREROUTING") == {"unidir": 2, "sockref": 1}
        special.close()
        until(lambda: len(lab.ask("sockrefs")) == 1, "unassigned")
        known.send(b"again")
        assert listener.recvfrom(10)[0] == b"again"


@datapaths
@deletions
def test_listener_that_closes_is_an_orphan_until_its_last_connection_ends(
    tmp_path: Path, datapath: str, deletion: str
) -> None:
    with engine_lab(tmp_path, datapath=datapath, options=["--deletion", deletion]) as lab:
        lab.gateway.run(["sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_timeout_close=1"])
        proxy = lab.bound(lab.gateway, TCP, lab.gateway.address(), 7000, listen=True)
        lab.tproxy.assign(proxy, FOREIGN[4], 8000)
        lab.tproxy.set_flags(proxy, Flag.LISTEN)
        near = lab.open(lab.client, TCP)
        near.connect((FOREIGN[4], 8000))
        far, _ = proxy.accept()
        [entry] = lab.ask("sockrefs")
        assert entry["related"] == 1
        proxy.close()
        until(lambda: "ORPHAN" in lab.ask("sockrefs")[0]["flags"], "an orphan")
        exchange(near, far, 1000)
        if datapath == "kernel":
            lab.gateway.run(["conntrack", "-D", "-p", "tcp", "--orig-port-dst", "8000"])
            until(lambda: lab.ask("sockrefs") == [], "the orphan has gone")
        far.close()


# Deletion.


@versions
@datapaths
@deletions
def test_unassigning_deletes_the_connections_of_this_sockref_only(
    tmp_path: Path, datapath: str, deletion: str, version: int
) -> None:
    with engine_lab(tmp_path, datapath=datapath, options=["--deletion", deletion]) as lab:
        doomed = foreign_listener(lab, version)
        kept = lab.bound(lab.gateway, UDP, lab.gateway.address(version, "eth0"), 7001)
        lab.tproxy.assign(kept, FOREIGN[version], 54)
        lab.tproxy.set_flags(kept, Flag.LISTEN)
        for listener, port in ((doomed, 53), (doomed, 53), (kept, 54)):
            peer_of(lab, version, port).send(b"?")
            listener.recv(10)
        assert sorted(entry["related"] for entry in lab.ask("sockrefs")) == [1, 2]
        assert len(lab.ask("connections")) == 3
        lab.tproxy.unassign(doomed)
        [entry] = lab.ask("sockrefs")
        assert entry["related"] == 1
        [connection] = lab.ask("connections")
        assert connection["original"]["destination"]["port"] == 54


@datapaths
@deletions
def test_setting_flags_deletes_so_that_the_next_packet_is_looked_up_afresh(
    tmp_path: Path, datapath: str, deletion: str
) -> None:
    with engine_lab(tmp_path, datapath=datapath, options=["--deletion", deletion]) as lab:
        listener = foreign_listener(lab, 4)
        asking = peer_of(lab)
        asking.send(b"1")
        listener.recv(10)
        lab.tproxy.set_flags(listener, Flag.CONNECT)
        assert lab.ask("connections") == []
        asking.send(b"2")
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.recv(10)
        listener.settimeout(PATIENCE)
        lab.tproxy.set_flags(listener, Flag.LISTEN)
        fresh = peer_of(lab)
        fresh.send(b"3")
        assert listener.recv(10) == b"3"


@deletions
def test_connections_that_end_by_themselves_leave_the_list(tmp_path: Path, deletion: str) -> None:
    with engine_lab(tmp_path, options=["--deletion", deletion]) as lab:
        listener = foreign_listener(lab, 4)
        one, other = peer_of(lab), peer_of(lab)
        for peer in (one, other):
            peer.send(b"?")
            listener.recv(10)
        lab.gateway.run(["conntrack", "-D", "-p", "udp", "--orig-port-src", str(one.getsockname()[1])])
        assert lab.ask("sockrefs")[0]["related"] == 1
        lab.gateway.run(["sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=1"])
        other.send(b"!")  # and its time begins anew, with this one second
        listener.recv(10)
        # The kernel notices that a timeout is over when it next comes by the entry, as a listing makes it do.
        until(lambda: lab.ask("connections") == [], "timed out")
        until(lambda: lab.ask("sockrefs")[0]["related"] == 0, "off the list")


def test_a_connection_that_never_came_about_leaves_the_list(lab: EngineLab) -> None:
    """The user's filter drops the packet after the engine mapped it, so conntrack never reports it."""
    lab.gateway.run(
        ["nft", "add table ip filter; add chain ip filter input { type filter hook input priority 0; policy drop; }"]
    )
    listener = foreign_listener(lab, 4)
    peer_of(lab).send(b"?")
    until(lambda: lab.reasons("PREROUTING") == {"sockref": 1}, "decided")
    assert lab.ask("connections") == []
    assert lab.ask("sockrefs")[0]["related"] == 1
    lab.tproxy.unassign(listener)
    assert lab.ask("sockrefs") == []


# Trouble.


def test_full_map_drops_and_counts(lab: EngineLab) -> None:
    filling = ", ".join(
        f"udp . 10.0.{n >> 8}.{n & 255} . {port} . 1.1.1.1 . 1 timeout 1h : 1.1.1.1 . 1"
        for n in range(1024)
        for port in range(1, 65)
    )
    fill(lab, "destination4", filling)
    listener, peer = foreign_listener(lab, 4), peer_of(lab)
    peer.send(b"lost")
    until(lambda: lab.reasons("PREROUTING") == {"map-full": 1}, "dropped")
    lab.gateway.run(["nft", "flush", "map", "inet", "nfq_tproxy", "destination4"])
    peer.send(b"found")
    assert listener.recv(10) == b"found"


def fill(lab: EngineLab, name: str, elements: str) -> None:
    """Put elements into a map, some at a time: in a user namespace, nft's messages are no larger than its buffer."""
    path, each = lab.lab.directory / "full.nft", elements.split(", ")
    for begin in range(0, len(each), 1000):
        path.write_text(f"add element inet nfq_tproxy {name} {{ {', '.join(each[begin : begin + 1000])} }}\n")
        lab.gateway.run(["nft", "-f", str(path)])


def test_refused_element_drops_and_counts(lab: EngineLab) -> None:
    """Somebody put an element for this very tuple into the map."""
    foreign_listener(lab, 4)
    near = lab.bound(lab.client, UDP, lab.client.address(), 33333)
    fill(lab, "destination4", f"udp . {lab.client.address()} . 33333 . {FOREIGN[4]} . 53 timeout 1h : 1.1.1.1 . 1")
    near.sendto(b"?", (FOREIGN[4], 53))
    until(lambda: lab.reasons("PREROUTING") == {"map-refused": 1}, "dropped")


def test_where_the_map_for_redirects_takes_no_more_a_packet_is_dropped_and_the_next_has_its_own_element(
    lab: EngineLab,
) -> None:
    proxy = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    fill(lab, "redirect4", ", ".join(f'"lo" . tcp . {port} : 1.1.1.1 . 1' for port in range(1, 4097)))
    near = lab.open(lab.client, TCP)
    near.settimeout(0.3)
    with pytest.raises(TimeoutError):
        near.connect((lab.server.address(), 80))
    near.close()  # before it sends its SYN again, on a machine that is not busy
    full = lab.reasons("PREROUTING")
    assert full.keys() == {"map-full"}
    again = lab.open(lab.client, TCP)
    again.connect((lab.server.address(), 80))
    proxy.accept()[0].close()
    assert lab.reasons("PREROUTING") == {**full, "redirect": 1}


@versions
def test_killed_engine_keeps_connections_and_the_next_one_adopts_them(lab: EngineLab, version: int) -> None:
    proxy = lab.bound(lab.gateway, TCP, ANY[version], 50080, listen=True)
    near = lab.open(lab.client, TCP, version)
    near.connect((lab.server.address(version), 80))
    far, _ = proxy.accept()
    with far:
        program = lab.lab.programs.pop(("gateway", "tproxyd"))
        program.kill()
        exchange(near, far, 100_000)
        late = lab.open(lab.client, TCP, version)
        late.settimeout(0.2)
        with pytest.raises(TimeoutError):
            late.connect((lab.server.address(version), 80))
        late.close()  # or its SYN, sent again, would reach the next engine
        handle = lab.gateway.run(["nft", "-a", "list", "tables"]).stdout
        rule = "-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080"
        lab.start_engine([rule])
        assert lab.gateway.run(["nft", "-a", "list", "tables"]).stdout == handle
        exchange(near, far, 100_000)
        assert len(lab.ask("connections")) == 1
    again = lab.open(lab.client, TCP, version)
    again.connect((lab.server.address(version), 80))
    proxy.accept()[0].close()


def test_killed_engine_that_fails_open_lets_new_connections_pass(tmp_path: Path) -> None:
    with engine_lab(tmp_path, options=["--fail-open"]) as lab:
        server = lab.bound(lab.server, TCP, lab.server.address(), 80, listen=True)
        lab.lab.programs.pop(("gateway", "tproxyd")).kill()
        near = lab.open(lab.client, TCP)
        near.connect((lab.server.address(), 80))
        assert server.accept()[1][0] == lab.client.address()


@pytest.mark.parametrize(("before", "after"), [("inline", "kernel"), ("kernel", "inline")])
def test_engine_replaces_the_table_of_another_datapath(tmp_path: Path, before: str, after: str) -> None:
    with engine_lab(tmp_path, datapath=before) as lab:
        lab.lab.programs.pop(("gateway", "tproxyd")).kill()
        lab.gateway.start(
            "tproxyd", ["tproxyd", "--datapath", after, "--notify-fd", "{notify_fd}"], Readiness(notify=True)
        )
        table = lab.gateway.run(["nft", "list", "table", "inet", "nfq_tproxy"]).stdout
        assert f"layout_{after}_" in table
        assert f"layout_{before}_" not in table


def test_stopped_engine_takes_its_table_along(lab: EngineLab) -> None:
    lab.lab.programs["gateway", "tproxyd"].stop()
    assert lab.gateway.run(["nft", "list", "ruleset"]).stdout == ""


def overflow_reports(lab: EngineLab) -> None:
    """Make more entries that carry the mark than reports of them fit into a socket."""
    path = lab.lab.directory / "entries"
    path.write_text(
        "".join(
            f"-I -p udp -s 10.0.{n >> 8}.{n & 255} -d 10.1.1.1 --sport 1 --dport 1 -t 60 -m 0x80000000\n"
            for n in range(30_000)
        )
    )
    lab.gateway.run(["conntrack", "-R", str(path)])


def test_lost_reports_are_made_up_for(lab: EngineLab) -> None:
    """While the engine is stopped, conntrack reports more than the engine's socket can hold."""
    listener = foreign_listener(lab, 4)
    asking = peer_of(lab)
    asking.send(b"?")
    listener.recv(10)
    assert lab.ask("sockrefs")[0]["related"] == 1
    engine = lab.lab.programs["gateway", "tproxyd"].pid
    os.kill(engine, signal.SIGSTOP)
    try:
        lab.gateway.run(["conntrack", "-D", "-p", "udp"])
        overflow_reports(lab)
    finally:
        os.kill(engine, signal.SIGCONT)
    until(lambda: lab.ask("sockrefs")[0]["related"] == 0, "compared")
    assert "reports of conntrack were lost" in lab.lab.programs["gateway", "tproxyd"].log.read_text()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """As many as this process may have, which is more than it has at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_the_sockets_of_a_big_program_that_dies_are_all_forgotten(lab: EngineLab) -> None:
    """All at once, more than one message to nf_tables can name."""
    here = lab.gateway.address(4, "eth0")
    with contextlib.ExitStack() as program:
        for number in range(2800):
            made = program.enter_context(lab.gateway.namespace.socket(socket.AF_INET, TCP))
            made.bind((here, 0))
            lab.tproxy.assign(made, f"198.51.{number >> 8}.{number & 255}", 80)
        engine = lab.lab.programs["gateway", "tproxyd"].pid
        os.kill(engine, signal.SIGSTOP)
    os.kill(engine, signal.SIGCONT)
    until(lambda: not lab.ask("counters")["sockrefs"], "forgotten")
    assert not lab.ask("sockrefs")
    assert "elements" not in lab.gateway.run(["nft", "list", "set", "inet", "nfq_tproxy", "foreign4"]).stdout


def lose_news_of_sockets(lab: EngineLab) -> None:
    """Close sockets until the engine, which is stopped, has no room for the news of another."""

    def is_lost() -> bool:
        for _ in range(500):
            lab.gateway.namespace.socket(socket.AF_INET, UDP).close()
        rows = lab.gateway.run(["cat", "/proc/net/netlink"]).stdout.splitlines()[1:]
        return any(protocol == SOCK_DIAG and int(drops) for _, protocol, *_, drops, _ in map(str.split, rows))

    until(is_lost, "news is lost")


def test_a_socket_of_whose_end_no_news_came_is_forgotten_though_it_lingers_in_time_wait(lab: EngineLab) -> None:
    """Its end was told, or lost, when TIME_WAIT began; afterwards comes nothing."""
    server = lab.bound(lab.server, TCP, ANY[4], 80, listen=True)
    closed, kept = (lab.bound(lab.gateway, TCP, lab.gateway.address(4, "eth1"), port) for port in (7000, 7001))
    for each in (closed, kept):
        lab.tproxy.assign(each, "0.0.0.0")
        each.connect((lab.server.address(), 80))
    far, _ = server.accept()
    engine = lab.lab.programs["gateway", "tproxyd"].pid
    os.kill(engine, signal.SIGSTOP)
    try:
        lose_news_of_sockets(lab)
        closed.close()
        assert far.recv(1) == b""
        far.close()
        until(lambda: "TIME-WAIT" in lab.gateway.run(["ss", "-tan", "sport = 7000"]).stdout, "it lingers")
    finally:
        os.kill(engine, signal.SIGCONT)
    until(lambda: [each["local"]["port"] for each in lab.ask("sockrefs")] == [7001], "forgotten")
    assert "news of closed sockets was lost" in lab.lab.programs["gateway", "tproxyd"].log.read_text()


# Looking inside.


def test_connections_are_listed_with_counters_where_the_kernel_accounts(lab: EngineLab) -> None:
    lab.gateway.run(["sysctl", "-qw", "net.netfilter.nf_conntrack_acct=1"])
    listener = foreign_listener(lab, 4)
    asking = peer_of(lab)
    for _ in range(3):
        asking.send(b"12345")
        listener.recvfrom(10)
    [connection] = lab.ask("connections")
    assert connection["packets"] == {"original": 3, "reply": 0}
    assert connection["bytes"] == {"original": 3 * 33, "reply": 0}
    assert connection["state"] == "UNREPLIED"
    assert connection["is_mapped"]
    assert connection["rule"] == ""
    assert connection["inside"]["destination"]["port"] == 7000
    assert json.dumps(connection)


def test_packets_that_nobody_counts_are_listed_as_a_dash(lab: EngineLab) -> None:
    listener = foreign_listener(lab, 4)
    peer_of(lab).send(b"12345")
    listener.recvfrom(10)
    [_, row] = lab.gateway.run(["tproxyctl", "connections"]).stdout.splitlines()
    assert "- / -" in row
    assert "None" not in row
