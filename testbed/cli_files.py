"""`testbed` and files: validate, plan, diagram. Nothing is built.

Owns: arguments, what is printed, exit codes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click

from testbed.cli_options import AS_JSON, FILE, examples
from testbed.diagram import diagram
from testbed.documents import DocumentError
from testbed.impair import kernel_means
from testbed.plan import describe, plan
from testbed.scenario_file import is_scenario, load_scenario
from testbed.topology import End, Topology
from testbed.topology_file import load


@click.command(epilog=examples("validate lab.yaml", "validate topologies/*.yaml topologies/scenarios/*.yaml --json"))
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path, dir_okay=False))
@AS_JSON
def validate(files: tuple[Path, ...], *, as_json: bool) -> None:
    """Check topology and scenario files.

    Every problem is told, with line and column; with --json as an object a file, on standard output.
    """
    are_valid = True
    for file in files:
        try:
            found = _summary(file)
        except DocumentError as error:
            are_valid = False
            if as_json:
                complaints = [dataclasses.asdict(complaint) for complaint in error.complaints]
                click.echo(json.dumps({"file": str(file), "valid": False, "problems": complaints}))
            else:
                click.ClickException(str(error)).show()
            continue
        if as_json:
            click.echo(json.dumps({"file": str(file), "valid": True, **found}))
        else:
            name, *rest = found.values()
            words = " in ".join if "steps" in found else ", ".join
            click.echo(
                f"{file}: {name}: {words(_amount(key, value) for key, value in zip([*found][1:], rest, strict=True))}"
            )
    if not are_valid:
        sys.exit(1)


def _summary(file: Path) -> dict[str, str | int]:
    """What is in a file, in a few words."""
    if is_scenario(file):
        scenario = load_scenario(file)
        return {"name": scenario.name, "steps": len(scenario.steps), "topology": scenario.topology.name}
    topology = load(file)
    return {"name": topology.name, "nodes": len(topology.nodes), "links": len(topology.links)}


def _amount(key: str, value: str | int) -> str:
    return f"{value} {key}" if isinstance(value, int) else value


@click.command("plan", epilog=examples("plan lab.yaml", "plan lab.yaml --json"))
@FILE
@AS_JSON
def show_plan(file: Path, *, as_json: bool) -> None:
    """Print the operations that build a lab, without building it."""
    topology = topology_of(file)
    operations = plan(topology, kernel_means(topology))
    if as_json:
        values = [{"operation": type(each).__name__, **dataclasses.asdict(each)} for each in operations]
        click.echo(json.dumps(values, indent=2, default=str))
        return
    for operation in operations:
        click.echo(describe(operation))


@click.command("diagram", epilog=examples("diagram lab.yaml -o lab.svg", "diagram lab.yaml --json"))
@FILE
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Instead of standard output.")
@click.option("--json", "as_json", is_flag=True, help="What is drawn, as JSON: each node, each link, with addresses.")
def draw(file: Path, output: Path | None, *, as_json: bool) -> None:
    """Draw a topology as SVG, without building it."""
    topology = topology_of(file)
    drawn = f"{json.dumps(_drawn(topology), indent=2)}\n" if as_json else diagram(topology)
    if output is None:
        click.echo(drawn, nl=False)
    else:
        output.write_text(drawn, encoding="utf-8")


def _drawn(topology: Topology) -> dict[str, object]:
    """What a diagram shows."""
    nodes = [
        {
            "name": node.name,
            "kind": node.kind.value,
            "engine": node.engine.datapath if node.engine is not None else None,
            "services": [service.name for service in node.services],
        }
        for node in topology.nodes
    ]
    links = [{"mtu": link.mtu, "ends": [_end(end) for end in link.ends]} for link in topology.links]
    return {"name": topology.name, "nodes": nodes, "links": links}


def _end(end: End) -> dict[str, object]:
    return {
        "node": end.node,
        "interface": end.interface,
        "addresses": [str(address) for address in end.addresses],
        "impair": dataclasses.asdict(end.impair) if end.impair is not None else None,
    }


def topology_of(file: Path) -> Topology:
    """A topology, or a scenario's."""
    return load_scenario(file).topology if is_scenario(file) else load(file)
