"""IRET, IRETD and IRETQ in every mode: frames, privilege, RFLAGS, and what comes with it."""

from __future__ import annotations

import pytest
from emulator_guest import (
    ABSENT_CS,
    CONFORMING_CS,
    DPL1,
    DPL3,
    GDT,
    KERNEL_CS,
    KERNEL_CS32,
    KERNEL_SS,
    KERNEL_STACK,
    RING1_CS,
    RING1_SS,
    UPPER,
    USER_CODE,
    USER_CS32,
    USER_CS64,
    USER_SS,
    USER_STACK,
    Guest,
)
from flat_protected_mode import GATE, STACK, enter_flat_mode
from legacy_modes import enter_compatibility_mode, enter_real_mode, enter_virtual_8086_mode, run

from lasskvm.emulator.faults import GuestFault, Unhandleable
from lasskvm.state import (
    CPL,
    GDT_BASE,
    INTERRUPT_SHADOW,
    NMI_BLOCKED,
    RFLAGS,
    RIP,
    RSP,
    Segment,
)
from lasskvm.x86.descriptors import make_segment
from lasskvm.x86.exceptions import DB, GP, NP, PF, PF_U
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    AR_CODE64,
    AR_DATA,
    AR_DB,
    AR_DPL_SHIFT,
    AR_P,
    AR_REAL_MODE,
    AR_UNUSABLE,
    CS,
    DR6_BS,
    DS,
    ES,
    FS,
    GS,
    RFLAGS_AC,
    RFLAGS_ARITHMETIC,
    RFLAGS_CF,
    RFLAGS_DF,
    RFLAGS_FIXED,
    RFLAGS_ID,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VIF,
    RFLAGS_VIP,
    RFLAGS_VM,
    SS,
)

IRETW, IRETD, IRETQ = "66cf", "cf", "48cf"
TARGET = UPPER + 0x12340
NOT_CANONICAL = 1 << 47
FLAT = 0xFFFFFFFF
#: Every bit of an image, reserved ones included.
EVERYTHING = 0xFFFF_FFFF_FFFF_FFFF
PROGRAM_FLAGS = RFLAGS_ARITHMETIC | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT | RFLAGS_RF | RFLAGS_AC | RFLAGS_ID
SUPERVISOR_FLAGS = RFLAGS_IF | RFLAGS_IOPL | RFLAGS_VIF | RFLAGS_VIP


def push_frame(guest: Guest, *values: int, size: int = 8) -> None:
    """Put *values* on the stack, the first at SS:RSP."""
    base = guest.state.segment(SS).base if guest.words[RSP] < 1 << 32 else 0
    for number, value in enumerate(values):
        guest.store(base + guest.words[RSP] + size * number, size, value & (1 << 8 * size) - 1)


def segment(guest: Guest, number: int) -> Segment:
    return guest.state.segment(number)


def fault_of(guest: Guest, code: str) -> tuple[int, int | None]:
    """What *code* faults with in a mode that is not flat 64-bit mode; the state must be as before."""
    before = guest.snapshot()
    with pytest.raises(GuestFault) as caught:
        run(guest, code)
    assert guest.snapshot() == before, "a faulting instruction changed the state"
    return caught.value.vector, caught.value.error_code


@pytest.fixture
def kernel32(guest: Guest) -> Guest:
    """Flat 32-bit kernel code outside IA-32e mode."""
    enter_flat_mode(guest)
    return guest


# ------------------------------------------------------------------------------------------------- 64-bit mode


@pytest.mark.parametrize(("code", "size"), [(IRETW, 2), (IRETD, 4), (IRETQ, 8)])
def test_64_bit_mode_always_pops_the_stack(guest: Guest, code: str, size: int) -> None:
    push_frame(guest, 0x1234, KERNEL_CS, RFLAGS_FIXED | RFLAGS_CF, 0x7654, KERNEL_SS, size=size)
    guest.run(code)
    words = guest.words
    assert (words[RIP], words[RSP], words[CPL]) == (0x1234, 0x7654, 0)
    assert words[RFLAGS] & RFLAGS_ARITHMETIC == RFLAGS_CF
    assert segment(guest, SS) == Segment(KERNEL_SS, 0, FLAT, AR_DATA)


