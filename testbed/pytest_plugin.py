"""The pytest plugin: labs as fixtures, and what is left of them when a test fails.

Owns: options, markers, fixtures and hooks. What a lab is and does is lab.py's matter, what its folder holds
artefacts.py's. pytest loads this module in every project of whoever has the testbed installed, so it imports the rest
when a test asks for it.

    @pytest.mark.topology("proxy.yaml")
    def test_the_client_is_served(lab):
        lab["client"].run(["python", "-m", "testbed.traffic", "fetch", "http://10.0.1.2/"])
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from testbed.artefacts import ArtefactFolder
    from testbed.capabilities import Capabilities
    from testbed.engine_handle import EngineHandle
    from testbed.lab import Lab
    from testbed.topology import Topology

_MARKERS: Final = (
    "lab: builds network namespaces; skipped, with the reason, where that cannot be done",
    "topology(source): what the fixture `lab` is built from: a Topology, a file (relative to the test's), or YAML text",
    "needs(*names): capabilities, by the names of testbed.capabilities, without which the test is skipped",
)
_FOLDER: Final = "lab artefacts"  # among the user properties of a report
_KEPT: Final = "lab kept"

_reports_of: Final = pytest.StashKey[list[pytest.TestReport]]()
_lab_of: Final = pytest.StashKey["Lab"]()  # while it is alive
_last_lab_of: Final = pytest.StashKey["Lab"]()  # until its folder is done
_folder_of: Final = pytest.StashKey["ArtefactFolder"]()


# ---- options ----


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    group = parser.getgroup("testbed", "labs of network namespaces")
    group.addoption(
        "--lab-artefacts", metavar="DIR", default="artefacts", help="Where failed tests leave a folder (%(default)s)."
    )
    group.addoption(
        "--lab-pcap",
        choices=("always", "failure", "never"),
        default="failure",
        help="Keep captures, and the folder they are in, of every test, of failed ones, of none (%(default)s).",
    )
    group.addoption("--lab-keep", action="store_true", help="Leave the lab of a failed test running.")
    group.addoption("--lab-shell", action="store_true", help="Stop a failed test in a shell, with its lab alive.")


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known, and refuse options that cannot be served."""
    for line in _MARKERS:
        config.addinivalue_line("markers", line)
    if config.getoption("--lab-shell"):
        from testbed.pytest_shell import refusal

        if reason := refusal(config):
            raise pytest.UsageError(f"--lab-shell: {reason}")


# ---- skipping ----


