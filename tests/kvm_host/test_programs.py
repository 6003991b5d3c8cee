"""The same programs on both providers, with the same exits."""

from __future__ import annotations

import pytest
from provided import CODE, REAL_MODE_CODE, STACK, Machine

from lasskvm.conformance.assembler import assemble
from lasskvm.kvm.exits import HltExit, IoExit, MmioExit, ShutdownExit
from lasskvm.kvm.structures import Regs

PORT = 0x5C0
#: Behind the memory of these machines.
HOLE = 0xD000_0000


def code(source: str) -> bytes:
    return assemble(source, CODE).code


def test_real_mode_code_adds_and_halts(machine: Machine) -> None:
    machine.real_mode(bytes.fromhex("01d8 f4"), rax=2, rbx=0xFFFF)  # add ax, bx; hlt
    regs = machine.run_to_halt()
    assert (regs.rax, regs.rip) == (1, REAL_MODE_CODE + 3)


def test_protected_mode_code_uses_its_stack(machine: Machine) -> None:
    machine.protected_mode(bytes.fromhex("50 5b f4"), rax=0xDEADBEEF)  # push eax; pop ebx; hlt
    assert machine.run_to_halt().rbx == 0xDEADBEEF
    assert machine.vm.memory.load(STACK - 4, 4) == 0xDEADBEEF


def test_long_mode_code_uses_64_bit_registers(machine: Machine) -> None:
    machine.long_mode(code("mov rax, 0x1122334455667788; lea r15, [rax + rax]; hlt"))
    assert machine.run_to_halt().r15 == 0x22446688AACCEF10


def test_an_out_is_an_exit_with_its_port_size_and_data(machine: Machine) -> None:
    machine.long_mode(code("out dx, eax; hlt"), rdx=PORT, rax=0xCAFEBABE)
    assert machine.run() == IoExit(PORT, 4, write=True, data=0xCAFEBABE)
    machine.run_to_halt()


@pytest.mark.parametrize(
    ("instruction", "size", "rax"), [("al", 1, 0xA1A2), ("ax", 2, 0xA1B2), ("eax", 4, 0xD3C2A1B2)]
)
def test_an_in_reads_what_the_vmm_answers(machine: Machine, instruction: str, size: int, rax: int) -> None:
    machine.long_mode(code(f"in {instruction}, dx; hlt"), rdx=PORT, rax=0xA1A1)
    vm_exit = machine.run()
    assert isinstance(vm_exit, IoExit)
    assert (vm_exit.size, vm_exit.write, vm_exit.data) == (size, False, (1 << 8 * size) - 1)
    vm_exit.data = {1: 0xA2, 2: 0xA1B2, 4: 0xD3C2A1B2}[size]
    assert machine.run_to_halt().rax == rax


def test_string_output_is_one_exit_for_each_element(machine: Machine) -> None:
    machine.long_mode(code("rep outsw; hlt"), rdx=PORT, rcx=3, rsi=0x2000)
    machine.vm.memory.write(0x2000, bytes.fromhex("0102 0304 0506"))
    exits = [machine.run() for _ in range(3)]
    assert exits == [IoExit(PORT, 2, write=True, data=data) for data in (0x0201, 0x0403, 0x0605)]
    assert machine.run_to_halt().rsi == 0x2006


def test_string_input_takes_an_answer_for_each_element(machine: Machine) -> None:
    machine.long_mode(code("rep insb; hlt"), rdx=PORT, rcx=5, rdi=0x3000)
    for data in b"Hello":
        vm_exit = machine.run()
        assert isinstance(vm_exit, IoExit)
        assert (vm_exit.port, vm_exit.size, vm_exit.write) == (PORT, 1, False)
        vm_exit.data = data
    assert machine.run_to_halt().rcx == 0
    assert machine.vm.memory.read(0x3000, 6) == b"Hello\0"


def test_a_store_to_a_hole_is_an_mmio_exit(machine: Machine) -> None:
    machine.long_mode(code("mov [rbx], rax; hlt"), rbx=HOLE, rax=0x8877665544332211)
    assert machine.run() == MmioExit(HOLE, 8, write=True, data=0x8877665544332211)
    machine.run_to_halt()


def test_a_load_from_a_hole_reads_what_the_vmm_answers(machine: Machine) -> None:
    machine.long_mode(code("movzx eax, word [rbx]; hlt"), rbx=HOLE + 0x10)
    vm_exit = machine.run()
    assert vm_exit == MmioExit(HOLE + 0x10, 2, write=False, data=0xFFFF)
    assert isinstance(vm_exit, MmioExit)
    vm_exit.data = 0x1234
    assert machine.run_to_halt().rax == 0x1234


@pytest.mark.parametrize("interrupts", [False, True])
def test_hlt_tells_whether_interrupts_are_enabled(machine: Machine, interrupts: bool) -> None:
    machine.long_mode(code("sti; nop; hlt" if interrupts else "cli; hlt"))
    assert machine.run() == HltExit(interrupts)


def test_a_fault_without_an_idt_is_a_shutdown(machine: Machine) -> None:
    machine.long_mode(code("ud2"))
    assert isinstance(machine.run(), ShutdownExit)


def test_registers_come_back_as_they_were_set(machine: Machine) -> None:
    regs = Regs(*range(100, 116), rip=0x1234, rflags=0x246)
    machine.vcpu.set_regs(regs)
    assert machine.vcpu.get_regs() == regs
