"""Whether packets get through, and what others see of them, for tests of labs."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

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


def has_connections() -> bool:
    """Whether this thread's namespace has TCP sockets that are neither LISTEN nor TIME_WAIT (proc_net_tcp)."""
    lines = [
        line for name in ("tcp", "tcp6") for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()
    ]
    return any(line.split()[3] not in ("0A", "06", "st") for line in lines)


def tcpdump(file: Path, words: str) -> str:
    """What tcpdump tells of the packets in a file.

    Root's tcpdump becomes somebody else first, which it cannot in a user namespace: there it is started as nobody.
    """
    may_change = Path("/proc/self/setgroups").read_text().strip() == "allow"
    command = [*([] if may_change else ["unshare", "--user"]), "tcpdump", "-nr", str(file), words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
