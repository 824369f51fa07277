"""What a shell offers behind `testbed`: labs that run, their nodes and those of a topology file.

Owns: the candidates, and the script that a shell needs (click's). A completion never fails and never says anything:
what cannot be found out is not offered.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from testbed import registry
from testbed.errors import TestbedError


class Shell(StrEnum):
    """The shells for which there is a script."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def script(command: click.Command, program: str, shell: Shell) -> str:
    """What a shell has to evaluate once to complete a program's words from then on."""
    kind = get_completion_class(shell.value)
    if kind is None:
        raise click.UsageError(f"there is no completion for {shell}")
    return kind(command, {}, program, f"_{program.upper()}_COMPLETE").source()


def labs(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Running labs."""
    return _items((record.name for record in _records()), incomplete)


def nodes(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Nodes of the lab that was chosen, or of all that run."""
    chosen = context.params.get("lab")
    return _items(
        (node for record in _records() if chosen in (None, record.name) for node in record.nodes),
        incomplete,
    )


def nodes_of_file(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Nodes of the topology file that was named before."""
    # Behind an option that still wants its value click has taken no argument yet: they are all in `args`.
    file = context.params.get("file") or next(iter(context.args), None)
    if file is None:
        return []
    from testbed.topology_file import load  # which no other completion needs

    try:
        return _items((node.name for node in load(Path(file)).nodes), incomplete)
    except (OSError, TestbedError):
        return []


def _records() -> list[registry.Record]:
    try:
        return registry.records()
    except (OSError, registry.RegistryError):
        return []


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in sorted(set(names)) if name.startswith(incomplete)]
