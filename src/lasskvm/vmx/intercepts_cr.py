"""VM exits for accesses to control and debug registers.

L1 owns the bits of CR0 and CR4 that are set in the guest/host masks, LASS in CR4 if it likes. L2 reads them from the
read shadows, and what it writes causes an exit unless it is what the shadow says already.

Source: Intel SDM volume 3C, 26.1.3 (CLTS, LMSW, MOV from and to CR, MOV DR), 25.6.6 (masks and shadows), 25.6.7
(CR3-target values), 28.2.1 with tables 28-3 and 28-4 (qualifications); KVM's ``nested_vmx_exit_handled_cr()``.
"""

from __future__ import annotations

from iced_x86 import Code, Mnemonic, Register

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded, effective_address
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.operands import is_register_operand, read_operand, read_register
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.instruction_exit import Intercept, instruction_exit, register_number
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.registers import CR0_EM, CR0_MP, CR0_PE, CR0_TS
from lasskvm.x86.vmx_exits import CrAccess, ExitReason, cr_access_qualification, dr_access_qualification
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["BY_CODE", "BY_MNEMONIC"]

_SOURCE_OPERAND16 = 0xFFFF

#: MOV to CR0 and CR4: the guest/host mask and the read shadow.
_MASKED = {
    0: (VmcsField.CR0_GUEST_HOST_MASK, VmcsField.CR0_READ_SHADOW),
    4: (VmcsField.CR4_GUEST_HOST_MASK, VmcsField.CR4_READ_SHADOW),
}
#: Controls for the other registers. There are no CR3-target values (VM entry fails when there are to be some), so with
#: "CR3-load exiting" every MOV to CR3 causes an exit.
_LOAD_CONTROLS = {3: vmx.CPU_BASED_CR3_LOAD_EXITING, 8: vmx.CPU_BASED_CR8_LOAD_EXITING}
_STORE_CONTROLS = {3: vmx.CPU_BASED_CR3_STORE_EXITING, 8: vmx.CPU_BASED_CR8_STORE_EXITING}


def _mov_to_cr(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    source = decoded.instruction.op1_register
    number = decoded.instruction.op0_register - Register.CR0
    if number in _MASKED:
        mask, shadow = _MASKED[number]
        exits = (read_register(ctx.words, source) ^ vmcs[shadow]) & vmcs[mask]
    else:
        exits = vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL] & _LOAD_CONTROLS.get(number, 0)
    if not exits:
        return None
    qualification = cr_access_qualification(number, CrAccess.MOV_TO_CR, register_number(source))
    return instruction_exit(ExitReason.CR_ACCESS, decoded, qualification=qualification)


def _mov_from_cr(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    """CR0 and CR4 are never intercepted: there are read shadows for them."""
    destination = decoded.instruction.op0_register
    number = decoded.instruction.op1_register - Register.CR0
    if not vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL] & _STORE_CONTROLS.get(number, 0):
        return None
    qualification = cr_access_qualification(number, CrAccess.MOV_FROM_CR, register_number(destination))
    return instruction_exit(ExitReason.CR_ACCESS, decoded, qualification=qualification)


def _clts(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    """With TS clear in the shadow, nothing would change for L2."""
    if not vmcs[VmcsField.CR0_GUEST_HOST_MASK] & vmcs[VmcsField.CR0_READ_SHADOW] & CR0_TS:
        return None
    qualification = cr_access_qualification(0, CrAccess.CLTS)
    return instruction_exit(ExitReason.CR_ACCESS, decoded, qualification=qualification)


def _lmsw(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    """LMSW cannot clear PE, so for PE only an attempt to set it counts."""
    value = read_operand(ctx, decoded, 0) & _SOURCE_OPERAND16
    mask, shadow = vmcs[VmcsField.CR0_GUEST_HOST_MASK], vmcs[VmcsField.CR0_READ_SHADOW]
    changed = (value ^ shadow) & (CR0_MP | CR0_EM | CR0_TS) | value & ~shadow & CR0_PE
    if not changed & mask:
        return None
    address = 0
    if decoded.operand is not None:
        offset = effective_address(ctx.words, decoded.operand)
        address = linear_address(ctx.words, decoded.operand.segment, offset)
    qualification = cr_access_qualification(
        0, CrAccess.LMSW, lmsw_source=value, lmsw_from_memory=not is_register_operand(decoded, 0)
    )
    return instruction_exit(
        ExitReason.CR_ACCESS, decoded, qualification=qualification, linear_address=address
    )


def _mov_dr(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    """Comes before the faults by privilege and CR4.DE, and before the #DB of DR7.GD. DR4 and DR5 keep their numbers."""
    if not vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL] & vmx.CPU_BASED_MOV_DR_EXITING:
        return None
    destination, source = decoded.instruction.op0_register, decoded.instruction.op1_register
    reads = Register.DR0 <= source <= Register.DR15
    dr, general = (source, destination) if reads else (destination, source)
    qualification = dr_access_qualification(dr - Register.DR0, register_number(general), reads=reads)
    return instruction_exit(ExitReason.DR_ACCESS, decoded, qualification=qualification)


#: By ``iced_x86.Code``.
BY_CODE: dict[int, Intercept] = {
    Code.MOV_CR_R32: _mov_to_cr,
    Code.MOV_CR_R64: _mov_to_cr,
    Code.MOV_R32_CR: _mov_from_cr,
    Code.MOV_R64_CR: _mov_from_cr,
    Code.MOV_DR_R32: _mov_dr,
    Code.MOV_DR_R64: _mov_dr,
    Code.MOV_R32_DR: _mov_dr,
    Code.MOV_R64_DR: _mov_dr,
}

#: By ``iced_x86.Mnemonic``.
BY_MNEMONIC: dict[int, Intercept] = {Mnemonic.CLTS: _clts, Mnemonic.LMSW: _lmsw}
