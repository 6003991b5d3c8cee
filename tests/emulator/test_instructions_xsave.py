"""XSAVE, XSAVEOPT and XRSTOR of x87 and SSE state and PKRU, XGETBV and XSETBV, executed from their bytes."""

from __future__ import annotations

import pytest
from emulator_guest import DPL3, UPPER, Guest
from xsave_processor import ALL, xsave_entries

from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.fpu import FpuState, copy_fpu
from lasskvm.emulator.fpu_images import FXSAVE_MXCSR, FXSAVE_REGISTERS, FXSAVE_XMM, fxsave_image
from lasskvm.emulator.instructions.availability import check_x87
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import (
    CPL,
    CR0,
    CR4,
    PKRU,
    RAX,
    RBP,
    RBX,
    RCX,
    RDX,
    RFLAGS,
    TLB_FLUSH,
    XCR0,
    Segment,
)
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import GP, MF, NM, PF, PF_P, PF_U, PF_W, SS, UD
from lasskvm.x86.fpu import FCW_INITIAL, FSW_ES, MXCSR_INITIAL, MXCSR_WRITABLE
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_DATA,
    CR0_EM,
    CR0_TS,
    CR4_LASS,
    CR4_OSXSAVE,
    CR4_SMAP,
    CS,
    DS,
    RFLAGS_AC,
)
from lasskvm.x86.xsave import (
    COMPONENT_PKRU,
    COMPONENT_SSE,
    COMPONENT_X87,
    PKRU_OFFSET,
    XSAVE_HEADER,
    XSAVE_HEADER_BYTES,
    supported_components,
)

AREA = 0x70000
AREA_BYTES = PKRU_OFFSET + 8
FILL = 0xA5
ONES = (1 << 64) - 1
RIGHTS = 0x5555_0004

# With the area at [RBX]
XSAVE, XSAVE64, XRSTOR, XRSTOR64 = "0f ae 23", "48 0f ae 23", "0f ae 2b", "48 0f ae 2b"
XSAVEOPT, XSAVEOPT64 = "0f ae 33", "48 0f ae 33"
XSAVE_RBP, XRSTOR_RBP = "0f ae 65 00", "0f ae 6d 00"
XGETBV, XSETBV = "0f 01 d0", "0f 01 d1"
SAVES = (XSAVE, XSAVE64, XSAVEOPT, XSAVEOPT64)
OPERATIONS = (*SAVES, XRSTOR, XRSTOR64)


@pytest.fixture
def guest(user: Guest) -> Guest:
    """User code with all components in XCR0 and in the mask, and an area of A5H bytes; the registers hold something."""
    words = user.words
    user.ctx.cpuid = CpuidTable(xsave_entries("xsaveopt", "xgetbv1"))
    words[CR4] |= CR4_OSXSAVE
    words[XCR0] = ALL
    # The upper halves of RDX and RAX are no part of the mask.
    words[RDX], words[RAX], words[RBX] = 0xFFFF_FFFF << 32, 0xFFFF_FFFF << 32 | ALL, AREA
    words[PKRU] = RIGHTS
    user.memory.write(AREA, bytes((FILL,)) * PAGE_SIZE)
    fpu = user.ctx.fpu
    for number in range(16):
        fpu.xmm[number] = (number + 1) * 0x0102_0304_0506_0708_090A_0B0C_0D0E_0F00
    for number in range(8):
        fpu.registers[number] = (0x3FFF + number) << 64 | 1 << 63 | number
    fpu.top, fpu.ftw, fpu.fsw, fpu.mxcsr, fpu.fcw = 6, 0b1100_0011, 0x4100, 0x1FA0, 0xF7F
    fpu.fip, fpu.fdp, fpu.fop = 0x40_1234, 0x70_5678, 0x123
    return user


def state_of(guest: Guest) -> dict[str, object]:
    """A copy of all registers that are saved."""
    state = FpuState()
    copy_fpu(guest.ctx.fpu, state)
    return {name: getattr(state, name) for name in FpuState.__slots__} | {"pkru": guest.words[PKRU]}


