"""The smallest lab: two namespaces and one wire, for tests of the parts that a real lab is made of."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pyroute2 import IPRoute

from testbed.capture import CapturePoint
from testbed.netns import Namespace

DEADLINE = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class Wire:
    """`left` has 10.9.0.1 and fd09::1, `right` 10.9.0.2 and fd09::2, both on eth0."""

    left: Namespace
    right: Namespace

    @property
    def points(self) -> list[CapturePoint]:
        return [CapturePoint("left", "eth0", self.left), CapturePoint("right", "eth0", self.right)]

    def udp_sender(self, port: int = 9) -> socket.socket:
        """A socket in `left`, connected to a port of `right`."""
        sender = self.left.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.connect(("10.9.0.2", port))
        return sender

    def raw_sender(self) -> socket.socket:
        """A socket in `left` that puts frames on the wire as they are."""
        sender = self.left.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sender.bind(("eth0", 0))
        return sender

    def set_link(self, state: str) -> None:
        """Bring the left end "up" or "down"."""
        with routes(self.left) as netlink:
            netlink.link("set", index=netlink.link_lookup(ifname="eth0")[0], state=state)


@contextlib.contextmanager
def routes(namespace: Namespace) -> Iterator[IPRoute]:
    """rtnetlink of a namespace."""
    with namespace.entered():
        netlink = IPRoute()
    with netlink:
        yield netlink


@contextlib.contextmanager
def wire() -> Iterator[Wire]:
    """Build it, both ends up and without neighbour discovery of their own accord; it goes with its descriptors."""
    with Namespace.new() as left, Namespace.new() as right:
        with routes(left) as netlink:
            peer = {"ifname": "eth0", "net_ns_fd": right.fileno(), "index": 11}
            netlink.link("add", ifname="eth0", kind="veth", index=10, peer=peer)
        for number, namespace in enumerate((left, right), start=1):
            with routes(namespace) as netlink:
                eth0 = netlink.link_lookup(ifname="eth0")[0]
                # Without a link-local address of the kernel's making nothing is sent before the tests do.
                netlink.link(
                    "set",
                    index=eth0,
                    IFLA_AF_SPEC={"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", 1)]})]},
                )
                netlink.link("set", index=netlink.link_lookup(ifname="lo")[0], state="up")
                netlink.link("set", index=eth0, state="up")
                netlink.addr("add", index=eth0, address=f"10.9.0.{number}", prefixlen=24)
                netlink.addr("add", index=eth0, address=f"fd09::{number}", prefixlen=64, flags=2)
        both = Wire(left, right)
        wait_until(lambda: all(_is_up(namespace) for namespace in (left, right)), "both ends have a carrier")
        yield both


def _is_up(namespace: Namespace) -> bool:
    with routes(namespace) as netlink:
        return bool(
            netlink.get_links(ifname="eth0")[0].get("state") == "up"
            and netlink.get_links(ifname="eth0")[0].get("operstate") == "UP"
        )


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, or fail naming it."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE} s: {what}"
        time.sleep(0.002)
