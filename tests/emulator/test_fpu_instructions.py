"""FXSAVE, FNSAVE, FNSTENV and their like, control and status words, and when x87 and SSE instructions cannot run."""

from __future__ import annotations

import pytest
from emulator_guest import Guest

from lasskvm.emulator.fpu import FpuState, copy_fpu
from lasskvm.emulator.fpu_images import FXSAVE_BYTES, FXSAVE_MXCSR, FXSAVE_XMM, fxsave_image
from lasskvm.state import CPL, CR0, CR4, EFER, RAX, RBP, RBX, RIP, Segment
from lasskvm.x86.exceptions import GP, MF, NM, PF, SS, UD
from lasskvm.x86.fpu import (
    EXCEPTION_IE,
    EXCEPTION_ZE,
    EXCEPTIONS,
    FCW_INITIAL,
    FSW_B,
    FSW_ES,
    FSW_SF,
)
from lasskvm.x86.registers import (
    AR_CODE,
    AR_CODE32,
    AR_DATA,
    AR_REAL_MODE,
    CR0_EM,
    CR0_MP,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR4_OSFXSR,
    CS,
    DS,
)

AREA = 0x70000
NON_CANONICAL = 1 << 47

FXSAVE, FXSAVE64, FXRSTOR, FXRSTOR64 = "0f ae 03", "48 0f ae 03", "0f ae 0b", "48 0f ae 0b"
LDMXCSR, STMXCSR = "0f ae 13", "0f ae 1b"
FNSTENV, FLDENV, FNSAVE, FRSTOR = "d9 33", "d9 23", "dd 33", "dd 23"
FLDCW, FNSTCW, FNSTSW, FNSTSW_AX = "d9 2b", "d9 3b", "dd 3b", "df e0"
FNINIT, FNCLEX, FWAIT, FNOP, EMMS = "db e3", "db e2", "9b", "d9 d0", "0f 77"
FLD1, PADDB_MM, PADDB_XMM = "d9 e8", "0f fc c1", "66 0f fc c1"


@pytest.fixture
def guest(user: Guest) -> Guest:
    """User code with SSE enabled and RBX at a free page; the registers hold something."""
    words = user.words
    words[CR4] |= CR4_OSFXSR
    words[CR0] |= CR0_MP | CR0_NE
    words[RBX] = AREA
    fpu = user.ctx.fpu
    for number in range(16):
        fpu.xmm[number] = (number + 1) * 0x0102_0304_0506_0708_090A_0B0C_0D0E_0F00
    for number in range(8):
        fpu.registers[number] = (0x3FFF + number) << 64 | 1 << 63 | number
    fpu.top, fpu.ftw, fpu.fsw, fpu.mxcsr = 6, 0b1100_0011, 0x4100, 0x1FA0
    fpu.fip, fpu.fdp, fpu.fop = 0x40_1234, 0x70_5678, 0x123
    fpu.fcs, fpu.fds = 0x2B, 0x23
    return user


def state_of(guest: Guest) -> dict[str, object]:
    """A copy of all registers."""
    state = FpuState()
    copy_fpu(guest.ctx.fpu, state)
    return {name: getattr(state, name) for name in FpuState.__slots__}


def area(guest: Guest, size: int) -> bytes:
    return guest.memory.read(AREA, size)


# --------------------------------------------------------------------------------------------------- FXSAVE, FXRSTOR


@pytest.mark.parametrize("code, wide", [(FXSAVE, False), (FXSAVE64, True)])
def test_fxsave_stores_all_but_the_end_of_the_area(guest: Guest, code: str, wide: bool) -> None:
    guest.memory.write(AREA, b"\xa5" * FXSAVE_BYTES)
    guest.run(code)
    image = fxsave_image(guest.ctx.fpu, wide_pointers=wide)
    assert area(guest, FXSAVE_BYTES) == image.ljust(FXSAVE_BYTES, b"\xa5")


@pytest.mark.parametrize("save, restore", [(FXSAVE, FXRSTOR), (FXSAVE64, FXRSTOR64)])
def test_fxrstor_undoes_what_happened_since_fxsave(guest: Guest, save: str, restore: str) -> None:
    if save == FXSAVE64:
        guest.ctx.fpu.fcs = guest.ctx.fpu.fds = 0
    before = state_of(guest)
    guest.run(save)
    guest.run(FNINIT)
    guest.ctx.fpu.xmm[15] = guest.ctx.fpu.registers[2] = 0
    guest.ctx.fpu.mxcsr = 0
    guest.run(restore)
    assert state_of(guest) == before


