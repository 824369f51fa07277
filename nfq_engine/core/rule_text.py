"""iptables' commands and iptables-save's text, read and written.

Owns: which arguments make which command, and the exchange format. Must not know what a command does (`rule_table`).
Place: between what a user types or a file holds, and the ruleset.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from nfq_engine.core import rule_syntax as syntax
from nfq_engine.core.rule_arguments import FORMS, OPTION_NAMES, Reader
from nfq_engine.core.rule_commands import (
    Append,
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
    SetPolicy,
    Show,
    Specify,
    Zero,
)
from nfq_engine.core.rule_listing import in_order, specification
from nfq_engine.core.rule_table import Draft
from nfq_engine.core.rule_values import (
    NOTHING_COUNTED,
    TABLE,
    AnyTarget,
    BuiltinChain,
    Counts,
    Jump,
    Network,
    Policy,
    Rule,
    RuleError,
    Target,
    Term,
    shown,
)
from nfq_engine.core.ruleset import Ruleset

__all__ = ["RuleError", "parse_command", "restore", "save"]


def parse_command(arguments: Sequence[str]) -> Command:
    """The command that iptables' arguments give; RuleError, with what is wrong, for any other list of strings."""
    reader = Reader(arguments)
    reader.read()
    if not reader.commands:
        raise RuleError("no command specified")
    key = next(iter(reader.commands))
    if key == "Z" and len(reader.commands) > 1:
        key = next(each for each in reader.commands if each != "Z")
    for option in reader.options:
        if option not in FORMS[key].options + "t":
            raise RuleError(f"illegal option `{OPTION_NAMES[option]}' with this command: -{key}")
    table = reader.values.get("t", Term(TABLE)).value
    if table != TABLE:
        raise RuleError(f"table `{shown(table)}' does not exist: there is only `{TABLE}'")
    return _BUILDERS[key](reader, reader.commands[key])


# One function a command: from what was read to the command.

_Words = Sequence[str]


def _append(reader: Reader, words: _Words) -> Command:
    return Append(words[0], _rules(reader, words[0]), reader.counts)


def _insert(reader: Reader, words: _Words) -> Command:
    number = syntax.rule_number(words[1]) if len(words) > 1 else 1
    return Insert(words[0], number, _rules(reader, words[0]), reader.counts)


def _replace(reader: Reader, words: _Words) -> Command:
    number, rules = syntax.rule_number(words[1]), _rules(reader, words[0])
    if len(rules) > 1:
        raise RuleError("replacement rule does not specify a unique address")
    return Replace(words[0], number, rules[0], reader.counts)


def _delete(reader: Reader, words: _Words) -> Command:
    if len(words) == 1:
        return Delete(words[0], _rules(reader, words[0]))
    if reader.options:
        raise RuleError(f"illegal option `{OPTION_NAMES[reader.options[0]]}' with a rule number")
    return DeleteNumber(words[0], syntax.rule_number(words[1]))


def _show(reader: Reader, words: _Words) -> Command:
    flags = reader.options
    return Show(
        *_place(reader, words),
        is_verbose="v" in flags,
        is_numeric="n" in flags,
        is_exact="x" in flags,
        has_numbers="0" in flags,
        then_zero="Z" in reader.commands,
    )


def _specify(reader: Reader, words: _Words) -> Command:
    return Specify(*_place(reader, words), with_counts="v" in reader.options, then_zero="Z" in reader.commands)


def _place(reader: Reader, words: _Words) -> tuple[str | None, int | None]:
    """The chain and the number that a command, or the -Z beside it, may name."""
    words = words or reader.commands.get("Z", [])
    return (words[0] if words else None, syntax.rule_number(words[1]) if len(words) > 1 else None)


def _set_policy(reader: Reader, words: _Words) -> Command:
    if words[1] not in set(Policy):
        raise RuleError(f"bad policy name `{shown(words[1])}': there are {', '.join(Policy)}")
    return SetPolicy(words[0], Policy(words[1]), reader.counts)


