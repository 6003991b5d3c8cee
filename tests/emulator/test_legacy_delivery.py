"""Event delivery outside IA-32e mode: real mode, 16-bit and 32-bit gates, virtual-8086 mode."""

from __future__ import annotations

import pytest
from emulator_guest import DPL3, KERNEL_CS, KERNEL_CS32, KERNEL_SS, USER_CS32, USER_SS, Guest

from lasskvm.emulator.events import Event, EventKind, deliver_event
from lasskvm.emulator.faults import GuestFault, TripleFault, Unhandleable
from lasskvm.emulator.legacy_delivery import deliver_legacy
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    CR0,
    CR4,
    EFER,
    GDT_BASE,
    IDT_BASE,
    IDT_LIMIT,
    INTERRUPT_SHADOW,
    LIMIT,
    RFLAGS,
    RIP,
    RSP,
    SELECTOR,
    Segment,
    segment_word,
)
from lasskvm.x86.descriptors import (
    SYS_INTERRUPT_GATE,
    SYS_INTERRUPT_GATE16,
    SYS_TASK_GATE,
    SYS_TRAP_GATE,
    SYS_TSS_BUSY,
    TSS16_SP0,
    TSS32_BYTES,
    TSS32_ESP0,
    make_gate,
    make_segment,
)
from lasskvm.x86.exceptions import BP, DE, ERROR_EXT, ERROR_IDT, GP, NP, PF, SS, TS, UD
from lasskvm.x86.registers import (
    AR_CODE,
    AR_CODE32,
    AR_DATA,
    AR_DB,
    AR_EXPAND_DOWN,
    AR_P,
    AR_REAL_MODE,
    AR_TSS16_BUSY,
    AR_UNUSABLE,
    AR_WRITABLE,
    CR0_ET,
    CR0_PE,
    CS,
    DS,
    ES,
    FS,
    GS,
    RFLAGS_AC,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    TR,
)
from lasskvm.x86.registers import SS as SS_REGISTER

GDT, IDT, TSS = 0x1000, 0x3000, 0x4000
HANDLER, STACK, RING0_STACK = 0x10000, 0x20000, 0x30000
TSS_SELECTOR = 0x30
FLAT = 0xFFFFFFFF
EXCEPTION, SOFTWARE = 0, 1


def set_gate(guest: Guest, vector: int, offset: int, selector: int, attributes: int) -> None:
    guest.memory.store(IDT + 8 * vector, 8, make_gate(offset, selector, attributes, 0))


@pytest.fixture
def protected(guest: Guest) -> Guest:
    """32-bit protected mode without paging, at CPL 0."""
    words = guest.words
    words[CR0], words[CR4], words[EFER] = CR0_PE | CR0_ET, 0, 0
    words[GDT_BASE], words[IDT_BASE], words[IDT_LIMIT] = GDT, IDT, 0x7FF
    guest.state.set_segment(CS, Segment(KERNEL_CS32, 0, FLAT, AR_CODE32))
    guest.state.set_segment(SS_REGISTER, Segment(KERNEL_SS, 0, FLAT, AR_DATA))
    guest.state.set_segment(TR, Segment(TSS_SELECTOR, TSS, TSS32_BYTES - 1, AR_P | SYS_TSS_BUSY))
    words[RIP], words[RSP] = 0x5000, STACK
    guest.memory.store(TSS + TSS32_ESP0, 4, RING0_STACK)
    guest.memory.store(TSS + TSS32_ESP0 + 4, 4, KERNEL_SS)
    for vector in range(256):
        set_gate(guest, vector, HANDLER + 16 * vector, KERNEL_CS32, AR_P | SYS_INTERRUPT_GATE)
    return guest


@pytest.fixture
def user32(protected: Guest) -> Guest:
    """The same at CPL 3."""
    protected.words[CPL] = 3
    protected.state.set_segment(CS, Segment(USER_CS32, 0, FLAT, AR_CODE32 | DPL3))
    protected.state.set_segment(SS_REGISTER, Segment(USER_SS, 0, FLAT, AR_DATA | DPL3))
    return protected


