"""Undoing: what was done is taken back in reverse, and every failure of that is kept."""

from __future__ import annotations

from collections.abc import Callable


class Undo:
    """Steps that take back what was done, the last first."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def add(self, what: str, step: Callable[[], object]) -> None:
        """Note how something is taken back; `what` names it if that fails."""
        self._steps.append((what, step))

    def run(self) -> list[str]:
        """Take everything back; a line for each step that failed. A second run does nothing."""
        failures = []
        while self._steps:
            what, step = self._steps.pop()
            try:
                step()
            except Exception as error:
                failures.append(f"{what}: {type(error).__name__}: {error}")
        return failures
