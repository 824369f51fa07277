"""The names by which matches speak of a frame's layers and fields.

Owns: names to Scapy's classes, and reading a field off a frame. `net` is IPv4 or IPv6, whichever there is, so that one
match serves both; `frame` is the captured frame itself.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache, reduce
from importlib import import_module
from operator import truediv
from typing import TYPE_CHECKING, Any, Final

from testbed.frames import Frame
from testbed.headers import PROTOCOL_NAMES, TCP, UDP, IpPacket

if TYPE_CHECKING:
    from scapy.packet import Packet

# Scapy is loaded when a match needs it, see Frame.packet.
_CLASSES: Final = {
    "ether": ("scapy.layers.l2", "Ether"),
    "vlan": ("scapy.layers.l2", "Dot1Q"),
    "arp": ("scapy.layers.l2", "ARP"),
    "ip": ("scapy.layers.inet", "IP"),
    "icmp": ("scapy.layers.inet", "ICMP"),
    "tcp": ("scapy.layers.inet", "TCP"),
    "udp": ("scapy.layers.inet", "UDP"),
    "ipv6": ("scapy.layers.inet6", "IPv6"),
    "icmpv6": ("scapy.layers.inet6", "_ICMPv6"),  # the base class of all its messages
    "dns": ("scapy.layers.dns", "DNS"),
    "raw": ("scapy.packet", "Raw"),
}
# Fields that hold an address, and of which versions of IP.
_ADDRESSES: Final = {
    **dict.fromkeys(("net.src", "net.dst"), (4, 6)),
    **dict.fromkeys(("ip.src", "ip.dst", "arp.psrc", "arp.pdst"), (4,)),
    **dict.fromkeys(("ipv6.src", "ipv6.dst"), (6,)),
}
_OF_FRAMES: Final[dict[str, tuple[type[Any], ...]]] = {
    "point": (str,),
    "time_ns": (int,),
    "data": (bytes,),
    "outgoing": (bool,),
    "half_checksum": (bool,),
    "number": (int,),
    "vlans": (tuple,),
}
_LINK_ADDRESSES: Final = frozenset({("arp", "hwsrc"), ("arp", "hwdst")})  # on Ethernet, which is what labs have
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
NAMES: Final = ("frame", "net", *_CLASSES)


class MatchError(ValueError):
    """A match that makes no sense, whatever the frames are."""


class _Missing:
    """What a frame without the layer has in place of a field's value."""

    def __repr__(self) -> str:
        return "no such layer"


MISSING: Final = _Missing()


@cache
def layer_class(name: str) -> type[Any]:
    """The Scapy class of a layer; MatchError when there is no layer of that name."""
    if name not in _CLASSES:
        near = get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise MatchError(f"there is no layer {name!r}, only {', '.join(NAMES)}{hint}")
    module, attribute = _CLASSES[name]
    found: type[Any] = getattr(import_module(module), attribute)
    return found


def layer_in(frame: Frame, name: str) -> Packet | Frame | None:
    """A layer of a frame by its name; None when it has none."""
    if name == "frame":
        return frame
    if name == "net":
        return layer_in(frame, "ip") or layer_in(frame, "ipv6")
    return instance_in(frame, layer_class(name))


def instance_in(frame: Frame, layer: type[Any]) -> Packet | None:
    """The outermost layer of a Scapy class; for the base classes of ICMPv6 and of VLAN tags, of any of them."""
    return frame.packet.getlayer(layer, _subclass=layer in (layer_class("icmpv6"), layer_class("vlan")))


def packet_of(fields: Mapping[str, object]) -> Packet:
    """A packet made of fields, `layer.field`, its layers in the order in which they are named first, outermost first.

    What is not given Scapy fills in: lengths, checksums, the next layer's number. MatchError for what does not exist;
    ValueError for a value that its field cannot have.
    """
    layers: dict[str, dict[str, object]] = {}
    for name, value in fields.items():
        layer, _, field = name.partition(".")
        check_field(layer, field)
        if name in _ADDRESSES:
            check_value(layer, field, value)  # Scapy would ask a name server
        layers.setdefault(layer, {})[field] = value
    try:
        made = [layer_class(layer)(**values) for layer, values in layers.items()]
        packet: Packet = reduce(truediv, made)
        packet.build()
    except MatchError:
        raise
    except Exception as error:  # whatever Scapy says of a value
        raise ValueError(f"no packet can be made of {dict(fields)}: {type(error).__name__}: {error}") from error
    return packet


