"""The VMX instructions, as L1 executes them: checks, memory operands, and VMsucceed or one of the two VMfails.

In the order of the manual: #UD where the instruction is not recognized, #GP(0) by privilege, then what is wrong with
the operands. Memory operands are data accesses like others, so segments, the canonical rule, LASS and paging apply. An
address inside a descriptor is only named: LASS has no say in it.

In L2 the instructions cause VM exits, and :mod:`lasskvm.vmx.intercepts` takes them before they get here; what gets here
from L2 is #UD.

Source: Intel SDM volume 3C, chapter 31 (31.2: VMsucceed, VMfailInvalid, VMfailValid; 31.3: the instructions by name);
KVM's ``handle_vmxon()``, ``nested_vmx_run()`` and their neighbours, ``nested_vmx_fail()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from iced_x86 import Mnemonic

from lasskvm.emulator.completion import complete, require_cpl0
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import Unhandleable, general_protection, invalid_opcode
from lasskvm.emulator.modes import in_64bit_mode, in_ia32e_mode, in_protected_mode
from lasskvm.emulator.msrs import read_msr
from lasskvm.emulator.operands import (
    load_memory_operand,
    read_operand,
    store_memory_operand,
    write_operand,
)
from lasskvm.memory import PAGE_MASK
from lasskvm.state import CR0, CR4, CR4_ALLOWED, INTERRUPT_SHADOW, MAXPHYADDR, RFLAGS, TLB_FLUSH, Words
from lasskvm.vmx.control_register_shadows import written_in_guest, written_in_root
from lasskvm.vmx.entry_checks import is_valid_eptp
from lasskvm.vmx.nested import NestedVmx
from lasskvm.vmx.repeated_checks import RepeatedChecks
from lasskvm.vmx.vmcs import VMCS12_REVISION, Vmcs12, VmFailValid, revision_id
from lasskvm.x86 import vmx
from lasskvm.x86.address import is_canonical, linear_bits
from lasskvm.x86.msr import (
    FEATURE_CONTROL_LOCK,
    FEATURE_CONTROL_VMX_OUTSIDE_SMX,
    MSR_IA32_FEATURE_CONTROL,
)
from lasskvm.x86.registers import CR4_VMXE, MASK64, RFLAGS_ARITHMETIC, RFLAGS_CF, RFLAGS_ZF
from lasskvm.x86.vmx import VmInstructionError
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["EnterGuest", "VmxInstructions"]

#: Enters L2 from the current VMCS, whose controls and host state have passed; the second argument is whether VMLAUNCH
#: asks for it. It completes the instruction in every case: with L2's state, or with L1's host state when the entry
#: fails for the guest state. It makes the VMCS "launched" when a VMLAUNCH has succeeded.
EnterGuest = Callable[[Emulation, bool], None]

#: Firmware has to lock the register with VMX enabled.
_VMX_ENABLED = FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMX_OUTSIDE_SMX
_POINTER_BYTES = 8
#: INVEPT's descriptor is an EPT pointer and 64 reserved bits, which the manual's operation does not look at. That of
#: INVVPID is a VPID of 16 bits, reserved bits up to 63, and a linear address.
_DESCRIPTOR_BYTES = 16
_VPID_BITS = 16
_DESCRIPTOR_ADDRESS_SHIFT = 64

#: The types of INVEPT and INVVPID, and the bits of IA32_VMX_EPT_VPID_CAP that offer them.
_INVEPT_TYPES = {
    vmx.VMX_EPT_EXTENT_CONTEXT: vmx.VMX_EPT_EXTENT_CONTEXT_BIT,
    vmx.VMX_EPT_EXTENT_GLOBAL: vmx.VMX_EPT_EXTENT_GLOBAL_BIT,
}
_INVVPID_TYPES = {
    vmx.VMX_VPID_EXTENT_INDIVIDUAL_ADDR: vmx.VMX_VPID_EXTENT_INDIVIDUAL_ADDR_BIT,
    vmx.VMX_VPID_EXTENT_SINGLE_CONTEXT: vmx.VMX_VPID_EXTENT_SINGLE_CONTEXT_BIT,
    vmx.VMX_VPID_EXTENT_ALL_CONTEXT: vmx.VMX_VPID_EXTENT_GLOBAL_CONTEXT_BIT,
    vmx.VMX_VPID_EXTENT_SINGLE_NON_GLOBAL: vmx.VMX_VPID_EXTENT_SINGLE_NON_GLOBAL_BIT,
}
#: What the instructions that are features of their own need: a secondary control, and a bit of IA32_VMX_EPT_VPID_CAP.
_NEEDED: dict[int, tuple[int, int]] = {
    Mnemonic.INVEPT: (vmx.SECONDARY_EXEC_ENABLE_EPT, vmx.VMX_EPT_INVEPT_BIT),
    Mnemonic.INVVPID: (vmx.SECONDARY_EXEC_ENABLE_VPID, vmx.VMX_VPID_INVVPID_BIT),
}


class _VmFailInvalid(Exception):
    """A VMX instruction ends in VMfailInvalid: RFLAGS.CF is set, and there is no error number."""


def _no_way_into_a_guest(ctx: Emulation, launch: bool) -> None:
    raise Unhandleable("VM entries are not set up for this vCPU")


@dataclass
class VmxInstructions:
    """What executes L1's VMX instructions: a :class:`~lasskvm.emulator.context.VmxHandler`.

    ``enter_guest`` may be set later. What it raises goes through to the caller, but for :class:`VmFailValid`, which
    fails the instruction as if a check here had.
    """

    nested: NestedVmx
    enter_guest: EnterGuest = _no_way_into_a_guest
    checks: RepeatedChecks = field(default_factory=RepeatedChecks)

    def execute(self, ctx: Emulation, decoded: Decoded) -> None:
        """Execute one of the instructions and complete it; raises :class:`GuestFault` with nothing changed.

        A memory operand that is a device's may raise :class:`~lasskvm.emulator.mmio.MmioReadNeeded`.
        """
        mnemonic = decoded.instruction.mnemonic
        self._check_recognized(ctx.words, mnemonic)
        if self.nested.in_guest:
            raise Unhandleable("a VMX instruction of a nested guest was not intercepted")
        require_cpl0(ctx.words)
        flags = 0
        try:
            if mnemonic in _ENTRIES:
                self._enter(ctx, launch=mnemonic == Mnemonic.VMLAUNCH)
                return
            _INSTRUCTIONS[mnemonic](self.nested, ctx, decoded)
        except _VmFailInvalid:
            flags = RFLAGS_CF
        except VmFailValid as failure:
            flags = _fail(self.nested, failure.error)
        ctx.words[RFLAGS] = ctx.words[RFLAGS] & ~RFLAGS_ARITHMETIC | flags
        complete(ctx, decoded)

    def written_control_register(self, words: Words, number: int, value: int) -> int:
        """What MOV of *value* to CR0 or CR4 writes, in or out of VMX operation; #GP(0) as :class:`GuestFault`."""
        nested = self.nested
        if nested.in_guest:
            assert nested.current is not None
            return written_in_guest(nested.current, nested.capabilities, words, number, value)
        if nested.in_vmx_operation:
            return written_in_root(nested.capabilities, number, value)
        return value

    def _check_recognized(self, words: Words, mnemonic: int) -> None:
        """#UD in real, virtual-8086 and compatibility mode, and where the instruction is not available."""
        if not in_protected_mode(words) or in_ia32e_mode(words) != in_64bit_mode(words):
            raise invalid_opcode()
        is_on = words[CR4] & CR4_VMXE if mnemonic == Mnemonic.VMXON else self.nested.in_vmx_operation
        if not is_on:
            raise invalid_opcode()
        control, capability = _NEEDED.get(mnemonic, (0, 0))
        offered = self.nested.capabilities
        if control & ~offered.secondary.may_be_1 or capability & ~offered.ept_vpid:
            raise invalid_opcode()

    def _enter(self, ctx: Emulation, *, launch: bool) -> None:
        """VMLAUNCH and VMRESUME, up to where the guest state is loaded."""
        vmcs = _current_vmcs(self.nested)
        if ctx.words[INTERRUPT_SHADOW]:
            # MOV SS and STI cast the same shadow here. Nobody enters a guest right behind STI.
            raise VmFailValid(VmInstructionError.ENTRY_EVENTS_BLOCKED_BY_MOV_SS)
        if launch and vmcs.launched:
            raise VmFailValid(VmInstructionError.VMLAUNCH_NONCLEAR_VMCS)
        if not launch and not vmcs.launched:
            raise VmFailValid(VmInstructionError.VMRESUME_NONLAUNCHED_VMCS)
        self.checks.controls_and_host_state(vmcs, self.nested.capabilities, ctx.memory, ctx.words)
        self.enter_guest(ctx, launch)


