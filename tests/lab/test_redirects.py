"""Redirects on the kernel datapath: what rules said of one connection holds for the next."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from engine_lab import ANY, TCP, UDP, EngineLab, engine_lab, until

from nfq_engine.client import Flag
from nfq_engine.shell.divert import TABLE
from nfq_engine.shell.nftables import Element, NftSocket

pytestmark = pytest.mark.lab

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[EngineLab]:
    with engine_lab(tmp_path) as running:
        yield running


def redirected(lab: EngineLab, proxy: socket.socket, version: int = 4, port: int = 80) -> None:
    """Connect once more, and arrive there."""
    near = lab.open(lab.client, TCP, version)
    near.connect((lab.server.address(version), port))
    far, peer = proxy.accept()
    far.close()
    assert peer[:2] == near.getsockname()[:2]


@versions
def test_the_next_connection_needs_no_element_of_its_own(lab: EngineLab, version: int) -> None:
    proxy = lab.bound(lab.gateway, TCP, ANY[version], 50080, listen=True)
    for _ in range(3):
        redirected(lab, proxy, version)
    assert lab.reasons("PREROUTING") == {"redirect": 3}
    table = json.loads(lab.gateway.run(["nft", "-j", "list", "table", "inet", "nfq_tproxy"]).stdout)
    maps = {each["map"]["name"]: each["map"].get("elem", []) for each in table["nftables"] if "map" in each}
    assert len(maps[f"redirect{version}"]) == 1
    assert maps[f"destination{version}"] == []
    assert re.search(
        r"^\[3:\d+\] -A PREROUTING -p tcp", lab.gateway.run(["tproxyctl", "save", "-c"]).stdout, re.MULTILINE
    )


def test_other_rules_hold_from_the_next_connection_on(lab: EngineLab) -> None:
    before = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    after = lab.bound(lab.gateway, TCP, ANY[4], 50081, listen=True)
    for _ in range(4):
        redirected(lab, before)
    lab.rules(*["-I", "PREROUTING", "-p", "tcp", "-m", "tcp", "--dport", "80", "-j", "TPROXY", "--on-port", "50081"])
    for _ in range(4):
        redirected(lab, after)
    lab.rules("-D", "PREROUTING", "1")
    redirected(lab, before)


def test_rules_that_tell_sources_apart_do_so_every_time(lab: EngineLab) -> None:
    """Both want the same element, by turns and at once."""
    rule = "-I PREROUTING -p tcp -m tcp --sport 40000:40009 --dport 80 -j TPROXY --on-port 50081"
    lab.rules(*rule.split())
    usual = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    special = lab.bound(lab.gateway, TCP, ANY[4], 50081, listen=True)
    nears = []
    for number in range(10):
        nears.append(lab.bound(lab.client, TCP, lab.client.address(), (40000, 41000)[number % 2] + number))
        nears[-1].setblocking(False)
    for near in nears:
        near.connect_ex((lab.server.address(), 80))
    for proxy, first in ((usual, 41000), (special, 40000)):
        arrived = []
        for _ in range(5):
            far, peer = proxy.accept()
            far.close()
            arrived.append(peer[1] // 1000 * 1000)
        assert arrived == [first] * 5


def test_what_is_marked_only_keeps_its_destination_beside_redirects(lab: EngineLab) -> None:
    """The mark has it looked for in the maps, where redirects have left an element for port 80."""
    proxy = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    own = lab.bound(lab.gateway, TCP, lab.gateway.address(4, "eth0"), 80, listen=True)
    lab.tproxy.assign(own, "0.0.0.0")
    for _ in range(2):
        for _ in range(3):
            redirected(lab, proxy)
        near = lab.open(lab.client, TCP)
        near.connect((lab.gateway.address(4, "eth0"), 80))
        own.accept()[0].close()
    assert lab.reasons("PREROUTING") == {"redirect": 6, "mark-only": 2}


def test_beside_a_one_way_listener_only_first_datagrams_are_queued(lab: EngineLab) -> None:
    """The listener is narrowed to one peer; the others' datagrams to its foreign endpoint are redirected by a rule."""
    listener = lab.bound(lab.gateway, UDP, lab.gateway.address(4, "eth0"), 7000)
    lab.tproxy.assign(listener, lab.server.address(), 80)
    lab.tproxy.connect(listener, "10.99.99.99", 9)
    lab.tproxy.set_flags(listener, Flag.LISTEN | Flag.UNIDIR)
    proxy = lab.bound(lab.gateway, UDP, lab.gateway.address(4, "eth0"), 50080)
    peers = [lab.open(lab.client, UDP) for _ in range(2)]
    for peer in peers:
        peer.connect((lab.server.address(), 80))
        peer.send(b"first")
        data, name = proxy.recvfrom(10)
        proxy.sendto(data, name)
        assert peer.recv(10) == b"first"
    before = lab.queued()
    for peer in peers:
        peer.send(b"second")
        assert proxy.recv(10) == b"second"
    assert lab.queued() == before


