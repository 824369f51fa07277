"""The main job: full transparency, seen from all sides.

Builds topologies/transparent-proxy.yaml, fetches a file over IPv4 and IPv6 through a relay that nobody can see, asks a
service that lives on somebody else's address, and then checks (demo_checks.py) what the captures at every interface,
the kernel and the engine say about it. Exit code 0 only if every check holds.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import ipaddress
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from demo_checks import DATAGRAMS, FOREIGN, Run, checks, flow_text
from rich.console import Console

from testbed import capabilities
from testbed.build import BuildError
from testbed.capture import CaptureError
from testbed.connections import Connection, connections
from testbed.lab import Lab, LabError
from testbed.ladder import ladder
from testbed.owner import MARK, owner_mark, sweep
from testbed.process import ServiceError
from testbed.report import write_report
from testbed.topology_file import load
from testbed.trace import trace

ROOT: Final = Path(__file__).parent.parent
TOPOLOGY: Final = ROOT / "topologies" / "transparent-proxy.yaml"
REPORT: Final = "report.html"
ENGINE_TABLE: Final = "nfq_tproxy"
CONNTRACK_COUNTS: Final = Path("/proc/sys/net/netfilter/nf_conntrack_acct")
ESTABLISHED: Final = 1  # in /proc/net/tcp
PATIENCE: Final = 10.0
MOST_PROBLEMS: Final = 5
WIDEST: Final = 160  # columns


def rules(lab: Lab) -> str:
    """The gateway's ruleset, as nft and as iptables tell it, without the engine's table."""
    tables = lab["gateway"].run(["nft", "list", "tables"]).stdout.split("\n")
    listing = [
        lab["gateway"].run(["nft", "--stateless", "list", *line.split()]).stdout
        for line in tables
        if line and line.split()[-1] != ENGINE_TABLE
    ]
    saved = lab["gateway"].run(["iptables-save"]).stdout
    dated = [line for line in saved.splitlines() if not line.startswith("#")]
    return "\n".join([*listing, *dated])


def held_sockets(lab: Lab, version: int) -> set[tuple[str, int]]:
    """Local address and port of the gateway's TCP sockets while a connection is held open through the relay."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with lab["client"].namespace.socket(family, socket.SOCK_STREAM) as held:
        held.settimeout(PATIENCE)
        held.connect((lab["server"].address(version), 80))
        held.sendall(b"GET / HTTP/1.1\r\nHost: server\r\n\r\n")
        answer = http.client.HTTPResponse(held)
        answer.begin()  # so both of the relay's sockets are there; HTTP/1.1 keeps them open
        found = lab["gateway"].call(connected_sockets)
        answer.read()  # all of it: a connection that is closed unread is reset, and soon forgotten
    return found


