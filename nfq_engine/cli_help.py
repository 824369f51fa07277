"""What stands below the help of a command: examples and exit codes."""

from __future__ import annotations


def epilog(program: str, *examples: str, codes: str) -> str:
    """The examples, each behind the program's name, and the exit codes, in click's notation."""
    listed = "\n".join(f"  {program} {line}".rstrip() for line in examples)
    return f"\b\nExamples:\n{listed}\n\nExit codes: {codes}"
