"""Scenarios, carried out: step by step in a lab, until one fails or all are done.

Owns: what each step does and when it has failed. Must not know files or terminals. An expectation looks back to the
last step that did something, as that is where what it speaks of began.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, assert_never

from testbed.capture import CaptureError
from testbed.engine_handle import EngineHandle
from testbed.errors import in_words
from testbed.expect import ExpectationError
from testbed.journal import LAB, exit_code
from testbed.lab import Lab, LabError
from testbed.layers import packet_of
from testbed.process import ServiceError
from testbed.scenario import (
    Action,
    Change,
    ChangeLinks,
    Ending,
    Expect,
    Expectation,
    ExpectEngine,
    ExpectNever,
    ExpectSame,
    Fetch,
    Kill,
    Run,
    Scenario,
    Send,
    Start,
    Step,
    Tool,
)

_NO_ANSWER: Final = 1  # what `fetch` ends with then (traffic.py)
_LOOK_AGAIN: Final = 0.02  # seconds between two questions to an engine
_TRY_AGAIN: Final = 0.1  # seconds between two attempts
_TROUBLE: Final = (LabError, ServiceError, CaptureError, ExpectationError, OSError)


class StepError(Exception):
    """A step came out otherwise than it should; the message says how."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A step, how long it took in seconds, and why it failed; empty when it did not."""

    number: int
    step: Step
    seconds: float
    failure: str = ""


def carry_out(scenario: Scenario, lab: Lab) -> Iterator[Outcome]:
    """Do the steps in a lab that runs the scenario's topology; the first that fails is the last."""
    runner = _Runner(lab)
    for number, step in enumerate(scenario.steps, start=1):
        begin = time.monotonic()
        failure = ""
        with lab.journal.during(LAB, str(step)) as entry:
            try:
                runner.do(step)
            except (StepError, *_TROUBLE) as error:
                failure = in_words(error)
            entry.end("failed" if failure else "as it should be", is_bad=bool(failure))
        yield Outcome(number, step, time.monotonic() - begin, failure)
        if failure:
            return


class _Runner:
    """Does steps; expectations look back to the last one that was none."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def do(self, step: Step) -> None:
        """Do one step; StepError, or what the lab raises, when it fails."""
        if isinstance(step, Expectation):
            self._expect(step)
        else:
            self._lab.mark()
            self._act(step)

    def _expect(self, step: Expectation) -> None:
        match step:
            case Expect(at, match, count, within):
                self._lab.expect(at, match, count=count, within=within)
            case ExpectNever(at, match, during):
                self._lab.expect_none(at, match, during=during)
            case ExpectSame(at, match, changed, within):
                self._lab.expect_same(match, at=at, changed=changed, within=within)
            case ExpectEngine():
                self._ask_engine(step)
            case _:
                assert_never(step)

    def _act(self, step: Action) -> None:
        match step:
            case Start():
                self._start(step)
            case Run(retry=patience):
                _retried(lambda: self._run(step), patience)
            case Fetch(retry=patience):
                _retried(lambda: self._fetch(step), patience)
            case Send(node, fields, count):
                for _ in range(count):
                    self._lab[node].send(packet_of(fields))
            case Change():
                self._change(step)
            case ChangeLinks(node, impairments):
                for interface, impairment in impairments.items():
                    self._lab.impair(f"{node}:{interface}", impairment)
            case Kill():
                self._kill(step)
            case _:
                assert_never(step)

    def _start(self, step: Start) -> None:
        if step.service is not None:
            self._lab.start(step.node, step.service)
        else:
            self._lab.start_again(step.node, step.name)

    def _run(self, step: Run) -> None:
        command = [word.replace("{python}", sys.executable) for word in step.command]
        result = self._lab[step.node].run(command, check=False, timeout=step.within)
        printed = result.stdout + result.stderr
        if (status := exit_code(result.returncode)) != step.exit:
            raise StepError(f"ended with {status} instead of {step.exit}{_indented(printed)}")
        if re.search(step.output, printed, re.MULTILINE) is None:
            raise StepError(f"printed nothing like {step.output!r}{_indented(printed)}")

    def _fetch(self, step: Fetch) -> None:
        command = [sys.executable, "-m", "testbed.traffic", "fetch", step.url, "--timeout", str(step.within)]
        result = self._lab[step.node].run(command, check=False, timeout=step.within + 10)
        if result.returncode == _NO_ANSWER and step.status is None:
            return
        if result.returncode:
            what = "no answer" if result.returncode == _NO_ANSWER else f"`fetch` ended with {result.returncode}"
            raise StepError(f"{what}{_indented(result.stderr)}")
        answer = json.loads(result.stdout)
        if step.status is None:
            raise StepError(f"answered, with status {answer['status']} and {answer['size']} bytes")
        for name, wanted in (("status", step.status), ("size", step.size)):
            if wanted not in (None, answer[name]):
                raise StepError(f"{name} {answer[name]} instead of {wanted}")

    def _ask_engine(self, step: ExpectEngine) -> None:
        engine = EngineHandle(self._lab[step.node])
        deadline = time.monotonic() + step.within
        while wrong := list(_otherwise(step, engine)):
            if time.monotonic() >= deadline:
                raise StepError("; ".join(wrong))
            time.sleep(_LOOK_AGAIN)

    def _change(self, step: Change) -> None:
        node = self._lab[step.node]
        match step.tool:
            case Tool.TPROXY:
                EngineHandle(node).tproxyctl(*step.words)
            case Tool.IP | Tool.NFT:
                node.run([step.tool.value, *step.words])
            case _:
                assert_never(step.tool)

    def _kill(self, step: Kill) -> None:
        program = self._lab.programs[step.node, step.name]
        program.check()
        match step.ending:
            case Ending.TERM:
                program.stop()
            case Ending.KILL:
                program.kill()
            case _:
                assert_never(step.ending)


def _retried(attempt: Callable[[], None], patience: float) -> None:
    """Do something until it comes out as it should, or for `patience` seconds; then what the last attempt raised."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return attempt()
        except (StepError, LabError):
            if time.monotonic() >= deadline:
                raise
        time.sleep(_TRY_AGAIN)


def _otherwise(step: ExpectEngine, engine: EngineHandle) -> Iterator[str]:
    """What an engine knows otherwise than it should."""
    if step.counters:
        hooks: Mapping[str, Mapping[str, int]] = engine.counters["hooks"]
        for (hook, reason), wanted in step.counters.items():
            if (found := hooks.get(hook, {}).get(reason, 0)) != wanted:
                yield f"{hook}.{reason} is {found} instead of {wanted}"
    for name, count in (("connections", step.connections), ("sockrefs", step.sockrefs)):
        if count is not None and (listed := len(getattr(engine, name))) != count:
            yield f"{listed} {name} instead of {count}"


def _indented(text: str) -> str:
    """What a program printed, behind a message: its last lines, indented."""
    return "".join(f"\n    | {line}" for line in text.splitlines()[-20:])