def initial_state() -> dict[str, object]:
    """The initial configurations of all components."""
    state = FpuState()
    state.fcw = FCW_INITIAL
    return {name: getattr(state, name) for name in FpuState.__slots__} | {"pkru": 0}


def clobber(guest: Guest) -> None:
    """Change everything that there is to save."""
    fpu = guest.ctx.fpu
    for number in range(16):
        fpu.xmm[number] = 0x77 << number
    for number in range(8):
        fpu.registers[number] = 0x99 << number
    fpu.top, fpu.ftw, fpu.fsw, fpu.mxcsr, fpu.fcw = 3, 0x18, 0x200, 0x1F81, 0x27F
    fpu.fip, fpu.fdp, fpu.fop, fpu.fcs, fpu.fds = 1, 2, 3, 0, 0
    guest.words[PKRU] = 0x8


def area(guest: Guest) -> bytes:
    return guest.memory.read(AREA, AREA_BYTES)


def xstate_bv(guest: Guest) -> int:
    return guest.load(AREA + XSAVE_HEADER)


def write_area(guest: Guest, components: int) -> None:
    """An area with the registers as they are, whose header names *components*; nothing reserved is set."""
    image = fxsave_image(guest.ctx.fpu, wide_pointers=True).ljust(XSAVE_HEADER + XSAVE_HEADER_BYTES, b"\0")
    guest.memory.write(AREA, image)
    guest.store(AREA + XSAVE_HEADER, 8, components)
    guest.store(AREA + PKRU_OFFSET, 8, guest.words[PKRU])


def changed_bytes(guest: Guest) -> set[int]:
    """The places in the area that no longer hold what was there at first."""
    return {place for place, value in enumerate(area(guest)) if value != FILL}


def places(*ranges: tuple[int, int]) -> set[int]:
    return {place for start, end in ranges for place in range(start, end)}


X87_PLACES = ((0, FXSAVE_MXCSR), (FXSAVE_REGISTERS, FXSAVE_XMM))
SSE_PLACES = ((FXSAVE_MXCSR, FXSAVE_REGISTERS), (FXSAVE_XMM, FXSAVE_XMM + 256))
BV_PLACES = (XSAVE_HEADER, XSAVE_HEADER + 8)
PKRU_PLACES = (PKRU_OFFSET, PKRU_OFFSET + 8)

# ----------------------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize(
    ("code", "wide"), [(XSAVE, False), (XSAVE64, True), (XSAVEOPT, False), (XSAVEOPT64, True)]
)
def test_the_legacy_region_is_an_fxsave_image(guest: Guest, code: str, wide: bool) -> None:
    guest.ctx.fpu.fcs, guest.ctx.fpu.fds = 0x2B, 0x23
    guest.run(code)
    image = fxsave_image(guest.ctx.fpu, wide_pointers=wide)
    assert area(guest)[: len(image)] == image
    assert area(guest)[PKRU_OFFSET : PKRU_OFFSET + 8] == RIGHTS.to_bytes(8, "little")
    assert changed_bytes(guest) <= places(*X87_PLACES, *SSE_PLACES, BV_PLACES, PKRU_PLACES)


@pytest.mark.parametrize("code", SAVES)
@pytest.mark.parametrize(
    ("mask", "saved"),
    [
        (0, ()),
        (COMPONENT_X87, X87_PLACES),
        (COMPONENT_SSE, SSE_PLACES),
        (COMPONENT_X87 | COMPONENT_PKRU, (*X87_PLACES, PKRU_PLACES)),
        (COMPONENT_PKRU, (PKRU_PLACES,)),
        (ALL | 1 << 2 | 1 << 63, (*X87_PLACES, *SSE_PLACES, PKRU_PLACES)),
    ],
)
def test_only_what_the_mask_names_is_written(
    guest: Guest, code: str, mask: int, saved: tuple[tuple[int, int], ...]
) -> None:
    guest.words[RAX], guest.words[RDX] = mask & 0xFFFF_FFFF, mask >> 32
    guest.run(code)
    assert changed_bytes(guest) <= places(*saved, BV_PLACES)
    for start, _ in saved:
        assert start in changed_bytes(guest)


