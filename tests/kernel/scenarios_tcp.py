"""Scenarios of TCP connections. Names say what happens; numbers are ports within the scenario's block."""

from __future__ import annotations

import socket
import struct

import pytest
from scenario import ENGINES, UNMANAGED, Scenario, scenario
from stage import LOOPBACK, SILENCE, TCP, Stage, converse, finish

from nfq_engine.client import Flag

SCENARIOS: list[Scenario] = []
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


def redirected(stage: Stage) -> tuple[socket.socket, socket.socket]:
    """A connection of the client's that a rule brings to the gateway: both sockets."""
    stage.redirect(TCP, 0, 1)
    proxy = stage.at_gateway(TCP, 1, listen=True)
    near = stage.at_client(TCP, 2)
    near.connect((stage.server_address, stage.port(0)))
    return near, stage.accept(proxy)


def passed_on(stage: Stage) -> tuple[socket.socket, socket.socket]:
    """A connection to a foreign address that a rule brings to the server: both sockets."""
    stage.redirect(TCP, 0, 1, stage.server_address)
    server = stage.at_server(TCP, 1)
    near = stage.at_client(TCP, 2)
    near.connect((stage.foreign, stage.port(0)))
    return near, stage.accept(server)


@scenario(SCENARIOS)
def untouched(stage: Stage) -> None:
    stage.redirect(TCP, 0, 1)
    server = stage.at_server(TCP, 3)
    near = stage.at_client(TCP, 2)
    near.connect((stage.server_address, stage.port(3)))
    converse(near, stage.accept(server))


@scenario(SCENARIOS)
def redirect_to_the_gateway(stage: Stage) -> None:
    near, far = redirected(stage)
    converse(near, far)
    finish(near, far)


@scenario(SCENARIOS)
def redirect_to_the_server(stage: Stage) -> None:
    near, far = passed_on(stage)
    converse(near, far)
    finish(near, far)


@scenario(SCENARIOS)
def redirect_to_a_port_where_nobody_listens(stage: Stage) -> None:
    stage.redirect(TCP, 0, 1)
    near = stage.at_client(TCP, 2)
    with pytest.raises(ConnectionRefusedError):
        near.connect((stage.server_address, stage.port(0)))


@scenario(SCENARIOS)
def redirect_to_a_server_that_refuses(stage: Stage) -> None:
    stage.redirect(TCP, 0, 1, stage.server_address)
    near = stage.at_client(TCP, 2)
    with pytest.raises(ConnectionRefusedError):
        near.connect((stage.foreign, stage.port(0)))


@scenario(SCENARIOS)
def foreign_listen(stage: Stage) -> None:
    proxy = stage.at_gateway(TCP, 1, stage.near, listen=True)
    stage.listen_as(proxy, 0)
    near = stage.at_client(TCP, 2)
    near.connect((stage.foreign, stage.port(0)))
    far = stage.accept(proxy)
    converse(near, far)
    finish(far, near)


@scenario(SCENARIOS)
def foreign_listen_at_the_servers_address(stage: Stage) -> None:
    """The server's own listener on that port gets nothing."""
    server = stage.at_server(TCP, 0)
    proxy = stage.at_gateway(TCP, 1, stage.near, listen=True)
    stage.listen_as(proxy, 0, stage.server_address)
    near = stage.at_client(TCP, 2)
    near.connect((stage.server_address, stage.port(0)))
    converse(near, stage.accept(proxy))
    server.settimeout(SILENCE)
    with pytest.raises(TimeoutError):
        server.accept()


@scenario(SCENARIOS)
def foreign_connect(stage: Stage) -> None:
    server = stage.at_server(TCP, 0)
    near = stage.at_gateway(TCP, 1, stage.far)
    stage.connect_as(near, stage.client_address, 2)
    near.connect((stage.server_address, stage.port(0)))
    far = stage.accept(server)
    assert far.getpeername()[:2] == (stage.client_address, stage.port(2))
    converse(near, far)
    finish(near, far)


@scenario(SCENARIOS, chosen_at=("client",))
def foreign_connect_with_a_port_left_to_nat(stage: Stage) -> None:
    server = stage.at_server(TCP, 0)
    near = stage.at_gateway(TCP, 1, stage.far)
    stage.connect_as(near, stage.client_address)
    near.connect((stage.server_address, stage.port(0)))
    far = stage.accept(server)
    assert far.getpeername()[0] == stage.client_address
    converse(near, far)


@scenario(SCENARIOS)
def transparent_proxy(stage: Stage) -> None:
    """Foreign both ways: the client talks to the server's address, the server sees the client's."""
    server = stage.at_server(TCP, 0)
    near, inner = redirected(stage)
    outer = stage.at_gateway(TCP, 3, stage.far)
    stage.connect_as(outer, stage.client_address, 2)
    outer.connect((stage.server_address, stage.port(0)))
    far = stage.accept(server)
    assert far.getpeername()[:2] == near.getsockname()[:2]
    converse(near, inner)
    converse(outer, far)
    finish(near, inner)
    finish(outer, far)


