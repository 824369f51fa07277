"""Netlink: messages taken apart and put together, and answers that do not come."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable

import pytest

from nfq_engine.shell import ctnetlink, netlink, nftables
from nfq_engine.shell.ctnetlink import ConntrackNews
from nfq_engine.shell.nftables import NftSocket


class FakeSocket:
    """Remembers what is sent; gives what it was told to, then nothing."""

    def __init__(self, answers: Iterable[bytes | OSError] = ()) -> None:
        self.sent: list[bytes] = []
        self.answers = list(answers)

    def setblocking(self, _: bool) -> None: ...

    def setsockopt(self, *_: object) -> None: ...

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def recv(self, _: int) -> bytes:
        if not self.answers:
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer


def answer(sequence: int, number: int = 0) -> bytes:
    """An acknowledgement, or an error."""
    return struct.pack("=IHHIIi16x", 36, netlink.ERROR, 0, sequence, 0, -number)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSocket:
    made = FakeSocket()
    monkeypatch.setattr(nftables, "open_socket", lambda: made)
    monkeypatch.setattr(ctnetlink, "open_socket", lambda: made)
    return made


def test_attributes_come_back() -> None:
    data = netlink.attribute(1, b"abc") + netlink.nested(2, netlink.attribute(3, b"12345678"))
    found = netlink.attributes(data, 0, len(data))
    assert data[slice(*found[1])] == b"abc"
    inner = netlink.attributes(data, *found[2])
    assert data[slice(*inner[3])] == b"12345678"


@pytest.mark.parametrize("cut", range(24))
def test_cut_messages_raise_nothing(cut: int) -> None:
    data = netlink.message(0x100, 0, 2, 0, netlink.attribute(1, b"abc"))[:cut]
    for _, _, at, end in netlink.messages(data):
        assert netlink.attributes(data, at + netlink.BODY_AT, end) == {} or end <= len(data)


def test_lengths_of_zero_end_the_walk() -> None:
    assert list(netlink.messages(bytes(64))) == []
    assert netlink.attributes(bytes(64), 0, 64) == {}


ELEMENTS = {"source4": [(b"key.", b"data")]}


@pytest.mark.parametrize(
    ("answers", "raised"),
    [
        ([answer(2)], None),
        ([answer(1, errno.ENOENT), answer(2)], errno.ENOENT),
        ([answer(2, errno.ENFILE)], errno.ENFILE),
        ([], errno.ETIMEDOUT),
        ([answer(1, errno.EEXIST)], errno.EEXIST),
        ([answer(0, errno.EPERM), answer(2)], None),
    ],
    ids=["done", "first refused", "last refused", "no answer", "no answer to the last", "answer to an earlier one"],
)
def test_answers_to_a_transaction(fake: FakeSocket, answers: list[bytes | OSError], raised: int | None) -> None:
    nft = NftSocket("table")
    fake.answers = answers
    if raised is None:
        nft.change(ELEMENTS, {"source4": [b"old."]})
    else:
        with pytest.raises(OSError, match=os.strerror(raised)) as caught:
            nft.change(ELEMENTS, {"source4": [b"old."]})
        assert caught.value.errno == raised
    assert len(fake.sent) == 1


def test_nothing_to_change_is_not_sent(fake: FakeSocket) -> None:
    NftSocket("table").change({}, {})
    assert fake.sent == []


def test_many_elements_go_in_as_many_messages_as_they_need_of_one_transaction(fake: FakeSocket) -> None:
    fake.answers = [answer(16)]
    keys = [number.to_bytes(4, "big") for number in range(4096)]
    NftSocket("table").change({"redirect6": [(key, bytes(20)) for key in keys]}, {"foreign6": keys})
    (sent,) = fake.sent
    _, *bodies, _ = netlink.messages(sent)
    found: dict[bytes, list[bytes]] = {}
    for _, _, at, end in bodies:
        about = netlink.attributes(sent, at + netlink.BODY_AT, end)
        assert about[3][1] <= end
        for _, element in netlink.attribute_list(sent, *about[3]):
            key = netlink.attributes(sent, *netlink.attributes(sent, *element)[1])[1]
            found.setdefault(sent[slice(*about[2])], []).append(sent[slice(*key)])
    assert found == {b"foreign6\0": keys, b"redirect6\0": keys}


def test_what_a_transaction_tells_is_read_to_its_end_though_some_was_lost(fake: FakeSocket) -> None:
    """Or the next one would be thought to tell it, as it has no sequence number."""
    nft = NftSocket("table")
    counter = netlink.nested(
        2, netlink.attribute(1, (60).to_bytes(8, "big")), netlink.attribute(2, (1).to_bytes(8, "big"))
    )
    element = netlink.nested(1, netlink.nested(1, netlink.attribute(1, b"key.")), netlink.nested(7, counter))
    about = netlink.attribute(1, b"table\0") + netlink.attribute(2, b"answered4\0") + netlink.nested(3, element)
    told = netlink.message(10 << 8 | 14, 0, 1, 0, about, 0)
    fake.answers = [OSError(errno.ENOBUFS, "no room"), told, answer(1)]
    with pytest.raises(OSError, match=os.strerror(errno.ENOBUFS)):
        nft.refill_counted(["answered4"], {})
    fake.answers += [answer(2)]
    assert nft.refill_counted(["answered4"], {}) == {}


def entry_message(kind: int, port: int) -> bytes:
    """A report of conntrack's, of an entry of a UDP flow."""
    ip = netlink.nested(1, netlink.attribute(1, bytes(4)), netlink.attribute(2, bytes(4)))
    proto = netlink.nested(
        2,
        netlink.attribute(1, bytes((socket.IPPROTO_UDP,))),
        netlink.attribute(2, port.to_bytes(2, "big")),
        netlink.attribute(3, b"\0\x35"),
    )
    tuples = netlink.nested(1, ip, proto) + netlink.nested(2, ip, proto)
    return netlink.message(kind, 0, 2, 0, tuples + netlink.attribute(12, (7).to_bytes(4, "big")))


def test_reports_are_read_in_order_and_a_loss_is_told(fake: FakeSocket) -> None:
    news = ConntrackNews(1 << 31)
    fake.answers = [entry_message(0x100, 1), entry_message(0x102, 2)]
    reports, is_complete = news.read()
    assert [(report.is_new, report.entry.original.source.port) for report in reports] == [(True, 1), (False, 2)]
    assert reports[0].entry.identifier == 7
    assert is_complete
    fake.answers = [OSError(errno.ENOBUFS, "lost"), entry_message(0x100, 3)]
    reports, is_complete = news.read()
    assert len(reports) == 1
    assert not is_complete