@pytest.mark.parametrize("code", [XSAVE, XSAVEOPT])
def test_what_is_not_in_xcr0_is_not_saved(guest: Guest, code: str) -> None:
    guest.words[XCR0] = COMPONENT_X87
    guest.run(code)
    assert changed_bytes(guest) <= places(*X87_PLACES, BV_PLACES)


@pytest.mark.parametrize("code", SAVES)
@pytest.mark.parametrize("mask", [0, COMPONENT_X87, COMPONENT_SSE, COMPONENT_PKRU, ALL])
def test_xstate_bv_changes_where_the_mask_says(guest: Guest, code: str, mask: int) -> None:
    before = 0xA5A5_A5A5_A5A5_A5A5 & ~ALL
    guest.store(AREA + XSAVE_HEADER, 8, before)
    guest.words[RAX] = mask
    guest.run(code)
    assert xstate_bv(guest) == before | mask
    guest.store(AREA + XSAVE_HEADER, 8, ONES)
    copy_fpu(FpuState(), guest.ctx.fpu)
    guest.words[PKRU] = 0
    guest.run(code)
    assert xstate_bv(guest) == ONES & ~mask
    header = area(guest)[XSAVE_HEADER + 8 : XSAVE_HEADER + XSAVE_HEADER_BYTES]
    assert header == bytes((FILL,)) * len(header)


@pytest.mark.parametrize(
    ("change", "in_use"),
    [
        ({}, 0),
        ({"fcw": 0x27F}, COMPONENT_X87),
        ({"fsw": 0x100}, COMPONENT_X87),
        ({"top": 1}, COMPONENT_X87),
        ({"ftw": 1}, COMPONENT_X87),
        ({"fop": 1}, COMPONENT_X87),
        ({"fip": 1}, COMPONENT_X87),
        ({"fdp": 1 << 40}, COMPONENT_X87),
        ({"mxcsr": 0x1F81}, 0),
    ],
)
def test_a_component_is_in_use_when_it_differs_from_its_initial_state(
    guest: Guest, change: dict[str, int], in_use: int
) -> None:
    """MXCSR does not make SSE state count as in use."""
    copy_fpu(FpuState(), guest.ctx.fpu)
    guest.words[PKRU] = 0
    for name, value in change.items():
        setattr(guest.ctx.fpu, name, value)
    guest.run(XSAVE64)
    assert xstate_bv(guest) & ALL == in_use


@pytest.mark.parametrize("number", [0, 7, 15])
def test_a_register_that_is_not_zero_is_in_use(guest: Guest, number: int) -> None:
    copy_fpu(FpuState(), guest.ctx.fpu)
    guest.words[PKRU] = 0
    guest.ctx.fpu.xmm[number] = 1 << 127
    guest.run(XSAVE)
    assert xstate_bv(guest) & ALL == COMPONENT_SSE
    guest.ctx.fpu.xmm[number] = 0
    guest.ctx.fpu.registers[number % 8] = 1 << 79
    guest.run(XSAVE)
    assert xstate_bv(guest) & ALL == COMPONENT_X87


def test_xsave_writes_components_in_their_initial_state_and_xsaveopt_does_not(guest: Guest) -> None:
    copy_fpu(FpuState(), guest.ctx.fpu)
    guest.ctx.fpu.mxcsr = 0x9F80
    guest.words[PKRU] = 0
    guest.run(XSAVEOPT)
    assert changed_bytes(guest) <= places((FXSAVE_MXCSR, FXSAVE_REGISTERS), BV_PLACES)
    assert guest.load(AREA + FXSAVE_MXCSR, 8) == MXCSR_WRITABLE << 32 | 0x9F80
    guest.run(XSAVE)
    assert changed_bytes(guest) - places(BV_PLACES) == places(*X87_PLACES, *SSE_PLACES, PKRU_PLACES)


