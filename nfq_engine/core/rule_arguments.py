"""iptables' command line, argument by argument.

Owns: options, their spellings, which of them take what. Must not know what the values mean (`rule_syntax`,
`rule_modules`), nor what command is made of them (`rule_text`). Place: what a user types, or a line of a file, comes
here first.

Beyond today's iptables, `--option ! value` is read too, as iptables-save of 2003 wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from nfq_engine.core import rule_syntax
from nfq_engine.core.packet import Protocol
from nfq_engine.core.rule_modules import MATCHES, TPROXY_SYNTAX, Syntax
from nfq_engine.core.rule_values import NOTHING_COUNTED, TPROXY, Counts, Match, RuleError, Term, Tproxy, shown

T = TypeVar("T")

# Every base option by its long name; the short one is its key. --line-numbers has no short name of its own.
_LINE_NUMBERS: Final = "0"
_LONG: Final[Mapping[str, str]] = {
    "append": "A",
    "delete": "D",
    "insert": "I",
    "replace": "R",
    "check": "C",
    "list": "L",
    "list-rules": "S",
    "flush": "F",
    "zero": "Z",
    "new-chain": "N",
    "delete-chain": "X",
    "rename-chain": "E",
    "policy": "P",
    "protocol": "p",
    "proto": "p",
    "source": "s",
    "src": "s",
    "destination": "d",
    "dst": "d",
    "in-interface": "i",
    "out-interface": "o",
    "jump": "j",
    "goto": "g",
    "match": "m",
    "table": "t",
    "set-counters": "c",
    "numeric": "n",
    "verbose": "v",
    "exact": "x",
    "line-numbers": _LINE_NUMBERS,
}
OPTION_NAMES: Final[Mapping[str, str]] = {key: f"-{key}" for key in _LONG.values()} | {_LINE_NUMBERS: "--line-numbers"}
_FLAGS: Final = frozenset({"n", "v", "x", _LINE_NUMBERS})
_REPEATABLE: Final = frozenset("mv")
_INVERTIBLE: Final = frozenset("psdio")


@dataclass(frozen=True, slots=True)
class Form:
    """How a command is written: so many arguments it needs, so many it may have, what it says when one lacks."""

    required: int
    optional: int = 0
    missing: str = ""
    options: str = ""  # the options it takes, by key


_RULE_OPTIONS: Final = "psdiojgm"
FORMS: Final[Mapping[str, Form]] = {
    "A": Form(1, options=_RULE_OPTIONS + "c"),
    "I": Form(1, 1, options=_RULE_OPTIONS + "c"),
    "D": Form(1, 1, options=_RULE_OPTIONS),
    "R": Form(2, missing="-R requires a chain and a rule number", options=_RULE_OPTIONS + "c"),
    "C": Form(1, options=_RULE_OPTIONS),
    "L": Form(0, 2, options="nvx" + _LINE_NUMBERS),
    "S": Form(0, 2, options="v"),
    "F": Form(0, 1),
    "Z": Form(0, 2),
    "N": Form(1),
    "X": Form(0, 1),
    "E": Form(2, missing="-E requires old-chain-name and new-chain-name"),
    "P": Form(2, missing="-P requires a chain and a policy", options="c"),
}


@dataclass(slots=True, eq=False)
class Module(Generic[T]):
    """A match or target that was named, and what it was given so far."""

    syntax: Syntax[T]
    given: dict[str, Term[str]] = field(default_factory=dict)


class Reader:
    """Reads arguments one by one, and keeps what they say."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._at = 0
        self._is_inverted = False
        self.commands: dict[str, list[str]] = {}
        self.options: list[str] = []  # the keys of all base options that were given
        self.values: dict[str, Term[str]] = {}  # what those were given that take one argument
        self.counts = NOTHING_COUNTED
        self.matches: list[Module[Match]] = []
        self.target: Module[Tproxy] | None = None

    def read(self) -> None:
        """Read everything; RuleError for what cannot be read."""
        while self._at < len(self._arguments):
            word = self._next()
            if word == "!":
                if self._is_inverted:
                    raise RuleError("multiple consecutive ! not allowed")
                self._is_inverted = True
            elif word.startswith("--") and word != "--":
                self._long(word)
            elif word.startswith("-") and word != "-":
                self._cluster(word[1:])
            else:
                raise RuleError(f"Bad argument `{shown(word)}'")
        if self._is_inverted:
            raise RuleError("nothing appropriate following !")

    def protocol(self) -> Term[Protocol] | None:
        """What -p says; None for all."""
        term = self.values.get("p")
        if term is None:
            return None
        protocol = rule_syntax.protocol(term.value)
        if protocol is None and term.is_inverted:
            raise RuleError("rule would never match protocol")
        return None if protocol is None else Term(protocol, term.is_inverted)

    def _next(self) -> str:
        self._at += 1
        return self._arguments[self._at - 1]

    def _argument(self, spelling: str, attached: str | None) -> str:
        """The argument of an option that needs one."""
        if attached is not None:
            return attached
        if self._at == len(self._arguments):
            raise RuleError(f'option "{shown(spelling)}" requires an argument')
        return self._next()

    def _term(self, spelling: str, attached: str | None) -> Term[str]:
        """The argument of an option that may be inverted, by a ! before it or, as of old, behind it."""
        value = self._argument(spelling, attached)
        if value == "!":
            if self._is_inverted:
                raise RuleError("multiple consecutive ! not allowed")
            self._is_inverted = True
            value = self._argument(spelling, None)
        term = Term(value, self._is_inverted)
        self._is_inverted = False
        return term

    def _plain(self, spelling: str, attached: str | None) -> Term[str]:
        """The argument of an option that may not be inverted."""
        return Term(self._argument(spelling, attached))

    def _may_follow(self) -> bool:
        """Is the next word one that an option with a voluntary argument takes?"""
        return self._at < len(self._arguments) and not self._arguments[self._at].startswith(("-", "!"))

    def _cluster(self, letters: str) -> None:
        """Short options: flags may stand together, and an argument may stand right behind its option."""
        while letters:
            key, letters = letters[0], letters[1:]
            if key == _LINE_NUMBERS or (key not in FORMS and key not in _LONG.values()):
                raise RuleError(f'unknown option "-{shown(key)}"')
            if key in _FLAGS:
                self._base(key, f"-{key}", None)
            else:
                self._base(key, f"-{key}", letters or None)
                return

    def _long(self, word: str) -> None:
        name, equals, value = word[2:].partition("=")
        found = self._find(name)
        if found is None and self._load_protocol():
            found = self._find(name)
        if found is None and "j" in self.values and self.target is None:
            target = shown(self.values["j"].value)
            raise RuleError(f'unknown option "--{shown(name)}": target `{target}\' takes none')
        if found is None:
            raise RuleError(f'unknown option "--{shown(name)}"')
        module, option = found
        attached = value if equals else None
        if module is None:
            self._base(option, f"--{name}", attached)
        else:
            self._extension(module, option, f"--{name}", attached)

    def _find(self, name: str) -> tuple[Module[Any] | None, str] | None:
        """The option of this name, or the only one whose name begins so, and the module that it belongs to."""
        modules: list[Module[Any]] = [*self.matches]
        if self.target is not None:
            modules.append(self.target)
        for module in reversed(modules):
            if name in module.syntax.options:
                return module, module.syntax.options[name]
        if name in _LONG:
            return None, _LONG[name]
        known: dict[str, tuple[Module[Any] | None, str]] = {long: (None, key) for long, key in _LONG.items()}
        for module in modules:
            known |= {spelling: (module, option) for spelling, option in module.syntax.options.items()}
        meanings = {known[each] for each in known if each.startswith(name)}
        return meanings.pop() if len(meanings) == 1 else None

    def _load_protocol(self) -> bool:
        """Load the match of the protocol that -p named, as iptables does when it meets an option it does not know."""
        protocol = self.protocol()
        if protocol is None or protocol.is_inverted:
            return False
        name = protocol.value.name.lower()
        if any(module.syntax.name == name for module in self.matches):
            return False
        self.matches.append(Module(MATCHES[name]))
        return True

    def _base(self, key: str, spelling: str, attached: str | None) -> None:
        """One option that is no module's."""
        if self._is_inverted and key not in _INVERTIBLE:
            raise RuleError(f"cannot have ! before {spelling}")
        if key in FORMS:
            self._command(key, spelling, attached)
            return
        if key in self.options and key not in _REPEATABLE:
            raise RuleError(f"multiple -{key} flags not allowed")
        self.options.append(key)
        if key in _FLAGS:
            return
        if key == "m":
            self._load_match(self._argument(spelling, attached))
        elif key == "c":
            self._counts(self._argument(spelling, attached))
        else:
            self._value(key, spelling, attached)

    def _command(self, key: str, spelling: str, attached: str | None) -> None:
        form = FORMS[key]
        for other in self.commands:
            if {key, other} not in ({"L", "Z"}, {"S", "Z"}):
                raise RuleError(f"cannot use -{key} with -{other}")
        arguments = [attached] if attached else []
        if form.required and not arguments:
            arguments.append(self._argument(spelling, None))
        while len(arguments) < form.required + form.optional and self._may_follow():
            arguments.append(self._next())
        if len(arguments) < form.required:
            raise RuleError(form.missing)
        self.commands[key] = arguments

    def _load_match(self, name: str) -> None:
        if name not in MATCHES:
            known = ", ".join(sorted(MATCHES))
            raise RuleError(f"match `{shown(name)}' is not supported: there are {known}")
        self.matches.append(Module(MATCHES[name]))

    def _counts(self, first: str) -> None:
        """-c PACKETS BYTES, or PACKETS,BYTES."""
        packets, comma, size = first.partition(",")
        if not comma:
            if not self._may_follow():
                raise RuleError("-c requires packet and byte counter")
            size = self._next()
        self.counts = Counts(rule_syntax.counter(packets, "packet"), rule_syntax.counter(size, "byte"))

    def _value(self, key: str, spelling: str, attached: str | None) -> None:
        if {"j", "g"} <= set(self.options):
            raise RuleError("cannot use -g with -j")
        read = self._term if key in _INVERTIBLE else self._plain
        self.values[key] = read(spelling, attached)
        if key == "j" and self.values[key].value == TPROXY:
            self.target = Module(TPROXY_SYNTAX)

    def _extension(self, module: Module[Any], option: str, spelling: str, attached: str | None) -> None:
        """One option of a match or target."""
        may_invert = option in module.syntax.invertible
        if self._is_inverted and not may_invert:
            raise RuleError(f'{module.syntax.name}: option "{spelling}" cannot be inverted.')
        if option in module.given:
            raise RuleError(f'{module.syntax.name}: option "--{option}" can only be used once.')
        module.given[option] = (self._term if may_invert else self._plain)(spelling, attached)
