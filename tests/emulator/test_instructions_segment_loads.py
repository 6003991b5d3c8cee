"""MOV, PUSH and POP of segment registers, and far pointer loads."""

from __future__ import annotations

import pytest
from emulator_guest import (
    ABSENT_CS,
    CODE,
    GDT,
    KERNEL_CS,
    KERNEL_SS,
    KERNEL_STACK,
    UPPER,
    USER_SS,
    USER_STACK,
    Guest,
)
from flat_protected_mode import DATA16, STACK, enter_flat_mode
from legacy_modes import DATA_BASE, enter_real_mode, enter_virtual_8086_mode, run

from lasskvm.emulator.faults import GuestFault
from lasskvm.state import (
    GDT_BASE,
    INTERRUPT_SHADOW,
    RAX,
    RBX,
    RDX,
    RFLAGS,
    RIP,
    RSP,
    Segment,
)
from lasskvm.x86.descriptors import make_segment
from lasskvm.x86.exceptions import DB, GP, NP, PF, PF_P, PF_U, PF_W, UD
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    AR_DATA,
    AR_DB,
    AR_G,
    AR_P,
    AR_UNUSABLE,
    CS,
    DS,
    ES,
    FS,
    GS,
    RFLAGS_AC,
    RFLAGS_RF,
    RFLAGS_TF,
    SS,
)

MOV_DS_AX, MOV_SS_AX, MOV_ES_AT_RAX = "8ed8", "8ed0", "8e00"
POINTER, USER_POINTER = UPPER + 0x70000, 0x70000
FLAT = 0xFFFFFFFF
SPARE = 0x78


def segment(guest: Guest, number: int) -> Segment:
    return guest.state.segment(number)


def fault_of(guest: Guest, code: str) -> tuple[int, int | None]:
    """What *code* faults with outside 64-bit mode; the state must be as before."""
    before = guest.snapshot()
    with pytest.raises(GuestFault) as caught:
        run(guest, code)
    assert guest.snapshot() == before, "a faulting instruction changed the state"
    return caught.value.vector, caught.value.error_code


# --------------------------------------------------------------------------------------- MOV to segment registers


@pytest.mark.parametrize("code", ["8ed8", "668ed8", "488ed8"])
def test_low_16_bits_of_the_register_count(guest: Guest, code: str) -> None:
    guest.words[RAX] = 0xFFFF_FFFF_FFFF_0000 | KERNEL_SS
    guest.run(code)
    assert segment(guest, DS) == Segment(KERNEL_SS, 0, FLAT, AR_DATA)


def test_no_more_than_two_bytes_of_memory_are_read(guest: Guest) -> None:
    where = POINTER + 0xFFE
    guest.unmap(POINTER + 0x1000)
    guest.store(where, 2, KERNEL_SS)
    guest.words[RAX] = where
    guest.run(MOV_ES_AT_RAX)
    assert segment(guest, ES).selector == KERNEL_SS


@pytest.mark.parametrize("code", ["8ec8", "488ec8", "8e08"])
def test_cs_cannot_be_loaded(guest: Guest, code: str) -> None:
    assert guest.fault_of(code) == (UD, None)


@pytest.mark.parametrize(
    ("code", "selector", "fault"),
    [
        ("8ed8", 0x80, (GP, 0x80)),
        ("8ed8", ABSENT_CS, (NP, ABSENT_CS)),
        ("8ed0", ABSENT_CS, (GP, ABSENT_CS)),
        ("8ed0", USER_SS, (GP, USER_SS & ~3)),
        ("8ed0", 3, (GP, 0)),
        ("8ed0", SPARE, (STACK_FAULT, SPARE)),
    ],
    ids=["beyond", "absent", "ss is code", "ss of user", "null ss", "absent ss"],
)
def test_forbidden_loads(guest: Guest, code: str, selector: int, fault: tuple[int, int]) -> None:
    guest.set_descriptor(SPARE, make_segment(0, FLAT, AR_DATA & ~AR_P))
    guest.words[RAX] = selector
    assert guest.fault_of(code) == fault


def test_user_load_reads_a_supervisor_table_but_user_memory(user: Guest) -> None:
    user.store(USER_POINTER, 2, USER_SS)
    user.words[RAX] = USER_POINTER
    user.run(MOV_ES_AT_RAX)
    assert segment(user, ES).selector == USER_SS
    user.words[RAX] = POINTER
    assert user.fault_of(MOV_ES_AT_RAX) == (GP, 0)
    user.words[RSP] = POINTER
    assert user.fault_of("8e0424") == (STACK_FAULT, 0)


def test_low_table_violates_lass_also_with_ac(guest: Guest) -> None:
    guest.words[GDT_BASE] = GDT - UPPER
    guest.words[RFLAGS] |= RFLAGS_AC
    guest.words[RAX] = KERNEL_SS
    assert guest.fault_of(MOV_DS_AX) == (GP, 0)


# --------------------------------------------------------------------------------------------- shadow of MOV SS