def test_without_osfxsr_fxsave_and_fxrstor_leave_sse_alone(guest: Guest) -> None:
    guest.words[CR4] &= ~CR4_OSFXSR
    guest.memory.write(AREA, b"\xff" * FXSAVE_BYTES)
    guest.run(FXSAVE)
    saved = area(guest, FXSAVE_BYTES)
    assert saved[FXSAVE_MXCSR : FXSAVE_MXCSR + 8] == b"\xff" * 8
    assert saved[FXSAVE_XMM:] == b"\xff" * (FXSAVE_BYTES - FXSAVE_XMM)
    assert saved[:2] == FCW_INITIAL.to_bytes(2, "little")
    before = state_of(guest)
    guest.run(FXRSTOR)
    assert state_of(guest) == before


@pytest.mark.parametrize("code", [FXSAVE, FXSAVE64, FXRSTOR, FXRSTOR64])
def test_fxsave_area_must_be_aligned(guest: Guest, code: str) -> None:
    guest.words[RBX] = AREA + 8
    assert guest.fault_of(code) == (GP, 0)


def test_non_canonical_stack_address_comes_before_alignment(guest: Guest) -> None:
    guest.words[RBP] = NON_CANONICAL + 8
    # fxsave [rbp]
    assert guest.fault_of("0f ae 45 00") == (SS, 0)


def test_alignment_comes_before_a_page_fault(guest: Guest) -> None:
    guest.unmap(AREA)
    assert guest.fault_of(FXSAVE) == (PF, 0x6)
    guest.words[RBX] = AREA + 8
    assert guest.fault_of(FXSAVE) == (GP, 0)


def test_user_code_cannot_save_to_the_upper_half(guest: Guest) -> None:
    guest.words[RBX] = 0xFFFF_8000_0000_0000 + AREA
    assert guest.fault_of(FXSAVE) == (GP, 0)


def test_fxsave_to_a_missing_second_page_stores_nothing(guest: Guest) -> None:
    guest.memory.write(AREA, b"\xa5" * 0x1000)
    guest.unmap(AREA + 0x1000)
    # Not even what is written reaches into the second page here, but the area does.
    guest.words[RBX] = AREA + 0x1000 - FXSAVE_BYTES + 16
    assert guest.fault_of(FXSAVE) == (PF, 0x6)
    assert area(guest, 0x1000) == b"\xa5" * 0x1000


@pytest.mark.parametrize("value", [1 << 16, 1 << 31, 0xFFFF_FFFF])
def test_reserved_mxcsr_bits_fault_and_load_nothing(guest: Guest, value: int) -> None:
    guest.run(FXSAVE)
    guest.store(AREA + FXSAVE_MXCSR, 4, value)
    guest.run(FNINIT)
    before = state_of(guest)
    assert guest.fault_of(FXRSTOR) == (GP, 0)
    guest.store(AREA, 4, value)
    assert guest.fault_of(LDMXCSR) == (GP, 0)
    assert state_of(guest) == before


def test_mxcsr_is_loaded_and_stored(guest: Guest) -> None:
    guest.store(AREA, 4, 0xFFC1)
    guest.run(LDMXCSR)
    assert guest.ctx.fpu.mxcsr == 0xFFC1
    guest.store(AREA, 8, (1 << 64) - 1)
    guest.run(STMXCSR)
    assert guest.load(AREA) == 0xFFFF_FFFF_0000_FFC1


def test_legacy_modes_save_eight_registers(guest: Guest) -> None:
    guest.state.set_segment(CS, Segment(0x1B, 0, 0xFFFFFFFF, AR_CODE32 | 3 << 5))
    guest.state.set_segment(DS, Segment(0x23, 0, 0xFFFFFFFF, AR_DATA | 3 << 5))
    guest.memory.write(AREA, b"\xa5" * FXSAVE_BYTES)
    guest.run(FXSAVE)
    assert area(guest, FXSAVE_BYTES)[FXSAVE_XMM + 8 * 16 :] == b"\xa5" * (FXSAVE_BYTES - FXSAVE_XMM - 8 * 16)
    before = list(guest.ctx.fpu.xmm)
    for number in range(16):
        guest.ctx.fpu.xmm[number] = 0
    guest.run(FXRSTOR)
    assert list(guest.ctx.fpu.xmm) == before[:8] + [0] * 8


