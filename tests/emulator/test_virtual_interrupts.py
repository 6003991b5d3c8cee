"""CR4.VME and CR4.PVI: programs with an interrupt flag of their own, and INT n that stays in virtual-8086 mode."""

from __future__ import annotations

import pytest
from emulator_guest import Guest
from legacy_modes import STACK_BASE, STACK_TOP, START, enter_virtual_8086_mode, run

from lasskvm.emulator.events import Event, EventKind, deliver_event
from lasskvm.emulator.faults import GuestFault
from lasskvm.state import CPL, CR4, IDT_LIMIT, INTERRUPT_SHADOW, RFLAGS, RIP, RSP, Segment
from lasskvm.x86.descriptors import SYS_TSS_BUSY
from lasskvm.x86.exceptions import ERROR_IDT, GP
from lasskvm.x86.registers import (
    AR_P,
    CR4_PVI,
    CR4_VME,
    CS,
    RFLAGS_CF,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_TF,
    RFLAGS_VIF,
    RFLAGS_VIP,
    RFLAGS_VM,
    TR,
)

PUSHF, POPF, CLI, STI, IRET = "9c", "9d", "fa", "fb", "cf"
OPERAND32 = "66"
VECTOR = 0x21
INT = f"cd{VECTOR:02x}"
HANDLER_CS, HANDLER_IP = 0x5000, 0x1234
TSS, TSS_LIMIT, IO_MAP = 0x60000, 0x2087, 0x88
REDIRECTION = TSS + IO_MAP - 32


@pytest.fixture
def program(guest: Guest) -> Guest:
    """A program in virtual-8086 mode, IOPL 0, with CR4.VME, a TSS that redirects everything, and a handler."""
    enter_virtual_8086_mode(guest, iopl=0)
    guest.words[CR4] |= CR4_VME
    guest.state.set_segment(TR, Segment(8, TSS, TSS_LIMIT, SYS_TSS_BUSY | AR_P))
    guest.memory.store(TSS + 0x66, 2, IO_MAP)
    guest.memory.store(REDIRECTION, 32, 0)
    guest.memory.store(VECTOR * 4, 4, HANDLER_CS << 16 | HANDLER_IP)
    return guest


def frame(guest: Guest, words: int) -> list[int]:
    start = STACK_BASE + guest.words[RSP]
    return [guest.memory.load(start + 2 * number, 2) for number in range(words)]


def refused(guest: Guest, code: str) -> None:
    """*code* is #GP(0), and changes nothing."""
    before = guest.words[RFLAGS], guest.words[RSP]
    with pytest.raises(GuestFault) as caught:
        run(guest, code)
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)
    assert (guest.words[RFLAGS], guest.words[RSP], guest.words[RIP]) == (*before, START)


def test_sti_and_cli_change_the_virtual_flag_only(program: Guest) -> None:
    run(program, STI)
    assert program.words[RFLAGS] == RFLAGS_FIXED | RFLAGS_VM | RFLAGS_VIF
    assert program.words[INTERRUPT_SHADOW] == 0
    program.words[RFLAGS] |= RFLAGS_IF
    run(program, CLI)
    assert program.words[RFLAGS] == RFLAGS_FIXED | RFLAGS_VM | RFLAGS_IF


@pytest.mark.parametrize("code", [STI, POPF, IRET])
def test_who_would_enable_a_pending_virtual_interrupt_faults(program: Guest, code: str) -> None:
    program.words[RFLAGS] |= RFLAGS_VIP
    program.memory.store(STACK_BASE + STACK_TOP, 2, RFLAGS_IF)
    program.memory.store(STACK_BASE + STACK_TOP + 4, 2, RFLAGS_IF)
    refused(program, code)


@pytest.mark.parametrize("code", [POPF, IRET])
def test_who_would_single_step_faults(program: Guest, code: str) -> None:
    program.memory.store(STACK_BASE + STACK_TOP, 2, RFLAGS_TF)
    program.memory.store(STACK_BASE + STACK_TOP + 4, 2, RFLAGS_TF)
    refused(program, code)


@pytest.mark.parametrize("code", [PUSHF, POPF, IRET])
def test_flags_of_32_bits_are_still_the_monitors(program: Guest, code: str) -> None:
    refused(program, OPERAND32 + code)


@pytest.mark.parametrize(("virtual", "seen"), [(0, 0), (RFLAGS_VIF, RFLAGS_IF)])
def test_pushf_shows_the_virtual_flag_and_iopl_3(program: Guest, virtual: int, seen: int) -> None:
    program.words[RFLAGS] |= virtual | RFLAGS_CF | (0 if seen else RFLAGS_IF)
    run(program, PUSHF)
    assert frame(program, 1) == [RFLAGS_FIXED | RFLAGS_IOPL | RFLAGS_CF | seen]


