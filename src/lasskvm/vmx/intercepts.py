"""Instructions of L2 that cause VM exits to L1.

Whoever executes an instruction of L2 asks three questions, in this order:

- :func:`is_sensitive`: is it one that VMX non-root operation treats in a way of its own? It depends on the instruction
  alone, so it can be settled when code is compiled, and for nearly all instructions the answer is no;
- :func:`~lasskvm.vmx.intercepts_faults.faults_before_exit`: does it raise a fault that comes before a VM exit?
- :func:`intercept_of`: does it cause a VM exit, and what does the exit tell?

When it does not, it is executed. What is different then about the values that it reads and writes (the read shadows,
the TSC offset, the TPR shadow) is no matter of this module.

Exits of INT3, INTO and INT1 are among these, because they come before anything is looked up in the IDT. All other
events are in :mod:`lasskvm.vmx.intercepts_events`.

Source: Intel SDM volume 3C, 26.1 (instructions that cause VM exits), 28.2 (what is recorded); KVM's
``nested_vmx_l1_wants_exit()``.
"""

from __future__ import annotations

from iced_x86 import Mnemonic

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded, effective_address
from lasskvm.emulator.linearize import linear_address
from lasskvm.state import RAX, RFLAGS
from lasskvm.vmx import intercepts_cr, intercepts_io, intercepts_msr, intercepts_operands
from lasskvm.vmx.entry_checks import secondary_controls
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.instruction_exit import Intercept, instruction_exit
from lasskvm.vmx.intercepts_events import software_exception_exit
from lasskvm.vmx.intercepts_faults import UNDEFINED_IN_NON_ROOT
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import BP, DB, OF
from lasskvm.x86.registers import MASK32, RFLAGS_OF
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["intercept_of", "is_sensitive"]

#: Bit 63 of the ENCLS-exiting bitmap is for all leaf functions from 63 on.
_ENCLS_LAST_BIT = 63


def is_sensitive(decoded: Decoded) -> bool:
    """Whether L1 may intercept *decoded*, or VMX non-root operation may make it #UD.

    The other questions need not be asked about any other instruction. So this is what must not be part of a block of
    L2 that is executed without looking; PAUSE is among it.
    """
    return (
        decoded.instruction.mnemonic in _BY_MNEMONIC
        or decoded.instruction.code in intercepts_cr.BY_CODE
        or decoded.instruction.mnemonic in UNDEFINED_IN_NON_ROOT
    )


