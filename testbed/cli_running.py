"""`testbed` and the labs that run: ls, exec, shell, report, impair, down.

Owns: arguments, what is printed, exit codes. It builds no lab and imports none, so that `exec` starts at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import webbrowser
from pathlib import Path
from typing import Final

import click

from testbed import registry
from testbed.cli_command import become, command_values, run_captured
from testbed.cli_options import AS_JSON, COMMANDS_CODE, JSON_OF_COMMAND, LAB, NAME, NODE, examples, progress
from testbed.journal import exit_code


@click.command(epilog=examples("down", "down transparent-proxy --json"))
@NAME
@AS_JSON
def down(name: str | None, *, as_json: bool) -> None:
    """End a running lab: by name, or the only one."""
    record = registry.find(name)
    with progress(f"taking {record.name} down"):
        registry.down(record)
    click.echo(json.dumps(as_values(record)) if as_json else f"{record.name} is down")


@click.command("report", epilog=examples("report --open", "report transparent-proxy -o lab.html"))
@NAME
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Instead of the lab's directory.")
@click.option("--open", "is_shown", is_flag=True, help="Show it in the browser: $BROWSER, or the first that is found.")
@AS_JSON
def write_report_of(name: str | None, output: Path | None, *, is_shown: bool, as_json: bool) -> None:
    """Write down what a running lab did so far, as HTML.

    Which lab: by name, or the only one.
    """
    record = registry.find(name)
    path = output or Path(record.directory, "report.html")
    with progress(f"writing the report of {record.name}"):
        path.write_text(registry.ask_report(record), encoding="utf-8")
    click.echo(json.dumps({"lab": record.name, "report": str(path)}) if as_json else path)
    if is_shown and not webbrowser.open(path.absolute().as_uri()):
        raise click.ClickException("no browser is there to open the report: BROWSER may name one")


@click.command(
    epilog=examples(
        "impair server:eth0 --delay 20ms --loss 1%",
        "impair server:eth0 --lab lossy-link",
        "impair a:eth0 --rate 1mbit --json",
    )
)
@LAB
@click.argument("end", metavar="NODE:INTERFACE")
@click.option("--delay", help="How long each packet is on its way: 20ms.")
@click.option("--jitter", help="How far from that it may be, to either side: 5ms.")
@click.option("--loss", help="Share of packets that get lost: 1%.")
@click.option("--duplicate", help="Share of packets that arrive twice.")
@click.option("--reorder", help="Share of packets that are not delayed, and so overtake others.")
@click.option("--corrupt", help="Share of packets of which one bit is wrong.")
@click.option("--rate", help="The most that passes in a second: 10mbit.")
@click.option("--seed", type=click.IntRange(0, 0xFFFFFFFF), help="The choices begin anew, from this seed.")
@AS_JSON
def impair(lab: str | None, end: str, *, as_json: bool, **values: str | int | None) -> None:
    """Change what an impaired link of a running lab does.

    To what this end sends, from now on; without options nothing is done to it any more. The topology must have an
    impairment there, be it `impair: {}`.
    """
    from testbed.impair import described
    from testbed.topology_reader import impairment as read_impairment

    given = {key: value for key, value in values.items() if value is not None}
    impairment, problems = read_impairment(given)
    for (key,), what in problems:
        raise click.BadParameter(what, param_hint=f"--{key}")
    record = registry.find(lab)
    registry.impair(record, end, impairment)
    if as_json:
        click.echo(json.dumps({"lab": record.name, "end": end, "impairment": dataclasses.asdict(impairment)}))
    else:
        click.echo(f"{end}: {described(impairment)}")


@click.command("ls", epilog=examples("ls", "ls --json"))
@AS_JSON
def list_labs(*, as_json: bool) -> None:
    """List the running labs."""
    records = registry.records()
    if as_json:
        click.echo(json.dumps([as_values(record) for record in records], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("lab", "nodes", "keeper", "logs and captures", box=None, pad_edge=False)
    for record in records:
        table.add_row(record.name, " ".join(record.nodes), str(record.pid), record.directory)
    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it is closed
    console = Console() if is_terminal else Console(width=200)
    console.print(table)


def _behind_dashes(context: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    """A command, without the `--` that may stand before it."""
    command = words[1:] if words[:1] == ("--",) else words
    if not command:
        raise click.MissingParameter(ctx=context, param=parameter)
    return command


_COMMAND: Final = click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, callback=_behind_dashes)


@click.command(
    "exec",
    context_settings={"allow_interspersed_args": False},  # behind the node, options are the command's
    epilog=examples(
        "exec client -- ping -c 1 10.0.1.2",
        "exec --lab two-proxies second tproxyctl connections --json",
        "exec --json client -- ip -brief address",
        codes=COMMANDS_CODE,
    ),
)
@LAB
@JSON_OF_COMMAND
@NODE
@_COMMAND
def execute(lab: str | None, node: str, command: tuple[str, ...], *, as_json: bool) -> None:
    """Run a command in a node of a running lab. Options of this command come before NODE."""
    record = registry.find(lab)
    if not as_json:
        become(record, node, command)
    done = run_captured(record, node, command)
    click.echo(json.dumps({"lab": record.name, **command_values(node, command, done)}))
    sys.exit(exit_code(done.returncode))


@click.command(epilog=examples("shell gateway", codes=COMMANDS_CODE))
@LAB
@NODE
def shell(lab: str | None, node: str) -> None:
    """Open a shell ($SHELL, or /bin/sh) in a node of a running lab."""
    become(registry.find(lab), node, (os.environ.get("SHELL") or "/bin/sh",))


def as_values(record: registry.Record) -> dict[str, object]:
    """A running lab, for JSON."""
    return {"name": record.name, "nodes": list(record.nodes), "pid": record.pid, "directory": record.directory}
