"""What commands do to chains, and what they are not let do."""

from __future__ import annotations

import pytest

from nfq_engine.core.rule_text import RuleError, parse_command, save, split_words
from nfq_engine.core.ruleset import Ruleset


def run(ruleset: Ruleset, *lines: str) -> list[str]:
    output: list[str] = []
    for line in lines:
        output += ruleset.apply(parse_command(split_words(line)))
    return output


def ruleset_of(*lines: str) -> Ruleset:
    ruleset = Ruleset()
    run(ruleset, *lines)
    return ruleset


BEFORE = (
    "-N a",
    "-N b",
    "-A PREROUTING -j a -c 1 2",
    "-A PREROUTING -p tcp -c 3 4",
    "-A PREROUTING -p tcp -c 5 6",
    "-A a -j DROP -c 7 8",
    "-P PREROUTING DROP -c 9 10",
)

# command, then what -S says of the chain
EFFECTS: list[tuple[str, str, list[str]]] = [
    ("-A b -j a", "b", ["-N b", "-A b -j a"]),
    (
        "-I PREROUTING 2 -j b",
        "PREROUTING",
        ["-P PREROUTING DROP", "-A PREROUTING -j a", "-A PREROUTING -j b", *2 * ["-A PREROUTING -p tcp"]],
    ),
    ("-I a 2 -j b", "a", ["-N a", "-A a -j DROP", "-A a -j b"]),
    ("-I b -s 1.1.1.1,2.2.2.2", "b", ["-N b", "-A b -s 2.2.2.2/32", "-A b -s 1.1.1.1/32"]),
    ("-R PREROUTING 1 -j b", "PREROUTING", ["-P PREROUTING DROP", "-A PREROUTING -j b", *2 * ["-A PREROUTING -p tcp"]]),
    ("-D PREROUTING -p tcp", "PREROUTING", ["-P PREROUTING DROP", "-A PREROUTING -j a", "-A PREROUTING -p tcp"]),
    ("-D PREROUTING 1", "PREROUTING", ["-P PREROUTING DROP", *2 * ["-A PREROUTING -p tcp"]]),
    ("-C PREROUTING -p tcp", "a", ["-N a", "-A a -j DROP"]),
    ("-F PREROUTING", "PREROUTING", ["-P PREROUTING DROP"]),
    ("-F", "a", ["-N a"]),
    ("-E a c", "PREROUTING", ["-P PREROUTING DROP", "-A PREROUTING -j c", *2 * ["-A PREROUTING -p tcp"]]),
    ("-E a c", "c", ["-N c", "-A c -j DROP"]),
    (
        "-P PREROUTING ACCEPT",
        "PREROUTING -v",
        [
            "-P PREROUTING ACCEPT -c 0 0",
            "-A PREROUTING -c 1 2 -j a",
            "-A PREROUTING -p tcp -c 3 4",
            "-A PREROUTING -p tcp -c 5 6",
        ],
    ),
    (
        "-Z PREROUTING 2",
        "PREROUTING -v",
        [
            "-P PREROUTING DROP -c 9 10",
            "-A PREROUTING -c 1 2 -j a",
            "-A PREROUTING -p tcp -c 0 0",
            "-A PREROUTING -p tcp -c 5 6",
        ],
    ),
    (
        "-Z PREROUTING",
        "PREROUTING -v",
        ["-P PREROUTING DROP -c 0 0", "-A PREROUTING -c 0 0 -j a", *2 * ["-A PREROUTING -p tcp -c 0 0"]],
    ),
    ("-Z PREROUTING", "a -v", ["-N a", "-A a -c 7 8 -j DROP"]),
    ("-Z", "a -v", ["-N a", "-A a -c 0 0 -j DROP"]),
    ("-R a 1 -j DROP", "a -v", ["-N a", "-A a -c 0 0 -j DROP"]),
]


@pytest.mark.parametrize(("command", "looked_at", "expected"), EFFECTS)
def test_a_command_does_what_iptables_does(command: str, looked_at: str, expected: list[str]) -> None:
    ruleset = ruleset_of(*BEFORE)
    run(ruleset, command)
    assert run(ruleset, f"-S {looked_at}") == expected


