"""What ends a repeated string instruction before its count does, and where it goes on: traps, faults, devices."""

from __future__ import annotations

import pytest
from emulator_guest import CODE, UPPER, Guest
from string_guest import (
    CMPSB,
    CMPSD,
    DESTINATION,
    MOVSB,
    MOVSD,
    MOVSQ,
    PATTERN,
    REP,
    SOURCE,
    STOSB,
    STOSQ,
    content,
    finish,
    prepare,
    string_kernel,
)

from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.mmio import Mmio, MmioReadNeeded, MmioWrite
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import (
    CR0,
    DR0,
    DR7,
    INTERRUPT_SHADOW,
    RAX,
    RCX,
    RDI,
    RFLAGS,
    RIP,
    RSI,
)
from lasskvm.x86.exceptions import AC, DB, GP, PF, PF_U, PF_W
from lasskvm.x86.paging import PTE_A, PTE_D, PTE_P, PTE_W
from lasskvm.x86.registers import (
    CR0_AM,
    DR6_BS,
    RFLAGS_AC,
    RFLAGS_CF,
    RFLAGS_DF,
    RFLAGS_RF,
    RFLAGS_SF,
    RFLAGS_TF,
    RFLAGS_ZF,
)

#: Guest-physical, where no memory is, and a linear page for it.
DEVICE_GPA, DEVICE = 0xFE00_0000, UPPER + 0xB0000


@pytest.fixture(params=["walked", "cached"])
def kernel(guest: Guest, request: pytest.FixtureRequest) -> Guest:
    """A 64-bit kernel with a pattern at the source."""
    return string_kernel(guest, cached=request.param == "cached")


def map_device(guest: Guest, address: int = DEVICE) -> None:
    """Map the page at *address* to where no memory is."""
    guest.memory.store(guest.page_entry(address), 8, DEVICE_GPA | PTE_P | PTE_W)


# ------------------------------------------------------------------------------------- what comes in between


def test_long_repetition_pauses_on_itself_so_that_interrupts_can_come_in(kernel: Guest) -> None:
    kernel.words[RCX] = 3000
    kernel.words[RFLAGS] |= RFLAGS_DF
    kernel.words[RDI] = DESTINATION + 3000
    kernel.words[INTERRUPT_SHADOW] = 1
    kernel.run(REP + STOSB)
    assert kernel.words[RIP] == CODE
    assert 0 < kernel.words[RCX] < 3000
    assert kernel.words[RFLAGS] & RFLAGS_RF
    assert kernel.words[INTERRUPT_SHADOW] == 0
    assert kernel.words[RDI] == DESTINATION + kernel.words[RCX]
    assert finish(kernel, REP + STOSB) > 1
    assert not kernel.words[RFLAGS] & RFLAGS_RF


def test_single_step_trap_comes_behind_each_element(kernel: Guest) -> None:
    kernel.words[RFLAGS] |= RFLAGS_TF
    kernel.words[RCX] = 20
    for left in range(19, -1, -1):
        with pytest.raises(GuestFault) as caught:
            kernel.run(REP + MOVSB)
        assert (caught.value.vector, caught.value.dr6) == (DB, DR6_BS)
        assert kernel.words[RCX] == left
        assert kernel.words[RIP] == (CODE if left else CODE + 2)
        assert bool(kernel.words[RFLAGS] & RFLAGS_RF) == bool(left)


def test_data_breakpoint_stops_behind_the_element_that_met_it(guest: Guest) -> None:
    prepare(guest, 40)
    guest.words[DR0], guest.words[DR7] = DESTINATION + 10, 0x10402
    guest.run(REP + MOVSB)
    assert guest.ctx.watch_hits == 1
    assert guest.words[RDI] == DESTINATION + 11
    assert guest.words[RIP] == CODE
    guest.run(REP + MOVSB)
    assert guest.ctx.watch_hits == 0
    assert guest.words[RIP] == CODE + 2


