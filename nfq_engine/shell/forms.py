"""Values as they go over the control socket, in the shape that `tproxyctl --json` prints.

Owns: the JSON of endpoints, flows and sockrefs. Must not know who asks.
"""

from __future__ import annotations

from typing import Any, Final

from nfq_engine import wire
from nfq_engine.core.one_way import Listener
from nfq_engine.core.packet import Endpoint, FlowTuple, Protocol
from nfq_engine.core.sockref import Flag, Sockref

_ADDRESS_SIZES: Final = (4, 16)  # IPv4, IPv6
_LAST_PORT: Final = 0xFFFF


def number_from(value: Any, most: int) -> int:
    """A number from a request, of 0 to `most`; ValueError for anything else that JSON knows."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no number of 0 to {most}")
    return value


def endpoint_from(value: Any) -> Endpoint:
    """An endpoint from its form in a request, a list of hexadecimal address and port; ValueError, TypeError."""
    text, port = value
    address = bytes.fromhex(text)
    if len(address) not in _ADDRESS_SIZES:
        raise ValueError(f"{text!r} is no address")
    return Endpoint(address, number_from(port, _LAST_PORT))


def endpoint_form(endpoint: Endpoint) -> dict[str, str | int]:
    """An endpoint for people."""
    text, _, _ = str(endpoint).rpartition(":")
    return {"address": text.strip("[]"), "port": endpoint.port}


def flow_form(flow: FlowTuple) -> wire.Message:
    """One direction of a connection."""
    return {"source": endpoint_form(flow.source), "destination": endpoint_form(flow.destination)}


def sockref_form(sockref: Sockref) -> wire.Message:
    """A sockref."""
    return {
        "protocol": sockref.protocol.name.lower(),
        "local": endpoint_form(sockref.local),
        "foreign": endpoint_form(sockref.foreign),
        "remote": endpoint_form(sockref.remote),
        "flags": [flag.name for flag in sockref.flags],
        "flags_value": int(sockref.flags),
        "related": len(sockref.related),
        "sockets": len(sockref.cookies),
        "hashed": sockref.hashed,
        "owner": sockref.owner,
    }


def listener_form(listener: Listener) -> wire.Message:
    """A one-way listener, which has no foreign address, as a sockref that is found by nothing."""
    nobody = Endpoint(bytes(len(listener.local.address)), 0)
    flags = Flag.LISTEN | Flag.UNIDIR
    return sockref_form(
        Sockref(Protocol.UDP, listener.local, nobody, nobody, {listener.cookie}, listener.since, flags, listener.owner)
    )