def test_popf_loads_the_virtual_flag_and_leaves_if_and_iopl(program: Guest) -> None:
    program.memory.store(STACK_BASE + STACK_TOP, 2, RFLAGS_IF | RFLAGS_IOPL | RFLAGS_CF)
    run(program, POPF)
    assert program.words[RFLAGS] == RFLAGS_FIXED | RFLAGS_VM | RFLAGS_VIF | RFLAGS_CF


def test_iret_loads_the_virtual_flag_and_leaves_if_and_iopl(program: Guest) -> None:
    program.words[RFLAGS] |= RFLAGS_IF | RFLAGS_VIF
    for number, value in enumerate((HANDLER_IP, HANDLER_CS, RFLAGS_IOPL | RFLAGS_CF)):
        program.memory.store(STACK_BASE + STACK_TOP + 2 * number, 2, value)
    run(program, IRET)
    assert program.words[RFLAGS] == RFLAGS_FIXED | RFLAGS_VM | RFLAGS_IF | RFLAGS_CF
    assert (program.state.segment(CS).selector, program.words[RIP]) == (HANDLER_CS, HANDLER_IP)


@pytest.mark.parametrize(
    ("iopl", "before", "pushed", "after"),
    [
        pytest.param(0, RFLAGS_VIF, RFLAGS_IF | RFLAGS_IOPL, 0, id="virtual_interrupts_enabled"),
        pytest.param(0, RFLAGS_IF, RFLAGS_IOPL, RFLAGS_IF, id="virtual_interrupts_disabled"),
        pytest.param(3, RFLAGS_IF | RFLAGS_VIF, RFLAGS_IF | RFLAGS_IOPL, RFLAGS_VIF, id="iopl_3"),
    ],
)
def test_redirected_int_goes_through_the_programs_own_table(
    program: Guest, iopl: int, before: int, pushed: int, after: int
) -> None:
    program.words[RFLAGS] |= before | iopl << 12
    run(program, INT)
    assert (program.state.segment(CS).base, program.words[RIP]) == (HANDLER_CS << 4, HANDLER_IP)
    assert frame(program, 3) == [START + 2, 0x1000, RFLAGS_FIXED | pushed]
    assert program.words[RFLAGS] == RFLAGS_FIXED | RFLAGS_VM | iopl << 12 | after
    assert program.words[CPL] == 3


def test_int_whose_bit_is_set_is_the_monitors(program: Guest) -> None:
    program.memory.store(REDIRECTION + VECTOR // 8, 1, 1 << VECTOR % 8)
    refused(program, INT)


def test_int_whose_bit_is_set_goes_through_the_idt_with_iopl_3(program: Guest) -> None:
    program.memory.store(REDIRECTION + VECTOR // 8, 1, 1 << VECTOR % 8)
    program.words[RFLAGS] |= RFLAGS_IOPL
    program.words[IDT_LIMIT] = 0
    with pytest.raises(GuestFault) as caught:
        deliver_event(program.words, program.memory, Event(VECTOR, EventKind.SOFTWARE), Refusal())
    assert (caught.value.vector, caught.value.error_code) == (GP, VECTOR << 3 | ERROR_IDT)


class Refusal:
    """Stops at the first event that comes up during a delivery."""

    def before_event(self, event: Event, vectoring: Event | None) -> None:
        if vectoring is not None:
            raise GuestFault(event.vector, event.error_code)


def test_only_int_n_is_redirected(program: Guest) -> None:
    program.words[IDT_LIMIT] = 0
    for kind in (EventKind.EXTERNAL, EventKind.SOFTWARE_EXCEPTION):
        with pytest.raises(GuestFault):
            deliver_event(program.words, program.memory, Event(VECTOR, kind), Refusal())
    assert program.words[RIP] == START


@pytest.mark.parametrize(("limit", "io_map"), [(102, IO_MAP), (103, IO_MAP), (TSS_LIMIT, 8)])
def test_tss_without_a_redirection_bitmap_refuses_int(program: Guest, limit: int, io_map: int) -> None:
    program.state.set_segment(TR, Segment(8, TSS, limit, SYS_TSS_BUSY | AR_P))
    program.memory.store(TSS + 0x66, 2, io_map)
    refused(program, INT)


@pytest.mark.parametrize("code", [CLI, STI])
def test_protected_mode_programs_have_a_virtual_flag_by_pvi(guest: Guest, code: str) -> None:
    guest.enter_user()
    guest.words[RFLAGS] = RFLAGS_FIXED | RFLAGS_IF | (RFLAGS_VIF if code == CLI else 0)
    assert guest.fault_of(code) == (GP, 0)
    guest.words[CR4] |= CR4_PVI
    guest.run(code)
    assert guest.words[RFLAGS] == RFLAGS_FIXED | RFLAGS_IF | (RFLAGS_VIF if code == STI else 0)
    guest.words[RFLAGS] |= RFLAGS_VIP
    if code == STI:
        assert guest.fault_of(code) == (GP, 0)
