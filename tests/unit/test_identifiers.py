"""User and group numbers across user namespaces."""

from __future__ import annotations

import pytest

from nfq_engine.shell.identifiers import IdentifierMap

ROOTLESS = "         0       1000          1\n         1     100000      65536\n"


@pytest.mark.parametrize(
    ("text", "outside", "inside"),
    [
        ("0 0 4294967295\n", 4711, 4711),
        (ROOTLESS, 1000, 0),
        (ROOTLESS, 100_000, 1),
        (ROOTLESS, 165_535, 65_536),
        (ROOTLESS, 165_536, 65_534),
        (ROOTLESS, 0, 65_534),
        ("", 0, 65_534),
    ],
)
def test_number_of_somebody_here(text: str, outside: int, inside: int) -> None:
    assert IdentifierMap.read(text).inside(outside) == inside
