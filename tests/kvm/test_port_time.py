"""Port I/O takes a microsecond of virtual time, whoever executes it and whoever answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lasskvm.conformance.assembler import assemble
from lasskvm.kvm import ExecutionEngine, IoExit, PortBus, Vm
from lasskvm.kvm.port_time import BLOCKS_PER_PORT_ACCESS, TimedPorts
from lasskvm.machine.boot.entry import prepare_long_mode

MIB = 1 << 20
CODE = 0x10000
END_PORT = 0xF4
#: Read often, and answered by the interrupt controller.
PIC_PORT = 0x21
UNUSED_PORT = 0x500
ACCESSES = 100
MICROSECOND = 1000
ENGINES = pytest.mark.parametrize("engine", ["jit", "emulator"])


class Port:
    """A device of one port."""

    ports = (range(0x10, 0x11),)
    register_size = 1

    def reset(self) -> None:
        """Do nothing."""

    def read_port(self, port: int, size: int) -> int:
        """Return a constant."""
        return 7

    def write_port(self, port: int, size: int, value: int) -> None:
        """Do nothing."""


def elapsed(engine: ExecutionEngine, source: str) -> int:
    """The virtual nanoseconds that *source* takes until it writes to the end port."""
    vm = Vm(engine)
    vm.set_user_memory_region(0, 0, vm.allocate(4 * MIB))
    vm.create_irqchip()
    vcpu = vm.create_vcpu()
    vm.memory.write(CODE, assemble(f"{source}; out {END_PORT:#x}, al", CODE).code)
    prepare_long_mode(vm.memory, CODE).apply(vcpu)
    while True:
        vm_exit = vcpu.run()
        if isinstance(vm_exit, IoExit) and vm_exit.port == END_PORT:
            return vm.clock.now()


@ENGINES
@pytest.mark.parametrize("port", [PIC_PORT, UNUSED_PORT])
@pytest.mark.parametrize("instruction", ["in al, dx", "out dx, al"])
def test_an_access_takes_a_microsecond(engine: ExecutionEngine, port: int, instruction: str) -> None:
    program = "mov edx, {}; mov al, 0xff; mov ecx, {}; again: {}; dec ecx; jne again"
    without = elapsed(engine, program.format(port, ACCESSES, "nop"))
    taken = elapsed(engine, program.format(port, ACCESSES, instruction)) - without
    assert ACCESSES * MICROSECOND <= taken < 1.1 * ACCESSES * MICROSECOND


@ENGINES
def test_the_time_stamp_counter_sees_it_within_one_block(engine: ExecutionEngine) -> None:
    source = f"rdtsc; mov ebx, eax; in al, {PIC_PORT:#x}; rdtsc; sub eax, ebx; mov [0x8000], eax"
    vm = Vm(engine)
    vm.set_user_memory_region(0, 0, vm.allocate(4 * MIB))
    vm.create_irqchip()
    vcpu = vm.create_vcpu()
    vm.memory.write(CODE, assemble(f"{source}; out {END_PORT:#x}, al", CODE).code)
    prepare_long_mode(vm.memory, CODE).apply(vcpu)
    assert isinstance(vcpu.run(), IoExit)
    assert MICROSECOND <= vm.memory.load(0x8000, 4) < 2 * MICROSECOND


@pytest.mark.parametrize(("unanswered", "spent"), [(True, 4), (False, 2)])
def test_what_nobody_answers_is_paid_for_once(unanswered: bool, spent: int) -> None:
    blocks: list[int] = []
    bus = PortBus()
    bus.register(Port())
    ports = TimedPorts(bus, blocks.append, unanswered=unanswered)
    access: Callable[[], object]
    for access, answer in (
        (lambda: ports.read(0x10, 1), 7),
        (lambda: ports.write(0x10, 1, 0), True),
        (lambda: ports.read(0x11, 1), None),
        (lambda: ports.write(0x11, 1, 0), False),
    ):
        assert access() == answer
    assert blocks == [BLOCKS_PER_PORT_ACCESS] * spent
