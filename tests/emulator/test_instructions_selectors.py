"""LAR, LSL, VERR, VERW and ARPL: what they say about each kind of descriptor, and what faults."""

from __future__ import annotations

import pytest
from emulator_guest import (
    CONFORMING_CS,
    DPL1,
    GDT,
    KERNEL_CS,
    KERNEL_SS,
    LDT_SELECTOR,
    TSS_SELECTOR,
    UPPER,
    USER_CS64,
    USER_SS,
    Guest,
)
from flat_protected_mode import DATA, enter_flat_mode
from legacy_modes import enter_real_mode, enter_virtual_8086_mode, run

from lasskvm.emulator.faults import GuestFault
from lasskvm.state import GDT_BASE, RAX, RBX, RCX, RFLAGS, RSP, Segment
from lasskvm.x86.descriptors import (
    SYS_CALL_GATE,
    SYS_CALL_GATE16,
    SYS_INTERRUPT_GATE,
    SYS_LDT,
    SYS_TASK_GATE,
    SYS_TSS16_AVAILABLE,
    SYS_TSS16_BUSY,
    SYS_TSS_AVAILABLE,
    SYS_TSS_BUSY,
    TSS64_BYTES,
    make_segment,
)
from lasskvm.x86.exceptions import GP, PF, UD
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    AR_CODE,
    AR_DATA,
    AR_DB,
    AR_EXPAND_DOWN,
    AR_G,
    AR_P,
    AR_S,
    AR_UNUSABLE,
    DS,
    LDTR,
    RFLAGS_AC,
    RFLAGS_CF,
    RFLAGS_ZF,
)

LAR16, LAR32, LAR64 = "660f02c1", "0f02c1", "480f02c1"
LSL16, LSL32, LSL64 = "660f03c1", "0f03c1", "480f03c1"
VERR_CX, VERW_CX = "0f00e1", "0f00e9"
ARPL_AX_CX, ARPL_AT_BX = "63c8", "630b"
UNTOUCHED = 0xAAAA_BBBB_CCCC_DDDD
SPARE = 0x78
FLAT = 0xFFFFFFFF


def ask(guest: Guest, code: str, selector: int) -> int | None:
    """What *code* makes of *selector* in CX: RAX with ZF set, None with ZF clear, when RAX must be untouched."""
    guest.words[RAX], guest.words[RCX] = UNTOUCHED, 0xFFFF0000 | selector
    guest.run(code)
    if guest.words[RFLAGS] & RFLAGS_ZF:
        return guest.words[RAX]
    assert guest.words[RAX] == UNTOUCHED
    return None


def allows(guest: Guest, code: str, selector: int) -> bool:
    return ask(guest, code, selector) is not None


# ------------------------------------------------------------------------------------------------------- LAR, LSL


@pytest.mark.parametrize(
    ("code", "rights"),
    [(LAR16, UNTOUCHED & ~0xFFFF | 0x9300), (LAR32, 0xC09300), (LAR64, 0xC09300)],
)
def test_access_rights_come_in_the_operand_size(guest: Guest, code: str, rights: int) -> None:
    assert ask(guest, code, KERNEL_SS) == rights


def test_lar_masks_base_and_limit_out(guest: Guest) -> None:
    guest.set_descriptor(SPARE, make_segment(0xFFFFFFFF, 0xFFFFFFFF, AR_P | AR_S | AR_DB))
    assert ask(guest, LAR32, SPARE) == 0x409000


@pytest.mark.parametrize(
    ("code", "limit"), [(LSL16, UNTOUCHED & ~0xFFFF | 0x5FFF), (LSL32, 0x12345FFF), (LSL64, 0x12345FFF)]
)
def test_limit_is_scaled_by_granularity(guest: Guest, code: str, limit: int) -> None:
    guest.set_descriptor(SPARE, make_segment(0, 0x12345FFF, AR_DATA | AR_G))
    assert ask(guest, code, SPARE) == limit


def test_limit_without_granularity_is_in_bytes(guest: Guest) -> None:
    guest.set_descriptor(SPARE, make_segment(0, 0xABCDE, AR_DATA & ~AR_G))
    assert ask(guest, LSL32, SPARE) == 0xABCDE


