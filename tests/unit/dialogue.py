"""A dialogue with the engine: a packet in at a hook, a decision out.

Two engines are fed alike. One is only ever asked by `decide`, the other by its hot path first, as the daemon does; they
must agree on every packet, so that every dialogue is a test of the hot path, too. Chance is seeded, and the clock
stands until it is put forward.
"""

from __future__ import annotations

import itertools
import random
import shlex
from dataclasses import replace
from typing import Final

from builders import endpoint, packet

from nfq_engine.core.conntrack import Connection, Direction, Stage
from nfq_engine.core.decision import Decision, Reason, Verdict
from nfq_engine.core.nat import PortRange
from nfq_engine.core.option import Operation, pack_address, pack_number
from nfq_engine.core.packet import Endpoint, FlowTuple, Hook, Protocol, Segment, parse
from nfq_engine.core.pipeline import Engine
from nfq_engine.core.rule_text import parse_command
from nfq_engine.core.sockopt import Socket, SocketApi
from nfq_engine.core.sockref import Flag, Sockref
from nfq_engine.core.surroundings import AddressType
from nfq_engine.core.tproxy_table import Arrival, Deletion

PORTS: Final = PortRange(40_000, 40_003)
_FEW: Final = 20  # connections that are compared after every packet


class Interfaces:
    """The gateway: eth0 towards the client, eth1 towards the server; eth9 has no address."""

    def first_address(self, interface: str, size: int) -> bytes | None:
        name = {"eth0": "gateway", "eth1": "outside"}.get(interface)
        return endpoint(name, 0, 4 if size == 4 else 6).address if name else None

    def address_type(self, address: bytes) -> AddressType:
        own = {endpoint(name, 0, version).address for name in ("gateway", "outside") for version in (4, 6)}
        return AddressType.LOCAL if address in own else AddressType.UNICAST