def test_outside_64_bit_mode_there_are_eight_xmm_registers(guest: Guest) -> None:
    guest.state.set_segment(CS, Segment(0x1B, 0, 0xFFFF_FFFF, AR_CODE32 | DPL3))
    guest.state.set_segment(DS, Segment(0x23, 0, 0xFFFF_FFFF, AR_DATA | DPL3))
    guest.run(XSAVE)
    assert changed_bytes(guest) & places((FXSAVE_XMM + 128, XSAVE_HEADER)) == set()
    before = list(guest.ctx.fpu.xmm)
    guest.memory.write(AREA + XSAVE_HEADER, COMPONENT_SSE.to_bytes(64, "little"))
    guest.memory.write(AREA + FXSAVE_XMM, bytes(256))
    guest.run(XRSTOR)
    assert list(guest.ctx.fpu.xmm) == [0] * 8 + before[8:]
    for number in range(16):
        guest.ctx.fpu.xmm[number] = number + 1 if number >= 8 else 0
    guest.run(XSAVE)
    assert not xstate_bv(guest) & COMPONENT_SSE
    guest.memory.write(AREA + XSAVE_HEADER, bytes(64))
    guest.run(XRSTOR)
    assert list(guest.ctx.fpu.xmm) == [0] * 8 + list(range(9, 17))


# ------------------------------------------------------------------------------------------- what is restored


@pytest.mark.parametrize("save", SAVES)
def test_xrstor_undoes_what_happened_since_xsave(guest: Guest, save: str) -> None:
    before = state_of(guest)
    guest.memory.write(AREA, bytes(PAGE_SIZE))
    guest.run(save)
    clobber(guest)
    assert state_of(guest) != before
    guest.run(XRSTOR64 if save in (XSAVE64, XSAVEOPT64) else XRSTOR)
    assert state_of(guest) == before


@pytest.mark.parametrize("code", [XRSTOR, XRSTOR64])
def test_components_that_are_not_in_the_area_get_their_initial_state(guest: Guest, code: str) -> None:
    """But for MXCSR, which comes from the area all the same."""
    write_area(guest, 0)
    guest.store(AREA + FXSAVE_MXCSR, 4, 0xFF80)
    guest.run(code)
    assert state_of(guest) == initial_state() | {"mxcsr": 0xFF80}


def test_mxcsr_is_loaded_with_sse_state_only(guest: Guest) -> None:
    write_area(guest, ALL)
    guest.store(AREA + FXSAVE_MXCSR, 4, MXCSR_INITIAL | 1)
    guest.words[RAX] = COMPONENT_X87 | COMPONENT_PKRU
    guest.run(XRSTOR)
    assert guest.ctx.fpu.mxcsr == 0x1FA0
    guest.words[RAX] = COMPONENT_SSE
    guest.run(XRSTOR)
    assert guest.ctx.fpu.mxcsr == MXCSR_INITIAL | 1


@pytest.mark.parametrize("components", [0, ALL])
def test_components_that_are_not_asked_for_stay(guest: Guest, components: int) -> None:
    write_area(guest, components)
    clobber(guest)
    before = state_of(guest)
    guest.words[RAX] = 0
    guest.run(XRSTOR64)
    assert state_of(guest) == before
    guest.words[RAX] = COMPONENT_SSE
    guest.run(XRSTOR64)
    after = state_of(guest)
    assert after["xmm"] != before["xmm"]
    assert {**after, "xmm": before["xmm"], "mxcsr": before["mxcsr"]} == before


def test_a_restored_exception_is_pending_and_does_not_stop_xsave(guest: Guest) -> None:
    """ES follows from the exceptions and masks that are loaded; #MF is for waiting instructions."""
    write_area(guest, COMPONENT_X87)
    guest.store(AREA, 4, 0x0004_037B)
    guest.run(XRSTOR)
    assert guest.ctx.fpu.fsw & FSW_ES
    with pytest.raises(GuestFault) as caught:
        check_x87(guest.ctx)
    assert caught.value.vector == MF
    guest.run(XSAVE)
    guest.run(XRSTOR)


