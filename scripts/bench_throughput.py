#!/usr/bin/env python3
"""TCP throughput through a redirect: the kernel datapath, against a plain nft DNAT rule.

Client and gateway, one link, one connection, both programs in C; once with packets of up to 64 KB, as Linux has them
between a sender and its network card, and once with each segment by itself all the way. Beside it: what the engine did
meanwhile, which should be nothing but its timer, and how many packets came to its queue: the connection's first.
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

SECONDS: Final = 0.5  # short, so that both of a pair meet the machine alike
SIZES: Final = ("64 KB", "segments")


def gigabits(lab: Lab, program: Path) -> float:
    """Gbit/s over one connection."""
    command = [str(program), "send", gateways.ELSEWHERE, str(gateways.ASKED), str(SECONDS)]
    count, seconds = lab["client"].run(command).stdout.split()
    return int(count) * 8 / float(seconds) / 1e9


def observed(lab: Lab, program: Path) -> tuple[float, float, float]:
    """Of one transfer: nanoseconds of the engine's CPU for each packet, packets, and those that were queued."""
    cpu, packets, queued = gateways.engine_seconds(lab), gateways.received(lab), gateways.queued(lab)
    gigabits(lab, program)
    packets = gateways.received(lab) - packets
    return (gateways.engine_seconds(lab) - cpu) / packets * 1e9, packets, gateways.queued(lab) - queued


def served(case: str, size: str, program: Path, stack: ExitStack) -> Lab:
    """A gateway that reads what is redirected to it."""
    lab = gateways.running(case, stack, offload=size == "64 KB")
    command = (str(program), "serve", str(gateways.SERVED), "{notify_fd}")
    lab["gateway"].start("reader", command, Readiness(notify=True))
    return lab


def main() -> None:
    options = benchlib.parser(__doc__.splitlines()[0], rounds=25).parse_args()
    with ExitStack() as stack:
        program = gateways.compiled("stream", stack)
        labs = {(case, size): served(case, size, program, stack) for size in SIZES for case in gateways.CASES}
        cases: dict[str, Callable[[], float]] = {
            f"{case}, {size}": partial(gigabits, lab, program) for (case, size), lab in labs.items()
        }
        samples = benchlib.run_paired(cases, options.rounds)
        seen = [observed(labs["engine", "segments"], program) for _ in range(options.rounds)]
    cpu, packets, queued = (median(values) for values in zip(*seen, strict=True))
    further = {
        "engine CPU, ns for each packet": cpu,
        "packets of a transfer": packets,
        "of these, in the queue": queued,
    }
    ratios = {f"engine/plain, {size}": (f"engine, {size}", f"plain, {size}") for size in SIZES}
    benchlib.publish(benchlib.summarise("throughput", "Gbit/s", samples, ratios, further), options.json)


if __name__ == "__main__":
    main()
