"""Each scenario looks the same from outside, whoever translates: the engine, the kernel for it, or plain nft rules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import pytest
import scenarios_tcp
import scenarios_udp
from observation import differences
from scenario import Scenario
from stage import House, Way, house, perform

pytestmark = [pytest.mark.kernel, pytest.mark.lab]

SCENARIOS = [*scenarios_tcp.SCENARIOS, *scenarios_udp.SCENARIOS]
CASES = [(scenario, version) for scenario in SCENARIOS for version in scenario.versions]
NUMBERS = {(scenario.name, version): number for number, (scenario, version) in enumerate(CASES)}


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[Way, House]]:
    with contextlib.ExitStack() as stack:
        yield {way: stack.enter_context(house(way, tmp_path_factory.mktemp(way))) for way in Way}


@pytest.mark.parametrize(("scenario", "version"), CASES, ids=[f"{each.name}-ipv{version}" for each, version in CASES])
def test_all_ways_look_the_same(houses: Mapping[Way, House], scenario: Scenario, version: int) -> None:
    number = NUMBERS[scenario.name, version]
    seen = {}
    for way in scenario.ways:
        try:
            seen[way] = perform(houses[way], version, number, scenario.chosen_at, scenario.play)
        except BaseException as error:
            error.add_note(f"played with {way}")
            raise
        if way not in scenario.views:
            seen[way] = {**seen[way], "conntrack": seen[scenario.ways[0]]["conntrack"]}
    first = scenario.ways[0]
    assert (len(seen[first]) == 1) is scenario.stays_inside, "nothing was captured, or what should not be"
    found = [differences(seen[first], seen[way], (first, way)) for way in scenario.ways[1:]]
    if any(found):
        pytest.fail("\n\n".join(filter(None, found)), pytrace=False)
