"""Runs a program under a supervisor whose handler is a script: `supervisor_harness.py SETTINGS.json PROGRAM ARGS…`.

Settings: `record` (a file that gets a JSON line with the supervisor's pid, then one line a call), `rules` (the first
that fits a call decides its reply; with none that fits it succeeds, a getsockopt with what was in the buffer),
`original_dst` (trap SO_ORIGINAL_DST too), `original` (trap recvmsg too; the address and port that datagrams were sent
to), `engine` (no script: ask the engine, with recvmsg), `patience` (seconds that it may take), `uid` (become this user
first), `refuse` (make no handler, for this reason), `old_kernel` (as one before Linux 5.19: any signal ends a call that
the supervisor has taken on).

A rule: `direction`, `option`, `op` to fit; `error`, `value` (hex) to reply; `gate` (a FIFO: reply when someone writes);
`fails` (raise instead); `signal` (send the program this signal, just before the reply).
"""

import ctypes
import json
import os
import socket
import sys
from pathlib import Path
from struct import pack, unpack_from
from typing import Any

from nfq_engine import control_client
from nfq_engine.shell import seccomp
from nfq_engine.shell.seccomp import ORIGINAL_DST_OPTIONS, TPROXY_OPTIONS, SeccompError, SocketOption
from nfq_engine.shell.supervisor import Handler, SocketCall, SocketReply
from nfq_engine.shell.supervisor_engine import EngineHandler, EngineReceiver
from nfq_engine.shell.supervisor_launch import Supervision, SupervisorError, run_program
from nfq_engine.shell.supervisor_receive import Datagram, Receiver

PR_SET_DUMPABLE = 4
UNKNOWN_FLAG = 1 << 31  # refused by every kernel, as WAIT_KILLABLE_RECV is by an old one


def fits(rule: dict[str, Any], call: dict[str, Any]) -> bool:
    return all(rule[key] == call[key] for key in ("direction", "option", "op") if key in rule)


def make_handler(settings: dict[str, Any]) -> Handler:
    if settings.get("refuse"):
        raise RuntimeError(settings["refuse"])
    record = Path(settings["record"]).open("a", buffering=1)  # noqa: SIM115 - open as long as the supervisor lives
    record.write(json.dumps({"supervisor": os.getpid()}) + "\n")

    def handle(call: SocketCall) -> SocketReply:
        seen = {
            "direction": call.direction.name,
            "level": call.level,
            "option": call.option,
            "op": call.value[0] if call.value else None,
            "value": call.value.hex(),
            "length": call.length,
            "pid": call.pid,
            "uid": call.uid,
            "is_privileged": call.is_privileged,
            "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        }
        record.write(json.dumps(seen) + "\n")
        rule: dict[str, Any] = next((rule for rule in settings["rules"] if fits(rule, seen)), {})
        if "gate" in rule:
            Path(rule["gate"]).read_bytes()
        if "fails" in rule:
            raise RuntimeError(rule["fails"])
        if "signal" in rule:
            os.kill(call.pid, rule["signal"])
        return SocketReply(rule.get("error", 0), bytes.fromhex(rule["value"]) if "value" in rule else call.value)

    return handle


def make_receiver(settings: dict[str, Any]) -> Receiver:
    """Says that every datagram was on its way from its source to `original`; nothing of one from port `unknown`."""

    def original_addresses(datagram: Datagram) -> bytes | None:
        _, port, source = unpack_from("!2sH4s", datagram.source)
        address, original_port = settings["original"]
        if port == settings.get("unknown"):
            return None
        return pack("!4s4sHH", source, socket.inet_aton(address), port, original_port)

    return original_addresses


def supervision(settings: dict[str, Any], options: frozenset[SocketOption]) -> Supervision:
    if settings.get("engine"):
        control_client._PATIENCE = settings.get("patience", control_client._PATIENCE)  # type: ignore[misc]
        return Supervision(options, lambda: EngineHandler(has_receiver=True), EngineReceiver)
    receiver = (lambda: make_receiver(settings)) if "original" in settings else None
    return Supervision(options, lambda: make_handler(settings), receiver)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    if "uid" in settings:
        os.setuid(settings["uid"])
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # setuid made this process one that no other may look into
    if settings.get("old_kernel"):
        seccomp._FLAG_WAIT_KILLABLE = UNKNOWN_FLAG  # type: ignore[misc]
    options = TPROXY_OPTIONS | ORIGINAL_DST_OPTIONS if settings.get("original_dst") else TPROXY_OPTIONS
    try:
        run_program(
            sys.argv[2:],
            supervision(settings, options),
        )
    except (SeccompError, SupervisorError, OSError) as problem:
        sys.exit(f"cannot run: {problem}")


if __name__ == "__main__":
    main()