def test_return_to_user_mode(guest: Guest) -> None:
    push_frame(guest, USER_CODE, USER_CS64, RFLAGS_FIXED | RFLAGS_IF, USER_STACK, USER_SS)
    guest.state.set_segment(DS, Segment(KERNEL_SS, 0, FLAT, AR_DATA))
    guest.state.set_segment(GS, Segment(3, 0x1234567, 0, AR_UNUSABLE))
    guest.run(IRETQ)
    words = guest.words
    assert (words[RIP], words[CPL], words[RSP]) == (USER_CODE, 3, USER_STACK)
    assert segment(guest, CS) == Segment(USER_CS64, 0, FLAT, AR_CODE64 | DPL3)
    assert segment(guest, DS) == Segment(0, 0, 0, AR_UNUSABLE)
    assert segment(guest, GS) == Segment(0, 0x1234567, 0, AR_UNUSABLE)


def test_return_to_compatibility_mode(guest: Guest) -> None:
    push_frame(guest, 0xFFFF_0000_0000 | USER_CODE, USER_CS32, RFLAGS_FIXED, 1 << 32 | USER_STACK, USER_SS)
    guest.run(IRETQ)
    assert (guest.words[RIP], guest.words[RSP]) == (USER_CODE, USER_STACK)


def test_return_to_a_16_bit_stack_leaves_the_upper_bits_of_rsp(guest: Guest) -> None:
    guest.set_descriptor(0x78, make_segment(0, 0xFFFF, AR_DATA & ~AR_DB | DPL3))
    push_frame(guest, USER_CODE, USER_CS32, RFLAGS_FIXED, 0xFFFF1234, 0x7B)
    guest.run(IRETQ)
    assert guest.words[RSP] == KERNEL_STACK & ~0xFFFF | 0x1234


def test_compatibility_mode_pops_the_stack_only_towards_user_mode(guest: Guest) -> None:
    enter_compatibility_mode(guest)
    push_frame(guest, 0x5000, USER_CS32, RFLAGS_FIXED, size=4)
    run(guest, IRETD)
    assert (guest.words[RIP], guest.words[RSP]) == (0x5000, USER_STACK + 12)


def test_same_level_return_with_a_null_ss(guest: Guest) -> None:
    push_frame(guest, TARGET, KERNEL_CS, RFLAGS_FIXED, KERNEL_STACK, 0)
    guest.run(IRETQ)
    assert segment(guest, SS) == Segment(0, 0, 0, AR_UNUSABLE)


def test_null_ss_towards_ring_1(guest: Guest) -> None:
    push_frame(guest, TARGET, RING1_CS, RFLAGS_FIXED, KERNEL_STACK, 1)
    guest.run(IRETQ)
    assert segment(guest, SS) == Segment(1, 0, 0, AR_UNUSABLE | 1 << AR_DPL_SHIFT)


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        ((TARGET, 0), (GP, 0)),
        ((TARGET, 0x80), (GP, 0x80)),
        ((TARGET, KERNEL_SS), (GP, KERNEL_SS)),
        ((TARGET, USER_CS64 & ~3), (GP, USER_CS64 & ~3)),
        ((TARGET, KERNEL_CS | 3), (GP, KERNEL_CS)),
        ((TARGET, 0x78), (GP, 0x78)),
        ((TARGET, ABSENT_CS), (NP, ABSENT_CS)),
        ((TARGET, KERNEL_CS, 2, 0, 1), (GP, 0)),
        ((TARGET, USER_CS64, 2, 0, 0), (GP, 0)),
        ((TARGET, USER_CS64, 2, 0, 3), (GP, 0)),
        ((0x1000, KERNEL_CS32, 2, 0, 0), (GP, 0)),
        ((TARGET, RING1_CS, 2, 0, KERNEL_SS), (GP, KERNEL_SS)),
        ((TARGET, KERNEL_CS, 2, 0, KERNEL_CS), (GP, KERNEL_CS)),
        ((TARGET, KERNEL_CS, 2, 0, 0x80), (GP, 0x80)),
        ((NOT_CANONICAL, RING1_CS, 2, 0, RING1_SS), (STACK_FAULT, RING1_SS & ~3)),
        ((NOT_CANONICAL, KERNEL_CS, 2, 0, KERNEL_SS), (GP, 0)),
        ((NOT_CANONICAL, USER_CS64, 2, 0, USER_SS), (GP, 0)),
    ],
    ids=[
        "null", "beyond", "data", "rpl", "dpl", "l and d", "absent", "null ss of another level", "null ss for user",
        "null ss rpl 3", "null ss for compatibility mode", "ss of another level", "ss is code", "ss beyond",
        "absent ss", "target", "target outside",
    ],
)  # fmt: skip
def test_forbidden_returns(guest: Guest, frame: tuple[int, ...], fault: tuple[int, int]) -> None:
    guest.set_descriptor(0x78, make_segment(0, FLAT, AR_CODE64 | AR_DB))
    guest.set_descriptor(RING1_SS, make_segment(0, FLAT, AR_DATA & ~AR_P | DPL1))
    push_frame(guest, *frame)
    assert guest.fault_of(IRETQ) == fault