# ------------------------------------------------------------------------------------------------- x87 environment


def test_fnstenv_masks_exceptions_behind_the_store(guest: Guest) -> None:
    guest.ctx.fpu.fcw = FCW_INITIAL & ~EXCEPTIONS
    guest.run(FNSTENV)
    assert guest.load(AREA, 2) == FCW_INITIAL & ~EXCEPTIONS
    assert guest.ctx.fpu.fcw == FCW_INITIAL
    assert guest.load(AREA + 4, 2) == 0x4100 | 6 << 11
    assert guest.load(AREA + 12, 4) == 0x40_1234


def test_environment_goes_round_trip(guest: Guest) -> None:
    before = state_of(guest)
    guest.run(FNSTENV)
    guest.ctx.fpu.fcs = guest.ctx.fpu.fds = guest.ctx.fpu.fdp = 0
    guest.ctx.fpu.top = guest.ctx.fpu.ftw = guest.ctx.fpu.fip = 0
    guest.run(FLDENV)
    assert state_of(guest) == before


def test_fnsave_initializes_and_frstor_brings_it_back(guest: Guest) -> None:
    before = state_of(guest)
    guest.run(FNSAVE)
    assert (guest.ctx.fpu.fcw, guest.ctx.fpu.ftw, guest.ctx.fpu.top) == (FCW_INITIAL, 0, 0)
    guest.ctx.fpu.registers[3] = 0
    guest.run(FRSTOR)
    assert state_of(guest) == before


def test_fnsave_to_a_missing_page_changes_nothing(guest: Guest) -> None:
    guest.unmap(AREA + 0x1000)
    guest.words[RBX] = AREA + 0x1000 - 100
    guest.memory.write(AREA, b"\xa5" * 0x1000)
    before = state_of(guest)
    assert guest.fault_of(FNSAVE) == (PF, 0x6)
    assert state_of(guest) == before
    assert area(guest, 0x1000) == b"\xa5" * 0x1000


@pytest.mark.parametrize(
    "code, size", [(FNSTENV, 28), (FNSAVE, 108), ("66 " + FNSTENV, 14), ("66 " + FNSAVE, 94)]
)
def test_size_of_environments_and_saved_states(guest: Guest, code: str, size: int) -> None:
    guest.memory.write(AREA, b"\xa5" * 128)
    guest.run(code)
    data = area(guest, 128)
    assert data[size:] == b"\xa5" * (128 - size)
    assert data[size - 1] != 0xA5


def test_environment_of_real_mode_has_linear_addresses(guest: Guest) -> None:
    words = guest.words
    words[CR0] &= ~(CR0_PE | CR0_PG)
    words[EFER] = words[CPL] = words[RBX] = 0
    guest.state.set_segment(CS, Segment(0, 0, 0xFFFF, AR_REAL_MODE | AR_CODE))
    guest.state.set_segment(DS, Segment(AREA >> 4, AREA, 0xFFFF, AR_REAL_MODE))
    words[RIP] = 0x8000
    guest.ctx.fpu.fcs, guest.ctx.fpu.fip = 0x1230, 0x45
    # fnstenv [bx]
    guest.run("d9 37")
    assert guest.load(AREA + 6, 2) == 0x2345
    assert guest.load(AREA + 8, 2) == 0x1 << 12 | 0x123


# ---------------------------------------------------------------------------------------------- control and status


def test_control_word_is_loaded_and_stored(guest: Guest) -> None:
    guest.store(AREA, 2, 0)
    guest.run(FLDCW)
    guest.run(FNSTCW)
    assert guest.load(AREA, 2) == 0x40


def test_status_word_goes_to_memory_and_to_ax(guest: Guest) -> None:
    guest.words[RAX] = (1 << 64) - 1
    guest.run(FNSTSW)
    guest.run(FNSTSW_AX)
    assert guest.load(AREA, 2) == 0x4100 | 6 << 11
    assert guest.words[RAX] == 0xFFFF_FFFF_FFFF_0000 | 0x4100 | 6 << 11


