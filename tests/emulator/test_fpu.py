"""x87 and SSE registers by themselves, and how they lie in memory."""

from __future__ import annotations

import random

import pytest

from lasskvm.emulator.fpu import (
    ALL_TAGS,
    FpuState,
    abridged_tags,
    copy_fpu,
    enter_mmx,
    full_tag_word,
    initialize,
    read_mmx,
    set_control_word,
    set_status_word,
    status_word,
    write_mmx,
)
from lasskvm.emulator.fpu_images import (
    FXSAVE_MXCSR,
    FXSAVE_REGISTERS,
    FXSAVE_XMM,
    environment_bytes,
    environment_image,
    fxsave_image,
    image_mxcsr,
    load_environment,
    load_fxsave_image,
    load_stack_image,
    stack_image,
)
from lasskvm.x86.fpu import EXCEPTION_ZE, EXCEPTIONS, FCW_FIXED, FCW_INITIAL, FSW_B, FSW_ES, MXCSR_INITIAL

ONE = 0x3FFF_8000_0000_0000_0000
INFINITY = 0x7FFF_8000_0000_0000_0000
DENORMAL = 1
UNNORMAL = 0x3FFF_0000_0000_0000_0001


@pytest.fixture
def fpu() -> FpuState:
    """Random registers, with nothing pending."""
    rng = random.Random(7)
    state = FpuState()
    state.xmm[:] = [rng.getrandbits(128) for _ in range(16)]
    state.registers[:] = [rng.getrandbits(80) for _ in range(8)]
    state.mxcsr, state.fcw, state.fsw = 0x5FA1, 0x0B7F, 0x4521
    state.top, state.ftw = 5, 0b1010_0110
    state.fop, state.fip, state.fdp = 0x5D9, 0xFFFF_8000_1234_5678, 0x7FFF_8765_4321
    state.fcs, state.fds = 0x33, 0x2B
    return state


def fields(state: FpuState) -> dict[str, object]:
    return {name: getattr(state, name) for name in FpuState.__slots__}


def test_new_registers_are_masked_and_empty() -> None:
    state = FpuState()
    assert (state.mxcsr, state.fcw, status_word(state)) == (MXCSR_INITIAL, FCW_INITIAL, 0)
    assert full_tag_word(state) == 0xFFFF


def test_initialization_empties_the_stack_and_leaves_sse_alone(fpu: FpuState) -> None:
    registers, xmm = list(fpu.registers), list(fpu.xmm)
    initialize(fpu)
    assert (fpu.fcw, status_word(fpu), fpu.ftw, fpu.fip, fpu.fdp) == (FCW_INITIAL, 0, 0, 0, 0)
    assert (fpu.registers, fpu.xmm, fpu.mxcsr) == (registers, xmm, 0x5FA1)


def test_copy_has_everything(fpu: FpuState) -> None:
    other = FpuState()
    copy_fpu(fpu, other)
    assert fields(other) == fields(fpu)


def test_status_word_contains_top(fpu: FpuState) -> None:
    assert status_word(fpu) == 0x4521 | 5 << 11
    set_status_word(fpu, 3 << 11)
    assert (fpu.top, fpu.fsw) == (3, 0)


def test_error_summary_follows_exceptions_and_masks(fpu: FpuState) -> None:
    set_status_word(fpu, EXCEPTION_ZE)
    assert not fpu.fsw & FSW_ES
    set_control_word(fpu, FCW_INITIAL & ~EXCEPTION_ZE)
    assert fpu.fsw & (FSW_ES | FSW_B) == FSW_ES | FSW_B
    set_control_word(fpu, FCW_INITIAL)
    assert not fpu.fsw & (FSW_ES | FSW_B)
    set_status_word(fpu, FSW_ES | FSW_B)
    assert not fpu.fsw & (FSW_ES | FSW_B)


def test_bit_6_of_the_control_word_reads_as_one(fpu: FpuState) -> None:
    set_control_word(fpu, 0)
    assert fpu.fcw == FCW_FIXED
    set_control_word(fpu, 0xFFFF)
    assert fpu.fcw == 0x1F7F


@pytest.mark.parametrize(
    "value, tag", [(ONE, 0), (0, 1), (1 << 79, 1), (INFINITY, 2), (DENORMAL, 2), (UNNORMAL, 2)]
)
def test_full_tag_says_what_a_register_holds(value: int, tag: int) -> None:
    state = FpuState()
    state.registers[2], state.ftw = value, 1 << 2
    assert full_tag_word(state) == 0xFFFF & ~(3 << 4) | tag << 4


def test_abridged_tags_tell_empty_registers_only() -> None:
    assert abridged_tags(0b11_10_01_00_11_11_00_11) == 0b0111_0010


def test_mmx_instructions_mark_all_registers_as_used(fpu: FpuState) -> None:
    enter_mmx(fpu)
    assert (fpu.top, fpu.ftw) == (0, ALL_TAGS)


def test_mmx_register_is_the_significand_of_a_physical_register(fpu: FpuState) -> None:
    write_mmx(fpu, 6, 0x0123_4567_89AB_CDEF)
    assert fpu.registers[6] == 0xFFFF_0123_4567_89AB_CDEF
    assert read_mmx(fpu, 6) == 0x0123_4567_89AB_CDEF


