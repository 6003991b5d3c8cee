"""What an image finds of a BIOS: the data area, and calls that return with the carry flag."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lasskvm.kvm import IoExit, Vm
from lasskvm.machine.bios_data import place_bios_data

MIB = 1 << 20
LOW_MEMORY_END = 0x9FC00
CODE = 0x1000
STATUS_PORT = 0xF8


@pytest.fixture
def vm() -> Vm:
    vm = Vm("emulator")
    vm.set_user_memory_region(0, 0, vm.allocate(MIB))
    place_bios_data(vm.memory)
    return vm


def test_the_data_area_says_where_low_memory_ends(vm: Vm) -> None:
    assert vm.memory.load(0x413, 2) * 1024 == LOW_MEMORY_END
    assert vm.memory.load(0x40E, 2) * 16 == LOW_MEMORY_END
    # The extended area begins with its size in KiB, and ends where video memory begins.
    assert LOW_MEMORY_END + vm.memory.load(LOW_MEMORY_END, 1) * 1024 == 0xA0000


def test_the_data_area_has_one_serial_port_and_an_fpu(vm: Vm) -> None:
    assert [vm.memory.load(0x400 + 2 * number, 2) for number in range(4)] == [0x3F8, 0, 0, 0]
    equipment = vm.memory.load(0x410, 2)
    assert equipment >> 9 & 7 == 1
    assert equipment & 2


@pytest.mark.parametrize("vector", [0x10, 0x13, 0x15, 0xFF])
def test_every_call_returns_with_carry_and_changes_nothing_else(vm: Vm, vector: int) -> None:
    # xor eax, eax (clears CF); int vector; sbb al, al; out 0xf8, al
    vm.memory.write(CODE, bytes([0x66, 0x31, 0xC0, 0xCD, vector, 0x18, 0xC0, 0xE6, STATUS_PORT]))
    vcpu = vm.create_vcpu()
    sregs = vcpu.get_sregs()
    sregs.cs = replace(sregs.cs, selector=0, base=0)
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp, regs.rbp = CODE, 0x2000, 0x1234
    vcpu.set_regs(regs)
    port_exit = vcpu.run()
    assert isinstance(port_exit, IoExit)
    assert (port_exit.port, port_exit.data) == (STATUS_PORT, 0xFF)
    assert (vcpu.get_regs().rsp, vcpu.get_regs().rbp) == (0x2000, 0x1234)
