"""The devices of a page or less: reset lines, debug ports, the POST port."""

import pytest

from lasskvm.kvm.iobus import PortBus
from lasskvm.machine.devices import I8042, DebugConsole, DebugExit, Port92, PostPort
from lasskvm.machine.devices.debug_exit import exit_status


def test_without_a_keyboard_controller_its_ports_read_as_ones():
    i8042 = I8042(lambda: None)
    assert (i8042.read_port(0x60, 1), i8042.read_port(0x64, 1)) == (0xFF, 0xFF)


@pytest.mark.parametrize(
    ("port", "value", "resets"),
    [(0x64, 0xFE, 1), (0x64, 0xF0, 1), (0x64, 0xFF, 0), (0x64, 0xD1, 0), (0x64, 0x0E, 0), (0x60, 0xFE, 0)],
)
def test_only_a_pulse_of_the_reset_line_resets_the_machine(port, value, resets):
    calls = []
    I8042(lambda: calls.append("reset")).write_port(port, 1, value)
    assert len(calls) == resets


def test_port_92_resets_on_a_rising_bit_0_and_keeps_the_a20_bit():
    calls = []
    port92 = Port92(lambda: calls.append("reset"))
    assert port92.read_port(0x92, 1) == 0x02
    for value in (0x00, 0x03, 0x01, 0x02, 0x03):
        port92.write_port(0x92, 1, value)
        assert port92.read_port(0x92, 1) == value
    assert len(calls) == 2
    port92.reset()
    assert port92.read_port(0x92, 1) == 0x02


@pytest.mark.parametrize(("size", "value", "status"), [(1, 0, 1), (1, 0x10, 33), (4, 0x12345678, 0x2468ACF1)])
def test_debug_exit_ends_with_an_odd_status(size, value, status):
    ended = []
    bus = PortBus()
    bus.register(DebugExit(ended.append))
    assert bus.write(0xF4, size, value)
    assert ended == [status]
    assert exit_status(value) == status


def test_debug_exit_reads_as_ones():
    bus = PortBus()
    bus.register(DebugExit(lambda status: None))
    assert [bus.read(0xF4, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]


def test_the_debug_console_says_it_is_there_and_outputs_bytes():
    output = bytearray()
    console = DebugConsole(output.extend)
    assert console.read_port(0xE9, 1) == 0xE9
    for byte in b"lass\xff":
        console.write_port(0xE9, 1, byte)
    assert bytes(output) == b"lass\xff"


def test_the_post_port_remembers_the_last_code():
    post = PostPort()
    post.write_port(0x80, 1, 0x55)
    assert (post.code, post.read_port(0x80, 1)) == (0x55, 0x55)
    post.reset()
    assert post.code == 0
