"""Whether packets get through, for tests of labs."""

from __future__ import annotations

import socket

from testbed.netns import Namespace

PORT = 7


def gets_through(source: Namespace, destination: Namespace, address: str, within: float = 10.0) -> bool:
    """Whether a datagram comes from one namespace to an address in another."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with destination.socket(family, socket.SOCK_DGRAM) as receiver, source.socket(family, socket.SOCK_DGRAM) as sender:
        receiver.bind((address, PORT))
        receiver.settimeout(within)
        try:
            sender.sendto(b"through", (address, PORT))
            return receiver.recv(16) == b"through"
        except OSError:
            return False