def _fail(nested: NestedVmx, error: VmInstructionError) -> int:
    """The flags of VMfail: VMfailValid with *error* in the current VMCS; without one VMfailInvalid."""
    if nested.current is None:
        return RFLAGS_CF
    nested.current[VmcsField.VM_INSTRUCTION_ERROR] = error
    return RFLAGS_ZF


def _current_vmcs(nested: NestedVmx) -> Vmcs12:
    if nested.current is None:
        raise _VmFailInvalid
    return nested.current


# ------------------------------------------------------------------------------------------------- VMX operation


def _vmxon(nested: NestedVmx, ctx: Emulation, decoded: Decoded) -> None:
    words = ctx.words
    if nested.in_vmx_operation:
        raise VmFailValid(VmInstructionError.VMXON_IN_VMX_ROOT_OPERATION)
    capabilities = nested.capabilities
    if not capabilities.cr0.allow(words[CR0]) or not capabilities.cr4.allow(words[CR4]):
        raise general_protection()
    if read_msr(ctx, MSR_IA32_FEATURE_CONTROL, host_initiated=True) & _VMX_ENABLED != _VMX_ENABLED:
        raise general_protection()
    gpa = load_memory_operand(ctx, decoded, _POINTER_BYTES)
    if not _is_region_address(words, gpa) or revision_id(ctx.memory, gpa) != VMCS12_REVISION:
        raise _VmFailInvalid
    nested.enter_operation(gpa)


