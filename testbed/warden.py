"""The warden of a lab: a process that outlives it by a moment, and removes what it left.

Owns: the end of a lab's processes, however the lab ends; SIGKILL is no exception. It reads from its standard input what
it is responsible for, words and descriptors of namespaces, until that closes or the lab's process is gone. Then it
kills every process whose network namespace is one of the lab's (any number of forks, sessions and users away from it),
removes the lab's temporary folders, and has the kernel give up its connections. It prints what it had to kill.

Runs as a script with the bare interpreter, which starts in 20 ms; so it imports nothing of ours, and what only the end
needs it imports then.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time

PATIENCE = 5.0  # seconds for killed processes to be gone
KEPT = "kept"  # owner.py
CLONE_NEWNET = 0x40000000  # linux/sched.h
_MOST_DESCRIPTORS = 64  # that come with one message; the lab sends one

Namespace = tuple[int, int]  # device and inode of /proc/PID/ns/net


class Warden:
    """What one lab may leave behind."""

    def __init__(self, lab: int, ended: int) -> None:
        """`lab`: its process. `ended`: a pidfd of that, opened by itself: the right one however late we start."""
        self.lab = lab
        self.ended = ended
        self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        # Held open: the number of a namespace that is gone is soon that of another lab's.
        self.namespaces: dict[Namespace, int] = {}
        self.folders: list[str] = []
        self.killed: dict[int, str] = {}

    def listen(self) -> None:
        """Take words and namespaces until the lab closes its end or is gone."""
        words = b""
        told = socket.socket(fileno=0)
        news = select.poll()  # select() takes no descriptor above 1023
        for descriptor in (0, self.ended):
            news.register(descriptor, select.POLLIN)
        while True:
            if 0 in dict(news.poll()):
                read, descriptors, _, _ = socket.recv_fds(told, 1 << 16, _MOST_DESCRIPTORS)
                for descriptor in descriptors:
                    self.hold(descriptor)
                words += read
                *lines, words = words.split(b"\n")
                for line in lines:
                    self.take(line.decode())
                if not read:
                    return
            else:
                return  # a child that the lab forked may hold the other end open for long

    def hold(self, descriptor: int) -> None:
        """A namespace that is the lab's."""
        status = os.fstat(descriptor)
        self.namespaces[status.st_dev, status.st_ino] = descriptor

    def take(self, line: str) -> None:
        """`folder PATH`, or `release`: all that was told so far is somebody else's now."""
        kind, _, rest = line.partition(" ")
        if kind == "folder":
            self.folders.append(rest)
        elif kind == "release":
            for descriptor in self.namespaces.values():
                os.close(descriptor)
            self.namespaces.clear()
            self.folders.clear()

    def clean(self) -> None:
        """Kill until nothing is left, then remove the folders, but those that are to stay; last, connections."""
        deadline = time.monotonic() + PATIENCE
        while self.kill_all(deadline) and time.monotonic() < deadline:
            pass
        if folders := [folder for folder in self.folders if not os.access(f"{folder}/{KEPT}", os.F_OK)]:
            import shutil

            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        if self.namespaces:
            import threading

            # /proc shows where a process's first thread is, and whoever is seen inside a lab is killed with it.
            entering = threading.Thread(target=self.give_up_connections)
            entering.start()
            entering.join()

    def give_up_connections(self) -> None:
        """Let TCP ask just once more where no program is left: it would ask for 100 s, and keep the namespace.

        That is how long the other end, which is perhaps no more, has to answer (tcp(7), tcp_orphan_retries). Where it
        has been silent for long already, the next time that it is asked is as far away.
        """
        import ctypes

        setns = ctypes.CDLL(None).setns
        for descriptor in self.namespaces.values():
            if setns(descriptor, CLONE_NEWNET) == 0:
                with contextlib.suppress(OSError):
                    setting = os.open("sys/net/ipv4/tcp_orphan_retries", os.O_WRONLY, dir_fd=self.proc)
                    try:
                        os.write(setting, b"1")
                    finally:
                        os.close(setting)

    def kill_all(self, deadline: float) -> bool:
        """Kill what is there now and wait for its end; false when nothing was."""
        dying = []
        for pid in [entry.name for entry in os.scandir(self.proc) if entry.name.isdigit()]:
            if int(pid) not in (self.lab, os.getpid()) and self.is_inside(pid):
                with contextlib.suppress(OSError):
                    dying += self.kill(pid)
        for descriptor in dying:
            end = select.poll()
            end.register(descriptor, select.POLLIN)
            end.poll(max(0.0, deadline - time.monotonic()) * 1000)
            os.close(descriptor)
        return bool(dying)

    def kill(self, pid: str) -> list[int]:
        """Kill a process, and give its pidfd, if it is still the one that is inside and not another with its number."""
        descriptor = os.pidfd_open(int(pid))
        try:
            name = self.name(pid)
            if self.is_inside(pid):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                self.killed[int(pid)] = name
                return [descriptor]
        except OSError:  # it has ended
            pass
        os.close(descriptor)
        return []

    def is_inside(self, pid: str) -> bool:
        """Whether a process is in a namespace of the lab; a zombie is in none."""
        try:
            status = os.stat(f"{pid}/ns/net", dir_fd=self.proc)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) in self.namespaces

    def name(self, pid: str) -> str:
        """What a process calls itself."""
        file = os.open(f"{pid}/comm", os.O_RDONLY, dir_fd=self.proc)
        try:
            return os.read(file, 64).decode(errors="replace").strip()
        finally:
            os.close(file)


def main() -> None:
    """`warden.py PID PIDFD`: watch over the lab of that process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    warden = Warden(int(sys.argv[1]), int(sys.argv[2]))
    warden.listen()
    warden.clean()
    with contextlib.suppress(BrokenPipeError):
        os.write(1, "".join(f"{name} (pid {pid})\n" for pid, name in warden.killed.items()).encode())


if __name__ == "__main__":
    main()
