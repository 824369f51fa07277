"""The journal of a lab: what happened in it and when, for the timeline of its report.

Owns: the entries, in the order in which they began. Must not know how they are drawn (timeline.py), nor packets and the
engines' events, which captures and recorder.py keep.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from testbed.process import Program

LAB: Final = "lab"  # where something happened that is no node's matter


@dataclass(slots=True)
class Entry:
    """Something that took time, or still does. Times are nanoseconds since the epoch, as captures have them.

    `where`: a node, or `LAB`. `ready`: when a program said that it is. `outcome`: how it ended, where that is worth a
    word; `is_bad`: it was no good end.
    """

    where: str
    what: str
    began: int
    ready: int | None = None
    ended: int | None = None
    outcome: str = ""
    is_bad: bool = False
    program: Program | None = None

    def end(self, outcome: str = "", *, is_bad: bool = False) -> None:
        """It is over; only the first word counts."""
        if self.ended is None:
            self.ended, self.outcome, self.is_bad = time.time_ns(), outcome, is_bad

    def look(self) -> None:
        """A program that has ended by itself is over, from when it was seen to be."""
        if self.program is not None and (status := self.program.returncode) is not None:
            how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
            self.end(how, is_bad=status > 0)


def exit_code(status: int) -> int:
    """What a shell makes of how a command ended, as subprocess tells it."""
    return status if status >= 0 else 128 - status


def command_line(words: Sequence[str]) -> str:
    """A command as a shell would be given it, without the folder that it lies in."""
    return shlex.join((Path(words[0]).name, *words[1:]))


@dataclass(slots=True)
class Journal:
    """What happened so far."""

    entries: list[Entry] = field(default_factory=list)

    def begin(self, where: str, what: str) -> Entry:
        """Something begins now."""
        entry = Entry(where, what, time.time_ns())
        self.entries.append(entry)
        return entry

    @contextlib.contextmanager
    def during(self, where: str, what: str) -> Iterator[Entry]:
        """Something that happens in the `with`; an exception is its bad end."""
        entry = self.begin(where, what)
        try:
            yield entry
        except BaseException as error:
            entry.end(str(error) or type(error).__name__, is_bad=True)
            raise
        entry.end()
