"""The table's chains, and what commands do to them.

Owns: how chains may change. Must not know packets. Place: `ruleset` keeps the chains in force; a command, or a whole
restore, works on a draft of them, so that a refusal changes nothing.

Rules that hold here:

* everything in a draft is replaced, never changed in place;
* `execute` refuses what is wrong with the command itself; `check` what is wrong with all chains together, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import Final, assert_never

from nfq_engine.core.rule_commands import (
    Append,
    ChainCommand,
    Check,
    Command,
    Delete,
    DeleteChain,
    DeleteNumber,
    Flush,
    Insert,
    NewChain,
    Rename,
    Replace,
    RuleCommand,
    SetPolicy,
    Show,
    Specify,
    Zero,
)
from nfq_engine.core.rule_compile import compile_rule
from nfq_engine.core.rule_listing import references, show, specify
from nfq_engine.core.rule_matches import OwnerMatch
from nfq_engine.core.rule_values import (
    TARGET_NAMES,
    BuiltinChain,
    Chain,
    Counts,
    Entry,
    Jump,
    Policy,
    Rule,
    RuleError,
    Tally,
    shown,
)
from nfq_engine.core.surroundings import Chance

_BUILT_IN: Final = frozenset(BuiltinChain)


def empty_chains() -> dict[str, Chain]:
    """A table at its beginning."""
    return {name.value: Chain(policy=Policy.ACCEPT) for name in BuiltinChain}


class Draft:
    """A table that is being changed."""

    def __init__(self, chains: Mapping[str, Chain], chance: Chance | None) -> None:
        self.chains = dict(chains)
        self._chance = chance

    def execute(self, command: Command) -> list[str]:
        """Do a command, and return the lines it prints; after a RuleError the draft is of no more use."""
        match command:
            case Append() | Insert() | Replace() | Delete() | DeleteNumber() | Flush() | Zero():
                self._change_rules(command)
                return []
            case NewChain() | DeleteChain() | Rename() | SetPolicy():
                self._change_chains(command)
                return []
            case Check(name, rules):
                self._without(name, rules)
                return []
            case Show() | Specify():
                return self._print(command)
            case _:
                assert_never(command)

    def check(self) -> None:
        """RuleError if jumps go round in circles, or lead a packet to a rule that its hook has no answer for."""
        jumps = {
            name: {entry.rule.target.chain for entry in chain.entries if isinstance(entry.rule.target, Jump)}
            for name, chain in self.chains.items()
        }
        try:
            TopologicalSorter(jumps).prepare()
        except CycleError as error:
            # Its second argument is the circle, against the direction of the jumps.
            raise RuleError(f"jumps in a circle: {' -> '.join(reversed(error.args[1]))}") from None
        reached: set[str] = set()
        waiting = {BuiltinChain.PREROUTING.value}
        while waiting:
            name = waiting.pop()
            reached.add(name)
            if any(
                isinstance(match, OwnerMatch) for entry in self.chains[name].entries for match in entry.rule.matches
            ):
                raise RuleError(f"owner: used from PREROUTING, in chain `{name}', but only usable from OUTPUT")
            waiting |= jumps[name] - reached

    # What becomes of rules.

    def _change_rules(self, command: RuleCommand) -> None:
        match command:
            case Append(name, rules, counts):
                self._set_entries(name, self._chain(name).entries + self._entries(rules, counts))
            case Insert(name, number, rules, counts):
                entries = self._chain(name).entries
                if number > len(entries) + 1:
                    raise RuleError(f"index of insertion too big: {number}, with {len(entries)} rules in `{name}'")
                new = self._entries(rules, counts)[::-1]
                self._set_entries(name, entries[: number - 1] + new + entries[number - 1 :])
            case Replace(name, number, rule, counts):
                at = self._index(name, number, "replacement")
                entries = self._chain(name).entries
                self._set_entries(name, entries[:at] + self._entries([rule], counts) + entries[at + 1 :])
            case Delete(name, rules):
                self._set_entries(name, self._without(name, rules))
            case DeleteNumber(name, number):
                at = self._index(name, number, "deletion")
                entries = self._chain(name).entries
                self._set_entries(name, entries[:at] + entries[at + 1 :])
            case Flush(chain):
                for each in self._named(chain):
                    self._set_entries(each, ())
            case Zero(chain, number):
                self._zero(chain, number)
            case _:
                assert_never(command)

    def _entries(self, rules: Iterable[Rule], counts: Counts) -> tuple[Entry, ...]:
        """New rules, ready for a chain."""
        entries = []
        for rule in rules:
            self._check_target(rule)
            entries.append(Entry(rule, compile_rule(rule, self._chance), Tally.of(counts)))
        return tuple(entries)

    def _check_target(self, rule: Rule) -> None:
        """RuleError for a jump to what is no user chain."""
        if not isinstance(rule.target, Jump):
            return
        name, is_goto = rule.target.chain, rule.target.is_goto
        if name in _BUILT_IN:
            raise RuleError(f"cannot jump to the built-in chain `{name}'")
        if name not in self.chains and is_goto:
            raise RuleError(f"goto `{shown(name)}' is not a chain")
        if name not in self.chains:
            known = ", ".join(sorted(TARGET_NAMES))
            raise RuleError(f"target `{shown(name)}' is neither a chain nor one of {known}")

    def _without(self, name: str, rules: Iterable[Rule]) -> tuple[Entry, ...]:
        """A chain's rules without the first that equals each of these; RuleError if one has none."""
        remaining = list(self._chain(name).entries)
        for rule in rules:
            self._check_target(rule)
            at = next((at for at, entry in enumerate(remaining) if entry.rule == rule), None)
            if at is None:
                raise RuleError(f"bad rule: no matching rule in chain `{name}'")
            del remaining[at]
        return tuple(remaining)

    def _zero(self, chain: str | None, number: int | None) -> None:
        at = None if number is None or chain is None else self._index(chain, number, "counter")
        for name in self._named(chain):
            old = self.chains[name]
            entries = tuple(
                replace(entry, tally=Tally()) if at in (None, position) else entry
                for position, entry in enumerate(old.entries)
            )
            self.chains[name] = replace(old, entries=entries, tally=Tally() if at is None else old.tally)

    def _set_entries(self, name: str, entries: tuple[Entry, ...]) -> None:
        self.chains[name] = replace(self.chains[name], entries=entries)

    # What becomes of chains.

    def _change_chains(self, command: ChainCommand) -> None:
        match command:
            case NewChain(name):
                if name in self.chains:
                    raise RuleError(f"chain `{name}' already exists")
                self.chains[name] = Chain()
            case DeleteChain(chain):
                for name in self._named(chain):
                    if chain is not None or name not in _BUILT_IN:
                        self._delete_chain(name)
            case Rename(name, new_name):
                self._rename(name, new_name)
            case SetPolicy(name, policy, counts):
                if self._chain(name).policy is None:
                    raise RuleError(
                        f"bad built-in chain name `{shown(name)}': only {' and '.join(BuiltinChain)} have a policy"
                    )
                self.chains[name] = replace(self.chains[name], policy=policy, tally=Tally.of(counts))
            case _:
                assert_never(command)

    def _delete_chain(self, name: str) -> None:
        if name in _BUILT_IN:
            raise RuleError(f"cannot delete the built-in chain `{name}'")
        if self.chains[name].entries:
            raise RuleError(f"chain `{name}' is not empty")
        if references(self.chains, name):
            raise RuleError(f"chain `{name}' is referenced by {references(self.chains, name)} rules")
        del self.chains[name]

    def _rename(self, name: str, new_name: str) -> None:
        if self._chain(name).policy is not None:
            raise RuleError(f"cannot rename the built-in chain `{name}'")
        if new_name in self.chains:
            raise RuleError(f"chain `{new_name}' already exists")
        self.chains[new_name] = self.chains.pop(name)
        for each, chain in self.chains.items():
            if references({each: chain}, name):
                entries = tuple(_redirected(entry, name, new_name) for entry in chain.entries)
                self.chains[each] = replace(chain, entries=entries)

    # Looking.

    def _print(self, command: Show | Specify) -> list[str]:
        self._named(command.chain)
        lines = show(self.chains, command) if isinstance(command, Show) else specify(self.chains, command)
        if command.then_zero:
            self._zero(command.chain, command.number)
        return lines

    def _chain(self, name: str) -> Chain:
        if name not in self.chains:
            raise RuleError(f"no chain by that name: `{shown(name)}'")
        return self.chains[name]

    def _named(self, name: str | None) -> tuple[str, ...]:
        """One chain, which must be there, or all."""
        if name is None:
            return tuple(self.chains)
        self._chain(name)
        return (name,)

    def _index(self, name: str, number: int, purpose: str) -> int:
        """Where the rule with this number is."""
        count = len(self._chain(name).entries)
        if number > count:
            raise RuleError(f"index of {purpose} too big: {number}, with {count} rules in `{name}'")
        return number - 1


def _redirected(entry: Entry, name: str, new_name: str) -> Entry:
    """A rule that leads to the new name if it led to the old; it goes on counting."""
    target = entry.rule.target
    if not isinstance(target, Jump) or target.chain != name:
        return entry
    return replace(entry, rule=replace(entry.rule, target=replace(target, chain=new_name)))
