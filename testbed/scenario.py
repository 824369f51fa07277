"""Scenarios as values: a topology, and what happens in it step by step.

Owns: nothing but the values; scenario_file.py reads them, scenario_run.py carries them out. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from testbed.expect import WITHIN
from testbed.impair import described
from testbed.topology import Impairment, Service, Topology


class Tool(StrEnum):
    """What a change is made with."""

    TPROXY = "tproxy"
    IP = "ip"
    NFT = "nft"


class Ending(StrEnum):
    """How a program is ended."""

    TERM = "TERM"
    KILL = "KILL"


@dataclass(frozen=True, slots=True)
class Start:
    """Start a program; None: the service of that name, or the engine, as the topology has it."""

    node: str
    name: str
    service: Service | None = None

    def __str__(self) -> str:
        return f"start {self.node}/{self.name}"


@dataclass(frozen=True, slots=True)
class Run:
    """Run a command to its end: its exit status, and a regular expression for what it prints.

    `retry`: try again until it comes out so, for that long.
    """

    node: str
    command: tuple[str, ...]
    exit: int = 0
    output: str = ""
    within: float = 60.0
    retry: float = 0.0

    def __str__(self) -> str:
        return f"run in {self.node}: {' '.join(self.command)}"


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fetch a URL; status None: nothing may answer. `retry`: try again until it comes out so, for that long."""

    node: str
    url: str
    status: int | None = 200
    size: int | None = None
    within: float = 15.0
    retry: float = 0.0

    def __str__(self) -> str:
        return f"fetch in {self.node}: {self.url}{'' if self.status is not None else ', in vain'}"


@dataclass(frozen=True, slots=True)
class Send:
    """Send a packet made of fields, `layer.field`."""

    node: str
    packet: Mapping[str, object]
    count: int = 1

    def __str__(self) -> str:
        return f"send in {self.node}: {_fields_text(self.packet)}{f', {_times(self.count)}' if self.count > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Expect:
    """Packets that match must be seen at a point; how many, None: one or more."""

    at: str
    match: Mapping[str, object] = field(default_factory=dict)
    count: int | None = None
    within: float = WITHIN

    def __str__(self) -> str:
        return f"expect at {self.at}: {_fields_text(self.match)}{f', {_times(self.count)}' if self.count else ''}"


@dataclass(frozen=True, slots=True)
class ExpectNever:
    """No packet that matches may be seen at a point, from the stimulus on until so many seconds from now."""

    at: str
    match: Mapping[str, object]
    during: float

    def __str__(self) -> str:
        return f"expect never at {self.at}: {_fields_text(self.match)}"


@dataclass(frozen=True, slots=True)
class ExpectSame:
    """The packets that match at one point must be seen at the other, with just these fields changed."""

    at: tuple[str, str]
    match: Mapping[str, object] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    within: float = WITHIN

    def __str__(self) -> str:
        changes = f"{', '.join(self.changed)} changed" if self.changed else "nothing changed"
        return f"expect at {self.at[0]} and at {self.at[1]}: {_fields_text(self.match)}; {changes}"


@dataclass(frozen=True, slots=True)
class ExpectEngine:
    """What an engine must know: counters by hook and reason; how many connections and sockrefs, None: any."""

    node: str
    counters: Mapping[tuple[str, str], int] = field(default_factory=dict)
    connections: int | None = None
    sockrefs: int | None = None
    within: float = WITHIN

    def __str__(self) -> str:
        wanted = [f"{hook}.{reason} {count}" for (hook, reason), count in self.counters.items()]
        wanted += [f"{count} connections" for count in (self.connections,) if count is not None]
        wanted += [f"{count} sockrefs" for count in (self.sockrefs,) if count is not None]
        return f"expect of the engine in {self.node}: {', '.join(wanted)}"


@dataclass(frozen=True, slots=True)
class Change:
    """Change something in a node by one of the tools, with these words."""

    node: str
    tool: Tool
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"change in {self.node}: {self.tool} {' '.join(self.words)}"


@dataclass(frozen=True, slots=True)
class ChangeLinks:
    """Change what impaired links do to what a node sends, by its interfaces."""

    node: str
    impairments: Mapping[str, Impairment]

    def __str__(self) -> str:
        each = (f"{interface} {described(impairment)}" for interface, impairment in self.impairments.items())
        return f"change in {self.node}: impair {', '.join(each)}"


@dataclass(frozen=True, slots=True)
class Kill:
    """End a program."""

    node: str
    name: str
    ending: Ending = Ending.TERM

    def __str__(self) -> str:
        return f"kill {self.node}/{self.name}"


Expectation = Expect | ExpectNever | ExpectSame | ExpectEngine
Action = Start | Run | Fetch | Send | Change | ChangeLinks | Kill
Step = Action | Expectation


@dataclass(frozen=True, slots=True)
class Scenario:
    """A topology and its steps. `description`: what it shows."""

    name: str
    topology: Topology
    steps: tuple[Step, ...]
    description: str = ""


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _fields_text(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items()) or "any packet"