@pytest.mark.parametrize("code, size", [(MOVSB, 1), (MOVSQ, 8), (STOSB, 1), (STOSQ, 8)])
def test_fault_leaves_the_registers_at_the_element_that_faults(kernel: Guest, code: str, size: int) -> None:
    words = kernel.words
    start = DESTINATION + PAGE_SIZE - 100 * size
    words[RDI], words[RCX], words[RAX] = start, 200, 0x5A5A5A5A5A5A5A5A
    kernel.unmap(DESTINATION + PAGE_SIZE)
    with pytest.raises(GuestFault) as caught:
        finish(kernel, REP + code)
    assert (caught.value.vector, caught.value.error_code) == (PF, PF_W)
    assert caught.value.cr2 == DESTINATION + PAGE_SIZE
    assert (words[RDI], words[RCX], words[RIP]) == (DESTINATION + PAGE_SIZE, 100, CODE)
    moved = PATTERN[: 100 * size] if code in (MOVSB, MOVSQ) else b"\x5a" * 100 * size
    assert content(kernel, start, 100 * size) == moved


def test_element_across_a_missing_page_is_not_stored_in_part(kernel: Guest) -> None:
    kernel.words[RDI], kernel.words[RCX] = DESTINATION + PAGE_SIZE - 84, 20
    kernel.unmap(DESTINATION + PAGE_SIZE)
    with pytest.raises(GuestFault) as caught:
        finish(kernel, REP + MOVSQ)
    assert caught.value.cr2 == DESTINATION + PAGE_SIZE
    assert kernel.words[RCX] == 10
    assert content(kernel, DESTINATION + PAGE_SIZE - 4, 4) == bytes(4)


def test_page_of_the_destination_stays_clean_when_the_source_faults(kernel: Guest) -> None:
    kernel.words[RCX] = 100
    kernel.unmap(SOURCE)
    entry = kernel.page_entry(DESTINATION)
    with pytest.raises(GuestFault) as caught:
        kernel.run(REP + MOVSQ)
    assert (caught.value.vector, caught.value.error_code, caught.value.cr2) == (PF, 0, SOURCE)
    assert not kernel.memory.load(entry, 8) & (PTE_A | PTE_D)


def test_fault_in_a_repeated_comparison_restores_the_flags(kernel: Guest) -> None:
    """The manual, on REP: "the EFLAGS value is restored to the state prior to the execution of the instruction"."""
    kernel.memory.write(DESTINATION & 0xFFFFF, PATTERN)
    kernel.unmap(SOURCE + PAGE_SIZE)
    words = kernel.words
    words[RSI] = SOURCE + PAGE_SIZE - 10
    words[RDI] = DESTINATION + PAGE_SIZE - 10
    words[RCX] = 20
    words[RFLAGS] |= RFLAGS_CF | RFLAGS_SF
    before = words[RFLAGS]
    with pytest.raises(GuestFault):
        kernel.run(REP + CMPSB)
    assert words[RCX] == 10
    assert words[RFLAGS] == before


def test_repetition_of_a_user_stops_where_lass_begins(user: Guest) -> None:
    user.words[RSI], user.words[RDI], user.words[RCX] = SOURCE, 0x90000, 4
    assert user.fault_of(REP + MOVSB) == (GP, 0)
    user.words[RDI], user.words[RSI] = DESTINATION, 0x70000
    assert user.fault_of(REP + MOVSB) == (GP, 0)


def test_supervisor_string_access_below_the_split_needs_ac(kernel: Guest) -> None:
    kernel.words[RDI], kernel.words[RCX] = 0x90000, 100
    assert kernel.fault_of(REP + MOVSQ) == (GP, 0)
    kernel.words[RFLAGS] |= RFLAGS_AC
    if kernel.ctx.tlb.enabled:
        kernel.ctx.tlb.select(kernel.words)
    finish(kernel, REP + MOVSQ)
    assert content(kernel, 0x90000, 800) == PATTERN[:800]


