"""The pages about topology and scenario files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.schema_page import PAGES

REPOSITORY = Path(__file__).parents[2]
DOCS = {"topology": "topology.md", "scenario": "scenarios.md"}


def keys(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key that the schema knows, with its own schema."""
    match schema:
        case dict():
            for name, value in schema.items():
                if name == "properties":
                    yield from value.items()
                yield from keys(value)
        case list():
            for value in schema:
                yield from keys(value)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_in_docs_is_what_the_schema_says(name: str) -> None:
    committed = (REPOSITORY / "docs" / DOCS[name]).read_text()
    anew = f"make it anew: python -m testbed.schema_page {name} > docs/{DOCS[name]}"
    assert committed == PAGES[name](), anew


@pytest.mark.parametrize("name", PAGES)
def test_every_key_is_on_the_page(name: str) -> None:
    page = PAGES[name]()
    found = [key for key, _ in keys(json.loads((REPOSITORY / "testbed" / f"{name}.schema.json").read_text()))]
    assert len(found) > 30
    for key in found:
        assert f"| `{key}`" in page or f"## A step: `{key}`" in page


@pytest.mark.parametrize("name", PAGES)
def test_every_key_is_explained(name: str) -> None:
    rows = [line for line in PAGES[name]().splitlines() if line.startswith("| `")]
    assert rows
    assert [row for row in rows if row.endswith("|  |")] == []
