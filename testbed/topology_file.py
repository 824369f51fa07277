"""Topology files: YAML to values.

Owns: the file format and its schema. All problems of a file are told at once (documents.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from testbed.addressing import AddressingError, addressed
from testbed.documents import Complaint, Document, DocumentError, Problem, key_text, shape_problems
from testbed.topology import Topology
from testbed.topology_checks import problems
from testbed.topology_reader import read

SCHEMA: Final = Path(__file__).with_name("topology.schema.json")


class TopologyError(DocumentError):
    """A topology that cannot be used."""


def load(path: Path) -> Topology:
    """Read a topology file."""
    return _read(Document.load(path, TopologyError))


def loads(text: str, source: str = "topology") -> Topology:
    """Read a topology from YAML text; `source` is the name that errors give it."""
    return _read(Document.parse(text, source, TopologyError))


def check(topology: Topology) -> None:
    """TopologyError when something is wrong with a topology, wherever it came from."""
    if found := problems(topology):
        raise TopologyError(*(Complaint(topology.name, what, key=key_text(where)) for where, what in found))


def understand(root: Any) -> tuple[Topology, list[Problem]]:
    """The topology that a document, which keeps to the schema, describes, and all that is wrong with it."""
    topology, found = read(root)
    if found:
        return topology, found
    try:
        topology = addressed(topology)
    except AddressingError as error:
        return topology, [(("links",), str(error))]
    return topology, problems(topology)


def _read(document: Document) -> Topology:
    document.refuse(shape_problems(document.root, SCHEMA))
    topology, found = understand(document.root)
    document.refuse(found)
    return topology
