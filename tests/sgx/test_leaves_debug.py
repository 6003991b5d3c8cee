"""EDBGRD and EDBGWR: a debugger looks into an enclave, if the enclave allows it."""

from __future__ import annotations

import pytest
from emulator_guest import KERNEL_CS32, USER_CODE
from sgx_guest import (
    EPC,
    GENERAL_PROTECTION,
    NONE,
    SOURCE,
    TCS_CONTENT,
    USER_EPC,
    ZERO,
    Left,
    SgxGuest,
    epc_fault,
)
from signing import DEBUG, MODE64BIT, PAGE, REG_R, TCS, Page

from lasskvm.state import CR4, RBX, RIP, Segment
from lasskvm.x86.registers import AR_CODE32, AR_DATA, CR4_LASS, CR4_SMAP, CR4_SMEP, CS, DS, MASK64
from lasskvm.x86.sgx import EnclsLeaf, SgxError

EDBGRD, EDBGWR = EnclsLeaf.EDBGRD, EnclsLeaf.EDBGWR
CONTENT = bytes(range(256)) * 16
SECS, REGULAR, THREAD, VA = (EPC + number * PAGE for number in range(4))
TCS_FLAGS, TCS_END = 8, 72


def guest_with_enclave(attributes: int) -> SgxGuest:
    guest = SgxGuest()
    guest.build([Page(0x1000, REG_R, CONTENT), Page(0x2000, TCS, TCS_CONTENT)], attributes)
    guest.version_array(3)
    return guest


@pytest.fixture
def debugged() -> SgxGuest:
    """An enclave that allows debugging: a regular page and a TCS; and a version array."""
    return guest_with_enclave(MODE64BIT | DEBUG)


def value_at(guest: SgxGuest, address: int) -> int:
    guest.done(EDBGRD, 0x5A, address)
    return guest.words[RBX]


def enter_32bit_code(guest: SgxGuest) -> None:
    """Compatibility mode with a flat DS; nothing keeps the kernel from the lower half."""
    guest.words[CR4] &= ~(CR4_LASS | CR4_SMAP | CR4_SMEP)
    guest.map(USER_CODE, USER_CODE, 0)
    guest.words[RIP] = USER_CODE
    guest.state.set_segment(CS, Segment(KERNEL_CS32, 0, 0xFFFFFFFF, AR_CODE32))
    guest.state.set_segment(DS, Segment(0x10, 0, 0xFFFFFFFF, AR_DATA))


def test_eight_bytes_are_read_in_64_bit_mode(debugged: SgxGuest) -> None:
    assert value_at(debugged, REGULAR + 8) == int.from_bytes(CONTENT[8:16], "little")


def test_eight_bytes_are_written_in_64_bit_mode_whatever_the_pages_permissions(debugged: SgxGuest) -> None:
    debugged.done(EDBGWR, 0x1122_3344_5566_7788, REGULAR + 16)
    assert value_at(debugged, REGULAR + 16) == 0x1122_3344_5566_7788
    page = debugged.epc.read(debugged.gpa(REGULAR))
    assert (page[:16], page[24:]) == (CONTENT[:16], CONTENT[24:])


def test_four_bytes_are_read_and_written_outside_64_bit_mode(debugged: SgxGuest) -> None:
    enter_32bit_code(debugged)
    address = USER_EPC + PAGE + 4
    assert value_at(debugged, address) == int.from_bytes(CONTENT[4:8], "little")
    debugged.done(EDBGWR, 0xFFFF_FFFF_0102_0304, address)
    assert debugged.epc.read(debugged.gpa(REGULAR), 12) == CONTENT[:4] + bytes((4, 3, 2, 1)) + CONTENT[8:12]


