"""Labs: a topology, alive, from the first namespace to the last undo.

Owns: the order of things. Leftovers of killed labs go first; then a warden is set over what comes; then namespaces and
links; then captures, so that they see the first packet; then engines; then services. Everything is undone in reverse,
and every failure of that is told.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

from testbed import capabilities, craft
from testbed.build import Builder
from testbed.capture import CapturePoint, CaptureSession
from testbed.errors import TestbedError
from testbed.expect import Expectations
from testbed.failure import ExpectationError, FrameSource
from testbed.impair import (
    LOG,
    WIRE,
    ImpairError,
    KernelImpairments,
    Stage,
    described,
    is_impaired,
    kernel_means,
    notes,
    why_in_user_space,
)
from testbed.impair_model import Counts, longest_way
from testbed.journal import LAB, Journal, command_line
from testbed.netns import Namespace
from testbed.nsid import Watch
from testbed.owner import KEPT, environment, sweep, temporary_folder
from testbed.plan import plan
from testbed.process import Program, ServiceError
from testbed.recorder import Recorder, Recording
from testbed.topology import ENGINE, Address, Impairment, Node, Readiness, Service, Topology
from testbed.topology_file import check
from testbed.trace import LONGEST_HOP
from testbed.undo import Undo
from testbed.warden_handle import WardenHandle

if TYPE_CHECKING:
    from pyroute2 import IPRoute
    from scapy.packet import Packet

__tracebackhide__ = methodcaller("errisinstance", TestbedError)  # pytest shows where the test called

_COMMAND_PATIENCE: Final = 60.0  # seconds for a command in a node
_ANSWER_PATIENCE: Final = 2.0  # seconds for an answer to a crafted packet
_DELETE_PATIENCE: Final = 20.0  # seconds for the kernel to take the namespaces apart

_Result = TypeVar("_Result")


class LabError(TestbedError):
    """A lab did not work as it should; one line a failure."""


class NodeHandle:
    """A node of a running lab."""

    def __init__(self, lab: Lab, node: Node, namespace: Namespace) -> None:
        self.node = node
        self.namespace = namespace
        self._lab = lab

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name

    @property
    def addresses(self) -> list[Address]:
        """The addresses of its interfaces, in order."""
        return [address for end in self._lab.topology.ends_of(self.name) for address in end.addresses]

    def address(self, version: int = 4, interface: str | None = None) -> str:
        """Its first address of a family, of one interface or of any; LookupError when it has none."""
        for end in self._lab.topology.ends_of(self.name):
            for address in end.addresses:
                if address.version == version and interface in (None, end.interface):
                    return str(address.ip)
        raise LookupError(f"{self.name} has no IPv{version} address{f' on {interface}' if interface else ''}")

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Call a function with this thread inside the namespace."""
        return self.namespace.call(function)

    def route(self) -> IPRoute:
        """pyroute2 inside the node, for what changes while the lab runs: routes, addresses, links. Close it."""
        from pyroute2 import IPRoute  # takes longer to import than the testbed itself

        return self.namespace.call(IPRoute)

    def run(
        self, command: Sequence[str], *, check: bool = True, timeout: float = _COMMAND_PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; LabError, with what it wrote, when it fails (and `check`) or takes too long."""
        try:
            with self._lab.journal.during(self.name, command_line(command)) as entry:
                with self.namespace.entered():
                    running = subprocess.Popen(
                        list(command),
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                        errors="replace",
                        env=environment(),
                    )
                with running:
                    try:
                        output, errors = running.communicate(timeout=timeout)
                    except BaseException:
                        running.kill()
                        raise
                entry.end(f"exit status {running.returncode}", is_bad=check and running.returncode != 0)
        except OSError as error:
            raise LabError(f"{self.name}: cannot run {command[0]!r}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name}: {' '.join(command)} took longer than {timeout:g} s") from None
        if check and running.returncode:
            raise LabError(f"{self.name}: {' '.join(command)} failed ({running.returncode}): {errors or output}")
        return subprocess.CompletedProcess(list(command), running.returncode, output, errors)

    def send(self, packet: Packet, interface: str | None = None) -> None:
        """Send a Scapy packet that begins with IP or IPv6, by this node's routes; LabError when it cannot be sent.

        A source that it does not name is the node's own. Link-local destinations and groups need the interface. From
        any thread; the namespace of none is left.
        """
        self._craft(lambda: craft.send(self.namespace, packet, interface))

    def sr1(self, packet: Packet, timeout: float = _ANSWER_PATIENCE, *, interface: str | None = None) -> Packet | None:
        """Send a Scapy packet and return the first that answers it, from its IP header on.

        None when there was no answer within `timeout` seconds; LabError when it cannot be sent. In async code:
        `await asyncio.to_thread(lab["client"].sr1, packet)`.
        """
        return self._craft(lambda: craft.sr1(self.namespace, packet, timeout, interface))

    def _craft(self, act: Callable[[], _Result]) -> _Result:
        try:
            return act()
        except craft.CraftError as error:
            raise LabError(f"{self.name}: {error}") from None

    def start(self, name: str, command: Sequence[str], ready: Readiness | None = None) -> Program:
        """Start a program that runs until the lab ends, or `stop`."""
        return self._lab.start(self.name, Service(name, tuple(command), ready or Readiness()))


class Lab(Expectations):
    """A lab, as a context manager: inside the `with` everything runs, and what is expected of its captures is asked."""

    def __init__(
        self,
        topology: Topology,
        directory: Path | None = None,
        *,
        capture: bool = True,
        programs: bool = True,
        engine_options: Mapping[str, Sequence[str]] | None = None,
        record: bool = False,
    ) -> None:
        """A lab that keeps its logs and captures in `directory`, or in a temporary one.

        That goes with it, unless it was an expectation that failed inside the `with`.

        `engine_options`: further options of tproxyd, by node, beside those of the topology. `record`: listen to the
        engines, so that a report has their decisions packet by packet; for its first packets it slows them.
        """
        self.topology = topology
        self.capture: CaptureSession | None = None
        self.programs: dict[tuple[str, str], Program] = {}
        self.logs: dict[tuple[str, str], Path] = {}  # of programs that never got ready as well
        self.left_over: list[str] = []  # after the end: what outlived the undoing, and that was killed if it could be
        self.journal = Journal()
        self._recorder: Recorder | None = None
        self._wants_record = record
        self._wants_capture = capture
        self._wants_programs = programs
        self._engine_options = engine_options or {}
        self._builder = Builder()
        self._stage: Stage | None = None
        self._by_kernel: KernelImpairments | None = None
        self._watch: Watch | None = None
        self._warden: WardenHandle | None = None
        self._undo = Undo()
        self._is_temporary = directory is None
        self.directory = directory or temporary_folder(topology.name)

    def __enter__(self) -> Self:
        try:
            with self.journal.during(LAB, "namespaces and links"):
                self._build()
            if self._wants_record:
                self._recorder = Recorder()
                self._undo.add("the recorder", self._recorder.close)
            if self._wants_capture:
                with self.journal.during(LAB, "captures are armed"):
                    self._start_capture()
            self._start_stage()
            if self._wants_programs:
                self.start_programs()
        except BaseException as error:
            for failure in self._undo.run():
                error.add_note(f"while undoing: {failure}")
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_temporary and isinstance(error, ExpectationError):
            (self.directory / KEPT).touch()  # the error says where the capture file lies
        complaints = [program.account() for program in self.programs.values() if program.has_failed]
        if self._stage is not None and self._stage.program.has_failed:
            complaints.append(self._stage.program.account())
        complaints += self._undo.run()
        if error is not None:
            for complaint in complaints:
                error.add_note(complaint)
        elif complaints:
            raise LabError("\n".join(complaints))

    def _build(self) -> None:
        """Namespaces, links, and what watches over them."""
        if missing := capabilities.probe().missing(required=True):
            raise LabError(capabilities.explain(capabilities.Capabilities(missing)))
        check(self.topology)
        sweep()
        warden = self._warden = WardenHandle()
        self._undo.add("the end of the namespaces", self._await_deletion)
        self._undo.add("the warden", lambda: self.left_over.extend(warden.finish()))
        if self._is_temporary:
            warden.remove(self.directory)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=not self._is_temporary)
        self._builder = Builder(warden.guard)
        self._undo.add("the namespaces", self._builder.close)
        self._builder.build(plan(self.topology, kernel_means(self.topology)))
        with contextlib.suppress(PermissionError):  # inside somebody else's namespace we see no others end
            self._watch = Watch(self.namespaces)

    def _await_deletion(self) -> None:
        """Wait until the kernel has taken the namespaces apart."""
        if self._watch is not None:
            with self._watch:
                held = self._watch.remaining(_DELETE_PATIENCE)
            self.left_over += [f"the namespace of {node}, held by a socket or descriptor" for node in held]

    def __getitem__(self, name: str) -> NodeHandle:
        return NodeHandle(self, self.topology.node(name), self._builder.namespace(name))

    @property
    def namespaces(self) -> Mapping[str, Namespace]:
        """All that it consists of: the nodes' by their names, and that between impaired links (impair.py)."""
        return {name: site.namespace for name, site in self._builder.sites.items()}

    @property
    def _source(self) -> FrameSource:
        if self.capture is None:
            raise LabError(f"nothing can be expected of {self.topology.name}: it captures nothing")
        return self.capture

    def start(self, node: str, service: Service) -> Program:
        """Start a service in a node."""
        key = (node, service.name)
        if key in self.programs and self.programs[key].returncode is None:
            raise ServiceError(f"{node}/{service.name} runs already")
        log = self.directory / f"{node}.{service.name}.log"
        if key not in self.logs:
            log.unlink(missing_ok=True)  # of an earlier lab in this directory
        self.logs[key] = log
        namespace = self._builder.namespace(node)
        entry = self.journal.begin(node, service.name)
        try:
            program = Program(f"{node}/{service.name}", service.words, namespace, log, service.ready)
        except ServiceError:
            entry.end("did not get ready", is_bad=True)
            raise
        entry.ready, entry.program = time.time_ns(), program
        self.programs[key] = program
        self._undo.add(program.label, program.stop)
        if self._recorder is not None:
            self._recorder.watch(entry)
            if service.name == ENGINE:
                with contextlib.suppress(OSError):  # one that has ended already says why when the lab ends
                    self._recorder.attach(node, namespace)
        return program

    def recording(self) -> Recording:
        """What its engines told so far, if they are listened to."""
        return Recording() if self._recorder is None else self._recorder.recording()

    def start_again(self, node: str, name: str) -> Program:
        """Start a service of the topology's, or a node's engine, after it has ended; ServiceError while it runs."""
        spec = self.topology.node(node)
        if name == ENGINE and spec.engine is not None:
            self._start_engine(spec)
        else:
            self.start(node, next(service for service in spec.services if service.name == name))
        return self.programs[node, name]

    def at_end(self, what: str, step: Callable[[], object]) -> None:
        """Have something done when the lab ends, before anything earlier is undone; `what` names it if it fails."""
        self._undo.add(what, step)

    def leave(self) -> None:
        """End the captures and let go of all else: somebody has taken it over (keeper.py).

        Steps given to `at_end` are not done. CaptureError, and the lab is as it was, when a capture has failed.
        """
        if self.capture is not None:
            self.capture.stop()
        self._undo = Undo()
        if self._warden is not None:
            self._warden.release()
            self._warden.finish()
        self._builder.close()
        if self._watch is not None:
            self._watch.close()
        if self._recorder is not None:
            self._recorder.close()

    def start_programs(self) -> None:
        """Start the engines, then the services: done on entering, unless the lab was made with `programs=False`."""
        for node in self.topology.nodes:
            self._start_engine(node)
        for node in self.topology.nodes:
            for service in node.services:
                self.start(node.name, service)

    def _start_capture(self) -> None:
        """Captures at the interfaces that the topology names; there is a session even when it names none."""
        interfaces = [label.split(":") for label in self.topology.captured()]
        points = [CapturePoint(node, interface, self._builder.namespace(node)) for node, interface in interfaces]
        self.capture = CaptureSession(points, self.directory)
        for impairment in (end.impair for link in self.topology.links for end in link.ends if end.impair is not None):
            self._allow_for(impairment)
        self.capture.start()
        self._undo.add("the captures", self.capture.stop)

    def _start_stage(self) -> None:
        """What stands in the middle of the impaired links that the kernel does not impair."""
        impaired = {number: link for number, link in enumerate(self.topology.links) if is_impaired(link)}
        if impaired:
            (self.directory / LOG).write_text("".join(f"{line}\n" for line in self.notes))
        kernel = kernel_means(self.topology)
        staged = {number: link for number, link in impaired.items() if why_in_user_space(link, kernel)}
        if len(staged) < len(impaired):
            by_kernel = {number: link for number, link in impaired.items() if number not in staged}
            self._by_kernel = KernelImpairments(by_kernel, self._builder.namespace(WIRE), kernel)
        if staged:
            self._stage = Stage(staged, self._builder.namespace(WIRE), self.directory)
            self._undo.add("the impairments", self._stage.program.stop)

    @property
    def notes(self) -> list[str]:
        """Who impairs which ends of links, and why not the kernel where it is not."""
        return notes(self.topology, kernel_means(self.topology))

    @property
    def impairments(self) -> Mapping[str, Counts]:
        """What became of the frames that each end of an impaired link sent so far, by its label; ask while it runs."""
        return {label: counts for means in self._means for label, counts in means.counts().items()}

    def impair(self, label: str, impairment: Impairment) -> None:
        """Change what an impaired link does to what one of its ends, `node:interface`, sends from now on.

        LabError when the topology has no such impaired link (`impair: {}` makes one that does nothing yet), and when
        the kernel is to do what it cannot.
        """
        means = next((means for means in self._means if label in means.labels), None)
        if means is None:
            ends = ", ".join(label for means in self._means for label in means.labels)
            what = f"only {ends}" if ends else "there is none"
            raise LabError(f"{label} is no end of an impaired link, {what}; `impair: {{}}` in a topology makes one")
        with self.journal.during(LAB, f"{label}: {described(impairment)}"):
            try:
                means.change(label, impairment)
                self._allow_for(impairment)
            except ImpairError as error:
                raise LabError(str(error)) from error

    def _allow_for(self, impairment: Impairment) -> None:
        """Take no packet for lost as long as a link may be the reason that it is not seen."""
        if self.capture is not None:
            self.capture.longest_hop = max(self.capture.longest_hop, LONGEST_HOP + longest_way(impairment))

    @property
    def _means(self) -> list[Stage | KernelImpairments]:
        """What impairs its links."""
        return [means for means in (self._stage, self._by_kernel) if means is not None]

    def _start_engine(self, node: Node) -> None:
        """Start a node's engine with its ruleset in a file, as a user would."""
        spec = node.engine
        if spec is None:
            return
        rules = self.directory / f"{node.name}.rules"
        chains = (":PREROUTING ACCEPT [0:0]", ":OUTPUT ACCEPT [0:0]")
        rules.write_text("\n".join(["*tproxy", *chains, *spec.rules, "COMMIT", ""]))
        command = ("tproxyd", "--datapath", spec.datapath, "--ruleset", str(rules), "--notify-fd", "{notify_fd}")
        options = (*spec.options, *self._engine_options.get(node.name, ()))
        self.start(node.name, Service(ENGINE, (*command, *options), Readiness(notify=True)))
