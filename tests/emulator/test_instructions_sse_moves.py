"""Moves of XMM and MMX registers: what they move, alignment, and all or nothing across pages."""

from __future__ import annotations

import pytest
from emulator_guest import Guest

from lasskvm.state import CR0, CR4, RAX, RBP, RBX, RDI, RFLAGS, RSI
from lasskvm.x86.exceptions import AC, GP, PF, SS
from lasskvm.x86.registers import CR0_AM, CR0_NE, CR4_OSFXSR, RFLAGS_AC

AREA = 0x70000
NON_CANONICAL = 1 << 47
LOW = 0x0807_0605_0403_0201
HIGH = 0x1817_1615_1413_1211
VALUE = HIGH << 64 | LOW
ONES = (1 << 128) - 1

#: XMM1 to and from [RBX].
ALIGNED_LOADS = {
    "movaps": "0f 28 0b",
    "movapd": "66 0f 28 0b",
    "movdqa": "66 0f 6f 0b",
    "movntdqa": "66 0f 38 2a 0b",
}
ALIGNED_STORES = {
    "movaps": "0f 29 0b", "movapd": "66 0f 29 0b", "movdqa": "66 0f 7f 0b", "movntps": "0f 2b 0b",
    "movntpd": "66 0f 2b 0b", "movntdq": "66 0f e7 0b",
}  # fmt: skip
UNALIGNED_LOADS = {
    "movups": "0f 10 0b",
    "movupd": "66 0f 10 0b",
    "movdqu": "f3 0f 6f 0b",
    "lddqu": "f2 0f f0 0b",
}
UNALIGNED_STORES = {"movups": "0f 11 0b", "movupd": "66 0f 11 0b", "movdqu": "f3 0f 7f 0b"}
LOADS, STORES = ALIGNED_LOADS | UNALIGNED_LOADS, ALIGNED_STORES | UNALIGNED_STORES


@pytest.fixture(params=[False, True], ids=["no-tlb", "tlb"])
def guest(request: pytest.FixtureRequest, user: Guest) -> Guest:
    """User code with SSE enabled, RBX at a free page; with and without the software TLB."""
    user.words[CR4] |= CR4_OSFXSR
    user.words[CR0] |= CR0_NE
    user.words[RBX] = AREA
    user.ctx.tlb.enabled = request.param
    user.ctx.tlb.select(user.words)
    return user


def put(guest: Guest, address: int, value: int) -> None:
    guest.memory.write(address, value.to_bytes(16, "little"))


def get(guest: Guest, address: int, size: int = 16) -> int:
    return int.from_bytes(guest.memory.read(address, size), "little")


@pytest.mark.parametrize("code", LOADS.values(), ids=LOADS)
def test_load_of_a_register(guest: Guest, code: str) -> None:
    put(guest, AREA, VALUE)
    for _ in range(2):
        guest.ctx.fpu.xmm[1] = 0
        guest.run(code)
        assert guest.ctx.fpu.xmm[1] == VALUE


@pytest.mark.parametrize("code", STORES.values(), ids=STORES)
def test_store_of_a_register(guest: Guest, code: str) -> None:
    guest.ctx.fpu.xmm[1] = VALUE
    for _ in range(2):
        put(guest, AREA, 0)
        put(guest, AREA + 16, ONES)
        guest.run(code)
        assert (get(guest, AREA), get(guest, AREA + 16)) == (VALUE, ONES)


@pytest.mark.parametrize("code", (ALIGNED_LOADS | ALIGNED_STORES).values())
@pytest.mark.parametrize("offset", [1, 8, 15])
def test_aligned_moves_fault_at_other_addresses(guest: Guest, code: str, offset: int) -> None:
    guest.run(code)
    guest.words[RBX] = AREA + offset
    assert guest.fault_of(code) == (GP, 0)


@pytest.mark.parametrize("code", ["66 0f fc 0b", "0f 58 0b", "66 0f 70 0b 00", "0f c6 0b 00"])
def test_operands_of_operations_must_be_aligned(guest: Guest, code: str) -> None:
    guest.run(code)
    guest.words[RBX] = AREA + 8
    assert guest.fault_of(code) == (GP, 0)


