"""VM exits for port I/O: the controls, the bitmaps, string instructions, and the TSS's bitmap before them."""

from __future__ import annotations

import pytest
from emulator_guest import TSS, UPPER
from hypothesis import given
from hypothesis import strategies as st
from l2_guest import IO_BITMAP_A, IO_BITMAP_B, L2
from legacy_modes import DATA_BASE, EXTRA_BASE, enter_protected_mode, enter_real_mode

from lasskvm.memory import PAGE_SIZE
from lasskvm.state import ATTRIBUTES, BASE, LIMIT, RCX, RDI, RDX, RFLAGS, RSI, segment_word
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.intercepts_io import port_access_exits
from lasskvm.x86 import vmx
from lasskvm.x86.descriptors import TSS64_BYTES, TSS64_IO_MAP_BASE
from lasskvm.x86.exceptions import GP, PF
from lasskvm.x86.registers import AR_UNUSABLE, DS, ES, FS, RFLAGS_IOPL, TR
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

DATA = UPPER + 0x70000
UNCONDITIONAL, BITMAPS = vmx.CPU_BASED_UNCOND_IO_EXITING, vmx.CPU_BASED_USE_IO_BITMAPS
HOLE = 0x4000_0000


@pytest.fixture
def l2() -> L2:
    return L2()


def io_exit(qualification: int, length: int, information: int = 0, linear_address: int = 0) -> NestedExit:
    return NestedExit(
        ExitReason.IO_INSTRUCTION,
        qualification=qualification,
        instruction_information=information,
        instruction_length=length,
        guest_linear_address=linear_address,
    )


def intercept_port(l2: L2, port: int) -> None:
    """Set the bit of *port* in L1's bitmaps."""
    address = (IO_BITMAP_A if port < 0x8000 else IO_BITMAP_B) + (port % 0x8000 >> 3)
    l2.memory.store(address, 1, l2.memory.load(address, 1) | 1 << port % 8)


# --------------------------------------------------------------------------------------------------- qualifications


@pytest.mark.parametrize(
    "source, qualification, length",
    [
        ("in al, dx", 0x03F8_0008, 1),
        ("in ax, dx", 0x03F8_0009, 2),
        ("in eax, dx", 0x03F8_000B, 1),
        ("out dx, al", 0x03F8_0000, 1),
        ("out dx, ax", 0x03F8_0001, 2),
        ("out dx, eax", 0x03F8_0003, 1),
        ("in al, 0x71", 0x0071_0048, 2),
        ("out 0x80, eax", 0x0080_0043, 2),
    ],
)
def test_in_and_out_report_port_size_direction_and_encoding(
    l2: L2, source: str, qualification: int, length: int
) -> None:
    l2.words[RDX] = 0xFFFF_03F8
    l2.vmcs[F.CPU_BASED_VM_EXEC_CONTROL] = 0xFFFF_FFFF & ~(UNCONDITIONAL | BITMAPS)
    assert l2.exit_of(source) is None
    l2.primary(UNCONDITIONAL)
    assert l2.exit_of(source) == io_exit(qualification, length)


@pytest.mark.parametrize(
    "source, qualification, length, information",
    [
        # Instruction information: 64-bit addresses are 2 in bits 9:7; ES is 0 and DS 3 in bits 17:15.
        ("insb", 0x03F8_0018, 1, 2 << 7),
        ("rep insb", 0x03F8_0038, 2, 2 << 7),
        ("rep insw", 0x03F8_0039, 3, 2 << 7),
        ("outsb", 0x03F8_0010, 1, 2 << 7 | 3 << 15),
        ("rep outsd", 0x03F8_0033, 2, 2 << 7 | 3 << 15),
        ("repne outsd", 0x03F8_0033, 2, 2 << 7 | 3 << 15),
    ],
)
def test_string_io_reports_repetition_address_size_segment_and_linear_address(
    l2: L2, source: str, qualification: int, length: int, information: int
) -> None:
    words = l2.words
    words[RDX], words[RCX], words[RDI], words[RSI] = 0x3F8, 2, DATA, DATA + 0x100
    assert l2.exit_of(source) is None
    l2.primary(UNCONDITIONAL)
    address = DATA if "ins" in source else DATA + 0x100
    assert l2.exit_of(source) == io_exit(qualification, length, information, address)