@pytest.mark.parametrize("code", [MOV_SS_AX, "8e10"])
def test_mov_ss_casts_a_shadow_and_is_not_single_stepped(guest: Guest, code: str) -> None:
    guest.store(POINTER, 2, KERNEL_SS)
    guest.words[RAX] = KERNEL_SS if code == MOV_SS_AX else POINTER
    guest.words[RFLAGS] |= RFLAGS_TF | RFLAGS_RF
    guest.run(code)
    assert (guest.words[INTERRUPT_SHADOW], guest.words[RIP]) == (1, CODE + 2)
    assert not guest.words[RFLAGS] & RFLAGS_RF


def test_second_mov_ss_in_a_row_has_no_shadow(guest: Guest) -> None:
    guest.words[RAX] = KERNEL_SS
    guest.run(MOV_SS_AX)
    guest.run(MOV_SS_AX)
    assert guest.words[INTERRUPT_SHADOW] == 0


def test_other_loads_end_the_shadow_and_are_single_stepped(guest: Guest) -> None:
    guest.words[INTERRUPT_SHADOW] = 1
    guest.words[RFLAGS] |= RFLAGS_TF
    with pytest.raises(GuestFault) as caught:
        guest.run(MOV_DS_AX)
    assert (caught.value.vector, guest.words[INTERRUPT_SHADOW], guest.words[RIP]) == (DB, 0, CODE + 2)


# ------------------------------------------------------------------------------------ MOV from segment registers


@pytest.mark.parametrize(
    ("code", "result"),
    [("8cc8", KERNEL_CS), ("488cc8", KERNEL_CS), ("668cc8", 0xFFFF_FFFF_FFFF_0000 | KERNEL_CS)],
)
def test_selector_is_zero_extended_to_a_wide_register(guest: Guest, code: str, result: int) -> None:
    guest.words[RAX] = 0xFFFF_FFFF_FFFF_FFFF
    guest.run(code)
    assert guest.words[RAX] == result


@pytest.mark.parametrize("code", ["8c08", "668c08", "488c08"])
def test_memory_gets_16_bits(guest: Guest, code: str) -> None:
    guest.words[RAX] = POINTER
    guest.store(POINTER, 8, 0xFFFF_FFFF_FFFF_FFFF)
    guest.run(code)
    assert guest.load(POINTER) == 0xFFFF_FFFF_FFFF_0000 | KERNEL_CS


def test_store_of_a_selector_is_a_user_access(user: Guest) -> None:
    user.words[RAX] = POINTER
    assert user.fault_of("8c08") == (GP, 0)


# ------------------------------------------------------------------------------------------------- PUSH and POP


@pytest.mark.parametrize(("code", "size"), [("0fa0", 8), ("660fa0", 2)])
def test_push_writes_the_whole_slot(guest: Guest, code: str, size: int) -> None:
    guest.words[RAX] = KERNEL_SS
    guest.run("8ee0")
    guest.store(KERNEL_STACK - 8, 8, 0xFFFF_FFFF_FFFF_FFFF)
    guest.run(code)
    assert guest.words[RSP] == KERNEL_STACK - size
    assert guest.load(guest.words[RSP], size) == KERNEL_SS


@pytest.mark.parametrize(("code", "size"), [("0fa1", 8), ("660fa1", 2)])
def test_pop_moves_by_the_operand_size(guest: Guest, code: str, size: int) -> None:
    guest.store(KERNEL_STACK, 8, 0xABCD_ABCD_ABCD_0000 | KERNEL_SS)
    guest.run(code)
    assert (guest.words[RSP], segment(guest, FS).selector) == (KERNEL_STACK + size, KERNEL_SS)


def test_pop_of_a_forbidden_selector_leaves_the_stack_pointer(guest: Guest) -> None:
    guest.store(KERNEL_STACK, 8, 0x80)
    assert guest.fault_of("0fa9") == (GP, 0x80)


def test_stack_of_push_and_pop_is_judged_by_lass(user: Guest) -> None:
    user.words[RSP] = KERNEL_STACK
    assert user.fault_of("0fa0") == (STACK_FAULT, 0)
    assert user.fault_of("0fa1") == (STACK_FAULT, 0)


def test_page_fault_of_a_push_is_a_write(user: Guest) -> None:
    user.write_protect(USER_STACK - 8)
    assert user.fault_of("0fa8") == (PF, PF_P | PF_W | PF_U)


@pytest.mark.parametrize("code", ["06", "0e", "16", "1e", "07", "17", "1f"])
def test_old_segment_registers_have_no_push_and_pop_in_64_bit_mode(guest: Guest, code: str) -> None:
    assert guest.fault_of(code) == (UD, None)


@pytest.mark.parametrize(("code", "number"), [("06", ES), ("0e", CS), ("16", SS), ("1e", DS), ("0fa8", GS)])
def test_push_in_32_bit_code(guest: Guest, code: str, number: int) -> None:
    enter_flat_mode(guest)
    run(guest, code)
    assert guest.words[RSP] == STACK - 4
    assert guest.load(STACK - 4, 4) == segment(guest, number).selector