def intercept_of(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    """The VM exit that *decoded*, an instruction of L2 at CS:RIP, causes by the controls in *vmcs*, if it does.

    *ctx* is in the state before the instruction; ``ctx.memory`` is L1's guest-physical memory, where the bitmaps are.
    The caller has asked :func:`~lasskvm.vmx.intercepts_faults.faults_before_exit`. Nothing is changed. LMSW reads its
    memory operand, because its value decides: this raises what a load raises, :class:`GuestFault` or
    :class:`~lasskvm.emulator.mmio.MmioReadNeeded`, and those come before the exit.
    """
    instruction = decoded.instruction
    intercept = intercepts_cr.BY_CODE.get(instruction.code) or _BY_MNEMONIC.get(instruction.mnemonic)
    return None if intercept is None else intercept(ctx, decoded, vmcs)


# ----------------------------------------------------------------------------------------------- without conditions


def _always(reason: ExitReason) -> Intercept:
    def intercept(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
        return instruction_exit(reason, decoded)

    return intercept


#: The other VMX instructions, which have operands, are in :mod:`lasskvm.vmx.intercepts_operands`.
_UNCONDITIONAL: dict[int, Intercept] = {
    Mnemonic.CPUID: _always(ExitReason.CPUID),
    Mnemonic.GETSEC: _always(ExitReason.GETSEC),
    Mnemonic.INVD: _always(ExitReason.INVD),
    Mnemonic.XSETBV: _always(ExitReason.XSETBV),
    Mnemonic.VMCALL: _always(ExitReason.VMCALL),
    Mnemonic.VMLAUNCH: _always(ExitReason.VMLAUNCH),
    Mnemonic.VMRESUME: _always(ExitReason.VMRESUME),
    Mnemonic.VMXOFF: _always(ExitReason.VMXOFF),
}


# -------------------------------------------------------------------------------------------- by a control of its own


def _by_primary(control: int, reason: ExitReason) -> Intercept:
    def intercept(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
        if vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL] & control:
            return instruction_exit(reason, decoded)
        return None

    return intercept


def _by_secondary(control: int, reason: ExitReason) -> Intercept:
    def intercept(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
        if secondary_controls(vmcs) & control:
            return instruction_exit(reason, decoded)
        return None

    return intercept


_wbinvd = _by_secondary(vmx.SECONDARY_EXEC_WBINVD_EXITING, ExitReason.WBINVD)

#: The qualification of MWAIT's exit says whether MONITOR has armed anything; here it never does.
_BY_CONTROL: dict[int, Intercept] = {
    Mnemonic.HLT: _by_primary(vmx.CPU_BASED_HLT_EXITING, ExitReason.HLT),
    Mnemonic.MONITOR: _by_primary(vmx.CPU_BASED_MONITOR_EXITING, ExitReason.MONITOR_INSTRUCTION),
    Mnemonic.MWAIT: _by_primary(vmx.CPU_BASED_MWAIT_EXITING, ExitReason.MWAIT_INSTRUCTION),
    Mnemonic.PAUSE: _by_primary(vmx.CPU_BASED_PAUSE_EXITING, ExitReason.PAUSE_INSTRUCTION),
    Mnemonic.RDPMC: _by_primary(vmx.CPU_BASED_RDPMC_EXITING, ExitReason.RDPMC),
    Mnemonic.RDTSC: _by_primary(vmx.CPU_BASED_RDTSC_EXITING, ExitReason.RDTSC),
    Mnemonic.RDTSCP: _by_primary(vmx.CPU_BASED_RDTSC_EXITING, ExitReason.RDTSCP),
    Mnemonic.WBINVD: _wbinvd,
    Mnemonic.WBNOINVD: _wbinvd,
}


# ------------------------------------------------------------------------------------------------------------- others


def _invlpg(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    """The qualification is the linear address. It is only named: neither the canonical rule nor LASS applies."""
    if not vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL] & vmx.CPU_BASED_INVLPG_EXITING:
        return None
    operand = decoded.operand
    assert operand is not None
    address = linear_address(ctx.words, operand.segment, effective_address(ctx.words, operand))
    return instruction_exit(ExitReason.INVLPG, decoded, qualification=address)


def _encls(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    if not secondary_controls(vmcs) & vmx.SECONDARY_EXEC_ENCLS_EXITING:
        return None
    leaf = min(ctx.words[RAX] & MASK32, _ENCLS_LAST_BIT)
    if vmcs[VmcsField.ENCLS_EXITING_BITMAP] >> leaf & 1:
        return instruction_exit(ExitReason.ENCLS, decoded)
    return None


def _int3(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    return software_exception_exit(vmcs, BP, decoded.length)


def _into(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    if not ctx.words[RFLAGS] & RFLAGS_OF:
        return None
    return software_exception_exit(vmcs, OF, decoded.length)


def _int1(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    return software_exception_exit(vmcs, DB, decoded.length)


#: What decides about an instruction, by ``iced_x86.Mnemonic``. The moves to and from control and debug registers share
#: theirs with other instructions, and are found by their code.
_BY_MNEMONIC: dict[int, Intercept] = {
    **_UNCONDITIONAL,
    **_BY_CONTROL,
    **intercepts_cr.BY_MNEMONIC,
    **intercepts_io.BY_MNEMONIC,
    **intercepts_msr.BY_MNEMONIC,
    **intercepts_operands.BY_MNEMONIC,
    Mnemonic.INVLPG: _invlpg,
    Mnemonic.ENCLS: _encls,
    Mnemonic.INT3: _int3,
    Mnemonic.INTO: _into,
    Mnemonic.INT1: _int1,
}
