"""What `testbed run` prints of a scenario: a line a step, as it is done, and in the end how it came out.

Owns: the words, the colours, the JSON. What a step does is scenario_run.py's matter.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator
from typing import Final

import click

from testbed.cli_options import progress
from testbed.lab import Lab
from testbed.scenario import Scenario
from testbed.scenario_run import Outcome, carry_out

_INDENT: Final = " " * 12


def play(scenario: Scenario, lab: Lab, *, as_json: bool) -> bool:
    """Carry out a scenario in its lab and print how; whether all of it was as it should be."""
    if as_json:
        outcomes = list(_outcomes(scenario, lab))
        click.echo(json.dumps(_values(scenario, outcomes), indent=2))
    else:
        outcomes = []
        for outcome in _outcomes(scenario, lab):
            outcomes.append(outcome)
            _print(outcome)
        _print_end(scenario, outcomes)
    return not any(outcome.failure for outcome in outcomes)


def _outcomes(scenario: Scenario, lab: Lab) -> Iterator[Outcome]:
    """How the steps come out; one that takes long is told while it does."""
    outcomes = carry_out(scenario, lab)
    for step in scenario.steps:
        with progress(str(step)):
            outcome = next(outcomes)
        yield outcome
        if outcome.failure:
            return


def _print(outcome: Outcome) -> None:
    word = click.style("FAILED", fg="red", bold=True) if outcome.failure else click.style("ok    ", fg="green")
    if os.environ.get("NO_COLOR"):  # click knows only terminals
        word = click.unstyle(word)
    click.echo(f"{word}  {outcome.number:>2}  {outcome.step}  ({outcome.seconds:.2f} s)")
    if outcome.failure:
        click.echo(textwrap.indent(outcome.failure, _INDENT))


def _print_end(scenario: Scenario, outcomes: list[Outcome]) -> None:
    left = len(scenario.steps) - len(outcomes)
    if outcomes[-1].failure:
        click.echo(f"{scenario.name}: step {len(outcomes)} failed{f', {left} were not done' if left else ''}")
    else:
        click.echo(f"{scenario.name}: all {len(outcomes)} steps as they should be")


def _values(scenario: Scenario, outcomes: list[Outcome]) -> dict[str, object]:
    return {
        "scenario": scenario.name,
        "passed": not any(outcome.failure for outcome in outcomes),
        "steps": [
            {
                "number": outcome.number,
                "step": str(outcome.step),
                "seconds": round(outcome.seconds, 3),
                "failure": outcome.failure or None,
            }
            for outcome in outcomes
        ],
        "not_done": [str(step) for step in scenario.steps[len(outcomes) :]],
    }
