"""VMX: controls, capability bits, error numbers and the formats of what software puts into a VMCS.

Names are KVM's. The fields of a VMCS are in :mod:`lasskvm.x86.vmx_fields`, VM exits in :mod:`lasskvm.x86.vmx_exits`,
the capability MSRs' numbers and the bits of IA32_FEATURE_CONTROL in :mod:`lasskvm.x86.msr`. Controls that this VMM does
not offer have no name here. What each control does: SDM volume 3C, chapter 25.

Source: Intel SDM volume 3C, 25.6 to 25.8 (controls), 25.4.2 (non-register state), 31.4 (errors), appendix A
(capabilities).
"""

from enum import IntEnum

# Pin-based VM-execution controls (25.6.1)
PIN_BASED_EXT_INTR_MASK = 1 << 0
PIN_BASED_NMI_EXITING = 1 << 3
PIN_BASED_VIRTUAL_NMIS = 1 << 5
PIN_BASED_VMX_PREEMPTION_TIMER = 1 << 6

# Primary processor-based VM-execution controls (25.6.2)
CPU_BASED_INTR_WINDOW_EXITING = 1 << 2
CPU_BASED_USE_TSC_OFFSETTING = 1 << 3
CPU_BASED_HLT_EXITING = 1 << 7
CPU_BASED_INVLPG_EXITING = 1 << 9
CPU_BASED_MWAIT_EXITING = 1 << 10
CPU_BASED_RDPMC_EXITING = 1 << 11
CPU_BASED_RDTSC_EXITING = 1 << 12
CPU_BASED_CR3_LOAD_EXITING = 1 << 15
CPU_BASED_CR3_STORE_EXITING = 1 << 16
CPU_BASED_CR8_LOAD_EXITING = 1 << 19
CPU_BASED_CR8_STORE_EXITING = 1 << 20
CPU_BASED_TPR_SHADOW = 1 << 21
CPU_BASED_NMI_WINDOW_EXITING = 1 << 22
CPU_BASED_MOV_DR_EXITING = 1 << 23
CPU_BASED_UNCOND_IO_EXITING = 1 << 24
CPU_BASED_USE_IO_BITMAPS = 1 << 25
CPU_BASED_MONITOR_TRAP_FLAG = 1 << 27
CPU_BASED_USE_MSR_BITMAPS = 1 << 28
CPU_BASED_MONITOR_EXITING = 1 << 29
CPU_BASED_PAUSE_EXITING = 1 << 30
CPU_BASED_ACTIVATE_SECONDARY_CONTROLS = 1 << 31

# Secondary processor-based VM-execution controls
SECONDARY_EXEC_ENABLE_EPT = 1 << 1
#: Exits for SGDT, SIDT, SLDT, STR and their loads.
SECONDARY_EXEC_DESC = 1 << 2
SECONDARY_EXEC_ENABLE_RDTSCP = 1 << 3
SECONDARY_EXEC_ENABLE_VPID = 1 << 5
SECONDARY_EXEC_WBINVD_EXITING = 1 << 6
SECONDARY_EXEC_UNRESTRICTED_GUEST = 1 << 7
SECONDARY_EXEC_RDRAND_EXITING = 1 << 11
SECONDARY_EXEC_ENABLE_INVPCID = 1 << 12
SECONDARY_EXEC_ENCLS_EXITING = 1 << 15
SECONDARY_EXEC_RDSEED_EXITING = 1 << 16
SECONDARY_EXEC_ENABLE_XSAVES = 1 << 20

# VM-exit controls (25.7.1)
VM_EXIT_SAVE_DEBUG_CONTROLS = 1 << 2
VM_EXIT_HOST_ADDR_SPACE_SIZE = 1 << 9
VM_EXIT_ACK_INTR_ON_EXIT = 1 << 15
VM_EXIT_SAVE_IA32_PAT = 1 << 18
VM_EXIT_LOAD_IA32_PAT = 1 << 19
VM_EXIT_SAVE_IA32_EFER = 1 << 20
VM_EXIT_LOAD_IA32_EFER = 1 << 21
VM_EXIT_SAVE_VMX_PREEMPTION_TIMER = 1 << 22

# VM-entry controls (25.8.1)
VM_ENTRY_LOAD_DEBUG_CONTROLS = 1 << 2
VM_ENTRY_IA32E_MODE = 1 << 9
VM_ENTRY_LOAD_IA32_PAT = 1 << 14
VM_ENTRY_LOAD_IA32_EFER = 1 << 15

# Controls of the default1 class (appendix A.2): bits, reserved ones and others, that are 1 unless the "true" capability
# MSRs say that they may be 0.
PIN_BASED_ALWAYSON_WITHOUT_TRUE_MSR = 0x00000016
CPU_BASED_ALWAYSON_WITHOUT_TRUE_MSR = 0x0401E172
VM_EXIT_ALWAYSON_WITHOUT_TRUE_MSR = 0x00036DFF
VM_ENTRY_ALWAYSON_WITHOUT_TRUE_MSR = 0x000011FF
#: A capability MSR of controls has the bits that must be 1 in its lower half and those that may be 1 in its upper.
CONTROL_MSR_MAY_BE_1_SHIFT = 32