def test_fnclex_forgets_exceptions_and_keeps_conditions(guest: Guest) -> None:
    guest.ctx.fpu.fsw = 0x4700 | FSW_ES | FSW_B | FSW_SF | EXCEPTION_IE
    guest.run(FNCLEX)
    assert guest.ctx.fpu.fsw == 0x4700
    assert guest.ctx.fpu.top == 6


def test_fldcw_makes_a_masked_exception_pending(guest: Guest) -> None:
    guest.ctx.fpu.fsw = EXCEPTION_ZE
    guest.store(AREA, 2, FCW_INITIAL & ~EXCEPTION_ZE)
    guest.run(FLDCW)
    assert guest.fault_of(FWAIT) == (MF, None)


def test_emms_empties_the_stack(guest: Guest) -> None:
    guest.run(EMMS)
    assert guest.ctx.fpu.ftw == 0


# --------------------------------------------------------------------------------------------------- availability


@pytest.mark.parametrize(
    "code",
    [FLD1, FXSAVE, FXRSTOR, FNSTENV, FLDENV, FNSAVE, FRSTOR, FLDCW, FNSTCW, FNSTSW_AX, FNINIT, FNCLEX, FNOP],
)
@pytest.mark.parametrize("bit", [CR0_TS, CR0_EM])
def test_x87_is_not_available_with_ts_or_em(guest: Guest, code: str, bit: int) -> None:
    guest.words[CR0] |= bit
    assert guest.fault_of(code) == (NM, None)


def test_wait_is_trapped_by_mp_and_ts_together(guest: Guest) -> None:
    guest.words[CR0] |= CR0_TS
    assert guest.fault_of(FWAIT) == (NM, None)
    guest.words[CR0] &= ~CR0_MP
    guest.run(FWAIT)
    guest.words[CR0] = guest.words[CR0] & ~CR0_TS | CR0_EM | CR0_MP
    guest.run(FWAIT)


@pytest.mark.parametrize("code", [PADDB_XMM, PADDB_MM, LDMXCSR, STMXCSR, EMMS, "0f 10 03", "f2 0f d6 c1"])
def test_mmx_and_sse_are_undefined_with_em_and_not_available_with_ts(guest: Guest, code: str) -> None:
    guest.words[CR0] |= CR0_TS
    assert guest.fault_of(code) == (NM, None)
    guest.words[CR0] |= CR0_EM
    assert guest.fault_of(code) == (UD, None)


@pytest.mark.parametrize("code", [PADDB_XMM, LDMXCSR, STMXCSR, "0f 10 03", "f2 0f d6 c1"])
def test_sse_is_undefined_without_osfxsr_and_mmx_is_not(guest: Guest, code: str) -> None:
    guest.words[CR4] &= ~CR4_OSFXSR
    assert guest.fault_of(code) == (UD, None)
    guest.run(PADDB_MM)


@pytest.mark.parametrize("code", [FLD1, FWAIT, FNOP, FLDCW, FRSTOR, PADDB_MM, EMMS, "f2 0f d6 c1"])
def test_waiting_instructions_report_a_pending_exception(guest: Guest, code: str) -> None:
    guest.ctx.fpu.fcw, guest.ctx.fpu.fsw = FCW_INITIAL & ~EXCEPTION_ZE, EXCEPTION_ZE | FSW_ES | FSW_B
    assert guest.fault_of(code) == (MF, None)


@pytest.mark.parametrize(
    "code", [FNSTCW, FNSTSW_AX, FNSTENV, FNSAVE, FNCLEX, FNINIT, FXSAVE, FXRSTOR, PADDB_XMM]
)
def test_others_do_not_wait(guest: Guest, code: str) -> None:
    guest.ctx.fpu.fcw, guest.ctx.fpu.fsw = FCW_INITIAL & ~EXCEPTION_ZE, EXCEPTION_ZE | FSW_ES | FSW_B
    guest.run(code)


def test_prefetches_and_fences_ask_for_nothing(guest: Guest) -> None:
    guest.words[CR0] |= CR0_EM | CR0_TS
    guest.words[RBX] = NON_CANONICAL
    for code in ("0f 18 03", "0f 18 0b", "0f 18 13", "0f 18 1b", "0f ae f8", "0f ae e8", "0f ae f0"):
        guest.run(code)