# ------------------------------------------------------------------------------------------------------- PKRU


def test_restored_rights_forget_translations_when_they_differ(guest: Guest) -> None:
    write_area(guest, COMPONENT_PKRU)
    guest.run(XRSTOR)
    assert (guest.words[PKRU], guest.words[TLB_FLUSH], guest.ctx.leave_block) == (RIGHTS, 0, False)
    guest.store(AREA + PKRU_OFFSET, 8, 0xFFFF_FFFF_0000_0010)
    guest.run(XRSTOR)
    assert (guest.words[PKRU], guest.words[TLB_FLUSH], guest.ctx.leave_block) == (0x10, 1, True)


def test_rights_that_are_not_in_the_area_become_zero(guest: Guest) -> None:
    write_area(guest, 0)
    guest.run(XRSTOR)
    assert (guest.words[PKRU], guest.words[TLB_FLUSH]) == (0, 1)


def test_pkru_is_neither_read_nor_written_unless_it_is_asked_for(guest: Guest) -> None:
    """The area crosses into a page that is not there; only PKRU is on it."""
    guest.words[RBX] = AREA + PAGE_SIZE - 1024
    guest.unmap(AREA + PAGE_SIZE)
    guest.words[RAX] = COMPONENT_X87 | COMPONENT_SSE
    guest.run(XSAVE)
    guest.memory.write(AREA + PAGE_SIZE - 1024 + XSAVE_HEADER, bytes(64))
    guest.run(XRSTOR)
    guest.words[RAX] = ALL
    guest.run(XRSTOR)
    guest.words[PKRU] = 0
    guest.run(XSAVEOPT)
    guest.words[PKRU] = RIGHTS
    before = guest.memory.read(AREA, PAGE_SIZE)
    guest.ctx.fpu.xmm[0] += 1
    for code in SAVES:
        assert guest.fault_of(code) == (PF, PF_W | PF_U)
    assert guest.memory.read(AREA, PAGE_SIZE) == before
    guest.memory.write(AREA + PAGE_SIZE - 1024 + XSAVE_HEADER, ALL.to_bytes(64, "little"))
    assert guest.fault_of(XRSTOR) == (PF, PF_U)


# ------------------------------------------------------------------------------------- header and MXCSR checks


@pytest.mark.parametrize("code", [XRSTOR, XRSTOR64])
@pytest.mark.parametrize("place", [*range(8, 24)])
def test_the_first_bytes_behind_xstate_bv_must_be_zero(guest: Guest, code: str, place: int) -> None:
    """XCOMP_BV is among them: there is no compacted format."""
    write_area(guest, ALL)
    clobber(guest)
    before = state_of(guest)
    guest.store(AREA + XSAVE_HEADER + place, 1, 0x80)
    assert guest.fault_of(code) == (GP, 0)
    assert state_of(guest) == before


def test_the_rest_of_the_header_and_of_the_legacy_region_does_not_matter(guest: Guest) -> None:
    before = state_of(guest)
    write_area(guest, ALL)
    guest.memory.write(AREA + XSAVE_HEADER + 24, b"\xff" * 40)
    guest.memory.write(AREA + FXSAVE_XMM + 256, b"\xff" * 96)
    guest.store(AREA + FXSAVE_MXCSR + 4, 4, 0x1234)
    clobber(guest)
    guest.run(XRSTOR64)
    assert state_of(guest) == before


@pytest.mark.parametrize("bit", [2, 3, 8, 10, 62, 63])
@pytest.mark.parametrize("mask", [0, ALL])
def test_xrstor_refuses_components_that_do_not_exist(guest: Guest, bit: int, mask: int) -> None:
    """Whether they are asked for or not."""
    write_area(guest, ALL | 1 << bit)
    guest.words[RAX] = mask
    assert guest.fault_of(XRSTOR) == (GP, 0)


