"""The filter's decisions, by an interpreter of the kernel's instructions."""

from struct import Struct, iter_unpack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_engine.core.option import IP_RECVORIGADDRS, IP_TPROXY
from nfq_engine.shell.seccomp import (
    ORIGINAL_DST_OPTIONS,
    SO_ORIGINAL_DST,
    SOL_IP,
    SOL_IPV6,
    TPROXY_OPTIONS,
    Action,
    Architecture,
    Direction,
    SocketOption,
    assemble,
    filter_tree,
)

SECCOMP_DATA = Struct("=iIQ6Q")
X32_BIT = 0x40000000
TCP = 6


def run(code: bytes, architecture: int, number: int, *arguments: int) -> Action:
    """What the kernel would do with a call."""
    data = SECCOMP_DATA.pack(number, architecture, 0x7FFF00000000, *(*arguments, *(0,) * 6)[:6])
    instructions = list(iter_unpack("=HBBI", code))
    accumulator, position = 0, 0
    while True:
        operation, if_true, if_false, operand = instructions[position]
        position += 1
        match operation:
            case 0x20:
                accumulator = int.from_bytes(data[operand : operand + 4], "little")
            case 0x15:
                position += if_true if accumulator == operand else if_false
            case 0x06:
                return Action(operand)
            case _:
                pytest.fail(f"instruction {operation:#x}")


def decide(machine: str, architecture: int, number: int, *arguments: int, original_dst: bool = True) -> Action:
    options = TPROXY_OPTIONS | ORIGINAL_DST_OPTIONS if original_dst else TPROXY_OPTIONS
    return run(assemble(filter_tree(options, machine)), architecture, number, *arguments)


X86, I386, ARM = Architecture.X86_64, Architecture.I386, Architecture.AARCH64


@pytest.mark.parametrize(
    ("machine", "architecture", "number", "level", "option", "expected"),
    [
        pytest.param("x86_64", X86, 54, SOL_IP, IP_TPROXY, Action.NOTIFY, id="setsockopt"),
        pytest.param("x86_64", X86, 55, SOL_IP, IP_TPROXY, Action.NOTIFY, id="getsockopt"),
        pytest.param("x86_64", X86, 54, SOL_IP, IP_RECVORIGADDRS, Action.NOTIFY, id="recvorigaddrs"),
        pytest.param("x86_64", X86, 55, SOL_IP, SO_ORIGINAL_DST, Action.NOTIFY, id="original-dst"),
        pytest.param("x86_64", X86, 55, SOL_IPV6, SO_ORIGINAL_DST, Action.NOTIFY, id="original-dst-ipv6"),
        pytest.param("x86_64", X86, 54, SOL_IP, SO_ORIGINAL_DST, Action.ALLOW, id="original-dst-cannot-be-set"),
        pytest.param(
            "x86_64", X86, 54, SOL_IP | 1 << 32, IP_TPROXY, Action.NOTIFY, id="upper-half-is-no-part-of-an-int"
        ),
        pytest.param("x86_64", X86, 54, TCP, IP_TPROXY, Action.ALLOW, id="another-level"),
        pytest.param("x86_64", X86, 54, SOL_IPV6, IP_TPROXY, Action.ALLOW, id="level-of-another-option"),
        pytest.param("x86_64", X86, 54, SOL_IP, IP_TPROXY + 1, Action.ALLOW, id="another-option"),
        pytest.param("x86_64", X86, 53, SOL_IP, IP_TPROXY, Action.ALLOW, id="another-call"),
        pytest.param("x86_64", X86, X32_BIT | 541, SOL_IP, IP_TPROXY, Action.ALLOW, id="x32-sees-a-plain-kernel"),
        pytest.param("x86_64", X86, X32_BIT | 54, SOL_IP, IP_TPROXY, Action.ALLOW, id="x32-bit-makes-another-call"),
        pytest.param("x86_64", I386, 366, SOL_IP, IP_TPROXY, Action.NOTIFY, id="i386-setsockopt"),
        pytest.param("x86_64", I386, 365, SOL_IP, IP_TPROXY, Action.NOTIFY, id="i386-getsockopt"),
        pytest.param("x86_64", I386, 54, SOL_IP, IP_TPROXY, Action.ALLOW, id="i386-other-call-of-the-same-number"),
        pytest.param("x86_64", ARM, 208, SOL_IP, IP_TPROXY, Action.ALLOW, id="not-this-machine's-table"),
        pytest.param("aarch64", ARM, 208, SOL_IP, IP_TPROXY, Action.NOTIFY, id="aarch64-setsockopt"),
        pytest.param("aarch64", ARM, 209, SOL_IP, IP_TPROXY, Action.NOTIFY, id="aarch64-getsockopt"),
        pytest.param("aarch64", ARM, 54, SOL_IP, IP_TPROXY, Action.ALLOW, id="aarch64-other-call"),
    ],
)
def test_only_the_stated_options_are_handed_over(
    machine: str, architecture: int, number: int, level: int, option: int, expected: Action
) -> None:
    assert decide(machine, architecture, number, 3, level, option) is expected


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        pytest.param(14, Action.NOTIFY, id="setsockopt"),
        pytest.param(15, Action.NOTIFY, id="getsockopt"),
        pytest.param(1, Action.ALLOW, id="socket"),
        pytest.param(17, Action.ALLOW, id="recvmsg"),
    ],
)
def test_every_option_call_through_socketcall_is_handed_over(call: int, expected: Action) -> None:
    assert decide("x86_64", I386, 102, call, 0xFFFF0000) is expected


def test_original_dst_is_left_to_the_kernel_unless_asked_for() -> None:
    assert decide("x86_64", X86, 55, 3, SOL_IP, SO_ORIGINAL_DST, original_dst=False) is Action.ALLOW


ints = st.integers(0, 2**32 - 1)


@given(
    options=st.frozensets(st.builds(SocketOption, st.sampled_from(Direction), ints, ints), max_size=12),
    number=st.one_of(st.sampled_from([54, 55]), ints.map(lambda n: n >> 1)),
    level=ints,
    option=ints,
    data=st.data(),
)
def test_a_filter_hands_over_exactly_its_options(
    options: frozenset[SocketOption], number: int, level: int, option: int, data: st.DataObject
) -> None:
    known = data.draw(st.sampled_from([None, *sorted(options, key=repr)]))
    if known is not None:
        level, option = known.level, data.draw(st.sampled_from([known.option, option]))
    direction = {54: Direction.SET, 55: Direction.GET}.get(number)
    is_wanted = direction is not None and SocketOption(direction, level, option) in options
    code = assemble(filter_tree(options, "x86_64"))
    assert run(code, X86, number, 3, level, option) is (Action.NOTIFY if is_wanted else Action.ALLOW)
