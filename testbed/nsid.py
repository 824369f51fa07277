"""When namespaces are gone: the kernel says so, and nothing else can know.

Owns: the one way to see the end of a namespace that has no name. A namespace lives as long as a process, a descriptor,
a mount or a socket holds it, and most of these are hidden. But one that was given an id in another namespace is
announced there when the kernel begins to take it apart (rtnetlink, group RTNLGRP_NSID). The id goes with it. By then
nobody can enter it any more; its interfaces go within the next hundred milliseconds, those of several side by side, and
those that were let go of meanwhile after that (net/core/net_namespace.c, cleanup_net).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

from testbed import rtnetlink
from testbed.netns import Namespace

_RTNLGRP_NSID: Final = 28
_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_SO_RCVBUFFORCE: Final = 33
_NEWS_BUFFER: Final = 8 << 20  # the ends of everybody else's namespaces wait there, too, as long as the lab lives


class Watch:
    """Sees namespaces end. Close it, or use it in a `with`."""

    def __init__(self, namespaces: Mapping[str, Namespace]) -> None:
        """Begin to watch; OSError(EPERM) where this thread's namespace is not ours to give ids in."""
        self._news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            with contextlib.suppress(PermissionError):  # a user namespace may not; there, few namespaces end
                self._news.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _NEWS_BUFFER)
            self._news.bind((0, 0))
            self._alive = {_identify(self._news, namespace): name for name, namespace in namespaces.items()}
            self._news.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _RTNLGRP_NSID)
        except OSError:
            self._news.close()
            raise

    def remaining(self, within: float) -> list[str]:
        """The names of those that are still there when all others have gone, or after `within` seconds."""
        deadline = time.monotonic() + within
        news = select.poll()  # select() takes no descriptor above 1023
        news.register(self._news, select.POLLIN)
        while self._alive and news.poll(max(0.0, deadline - time.monotonic()) * 1000):
            for ended in self._ended():
                self._alive.pop(ended, None)
        return list(self._alive.values())

    def _ended(self) -> list[int]:
        """Ids of namespaces that are no more: the next news, or, where news found no room, those that are asked for."""
        try:
            return rtnetlink.ended_namespaces(self._news)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
        self._drain()
        numbers = list(self._alive)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asking:
            refused = rtnetlink.send(asking, [rtnetlink.ask_namespace(number) for number in numbers])
            return [numbers[place] for place, code in refused if code == errno.ENOENT]

    def _drain(self) -> None:
        """Read all that waits: until then the kernel drops what comes, and perhaps does not say so again."""
        while True:
            try:
                self._news.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def close(self) -> None:
        """Look no more."""
        self._news.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _identify(netlink: socket.socket, namespace: Namespace) -> int:
    """The id of a namespace in this one, given to it now if it has none."""
    for _, code in rtnetlink.send(netlink, [rtnetlink.name_namespace(namespace.fileno())]):
        if code != errno.EEXIST:
            raise OSError(code, f"no id for a namespace: {os.strerror(code)}")
    return rtnetlink.namespace_id(netlink, namespace.fileno())
