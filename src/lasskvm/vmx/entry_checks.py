"""The checks of a VM entry that end in VMfailValid: the controls and the host state.

They come before anything is loaded, and :func:`check_controls_and_host_state` makes all of them. Each group is a
generator of sentences, one for every rule that the VMCS breaks. *words* is the state of L1, which enters.

Source: Intel SDM volume 3C, 27.2.1 (controls) and 27.2.2 to 27.2.4 (host state); KVM's
``nested_vmx_check_controls()`` and ``nested_vmx_check_host_state()``. Manual and KVM leave the order within a group
open, because the error number is the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from lasskvm.emulator import msr_checks
from lasskvm.emulator.control import is_legal_cr3
from lasskvm.emulator.modes import in_ia32e_mode
from lasskvm.memory import PAGE_MASK, GuestMemory
from lasskvm.state import CR4_ALLOWED, EFER_ALLOWED, MAXPHYADDR, Words
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.tpr_shadow import read_cr8
from lasskvm.vmx.vmcs import Vmcs12, VmFailValid
from lasskvm.x86 import vmx
from lasskvm.x86.address import is_canonical, linear_bits
from lasskvm.x86.descriptors import SELECTOR_RPL, SELECTOR_TI
from lasskvm.x86.exceptions import NMI, has_error_code
from lasskvm.x86.registers import CR0_PE, CR4_PAE, CR4_PCIDE, EFER_LMA, EFER_LME
from lasskvm.x86.vmx import VmInstructionError
from lasskvm.x86.vmx_fields import VmcsField

__all__ = [
    "check_controls_and_host_state",
    "check_tpr_shadow",
    "entry_control_violations",
    "execution_control_violations",
    "exit_control_violations",
    "host_state_violations",
    "is_valid_eptp",
    "secondary_controls",
]

#: The bits of the TPR threshold that exist.
_TPR_THRESHOLD = 0xF
#: Exceptions have vectors below.
_EXCEPTION_VECTORS = 32
_ERROR_CODE = 0xFFFF

_HOST_SELECTORS = (
    VmcsField.HOST_ES_SELECTOR, VmcsField.HOST_CS_SELECTOR, VmcsField.HOST_SS_SELECTOR,
    VmcsField.HOST_DS_SELECTOR, VmcsField.HOST_FS_SELECTOR, VmcsField.HOST_GS_SELECTOR,
    VmcsField.HOST_TR_SELECTOR,
)  # fmt: skip
_HOST_ADDRESSES = (
    VmcsField.HOST_FS_BASE, VmcsField.HOST_GS_BASE, VmcsField.HOST_TR_BASE, VmcsField.HOST_GDTR_BASE,
    VmcsField.HOST_IDTR_BASE, VmcsField.HOST_IA32_SYSENTER_ESP, VmcsField.HOST_IA32_SYSENTER_EIP,
)  # fmt: skip
_SOFTWARE_EVENTS = (
    vmx.INTR_TYPE_SOFT_INTR,
    vmx.INTR_TYPE_PRIV_SW_EXCEPTION,
    vmx.INTR_TYPE_SOFT_EXCEPTION,
)


def check_controls_and_host_state(
    vmcs: Vmcs12, capabilities: VmxCapabilities, memory: GuestMemory, words: Words
) -> None:
    """Raise :class:`VmFailValid` with error 7 when a control is wrong, else with error 8 when the host state is."""
    for violation in execution_control_violations(vmcs, capabilities, memory, words):
        raise VmFailValid(VmInstructionError.ENTRY_INVALID_CONTROL_FIELD, violation)
    for violation in exit_control_violations(vmcs, capabilities, words):
        raise VmFailValid(VmInstructionError.ENTRY_INVALID_CONTROL_FIELD, violation)
    for violation in entry_control_violations(vmcs, capabilities, words):
        raise VmFailValid(VmInstructionError.ENTRY_INVALID_CONTROL_FIELD, violation)
    for violation in host_state_violations(vmcs, capabilities, words):
        raise VmFailValid(VmInstructionError.ENTRY_INVALID_HOST_STATE_FIELD, violation)


def check_tpr_shadow(vmcs: Vmcs12, memory: GuestMemory, words: Words) -> None:
    """The part of :func:`check_controls_and_host_state` that depends on memory."""
    if vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL] & vmx.CPU_BASED_TPR_SHADOW:
        for violation in _tpr_shadow_violations(vmcs, memory, words):
            raise VmFailValid(VmInstructionError.ENTRY_INVALID_CONTROL_FIELD, violation)


def secondary_controls(vmcs: Vmcs12) -> int:
    """The secondary controls as they work: all 0 while the primary controls do not activate them."""
    if vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL] & vmx.CPU_BASED_ACTIVATE_SECONDARY_CONTROLS:
        return vmcs[VmcsField.SECONDARY_VM_EXEC_CONTROL]
    return 0


# ------------------------------------------------------------------------------------------------------- controls


def execution_control_violations(
    vmcs: Vmcs12, capabilities: VmxCapabilities, memory: GuestMemory, words: Words
) -> Iterator[str]:
    """What is wrong with the VM-execution controls (27.2.1.1)."""
    pin_based = vmcs[VmcsField.PIN_BASED_VM_EXEC_CONTROL]
    cpu_based = vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL]
    if not capabilities.pin_based.allow(pin_based):
        yield "a pin-based control is not supported"
    if not capabilities.cpu_based.allow(cpu_based):
        yield "a primary processor-based control is not supported"
    if not capabilities.secondary.allow(secondary_controls(vmcs)):
        yield "a secondary processor-based control is not supported"
    if vmcs[VmcsField.CR3_TARGET_COUNT] > capabilities.cr3_targets:
        yield "there are more CR3-target values than the processor has"
    if cpu_based & vmx.CPU_BASED_USE_IO_BITMAPS:
        for bitmap in (VmcsField.IO_BITMAP_A, VmcsField.IO_BITMAP_B):
            if not _is_page_address(words, vmcs[bitmap]):
                yield "the address of an I/O bitmap is not that of a page"
    if cpu_based & vmx.CPU_BASED_USE_MSR_BITMAPS and not _is_page_address(words, vmcs[VmcsField.MSR_BITMAP]):
        yield "the address of the MSR bitmap is not that of a page"
    if cpu_based & vmx.CPU_BASED_TPR_SHADOW:
        yield from _tpr_shadow_violations(vmcs, memory, words)
    virtual_nmis = pin_based & vmx.PIN_BASED_VIRTUAL_NMIS
    if virtual_nmis and not pin_based & vmx.PIN_BASED_NMI_EXITING:
        yield "virtual NMIs need NMI exiting"
    if cpu_based & vmx.CPU_BASED_NMI_WINDOW_EXITING and not virtual_nmis:
        yield "NMI-window exiting needs virtual NMIs"
    yield from _secondary_control_violations(vmcs, capabilities, words)


def _tpr_shadow_violations(vmcs: Vmcs12, memory: GuestMemory, words: Words) -> Iterator[str]:
    page = vmcs[VmcsField.VIRTUAL_APIC_PAGE_ADDR]
    threshold = vmcs[VmcsField.TPR_THRESHOLD]
    if not _is_page_address(words, page):
        yield "the address of the virtual-APIC page is not that of a page"
    elif threshold & _TPR_THRESHOLD > read_cr8(vmcs, memory):
        yield "the TPR threshold is above the virtual TPR"
    if threshold & ~_TPR_THRESHOLD:
        yield "reserved bits of the TPR threshold are set"


def _secondary_control_violations(vmcs: Vmcs12, capabilities: VmxCapabilities, words: Words) -> Iterator[str]:
    secondary = secondary_controls(vmcs)
    if secondary & vmx.SECONDARY_EXEC_ENABLE_VPID and not vmcs[VmcsField.VIRTUAL_PROCESSOR_ID]:
        yield "VPID 0 is the host's"
    if secondary & vmx.SECONDARY_EXEC_ENABLE_EPT:
        if not is_valid_eptp(vmcs[VmcsField.EPT_POINTER], capabilities, words):
            yield "the EPT pointer is invalid"
    elif secondary & vmx.SECONDARY_EXEC_UNRESTRICTED_GUEST:
        yield "an unrestricted guest needs EPT"


def is_valid_eptp(eptp: int, capabilities: VmxCapabilities, words: Words) -> bool:
    """Whether *eptp* is an EPT pointer that INVEPT and VM entry accept (KVM: ``nested_vmx_check_eptp()``)."""
    supported = capabilities.ept_vpid
    memory_types = {vmx.MEMORY_TYPE_UC: vmx.VMX_EPTP_UC_BIT, vmx.MEMORY_TYPE_WB: vmx.VMX_EPTP_WB_BIT}
    if not supported & memory_types.get(eptp & vmx.VMX_EPTP_MT_MASK, 0):
        return False
    if eptp & vmx.VMX_EPTP_PWL_MASK != vmx.VMX_EPTP_PWL_4:
        return False
    if eptp & vmx.VMX_EPTP_AD_ENABLE_BIT and not supported & vmx.VMX_EPT_AD_BIT:
        return False
    return not eptp & vmx.VMX_EPTP_RESERVED and not eptp >> words[MAXPHYADDR]


def exit_control_violations(vmcs: Vmcs12, capabilities: VmxCapabilities, words: Words) -> Iterator[str]:
    """What is wrong with the VM-exit controls (27.2.1.2)."""
    controls = vmcs[VmcsField.VM_EXIT_CONTROLS]
    if not capabilities.vm_exit.allow(controls):
        yield "a VM-exit control is not supported"
    timer = vmcs[VmcsField.PIN_BASED_VM_EXEC_CONTROL] & vmx.PIN_BASED_VMX_PREEMPTION_TIMER
    if controls & vmx.VM_EXIT_SAVE_VMX_PREEMPTION_TIMER and not timer:
        yield "the preemption timer is to be saved, but not active"
    for address, count in (
        (VmcsField.VM_EXIT_MSR_STORE_ADDR, VmcsField.VM_EXIT_MSR_STORE_COUNT),
        (VmcsField.VM_EXIT_MSR_LOAD_ADDR, VmcsField.VM_EXIT_MSR_LOAD_COUNT),
    ):
        if not _is_msr_list(words, vmcs[address], vmcs[count]):
            yield "an MSR list of the VM exit is misaligned or beyond physical memory"


def entry_control_violations(vmcs: Vmcs12, capabilities: VmxCapabilities, words: Words) -> Iterator[str]:
    """What is wrong with the VM-entry controls (27.2.1.3)."""
    if not capabilities.vm_entry.allow(vmcs[VmcsField.VM_ENTRY_CONTROLS]):
        yield "a VM-entry control is not supported"
    if vmcs[VmcsField.VM_ENTRY_INTR_INFO_FIELD] & vmx.INTR_INFO_VALID_MASK:
        yield from _event_violations(vmcs, capabilities)
    address, count = vmcs[VmcsField.VM_ENTRY_MSR_LOAD_ADDR], vmcs[VmcsField.VM_ENTRY_MSR_LOAD_COUNT]
    if not _is_msr_list(words, address, count):
        yield "the MSR list of the VM entry is misaligned or beyond physical memory"


def _event_violations(vmcs: Vmcs12, capabilities: VmxCapabilities) -> Iterator[str]:
    """What is wrong with the event to inject."""
    information = vmcs[VmcsField.VM_ENTRY_INTR_INFO_FIELD]
    kind = information & vmx.INTR_INFO_INTR_TYPE_MASK
    vector = information & vmx.INTR_INFO_VECTOR_MASK
    if kind == vmx.INTR_TYPE_RESERVED:
        yield "the type of the event is reserved"
    monitor_trap = capabilities.cpu_based.may_be_1 & vmx.CPU_BASED_MONITOR_TRAP_FLAG
    if kind == vmx.INTR_TYPE_OTHER_EVENT and (vector or not monitor_trap):
        yield "there is no such other event"
    if kind == vmx.INTR_TYPE_NMI_INTR and vector != NMI:
        yield "an NMI has vector 2"
    if kind == vmx.INTR_TYPE_HARD_EXCEPTION and vector >= _EXCEPTION_VECTORS:
        yield "there is no such exception"
    if information & vmx.INTR_INFO_RESVD_BITS_MASK:
        yield "reserved bits of the event are set"
    yield from _error_code_violations(vmcs, capabilities, kind == vmx.INTR_TYPE_HARD_EXCEPTION, vector)
    if kind in _SOFTWARE_EVENTS:
        length = vmcs[VmcsField.VM_ENTRY_INSTRUCTION_LEN]
        shortest = 0 if capabilities.misc & vmx.VMX_MISC_ZERO_LEN_INS else 1
        if not shortest <= length <= vmx.VM_ENTRY_INSTRUCTION_LEN_MAX:
            yield "no instruction has the length of the one to inject"


def _error_code_violations(
    vmcs: Vmcs12, capabilities: VmxCapabilities, is_exception: bool, vector: int
) -> Iterator[str]:
    delivers = vmcs[VmcsField.VM_ENTRY_INTR_INFO_FIELD] & vmx.INTR_INFO_DELIVER_CODE_MASK != 0
    unrestricted = secondary_controls(vmcs) & vmx.SECONDARY_EXEC_UNRESTRICTED_GUEST
    protected = not unrestricted or vmcs[VmcsField.GUEST_CR0] & CR0_PE
    if not is_exception or not protected:
        if delivers:
            yield "the event has no error code: it is no exception, or is delivered in real mode"
    elif not capabilities.basic & vmx.VMX_BASIC_NO_HW_ERROR_CODE_CC and delivers != has_error_code(vector):
        yield "the exception has an error code that it should not have, or lacks one"
    if delivers and vmcs[VmcsField.VM_ENTRY_EXCEPTION_ERROR_CODE] & ~_ERROR_CODE:
        yield "the error code has more than 16 bits"


def _is_page_address(words: Words, gpa: int) -> bool:
    return not gpa & PAGE_MASK and not gpa >> words[MAXPHYADDR]


def _is_msr_list(words: Words, gpa: int, count: int) -> bool:
    """An empty list may be anywhere."""
    if not count:
        return True
    last = gpa + count * vmx.VMX_MSR_ENTRY_BYTES - 1
    return not gpa % vmx.VMX_MSR_ENTRY_BYTES and not last >> words[MAXPHYADDR]


# ----------------------------------------------------------------------------------------------------- host state


def host_state_violations(vmcs: Vmcs12, capabilities: VmxCapabilities, words: Words) -> Iterator[str]:
    """What is wrong with the host state (27.2.2 to 27.2.4).

    A host CR4 with LASS is wrong where L1 has no LASS, by the fixed bits; LASS has no say in the addresses.
    """
    controls = vmcs[VmcsField.VM_EXIT_CONTROLS]
    ia32e = controls & vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE != 0
    if not capabilities.cr0.allow(vmcs[VmcsField.HOST_CR0]):
        yield "host CR0 has bits that VMX operation does not allow"
    if not capabilities.cr4.allow(vmcs[VmcsField.HOST_CR4]):
        yield "host CR4 has bits that VMX operation does not allow"
    if not is_legal_cr3(words, vmcs[VmcsField.HOST_CR3]):
        yield "host CR3 is beyond physical memory"
    if controls & vmx.VM_EXIT_LOAD_IA32_PAT and not msr_checks.pat(words, vmcs[VmcsField.HOST_IA32_PAT]):
        yield "host IA32_PAT has a memory type that does not exist"
    if controls & vmx.VM_EXIT_LOAD_IA32_EFER:
        efer = vmcs[VmcsField.HOST_IA32_EFER]
        if efer & ~words[EFER_ALLOWED] or efer & (EFER_LMA | EFER_LME) != (EFER_LMA | EFER_LME) * ia32e:
            yield "host IA32_EFER has reserved bits, or another mode than the controls"
    yield from _host_segment_violations(vmcs, words, ia32e)
    yield from _address_space_violations(vmcs, words, ia32e)


def _host_segment_violations(vmcs: Vmcs12, words: Words, ia32e: bool) -> Iterator[str]:
    if any(vmcs[selector] & (SELECTOR_RPL | SELECTOR_TI) for selector in _HOST_SELECTORS):
        yield "a host selector has RPL or TI set"
    if not vmcs[VmcsField.HOST_CS_SELECTOR] or not vmcs[VmcsField.HOST_TR_SELECTOR]:
        yield "host CS or TR is null"
    if not ia32e and not vmcs[VmcsField.HOST_SS_SELECTOR]:
        yield "host SS is null outside IA-32e mode"
    # Registers take what the processor could use, whatever CR4.LA57 says at the moment.
    bits = linear_bits(words[CR4_ALLOWED])
    if not all(is_canonical(vmcs[address], bits) for address in _HOST_ADDRESSES):
        yield "a host base or SYSENTER address is not canonical"


def _address_space_violations(vmcs: Vmcs12, words: Words, ia32e: bool) -> Iterator[str]:
    cr4, rip = vmcs[VmcsField.HOST_CR4], vmcs[VmcsField.HOST_RIP]
    if ia32e != in_ia32e_mode(words):
        yield "VM exits would not return to the mode that the VM entry is made in"
    if ia32e:
        if not cr4 & CR4_PAE:
            yield "host CR4 has no PAE in IA-32e mode"
        if not is_canonical(rip, linear_bits(cr4)):
            yield "host RIP is not canonical"
    else:
        if vmcs[VmcsField.VM_ENTRY_CONTROLS] & vmx.VM_ENTRY_IA32E_MODE:
            yield "the guest cannot be in IA-32e mode when the host is not"
        if cr4 & CR4_PCIDE:
            yield "host CR4 has PCIDE outside IA-32e mode"
        if rip >> 32:
            yield "host RIP has more than 32 bits outside IA-32e mode"