# IA32_VMX_BASIC (A.1)
VMX_BASIC_REVISION = (1 << 31) - 1
VMX_BASIC_VMCS_SIZE_SHIFT = 32
#: VMX structures are limited to 32-bit physical addresses.
VMX_BASIC_32BIT_PHYS_ADDR_ONLY = 1 << 48
VMX_BASIC_DUAL_MONITOR_TREATMENT = 1 << 49
VMX_BASIC_MEM_TYPE_SHIFT = 50
#: VM exits due to INS and OUTS come with instruction information.
VMX_BASIC_INOUT = 1 << 54
VMX_BASIC_TRUE_CTLS = 1 << 55
#: VM entry delivers hardware exceptions with or without an error code, whatever the vector.
VMX_BASIC_NO_HW_ERROR_CODE_CC = 1 << 56

# IA32_VMX_MISC (A.6)
#: Bits 4:0: the preemption timer counts once for every 2 ** rate ticks of the TSC.
VMX_MISC_PREEMPTION_TIMER_RATE = 0x1F
#: VM exits store IA32_EFER.LMA into the "IA-32e mode guest" control.
VMX_MISC_SAVE_EFER_LMA = 1 << 5
VMX_MISC_ACTIVITY_HLT = 1 << 6
VMX_MISC_ACTIVITY_SHUTDOWN = 1 << 7
VMX_MISC_ACTIVITY_WAIT_SIPI = 1 << 8
VMX_MISC_CR3_TARGETS_SHIFT = 16
VMX_MISC_CR3_TARGETS = 0x1FF << VMX_MISC_CR3_TARGETS_SHIFT
#: Bits 27:25: an MSR list should have at most 512 * (n + 1) entries.
VMX_MISC_MSR_LIST_SHIFT = 25
VMX_MISC_MSR_LIST = 7 << VMX_MISC_MSR_LIST_SHIFT
VMX_MISC_MSR_LIST_UNIT = 512
#: VMWRITE writes all fields, those that are read-only otherwise included.
VMX_MISC_VMWRITE_SHADOW_RO_FIELDS = 1 << 29
#: Software events may be injected with an instruction length of 0.
VMX_MISC_ZERO_LEN_INS = 1 << 30

# IA32_VMX_VMCS_ENUM (A.9): bits 9:1 are the highest index of any field.
VMX_VMCS_ENUM_INDEX_SHIFT = 1

# IA32_VMX_EPT_VPID_CAP (A.10)
VMX_EPT_EXECUTE_ONLY_BIT = 1 << 0
VMX_EPT_PAGE_WALK_4_BIT = 1 << 6
VMX_EPTP_UC_BIT = 1 << 8
VMX_EPTP_WB_BIT = 1 << 14
VMX_EPT_2MB_PAGE_BIT = 1 << 16
VMX_EPT_1GB_PAGE_BIT = 1 << 17
VMX_EPT_INVEPT_BIT = 1 << 20
VMX_EPT_AD_BIT = 1 << 21
VMX_EPT_EXTENT_CONTEXT_BIT = 1 << 25
VMX_EPT_EXTENT_GLOBAL_BIT = 1 << 26
VMX_VPID_INVVPID_BIT = 1 << 32
VMX_VPID_EXTENT_INDIVIDUAL_ADDR_BIT = 1 << 40
VMX_VPID_EXTENT_SINGLE_CONTEXT_BIT = 1 << 41
VMX_VPID_EXTENT_GLOBAL_CONTEXT_BIT = 1 << 42
VMX_VPID_EXTENT_SINGLE_NON_GLOBAL_BIT = 1 << 43

# Types of INVEPT and INVVPID (chapter 31)
VMX_EPT_EXTENT_CONTEXT = 1
VMX_EPT_EXTENT_GLOBAL = 2
VMX_VPID_EXTENT_INDIVIDUAL_ADDR = 0
VMX_VPID_EXTENT_SINGLE_CONTEXT = 1
VMX_VPID_EXTENT_ALL_CONTEXT = 2
VMX_VPID_EXTENT_SINGLE_NON_GLOBAL = 3

# The EPT pointer (25.6.11)
VMX_EPTP_MT_MASK = 7
VMX_EPTP_PWL_MASK = 7 << 3
#: Bits 5:3 are the length of the walk minus one.
VMX_EPTP_PWL_4 = 3 << 3
VMX_EPTP_AD_ENABLE_BIT = 1 << 6
#: Bits 11:7; bit 7 is that of supervisor shadow-stack control, which is not offered.
VMX_EPTP_RESERVED = 0x1F << 7

# Memory types, in IA32_VMX_BASIC and in EPT pointers
MEMORY_TYPE_UC = 0
MEMORY_TYPE_WB = 6

