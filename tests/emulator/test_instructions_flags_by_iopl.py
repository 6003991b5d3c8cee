"""PUSHF, POPF, CLI and STI: what each privilege level may do to RFLAGS, single-stepping, the shadow of STI."""

from __future__ import annotations

import pytest
from emulator_guest import CODE, KERNEL_STACK, Guest
from legacy_modes import (
    STACK_BASE,
    STACK_TOP,
    START,
    enter_real_mode,
    enter_virtual_8086_mode,
    run,
)

from lasskvm.emulator.faults import GuestFault
from lasskvm.state import (
    CPL,
    INTERRUPT_SHADOW,
    RFLAGS,
    RIP,
    RSP,
)
from lasskvm.x86.exceptions import DB, GP
from lasskvm.x86.registers import (
    RFLAGS_AC,
    RFLAGS_CF,
    RFLAGS_DF,
    RFLAGS_FIXED,
    RFLAGS_ID,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    RFLAGS_ZF,
)

PUSHF, POPF, CLI, STI = "9c", "9d", "fa", "fb"


def test_pushf_stores_rf_as_0(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_RF | RFLAGS_ID | RFLAGS_AC
    guest.run(PUSHF)
    assert guest.frame(1) == [RFLAGS_FIXED | RFLAGS_IF | RFLAGS_ID | RFLAGS_AC]


def test_pushf_of_virtual_8086_mode_stores_vm_as_0(guest: Guest) -> None:
    enter_virtual_8086_mode(guest, iopl=3)
    run(guest, "66" + PUSHF)
    assert guest.memory.load(STACK_BASE + STACK_TOP - 4, 4) == RFLAGS_FIXED | RFLAGS_IOPL


@pytest.mark.parametrize("code", [PUSHF, POPF, CLI, STI])
@pytest.mark.parametrize("iopl", [0, 1, 2])
def test_flags_of_virtual_8086_mode_need_iopl_3(guest: Guest, code: str, iopl: int) -> None:
    enter_virtual_8086_mode(guest, iopl)
    with pytest.raises(GuestFault) as caught:
        run(guest, code)
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)
    assert (guest.words[RSP], guest.words[RIP]) == (STACK_TOP, START)


def test_popf_of_virtual_8086_mode_with_iopl_3_changes_if_but_not_iopl_and_vm(guest: Guest) -> None:
    enter_virtual_8086_mode(guest, iopl=3)
    guest.memory.store(STACK_BASE + STACK_TOP, 4, RFLAGS_IF | RFLAGS_NT)
    run(guest, "66" + POPF)
    assert guest.words[RFLAGS] == RFLAGS_FIXED | RFLAGS_IF | RFLAGS_NT | RFLAGS_IOPL | RFLAGS_VM


@pytest.mark.parametrize(
    "cpl, iopl, changes", [(0, 0, RFLAGS_IF | RFLAGS_IOPL), (3, 3, RFLAGS_IF), (1, 1, RFLAGS_IF), (3, 2, 0)]
)
def test_popf_changes_if_and_iopl_as_privilege_allows(
    guest: Guest, cpl: int, iopl: int, changes: int
) -> None:
    words = guest.words
    words[CPL] = cpl
    if cpl == 3:
        guest.enter_user()
    before = RFLAGS_FIXED | iopl << 12
    words[RFLAGS] = before
    flipped = (RFLAGS_IF | RFLAGS_IOPL) ^ (iopl << 12)
    others = RFLAGS_CF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID
    guest.store(words[RSP], 8, flipped | others | (1 << 63 | RFLAGS_RF | RFLAGS_VM))
    guest.run(POPF)
    assert words[RFLAGS] == before & ~changes | flipped & changes | others


def test_16_bit_popf_leaves_the_upper_flags(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_AC | RFLAGS_ID
    guest.store(KERNEL_STACK, 8, RFLAGS_ZF)
    guest.run("66" + POPF)
    assert guest.words[RFLAGS] == RFLAGS_FIXED | RFLAGS_ZF | RFLAGS_AC | RFLAGS_ID
    assert guest.words[RSP] == KERNEL_STACK + 2


def test_popf_that_sets_tf_is_not_itself_stepped(guest: Guest) -> None:
    guest.store(KERNEL_STACK, 8, RFLAGS_TF)
    guest.run(POPF)
    assert guest.words[RFLAGS] & RFLAGS_TF
    with pytest.raises(GuestFault) as caught:
        guest.run("50")
    assert caught.value.vector == DB


def test_popf_that_clears_tf_is_stepped_for_the_last_time(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_TF
    guest.store(KERNEL_STACK, 8, 0)
    with pytest.raises(GuestFault) as caught:
        guest.run(POPF)
    assert caught.value.vector == DB
    assert guest.words[RIP] == CODE + 1
    assert not guest.words[RFLAGS] & RFLAGS_TF


def test_sti_holds_interrupts_back_for_one_instruction_when_it_enables_them(guest: Guest) -> None:
    guest.words[RFLAGS] &= ~RFLAGS_IF
    guest.run(STI)
    assert guest.words[RFLAGS] & RFLAGS_IF
    assert guest.words[INTERRUPT_SHADOW] == 1
    guest.run(STI)
    assert guest.words[INTERRUPT_SHADOW] == 0


def test_cli_and_popf_cast_no_shadow(guest: Guest) -> None:
    guest.run(CLI)
    assert not guest.words[RFLAGS] & RFLAGS_IF
    guest.store(KERNEL_STACK, 8, RFLAGS_IF)
    guest.run(POPF)
    assert guest.words[RFLAGS] & RFLAGS_IF
    assert guest.words[INTERRUPT_SHADOW] == 0


@pytest.mark.parametrize("code", [CLI, STI])
def test_cli_and_sti_need_iopl_in_protected_mode(user: Guest, code: str) -> None:
    for iopl in (0, 1, 2):
        user.words[RFLAGS] = RFLAGS_FIXED | iopl << 12
        assert user.fault_of(code) == (GP, 0)
    user.words[RFLAGS] = RFLAGS_FIXED | RFLAGS_IOPL
    user.run(code)
    assert bool(user.words[RFLAGS] & RFLAGS_IF) == (code == STI)


def test_real_mode_needs_no_iopl(guest: Guest) -> None:
    enter_real_mode(guest)
    run(guest, STI)
    assert guest.words[RFLAGS] & RFLAGS_IF
