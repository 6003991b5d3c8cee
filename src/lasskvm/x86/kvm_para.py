"""The paravirtual interface of KVM as a guest sees it: signature, hypercalls, and the layouts of its clocks.

The CPUID leaves and their features are in :mod:`lasskvm.x86.cpuid`, the MSRs in :mod:`lasskvm.x86.msr`
(``MSR_KVM_*``). Source: Linux's documentation of KVM on x86 (CPUID, MSRs, hypercalls) and of paravirtual clocks.
"""

import struct

#: CPUID 40000000H: EBX, ECX and EDX.
KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"

# Hypercalls: the number in RAX, and what RAX returns
KVM_HC_VAPIC_POLL_IRQ = 1
KVM_EPERM = 1
KVM_ENOSYS = 1000

#: Bit 0 of MSR_KVM_SYSTEM_TIME*; the other bits are the guest-physical address of the structure.
SYSTEM_TIME_ENABLE = 1 << 0

#: ``struct pvclock_vcpu_time_info``: version, padding, TSC at ``system_time``, ``system_time`` in nanoseconds,
#: multiplier and shift from TSC to nanoseconds, flags, padding.
PVCLOCK_TIME_INFO = struct.Struct("<IIQQIbB2x")
#: Time read from different processors never goes backwards.
PVCLOCK_TSC_STABLE_BIT = 1 << 0

#: ``struct pvclock_wall_clock``: version, and seconds and nanoseconds of the Unix time at ``system_time`` 0.
PVCLOCK_WALL_CLOCK = struct.Struct("<III")

#: The version that both structures begin with: odd while they are being written.
PVCLOCK_VERSION_BYTES = 4
