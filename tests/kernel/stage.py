"""Where scenarios are played: a client, a gateway and a server, and three ways to have the gateway translate.

Owns: the labs, what a scenario may do in one, and what a mapping is called in each: the engine's rules and sockrefs for
datapaths `inline` and `kernel`, nft nat statements of the same meaning for `plain`. What is played must not know which.

One lab serves all scenarios of a way. Each scenario has ports of its own, so that none sees what another left behind.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from observation import Entry, Names, Observation, observe
from scapy.packet import Packet

from nfq_engine.client import Flag, Tproxy
from testbed.capture import CaptureSession
from testbed.lab import Lab
from testbed.topology import End, EngineSpec, Kind, Link, Node, Route, Topology

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
PATIENCE = 10.0  # seconds for what must come
SILENCE = 0.15  # seconds for what must not
QUIET = 0.06  # seconds without a packet after which a scenario is over: longer than a delayed acknowledgement
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
ANY = {4: "0.0.0.0", 6: "::"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
FOREIGN = {4: "198.51.100.7", 6: "2001:db8::7"}
WORD: dict[int, str] = {TCP: "tcp", UDP: "udp"}
NFT_FAMILY = {4: "ip", 6: "ip6"}
BLOCK = 40  # ports of a scenario
FIRST_PORT = 10_000
MACS = {"client": "02:00:00:00:01:02", "near": "02:00:00:00:01:01", "far": "02:00:00:00:02:01"}


class Way(StrEnum):
    """Who translates."""

    INLINE = "inline"
    KERNEL = "kernel"
    PLAIN = "plain"


def topology(way: Way) -> Topology:
    """Client 10.1.0.2 to .5, gateway 10.1.0.1 and 10.2.0.1, server 10.2.0.2; the same in fd01:: and fd02::."""
    engine = None if way is Way.PLAIN else EngineSpec(way.value)
    onward = tuple(
        Route(ipaddress.ip_network(to), ipaddress.ip_address(via))
        for to, via in (("0.0.0.0/0", "10.2.0.2"), ("::/0", "fd02::2"))
    )
    nodes = (Node("client"), Node("gateway", Kind.ROUTER, onward, engine=engine), Node("server"))
    return Topology(
        f"oracle-{way}",
        nodes,
        (
            Link(
                End("client", "eth0", _addresses(1, 2, 3, 4, 5), mac=MACS["client"]),
                End("gateway", "eth0", _addresses(1, 1), mac=MACS["near"]),
            ),
            Link(End("gateway", "eth1", _addresses(2, 1), mac=MACS["far"]), End("server", "eth0", _addresses(2, 2))),
        ),
        capture=("client:eth0", "server:eth0"),
    )


def _addresses(net: int, *hosts: int) -> tuple[ipaddress.IPv4Interface | ipaddress.IPv6Interface, ...]:
    fours = [ipaddress.IPv4Interface(f"10.{net}.0.{host}/24") for host in hosts]
    return (*fours, *(ipaddress.IPv6Interface(f"fd0{net}::{host}/64") for host in hosts))


# The rule with `ct` has the kernel track connections from the start, not from the first nat rule on.
PLAIN_TABLES = "".join(
    f"""
