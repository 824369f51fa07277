"""What tproxyctl's commands share: asking the engine, addresses as text, tables.

Owns: how an endpoint looks and how a listing fits a terminal or a file. Rich is imported where something is drawn: it
takes a third of this command's start, and rules and JSON do without.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from nfq_engine import wire
from nfq_engine.cli_help import epilog
from nfq_engine.control_client import Control, ControlError, reason

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


CODES: Final = "0 done; 1 the engine refused or is not there; 2 wrong usage."


def examples(*lines: str, codes: str = CODES) -> str:
    """Examples and exit codes below the help of a command."""
    return epilog("tproxyctl", *lines, codes=codes)


@contextmanager
def engine() -> Iterator[Control]:
    """The engine; that there is none, or that it says no, ends the command."""
    try:
        with Control() as control:
            yield control
    except (OSError, ControlError) as error:
        raise click.ClickException(reason(error)) from error


def ask(request: wire.Message) -> wire.Message:
    """Send one request to the engine."""
    with engine() as control:
        return control.call(request)


def endpoint(value: dict[str, Any]) -> str:
    """An endpoint as text; an IPv6 address in brackets."""
    address = f"[{value['address']}]" if ":" in value["address"] else value["address"]
    return f"{address}:{value['port']}"


def flow(value: dict[str, Any]) -> str:
    """One direction of a connection as text."""
    return f"{endpoint(value['source'])} > {endpoint(value['destination'])}"


def table(columns: tuple[str, ...]) -> Table:
    """A table without lines, to be filled."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def console() -> Console:
    """The terminal as it is; without one, lines as long as they need to be."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(markup=False)
    return Console(width=400, highlight=False, markup=False)