@scenario(SCENARIOS)
def port_clash_is_dropped(stage: Stage) -> None:
    """Two sockets with one foreign endpoint, to one destination."""
    server = stage.at_server(TCP, 0)
    first, second = stage.at_gateway(TCP, 1, stage.far), stage.at_gateway(TCP, 2, stage.far)
    for sock in (first, second):
        stage.connect_as(sock, stage.client_address, 3)
    first.connect((stage.server_address, stage.port(0)))
    second.settimeout(SILENCE)
    with pytest.raises(TimeoutError):
        second.connect((stage.server_address, stage.port(0)))
    second.close()
    converse(first, stage.accept(server))


@scenario(SCENARIOS)
def one_foreign_endpoint_for_two_destinations(stage: Stage) -> None:
    servers = [stage.at_server(TCP, number) for number in (0, 4)]
    for number, server in enumerate(servers):
        sock = stage.at_gateway(TCP, 1 + number, stage.far)
        stage.connect_as(sock, stage.client_address, 3)
        sock.connect(server.getsockname()[:2])
        far = stage.accept(server)
        assert far.getpeername()[1] == stage.port(3)
        converse(sock, far)


@scenario(SCENARIOS, chosen_at=("client",))
def port_clash_is_avoided_where_nat_may_choose(stage: Stage) -> None:
    """The client itself talks to the server; the gateway appears as the client, and would have the same port."""
    server = stage.at_server(TCP, 0)
    direct = stage.at_client(TCP, 1)
    direct.connect((stage.server_address, stage.port(0)))
    converse(direct, stage.accept(server))
    outer = stage.at_gateway(TCP, 1, stage.far)
    stage.connect_as(outer, stage.client_address)
    outer.connect((stage.server_address, stage.port(0)))
    far = stage.accept(server)
    assert far.getpeername() != direct.getsockname()
    converse(outer, far)


@scenario(SCENARIOS)
def several_clients(stage: Stage) -> None:
    """All from the same port, told apart by address alone."""
    stage.redirect(TCP, 0, 1)
    proxy = stage.at_gateway(TCP, 1, listen=True)
    for address in stage.clients():
        near = stage.at_client(TCP, 2, address)
        near.connect((stage.server_address, stage.port(0)))
        far = stage.accept(proxy)
        assert far.getpeername()[0] == address
        converse(near, far)


@scenario(SCENARIOS)
def one_connection_after_another(stage: Stage) -> None:
    """Two rules; what they said of the first connections, the kernel datapath lets the kernel say of the later ones."""
    stage.redirect(TCP, 0, 1)
    stage.redirect(TCP, 2, 3, stage.server_address)
    proxy, server = stage.at_gateway(TCP, 1, listen=True), stage.at_server(TCP, 3)
    for number in range(4, 10):
        near = stage.at_client(TCP, number)
        near.connect((stage.server_address, stage.port(0)))
        converse(near, stage.accept(proxy))
        other = stage.at_client(TCP, number + 10)
        other.connect((stage.foreign, stage.port(2)))
        converse(other, stage.accept(server))


@scenario(SCENARIOS)
def simultaneous_connections(stage: Stage) -> None:
    stage.redirect(TCP, 0, 1, stage.server_address)
    server = stage.at_server(TCP, 1)
    opening = [stage.at_client(TCP, number) for number in range(2, 22)]
    for near in opening:
        near.setblocking(False)
        near.connect_ex((stage.foreign, stage.port(0)))
    accepted = {far.getpeername()[1]: far for far in (stage.accept(server) for _ in opening)}
    for near in opening:
        near.settimeout(3)
        converse(near, accepted[near.getsockname()[1]], 100)


@scenario(SCENARIOS, stays_inside=True)
def local_origin(stage: Stage) -> None:
    """A rule at OUTPUT brings the gateway's own connection back to it."""
    stage.redirect(TCP, 0, 1, hook="output")
    proxy = stage.at_gateway(TCP, 1, LOOPBACK[stage.version], listen=True)
    near = stage.at_gateway(TCP, 2, stage.far)
    near.connect((stage.server_address, stage.port(0)))
    far = stage.accept(proxy)
    converse(near, far)
    finish(near, far)


@scenario(SCENARIOS, stays_inside=True)
def local_origin_to_a_foreign_listener(stage: Stage) -> None:
    proxy = stage.at_gateway(TCP, 1, stage.near, listen=True)
    stage.listen_as(proxy, 0)
    near = stage.at_gateway(TCP, 2, stage.near)
    near.connect((stage.foreign, stage.port(0)))
    converse(near, stage.accept(proxy))


@scenario(SCENARIOS)
def long_transfer_to_the_gateway(stage: Stage) -> None:
    converse(*redirected(stage), 1 << 19)


