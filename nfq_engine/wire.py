"""The engine's control socket: its address and the form of its messages, for both ends.

The address is abstract, so it belongs to the network namespace: an engine is found by being in its namespace, and labs
never collide (unix(7)). A message is one line of JSON. A request that says `"with_socket": true` comes with one
descriptor (SCM_RIGHTS); the caller is known by its credentials (SO_PEERCRED). Every request gets one reply, in order:
an object with what was asked for, or with `error` (a sentence) or `errno` (a number, for the socket API).
"""

from __future__ import annotations

import json
from typing import Any, Final

ADDRESS: Final = "\0nfq-tproxy"
LONGEST_REQUEST: Final = 1 << 20  # bytes; a ruleset to restore is the longest thing anyone sends

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """A message as it is sent."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """A received line as a message; ValueError when it is none."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("a request is a JSON object")
    return message
