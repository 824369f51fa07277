"""Automatic addresses: a function of the topology alone, so that a lab looks the same each time. Pure.

A segment (what bridges join counts as one) whose ends were given no address gets the next subnets of 10.0.0.0/8 and
fd00::/48 that overlap none that the topology names: 10.H.L.0/24 and fd00:0:0:N::/64 for number N = 256 H + L. Its ends
are 1, 2, ... in the order of the links. In a segment that has a subnet, ends get its lowest free addresses.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Final

from testbed.topology import Address, End, Network, Topology

FAMILIES: Final = (4, 6)
_LARGEST: Final = 1 << 16  # subnets; 10.0.0.0/8 has no more


class AddressingError(ValueError):
    """A subnet has no address left, or there is no subnet left."""


def addressed(topology: Topology) -> Topology:
    """The topology with an address for each family that an end wants; AddressingError when there are not enough."""
    chosen: dict[str, tuple[Address, ...]] = {}
    free = _free_subnets(topology)
    for segment in topology.segments():
        subnets = {version: _subnet(segment, version) for version in FAMILIES}
        if any(subnets[version] is None for end in segment for version in end.auto):
            fresh = next(free)
            subnets = {version: subnets[version] or fresh[version] for version in FAMILIES}
        taken = {address.ip for end in segment for address in end.addresses}
        for end in segment:
            found = []
            for subnet in (subnets[version] for version in end.auto):
                address = next((each for each in _hosts(subnet) if each.ip not in taken), None) if subnet else None
                if address is None:
                    raise AddressingError(f"{end.label}: no address is left in {subnet}")
                taken.add(address.ip)
                found.append(address)
            chosen[end.label] = tuple(found)
    links = (replace(link, left=_with(link.left, chosen), right=_with(link.right, chosen)) for link in topology.links)
    return replace(topology, links=tuple(links))


def _with(end: End, chosen: dict[str, tuple[Address, ...]]) -> End:
    return replace(end, addresses=end.addresses + chosen.get(end.label, ()), auto=())


def _subnet(segment: list[End], version: int) -> Network | None:
    """The first subnet of a family that a segment was given; one of several addresses, if there is such."""
    given = (address.network for end in segment for address in end.addresses if address.version == version)
    subnets = [network for network in given if version == 4 or not network.is_link_local]
    return next((network for network in subnets if network.num_addresses > 1), next(iter(subnets), None))


def _hosts(subnet: Network) -> Iterator[Address]:
    """The addresses of a subnet that a host may have, lowest first."""
    first = 0 if subnet.prefixlen >= subnet.max_prefixlen - 1 else 1
    last = subnet.num_addresses - (1 if subnet.version == 4 and first else 0)
    make = ipaddress.IPv4Interface if subnet.version == 4 else ipaddress.IPv6Interface
    for number in range(first, last):
        yield make((int(subnet.network_address) + number, subnet.prefixlen))


def _free_subnets(topology: Topology) -> Iterator[dict[int, Network]]:
    """A subnet of each family, again and again, none of which overlaps any that the topology names."""
    named = {address.network for link in topology.links for end in link.ends for address in end.addresses}
    for number in islice(count(), _LARGEST):
        pair = _pair(number)
        if not any(pair[other.version].overlaps(other) for other in named):
            yield pair
    raise AddressingError("no subnet is left for automatic addresses")


def _pair(number: int) -> dict[int, Network]:
    return {
        4: ipaddress.IPv4Network((10 << 24 | number << 8, 24)),
        6: ipaddress.IPv6Network((0xFD << 120 | number << 64, 64)),
    }