def test_return_inwards_is_a_general_protection(user: Guest) -> None:
    push_frame(user, TARGET, KERNEL_CS, 2, KERNEL_STACK, KERNEL_SS)
    assert user.fault_of(IRETQ) == (GP, KERNEL_CS)


def test_conforming_code_takes_the_level_of_the_selector(guest: Guest) -> None:
    push_frame(guest, USER_CODE, CONFORMING_CS | 3, 2, USER_STACK, USER_SS)
    guest.run(IRETQ)
    assert guest.words[CPL] == 3


def test_nested_task_flag_is_a_general_protection_in_ia32e_mode(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_NT
    guest.words[RSP] = NOT_CANONICAL
    assert guest.fault_of(IRETQ) == (GP, 0)


def test_vm_in_the_image_means_nothing_in_ia32e_mode(guest: Guest) -> None:
    push_frame(guest, TARGET, KERNEL_CS, RFLAGS_FIXED | RFLAGS_VM, KERNEL_STACK, KERNEL_SS)
    guest.run(IRETQ)
    assert not guest.words[RFLAGS] & RFLAGS_VM


# -------------------------------------------------------------------------------------- LASS and other accesses


def test_user_frame_in_the_upper_half_is_a_stack_fault(user: Guest) -> None:
    user.words[RSP] = KERNEL_STACK
    assert user.fault_of(IRETQ) == (STACK_FAULT, 0)


def test_user_frame_on_an_absent_page_is_a_user_page_fault(user: Guest) -> None:
    user.unmap(USER_STACK)
    assert user.fault_of(IRETQ) == (PF, PF_U)


def test_kernel_frame_in_the_lower_half_needs_ac(guest: Guest) -> None:
    guest.words[RSP] = USER_STACK
    push_frame(guest, TARGET, KERNEL_CS, RFLAGS_FIXED, KERNEL_STACK, KERNEL_SS)
    assert guest.fault_of(IRETQ) == (STACK_FAULT, 0)
    guest.words[RFLAGS] |= RFLAGS_AC
    guest.run(IRETQ)
    assert guest.words[RSP] == KERNEL_STACK


def test_low_gdt_violates_lass_also_with_ac(guest: Guest) -> None:
    guest.words[GDT_BASE] = GDT - UPPER
    guest.words[RFLAGS] |= RFLAGS_AC
    push_frame(guest, TARGET, KERNEL_CS, RFLAGS_FIXED, KERNEL_STACK, KERNEL_SS)
    assert guest.fault_of(IRETQ) == (GP, 0)


def test_kernel_may_return_to_the_lower_half_and_faults_there(guest: Guest) -> None:
    push_frame(guest, USER_CODE, KERNEL_CS, RFLAGS_FIXED, KERNEL_STACK, KERNEL_SS)
    guest.run(IRETQ)
    assert guest.words[RIP] == USER_CODE


# ------------------------------------------------------------------------------------------------------ RFLAGS


def flags_after(guest: Guest, before: int, image: int, code: str = IRETQ, size: int = 8) -> int:
    """RFLAGS after a return to the same level."""
    cpl = guest.words[CPL]
    frame = (USER_CODE, USER_CS64, image, USER_STACK, USER_SS)
    if cpl == 0:
        frame = (0x1000, KERNEL_CS, image, 0x2000, KERNEL_SS)
    guest.words[RFLAGS] = before | RFLAGS_FIXED
    push_frame(guest, *frame, size=size)
    guest.run(code)
    return guest.words[RFLAGS]


def test_cpl_0_takes_every_flag_but_vm(guest: Guest) -> None:
    assert flags_after(guest, 0, EVERYTHING) == RFLAGS_FIXED | PROGRAM_FLAGS | SUPERVISOR_FLAGS


def test_cpl_0_can_clear_them_all(guest: Guest) -> None:
    before = (PROGRAM_FLAGS | SUPERVISOR_FLAGS) & ~(RFLAGS_TF | RFLAGS_NT)
    assert flags_after(guest, before, 0) == RFLAGS_FIXED


def test_cpl_3_keeps_if_iopl_vif_and_vip(user: Guest) -> None:
    assert flags_after(user, RFLAGS_IF, EVERYTHING) == RFLAGS_FIXED | RFLAGS_IF | PROGRAM_FLAGS


def test_iopl_3_lets_user_mode_change_if(user: Guest) -> None:
    assert flags_after(user, RFLAGS_IF | RFLAGS_IOPL, 0) == RFLAGS_FIXED | RFLAGS_IOPL


def test_return_to_user_mode_changes_what_cpl_0_may_change(guest: Guest) -> None:
    push_frame(guest, USER_CODE, USER_CS64, RFLAGS_FIXED | RFLAGS_IOPL | RFLAGS_IF, USER_STACK, USER_SS)
    guest.words[RFLAGS] = RFLAGS_FIXED
    guest.run(IRETQ)
    assert guest.words[RFLAGS] == RFLAGS_FIXED | RFLAGS_IOPL | RFLAGS_IF


def test_16_bit_image_leaves_the_upper_flags(guest: Guest) -> None:
    upper = RFLAGS_AC | RFLAGS_ID | RFLAGS_VIF | RFLAGS_RF
    assert flags_after(guest, upper | RFLAGS_CF, 0, IRETW, 2) == RFLAGS_FIXED | upper


def test_rf_of_the_image_holds_for_the_next_instruction(guest: Guest) -> None:
    assert flags_after(guest, 0, RFLAGS_RF) & RFLAGS_RF
    guest.words[RIP] = TARGET
    guest.run("90")
    assert not guest.words[RFLAGS] & RFLAGS_RF


def test_tf_of_the_image_traps_behind_the_next_instruction(guest: Guest) -> None:
    assert flags_after(guest, 0, RFLAGS_TF) & RFLAGS_TF
    guest.words[RIP] = TARGET
    with pytest.raises(GuestFault) as caught:
        guest.run("90")
    assert (caught.value.vector, caught.value.dr6) == (DB, DR6_BS)


def test_iret_is_single_stepped_by_the_tf_it_began_with(guest: Guest) -> None:
    with pytest.raises(GuestFault) as caught:
        flags_after(guest, RFLAGS_TF, 0)
    assert (caught.value.vector, caught.value.dr6) == (DB, DR6_BS)
    assert (guest.words[RIP], guest.words[RFLAGS]) == (0x1000, RFLAGS_FIXED)


def test_iret_ends_the_interrupt_shadow_and_the_blocking_of_nmis(guest: Guest) -> None:
    guest.words[INTERRUPT_SHADOW] = guest.words[NMI_BLOCKED] = 1
    flags_after(guest, 0, 0)
    assert (guest.words[INTERRUPT_SHADOW], guest.words[NMI_BLOCKED]) == (0, 0)


def test_faulting_iret_ends_the_blocking_of_nmis_too(guest: Guest) -> None:
    guest.words[NMI_BLOCKED] = 1
    push_frame(guest, TARGET, 0)
    with pytest.raises(GuestFault):
        guest.run(IRETQ)
    assert (guest.words[NMI_BLOCKED], guest.words[RSP]) == (0, KERNEL_STACK)


# --------------------------------------------------------------------------------------- 32-bit protected mode


@pytest.mark.parametrize(("code", "size"), [(IRETD, 4), (IRETW, 2)])
def test_protected_mode_return_to_the_same_level(kernel32: Guest, code: str, size: int) -> None:
    push_frame(kernel32, 0x1234, KERNEL_CS32, RFLAGS_FIXED | RFLAGS_CF, size=size)
    run(kernel32, code)
    words = kernel32.words
    assert (words[RIP], words[RSP], words[RFLAGS]) == (0x1234, STACK + 3 * size, RFLAGS_FIXED | RFLAGS_CF)


def test_protected_mode_return_to_user_mode(kernel32: Guest) -> None:
    push_frame(kernel32, 0x1234, USER_CS32, RFLAGS_FIXED, 0x7000, USER_SS, size=4)
    run(kernel32, IRETD)
    words = kernel32.words
    assert (words[RIP], words[RSP], words[CPL]) == (0x1234, 0x7000, 3)
    assert segment(kernel32, SS).selector == USER_SS
    assert segment(kernel32, DS) == Segment(0, 0, 0, AR_UNUSABLE)


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        ((0x1234, 0), (GP, 0)),
        ((0x1234, ABSENT_CS), (NP, ABSENT_CS)),
        ((0x1234, USER_CS32, 2, 0x7000, 0), (GP, 0)),
        ((0x1234, USER_CS32, 2, 0x7000, KERNEL_SS), (GP, KERNEL_SS)),
        ((0x10000, GATE), (GP, 0)),
    ],
    ids=["null", "absent", "null ss", "ss of the kernel", "limit"],
)
def test_forbidden_protected_mode_returns(
    kernel32: Guest, frame: tuple[int, ...], fault: tuple[int, int]
) -> None:
    kernel32.set_descriptor(GATE, make_segment(0, 0xFFFF, 0x9B))
    push_frame(kernel32, *frame, size=4)
    assert fault_of(kernel32, IRETD) == fault


