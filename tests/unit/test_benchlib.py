"""The shape and the arithmetic of benchmark results."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import benchlib
import pytest
from rich.console import Console


def test_each_round_measures_every_case_once_and_begins_with_another() -> None:
    order: list[str] = []

    def case(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    samples = benchlib.run_paired({"a": case("a"), "b": case("b"), "c": case("c")}, rounds=3)

    assert "".join(order) == "abcbcacab"
    assert samples == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_a_ratio_is_the_median_of_the_paired_ratios() -> None:
    samples = {"fast": [10.0, 90.0, 20.0], "slow": [1.0, 3.0, 10.0]}

    result = benchlib.summarise("walk", "m/s", samples, {"fast/slow": ("fast", "slow")})

    assert result.ratios == {"fast/slow": 10.0}  # of 10, 30 and 2; the medians' own ratio would be 20 / 3
    assert result.cases["fast"] == benchlib.Spread(median=20.0, min=10.0, max=90.0)


@pytest.mark.parametrize(
    "samples",
    [
        pytest.param({"a": [1.0, 2.0], "b": [1.0]}, id="unequal"),
        pytest.param({"a": []}, id="empty"),
        pytest.param({}, id="no case"),
    ],
)
def test_samples_that_are_no_pairs_are_refused(samples: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="same number of samples"):
        benchlib.summarise("walk", "m/s", samples, {})


def test_published_as_a_table_and_as_the_one_json_shape(tmp_path: Path) -> None:
    text = io.StringIO()
    samples = {"a": [2.0], "b": [12345.6]}
    result = benchlib.summarise("walk", "m/s", samples, {"b/a": ("b", "a")}, {"blisters of b": 4.0})

    benchlib.publish(result, tmp_path / "walk.json", Console(file=text, width=80))

    assert json.loads((tmp_path / "walk.json").read_text()) == {
        "name": "walk",
        "unit": "m/s",
        "cases": {
            "a": {"median": 2.0, "min": 2.0, "max": 2.0},
            "b": {"median": 12345.6, "min": 12345.6, "max": 12345.6},
        },
        "ratios": {"b/a": 6172.8},
        "further": {"blisters of b": 4.0},
    }
    assert "walk (m/s)" in text.getvalue()
    assert "12,346" in text.getvalue()
    assert "b/a: 6,173" in text.getvalue()
    assert "blisters of b: 4" in text.getvalue()


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--rounds", "0"], id="no rounds"),
        pytest.param(["--rounds", "many"], id="rounds not a number"),
        pytest.param(["--json", "/nonexistent/x.json"], id="json in a folder that is not there"),
        pytest.param(["--json", "/"], id="json onto a folder"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchlib.parser("a walk", rounds=3).parse_args(arguments)
    assert arguments[1] in capsys.readouterr().err