def test_xrstor_refuses_components_that_are_not_in_xcr0(guest: Guest) -> None:
    write_area(guest, COMPONENT_X87 | COMPONENT_SSE)
    guest.words[XCR0] = COMPONENT_X87
    guest.words[RAX] = COMPONENT_X87
    assert guest.fault_of(XRSTOR) == (GP, 0)
    guest.words[XCR0] |= COMPONENT_SSE
    guest.run(XRSTOR)


@pytest.mark.parametrize("components", [0, ALL])
@pytest.mark.parametrize("value", [1 << 16, 1 << 31])
def test_reserved_mxcsr_bits_matter_where_mxcsr_is_loaded(guest: Guest, components: int, value: int) -> None:
    write_area(guest, components)
    guest.store(AREA + FXSAVE_MXCSR, 4, value)
    before = state_of(guest)
    for mask in (COMPONENT_SSE, ALL):
        guest.words[RAX] = mask
        assert guest.fault_of(XRSTOR) == (GP, 0)
    assert state_of(guest) == before
    guest.words[RAX] = COMPONENT_X87 | COMPONENT_PKRU
    guest.run(XRSTOR)


# ------------------------------------------------------------------------------------------- when it cannot run


@pytest.mark.parametrize("code", OPERATIONS)
def test_the_checks_come_in_the_order_of_the_manual(guest: Guest, code: str) -> None:
    guest.unmap(AREA)
    page_fault = PF_U if code in (XRSTOR, XRSTOR64) else PF_W | PF_U
    assert guest.fault_of(code) == (PF, page_fault)
    guest.words[RBX] = AREA + 32
    assert guest.fault_of(code) == (GP, 0)
    guest.words[CR0] |= CR0_TS
    assert guest.fault_of(code) == (NM, None)
    guest.words[CR4] &= ~CR4_OSXSAVE
    assert guest.fault_of(code) == (UD, None)


@pytest.mark.parametrize("offset", [1, 8, 16, 32])
@pytest.mark.parametrize("code", OPERATIONS)
def test_the_area_must_be_aligned_to_64_bytes(guest: Guest, code: str, offset: int) -> None:
    guest.words[RBX] = AREA + offset
    assert guest.fault_of(code) == (GP, 0)
    assert changed_bytes(guest) == set()


@pytest.mark.parametrize("code", [XSAVE, XSAVEOPT])
def test_cr0_em_does_not_stop_xsave(guest: Guest, code: str) -> None:
    guest.words[CR0] |= CR0_EM
    guest.run(code)
    assert xstate_bv(guest) & ALL == ALL


@pytest.mark.parametrize("prefix", ["f0", "66", "f2", "f3"])
def test_xsave_takes_no_prefixes(guest: Guest, prefix: str) -> None:
    """With some of them it is another instruction, which this processor has or has not."""
    assert guest.fault_of(f"{prefix} {XSAVE}") == (UD, None)
    assert guest.fault_of(f"{prefix} {XRSTOR}") == (UD, None)
    assert guest.fault_of(f"{prefix} {XGETBV}") == (UD, None)


def test_instructions_are_undefined_without_their_features(guest: Guest) -> None:
    guest.ctx.cpuid = CpuidTable(xsave_entries())
    guest.run(XSAVE)
    assert guest.fault_of(XSAVEOPT) == (UD, None)
    for code in ("0f c7 23", "0f c7 2b", "0f c7 1b"):  # XSAVEC, XSAVES, XRSTORS
        assert guest.fault_of(code) == (UD, None)
    guest.ctx.cpuid = CpuidTable(parse_cpu("max,-xsave").entries())
    for code in (*OPERATIONS, XGETBV, XSETBV):
        assert guest.fault_of(code) == (UD, None)


# --------------------------------------------------------------------------------------------- paging and LASS


@pytest.mark.parametrize("code", SAVES)
def test_the_area_must_be_writable(guest: Guest, code: str) -> None:
    guest.write_protect(AREA)
    for mask in (ALL, 0, COMPONENT_SSE):
        guest.words[RAX] = mask
        assert guest.fault_of(code) == (PF, PF_P | PF_W | PF_U)
    assert changed_bytes(guest) == set()


