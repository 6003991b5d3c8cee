"""Accesses to guest-physical addresses where no memory is: the instruction ends undone, and the VMM hears of it.

Direct execution alone is looked at: what :meth:`Engine.run` returns, and what state it leaves.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest

from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import (
    FREE_SELECTOR,
    HIGH_ABSENT,
    HIGH_SUPERVISOR,
    LOW_USER,
)
from lasskvm.engine import context as c
from lasskvm.engine.engine import EngineExit
from lasskvm.kvm import DescriptorTable
from lasskvm.lass import WRITE
from lasskvm.memory import PAGE_SIZE, SLOT_READONLY
from lasskvm.x86.exceptions import GP
from lasskvm.x86.paging import PTE_U

HOLE = 1 << 32
#: Linear address of a page of the hole; the page before it is memory.
DEVICE = HIGH_SUPERVISOR + PAGE_SIZE
REGISTER = DEVICE + 0x120
ROM, ROM_GPA = HIGH_ABSENT, 0x800000
ROM_CONTENT = 0x1122334455667788
BLOCKS = 10_000

READS = (
    "mov rax, [rbx]", "mov al, [rbx]", "movzx eax, word [rbx]", "add rax, [rbx]", "cmp [rbx], eax",
    "test dword [rbx], 1", "push qword [rbx]", "fld tbyte [rbx]", "call qword [rbx]", "jmp qword [rbx]",
    "imul rax, [rbx]", "div dword [rbx]", "bt dword [rbx], 3", "lodsq", "scasb", "cmpsb", "movsb",
    "cmovne rax, [rbx]", "mov fs, word [rbx]", "fld qword [rbx]", "fadd dword [rbx]", "fldcw [rbx]",
    "movups xmm0, [rbx]", "movd xmm0, [rbx]", "addps xmm0, [rbx]", "ldmxcsr [rbx]", "fxrstor [rbx]",
)  # fmt: skip
WRITES = (
    "mov [rbx], rax", "mov byte [rbx], 5", "stosd", "sete [rbx]", "fstp qword [rbx]", "fstp tbyte [rbx]",
    "fnstcw [rbx]", "movups [rbx], xmm0", "movd [rbx], xmm0", "stmxcsr [rbx]", "pop qword [rbx]", "fxsave [rbx]",
)  # fmt: skip
#: Their read half comes first; it exits.
MODIFICATIONS = (
    "add [rbx], rax", "inc dword [rbx]", "lock inc dword [rbx]", "xchg [rbx], rax", "cmpxchg [rbx], rcx",
    "not byte [rbx]", "lock xadd [rbx], rax", "bts dword [rbx], 3", "shl dword [rbx], 1", "cmpxchg8b [rbx]",
    "lock cmpxchg16b [rbx]",
)  # fmt: skip


@pytest.fixture
def device(guest: Guest) -> Iterator[Guest]:
    """The guest with a page of hole at DEVICE and one of read-only memory at ROM."""
    guest.tables.map(DEVICE, HOLE)
    guest.tables.map(ROM, ROM_GPA)
    rom = mmap.mmap(-1, PAGE_SIZE)
    rom[:8] = ROM_CONTENT.to_bytes(8, "little")
    guest.vm.set_user_memory_region(1, ROM_GPA, rom, SLOT_READONLY)
    yield guest
    guest.vm.set_user_memory_region(1, ROM_GPA, None)


def resume(guest: Guest) -> EngineExit:
    guest.vcpu.engine.stop_after(BLOCKS)
    return guest.vcpu.engine.run()


def program(guest: Guest, source: str, *, cpl: int = 0, **registers: int) -> tuple[int, bytes]:
    """Make the vCPU ready to execute *source* alone; where it is, and its bytes without the INT behind it."""
    assembled = guest.start(source, cpl=cpl, bits=64, at=None, rflags=0, handlers=None, **registers)
    return assembled.address, assembled.code[:-2]


def pointers(address: int) -> dict[str, int]:
    return {"rbx": address, "rsi": address, "rdi": address, "rax": 0}


@pytest.mark.parametrize("source", [*READS, *MODIFICATIONS])
def test_read_from_a_device_ends_the_instruction_undone(device: Guest, source: str) -> None:
    rip, code = program(device, source, **pointers(REGISTER))
    before = device.vcpu.get_regs()
    engine_exit = resume(device)
    assert engine_exit.reason == c.EXIT_MMIO
    assert engine_exit.address == HOLE + 0x120
    assert not engine_exit.flags & WRITE
    assert engine_exit.instruction.startswith(code)
    assert device.vcpu.get_regs() == before
    assert before.rip == rip


@pytest.mark.parametrize("source", WRITES)
def test_write_to_a_device_ends_the_instruction_undone(device: Guest, source: str) -> None:
    _, code = program(device, source, **pointers(REGISTER))
    before = device.vcpu.get_regs()
    engine_exit = resume(device)
    assert (engine_exit.reason, engine_exit.address) == (c.EXIT_MMIO, HOLE + 0x120)
    assert engine_exit.flags & WRITE
    assert engine_exit.instruction.startswith(code)
    assert device.vcpu.get_regs() == before


@pytest.mark.parametrize(("source", "distance"), [("push rax", -8), ("call rbx", -8), ("pushfq", -8)])
def test_stack_in_a_device_takes_no_push(device: Guest, source: str, distance: int) -> None:
    program(device, source, rbx=DEVICE, rsp=REGISTER)
    before = device.vcpu.get_regs()
    engine_exit = resume(device)
    assert (engine_exit.reason, engine_exit.address) == (c.EXIT_MMIO, HOLE + 0x120 + distance)
    assert device.vcpu.get_regs() == before


@pytest.mark.parametrize("source", ["pop rax", "ret", "popfq", "leave"])
def test_stack_in_a_device_gives_no_pop(device: Guest, source: str) -> None:
    program(device, source, rsp=REGISTER, rbp=REGISTER)
    before = device.vcpu.get_regs()
    engine_exit = resume(device)
    assert (engine_exit.reason, engine_exit.address) == (c.EXIT_MMIO, HOLE + 0x120)
    assert device.vcpu.get_regs() == before


def test_user_program_exits_like_the_kernel(device: Guest) -> None:
    device.tables.map(LOW_USER, HOLE + 0x7000, PTE_U)
    program(device, "mov rax, [rbx]", cpl=3, rbx=LOW_USER + 8)
    engine_exit = resume(device)
    assert (engine_exit.reason, engine_exit.address) == (c.EXIT_MMIO, HOLE + 0x7008)


def test_protection_comes_before_the_device(device: Guest) -> None:
    """LASS, and the page tables, say no before anybody asks what is there."""
    program(device, "mov rax, [rbx]", cpl=3, rbx=REGISTER)
    engine_exit = resume(device)
    assert (engine_exit.reason, engine_exit.vector) == (c.EXIT_MEMORY_FAULT, GP)


@pytest.mark.parametrize("source", ["mov [rbx], rax", "movups [rbx], xmm0", "push rax", "add [rbx], rax"])
def test_access_across_the_end_of_memory_leaves_memory_alone_when_it_is_small(
    device: Guest, source: str
) -> None:
    start = DEVICE - 4
    device.write(start - 12, bytes(range(16)))
    program(device, source, rbx=start, rsp=start + 8, rax=2**64 - 1)
    engine_exit = resume(device)
    assert (engine_exit.reason, engine_exit.address) == (c.EXIT_MMIO, HOLE)
    assert device.memory.read(device.gpa(start - 12), 16) == bytes(range(16))


def test_repeated_move_into_a_device_has_done_what_fits_into_memory(device: Guest) -> None:
    device.write(HIGH_SUPERVISOR, b"abcdefgh")
    rip, _ = program(device, "rep movsb", rsi=HIGH_SUPERVISOR, rdi=DEVICE - 3, rcx=8)
    engine_exit = resume(device)
    regs = device.vcpu.get_regs()
    assert (engine_exit.reason, engine_exit.address) == (c.EXIT_MMIO, HOLE)
    assert (regs.rip, regs.rcx, regs.rsi, regs.rdi) == (rip, 5, HIGH_SUPERVISOR + 3, DEVICE)
    assert device.memory.read(device.gpa(DEVICE - 3), 3) == b"abc"


def test_move_from_memory_to_a_device_and_back_exits_on_the_device(device: Guest) -> None:
    program(device, "movsq", rsi=HIGH_SUPERVISOR, rdi=REGISTER)
    engine_exit = resume(device)
    assert (engine_exit.address, engine_exit.flags & WRITE) == (HOLE + 0x120, WRITE)
    program(device, "movsq", rsi=REGISTER, rdi=HIGH_SUPERVISOR)
    engine_exit = resume(device)
    assert (engine_exit.address, engine_exit.flags & WRITE) == (HOLE + 0x120, 0)


def test_flags_of_the_instructions_before_are_kept(device: Guest) -> None:
    """The translator computes flags late; an exit has to find them."""
    assembled = device.start("mov eax, 1; sub eax, 2; access: add [rbx], eax", rbx=REGISTER)
    assert resume(device).reason == c.EXIT_MMIO
    regs = device.vcpu.get_regs()
    assert (regs.rip, regs.rax) == (assembled.labels["access"], 0xFFFFFFFF)
    assert regs.rflags & 0x8D5 == 0x95


def test_every_access_to_a_device_exits(device: Guest) -> None:
    """Nothing about a device is kept in the TLB, whatever was accessed before and however the exit was dealt with."""
    assembled = device.start("mov rax, [rbx]; next: mov rcx, [rbx + 8]; mov [rbx], rdx", rbx=REGISTER)
    assert resume(device).address == HOLE + 0x120
    assert resume(device).address == HOLE + 0x120
    regs = device.vcpu.get_regs()
    regs.rip = assembled.labels["next"]
    device.vcpu.set_regs(regs)
    assert resume(device).address == HOLE + 0x128


def test_memory_put_into_a_hole_is_seen_by_the_instruction_that_exited(device: Guest) -> None:
    device.start("mov rax, [rbx]", rbx=REGISTER)
    assert resume(device).reason == c.EXIT_MMIO
    ram = mmap.mmap(-1, PAGE_SIZE)
    ram[0x120:0x128] = bytes(range(8))
    device.vm.set_user_memory_region(2, HOLE, ram)
    try:
        assert resume(device).reason == c.EXIT_INTERCEPT
        assert device.vcpu.get_regs().rax == int.from_bytes(bytes(range(8)), "little")
    finally:
        device.vm.set_user_memory_region(2, HOLE, None)


def test_memory_taken_away_becomes_a_device(device: Guest) -> None:
    ram = mmap.mmap(-1, PAGE_SIZE)
    device.vm.set_user_memory_region(2, HOLE, ram)
    device.start("mov rax, [rbx]", rbx=REGISTER)
    assert resume(device).reason == c.EXIT_INTERCEPT
    device.vm.set_user_memory_region(2, HOLE, None)
    device.start("mov rax, [rbx]", rbx=REGISTER)
    assert resume(device).reason == c.EXIT_MMIO


def test_read_only_memory_is_read_directly(device: Guest) -> None:
    device.start("mov rax, [rbx]", rbx=ROM)
    assert resume(device).reason == c.EXIT_INTERCEPT
    assert device.vcpu.get_regs().rax == ROM_CONTENT


@pytest.mark.parametrize("source", ["mov [rbx], rax", "add [rbx], rax", "xchg [rbx], rax", "stosb"])
@pytest.mark.parametrize("read_before", [False, True])
def test_write_to_read_only_memory_is_an_mmio_exit(device: Guest, source: str, read_before: bool) -> None:
    before = "mov rcx, [rbx]; " * read_before
    assembled = device.start(f"{before}access: {source}", rbx=ROM, rdi=ROM, rax=77)
    engine_exit = resume(device)
    assert (engine_exit.reason, engine_exit.address, engine_exit.flags & WRITE) == (
        c.EXIT_MMIO, ROM_GPA, WRITE,
    )  # fmt: skip
    assert device.vcpu.get_regs().rip == assembled.labels["access"]
    assert device.vcpu.get_regs().rax == 77
    assert device.memory.load(ROM_GPA, 8) == ROM_CONTENT


@pytest.mark.parametrize("cpl", [0, 3])
def test_descriptor_table_in_a_hole_reads_as_ones(device: Guest, cpl: int) -> None:
    """An implicit access is no MMIO: all ones is a present, conforming code segment, which FS may hold."""
    device.sregs["gdt"] = DescriptorTable(DEVICE, 0xFF)
    device.start("mov fs, eax", cpl=cpl, rax=FREE_SELECTOR | 3)
    assert resume(device).reason == c.EXIT_INTERCEPT
    assert device.vcpu.get_sregs().fs.selector == FREE_SELECTOR | 3
    assert device.vcpu.get_sregs().fs.base == 0xFFFFFFFF


def test_explicit_access_to_a_descriptor_table_in_a_hole_is_mmio(device: Guest) -> None:
    device.sregs["gdt"] = DescriptorTable(DEVICE, 0xFF)
    device.start("mov rax, [rbx]", rbx=DEVICE + FREE_SELECTOR)
    assert resume(device).reason == c.EXIT_MMIO


def test_page_table_in_a_hole_is_all_ones(device: Guest) -> None:
    device.sregs["cr3"] = HOLE
    device.start("nop")
    assert resume(device).reason == c.EXIT_MEMORY_FAULT


def test_fetch_from_a_hole_is_an_exit_of_its_own(device: Guest) -> None:
    device.start("jmp rbx", rbx=REGISTER)
    engine_exit = resume(device)
    assert (engine_exit.reason, engine_exit.address) == (c.EXIT_FETCH_FROM_HOLE, HOLE + 0x120)
