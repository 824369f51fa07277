"""The tproxy table's ruleset: a packet goes in, a verdict comes out.

Owns: the chains in force, and how packets pass through them. Must not know how rules are written. Place in the path:
asked for every new connection that no sockref wants (pipeline.py).

    apply(command), restore(text) -> a draft -> check -> commit: one step from one whole ruleset to the next
    evaluate(chain, packet, now)  -> the steps of the chain, prepared at the commit

Every command is all or nothing: what is refused leaves the ruleset, its counts and its memory as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, assert_never

from nfq_engine.core.rule_commands import (
    Command,
)
from nfq_engine.core.rule_compile import service_of
from nfq_engine.core.rule_matches import AddressTypeMatch, Comment, Multiport, OwnerMatch, PortMatch, PortSide
from nfq_engine.core.rule_table import Draft, empty_chains
from nfq_engine.core.rule_values import (
    Accept,
    AnyTarget,
    BuiltinChain,
    Chain,
    Drop,
    Jump,
    Match,
    Policy,
    Redirect,
    RuleError,
    RulePacket,
    Tally,
    Target,
    Test,
    Tproxy,
    Verdict,
)
from nfq_engine.core.surroundings import Chance

__all__ = ["Accept", "BuiltinChain", "Drop", "Redirect", "RuleError", "RulePacket", "Ruleset", "Verdict"]

# What a rule that matched does: decide, go elsewhere, go back, or (None) nothing but count.
_Action = Verdict | Jump | Literal[Target.RETURN] | None

# A rule made ready: first service, last service, test, tally, action. A tuple, as taking one apart costs least.
_Step = tuple[int, int, Test, Tally, _Action]


class Ruleset:
    """The table in force: at first two empty chains with the policy ACCEPT."""

    def __init__(self, chance: Chance | None = None) -> None:
        """Rules that need chance (-m statistic --mode random) are refused if there is none."""
        self._chance: Final = chance
        self._chains: Mapping[str, Chain] = {}
        self._steps: dict[str, tuple[_Step, ...]] = {}
        self._policies: dict[BuiltinChain, tuple[Verdict, Tally]] = {}
        # Whether some rule asks for what costs a look-up: address types; the owner of a packet's socket.
        self.looks_at_types = False
        self.looks_at_owners = False
        # Whether rules ask for nothing but protocol, addresses, destination ports and interfaces.
        self.is_plain = True
        self.looks_at_addresses = False  # in a rule's own -s or -d
        self.passed: list[Tally] = []  # where the last packet was counted
        self.commit(Draft(empty_chains(), chance))

    @property
    def chains(self) -> Mapping[str, Chain]:
        """The chains in force, by name."""
        return self._chains

    def draft(self) -> Draft:
        """A copy to change and to commit."""
        return Draft(self._chains, self._chance)

    def commit(self, draft: Draft) -> None:
        """Put a draft in force; RuleError, and no change, if its chains do not go together."""
        if draft.chains == self._chains:
            return
        draft.check()
        self._steps = {
            name: self._steps[name] if self._chains.get(name) is chain else _steps(name, chain)
            for name, chain in draft.chains.items()
        }
        self._policies = {name: _policy(name, draft.chains[name]) for name in BuiltinChain}
        self._chains = dict(draft.chains)
        rules = [entry.rule for chain in draft.chains.values() for entry in chain.entries]
        self.looks_at_addresses = any(rule.source is not None or rule.destination is not None for rule in rules)
        matches = [match for rule in rules for match in rule.matches]
        kinds = {type(match) for match in matches}
        self.is_plain = all(_is_plain(match) for match in matches)
        self.looks_at_types, self.looks_at_owners = AddressTypeMatch in kinds, OwnerMatch in kinds

    def apply(self, command: Command) -> list[str]:
        """Do one command, and return the lines it prints; RuleError, and no change, if it cannot be done."""
        draft = self.draft()
        lines = draft.execute(command)
        self.commit(draft)
        return lines

    def evaluate(self, chain: BuiltinChain, packet: RulePacket, now: float) -> Verdict:
        """What becomes of the first packet of a connection, at `now` (seconds of a clock that never goes back).

        Counts the packet at every rule that it matches, and at the policy if that decides.
        """
        service, length = service_of(packet), packet.length
        steps = iter(self._steps[chain])
        passed = self.passed = []
        callers = []
        while True:
            for first, last, test, tally, action in steps:
                if not (first <= service <= last and test(packet, now)):
                    continue
                passed.append(tally)
                tally.packets += 1
                tally.bytes += length
                if action is None:
                    continue
                if isinstance(action, Jump):
                    if not action.is_goto:
                        callers.append(steps)
                    steps = iter(self._steps[action.chain])
                    break
                if action is Target.RETURN:
                    steps = iter(())
                    break
                return action
            else:
                if not callers:
                    verdict, tally = self._policies[chain]
                    passed.append(tally)
                    tally.packets += 1
                    tally.bytes += length
                    return verdict
                steps = callers.pop()


def _is_plain(match: Match) -> bool:
    """Does a match ask for destination ports at the most?"""
    match match:
        case PortMatch():
            return match.source is None
        case Multiport():
            return match.side is PortSide.DESTINATION
        case _:
            return isinstance(match, Comment)


def _steps(name: str, chain: Chain) -> tuple[_Step, ...]:
    """The rules of a chain, ready for packets."""
    return tuple(
        (
            entry.compiled.first,
            entry.compiled.last,
            entry.compiled.test,
            entry.tally,
            _action(entry.rule.target, f"{name} {number}"),
        )
        for number, entry in enumerate(chain.entries, start=1)
    )


def _policy(name: BuiltinChain, chain: Chain) -> tuple[Verdict, Tally]:
    """What becomes of a packet that no rule decided on, and where it is counted."""
    rule = f"{name} policy"
    return (Drop(rule) if chain.policy is Policy.DROP else Accept(rule)), chain.tally


def _action(target: AnyTarget | None, rule: str) -> _Action:
    """What a rule with this target does; `rule` is how its verdict will call it."""
    match target:
        case None | Jump() | Target.RETURN:
            return target
        case Target.ACCEPT:
            return Accept(rule)
        case Target.DROP:
            return Drop(rule)
        case Tproxy(on_port, on_ip):
            return Redirect(on_port, on_ip, rule)
        case _:
            assert_never(target)
