#!/usr/bin/env python3
"""Packets a second that a capture keeps up with: small and full-size frames, at one interface and at two at once.

Two hosts and a link; a program in C sends datagrams from one to the other at a steady rate. A capture kept up with a
rate when it lost nothing and the last frame was in memory and in the pcapng file at most 0.2 s after it was sent: so no
buffer hides that it was too slow. The highest such rate is looked for among steps of a quarter. With two interfaces,
both ends of the link are captured, each at this rate, into one file.
"""

from __future__ import annotations

import socket
from bisect import bisect_left
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import benchlib
import gateways

from testbed.capture import CaptureError
from testbed.lab import Lab
from testbed.topology_file import loads

SIZES: Final = {"small": 18, "full-size": 1472}  # bytes of payload in frames of 60 and 1514 bytes
POINTS: Final = {"one interface": ("client:eth0",), "two": ("client:eth0", "server:eth0")}
GOAL: Final = 50_000  # packets a second
RATES: Final = tuple(GOAL * 1.25**step for step in range(-4, 9))
SECONDS: Final = 1.0
BEHIND: Final = 0.2
PATIENCE: Final = 60.0  # seconds for a capture to catch up
PORT: Final = 9

TOPOLOGY: Final = loads(
    "name: bench-capture\nnodes: {client: , server: }\nlinks: [{ends: [{node: client}, {node: server}]}]"
)


class Run:
    """What became of one steady second."""

    def __init__(self, program: Path, size: int, points: tuple[str, ...], rate: float) -> None:
        with Lab(replace(TOPOLOGY, capture=points)) as lab:
            capture = lab.capture
            assert capture is not None
            address = lab["server"].address()
            with lab["server"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
                sink.bind((address, PORT))
                sink.settimeout(PATIENCE)
                command = [str(program), address, str(PORT), str(size)]
                lab["client"].run([*command, "1", "1"])
                sink.recv(size)  # so the neighbour is known; all further ones are left unread
                sent, seconds = lab["client"].run([*command, str(rate), str(SECONDS)]).stdout.split()
            self.has_kept_up = True
            try:
                capture.settle(BEHIND)
            except CaptureError:
                self.has_kept_up = False
                capture.settle(PATIENCE)
            self.rate = int(sent) / float(seconds)
            self.lost = sum(statistics.dropped for statistics in capture.statistics().values())
            # Of the sender's interface only: behind it, a busy kernel's backlog of received packets may overflow.
            sender = capture.statistics()["client:eth0"]
            if sender.seen + sender.dropped < int(sent):
                raise RuntimeError(f"{sent} packets were sent, but the capture tells of {sender}")
            self.has_kept_up = self.has_kept_up and not self.lost


def highest(program: Path, size: int, points: tuple[str, ...]) -> float:
    """The highest rate that is kept up with, as it was really sent; 0 when even the lowest is too much."""
    kept = 0.0

    def is_too_much(rate: float) -> bool:
        nonlocal kept
        run = Run(program, size, points, rate)
        kept = max(kept, run.rate) if run.has_kept_up else kept
        return not run.has_kept_up

    bisect_left(RATES, x=True, key=is_too_much)
    return kept


def main() -> None:
    options = benchlib.parser(__doc__.splitlines()[0], rounds=3).parse_args()
    kinds = {f"{size}, {where}": (SIZES[size], POINTS[where]) for size in SIZES for where in POINTS}
    with ExitStack() as stack:
        program = gateways.compiled("datagrams", stack)
        cases: dict[str, Callable[[], float]] = {kind: partial(highest, program, *what) for kind, what in kinds.items()}
        samples = benchlib.run_paired(cases, options.rounds)
        lost = {
            f"lost at {GOAL:,} packets/s, {kind}, {options.rounds} times": float(
                sum(Run(program, *what, GOAL).lost for _ in range(options.rounds))
            )
            for kind, what in kinds.items()
        }
    benchlib.publish(benchlib.summarise("capture", "packets/s", samples, {}, lost), options.json)


if __name__ == "__main__":
    main()
