"""The frames of a capture in memory: by point and moment, each made once."""

from __future__ import annotations

import pytest

from testbed.capture_store import FrameStore

SECOND = 1_000_000_000
A, B = 0, 1


@pytest.fixture
def store() -> FrameStore:
    """Three frames at a, two at b; one was shown too late for the order of time."""
    made = FrameStore(["a:eth0", "b:eth0"])
    made.add([(10 * SECOND, A, b"1", True, True), (12 * SECOND, B, b"2", False, True)])
    made.add([(12 * SECOND - 5, A, b"3", True, False), (13 * SECOND, B, b"4", False, False)])
    made.add([(14 * SECOND, A, b"5", True, False)])
    return made


@pytest.mark.parametrize(
    ("moment", "point", "numbers"),
    [
        pytest.param(0, None, [1, 2, 3, 4, 5], id="all"),
        pytest.param(0, A, [1, 3, 5], id="a point's"),
        pytest.param(12 * SECOND, None, [2, 4, 5], id="all since"),
        pytest.param(12 * SECOND - 5, A, [3, 5], id="a point's since"),
        pytest.param(12 * SECOND - 5, None, [2, 3, 4, 5], id="out of order"),
        pytest.param(15 * SECOND, B, [], id="none"),
    ],
)
def test_frames_by_point_and_moment(store: FrameStore, moment: int, point: int | None, numbers: list[int]) -> None:
    assert [frame.number for frame in store.since(moment, point)] == numbers


@pytest.mark.parametrize(
    ("point", "behind", "numbers"),
    [(None, 0, [2, 4, 5]), (None, 2, [4, 5]), (A, 3, [5]), (A, 5, []), (B, 1, [2, 4])],
)
def test_only_frames_behind_another(store: FrameStore, point: int | None, behind: int, numbers: list[int]) -> None:
    assert [frame.number for frame in store.since(12 * SECOND, point, behind)] == numbers


def test_a_frame_is_what_was_captured_and_the_same_each_time(store: FrameStore) -> None:
    [first, _] = store.since(0, B)
    assert (first.point, first.time_ns, first.data) == ("b:eth0", 12 * SECOND, b"2")
    assert (first.outgoing, first.half_checksum, first.number) == (False, True, 2)
    assert store.since(0, None)[1] is first


def test_frames_are_counted(store: FrameStore) -> None:
    assert (len(store), store.count(A), store.count(B)) == (5, 3, 2)