_BUILDERS: Final[Mapping[str, Callable[[Reader, _Words], Command]]] = {
    "A": _append,
    "I": _insert,
    "R": _replace,
    "D": _delete,
    "C": lambda reader, words: Check(words[0], _rules(reader, words[0])),
    "L": _show,
    "S": _specify,
    "F": lambda _, words: Flush(words[0] if words else None),
    "Z": lambda reader, words: Zero(*_place(reader, words)),
    "N": lambda _, words: NewChain(syntax.chain_name(words[0])),
    "X": lambda _, words: DeleteChain(words[0] if words else None),
    "E": lambda _, words: Rename(words[0], syntax.chain_name(words[1])),
    "P": _set_policy,
}


def _rules(reader: Reader, chain: str) -> tuple[Rule, ...]:
    """The rules that were read: one for each pair of source and destination."""
    for option, wrong in (("i", BuiltinChain.OUTPUT), ("o", BuiltinChain.PREROUTING)):
        if option in reader.values and chain == wrong:
            raise RuleError(f"can't use -{option} with {chain}")
    rules = []
    for source in _networks(reader.values.get("s")):
        for destination in _networks(reader.values.get("d")):
            rule = Rule(
                source=source,
                destination=destination,
                in_interface=_interface(reader.values.get("i")),
                out_interface=_interface(reader.values.get("o")),
                protocol=reader.protocol(),
                matches=tuple(module.syntax.build(module.given) for module in reader.matches),
                target=_target(reader),
            )
            rule.check()
            rules.append(rule)
    return tuple(rules)


def _networks(term: Term[str] | None) -> list[Term[Network] | None]:
    """The networks of -s or -d; one None for no such option."""
    if term is None:
        return [None]
    networks = syntax.networks(term.value)
    if term.is_inverted and len(networks) > 1:
        raise RuleError(f"! not allowed with multiple source or destination IP addresses `{shown(term.value)}'")
    return [Term(network, term.is_inverted) for network in networks]


def _interface(term: Term[str] | None) -> Term[str] | None:
    """What -i or -o says; None for nothing, and for what every interface fulfils."""
    if term is None:
        return None
    name = syntax.interface(term.value)
    return None if name == "+" and not term.is_inverted else Term(name, term.is_inverted)


def _target(reader: Reader) -> AnyTarget | None:
    if reader.target is not None:
        return reader.target.syntax.build(reader.target.given)
    for key in "jg":
        if key in reader.values:
            name = reader.values[key].value
            if key == "j" and name in set(Target):
                return Target(name)
            if not name:
                raise RuleError("invalid target name (too short)")
            return Jump(name, is_goto=key == "g")
    return None


# iptables-save's text.

_COUNTERS: Final = re.compile(r"\[([0-9]{1,20}):([0-9]{1,20})\]", re.ASCII)
_SPACE: Final = " \t\r"
_WORD: Final = re.compile(rf'[{_SPACE}]*(?:"((?:[^"\\]|\\.)*)"|([^{_SPACE}"]+))', re.DOTALL)


def save(ruleset: Ruleset, counters: bool = False) -> str:
    """The ruleset as iptables-save writes it; `counters`: those of the rules, too. `restore` reads it."""
    lines = [f"*{TABLE}"]
    for name in in_order(ruleset.chains):
        chain = ruleset.chains[name]
        lines.append(f":{name} {chain.policy or '-'} [{chain.tally.packets}:{chain.tally.bytes}]")
    for name in in_order(ruleset.chains):
        for entry in ruleset.chains[name].entries:
            counts = f"[{entry.tally.packets}:{entry.tally.bytes}] " if counters else ""
            lines.append(counts + specification(name, entry.rule))
    return "\n".join([*lines, "COMMIT", ""])


