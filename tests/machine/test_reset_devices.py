"""The devices that end or restart a machine by a port: reset control and Bochs' power-off; and the debug consoles."""

import json

import pytest

from lasskvm.kvm.iobus import PortBus
from lasskvm.machine.devices import DebugConsole
from lasskvm.machine.devices.debug_console import SEABIOS_DEBUG_PORT
from lasskvm.machine.devices.reset_control import ResetControl
from lasskvm.machine.devices.shutdown_port import ShutdownPort


class Bench:
    """Both devices on a bus, with what they have asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.reset_control = ResetControl(lambda: self.asked.append("reset"))
        self.shutdown_port = ShutdownPort(lambda: self.asked.append("power off"))
        self.bus = PortBus()
        self.bus.register(self.reset_control)
        self.bus.register(self.shutdown_port)

    def say(self, word: bytes) -> None:
        for letter in word:
            assert self.bus.write(0x8900, 1, letter)


@pytest.fixture
def bench():
    return Bench()


@pytest.mark.parametrize(
    ("value", "resets"), [(0x0E, 1), (0x06, 1), (0x04, 1), (0x0A, 0), (0x02, 0), (0x00, 0)]
)
def test_bit_2_of_the_reset_control_register_resets_the_machine(bench, value, resets):
    bench.bus.write(0xCF9, 1, value)
    assert bench.asked == ["reset"] * resets


def test_the_type_of_reset_reads_back_until_a_reset(bench):
    bench.bus.write(0xCF9, 1, 0xFB)
    assert bench.bus.read(0xCF9, 1) == 0x02
    bench.reset_control.reset()
    assert bench.bus.read(0xCF9, 1) == 0


@pytest.mark.parametrize(
    ("port", "size"), [(0xCF8, 4), (0xCF8, 2), (0xCF8, 1), (0xCFA, 1), (0xCFB, 1), (0xCF7, 4)]
)
def test_a_probe_for_pci_finds_nothing_and_resets_nothing(bench, port, size):
    ones = (1 << 8 * size) - 1
    bench.bus.write(port, size, ones)
    assert bench.asked == []
    assert bench.bus.read(port, size) == ones


def test_a_16_bit_write_to_the_register_itself_counts(bench):
    bench.bus.write(0xCF9, 2, 0x0006)
    assert bench.asked == ["reset"]


def test_the_word_shutdown_switches_the_machine_off_each_time_it_comes(bench):
    bench.say(b"Shutdow")
    assert bench.asked == []
    bench.say(b"n")
    assert bench.asked == ["power off"]
    bench.say(b"Shutdown")
    assert bench.asked == ["power off"] * 2


@pytest.mark.parametrize("word", [b"shutdown", b"Shutup down", b"Shut\0down", b"SHUTDOWN"])
def test_another_word_does_nothing(bench, word):
    bench.say(word)
    assert bench.asked == []


@pytest.mark.parametrize("noise", [b"Shut", b"S", b"xyz"])
def test_the_word_may_start_anew_at_any_letter(bench, noise):
    bench.say(noise + b"Shutdown")
    assert bench.asked == ["power off"]


def test_the_power_off_port_reads_as_ones_and_forgets_at_reset(bench):
    assert bench.bus.read(0x8900, 1) == 0xFF
    bench.say(b"Shut")
    bench.shutdown_port.reset()
    bench.say(b"down")
    assert bench.asked == []


def test_saved_devices_remember_half_a_word_and_the_type_of_reset(bench):
    bench.say(b"Shut")
    bench.bus.write(0xCF9, 1, 0x02)
    other = Bench()
    other.shutdown_port.set_state(json.loads(json.dumps(bench.shutdown_port.get_state())))
    other.reset_control.set_state(json.loads(json.dumps(bench.reset_control.get_state())))
    other.say(b"down")
    assert other.asked == ["power off"]
    assert other.bus.read(0xCF9, 1) == 0x02
    with pytest.raises(ValueError, match="letters"):
        other.shutdown_port.set_state({"matched": 8})


def test_two_debug_consoles_have_a_port_each_and_the_same_signature():
    outputs = bytearray(), bytearray()
    bus = PortBus()
    bus.register(DebugConsole(outputs[0].extend))
    bus.register(DebugConsole(outputs[1].extend, SEABIOS_DEBUG_PORT))
    assert (bus.read(0xE9, 1), bus.read(0x402, 1)) == (0xE9, 0xE9)
    bus.write(0xE9, 1, ord("a"))
    bus.write(0x402, 1, ord("b"))
    assert outputs == (b"a", b"b")
