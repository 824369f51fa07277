"""tproxyctl: the table saved and restored, and sockrefs in the layout of /proc/net/tproxy."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfq_engine.client import Flag, Tproxy
from testbed.lab import Lab
from testbed.topology_file import loads

pytestmark = pytest.mark.lab

TOPOLOGY = """
name: ctl
nodes:
  host:
    engine: {rules: ["-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080"]}
  peer:
links:
  - ends: [{node: host}, {node: peer}]
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(loads(TOPOLOGY), tmp_path, capture=False) as running:
        yield running


def ctl(lab: Lab, *arguments: str, status: int = 0) -> str:
    result = lab["host"].run(["tproxyctl", *arguments], check=False)
    assert result.returncode == status, result.stderr
    return result.stdout or result.stderr


def without_comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_what_is_saved_is_restored(lab: Lab, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.write_text(ctl(lab, "save"))
    assert "-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080" in saved.read_text()
    ctl(lab, "-F")
    ctl(lab, "restore", "--test", str(saved))
    assert "TPROXY" not in ctl(lab, "save"), "a test changes nothing"
    ctl(lab, "restore", str(saved))
    assert without_comments(ctl(lab, "save")) == without_comments(saved.read_text())


def test_noflush_adds(lab: Lab, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.write_text("*tproxy\n-A PREROUTING -p udp -m udp --dport 53 -j TPROXY --on-port 5353\nCOMMIT\n")
    ctl(lab, "restore", "--noflush", str(more))
    assert ctl(lab, "-S", "PREROUTING").count("TPROXY") == 2
    ctl(lab, "restore", str(more))
    assert ctl(lab, "-S", "PREROUTING").count("TPROXY") == 1


def test_restore_is_all_or_nothing(lab: Lab, tmp_path: Path) -> None:
    before = ctl(lab, "-S")
    bad = tmp_path / "bad"
    bad.write_text("*tproxy\n-A PREROUTING -p tcp -j ACCEPT\n-A PREROUTING -p tcp --dport 80x -j ACCEPT\nCOMMIT\n")
    told = ctl(lab, "restore", str(bad), status=1)
    assert "line 3" in told
    assert "80x" in told
    assert ctl(lab, "-S") == before


def test_text_that_is_no_text_is_refused_without_a_traceback(lab: Lab, tmp_path: Path) -> None:
    before = ctl(lab, "-S")
    bad = tmp_path / "bad"
    bad.write_bytes(b"\xff\xfe*tproxy\n")
    told = ctl(lab, "restore", str(bad), status=1)
    assert "UTF-8" in told
    assert "Traceback" not in told
    assert ctl(lab, "-S") == before


def test_sockrefs_as_proc_had_them(lab: Lab) -> None:
    host = lab["host"]
    with host.call(Tproxy) as tproxy, host.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("10.0.0.1", 5000))
        tproxy.assign(sock, "192.0.2.7", 80)
        tproxy.set_flags(sock, Flag.CONNECT)
        fields = ctl(lab, "sockrefs", "--proc").split()
    assert fields[:7] == ["06", "c0000207:0050", "0a000001:1388", "00000000:0000", "00000001", "0", "1"]


def test_ipv6_sockrefs_as_proc_would_have_had_them(lab: Lab) -> None:
    host = lab["host"]
    address = host.address(6)
    with host.call(Tproxy) as tproxy, host.namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 5000))
        tproxy.assign(sock, "2001:db8::7", 53)
        tproxy.connect(sock, "2001:db8::9", 1024)
        tproxy.set_flags(sock, Flag.ESTABLISHED)
        fields = ctl(lab, "sockrefs", "--proc").split()
    local, foreign, remote = (socket.inet_pton(socket.AF_INET6, text).hex() for text in (address, *FOREIGN_AND_REMOTE))
    ends = [f"{foreign}:0035", f"{local}:1388", f"{remote}:0400"]
    assert fields[:7] == ["11", *ends, "00000004", "0", "1"]


FOREIGN_AND_REMOTE = ("2001:db8::7", "2001:db8::9")