def _vmxoff(nested: NestedVmx, ctx: Emulation, decoded: Decoded) -> None:
    nested.leave_operation(ctx.memory)


# ------------------------------------------------------------------------------------------------ VMCS pointers


def _vmclear(nested: NestedVmx, ctx: Emulation, decoded: Decoded) -> None:
    gpa = load_memory_operand(ctx, decoded, _POINTER_BYTES)
    if not _is_region_address(ctx.words, gpa):
        raise VmFailValid(VmInstructionError.VMCLEAR_INVALID_ADDRESS)
    if gpa == nested.vmxon_gpa:
        raise VmFailValid(VmInstructionError.VMCLEAR_VMXON_POINTER)
    nested.clear(ctx.memory, gpa)


def _vmptrld(nested: NestedVmx, ctx: Emulation, decoded: Decoded) -> None:
    """The revision is that in memory even when the VMCS is current already."""
    gpa = load_memory_operand(ctx, decoded, _POINTER_BYTES)
    if not _is_region_address(ctx.words, gpa):
        raise VmFailValid(VmInstructionError.VMPTRLD_INVALID_ADDRESS)
    if gpa == nested.vmxon_gpa:
        raise VmFailValid(VmInstructionError.VMPTRLD_VMXON_POINTER)
    # Bit 31 differs in a shadow VMCS, which is not offered, and everything where there is no memory.
    if revision_id(ctx.memory, gpa) != VMCS12_REVISION:
        raise VmFailValid(VmInstructionError.VMPTRLD_INCORRECT_VMCS_REVISION_ID)
    nested.make_current(ctx.memory, gpa)


def _vmptrst(nested: NestedVmx, ctx: Emulation, decoded: Decoded) -> None:
    store_memory_operand(ctx, decoded, _POINTER_BYTES, nested.current_gpa)


def _is_region_address(words: Words, gpa: int) -> bool:
    return not gpa & PAGE_MASK and not gpa >> words[MAXPHYADDR]