def restore(
    text: str,
    ruleset: Ruleset,
    *,
    counters: bool = False,
    noflush: bool = False,
    test: bool = False,
) -> list[str]:
    """Read iptables-save's text into a ruleset, all of it or, with a RuleError that names the line, nothing.

    `counters`: take over the counts that it tells, which are otherwise left out; `noflush`: add to what is there;
    `test`: only find out whether it could be done. Returns the lines that its commands print.
    """
    restoring = _Restoring(ruleset.draft(), counters, noflush)
    output: list[str] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            output += restoring.line(line.strip(_SPACE))
        except RuleError as error:
            raise RuleError(f"line {number}: {error}") from None
    if restoring.is_in_table:
        raise RuleError(f"line {len(lines)}: COMMIT expected")
    if not test:
        ruleset.commit(restoring.draft)
    return output


class _Restoring:
    """A restore under way."""

    def __init__(self, draft: Draft, counters: bool, noflush: bool) -> None:
        self.draft = draft
        self.is_in_table = False
        self._counters = counters
        self._noflush = noflush

    def line(self, line: str) -> list[str]:
        """Do what one line says, and return what that prints."""
        if not line or line.startswith("#"):
            return []
        if not self.is_in_table:
            self._begin(line)
        elif line == "COMMIT":
            self.draft.check()
            self.is_in_table = False
        elif line.startswith(":"):
            self._declare(line)
        else:
            return self.draft.execute(parse_command(self._words(line)))
        return []

    def _begin(self, line: str) -> None:
        if not line.startswith("*"):
            raise RuleError(f"no table for `{shown(line)}': a line like `*{TABLE}' goes before it")
        if line != f"*{TABLE}":
            raise RuleError(f"table `{shown(line[1:])}' does not exist: there is only `{TABLE}'")
        self.is_in_table = True
        if not self._noflush:
            self.draft.execute(Flush(None))
            self.draft.execute(DeleteChain(None))

    def _declare(self, line: str) -> None:
        """:CHAIN POLICY [packets:bytes]."""
        words = line[1:].split()
        if len(words) not in (2, 3):
            raise RuleError(f"policy invalid: `{shown(line)}'")
        name, policy = words[:2]
        counts = self._counts(words[2], name) if len(words) == 3 else NOTHING_COUNTED
        if policy != "-":
            if policy not in set(Policy):
                raise RuleError(f"bad policy name `{shown(policy)}' for chain `{shown(name)}'")
            self.draft.execute(SetPolicy(name, Policy(policy), counts))
        elif self._noflush and name in self.draft.chains and name not in set(BuiltinChain):
            self.draft.execute(Flush(name))
        elif name not in set(BuiltinChain):
            self.draft.execute(NewChain(syntax.chain_name(name)))

    def _counts(self, text: str, chain: str) -> Counts:
        """The counts in brackets, if they are wanted."""
        found = _COUNTERS.fullmatch(text)
        if found is None:
            raise RuleError(f"invalid policy counters for chain `{shown(chain)}': `{shown(text)}'")
        return Counts(int(found[1]), int(found[2])) if self._counters else NOTHING_COUNTED

    def _words(self, line: str) -> list[str]:
        """A line's words, as a shell would hand them over; counts at its beginning become an option at its end."""
        counts: list[str] = []
        if line.startswith("["):
            found = _COUNTERS.match(line)
            if found is None:
                raise RuleError(f"invalid counters: `{shown(line)}'")
            line = line[found.end() :]
            counts = ["--set-counters", found[1], found[2]] if self._counters else []
        return split_words(line) + counts


def split_words(line: str) -> list[str]:
    """The words of a line; double quotes make one word, in which a backslash makes the next character plain."""
    words: list[str] = []
    at, end = 0, len(line.rstrip(_SPACE))
    while at < end:
        found = _WORD.match(line, at)
        if found is None:
            raise RuleError(f"a quote is not closed: `{shown(line[at:])}'")
        quoted, plain = found[1], found[2]
        words.append(plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL))
        at = found.end()
    return words
