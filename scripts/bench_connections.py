#!/usr/bin/env python3
"""New TCP connections a second through a redirect: the kernel datapath, against a plain nft DNAT rule.

Client and gateway, one link; a program in C opens connections from several processes at once, and one in C accepts them
on the gateway. All share the machine's processors, as the engine does, so the figures compare what a new connection
costs altogether. The engine's own CPU time for each is told beside.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

import benchlib
import gateways

from testbed.lab import Lab
from testbed.topology import Readiness

OPENERS: Final = 16
ACCEPTORS: Final = 4
SECONDS: Final = 2.0


def connections(lab: Lab, program: Path) -> float:
    """New connections a second."""
    count, seconds = opened(lab, program)
    return count / seconds


def engine_cost(lab: Lab, program: Path) -> float:
    """Microseconds of the engine's CPU for each new connection."""
    before = gateways.engine_seconds(lab)
    count, _ = opened(lab, program)
    return (gateways.engine_seconds(lab) - before) / count * 1e6


def opened(lab: Lab, program: Path) -> tuple[int, float]:
    """Open connections for a while: how many, and in how many seconds."""
    command = [str(program), "open", gateways.ELSEWHERE, str(gateways.ASKED), str(OPENERS), str(SECONDS)]
    count, seconds = lab["client"].run(command).stdout.split()
    return int(count), float(seconds)


def served(case: str, program: Path, stack: ExitStack) -> Lab:
    """A gateway that accepts what is redirected to it."""
    lab = gateways.running(case, stack)
    command = (str(program), "serve", str(gateways.SERVED), str(ACCEPTORS), "{notify_fd}")
    lab["gateway"].start("acceptors", command, Readiness(notify=True))
    return lab


def main() -> None:
    options = benchlib.parser(__doc__.splitlines()[0], rounds=11).parse_args()
    with ExitStack() as stack:
        program = gateways.compiled("connections", stack)
        labs = {case: served(case, program, stack) for case in (*gateways.CASES, gateways.ASKED_EACH)}
        cases: dict[str, Callable[[], float]] = {case: partial(connections, labs[case], program) for case in labs}
        samples = benchlib.run_paired(cases, options.rounds)
        further = {
            f"{case}: CPU, µs for each connection": median(
                engine_cost(labs[case], program) for _ in range(options.rounds)
            )
            for case in ("engine", gateways.ASKED_EACH)
        }
    ratios = {f"{case}/plain": (case, "plain") for case in ("engine", gateways.ASKED_EACH)}
    benchlib.publish(benchlib.summarise("connections", "connections/s", samples, ratios, further), options.json)


if __name__ == "__main__":
    main()