@pytest.fixture(scope="session")
def capabilities() -> Capabilities:
    """What this machine can do; looked at once a session."""
    from testbed.capabilities import probe

    return probe()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, and say by name what is missing; who marks nothing asks nothing of the machine."""
    if item.get_closest_marker("lab") or item.get_closest_marker("topology"):
        _skip_without_labs()
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            _skip_without(name)


def _skip_without_labs() -> None:
    from testbed.capabilities import probe

    lacking = [f"{c.name} ({c.detail}): {c.remedy}" for c in probe().missing(required=True)]
    if lacking:
        pytest.skip("no lab here, missing " + "; ".join(lacking))


def _skip_without(name: str) -> None:
    from difflib import get_close_matches

    from testbed.capabilities import names, probe

    if name not in names():
        near = get_close_matches(str(name), names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names())}"
        pytest.fail(f"needs({name!r}): there is no such capability; {hint}", pytrace=False)
    if not probe().has(name):
        found = next((c for c in probe() if c.name == name), None)
        why = f" ({found.detail}): {found.remedy}" if found else ": it could not be tried"
        pytest.skip(f"missing {name}{why}")


# ---- fixtures ----


@pytest.fixture
def topology(request: pytest.FixtureRequest) -> Topology:
    """What `lab` is built from: the marker's, or the parameter's with `indirect=True`. May be overridden."""
    if hasattr(request, "param"):
        return _topology_from(request.param, request.path)
    marker = request.node.get_closest_marker("topology")
    if marker is None:
        pytest.fail(
            "no topology for the lab: mark the test with @pytest.mark.topology(...), or override the fixture topology",
            pytrace=False,
        )
    if len(marker.args) != 1 or marker.kwargs:
        pytest.fail("@pytest.mark.topology takes one argument: a Topology, a file, or YAML text", pytrace=False)
    return _topology_from(marker.args[0], request.path)


def _topology_from(source: object, test: Path) -> Topology:
    """A topology from whatever a user may give; what is wrong with it fails the test in one clear text."""
    from testbed.topology import Topology
    from testbed.topology_file import TopologyError, load, loads

    try:
        match source:
            case Topology():
                return source
            case str() if "\n" in source:
                return loads(source)
            case str() | Path():
                return load(test.parent / source)
            case _:
                wrong = f"topology: a Topology, a file, or YAML text is wanted, not {type(source).__name__}"
    except TopologyError as error:
        wrong = str(error)
    pytest.fail(wrong, pytrace=False)  # not while the error is handled: pytest would tell that as well


@pytest.fixture
def lab(request: pytest.FixtureRequest, topology: object) -> Iterator[Lab]:
    """A running lab, built from `topology` for this test alone; captures and logs are in `lab.directory`."""
    from testbed.artefacts import write_state
    from testbed.lab import Lab

    _skip_without_labs()
    node, config = request.node, request.config
    description = _topology_from(topology, request.path)
    folder = _claim_folder(config.rootpath / config.getoption("--lab-artefacts"), node.nodeid)
    node.stash[_folder_of] = folder
    lab = node.stash[_last_lab_of] = Lab(description, folder.path, record=True)
    with _in_its_own_words(), contextlib.ExitStack() as stack:
        stack.enter_context(lab)
        node.stash[_lab_of] = lab
        yield lab
        del node.stash[_lab_of]
        if _was_interrupted(node):
            write_state(lab, folder.path, "The test was interrupted.")
        accounts = [program.account() for program in lab.programs.values() if program.has_failed]
        if _has_failed(node) or accounts:
            write_state(lab, folder.path, "\n".join((_story(node), *accounts)).strip())
        if _has_failed(node) and config.getoption("--lab-keep"):
            node.user_properties.append((_KEPT, _keep(lab, folder)))
            stack.pop_all()


@contextlib.contextmanager
def _in_its_own_words() -> Iterator[None]:
    """What is wrong with a lab fails the test as a text: a traceback would show where the testbed noticed."""
    from testbed.errors import TestbedError, in_words

    try:
        yield
    except TestbedError as error:
        raise pytest.fail.Exception(in_words(error), pytrace=False) from None


def _claim_folder(parent: Path, name: str) -> ArtefactFolder:
    """The folder of a test; where there can be none, the test fails and says why."""
    from testbed.artefacts import ArtefactFolder

    try:
        return ArtefactFolder.claim(parent, name)
    except OSError as error:
        wrong = f"no folder for the lab: {error.strerror}: {error.filename}; --lab-artefacts names another place"
    pytest.fail(wrong, pytrace=False)


def _keep(lab: Lab, folder: ArtefactFolder) -> str:
    """Let a lab outlive the session, and its folder be its own; how to get into it, and how to end it."""
    from testbed.keeper import hand_over

    record = hand_over(lab, (folder.fileno(),))
    nodes = "|".join(record.nodes)
    return f"testbed shell --lab {record.name} {nodes}    to end it: testbed down {record.name}"


@pytest.fixture
def engines(lab: Lab) -> Mapping[str, EngineHandle]:
    """The engines of the lab, by node."""
    from testbed.engine_handle import EngineHandle

    return {node.name: EngineHandle(lab[node.name]) for node in lab.topology.nodes if node.engine is not None}


@pytest.fixture
def engine(engines: Mapping[str, EngineHandle]) -> EngineHandle:
    """The engine of the lab, where there is one; where there are several, `engines` has them by node."""
    if len(engines) != 1:
        which = f"several ({', '.join(engines)}): use the fixture `engines`" if engines else "none"
        pytest.fail(f"the fixture `engine` is for labs with one engine; here is {which}", pytrace=False)
    return next(iter(engines.values()))


# ---- failures ----


def _has_failed(item: pytest.Item) -> bool:
    return any(report.failed for report in item.stash.get(_reports_of, []))


def _was_interrupted(item: pytest.Item) -> bool:
    """Did Ctrl-C or the like end it? Then pytest has no report of the phase that it was in."""
    reports = item.stash.get(_reports_of, [])
    return not any(report.when == "call" or not report.passed for report in reports)


def _story(item: pytest.Item) -> str:
    """What pytest tells of a test's failures; empty when there are none."""
    failures = [report for report in item.stash.get(_reports_of, []) if report.failed]
    return "\n".join(f"{report.nodeid}, {report.when}:\n\n{report.longreprtext}\n" for report in failures)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember how each phase came out; after the last, see to the folder."""
    report = yield
    item.stash.setdefault(_reports_of, []).append(report)
    if report.when == "teardown" and (folder := item.stash.get(_folder_of, None)) is not None:
        _finish_folder(item, folder)
        report.user_properties = list(item.user_properties)
    return report


def _finish_folder(item: pytest.Item, folder: ArtefactFolder) -> None:
    """Keep the folder of a failed test with its story, and of others as the options say."""
    from testbed.artefacts import write_end
    from testbed.capture import FILE_NAME

    captures = item.config.getoption("--lab-pcap")
    lab = item.stash[_last_lab_of]
    del item.stash[_last_lab_of]
    failures = [report for report in item.stash[_reports_of] if report.failed]
    if not failures and captures != "always":
        folder.remove()
        return
    where = str(folder.path)
    try:
        if failures:
            write_end(lab, folder.path, _story(item))
        if captures == "never":
            (folder.path / FILE_NAME).unlink(missing_ok=True)
    except OSError as error:  # no room, or the test has removed it: the other tests go on
        where += f" ({error})"
    item.user_properties.append((_FOLDER, where))
    folder.close()


def pytest_exception_interact(node: pytest.Item | pytest.Collector, report: pytest.TestReport) -> None:
    """Open a shell in the lab of a test that has just failed."""
    lab = node.stash.get(_lab_of, None)
    if lab is not None and node.config.getoption("--lab-shell"):
        from testbed.pytest_shell import open_shell

        open_shell(node.config, lab, f"{report.nodeid} failed\n{report.longreprtext}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say where the folders are, and which labs live on."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    told = {
        (name, report.nodeid, value)
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name in (_FOLDER, _KEPT)
    }
    for heading in (_FOLDER, _KEPT):
        lines = sorted((nodeid, value) for name, nodeid, value in told if name == heading)
        if lines:
            terminalreporter.section(heading)
        for nodeid, value in lines:
            terminalreporter.line(f"{nodeid}: {value}")
