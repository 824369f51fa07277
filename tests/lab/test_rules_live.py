"""What people write with iptables, on live traffic: each match once, and the commands that look at and change rules."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_lab import ANY, PATIENCE, TCP, EngineLab, engine_lab

pytestmark = pytest.mark.lab


@pytest.fixture(params=["inline", "kernel"])
def lab(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[EngineLab]:
    with engine_lab(tmp_path, (), request.param) as running:
        running.bound(running.gateway, TCP, ANY[4], 50080, listen=True)
        yield running


def rule(lab: EngineLab, text: str, status: int = 0) -> str:
    result = lab.gateway.run(["tproxyctl", *shlex.split(text)], check=False)
    assert result.returncode == status, result.stderr
    return result.stdout or result.stderr


def is_redirected(lab: EngineLab, port: int) -> bool:
    """Does the client come to the proxy, and not to the server, which refuses?"""
    with lab.client.namespace.socket(socket.AF_INET, TCP) as near:
        near.settimeout(PATIENCE)
        try:
            near.connect((lab.server.address(), port))
        except ConnectionRefusedError:
            return False
        return True


MATCHES = [
    pytest.param("-m multiport --dports 81,90:92", [(81, True), (91, True), (93, False)], id="multiport"),
    pytest.param("-m multiport ! --ports 81", [(81, False), (82, True)], id="multiport-inverted"),
    pytest.param("-m mark --mark 0x2/0x2", [(95, True), (96, False)], id="mark"),
    pytest.param("-m comment --comment 'all of it'", [(81, True)], id="comment"),
    pytest.param("-m addrtype --dst-type UNICAST", [(81, True)], id="addrtype"),
    pytest.param("-m limit --limit 1/hour --limit-burst 2", [(81, True), (81, True), (81, False)], id="limit"),
    pytest.param(
        "-m statistic --mode nth --every 2 --packet 0", [(81, False), (81, True), (81, False)], id="statistic-nth"
    ),
    pytest.param("-m statistic --mode random --probability 1", [(81, True)], id="statistic-always"),
    pytest.param("-m statistic --mode random --probability 0", [(81, False)], id="statistic-never"),
]


@pytest.mark.parametrize(("match", "ports"), MATCHES)
def test_match_decides(lab: EngineLab, match: str, ports: list[tuple[int, bool]]) -> None:
    lab.gateway.run(
        ["nft", "table ip users { chain c { type filter hook prerouting priority -310; tcp dport 95 mark set 0x6; }; }"]
    )
    text = f"-A PREROUTING -p tcp {match} -j TPROXY --on-port 50080"
    rule(lab, text)
    assert [(port, is_redirected(lab, port)) for port, _ in ports] == ports
    matched = sum(is_match for _, is_match in ports)
    [line] = [line for line in rule(lab, "-L PREROUTING -nvx").splitlines() if "TPROXY" in line]
    assert int(line.split()[0]) == matched
    rule(lab, f"-C{text.removeprefix('-A')}")


UNSUPPORTED = [
    ("-A PREROUTING -m state --state NEW -j ACCEPT", "state"),
    ("-A PREROUTING -m conntrack --ctstate NEW -j ACCEPT", "conntrack"),
    ("-A PREROUTING -m tproxy -j ACCEPT", "tproxy"),
    ("-A PREROUTING -m socket -j ACCEPT", "socket"),
    ("-A PREROUTING -m mac --mac-source 00:00:00:00:00:01 -j ACCEPT", "mac"),
    ("-A PREROUTING -p icmp -j ACCEPT", "icmp"),
    ("-A PREROUTING -p tcp -m tcp --tcp-flags SYN SYN -j ACCEPT", "tcp-flags"),
    ("-A PREROUTING -f -j ACCEPT", "-f"),
    ("-A PREROUTING -p tcp -j REDIRECT --to-ports 80", "REDIRECT"),
    ("-A PREROUTING -m addrtype --dst-type BLACKHOLE -j ACCEPT", "BLACKHOLE"),
    ("-A OUTPUT -m owner --pid-owner 1 -j ACCEPT", "pid-owner"),
    ("-A OUTPUT -m owner --uid-owner root -j ACCEPT", "root"),
    ("-A FORWARD -j ACCEPT", "FORWARD"),
]


def test_what_is_not_supported_is_refused_by_name_and_changes_nothing(lab: EngineLab) -> None:
    before = rule(lab, "-S")
    for text, name in UNSUPPORTED:
        told = rule(lab, text, status=1)
        assert told.startswith("tproxyctl: ")
        assert name in told, text
    assert rule(lab, "-S") == before


def test_rules_are_replaced_and_chains_renamed_under_traffic(lab: EngineLab) -> None:
    rule(lab, "-N own")
    rule(lab, "-A own -p tcp --dport 81 -j TPROXY --on-port 50080")
    rule(lab, "-A PREROUTING -p tcp -j own")
    assert (is_redirected(lab, 81), is_redirected(lab, 82)) == (True, False)
    rule(lab, "-R own 1 -p tcp --dport 82 -j TPROXY --on-port 50080")
    assert (is_redirected(lab, 81), is_redirected(lab, 82)) == (False, True)
    rule(lab, "-E own other")
    assert (is_redirected(lab, 81), is_redirected(lab, 82)) == (False, True)
    assert rule(lab, "-C other -p tcp --dport 82 -j TPROXY --on-port 50080") == ""
    assert "no matching rule" in rule(lab, "-C other -p tcp --dport 81 -j TPROXY --on-port 50080", status=1)
    assert "own" in rule(lab, "-L own", status=1)
    rule(lab, "-D other 1")
    assert not is_redirected(lab, 82)


def test_listing_has_numbers_names_and_exact_counts(lab: EngineLab) -> None:
    rule(lab, "-A PREROUTING -p udp -j ACCEPT")
    rule(lab, "-A PREROUTING -p tcp --dport 81 -c 123456 7654321 -j TPROXY --on-port 50080")
    assert is_redirected(lab, 81)
    packets, size = 123457, 7654321 + 60
    lines = rule(lab, "-L PREROUTING -n -v -x --line-numbers").splitlines()
    assert lines[3].split()[:5] == ["2", str(packets), str(size), "TPROXY", "tcp"]
    assert rule(lab, "-L PREROUTING -nv").splitlines()[3].split()[:3] == ["123K", "7654K", "TPROXY"]
    assert (
        rule(lab, "-S PREROUTING -v")
        .splitlines()[2]
        .endswith(f"-m tcp --dport 81 -c {packets} {size} -j TPROXY --on-port 50080")
    )


OF_2003 = """\
# Generated by iptables-save v1.2.9 on Fri Oct 31 12:00:00 2003
*tproxy
:PREROUTING ACCEPT [12:3456]
:OUTPUT ACCEPT [0:0]
:http - [0:0]
[7:420] -A PREROUTING -s ! 192.168.0.0/255.255.0.0 -i ! eth1 -p tcp -m tcp --dport 81 -j http
[3:180] -A http -d {} -p tcp -m tcp --sport ! 1:1023 -j TPROXY --on-port 50080 --on-ip 0.0.0.0
[1:60] -A http -p tcp -m limit --limit 5/min -j TPROXY --on-port 50081 --on-ip 192.168.1.1
COMMIT
# Completed on Fri Oct 31 12:00:00 2003
"""


def test_table_of_2003_is_restored_and_counts_on(lab: EngineLab, tmp_path: Path) -> None:
    old, saved, more = (tmp_path / name for name in ("old", "saved", "more"))
    old.write_text(OF_2003.format(lab.server.address()))
    rule(lab, f"restore --test -c {old}")
    assert not is_redirected(lab, 81)
    rule(lab, f"restore -c {old}")
    assert is_redirected(lab, 81)
    saved.write_text(rule(lab, "save -c"))
    counted = [line for line in saved.read_text().splitlines() if line.startswith("[")]
    assert [line.partition(" ")[0] for line in counted] == ["[8:480]", "[4:240]", "[1:60]"]
    rule(lab, f"restore {old}")
    assert "[0:0] -A PREROUTING" in rule(lab, "save -c"), "counts are taken over only with -c"
    rule(lab, f"restore --counters {saved}")
    assert rule(lab, "save -c") == saved.read_text()
    more.write_text("*tproxy\n[5:300] -A OUTPUT -p tcp -j ACCEPT\nCOMMIT\n")
    rule(lab, f"restore -c --noflush {more}")
    assert set(rule(lab, "save -c").splitlines()) == {*saved.read_text().splitlines(), more.read_text().splitlines()[1]}
