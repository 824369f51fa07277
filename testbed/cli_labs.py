"""`testbed` and labs that it builds: up and run.

Owns: arguments, what is printed, exit codes. What a lab is and does is lab.py's matter.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import click

from testbed import cli_completion as completion
from testbed import up as keeping
from testbed.cli_command import command_values, run_in
from testbed.cli_files import topology_of
from testbed.cli_options import AS_JSON, COMMANDS_CODE, FILE, JSON_OF_COMMAND, LOGS, examples, progress
from testbed.cli_running import as_values
from testbed.cli_scenario import play
from testbed.impair import kernel_means, notes
from testbed.journal import exit_code
from testbed.keeper import hand_over
from testbed.lab import Lab
from testbed.owner import sweep
from testbed.registry import RegistryError
from testbed.report import write_report
from testbed.scenario_file import is_scenario, load_scenario
from testbed.topology import Topology
from testbed.topology_file import load


@click.command(epilog=examples("up lab.yaml", "up lab.yaml --directory logs --json"))
@FILE
@LOGS
@AS_JSON
def up(file: Path, directory: Path | None, *, as_json: bool) -> None:
    """Build a lab and leave it running."""
    topology = topology_of(file)
    sweep()
    logs, _ = _directory(topology, directory)
    try:
        with progress(f"building {topology.name}"):
            record = keeping.up(topology, logs)
    except RegistryError:
        if directory is None:
            shutil.rmtree(logs)
        raise
    _tell_impairments(topology)
    if as_json:
        click.echo(json.dumps(as_values(record)))
    else:
        click.echo(f"{record.name} is up: {', '.join(record.nodes)}; logs and captures in {logs}")


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "run lab.yaml -- ./my-test.sh",
        "run lab.yaml --in client --report lab.html -- python -m testbed.traffic fetch http://10.0.1.2/",
        "run topologies/scenarios/proxy-dies.yaml --json",
        "run --keep topologies/scenarios/proxy-dies.yaml",
        codes=f"{COMMANDS_CODE} Of a scenario: 0 all steps came out as they should; 1 one failed.",
    ),
)
@FILE
@LOGS
@click.option(
    "--in", "node", help="Run the command in this node instead of here.", shell_complete=completion.nodes_of_file
)
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write what was seen to an HTML file.")
@click.option("--keep", is_flag=True, help="When it fails, leave the lab running: testbed shell, down.")
@JSON_OF_COMMAND
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    file: Path,
    directory: Path | None,
    node: str | None,
    report: Path | None,
    command: tuple[str, ...],
    *,
    keep: bool,
    as_json: bool,
) -> None:
    """Build a lab, do something while it lives, take it down.

    \b
    testbed run TOPOLOGY [--in NODE] -- COMMAND...   runs a command
    testbed run SCENARIO                             does a scenario's steps
    """
    scenario = load_scenario(file) if is_scenario(file) else None
    if scenario is not None and (command or node is not None):
        raise click.UsageError(f"{file} is a scenario: its steps say what is done, and where")
    if scenario is None and not command:
        raise click.UsageError(f"{file} is a topology: say what to run, as in testbed run {file} -- COMMAND...")
    topology = load(file) if scenario is None else scenario.topology
    if node is not None and node not in {known.name for known in topology.nodes}:
        raise click.BadParameter(f"the lab has no node {node!r}", param_hint="--in")
    if report is not None and not report.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {report.absolute().parent}", param_hint="--report")
    logs, held = _directory(topology, directory)
    click.echo(f"logs and captures: {logs}", err=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the lab is taken down
    with contextlib.ExitStack() as stack:
        with progress(f"building {topology.name}"):
            lab = stack.enter_context(Lab(topology, logs, record=report is not None))
        _tell_impairments(topology)
        if scenario is not None:
            status = 0 if play(scenario, lab, as_json=as_json) else 1
        else:
            done = run_in(lab, node, command, is_captured=as_json)
            status = exit_code(done.returncode)
            if as_json:
                click.echo(json.dumps({"lab": topology.name, **command_values(node, command, done)}))
        if report is not None:
            with progress(f"writing {report}"):
                write_report(lab, report)
            click.echo(f"report: {report}", err=True)
        if keep and status:
            record = hand_over(lab, (held,))
            stack.pop_all()
            click.echo(f"the lab lives on: testbed shell --lab {record.name} {'|'.join(record.nodes)}", err=True)
            click.echo(f"to end it: testbed down {record.name}", err=True)
        else:
            with progress(f"taking {topology.name} down"):
                stack.close()
    sys.exit(status)


def _tell_impairments(topology: Topology) -> None:
    """Say who impairs the lab's links: the figures of one are not those of the other."""
    for line in notes(topology, kernel_means(topology)):
        click.echo(line, err=True)


def _directory(topology: Topology, directory: Path | None) -> tuple[Path, int]:
    """The folder for logs and captures, made if it is not there, and the descriptor that holds it for this lab alone.

    That closes when we, and the lab's keeper if there is one, are gone.
    """
    if directory is None:
        directory = Path(tempfile.mkdtemp(prefix=f"testbed-{topology.name}-"))
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise click.BadParameter(f"{directory} is in use by another lab", param_hint="--directory") from error
    except OSError as error:
        raise click.BadParameter(f"{directory}: {error.strerror}", param_hint="--directory") from error
    return directory, held
