"""The bytes that ask the kernel for impairments, against the structures of linux/pkt_sched.h and pkt_cls.h."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int16, c_uint8, c_uint16, c_uint32

import pytest
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from testbed import tc
from testbed.rtnetlink import Request
from testbed.topology import Impairment

NEW_QDISC, NEW_FILTER = 36, 44
CREATE_REPLACE = 0x500


class TcNetemQopt(ctypes.Structure):
    _fields_ = [(name, c_uint32) for name in ("latency", "limit", "loss", "gap", "duplicate", "jitter")]


class TcNetemReorder(ctypes.Structure):
    _fields_ = [("probability", c_uint32), ("correlation", c_uint32)]


class TcNetemCorrupt(ctypes.Structure):
    _fields_ = [("probability", c_uint32), ("correlation", c_uint32)]


class TcRatespec(ctypes.Structure):
    _fields_ = [
        ("cell_log", c_uint8),
        ("linklayer", c_uint8),
        ("overhead", c_uint16),
        ("cell_align", c_int16),
        ("mpu", c_uint16),
        ("rate", c_uint32),
    ]


class TcTbfQopt(ctypes.Structure):
    _fields_ = [
        ("rate", TcRatespec),
        ("peakrate", TcRatespec),
        ("limit", c_uint32),
        ("buffer", c_uint32),
        ("mtu", c_uint32),
    ]


class TcU32Sel(ctypes.Structure):
    _fields_ = [
        ("flags", c_uint8),
        ("offshift", c_uint8),
        ("nkeys", c_uint8),
        ("offmask", c_uint16),
        ("off", c_uint16),
        ("offoff", c_int16),
        ("hoff", c_int16),
        ("hmask", c_uint32),
    ]


class TcMirred(ctypes.Structure):
    _fields_ = [
        ("index", c_uint32),
        ("capab", c_uint32),
        ("action", c_int),
        ("refcnt", c_int),
        ("bindcnt", c_int),
        ("eaction", c_int),
        ("ifindex", c_uint32),
    ]


class TcmsgHeader(ctypes.Structure):
    _fields_ = [
        ("family", c_uint8),
        ("pad1", c_uint8),
        ("pad2", c_uint16),
        ("ifindex", c_int),
        ("handle", c_uint32),
        ("parent", c_uint32),
        ("info", c_uint32),
    ]


class Rtattr(ctypes.Structure):
    _fields_ = [("rta_len", c_uint16), ("rta_type", c_uint16)]


def attribute(kind: int, value: bytes) -> bytes:
    return bytes(Rtattr(4 + len(value), kind)) + value + bytes(-len(value) % 4)


def message(ifindex: int, handle: int, parent: int, kind: bytes, options: bytes, info: int = 0) -> bytes:
    """What TCA_KIND (1) and TCA_OPTIONS (2) make of it."""
    header = bytes(TcmsgHeader(ifindex=ifindex, handle=handle, parent=parent, info=info))
    return header + attribute(1, kind + b"\0") + (attribute(2, options) if options else b"")


def parts(request: Request) -> tuple[int, int, bytes]:
    return request.kind, request.flags, request.body


EVERYTHING = Impairment(delay=0.02, jitter=0.005, loss=0.05, duplicate=0.01, reorder=0.25, corrupt=0.03)


def test_netem_is_asked_for_all_that_it_does() -> None:
    # The shares are those that `tc qdisc add … netem loss 5% duplicate 1% reorder 25% corrupt 3%` sends.
    options = (
        bytes(TcNetemQopt(latency=0, limit=100_000, loss=0x0CCCCCCD, gap=1, duplicate=0x028F5C29, jitter=0))
        + attribute(3, bytes(TcNetemReorder(0x40000000, 0)))
        + attribute(4, bytes(TcNetemCorrupt(0x07AE147B, 0)))
        + attribute(10, (20_000_000).to_bytes(8, "little"))
        + attribute(11, (5_000_000).to_bytes(8, "little"))
        + attribute(14, bytes.fromhex("c336ecb329ed38c3"))
    )
    expected = message(7, 0x10000, 0xFFFFFFFF, b"netem", options)
    assert parts(tc.netem(7, EVERYTHING, "a:eth0")) == (NEW_QDISC, CREATE_REPLACE, expected)


def test_without_reordering_netem_has_no_gap() -> None:
    options = (
        bytes(TcNetemQopt(limit=100_000, loss=0xFFFFFFFF))
        + attribute(4, bytes(TcNetemCorrupt()))
        + attribute(10, bytes(8))
        + attribute(11, bytes(8))
    )
    sent = tc.netem(7, Impairment(loss=1), "a:eth0").body
    assert sent.endswith(attribute(2, options + sent[-12:]))


def test_ends_choose_differently() -> None:
    assert tc.netem(7, EVERYTHING, "a:eth0").body != tc.netem(7, EVERYTHING, "b:eth0").body


@pytest.mark.parametrize(
    ("rate", "mtu", "burst", "above_32_bits"),
    [
        pytest.param(4_000_000, 1500, 3044, b"", id="two frames at least"),
        pytest.param(1_000_000_000, 1500, 500_000, b"", id="four milliseconds at least"),
        pytest.param(8, 68, 180, b"", id="a byte a second"),
        pytest.param(
            8 * 5_000_000_000,
            9000,
            20_000_000,
            attribute(4, (5_000_000_000).to_bytes(8, "little")),
            id="more than 32 bits can say",
        ),
    ],
)
@pytest.mark.parametrize(("inside", "parent"), [(False, 0xFFFFFFFF), (True, 0x10001)], ids=["alone", "inside netem"])
def test_tbf_is_asked_for_a_rate(
    rate: int, mtu: int, burst: int, above_32_bits: bytes, inside: bool, parent: int
) -> None:
    ethernet = TcRatespec(linklayer=1, rate=min(rate // 8, 0xFFFFFFFF))
    options = (
        attribute(1, bytes(TcTbfQopt(rate=ethernet, limit=256 * 1024)))
        + above_32_bits
        + attribute(6, burst.to_bytes(4, "little"))
    )
    expected = message(7, 0x20000, parent, b"tbf", options)
    assert parts(tc.tbf(7, rate, mtu, inside_netem=inside)) == (NEW_QDISC, CREATE_REPLACE, expected)


def test_what_comes_in_is_sent_elsewhere() -> None:
    assert parts(tc.ingress(7)) == (
        NEW_QDISC,
        CREATE_REPLACE,
        message(7, 0xFFFF0000, 0xFFFFFFF1, b"ingress", b""),
    )
    mirred = bytes(TcMirred(action=4, eaction=1, ifindex=8))
    action = attribute(1, b"mirred\0") + attribute(2, attribute(2, mirred))
    options = attribute(5, bytes(TcU32Sel(flags=1))) + attribute(7, attribute(1, action))
    expected = message(7, 0, 0xFFFF0000, b"u32", options, info=1 << 16 | 0x0300)
    assert parts(tc.redirect(7, 8)) == (NEW_FILTER, CREATE_REPLACE, expected)


def test_another_library_reads_the_same() -> None:
    def read(request: Request) -> tcmsg:
        header = (16 + len(request.body)).to_bytes(4, "little") + request.kind.to_bytes(2, "little") + bytes(10)
        found = tcmsg(header + request.body)
        found.decode()
        return found

    netem = read(tc.netem(7, EVERYTHING, "a:eth0")).get_attr("TCA_OPTIONS")
    assert netem["loss"] == 0x0CCCCCCD
    assert netem.get_attr("TCA_NETEM_REORDER")["prob_reorder"] == 0x40000000
    tbf = read(tc.tbf(7, 4_000_000, 1500, inside_netem=True))
    assert tbf["parent"] == 0x10001
    assert tbf.get_attr("TCA_OPTIONS").get_attr("TCA_TBF_PARMS")["rate"] == 500_000
    u32 = read(tc.redirect(7, 8)).get_attr("TCA_OPTIONS")
    (action,) = (value for _, value in u32.get_attr("TCA_U32_ACT")["attrs"])
    assert action.get_attr("TCA_ACT_OPTIONS").get_attr("TCA_MIRRED_PARMS")["ifindex"] == 8
