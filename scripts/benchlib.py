"""Benchmarks: paired runs, medians, and the one shape of a result.

Owns: in which order cases are measured, how samples become figures, how a result looks as text and as JSON.
Must not know what is measured: a case is a function that runs once and returns one figure.

A `scripts/bench_NAME.py` reads:

    options = benchlib.parser("what this measures", rounds=5).parse_args()
    samples = benchlib.run_paired({"engine": run_engine, "plain": run_plain}, options.rounds)
    result = benchlib.summarise("forward", "packets/s", samples, {"engine/plain": ("engine", "plain")})
    benchlib.publish(result, options.json)
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Spread:
    """What one case's rounds came to, in the unit of its benchmark."""

    median: float
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class Result:
    """A finished benchmark. A ratio is the median of the ratios of each round, not the ratio of the medians.

    `further` are single figures of other units, which their names tell.
    """

    name: str
    unit: str
    cases: Mapping[str, Spread]
    ratios: Mapping[str, float]
    further: Mapping[str, float]

    def as_json(self) -> str:
        """The shape that every benchmark writes: name, unit, cases (median, min, max), ratios, further."""
        cases = {case: {"median": s.median, "min": s.min, "max": s.max} for case, s in self.cases.items()}
        shape = {"name": self.name, "unit": self.unit, "cases": cases, "ratios": dict(self.ratios)}
        shape["further"] = dict(self.further)
        return json.dumps(shape, indent=2) + "\n"


def run_paired(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every case once a round, `rounds` times; sample i of every case is of round i.

    Each round begins with another case, so that no case always meets the machine as the one before left it.
    """
    samples: dict[str, list[float]] = {case: [] for case in cases}
    names = list(cases)
    for round_number in range(rounds):
        first = round_number % len(names)
        for case in names[first:] + names[:first]:
            samples[case].append(cases[case]())
    return samples


def summarise(
    name: str,
    unit: str,
    samples: Mapping[str, Sequence[float]],
    ratios: Mapping[str, tuple[str, str]],
    further: Mapping[str, float] | None = None,
) -> Result:
    """Samples of paired rounds as a result; `ratios` is name -> (case above the line, case below it).

    Raises ValueError when a case has no samples, or not as many as the others (then no round is a pair).
    """
    lengths = {case: len(values) for case, values in samples.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"every case needs the same number of samples, at least one: {lengths}")
    return Result(
        name=name,
        unit=unit,
        cases={case: Spread(median(values), min(values), max(values)) for case, values in samples.items()},
        ratios={
            ratio: median(a / b for a, b in zip(samples[above], samples[below], strict=True))
            for ratio, (above, below) in ratios.items()
        },
        further=further or {},
    )


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options every benchmark has (`--json FILE`, `--rounds N`); a module adds its own to it."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", type=new_file, metavar="FILE", help="write the result there as JSON")
    options.add_argument("--rounds", type=_positive, default=rounds, metavar="N", help="default: %(default)s")
    return options


def publish(result: Result, json_file: Path | None, console: Console | None = None) -> None:
    """Print the result as a table, and write it to `json_file` if there is one."""
    console = console or Console()
    console.print(_cases_table(result))
    for ratio, value in result.ratios.items():
        console.print(f"{ratio}: {_figure(value)} (median of the paired ratios)", highlight=False, markup=False)
    for name, value in result.further.items():
        console.print(f"{name}: {_figure(value)}", highlight=False, markup=False)
    if json_file is not None:
        json_file.write_text(result.as_json(), encoding="utf-8")


def _cases_table(result: Result) -> Table:
    table = Table(title=f"{result.name} ({result.unit})", title_justify="left")
    table.add_column("case")
    for column in ("median", "min", "max"):
        table.add_column(column, justify="right")
    for case, spread in result.cases.items():
        table.add_row(case, *(_figure(value) for value in (spread.median, spread.min, spread.max)))
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def new_file(text: str) -> Path:
    """A path that can be written: a benchmark must not run for a minute and only then fail to save."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}")
    return path
