"""Datagrams with their original addresses: recvmsg under the supervisor, beside what the kernel itself does."""

import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor_runs import (
    ASSIGN,
    CONNECT,
    IP_RECVORIGADDRS,
    IP_TPROXY,
    ITP_ESTABLISHED,
    ITP_LISTEN,
    ITP_UNIDIR,
    TIMEOUT,
    Start,
    address_argument,
    flags_argument,
    wait_until,
)

pytestmark = [pytest.mark.lab, pytest.mark.needs("seccomp-notify")]
pytest_plugins = ["supervisor_fixtures"]

RECVMSG = {"x86_64": 47, "aarch64": 212}[platform.machine()]
ORIGINAL = ("198.51.100.9", 53)


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        made.settimeout(TIMEOUT)
        yield made


def test_a_udp_listener_learns_where_a_datagram_was_sent_to(start: Start, peer: socket.socket) -> None:
    run = start("udp_listener", "127.0.0.1", 0, original=ORIGINAL)
    peer.sendto(b"are you there?", ("127.0.0.1", int(run.line().rpartition(":")[2])))
    assert peer.recv(100) == b"are you there?"
    peer_port = peer.getsockname()[1]
    assert run.output() == f"source 127.0.0.1:{peer_port}\ndestination 198.51.100.9:53\n"
    assert [(call["option"], call["value"][:20]) for call in run.calls()] == [
        (IP_RECVORIGADDRS, "01000000"),
        (IP_TPROXY, flags_argument(ITP_LISTEN | ITP_UNIDIR) + "0000"),
        (IP_TPROXY, address_argument(ASSIGN, *ORIGINAL)),
        (IP_TPROXY, address_argument(CONNECT, "127.0.0.1", peer_port)),
        (IP_TPROXY, flags_argument(ITP_ESTABLISHED) + "0000"),
    ]


def test_a_datagram_of_unknown_origin_comes_without_addresses(start: Start, peer: socket.socket) -> None:
    run = start("udp_listener", "127.0.0.1", 0, original=ORIGINAL, unknown=peer.getsockname()[1])
    peer.sendto(b"are you there?", ("127.0.0.1", int(run.line().rpartition(":")[2])))
    assert run.output() == "no original addresses\n"


def test_recvmsg_does_all_that_the_kernel_s_does(start: Start, programs: Path) -> None:
    run = start("receive", original=ORIGINAL)
    supervised = run.output().replace("198.51.100.9:53", "127.0.0.1:0")
    kernel = subprocess.run(
        [programs / "receive_by_kernel"], capture_output=True, text=True, check=True, timeout=TIMEOUT
    )
    assert supervised == kernel.stdout
    first, *_, last = run.calls()
    assert first["descriptors"] == last["descriptors"]


def test_signals_do_not_double_a_call(start: Start) -> None:
    run = start("signalled", 100, original=ORIGINAL)
    assert run.output().split() == ["calls", str(len(run.calls())), "failed", "0"]


def test_a_signal_that_comes_with_the_answer_does_not_double_a_call(start: Start) -> None:
    """Without WAIT_KILLABLE_RECV, the kernel took the answer and restarted the call, 3 times in 10,000."""
    run = start("signalled", 4000, original=ORIGINAL, rules=[{"signal": signal.SIGALRM}])
    assert run.output().split() == ["calls", str(len(run.calls())), "failed", "0"]


def test_signals_end_a_recvmsg_as_the_kernel_s(start: Start, programs: Path) -> None:
    run = start("interrupted", original=ORIGINAL)
    supervised = run.output()
    kernel = subprocess.run(
        [programs / "interrupted_by_kernel"], capture_output=True, text=True, check=True, timeout=TIMEOUT
    )
    assert supervised == kernel.stdout


def waits_in_recvmsg(pid: int) -> bool:
    return Path(f"/proc/{pid}/syscall").read_text().startswith(f"{RECVMSG} ")


@pytest.mark.parametrize("threads", ["alone", "threads"])
def test_a_program_is_stopped_and_goes_on_while_it_waits_for_a_datagram(
    start: Start, peer: socket.socket, threads: str
) -> None:
    run = start("interrupted", threads, original=ORIGINAL)
    port = int(run.line().rpartition(":")[2])
    wait_until(lambda: waits_in_recvmsg(run.process.pid), "the program waits for a datagram")
    run.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: os.waitid(os.P_PID, run.process.pid, os.WSTOPPED | os.WNOHANG), "all threads of it stop")
    peer.sendto(b"late", ("127.0.0.1", port))
    run.process.send_signal(signal.SIGCONT)
    assert run.output() == "stopped late with-addresses\n"


ERROR_QUEUE_UNREAD = """
import socket, sys
ip_recverr = 11
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_IP, ip_recverr, 1)
sock.setsockopt(socket.SOL_IP, 11273, 1)
sock.connect(("127.0.0.1", int(sys.argv[1])))
sock.send(b"refused")
try:
    sock.recvmsg(100, 100)
except ConnectionRefusedError:
    print(sock.getsockname()[1], flush=True)
data, controls, _, _ = sock.recvmsg(100, 100)
print(data.decode(), len(controls))
"""


def test_an_error_queue_that_nobody_reads_keeps_nobody_busy(start: Start, peer: socket.socket) -> None:
    port = peer.getsockname()[1]
    peer.close()
    run = start(sys.executable, "-c", ERROR_QUEUE_UNREAD, port, original=ORIGINAL)
    own_port = int(run.line())
    wait_until(lambda: waits_in_recvmsg(run.process.pid), "the program waits for a datagram")
    fields = Path(f"/proc/{run.supervisor()}/stat")
    begin, ticks = time.monotonic(), ticks_of(fields)
    wait_until(lambda: time.monotonic() > begin + 0.5, "half a second goes by")
    assert ticks_of(fields) - ticks < 0.25 * os.sysconf("SC_CLK_TCK")  # half of it, were the supervisor busy
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as late:
        late.bind(("127.0.0.1", port))
        late.sendto(b"late", ("127.0.0.1", own_port))
        assert run.output() == "late 1\n"


def ticks_of(stat: Path) -> int:
    """Processor time, as /proc/PID/stat tells it."""
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


def test_a_program_killed_while_it_waits_for_a_datagram(start: Start) -> None:
    run = start("udp_listener", "127.0.0.1", 0, original=ORIGINAL)
    run.line()
    run.process.kill()  # `start` sees that the supervisor ends
    assert run.output() == ""


def test_a_supervisor_killed_while_a_program_waits_for_a_datagram(start: Start) -> None:
    run = start("udp_listener", "127.0.0.1", 0, original=ORIGINAL)
    run.line()
    wait_until(lambda: waits_in_recvmsg(run.process.pid), "the program waits for a datagram")
    os.kill(run.supervisor(), signal.SIGKILL)
    assert run.output() == "recvmsg: ENOSYS\n"