# -------------------------------------------------------------------------------------------------- VMCS fields


def _vmread(nested: NestedVmx, ctx: Emulation, decoded: Decoded) -> None:
    """Operands have 64 bits in 64-bit mode, else 32, whatever the width of the field."""
    value = _current_vmcs(nested).read(read_operand(ctx, decoded, 1))
    write_operand(ctx, decoded, 0, value)


def _vmwrite(nested: NestedVmx, ctx: Emulation, decoded: Decoded) -> None:
    """The value is loaded before the encoding is looked at, so that a fault comes before VMfailValid, as in KVM."""
    vmcs = _current_vmcs(nested)
    value = read_operand(ctx, decoded, 1)
    encoding = read_operand(ctx, decoded, 0)
    vmcs.write(encoding, value, any_field=nested.capabilities.vmwrite_any_field)


# ------------------------------------------------------------------------------------------------- invalidation


def _invept(nested: NestedVmx, ctx: Emulation, decoded: Decoded) -> None:
    """Whatever the type, all translations go. The descriptor is read even where the type does not need it."""
    kind = read_operand(ctx, decoded, 0)
    if not nested.capabilities.ept_vpid & _INVEPT_TYPES.get(kind, 0):
        raise VmFailValid(VmInstructionError.INVALID_OPERAND_TO_INVEPT_INVVPID)
    eptp = load_memory_operand(ctx, decoded, _DESCRIPTOR_BYTES) & MASK64
    if kind == vmx.VMX_EPT_EXTENT_CONTEXT and not is_valid_eptp(eptp, nested.capabilities, ctx.words):
        raise VmFailValid(VmInstructionError.INVALID_OPERAND_TO_INVEPT_INVVPID)
    ctx.words[TLB_FLUSH] = 1


def _invvpid(nested: NestedVmx, ctx: Emulation, decoded: Decoded) -> None:
    """As INVEPT. The address to invalidate has to be canonical, and nothing else; LAM does not apply to it either."""
    kind = read_operand(ctx, decoded, 0)
    if not nested.capabilities.ept_vpid & _INVVPID_TYPES.get(kind, 0):
        raise VmFailValid(VmInstructionError.INVALID_OPERAND_TO_INVEPT_INVVPID)
    descriptor = load_memory_operand(ctx, decoded, _DESCRIPTOR_BYTES)
    vpid, address = descriptor & MASK64, descriptor >> _DESCRIPTOR_ADDRESS_SHIFT
    # VPID 0 is L1's own.
    if vpid >> _VPID_BITS or (kind != vmx.VMX_VPID_EXTENT_ALL_CONTEXT and not vpid):
        raise VmFailValid(VmInstructionError.INVALID_OPERAND_TO_INVEPT_INVVPID)
    if kind == vmx.VMX_VPID_EXTENT_INDIVIDUAL_ADDR and not _is_nameable(ctx.words, address):
        raise VmFailValid(VmInstructionError.INVALID_OPERAND_TO_INVEPT_INVVPID)
    ctx.words[TLB_FLUSH] = 1


def _is_nameable(words: Words, address: int) -> bool:
    """Canonical for the widest addresses that the processor has; CR4.LA57 does not matter
    (KVM: ``is_noncanonical_invlpg_address()``)."""
    return is_canonical(address, linear_bits(words[CR4_ALLOWED]))


_ENTRIES = frozenset((Mnemonic.VMLAUNCH, Mnemonic.VMRESUME))
#: The others: they return for VMsucceed, and raise for everything else.
_INSTRUCTIONS: dict[int, Callable[[NestedVmx, Emulation, Decoded], None]] = {
    Mnemonic.INVEPT: _invept,
    Mnemonic.INVVPID: _invvpid,
    Mnemonic.VMCLEAR: _vmclear,
    Mnemonic.VMPTRLD: _vmptrld,
    Mnemonic.VMPTRST: _vmptrst,
    Mnemonic.VMREAD: _vmread,
    Mnemonic.VMWRITE: _vmwrite,
    Mnemonic.VMXOFF: _vmxoff,
    Mnemonic.VMXON: _vmxon,
}
