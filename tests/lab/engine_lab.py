"""A client, a gateway with the engine, and a server: what the tests of the kernel datapath begin with."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfq_engine.client import Tproxy
from testbed.lab import Lab, NodeHandle
from testbed.topology import Readiness
from testbed.topology_file import loads

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
ANY = {4: "0.0.0.0", 6: "::"}
FOREIGN = {4: "198.51.100.7", 6: "2001:db8::7"}
PATIENCE = 10.0
RULES = (
    "-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 50080",
    "-A PREROUTING -p udp -m udp --dport 80 -j TPROXY --on-port 50080",
    "-A OUTPUT -p tcp -m tcp --dport 82 -j TPROXY --on-port 50082",
)


def topology(rules: Sequence[str] = RULES, datapath: str = "kernel", options: Sequence[str] = ()) -> str:
    """The topology file."""
    return json.dumps(
        {
            "name": "engine",
            "nodes": {
                "client": {},
                "gateway": {
                    "kind": "router",
                    "engine": {"datapath": datapath, "rules": list(rules), "options": list(options)},
                },
                "server": {},
            },
            "links": [
                {"ends": [{"node": "client"}, {"node": "gateway"}]},
                {"ends": [{"node": "gateway"}, {"node": "server"}]},
            ],
        }
    )


@dataclass
class EngineLab:
    """The lab, with its three nodes and a client of its engine."""

    lab: Lab
    tproxy: Tproxy
    stack: contextlib.ExitStack

    @property
    def client(self) -> NodeHandle:
        return self.lab["client"]

    @property
    def gateway(self) -> NodeHandle:
        return self.lab["gateway"]

    @property
    def server(self) -> NodeHandle:
        return self.lab["server"]

    def open(self, node: NodeHandle, kind: int, version: int = 4) -> socket.socket:
        """An unbound socket, closed with the lab."""
        made = node.namespace.socket(FAMILY[version], kind)
        made.settimeout(PATIENCE)
        return self.stack.enter_context(made)

    def bound(
        self, node: NodeHandle, kind: int, address: str, port: int = 0, *, listen: bool = False, reuse: bool = False
    ) -> socket.socket:
        """A bound socket, closed with the lab."""
        made = self.open(node, kind, 6 if ":" in address else 4)
        if reuse:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        if listen:
            made.listen()
        return made

    def ask(self, what: str) -> Any:
        """What `tproxyctl WHAT --json` tells."""
        return json.loads(self.gateway.run(["tproxyctl", what, "--json"]).stdout)

    def reasons(self, hook: str) -> dict[str, int]:
        """The engine's counters of one hook."""
        found: dict[str, int] = self.ask("counters")["hooks"].get(hook, {})
        return found

    def queued(self) -> int:
        """How many packets the engine has seen."""
        return sum(sum(reasons.values()) for reasons in self.ask("counters")["hooks"].values())

    def tracked(self, *words: str) -> list[str]:
        """The lines of the gateway's conntrack that have all these words."""
        lines = self.gateway.run(["conntrack", "-L"]).stdout.splitlines()
        lines += self.gateway.run(["conntrack", "-L", "-f", "ipv6"]).stdout.splitlines()
        return [line for line in lines if all(word in line.split() for word in words)]

    def start_engine(self, rules: Sequence[str]) -> None:
        """Start another engine of the kernel datapath in the gateway."""
        path = self.lab.directory / "again.rules"
        path.write_text("\n".join(["*tproxy", *rules, "COMMIT", ""]))
        command = ["tproxyd", "--datapath", "kernel", "--ruleset", str(path), "--notify-fd", "{notify_fd}"]
        self.gateway.start("tproxyd", command, Readiness(notify=True))

    def rules(self, *arguments: str) -> None:
        """Change the ruleset."""
        self.gateway.run(["tproxyctl", *arguments])


@contextlib.contextmanager
def engine_lab(
    directory: Path,
    rules: Sequence[str] = RULES,
    datapath: str = "kernel",
    options: Sequence[str] = (),
    *,
    capture: bool = False,
    record: bool = False,
) -> Iterator[EngineLab]:
    """A running lab."""
    with (
        Lab(loads(topology(rules, datapath, options)), directory, capture=capture, record=record) as lab,
        contextlib.ExitStack() as stack,
    ):
        tproxy = lab["gateway"].call(Tproxy)
        stack.enter_context(tproxy)
        yield EngineLab(lab, tproxy, stack)


def exchange(near: socket.socket, far: socket.socket, size: int) -> None:
    """Send `size` bytes one way and back over a TCP connection, and compare."""
    data = os.urandom(size)
    received: list[bytes] = []

    def answer() -> None:
        got = b""
        while len(got) < size and (piece := far.recv(1 << 16)):
            got += piece
        received.append(got)
        far.sendall(got)

    thread = threading.Thread(target=answer)
    thread.start()
    near.sendall(data)
    back = b""
    while len(back) < size and (piece := near.recv(1 << 16)):
        back += piece
    thread.join()
    assert received == [data]
    assert back == data


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)