@pytest.fixture
def virtual_8086(protected: Guest) -> Guest:
    """A virtual-8086 task."""
    words = protected.words
    words[CPL] = 3
    words[RFLAGS] = RFLAGS_FIXED | RFLAGS_VM | RFLAGS_IF
    for number, selector in (
        (CS, 0x800),
        (SS_REGISTER, 0x900),
        (DS, 0xA00),
        (ES, 0xB00),
        (FS, 0xC00),
        (GS, 0xD00),
    ):
        protected.state.set_segment(number, Segment(selector, selector << 4, 0xFFFF, AR_REAL_MODE | DPL3))
    words[RIP], words[RSP] = 0x10, 0x100
    return protected


@pytest.fixture
def real(guest: Guest) -> Guest:
    """Real mode, as after reset but with a stack."""
    guest.state.reset()
    words = guest.words
    guest.state.set_segment(CS, Segment(0x700, 0x7000, 0xFFFF, AR_REAL_MODE | AR_CODE))
    words[RIP], words[RSP] = 0x10, 0x8000
    words[IDT_LIMIT] = 0x3FF
    words[RFLAGS] |= RFLAGS_IF
    guest.memory.store(4 * 0x10, 4, 0x1234 << 16 | 0x5678)
    return guest


def deliver(
    guest: Guest, vector: int, kind: int = EXCEPTION, error_code: int | None = None, rip: int | None = None
) -> None:
    rip = guest.words[RIP] if rip is None else rip
    deliver_legacy(guest.words, guest.memory, vector, error_code, kind, rip)


def fault_of(guest: Guest, vector: int, kind: int = EXCEPTION) -> tuple[int, int | None]:
    before = guest.snapshot()
    with pytest.raises(GuestFault) as caught:
        deliver(guest, vector, kind)
    assert guest.snapshot() == before, "a failed delivery changed the state"
    return caught.value.vector, caught.value.error_code


def pushed(guest: Guest, count: int, size: int) -> list[int]:
    base = guest.words[segment_word(SS_REGISTER, BASE)] + guest.words[RSP]
    return [guest.memory.load(base + size * index, size) for index in range(count)]


# ------------------------------------------------------------------------------------------------- real mode


def test_real_mode_pushes_flags_cs_and_ip_and_goes_through_the_vector_table(real: Guest) -> None:
    words = real.words
    words[RFLAGS] |= RFLAGS_TF | RFLAGS_AC
    flags = words[RFLAGS] & 0xFFFF
    deliver(real, 0x10, SOFTWARE, rip=0x12)
    assert (words[segment_word(CS, SELECTOR)], words[segment_word(CS, BASE)]) == (0x1234, 0x12340)
    assert words[RIP] == 0x5678
    assert pushed(real, 3, 2) == [0x12, 0x700, flags]
    assert words[RFLAGS] == RFLAGS_FIXED
    assert words[INTERRUPT_SHADOW] == 0


def test_real_mode_pushes_no_error_code(real: Guest) -> None:
    real.memory.store(4 * GP, 4, 0x2000 << 16)
    deliver(real, GP, error_code=0)
    assert real.words[RSP] == 0x8000 - 6


def test_real_mode_honours_base_and_limit_of_the_vector_table(real: Guest) -> None:
    real.words[IDT_BASE] = 0x9000
    real.memory.store(0x9000 + 4 * 0x10, 4, 0x42)
    deliver(real, 0x10)
    assert real.words[RIP] == 0x42
    real.words[IDT_LIMIT] = 4 * 0x10 + 2
    assert fault_of(real, 0x10)[0] == GP


def test_real_mode_stack_pointer_wraps_at_16_bits(real: Guest) -> None:
    real.words[RSP] = 2
    deliver(real, 0x10)
    assert real.words[RSP] == 0xFFFC


def test_real_mode_push_beyond_the_stack_limit_is_a_stack_fault(real: Guest) -> None:
    real.words[segment_word(SS_REGISTER, LIMIT)] = 0x7FF0
    assert fault_of(real, 0x10) == (SS, ERROR_EXT)


def test_real_mode_with_an_empty_vector_table_shuts_down(real: Guest) -> None:
    real.words[IDT_LIMIT] = 0
    with pytest.raises(TripleFault):
        deliver_event(real.words, real.memory, Event(UD))


# -------------------------------------------------------------------------------------------- protected mode


