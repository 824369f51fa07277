"""Proxies that know nothing of this project, behind a redirect rule: squid and mitmproxy, each as distributed.

Both ask getsockopt(SO_ORIGINAL_DST) where a connection was going. With datapath `kernel` the kernel itself answers;
inline they run under `tproxyctl run`, and the engine does. The requests name another host than they go to, so what the
proxies log and where they connect is that answer and nothing else.

Neither has the client's address towards the server: squid's own `tproxy` mode sets IP_TRANSPARENT, and no IP_TPROXY.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from engine_lab import until

from testbed.conversations import conversations
from testbed.frames import endpoint
from testbed.lab import Lab
from testbed.process import Program
from testbed.topology import Readiness
from testbed.topology_file import loads
from testbed.traffic import content

pytestmark = pytest.mark.lab

SIZE = 200_000
PORT = 3129
READY = Readiness(port=PORT, within=60)
PATIENCE = 10.0
LIE = "203.0.113.9"  # nobody's address (RFC 5737)
TOPOLOGY = """
name: proxies
nodes:
  client:
  gateway:
    kind: router
    engine:
      datapath: DATAPATH
      rules:
        - -A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 3129
        - -A PREROUTING -p tcp -m tcp --dport 8080 -j TPROXY --on-port 3129
  server:
    services:
      web80:
        command: ["{python}", -m, testbed.traffic, http-server, --port, 80, --size, SIZE, --notify-fd, "{notify_fd}"]
        ready: notify
      web8080:
        command: ["{python}", -m, testbed.traffic, http-server, --port, 8080, --size, SIZE, --notify-fd, "{notify_fd}"]
        ready: notify
links:
  - ends: [{node: client}, {node: gateway}]
  - ends: [{node: gateway}, {node: server}]
"""
# Squid wants a port for itself too, for the icons in its listings.
SQUID = """
http_port {port} intercept
http_port 127.0.0.1:3128
http_access allow all
cache deny all
cache_effective_user nobody
pid_filename none
pinger_enable off
netdb_filename none
dns_nameservers 127.0.0.1
visible_hostname gateway
coredump_dir {folder}
cache_log {folder}/cache.log
logformat destination %>a %>p was going to %>la %>lp, served by %<a %<p: %rm %>rp
access_log stdio:{folder}/access.log destination
"""
# Squid keeps files in /dev/shm while it runs; a mount of its own takes them along however it ends.
PRIVATE_SHM = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
UNDER = {"kernel": [], "inline": ["tproxyctl", "run", "--"]}


@dataclass(frozen=True, slots=True)
class Request:
    """A request that was answered: the client's port, and where it was going."""

    client: str
    port: int
    server: str
    server_port: int
    path: str


@dataclass(frozen=True, slots=True)
class Running:
    """A lab with a proxy on its gateway, what the proxy logs, and how it logs a request: patterns of lines."""

    lab: Lab
    program: Program
    log: Path
    lines_of: Callable[[Request], Sequence[str]]


def squid(lab: Lab, folder: Path, under: list[str]) -> Running:
    shutil.chown(folder, "nobody")  # squid will not work as root
    configuration = folder / "squid.conf"
    configuration.write_text(SQUID.format(folder=folder, port=PORT))
    command = [*under, *PRIVATE_SHM, "squid", "-N", "-d1", "-f", str(configuration)]
    return Running(lab, lab["gateway"].start("squid", command, READY), folder / "access.log", squid_lines)


def squid_lines(request: Request) -> Sequence[str]:
    client, server = f"{request.client} {request.port}", f"{request.server} {request.server_port}"
    return [re.escape(f"{client} was going to {server}, served by {server}: GET {request.path}")]


def mitmproxy(lab: Lab, folder: Path, under: list[str]) -> Running:
    options = ["--mode", "transparent", "--listen-port", str(PORT), "--set", f"confdir={folder}"]
    program = lab["gateway"].start("mitmdump", [*under, "mitmdump", *options], READY)
    return Running(lab, program, program.log, mitmproxy_lines)


def mitmproxy_lines(request: Request) -> Sequence[str]:
    client = re.escape(endpoint(request.client, request.port)) + r"[]:]+"
    server = re.escape(endpoint(request.server, request.server_port))
    return [rf".*{client} server connect {server}", rf".*{client} GET http://\S+{request.path}( .*)?"]


STARTS = {"squid": squid, "mitmdump": mitmproxy}
PACKAGES = {"squid": "squid", "mitmdump": "mitmproxy"}
CASES = [
    pytest.param(
        (proxy, datapath),
        marks=pytest.mark.needs(*needs, *(["seccomp-notify"] if datapath == "inline" else [])),
        id=f"{PACKAGES[proxy]}-{datapath}",
    )
    for proxy, needs in (("squid", ["other-users"]), ("mitmdump", []))
    for datapath in UNDER
]


@pytest.fixture(scope="module", params=CASES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    proxy, datapath = request.param
    if shutil.which(proxy) is None:
        pytest.skip(f"missing {PACKAGES[proxy]}: apt install {PACKAGES[proxy]}")
    topology = TOPOLOGY.replace("DATAPATH", datapath).replace("SIZE", str(SIZE))
    # Not below pytest's own folder, which only root may enter.
    with (
        tempfile.TemporaryDirectory(prefix="proxy-") as folder,
        Lab(loads(topology), tmp_path_factory.mktemp(datapath)) as lab,
    ):
        started = STARTS[proxy](lab, Path(folder), UNDER[datapath])
        yield started
        started.program.kill()  # squid takes its time to say goodbye


def fetch(address: str, port: int, path: str) -> tuple[bytes, tuple[str, int]]:
    """What a server answers to a request that names another host, and where the request came from."""
    connection = http.client.HTTPConnection(address, port, timeout=PATIENCE)
    try:
        connection.request("GET", path, headers={"Host": f"{LIE}:{port}", "Connection": "close"})
        address, port, *_ = connection.sock.getsockname()
        return connection.getresponse().read(), (address, port)
    finally:
        connection.close()


def has_line(log: Path, line: str) -> bool:
    return re.search(rf"^{line}$", log.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("port", [80, 8080])
@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_proxy_fetches_from_where_the_client_was_going(running: Running, version: int, port: int) -> None:
    lab = running.lab
    client, server = lab["client"].address(version), lab["server"].address(version)
    outer = lab["gateway"].address(version, "eth1")
    path = f"/file-{version}-{port}"
    body, came_from = lab["client"].call(partial(fetch, server, port, path))
    assert hashlib.sha256(body).hexdigest() == hashlib.sha256(content(SIZE)).hexdigest()
    for line in running.lines_of(Request(*came_from, server, port, path)):
        until(partial(has_line, running.log, line), f"{line} in the proxy's log")
    log = lab.programs["server", f"web{port}"].log.read_text().splitlines()
    peers = [line["peer"] for line in map(json.loads, log) if path in line["said"]]
    assert peers == [outer], "the server's log"
    assert lab.capture is not None
    lab.capture.settle()
    to_server = f"> {endpoint(server, port)}"
    at_client, at_server = (
        {str(one) for one in conversations(lab.capture.frames(f"{node}:eth0")) if str(one).endswith(to_server)}
        for node in ("client", "server")
    )
    assert (at_client, at_server) == ({f"tcp {client} {to_server}"}, {f"tcp {outer} {to_server}"})