def test_all_user_chains_are_deleted_when_all_may_be() -> None:
    ruleset = ruleset_of("-N a", "-N b")
    run(ruleset, "-X")
    assert run(ruleset, "-S") == ["-P PREROUTING ACCEPT", "-P OUTPUT ACCEPT"]


REFUSED = {
    "-A nosuch": "no chain by that name: `nosuch'",
    "-A PREROUTING -j nosuch": "target `nosuch' is neither a chain nor one of ACCEPT, DROP, RETURN, TPROXY",
    "-A PREROUTING -j accept": "target `accept' is neither a chain nor one of ACCEPT, DROP, RETURN, TPROXY",
    "-A PREROUTING -j LOG": "target `LOG' is neither a chain nor one of ACCEPT, DROP, RETURN, TPROXY",
    "-A PREROUTING -g ACCEPT": "goto `ACCEPT' is not a chain",
    "-A a -j PREROUTING": "cannot jump to the built-in chain `PREROUTING'",
    "-A a -j a": "jumps in a circle: a -> a",
    "-A b -j PREROUTING": "cannot jump to the built-in chain `PREROUTING'",
    "-I PREROUTING 5": "index of insertion too big: 5, with 3 rules in `PREROUTING'",
    "-R PREROUTING 4": "index of replacement too big: 4, with 3 rules in `PREROUTING'",
    "-D PREROUTING 4": "index of deletion too big: 4, with 3 rules in `PREROUTING'",
    "-Z PREROUTING 4": "index of counter too big: 4, with 3 rules in `PREROUTING'",
    "-D PREROUTING -p udp": "bad rule: no matching rule in chain `PREROUTING'",
    "-C PREROUTING -j DROP": "bad rule: no matching rule in chain `PREROUTING'",
    "-D PREROUTING -p tcp -m tcp": "bad rule: no matching rule in chain `PREROUTING'",
    "-F nosuch": "no chain by that name: `nosuch'",
    "-Z nosuch": "no chain by that name: `nosuch'",
    "-S nosuch": "no chain by that name: `nosuch'",
    "-L nosuch": "no chain by that name: `nosuch'",
    "-N a": "chain `a' already exists",
    "-N OUTPUT": "chain `OUTPUT' already exists",
    "-X": "chain `a' is not empty",
    "-X a": "chain `a' is not empty",
    "-X OUTPUT": "cannot delete the built-in chain `OUTPUT'",
    "-X nosuch": "no chain by that name: `nosuch'",
    "-E OUTPUT c": "cannot rename the built-in chain `OUTPUT'",
    "-E a b": "chain `b' already exists",
    "-E nosuch c": "no chain by that name: `nosuch'",
    "-P a DROP": "bad built-in chain name `a': only PREROUTING and OUTPUT have a policy",
    "-P nosuch DROP": "no chain by that name: `nosuch'",
    "-A PREROUTING -m owner --uid-owner 1": (
        "owner: used from PREROUTING, in chain `PREROUTING', but only usable from OUTPUT"
    ),
    "-A a -m owner --uid-owner 1": "owner: used from PREROUTING, in chain `a', but only usable from OUTPUT",
}


@pytest.mark.parametrize(("command", "message"), REFUSED.items(), ids=list(REFUSED))
def test_what_cannot_be_done_is_refused_and_changes_nothing(command: str, message: str) -> None:
    ruleset = ruleset_of(*BEFORE)
    before = save(ruleset, counters=True)
    with pytest.raises(RuleError) as caught:
        run(ruleset, command)
    assert str(caught.value) == message
    assert save(ruleset, counters=True) == before


def test_a_chain_that_rules_lead_to_is_not_deleted() -> None:
    ruleset = ruleset_of("-N a", "-A OUTPUT -j a", "-A PREROUTING -g a")
    with pytest.raises(RuleError, match="chain `a' is referenced by 2 rules"):
        run(ruleset, "-X a")


def test_a_long_circle_is_found() -> None:
    ruleset = ruleset_of("-N a", "-N b", "-N c", "-A a -j b", "-A b -g c")
    with pytest.raises(RuleError, match=r"jumps in a circle: (a -> b -> c -> a|b -> c -> a -> b|c -> a -> b -> c)"):
        run(ruleset, "-A c -j a")
