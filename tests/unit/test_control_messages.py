"""Control messages as the kernel's put_cmsg writes them: whole, cut, or left out."""

import socket
from struct import pack

import pytest

from nfq_engine.shell.supervisor_message import Control, read_controls, write_controls

ADDRESSES = Control((0, 11273), bytes(range(12)))
PACKET_INFO = Control((0, 8), bytes(range(12)))
HEADER, WHOLE, SPACE = 16, 28, 32


def message(one: Control, length: int) -> bytes:
    return pack("=Qii", length, *one.kind) + one.data


@pytest.mark.parametrize(
    ("controls", "room", "expected", "is_cut"),
    [
        pytest.param([], 0, b"", False, id="none"),
        pytest.param([ADDRESSES], 0, b"", True, id="no-room"),
        pytest.param([ADDRESSES], HEADER - 1, b"", True, id="no-room-for-the-header"),
        pytest.param([ADDRESSES], HEADER, message(ADDRESSES, HEADER)[:HEADER], True, id="the-header-only"),
        pytest.param([ADDRESSES], WHOLE - 1, message(ADDRESSES, WHOLE - 1)[: WHOLE - 1], True, id="all-but-a-byte"),
        pytest.param([ADDRESSES], WHOLE, message(ADDRESSES, WHOLE), False, id="whole-without-padding"),
        pytest.param([ADDRESSES], 100, message(ADDRESSES, WHOLE) + bytes(4), False, id="whole-with-padding"),
        pytest.param(
            [PACKET_INFO, ADDRESSES], SPACE, message(PACKET_INFO, WHOLE) + bytes(4), True, id="the-first-of-two"
        ),
        pytest.param(
            [PACKET_INFO, ADDRESSES],
            SPACE + HEADER,
            message(PACKET_INFO, WHOLE) + bytes(4) + message(ADDRESSES, HEADER)[:HEADER],
            True,
            id="the-first-and-the-second's-header",
        ),
    ],
)
def test_control_messages_are_cut_to_the_room_that_there_is(
    controls: list[Control], room: int, expected: bytes, *, is_cut: bool
) -> None:
    assert write_controls(controls, room) == (expected, socket.MSG_CTRUNC if is_cut else 0)


def test_what_is_written_is_read_again() -> None:
    controls = [PACKET_INFO, Control((1, 2), b""), ADDRESSES]
    written, cut = write_controls(controls, 1000)
    assert cut == 0
    assert read_controls(written) == controls


def test_a_length_below_the_header_s_ends_the_reading() -> None:
    assert len(read_controls(bytes(64))) <= 4
