"""tproxyctl monitor, trace and top, on both datapaths."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_lab import until

from nfq_engine.client import Flag, Tproxy
from testbed.lab import Lab
from testbed.owner import environment
from testbed.topology_file import loads

pytestmark = pytest.mark.lab

TOPOLOGY = """
name: watch
nodes:
  host:
    engine:
      datapath: {datapath}
      rules: ["-A OUTPUT -p tcp -m tcp --dport 80 -j TPROXY --on-port 5080",
              "-A OUTPUT -p tcp -m tcp --dport 81 -j DROP"]
  peer:
links:
  - ends: [{{node: host}}, {{node: peer}}]
"""
PATIENCE = 10.0


@pytest.fixture(params=["inline", "kernel"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    with Lab(loads(TOPOLOGY.format(datapath=request.param)), tmp_path, capture=False) as running:
        yield running


class Watcher:
    """A tproxyctl that prints events."""

    def __init__(self, lab: Lab, *arguments: str) -> None:
        with lab["host"].namespace.entered():
            self.process = subprocess.Popen(
                ["tproxyctl", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
            )

    def output(self) -> str:
        """What it printed, when it has ended."""
        output, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, errors
        return output


@contextlib.contextmanager
def watching(lab: Lab, *arguments: str) -> Iterator[Watcher]:
    """A tproxyctl that the engine is telling already; ended in any case."""
    before = listeners(lab)
    watcher = Watcher(lab, *arguments)
    try:
        while listeners(lab) == before:
            assert watcher.process.poll() is None, watcher.process.communicate()
        yield watcher
    finally:
        watcher.process.kill()
        watcher.process.communicate()


def listeners(lab: Lab) -> int:
    counters = json.loads(lab["host"].run(["tproxyctl", "counters", "--json"]).stdout)
    listening = counters["watchers"]
    assert isinstance(listening, int)
    return listening


def connect(lab: Lab, port: int, patience: float = 0.3) -> tuple[str, int]:
    """Try to connect to the peer from the host; the address it was tried from. Without patience, one SYN is sent."""
    with lab["host"].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as near:
        near.bind((lab["host"].address(), 0))
        near.settimeout(patience)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            near.connect((lab["peer"].address(), port))
        name: tuple[str, int] = near.getsockname()
        return name


@contextlib.contextmanager
def proxy(lab: Lab) -> Iterator[socket.socket]:
    with lab["host"].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.bind(("", 5080))
        listening.listen()
        yield listening


def endpoint(address: str, port: int) -> dict[str, Any]:
    return {"address": address, "port": port}


def test_monitor_tells_of_sockrefs_connections_and_drops(lab: Lab) -> None:
    with proxy(lab), watching(lab, "monitor", "--json", "--count", "5") as watcher:
        address, port = connect(lab, 80)
        connect(lab, 81, patience=0)
        with (
            lab["host"].call(Tproxy) as tproxy,
            lab["host"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as owner,
        ):
            owner.bind((address, 4000))
            tproxy.assign(owner, "198.51.100.7", 53)
            tproxy.unassign(owner)
        events = [json.loads(line) for line in watcher.output().splitlines()]
    by_kind = {event["event"]: event for event in events}
    assert sorted(by_kind) == ["assign", "dropped", "mapped", "new", "unassign"]
    mapped = by_kind["mapped"]["connection"]
    assert mapped["original"]["source"] == endpoint(address, port)
    assert mapped["original"]["destination"] == endpoint(lab["peer"].address(), 80)
    assert mapped["inside"]["destination"] == endpoint("127.0.0.1", 5080)
    assert by_kind["new"]["connection"]["id"] == mapped["id"]
    dropped = by_kind["dropped"]
    assert (dropped["hook"], dropped["reason"], dropped["detail"]) == ("OUTPUT", "rule-drop", "OUTPUT 2")
    assert dropped["before"]["destination"] == endpoint(lab["peer"].address(), 81)
    assert by_kind["assign"]["sockref"]["foreign"] == endpoint("198.51.100.7", 53)
    assert by_kind["unassign"]["sockref"]["local"] == endpoint(address, 4000)


def test_monitor_tells_when_connections_are_deleted_with_their_sockref(lab: Lab) -> None:
    with (
        lab["host"].call(Tproxy) as tproxy,
        lab["host"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as owner,
        watching(lab, "monitor", "--count", "5") as watcher,
    ):
        owner.bind((lab["host"].address(), 4000))
        tproxy.assign(owner, "198.51.100.7", 53)
        tproxy.set_flags(owner, Flag.CONNECT)
        owner.sendto(b"x", (lab["peer"].address(), 9))
        until(lambda: tproxy.flags(owner) & Flag.APPLIED, "the datagram has been mapped")
        tproxy.unassign(owner)
        lines = watcher.output().splitlines()
    assert [line.split()[1] for line in lines] == ["assign", "new", "mapped", "unassign", "deleted"]
    assert "leaves as 198.51.100.7:53 > " in lines[2]


def test_trace_shows_rule_and_tuples_of_the_packets_that_are_wanted(lab: Lab) -> None:
    with proxy(lab), watching(lab, "trace", "--count", "1", "-p", "tcp", "--dport", "5080") as watcher:
        connect(lab, 81)
        address, port = connect(lab, 80)
        line = watcher.output()
    server = lab["peer"].address()
    assert line.split(None, 1)[1] == (
        f"OUTPUT out=eth0 tcp {address}:{port} > {server}:80 [S] 60 bytes: redirect by OUTPUT 1 => "
        f"{address}:{port} > 127.0.0.1:5080\n"
    )


def test_trace_names_the_sockref(lab: Lab) -> None:
    with (
        lab["host"].call(Tproxy) as tproxy,
        lab["host"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as owner,
        watching(lab, "trace", "--json", "--count", "1", "-p", "udp", "--sport", "53") as watcher,
    ):
        owner.bind((lab["host"].address(), 4000))
        tproxy.assign(owner, "198.51.100.7", 53)
        tproxy.set_flags(owner, Flag.CONNECT)
        owner.sendto(b"x", (lab["peer"].address(), 9))
        event = json.loads(watcher.output())
    assert (event["hook"], event["reason"], event["verdict"]) == ("POSTROUTING", "sockref", "accept")
    assert event["by"] == f"sockref 198.51.100.7:53 of {lab['host'].address()}:4000"
    assert event["after"]["source"] == endpoint("198.51.100.7", 53)


@pytest.mark.parametrize("lab", ["inline"], indirect=True)  # with datapath kernel no other packets come by
def test_a_trace_of_decisions_leaves_out_packets_that_go_by_an_earlier_one(lab: Lab) -> None:
    arguments = ("--json", "--decisions", "--count", "4", "-p", "udp", "--dport", "9")
    with (
        lab["peer"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
        watching(lab, "trace", *arguments) as watcher,
    ):
        peer.bind((lab["peer"].address(), 9))
        for _ in range(4):
            with lab["host"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(10):
                    sender.sendto(b"x", peer.getsockname())
        events = [json.loads(line) for line in watcher.output().splitlines()]
    # All packets would be those of the first connection.
    assert len({event["before"]["source"]["port"] for event in events}) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "icmp"], "icmp"),
        (["--dport", "80"], "dport"),
        (["-j", "ACCEPT"], "-j"),
        (["-p", "tcp", "--dport", "http-but-not"], "http-but-not"),
    ],
    ids=["protocol", "port without protocol", "target", "port"],
)
def test_a_bad_filter_is_refused_and_nobody_listens(lab: Lab, arguments: list[str], message: str) -> None:
    result = lab["host"].run(["tproxyctl", "trace", *arguments], check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert listeners(lab) == 0


@pytest.mark.needs("other-users")
def test_who_may_not_administer_may_not_listen(lab: Lab) -> None:
    for call in ("monitor", "trace"):
        command = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all", "tproxyctl", call]
        result = lab["host"].run(command, check=False)
        assert result.returncode == 1
        assert "CAP_NET_ADMIN" in result.stderr


def test_a_listener_that_does_not_read_is_told_how_much_it_missed(lab: Lab) -> None:
    with (
        lab["host"].call(Tproxy) as tproxy,
        lab["host"].call(Tproxy) as idle,
        lab["host"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as owner,
    ):
        owner.bind((lab["host"].address(), 4000))

        def make_events(pairs: int) -> int:
            for _ in range(pairs):
                tproxy.assign(owner, "198.51.100.7", 53)
                tproxy.unassign(owner)
            return 2 * pairs

        idle.call({"call": "monitor"})
        made = make_events(4000)
        events, told, lost = idle.events(), 0, 0
        while told + lost < made:
            event = next(events)
            if event["event"] == "lost":
                lost += event["events"]
            else:
                told += 1
                if not lost and told % 500 == 0:  # the news of what was lost comes with the next event that has room
                    made += make_events(1)
    assert lost


def test_listening_ends_with_the_engine(lab: Lab) -> None:
    with watching(lab, "monitor") as watcher:
        lab.programs["host", "tproxyd"].stop()
        _, errors = watcher.process.communicate(timeout=PATIENCE)
    assert watcher.process.returncode == 1
    assert "closed the connection" in errors


def test_top_shows_the_busiest_connection_first(lab: Lab) -> None:
    lab["host"].run(["sh", "-c", "echo 1 > /proc/sys/net/netfilter/nf_conntrack_acct"])
    with proxy(lab) as listening, lab["host"].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as near:
        near.connect((lab["peer"].address(), 80))
        far, _ = listening.accept()
        with far, Watcher(lab, "top", "--interval", "2", "--count", "1").process as process:
            while process.poll() is None:
                near.sendall(bytes(1000))
                far.recv(1 << 16)
            assert process.stdout is not None
            heading, _, busiest, *_ = process.stdout.read().splitlines()
    assert heading == "1 connections, the 1 busiest"
    assert busiest.split()[:2] == ["tcp", "ESTABLISHED"]
    assert float(busiest.split()[-1].replace(",", "")) > 1


def test_top_tells_a_look_a_line_as_json(lab: Lab) -> None:
    with proxy(lab) as listening, lab["host"].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as near:
        near.connect((lab["peer"].address(), 80))
        far, _ = listening.accept()
        with far:
            told = lab["host"].run(["tproxyctl", "top", "--json", "--interval", "0.1", "--count", "2"]).stdout
    looks = [json.loads(line) for line in told.splitlines()]
    assert [(look["connections"], len(look["busiest"])) for look in looks] == [(1, 1)] * 2
    assert looks[0]["busiest"][0]["connection"]["protocol"] == "tcp"


def test_top_redraws_a_terminal(lab: Lab) -> None:
    reading, writing = pty.openpty()
    with lab["host"].namespace.entered():
        process = subprocess.Popen(
            ["tproxyctl", "top", "--interval", "0.2", "--count", "2"],
            stdout=writing,
            env={**environment(), "TERM": "xterm", "COLUMNS": "120", "LINES": "24"},
        )
    os.close(writing)
    shown = b""
    with contextlib.suppress(OSError):  # EIO is a pseudo-terminal's end
        while piece := os.read(reading, 4096):
            shown += piece
    os.close(reading)
    assert process.wait(PATIENCE) == 0
    assert b"0 connections" in shown