def test_outs_reports_its_segment_override_with_that_segments_base(l2: L2) -> None:
    l2.primary(UNCONDITIONAL)
    l2.words[segment_word(FS, BASE)] = UPPER
    l2.words[RDX], l2.words[RSI] = 0x80, 0x5_0000_1234
    # fs outsb with 32-bit addresses
    nested_exit = l2.exit_of("db 0x64, 0x67, 0x6E")
    assert nested_exit == io_exit(0x0080_0010, 3, 1 << 7 | 4 << 15, UPPER + 0x1234)


def test_16_bit_string_io_wraps_its_offset_and_adds_the_base(l2: L2) -> None:
    enter_real_mode(l2)
    l2.primary(UNCONDITIONAL)
    l2.words[RDX], l2.words[RDI], l2.words[RSI] = 0x60, 0xABCD_0010, 0xABCD_0020
    assert l2.exit_of("insb") == io_exit(0x0060_0018, 1, 0, EXTRA_BASE + 0x10)
    assert l2.exit_of("outsb") == io_exit(0x0060_0010, 1, 3 << 15, DATA_BASE + 0x20)


def test_string_io_exits_before_anything_about_its_memory_operand(l2: L2) -> None:
    """An unusable segment, an offset beyond its limit, LASS, and a page that is not there all come behind."""
    l2.primary(UNCONDITIONAL)
    l2.words[RDX], l2.words[RDI] = 0x60, 0x70003
    l2.unmap(0x70000)
    assert l2.exit_of("insd") == io_exit(0x0060_001B, 1, 2 << 7, 0x70003)
    enter_protected_mode(l2, 32)
    l2.words[segment_word(ES, ATTRIBUTES)] |= AR_UNUSABLE
    l2.words[segment_word(DS, LIMIT)] = 0
    l2.words[RSI] = 0x123
    for source in ("insd", "outsd"):
        assert l2.exit_of(source) is not None


def test_a_repeated_instruction_exits_also_when_its_count_is_0(l2: L2) -> None:
    l2.primary(UNCONDITIONAL)
    l2.words[RCX], l2.words[RDX], l2.words[RDI] = 0, 0x60, DATA
    assert l2.exit_of("rep insb") == io_exit(0x0060_0038, 2, 2 << 7, DATA)


# ------------------------------------------------------------------------------------------------------------ bitmaps


