"""CR0 and CR4 of L2 under guest/host masks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lasskvm.state import CR0, CR4, VcpuState
from lasskvm.vmx.control_register_shadows import keep_owned_bits, visible_cr0, visible_cr4
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86.registers import CR0_PE, CR0_TS, CR4_LASS, CR4_PAE, CR4_VMXE
from lasskvm.x86.vmx_fields import VmcsField as F

words = st.integers(0, (1 << 64) - 1)


def test_l2_sees_the_shadow_of_what_l1_owns() -> None:
    vmcs, state = Vmcs12(), VcpuState().words
    state[CR0], state[CR4] = CR0_PE, CR4_PAE | CR4_VMXE
    vmcs[F.CR0_GUEST_HOST_MASK], vmcs[F.CR0_READ_SHADOW] = CR0_TS, CR0_TS
    vmcs[F.CR4_GUEST_HOST_MASK], vmcs[F.CR4_READ_SHADOW] = CR4_VMXE | CR4_LASS, CR4_LASS
    assert visible_cr0(vmcs, state) == CR0_PE | CR0_TS
    assert visible_cr4(vmcs, state) == CR4_PAE | CR4_LASS


def test_l2_cannot_write_what_l1_owns() -> None:
    assert keep_owned_bits(CR4_PAE, mask=CR4_LASS | CR4_VMXE, register=CR4_LASS) == CR4_PAE | CR4_LASS


@given(register=words, mask=words, shadow=words)
def test_writing_back_what_is_seen_changes_nothing(register: int, mask: int, shadow: int) -> None:
    vmcs, state = Vmcs12(), VcpuState().words
    state[CR4] = register
    vmcs[F.CR4_GUEST_HOST_MASK], vmcs[F.CR4_READ_SHADOW] = mask, shadow
    seen = visible_cr4(vmcs, state)
    assert not (seen ^ shadow) & mask
    assert keep_owned_bits(seen, mask, register) == register


@given(value=words, mask=words, shadow=words, register=words)
def test_a_write_that_does_not_exit_is_seen_as_written(
    value: int, mask: int, shadow: int, register: int
) -> None:
    # Anything else in the owned bits would have caused an exit.
    value = value & ~mask | shadow & mask
    vmcs, state = Vmcs12(), VcpuState().words
    vmcs[F.CR0_GUEST_HOST_MASK], vmcs[F.CR0_READ_SHADOW] = mask, shadow
    state[CR0] = keep_owned_bits(value, mask, register)
    assert visible_cr0(vmcs, state) == value
    assert state[CR0] & mask == register & mask
