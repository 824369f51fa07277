"""testbed: labs from the command line.

Owns: arguments, what is printed, exit codes. What a lab is and does is lab.py's matter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from testbed import cli_completion as completion
from testbed import registry
from testbed.build import BuildError
from testbed.capture import CaptureError
from testbed.cli_command import become, command_values, exit_code, run_captured, run_in
from testbed.cli_scenario import play
from testbed.diagram import diagram
from testbed.documents import DocumentError
from testbed.impair import described, notes
from testbed.keeper import hand_over
from testbed.lab import Lab, LabError, kernel_means
from testbed.plan import describe, plan
from testbed.process import ServiceError, sweep
from testbed.registry import Record, RegistryError
from testbed.report import write_report
from testbed.scenario_file import is_scenario, load_scenario
from testbed.topology import Topology
from testbed.topology_file import load
from testbed.topology_reader import impairment as read_impairment

_TROUBLE: Final = (
    DocumentError,
    BuildError,
    CaptureError,
    LabError,
    ServiceError,
    RegistryError,
    OSError,
)

_SOON_S: Final = 1.0
"""What takes no longer needs no word of progress."""

_CODES: Final = "0 done; 1 the lab or the file is not as it should be; 2 wrong usage."
_COMMANDS_CODE: Final = "the command's own; 1 the lab is not as it should be; 2 wrong usage."

_EPILOG: Final = f"""\b
Examples:
  testbed up topologies/transparent-proxy.yaml
  testbed exec client -- python -m testbed.traffic fetch http://10.0.1.2/
  testbed report -o lab.html
  testbed down
  testbed run topologies/transparent-proxy.yaml -- ./my-test.sh
  testbed run topologies/scenarios/rules-change.yaml

\b
Completion: eval "$(testbed completion bash)", the same for zsh;
testbed completion fish | source

\b
Exit codes: {_CODES}
Exec, shell and run end with the command's own; run ends with 1 when a step of a scenario failed."""

_file: Final = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
_lab: Final = click.option("--lab", help="Which lab, when several run.", shell_complete=completion.labs)
_name: Final = click.argument("name", required=False, shell_complete=completion.labs)
_node: Final = click.argument("node", shell_complete=completion.nodes)
_as_json: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_command: Final = click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
_json_of_command: Final = click.option(
    "--json", "as_json", is_flag=True, help="Print how it ended and what it said as JSON."
)
_logs: Final = click.option(
    "--directory", type=click.Path(path_type=Path, file_okay=False), help="For logs and captures; a new one by default."
)


def _examples(*lines: str, codes: str = _CODES) -> str:
    """Examples and exit codes below the help of a command."""
    listed = "\n".join(f"  testbed {line}" for line in lines)
    return f"\b\nExamples:\n{listed}\n\nExit codes: {codes}"


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Say on a terminal what is being done, once it has taken a second; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield
        return
    status = Console(stderr=True).status(what)
    late = threading.Timer(_SOON_S, status.start)
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()
        late.join()  # it may just be starting the status
        status.stop()