table {family} oracle {{
    chain prerouting {{ type nat hook prerouting priority -101; }}
    chain output {{ type nat hook output priority -101; }}
    chain postrouting {{ type nat hook postrouting priority 99; }}
    chain tracked {{
        type filter hook prerouting priority 0;
        ct state new counter
    }}
}}"""
    for family in NFT_FAMILY.values()
)


@dataclass
class House:
    """A running lab of one way, with a client of its engine if it has one."""

    way: Way
    lab: Lab
    tproxy: Tproxy | None

    @property
    def capture(self) -> CaptureSession:
        assert self.lab.capture is not None
        return self.lab.capture

    def nft(self, text: str) -> None:
        """Run nft in the gateway."""
        self.lab["gateway"].run(["nft", text])

    def entries(self, version: int) -> list[Entry]:
        """The conntrack view: the engine's own where it carries the connections, else the kernel's."""
        if self.way is Way.INLINE:
            assert self.tproxy is not None
            forms = self.tproxy.call({"call": "connections"})["connections"]
            return [_engine_entry(form) for form in forms if not _is_refused(form)]
        family = ["-f", "ipv6"] if version == 6 else []
        lines = self.lab["gateway"].run(["conntrack", "-L", *family]).stdout.splitlines()
        return [_kernel_entry(line) for line in lines if line.startswith(("tcp", "udp"))]


def _is_refused(form: dict[str, Any]) -> bool:
    """Was it reset before any other answer? conntrack forgets such at once, the engine after ten seconds."""
    original, reply = form["packets"]["original"], form["packets"]["reply"]
    return form["state"] == "CLOSE" and (reply == 0 or (original, reply) == (1, 1))


def _engine_entry(form: dict[str, Any]) -> Entry:
    def flow(which: str) -> tuple[str, int, str, int]:
        source, destination = form[which]["source"], form[which]["destination"]
        return source["address"], source["port"], destination["address"], destination["port"]

    return Entry(form["protocol"], flow("original"), flow("reply"), form["state"])


def _kernel_entry(line: str) -> Entry:
    """A line of `conntrack -L`: protocol, number, seconds, for TCP the state, then both tuples and flags."""
    flows = re.findall(r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)", line)
    original, reply = ((source, int(port), to, int(dport)) for source, to, port, dport in flows)
    words = line.split()
    udp_state = "UNREPLIED" if "[UNREPLIED]" in words else "ASSURED"
    return Entry(words[0], original, reply, words[3] if words[0] == "tcp" else udp_state)


@contextlib.contextmanager
def house(way: Way, directory: Path) -> Iterator[House]:
    """Build the lab of a way."""
    with Lab(topology(way), directory) as lab, contextlib.ExitStack() as stack:
        tproxy = None if way is Way.PLAIN else stack.enter_context(lab["gateway"].call(Tproxy))
        running = House(way, lab, tproxy)
        if way is Way.PLAIN:
            running.nft(PLAIN_TABLES)
        yield running


@dataclass
class Stage:
    """One scenario in one lab and one family of addresses. Ports are given as numbers within the scenario's block."""

    house: House
    version: int
    block: range
    stack: contextlib.ExitStack
    chosen_at: frozenset[str] = frozenset()
    _rules: list[str] = field(default_factory=list)

    # Places.

    @property
    def client_address(self) -> str:
        return self._address("client")

    @property
    def near(self) -> str:
        """The gateway's address at the client's side."""
        return self._address("gateway", "eth0")

    @property
    def far(self) -> str:
        """The gateway's address at the server's side."""
        return self._address("gateway", "eth1")

    @property
    def server_address(self) -> str:
        return self._address("server")

    @property
    def foreign(self) -> str:
        """An address of nobody's, somewhere beyond the gateway."""
        return FOREIGN[self.version]

    def clients(self) -> list[str]:
        """All addresses of the client's."""
        return [str(a.ip) for a in self.house.lab["client"].addresses if a.version == self.version]

    def port(self, number: int) -> int:
        """A port of the scenario's."""
        return self.block[number]

    def _address(self, node: str, interface: str = "eth0") -> str:
        return self.house.lab[node].address(self.version, interface)

    # Sockets.

    def bound(self, node: str, kind: int, address: str, number: int, *, listen: bool = False) -> socket.socket:
        """A bound socket with SO_REUSEADDR, closed when the scenario is over."""
        made = self.house.lab[node].namespace.socket(FAMILY[self.version], kind)
        self.stack.callback(made.close)
        made.settimeout(PATIENCE)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, self.port(number)))
        if listen:
            made.listen(64)
        return made

    def at_client(self, kind: int, number: int, address: str | None = None) -> socket.socket:
        """A socket of the client's."""
        return self.bound("client", kind, address or self.client_address, number)

    def at_server(self, kind: int, number: int) -> socket.socket:
        """A socket of the server's; TCP ones listen."""
        return self.bound("server", kind, self.server_address, number, listen=kind == TCP)

    def at_gateway(self, kind: int, number: int, address: str | None = None, *, listen: bool = False) -> socket.socket:
        """A socket of the gateway's, at any address if none is named."""
        return self.bound("gateway", kind, address or ANY[self.version], number, listen=listen)

    def accept(self, listener: socket.socket) -> socket.socket:
        """The next connection, closed when the scenario is over."""
        accepted, _ = listener.accept()
        accepted.settimeout(PATIENCE)
        self.stack.callback(accepted.close)
        return accepted

    # Mappings.

    def redirect(self, kind: int, number: int, to: int, address: str | None = None, hook: str = "prerouting") -> None:
        """Connections to a port go to another, on this host or at an address; on this host if none is named."""
        dport, to_port = self.port(number), self.port(to)
        if self.house.way is not Way.PLAIN:
            on_ip = f" --on-ip {address}" if address else ""
            match = f"-p {WORD[kind]} -m {WORD[kind]} --dport {dport}"
            self.rule(f"-A {hook.upper()} {match} -j TPROXY --on-port {to_port}{on_ip}")
            return
        target = f"dnat to {self._written(address)}:{to_port}" if address else f"redirect to :{to_port}"
        self.plain("add", hook, f"{WORD[kind]} dport {dport} {target}")

    def listen_as(
        self, sock: socket.socket, number: int, address: str | None = None, flags: Flag = Flag.LISTEN
    ) -> None:
        """Connections to a foreign endpoint come to this socket."""
        foreign, port = address or self.foreign, self.port(number)
        tproxy = self.house.tproxy
        if tproxy is not None:
            tproxy.assign(sock, foreign, port)
            tproxy.set_flags(sock, flags)
            return
        local, local_port = sock.getsockname()[:2]
        family = NFT_FAMILY[self.version]
        match = f"{family} daddr {foreign} {WORD[sock.type]} dport {port}"
        for chain in ("prerouting", "output"):
            self.plain("insert", chain, f"{match} dnat to {self._written(local)}:{local_port}")

    def connect_as(self, sock: socket.socket, address: str, number: int | None = None) -> None:
        """What this socket connects to sees it as a foreign endpoint; without a number NAT chooses the port."""
        tproxy = self.house.tproxy
        port = 0 if number is None else self.port(number)
        if tproxy is not None:
            tproxy.assign(sock, address, port)
            tproxy.set_flags(sock, Flag.CONNECT)
            return
        local, local_port = sock.getsockname()[:2]
        family = NFT_FAMILY[self.version]
        match = f"{family} saddr {local} {WORD[sock.type]} sport {local_port}"
        to = f"{self._written(address)}:{port}" if port else address
        self.plain("insert", "postrouting", f"{match} snat to {to}")

    def rule(self, rule: str) -> None:
        """Add a rule to the engine's table."""
        self._rules.append(rule)
        self._load()

    def plain(self, verb: str, chain: str, statement: str) -> None:
        """Add a rule to the table that stands in for the engine."""
        self.house.nft(f"{verb} rule {NFT_FAMILY[self.version]} oracle {chain} {statement}")

    def users(self, text: str) -> None:
        """Load a table of the user's, named `users`, which goes when the scenario is over."""
        family = NFT_FAMILY[self.version]
        self.house.nft(f"table {family} users {{\n{text}\n}}")
        self.stack.callback(self.house.nft, f"delete table {family} users")

    def _written(self, address: str) -> str:
        return f"[{address}]" if self.version == 6 else address

    def _load(self) -> None:
        assert self.house.tproxy is not None
        text = "\n".join(["*tproxy", ":PREROUTING ACCEPT [0:0]", ":OUTPUT ACCEPT [0:0]", *self._rules, "COMMIT", ""])
        self.house.tproxy.call({"call": "restore", "text": text})

    def clear(self) -> None:
        """Take the rules away."""
        if self.house.way is Way.PLAIN:
            for chain in ("prerouting", "output", "postrouting"):
                self.house.nft(f"flush chain {NFT_FAMILY[self.version]} oracle {chain}")
        elif self._rules:
            self._rules.clear()
            self._load()

    # Traffic.

    def inject(self, node: str, packet: Packet) -> None:
        """Put a packet on the wire from the client or the server to the gateway, exactly as it is."""
        mac = MACS["near" if node == "client" else "far"]
        ethertype = 0x0800 if self.version == 4 else 0x86DD
        with self.house.lab[node].namespace.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as wire:
            wire.sendto(bytes(packet), ("eth0", ethertype, 0, 0, bytes.fromhex(mac.replace(":", ""))))

    def forget_paths(self) -> None:
        """Have all nodes forget the path MTUs that they have learnt."""
        for node in ("client", "gateway", "server"):
            self.run(node, "ip", f"-{self.version}", "route", "flush", "cache")

    def run(self, node: str, *command: str) -> None:
        """Run a command."""
        self.house.lab[node].run(list(command))

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"not in time: {what}"
            time.sleep(0.005)

    def until_seen(self, point: str, count: int, since: int) -> None:
        """Wait until so many packets of the scenario were seen at a point."""
        names = Names(self.block)

        def seen() -> bool:
            frames = self.house.capture.frames(point, since)
            return sum(1 for frame in frames if frame.ip and names.concerns(frame.ip)) >= count

        self.until(seen, f"{count} packets at {point}")

    def until_quiet(self) -> None:
        """Wait until nothing is on the wires any more."""
        capture, deadline = self.house.capture, time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            capture.settle()
            before = capture.total
            capture.wait(before, QUIET)
            if capture.total == before:
                return
        raise AssertionError("the wires do not come to rest")


