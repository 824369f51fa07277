"""The smallest labs, for tests of the parts that a real lab is made of: a wire, and a gateway between two."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute

from testbed.capture import CapturePoint
from testbed.netns import Namespace

DEADLINE = 10.0  # seconds


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


@dataclass(frozen=True, slots=True)
class Chain:
    """`client` 10.8.1.2, `gateway` 10.8.1.1 and 10.8.2.1, `server` 10.8.2.2; the same in fd08:1:: and fd08:2::."""

    client: Namespace
    gateway: Namespace
    server: Namespace

    @property
    def points(self) -> list[CapturePoint]:
        return [
            CapturePoint("client", "eth0", self.client),
            CapturePoint("gateway", "eth0", self.gateway),
            CapturePoint("gateway", "eth1", self.gateway),
            CapturePoint("server", "eth0", self.server),
        ]

    def load_rules(self, ruleset: str) -> None:
        """Load nft rules on the gateway."""
        with self.gateway.entered():
            subprocess.run(["nft", "-f", "-"], input=ruleset, text=True, check=True)


@contextlib.contextmanager
def wire() -> Iterator[Wire]:
    """Build it; it goes with its descriptors."""
    with Namespace.new() as left, Namespace.new() as right:
        _connect(left, "eth0", right, "eth0")
        for number, namespace in enumerate((left, right), start=1):
            _address(namespace, "eth0", f"10.9.0.{number}", f"fd09::{number}")
        wait_until(lambda: _has_carrier(left) and _has_carrier(right), "both ends have a carrier")
        yield Wire(left, right)


@contextlib.contextmanager
def chain() -> Iterator[Chain]:
    """Build it; it goes with its descriptors."""
    with Namespace.new() as client, Namespace.new() as gateway, Namespace.new() as server:
        _connect(client, "eth0", gateway, "eth0")
        _connect(server, "eth0", gateway, "eth1")
        for side, (node, interface) in enumerate(((client, "eth0"), (server, "eth1")), start=1):
            _address(node, "eth0", f"10.8.{side}.2", f"fd08:{side}::2")
            _address(gateway, interface, f"10.8.{side}.1", f"fd08:{side}::1")
            with routes(node) as netlink:
                netlink.route("add", dst="0.0.0.0/0", gateway=f"10.8.{side}.1")
                netlink.route("add", dst="::/0", gateway=f"fd08:{side}::1")
        with gateway.entered():
            for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                Path("/proc/sys/net", setting).write_text("1")
        wait_until(lambda: all(map(_has_carrier, (client, gateway, server))), "all ends have a carrier")
        yield Chain(client, gateway, server)


def _connect(left: Namespace, interface: str, right: Namespace, peer: str) -> None:
    """Make a veth pair, both ends up, that says nothing by itself."""
    with routes(left) as netlink:
        netlink.link("add", ifname=interface, kind="veth", peer={"ifname": peer, "net_ns_fd": right.fileno()})
    for namespace, name in ((left, interface), (right, peer)):
        with namespace.entered():
            # No link-local address of the kernel's making, so no neighbour discovery before the tests do something.
            Path(f"/proc/sys/net/ipv6/conf/{name}/addr_gen_mode").write_text("1")
        with routes(namespace) as netlink:
            for device in ("lo", name):
                netlink.link("set", index=netlink.link_lookup(ifname=device)[0], state="up")


def _address(namespace: Namespace, interface: str, address: str, address6: str) -> None:
    without_detection = 2  # IFA_F_NODAD
    with routes(namespace) as netlink:
        index = netlink.link_lookup(ifname=interface)[0]
        netlink.addr("add", index=index, address=address, prefixlen=24)
        netlink.addr("add", index=index, address=address6, prefixlen=64, flags=without_detection)


def _has_carrier(namespace: Namespace) -> bool:
    with routes(namespace) as netlink:
        return all(
            link.get("operstate") in ("UP", "UNKNOWN") for link in netlink.get_links() if link.get("state") == "up"
        )


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, or fail naming it."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE} s: {what}"
        time.sleep(0.002)
