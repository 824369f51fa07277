"""tproxyctl: talks to the engine of the network namespace that it runs in.

Owns: the way to rules, which are given as to iptables, or to a command by its name. Exit codes: 0 done, 1 the engine
refused or is not there, 2 wrong usage of this command. Scripts set rule after rule: what these need is imported here,
and no more; commands by name import theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nfq_engine.control_client import Control, ControlError, reason


def main() -> None:
    """The command: rules in iptables' way when the first argument is such an option, else a command by name."""
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("--help", "--version"):
        sys.exit(_rules(arguments))
    from nfq_engine.cli_commands import commands

    commands()


def _rules(arguments: Sequence[str]) -> int:
    """Have the engine do what iptables would; the exit code."""
    try:
        with Control() as control:
            output = control.call({"call": "rules", "arguments": list(arguments)})["output"]
    except (OSError, ControlError) as error:
        print(f"tproxyctl: {reason(error)}", file=sys.stderr)
        return 1
    for line in output:
        print(line)
    return 0


if __name__ == "__main__":
    main()