def test_pop_ss_moves_the_stack_by_the_width_it_had(guest: Guest) -> None:
    enter_flat_mode(guest)
    guest.words[RSP] = 0x2FFFC
    guest.store(0x2FFFC, 4, DATA16)
    run(guest, "17")
    assert (guest.words[RSP], segment(guest, SS).selector) == (0x30000, DATA16)
    assert guest.words[INTERRUPT_SHADOW] == 1


def test_16_bit_stack_wraps(guest: Guest) -> None:
    enter_flat_mode(guest)
    from_16_bit = AR_DATA & ~AR_DB & ~AR_G
    guest.state.set_segment(SS, Segment(DATA16, 0x10000, 0xFFFF, from_16_bit))
    guest.words[RSP] = 0xABCD0002
    run(guest, "661e")
    assert guest.words[RSP] == 0xABCD0000
    run(guest, "1e")
    assert guest.words[RSP] == 0xABCDFFFC


# -------------------------------------------------------------------------------------------- far pointer loads


@pytest.mark.parametrize(
    ("code", "number", "size"),
    [("0fb210", SS, 4), ("480fb210", SS, 8), ("660fb410", FS, 2), ("480fb510", GS, 8)],
)
def test_pointer_loads_segment_and_register(guest: Guest, code: str, number: int, size: int) -> None:
    guest.words[RAX], guest.words[RDX] = POINTER, 0xFFFF_FFFF_FFFF_FFFF
    guest.store(POINTER, size, 0x1234)
    guest.store(POINTER + size, 2, KERNEL_SS)
    guest.run(code)
    assert guest.words[RDX] == (0xFFFF_FFFF_FFFF_0000 | 0x1234 if size == 2 else 0x1234)
    assert segment(guest, number).selector == KERNEL_SS
    assert guest.words[INTERRUPT_SHADOW] == 0


def test_forbidden_selector_leaves_the_register(guest: Guest) -> None:
    guest.words[RAX], guest.words[RDX] = POINTER, 0x5555
    guest.store(POINTER, 8, 0x1234)
    guest.store(POINTER + 8, 2, 0)
    guest.run("480fb410")
    assert segment(guest, FS) == Segment(0, 0, 0, AR_UNUSABLE)
    guest.store(POINTER + 8, 2, 3)
    assert guest.fault_of("480fb210") == (GP, 0)
    guest.store(POINTER + 8, 2, 0x80)
    assert guest.fault_of("480fb510") == (GP, 0x80)


def test_pointer_itself_is_an_ordinary_access(user: Guest) -> None:
    user.words[RAX], user.words[RSP] = POINTER, POINTER
    assert user.fault_of("480fb410") == (GP, 0)
    assert user.fault_of("480fb41424") == (STACK_FAULT, 0)


@pytest.mark.parametrize("code", ["0fb2c0", "0fb4c0", "0fb5c0"])
def test_pointer_in_a_register_is_an_invalid_opcode(guest: Guest, code: str) -> None:
    assert guest.fault_of(code) == (UD, None)


@pytest.mark.parametrize(("code", "number"), [("c513", DS), ("c413", ES)])
def test_lds_and_les_in_32_bit_code(guest: Guest, code: str, number: int) -> None:
    enter_flat_mode(guest)
    guest.words[RBX] = 0x70000
    guest.store(0x70000, 4, 0x87654321)
    guest.store(0x70004, 2, DATA16)
    run(guest, code)
    assert (guest.words[RDX], segment(guest, number).selector) == (0x87654321, DATA16)


# ------------------------------------------------------------------------------------ real and virtual-8086 mode


def enter_virtual_8086(guest: Guest) -> None:
    enter_virtual_8086_mode(guest, iopl=0)


@pytest.mark.parametrize("enter", [enter_real_mode, enter_virtual_8086])
def test_selector_becomes_a_base(guest: Guest, enter) -> None:  # type: ignore[no-untyped-def]
    enter(guest)
    attributes = segment(guest, DS).attributes
    guest.words[RAX] = 0x1234
    run(guest, "8ed8")
    assert segment(guest, DS) == Segment(0x1234, 0x12340, 0xFFFF, attributes)
    run(guest, "8ed0")
    assert (segment(guest, SS).base, guest.words[INTERRUPT_SHADOW]) == (0x12340, 1)


def test_pointer_across_the_end_of_a_segment_is_a_general_protection(guest: Guest) -> None:
    enter_real_mode(guest)
    guest.words[RBX] = 0xFFFE
    assert fault_of(guest, "c417") == (GP, 0)
    guest.words[RBX] = 0xFFFC
    guest.store(DATA_BASE + 0xFFFC, 4, 0x4321_8765)
    run(guest, "c417")
    assert (guest.words[RDX] & 0xFFFF, segment(guest, ES).selector) == (0x8765, 0x4321)
