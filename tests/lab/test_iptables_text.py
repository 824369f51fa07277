"""The real iptables, in a namespace of its own, reads and prints the same rules."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from rule_cases import CASES

from nfq_engine.core.rule_listing import specification
from nfq_engine.core.rule_text import RuleError, parse_command, restore
from nfq_engine.core.ruleset import Ruleset

pytestmark = pytest.mark.lab

SHARED = [case for case in CASES if case.is_iptables]


def iptables() -> str:
    found = shutil.which("iptables-legacy") or shutil.which("iptables")
    if found is None:
        pytest.skip("missing iptables: install the package iptables")
    return found


def in_a_new_namespace(script: str) -> str:
    """Run a shell script where its rules are seen by nobody, and return what it prints."""
    command = ["unshare", "--net", "sh", "-ec", script]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def restored(lines: list[str]) -> str:
    """A script that loads rules into the table mangle, which has both our chains."""
    return "\n".join([f"{iptables()}-restore -w <<'EOF'", "*mangle", ":user - [0:0]", *lines, "COMMIT", "EOF", ""])


def ours(lines: list[str]) -> Ruleset:
    ruleset = Ruleset()
    restore("\n".join(["*tproxy", ":user - [0:0]", *lines, "COMMIT"]), ruleset)
    return ruleset


@pytest.mark.needs("other-users")
def test_iptables_prints_what_we_print() -> None:
    lines = [f"-A {case.chain} {case.written}".strip() for case in SHARED]
    printed = in_a_new_namespace(f"{restored(lines)}{iptables()} -w -t mangle -S").splitlines()
    wanted = [
        specification(case.chain, case.rule)
        for chain in ("PREROUTING", "OUTPUT")
        for case in SHARED
        if case.chain == chain
    ]
    assert [line for line in printed if line.startswith("-A")] == wanted


LISTED = [
    "-A PREROUTING -j user -c 100000 12345678",
    "-A PREROUTING -g user -c 99999 123456789012",
    "-A PREROUTING ! -s 10.0.0.0/8 ! -d 10.0.0.1 ! -i eth0 ! -p tcp",
    "-A PREROUTING -s 1.2.3.4/255.0.255.0 -p udp -m udp --sport 1:2 ! --dport 3",
    '-A PREROUTING -p tcp -m comment --comment "a b" -m multiport ! --dports 80,90:91',
    "-A PREROUTING -p tcp -m multiport --ports 5 -m mark ! --mark 1/2 -m limit --limit-burst 9",
    "-A OUTPUT -o abcdefghij -m owner ! --uid-owner 1-2 --gid-owner 3",
    "-A OUTPUT -m addrtype ! --dst-type LOCAL --src-type UNICAST",
    "-A OUTPUT -m statistic --mode nth ! --every 3 --packet 1 -j RETURN",
    "-A OUTPUT -m statistic --mode nth --every 3 --packet 0",
]


@pytest.mark.needs("other-users")
@pytest.mark.parametrize("options", ["-nv", "-nvx", "-n --line-numbers"])
def test_iptables_lists_as_we_list(options: str) -> None:
    script = (
        f"{restored(LISTED)}for chain in PREROUTING OUTPUT user; do {iptables()} -w -t mangle {options} -L $chain; done"
    )
    theirs = in_a_new_namespace(script).splitlines()
    ruleset = ours(LISTED)
    lines = [
        line
        for chain in ("PREROUTING", "OUTPUT", "user")
        for line in ruleset.apply(parse_command([*options.split(), "-L", chain]))
    ]
    assert [with_protocol_names(line) for line in theirs] == lines


def with_protocol_names(line: str) -> str:
    """What releases other than 1.8.9 and 1.8.10 print: with -n, too, protocols by name."""
    names = {"0": "all", "6": "tcp", "17": "udp"}
    return re.sub(r"(?<=[ !])(0|6|17) +(?=-- )", lambda number: f"{names[number[1]]:<4} ", line)


REFUSED_BY_BOTH = [
    "-p tcp --dport 80x",
    "-p tcp --dport 90:80",
    "-p tcp -m multiport --dports 80:80",
    "--dport 80",
    "-m tcp --dport 80",
    "-s 10.0.0.256",
    "-s 10.0.0.1/33",
    "! -p all",
    "! ! -p tcp",
    "-p tcp !",
    "-i a123456789012345",
    "-o eth0",
    "-m mark --mark x",
    "-m comment",
    "-m limit --limit 5/seconds",
    "-m statistic --mode nth --every 3",
    "-m addrtype --dst-type foo",
    "-m owner --uid-owner 1",
    "-j nosuch",
    "-j PREROUTING",
    "-p tcp -j TPROXY",
    "-j TPROXY --on-port 80",
]


def test_iptables_refuses_what_we_refuse() -> None:
    script = "".join(
        f"{iptables()} -w -t mangle -A PREROUTING {rule} 2>/dev/null && echo '{rule}'\n" for rule in REFUSED_BY_BOTH
    )
    assert in_a_new_namespace(f"set +e\n{script}true") == ""
    for rule in REFUSED_BY_BOTH:
        with pytest.raises(RuleError):
            ours([f"-A PREROUTING {rule}"])