@pytest.mark.parametrize(
    "code", [UNALIGNED_LOADS["movdqu"], UNALIGNED_LOADS["lddqu"], UNALIGNED_LOADS["movups"]]
)
def test_unaligned_load_crosses_pages(guest: Guest, code: str) -> None:
    put(guest, AREA + 0xFF9, VALUE)
    guest.words[RBX] = AREA + 0xFF9
    guest.run(code)
    assert guest.ctx.fpu.xmm[1] == VALUE


@pytest.mark.parametrize("code", UNALIGNED_STORES.values(), ids=UNALIGNED_STORES)
def test_store_across_pages_happens_whole_or_not_at_all(guest: Guest, code: str) -> None:
    guest.ctx.fpu.xmm[1] = VALUE
    guest.words[RBX] = AREA + 0xFF9
    put(guest, AREA + 0xFF0, ONES)
    guest.write_protect(AREA + 0x1000)
    assert guest.fault_of(code) == (PF, 0x7)
    assert get(guest, AREA + 0xFF0) == ONES


def test_load_across_pages_with_the_second_missing_loads_nothing(guest: Guest) -> None:
    guest.ctx.fpu.xmm[1] = 5
    guest.words[RBX] = AREA + 0xFF9
    guest.unmap(AREA + 0x1000)
    assert guest.fault_of(UNALIGNED_LOADS["movdqu"]) == (PF, 0x4)
    assert guest.ctx.fpu.xmm[1] == 5


def test_linear_address_comes_before_alignment_and_alignment_before_paging(guest: Guest) -> None:
    guest.words[RBP] = NON_CANONICAL + 1
    # movaps xmm1, [rbp]
    assert guest.fault_of("0f 28 4d 00") == (SS, 0)
    guest.unmap(AREA)
    guest.words[RBX] = AREA + 1
    assert guest.fault_of(ALIGNED_LOADS["movaps"]) == (GP, 0)


def test_upper_half_is_out_of_reach_for_user_code(guest: Guest) -> None:
    guest.words[RBX] = 0xFFFF_8000_0000_0000 + AREA
    guest.words[RBP] = guest.words[RBX] + 1
    assert guest.fault_of(UNALIGNED_LOADS["movups"]) == (GP, 0)
    assert guest.fault_of("0f 28 4d 00") == (SS, 0)


def test_alignment_check_concerns_eight_byte_moves(guest: Guest) -> None:
    guest.ctx.tlb.enabled = False
    guest.words[CR0] |= CR0_AM
    guest.words[RFLAGS] |= RFLAGS_AC
    guest.words[RBX] = AREA + 1
    # movq xmm1, [rbx]
    assert guest.fault_of("f3 0f 7e 0b") == (AC, 0)


# ------------------------------------------------------------------------------------------------- parts of registers


@pytest.mark.parametrize(
    "code, expected",
    [
        ("66 0f 6e 0b", LOW & 0xFFFF_FFFF),  # movd xmm1, [rbx]
        ("66 48 0f 6e 0b", LOW),  # movq xmm1, [rbx]
        ("f3 0f 7e 0b", LOW),  # movq xmm1, [rbx]
        ("f3 0f 10 0b", LOW & 0xFFFF_FFFF),  # movss xmm1, [rbx]
        ("f2 0f 10 0b", LOW),  # movsd xmm1, [rbx]
        ("0f 12 0b", ONES >> 64 << 64 | LOW),  # movlps xmm1, [rbx]
        ("66 0f 12 0b", ONES >> 64 << 64 | LOW),  # movlpd xmm1, [rbx]
        ("0f 16 0b", LOW << 64 | ONES >> 64),  # movhps xmm1, [rbx]
        ("66 0f 16 0b", LOW << 64 | ONES >> 64),  # movhpd xmm1, [rbx]
        ("f2 0f 12 0b", LOW << 64 | LOW),  # movddup xmm1, [rbx]
        ("f3 0f 12 0b", 0x14131211_14131211_04030201_04030201),  # movsldup xmm1, [rbx]
        ("f3 0f 16 0b", 0x18171615_18171615_08070605_08070605),  # movshdup xmm1, [rbx]
    ],
)
def test_partial_load(guest: Guest, code: str, expected: int) -> None:
    put(guest, AREA, VALUE)
    guest.ctx.fpu.xmm[1] = ONES
    guest.run(code)
    assert guest.ctx.fpu.xmm[1] == expected


