"""Nothing is left of a lab, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed.lab import Lab, LabError
from testbed.netns import Namespace
from testbed.nsid import Watch
from testbed.owner import MARK, is_gone, owner_mark, start_time, sweep
from testbed.topology import Node, Topology
from testbed.warden_handle import WardenHandle

pytestmark = pytest.mark.lab

# A lab whose services fork away from their session, with an impaired link; it says when it stands.
OWNER = """
import select, signal, sys
import testbed.lab
from testbed.lab import Lab
from testbed.topology_file import loads
testbed.lab.sweep = lambda: None  # it opens namespaces of others for a moment, which are not to be taken for its own
print("begins", flush=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, when the test run is a shell's background job
topology = loads('''
name: {name}
nodes:
  a: {{services: {{s: {{command: [bash, -c, "setsid --fork bash -c 'echo up; exec sleep 60'; exec sleep 60"],
                     ready: {{log: up}}}}}}}}
  r: {{kind: router}}
  b:
links: [{{ends: [{{node: a}}, {{node: r}}], impair: {{delay: 1ms, seed: 1}}}}, {{ends: [{{node: r}}, {{node: b}}]}}]
''')
with Lab(topology) as lab:
    print("up", flush=True)
    # Not just a read: a signal between Python's last look and the system call would be seen after that only.
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        pass
print(*lab.left_over, flush=True)
"""
CHANCE = random.Random(5)
MOMENTS = [CHANCE.uniform(0, 0.5) for _ in range(8)]  # seconds after the testbed was imported
PATIENCE = 20.0


class Owner:
    """A process with a lab, that is going to be killed."""

    def __init__(self, name: str, script: str = OWNER) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-c", script.format(name=name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait_until_begun(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "begins\n"

    def wait_until_up(self) -> None:
        self.wait_until_begun()
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "up\n"

    def namespaces(self) -> dict[str, Namespace]:
        """Handles to the namespaces that it holds now."""
        found = {}
        with Namespace.current() as ours:
            for descriptor in Path(f"/proc/{self.process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()).startswith("net:["):
                        namespace = Namespace.at(descriptor)
                        if namespace.identity != ours.identity:
                            found[str(descriptor)] = namespace
        return found

    def processes(self) -> list[str]:
        """What runs on its behalf: what it marked, and its warden."""
        mark = f":{self.process.pid}:".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                environment = (process / "environ").read_bytes()
                command = (process / "cmdline").read_bytes()
                is_marked = any(
                    mark in line for line in environment.split(b"\0") if line.startswith(MARK.encode() + b"=")
                )
                is_warden = b"warden.py\0%d\0" % self.process.pid in command
                if is_marked or is_warden:
                    found.append(f"{process.name} {command!r}")
        return found

    def state(self) -> str:
        """Where it is, for who has to find out why it does not end."""
        if (code := self.process.poll()) is not None:
            return f"ended with {code}; {self.processes()}"
        waits = Path(f"/proc/{self.process.pid}/wchan").read_text(encoding="ascii")
        return f"waits in {waits}; {self.processes()}"

    def folders(self) -> list[Path]:
        """Its temporary folders."""
        return list(Path(tempfile.gettempdir()).glob(f"testbed-{self.name}-*"))


def assert_gone_after(number: signal.Signals, owner: Owner, namespaces: dict[str, Namespace]) -> None:
    """Send the owner a signal, after which its namespaces must go."""
    with Watch(namespaces) as watch:
        for namespace in namespaces.values():
            namespace.close()
        owner.process.send_signal(number)
        assert watch.remaining(PATIENCE) == [], owner.state()


@pytest.fixture
def owner(request: pytest.FixtureRequest) -> Iterator[Owner]:
    """An owner of a lab with a name of its own."""
    made = Owner(f"leak-{os.getpid()}-{abs(hash(request.node.name)) % 10**6}")
    with made.process:
        try:
            yield made
        finally:
            made.process.kill()


def wait_for(condition: Callable[[], object]) -> bool:
    """Wait until something is empty."""
    deadline = time.monotonic() + PATIENCE
    while condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not condition()


@contextlib.contextmanager
def without_room() -> Iterator[tuple[Namespace, Watch]]:
    """A namespace, and who watches it and missed the ends of others: its socket had no room for them."""
    ours, *others = [Namespace.new() for _ in range(20)]
    with Watch({"ours": ours}) as watch, Watch({str(number): other for number, other in enumerate(others)}) as beside:
        watch._news.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel makes it two messages or three
        for other in others:
            other.close()
        assert beside.remaining(PATIENCE) == []
        yield ours, watch


def test_the_end_of_a_namespace_is_seen_though_news_of_others_had_no_room() -> None:
    with without_room() as (ours, watch):
        assert watch.remaining(0) == ["ours"]
        ours.close()
        assert watch.remaining(PATIENCE) == []


def test_news_that_find_no_room_while_older_ones_are_read_are_not_missed() -> None:
    """Until all that waits has been read, the kernel drops what comes, and does not say so a second time."""
    with without_room() as (ours, watch), Watch({"ours": ours}) as sees:
        ended, looks = watch._ended, iter(range(100))

        def look() -> list[int]:
            found = ended()
            if next(looks) == 0:  # the kernel has said once that there was no room
                ours.close()
                assert sees.remaining(PATIENCE) == []
            return found

        watch._ended = look  # type: ignore[method-assign]
        assert watch.remaining(2) == []


def test_an_ordinary_end_leaves_nothing(owner: Owner) -> None:
    owner.wait_until_up()
    assert len(owner.processes()) >= 3
    output, _ = owner.process.communicate()
    assert re.search(r"(sleep|bash) \(pid ", output)  # it says `up`, and sleeps a moment later
    assert owner.processes() == []
    assert owner.folders() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_leaves_nothing(owner: Owner, number: signal.Signals) -> None:
    owner.wait_until_up()
    namespaces = owner.namespaces()
    assert len(namespaces) == 4  # the nodes', and that of the impaired link
    assert_gone_after(number, owner, namespaces)
    assert wait_for(owner.processes), owner.processes()
    assert wait_for(owner.folders), owner.folders()


# A connection with something left to say, and nobody who would hear it.
SPEAKER = """
    import socket
    listening, near = (lab[node].namespace.socket(socket.AF_INET, socket.SOCK_STREAM) for node in "ba")
    listening.bind((lab["b"].address(), 80))
    listening.listen()
    near.connect((lab["b"].address(), 80))
    lab["b"].run(["ip", "link", "set", "eth0", "down"])
    near.send(b"nobody hears that")
    print("up", flush=True)
"""


def test_sigkill_leaves_no_connection_that_keeps_a_namespace() -> None:
    script = OWNER.replace('    print("up", flush=True)\n', SPEAKER)
    assert "nobody hears" in script
    owner = Owner(f"speaker-{os.getpid()}", script)
    with owner.process:
        owner.wait_until_up()
        assert_gone_after(signal.SIGKILL, owner, owner.namespaces())
    assert wait_for(owner.processes), owner.processes()


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment:.3f}s")
def test_sigkill_at_any_moment_leaves_nothing(owner: Owner, moment: float) -> None:
    owner.wait_until_begun()
    with contextlib.suppress(subprocess.TimeoutExpired):
        owner.process.wait(moment)
    owner.process.send_signal(signal.SIGSTOP)  # so that what it holds now can be looked at
    assert_gone_after(signal.SIGKILL, owner, owner.namespaces())
    assert wait_for(owner.processes), owner.processes()
    assert wait_for(owner.folders), owner.folders()


def test_a_process_without_environment_is_found_by_its_namespace(tmp_path: Path) -> None:
    """Neither the lab nor its warden is there to end it, and it has thrown away the mark."""
    script = (
        "import subprocess, sys; from testbed.lab import Lab; from testbed.topology_file import loads\n"
        "with Lab(loads('name: x\\nnodes: {a: }'), capture=False) as lab:\n"
        "    with lab['a'].namespace.entered():\n"
        "        sleeper = subprocess.Popen(['setsid', 'sleep', '600'], env={})\n"
        "    print(sleeper.pid, lab._warden._process.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as lab:
        assert lab.stdout is not None
        sleeper, warden = map(int, lab.stdout.readline().split())
        sweep()
        assert start_time(sleeper) is not None
        os.kill(warden, signal.SIGKILL)
        lab.kill()
    sweep()  # or another lab that starts at the same time
    assert wait_for(lambda: start_time(sleeper) is not None)


def test_who_sweeps_is_not_seen_inside_a_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lab's warden, or another that sweeps, would take it for one of the lab's processes, and kill it."""
    entered, entries = Namespace.entered, []

    @contextlib.contextmanager
    def watched(namespace: Namespace) -> Iterator[None]:
        with entered(namespace), Namespace.of_process(os.getpid()) as shown:
            entries.append(shown.identity == namespace.identity)
            yield

    with Lab(Topology("swept", (Node("a"),)), tmp_path, capture=False) as lab:
        with lab["a"].namespace.entered():
            sleeper = subprocess.Popen(["sleep", "60"], env={})  # not marked: its namespace is asked
        monkeypatch.setattr(Namespace, "entered", watched)
        sweep()
        monkeypatch.undo()
    sleeper.wait()
    assert entries
    assert not any(entries)


SLEEPER = "setsid sleep 60 >/dev/null 2>&1 &"  # a daemon that no service stops


def test_a_fork_of_the_lab_s_process_does_not_keep_the_warden_from_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("testbed.lab._DELETE_PATIENCE", 0.1)  # the fork has the namespaces open, too
    lab = Lab(Topology("forked", (Node("a"),)), tmp_path, capture=False)
    child = 0
    try:
        with lab:
            lab["a"].run(["sh", "-c", SLEEPER])
            child = os.fork()
            if not child:
                time.sleep(60)
                os._exit(0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert any("(pid " in left for left in lab.left_over)


def test_a_warden_that_was_killed_is_told(tmp_path: Path) -> None:
    lab = Lab(Topology("unguarded", (Node("a"),)), tmp_path, capture=False)
    lab.__enter__()
    assert lab._warden is not None
    os.kill(lab._warden._process.pid, signal.SIGKILL)
    with pytest.raises(LabError, match=r"the warden: WardenError: the lab's warden ended with -9"):
        lab.__exit__(None, None, None)


def test_a_process_with_many_descriptors_has_labs_that_leave_nothing(tmp_path: Path) -> None:
    """select() knows no descriptor above 1023."""
    script = f"""
import os, resource
from pathlib import Path
from testbed.lab import Lab
from testbed.topology import Node, Topology
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096), most))
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
with Lab(Topology("many", (Node("a"),)), Path({str(tmp_path)!r}), capture=False) as lab:
    lab["a"].run(["sh", "-c", {SLEEPER!r}])
print(lab.left_over)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "(pid " in done.stdout, done.stderr
    assert done.stderr == ""


def test_who_sweeps_does_not_kill_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been started, long ago, by a lab that is gone."""
    pid_namespace, _, _ = owner_mark().split(":")
    script = "from testbed import owner; owner.MARK = 'TESTBED_ITSELF'; owner.sweep(); print('swept')"
    environment = {**os.environ, "TESTBED_ITSELF": f"{pid_namespace}:{2**22}:1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "swept\n"


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM, errno.EACCES], ids=errno.errorcode.get)
def test_an_owner_that_cannot_be_looked_at_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    pid_namespace, pid, started = owner_mark().split(":")
    assert not is_gone(int(pid_namespace), int(pid), started)
    assert is_gone(int(pid_namespace), int(pid), "0")

    def fails(path: Path, *_: object, **__: object) -> str:
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(Path, "read_text", fails)
    assert not is_gone(int(pid_namespace), int(pid), "0")


def test_an_owner_that_is_hidden_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As others' processes are by the mount option hidepid of /proc."""
    pid_namespace, pid, started = owner_mark().split(":")

    def fails(path: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "", str(path))

    monkeypatch.setattr(Path, "read_text", fails)
    assert not is_gone(int(pid_namespace), int(pid), started)


def test_what_even_the_warden_could_not_end_is_ended_by_the_next_start(owner: Owner) -> None:
    owner.wait_until_up()
    (warden,) = (int(text.split()[0]) for text in owner.processes() if "warden.py" in text)
    os.kill(warden, signal.SIGKILL)
    owner.process.kill()
    owner.process.wait()
    sweep()  # or another lab that starts at the same time
    assert wait_for(owner.processes), owner.processes()
    assert owner.folders() == []


def test_a_warden_kills_nobody_in_a_namespace_with_the_number_of_one_that_is_gone() -> None:
    """A lab's namespaces may go before its warden does, and their numbers are soon those of other labs' namespaces."""
    warden = WardenHandle()
    gone = Namespace.new()
    warden.guard(gone)
    number = gone.identity
    gone.close()
    for _ in range(400):
        time.sleep(0.005)  # for the kernel to take the last one apart; a number comes again after 4 to 300
        with Namespace.new() as later:
            if later.identity == number:
                with later.entered():
                    bystander = subprocess.Popen(["sleep", "30"])
                assert warden.finish() == []
                bystander.kill()
                bystander.wait()
                pytest.fail("the warden did not hold what it was told of")
    assert warden.finish() == []
