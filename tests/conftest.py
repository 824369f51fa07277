"""What a test needs from the machine, and what happens when the machine lacks it."""

from __future__ import annotations

import pytest

from testbed.capabilities import Capabilities, probe


@pytest.fixture(scope="session")
def capabilities() -> Capabilities:
    """What this machine can do; looked at once a session."""
    return probe()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, and say by name what is missing; a unit test asks nothing of the machine."""
    if item.get_closest_marker("lab") or item.get_closest_marker("kernel"):
        lacking = [f"{c.name} ({c.detail}): {c.remedy}" for c in probe().missing(required=True)]
        if lacking:
            pytest.skip("no lab here, missing " + "; ".join(lacking))
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            if not probe().has(name):
                pytest.skip(f"missing {name}")
