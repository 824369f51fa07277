"""The table of tproxy.md section 4, as an unmodified program meets it: each op, each errno, TCP and UDP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.lab import Lab
from testbed.topology_file import loads

pytestmark = [pytest.mark.lab, pytest.mark.needs("seccomp-notify")]
pytest_plugins = ["supervisor_fixtures"]

EXPECTED = {
    "set too short": "EINVAL",
    "set unknown op": "ENOPROTOOPT",
    "set QUERY": "ENOPROTOOPT",
    "get too short": "EINVAL",
    "get unknown op": "ENOPROTOOPT",
    "get ASSIGN": "ENOPROTOOPT",
    "VERSION of ours": "OK",
    "VERSION of another major": "EINVAL",
    "VERSION of a newer minor": "EINVAL",
    "VERSION is told": "OK",
    "ASSIGN": "OK",
    "ASSIGN without a foreign port": "OK",
    "ASSIGN nobody": "OK",
    "ASSIGN cut short": "EINVAL",
    "ASSIGN an IPv6 address": "EINVAL",
    "ASSIGN an IPv4 address over IPv6": "EINVAL",
    "ASSIGN when connected": "EINVAL",
    "ASSIGN when not bound": "EINVAL",
    "ASSIGN when bound to any address": "EINVAL",
    "ASSIGN twice": "EEXIST",
    "ASSIGN nobody after another": "EEXIST",
    "ASSIGN another after nobody": "EEXIST",
    "ASSIGN at a taken local address": "EEXIST",
    "ASSIGN nobody at a taken local address": "EEXIST",
    "ASSIGN nobody at an address of nobody's": "OK",
    "ASSIGN a taken foreign address": "EADDRINUSE",
    "ASSIGN a taken foreign address with SO_REUSEADDR": "OK",
    "FLAGS=LISTEN on a connect-only entry": "EINVAL",
    "FLAGS=CONNECT on a connect-only entry": "OK",
    "UNASSIGN": "OK",
    "UNASSIGN without": "ENOENT",
    "UNASSIGN twice": "ENOENT",
    "QUERY": "OK",
    "QUERY without": "ENOENT",
    "FLAGS are told": "OK",
    "get FLAGS without": "ENOENT",
    "FLAGS without": "ENOENT",
    "FLAGS=LISTEN|UNIDIR without": "by protocol",
    "FLAGS of no kind": "EINVAL",
    "FLAGS of two kinds": "EINVAL",
    "FLAGS that nobody knows": "EINVAL",
    "FLAGS that are not for setting": "EINVAL",
    "FLAGS=ESTABLISHED without a remote": "EINVAL",
    "FLAGS=ESTABLISHED": "OK",
    "FLAGS of a mark-only entry": "OK",
    "ALLOC is told": "OK",
    "ALLOC without": "ENOENT",
    "ALLOC with a port": "EINVAL",
    "ALLOC when none is free": "EFAULT",
    "ALLOC of a mark-only entry": "OK",
    "CONNECT": "OK",
    "CONNECT without": "ENOENT",
    "CONNECT cut short": "EINVAL",
    "CONNECT to an IPv6 address": "EINVAL",
    "CONNECT of a mark-only entry": "OK",
    "ASSIGN without privilege": "EPERM",
    "ALLOC without privilege": "OK",
    "CONNECT without privilege": "OK",
    "FLAGS without privilege": "OK",
    "QUERY without privilege": "OK",
    "UNASSIGN without privilege": "OK",
}


@pytest.fixture(scope="module", params=["inline", "kernel"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    host = {"engine": {"datapath": request.param}, "sysctls": {"net.ipv4.ip_local_port_range": "40000 40003"}}
    topology = loads(json.dumps({"name": "errnos", "nodes": {"host": host}, "links": []}))
    with Lab(topology, tmp_path_factory.mktemp("lab"), capture=False) as running:
        yield running


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_every_op_ends_as_the_table_says(lab: Lab, programs: Path, protocol: str) -> None:
    one_way = {"FLAGS=LISTEN|UNIDIR without": "OK" if protocol == "udp" else "ENOENT"}
    result = lab["host"].run(["tproxyctl", "run", "--", str(programs / "errnos"), protocol])
    assert dict(line.split(": ") for line in result.stdout.splitlines()) == EXPECTED | one_way


def test_without_an_engine_no_op_is_known(lab: Lab, programs: Path) -> None:
    """As on a kernel without tproxy."""
    command = ["unshare", "--net", "tproxyctl", "run", "--", str(programs / "flood"), "3"]
    assert lab["host"].run(command).stdout == "failed 3 ENOPROTOOPT\n"
