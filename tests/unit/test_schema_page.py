"""The page about topology files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testbed import schema_page

REPOSITORY = Path(__file__).parents[2]
SCHEMA = REPOSITORY / "testbed" / "topology.schema.json"


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


def test_the_page_in_docs_is_what_the_schema_says() -> None:
    committed = (REPOSITORY / "docs" / "topology.md").read_text()
    assert committed == schema_page.page(), "make it anew: python -m testbed.schema_page > docs/topology.md"


def test_every_key_is_on_the_page_and_explained() -> None:
    page = schema_page.page()
    found = dict(keys(json.loads(SCHEMA.read_text())))
    assert len(found) > 40
    for name, schema in found.items():
        assert f"| `{name}`" in page
        assert schema.get("description"), f"{name} has no description"
