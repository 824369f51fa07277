"""What the requests on the control socket mean.

Owns: the calls by name, who may make them, the form of their replies. Place: between the control socket and the core.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import Final

from nfq_engine import wire
from nfq_engine.core.option import SHORTEST, Operation, unpack_operation
from nfq_engine.core.packet import FlowTuple, Protocol
from nfq_engine.core.rule_text import RuleError, parse_command, restore, save
from nfq_engine.core.sockopt import Socket, SocketApi
from nfq_engine.shell import sockets
from nfq_engine.shell.control import Caller
from nfq_engine.shell.datapath import Datapath
from nfq_engine.shell.forms import endpoint_from, listener_form, number_from, sockref_form
from nfq_engine.shell.publisher import Publisher
from nfq_engine.shell.supervisor_caller import user_namespaces_over_network

log: Final = logging.getLogger("tproxyd")

_MOST_PID: Final = 0x7FFFFFFF
_MOST_DIGEST: Final = 0xFFFFFFFF

_Handler = Callable[["Answers", Caller, wire.Message, "int | None"], wire.Message]


class Answers:
    """Answers requests about one datapath and its table.

    `settle` is called first for what depends on news that may still wait: closed sockets, connections that ended.
    """

    def __init__(self, datapath: Datapath, settle: Callable[[], None], status: Callable[[], wire.Message]) -> None:
        self._datapath = datapath
        self._table = datapath.table
        self.socket_api = SocketApi(datapath.table)
        self._settle = settle
        self._status = status
        self.publisher = Publisher(datapath)
        self._namespace = sockets.own_namespace()
        self._administrators = user_namespaces_over_network()

    def __call__(self, caller: Caller, request: wire.Message, descriptor: int | None) -> wire.Message:
        """The reply to one request; whatever is wrong with it is told, and nothing is changed."""
        handler = _CALLS.get(request.get("call", "")) if isinstance(request.get("call"), str) else None
        if handler is None:
            return {"error": f"unknown call {request.get('call')!r}"}
        try:
            self._settle()
            return handler(self, caller, request, descriptor)
        except OSError as error:
            return {"errno": error.errno or errno.EIO, "error": error.strerror or str(error)}
        except RuleError as error:
            return {"error": str(error)}
        except (KeyError, TypeError, ValueError) as error:
            return {"error": f"malformed request: {type(error).__name__}: {error}"}
        except Exception:  # no request may end the engine
            log.exception("a request fails with EIO")
            return {"errno": errno.EIO, "error": "the engine has a fault: see its log"}

    def _may_administer(self, pid: int) -> bool:
        return sockets.may_administer(pid, self._administrators)

    def _require_privilege(self, caller: Caller) -> None:
        """OSError(EPERM) for callers without CAP_NET_ADMIN here."""
        if not self._may_administer(caller.pid):
            raise OSError(errno.EPERM, "this needs CAP_NET_ADMIN in the engine's network namespace")

    # The socket API.

    def _setsockopt(self, caller: Caller, request: wire.Message, descriptor: int | None) -> wire.Message:
        argument = bytes.fromhex(request["argument"])
        code = self.socket_api.set(self._socket(caller, request, descriptor, argument), argument, time.monotonic())
        return {"errno": code}

    def _getsockopt(self, caller: Caller, request: wire.Message, descriptor: int | None) -> wire.Message:
        argument = bytes.fromhex(request["argument"])
        result = self.socket_api.get(self._socket(caller, request, descriptor, argument), argument)
        return {"errno": result} if isinstance(result, int) else {"value": result.hex()}

    def _socket(self, caller: Caller, request: wire.Message, descriptor: int | None, argument: bytes) -> Socket:
        """The calling socket; privileged if the caller is, and so is the process on whose behalf it calls.

        Only ASSIGN asks for privileges, and for what a socket is now; all else is about its sockref.
        """
        if descriptor is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        pids = {caller.pid, number_from(request.get("pid", caller.pid), _MOST_PID)}
        is_assign = len(argument) >= SHORTEST and unpack_operation(argument) == Operation.ASSIGN
        if not is_assign:
            cookie = sockets.cookie_of(descriptor)
            sockref = self._table.sockrefs.of_socket(cookie)
            if sockref is not None:
                return Socket.known_by(sockref, cookie)
        is_privileged = is_assign and all(map(self._may_administer, pids))
        return sockets.describe(descriptor, self._namespace, is_privileged=is_privileged)

    def _original_destination(self, _caller: Caller, request: wire.Message, descriptor: int | None) -> wire.Message:
        if descriptor is not None:
            facts = sockets.describe(descriptor, self._namespace, is_privileged=False)
            local, peer = sockets.peer_of(descriptor)
            protocol = facts.protocol
        else:
            protocol = Protocol(request["protocol"])
            local, peer = endpoint_from(request["local"]), endpoint_from(request["peer"])
            if len(local.address) != len(peer.address):
                raise ValueError("local and peer are of different families")
        original = self._original(FlowTuple(protocol, peer, local), request)
        if original is None:
            raise OSError(errno.ENOENT, "no mapped connection has these addresses")
        return {
            "destination": [original.destination.address.hex(), original.destination.port],
            "source": [original.source.address.hex(), original.source.port],
        }

    def _original(self, inside: FlowTuple, request: wire.Message) -> FlowTuple | None:
        """How a packet arrived that a socket got as `inside`: a one-way datagram, told by its digest, or another."""
        if "digest" in request and inside.protocol is Protocol.UDP:
            digest, is_peeked = number_from(request["digest"], _MOST_DIGEST), request.get("is_peeked") is True
            original = self._table.origins.ask(inside, digest, time.monotonic(), is_peeked=is_peeked)
            if original is not None:
                return original
        return self._datapath.original(inside)

    # The ruleset.

    def _rules(self, caller: Caller, request: wire.Message, _: int | None) -> wire.Message:
        self._require_privilege(caller)
        command = parse_command(_arguments(request))
        self._datapath.take_over()
        return {"output": self._table.ruleset.apply(command)}

    def _save(self, caller: Caller, request: wire.Message, _: int | None) -> wire.Message:
        self._require_privilege(caller)
        self._datapath.collect()
        return {"text": save(self._table.ruleset, counters=request.get("counters") is True)}

    def _restore(self, caller: Caller, request: wire.Message, _: int | None) -> wire.Message:
        self._require_privilege(caller)
        text = request["text"]
        if not isinstance(text, str):
            raise TypeError("text is a string")
        options = {name: request.get(name) is True for name in ("counters", "noflush", "test")}
        self._datapath.take_over()
        return {"output": restore(text, self._table.ruleset, **options)}

    # Looking inside.

    def _sockrefs(self, _caller: Caller, _request: wire.Message, _: int | None) -> wire.Message:
        entries = [sockref_form(entry) for entry in self._table.sockrefs]
        return {"sockrefs": entries + [listener_form(entry) for entry in self._table.listeners]}

    def _connections(self, caller: Caller, _request: wire.Message, _: int | None) -> wire.Message:
        self._require_privilege(caller)
        return {"connections": self._datapath.connections()}

    def _counters(self, _caller: Caller, _request: wire.Message, _: int | None) -> wire.Message:
        self._datapath.collect()
        counters = self._table.counters
        hooks: dict[str, dict[str, int]] = {}
        for (hook, reason), packets in sorted(counters.packets.items()):
            hooks.setdefault(hook.name, {})[reason.value] = packets
        return {
            "counters": {
                "hooks": hooks,
                "malformed": dict(counters.malformed),
                "connections": self._datapath.connection_count(),
                "sockrefs": len(self._table.sockrefs) + len(self._table.listeners),
                "watchers": len(self.publisher),
                **self._status(),
            }
        }

    # Listening: events follow the reply.

    def _monitor(self, caller: Caller, _request: wire.Message, _: int | None) -> wire.Message:
        self._require_privilege(caller)
        self.publisher.monitor(caller)
        return {"datapath": self._status()["datapath"]}

    def _trace(self, caller: Caller, request: wire.Message, _: int | None) -> wire.Message:
        self._require_privilege(caller)
        self.publisher.trace(caller, _arguments(request), is_brief=request.get("decisions") is True)
        return {"datapath": self._status()["datapath"]}


def _arguments(request: wire.Message) -> list[str]:
    """A request's words as iptables would be given them; TypeError when they are none."""
    arguments = request["arguments"]
    if not isinstance(arguments, list) or not all(isinstance(argument, str) for argument in arguments):
        raise TypeError("arguments is a list of strings")
    return arguments


_CALLS: dict[str, _Handler] = {
    "setsockopt": Answers._setsockopt,
    "getsockopt": Answers._getsockopt,
    "original-destination": Answers._original_destination,
    "rules": Answers._rules,
    "save": Answers._save,
    "restore": Answers._restore,
    "sockrefs": Answers._sockrefs,
    "connections": Answers._connections,
    "counters": Answers._counters,
    "monitor": Answers._monitor,
    "trace": Answers._trace,
}