def test_misaligned_elements_of_a_user_with_alignment_checks_fault(user: Guest) -> None:
    user.words[CR0] |= CR0_AM
    user.words[RFLAGS] |= RFLAGS_AC
    user.words[RSI], user.words[RDI], user.words[RCX] = 0x70001, 0x90000, 64
    assert user.fault_of(REP + MOVSQ) == (AC, 0)
    finish(user, REP + MOVSB)
    assert user.words[RCX] == 0


def test_write_protected_user_page_faults_as_a_write(user: Guest) -> None:
    user.write_protect(0x90000)
    user.words[RDI], user.words[RCX] = 0x90000, 64
    assert user.fault_of(REP + STOSQ) == (PF, PF_W | PF_U | 1)


# ------------------------------------------------------------------------------------------------------ MMIO


def test_repeated_stores_to_a_device_leave_one_at_a_time(guest: Guest) -> None:
    prepare(guest, 3)
    map_device(guest)
    guest.words[RDI] = DEVICE + 8
    rip = guest.words[RIP]
    for number in range(3):
        guest.run(REP + MOVSD)
        value = int.from_bytes(PATTERN[4 * number : 4 * number + 4], "little")
        assert guest.ctx.mmio.writes == [MmioWrite(DEVICE_GPA + 8 + 4 * number, 4, value)]
        guest.ctx.mmio.writes.clear()
        guest.ctx.leave_block = False
        assert (guest.words[RIP] == rip) == (number < 2)


def test_repeated_loads_from_a_device_wait_for_each_answer(guest: Guest) -> None:
    prepare(guest, 2)
    map_device(guest)
    guest.words[RSI] = DEVICE
    for number in range(2):
        with pytest.raises(MmioReadNeeded) as needed:
            guest.run(REP + MOVSD)
        assert needed.value.gpa == DEVICE_GPA + 4 * number
        assert guest.words[RCX] == 2 - number
        guest.ctx.mmio.answer(0x11111111 * (number + 1))
        guest.run(REP + MOVSD)
    assert content(guest, DESTINATION, 8) == bytes.fromhex("1111111122222222")
    assert guest.words[RIP] == CODE + 2


def test_comparison_of_two_device_registers_asks_for_both(guest: Guest) -> None:
    map_device(guest)
    guest.words[RSI], guest.words[RDI] = DEVICE, DEVICE + 0x10
    for gpa in (DEVICE_GPA, DEVICE_GPA + 0x10):
        with pytest.raises(MmioReadNeeded) as needed:
            guest.run(CMPSD)
        assert needed.value.gpa == gpa
        guest.ctx.mmio.answer(7)
    guest.run(CMPSD)
    assert guest.words[RFLAGS] & RFLAGS_ZF


def test_device_on_the_vms_own_bus_gets_every_element(guest: Guest) -> None:
    prepare(guest, 200)
    map_device(guest)
    written: list[tuple[int, int]] = []

    def write(gpa: int, size: int, value: int) -> bool:
        written.append((gpa, value))
        return True

    guest.ctx.mmio = Mmio(write=write)
    guest.words[RDI] = DEVICE
    finish(guest, REP + MOVSB)
    assert written == [(DEVICE_GPA + number, PATTERN[number]) for number in range(200)]


def test_store_to_a_page_with_decoded_code_pauses(guest: Guest) -> None:
    guest.ctx.tlb.select(guest.words)
    guest.ctx.tlb.mark_code(DESTINATION & 0xFFFFF)
    prepare(guest, 600)
    guest.words[RDI] = DESTINATION + PAGE_SIZE - 8
    guest.ctx.tlb.mark_code((DESTINATION & 0xFFFFF) + PAGE_SIZE)
    guest.run(REP + MOVSQ)
    assert guest.ctx.leave_block
    assert guest.words[RIP] == CODE
    assert finish(guest, REP + MOVSQ) >= 2
    assert content(guest, DESTINATION + PAGE_SIZE - 8, 4800) == PATTERN[:4800]
