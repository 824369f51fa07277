"""Dissections: frames as Scapy reads them, line by line, with what changed on the way marked.

Owns: the words for one frame. Values in, values out; Scapy is loaded with the first.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from testbed.changes import Change
from testbed.frames import Frame

_LONGEST_LINE: Final = 300  # characters
_MOST_BYTES: Final = 256  # of a frame, in the listing of its bytes

# How Scapy's text opens a layer and tells a field.
_LAYER: Final = re.compile(r"###\[ (.+?) \]###")
_FIELD: Final = re.compile(r"[\s|]*(\w+)\s*=")


@dataclass(frozen=True, slots=True)
class Line:
    """A line, and whether its field is not what it was at the point before."""

    text: str
    is_changed: bool = False


@dataclass(frozen=True, slots=True)
class Dissection:
    """A frame's fields, and its bytes as hexadecimal numbers; `rest`: how many of these are left out."""

    frame: Frame
    lines: tuple[Line, ...]
    dump: str
    rest: int


def dissect(frame: Frame, changes: Collection[Change] = ()) -> Dissection:
    """Read a frame with Scapy; `changes` are marked."""
    from scapy.utils import hexdump

    try:
        text = str(frame.packet.show(dump=True))
    except Exception as error:  # what is broken on purpose may break Scapy
        text = f"Scapy cannot read it: {error!r}"
    data = frame.data[:_MOST_BYTES]
    dump = str(hexdump(data, dump=True))
    return Dissection(
        frame, tuple(_lines(text, {change.field for change in changes})), dump, len(frame.data) - len(data)
    )


def _lines(text: str, changed: Collection[str]) -> list[Line]:
    layer, lines = "", []
    for line in text.splitlines():
        if opens := _LAYER.search(line):
            name = opens[1].lower()
            layer = f"embedded {name.removesuffix(' in icmp')}" if name.endswith(" in icmp") else name
        field = _FIELD.match(line)
        name = f"{layer}.{field[1]}" if field else ""
        is_changed = name in changed or (layer == "raw" and field is not None and "payload" in changed)
        lines.append(Line(_cut(line), is_changed))
    return lines


def _cut(line: str) -> str:
    left_out = len(line) - _LONGEST_LINE
    return line if left_out <= 0 else f"{line[:_LONGEST_LINE]}… and {left_out} characters more"