@scenario(SCENARIOS)
def long_transfer_through_the_gateway(stage: Stage) -> None:
    near, far = passed_on(stage)
    converse(near, far, 1 << 19)
    finish(far, near)


@scenario(SCENARIOS)
def client_resets(stage: Stage) -> None:
    near, far = passed_on(stage)
    converse(near, far)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    near.close()
    with pytest.raises(ConnectionResetError):
        far.recv(1)


@scenario(SCENARIOS)
def server_resets(stage: Stage) -> None:
    near, far = passed_on(stage)
    converse(near, far)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    far.close()
    with pytest.raises(ConnectionResetError):
        near.recv(1)


@scenario(SCENARIOS)
def gateway_resets(stage: Stage) -> None:
    near, far = redirected(stage)
    converse(near, far)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    far.close()
    with pytest.raises(ConnectionResetError):
        near.recv(1)


@scenario(SCENARIOS)
def half_close_by_the_client(stage: Stage) -> None:
    near, far = passed_on(stage)
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    far.sendall(b"still here")
    assert near.recv(100) == b"still here"


@scenario(SCENARIOS)
def half_close_by_the_server(stage: Stage) -> None:
    near, far = passed_on(stage)
    far.shutdown(socket.SHUT_WR)
    assert near.recv(1) == b""
    near.sendall(b"still here")
    assert far.recv(100) == b"still here"
    finish(near, far)


@scenario(SCENARIOS)
def port_used_again_in_time_wait(stage: Stage) -> None:
    """A client's port, while the last connection's entry is in TIME_WAIT; its SYN begins another connection."""
    stage.redirect(TCP, 0, 1, stage.server_address)
    server = stage.at_server(TCP, 1)
    for size in (100, 200):
        near = stage.at_client(TCP, 2)
        near.connect((stage.foreign, stage.port(0)))
        far = stage.accept(server)
        converse(near, far, size)
        far.close()  # TIME_WAIT is then at the server, which takes a SYN with a higher number
        assert near.recv(1) == b""
        near.close()
        stage.until_quiet()


@scenario(SCENARIOS, ways=ENGINES)
def foreign_port_used_again_in_time_wait(stage: Stage) -> None:
    """By another local socket: plain nat drops it until TIME_WAIT is over."""
    server = stage.at_server(TCP, 0)
    for number in (1, 4):
        near = stage.at_gateway(TCP, number, stage.far)
        stage.connect_as(near, stage.client_address, 3)
        near.connect((stage.server_address, stage.port(0)))
        far = stage.accept(server)
        assert far.getpeername()[1] == stage.port(3)
        converse(near, far)
        far.close()
        assert near.recv(1) == b""
        near.close()
        stage.until_quiet()


def users_nat(stage: Stage) -> None:
    """A rule of the user's that would take what the engine maps, port 0, and what not, port 4, to the server."""
    ports = f"{stage.port(0)}, {stage.port(4)}"
    host = stage.server_address if stage.version == 4 else f"[{stage.server_address}]"
    stage.users(
        f"chain prerouting {{ type nat hook prerouting priority -100; tcp dport {{ {ports} }} "
        f"dnat to {host}:{stage.port(5)}\n}}"
    )


@scenario(SCENARIOS)
def redirect_wins_over_the_users_nat(stage: Stage) -> None:
    users_nat(stage)
    near, far = redirected(stage)
    converse(near, far)
    finish(near, far)


@scenario(SCENARIOS, views=UNMANAGED)
def users_nat_has_what_the_engine_leaves(stage: Stage) -> None:
    users_nat(stage)
    stage.redirect(TCP, 0, 1)
    server = stage.at_server(TCP, 5)
    near = stage.at_client(TCP, 6)
    near.connect((stage.foreign, stage.port(4)))
    far = stage.accept(server)
    converse(near, far)
    finish(near, far)


@scenario(SCENARIOS, ways=ENGINES)
def once(stage: Stage) -> None:
    """The second connection goes where it was meant to."""
    server = stage.at_server(TCP, 0)
    proxy = stage.at_gateway(TCP, 1, stage.near, listen=True)
    stage.listen_as(proxy, 0, stage.server_address, Flag.LISTEN | Flag.ONCE)
    for number, listener in ((2, proxy), (3, server)):
        near = stage.at_client(TCP, number)
        near.connect((stage.server_address, stage.port(0)))
        converse(near, stage.accept(listener))


@scenario(SCENARIOS, ways=ENGINES)
def rule_that_drops(stage: Stage) -> None:
    stage.rule(f"-A PREROUTING -p tcp -m tcp --dport {stage.port(0)} -j DROP")
    stage.at_server(TCP, 0)
    near = stage.at_client(TCP, 1)
    near.settimeout(SILENCE)
    with pytest.raises(TimeoutError):
        near.connect((stage.server_address, stage.port(0)))
