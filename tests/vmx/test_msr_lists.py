"""MSR lists of VM entries and VM exits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transition_guest import Nested

from lasskvm import state as s
from lasskvm.emulator.context import Emulation
from lasskvm.vmx.msr_lists import load_msrs, store_msrs
from lasskvm.x86 import msr
from lasskvm.x86.registers import EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE

LIST = 0x70000
LIMIT = 512
KERNEL = 0xFFFF_8000_0000_0000
NOT_CANONICAL = 1 << 62
#: No register has this number.
UNKNOWN_MSR = 0x1234_5678

Entry = tuple[int, int]
Process = Callable[[Emulation, int, int, int], int]


def machine(*entries: Entry, reserved: int = 0) -> Nested:
    """A guest with a list of (index, value) at LIST; *reserved* is what the last entry has in its reserved bytes."""
    guest = Nested()
    for number, (index, value) in enumerate(entries):
        place = LIST + 16 * number
        guest.memory.store(place, 4, index)
        guest.memory.store(place + 4, 4, reserved if number == len(entries) - 1 else 0)
        guest.memory.store(place + 8, 8, value)
    return guest


def load(guest: Nested, count: int) -> int:
    return load_msrs(guest.ctx, LIST, count, LIMIT)


def store(guest: Nested, count: int) -> int:
    return store_msrs(guest.ctx, LIST, count, LIMIT)


def stored(guest: Nested, number: int) -> int:
    return guest.memory.load(LIST + 16 * (number - 1) + 8, 8)


STAR_AND_LSTAR = ((msr.MSR_IA32_STAR, 0x23), (msr.MSR_IA32_LSTAR, KERNEL))


def test_all_entries_are_loaded_in_order() -> None:
    guest = machine(*STAR_AND_LSTAR, (msr.MSR_IA32_STAR, 0x33))
    assert load(guest, 3) == 0
    assert (guest.words[s.STAR], guest.words[s.LSTAR]) == (0x33, KERNEL)


def test_empty_list_may_be_anywhere() -> None:
    guest = machine()
    before = guest.snapshot()
    assert load_msrs(guest.ctx, 1 << 51, 0, LIMIT) == store_msrs(guest.ctx, 1 << 51, 0, LIMIT) == 0
    assert guest.snapshot() == before


def test_entries_before_the_one_that_fails_have_been_loaded_and_none_behind() -> None:
    guest = machine((msr.MSR_IA32_STAR, 1), (UNKNOWN_MSR, 0), (msr.MSR_IA32_SFMASK, 1))
    guest.words[s.SFMASK] = 0
    assert load(guest, 3) == 2
    assert (guest.words[s.STAR], guest.words[s.SFMASK]) == (1, 0)


@pytest.mark.parametrize(
    "index, value",
    [
        (UNKNOWN_MSR, 0),
        (msr.MSR_IA32_LSTAR, NOT_CANONICAL),
        (msr.MSR_IA32_PAT, 2),
        (msr.MSR_IA32_VMX_BASIC, 0),  # read-only
        (msr.MSR_IA32_FS_BASE, 0),
        (msr.MSR_IA32_GS_BASE, 0),
        (msr.MSR_IA32_SMBASE, 0),
        (msr.MSR_IA32_X2APIC_FIRST, 0),
        (msr.MSR_IA32_X2APIC_LAST, 0),
        (msr.MSR_IA32_BIOS_UPDT_TRIG, 0),
        (msr.MSR_IA32_BIOS_SIGN_ID, 0),
        # Paging is on.
        (msr.MSR_IA32_EFER, EFER_SCE | EFER_NXE),
    ],
)
def test_what_a_list_may_not_load_fails(index: int, value: int) -> None:
    guest = machine((index, value))
    before = guest.snapshot()
    assert load(guest, 1) == 1
    assert guest.snapshot() == before


def test_efer_is_loaded_while_its_mode_bits_agree() -> None:
    guest = machine((msr.MSR_IA32_EFER, EFER_LME | EFER_LMA))
    assert load(guest, 1) == 0
    assert guest.words[s.EFER] == EFER_LME | EFER_LMA


def test_kernel_gs_base_is_loaded_unlike_the_other_bases() -> None:
    guest = machine((msr.MSR_IA32_KERNEL_GS_BASE, KERNEL))
    assert load(guest, 1) == 0
    assert guest.words[s.KERNEL_GS_BASE] == KERNEL


@pytest.mark.parametrize("process", [load, store])
def test_reserved_bytes_must_be_0(process: Callable[[Nested, int], int]) -> None:
    assert process(machine(*STAR_AND_LSTAR, reserved=1 << 31), 2) == 2


@pytest.mark.parametrize("process", [load_msrs, store_msrs])
def test_list_outside_memory_fails_at_its_first_entry(process: Process) -> None:
    assert process(machine().ctx, 1 << 40, 3, LIMIT) == 1


@pytest.mark.parametrize("process", [load_msrs, store_msrs])
def test_list_longer_than_the_processor_takes_fails_behind_the_limit(process: Process) -> None:
    guest = machine(*[(msr.MSR_IA32_STAR, number) for number in range(5)])
    assert process(guest.ctx, LIST, 5, 3) == 4
    assert process(guest.ctx, LIST, 3, 3) == 0


def test_store_writes_values_and_nothing_else() -> None:
    guest = machine((msr.MSR_IA32_STAR, 0), (msr.MSR_IA32_TSC, 0), (msr.MSR_IA32_GS_BASE, 1))
    guest.words[s.STAR] = 0x1234
    assert store(guest, 3) == 0
    assert [stored(guest, number) for number in (1, 2, 3)] == [0x1234, guest.tsc, 0]
    assert guest.memory.load(LIST + 16, 8) == msr.MSR_IA32_TSC


@pytest.mark.parametrize(
    "index",
    [
        UNKNOWN_MSR,
        msr.MSR_IA32_SMBASE,
        msr.MSR_IA32_X2APIC_APICID,
        msr.MSR_IA32_BIOS_UPDT_TRIG,
        msr.MSR_IA32_BIOS_SIGN_ID,
    ],
)
def test_what_a_list_may_not_store_fails(index: int) -> None:
    guest = machine((index, 0x55))
    assert store(guest, 1) == 1
    assert stored(guest, 1) == 0x55


def test_what_the_vmm_filters_fails() -> None:
    guest = machine(*STAR_AND_LSTAR)
    guest.ctx.msr_permission = lambda index, is_write: index != msr.MSR_IA32_LSTAR or not is_write
    assert load(guest, 2) == 2
    assert store(guest, 2) == 0
