"""Labs as other testbeds build them, for comparison: mininet and munet, where they are installed.

Owns: finding them, and the conversation with the process that has one. Neither is a dependency of ours, and the Python
that has it is seldom ours: a script of scripts/others runs in that Python. Starting it is not counted, as our own start
is not; the namespaces are looked at from here, so that all are measured with one clock.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from testbed.netns import Namespace
from testbed.plan import AddAddress, AddRoute, MakeLink, MakeNamespace, Operation, SetUp, StopOffload

_SCRIPTS: Final = Path(__file__).parent / "others"
# What to do about it when it is not there.
REMEDIES: Final = {
    "mininet": "apt install --no-install-recommends mininet",
    "munet": "python3 -m venv DIR && DIR/bin/pip install munet, and --munet DIR/bin/python",
}


@dataclass(slots=True)
class Job:
    """What is to be built: links as (node, interface, node, interface), and by node what a shell there is to do.

    `settings` are for a node without links, `commands` for when it has them.
    """

    nodes: list[str] = field(default_factory=list)
    links: list[tuple[str, str, str, str]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)


def job_of(operations: Sequence[Operation]) -> Job:
    """The same lab that our own builder makes of these operations."""
    job, commands = Job(), dict[str, list[str]]()
    for operation in operations:
        match operation:
            case MakeNamespace(node, settings):
                job.nodes.append(node)
                job.settings[node] = " ".join(["sysctl -qw", *(f"{key}={value}" for key, value in settings)])
                commands[node] = []
            case MakeLink(left, right, mtu):
                job.links.append((left.node, left.interface, right.node, right.interface))
                for end in (left, right):
                    commands[end.node].append(f"ip link set {end.interface} mtu {mtu}")
            case StopOffload(node, interface):
                commands[node].append(f"ethtool -K {interface} tx off >/dev/null")
            case AddAddress(node, interface, address):
                commands[node].append(f"ip addr add {address} dev {interface}")
            case SetUp(node, interface):
                commands[node].append(f"ip link set {interface} up")
            case AddRoute(node, to, via):
                commands[node].append(f"ip route add {to} via {via}")
    # One call of a shell for each node, the least that these testbeds ask for.
    job.commands = {node: " && ".join(lines) for node, lines in commands.items()}
    return job


class Other:
    """A lab of another testbed; a maker as bench_build.py has them."""

    def __init__(self, name: str, python: str) -> None:
        """Start the process that will build it."""
        self._name = name
        # Both make links where they are, before they move the ends to the nodes.
        command = ["unshare", "--net", python, str(_SCRIPTS / f"{name}_chain.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._namespaces: dict[str, Namespace] = {}
        self._expect("ready")

    def build(self, operations: Sequence[Operation]) -> None:
        """Build it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job_of(operations))) + "\n")
        self._process.stdin.flush()
        pids = json.loads(self._expect("{"))
        self._namespaces = {node: Namespace.at(Path(f"/proc/{pid}/ns/net")) for node, pid in pids.items()}

    def namespace(self, node: str) -> Namespace:
        """The namespace of a node."""
        return self._namespaces[node]

    def close(self) -> None:
        """Have it deleted."""
        for namespace in self._namespaces.values():
            namespace.close()
        with self._process as process:  # closes its input
            process.communicate()
        if process.returncode:
            sys.exit(f"{self._name} ended with exit status {process.returncode}")

    def _expect(self, beginning: str) -> str:
        """The next line that begins so: a library may print more than we asked for."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(beginning):
                return line
        sys.exit(f"{self._name} ended with exit status {self._process.wait()}")


def pythons(munet: str) -> dict[str, str]:
    """The Python that has each testbed, of those that are installed; `munet`: where to look for that one."""
    candidates = {"mininet": "/usr/bin/python3", "munet": munet}
    return {name: python for name, python in candidates.items() if _has(python, name)}


def _has(python: str, module: str) -> bool:
    if shutil.which(python) is None or (module == "mininet" and shutil.which("mnexec") is None):
        return False
    return subprocess.run([python, "-c", f"import {module}"], stderr=subprocess.DEVNULL, check=False).returncode == 0
