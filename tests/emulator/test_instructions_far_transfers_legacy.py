"""Far JMP, CALL and RET in protected mode (with 16-bit and 32-bit gates), real and virtual-8086 mode."""

from __future__ import annotations

import pytest
from emulator_guest import (
    ABSENT_CS,
    CONFORMING_CS,
    DPL1,
    DPL3,
    KERNEL_CS32,
    KERNEL_SS,
    TSS_SELECTOR,
    USER_CS32,
    USER_SS,
    Guest,
)
from flat_protected_mode import (
    CODE16,
    DATA,
    DATA16,
    FLAT,
    GATE,
    RING0_STACK,
    STACK,
    TSS,
    enter_flat_mode,
    frame32,
    set_gate,
)
from flat_protected_mode import START as FLAT_START
from legacy_modes import CODE_BASE, START, enter_real_mode, enter_virtual_8086_mode, run

from lasskvm.emulator.faults import GuestFault, Unhandleable
from lasskvm.state import CPL, LIMIT, RIP, RSP, Segment, segment_word
from lasskvm.x86.descriptors import (
    SYS_CALL_GATE,
    SYS_CALL_GATE16,
    SYS_INTERRUPT_GATE,
    SYS_TASK_GATE,
    SYS_TSS16_AVAILABLE,
    SYS_TSS_AVAILABLE,
    SYS_TSS_BUSY,
    TSS16_SP0,
    TSS32_ESP0,
    make_segment,
)
from lasskvm.x86.exceptions import GP, NP
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.exceptions import TS as INVALID_TSS
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_DATA,
    AR_DB,
    AR_DPL_SHIFT,
    AR_G,
    AR_L,
    AR_P,
    AR_TSS16_BUSY,
    AR_UNUSABLE,
    CS,
    DS,
    ES,
    FS,
    GS,
    SS,
    TR,
)

ENTRY = 0x6789
CALL_GATE, CALL_GATE16 = AR_P | SYS_CALL_GATE | DPL3, AR_P | SYS_CALL_GATE16 | DPL3


@pytest.fixture
def kernel32(guest: Guest) -> Guest:
    """Flat 32-bit kernel code."""
    enter_flat_mode(guest)
    return guest


@pytest.fixture
def user32(guest: Guest) -> Guest:
    """Flat 32-bit user code."""
    enter_flat_mode(guest, cpl=3)
    return guest


def far(opcode: str, selector: int, offset: int) -> str:
    """JMP (ea) or CALL (9a) with a 32-bit offset."""
    return opcode + offset.to_bytes(4, "little").hex() + selector.to_bytes(2, "little").hex()


def jmp(selector: int, offset: int = ENTRY) -> str:
    return far("ea", selector, offset)


def call(selector: int, offset: int = ENTRY) -> str:
    return far("9a", selector, offset)


def segment(guest: Guest, number: int) -> Segment:
    return guest.state.segment(number)


def fault_of(guest: Guest, code: str) -> tuple[int, int | None]:
    """What *code* faults with; the state must be as before."""
    before = guest.snapshot()
    with pytest.raises(GuestFault) as caught:
        run(guest, code)
    assert guest.snapshot() == before, "a faulting instruction changed the state"
    return caught.value.vector, caught.value.error_code


def push_frame(guest: Guest, *values: int, size: int = 4) -> None:
    for number, value in enumerate(values):
        guest.store(guest.words[RSP] + size * number, size, value)


# ------------------------------------------------------------------------------------ protected mode, no gate


def test_jump_through_memory_and_direct(kernel32: Guest) -> None:
    run(kernel32, jmp(KERNEL_CS32))
    assert (kernel32.words[RIP], segment(kernel32, CS).selector) == (ENTRY, KERNEL_CS32)
    kernel32.store(DATA, 4, 0x4321)
    kernel32.store(DATA + 4, 2, KERNEL_CS32)
    run(kernel32, "ff2d" + DATA.to_bytes(4, "little").hex())
    assert kernel32.words[RIP] == 0x4321


def test_jump_to_16_bit_code_keeps_all_32_bits_of_the_offset(kernel32: Guest) -> None:
    assert fault_of(kernel32, jmp(CODE16, 0x10000)) == (GP, 0)
    run(kernel32, jmp(CODE16, 0xFFFF))
    assert (kernel32.words[RIP], segment(kernel32, CS).attributes & AR_DB) == (0xFFFF, 0)


