"""Impaired links: what the plan makes for them, and the stage that a lab starts for them.

Owns: the names in the stage's namespace, its files, the reading of its counters. An impaired link is two veth pairs
whose far ends lie in a namespace of the testbed's own; impair_stage.py carries frames between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

from testbed.impair_model import Counts
from testbed.impair_stage import RECORD
from testbed.netns import Namespace
from testbed.process import Program
from testbed.topology import End, Impairment, Link, Readiness, Topology

WIRE: Final = "(wire)"  # the stage's namespace; no node may be called that


def is_impaired(link: Link) -> bool:
    """Whether a link does anything to its packets."""
    return any(end.impair is not None for end in link.ends)


def stage_ends(number: int) -> tuple[End, End]:
    """The stage's ends that face the left and the right end of the link of that number."""
    return End(WIRE, f"l{number}"), End(WIRE, f"r{number}")


class Stage:
    """The running stage of a lab."""

    def __init__(self, topology: Topology, namespace: Namespace, directory: Path) -> None:
        """Start it and wait until it carries frames; ServiceError when it does not."""
        directions = _directions(topology)
        self._labels = [str(direction["label"]) for direction in directions]
        self._counters = directory / "impairments.counters"
        self._counters.write_bytes(bytes(RECORD.size * len(directions)))
        config = directory / "impairments.json"
        config.write_text(json.dumps(directions, indent=1))
        log = directory / "impairments.log"
        log.unlink(missing_ok=True)  # of an earlier lab in this directory
        files = (str(config), str(self._counters))
        command = ("{python}", "-m", "testbed.impair_stage", *files, "{notify_fd}")
        self.program = Program("the impairments", command, namespace, log, Readiness(notify=True))

    def counts(self) -> Mapping[str, Counts]:
        """What became of the frames that each end of an impaired link sent, by its label."""
        data = self._counters.read_bytes()
        return {label: Counts(*record) for label, record in zip(self._labels, RECORD.iter_unpack(data), strict=True)}


def _directions(topology: Topology) -> list[dict[str, object]]:
    """Both directions of each impaired link, as the stage reads them."""
    found: list[dict[str, object]] = []
    for number, link in enumerate(topology.links):
        if is_impaired(link):
            near = stage_ends(number)
            for end, source, target in zip(link.ends, near, reversed(near), strict=True):
                impairment = asdict(end.impair or Impairment())
                names = {"source": source.interface, "target": target.interface}
                found.append({"label": end.label, **names, "impairment": impairment})
    return found