@pytest.mark.parametrize(
    "code, stored, size",
    [
        ("66 0f 7e 0b", LOW & 0xFFFF_FFFF, 4),  # movd [rbx], xmm1
        ("66 48 0f 7e 0b", LOW, 8),  # movq [rbx], xmm1
        ("66 0f d6 0b", LOW, 8),  # movq [rbx], xmm1
        ("f3 0f 11 0b", LOW & 0xFFFF_FFFF, 4),  # movss [rbx], xmm1
        ("f2 0f 11 0b", LOW, 8),  # movsd [rbx], xmm1
        ("0f 13 0b", LOW, 8),  # movlps [rbx], xmm1
        ("66 0f 13 0b", LOW, 8),  # movlpd [rbx], xmm1
        ("0f 17 0b", HIGH, 8),  # movhps [rbx], xmm1
        ("66 0f 17 0b", HIGH, 8),  # movhpd [rbx], xmm1
    ],
)
def test_partial_store_leaves_its_surroundings(guest: Guest, code: str, stored: int, size: int) -> None:
    put(guest, AREA, ONES)
    guest.ctx.fpu.xmm[1] = VALUE
    guest.run(code)
    assert get(guest, AREA) == ONES >> 8 * size << 8 * size | stored


@pytest.mark.parametrize(
    "code, expected",
    [
        ("f3 0f 10 ca", ONES >> 32 << 32 | LOW & 0xFFFF_FFFF),  # movss xmm1, xmm2
        ("f2 0f 10 ca", ONES >> 64 << 64 | LOW),  # movsd xmm1, xmm2
        ("f2 0f 11 d1", ONES >> 64 << 64 | LOW),  # movsd xmm1, xmm2, the other encoding
        ("f3 0f 7e ca", LOW),  # movq xmm1, xmm2
        ("66 0f d6 d1", LOW),  # movq xmm1, xmm2, the other encoding
        ("0f 16 ca", LOW << 64 | ONES >> 64),  # movlhps xmm1, xmm2
        ("0f 12 ca", ONES >> 64 << 64 | HIGH),  # movhlps xmm1, xmm2
    ],
)
def test_move_between_registers_merges_or_clears(guest: Guest, code: str, expected: int) -> None:
    guest.ctx.fpu.xmm[1], guest.ctx.fpu.xmm[2] = ONES, VALUE
    guest.run(code)
    assert guest.ctx.fpu.xmm[1] == expected


def test_string_instruction_of_the_same_name_is_no_sse_move(guest: Guest) -> None:
    guest.words[RDI], guest.words[RSI] = AREA + 64, AREA
    put(guest, AREA, VALUE)
    guest.run("a5")
    assert get(guest, AREA + 64, 8) == LOW & 0xFFFF_FFFF


def test_moves_to_general_registers_clear_the_upper_half(guest: Guest) -> None:
    guest.ctx.fpu.xmm[1] = ONES
    guest.words[RAX] = (1 << 64) - 1
    # movd eax, xmm1
    guest.run("66 0f 7e c8")
    assert guest.words[RAX] == 0xFFFF_FFFF


def test_masks_of_signs(guest: Guest) -> None:
    guest.ctx.fpu.xmm[1] = sum(0x80 << 8 * byte for byte in (0, 3, 7, 8, 15))
    guest.run("66 0f d7 c1")  # pmovmskb eax, xmm1
    assert guest.words[RAX] == 1 << 0 | 1 << 3 | 1 << 7 | 1 << 8 | 1 << 15
    guest.run("0f 50 c1")  # movmskps eax, xmm1
    assert guest.words[RAX] == 0b1011
    guest.run("66 0f 50 c1")  # movmskpd eax, xmm1
    assert guest.words[RAX] == 0b11


