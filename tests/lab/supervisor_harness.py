"""Runs a program under a supervisor whose handler is a script: `supervisor_harness.py SETTINGS.json PROGRAM ARGS…`.

Settings: `record` (a file that gets a JSON line with the supervisor's pid, then one line a call), `rules` (the first
that fits a call decides its reply; with none that fits it succeeds, a getsockopt with what was in the buffer),
`original_dst` (trap SO_ORIGINAL_DST too), `uid` (become this user first), `refuse` (make no handler, for this reason).

A rule: `direction`, `option`, `op` to fit; `error`, `value` (hex) to reply; `gate` (a FIFO: reply when someone writes);
`fails` (raise instead).
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

from nfq_engine.shell.seccomp import ORIGINAL_DST_OPTIONS, TPROXY_OPTIONS, SeccompError
from nfq_engine.shell.supervisor import Handler, SocketCall, SocketReply
from nfq_engine.shell.supervisor_launch import SupervisorError, run_program

PR_SET_DUMPABLE = 4


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
        rule = next((rule for rule in settings["rules"] if fits(rule, seen)), {})
        if "gate" in rule:
            Path(rule["gate"]).read_bytes()
        if "fails" in rule:
            raise RuntimeError(rule["fails"])
        return SocketReply(rule.get("error", 0), bytes.fromhex(rule["value"]) if "value" in rule else call.value)

    return handle


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    if "uid" in settings:
        os.setuid(settings["uid"])
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # setuid made this process one that no other may look into
    options = TPROXY_OPTIONS | ORIGINAL_DST_OPTIONS if settings.get("original_dst") else TPROXY_OPTIONS
    try:
        run_program(sys.argv[2:], options, lambda: make_handler(settings))
    except (SeccompError, SupervisorError, OSError) as problem:
        sys.exit(f"cannot run: {problem}")


if __name__ == "__main__":
    main()
