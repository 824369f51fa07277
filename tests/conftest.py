"""What is this project's own; markers, skipping and fixtures come from testbed.pytest_plugin."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["pytester"]


# On a busy machine any example may take long: how long says nothing.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


def pytest_configure(config: pytest.Config) -> None:
    """A .venv that was made before the plugin does not know it."""
    if not config.pluginmanager.hasplugin("testbed"):
        raise pytest.UsageError("the testbed's pytest plugin is not installed in .venv: scripts/test does that")


def pytest_collection_finish() -> None:
    """What is there when tests begin, Scapy above all, stays: no search for garbage looks through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands leave in the temporary folder on purpose, logs of labs, goes with the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Whoever wants a shell in the lab of a failed test has them run where the terminal is, scripts/test or not."""
    return 0 if config.getoption("--lab-shell") else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """A case that runs against the kernel's own nat needs a lab for it."""
    if item.get_closest_marker("kernel"):
        item.add_marker("lab")
