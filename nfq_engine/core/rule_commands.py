"""Commands: what iptables' command line can ask for.

Owns: one value a command. Must not know how it is written (`rule_text`) or done (`rule_table`). Place: between the two.

In all of them `chain` None stands for all chains, and numbers begin at 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from nfq_engine.core.rule_values import NOTHING_COUNTED, Counts, Policy, Rule


@dataclass(frozen=True, slots=True)
class Append:
    """-A: put rules at the end of a chain."""

    chain: str
    rules: tuple[Rule, ...]
    counts: Counts = NOTHING_COUNTED


@dataclass(frozen=True, slots=True)
class Insert:
    """-I: put rules before the one with this number, each before the one that was put there before it."""

    chain: str
    number: int
    rules: tuple[Rule, ...]
    counts: Counts = NOTHING_COUNTED


@dataclass(frozen=True, slots=True)
class Delete:
    """-D: take the first rule away that equals the given one."""

    chain: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class DeleteNumber:
    """-D with a number."""

    chain: str
    number: int


@dataclass(frozen=True, slots=True)
class Replace:
    """-R: put a rule in the place of the one with this number."""

    chain: str
    number: int
    rule: Rule
    counts: Counts = NOTHING_COUNTED


@dataclass(frozen=True, slots=True)
class Check:
    """-C: refused unless the chain has rules that equal these."""

    chain: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Flush:
    """-F: take all rules away."""

    chain: str | None


@dataclass(frozen=True, slots=True)
class Zero:
    """-Z: count from nothing again; with a number, one rule only."""

    chain: str | None
    number: int | None = None


@dataclass(frozen=True, slots=True)
class NewChain:
    """-N: make a user chain."""

    chain: str


@dataclass(frozen=True, slots=True)
class DeleteChain:
    """-X: remove an empty user chain that no rule leads to, or all user chains if they are all such."""

    chain: str | None


@dataclass(frozen=True, slots=True)
class Rename:
    """-E: give a user chain another name; rules that lead to it follow."""

    chain: str
    new_name: str


@dataclass(frozen=True, slots=True)
class SetPolicy:
    """-P: set the policy of a built-in chain; its counts begin anew."""

    chain: str
    policy: Policy
    counts: Counts = NOTHING_COUNTED


@dataclass(frozen=True, slots=True)
class Specify:
    """-S: the rules as commands; with `with_counts` their counts too, with `then_zero` they are zeroed afterwards."""

    chain: str | None
    number: int | None = None
    with_counts: bool = False
    then_zero: bool = False


@dataclass(frozen=True, slots=True)
class Show:
    """-L: the rules as a table for people; -v, -n, -x, --line-numbers, -Z."""

    chain: str | None
    number: int | None = None
    is_verbose: bool = False
    is_numeric: bool = False
    is_exact: bool = False
    has_numbers: bool = False
    then_zero: bool = False


RuleCommand = Append | Insert | Replace | Delete | DeleteNumber | Flush | Zero
ChainCommand = NewChain | DeleteChain | Rename | SetPolicy
Command = RuleCommand | ChainCommand | Check | Specify | Show
