"""Dissections: frames as Scapy reads them, line by line, with what changed on the way marked.

Owns: the words for one frame. Values in, values out; Scapy is loaded with the first.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from testbed.changes import EMBEDDED, Change
from testbed.frames import Frame

_LONGEST_LINE: Final = 300  # characters
_MOST_BYTES: Final = 256  # of a frame, in the listing of its bytes

# How Scapy's text opens a layer and tells a field.
_LAYER: Final = re.compile(r"###\[ (.+?) \]###")
_FIELD: Final = re.compile(r"[\s|]*(?:(\w+)\s*=|\\(\w+)\s*\\)")

# What changes.py calls otherwise than Scapy does.
_NAMES: Final = {
    "802.1q.vlan": "vlan",
    "802_1ad.vlan": "vlan",
    "icmpv6.data": "payload",
    "raw.load": "payload",
}


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
    layer = embedded = ""
    seen, lines = set(), []
    for line in text.splitlines():
        if opens := _LAYER.search(line):
            layer, is_embedded = _layer_of(opens[1])
            embedded = EMBEDDED if is_embedded else embedded
        name = ""
        if field := _FIELD.match(line):
            own = f"{layer}.{field[1] or field[2]}"
            name = embedded + _NAMES.get(own, own)
        # What changed is the outer of two headers; of tags, it may be any.
        lines.append(Line(_cut(line), name in changed and (name not in seen or name == "vlan")))
        seen.add(name)
    return lines


def _layer_of(shown: str) -> tuple[str, bool]:
    """What changes.py calls a layer that Scapy shows so, and whether it is of the packet that an error is about."""
    name, inside, _ = shown.lower().partition(" in icmp")
    return "icmpv6" if name.startswith("icmpv6 ") else name, bool(inside)


def _cut(line: str) -> str:
    left_out = len(line) - _LONGEST_LINE
    return line if left_out <= 0 else f"{line[:_LONGEST_LINE]}… and {left_out} characters more"
