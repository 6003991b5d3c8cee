"""The hot functions, compiled, against themselves as plain Python: same results, same state, same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulator_guest import CODE, DPL3, IDT, KERNEL_CS, MAPPED, PML4, UPPER, USER_CS64, USER_STACK, Guest

import lasskvm.engine.physical  # noqa: F401  (gives compiled code its guest memory)
from lasskvm.emulator.control import set_cr3, set_segment_base
from lasskvm.emulator.delivery import EXCEPTION, EXTERNAL, SOFTWARE, deliver64
from lasskvm.emulator.msrs import write_base_msr
from lasskvm.emulator.syscalls import syscall64, sysenter, sysexit, sysret
from lasskvm.engine.compiler import compiled
from lasskvm.state import (
    CR0,
    CR4,
    EFER,
    IDT_BASE,
    RCX,
    RFLAGS,
    RSP,
    STAR,
    SYSENTER_CS,
)
from lasskvm.x86 import msr
from lasskvm.x86.descriptors import SYS_INTERRUPT_GATE, SYS_TRAP_GATE
from lasskvm.x86.exceptions import GP, PF, UD
from lasskvm.x86.registers import AR_P, CR4_PAE, CR4_PCIDE, EFER_LMA, EFER_SCE, FS, GS, RFLAGS_AC

Arrange = Callable[[Guest], None]


def nothing(guest: Guest) -> None:
    pass


def user(guest: Guest) -> None:
    guest.enter_user()


def ist(guest: Guest) -> None:
    for vector in (UD, PF, 0x80):
        guest.set_gate(vector, CODE, attributes=AR_P | SYS_TRAP_GATE, ist=1)


def absent_gates(guest: Guest) -> None:
    for vector in (UD, PF, 0x80):
        guest.set_gate(vector, CODE, attributes=SYS_INTERRUPT_GATE)


def user_handler(guest: Guest) -> None:
    guest.enter_user()
    for vector in (UD, PF, 0x80):
        guest.set_gate(vector, CODE, USER_CS64, AR_P | SYS_INTERRUPT_GATE | DPL3)


def low_idt(guest: Guest) -> None:
    guest.words[IDT_BASE] = IDT - UPPER


def low_stack(guest: Guest) -> None:
    guest.words[RSP] = USER_STACK


def low_stack_with_ac(guest: Guest) -> None:
    guest.words[RSP] = USER_STACK
    guest.words[RFLAGS] |= RFLAGS_AC


def crossing_stack(guest: Guest) -> None:
    guest.words[RSP] -= 0xFF0


def half_mapped_stack(guest: Guest) -> None:
    guest.words[RSP] -= 0xFF0
    guest.unmap(guest.words[RSP] - 0x20)


def unaccessed_code(guest: Guest) -> None:
    guest.set_descriptor(KERNEL_CS, guest.descriptor(KERNEL_CS) & ~(1 << 40))


def straddling_idt(guest: Guest) -> None:
    guest.words[IDT_BASE] = IDT - 8


def outcome(
    guest: Guest, arrange: Arrange, function: Any, arguments: tuple[int, ...], takes_memory: bool
) -> Any:
    arrange(guest)
    inputs = (guest.memory, *arguments) if takes_memory else arguments
    result = function(guest.words, *inputs)
    return result, guest.snapshot(), guest.memory.read(0, MAPPED)


def compiled_outcome(
    guest: Guest, arrange: Arrange, function: Any, arguments: tuple[int, ...], takes_memory: bool
) -> Any:
    arrange(guest)
    numbers = tuple(np.uint64(argument) for argument in arguments)
    table = np.uint64(guest.memory.table.ctypes.data)
    inputs = (table, *numbers) if takes_memory else numbers
    result = compiled(function)(guest.state.array, *inputs)
    result = tuple(map(int, result)) if isinstance(result, tuple) else int(result)
    return result, guest.snapshot(), guest.memory.read(0, MAPPED)


def assert_same(function: Any, arrange: Arrange, arguments: tuple[int, ...], *, takes_memory: bool) -> Any:
    plain = outcome(Guest(), arrange, function, arguments, takes_memory)
    native = compiled_outcome(Guest(), arrange, function, arguments, takes_memory)
    assert native[0] == plain[0]
    assert native[1] == plain[1], "the states differ"
    assert native[2] == plain[2], "the memories differ"
    return plain[0]


@pytest.mark.parametrize(
    "arrange",
    [
        nothing, user, ist, absent_gates, user_handler, low_idt, low_stack, low_stack_with_ac, crossing_stack,
        half_mapped_stack, unaccessed_code, straddling_idt,
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("vector", "error_code", "has_error_code", "kind"),
    [(PF, 7, 1, EXCEPTION), (UD, 0, 0, EXCEPTION), (0x80, 0, 0, SOFTWARE), (0x80, 0, 0, EXTERNAL)],
)
def test_delivery(arrange: Arrange, vector: int, error_code: int, has_error_code: int, kind: int) -> None:
    result = assert_same(
        deliver64, arrange, (vector, error_code, has_error_code, kind, CODE), takes_memory=True
    )
    assert len(result) == 3


def with_msrs(guest: Guest) -> None:
    guest.words[STAR] = 0x18 << 48 | 8 << 32
    guest.words[SYSENTER_CS] = 8


def with_bad_rcx(guest: Guest) -> None:
    with_msrs(guest)
    guest.words[RCX] = 1 << 62


def without_sce(guest: Guest) -> None:
    guest.words[EFER] &= ~EFER_SCE


@pytest.mark.parametrize("arrange", [nothing, user, with_msrs, with_bad_rcx, without_sce])
def test_system_calls(arrange: Arrange) -> None:
    assert_same(syscall64, arrange, (2,), takes_memory=False)
    assert_same(sysenter, arrange, (), takes_memory=False)
    for operand_size_64 in (0, 1):
        assert_same(sysret, arrange, (operand_size_64,), takes_memory=False)
        assert_same(sysexit, arrange, (operand_size_64,), takes_memory=False)


def pae_paging(guest: Guest) -> None:
    guest.words[EFER] &= ~EFER_LMA
    guest.words[CR4] = CR4_PAE
    guest.memory.store(0x10000, 8, 0x5001)
    guest.memory.store(0x11000, 8, 0x5003)
    assert guest.words[CR0]


def test_cr3_writes() -> None:
    assert assert_same(set_cr3, nothing, (PML4,), takes_memory=True) == 0
    assert assert_same(set_cr3, nothing, (1 << 50,), takes_memory=True) == GP
    assert assert_same(set_cr3, pae_paging, (0x10000,), takes_memory=True) == 0
    assert assert_same(set_cr3, pae_paging, (0x11000,), takes_memory=True) == GP


def pcids(guest: Guest) -> None:
    guest.words[CR4] |= CR4_PCIDE


def test_cr3_writes_with_pcids() -> None:
    assert assert_same(set_cr3, pcids, (1 << 63 | PML4 | 5,), takes_memory=True) == 0
    assert assert_same(set_cr3, pcids, (1 << 62 | PML4,), takes_memory=True) == GP


@pytest.mark.parametrize("number", [FS, GS])
@pytest.mark.parametrize("value", [0x1000, UPPER, 1 << 47])
def test_fsgsbase_writes(number: int, value: int) -> None:
    assert_same(set_segment_base, nothing, (number, value), takes_memory=False)


@pytest.mark.parametrize("index", [msr.MSR_IA32_FS_BASE, msr.MSR_IA32_KERNEL_GS_BASE, msr.MSR_IA32_LSTAR])
@pytest.mark.parametrize("value", [0x1000, UPPER, 1 << 47])
def test_segment_base_writes(index: int, value: int) -> None:
    assert_same(write_base_msr, nothing, (index, value), takes_memory=False)