class Dialogue:
    """Two engines on the gateway, their sockets, their clock, and the way that packets are put to them."""

    def __init__(self, *rules: str, ports: PortRange = PORTS, deletion: Deletion = Deletion.LINKED) -> None:
        self.engine, self.twin = (Engine(Interfaces(), random.Random(1), ports, deletion) for _ in range(2))
        self.now = 100.0
        self._apis = [SocketApi(engine) for engine in (self.engine, self.twin)]
        self._cookies = itertools.count(1)
        for rule in rules:
            self.rule(rule)

    def rule(self, text: str) -> None:
        """Do one command of the ruleset's language."""
        for engine in (self.engine, self.twin):
            engine.ruleset.apply(parse_command(shlex.split(text)))

    def wait(self, seconds: float) -> None:
        """Let time pass, and connections expire."""
        self.now += seconds
        for engine in (self.engine, self.twin):
            engine.expire(self.now)

    # Sockets.

    def socket(self, local: Endpoint, protocol: Protocol = Protocol.TCP, *, reuse: bool = False) -> Socket:
        """A bound socket of somebody who may do everything."""
        return Socket(
            cookie=next(self._cookies),
            protocol=protocol,
            local=local,
            is_connected=False,
            has_reuse_address=reuse,
            is_privileged=True,
            owner=0,
        )

    def set(self, socket: Socket, argument: bytes) -> int:
        """setsockopt: the errno."""
        errno, again = (api.set(socket, argument, self.now) for api in self._apis)
        assert errno == again
        return errno

    def get(self, socket: Socket, argument: bytes) -> bytes | int:
        """getsockopt: the value, or an errno."""
        value, again = (api.get(socket, argument) for api in self._apis)
        assert value == again
        return value

    def close(self, socket: Socket) -> None:
        """The socket was closed."""
        for api in self._apis:
            api.closed(socket.cookie)

    def assign(
        self,
        local: Endpoint,
        foreign: Endpoint,
        flags: Flag,
        protocol: Protocol = Protocol.TCP,
        *,
        remote: Endpoint | None = None,
    ) -> Socket:
        """A socket with a foreign address, in the order of calls that programs use."""
        socket = self.socket(local, protocol, reuse=True)
        assert self.set(socket, pack_address(Operation.ASSIGN, foreign)) == 0
        if remote is not None:
            assert self.set(socket, pack_address(Operation.CONNECT, remote)) == 0
        assert self.set(socket, pack_number(Operation.FLAGS, flags)) == 0
        return socket

    def mark_only(self, local: Endpoint, protocol: Protocol = Protocol.TCP) -> Socket:
        """A socket that is only marked."""
        socket = self.socket(local, protocol)
        assert self.set(socket, pack_address(Operation.ASSIGN, Endpoint(bytes(len(local.address)), 0))) == 0
        return socket

    def sockref(self, socket: Socket) -> Sockref:
        """The sockref of a socket."""
        found = self.engine.sockrefs.of_socket(socket.cookie)
        assert found is not None
        return found

    # Packets.

    def put(self, hook: Hook, data: bytes, interface: str = "eth0", *, is_cut: bool = False) -> Decision:
        """The decision on a packet, which is counted once."""
        inward = interface if hook is Hook.PREROUTING else ""
        arrival = Arrival(hook, data, inward, "" if inward else interface, self.now, is_cut=is_cut)
        before = dict(self.engine.counters.packets)
        decision = self.engine.decide(arrival)
        counted = hook, decision.reason
        assert self.engine.counters.packets == {**before, counted: before.get(counted, 0) + 1}
        self._compare_with_hot_path(arrival, decision)
        return decision

    def send(self, hook: Hook, of: FlowTuple, flags: str = "S", interface: str = "eth0") -> tuple[Reason, FlowTuple]:
        """Put one packet of a flow, which passes: the reason, and the flow that it has afterwards."""
        data = packet(of, flags=flags)
        decision = self.put(hook, data, interface)
        assert decision.verdict is Verdict.ACCEPT, decision
        assert decision.payload != data, "what does not change is not given as a payload"
        parsed = parse(decision.payload or data)
        assert isinstance(parsed, Segment)
        assert (decision.payload or data) == packet(parsed.flow, flags=flags)
        return decision.reason, parsed.flow

    def refused(self, hook: Hook, of: FlowTuple, flags: str = "S", interface: str = "eth0") -> Reason:
        """Put one packet of a flow, which is dropped: the reason."""
        decision = self.put(hook, packet(of, flags=flags), interface)
        assert (decision.verdict, decision.payload) == (Verdict.DROP, None), decision
        return decision.reason

    def _compare_with_hot_path(self, arrival: Arrival, decision: Decision) -> None:
        """The twin, asked as the daemon asks, says the same and knows the same afterwards."""
        translated = self.twin.hot.translate(Stage.at(arrival.hook), arrival.data, arrival.now)
        if translated is None:
            assert replace(self.twin.decide(arrival), detail="") == replace(decision, detail="")
        elif translated is arrival.data:
            assert (decision.verdict, decision.reason, decision.payload) == (Verdict.ACCEPT, Reason.ESTABLISHED, None)
        else:
            assert (decision.verdict, decision.reason) == (Verdict.ACCEPT, Reason.TRANSLATED)
            assert decision.payload == translated
        assert len(self.twin.connections) == len(self.engine.connections)
        if len(self.engine.connections) <= _FEW:
            assert list(map(facts, self.twin.connections)) == list(map(facts, self.engine.connections))


def facts(connection: Connection) -> tuple[object, ...]:
    """Everything of a connection that can be seen from outside, but its number."""
    return (
        (connection.original, connection.inside, connection.final),
        (connection.state, connection.is_marked, connection.rule, connection.last_seen),
        [connection.traffic(way) for way in Direction],
        {place: (entry.is_settled, entry.rewrite) for place, entry in connection.entries.items()},
    )