# Regions (25.2): revision identifier and VMX-abort indicator, then data in a format of the processor's own
VMCS_REVISION_ID = 0
VMCS_ABORT_INDICATOR = 4
VMCS_BYTES = 4096
#: Bit 31 of the first word: a shadow VMCS.
VMCS_SHADOW_INDICATOR = 1 << 31
#: The "no VMCS" of VMPTRST and of the VMCS link pointer.
VMCS_NO_POINTER = (1 << 64) - 1

# Entries of the MSR lists (25.7.2): MSR index, four reserved bytes, value
VMX_MSR_ENTRY_BYTES = 16
VMX_MSR_ENTRY_RESERVED = 4
VMX_MSR_ENTRY_VALUE = 8

# Interruption information: events to inject, events that exited, and IDT-vectoring (25.8.3, 25.9.2, 25.9.3)
INTR_INFO_VECTOR_MASK = 0xFF
INTR_INFO_INTR_TYPE_MASK = 7 << 8
INTR_INFO_DELIVER_CODE_MASK = 1 << 11
#: Of a VM exit only: the IRET that faulted has unblocked NMIs.
INTR_INFO_UNBLOCK_NMI = 1 << 12
INTR_INFO_VALID_MASK = 1 << 31
#: Bits 30:12 of an event to inject.
INTR_INFO_RESVD_BITS_MASK = 0x7FFFF000
INTR_TYPE_EXT_INTR = 0 << 8
INTR_TYPE_RESERVED = 1 << 8
INTR_TYPE_NMI_INTR = 2 << 8
INTR_TYPE_HARD_EXCEPTION = 3 << 8
#: INT n
INTR_TYPE_SOFT_INTR = 4 << 8
#: INT1
INTR_TYPE_PRIV_SW_EXCEPTION = 5 << 8
#: INT3 and INTO
INTR_TYPE_SOFT_EXCEPTION = 6 << 8
#: With vector 0: a pending monitor-trap-flag VM exit.
INTR_TYPE_OTHER_EVENT = 7 << 8
#: An instruction is at most as long.
VM_ENTRY_INSTRUCTION_LEN_MAX = 15

# Guest non-register state (25.4.2)
GUEST_ACTIVITY_ACTIVE = 0
GUEST_ACTIVITY_HLT = 1
GUEST_ACTIVITY_SHUTDOWN = 2
GUEST_ACTIVITY_WAIT_SIPI = 3
GUEST_INTR_STATE_STI = 1 << 0
GUEST_INTR_STATE_MOV_SS = 1 << 1
GUEST_INTR_STATE_SMI = 1 << 2
GUEST_INTR_STATE_NMI = 1 << 3
GUEST_INTR_STATE_ENCLAVE_INTR = 1 << 4
#: Pending debug exceptions: breakpoints B3:B0, that one of them is enabled, and a single step.
PENDING_DEBUG_BREAKPOINTS = 0xF
PENDING_DEBUG_ENABLED_BREAKPOINT = 1 << 12
PENDING_DEBUG_BS = 1 << 14

#: Access rights that VMWRITE keeps: those of a descriptor, and "unusable". Processors may drop the reserved bits or
#: keep them; KVM drops them, so that VMREAD tells the same everywhere.
SEGMENT_AR_WRITABLE = 0x1F0FF


class VmInstructionError(IntEnum):
    """VM-instruction error numbers (31.4): why a VMX instruction ended in VMfailValid. Those of SMM have no name."""

    VMCALL_IN_VMX_ROOT_OPERATION = 1
    VMCLEAR_INVALID_ADDRESS = 2
    VMCLEAR_VMXON_POINTER = 3
    VMLAUNCH_NONCLEAR_VMCS = 4
    VMRESUME_NONLAUNCHED_VMCS = 5
    VMRESUME_AFTER_VMXOFF = 6
    ENTRY_INVALID_CONTROL_FIELD = 7
    ENTRY_INVALID_HOST_STATE_FIELD = 8
    VMPTRLD_INVALID_ADDRESS = 9
    VMPTRLD_VMXON_POINTER = 10
    VMPTRLD_INCORRECT_VMCS_REVISION_ID = 11
    UNSUPPORTED_VMCS_COMPONENT = 12
    VMWRITE_READ_ONLY_VMCS_COMPONENT = 13
    VMXON_IN_VMX_ROOT_OPERATION = 15
    ENTRY_EVENTS_BLOCKED_BY_MOV_SS = 26
    INVALID_OPERAND_TO_INVEPT_INVVPID = 28


class VmEntryFailure(IntEnum):
    """Exit qualification of a VM entry that fails for the guest state (27.8): which kind of check has failed."""

    DEFAULT = 0
    PDPTE = 2
    NMI = 3
    VMCS_LINK_PTR = 4


class VmxAbort(IntEnum):
    """VMX-abort indicators (28.7): why a VM exit could not load the host state. Those of SMM have no name."""

    SAVE_GUEST_MSR_FAIL = 1
    HOST_PDPTE_FAIL = 2
    CORRUPTED_VMCS = 3
    LOAD_HOST_MSR_FAIL = 4
    MACHINE_CHECK = 5
    #: An exit from IA-32e mode to a host outside it.
    HOST_ADDR_SPACE_SIZE = 6
