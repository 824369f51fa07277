"""What the commands of `testbed` share: arguments and options, examples and exit codes, the word of progress."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from nfq_engine.cli_help import epilog
from testbed import cli_completion as completion

_SOON_S: Final = 1.0
"""What takes no longer needs no word of progress."""

CODES: Final = "0 done; 1 the lab or the file is not as it should be; 2 wrong usage."
COMMANDS_CODE: Final = "the command's own; 1 the lab is not as it should be; 2 wrong usage."

FILE: Final = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
LAB: Final = click.option("--lab", help="Which lab, when several run.", shell_complete=completion.labs)
NAME: Final = click.argument("name", required=False, shell_complete=completion.labs)
NODE: Final = click.argument("node", shell_complete=completion.nodes)
AS_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
JSON_OF_COMMAND: Final = click.option(
    "--json", "as_json", is_flag=True, help="Print how it ended and what it said as JSON."
)
LOGS: Final = click.option(
    "--directory", type=click.Path(path_type=Path, file_okay=False), help="For logs and captures; a new one by default."
)


def examples(*lines: str, codes: str = CODES) -> str:
    """Examples and exit codes below the help of a command."""
    return epilog("testbed", *lines, codes=codes)


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Say on a terminal what is being done, once it has taken a second; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    status = Console(stderr=True).status(Text(what))  # brackets in a step are no markup
    late = threading.Timer(_SOON_S, status.start)
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()
        late.join()  # it may just be starting the status
        status.stop()
