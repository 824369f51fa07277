"""The pages of docs/, done as they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from engine_lab import until
from pages import DOCS, Block, Command, blocks, commands, missing
from traffic_checks import has_connections

from testbed.capabilities import system_packages
from testbed.lab import Lab
from testbed.topology_file import loads

pytestmark = pytest.mark.lab

PATIENCE = 120.0


def of_no_test() -> dict[str, str]:
    """This environment, without what pytest says to itself and to its workers."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


class Shell:
    """A shell that a page's commands are typed into, which knows of no labs that others have running."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", "mount -t tmpfs tmpfs /run; exec bash"],  # the records are there
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**of_no_test(), "NO_COLOR": "1", "COLUMNS": "200"},
        )

    def run(self, command: str) -> str:
        """What a command prints, errors included."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        end = "== that was it =="
        self._process.stdin.write(f"{command}\necho '{end}'\n")
        self._process.stdin.flush()
        lines = iter(self._process.stdout.readline, f"{end}\n")
        return "".join(lines)

    def close(self) -> None:
        self._process.communicate("", timeout=PATIENCE)


@pytest.mark.usefixtures("own_temporary_folder")
def test_the_tutorial_works_as_it_says_command_by_command(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)  # as if in a clone
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    shell = Shell(tmp_path)
    done = 0
    try:
        for block in blocks("tutorial.md"):
            if block.name:
                (tmp_path / "try" / block.name).write_text(block.text)
                continue
            assert block.language == "console"
            for command in commands(block):
                seen = shell.run(command.text)
                assert not missing(command.shown, seen), f"docs/tutorial.md:{block.line}: {command.text}\n{seen}"
                done += 1
    finally:
        shell.run("testbed down tutorial; testbed down tutorial-proxy")
        shell.close()
    assert done > 15


@pytest.fixture(scope="module")
def cookbook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """The cookbook's lab, and what its first block defines."""
    topology, beginning = blocks("expectations.md")[:2]
    with Lab(loads(topology.text), tmp_path_factory.mktemp("cookbook")) as lab:
        names: dict[str, object] = {"lab": lab}
        exec(beginning.text, names)
        yield names


@pytest.mark.parametrize("recipe", blocks("expectations.md")[2:], ids=lambda block: f"line-{block.line}")
def test_a_recipe_of_the_cookbook_holds(recipe: Block, cookbook: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "recipe.py"  # failures quote the source
    file.write_text(recipe.text)
    running = cookbook["lab"]
    assert isinstance(running, Lab)
    nodes = [running[node.name] for node in running.topology.nodes]
    # What the recipe before left is not this one's.
    until(lambda: not any(node.call(has_connections) for node in nodes), "the end of earlier connections")
    exec(compile(recipe.text, file, "exec"), dict(cookbook))


def test_the_tests_on_the_page_about_pytest_pass_as_they_stand(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for block in blocks("pytest.md"):
        files[block.name] = files.get(block.name, "") + block.text
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--color=no"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False, env=of_no_test()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tests = files["test_labs.py"].count("def test_") + 3  # three of them are run twice
    outcomes = {what: int(number) for number, what in re.findall(r"(\d+) (passed|skipped)", done.stdout)}
    assert sum(outcomes.values()) == tests, done.stdout
    assert outcomes.get("skipped", 0) == done.stdout.count("missing netem")


def test_the_page_about_pytest_names_all_packages_that_are_needed() -> None:
    (line,) = re.findall(r"^ +apt install (.+)$", (DOCS / "pytest.md").read_text(), re.MULTILINE)
    needed = [entry.package for entry in system_packages() if entry.when in ("build", "required")]
    assert sorted(line.split()) == sorted(needed)


# ---- in CI and in containers ----

SERVED = """
name: capable
nodes:
  client:
  server:
    services:
      web:
        command: ["{python}", -m, testbed.traffic, http-server, --port, 80, --size, 10]
        ready: {port: 80}
links:
  - ends: [{node: client}, {node: server}]
"""
CONTAINERS = (DOCS / "ci-containers.md").read_text()
CAPABILITIES = dict(re.findall(r"^\| `([A-Z_]+)` \|[^|]+\| `([^`]+)` \|$", CONTAINERS, re.MULTILINE))


def run_lab(folder: Path, capabilities: Iterable[str], before: str = "") -> subprocess.CompletedProcess[str]:
    """A lab run by root with these capabilities and no others, in a mount namespace of its own."""
    (folder / "capable.yaml").write_text(SERVED)
    bounding = ",".join(("-all", *(f"+{name.lower()}" for name in capabilities)))
    fetch = "python -m testbed.traffic fetch http://10.0.0.2/"
    run = f"exec {sys.executable} -m testbed.cli run capable.yaml --directory logs --in client -- {fetch}"
    command = ["unshare", "--mount", "sh", "-c", 'set -e; eval "$1"; shift; exec "$@"', "sh", before or ":"]
    command += ["setpriv", f"--bounding-set={bounding}", "sh", "-c", run]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_the_capabilities_that_the_page_names_are_enough(tmp_path: Path) -> None:
    assert len(CAPABILITIES) == 4
    done = run_lab(tmp_path, CAPABILITIES)
    assert '"status": 200' in done.stdout, done.stderr


@pytest.mark.parametrize("name", CAPABILITIES)
def test_without_one_of_them_it_fails_as_the_page_says(name: str, tmp_path: Path) -> None:
    done = run_lab(tmp_path, CAPABILITIES.keys() - {name})
    assert done.returncode != 0
    assert CAPABILITIES[name] in done.stderr


READ_ONLY = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; "


@pytest.mark.needs("other-users")  # who is root of a user namespace only may not mount it read-only
def test_a_read_only_proc_sys_is_told_and_mounted_again_as_the_page_says(tmp_path: Path) -> None:
    done = run_lab(tmp_path, CAPABILITIES, READ_ONLY)
    assert "Read-only file system: '/proc/sys/net/" in done.stderr
    cure = re.search(r"`(mount -o remount,rw /proc/sys)`", CONTAINERS)
    assert cure is not None
    done = run_lab(tmp_path, CAPABILITIES, READ_ONLY + cure[1])
    assert '"status": 200' in done.stdout, done.stderr


def test_shown_output_that_does_not_come_is_found() -> None:
    command = Command("ls", ("a …", "b"))
    assert missing(command.shown, "a   1\nx\nb\n") == []
    assert missing(command.shown, "a 1\nx\n") == ["b"]
    assert missing(command.shown, "b\na 1\n") == ["b"]
