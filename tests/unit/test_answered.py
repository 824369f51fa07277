"""What the kernel answers by itself: what it counts is added once, and what it does not take back it still answers."""

from __future__ import annotations

import errno
import math
import socket
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pytest
from builders import endpoint

from nfq_engine.core.known_redirects import Known
from nfq_engine.core.packet import Protocol
from nfq_engine.core.rule_values import Tally
from nfq_engine.shell import netlink, nftables
from nfq_engine.shell.answered import Answered
from nfq_engine.shell.divert import ANSWER_LIFE
from nfq_engine.shell.nftables import Element, ElementCounts, NftSocket
from nfq_engine.shell.redirects import Redirects, key_of

SET = "answered4"
KEY = (2).to_bytes(4, sys.byteorder) + bytes((0, 80, 0, 0))


@dataclass
class FakeNft(NftSocket):
    """A table of which only the sets with counters are looked at."""

    elements: dict[bytes, ElementCounts] = field(default_factory=dict)
    refuses: bool = False
    is_silent: bool = False  # refills, but what it says of that is lost

    def change(
        self, added: Mapping[str, Iterable[Element]], removed: Mapping[str, Iterable[bytes]] | None = None
    ) -> None:
        self._may_refuse()
        self.elements |= {key: ElementCounts() for key, _ in added.get(SET, ()) if key not in self.elements}

    def refill(self, names: Iterable[str], added: Mapping[str, Iterable[Element]]) -> None:
        self._may_refuse()

    def refill_counted(
        self, names: Iterable[str], added: Mapping[str, Iterable[Element]]
    ) -> dict[tuple[str, bytes], ElementCounts]:
        self._may_refuse()
        counted = {(SET, key): counts for key, counts in self.elements.items()}
        self.elements = {key: ElementCounts() for each in added.values() for key, _ in each}
        if self.is_silent:
            raise OSError(errno.ENOBUFS, "too much to say")
        return counted

    def counts(self, name: str) -> dict[bytes, ElementCounts]:
        self._may_refuse()
        return dict(self.elements)

    def _may_refuse(self) -> None:
        if self.refuses:
            raise OSError(errno.EBUSY, "busy")


@dataclass
class Scene:
    """The kernel answers for one redirect."""

    nft: FakeNft = field(default_factory=FakeNft)
    tally: Tally = field(default_factory=Tally)
    counted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answered = Answered(self.nft, self.counted.append)
        self.propose(80)
        self.answered.adjust(0.0)
        assert list(self.nft.elements) == [KEY]

    def propose(self, port: int) -> None:
        known = Known(endpoint("gateway", 50080), endpoint("server", port), (self.tally,), is_for_all=True)
        self.answered.propose(2, known)


def test_what_the_kernel_counts_is_added_once() -> None:
    scene = Scene()
    scene.nft.elements[KEY] = ElementCounts(3, 180)
    scene.answered.collect()
    scene.answered.collect()
    assert (scene.tally, scene.counted) == (Tally(3, 180), [3])
    scene.nft.elements[KEY] = ElementCounts(5, 300)
    assert scene.answered.withdraw()
    assert (scene.tally, scene.counted) == (Tally(5, 300), [3, 2])
    assert not scene.nft.elements
    assert not scene.answered


def test_what_is_renewed_is_counted_once() -> None:
    scene = Scene()
    scene.nft.elements[KEY] = ElementCounts(3, 180)
    scene.answered.adjust(ANSWER_LIFE / 2)
    assert scene.nft.elements == {KEY: ElementCounts()}
    scene.nft.elements[KEY] = ElementCounts(1, 60)
    scene.answered.collect()
    assert (scene.tally, scene.counted) == (Tally(4, 240), [3, 1])


def test_what_is_answered_goes_on_counting_when_more_is() -> None:
    scene = Scene()
    scene.nft.elements[KEY] = ElementCounts(3, 180)
    scene.propose(81)
    scene.answered.adjust(1.0)
    assert scene.nft.elements == {KEY: ElementCounts(3, 180), KEY.replace(b"P", b"Q"): ElementCounts()}
    scene.answered.collect()
    assert (scene.tally, scene.counted) == (Tally(3, 180), [3])


