"""Whether x87, MMX and SSE instructions may be executed now, and the exceptions that they wait for.

Source: Intel SDM volume 3A, 2.5 (CR0.EM, MP, TS, NE), table 14-1 (SSE) and 13.1 (MMX); volume 1, 8.7 (#MF).
"""

from __future__ import annotations

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import GuestFault, invalid_opcode
from lasskvm.state import CR0, CR4, Words
from lasskvm.x86.exceptions import MF, NM
from lasskvm.x86.fpu import FSW_ES
from lasskvm.x86.registers import CR0_EM, CR0_MP, CR0_NE, CR0_TS, CR4_OSFXSR

__all__ = [
    "check_mmx",
    "check_not_switched",
    "check_pending",
    "check_sse",
    "check_sse_and_mmx",
    "check_wait",
    "check_x87",
    "check_x87_control",
]

_DISABLED = CR0_EM | CR0_TS
_WAIT_TRAPS = CR0_MP | CR0_TS


def check_sse(ctx: Emulation) -> None:
    """#UD or #NM when instructions on XMM registers or MXCSR cannot be executed."""
    words = ctx.words
    if words[CR0] & _DISABLED or not words[CR4] & CR4_OSFXSR:
        if words[CR0] & CR0_EM or not words[CR4] & CR4_OSFXSR:
            raise invalid_opcode()
        raise _device_not_available()


def check_not_switched(ctx: Emulation) -> None:
    """#NM while CR0.TS says that the registers are another task's; for XSAVE and XRSTOR, which CR0.EM does not stop."""
    if ctx.words[CR0] & CR0_TS:
        raise _device_not_available()


def check_mmx(ctx: Emulation) -> None:
    """#UD, #NM or #MF when instructions on MMX registers cannot be executed. CR4.OSFXSR does not matter to them."""
    _check_mmx_enabled(ctx.words)
    check_pending(ctx)


def check_sse_and_mmx(ctx: Emulation) -> None:
    """The checks of an instruction that uses registers of both kinds."""
    check_sse(ctx)
    check_pending(ctx)


def _check_mmx_enabled(words: Words) -> None:
    if words[CR0] & _DISABLED:
        raise invalid_opcode() if words[CR0] & CR0_EM else _device_not_available()


def check_x87_control(ctx: Emulation) -> None:
    """#NM when x87 instructions cannot be executed; for those that do not wait for pending exceptions."""
    if ctx.words[CR0] & _DISABLED:
        raise _device_not_available()


def check_x87(ctx: Emulation) -> None:
    """#NM when x87 instructions cannot be executed, #MF when an exception is pending."""
    if ctx.words[CR0] & _DISABLED:
        raise _device_not_available()
    check_pending(ctx)


def check_wait(ctx: Emulation) -> None:
    """The checks of FWAIT, which CR0.EM does not stop."""
    if ctx.words[CR0] & _WAIT_TRAPS == _WAIT_TRAPS:
        raise _device_not_available()
    check_pending(ctx)


def check_pending(ctx: Emulation) -> None:
    """#MF for a pending x87 exception. With CR0.NE clear it would go through an interrupt controller's FERR# input,
    which nothing is connected to, and is ignored as with IGNNE#."""
    if ctx.fpu.fsw & FSW_ES and ctx.words[CR0] & CR0_NE:
        raise GuestFault(MF)


def _device_not_available() -> GuestFault:
    return GuestFault(NM)
