"""VM exits for RDMSR and WRMSR: all of them, or by the MSR bitmap.

Source: Intel SDM volume 3C, 26.1.3 (RDMSR, WRMSR), 25.6.9 (MSR-bitmap address); KVM's
``nested_vmx_exit_handled_msr()``.
"""

from __future__ import annotations

from iced_x86 import Mnemonic

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.memory import GuestMemory
from lasskvm.state import RCX
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.instruction_exit import Intercept, instruction_exit
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.registers import MASK32
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["BY_MNEMONIC", "msr_access_exits"]

#: Two ranges of MSRs have bits: those from 0, and those from here.
_HIGH_MSRS = 0xC000_0000
_RANGE_MSRS = 0x2000
#: The four parts of the bitmap.
_RANGE_BYTES = 0x400
_READ_LOW, _READ_HIGH, _WRITE_LOW, _WRITE_HIGH = range(0, 4 * _RANGE_BYTES, _RANGE_BYTES)
_BITS_IN_BYTE = 8


def msr_access_exits(vmcs: Vmcs12, memory: GuestMemory, index: int, *, is_write: bool) -> bool:
    """Whether RDMSR or WRMSR of MSR *index*, 32 bits, causes a VM exit; *memory* is L1's, where the bitmap is.

    An MSR that has no bit always does. So does every MSR without a bitmap.
    """
    if not vmcs[VmcsField.CPU_BASED_VM_EXEC_CONTROL] & vmx.CPU_BASED_USE_MSR_BITMAPS:
        return True
    if index < _RANGE_MSRS:
        part = _WRITE_LOW if is_write else _READ_LOW
    elif _HIGH_MSRS <= index < _HIGH_MSRS + _RANGE_MSRS:
        part = _WRITE_HIGH if is_write else _READ_HIGH
    else:
        return True
    byte, bit = divmod(index % _RANGE_MSRS, _BITS_IN_BYTE)
    return bool(memory.load(vmcs[VmcsField.MSR_BITMAP] + part + byte, 1) >> bit & 1)


def _rdmsr(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    if msr_access_exits(vmcs, ctx.memory, ctx.words[RCX] & MASK32, is_write=False):
        return instruction_exit(ExitReason.MSR_READ, decoded)
    return None


def _wrmsr(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> NestedExit | None:
    if msr_access_exits(vmcs, ctx.memory, ctx.words[RCX] & MASK32, is_write=True):
        return instruction_exit(ExitReason.MSR_WRITE, decoded)
    return None


#: By ``iced_x86.Mnemonic``.
BY_MNEMONIC: dict[int, Intercept] = {Mnemonic.RDMSR: _rdmsr, Mnemonic.WRMSR: _wrmsr}
