"""What this machine can do, asked before anything is built.

Owns: the list of what a lab needs, what the lack of each costs, and how that is told. Must not know how a lab is built,
nor import anything that a bare Python lacks: a missing package is among the things it has to tell. Place in the path:
first of all; `scripts/demo`, the pytest fixtures and `python -m testbed.capabilities` look here.

Kernel features are tried, not looked up: in a network namespace that only one thread of this process is ever in
(`kernel_probe.py`), and that ends with it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Final

from testbed import kernel_probe

PROJECT: Final = "nfq-tproxy-testbed"
ADMIN_FOLDERS: Final = "/usr/sbin:/sbin"
PACKAGES_FILE: Final = Path(__file__).with_name("packages.txt")


@dataclass(frozen=True, slots=True)
class Capability:
    """One thing that a lab needs, and whether it is here.

    `detail` is what was found instead, `remedy` what to install or which kernel option, `cost` what its lack costs.
    """

    name: str
    present: bool
    required: bool
    needed_for: str
    detail: str
    remedy: str
    cost: str


@dataclass(frozen=True, slots=True)
class Capabilities:
    """All that was looked at. What could not be tried (no namespace to try it in) is not in it, so `has` is false."""

    found: tuple[Capability, ...]

    def __iter__(self) -> Iterator[Capability]:
        return iter(self.found)

    def has(self, name: str) -> bool:
        """Whether the capability of that name is present."""
        return any(capability.present for capability in self.found if capability.name == name)

    def missing(self, *, required: bool) -> tuple[Capability, ...]:
        """What is not here, of the required or of the optional ones."""
        return tuple(c for c in self.found if not c.present and c.required is required)


@dataclass(frozen=True, slots=True)
class SystemPackage:
    """A line of packages.txt; `probe` and `when` are explained there."""

    package: str
    probe: str
    when: str
    needed_for: str


@cache
def probe() -> Capabilities:
    """Look at everything once for this process, in well under 300 ms; leaves nothing behind."""
    return Capabilities((_python_packages(), *_commands(system_packages()), *_kernel()))


def names() -> list[str]:
    """Everything that is looked at, whether or not it could be tried here."""
    commands = [capability.name for capability in _commands(system_packages())]
    return ["python-packages", *commands, *(feature.name for feature in kernel_probe.FEATURES)]


def explain(capabilities: Capabilities) -> str:
    """What is missing, as text: a table when anything required is, else one line for each optional thing."""
    optional = capabilities.missing(required=False)
    if required := capabilities.missing(required=True):
        return _table((*required, *optional))
    return "\n".join(f"without {c.name} ({c.detail}): {c.cost}; to have it: {c.remedy}" for c in optional)


def system_packages() -> tuple[SystemPackage, ...]:
    """The system packages that labs need: testbed/packages.txt, which the set-up installs from."""
    lines = PACKAGES_FILE.read_text(encoding="utf-8").splitlines()
    return tuple(SystemPackage(*line.split(None, 3)) for line in lines if line and not line.startswith("#"))


def _commands(packages: tuple[SystemPackage, ...]) -> Iterator[Capability]:
    for entry in packages:
        kind, _, command = entry.probe.partition(":")
        if kind == "command" and entry.when in ("required", "optional"):
            is_required = entry.when == "required"
            is_off_path = shutil.which(command, path=ADMIN_FOLDERS) is not None
            yield Capability(
                name=command,
                present=shutil.which(command) is not None,
                required=is_required,
                needed_for=entry.needed_for,
                detail="not on PATH",
                remedy=f"add {ADMIN_FOLDERS} to PATH" if is_off_path else f"apt install {entry.package}",
                cost="no lab" if is_required else f"no {entry.needed_for}",
            )


def _python_packages() -> Capability:
    missing = _missing_distributions()
    return Capability(
        name="python-packages",
        present=not missing,
        required=True,
        needed_for="everything",
        detail=f"not installed: {', '.join(missing)}",
        remedy="scripts/test sets up .venv",
        cost="nothing runs",
    )


def _missing_distributions() -> list[str]:
    """The project, or those of its run-time dependencies, that this Python does not have."""
    try:
        requirements = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        return [PROJECT]
    names = [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in requirements if "extra ==" not in text]
    return [name for name in names if not _is_installed(name)]


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _kernel() -> Iterator[Capability]:
    for feature, failure in kernel_probe.try_all():
        yield Capability(
            name=feature.name,
            present=failure is None,
            required=feature.required,
            needed_for=feature.needed_for,
            detail=failure or "",
            remedy=feature.remedy,
            cost=feature.cost,
        )


def _table(missing: tuple[Capability, ...]) -> str:
    rows = [(c.name, c.needed_for, c.detail, c.remedy, c.cost) for c in missing]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return "\n".join("  ".join(row) for row in rows)
    table = Table(show_lines=True)
    for heading in ("missing", "needed for", "found", "what to do", "what its lack costs"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=max(100, shutil.get_terminal_size().columns))
    with console.capture() as text:
        console.print(table)
    return text.get().rstrip("\n")


def main() -> int:
    """`python -m testbed.capabilities`: tell what is missing; 1 when anything required is."""
    parser = argparse.ArgumentParser(
        prog="python -m testbed.capabilities",
        description="Tell what this machine lacks for labs and engines, what to do about it, and what its lack costs.",
        epilog="Exit codes: 0 all that is required is here; 1 something is missing; 2 wrong usage.",
    )
    parser.add_argument("--json", action="store_true", help="print all that was looked at as JSON")
    as_json = parser.parse_args().json
    capabilities = probe()
    if as_json:
        print(json.dumps([asdict(capability) for capability in capabilities], indent=2))
        return 1 if capabilities.missing(required=True) else 0
    if text := explain(capabilities):
        print(text)
    if capabilities.missing(required=True):
        return 1
    print(f"everything required is here ({len(capabilities.found)} things looked at)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