@pytest.mark.parametrize("leaf", (EDBGRD, EDBGWR))
def test_the_operand_is_naturally_aligned(debugged: SgxGuest, leaf: int) -> None:
    for offset in (1, 2, 4, 7):
        assert debugged.fault(leaf, 0, REGULAR + offset) == GENERAL_PROTECTION
    enter_32bit_code(debugged)
    for offset in (1, 2, 3):
        assert debugged.fault(leaf, 0, USER_EPC + PAGE + offset) == GENERAL_PROTECTION


@pytest.mark.parametrize("leaf", (EDBGRD, EDBGWR))
def test_an_enclave_that_does_not_allow_debugging_is_left_alone(leaf: int) -> None:
    guest = guest_with_enclave(MODE64BIT)
    for address in (REGULAR, THREAD + TCS_FLAGS):
        assert guest.fault(leaf, 0, address) == GENERAL_PROTECTION


def test_the_secs_and_free_pages_are_page_faults(debugged: SgxGuest) -> None:
    for address in (SECS, EPC + 9 * PAGE):
        assert debugged.fault(EDBGRD, 0, address) == epc_fault(address, is_write=False)
        assert debugged.fault(EDBGWR, 0, address) == epc_fault(address)


def test_memory_outside_the_epc_is_a_page_fault(debugged: SgxGuest) -> None:
    assert debugged.fault(EDBGRD, 0, SOURCE) == epc_fault(SOURCE, is_write=False)
    assert debugged.fault(EDBGWR, 0, SOURCE) == epc_fault(SOURCE)


def test_the_fields_of_a_tcs_can_be_read_and_nothing_behind_them(debugged: SgxGuest) -> None:
    assert value_at(debugged, THREAD + TCS_END - 8) == MASK64
    assert debugged.fault(EDBGRD, 0, THREAD + TCS_END) == GENERAL_PROTECTION


def test_of_a_tcs_only_the_flags_can_be_written(debugged: SgxGuest) -> None:
    debugged.done(EDBGWR, 1, THREAD + TCS_FLAGS)
    assert value_at(debugged, THREAD + TCS_FLAGS) == 1
    for offset in (0, TCS_FLAGS + 8, TCS_END, PAGE - 8):
        assert debugged.fault(EDBGWR, 1, THREAD + offset) == GENERAL_PROTECTION


def test_of_a_version_array_only_which_slots_are_in_use_is_told(debugged: SgxGuest) -> None:
    for version in (1, 7, 8, 1 << 63):
        debugged.epc.store_version(debugged.gpa(VA + 16), version)
        assert [value_at(debugged, VA + offset) for offset in (8, 16, 24)] == [0, MASK64, 0]


def test_of_a_version_array_four_bytes_are_told_outside_64_bit_mode(debugged: SgxGuest) -> None:
    debugged.epc.store_version(debugged.gpa(VA + PAGE - 8), 1)
    enter_32bit_code(debugged)
    address = USER_EPC + 4 * PAGE
    assert [value_at(debugged, address - offset) for offset in (4, 8, 12)] == [0xFFFFFFFF, 0xFFFFFFFF, 0]


def test_a_version_array_cannot_be_written(debugged: SgxGuest) -> None:
    assert debugged.fault(EDBGWR, 0, VA) == epc_fault(VA)


@pytest.mark.parametrize("leaf", (EDBGRD, EDBGWR))
@pytest.mark.parametrize("state", ("pending", "modified"))
def test_a_page_that_is_changing_is_not_debuggable(debugged: SgxGuest, leaf: int, state: str) -> None:
    entry = debugged.epc.entry(debugged.gpa(REGULAR))
    setattr(entry, state, True)
    assert debugged.encls(leaf, 0x77, REGULAR) == Left(SgxError.PAGE_NOT_DEBUGGABLE, ZERO)
    assert debugged.words[RBX] == 0x77
    assert debugged.epc.read(debugged.gpa(REGULAR)) == CONTENT


def test_rbx_is_not_touched_by_a_write(debugged: SgxGuest) -> None:
    assert debugged.encls(EDBGWR, 0x99, REGULAR) == Left(0, NONE)
    assert debugged.words[RBX] == 0x99
