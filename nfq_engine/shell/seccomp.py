"""The seccomp filter that hands a few socket calls to a supervisor, and the kernel's interface around it.

Owns: which system calls are handed over, the BPF program that says so, its installation, the notification descriptor.
Must not know what the options mean or who answers (supervisor.py). Place in the path: none; programs come this way to
the socket API (core/sockopt.py).

Rules that hold here:
- A call that is not handed over is allowed, whatever it is: this filter is no sandbox.
- The filter is a decision tree, a value; `filter_tree` makes it and `assemble` turns it into the kernel's instructions.
- A foreign system call table (x32, 32-bit ARM) is allowed as it is: its programs see a kernel without tproxy.

The kernel skips the filter for a system call that it allows whatever the arguments (its 'action cache', Linux 5.11), so
only calls with the numbers of setsockopt and getsockopt pay for the tree at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from struct import Struct
from typing import Final

from nfq_engine.core.option import IP_RECVORIGADDRS, IP_TPROXY

SOL_IP: Final = 0
SOL_IPV6: Final = 41
SO_ORIGINAL_DST: Final = 80  # the same number at both levels


class Direction(Enum):
    """Which of the two calls: getsockopt or setsockopt."""

    GET = auto()
    SET = auto()


@dataclass(frozen=True, slots=True)
class SocketOption:
    """One option in one direction: what the filter can hand over."""

    direction: Direction
    level: int
    option: int


TPROXY_OPTIONS: Final = frozenset(
    SocketOption(direction, SOL_IP, option) for direction in Direction for option in (IP_TPROXY, IP_RECVORIGADDRS)
)
ORIGINAL_DST_OPTIONS: Final = frozenset(
    SocketOption(Direction.GET, level, SO_ORIGINAL_DST) for level in (SOL_IP, SOL_IPV6)
)


class Architecture(IntEnum):
    """The kernel's names of system call tables (AUDIT_ARCH_*, linux/audit.h)."""

    X86_64 = 0xC000003E
    I386 = 0x40000003
    AARCH64 = 0xC00000B7


@dataclass(frozen=True, slots=True)
class CallTable:
    """The numbers of one system call table that matter here; None: its programs do not get this.

    `socketcall`: i386 programs older than glibc 2.23 make every socket call through this one, the arguments in memory
    where no filter sees them; so all its getsockopt and setsockopt calls are handed over, and the supervisor lets go on
    those that are not ours. `recvmsg` and `recvmmsg` are handed over only where a program is to receive datagrams with
    their original addresses.
    """

    architecture: Architecture
    getsockopt: int
    setsockopt: int
    socketcall: int | None = None
    recvmsg: int | None = None
    recvmmsg: int | None = None


_X86_64: Final = CallTable(Architecture.X86_64, getsockopt=55, setsockopt=54, recvmsg=47, recvmmsg=299)
_I386: Final = CallTable(Architecture.I386, getsockopt=365, setsockopt=366, socketcall=102)
_AARCH64: Final = CallTable(Architecture.AARCH64, getsockopt=209, setsockopt=208, recvmsg=212, recvmmsg=243)

SOCKETCALLS: Final = {14: Direction.SET, 15: Direction.GET}  # linux/net.h

# Per machine (`uname -m`): the tables that its programs may use, and the number of seccomp(2) itself.
_MACHINES: Final = {
    "x86_64": ((_X86_64, _I386), 317),
    "aarch64": ((_AARCH64,), 277),
}


class SeccompError(Exception):
    """The filter cannot be installed; the text says why and what would help."""


# The filter as a value


class Action(IntEnum):
    """What the kernel does with a call (SECCOMP_RET_*)."""

    ALLOW = 0x7FFF0000
    NOTIFY = 0x7FC00000


@dataclass(frozen=True, slots=True)
class Switch:
    """Look at one 32-bit word of `struct seccomp_data`; an unlisted value means the call is allowed."""

    offset: int
    cases: tuple[tuple[int, Tree], ...]


Tree = Switch | Action