def test_32_bit_gate_in_the_kernel_pushes_doublewords(protected: Guest) -> None:
    flags = protected.words[RFLAGS]
    deliver(protected, PF, error_code=2)
    assert protected.words[RIP] == HANDLER + 16 * PF
    assert protected.words[RSP] == STACK - 16
    assert pushed(protected, 4, 4) == [2, 0x5000, KERNEL_CS32, flags | RFLAGS_RF]
    assert not protected.words[RFLAGS] & (RFLAGS_IF | RFLAGS_NT | RFLAGS_TF)


def test_16_bit_gate_pushes_words_and_takes_a_16_bit_offset(protected: Guest) -> None:
    set_gate(protected, UD, 0x7_1234, KERNEL_CS32, AR_P | SYS_INTERRUPT_GATE16)
    flags = protected.words[RFLAGS]
    deliver(protected, UD)
    assert protected.words[RIP] == 0x1234
    assert protected.words[RSP] == STACK - 6
    assert pushed(protected, 3, 2) == [0x5000, KERNEL_CS32, flags & 0xFFFF]


def test_trap_gate_leaves_if(protected: Guest) -> None:
    set_gate(protected, UD, HANDLER, KERNEL_CS32, AR_P | SYS_TRAP_GATE)
    deliver(protected, UD)
    assert protected.words[RFLAGS] & RFLAGS_IF


def test_user_mode_event_switches_to_the_ring_0_stack_of_the_tss(user32: Guest) -> None:
    words = user32.words
    flags = words[RFLAGS]
    deliver(user32, DE)
    assert words[CPL] == 0
    assert words[RSP] == RING0_STACK - 20
    assert pushed(user32, 5, 4) == [0x5000, USER_CS32, flags | RFLAGS_RF, STACK, USER_SS]
    assert words[segment_word(SS_REGISTER, SELECTOR)] == KERNEL_SS
    assert words[segment_word(CS, SELECTOR)] == KERNEL_CS32


def test_16_bit_tss_gives_a_16_bit_stack_pointer(user32: Guest) -> None:
    user32.words[segment_word(TR, ATTRIBUTES)] = AR_TSS16_BUSY
    user32.memory.store(TSS + TSS16_SP0, 4, KERNEL_SS << 16 | 0x8000)
    deliver(user32, DE)
    assert user32.words[RSP] == 0x8000 - 20


def test_user_int_n_needs_a_gate_with_dpl_three(user32: Guest) -> None:
    assert fault_of(user32, 0x80, SOFTWARE) == (GP, 0x80 << 3 | ERROR_IDT)
    set_gate(user32, 0x80, HANDLER, KERNEL_CS32, AR_P | SYS_INTERRUPT_GATE | DPL3)
    deliver(user32, 0x80, SOFTWARE)
    assert user32.words[CPL] == 0


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (SYS_INTERRUPT_GATE, (NP, UD << 3 | ERROR_IDT | ERROR_EXT)),
        (AR_P | 2, (GP, UD << 3 | ERROR_IDT | ERROR_EXT)),
    ],
)
def test_bad_gates_report_themselves(protected: Guest, attributes: int, expected: tuple[int, int]) -> None:
    set_gate(protected, UD, HANDLER, KERNEL_CS32, attributes)
    assert fault_of(protected, UD) == expected


def test_gate_beyond_the_idt_limit_reports_itself(protected: Guest) -> None:
    protected.words[IDT_LIMIT] = UD * 8 + 6
    assert fault_of(protected, UD) == (GP, UD << 3 | ERROR_IDT | ERROR_EXT)


def test_task_gate_is_not_implemented_and_says_so(protected: Guest) -> None:
    set_gate(protected, UD, 0, TSS_SELECTOR, AR_P | SYS_TASK_GATE)
    with pytest.raises(Unhandleable, match="task gate"):
        deliver(protected, UD)


def test_handler_beyond_the_code_limit_is_a_general_protection(protected: Guest) -> None:
    protected.set_descriptor(KERNEL_CS32, make_segment(0, HANDLER - 1, AR_CODE32 & ~(1 << 15)))
    assert fault_of(protected, UD) == (GP, ERROR_EXT)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (0, (TS, ERROR_EXT)),
        (KERNEL_SS | 3, (TS, KERNEL_SS | ERROR_EXT)),
        (USER_SS & ~3, (TS, USER_SS & ~3 | ERROR_EXT)),
        (KERNEL_CS, (TS, KERNEL_CS | ERROR_EXT)),
        (0xFF8, (TS, 0xFF8 | ERROR_EXT)),
    ],
    ids=["null", "wrong RPL", "wrong DPL", "code segment", "beyond the GDT"],
)
def test_bad_stack_selector_in_the_tss_is_an_invalid_tss(
    user32: Guest, selector: int, expected: tuple[int, int]
) -> None:
    user32.memory.store(TSS + TSS32_ESP0 + 4, 4, selector)
    assert fault_of(user32, DE) == expected


