"""How the values of a rule are written.

Owns: the way from one argument to one value. Must not know which option it belongs to. Place: below `rule_modules` and
`rule_text`.

Numbers are read as iptables reads them: decimal, 0x hexadecimal, 0 octal. Names of hosts, services, users and groups
are refused, as the core resolves nothing.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from nfq_engine.core.packet import Protocol
from nfq_engine.core.rule_matches import LAST_PORT, Ports
from nfq_engine.core.rule_values import TARGET_NAMES, Network, RuleError, shown

_NUMBER: Final = re.compile(r"\s*\+?(0x[0-9a-f]{1,16}|0[0-7]{0,21}|[1-9][0-9]{0,19})", re.ASCII | re.IGNORECASE)
_PROTOCOLS: Final = {"all": 0, **{each.name.lower(): each.value for each in Protocol}}
_LONGEST_INTERFACE: Final = 15  # IFNAMSIZ, less the byte that ends it
_LONGEST_CHAIN: Final = 28  # XT_EXTENSION_MAXNAMELEN, less the byte that ends it


def integer(text: str, low: int, high: int) -> int | None:
    """A number between the bounds, both included; None for anything else."""
    number = _NUMBER.fullmatch(text)
    if number is None:
        return None
    digits = number[1].lower()
    is_octal = digits.startswith("0") and not digits.startswith("0x")
    value = int(digits, 8 if is_octal else 0)
    return value if low <= value <= high else None


def port(text: str) -> int:
    """One port."""
    value = integer(text, 0, LAST_PORT)
    if value is None:
        raise RuleError(f"invalid port/service `{shown(text)}' specified")
    return value


def ports(text: str) -> Ports:
    """One port, or a range; a range may leave out its first or last port."""
    low, colon, high = text.partition(":")
    if not colon:
        return Ports(port(text), port(text))
    first, last = port(low or "0"), port(high or str(LAST_PORT))
    if first > last:
        raise RuleError(f"invalid portrange (min > max) `{shown(text)}'")
    return Ports(first, last)


def protocol(text: str) -> Protocol | None:
    """TCP or UDP, by name or number; None for all."""
    number = integer(text, 0, 255)
    if number is None:
        number = _PROTOCOLS.get(text.lower())
    if number is None:
        raise RuleError(f'unknown protocol "{shown(text)}" specified: the table knows tcp, udp and all')
    if number not in _PROTOCOLS.values():
        raise RuleError(f'protocol "{text}" is not supported: the table sees tcp and udp')
    return Protocol(number) if number else None


def interface(text: str) -> str:
    """The name of an interface; a + at its end stands for any end."""
    if not text:
        raise RuleError("empty interface is likely to be undesired")
    if not text.isprintable() or any(character in text for character in " \"'\\/"):
        raise RuleError(f"interface name `{shown(text)}' has a character that the kernel does not allow")
    if len(text.encode()) > _LONGEST_INTERFACE:
        raise RuleError(f"interface name `{shown(text)}' is longer than {_LONGEST_INTERFACE} characters")
    return text


def chain_name(text: str) -> str:
    """A name that a user chain may have."""
    if text in TARGET_NAMES:
        raise RuleError(f"chain name `{text}' may not clash with target name")
    if text.startswith(("-", "!")):
        raise RuleError(f"chain name `{shown(text)}' not allowed to start with `{text[0]}'")
    if not text or not text.isprintable() or any(character in text for character in " \"'\\"):
        raise RuleError(f"invalid chain name `{shown(text)}'")
    if len(text.encode()) > _LONGEST_CHAIN:
        raise RuleError(f"chain name `{shown(text)}' too long (must be under {_LONGEST_CHAIN + 1} chars)")
    return text


def rule_number(text: str) -> int:
    """The number of a rule, from 1 on."""
    number = integer(text, 1, 0xFFFFFFFF)
    if number is None:
        raise RuleError(f"invalid rule number `{shown(text)}'")
    return number


def counter(text: str, what: str) -> int:
    """A count of packets or bytes; `what` says of which."""
    number = integer(text, 0, 0xFFFFFFFFFFFFFFFF)
    if number is None:
        raise RuleError(f"-c {what} counter not numeric: `{shown(text)}'")
    return number


def networks(text: str) -> tuple[Network, ...]:
    """One or several networks, with commas between them."""
    return tuple(_network(each) for each in text.split(","))


def _network(text: str) -> Network:
    """address, address/prefix length or address/mask; IPv4 addresses may leave out zeros at their end."""
    host, slash, mask_text = text.rpartition("/") if "/" in text else (text, "", "")
    address = _ipv6(host) if ":" in host else _ipv4(host)
    if address is None:
        raise RuleError(f"host/network `{shown(host)}' not found: names are not resolved")
    mask = _mask(mask_text, len(address)) if slash else b"\xff" * len(address)
    if mask is None:
        raise RuleError(f"invalid mask `{shown(mask_text)}' specified")
    return Network(bytes(a & m for a, m in zip(address, mask, strict=True)), mask)


def _ipv4(text: str) -> bytes | None:
    parts = [integer(part, 0, 255) if part[:1].isdigit() else None for part in text.split(".")]
    numbers = [part for part in parts if part is not None]
    return bytes(numbers).ljust(4, b"\0") if len(numbers) == len(parts) <= 4 else None


def _ipv6(text: str) -> bytes | None:
    try:
        return ipaddress.IPv6Address(text).packed if "%" not in text else None
    except ValueError:
        return None


def _mask(text: str, size: int) -> bytes | None:
    length = integer(text, 0, size * 8)
    if length is not None:
        return ((1 << size * 8) - (1 << size * 8 - length)).to_bytes(size, "big")
    mask = address(text)
    return mask if mask is not None and len(mask) == size else None


def address(text: str) -> bytes | None:
    """One address; None for anything else."""
    if ":" in text:
        return _ipv6(text)
    return _ipv4(text) if text.count(".") == 3 else None
