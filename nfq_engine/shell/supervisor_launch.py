"""Starts a program under a supervisor: `tproxyctl run -- PROGRAM`.

Owns: who is whose parent. The process that asks becomes the program, by exec: its pid, its parent, its terminal, its
signals and its exit status are the program's. Before that it starts the supervisor, which is nobody's child:

    caller ── fork ── forks again, ends ── supervisor   (own session; child of init or of the nearest subreaper)
       │   puts the filter on itself                 │
       │   tells the number of its listener ───────▶ takes it, makes the handler
       │ ◀──────────────────────────────── ready, or why not
    exec PROGRAM                                     answers until the last program under the filter is gone

The supervisor is not stopped by SIGTERM, SIGINT or SIGHUP: a service manager sends these to all processes of a
service, and the programs, which end in their own time, still need it. Killed by SIGKILL, it leaves the kernel to
answer: the calls that wait for it and all later ones fail with ENOSYS.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final, NoReturn

from nfq_engine.shell.seccomp import Listener, SocketOption, install_filter
from nfq_engine.shell.supervisor import Handler, Supervisor
from nfq_engine.shell.supervisor_caller import take_descriptor
from nfq_engine.shell.supervisor_receive import Receiver

_log = logging.getLogger(__name__)

_NUMBER: Final = Struct("=i")
_READY: Final = b"ready"
_MESSAGE_SIZE: Final = 4096
_IGNORED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Python ignores these; a program expects to be killed by them, and an ignored signal stays ignored over exec.
_PYTHON_IGNORES: Final = (signal.SIGPIPE, signal.SIGXFSZ)


class SupervisorError(Exception):
    """The supervisor did not come up; the text says why."""


@dataclass(frozen=True, slots=True)
class Supervision:
    """What a program's supervisor does: these options, and if there is a receiver, recvmsg for IP_RECVORIGADDRS.

    The functions that make handler and receiver are called in the supervisor, a process of its own, in the network
    namespace of the caller, with all descriptors closed and the standard streams at /dev/null: what they want to log
    to, they open.
    """

    options: frozenset[SocketOption]
    make_handler: Callable[[], Handler]
    make_receiver: Callable[[], Receiver] | None = None


def run_program(command: Sequence[str], supervision: Supervision) -> NoReturn:
    """Become a program under a supervisor. Does not return.

    The caller must have one thread only. Raises SeccompError or SupervisorError when no supervisor can be had, OSError
    when the program cannot be executed; the caller then carries the filter and had best exit.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        _start_supervisor(theirs, supervision)
        theirs.close()
        listener = install_filter(supervision.options, has_receiver=supervision.make_receiver is not None)
        ours.send(_NUMBER.pack(listener))
        answer = ours.recv(_MESSAGE_SIZE)
        os.close(listener)  # were it open with nobody there to answer, calls would wait for ever
    if answer != _READY:
        raise SupervisorError(answer.decode() or "it died before it was ready")
    for number in _PYTHON_IGNORES:
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], list(command))


def _start_supervisor(link: socket.socket, supervision: Supervision) -> None:
    """Fork a grandchild in a session of its own; it never comes back from here."""
    program = os.getpid()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            _supervise(link, program, supervision)
    except BaseException:
        _log.exception("the supervisor ends before its programs")
    finally:
        os._exit(0)


def _supervise(link: socket.socket, program: int, supervision: Supervision) -> None:
    """The supervisor's life."""
    _detach(keep=link.fileno())
    message = link.recv(_MESSAGE_SIZE)
    if not message:  # the caller got no filter
        return
    try:
        listener = _take_listener(program, *_NUMBER.unpack(message))
        receiver = supervision.make_receiver and supervision.make_receiver()
        supervisor = Supervisor(listener, supervision.options, supervision.make_handler(), receiver)
    except Exception as problem:
        link.send(f"{problem}"[:_MESSAGE_SIZE].encode())
        return
    link.send(_READY)
    link.close()
    supervisor.serve()


def _detach(keep: int) -> None:
    """Hold on to nothing of the caller's: descriptors (but one), folder, signals that are meant for others."""
    gc.freeze()  # objects of the caller must not close, when collected, numbers that are used anew
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


def _take_listener(program: int, number: int) -> Listener:
    """The program's own descriptor, taken the way its sockets will be: so a lack of rights shows before it runs."""
    pidfd = os.pidfd_open(program)
    try:
        return Listener(take_descriptor(pidfd, number))
    except PermissionError as problem:
        raise SupervisorError(
            "the supervisor may not take sockets from the program: "
            "CAP_SYS_PTRACE is missing, or kernel.yama.ptrace_scope is not 0, or a container forbids pidfd_getfd"
        ) from problem
    finally:
        os.close(pidfd)
