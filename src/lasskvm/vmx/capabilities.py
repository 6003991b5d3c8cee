"""What VMX offers to L1: the values of the capability MSRs, 480H to 491H, and whether a value is within them.

The same numbers answer RDMSR and judge VM entries, so that what is offered is what is accepted. They are those of a
current KVM on Intel, as far as the features exist here. Left out: VMCS shadowing, VM functions, page-modification
logging, virtualization of the APIC beyond the TPR shadow, the performance-counter controls, five-level EPT, and waiting
for a SIPI, which no second processor would ever send. EPT paging structures may be uncacheable, which KVM does not
offer.

Source: Intel SDM volume 3C, appendix A; KVM's ``nested_vmx_setup_ctls_msrs()``, ``nested_vmx_cr_fixed1_bits_update()``
and ``vmx_adjust_secondary_exec_control()``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lasskvm.vmx.vmcs import VMCS12_REVISION
from lasskvm.x86 import msr, vmx
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.registers import CR0_NE, CR0_PE, CR0_PG, CR4_VMXE, MASK32
from lasskvm.x86.vmx_fields import VmcsField, field_index

__all__ = ["ControlBits", "FixedBits", "VmxCapabilities"]


class ControlBits(NamedTuple):
    """Which bits of a 32-bit field of controls must be 1, and which may be."""

    must_be_1: int
    may_be_1: int

    def allow(self, value: int) -> bool:
        """Whether *value* keeps to them (KVM: ``vmx_control_verify()``)."""
        return value & self.must_be_1 == self.must_be_1 and not value & ~self.may_be_1

    @property
    def msr(self) -> int:
        """The capability MSR that tells them."""
        return self.must_be_1 | self.may_be_1 << vmx.CONTROL_MSR_MAY_BE_1_SHIFT


class FixedBits(NamedTuple):
    """Which bits of CR0 or CR4 must be 1 in VMX operation, and which may be: the registers FIXED0 and FIXED1."""

    must_be_1: int
    may_be_1: int

    def allow(self, value: int, *, exempt: int = 0) -> bool:
        """Whether *value* keeps to them; bits in *exempt* may also be 0 (KVM: ``fixed_bits_valid()``)."""
        needed = self.must_be_1 & ~exempt
        return value & needed == needed and not value & ~self.may_be_1


_PIN_BASED = (
    vmx.PIN_BASED_EXT_INTR_MASK | vmx.PIN_BASED_NMI_EXITING | vmx.PIN_BASED_VIRTUAL_NMIS
    | vmx.PIN_BASED_VMX_PREEMPTION_TIMER
)  # fmt: skip
_CPU_BASED = (
    vmx.CPU_BASED_INTR_WINDOW_EXITING | vmx.CPU_BASED_USE_TSC_OFFSETTING | vmx.CPU_BASED_HLT_EXITING
    | vmx.CPU_BASED_INVLPG_EXITING | vmx.CPU_BASED_MWAIT_EXITING | vmx.CPU_BASED_RDPMC_EXITING
    | vmx.CPU_BASED_RDTSC_EXITING | vmx.CPU_BASED_CR3_LOAD_EXITING | vmx.CPU_BASED_CR3_STORE_EXITING
    | vmx.CPU_BASED_CR8_LOAD_EXITING | vmx.CPU_BASED_CR8_STORE_EXITING | vmx.CPU_BASED_TPR_SHADOW
    | vmx.CPU_BASED_NMI_WINDOW_EXITING | vmx.CPU_BASED_MOV_DR_EXITING | vmx.CPU_BASED_UNCOND_IO_EXITING
    | vmx.CPU_BASED_USE_IO_BITMAPS | vmx.CPU_BASED_MONITOR_TRAP_FLAG | vmx.CPU_BASED_USE_MSR_BITMAPS
    | vmx.CPU_BASED_MONITOR_EXITING | vmx.CPU_BASED_PAUSE_EXITING | vmx.CPU_BASED_ACTIVATE_SECONDARY_CONTROLS
)  # fmt: skip
_SECONDARY = (
    vmx.SECONDARY_EXEC_ENABLE_EPT | vmx.SECONDARY_EXEC_DESC | vmx.SECONDARY_EXEC_ENABLE_VPID
    | vmx.SECONDARY_EXEC_WBINVD_EXITING | vmx.SECONDARY_EXEC_UNRESTRICTED_GUEST
)  # fmt: skip
#: Secondary controls of an instruction, and the features of which one has to be there for it.
_SECONDARY_FEATURES = {
    vmx.SECONDARY_EXEC_ENABLE_RDTSCP: ("rdtscp", "rdpid"),
    vmx.SECONDARY_EXEC_RDRAND_EXITING: ("rdrand",),
    vmx.SECONDARY_EXEC_ENABLE_INVPCID: ("invpcid",),
    vmx.SECONDARY_EXEC_ENCLS_EXITING: ("sgx",),
    vmx.SECONDARY_EXEC_RDSEED_EXITING: ("rdseed",),
    vmx.SECONDARY_EXEC_ENABLE_XSAVES: ("xsaves",),
}
_VM_EXIT = (
    vmx.VM_EXIT_SAVE_DEBUG_CONTROLS | vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE | vmx.VM_EXIT_ACK_INTR_ON_EXIT
    | vmx.VM_EXIT_SAVE_IA32_PAT | vmx.VM_EXIT_LOAD_IA32_PAT | vmx.VM_EXIT_SAVE_IA32_EFER
    | vmx.VM_EXIT_LOAD_IA32_EFER | vmx.VM_EXIT_SAVE_VMX_PREEMPTION_TIMER
)  # fmt: skip
_VM_ENTRY = (
    vmx.VM_ENTRY_LOAD_DEBUG_CONTROLS | vmx.VM_ENTRY_IA32E_MODE | vmx.VM_ENTRY_LOAD_IA32_PAT
    | vmx.VM_ENTRY_LOAD_IA32_EFER
)  # fmt: skip

#: Controls of the default1 class that may be 0 for software that asks the "true" registers.
_CPU_BASED_FREE = vmx.CPU_BASED_CR3_LOAD_EXITING | vmx.CPU_BASED_CR3_STORE_EXITING
_VM_EXIT_FREE = vmx.VM_EXIT_SAVE_DEBUG_CONTROLS
_VM_ENTRY_FREE = vmx.VM_ENTRY_LOAD_DEBUG_CONTROLS

_BASIC = (
    VMCS12_REVISION
    | vmx.VMCS_BYTES << vmx.VMX_BASIC_VMCS_SIZE_SHIFT
    | vmx.MEMORY_TYPE_WB << vmx.VMX_BASIC_MEM_TYPE_SHIFT
    | vmx.VMX_BASIC_INOUT
    | vmx.VMX_BASIC_TRUE_CTLS
    # All processors with LASS have it.
    | vmx.VMX_BASIC_NO_HW_ERROR_CODE_CC
)
#: KVM's emulated preemption timer has the same rate: every 32 ticks.
_PREEMPTION_TIMER_RATE = 5
#: No CR3-target values, MSR lists of 512 entries.
_MISC = (
    _PREEMPTION_TIMER_RATE
    | vmx.VMX_MISC_SAVE_EFER_LMA
    | vmx.VMX_MISC_ACTIVITY_HLT
    | vmx.VMX_MISC_VMWRITE_SHADOW_RO_FIELDS
)
#: In VMX operation, paging and protection are always on, and x87 errors are exceptions (A.7).
_CR0_FIXED = FixedBits(CR0_PE | CR0_PG | CR0_NE, MASK32)
_VMCS_ENUM = max(map(field_index, VmcsField)) << vmx.VMX_VMCS_ENUM_INDEX_SHIFT
_EPT_VPID_CAP = (
    vmx.VMX_EPT_EXECUTE_ONLY_BIT | vmx.VMX_EPT_PAGE_WALK_4_BIT | vmx.VMX_EPTP_UC_BIT | vmx.VMX_EPTP_WB_BIT
    | vmx.VMX_EPT_2MB_PAGE_BIT | vmx.VMX_EPT_1GB_PAGE_BIT | vmx.VMX_EPT_INVEPT_BIT | vmx.VMX_EPT_AD_BIT
    | vmx.VMX_EPT_EXTENT_CONTEXT_BIT | vmx.VMX_EPT_EXTENT_GLOBAL_BIT
    | vmx.VMX_VPID_INVVPID_BIT | vmx.VMX_VPID_EXTENT_INDIVIDUAL_ADDR_BIT | vmx.VMX_VPID_EXTENT_SINGLE_CONTEXT_BIT
    | vmx.VMX_VPID_EXTENT_GLOBAL_CONTEXT_BIT | vmx.VMX_VPID_EXTENT_SINGLE_NON_GLOBAL_BIT
)  # fmt: skip
_NO_VM_FUNCTIONS = 0


@dataclass(frozen=True)
class VmxCapabilities:
    """What L1 may use. Controls are those of the "true" registers, which say more than the others."""

    pin_based: ControlBits
    cpu_based: ControlBits
    secondary: ControlBits
    vm_exit: ControlBits
    vm_entry: ControlBits
    cr0: FixedBits
    cr4: FixedBits
    basic: int = _BASIC
    misc: int = _MISC
    vmcs_enum: int = _VMCS_ENUM
    ept_vpid: int = _EPT_VPID_CAP
    vmfunc: int = _NO_VM_FUNCTIONS

    @classmethod
    def of(cls, cpuid: CpuidTable, cr4_allowed: int) -> VmxCapabilities:
        """The capabilities of a vCPU with this CPUID, which has VMX, and with these CR4 bits.

        *cr4_allowed* is :func:`lasskvm.x86.cpuid.cr4_allowed` of the table, and becomes IA32_VMX_CR4_FIXED1: what may
        be set may be set in VMX operation, too. So bit 27 is 1 exactly when CPUID has LASS. (KVM takes TSD, DE, PSE,
        PAE, MCE, PGE, OSFXSR and OSXMMEXCPT away when their features are missing; here they never need one.)
        """
        instructions = (
            control
            for control, features in _SECONDARY_FEATURES.items()
            if any(cpuid.has(feature) for feature in features)
        )
        return cls(
            pin_based=_controls(_PIN_BASED, vmx.PIN_BASED_ALWAYSON_WITHOUT_TRUE_MSR, 0),
            cpu_based=_controls(_CPU_BASED, vmx.CPU_BASED_ALWAYSON_WITHOUT_TRUE_MSR, _CPU_BASED_FREE),
            secondary=_controls(_SECONDARY | sum(instructions), 0, 0),
            vm_exit=_controls(_VM_EXIT, vmx.VM_EXIT_ALWAYSON_WITHOUT_TRUE_MSR, _VM_EXIT_FREE),
            vm_entry=_controls(_VM_ENTRY, vmx.VM_ENTRY_ALWAYSON_WITHOUT_TRUE_MSR, _VM_ENTRY_FREE),
            cr0=_CR0_FIXED,
            cr4=FixedBits(CR4_VMXE, cr4_allowed),
        )

    def msrs(self) -> dict[int, int]:
        """What RDMSR returns, by index. All are read-only: WRMSR is #GP(0)."""
        return {
            msr.MSR_IA32_VMX_BASIC: self.basic,
            msr.MSR_IA32_VMX_PINBASED_CTLS: _default1(
                self.pin_based, vmx.PIN_BASED_ALWAYSON_WITHOUT_TRUE_MSR
            ),
            msr.MSR_IA32_VMX_PROCBASED_CTLS: _default1(
                self.cpu_based, vmx.CPU_BASED_ALWAYSON_WITHOUT_TRUE_MSR
            ),
            msr.MSR_IA32_VMX_EXIT_CTLS: _default1(self.vm_exit, vmx.VM_EXIT_ALWAYSON_WITHOUT_TRUE_MSR),
            msr.MSR_IA32_VMX_ENTRY_CTLS: _default1(self.vm_entry, vmx.VM_ENTRY_ALWAYSON_WITHOUT_TRUE_MSR),
            msr.MSR_IA32_VMX_MISC: self.misc,
            msr.MSR_IA32_VMX_CR0_FIXED0: self.cr0.must_be_1,
            msr.MSR_IA32_VMX_CR0_FIXED1: self.cr0.may_be_1,
            msr.MSR_IA32_VMX_CR4_FIXED0: self.cr4.must_be_1,
            msr.MSR_IA32_VMX_CR4_FIXED1: self.cr4.may_be_1,
            msr.MSR_IA32_VMX_VMCS_ENUM: self.vmcs_enum,
            msr.MSR_IA32_VMX_PROCBASED_CTLS2: self.secondary.msr,
            msr.MSR_IA32_VMX_EPT_VPID_CAP: self.ept_vpid,
            msr.MSR_IA32_VMX_TRUE_PINBASED_CTLS: self.pin_based.msr,
            msr.MSR_IA32_VMX_TRUE_PROCBASED_CTLS: self.cpu_based.msr,
            msr.MSR_IA32_VMX_TRUE_EXIT_CTLS: self.vm_exit.msr,
            msr.MSR_IA32_VMX_TRUE_ENTRY_CTLS: self.vm_entry.msr,
            msr.MSR_IA32_VMX_VMFUNC: self.vmfunc,
        }

    @property
    def cr3_targets(self) -> int:
        """How many CR3-target values there are."""
        return (self.misc & vmx.VMX_MISC_CR3_TARGETS) >> vmx.VMX_MISC_CR3_TARGETS_SHIFT

    @property
    def msr_list_entries(self) -> int:
        """How many entries an MSR list may have before the processor gives up on it."""
        units = (self.misc & vmx.VMX_MISC_MSR_LIST) >> vmx.VMX_MISC_MSR_LIST_SHIFT
        return vmx.VMX_MISC_MSR_LIST_UNIT * (units + 1)

    @property
    def vmwrite_any_field(self) -> bool:
        """Whether VMWRITE writes read-only fields. KVM says yes to its guests, and so do we."""
        return bool(self.misc & vmx.VMX_MISC_VMWRITE_SHADOW_RO_FIELDS)


def _controls(offered: int, default1: int, free: int) -> ControlBits:
    return ControlBits(must_be_1=default1 & ~free, may_be_1=default1 | offered)


def _default1(controls: ControlBits, default1: int) -> int:
    """The register that old software reads: every control of the default1 class must be 1."""
    return controls._replace(must_be_1=controls.must_be_1 | default1).msr