def test_return_to_a_task_is_not_implemented(kernel32: Guest) -> None:
    kernel32.words[RFLAGS] |= RFLAGS_NT
    with pytest.raises(Unhandleable):
        run(kernel32, IRETD)


def test_return_to_virtual_8086_mode_pops_every_segment(kernel32: Guest) -> None:
    image = EVERYTHING & ~RFLAGS_TF
    push_frame(kernel32, 0x1234, 0x800, image, 0x9876, 0x900, 0xA00, 0xB00, 0xC00, 0xD00, size=4)
    run(kernel32, IRETD)
    words = kernel32.words
    assert (words[RIP], words[RSP], words[CPL]) == (0x1234, 0x9876, 3)
    assert words[RFLAGS] == RFLAGS_FIXED | (PROGRAM_FLAGS | SUPERVISOR_FLAGS | RFLAGS_VM) & ~RFLAGS_TF
    for number, selector in ((CS, 0x800), (SS, 0x900), (ES, 0xA00), (DS, 0xB00), (FS, 0xC00), (GS, 0xD00)):
        assert segment(kernel32, number) == Segment(selector, selector << 4, 0xFFFF, AR_REAL_MODE | DPL3)


def test_return_to_virtual_8086_mode_is_limited_to_64_kib(kernel32: Guest) -> None:
    push_frame(kernel32, 0x10000, 0x800, RFLAGS_VM, 0, 0, 0, 0, 0, 0, size=4)
    assert fault_of(kernel32, IRETD) == (GP, 0)


