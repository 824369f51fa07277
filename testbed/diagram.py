"""Diagrams: a topology as an SVG picture, without building anything. Pure, and the same for the same topology.

Owns: where nodes and links are drawn. Nodes stand in columns: the first node and its like, their neighbours, the
neighbours' neighbours, and so on. Each link has a slot of its own at the sides of its nodes, and runs level next to
them, where its interfaces and addresses are written. What is not connected to the rest is drawn below it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final
from xml.etree import ElementTree

from testbed.topology import End, Impairment, Kind, Link, Node, Topology

_CHARACTER: Final = 6.7  # pixels, of the small monospaced letters
_IN_SIGHT: Final = 700  # of a taller box not all is seen at once
_LINE: Final = 13.0  # pixels from one line of text to the next
_SPACE: Final = 12.0  # pixels between two nodes of a column
_SLANT: Final = 44.0  # pixels in the middle of a link, where it may change its height
_MARGIN: Final = 16.0
_CORNER: Final = {Kind.HOST: "10", Kind.ROUTER: "2", Kind.BRIDGE: "2"}

_STYLE: Final = """
.topology { font: 11px ui-monospace, monospace; color-scheme: light dark; background: #fff; }
.topology text { fill: #20262d; } .topology .faint { fill: #66707a; }
.topology .name { font-weight: bold; font-size: 13px; }
.topology rect { stroke-width: 1.5; fill: #eef3f8; stroke: #6b8299; }
.topology .router rect { fill: #fdf3e1; stroke: #b98a2f; }
.topology .bridge rect { fill: #eee; stroke: #777; stroke-dasharray: 5 3; }
.topology .engine rect { stroke: #b3261e; stroke-width: 2.5; }
.topology .tproxyd, .topology .impaired { fill: #b3261e; }
.topology path { fill: none; stroke: #66707a; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
.topology { background: #15191d; } .topology text { fill: #dde3e9; } .topology .faint { fill: #98a3ae; }
.topology rect { fill: #1f2a35; stroke: #7f9ab5; } .topology .router rect { fill: #35290f; stroke: #c99b45; }
.topology .bridge rect { fill: #2a2a2a; stroke: #999; }
.topology .engine rect { stroke: #ff8a80; } .topology .tproxyd, .topology .impaired { fill: #ff8a80; }
}
"""


@dataclass(frozen=True, slots=True)
class Box:
    """Where a node is drawn, in pixels."""

    node: str
    x: float
    y: float
    width: float
    height: float


@dataclass(slots=True)
class _Column:
    """Nodes one below the other; `width` of the boxes, `gap` to the next column."""

    nodes: list[str]
    width: float = 0.0
    gap: float = 0.0


@dataclass(slots=True)
class _Sides:
    """The links at the left and at the right side of a node, from top to bottom."""

    left: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)


class _Layout:
    """Where everything is."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.slot = _LINE * max((len(_below(end)) for link in topology.links for end in link.ends), default=1) + 24
        self.boxes: dict[str, Box] = {}
        self.sides: dict[str, _Sides] = {node.name: _Sides() for node in topology.nodes}
        self.column_of: dict[str, int] = {}
        top = _MARGIN
        for columns in _components(topology):
            top = self._place(columns, top)
        self.height = top + _MARGIN - _SPACE
        self.width = max(self._right_edge(box) for box in self.boxes.values()) + _MARGIN

    def _place(self, columns: list[_Column], top: float) -> float:
        """Place what is connected below `top`; the next free height."""
        self.column_of |= {name: index for index, column in enumerate(columns) for name in column.nodes}
        order = {name: index for column in columns for index, name in enumerate(column.nodes)}
        for number, link in sorted(enumerate(self.topology.links), key=lambda each: _orders(each[1], order)):
            if link.left.node in order:
                self._attach(number, link)
        self._measure(columns)
        heights = [sum(self._height(name) + _SPACE for name in column.nodes) for column in columns]
        x = _MARGIN
        for column, height in zip(columns, heights, strict=True):
            y = top + (max(heights) - height) / 2
            for name in column.nodes:
                self.boxes[name] = Box(name, x, y, column.width, self._height(name))
                y += self._height(name) + _SPACE
            x += column.width + column.gap
        return top + max(heights)

    def _attach(self, number: int, link: Link) -> None:
        """Give a link its slots: to the right at the nearer node, to the left at the farther; equals have it right."""
        near, far = link.left.node, link.right.node
        if self.column_of[near] > self.column_of[far]:
            near, far = far, near
        self.sides[near].right.append(number)
        is_level = self.column_of[near] == self.column_of[far]
        (self.sides[far].right if is_level else self.sides[far].left).append(number)

    def _measure(self, columns: Sequence[_Column]) -> None:
        """How wide the boxes are, and the gaps for what is written beside them."""
        links = self.topology.links
        for column in columns:
            texts = [text for name in column.nodes for _, text in _inside(self.topology.node(name))]
            column.width = max(map(len, texts)) * _CHARACTER * 1.1 + 24
        for column, following in pairwise([*columns, _Column([])]):
            near = [_end_of(links[i], name) for name in column.nodes for i in self.sides[name].right]
            far = [_end_of(links[i], name) for name in following.nodes for i in self.sides[name].left]
            column.gap = sum(max(map(_label_width, ends), default=0.0) for ends in (near, far)) + _SLANT

    def _height(self, name: str) -> float:
        sides = self.sides[name]
        slots = max(len(sides.left), len(sides.right))
        return max(slots * (self.slot + _SPACE) - _SPACE, len(_inside(self.topology.node(name))) * 15.0 + 16)

    def _right_edge(self, box: Box) -> float:
        labels = [_label_width(_end_of(self.topology.links[i], box.node)) for i in self.sides[box.node].right]
        return box.x + box.width + (max(labels) + _SLANT if labels else 0)

    def port(self, node: str, number: int) -> tuple[float, float, int]:
        """Where a link meets a node, and in which direction it leaves: 1 to the right, -1 to the left."""
        box, sides = self.boxes[node], self.sides[node]
        slots, x, direction = (sides.right, box.x + box.width, 1) if number in sides.right else (sides.left, box.x, -1)
        pitch = self.slot + _SPACE
        top = box.y + (box.height - len(slots) * pitch + _SPACE) / 2
        return x, top + slots.index(number) * pitch + 20, direction


def diagram(topology: Topology) -> str:
    """Draw a topology: an SVG document, light or dark as the reader has it."""
    layout = _Layout(topology)
    width, height = (f"{size:.0f}" for size in (layout.width, layout.height))
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "class": "topology",
            "role": "img",
            "width": width,
            "height": height,
            "viewBox": f"0 0 {width} {height}",
        },
    )
    ElementTree.SubElement(root, "title").text = f"topology {topology.name}"
    ElementTree.SubElement(root, "style").text = _STYLE
    for number, link in enumerate(topology.links):
        _draw_link(root, layout, number, link)
    for node in topology.nodes:
        _draw_node(root, layout.boxes[node.name], node)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def boxes(topology: Topology) -> list[Box]:
    """Where the nodes are drawn, in the order of the topology."""
    placed = _Layout(topology).boxes
    return [placed[node.name] for node in topology.nodes]


def _components(topology: Topology) -> list[list[_Column]]:
    """The columns of each part that is connected."""
    neighbours: defaultdict[str, list[str]] = defaultdict(list)
    for link in topology.links:
        neighbours[link.left.node].append(link.right.node)
        neighbours[link.right.node].append(link.left.node)
    placed: set[str] = set()
    parts = []
    for node in topology.nodes:
        if node.name not in placed:
            parts.append(_columns(_first_column(topology, node, neighbours), neighbours))
            placed |= {name for column in parts[-1] for name in column.nodes}
    return parts


def _first_column(topology: Topology, first: Node, neighbours: dict[str, list[str]]) -> list[str]:
    """The first node; of a star's leaves also its like, so that clients stand on one side and servers on the other."""
    if len(neighbours[first.name]) != 1:
        return [first.name]
    (hub,) = neighbours[first.name]
    others = [topology.node(name) for name in dict.fromkeys(neighbours[hub]) if name != first.name]
    alike = [
        node.name
        for node in others
        if len(neighbours[node.name]) == 1 and node.kind is first.kind and bool(node.services) == bool(first.services)
    ]
    if alike and len(alike) == len(others):
        alike.pop()  # somebody has to be on the other side
    return [first.name, *alike]


def _columns(first: list[str], neighbours: dict[str, list[str]]) -> list[_Column]:
    """Nodes by their distance from the first column."""
    columns, seen = [_Column(first)], set(first)
    while names := [name for near in columns[-1].nodes for name in neighbours[near] if name not in seen]:
        columns.append(_Column(list(dict.fromkeys(names))))
        seen |= set(names)
    return columns


def _orders(link: Link, order: dict[str, int]) -> tuple[int, int]:
    """Links are attached from top to bottom, so that they cross seldom."""
    return order.get(link.left.node, 0) + order.get(link.right.node, 0), order.get(link.left.node, 0)


def _end_of(link: Link, node: str) -> End:
    return link.left if link.left.node == node else link.right


def _below(end: End) -> list[tuple[str, str]]:
    """What is written below a link at one end: style and text."""
    lines = [("faint", str(address)) for address in end.addresses]
    return lines + ([("impaired", _impairment_text(end.impair))] if end.impair is not None else [])


def _label_width(end: End) -> float:
    texts = [end.interface, *(text for _, text in _below(end))]
    return max(map(len, texts)) * _CHARACTER + 12


def _impairment_text(impairment: Impairment) -> str:
    """`delay 5 ms ±1 ms, loss 3%`."""
    parts = []
    if impairment.delay or impairment.jitter:
        jitter = f" ±{impairment.jitter * 1000:g} ms" if impairment.jitter else ""
        parts.append(f"delay {impairment.delay * 1000:g} ms{jitter}")
    for name in ("loss", "duplicate", "reorder", "corrupt"):
        if chance := getattr(impairment, name):
            parts.append(f"{name} {chance:.4%}".rstrip("%").rstrip("0").rstrip(".") + "%")
    if impairment.rate is not None:
        parts.append(f"rate {impairment.rate / 1e6:g} Mbit/s")
    return ", ".join(parts) or "no impairment"


def _inside(node: Node) -> list[tuple[str, str]]:
    """What is written into a node: style and text."""
    lines = [("name", node.name), ("faint", node.kind.value)]
    if node.engine is not None:
        lines.append(("tproxyd", f"engine: {node.engine.datapath}"))
    lines += [("faint", f"• {service.name}") for service in node.services]
    return lines


def _draw_node(root: ElementTree.Element, box: Box, node: Node) -> None:
    styles = f"node {node.kind.value}{' engine' if node.engine is not None else ''}"
    group = ElementTree.SubElement(root, "g", {"class": styles, "data-node": node.name})
    x, y, width, height = (f"{value:.1f}" for value in (box.x, box.y, box.width, box.height))
    ElementTree.SubElement(group, "rect", {"x": x, "y": y, "width": width, "height": height, "rx": _CORNER[node.kind]})
    lines = _inside(node)
    parts = max(1, round(box.height / _IN_SIGHT))  # in each of which it is written what this is
    for part in range(parts):
        top = box.y + box.height * (part + 0.5) / parts - len(lines) * 7.5 + 11
        for number, (style, text) in enumerate(lines):
            _write(group, text, box.x + box.width / 2, top + number * 15, style, "middle")


def _draw_link(root: ElementTree.Element, layout: _Layout, number: int, link: Link) -> None:
    group = ElementTree.SubElement(root, "g", {"class": "link", "data-link": f"{link.left.label} {link.right.label}"})
    way = []
    for end in link.ends:
        x, y, direction = layout.port(end.node, number)
        way.append([(x, y), (x + direction * _label_width(end), y)])
        anchor = "start" if direction > 0 else "end"
        _write(group, end.interface, x + direction * 6, y - 5, "interface", anchor)
        for line, (style, text) in enumerate(_below(end)):
            _write(group, text, x + direction * 6, y + _LINE * (line + 1), style, anchor)
    corners = [*way[0], *reversed(way[1])]
    path = " L ".join(f"{x:.1f} {y:.1f}" for x, y in corners)
    ElementTree.SubElement(group, "path", {"d": f"M {path}"})


def _write(group: ElementTree.Element, text: str, x: float, y: float, style: str, anchor: str) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": style, "text-anchor": anchor}
    ElementTree.SubElement(group, "text", place).text = text