NUMBER_AT: Final = 0
ARCHITECTURE_AT: Final = 4


def argument_at(index: int) -> int:
    """Where an argument's lower 32 bits are; all machines above are little-endian, and `int` is all that we look at."""
    return 16 + 8 * index


def filter_tree(options: Iterable[SocketOption], machine: str, *, has_receiver: bool = False) -> Tree:
    """The decision for each call of a program on this machine (`uname -m`); KeyError for one not in the table.

    `has_receiver`: recvmsg and recvmmsg are handed over too.
    """
    options = frozenset(options)
    tables, _ = _MACHINES[machine]
    return Switch(
        ARCHITECTURE_AT, tuple((table.architecture, _table_tree(options, table, has_receiver)) for table in tables)
    )


def _table_tree(options: frozenset[SocketOption], table: CallTable, has_receiver: bool) -> Tree:
    """The decision within one system call table."""
    cases: list[tuple[int, Tree]] = [
        (table.getsockopt, _option_tree(options, Direction.GET)),
        (table.setsockopt, _option_tree(options, Direction.SET)),
    ]
    if table.socketcall is not None:
        cases.append((table.socketcall, Switch(argument_at(0), tuple((call, Action.NOTIFY) for call in SOCKETCALLS))))
    if has_receiver:
        cases += [(number, Action.NOTIFY) for number in (table.recvmsg, table.recvmmsg) if number is not None]
    return Switch(NUMBER_AT, tuple(cases))


def _option_tree(options: frozenset[SocketOption], direction: Direction) -> Tree:
    """The decision by level and option."""
    wanted = [option for option in options if option.direction is direction]
    levels = sorted({option.level for option in wanted})
    return Switch(
        argument_at(1),
        tuple(
            (
                level,
                Switch(
                    argument_at(2),
                    tuple((number, Action.NOTIFY) for number in sorted(o.option for o in wanted if o.level == level)),
                ),
            )
            for level in levels
        ),
    )


_INSTRUCTION: Final = Struct("=HBBI")
_LOAD_WORD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K