def test_only_cpl_0_returns_to_virtual_8086_mode(guest: Guest) -> None:
    enter_flat_mode(guest, cpl=3)
    push_frame(guest, 0x1234, USER_CS32, RFLAGS_FIXED | RFLAGS_VM, size=4)
    run(guest, IRETD)
    assert (guest.words[RIP], guest.words[RFLAGS]) == (0x1234, RFLAGS_FIXED)


# --------------------------------------------------------------------------------- real and virtual-8086 mode


def test_real_mode_return(guest: Guest) -> None:
    enter_real_mode(guest)
    push_frame(guest, 0x1234, 0x5000, 0xFFFF, size=2)
    top = guest.words[RSP]
    run(guest, "cf")
    words = guest.words
    assert (words[RIP], segment(guest, CS).base, words[RSP]) == (0x1234, 0x50000, top + 6)
    assert words[RFLAGS] == RFLAGS_FIXED | (PROGRAM_FLAGS | RFLAGS_IF | RFLAGS_IOPL) & 0xFFFF


def test_real_mode_return_with_a_32_bit_image(guest: Guest) -> None:
    enter_real_mode(guest)
    push_frame(guest, 0x1234, 0xABCD5000, 0xFFFFFFFF & ~RFLAGS_TF, size=4)
    guest.words[RFLAGS] |= RFLAGS_VIP
    run(guest, "66cf")
    kept = RFLAGS_VIP
    changed = (PROGRAM_FLAGS | RFLAGS_IF | RFLAGS_IOPL) & ~RFLAGS_TF
    assert guest.words[RFLAGS] == RFLAGS_FIXED | kept | changed
    assert segment(guest, CS).selector == 0x5000


def test_real_mode_target_must_lie_within_the_limit(guest: Guest) -> None:
    enter_real_mode(guest)
    push_frame(guest, 0x10000, 0x5000, 2, size=4)
    assert fault_of(guest, "66cf") == (GP, 0)


def test_virtual_8086_return_keeps_iopl_and_vm(guest: Guest) -> None:
    enter_virtual_8086_mode(guest, iopl=3)
    push_frame(guest, 0x1234, 0x5000, RFLAGS_IF | RFLAGS_CF, size=2)
    run(guest, "cf")
    assert (guest.words[RIP], guest.words[CPL]) == (0x1234, 3)
    assert guest.words[RFLAGS] == RFLAGS_FIXED | RFLAGS_VM | RFLAGS_IOPL | RFLAGS_IF | RFLAGS_CF


@pytest.mark.parametrize("code", ["cf", "66cf", "cd21"])
@pytest.mark.parametrize("iopl", [0, 1, 2])
def test_virtual_8086_monitor_gets_iret_and_int(guest: Guest, code: str, iopl: int) -> None:
    enter_virtual_8086_mode(guest, iopl)
    assert fault_of(guest, code) == (GP, 0)