def test_l_bit_means_nothing_outside_ia32e_mode(kernel32: Guest) -> None:
    kernel32.set_descriptor(GATE, make_segment(0, 0xFFFF, (AR_CODE32 | AR_L) & ~AR_G))
    run(kernel32, jmp(GATE))
    assert kernel32.words[RIP] == ENTRY
    enter_flat_mode(kernel32)
    assert fault_of(kernel32, jmp(GATE, 0x10000)) == (GP, 0)


@pytest.mark.parametrize("opcode", ["ea", "9a"])
@pytest.mark.parametrize(
    ("selector", "fault"),
    [
        (0, (GP, 0)),
        (0x100, (GP, 0x100)),
        (KERNEL_SS, (GP, KERNEL_SS)),
        (USER_CS32, (GP, USER_CS32 & ~3)),
        (KERNEL_CS32 | 3, (GP, KERNEL_CS32)),
        (ABSENT_CS, (NP, ABSENT_CS)),
        (TSS_SELECTOR, (GP, TSS_SELECTOR)),
        (0x0C, (GP, 0x0C)),
    ],
    ids=["null", "beyond", "data", "outer", "rpl", "absent", "busy tss", "no ldt"],
)
def test_forbidden_selectors(kernel32: Guest, opcode: str, selector: int, fault: tuple[int, int]) -> None:
    kernel32.state.set_segment(6, Segment(0, 0, 0, AR_UNUSABLE))
    assert fault_of(kernel32, far(opcode, selector, ENTRY)) == fault


def test_call_pushes_cs_and_eip(kernel32: Guest) -> None:
    run(kernel32, call(KERNEL_CS32))
    assert (kernel32.words[RIP], kernel32.words[RSP]) == (ENTRY, STACK - 8)
    assert frame32(kernel32, 2) == [FLAT_START + 7, KERNEL_CS32]


def test_call_needs_room_before_its_target_counts(kernel32: Guest) -> None:
    kernel32.words[segment_word(SS, LIMIT)] = STACK - 2
    assert fault_of(kernel32, call(CODE16, 0x10000)) == (STACK_FAULT, 0)
    kernel32.words[segment_word(SS, LIMIT)] = STACK - 1
    assert fault_of(kernel32, call(CODE16, 0x10000)) == (GP, 0)


def test_call_on_a_16_bit_stack_wraps_and_keeps_the_upper_half(kernel32: Guest) -> None:
    kernel32.state.set_segment(SS, Segment(DATA16, 0x10000, 0xFFFF, AR_DATA & ~AR_DB & ~AR_G))
    kernel32.words[RSP] = 0xABCD0004
    run(kernel32, call(KERNEL_CS32))
    assert kernel32.words[RSP] == 0xABCDFFFC
    assert (kernel32.load(0x10000, 4), kernel32.load(0x1FFFC, 4)) == (KERNEL_CS32, FLAT_START + 7)


# --------------------------------------------------------------------------------- 32-bit and 16-bit call gates


def test_gate_switches_to_the_stack_in_the_tss_and_copies_parameters(user32: Guest) -> None:
    push_frame(user32, 0x1111, 0x2222, 0x3333)
    set_gate(user32, KERNEL_CS32, 0x12345, CALL_GATE, parameters=3)
    run(user32, call(GATE | 3, 0xDEAD))
    words = user32.words
    assert (words[RIP], words[CPL], words[RSP]) == (0x12345, 0, RING0_STACK - 28)
    assert segment(user32, CS).selector == KERNEL_CS32
    assert segment(user32, SS).selector == KERNEL_SS
    assert frame32(user32, 7) == [FLAT_START + 7, USER_CS32, 0x1111, 0x2222, 0x3333, STACK, USER_SS]


def test_return_from_a_gate_releases_the_parameters_of_both_stacks(user32: Guest) -> None:
    set_gate(user32, KERNEL_CS32, 0x12345, CALL_GATE, parameters=3)
    run(user32, call(GATE | 3))
    run(user32, "ca0c00")
    words = user32.words
    assert (words[RIP], words[CPL], words[RSP]) == (FLAT_START + 7, 3, STACK + 12)
    assert segment(user32, SS).selector == USER_SS
    assert segment(user32, DS).selector == USER_SS


def test_16_bit_gate_pushes_words_and_truncates_its_entry(user32: Guest) -> None:
    push_frame(user32, 0x1111, 0x2222, size=2)
    set_gate(user32, KERNEL_CS32, 0x1_2345, CALL_GATE16, parameters=2)
    run(user32, call(GATE))
    assert (user32.words[RIP], user32.words[RSP]) == (0x2345, RING0_STACK - 12)
    assert frame32(user32, 6, size=2) == [FLAT_START + 7, USER_CS32, 0x1111, 0x2222, STACK & 0xFFFF, USER_SS]