@pytest.mark.parametrize("port", [0, 7, 8, 0x3F8, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_each_port_has_its_bit(l2: L2, port: int) -> None:
    l2.primary(BITMAPS)
    intercept_port(l2, port)
    for other in {port - 1, port, port + 1, port ^ 0x8000} & set(range(0x10000)):
        l2.words[RDX] = other
        assert l2.exit_of("in al, dx") == (io_exit(other << 16 | 8, 1) if other == port else None)


@pytest.mark.parametrize("intercepted", [0x7FFE, 0x7FFF, 0x8000, 0x8001])
def test_one_intercepted_port_of_an_access_is_enough_also_across_the_two_bitmaps(
    l2: L2, intercepted: int
) -> None:
    l2.primary(BITMAPS)
    intercept_port(l2, intercepted)
    l2.words[RDX] = 0x7FFE
    assert l2.exit_of("out dx, eax") == io_exit(0x7FFE_0003, 1)
    assert (l2.exit_of("out dx, ax") is not None) == (intercepted <= 0x7FFF)
    assert (l2.exit_of("out dx, al") is not None) == (intercepted == 0x7FFE)


def test_ports_behind_an_access_do_not_matter(l2: L2) -> None:
    l2.primary(BITMAPS)
    intercept_port(l2, 0x73)
    for source in ("in al, 0x70", "in ax, 0x70", "in ax, 0x71"):
        assert l2.exit_of(source) is None
    assert l2.exit_of("in eax, 0x70") == io_exit(0x0070_004B, 2)


@pytest.mark.parametrize("port, source, exits", [
    (0xFFFF, "in al, dx", False), (0xFFFE, "in ax, dx", False), (0xFFFC, "in eax, dx", False),
    (0xFFFF, "in ax, dx", True), (0xFFFD, "in eax, dx", True), (0xFFFF, "in eax, dx", True),
])  # fmt: skip
def test_an_access_that_wraps_around_the_port_space_exits_whatever_the_bitmaps_say(
    l2: L2, port: int, source: str, exits: bool
) -> None:
    l2.primary(BITMAPS)
    l2.words[RDX] = port
    assert (l2.exit_of(source) is not None) == exits


def test_with_bitmaps_the_unconditional_control_is_ignored(l2: L2) -> None:
    l2.primary(BITMAPS | UNCONDITIONAL)
    l2.words[RDX] = 0x60
    assert l2.exit_of("in al, dx") is None


def test_bitmaps_where_l1_has_no_memory_intercept_everything(l2: L2) -> None:
    l2.primary(BITMAPS)
    l2.vmcs[F.IO_BITMAP_B] = HOLE
    l2.words[RDX] = 0x8000
    assert l2.exit_of("in al, dx") == io_exit(0x8000_0008, 1)


PROPERTY_GUEST = L2()


@given(
    ports=st.sets(st.integers(0, 0xFFFF), max_size=4),
    port=st.integers(0, 0xFFFF),
    size=st.sampled_from([1, 2, 4]),
)
def test_an_access_exits_exactly_when_it_touches_an_intercepted_port_or_wraps(
    ports: set[int], port: int, size: int
) -> None:
    l2 = PROPERTY_GUEST
    l2.primary(BITMAPS)
    l2.memory.write(IO_BITMAP_A, bytes(2 * PAGE_SIZE))
    for each in ports:
        intercept_port(l2, each)
    touched = set(range(port, port + size))
    assert port_access_exits(l2.vmcs, l2.memory, port, size) == bool(touched & ports or port + size > 0x10000)


# ---------------------------------------------------------------------------------------------- the TSS comes first


def test_user_code_without_permission_gets_gp_and_l1_hears_nothing(l2: L2) -> None:
    l2.primary(UNCONDITIONAL)
    l2.enter_user()
    l2.store(TSS + TSS64_IO_MAP_BASE, 2, TSS64_BYTES)
    for source in ("in al, 0x60", "rep outsb"):
        assert l2.fault_before_exit(source) == (GP, 0)


def test_user_code_with_iopl_exits(l2: L2) -> None:
    l2.primary(UNCONDITIONAL)
    l2.enter_user()
    l2.words[RFLAGS] |= RFLAGS_IOPL
    assert l2.exit_of("in al, 0x60") == io_exit(0x0060_0048, 2)


def test_the_permission_bitmap_of_the_tss_is_asked_before_l1s(l2: L2) -> None:
    l2.primary(UNCONDITIONAL)
    l2.enter_user()
    l2.words[segment_word(TR, LIMIT)] = TSS64_BYTES + 0x100
    l2.store(TSS + TSS64_IO_MAP_BASE, 2, TSS64_BYTES)
    l2.store(TSS + TSS64_BYTES + 0x60 // 8, 2, 0b10)
    assert l2.exit_of("in al, 0x60") == io_exit(0x0060_0048, 2)
    assert l2.fault_before_exit("in al, 0x61") == (GP, 0)
    assert l2.fault_before_exit("in ax, 0x60") == (GP, 0)


def test_a_fault_of_reading_the_tss_comes_before_the_exit_too(l2: L2) -> None:
    l2.primary(UNCONDITIONAL)
    l2.enter_user()
    l2.words[segment_word(TR, LIMIT)] = TSS64_BYTES + 0x100
    l2.unmap(TSS)
    assert l2.fault_before_exit("in al, 0x60") == (PF, 0)
