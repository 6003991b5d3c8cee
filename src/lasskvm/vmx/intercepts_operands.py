"""VM exits that tell where the operands are: descriptor tables, VMX instructions, INVPCID, XSAVES, RDRAND.

L1 finds the address itself: the instruction information has segment, base, index and scale, the exit qualification the
displacement. Nothing has been accessed or checked, by segment, LASS or paging, when the exit occurs.

Source: Intel SDM volume 3C, 26.1.2 and 26.1.3, 28.2.1 (displacement), 28.2.5 with tables 28-9 to 28-14 (instruction
information); KVM's ``get_vmx_mem_address()``, which reads them.
"""

from __future__ import annotations

from iced_x86 import Code, Mnemonic

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded, MemoryOperand
from lasskvm.emulator.operands import operand_size
from lasskvm.state import RAX, RDX, RIP, Words
from lasskvm.vmx.entry_checks import secondary_controls
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.instruction_exit import Intercept, instruction_exit, register_number
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.msr import MSR_IA32_XSS
from lasskvm.x86.registers import MASK32
from lasskvm.x86.vmx_exits import (
    ExitReason,
    descriptor_table_information,
    memory_operand_information,
    random_information,
    register_operand_information,
)
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["BY_MNEMONIC"]

_NO_WORD = -1
_BITS_IN_BYTE = 8
_HALF_BITS = 32

#: How the instruction information names the instructions on GDTR and IDTR (table 28-10), and on LDTR and TR (28-11).
_TABLE_INSTRUCTIONS = {Mnemonic.SGDT: 0, Mnemonic.SIDT: 1, Mnemonic.LGDT: 2, Mnemonic.LIDT: 3}
_SELECTOR_INSTRUCTIONS = {Mnemonic.SLDT: 0, Mnemonic.STR: 1, Mnemonic.LLDT: 2, Mnemonic.LTR: 3}
_TABLE_OPERANDS16 = (Code.LGDT_M1632_16, Code.LIDT_M1632_16, Code.SGDT_M1632_16, Code.SIDT_M1632_16)


def _displacement(words: Words, decoded: Decoded) -> int:
    """The exit qualification: the displacement; with RIP added where it is relative to that. 0 for a register operand.

    It has as many bits as addresses of the instruction have; those above are undefined.
    """
    operand = decoded.operand
    if operand is None:
        return 0
    # The decoder counts the displacement from the start of the instruction.
    base = words[RIP] if operand.relative_to_rip else 0
    return base + operand.displacement & operand.address_mask


def _place(operand: MemoryOperand, register2: int = 0) -> int:
    return memory_operand_information(
        address_size=operand.address_mask.bit_length() // _BITS_IN_BYTE,
        segment=operand.segment,
        # State words of the general-purpose registers have the numbers of the encodings.
        base=None if operand.base == _NO_WORD else operand.base,
        index=None if operand.index == _NO_WORD else operand.index,
        scale=operand.scale,
        register2=register2,
    )


def _place_of(decoded: Decoded, register2: int = 0) -> int:
    assert decoded.operand is not None
    return _place(decoded.operand, register2)


def _memory_exit(ctx: Emulation, decoded: Decoded, reason: ExitReason, information: int) -> NestedExit:
    return instruction_exit(
        reason, decoded, qualification=_displacement(ctx.words, decoded), information=information
    )


def _register_or_memory(decoded: Decoded, number: int, register2: int) -> int:
    """Instruction information where operand *number* is either of them."""
    if decoded.operand is None:
        return register_operand_information(
            register_number(decoded.instruction.op_register(number)), register2
        )
    return _place(decoded.operand, register2)


# --------------------------------------------------------------------------------------------------- VMX instructions


