"""What ``KVM_CHECK_EXTENSION`` says of the soft provider; the numbers are those of ``linux/kvm.h``."""

from lasskvm.kvm.nested_state import NESTED_STATE_BYTES
from lasskvm.kvm.registers_fpu import XSAVE_BYTES
from lasskvm.memory import MAX_SLOTS

__all__ = ["CAPABILITIES", "KVM_CAP_NESTED_STATE"]

_VCPUS = 1
#: ``KVM_GUESTDBG_ENABLE``, ``SINGLESTEP``, ``USE_SW_BP`` and ``USE_HW_BP``.
_DEBUG_CONTROLS = 1 << 0 | 1 << 1 | 1 << 16 | 1 << 17
#: ``KVM_MSR_EXIT_REASON_FILTER``.
_MSR_EXIT_REASONS = 1 << 2

#: Not there without nested virtualization.
KVM_CAP_NESTED_STATE = 157
#: Every capability that is there, and what it is worth. The rest is 0.
CAPABILITIES: dict[int, int] = {
    0: 1,  # KVM_CAP_IRQCHIP
    1: 1,  # KVM_CAP_HLT
    3: 1,  # KVM_CAP_USER_MEMORY
    7: 1,  # KVM_CAP_EXT_CPUID
    9: _VCPUS,  # KVM_CAP_NR_VCPUS
    10: MAX_SLOTS,  # KVM_CAP_NR_MEMSLOTS
    14: 1,  # KVM_CAP_MP_STATE
    16: 1,  # KVM_CAP_SYNC_MMU
    21: 1,  # KVM_CAP_DESTROY_MEMORY_REGION_WORKS
    22: 1,  # KVM_CAP_USER_NMI
    23: 1,  # KVM_CAP_SET_GUEST_DEBUG
    30: 1,  # KVM_CAP_JOIN_MEMORY_REGIONS_WORKS
    33: 1,  # KVM_CAP_PIT2
    35: 1,  # KVM_CAP_PIT_STATE2
    41: 1,  # KVM_CAP_VCPU_EVENTS
    49: 1,  # KVM_CAP_INTR_SHADOW
    50: 1,  # KVM_CAP_DEBUGREGS
    55: 1,  # KVM_CAP_XSAVE
    56: 1,  # KVM_CAP_XCRS
    66: _VCPUS,  # KVM_CAP_MAX_VCPUS
    81: 1,  # KVM_CAP_READONLY_MEM
    128: _VCPUS,  # KVM_CAP_MAX_VCPU_ID
    136: 1,  # KVM_CAP_IMMEDIATE_EXIT
    KVM_CAP_NESTED_STATE: NESTED_STATE_BYTES,
    164: 1,  # KVM_CAP_EXCEPTION_PAYLOAD
    188: _MSR_EXIT_REASONS,  # KVM_CAP_X86_USER_SPACE_MSR
    189: 1,  # KVM_CAP_X86_MSR_FILTER
    195: _DEBUG_CONTROLS,  # KVM_CAP_SET_GUEST_DEBUG2
    200: 1,  # KVM_CAP_SREGS2
    208: XSAVE_BYTES,  # KVM_CAP_XSAVE2
    218: 1,  # KVM_CAP_X86_TRIPLE_FAULT_EVENT
}
