"""Building: the operations of a plan, done.

Owns: the namespaces of a lab, and what a failed building leaves (nothing). Must not know what the lab
is for.

Messages are sent in batches, one netlink socket a namespace, and every answer is read: an error names the
operation that the kernel refused. Undoing is closing: a namespace without descriptor or process takes its interfaces,
addresses, routes and tables with it.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import shlex
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import dropwhile, groupby
from typing import Final

from testbed import impair, rtnetlink, sysctl, tc
from testbed.errors import TestbedError
from testbed.netns import Namespace, returning
from testbed.owner import environment, namespace_mark
from testbed.plan import (
    AddAddress,
    AddRoute,
    Configure,
    Impair,
    JoinBridge,
    LoadRules,
    MakeBridge,
    MakeLink,
    MakeNamespace,
    NetlinkOperation,
    Operation,
    Redirect,
    RunCommand,
    SetUp,
    StopOffload,
    WaitReady,
    describe,
)
from testbed.sysctl import Setting
from testbed.topology import BRIDGE, LOOPBACK, automatic_mac

_SIOCETHTOOL: Final = 0x8946
_ETHTOOL_GLINK, _ETHTOOL_STXCSUM = 0xA, 0x17  # linux/ethtool.h
_PATIENCE: Final = 10.0  # seconds until an interface must be up
_LOOK_AGAIN: Final = 0.0005  # seconds
_COMMAND_PATIENCE: Final = 60.0  # seconds for a command in a node
_BRIDGE_INDEX: Final = 9  # links begin at 10

_libc: Final = ctypes.CDLL(None)


class BuildError(TestbedError):
    """A lab could not be built; the message names the operation and what the kernel said."""


class Site:
    """One node while it is there: its namespace, the netlink socket inside, the index of each interface."""

    def __init__(self) -> None:
        """Make it, around a thread that ends there."""
        self.namespace = Namespace.move_into_new()
        try:
            self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        except OSError:
            self.namespace.close()
            raise
        self.indexes = {LOOPBACK: 1}

    def close(self) -> None:
        """Let the kernel take everything back."""
        self.netlink.close()
        self.namespace.close()


class Builder:
    """Carries out plans. Close it, or use it in a `with`: that removes what it built."""

    def __init__(self, made: Callable[[Namespace], object] = lambda _: None) -> None:
        """`made` is told of each namespace, before anything runs in it."""
        self.sites: dict[str, Site] = {}
        self._made = made
        self._mark = ""

    def namespace(self, node: str) -> Namespace:
        """The namespace of a node that was built."""
        return self.sites[node].namespace

    def build(self, operations: Iterable[Operation]) -> None:
        """Carry out operations in order; BuildError, with nothing left of them, when one fails."""
        try:
            for (node, is_netlink), group in groupby(operations, key=_place):
                if node is None:
                    self._make_namespaces([operation for operation in group if isinstance(operation, MakeNamespace)])
                elif is_netlink:
                    self._exchange(node, group)
                else:
                    for operation in group:
                        self._do(node, operation)
        except BuildError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise BuildError(f"the lab could not be built: {error}") from error

    def close(self) -> None:
        """Remove all namespaces, the last made first."""
        for site in reversed(self.sites.values()):
            site.close()
        self.sites.clear()

    def _exchange(self, node: str, operations: Iterable[Operation]) -> None:
        """Carry out operations of one node that are netlink messages, all at once."""
        batch = [(operation, request) for operation in operations for request in self._requests(node, operation)]
        refused = list(rtnetlink.send(self.sites[node].netlink, [request for _, request in batch]))
        if refused:
            raise BuildError(
                "\n".join(f"the kernel refused `{describe(batch[at][0])}`: {os.strerror(code)}" for at, code in refused)
            )

    def _do(self, node: str, operation: Operation) -> None:
        """Carry out an operation that is no netlink message."""
        match operation:
            case StopOffload(_, interface):
                # Segmentation offload goes with transmit checksumming (ethtool(8)).
                _ethtool(self.sites[node].netlink, interface, _ETHTOOL_STXCSUM, 0)
            case WaitReady():
                _wait_ready(node, self.sites[node])
            case Configure(_, settings):
                self.namespace(node).call(partial(_configure, node, settings))
            case RunCommand(_, command):
                self._run(node, command, f"the command {shlex.join(command)!r} of {node} failed")
            case LoadRules(_, command, text):
                self._run(node, command, f"{command[0]} refused the rules of {node}", text)
            case _:
                raise TypeError(f"{operation} is a matter of netlink")

    def _make_namespaces(self, operations: list[MakeNamespace]) -> None:
        """Make namespaces, two threads side by side, then what is in each.

        The kernel takes about a millisecond for a namespace, half of it under locks. Settings are written by one
        thread: two that share Python's lock wait longer for it than the writing takes.
        """
        made: dict[str, Site] = {}
        failures: list[Exception] = []
        nodes = iter([operation.node for operation in operations])
        # Each on processors of its own: the kernel has a thread that waited for Python's lock run where that was given
        # up, and there it waits again, until the other is done in the kernel.
        allowed = os.sched_getaffinity(0)
        here = {_libc.sched_getcpu()}
        makers = [
            threading.Thread(target=_make_sites, args=(processors, nodes, made, failures))
            for processors in (here, allowed - here or allowed)
        ]
        try:
            for maker in makers:
                maker.start()
            self._mark = namespace_mark()
            for maker in makers:
                maker.join()
        except RuntimeError as error:  # there can be no more threads
            raise BuildError(f"the lab could not be built: {error}") from error
        finally:
            _leave_out(nodes)
            for maker in makers:
                if maker.ident is not None:
                    maker.join()
            # In order, and ours to close before any failure is told.
            self.sites |= {operation.node: made[operation.node] for operation in operations if operation.node in made}
        if failures:
            raise failures[0]
        for operation in operations:
            self._made(self.namespace(operation.node))
        with returning():
            self.namespace(operations[0].node).enter()
            there = sysctl.already_there(operations[0].settings)  # and in all others: they begin alike
            for operation in operations:
                self.namespace(operation.node).enter()
                # Only the first are left out: what is written may change what comes later.
                _configure(operation.node, dropwhile(there.__contains__, operation.settings))

    def _run(self, node: str, command: Sequence[str], failed: str, text: str = "") -> None:
        """Run a command to its end, with a text to read; BuildError, `failed` and what it said, when it fails."""
        try:
            with self.namespace(node).entered():
                result = subprocess.run(
                    command,
                    input=text,
                    text=True,
                    errors="replace",
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    timeout=_COMMAND_PATIENCE,
                    check=False,
                )
        except OSError as error:
            raise BuildError(f"{failed}: {command[0]}: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{failed}: it took longer than {error.timeout:g} s") from error
        if result.returncode:
            raise BuildError(f"{failed}: {result.stdout.strip() or f'exit status {result.returncode}'}")

    def _requests(self, node: str, operation: Operation) -> list[rtnetlink.Request]:
        """The netlink messages of an operation; those that most labs have most of are looked for first."""
        indexes = self.sites[node].indexes
        match operation:
            case AddRoute(_, to, via):
                return [rtnetlink.route(to, via)]
            case AddAddress(_, interface, address):
                return [rtnetlink.address(indexes[interface], address)]
            case SetUp(_, interface):
                # Who finds a namespace sees at its lo whose it is (owner.py); in a plan, lo is up before anything runs.
                return [rtnetlink.up(indexes[interface], self._mark if interface == LOOPBACK else "")]
            case MakeLink():
                return [self._veth(operation)]
            case JoinBridge(_, interface):
                return [rtnetlink.join(indexes[interface], indexes[BRIDGE])]
            case MakeBridge():
                indexes[BRIDGE] = _BRIDGE_INDEX
                return [rtnetlink.bridge(BRIDGE, _BRIDGE_INDEX)]
            case Redirect(_, interface, to):
                return [tc.ingress(indexes[interface]), tc.redirect(indexes[interface], indexes[to])]
            case Impair(_, interface, sender, impairment, mtu):
                return impair.requests(indexes[interface], impairment, sender, mtu)
            case _:
                raise TypeError(f"{operation} is no matter of netlink")

    def _veth(self, operation: MakeLink) -> rtnetlink.Request:
        """A veth pair; indexes and MACs are ours, so that a lab looks the same each time."""
        left, right, index = operation.left, operation.right, operation.index
        self.sites[left.node].indexes[left.interface] = index
        self.sites[right.node].indexes[right.interface] = index + 1
        return rtnetlink.veth(
            left.interface,
            index,
            left.mac or automatic_mac(index),
            right.interface,
            index + 1,
            right.mac or automatic_mac(index + 1),
            self.namespace(right.node).fileno(),
            operation.mtu,
        )

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_sites(processors: set[int], nodes: Iterator[str], made: dict[str, Site], failures: list[Exception]) -> None:
    """Make the sites of nodes that no other thread has taken, in a thread that ends there."""
    try:
        with contextlib.suppress(OSError, ValueError):  # where it may not choose, or none is known, it is slower
            os.sched_setaffinity(0, processors)
        for node in nodes:
            made[node] = Site()
    except Exception as error:
        failures.append(error)
        _leave_out(nodes)


def _leave_out(nodes: Iterator[str]) -> None:
    """Have nobody make the sites of those that are left."""
    for _ in nodes:
        pass


def _place(operation: Operation) -> tuple[str | None, bool]:
    """The node inside which an operation is done, None for what makes the nodes; and whether netlink does it."""
    match operation:
        case MakeNamespace():
            return None, False
        case MakeLink(left):
            return left.node, True
        case _:
            return operation.node, isinstance(operation, NetlinkOperation)


def _ethtool(control: socket.socket, interface: str, command: int, value: int) -> int:
    """Give an ethtool command to an interface of the socket's namespace; returns the value that it leaves.

    Any socket will do: the kernel hands what a protocol does not know to the device (net/socket.c, sock_do_ioctl).
    """
    buffer = array.array("I", (command, value))
    address, _ = buffer.buffer_info()
    fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("16sP16x", interface.encode(), address))
    return buffer[1]


def _configure(node: str, settings: Iterable[Setting]) -> None:
    """Set sysctls of the namespace that this thread is in."""
    for key, value in settings:
        try:
            sysctl.write(key, value)
        except (OSError, UnicodeError) as error:
            raise BuildError(f"{key} = {value} in {node}: {error}") from error


def _wait_ready(node: str, site: Site) -> None:
    """Wait until every interface is operational and no IPv6 address tentative."""
    deadline = time.monotonic() + _PATIENCE
    while unready := _unready(site):
        if time.monotonic() > deadline:
            raise BuildError(f"{node} is not ready after {_PATIENCE:.0f} s: {', '.join(unready)}")
        time.sleep(_LOOK_AGAIN)


def _unready(site: Site) -> list[str]:
    """What keeps a node from passing traffic.

    The kernel makes a link operational late, in a worker; asked for the link by ethtool's way it does so at once
    (net/ethtool/ioctl.c, ethtool_op_get_link). An address is usable after that, late again.
    """
    interfaces = [interface for interface in site.indexes if interface != LOOPBACK]
    dead = [interface for interface in interfaces if not _ethtool(site.netlink, interface, _ETHTOOL_GLINK, 0)]
    return [
        *(f"{interface} is not operational" for interface in dead),
        *(f"{address} is tentative" for address in rtnetlink.tentative(site.netlink)),
    ]
