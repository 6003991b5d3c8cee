"""VM exits for port I/O: all of it, or by the two I/O bitmaps.

The permission bitmap in L2's TSS comes first (:mod:`lasskvm.vmx.intercepts_faults`). The exit comes before everything
about the memory operand of INS and OUTS, whose linear address is recorded without any check, and also when the count of
a repeated one is 0.

Source: Intel SDM volume 3C, 26.1.1, 26.1.3 (IN, INS, OUT, OUTS), 25.6.4 (I/O bitmaps), 28.2.1 with table 28-5
(qualification), 28.2.5 with table 28-8 (instruction information); KVM's ``nested_vmx_check_io_bitmaps()``.
"""

from __future__ import annotations

from iced_x86 import Mnemonic, OpKind

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import SEGMENT_NUMBERS, Decoded
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.port_io import locate_port
from lasskvm.emulator.string_registers import address_mask, is_repeated
from lasskvm.memory import GuestMemory
from lasskvm.state import RDI, RSI
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.instruction_exit import Intercept, instruction_exit
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.registers import ES
from lasskvm.x86.vmx_exits import ExitReason, io_information, io_qualification
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["BY_MNEMONIC", "port_access_exits"]

#: Bitmap A has a bit for each port below, bitmap B for the others.
_BITMAP_PORTS = 0x8000
_PORTS = 0x10000
_BITS_IN_BYTE = 8

_PLAIN = (Mnemonic.IN, Mnemonic.OUT)
_INS = (Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD)
_OUTS = (Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD)
_INPUTS = (Mnemonic.IN, *_INS)


def port_access_exits(vmcs: Vmcs12, memory: GuestMemory, port: int, size: int) -> bool:
    """Whether *size* bytes of I/O at *port* cause a VM exit; *memory* is L1's, where the bitmaps are.

    With bitmaps, one port of the access is enough, and so is wrapping around the end of the port space; the control for
    unconditional exits is ignored then.
    """
    controls = vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL]
    if not controls & vmx.CPU_BASED_USE_IO_BITMAPS:
        return controls & vmx.CPU_BASED_UNCOND_IO_EXITING != 0
    if port + size > _PORTS:
        return True
    return any(_bit(vmcs, memory, each) for each in range(port, port + size))


def _bit(vmcs: Vmcs12, memory: GuestMemory, port: int) -> bool:
    bitmap = VmcsField.IO_BITMAP_A if port < _BITMAP_PORTS else VmcsField.IO_BITMAP_B
    byte, bit = divmod(port % _BITMAP_PORTS, _BITS_IN_BYTE)
    return bool(memory.load(vmcs[bitmap] + byte, 1) >> bit & 1)


def _in_or_out(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    port, size = locate_port(ctx.words, decoded)
    if not port_access_exits(vmcs, ctx.memory, port, size):
        return None
    instruction = decoded.instruction
    reads = instruction.mnemonic in _INPUTS
    immediate = instruction.op_kind(1 if reads else 0) == OpKind.IMMEDIATE8
    qualification = io_qualification(port, size, reads=reads, immediate=immediate)
    return instruction_exit(ExitReason.IO_INSTRUCTION, decoded, qualification=qualification)


def _ins_or_outs(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    words, instruction = ctx.words, decoded.instruction
    port, size = locate_port(words, decoded)
    if not port_access_exits(vmcs, ctx.memory, port, size):
        return None
    reads = instruction.mnemonic in _INPUTS
    segment, index = (ES, RDI) if reads else (SEGMENT_NUMBERS[instruction.memory_segment], RSI)
    mask = address_mask(decoded)
    return instruction_exit(
        ExitReason.IO_INSTRUCTION,
        decoded,
        qualification=io_qualification(port, size, reads=reads, string=True, rep=is_repeated(decoded)),
        information=io_information(mask.bit_length() // _BITS_IN_BYTE, segment),
        linear_address=linear_address(words, segment, words[index] & mask),
    )


#: By ``iced_x86.Mnemonic``.
BY_MNEMONIC: dict[int, Intercept] = {
    **dict.fromkeys(_PLAIN, _in_or_out),
    **dict.fromkeys(_INS + _OUTS, _ins_or_outs),
}