def test_gate_takes_its_stack_from_a_16_bit_tss(user32: Guest) -> None:
    user32.state.set_segment(TR, Segment(TSS_SELECTOR, TSS, 0x2B, AR_TSS16_BUSY))
    user32.store(TSS + TSS16_SP0, 2, 0x7000)
    user32.store(TSS + TSS16_SP0 + 2, 2, KERNEL_SS)
    set_gate(user32, KERNEL_CS32, ENTRY, CALL_GATE)
    run(user32, call(GATE))
    assert (user32.words[RSP], user32.words[CPL]) == (0x7000 - 16, 0)


def test_gate_to_the_same_level_pushes_a_return_address_of_the_gates_size(kernel32: Guest) -> None:
    set_gate(kernel32, KERNEL_CS32, ENTRY, CALL_GATE16, parameters=5)
    run(kernel32, call(GATE))
    assert (kernel32.words[RIP], kernel32.words[RSP]) == (ENTRY, STACK - 4)
    assert frame32(kernel32, 2, size=2) == [FLAT_START + 7, KERNEL_CS32]


def test_gate_to_conforming_code_keeps_the_level(user32: Guest) -> None:
    set_gate(user32, CONFORMING_CS, ENTRY, CALL_GATE)
    run(user32, call(GATE))
    assert (user32.words[CPL], user32.words[RSP], segment(user32, CS).selector) == (
        3,
        STACK - 8,
        CONFORMING_CS | 3,
    )


def test_jump_through_a_gate(kernel32: Guest) -> None:
    set_gate(kernel32, KERNEL_CS32, ENTRY, CALL_GATE16)
    run(kernel32, jmp(GATE, 0x1000))
    assert (kernel32.words[RIP], kernel32.words[RSP]) == (ENTRY, STACK)


@pytest.mark.parametrize(
    ("attributes", "selector", "entry", "fault"),
    [
        (AR_P | SYS_CALL_GATE, KERNEL_CS32, ENTRY, (GP, GATE)),
        (SYS_CALL_GATE | DPL3, KERNEL_CS32, ENTRY, (NP, GATE)),
        (AR_P | SYS_INTERRUPT_GATE | DPL3, KERNEL_CS32, ENTRY, (GP, GATE)),
        (CALL_GATE, 0, ENTRY, (GP, 0)),
        (CALL_GATE, KERNEL_SS, ENTRY, (GP, KERNEL_SS)),
        (CALL_GATE, ABSENT_CS, ENTRY, (NP, ABSENT_CS)),
        (CALL_GATE, CODE16, 0x10000, (GP, 0)),
    ],
    ids=["dpl", "absent", "interrupt gate", "null", "data", "absent code", "beyond the limit"],
)
def test_forbidden_gates(
    user32: Guest, attributes: int, selector: int, entry: int, fault: tuple[int, int]
) -> None:
    set_gate(user32, selector, entry, attributes)
    assert fault_of(user32, call(GATE | 3)) == fault


@pytest.mark.parametrize(
    ("selector", "vector", "error_code"),
    [
        (0, INVALID_TSS, 0),
        (0x100, INVALID_TSS, 0x100),
        (USER_SS, INVALID_TSS, USER_SS & ~3),
        (KERNEL_SS | 1, INVALID_TSS, KERNEL_SS),
        (KERNEL_CS32, INVALID_TSS, KERNEL_CS32),
        (DATA16, STACK_FAULT, DATA16),
    ],
    ids=["null", "beyond", "user", "rpl", "code", "absent"],
)
def test_bad_stack_segments_in_the_tss(user32: Guest, selector: int, vector: int, error_code: int) -> None:
    user32.set_descriptor(DATA16, make_segment(0, 0xFFFF, AR_DATA & ~AR_P))
    set_gate(user32, KERNEL_CS32, ENTRY, CALL_GATE)
    user32.store(TSS + TSS32_ESP0 + 4, 4, selector)
    assert fault_of(user32, call(GATE)) == (vector, error_code)


def test_tss_must_reach_to_the_stack_selector(user32: Guest) -> None:
    set_gate(user32, KERNEL_CS32, ENTRY, CALL_GATE)
    user32.words[segment_word(TR, LIMIT)] = TSS32_ESP0 + 4
    assert fault_of(user32, call(GATE)) == (INVALID_TSS, TSS_SELECTOR)