# ------------------------------------------------------------------------------------------------------------- MMX


def test_mmx_moves_enter_mmx_state(guest: Guest) -> None:
    fpu = guest.ctx.fpu
    fpu.top, fpu.ftw = 3, 0
    put(guest, AREA, VALUE)
    guest.run("0f 6f 0b")  # movq mm1, [rbx]
    assert (fpu.top, fpu.ftw, fpu.registers[1]) == (0, 0xFF, 0xFFFF << 64 | LOW)
    guest.words[RBX] = AREA + 16
    guest.run("0f e7 0b")  # movntq [rbx], mm1
    assert get(guest, AREA + 16, 8) == LOW


def test_faulting_mmx_move_does_not_enter_mmx_state(guest: Guest) -> None:
    fpu = guest.ctx.fpu
    fpu.top, fpu.ftw = 3, 0
    guest.unmap(AREA)
    assert guest.fault_of("0f 6f 0b") == (PF, 0x4)
    assert guest.fault_of("0f 7f 0b") == (PF, 0x6)
    assert (fpu.top, fpu.ftw) == (3, 0)


def test_moves_between_mmx_and_xmm(guest: Guest) -> None:
    fpu = guest.ctx.fpu
    fpu.xmm[1] = VALUE
    guest.run("f2 0f d6 d1")  # movdq2q mm2, xmm1
    assert fpu.registers[2] == 0xFFFF << 64 | LOW
    fpu.xmm[1] = ONES
    guest.run("f3 0f d6 ca")  # movq2dq xmm1, mm2
    assert fpu.xmm[1] == LOW


# ---------------------------------------------------------------------------------------------------- masked stores


@pytest.fixture
def masked(guest: Guest) -> Guest:
    """MASKMOVDQU XMM1, XMM2 at AREA, with a mask of bytes 0, 1 and 9."""
    guest.words[RDI] = AREA
    guest.ctx.fpu.xmm[1] = VALUE
    guest.ctx.fpu.xmm[2] = 0x80 | 0x80 << 8 | 0x7F << 16 | 0xFF << 72
    return guest


MASKMOVDQU = "66 0f f7 ca"


def test_masked_store_stores_selected_bytes(masked: Guest) -> None:
    put(masked, AREA, ONES)
    masked.run(MASKMOVDQU)
    selected = 0xFFFF | 0xFF << 72
    assert get(masked, AREA) == ONES & ~selected | VALUE & selected


def test_masked_store_needs_no_alignment_and_no_access_to_other_bytes(masked: Guest) -> None:
    masked.unmap(AREA + 0x1000)
    masked.words[RDI] = AREA + 0x1000 - 10
    masked.run(MASKMOVDQU)
    assert get(masked, AREA + 0x1000 - 10, 2) == LOW & 0xFFFF


def test_masked_store_happens_whole_or_not_at_all(masked: Guest) -> None:
    put(masked, AREA + 0xFF0, ONES)
    masked.unmap(AREA + 0x1000)
    masked.words[RDI] = AREA + 0x1000 - 9
    assert masked.fault_of(MASKMOVDQU) == (PF, 0x6)
    assert get(masked, AREA + 0xFF0) == ONES


def test_masked_store_of_nothing_accesses_nothing(masked: Guest) -> None:
    masked.ctx.fpu.xmm[2] = 0
    masked.words[RDI] = NON_CANONICAL
    masked.run(MASKMOVDQU)


def test_masked_store_of_an_mmx_register(masked: Guest) -> None:
    masked.ctx.fpu.registers[1], masked.ctx.fpu.registers[2] = LOW, 0x80 << 56
    put(masked, AREA, 0)
    masked.run("0f f7 ca")
    assert get(masked, AREA) == LOW >> 56 << 56