def test_absent_stack_segment_is_a_stack_fault_with_the_selector(user32: Guest) -> None:
    user32.set_descriptor(KERNEL_SS, make_segment(0, FLAT, AR_DATA & ~AR_P))
    assert fault_of(user32, DE) == (SS, KERNEL_SS | ERROR_EXT)


def test_tss_too_small_for_the_stack_is_an_invalid_tss(user32: Guest) -> None:
    user32.words[segment_word(TR, LIMIT)] = TSS32_ESP0 + 4
    assert fault_of(user32, DE) == (TS, TSS_SELECTOR | ERROR_EXT)


def test_new_stack_without_room_is_a_stack_fault_with_the_selector(user32: Guest) -> None:
    user32.set_descriptor(KERNEL_SS, make_segment(0, RING0_STACK - 8, AR_DATA & ~(1 << 15)))
    assert fault_of(user32, DE) == (SS, KERNEL_SS | ERROR_EXT)


def test_current_stack_without_room_is_a_stack_fault_without_a_selector(protected: Guest) -> None:
    protected.words[segment_word(SS_REGISTER, LIMIT)] = STACK - 8
    assert fault_of(protected, DE) == (SS, ERROR_EXT)
    assert fault_of(protected, BP, SOFTWARE) == (SS, 0)


def test_expand_down_stack_has_its_room_above_the_limit(protected: Guest) -> None:
    attributes = AR_P | 1 << 4 | AR_WRITABLE | AR_EXPAND_DOWN | AR_DB
    protected.state.set_segment(SS_REGISTER, Segment(KERNEL_SS, 0, STACK - 13, attributes))
    deliver(protected, DE)
    assert protected.words[RSP] == STACK - 12
    protected.words[RSP], protected.words[segment_word(SS_REGISTER, LIMIT)] = STACK, STACK - 12
    assert fault_of(protected, DE) == (SS, ERROR_EXT)


def test_16_bit_stack_segment_changes_only_sp(protected: Guest) -> None:
    protected.words[segment_word(SS_REGISTER, ATTRIBUTES)] &= ~AR_DB
    protected.words[RSP] = 0x7_0008
    deliver(protected, DE)
    assert protected.words[RSP] == 0x7_FFFC


# ----------------------------------------------------------------------------------------- virtual-8086 mode


def test_virtual_8086_task_is_left_with_all_segments_pushed_and_nulled(virtual_8086: Guest) -> None:
    words = virtual_8086.words
    flags = words[RFLAGS]
    deliver(virtual_8086, GP, error_code=0)
    assert words[RSP] == RING0_STACK - 40
    assert pushed(virtual_8086, 10, 4) == [
        0,
        0x10,
        0x800,
        flags | RFLAGS_RF,
        0x100,
        0x900,
        0xB00,
        0xA00,
        0xC00,
        0xD00,
    ]
    assert not words[RFLAGS] & RFLAGS_VM
    assert words[CPL] == 0
    for number in (DS, ES, FS, GS):
        assert words[segment_word(number, SELECTOR)] == 0
        assert words[segment_word(number, ATTRIBUTES)] == AR_UNUSABLE


def test_handler_of_a_virtual_8086_event_must_be_in_ring_0(virtual_8086: Guest) -> None:
    set_gate(virtual_8086, UD, HANDLER, USER_CS32, AR_P | SYS_INTERRUPT_GATE)
    assert fault_of(virtual_8086, UD) == (GP, USER_CS32 & ~3 | ERROR_EXT)


def test_nested_faults_work_in_protected_mode_too(user32: Guest) -> None:
    event = Event(0x80, EventKind.SOFTWARE, return_rip=0x5002)
    deliver_event(user32.words, user32.memory, event)
    assert user32.words[RIP] == HANDLER + 16 * GP
    assert pushed(user32, 2, 4) == [0x80 << 3 | ERROR_IDT, 0x5000]