@pytest.mark.parametrize("distance", [64, 128, 256, 448, 512])
def test_an_area_across_two_pages_is_written_wholly_or_not(guest: Guest, distance: int) -> None:
    """*distance* bytes of it are on the first page."""
    start = AREA + PAGE_SIZE - distance
    guest.words[RBX], guest.words[RAX] = start, COMPONENT_X87 | COMPONENT_SSE
    guest.memory.write(AREA + PAGE_SIZE, bytes((FILL,)) * PAGE_SIZE)
    guest.unmap(AREA + PAGE_SIZE)
    for code in SAVES:
        assert guest.fault_of(code) == (PF, PF_W | PF_U)
    assert guest.fault_of(XRSTOR) == (PF, PF_U)
    assert guest.memory.read(start, XSAVE_HEADER + 64) == bytes((FILL,)) * (XSAVE_HEADER + 64)
    entry = guest.page_entry(AREA + PAGE_SIZE)
    guest.memory.store(entry, 8, guest.memory.load(guest.page_entry(AREA), 8) + PAGE_SIZE)
    before = state_of(guest)
    guest.run(XSAVE64)
    image = fxsave_image(guest.ctx.fpu, wide_pointers=True)
    assert guest.memory.read(start, len(image)) == image
    guest.memory.write(start + XSAVE_HEADER + 8, bytes(16))
    guest.store(start + XSAVE_HEADER, 8, COMPONENT_X87 | COMPONENT_SSE)
    clobber(guest)
    guest.run(XRSTOR64)
    assert state_of(guest) == before | {"pkru": guest.words[PKRU]}


@pytest.mark.parametrize("code", [XSAVE, XRSTOR])
@pytest.mark.parametrize("mask", [0, COMPONENT_PKRU])
def test_without_legacy_components_the_legacy_region_is_not_touched(
    guest: Guest, code: str, mask: int
) -> None:
    """Its page is missing; the header is on the next one."""
    guest.words[RBX], guest.words[RAX] = AREA + PAGE_SIZE - XSAVE_HEADER, mask
    guest.memory.write(AREA + PAGE_SIZE, mask.to_bytes(64, "little"))
    guest.unmap(AREA)
    guest.run(code)
    guest.words[RAX] = COMPONENT_X87
    assert guest.fault_of(code) == (PF, PF_U if code == XRSTOR else PF_W | PF_U)


@pytest.mark.parametrize("code", OPERATIONS)
def test_user_code_cannot_name_an_area_in_the_upper_half(guest: Guest, code: str) -> None:
    guest.words[RBX] = UPPER + AREA
    assert guest.fault_of(code) == (GP, 0)
    guest.words[CR4] &= ~CR4_LASS
    assert guest.fault_of(code)[0] == PF


@pytest.mark.parametrize("code", OPERATIONS)
def test_the_kernel_cannot_name_an_area_in_the_lower_half_but_with_ac(guest: Guest, code: str) -> None:
    guest.enter_kernel()
    write_area(guest, ALL)
    assert guest.fault_of(code) == (GP, 0)
    guest.words[RFLAGS] |= RFLAGS_AC
    guest.run(code)
    guest.words[RFLAGS] &= ~RFLAGS_AC
    guest.words[CR4] &= ~CR4_LASS
    assert guest.fault_of(code)[0] == PF
    guest.words[CR4] &= ~CR4_SMAP
    guest.run(code)


@pytest.mark.parametrize("code", [XSAVE_RBP, XRSTOR_RBP])
def test_an_area_on_the_stack_is_a_stack_access(guest: Guest, code: str) -> None:
    """The stack segment's fault comes before alignment, too."""
    for address in (UPPER + AREA, UPPER + AREA + 8, 1 << 47):
        guest.words[RBP] = address
        assert guest.fault_of(code) == (SS, 0)


def test_the_end_of_the_lower_half_is_no_place_for_an_area(guest: Guest) -> None:
    guest.words[RBX] = (1 << 47) - 256
    for code in OPERATIONS:
        assert guest.fault_of(code) == (GP, 0)


