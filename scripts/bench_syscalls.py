#!/usr/bin/env python3
"""What the supervisor's filter costs: system calls of a program with and without it, and calls that it hands over.

A program in C measures one system call, ten parts of a loop, and tells the quickest. Each round does so for each call
without the filter and with it. The handler behind IP_TPROXY answers at once, so its figures are those of the way there
and back.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import benchlib

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "programs" / "syscall_cost.c"

UNDER_FILTER = """
import sys
from nfq_engine.shell.seccomp import TPROXY_OPTIONS
from nfq_engine.shell.supervisor import SocketReply
from nfq_engine.shell.supervisor_launch import Supervision, run_program
run_program(sys.argv[1:], Supervision(TPROXY_OPTIONS, lambda: lambda call: SocketReply(0, call.value)))
"""

NOT_OURS = {"getppid": 400_000, "send": 50_000, "getsockopt": 200_000, "setsockopt": 200_000}
HANDED_OVER = {"tproxy-set": 2_000, "tproxy-get": 2_000}


def measure(program: Path, call: str, count: int, *, has_filter: bool) -> float:
    """Nanoseconds of one call."""
    launcher = [sys.executable, "-c", UNDER_FILTER] if has_filter else []
    done = subprocess.run(
        [*launcher, str(program), call, str(count)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        sys.exit(f"{call}: {done.stdout}{done.stderr}")
    return float(done.stdout)


def main() -> None:
    options = benchlib.parser("System calls of a program with and without the supervisor's filter.", 5).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "syscall_cost"
        subprocess.run(["gcc", "-O2", "-o", program, SOURCE], check=True)
        cases: dict[str, Callable[[], float]] = {}
        for call, count in NOT_OURS.items():
            cases[f"{call}, plain"] = partial(measure, program, call, count, has_filter=False)
            cases[f"{call}, filter"] = partial(measure, program, call, count, has_filter=True)
        for call, count in HANDED_OVER.items():
            cases[call] = partial(measure, program, call, count, has_filter=True)
        samples = benchlib.run_paired(cases, options.rounds)
    ratios = {f"{call}, filter/plain": (f"{call}, filter", f"{call}, plain") for call in NOT_OURS}
    benchlib.publish(benchlib.summarise("syscalls", "ns", samples, ratios), options.json)


if __name__ == "__main__":
    main()