def check_field(layer: str, field: str) -> None:
    """MatchError unless layers of that name may have such a field."""
    if layer == "icmpv6":
        names = _fields_of_messages()
    elif layer == "frame":
        names = ["point", "time_ns", "data", "outgoing", "half_checksum", "number", "vlans"]
    elif layer == "net":
        names = ["src", "dst"]
    else:
        names = [description.name for description in layer_class(layer).fields_desc]
    if field not in names:
        near = get_close_matches(field, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise MatchError(f"{layer} has no field {field!r}, only {', '.join(names)}{hint}")


@cache
def _fields_of_messages() -> list[str]:
    """Those of all ICMPv6 messages: each has its own."""
    classes, names = [layer_class("icmpv6")], dict[str, None]()
    for each in classes:
        classes += each.__subclasses__()
        names |= dict.fromkeys(description.name for description in each.fields_desc)
    return list(names)


def check_value(layer: str, field: str, value: object) -> object:
    """The value as frames have it in that field, known by `check_field`; MatchError when none can ever have it."""
    name = f"{layer}.{field}"
    try:
        if (versions := _ADDRESSES.get(name)) is not None:
            return _address(value, versions)
        if isinstance(value, str | int) and layer not in ("frame", "net", "icmpv6"):
            value = _as_scapy_has_it(layer, field, value)
    except Exception as error:  # whatever Scapy says of a value
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise MatchError(f"{name} is never {value!r}: {what}") from error
    kinds = _kinds(layer, field)
    if kinds and not isinstance(value, kinds):
        raise MatchError(f"{name} is never {value!r}, but a value of type {kinds[0].__name__}")
    return value


def _address(value: object, versions: tuple[int, ...]) -> str:
    address = ipaddress.ip_address(str(value))
    if address.version not in versions:
        raise ValueError(f"that is an address of IPv{address.version}")
    if getattr(address, "scope_id", None) is not None:
        raise ValueError("packets have no zones")
    return socket.inet_ntop(socket.AF_INET if address.version == 4 else socket.AF_INET6, address.packed)


def _as_scapy_has_it(layer: str, field: str, value: str | int) -> object:
    """What Scapy makes of a value that is put into a field, if it fits."""
    from scapy.fields import ConditionalField, MACField, MultipleTypeField, _BitField

    description: Any = next(each for each in layer_class(layer).fields_desc if each.name == field)
    while isinstance(description, ConditionalField):
        description = description.fld
    if isinstance(description, MACField) or (layer, field) in _LINK_ADDRESSES:
        if _MAC.fullmatch(seen := str(value).lower()) is None:
            raise ValueError("a MAC address has six parts, as 02:00:00:00:00:01")
        return seen
    if isinstance(description, MultipleTypeField):
        return value  # what it is depends on other fields
    seen = description.any2i(None, value)
    description.addfield(None, b"", seen)
    if isinstance(description, _BitField) and not 0 <= int(seen) < 1 << abs(description.size):  # Scapy only masks it
        raise ValueError(f"the field has {abs(description.size)} bits")
    return seen


@cache
def _kinds(layer: str, field: str) -> tuple[type[Any], ...]:
    """What a field's values are; empty when that is different things, or not known."""
    if layer == "frame":
        return _OF_FRAMES.get(field, ())
    if layer in ("net", "icmpv6"):
        return ()
    made = layer_class(layer)
    example = getattr(made(made().build()), field, None)
    if hasattr(example, "flagrepr"):
        return (type(example),)
    return next(((kind,) for kind in (int, bytes, str) if isinstance(example, kind)), ())


def read_field(frame: Frame, layer: str, field: str) -> object:
    """A field's value; MISSING when the frame has no such layer."""
    if (reader := _QUICK.get((layer, field))) is not None:
        value = None if frame.ip is None else reader(frame.ip)
        if value is not None:
            return value
        if frame.ip is not None and frame.ip.protocol in PROTOCOL_NAMES:
            return MISSING
        # Something else is in it, a tunnel perhaps, and what is in that Scapy knows.
    found = layer_in(frame, layer)
    if layer == "ether" and found is None:
        found = frame.packet  # a Dot3, which has the same addresses
    return MISSING if found is None else getattr(found, field, MISSING)


def is_quick(layer: str, field: str) -> bool:
    """Can the field be read without Scapy?"""
    return (layer, field) in _QUICK or layer == "frame"


def _of_version(version: int, read: Callable[[IpPacket], object]) -> Callable[[IpPacket], object]:
    return lambda packet: read(packet) if packet.layout.version == version else None


def _of_protocol(protocol: int, read: Callable[[IpPacket], object]) -> Callable[[IpPacket], object]:
    return lambda packet: read(packet) if packet.protocol == protocol else None


# The fields that most matches ask for. Dissecting takes Scapy a hundred times as long, and there may be 50,000 frames.
_QUICK: Final[dict[tuple[str, str], Callable[[IpPacket], object]]] = {
    ("net", "src"): lambda packet: packet.source,
    ("net", "dst"): lambda packet: packet.destination,
    ("ip", "src"): _of_version(4, lambda packet: packet.source),
    ("ip", "dst"): _of_version(4, lambda packet: packet.destination),
    ("ip", "ttl"): _of_version(4, lambda packet: packet.layout.hop_limit),
    ("ipv6", "src"): _of_version(6, lambda packet: packet.source),
    ("ipv6", "dst"): _of_version(6, lambda packet: packet.destination),
    ("ipv6", "hlim"): _of_version(6, lambda packet: packet.layout.hop_limit),
    ("tcp", "sport"): _of_protocol(TCP, lambda packet: packet.source_port),
    ("tcp", "dport"): _of_protocol(TCP, lambda packet: packet.destination_port),
    ("udp", "sport"): _of_protocol(UDP, lambda packet: packet.source_port),
    ("udp", "dport"): _of_protocol(UDP, lambda packet: packet.destination_port),
}
