"""The pages of docs/, done as they say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import Block, Command, blocks, commands, missing

from testbed.lab import Lab
from testbed.topology_file import loads

pytestmark = pytest.mark.lab

PATIENCE = 120.0


class Shell:
    """A shell that a page's commands are typed into."""

    def __init__(self, folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self._process = subprocess.Popen(
            ["bash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**environment, "NO_COLOR": "1", "COLUMNS": "200"},
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


def test_the_tutorial_works_as_it_says_command_by_command(tmp_path: Path) -> None:
    # As if in a clone; with a name of its own, since labs that stay are known by their names on the whole machine.
    (tmp_path / ".venv").symlink_to(sys.prefix)
    own = f"tutorial-{os.getpid()}"
    shell = Shell(tmp_path)
    done = 0
    try:
        for block in blocks("tutorial.md"):
            text = block.text.replace("tutorial", own)
            if block.name:
                (tmp_path / "try" / block.name.replace("tutorial", own)).write_text(text)
                continue
            assert block.language == "console"
            for command in commands(Block("console", "", text, block.line)):
                seen = shell.run(command.text)
                assert not missing(command.shown, seen), f"docs/tutorial.md:{block.line}: {command.text}\n{seen}"
                done += 1
    finally:
        shell.run(f"testbed down {own}; testbed down {own}-proxy")
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
    exec(compile(recipe.text, file, "exec"), dict(cookbook))


def test_shown_output_that_does_not_come_is_found() -> None:
    command = Command("ls", ("a …", "b"))
    assert missing(command.shown, "a   1\nx\nb\n") == []
    assert missing(command.shown, "a 1\nx\n") == ["b"]
    assert missing(command.shown, "b\na 1\n") == ["b"]
