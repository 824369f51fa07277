"""-L: the columns and words of iptables."""

from __future__ import annotations

import pytest

from nfq_engine.core.rule_text import parse_command, split_words
from nfq_engine.core.ruleset import Ruleset

LINES = (
    "-N user",
    "-A PREROUTING -j user",
    "-A PREROUTING -g user -c 100000 10000000000",
    "-A PREROUTING ! -s 10.0.0.0/8 ! -d 10.0.0.1 ! -i eth0 ! -p tcp -c 99999 123456789012345678",
    '-A PREROUTING -p tcp --dport 80 -m comment --comment "a b" -j TPROXY --on-port 50080 --on-ip 10.0.0.1',
    "-A PREROUTING -s ::1 -p udp -j TPROXY --on-port 0",
    "-P OUTPUT DROP -c 123456 7",
)


def listing(command: str) -> list[str]:
    ruleset = Ruleset()
    for line in LINES:
        ruleset.apply(parse_command(split_words(line)))
    return ruleset.apply(parse_command(command.split()))


HEADER = "target     prot opt source               destination         "
COUNTED = " pkts bytes target     prot opt in     out     source               destination         "
EXACT = "    pkts      bytes target     prot opt in     out     source               destination         "

LISTINGS = {
    "-L": [
        "Chain PREROUTING (policy ACCEPT)",
        HEADER,
        "user       all  --  anywhere             anywhere            ",
        "user       all  --  anywhere             anywhere            [goto] ",
        "          !tcp  -- !10.0.0.0/8          !10.0.0.1            ",
        "TPROXY     tcp  --  anywhere             anywhere             tcp dpt:80 /* a b */"
        " TPROXY redirect 10.0.0.1:50080",
        "TPROXY     udp  --  ::1                  anywhere             TPROXY redirect [::]:0",
        "",
        "Chain OUTPUT (policy DROP)",
        HEADER,
        "",
        "Chain user (2 references)",
        HEADER,
    ],
    "-L PREROUTING -nv --line-numbers": [
        "Chain PREROUTING (policy ACCEPT 0 packets, 0 bytes)",
        f"num  {COUNTED}",
        "1        0     0 user       all  --  *      *       0.0.0.0/0            0.0.0.0/0           ",
        "2     100K   10G user       all  --  *      *       0.0.0.0/0            0.0.0.0/0           [goto] ",
        "3    99999 123457T           !tcp  --  !eth0  *      !10.0.0.0/8          !10.0.0.1            ",
        "4        0     0 TPROXY     tcp  --  *      *       0.0.0.0/0            0.0.0.0/0           "
        " tcp dpt:80 /* a b */ TPROXY redirect 10.0.0.1:50080",
        "5        0     0 TPROXY     udp  --  *      *       ::1                  ::/0                "
        " TPROXY redirect [::]:0",
    ],
    "-L OUTPUT -v": ["Chain OUTPUT (policy DROP 123K packets, 7 bytes)", COUNTED],
    "-L OUTPUT -vx": ["Chain OUTPUT (policy DROP 123456 packets, 7 bytes)", EXACT],
    "-L PREROUTING 2 -vx": [
        "  100000 10000000000 user       all  --  any    any     anywhere             anywhere            [goto] "
    ],
    "-L PREROUTING 9": [],
    "-L user -n": ["Chain user (2 references)", HEADER],
}


@pytest.mark.parametrize(("command", "lines"), LISTINGS.items(), ids=list(LISTINGS))
def test_rules_are_listed_as_iptables_lists_them(command: str, lines: list[str]) -> None:
    assert listing(command) == lines


def test_zeroing_with_a_listing_shows_what_there_was() -> None:
    ruleset = Ruleset()
    ruleset.apply(parse_command(["-A", "OUTPUT", "-c", "1", "2"]))
    assert ruleset.apply(parse_command(["-S", "OUTPUT", "-vZ"])) == ["-P OUTPUT ACCEPT -c 0 0", "-A OUTPUT -c 1 2"]
    assert ruleset.apply(parse_command(["-S", "OUTPUT", "-v"])) == ["-P OUTPUT ACCEPT -c 0 0", "-A OUTPUT -c 0 0"]
