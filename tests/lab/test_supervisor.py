"""Real programs under the supervisor: what reaches the handler, what reaches the program, who outlives whom."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from struct import pack

import pytest
from supervisor_runs import (
    ALLOC,
    ASSIGN,
    CONNECT,
    HARNESS,
    IP_TPROXY,
    ITP_CONNECT,
    ITP_LISTEN,
    ITP_ONCE,
    QUERY,
    ROOT,
    SO_ORIGINAL_DST,
    SOURCES,
    TIMEOUT,
    UNASSIGN,
    Start,
    address_argument,
    compile_c,
    flags_argument,
    wait_until,
)

pytestmark = [pytest.mark.lab, pytest.mark.needs("seccomp-notify")]
pytest_plugins = ["supervisor_fixtures"]

NOBODY = 65534


def answer_hello(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        assert connection.recv(100) == b"hello\n"
        connection.sendall(b"good day\n")


# What programs did, and what came of it


@pytest.mark.parametrize(
    ("program", "arguments", "expected"),
    [
        pytest.param(
            "squid_connect",
            ["192.0.2.7"],
            [address_argument(ASSIGN, "192.0.2.7", 0), flags_argument(ITP_CONNECT)],
            id="squid-from-the-client's-address",
        ),
        pytest.param(
            "haproxy_connect",
            ["192.0.2.7", "40000"],
            [address_argument(ASSIGN, "192.0.2.7", 40000), flags_argument(ITP_CONNECT | ITP_ONCE)],
            id="haproxy-with-the-client's-port",
        ),
        pytest.param(
            "zorp_connect",
            ["192.0.2.7", "40000"],
            [address_argument(ASSIGN, "192.0.2.7", 40000), "SERVER", flags_argument(ITP_CONNECT)],
            id="zorp-narrowed-to-a-peer",
        ),
    ],
)
def test_a_connecting_program_s_calls_reach_the_handler(
    start: Start, server: socket.socket, program: str, arguments: list[str], expected: list[str]
) -> None:
    port = server.getsockname()[1]
    run = start(program, "127.0.0.1", *arguments, "127.0.0.1", port)
    answer_hello(server)
    assert run.output() == "answer good day\n"
    wanted = [address_argument(CONNECT, "127.0.0.1", port) if call == "SERVER" else call for call in expected]
    assert [call["value"][: len(value)] for call, value in zip(run.calls(), wanted, strict=True)] == wanted
    assert {(call["direction"], call["level"], call["option"], call["pid"]) for call in run.calls()} == {
        ("SET", 0, IP_TPROXY, run.process.pid)
    }


def test_a_foreign_listener_serves_after_its_calls(start: Start) -> None:
    run = start("zorp_listener", "127.0.0.1", 0, "192.0.2.7", 80)
    port = int(run.line().rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as client:
        client.sendall(b"there and back")
        assert client.recv(100) == b"there and back"
    assert run.output().startswith("peer 127.0.0.1:")
    wanted = [address_argument(ASSIGN, "192.0.2.7", 80), flags_argument(ITP_LISTEN)]
    assert [call["value"][: len(value)] for call, value in zip(run.calls(), wanted, strict=True)] == wanted


def test_values_come_back_from_getsockopt(start: Start) -> None:
    rules = [{"direction": "GET", "op": QUERY, "value": address_argument(QUERY, "192.0.2.7", 8080) + "0000"}]
    run = start("foreign_name", "127.0.0.1", "192.0.2.7", rules=rules)
    assert run.output() == "assigned 192.0.2.7:8080\nallocated 192.0.2.7:8080\nunassigned still there\n"
    operations = [(call["direction"], call["op"]) for call in run.calls()]
    assert operations == [
        ("SET", ASSIGN),
        ("GET", QUERY),
        ("SET", ALLOC),
        ("GET", QUERY),
        ("SET", UNASSIGN),
        ("GET", QUERY),
    ]


def test_the_original_destination_comes_from_the_handler_when_asked_for(start: Start) -> None:
    value = pack("=H", socket.AF_INET) + pack("!H", 80) + socket.inet_aton("198.51.100.9") + bytes(8)
    rules = [{"option": SO_ORIGINAL_DST, "value": value.hex()}]
    run = start("original_destination", "127.0.0.1", 0, rules=rules, original_dst=True)
    port = int(run.line().rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), TIMEOUT):
        assert run.line() == "destination 198.51.100.9:80"
    assert [(call["direction"], call["option"], call["length"]) for call in run.calls()] == [
        ("GET", SO_ORIGINAL_DST, 16)
    ]


def test_the_original_destination_comes_from_the_kernel_when_not(start: Start) -> None:
    run = start("original_destination", "127.0.0.1", 0)
    port = int(run.line().rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), TIMEOUT):
        assert run.line().startswith("SO_ORIGINAL_DST: ENO")
    assert run.calls() == []


@pytest.mark.parametrize(
    "error",
    ["EPERM", "ENOENT", "EFAULT", "EEXIST", "EINVAL", "ENOPROTOOPT", "EADDRINUSE"],
)
def test_an_errno_reaches_the_program(start: Start, error: str) -> None:
    rules = [{"direction": "SET", "op": ASSIGN, "error": getattr(errno, error)}]
    assert start("foreign_name", "127.0.0.1", "192.0.2.7", rules=rules).output() == f"ASSIGN: {error}\n"


EDGES = """\
set OK
set-closed EBADF
set-minus-one EBADF
set-file ENOTSOCK
set-path EBADF
set-null EFAULT
set-kernel-address EFAULT
set-negative-length EINVAL
set-empty OK
set-short OK
set-large OK
set-ends-with-page OK
set-claims-beyond-page OK
set-crosses-page EFAULT
get OK 12
get-closed EBADF 12
get-room-for-eight OK 8
get-room-for-much OK 24
get-negative-length EINVAL -5
get-null EFAULT 12
get-null-length EFAULT
get-bad-length EFAULT
other-option OK
other-option-get OK
other-option-value 1
other-level OK
other-level-same-number ENOPROTOOPT
other-option-closed EBADF
"""


@pytest.mark.parametrize("program", ["sockopt_edges", "sockopt_edges_static"])
def test_bad_calls_get_a_kernel_s_errno_and_other_options_are_untouched(start: Start, program: str) -> None:
    run = start(program)
    assert run.output() == EDGES
    calls = [(call["direction"], call["length"], len(call["value"]) // 2) for call in run.calls()]
    lengths_of_set = [
        ("SET", 12, 12),
        ("SET", 0, 0),
        ("SET", 7, 7),
        ("SET", 4096, 24),
        ("SET", 12, 12),
        ("SET", 4096, 12),
    ]
    assert calls == [*lengths_of_set, ("GET", 12, 12), ("GET", 8, 8), ("GET", 4096, 24)]
    assert len({call["descriptors"] for call in run.calls()}) == 1


def test_a_handler_that_fails_is_an_error_of_that_call_only(start: Start) -> None:
    rules = [{"op": ASSIGN, "fails": "a bug"}]
    assert start("foreign_name", "127.0.0.1", "192.0.2.7", rules=rules).output() == "ASSIGN: EIO\n"


# All kinds of programs


def test_threads_and_children_are_all_answered(start: Start) -> None:
    run = start("many_callers")
    assert run.output() == "failed 0 of 800\n"
    calls = run.calls()
    assert len(calls) == 800
    assert len({call["pid"] for call in calls}) == 9  # the process itself and its eight children
    assert len({call["descriptors"] for call in calls}) == 1


def test_several_programs_at_once(start: Start) -> None:
    runs = [start("many_callers") for _ in range(4)]
    assert [run.output() for run in runs] == ["failed 0 of 800\n"] * 4
    assert len({run.supervisor() for run in runs}) == 4


def test_a_thread_with_descriptors_of_its_own(start: Start) -> None:
    try:
        os.close(os.pidfd_open(os.getpid(), os.O_EXCL))
    except OSError:
        pytest.skip("the kernel has no pidfd of a thread (Linux 6.9)")
    assert start("private_descriptors").output() == "done\n"


def test_a_32_bit_program(start: Start, programs: Path) -> None:
    target = programs / "socketcall_i386"
    compile_c(
        "socketcall_i386.c", target, "-m32", "-nostdlib", "-static", "-fno-stack-protector", "-no-pie", "-fno-pie"
    )
    try:
        subprocess.run([target], check=False)
    except OSError as problem:
        pytest.skip(f"the kernel runs no 32-bit programs: {problem}")
    run = start(str(target))
    assert run.output() == ""
    assert run.process.returncode == 0
    assert [(call["direction"], call["option"]) for call in run.calls()] == [("SET", IP_TPROXY)] * 2 + [
        ("GET", IP_TPROXY)
    ] * 2


def test_a_static_rust_program(start: Start, programs: Path) -> None:
    compiler = shutil.which("rustc")
    if compiler is None:
        pytest.skip("rustc is not installed")
    target = programs / "static_client"
    source = str(SOURCES / "static_client.rs")
    subprocess.run([compiler, "-C", "target-feature=+crt-static", "-o", target, source], check=True)
    run = start(str(target))
    assert run.output() == "ASSIGN 0\n"
    assert [call["value"][:20] for call in run.calls()] == [address_argument(ASSIGN, "192.0.2.7", 80)]


def test_signals_neither_break_nor_double_a_call(start: Start) -> None:
    run = start("signalled", 100)
    words = run.output().split()
    assert words == ["calls", str(len(run.calls())), "failed", "0"]


def test_ten_thousand_calls_leak_nothing(start: Start) -> None:
    run = start("flood", 10_000)
    assert run.output() == "failed 0 -\n"
    calls = run.calls()
    assert len(calls) == 10_000
    assert len({call["descriptors"] for call in calls}) == 1


# Rights


@pytest.mark.parametrize(
    ("wrapper", "prefix", "is_privileged"),
    [
        pytest.param((), (), True, id="root"),
        pytest.param(
            (), ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"), False, id="root-without-it"
        ),
        pytest.param(
            (), ("setpriv", "--reuid=nobody"), False, id="dropped-to-a-user", marks=pytest.mark.needs("other-users")
        ),
        pytest.param((), ("unshare", "--user", "--map-root-user"), False, id="root-of-a-user-namespace-of-its-own"),
        pytest.param(("unshare", "--user", "--map-root-user", "--net"), (), True, id="all-in-a-user-namespace"),
        pytest.param(("unshare", "--user", "--map-root-user"), (), False, id="in-one-without-a-network-of-its-own"),
        pytest.param(("unshare", "--net"), (), True, id="in-a-network-namespace"),
    ],
)
def test_who_may_administer_the_network(
    start: Start, programs: Path, wrapper: tuple[str, ...], prefix: tuple[str, ...], is_privileged: bool
) -> None:
    run = start(*prefix, str(programs / "flood"), 1, wrapper=wrapper)
    assert run.output() == "failed 0 -\n"
    assert [call["is_privileged"] for call in run.calls()] == [is_privileged]


@pytest.mark.needs("other-users")
def test_it_works_for_an_unprivileged_user(start: Start) -> None:
    run = start("flood", 1, uid=NOBODY)
    assert run.output() == "failed 0 -\n"
    assert [(call["uid"], call["is_privileged"]) for call in run.calls()] == [(NOBODY, False)]


# Who outlives whom


LOOK_AROUND = """
read -r children < /proc/$$/task/$$/children
echo "$PPID" "$PWD" "children: $children"
umask; ulimit -a
grep -E '^(Sig[^Q]|ShdPnd|NoNewPrivs|CapEff|CapBnd|Specul|PPid|NSsid|NSpgid)' /proc/$$/status | sed "s/\\b$$\\b/self/"
ls /proc/$$/fd
"""


def test_a_program_finds_itself_as_if_started_without_supervisor(start: Start) -> None:
    plain = subprocess.run(["sh", "-c", LOOK_AROUND], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert start("sh", "-c", LOOK_AROUND).output() == plain.stdout


@pytest.mark.parametrize(
    ("script", "status"),
    [
        pytest.param("exit 0", 0, id="success"),
        pytest.param("exit 7", 7, id="a-status"),
        pytest.param("kill -TERM $$", -signal.SIGTERM, id="a-signal"),
        pytest.param("kill -PIPE $$", -signal.SIGPIPE, id="a-signal-that-python-ignores"),
    ],
)
def test_pid_and_exit_status_are_the_program_s(start: Start, script: str, status: int) -> None:
    run = start("sh", "-c", f"echo $$; {script}")
    assert run.output() == f"{run.process.pid}\n"
    assert run.process.returncode == status


def test_the_supervisor_stays_for_a_program_in_the_background(start: Start, programs: Path) -> None:
    run = start("sh", "-c", f"{programs}/zorp_listener 127.0.0.1 0 192.0.2.7 80 &")
    assert run.process.wait(TIMEOUT) == 0
    port = int(run.line().rpartition(":")[2])
    os.kill(run.supervisor(), 0)
    socket.create_connection(("127.0.0.1", port), TIMEOUT).close()
    assert run.output().startswith("peer ")


def test_a_program_killed_during_a_call(start: Start, gate: Path) -> None:
    run = start("flood", 1, rules=[{"gate": str(gate)}])
    wait_until(run.calls, "the call reaches the handler")
    run.process.kill()
    assert run.process.wait(TIMEOUT) == -signal.SIGKILL
    gate.write_bytes(b"go on")  # the handler's reply finds nobody; `start` sees that the supervisor ends


def test_a_supervisor_killed_during_a_call(start: Start, gate: Path) -> None:
    run = start("flood", 3, rules=[{"gate": str(gate)}])
    wait_until(run.calls, "the call reaches the handler")
    os.kill(run.supervisor(), signal.SIGKILL)
    assert run.output() == "failed 3 ENOSYS\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_signals_meant_for_the_programs_do_not_stop_the_supervisor(start: Start, gate: Path, number: int) -> None:
    run = start("flood", 1, rules=[{"gate": str(gate)}])
    wait_until(run.calls, "the call reaches the handler")
    os.kill(run.supervisor(), number)
    gate.write_bytes(b"go on")
    assert run.output() == "failed 0 -\n"


HELD_CALL = """
import signal, socket, sys
signal.signal(signal.SIGUSR1, lambda *_: print("signal"))
signal.siginterrupt(signal.SIGUSR1, "restart" not in sys.argv)
socket.socket().setsockopt(socket.SOL_IP, 11274, bytes(12))
print("done")
"""


def test_a_call_under_way_is_finished_before_a_signal_is_handled(start: Start, gate: Path) -> None:
    run = start(sys.executable, "-c", HELD_CALL, rules=[{"gate": str(gate)}])
    wait_until(run.calls, "the call reaches the handler")
    run.process.send_signal(signal.SIGUSR1)
    gate.write_bytes(b"go on")
    assert run.output() == "signal\ndone\n"


def test_a_call_that_a_signal_ended_is_not_done_twice(start: Start, gate: Path) -> None:
    run = start(sys.executable, "-c", HELD_CALL, "restart", rules=[{"gate": str(gate)}], old_kernel=True)
    wait_until(run.calls, "the call reaches the handler")
    run.process.send_signal(signal.SIGUSR1)
    status = Path(f"/proc/{run.process.pid}/status")
    wait_until(lambda: "ShdPnd:\t0000000000000000" in status.read_text(), "the program takes the signal")
    gate.write_bytes(b"go on")
    assert run.output() == "signal\ndone\n"
    assert len(run.calls()) == 1


def test_the_supervisor_is_out_of_reach_of_the_program_s_terminal(start: Start) -> None:
    run = start("zorp_listener", "127.0.0.1", 0, "192.0.2.7", 80)
    run.line()
    assert os.getsid(run.supervisor()) not in (os.getsid(run.process.pid), run.supervisor())


def test_a_slow_handler_delays_no_other_run(start: Start, gate: Path) -> None:
    slow = start("flood", 1, rules=[{"gate": str(gate)}])
    wait_until(slow.calls, "the call reaches the handler")
    assert start("flood", 100).output() == "failed 0 -\n"
    assert slow.process.poll() is None
    gate.write_bytes(b"go on")
    assert slow.output() == "failed 0 -\n"


# What cannot be


def test_no_supervisor_under_a_supervisor(start: Start, tmp_path: Path) -> None:
    settings = tmp_path / "inner.json"
    settings.write_text("{}")
    run = start("env", f"PYTHONPATH={ROOT}", sys.executable, HARNESS, settings, "true")
    assert run.output() == "cannot run: this process already runs under a supervisor; the kernel allows one\n"
    assert run.process.returncode == 1


def test_a_handler_that_cannot_be_made(start: Start) -> None:
    run = start("true", refuse="there is no handler today")
    assert run.output() == "cannot run: there is no handler today\n"
    assert run.process.returncode == 1


def test_a_program_that_cannot_be_executed(start: Start) -> None:
    run = start("/nowhere/to/be/found")
    assert run.output() == "cannot run: [Errno 2] No such file or directory\n"
    assert run.process.returncode == 1