# ------------------------------------------------------------------------------------------------------------ images


def test_fxsave_image_has_the_stack_from_its_top_and_everything_in_place(fpu: FpuState) -> None:
    image = fxsave_image(fpu, wide_pointers=True)
    assert len(image) == FXSAVE_XMM + 16 * 16
    assert image[:6] == bytes.fromhex("7f0b 216d a6 00")
    assert image[6:8] == (0x5D9).to_bytes(2, "little")
    assert int.from_bytes(image[8:16], "little") == fpu.fip
    assert int.from_bytes(image[16:24], "little") == fpu.fdp
    assert image_mxcsr(image) == fpu.mxcsr
    assert image[FXSAVE_MXCSR + 4 : FXSAVE_REGISTERS] == bytes.fromhex("ffff0000")
    for place in range(8):
        start = FXSAVE_REGISTERS + 16 * place
        assert int.from_bytes(image[start : start + 16], "little") == fpu.registers[(5 + place) % 8]
    for number in range(16):
        start = FXSAVE_XMM + 16 * number
        assert int.from_bytes(image[start : start + 16], "little") == fpu.xmm[number]


def test_legacy_fxsave_image_has_eight_registers_and_32_bit_pointers(fpu: FpuState) -> None:
    image = fxsave_image(fpu, wide_pointers=False, xmm_registers=8)
    assert len(image) == FXSAVE_XMM + 8 * 16
    assert int.from_bytes(image[8:16], "little") == 0x33_1234_5678
    assert int.from_bytes(image[16:24], "little") == 0x2B_8765_4321


def test_fxsave_image_is_loaded_as_it_was_stored(fpu: FpuState) -> None:
    for wide in (True, False):
        # There is no place for both, selectors and the upper halves of offsets.
        dropped = {"fcs": 0, "fds": 0} if wide else {"fip": 0x1234_5678, "fdp": 0x8765_4321}
        other = FpuState()
        load_fxsave_image(other, fxsave_image(fpu, wide_pointers=wide), wide_pointers=wide)
        assert fields(other) == fields(fpu) | dropped


def test_fxsave_image_without_sse_leaves_sse_alone(fpu: FpuState) -> None:
    other = FpuState()
    image = fxsave_image(fpu, wide_pointers=True)
    load_fxsave_image(other, image, wide_pointers=True, xmm_registers=0, with_mxcsr=False)
    assert (other.mxcsr, other.xmm) == (MXCSR_INITIAL, [0] * 16)
    assert other.registers == fpu.registers


def test_protected_mode_environment(fpu: FpuState) -> None:
    image = environment_image(fpu, 4, real_mode=False)
    assert len(image) == environment_bytes(4) == 28
    words = [int.from_bytes(image[at : at + 4], "little") for at in range(0, 28, 4)]
    assert words[:2] == [0x0B7F, 0x6D21]
    assert words[2] == full_tag_word(fpu)
    assert words[3:] == [0x1234_5678, 0x5D9 << 16 | 0x33, 0x8765_4321, 0x2B]


def test_real_mode_environment_splits_linear_addresses(fpu: FpuState) -> None:
    fpu.fcs, fpu.fip, fpu.fds, fpu.fdp = 0x1234, 0x5, 0xABCD, 0xE
    image = environment_image(fpu, 2, real_mode=True)
    words = [int.from_bytes(image[at : at + 2], "little") for at in range(0, environment_bytes(2), 2)]
    assert words[3:] == [0x2345, 0x1 << 12 | 0x5D9, 0xBCDE, 0xA << 12]


@pytest.mark.parametrize("real_mode", [False, True])
@pytest.mark.parametrize("width", [4, 2])
def test_environment_is_loaded_as_it_was_stored(fpu: FpuState, width: int, real_mode: bool) -> None:
    fpu.fip, fpu.fdp = 0x1234, 0x5678
    if real_mode:
        # Linear addresses: no selectors.
        fpu.fcs = fpu.fds = 0
    elif width == 2:
        # That format has no place for the opcode.
        fpu.fop = 0
    other = FpuState()
    copy_fpu(fpu, other)
    initialize(other)
    load_environment(other, environment_image(fpu, width, real_mode=real_mode), width, real_mode=real_mode)
    assert fields(other) == fields(fpu)


def test_loaded_environment_may_have_an_exception_pending() -> None:
    state = FpuState()
    state.fcw, state.fsw = FCW_INITIAL & ~EXCEPTIONS, EXCEPTION_ZE
    other = FpuState()
    load_environment(other, environment_image(state, 4, real_mode=False), 4, real_mode=False)
    assert other.fsw & FSW_ES


def test_stack_image_is_loaded_as_it_was_stored(fpu: FpuState) -> None:
    image = stack_image(fpu)
    assert int.from_bytes(image[:10], "little") == fpu.registers[5]
    other = FpuState()
    other.top = fpu.top
    load_stack_image(other, image)
    assert other.registers == fpu.registers
