"""The rules of the house that a tool enforces, the lock files, the package list, and how a lack is told."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from testbed.capabilities import Capabilities, Capability, explain, system_packages

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements-build.lock", "requirements.lock")


# ---- what nfq_engine/core may import ----

IMPURE = [
    "import socket",
    "from socket import AF_INET",
    "import os.path",
    "from os import *",
    "import time as clock",
    "from time import monotonic",
    "from datetime import datetime",
    "import asyncio.events",
    "from concurrent.futures import Future",
    "from scapy.layers.inet import IP",
    "import pyroute2",
    "from netfilterqueue import NetfilterQueue",
    "from nfq_engine.shell import queue",
    "from nfq_engine import shell",
    "from ..shell import divert",
    "from .. import daemon",
    "from testbed.netns import Namespace",
    "def later():\n    import subprocess\n",
]
PURE = [
    "import struct",
    "from ipaddress import ip_address",
    "from nfq_engine.core.nat import choose",
    "from . import nat",
]


def banned(statement: str, path: str) -> bool:
    """Whether ruff, set as it is here, refuses the import in a file of that path."""
    ruff = [str(Path(sys.executable).with_name("ruff")), "check", "--select=TID251", "--no-cache", "--quiet"]
    run = subprocess.run(
        [*ruff, "--stdin-filename", path, "-"], input=statement, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode in (0, 1), run.stderr
    return "TID251" in run.stdout


@pytest.mark.parametrize("statement", IMPURE)
def test_core_may_not_import_what_is_impure(statement: str) -> None:
    assert banned(statement, "nfq_engine/core/nat.py")


@pytest.mark.parametrize("statement", PURE)
def test_core_may_import_what_is_pure(statement: str) -> None:
    assert not banned(statement, "nfq_engine/core/nat.py")


@pytest.mark.parametrize(
    "path",
    ["nfq_engine/daemon.py", "nfq_engine/shell/queue.py", "testbed/netns.py", "tests/unit/test_nat.py", "scripts/x.py"],
)
def test_the_import_ban_is_for_core_alone(path: str) -> None:
    assert not banned("\n".join(IMPURE), path)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("testbed.cli_running", {"testbed.lab", "testbed.topology", "ruamel.yaml", "rich", "jsonschema", "scapy"}),
        ("testbed.cli", {"testbed.lab", "ruamel.yaml", "rich", "jsonschema", "scapy"}),
        ("testbed.capabilities", {"click", "pyroute2", "scapy"}),
        ("nfq_engine.cli", {"click", "dataclasses", "nfq_engine.core.packet"}),
        ("nfq_engine.cli_commands", {"nfq_engine.shell.supervisor_launch", "rich"}),
        ("nfq_engine.daemon", {"pyroute2", "scapy", "rich"}),
    ],
)
def test_what_is_to_start_at_once_imports_nothing_that_takes_long(module: str, heavy: set[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    assert not heavy & set(loaded)


def test_nothing_but_scripts_imports_all_of_scapy() -> None:
    imports = re.compile(r"^\s*(from|import) scapy\.all\b", re.MULTILINE)
    folders = ("nfq_engine", "testbed", "tests")
    sources = [source for folder in folders for source in (ROOT / folder).rglob("*.py")]

    assert len(sources) > 10
    assert [str(source) for source in sources if imports.search(source.read_text(encoding="utf-8"))] == []


# ---- lock files ----


def locked(file: str) -> dict[str, str]:
    """Name -> version of a lock file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9][\w.-]*)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("file", LOCKS)
def test_a_lock_file_names_no_host_and_no_path(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    named = re.findall(r"\S*(?:://|index|trusted|find-links|/opt|/work|/root|\.org|\.com|\.net)\S*", text)
    assert named == []


@pytest.mark.parametrize("file", LOCKS)
def test_every_locked_version_has_hashes(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(locked(file)) > 0
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_everything_that_the_project_asks_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[^\w.-]", requirement)[0].lower().replace(".", "-") for requirement in asked}
    assert names - set(locked("requirements.lock")) == set()


def test_both_lock_files_agree() -> None:
    build, everything = locked("requirements-build.lock"), locked("requirements.lock")
    assert {name: version for name, version in build.items() if everything.get(name, version) != version} == {}


# ---- the package list ----


def test_every_package_can_be_looked_for() -> None:
    kinds = {"command", "header", "python", "include"}
    for entry in system_packages():
        assert entry.probe.partition(":")[0] in kinds, entry
        assert entry.when in {"build", "required", "optional", "tests"}, entry
        assert entry.needed_for, entry


# ---- telling what is missing ----


def capability(name: str, *, present: bool = False, required: bool = False) -> Capability:
    return Capability(name, present, required, f"{name}'s use", f"{name} was not found", f"get {name}", f"no {name}s")


def test_all_that_is_missing_is_told_at_once_when_any_of_it_is_required() -> None:
    found = Capabilities((capability("a", required=True), capability("b"), capability("c", present=True)))

    text = explain(found)

    for word in ("a's use", "a was not found", "get a", "no as", "b's use", "get b", "no bs"):
        assert word in text
    assert "get c" not in text


def test_a_missing_optional_thing_takes_one_line() -> None:
    found = Capabilities((capability("a"), capability("b"), capability("c", present=True, required=True)))
    assert explain(found).splitlines() == [
        "without a (a was not found): no as; to have it: get a",
        "without b (b was not found): no bs; to have it: get b",
    ]


def test_nothing_is_told_when_nothing_is_missing() -> None:
    assert explain(Capabilities((capability("a", present=True),))) == ""


def test_only_what_was_found_is_there() -> None:
    found = Capabilities((capability("here", present=True), capability("absent")))
    assert [found.has(name) for name in ("here", "absent", "never tried")] == [True, False, False]