def connected_sockets() -> set[tuple[str, int]]:
    """Local address and port of every connected TCP socket of this thread's namespace (proc_net_tcp)."""
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if int(state, 16) != ESTABLISHED:
                continue
            digits, _, port = local.partition(":")
            # Each 32-bit word is in the machine's byte order.
            words = [int(digits[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(digits), 8)]
            address = ipaddress.ip_address(socket.inet_ntop(family, b"".join(words)))
            mapped = getattr(address, "ipv4_mapped", None)
            found.add((str(mapped or address), int(port, 16)))
    return found


def counters_at_rest(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The engine's counters once no packet was counted between two readings of them.

    The engine answers from between its packets, so a reading may come while some have passed one hook and wait for the
    next; those of a connection that the client closed are still on their way when the client has ended.
    """
    before, counters = None, read()
    deadline = time.monotonic() + PATIENCE
    while before != counters["hooks"]:
        if time.monotonic() > deadline:
            raise LabError(f"the engine still counted packets {PATIENCE} s after the last request")
        before, counters = counters["hooks"], read()
    return counters


def work(lab: Lab) -> Run:
    """Let the lab do its job, and gather what there is to check."""
    client, gateway, server = lab["client"], lab["gateway"], lab["server"]
    assert lab.capture is not None
    # A rule of the user's, made with iptables: it must not change either.
    gateway.run(["iptables", "-A", "FORWARD", "-p", "tcp", "--dport", "8080", "-j", "ACCEPT"])
    before = rules(lab)
    lab.start_programs()
    # The kernel datapath lists what conntrack counts, and conntrack counts only where it is told to.
    gateway.call(lambda: CONNTRACK_COUNTS.write_text("1"))
    fetched, asked = {}, {}
    sockets: set[tuple[str, int]] = set()
    python = (sys.executable, "-m", "testbed.traffic")
    for version in (4, 6):
        address = server.address(version)
        host = f"[{address}]" if version == 6 else address
        fetched[version] = json.loads(client.run([*python, "fetch", f"http://{host}/file"]).stdout)
        asking = [*python, "udp-ask", FOREIGN[version], "--port", "7", "--count", str(DATAGRAMS)]
        asked[version] = json.loads(client.run(asking).stdout)
        sockets |= held_sockets(lab, version)
    counters = counters_at_rest(lambda: json.loads(gateway.run(["tproxyctl", "counters", "--json"]).stdout))
    connections = json.loads(gateway.run(["tproxyctl", "connections", "--json"]).stdout)
    during = rules(lab)
    lab.capture.settle()
    lab.capture.verify()
    frames = lab.capture.frames()
    write_report(lab, lab.directory / REPORT)
    lab.programs["gateway", "tproxyd"].stop()
    web_log = lab.programs["server", "web"].log.read_text().splitlines()
    return Run(
        frames=frames,
        fetched=fetched,
        asked=asked,
        web_log=[json.loads(line) for line in web_log if line.startswith("{")],
        gateway_sockets=sockets,
        gateway_addresses={str(address.ip) for address in gateway.addresses},
        client={version: client.address(version) for version in (4, 6)},
        server={version: server.address(version) for version in (4, 6)},
        counters=counters,
        connections=connections,
        rules_before=before,
        rules_during=during,
        rules_after=rules(lab),
    )


def leftovers(before: set[str]) -> list[str]:
    """What a lab that has ended left on the machine: processes, namespaces, interfaces."""
    mark = f"{MARK}={owner_mark()}".encode()
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            try:
                is_ours = mark in (directory / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if is_ours:
                found.append(f"process {directory.name}")
    here = Path("/proc/self/ns/net").stat().st_ino
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue
        if target.startswith("net:") and target != f"net:[{here}]":
            found.append(f"namespace {target}")
    return found + sorted(interfaces() - before)


def interfaces() -> set[str]:
    """The interfaces of this namespace, and the named namespaces of the machine."""
    named = Path("/run/netns")
    names = {f"named namespace {path.name}" for path in named.iterdir()} if named.is_dir() else set()
    return {f"interface {name}" for _, name in socket.if_nameindex()} | names


def relayed_connection(run: Run) -> Connection:
    """The first download: the leg from the client to the relay, and the one from the relay to the server."""
    downloads = [connection for connection in connections(trace(run.frames)) if len(connection.legs) > 1]
    return min(downloads, key=lambda connection: connection.legs[0].began)


def inside_the_gateway(run: Run, relayed: Connection) -> Iterator[str]:
    """What no interface shows: the addresses that the relay's own sockets have, and who gave them others."""
    names = {leg.initiator: name for name, leg in zip("AB", relayed.legs, strict=True)}
    for connection in run.connections:
        tuples = [flow_text(connection[step]) for step in ("original", "inside", "final")]
        source = tuples[2 if tuples[0] == tuples[1] else 0].split(" ")[0]
        if source in names and connection["protocol"] == "tcp":
            by = connection["rule"] or "sockref"
            verb = "leaves as" if tuples[0] == tuples[1] else "becomes"
            yield f"  {names[source]} in the gateway: {tuples[0]} {verb} {tuples[2]} (by {by}), and answers back"


def report(console: Console, what: str, problems: list[str]) -> bool:
    """Print one check's line, and what is wrong below it."""
    console.print(("[red]FAILED[/] " if problems else "[green]ok[/]     ") + what.replace("[", "\\["))
    for problem in problems[:MOST_PROBLEMS]:
        console.print(f"         {problem}", markup=False, highlight=False)
    if len(problems) > MOST_PROBLEMS:
        console.print(f"         and {len(problems) - MOST_PROBLEMS} more")
    return not problems


def demonstrate(console: Console, directory: Path, datapath: str) -> bool:
    """Run the lab and every check on it; True if all hold."""
    topology = load(TOPOLOGY)
    before = interfaces()
    options = {"gateway": ("--datapath", datapath)}
    with Lab(topology, directory, programs=False, engine_options=options, record=True) as lab:
        run = work(lab)
        assert lab.capture is not None
        points = lab.capture.points
    console.rule("one connection, seen at every interface")
    relayed = relayed_connection(run)
    console.print(ladder(relayed, points, min(console.width, WIDEST)), highlight=False, soft_wrap=True)
    for line in sorted(inside_the_gateway(run, relayed)):
        console.print(line, markup=False, highlight=False)
    console.rule("checks")
    results = [report(console, check.__doc__ or check.__name__, list(check(run))) for check in checks(datapath)]
    results.append(report(console, "nothing is left behind", [*lab.left_over, *leftovers(before)]))
    console.print(f"\nreport: {directory / REPORT}", markup=False, highlight=False)
    console.print(f"captures (pcapng) and logs: {directory}", markup=False, highlight=False)
    return all(results)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Full transparency, seen from all sides: client, gateway, server, tproxy, and what captures say.",
        epilog="Exit code: 0 if every check holds, 1 if one does not, 2 if the lab cannot be built here.",
    )
    parser.add_argument("--directory", type=Path, help="where captures and logs go (default: a new one below /tmp)")
    parser.add_argument(
        "--datapath",
        choices=("inline", "kernel"),
        default="inline",
        help="who rewrites packets: the engine, or as it says the kernel's NAT (default: inline)",
    )
    return parser.parse_args()


def main() -> int:
    """Run the demo."""
    # A fifth of the time would be spent in looking through 30,000 frames for garbage, again and again; there is none.
    gc.disable()
    arguments = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    sweep()
    found = capabilities.probe()
    if text := capabilities.explain(found):
        console.print(text, markup=False, highlight=False)
    if found.missing(required=True):
        return 2
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="tproxy-demo-"))
    try:
        return 0 if demonstrate(console, directory, arguments.datapath) else 1
    except KeyboardInterrupt:
        console.print("interrupted; the lab is gone")
        return 130
    except (BuildError, CaptureError, LabError, ServiceError, OSError) as error:
        console.print(f"FAILED: {error}", markup=False, highlight=False, style="red")
        return 2


if __name__ == "__main__":
    sys.exit(main())
