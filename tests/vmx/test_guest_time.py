"""The VMX-preemption timer and the TSC offset of L2."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.guest_time import save_timer, timer_deadline, tsc_offset
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.vmx_fields import VmcsField as F

CAPABILITIES = VmxCapabilities.of(CpuidTable(()), 0)
PERIOD = 1 << (CAPABILITIES.misc & vmx.VMX_MISC_PREEMPTION_TIMER_RATE)
ticks = st.integers(0, 1 << 50)
values = st.integers(0, (1 << 32) - 1)


def with_timer(value: int) -> Vmcs12:
    vmcs = Vmcs12()
    vmcs[F.PIN_BASED_VM_EXEC_CONTROL] = vmx.PIN_BASED_VMX_PREEMPTION_TIMER
    vmcs[F.VM_EXIT_CONTROLS] = vmx.VM_EXIT_SAVE_VMX_PREEMPTION_TIMER
    vmcs[F.VMX_PREEMPTION_TIMER_VALUE] = value
    return vmcs


def deadline_of(vmcs: Vmcs12, tsc: int) -> int:
    deadline = timer_deadline(vmcs, CAPABILITIES, tsc)
    assert deadline is not None
    return deadline


def test_without_the_control_there_is_no_timer() -> None:
    vmcs = with_timer(5)
    vmcs[F.PIN_BASED_VM_EXEC_CONTROL] = 0
    assert timer_deadline(vmcs, CAPABILITIES, 1000) is None


def test_timer_counts_changes_of_a_bit_of_the_time_stamp_counter() -> None:
    assert deadline_of(with_timer(3), 7 * PERIOD) == 10 * PERIOD
    assert deadline_of(with_timer(3), 8 * PERIOD - 1) == 10 * PERIOD


@given(tsc=ticks)
def test_timer_that_starts_with_0_has_expired(tsc: int) -> None:
    assert deadline_of(with_timer(0), tsc) <= tsc


@given(value=values, tsc=ticks, passed=ticks)
def test_saved_timer_has_lost_what_has_passed(value: int, tsc: int, passed: int) -> None:
    vmcs = with_timer(value)
    deadline = deadline_of(vmcs, tsc)
    save_timer(vmcs, CAPABILITIES, tsc + passed, deadline)
    left = vmcs[F.VMX_PREEMPTION_TIMER_VALUE]
    assert left == max(0, value - ((tsc + passed) // PERIOD - tsc // PERIOD))
    assert (left == 0) == (tsc + passed >= deadline)


@given(value=values, tsc=ticks)
def test_timer_goes_on_as_if_there_had_been_no_exit(value: int, tsc: int) -> None:
    vmcs = with_timer(value)
    deadline = deadline_of(vmcs, tsc)
    save_timer(vmcs, CAPABILITIES, tsc, deadline)
    assert deadline_of(vmcs, tsc) == deadline


def test_timer_is_left_alone_without_the_control_to_save_it() -> None:
    vmcs = with_timer(5)
    vmcs[F.VM_EXIT_CONTROLS] = 0
    save_timer(vmcs, CAPABILITIES, 10 * PERIOD, 12 * PERIOD)
    assert vmcs[F.VMX_PREEMPTION_TIMER_VALUE] == 5


def test_tsc_offset_counts_with_its_control_only() -> None:
    vmcs = Vmcs12()
    vmcs[F.TSC_OFFSET] = (1 << 64) - 1000
    assert tsc_offset(vmcs) == 0
    vmcs[F.CPU_BASED_VM_EXEC_CONTROL] = vmx.CPU_BASED_USE_TSC_OFFSETTING
    assert tsc_offset(vmcs) == (1 << 64) - 1000