def test_an_interface_that_has_another_address_first_is_noticed(lab: EngineLab) -> None:
    proxy = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    first = lab.gateway.address(4, "eth0")
    for _ in range(3):
        assert redirected_to(lab, proxy) == first
    lab.gateway.run(["ip", "addr", "del", f"{first}/24", "dev", "eth0"])
    lab.gateway.run(["ip", "addr", "add", "10.99.0.1/32", "dev", "eth0"])
    lab.gateway.run(["ip", "addr", "add", f"{first}/24", "dev", "eth0"])
    until(lambda: redirected_to(lab, proxy) == "10.99.0.1", "the engine has heard of it")


def redirected_to(lab: EngineLab, proxy: socket.socket) -> str:
    """Connect once more; the address that the connection came to."""
    near = lab.open(lab.client, TCP)
    near.connect((lab.server.address(), 80))
    far, _ = proxy.accept()
    with far:
        address: str = far.getsockname()[0]
    return address


def reached_queue(lab: EngineLab) -> int:
    """How many packets have come to the engine's queues (net/netfilter/nfnetlink_queue.c, seq_show).

    The engine is asked something first: before it answers, it does what it has not done yet.
    """
    lab.reasons("PREROUTING")
    rows = lab.gateway.run(["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout.splitlines()
    return sum(int(row.split()[7]) for row in rows)


def kernel_answers(lab: EngineLab, proxy: socket.socket, version: int = 4, asked: int = 2) -> None:
    """Connect as often as the engine is to be asked, then once more, without it."""
    for number in range(asked + 1):
        before = reached_queue(lab)
        redirected(lab, proxy, version)
        assert reached_queue(lab) - before == (number < asked)


@versions
def test_the_kernel_answers_by_itself_what_rules_have_said_twice_and_its_counts_are_the_rules(
    lab: EngineLab, version: int
) -> None:
    proxy = lab.bound(lab.gateway, TCP, ANY[version], 50080, listen=True)
    kernel_answers(lab, proxy, version)
    before = reached_queue(lab)
    for _ in range(2):
        redirected(lab, proxy, version)
    assert reached_queue(lab) == before
    assert lab.reasons("PREROUTING") == {"redirect": 5}
    size = 60 if version == 4 else 80
    saved = lab.gateway.run(["tproxyctl", "save", "-c"]).stdout
    assert f"[5:{5 * size}] -A PREROUTING -p tcp" in saved
    assert len(lab.ask("connections")) == 5
    lab.rules("-Z")
    redirected(lab, proxy, version)
    assert f"[1:{size}] -A PREROUTING -p tcp" in lab.gateway.run(["tproxyctl", "save", "-c"]).stdout
    assert lab.reasons("PREROUTING") == {"redirect": 6}


def test_counts_that_are_set_to_zero_again_and_again_add_up(lab: EngineLab) -> None:
    ends = threading.Event()
    connected = 0

    def connect() -> None:
        nonlocal connected
        while not ends.is_set():
            with lab.client.namespace.socket(socket.AF_INET, TCP) as near, contextlib.suppress(ConnectionRefusedError):
                near.connect((lab.server.address(), 80))
            connected += 1

    def has_connected(times: int) -> bool:
        return connected >= times

    def count(*arguments: str) -> int:
        output = lab.tproxy.call({"call": "rules", "arguments": ["-L", "PREROUTING", "-v", "-x", *arguments]})["output"]
        return int(output[2].split()[0])

    thread = threading.Thread(target=connect)
    thread.start()
    counted = 0
    for wanted in range(20, 420, 20):
        until(partial(has_connected, wanted), "connected")
        counted += count("-Z")
    ends.set()
    thread.join()
    assert counted + count() == lab.reasons("PREROUTING")["redirect"] == connected


def test_where_rules_look_at_addresses_each_connection_comes_to_the_engine(lab: EngineLab) -> None:
    lab.rules(*["-I", "PREROUTING", "-s", "192.0.2.1", "-p", "tcp", "-m", "tcp", "--dport", "80", "-j", "DROP"])
    proxy = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    for number in range(1, 5):
        redirected(lab, proxy)
        assert reached_queue(lab) == number


def test_a_sockref_wins_over_what_the_kernel_answers_as_soon_as_it_is_there(lab: EngineLab) -> None:
    proxy = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    kernel_answers(lab, proxy)
    owner = lab.bound(lab.gateway, TCP, lab.gateway.address(4, "eth0"), 7000, listen=True)
    lab.tproxy.assign(owner, lab.server.address(), 80)
    lab.tproxy.set_flags(owner, Flag.LISTEN)
    for _ in range(2):
        redirected(lab, owner)
    name = meets(lab, owner, 40000)
    lab.tproxy.unassign(owner)
    assert meets(lab, proxy, 40000) == name
    redirected(lab, proxy)


def meets(lab: EngineLab, listener: socket.socket, port: int) -> str:
    """Connect from a fixed port, have the connection reset, and tell who came."""
    near = lab.bound(lab.client, TCP, lab.client.address(), port, reuse=True)
    near.connect((lab.server.address(), 80))
    far, peer = listener.accept()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
    near.close()
    with far, pytest.raises(ConnectionResetError):
        far.recv(1)
    until(lambda: not lab.tracked(f"sport={port}", "ESTABLISHED"), "the connection has gone")
    return f"{peer[0]}:{peer[1]}"


def test_the_largest_map_and_all_that_is_answered_can_be_renewed(lab: EngineLab) -> None:
    """Their elements, as a client that tries all ports makes them where rules redirect every port."""
    elements: list[Element] = [
        (bytes((9, 0, 0, 0, 6, 0, 0, 0, *divmod(port, 256), 0, 0)), bytes(20)) for port in range(4096)
    ]
    answers: list[Element] = [(bytes((9, 0, 0, 0, *divmod(port, 256), 0, 0)), b"") for port in range(256)]
    nft = lab.gateway.call(lambda: NftSocket(TABLE))
    with contextlib.closing(nft):
        for _ in range(2):
            nft.refill(["redirect6"], {"redirect6": elements})
            counted = nft.refill_counted(["answered6"], {"answered6": answers})
        assert len(counted) == len(answers)
    listed = json.loads(lab.gateway.run(["nft", "-j", "list", "map", "inet", TABLE, "redirect6"]).stdout)
    assert len(listed["nftables"][1]["map"]["elem"]) == len(elements)


def test_who_traces_sees_what_the_kernel_answered_before(lab: EngineLab) -> None:
    proxy = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    kernel_answers(lab, proxy)
    lab.gateway.start("watcher", ["tproxyctl", "trace", "--count", "3", "-p", "tcp", "--dport", "80"])
    until(lambda: lab.ask("counters")["watchers"] == 1, "it watches")
    for _ in range(3):
        redirected(lab, proxy)
    until(lambda: lab.ask("counters")["watchers"] == 0, "nobody watches")
    kernel_answers(lab, proxy, asked=1)
    assert lab.reasons("PREROUTING") == {"redirect": 8}


def test_what_the_kernel_answers_survives_the_engine_and_ends_with_the_next(lab: EngineLab) -> None:
    proxy = lab.bound(lab.gateway, TCP, ANY[4], 50080, listen=True)
    kernel_answers(lab, proxy)
    lab.lab.programs.pop(("gateway", "tproxyd")).kill()
    redirected(lab, proxy)
    rule = "-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50081"
    lab.start_engine([rule])
    other = lab.bound(lab.gateway, TCP, ANY[4], 50081, listen=True)
    for _ in range(3):
        redirected(lab, other)
    assert lab.reasons("PREROUTING") == {"redirect": 3}
