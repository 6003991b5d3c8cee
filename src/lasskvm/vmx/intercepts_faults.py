"""Faults of L2's instructions that come before a VM exit, and instructions that VMX non-root operation makes #UD.

Before a VM exit come #UD, faults based on the privilege level, and #GP(0) by the I/O permission bitmap of the TSS.
Everything else about an instruction, such as reserved bits, MSRs that do not exist, and whatever its memory operand
would fault with, comes behind. There are exceptions in both directions: the VMX instructions do not look at CPL before
they exit, and MOV DR exits before the faults by privilege and CR4.DE.

Source: Intel SDM volume 3C, 26.1.1 (relative priority of faults and VM exits), 26.1.3 (MOV DR), 26.3 (changes to
instruction behavior); volumes 2 and 3C, the "Operation" of the instructions by name.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Code, Mnemonic

from lasskvm.emulator.completion import require_cpl0
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import invalid_opcode, raise_linear_fault
from lasskvm.emulator.io_permission import check_port_access
from lasskvm.emulator.modes import in_64bit_mode, in_ia32e_mode, in_protected_mode
from lasskvm.emulator.offered import as_offered, is_offered
from lasskvm.emulator.port_io import locate_port
from lasskvm.state import CPL, CR4, RFLAGS, Words
from lasskvm.vmx.entry_checks import secondary_controls
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.registers import CR4_OSXSAVE, CR4_PCE, CR4_SMXE, CR4_TSD, CR4_UMIP

__all__ = ["UNDEFINED_IN_NON_ROOT", "faults_before_exit"]

_Check = Callable[[Emulation, Decoded], None]

#: Instructions that have to be enabled for L2, by ``iced_x86.Mnemonic``; the secondary control.
_ENABLED_BY: dict[int, int] = {
    Mnemonic.RDTSCP: vmx.SECONDARY_EXEC_ENABLE_RDTSCP,
    Mnemonic.RDPID: vmx.SECONDARY_EXEC_ENABLE_RDTSCP,
    Mnemonic.INVPCID: vmx.SECONDARY_EXEC_ENABLE_INVPCID,
    Mnemonic.XSAVES: vmx.SECONDARY_EXEC_ENABLE_XSAVES,
    Mnemonic.XSAVES64: vmx.SECONDARY_EXEC_ENABLE_XSAVES,
    Mnemonic.XRSTORS: vmx.SECONDARY_EXEC_ENABLE_XSAVES,
    Mnemonic.XRSTORS64: vmx.SECONDARY_EXEC_ENABLE_XSAVES,
}
#: Always #UD: there are no VM functions, and the hypercall of the other vendor is answered to L1 only.
_NEVER_ENABLED = frozenset((Mnemonic.VMFUNC, Mnemonic.VMMCALL))
#: Instructions that may be #UD in L2 and are not in L1, by ``iced_x86.Mnemonic``.
UNDEFINED_IN_NON_ROOT: frozenset[int] = _NEVER_ENABLED | _ENABLED_BY.keys()


def faults_before_exit(ctx: Emulation, decoded: Decoded, vmcs: Vmcs12) -> None:
    """Raise the :class:`GuestFault` that *decoded*, an instruction of L2 at CS:RIP, ends in before any VM exit.

    To be called for what :func:`lasskvm.vmx.intercepts.is_sensitive` names, before
    :func:`~lasskvm.vmx.intercepts.intercept_of`. Nothing is changed but accessed bits, where the TSS is read. The fault
    itself may be intercepted, as every exception.
    """
    mnemonic = decoded.instruction.mnemonic
    if mnemonic in _NEVER_ENABLED or not is_offered(as_offered(decoded, ctx.cpuid), ctx.cpuid):
        raise invalid_opcode()
    if mnemonic in _ENABLED_BY and not secondary_controls(vmcs) & _ENABLED_BY[mnemonic]:
        raise invalid_opcode()
    check = _BY_CODE.get(decoded.instruction.code) or _BY_MNEMONIC.get(mnemonic)
    if check is not None:
        check(ctx, decoded)


# ---------------------------------------------------------------------------------------------------------- privilege


def _privileged(ctx: Emulation, decoded: Decoded) -> None:
    require_cpl0(ctx.words)


def _undefined_above_cpl0(ctx: Emulation, decoded: Decoded) -> None:
    """MONITOR, MWAIT."""
    if ctx.words[CPL]:
        raise invalid_opcode()


def _time_stamp(ctx: Emulation, decoded: Decoded) -> None:
    if ctx.words[CR4] & CR4_TSD:
        require_cpl0(ctx.words)


def _performance_counter(ctx: Emulation, decoded: Decoded) -> None:
    if not ctx.words[CR4] & CR4_PCE:
        require_cpl0(ctx.words)


def _cpuid(ctx: Emulation, decoded: Decoded) -> None:
    if ctx.msrs.cpuid_faulting:
        require_cpl0(ctx.words)


def _port(ctx: Emulation, decoded: Decoded) -> None:
    words = ctx.words
    port, size = locate_port(words, decoded)
    raise_linear_fault(*check_port_access(words, ctx.memory, port, size, words[CPL], words[RFLAGS]))


# -------------------------------------------------------------------------------------------------- descriptor tables


def _store_table_register(ctx: Emulation, decoded: Decoded) -> None:
    """SGDT, SIDT."""
    if ctx.words[CR4] & CR4_UMIP:
        require_cpl0(ctx.words)


def _store_selector(ctx: Emulation, decoded: Decoded) -> None:
    """SLDT, STR."""
    _require_protected_mode(ctx.words)
    _store_table_register(ctx, decoded)


def _load_selector(ctx: Emulation, decoded: Decoded) -> None:
    """LLDT, LTR."""
    _require_protected_mode(ctx.words)
    require_cpl0(ctx.words)


def _require_protected_mode(words: Words) -> None:
    if not in_protected_mode(words):
        raise invalid_opcode()


# --------------------------------------------------------------------------------------------------- by mode and CR4


def _vmx(ctx: Emulation, decoded: Decoded) -> None:
    """Not recognized in compatibility mode. CPL is for those that are in VMX root operation; CR4.VMXE is always set."""
    _require_protected_mode(ctx.words)
    if in_ia32e_mode(ctx.words) and not in_64bit_mode(ctx.words):
        raise invalid_opcode()


def _getsec(ctx: Emulation, decoded: Decoded) -> None:
    if not ctx.words[CR4] & CR4_SMXE:
        raise invalid_opcode()


def _xsave_privileged(ctx: Emulation, decoded: Decoded) -> None:
    """XSETBV, XSAVES, XRSTORS."""
    if not ctx.words[CR4] & CR4_OSXSAVE:
        raise invalid_opcode()
    require_cpl0(ctx.words)


def _encls(ctx: Emulation, decoded: Decoded) -> None:
    _require_protected_mode(ctx.words)
    _undefined_above_cpl0(ctx, decoded)


# ----------------------------------------------------------------------------------------------------------- together

#: Control and debug registers that do not exist are #UD for the decoder already. MOV DR has no fault before its exit.
_MOV_CR = (Code.MOV_CR_R32, Code.MOV_CR_R64, Code.MOV_R32_CR, Code.MOV_R64_CR)
_BY_CODE: dict[int, _Check] = dict.fromkeys(_MOV_CR, _privileged)

_PRIVILEGED = (
    Mnemonic.HLT, Mnemonic.INVD, Mnemonic.WBINVD, Mnemonic.WBNOINVD, Mnemonic.CLTS, Mnemonic.LMSW, Mnemonic.INVLPG,
    Mnemonic.INVPCID, Mnemonic.RDMSR, Mnemonic.WRMSR, Mnemonic.LGDT, Mnemonic.LIDT,
)  # fmt: skip
#: VMCALL is recognized in every mode.
_VMX = (
    Mnemonic.VMXON, Mnemonic.VMXOFF, Mnemonic.VMCLEAR, Mnemonic.VMPTRLD, Mnemonic.VMPTRST, Mnemonic.VMREAD,
    Mnemonic.VMWRITE, Mnemonic.VMLAUNCH, Mnemonic.VMRESUME, Mnemonic.INVEPT, Mnemonic.INVVPID,
)  # fmt: skip
_PORT_IO = (
    Mnemonic.IN, Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.OUT, Mnemonic.OUTSB, Mnemonic.OUTSW,
    Mnemonic.OUTSD,
)  # fmt: skip
_XSAVE_PRIVILEGED = (
    Mnemonic.XSETBV, Mnemonic.XSAVES, Mnemonic.XSAVES64, Mnemonic.XRSTORS, Mnemonic.XRSTORS64
)  # fmt: skip

_BY_MNEMONIC: dict[int, _Check] = {
    **dict.fromkeys(_PRIVILEGED, _privileged),
    **dict.fromkeys(_VMX, _vmx),
    **dict.fromkeys(_PORT_IO, _port),
    **dict.fromkeys(_XSAVE_PRIVILEGED, _xsave_privileged),
    **dict.fromkeys((Mnemonic.MONITOR, Mnemonic.MWAIT), _undefined_above_cpl0),
    **dict.fromkeys((Mnemonic.RDTSC, Mnemonic.RDTSCP), _time_stamp),
    **dict.fromkeys((Mnemonic.SGDT, Mnemonic.SIDT), _store_table_register),
    **dict.fromkeys((Mnemonic.SLDT, Mnemonic.STR), _store_selector),
    **dict.fromkeys((Mnemonic.LLDT, Mnemonic.LTR), _load_selector),
    Mnemonic.RDPMC: _performance_counter,
    Mnemonic.CPUID: _cpuid,
    Mnemonic.GETSEC: _getsec,
    Mnemonic.ENCLS: _encls,
}