def test_room_on_the_new_stack_includes_the_parameters(user32: Guest) -> None:
    user32.set_descriptor(DATA16, make_segment(0, 0xFFFF, AR_DATA & ~AR_G & ~AR_DB))
    user32.store(TSS + TSS32_ESP0, 4, 0x10)
    user32.store(TSS + TSS32_ESP0 + 4, 4, DATA16)
    set_gate(user32, CODE16, 0x10000, CALL_GATE)
    assert fault_of(user32, call(GATE)) == (GP, 0), "exactly enough room: the entry is judged next"
    user32.store(TSS + TSS32_ESP0, 4, 0x11)
    set_gate(user32, CODE16, 0x10000, CALL_GATE, parameters=1)
    assert fault_of(user32, call(GATE)) == (STACK_FAULT, DATA16)


def test_parameters_beyond_the_callers_stack_are_a_stack_fault_of_the_caller(user32: Guest) -> None:
    user32.words[segment_word(SS, LIMIT)] = STACK + 3
    set_gate(user32, KERNEL_CS32, ENTRY, CALL_GATE, parameters=2)
    assert fault_of(user32, call(GATE)) == (STACK_FAULT, 0)


@pytest.mark.parametrize("opcode", ["ea", "9a"])
@pytest.mark.parametrize("gate_type", [SYS_TASK_GATE, SYS_TSS_AVAILABLE, SYS_TSS16_AVAILABLE])
def test_tasks_are_not_implemented_but_checked(user32: Guest, opcode: str, gate_type: int) -> None:
    code = far(opcode, GATE, 0)
    set_gate(user32, TSS_SELECTOR, 0, AR_P | gate_type)
    assert fault_of(user32, code) == (GP, GATE)
    set_gate(user32, TSS_SELECTOR, 0, gate_type | DPL3)
    assert fault_of(user32, code) == (NP, GATE)
    set_gate(user32, TSS_SELECTOR, 0, AR_P | gate_type | DPL3)
    with pytest.raises(Unhandleable):
        run(user32, code)


def test_busy_task_is_a_general_protection(kernel32: Guest) -> None:
    set_gate(kernel32, 0, 0, AR_P | SYS_TSS_BUSY)
    assert fault_of(kernel32, jmp(GATE)) == (GP, GATE)


# -------------------------------------------------------------------------------------- far RET, protected mode


@pytest.mark.parametrize(("code", "size"), [("cb", 4), ("66cb", 2)])
def test_return_to_the_same_level(kernel32: Guest, code: str, size: int) -> None:
    push_frame(kernel32, ENTRY, KERNEL_CS32, size=size)
    run(kernel32, code)
    assert (kernel32.words[RIP], kernel32.words[RSP]) == (ENTRY, STACK + 2 * size)


def test_return_to_user_mode_takes_the_kernels_data_segments_away(kernel32: Guest) -> None:
    kernel32.state.set_segment(ES, Segment(USER_SS, 0, FLAT, AR_DATA | DPL3))
    kernel32.state.set_segment(FS, Segment(2, 0, FLAT, AR_DATA | DPL3))
    push_frame(kernel32, ENTRY, USER_CS32, 0x7000, USER_SS)
    run(kernel32, "cb")
    assert (kernel32.words[RIP], kernel32.words[CPL], kernel32.words[RSP]) == (ENTRY, 3, 0x7000)
    for number in (DS, GS):
        assert segment(kernel32, number) == Segment(0, 0, 0, AR_UNUSABLE)
    assert segment(kernel32, ES).selector == USER_SS
    assert segment(kernel32, FS).attributes & AR_UNUSABLE


def test_return_to_a_16_bit_stack_leaves_the_upper_half_of_esp(kernel32: Guest) -> None:
    kernel32.set_descriptor(DATA16, make_segment(0, 0xFFFF, AR_DATA & ~AR_DB & ~AR_G | DPL3))
    kernel32.words[RSP] = 0x2_3000
    push_frame(kernel32, ENTRY, USER_CS32, 0xFFFF1234, DATA16 | 3)
    run(kernel32, "cb")
    assert kernel32.words[RSP] == 0x2_1234


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        ((ENTRY, 0), (GP, 0)),
        ((ENTRY, KERNEL_SS), (GP, KERNEL_SS)),
        ((ENTRY, USER_CS32 & ~3), (GP, USER_CS32 & ~3)),
        ((ENTRY, ABSENT_CS), (NP, ABSENT_CS)),
        ((0x10000, CODE16), (GP, 0)),
        ((ENTRY, USER_CS32, 0x7000, 0), (GP, 0)),
        ((ENTRY, USER_CS32, 0x7000, 3), (GP, 0)),
        ((ENTRY, USER_CS32, 0x7000, KERNEL_SS), (GP, KERNEL_SS)),
        ((ENTRY, USER_CS32, 0x7000, 0x103), (GP, 0x100)),
    ],
    ids=["null", "data", "rpl", "absent", "limit", "null ss", "null ss rpl 3", "kernel ss", "ss beyond"],
)
def test_forbidden_returns(kernel32: Guest, frame: tuple[int, ...], fault: tuple[int, int]) -> None:
    push_frame(kernel32, *frame)
    assert fault_of(kernel32, "cb") == fault