def test_other_flags_stay(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_CF
    ask(guest, LAR32, 0)
    assert guest.words[RFLAGS] & (RFLAGS_CF | RFLAGS_ZF) == RFLAGS_CF


@pytest.mark.parametrize("code", [LAR32, LSL32, VERR_CX, VERW_CX])
@pytest.mark.parametrize("selector", [0, 3, 0x80, 0x1004])
def test_null_selectors_and_those_outside_a_table_clear_zf(guest: Guest, code: str, selector: int) -> None:
    assert ask(guest, code, selector) is None


def test_no_ldt_clears_zf(guest: Guest) -> None:
    assert ask(guest, LAR32, 0x0C) is not None
    guest.state.set_segment(LDTR, Segment(0, 0, 0, AR_UNUSABLE))
    assert ask(guest, LAR32, 0x0C) is None


TYPES = {
    0: (False, False), SYS_TSS16_AVAILABLE: (True, True), SYS_LDT: (True, True), SYS_TSS16_BUSY: (True, True),
    SYS_CALL_GATE16: (True, False), SYS_TASK_GATE: (True, False), 6: (False, False), 7: (False, False),
    8: (False, False), SYS_TSS_AVAILABLE: (True, True), 10: (False, False), SYS_TSS_BUSY: (True, True),
    SYS_CALL_GATE: (True, False), 13: (False, False), SYS_INTERRUPT_GATE: (False, False), 15: (False, False),
}  # fmt: skip
ONLY_LEGACY = (SYS_TSS16_AVAILABLE, SYS_TSS16_BUSY, SYS_CALL_GATE16, SYS_TASK_GATE)


@pytest.mark.parametrize("system_type", TYPES)
def test_system_types_in_ia32e_mode(guest: Guest, system_type: int) -> None:
    guest.set_descriptor(SPARE, make_segment(0, 0x67, AR_P | system_type))
    has_rights, has_limit = TYPES[system_type]
    exists = system_type not in ONLY_LEGACY
    assert allows(guest, LAR32, SPARE) == (has_rights and exists)
    assert allows(guest, LSL32, SPARE) == (has_limit and exists)
    assert not allows(guest, VERR_CX, SPARE)
    assert not allows(guest, VERW_CX, SPARE)


@pytest.mark.parametrize("system_type", TYPES)
def test_system_types_in_protected_mode(guest: Guest, system_type: int) -> None:
    enter_flat_mode(guest)
    guest.set_descriptor(SPARE, make_segment(0, 0x67, AR_P | system_type))
    has_rights, has_limit = TYPES[system_type]
    assert allows(guest, LAR32, SPARE) == has_rights
    assert allows(guest, LSL32, SPARE) == has_limit


def test_limits_of_tss_and_ldt(guest: Guest) -> None:
    assert ask(guest, LSL32, TSS_SELECTOR) == TSS64_BYTES - 1
    assert ask(guest, LSL32, LDT_SELECTOR) == 0xFFF


@pytest.mark.parametrize("code", [LAR32, LSL32, VERR_CX])
def test_privilege_decides_but_for_conforming_code(user: Guest, code: str) -> None:
    assert ask(user, code, KERNEL_CS) is None
    assert ask(user, code, USER_CS64) is not None
    assert ask(user, code, CONFORMING_CS | 3) is not None
    assert ask(user, code, TSS_SELECTOR) is None


@pytest.mark.parametrize("code", [LAR32, LSL32, VERR_CX, VERW_CX])
def test_rpl_weakens_the_caller(guest: Guest, code: str) -> None:
    assert ask(guest, code, KERNEL_SS) is not None
    assert ask(guest, code, KERNEL_SS | 1) is None


@pytest.mark.parametrize("code", [LAR32, LSL32, VERR_CX, VERW_CX])
def test_presence_does_not_matter(guest: Guest, code: str) -> None:
    guest.set_descriptor(SPARE, make_segment(0, FLAT, AR_DATA & ~AR_P))
    assert ask(guest, code, SPARE) is not None


# ----------------------------------------------------------------------------------------------------- VERR, VERW


@pytest.mark.parametrize(
    ("attributes", "readable", "writable"),
    [
        (AR_S, True, False),
        (AR_S | 2, True, True),
        (AR_S | AR_EXPAND_DOWN | 2, True, True),
        (AR_S | AR_CODE, False, False),
        (AR_S | AR_CODE | 2, True, False),
        (AR_S | AR_CODE | 4, False, False),
        (AR_S | AR_CODE | 6, True, False),
        (AR_S | DPL1 | 2, True, True),
    ],
)
def test_what_can_be_read_and_written(guest: Guest, attributes: int, readable: bool, writable: bool) -> None:
    guest.set_descriptor(SPARE, make_segment(0, FLAT, AR_P | attributes))
    assert allows(guest, VERR_CX, SPARE) == readable
    assert allows(guest, VERW_CX, SPARE) == writable


# ---------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("code", [LAR32, LSL32, VERR_CX, VERW_CX])
def test_descriptor_read_is_implicit(user: Guest, code: str) -> None:
    assert ask(user, code, USER_SS) is not None
    user.words[GDT_BASE] = GDT - UPPER
    user.words[RFLAGS] |= RFLAGS_AC
    assert user.fault_of(code) == (GP, 0)


def test_descriptor_on_an_absent_page_is_a_supervisor_page_fault(user: Guest) -> None:
    user.words[RCX] = USER_SS
    user.unmap(GDT)
    assert user.fault_of(LAR32) == (PF, 0)


def test_operand_in_memory_is_an_ordinary_access_of_two_bytes(user: Guest) -> None:
    user.store(0x70FFE, 2, USER_SS)
    user.unmap(0x71000)
    user.words[RCX] = 0x70FFE
    user.run("0f0201")
    assert user.words[RFLAGS] & RFLAGS_ZF
    user.words[RCX] = UPPER
    assert user.fault_of("0f0201") == (GP, 0)
    user.words[RSP] = UPPER
    assert user.fault_of("0f020424") == (STACK_FAULT, 0)


@pytest.mark.parametrize("code", ["0f02c1", "0f03c1", "0f00e1", "0f00e9", "63c8"])
@pytest.mark.parametrize("mode", ["real", "virtual-8086"])
def test_they_need_protected_mode(guest: Guest, mode: str, code: str) -> None:
    if mode == "real":
        enter_real_mode(guest)
    else:
        enter_virtual_8086_mode(guest, iopl=3)
    with pytest.raises(GuestFault) as caught:
        run(guest, code)
    assert (caught.value.vector, caught.value.error_code) == (UD, None)


# ------------------------------------------------------------------------------------------------------------ ARPL


@pytest.fixture
def flat(guest: Guest) -> Guest:
    """32-bit protected mode at CPL 0."""
    enter_flat_mode(guest)
    return guest


@pytest.mark.parametrize("source", range(4))
@pytest.mark.parametrize("destination", range(4))
def test_arpl_raises_the_rpl(flat: Guest, destination: int, source: int) -> None:
    flat.words[RAX], flat.words[RCX] = 0x12340000 | USER_SS & ~3 | destination, 0xFFFC | source
    run(flat, ARPL_AX_CX)
    assert flat.words[RAX] == 0x12340000 | USER_SS & ~3 | max(destination, source)
    assert bool(flat.words[RFLAGS] & RFLAGS_ZF) == (destination < source)


def test_arpl_adjusts_memory(flat: Guest) -> None:
    flat.words[RBX], flat.words[RCX] = DATA, 3
    flat.store(DATA, 4, 0xFFFF0010)
    run(flat, ARPL_AT_BX)
    assert flat.load(DATA, 4) == 0xFFFF0013


def test_arpl_needs_a_writable_operand_even_when_it_leaves_it(flat: Guest) -> None:
    flat.words[RBX], flat.words[RCX] = DATA, 0
    flat.state.set_segment(DS, Segment(KERNEL_SS, 0, FLAT, AR_P | AR_S | AR_DB | AR_G))
    with pytest.raises(GuestFault) as caught:
        run(flat, ARPL_AT_BX)
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)
