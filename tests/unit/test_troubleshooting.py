"""The page about troubles quotes messages; here they must be found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text()

# What somebody else says, or is no message but a command or option.
OTHERS = {"Read-only file system: '/proc/sys/": "the kernel", "testbed exec": "a command"}


def quoted() -> list[str]:
    """The messages in the first column, in the parts that … leaves."""
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", PAGE, re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    parts = [part.strip() for message in messages for part in message.split("…")]
    return [part for part in parts if part and part not in OTHERS]


@pytest.fixture(scope="module")
def sources() -> str:
    """All that may print a message."""
    files = [*REPOSITORY.glob("nfq_engine/**/*.py"), *REPOSITORY.glob("testbed/*.py"), REPOSITORY / "scripts/rootless"]
    held = ", ".join(f"CAP_{name} is not held" for name in ("SYS_ADMIN", "NET_ADMIN"))
    return "\n".join(file.read_text() for file in files).replace("{name} is not held", held)


@pytest.mark.parametrize("message", quoted())
def test_a_message_that_the_page_quotes_is_one_of_the_programs(message: str, sources: str) -> None:
    assert message in sources


def test_the_page_quotes_messages() -> None:
    assert len(quoted()) > 20


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
