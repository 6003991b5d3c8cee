"""VM exits for RDMSR and WRMSR, by the MSR bitmap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from l2_guest import L2, MSR_BITMAP

from lasskvm.memory import PAGE_SIZE
from lasskvm.state import RCX
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.intercepts_msr import msr_access_exits
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import GP
from lasskvm.x86.msr import MSR_IA32_EFER, MSR_KVM_WALL_CLOCK_NEW
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

READ = NestedExit(ExitReason.MSR_READ, instruction_length=2)
WRITE = NestedExit(ExitReason.MSR_WRITE, instruction_length=2)
LOW, HIGH = 0, 0xC000_0000


@pytest.fixture
def l2() -> L2:
    return L2()


def test_without_a_bitmap_every_access_exits(l2: L2) -> None:
    l2.vmcs[F.CPU_BASED_VM_EXEC_CONTROL] = 0xFFFF_FFFF & ~vmx.CPU_BASED_USE_MSR_BITMAPS
    l2.words[RCX] = MSR_IA32_EFER
    assert l2.exit_of("rdmsr") == READ
    assert l2.exit_of("wrmsr") == WRITE


@pytest.mark.parametrize("part, start, source, expected", [
    (0x000, LOW, "rdmsr", READ), (0x400, HIGH, "rdmsr", READ),
    (0x800, LOW, "wrmsr", WRITE), (0xC00, HIGH, "wrmsr", WRITE),
])  # fmt: skip
@pytest.mark.parametrize("offset", [0, 0x7, 0x8, 0x80, 0x1FFF], ids=hex)
def test_each_part_of_the_bitmap_is_about_one_range_and_one_direction(
    l2: L2, part: int, start: int, source: str, expected: NestedExit, offset: int
) -> None:
    l2.memory.store(MSR_BITMAP + part + offset // 8, 1, 1 << offset % 8)
    for each_start in (LOW, HIGH):
        for each_source in ("rdmsr", "wrmsr"):
            # Only ECX counts.
            l2.words[RCX] = 0xFFFF_FFFF_0000_0000 | each_start + offset
            intercepted = (each_start, each_source) == (start, source)
            assert l2.exit_of(each_source) == (expected if intercepted else None)


@pytest.mark.parametrize(
    "index", [0x2000, 0xBFFF_FFFF, 0xC000_2000, 0xFFFF_FFFF, MSR_KVM_WALL_CLOCK_NEW], ids=hex
)
def test_an_msr_outside_the_ranges_always_exits(l2: L2, index: int) -> None:
    l2.words[RCX] = index
    assert l2.exit_of("rdmsr") == READ
    assert l2.exit_of("wrmsr") == WRITE


@pytest.mark.parametrize("index", [0x1FFF, 0xC000_1FFF], ids=hex)
def test_the_last_msrs_of_the_ranges_have_bits(l2: L2, index: int) -> None:
    l2.words[RCX] = index
    assert l2.exit_of("rdmsr") is None
    assert l2.exit_of("wrmsr") is None


def test_an_exit_comes_before_the_gp_of_an_msr_that_does_not_exist(l2: L2) -> None:
    l2.memory.write(MSR_BITMAP, b"\xff" * PAGE_SIZE)
    l2.words[RCX] = 0x1234
    assert l2.exit_of("rdmsr") == READ


@pytest.mark.parametrize("source", ["rdmsr", "wrmsr"])
def test_the_gp_of_user_code_comes_before_the_exit(l2: L2, source: str) -> None:
    l2.memory.write(MSR_BITMAP, b"\xff" * PAGE_SIZE)
    l2.enter_user()
    assert l2.fault_before_exit(source) == (GP, 0)


PROPERTY_GUEST = L2()


@given(
    st.integers(0, 0xFFFF_FFFF) | st.integers(0, 0x2100) | st.integers(0xBFFF_FF00, 0xC000_2100),
    st.booleans(),
)
def test_one_bit_decides_about_an_msr_that_has_one(index: int, is_write: bool) -> None:
    l2 = PROPERTY_GUEST
    has_bit = index & ~0xC000_0000 < 0x2000 and index >> 30 in (0, 3)
    l2.memory.write(MSR_BITMAP, bytes(PAGE_SIZE))
    assert msr_access_exits(l2.vmcs, l2.memory, index, is_write=is_write) == (not has_bit)
    number = (2 * is_write + (index >> 31)) * 0x2000 + index % 0x2000
    l2.memory.store(MSR_BITMAP + number // 8, 1, 1 << number % 8)
    assert msr_access_exits(l2.vmcs, l2.memory, index, is_write=is_write)
    assert msr_access_exits(l2.vmcs, l2.memory, index, is_write=not is_write) == (not has_bit)
