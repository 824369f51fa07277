"""One-way listeners, and the record of where one-way datagrams were going."""

from __future__ import annotations

import pytest
from builders import endpoint, flow, packet

from nfq_engine.core.one_way import Listener, Listeners, Origins, digest_of, payload_of
from nfq_engine.core.packet import Endpoint, FlowTuple, Protocol, Segment, parse

LOCAL = endpoint("gateway", 50053)
INSIDE = flow(endpoint("client", 4000), LOCAL, Protocol.UDP)
FIRST, SECOND = (flow(endpoint("client", 4000), endpoint(who, 53), Protocol.UDP) for who in ("foreign", "server"))

HEARD = [
    pytest.param(LOCAL, False, LOCAL, True, id="its own"),
    pytest.param(LOCAL, False, endpoint("gateway", 50054), False, id="another port"),
    pytest.param(LOCAL, False, endpoint("outside", 50053), False, id="another address"),
    pytest.param(Endpoint(bytes(4), 50053), False, endpoint("outside", 50053), True, id="any address"),
    pytest.param(Endpoint(bytes(4), 50053), False, endpoint("outside", 50053, 6), False, id="the other family"),
    pytest.param(Endpoint(bytes(16), 50053), False, endpoint("outside", 50053, 6), True, id="any IPv6 address"),
    pytest.param(Endpoint(bytes(16), 50053), False, LOCAL, False, id="IPv6 only"),
    pytest.param(Endpoint(bytes(16), 50053), True, LOCAL, True, id="both families"),
]


@pytest.mark.parametrize(("local", "takes_ipv4", "endpoint_", "is_heard"), HEARD)
def test_what_a_listener_hears(local: Endpoint, takes_ipv4: bool, endpoint_: Endpoint, is_heard: bool) -> None:
    listeners = Listeners()
    listeners.add(Listener(1, local, takes_ipv4, owner=0, since=0.0))
    assert listeners.hear(endpoint_) is is_heard


def test_ports_are_another_object_after_every_change() -> None:
    listeners = Listeners()
    seen = [listeners.ports]
    for cookie in (1, 2):
        listeners.add(Listener(cookie, LOCAL, takes_ipv4=False, owner=0, since=0.0))
        seen.append(listeners.ports)
    for cookie in (1, 2):
        listeners.discard(cookie)
        seen.append(listeners.ports)
    assert [sorted(ports) for ports in seen] == [[], [50053], [50053], [50053], []]
    assert len({id(ports) for ports in seen[1:4]}) == 3
    assert not listeners.hear(LOCAL)


def ask(origins: Origins, digest: int, now: float = 1.0, *, is_peeked: bool = False) -> FlowTuple | None:
    return origins.ask(INSIDE, digest, now, is_peeked=is_peeked)


def test_origin_is_told_to_whoever_got_the_bytes() -> None:
    origins = Origins()
    origins.note(FIRST, INSIDE, digest_of(b"one"), 0.0)
    origins.note(SECOND, INSIDE, digest_of(b"two"), 0.0)
    assert ask(origins, digest_of(b"two")) == SECOND
    assert ask(origins, digest_of(b"one"), is_peeked=True) == FIRST
    assert ask(origins, digest_of(b"one")) == FIRST
    assert ask(origins, digest_of(b"one")) is None, "the next with these bytes came by itself"
    assert ask(origins, digest_of(b"three")) is None
    assert len(origins) == 0


def test_order_tells_datagrams_apart_that_look_alike() -> None:
    origins = Origins()
    for original in (FIRST, SECOND, FIRST):
        origins.note(original, INSIDE, 7, 0.0)
    assert [ask(origins, 7) for _ in range(4)] == [FIRST, SECOND, FIRST, None]


def test_record_is_bounded_in_time_and_number() -> None:
    origins = Origins()
    origins.note(FIRST, INSIDE, 0, 0.0)
    assert ask(origins, 0, 29.9, is_peeked=True) == FIRST
    assert ask(origins, 0, 30.0) is None
    for number in range(1, 20_001):
        origins.note(FIRST, INSIDE, number, 31.0)
    assert len(origins) == 16_384
    assert ask(origins, 20_000, 31.0) == FIRST
    assert ask(origins, 1, 31.0) is None, "the oldest went first"
    origins.note(FIRST, INSIDE, 1, 100.0)
    assert len(origins) == 1


@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_payload_ends_where_the_datagram_says(version: int) -> None:
    of = flow(endpoint("client", 1, version), endpoint("server", 2, version), Protocol.UDP)
    data = packet(of, payload=b"payload")
    segment = parse(data)
    assert isinstance(segment, Segment)
    assert payload_of(data + b"padding", segment) == b"payload"