def test_counts_never_fall_when_what_the_kernel_said_was_lost() -> None:
    scene = Scene()
    scene.nft.elements[KEY] = ElementCounts(3, 180)
    scene.answered.collect()
    scene.nft.is_silent = True
    scene.answered.adjust(ANSWER_LIFE / 2)
    scene.nft.elements[KEY] = ElementCounts(1, 60)
    scene.answered.collect()
    assert (scene.tally, scene.counted) == (Tally(4, 240), [3, 1])


def test_only_so_many_are_answered_as_can_be_counted_quickly() -> None:
    scene = Scene()
    for port in range(1000, 5000):
        scene.propose(port)
    scene.answered.adjust(1.0)
    assert len(scene.nft.elements) == 256


def test_nothing_is_answered_whose_redirect_may_time_out() -> None:
    scene = Scene()
    redirects = Redirects(scene.nft, scene.answered)
    key, to = key_of(2, Protocol.TCP, endpoint("server", 80)), endpoint("gateway", 50080)
    redirects.are_put({key: to})
    scene.nft.refuses = True
    redirects.adjust(math.inf)
    scene.nft.refuses = False
    assert not redirects.lead(key, to)
    scene.answered.adjust(0.0)
    assert not scene.nft.elements


def test_nothing_is_answered_whose_redirect_was_refused() -> None:
    scene = Scene()
    redirects = Redirects(scene.nft, scene.answered)
    key = key_of(2, Protocol.TCP, endpoint("server", 80))
    redirects.are_put({key: endpoint("gateway", 50080)})
    redirects.are_refused({key: endpoint("gateway", 50080)})
    scene.answered.adjust(0.0)
    assert not scene.nft.elements


def test_what_the_kernel_does_not_take_back_is_tried_again_and_its_redirect_stays_so_long() -> None:
    scene = Scene()
    redirects = Redirects(scene.nft, scene.answered)
    key, to = key_of(2, Protocol.TCP, endpoint("server", 80)), endpoint("gateway", 50080)
    redirects.are_put({key: to})
    scene.nft.refuses = True
    redirects.clear()
    assert not redirects.keep_away(key)
    assert redirects.lead(key, to)
    assert scene.nft.elements
    scene.nft.refuses = False
    scene.answered.adjust(0.0)
    assert not scene.nft.elements
    redirects.clear()
    assert not redirects.lead(key, to)


def test_what_the_kernel_may_have_taken_without_a_word_is_taken_back() -> None:
    nft = FakeNft(refuses=True)
    answered = Answered(nft, lambda _: None)
    answered.propose(2, Known(endpoint("gateway", 50080), endpoint("server", 80), (), is_for_all=True))
    answered.adjust(0.0)
    nft.elements[KEY] = ElementCounts()
    nft.refuses = False
    answered.adjust(0.0)
    assert not nft.elements


@pytest.mark.parametrize("kind", [12, 14], ids=["told", "removed"])
def test_counts_are_read_from_messages(monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    """Two elements in one message, as the kernel writes them (nf_tables_api.c, nf_tables_fill_setelem)."""
    counter = netlink.nested(
        2, netlink.attribute(1, (120).to_bytes(8, "big")), netlink.attribute(2, (2).to_bytes(8, "big"))
    )
    expression = netlink.nested(7, netlink.attribute(1, b"counter\0"), counter)
    element = netlink.nested(1, netlink.nested(1, netlink.attribute(1, KEY)), expression)
    other = netlink.nested(1, netlink.nested(1, netlink.attribute(1, KEY[::-1])), expression)
    body = netlink.attribute(1, b"table\0") + netlink.attribute(2, b"answered4\0") + netlink.nested(3, element, other)
    told = netlink.message(10 << 8 | kind, 0, 1, 0, body, 1)
    end = netlink.message(netlink.DONE, 0, 0, 0, b"", 1) if kind == 12 else acknowledgement(1)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    monkeypatch.setattr(nftables, "open_socket", lambda: near)
    with near, far:
        far.send(told)
        far.send(end)
        nft = NftSocket("table")
        found = (
            nft.counts(SET) if kind == 12 else {key: each for (_, key), each in nft.refill_counted([SET], {}).items()}
        )
    assert found == {KEY: ElementCounts(2, 120), KEY[::-1]: ElementCounts(2, 120)}


def acknowledgement(sequence: int) -> bytes:
    """What the kernel says when all went well."""
    return struct.pack("=IHHIIi16x", 36, netlink.ERROR, 0, sequence, 0, 0)