class _Commands(click.Group):
    """Commands whose expected troubles are told in their own words, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # who reads has enough; click ends quietly
            raise
        except _TROUBLE as error:
            text = "\n".join((str(error), *getattr(error, "__notes__", ())))
            raise click.ClickException(text) from error


@click.group(cls=_Commands, epilog=_EPILOG)
def main() -> None:
    """Labs of network namespaces, built from topology files."""


@main.command(epilog=_examples("validate lab.yaml", "validate topologies/scenarios/proxy-dies.yaml --json"))
@_file
@_as_json
def validate(file: Path, *, as_json: bool) -> None:
    """Check a topology or scenario file.

    Every problem is told, with line and column; with --json on standard output.
    """
    try:
        found = _summary(file)
    except DocumentError as error:
        if not as_json:
            raise
        click.echo(json.dumps({"file": str(file), "valid": False, "problems": str(error).splitlines()}, indent=2))
        sys.exit(1)
    if as_json:
        click.echo(json.dumps({"file": str(file), "valid": True, **found}))
    else:
        name, *rest = found.values()
        words = " in ".join if "steps" in found else ", ".join
        click.echo(
            f"{file}: {name}: {words(_amount(key, value) for key, value in zip([*found][1:], rest, strict=True))}"
        )


def _summary(file: Path) -> dict[str, str | int]:
    """What is in a file, in a few words."""
    if is_scenario(file):
        scenario = load_scenario(file)
        return {"name": scenario.name, "steps": len(scenario.steps), "topology": scenario.topology.name}
    topology = load(file)
    return {"name": topology.name, "nodes": len(topology.nodes), "links": len(topology.links)}


def _amount(key: str, value: str | int) -> str:
    return f"{value} {key}" if isinstance(value, int) else value


@main.command("plan", epilog=_examples("plan lab.yaml", "plan lab.yaml --json"))
@_file
@_as_json
def show_plan(file: Path, *, as_json: bool) -> None:
    """Print the operations that build a lab, without building it."""
    topology = _topology(file)
    operations = plan(topology, kernel_means(topology))
    if as_json:
        values = [{"operation": type(each).__name__, **dataclasses.asdict(each)} for each in operations]
        click.echo(json.dumps(values, indent=2, default=str))
        return
    for operation in operations:
        click.echo(describe(operation))


@main.command("diagram", epilog=_examples("diagram lab.yaml -o lab.svg"))
@_file
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Instead of standard output.")
def draw(file: Path, output: Path | None) -> None:
    """Draw a topology as SVG, without building it."""
    picture = diagram(_topology(file))
    if output is None:
        click.echo(picture, nl=False)
    else:
        output.write_text(picture)


@main.command(epilog=_examples("up lab.yaml", "up lab.yaml --directory logs --json"))
@_file
@_logs
@_as_json
def up(file: Path, directory: Path | None, *, as_json: bool) -> None:
    """Build a lab and leave it running."""
    topology = _topology(file)
    sweep()
    logs = _directory(topology, directory)
    try:
        with _progress(f"building {topology.name}"):
            record = registry.up(topology, logs.absolute())
    except RegistryError:
        if directory is None:
            shutil.rmtree(logs)
        raise
    _tell_impairments(topology)
    if as_json:
        click.echo(json.dumps(_as_values(record)))
    else:
        click.echo(f"{record.name} is up: {', '.join(record.nodes)}; logs and captures in {logs}")


@main.command(epilog=_examples("down", "down transparent-proxy --json"))
@_name
@_as_json
def down(name: str | None, *, as_json: bool) -> None:
    """End a running lab: by name, or the only one."""
    record = registry.find(name)
    with _progress(f"taking {record.name} down"):
        registry.down(record)
    click.echo(json.dumps(_as_values(record)) if as_json else f"{record.name} is down")


@main.command("report", epilog=_examples("report --open", "report transparent-proxy -o lab.html"))
@_name
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Instead of the lab's directory.")
@click.option("--open", "is_shown", is_flag=True, help="Show it in the browser: $BROWSER, or the first that is found.")
@_as_json
def write_report_of(name: str | None, output: Path | None, *, is_shown: bool, as_json: bool) -> None:
    """Write down what a running lab did so far, as HTML.

    Which lab: by name, or the only one.
    """
    record = registry.find(name)
    path = output or Path(record.directory, "report.html")
    with _progress(f"writing the report of {record.name}"):
        path.write_text(registry.ask_report(record), encoding="utf-8")
    click.echo(json.dumps({"lab": record.name, "report": str(path)}) if as_json else path)
    if is_shown and not webbrowser.open(path.absolute().as_uri()):
        raise click.ClickException("no browser is there to open the report: BROWSER may name one")


@main.command(
    epilog=_examples(
        "impair server:eth0 --delay 20ms --loss 1%",
        "impair server:eth0 --lab lossy-link",
        "impair a:eth0 --rate 1mbit --json",
    )
)
@_lab
@click.argument("end", metavar="NODE:INTERFACE")
@click.option("--delay", help="How long each packet is on its way: 20ms.")
@click.option("--jitter", help="How far from that it may be, to either side: 5ms.")
@click.option("--loss", help="Share of packets that get lost: 1%.")
@click.option("--duplicate", help="Share of packets that arrive twice.")
@click.option("--reorder", help="Share of packets that are not delayed, and so overtake others.")
@click.option("--corrupt", help="Share of packets of which one bit is wrong.")
@click.option("--rate", help="The most that passes in a second: 10mbit.")
@click.option("--seed", type=click.IntRange(0, 0xFFFFFFFF), help="The choices begin anew, from this seed.")
@_as_json
def impair(lab: str | None, end: str, *, as_json: bool, **values: str | int | None) -> None:
    """Change what an impaired link of a running lab does.

    To what this end sends, from now on; without options nothing is done to it any more. The topology must have an
    impairment there, be it `impair: {}`.
    """
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


@main.command("ls", epilog=_examples("ls", "ls --json"))
@_as_json
def list_labs(*, as_json: bool) -> None:
    """List the running labs."""
    records = registry.records()
    if as_json:
        click.echo(json.dumps([_as_values(record) for record in records], indent=2))
        return
    table = Table("lab", "nodes", "keeper", "logs and captures", box=None, pad_edge=False)
    for record in records:
        table.add_row(record.name, " ".join(record.nodes), str(record.pid), record.directory)
    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it is closed
    console = Console() if is_terminal else Console(width=200)
    console.print(table)


@main.command(
    "exec",
    context_settings={"ignore_unknown_options": True},
    epilog=_examples(
        "exec client -- ping -c 1 10.0.1.2",
        "exec --lab two-proxies inner -- tproxyctl connections",
        "exec --json client -- ip -brief address",
        codes=_COMMANDS_CODE,
    ),
)
@_lab
@_json_of_command
@_node
@_command
def execute(lab: str | None, node: str, command: tuple[str, ...], *, as_json: bool) -> None:
    """Run a command in a node of a running lab."""
    record = registry.find(lab)
    if not as_json:
        become(record, node, command)
    done = run_captured(record, node, command)
    click.echo(json.dumps({"lab": record.name, **command_values(node, command, done)}))
    sys.exit(exit_code(done.returncode))


@main.command(epilog=_examples("shell gateway", codes=_COMMANDS_CODE))
@_lab
@_node
def shell(lab: str | None, node: str) -> None:
    """Open a shell ($SHELL, or /bin/sh) in a node of a running lab."""
    become(registry.find(lab), node, (os.environ.get("SHELL") or "/bin/sh",))


@main.command(
    context_settings={"ignore_unknown_options": True},
    epilog=_examples(
        "run lab.yaml -- ./my-test.sh",
        "run lab.yaml --in client --report lab.html -- curl http://10.0.1.2/",
        "run topologies/scenarios/proxy-dies.yaml --json",
        "run --keep topologies/scenarios/proxy-dies.yaml",
        codes=f"{_COMMANDS_CODE} Of a scenario: 0 all steps came out as they should; 1 one failed.",
    ),
)
@_file
@_logs
@click.option(
    "--in", "node", help="Run the command in this node instead of here.", shell_complete=completion.nodes_of_file
)
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write what was seen to an HTML file.")
@click.option("--keep", is_flag=True, help="When it fails, leave the lab running: testbed shell, down.")
@_json_of_command
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
    logs = _directory(topology, directory)
    click.echo(f"logs and captures: {logs}", err=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the lab is taken down
    with contextlib.ExitStack() as stack:
        with _progress(f"building {topology.name}"):
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
            write_report(lab, report)
            click.echo(f"report: {report}", err=True)
        if keep and status:
            record = hand_over(lab)
            stack.pop_all()
            click.echo(f"the lab lives on: testbed shell --lab {record.name} {'|'.join(record.nodes)}", err=True)
            click.echo(f"to end it: testbed down {record.name}", err=True)
    sys.exit(status)


@main.command(
    "completion",
    epilog='\b\nExamples:\n  eval "$(testbed completion bash)"\n  testbed completion fish | source\n\n'
    "Exit codes: 0 done; 2 wrong usage.",
)
@click.argument("shell", type=click.Choice([shell.value for shell in completion.Shell]))
def print_completion(shell: str) -> None:
    """Print a shell's completion script.

    Once it is evaluated, the shell completes commands, options, labs and nodes.
    """
    click.echo(completion.script(main, "testbed", completion.Shell(shell)))


def _topology(file: Path) -> Topology:
    """A topology, or a scenario's."""
    return load_scenario(file).topology if is_scenario(file) else load(file)


def _tell_impairments(topology: Topology) -> None:
    """Say who impairs the lab's links: the figures of one are not those of the other."""
    for line in notes(topology, kernel_means(topology)):
        click.echo(line, err=True)


def _directory(topology: Topology, directory: Path | None) -> Path:
    """The folder for logs and captures, made if it is not there."""
    if directory is None:
        return Path(tempfile.mkdtemp(prefix=f"testbed-{topology.name}-"))
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"{directory}: {error.strerror}", param_hint="--directory") from error
    return directory


def _as_values(record: Record) -> dict[str, object]:
    return {"name": record.name, "nodes": list(record.nodes), "pid": record.pid, "directory": record.directory}


if __name__ == "__main__":
    main()