# ----------------------------------------------------------------------------------------------- XGETBV, XSETBV


def test_xgetbv_gives_xcr0_at_any_privilege_level(guest: Guest) -> None:
    guest.words[XCR0] = COMPONENT_X87 | COMPONENT_PKRU
    guest.words[RCX] = 0xFFFF_FFFF << 32
    guest.run(XGETBV)
    assert (guest.words[RAX], guest.words[RDX]) == (COMPONENT_X87 | COMPONENT_PKRU, 0)


def test_xgetbv_tells_what_is_in_use_where_it_is_offered(guest: Guest) -> None:
    guest.words[RCX] = 1
    guest.run(XGETBV)
    assert (guest.words[RAX], guest.words[RDX]) == (ALL, 0)
    copy_fpu(FpuState(), guest.ctx.fpu)
    guest.ctx.fpu.xmm[9] = 5
    guest.words[XCR0] = COMPONENT_X87 | COMPONENT_SSE
    guest.run(XGETBV)
    assert guest.words[RAX] == COMPONENT_SSE
    guest.ctx.cpuid = CpuidTable(xsave_entries("xsaveopt"))
    assert guest.fault_of(XGETBV) == (GP, 0)


@pytest.mark.parametrize("index", [2, 0xFFFF_FFFF])
@pytest.mark.parametrize("code", [XGETBV, XSETBV])
def test_other_extended_control_registers_do_not_exist(guest: Guest, code: str, index: int) -> None:
    guest.enter_kernel()
    guest.words[RCX] = index
    assert guest.fault_of(code) == (GP, 0)


def test_xsetbv_of_index_1_is_refused_whatever_xgetbv_takes(guest: Guest) -> None:
    guest.enter_kernel()
    guest.words[RCX] = 1
    assert guest.fault_of(XSETBV) == (GP, 0)


@pytest.mark.parametrize(
    "value", [COMPONENT_X87, COMPONENT_X87 | COMPONENT_SSE, COMPONENT_X87 | COMPONENT_PKRU, ALL]
)
def test_xsetbv_sets_what_cpuid_enumerates(guest: Guest, value: int) -> None:
    guest.enter_kernel()
    guest.words[RAX] = 0xFFFF_FFFF << 32 | value
    guest.run(XSETBV)
    assert guest.words[XCR0] == value
    guest.run(XGETBV)
    assert guest.words[RAX] == value


@pytest.mark.parametrize(
    "value", [0, COMPONENT_SSE, ALL & ~1, COMPONENT_X87 | 1 << 2, ALL | 1 << 8, ALL | 1 << 62, ALL | 1 << 32]
)
def test_xsetbv_refuses_other_values(guest: Guest, value: int) -> None:
    guest.enter_kernel()
    guest.words[RAX], guest.words[RDX] = value & 0xFFFF_FFFF, value >> 32
    assert guest.fault_of(XSETBV) == (GP, 0)


def test_what_xcr0_can_hold_depends_on_cpuid(guest: Guest) -> None:
    """AVX stays out even where somebody enumerates it."""
    guest.enter_kernel()
    guest.ctx.cpuid = CpuidTable(xsave_entries(components=COMPONENT_X87 | COMPONENT_SSE | 1 << 2))
    assert supported_components(guest.ctx.cpuid) == COMPONENT_X87 | COMPONENT_SSE
    assert guest.fault_of(XSETBV) == (GP, 0)
    guest.words[RAX] = COMPONENT_X87 | COMPONENT_SSE | 1 << 2
    assert guest.fault_of(XSETBV) == (GP, 0)
    guest.words[RAX] = COMPONENT_X87 | COMPONENT_SSE
    guest.run(XSETBV)


def test_xsetbv_is_privileged_and_needs_osxsave_first(guest: Guest) -> None:
    assert guest.words[CPL] == 3
    assert guest.fault_of(XSETBV) == (GP, 0)
    guest.words[CR4] &= ~CR4_OSXSAVE
    assert guest.fault_of(XSETBV) == (UD, None)
    assert guest.fault_of(XGETBV) == (UD, None)
