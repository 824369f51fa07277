"""The pages of docs/ as material for tests: their code blocks, and whether shown output is what comes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, what stands behind that, and the line of the page that it begins in."""

    language: str
    name: str
    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a console block, and the output that is shown."""

    text: str
    shown: tuple[str, ...]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    text = (DOCS / page).read_text()
    fences = re.finditer(r"^```(\w+) ?(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], match[3], text.count("\n", 0, match.start()) + 2) for match in fences]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a console block."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, *shown = part.splitlines()
        yield Command(command, tuple(shown))


def missing(shown: Sequence[str], seen: str) -> list[str]:
    """The shown lines that did not come, in their order; … is anything, and spaces are as many as may be."""
    lines = iter([" ".join(line.split()) for line in seen.splitlines()])
    return [line for line in shown if not any(re.fullmatch(_pattern(line), other) for other in lines)]


def _pattern(line: str) -> str:
    return r".*".join(re.escape(part) for part in re.split("…", " ".join(line.split())))
