"""The engine of a node, for tests and scripts: what it knows as Python values.

Owns: asking. Talks to the engine as any user does, through its control socket, from inside the node's namespace.
"""

from __future__ import annotations

from typing import Any, Final

from nfq_engine.client import ControlError, Tproxy
from testbed.lab import LabError, NodeHandle


class EngineHandle:
    """The engine that runs in a node. Each question is answered as things are then; LabError when it cannot be."""

    def __init__(self, node: NodeHandle) -> None:
        self.node: Final = node

    @property
    def rules(self) -> list[str]:
        """The tproxy table as `tproxyctl -S` prints it."""
        return self.tproxyctl("-S")

    @property
    def ruleset(self) -> str:
        """The tproxy table as `tproxyctl save -c` prints it: with packet and byte counts."""
        text: str = self._ask({"call": "save", "counters": True})["text"]
        return text

    @property
    def sockrefs(self) -> list[dict[str, Any]]:
        """The sockets that own a foreign address: the objects of `tproxyctl sockrefs --json`."""
        found: list[dict[str, Any]] = self._ask({"call": "sockrefs"})["sockrefs"]
        return found

    @property
    def connections(self) -> list[dict[str, Any]]:
        """The connections it tracks: the objects of `tproxyctl connections --json`."""
        found: list[dict[str, Any]] = self._ask({"call": "connections"})["connections"]
        return found

    @property
    def counters(self) -> dict[str, Any]:
        """Packets by hook and reason, and the queue's counts: the object of `tproxyctl counters --json`."""
        found: dict[str, Any] = self._ask({"call": "counters"})["counters"]
        return found

    def tproxyctl(self, *words: str) -> list[str]:
        """A rule command, as to `tproxyctl`: `tproxyctl("-A", "PREROUTING", ...)`; the lines that it prints."""
        lines: list[str] = self._ask({"call": "rules", "arguments": list(words)})["output"]
        return lines

    def client(self) -> Tproxy:
        """A client of the engine, for sockets of the node. Close it."""
        try:
            return self.node.call(Tproxy)
        except OSError as error:
            raise LabError(f"{self.node.name}: {error.strerror}") from error

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.client() as tproxy:
            try:
                return tproxy.call(request)
            except (ControlError, OSError) as error:
                raise LabError(f"{self.node.name}: {error}") from error