def perform(
    running: House, version: int, number: int, chosen_at: frozenset[str], play: Callable[[Stage], None]
) -> Observation:
    """Play a scenario in a lab, and look. `number` tells which ports are the scenario's own."""
    first = FIRST_PORT + number * BLOCK
    block = range(first, first + BLOCK)
    begin = running.capture.mark()
    with contextlib.ExitStack() as stack:
        stage = Stage(running, version, block, stack, chosen_at)
        stack.callback(stage.clear)
        play(stage)
        stage.until_quiet()
        entries = running.entries(version)
        running.capture.verify()
        return observe(running.capture.frames(since=begin), entries, Names(block, chosen_at))


def converse(near: socket.socket, far: socket.socket, size: int = 1000) -> None:
    """Send so many bytes one way and others back over TCP, and compare."""
    for sender, receiver, salt in ((near, far, 1), (far, near, 2)):
        data = bytes((n * 7 + salt + (n >> 8)) & 0xFF for n in range(size))
        thread = threading.Thread(target=sender.sendall, args=(data,))
        thread.start()
        got = b""
        while len(got) < size and (piece := receiver.recv(1 << 16)):
            got += piece
        thread.join()
        assert got == data


def ask_and_answer(near: socket.socket, far: socket.socket, question: bytes = b"?", answer: bytes = b"!") -> None:
    """One datagram each way; `near` is connected."""
    near.send(question)
    data, peer = far.recvfrom(1 << 16)
    assert data == question
    far.sendto(answer, peer)
    assert near.recv(1 << 16) == answer


def silent(sock: socket.socket) -> None:
    """Nothing comes."""
    sock.settimeout(SILENCE)
    try:
        data = sock.recv(1 << 16)
    except TimeoutError:
        return
    finally:
        sock.settimeout(PATIENCE)
    raise AssertionError(f"got {data!r}")


def finish(near: socket.socket, far: socket.socket) -> None:
    """Close both sides in turn, each seeing the other's end."""
    near.close()
    assert far.recv(1) == b""
    far.close()
