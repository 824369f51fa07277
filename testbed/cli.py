"""testbed: labs from the command line.

Owns: which commands there are and where, and how what goes wrong is told. A command's module is imported when the
command is called: `exec`, and TAB behind it, do not wait for what only building a lab needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

import click

from testbed import cli_completion as completion
from testbed.cli_options import CODES
from testbed.errors import TestbedError, in_words

_WHERE: Final = {
    "validate": "cli_files:validate",
    "plan": "cli_files:show_plan",
    "diagram": "cli_files:draw",
    "up": "cli_labs:up",
    "run": "cli_labs:run",
    "ls": "cli_running:list_labs",
    "exec": "cli_running:execute",
    "shell": "cli_running:shell",
    "report": "cli_running:write_report_of",
    "impair": "cli_running:impair",
    "down": "cli_running:down",
}

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
Exit codes: {CODES}
Exec, shell and run end with the command's own; run ends with 1 when a step of a scenario failed."""


class _Commands(click.Group):
    """Commands that are imported when they are called, and whose expected troubles are told without a traceback."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _WHERE:
            return super().get_command(ctx, cmd_name)
        module, _, name = _WHERE[cmd_name].partition(":")
        command = getattr(import_module(f"testbed.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # who reads has enough; click ends quietly
            raise
        except (TestbedError, OSError) as error:
            raise click.ClickException(in_words(error)) from error


@click.group(cls=_Commands, epilog=_EPILOG)
def main() -> None:
    """Labs of network namespaces, built from topology files."""


for _name in _WHERE:
    main.add_command(click.Command(_name))  # click looks among these for what a mistyped name may mean


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


if __name__ == "__main__":
    main()