def assemble(tree: Tree) -> bytes:
    """The kernel's instructions for a tree (struct sock_filter, one after another)."""
    if isinstance(tree, Action):
        return _INSTRUCTION.pack(_RETURN, 0, 0, tree)
    code = _INSTRUCTION.pack(_LOAD_WORD, 0, 0, tree.offset)
    for value, branch in tree.cases:
        body = assemble(branch)  # every way through it ends in a return
        code += _INSTRUCTION.pack(_JUMP_IF_EQUAL, 0, len(body) // _INSTRUCTION.size, value) + body
    return code + assemble(Action.ALLOW)


# Installation

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_SET_MODE_FILTER: Final = 1
_FLAG_SPEC_ALLOW: Final = 1 << 2  # no sandbox: do not slow the program down with mitigations meant for one
_FLAG_NEW_LISTENER: Final = 1 << 3
# Linux 5.19: only a fatal signal ends a call that the supervisor has taken on. Without it any signal may, even one that
# comes with the answer: the kernel then takes the answer, and has the program make the call again all the same.
_FLAG_WAIT_KILLABLE: Final = 1 << 5


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install_filter(options: Iterable[SocketOption], *, has_receiver: bool = False) -> int:
    """Put the filter on the calling thread, and with it on all it will start; it can never be taken off.

    Returns the notification descriptor (close-on-exec). A caller without CAP_SYS_ADMIN gives up, for all that it will
    start, to gain rights by exec of a set-user-id file (PR_SET_NO_NEW_PRIVS): the kernel's condition. Raises
    SeccompError.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        raise SeccompError(f"no filter for machine {machine!r}; there is one for {', '.join(sorted(_MACHINES))}")
    code = assemble(filter_tree(options, machine, has_receiver=has_receiver))
    program = _FilterProgram(len(code) // _INSTRUCTION.size, code)
    flags = _FLAG_NEW_LISTENER | _FLAG_SPEC_ALLOW
    for attempt in (flags | _FLAG_WAIT_KILLABLE, flags):
        listener = _seccomp(machine, attempt, program)
        if listener == -errno.EACCES:
            _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            listener = _seccomp(machine, attempt, program)
        if listener != -errno.EINVAL:
            break
    if listener == -errno.EBUSY:
        raise SeccompError("this process already runs under a supervisor; the kernel allows one")
    if listener < 0:
        raise SeccompError(f"seccomp user notification is refused (Linux 5.6 is needed): {os.strerror(-listener)}")
    return listener


def _seccomp(machine: str, flags: int, program: _FilterProgram) -> int:
    """seccomp(SET_MODE_FILTER): a descriptor, or a negative errno."""
    number = _MACHINES[machine][1]
    result: int = _libc.syscall(number, _SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(program))
    return result if result >= 0 else -ctypes.get_errno()


# Notifications

_NOTIFICATION: Final = Struct("=QIIiIQ6Q")  # struct seccomp_notif
_RESPONSE: Final = Struct("=QqiI")  # struct seccomp_notif_resp
_ID: Final = Struct("=Q")


def _ioctl_number(direction: int, number: int, size: int) -> int:
    """_IOC() of the notification descriptor; direction 1 writes to the kernel, 2 reads from it."""
    return direction << 30 | size << 16 | ord("!") << 8 | number


_RECEIVE: Final = _ioctl_number(3, 0, _NOTIFICATION.size)
_SEND: Final = _ioctl_number(3, 1, _RESPONSE.size)
_IS_VALID: Final = _ioctl_number(1, 2, _ID.size)
_SET_FLAGS: Final = _ioctl_number(1, 4, _ID.size)
_SYNC_WAKE_UP: Final = 1
_CONTINUE: Final = 1

_by_architecture: Final = {table.architecture.value: table for tables, _ in _MACHINES.values() for table in tables}


@dataclass(frozen=True, slots=True)
class Notification:
    """A call that waits for an answer: the kernel's id of it, the thread, and the call."""

    id: int
    thread: int
    table: CallTable
    number: int
    arguments: tuple[int, ...]


class Listener:
    """The notification descriptor of one filter. Owns the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # Linux 6.6: program and supervisor take turns, so one processor is enough
            fcntl.ioctl(descriptor, _SET_FLAGS, _SYNC_WAKE_UP)

    def fileno(self) -> int:
        """To poll: POLLIN when a call waits, POLLHUP when the last program under the filter is gone."""
        return self._descriptor

    def close(self) -> None:
        """Give it up: calls that wait, and all later ones, fail with ENOSYS."""
        os.close(self._descriptor)

    def receive(self) -> Notification | None:
        """Take on the next call; waits for one. None when its thread was killed or interrupted meanwhile."""
        buffer = bytearray(_NOTIFICATION.size)  # the kernel insists on zeroes
        if not self._ioctl(_RECEIVE, buffer):
            return None
        identity, thread, _, number, architecture, _, *arguments = _NOTIFICATION.unpack(buffer)
        return Notification(identity, thread, _by_architecture[architecture], number, tuple(arguments))

    def is_waiting(self, notification: Notification) -> bool:
        """Does the thread still wait for this answer? What was opened before, by its number, is then truly its own."""
        return self._ioctl(_IS_VALID, bytearray(_ID.pack(notification.id)))

    def answer(self, notification: Notification, error: int, value: int = 0) -> bool:
        """End the call with an errno, or, if that is 0, with a value; False when nobody waits for it any more."""
        return self._ioctl(_SEND, bytearray(_RESPONSE.pack(notification.id, 0 if error else value, -error, 0)))

    def let_go_on(self, notification: Notification) -> None:
        """Let the kernel do the call as if there were no filter."""
        self._ioctl(_SEND, bytearray(_RESPONSE.pack(notification.id, 0, 0, _CONTINUE)))

    def _ioctl(self, request: int, buffer: bytearray) -> bool:
        """True; or False when the kernel no longer knows the call."""
        try:
            fcntl.ioctl(self._descriptor, request, buffer)
        except FileNotFoundError:
            return False
        return True