def test_return_frame_must_lie_within_the_stack(kernel32: Guest) -> None:
    push_frame(kernel32, ENTRY, USER_CS32, 0x7000, USER_SS)
    for last, fault in ((6, (STACK_FAULT, 0)), (14, (STACK_FAULT, 0))):
        kernel32.words[segment_word(SS, LIMIT)] = STACK + last
        assert fault_of(kernel32, "cb") == fault
    kernel32.words[segment_word(SS, LIMIT)] = STACK + 15
    run(kernel32, "cb")
    assert kernel32.words[CPL] == 3


def test_return_to_ring_1_needs_its_own_stack_segment(kernel32: Guest) -> None:
    kernel32.set_descriptor(GATE, make_segment(0, FLAT, AR_CODE32 | DPL1))
    push_frame(kernel32, ENTRY, GATE | 1, 0x7000, 1)
    assert fault_of(kernel32, "cb") == (GP, 0)


# ----------------------------------------------------------------------------- real and virtual-8086 mode


def enter_virtual_8086(guest: Guest) -> None:
    enter_virtual_8086_mode(guest, iopl=0)


@pytest.fixture(params=[enter_real_mode, enter_virtual_8086], ids=["real", "virtual-8086"])
def shifted(guest: Guest, request: pytest.FixtureRequest) -> Guest:
    """Real or virtual-8086 mode."""
    request.param(guest)
    return guest


def test_real_mode_jump_makes_the_base_of_the_selector(shifted: Guest) -> None:
    before = segment(shifted, CS)
    run(shifted, "ea78563412")
    assert shifted.words[RIP] == 0x5678
    assert segment(shifted, CS).base == 0x12340
    assert segment(shifted, CS).limit == before.limit
    assert shifted.words[CPL] == before.attributes >> AR_DPL_SHIFT & 3


@pytest.mark.parametrize(("code", "size"), [("9a78563412", 2), ("669a785600003412", 4)])
def test_real_mode_call_and_return(shifted: Guest, code: str, size: int) -> None:
    words = shifted.words
    old = segment(shifted, CS).selector
    stack = segment(shifted, SS).base + words[RSP]
    run(shifted, code)
    assert (words[RIP], segment(shifted, CS).base) == (0x5678, 0x12340)
    pushed = [shifted.load(stack - size * number, size) for number in (2, 1)]
    assert pushed == [START + len(code) // 2, old]
    run(shifted, "cb" if size == 2 else "66cb")
    assert (words[RIP], segment(shifted, CS).base) == (START + len(code) // 2, CODE_BASE)
    assert segment(shifted, SS).base + words[RSP] == stack


@pytest.mark.parametrize("code", ["66ea000001003412", "669a000001003412"])
def test_real_mode_target_must_lie_within_the_limit(shifted: Guest, code: str) -> None:
    before = shifted.snapshot()
    with pytest.raises(GuestFault) as caught:
        run(shifted, code)
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)
    assert shifted.snapshot() == before


def test_real_mode_return_releases_parameters(shifted: Guest) -> None:
    words = shifted.words
    top = words[RSP]
    shifted.store(segment(shifted, SS).base + top, 4, 0x2000 << 16 | 0x1234)
    run(shifted, "ca0600")
    assert (words[RIP], words[RSP], segment(shifted, CS).base) == (0x1234, top + 4 + 6, 0x20000)


@pytest.mark.parametrize(("code", "vector"), [("9a78563412", STACK_FAULT), ("cb", STACK_FAULT)])
def test_real_mode_stack_must_not_wrap_within_a_word(shifted: Guest, code: str, vector: int) -> None:
    shifted.words[RSP] = 0xFFFF if code == "cb" else 1
    with pytest.raises(GuestFault) as caught:
        run(shifted, code)
    assert (caught.value.vector, caught.value.error_code) == (vector, 0)