def _pointer(reason: ExitReason) -> Intercept:
    """VMXON, VMCLEAR, VMPTRLD, VMPTRST: a memory operand."""

    def intercept(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
        return _memory_exit(ctx, decoded, reason, _place_of(decoded))

    return intercept


def _invalidation(reason: ExitReason) -> Intercept:
    """INVEPT and INVVPID: the type in a register, and a descriptor in memory."""

    def intercept(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
        type_register = register_number(decoded.instruction.op0_register)
        return _memory_exit(ctx, decoded, reason, _place_of(decoded, type_register))

    return intercept


def _vmread(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    field_register = register_number(decoded.instruction.op1_register)
    return _memory_exit(ctx, decoded, ExitReason.VMREAD, _register_or_memory(decoded, 0, field_register))


def _vmwrite(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    field_register = register_number(decoded.instruction.op0_register)
    return _memory_exit(ctx, decoded, ExitReason.VMWRITE, _register_or_memory(decoded, 1, field_register))


# ------------------------------------------------------------------------------------------------- descriptor tables


def _table_register(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    """SGDT, SIDT, LGDT, LIDT."""
    if not secondary_controls(vmcs) & vmx.SECONDARY_EXEC_DESC:
        return None
    information = descriptor_table_information(
        _place_of(decoded),
        _TABLE_INSTRUCTIONS[decoded.instruction.mnemonic],
        2 if decoded.instruction.code in _TABLE_OPERANDS16 else 4,
    )
    return _memory_exit(ctx, decoded, ExitReason.GDTR_IDTR, information)


def _selector_register(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    """SLDT, STR, LLDT, LTR."""
    if not secondary_controls(vmcs) & vmx.SECONDARY_EXEC_DESC:
        return None
    instruction = _SELECTOR_INSTRUCTIONS[decoded.instruction.mnemonic]
    return _memory_exit(ctx, decoded, ExitReason.LDTR_TR, _register_or_memory(decoded, 0, instruction))


# ------------------------------------------------------------------------------------------------------------- others


def _invpcid(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    """Without "enable INVPCID" it is #UD."""
    if not vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL] & vmx.CPU_BASED_INVLPG_EXITING:
        return None
    type_register = register_number(decoded.instruction.op0_register)
    return _memory_exit(ctx, decoded, ExitReason.INVPCID, _place_of(decoded, type_register))


def _supervisor_state(reason: ExitReason) -> Intercept:
    """XSAVES and XRSTORS: an exit when a state component is asked for that IA32_XSS has and L1 wants to see.

    IA32_XSS is 0 as long as the processor has no such components.
    """

    def intercept(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
        words = ctx.words
        requested = (words[RDX] & MASK32) << _HALF_BITS | words[RAX] & MASK32
        supervisor = ctx.msrs.values.get(MSR_IA32_XSS, 0)
        if not requested & supervisor & vmcs[VmcsField.XSS_EXIT_BITMAP]:
            return None
        return _memory_exit(ctx, decoded, reason, _place_of(decoded))

    return intercept


def _random(control: int, reason: ExitReason) -> Intercept:
    """RDRAND and RDSEED; there is no displacement to report."""

    def intercept(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
        if not secondary_controls(vmcs) & control:
            return None
        destination = register_number(decoded.instruction.op0_register)
        information = random_information(destination, operand_size(decoded, 0))
        return instruction_exit(reason, decoded, information=information)

    return intercept


_xsaves = _supervisor_state(ExitReason.XSAVES)
_xrstors = _supervisor_state(ExitReason.XRSTORS)

#: By ``iced_x86.Mnemonic``.
BY_MNEMONIC: dict[int, Intercept] = {
    Mnemonic.VMXON: _pointer(ExitReason.VMXON),
    Mnemonic.VMCLEAR: _pointer(ExitReason.VMCLEAR),
    Mnemonic.VMPTRLD: _pointer(ExitReason.VMPTRLD),
    Mnemonic.VMPTRST: _pointer(ExitReason.VMPTRST),
    Mnemonic.VMREAD: _vmread,
    Mnemonic.VMWRITE: _vmwrite,
    Mnemonic.INVEPT: _invalidation(ExitReason.INVEPT),
    Mnemonic.INVVPID: _invalidation(ExitReason.INVVPID),
    **dict.fromkeys(_TABLE_INSTRUCTIONS, _table_register),
    **dict.fromkeys(_SELECTOR_INSTRUCTIONS, _selector_register),
    Mnemonic.INVPCID: _invpcid,
    Mnemonic.XSAVES: _xsaves,
    Mnemonic.XSAVES64: _xsaves,
    Mnemonic.XRSTORS: _xrstors,
    Mnemonic.XRSTORS64: _xrstors,
    Mnemonic.RDRAND: _random(vmx.SECONDARY_EXEC_RDRAND_EXITING, ExitReason.RDRAND),
    Mnemonic.RDSEED: _random(vmx.SECONDARY_EXEC_RDSEED_EXITING, ExitReason.RDSEED),
}
