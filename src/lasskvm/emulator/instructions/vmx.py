"""The VMX instructions, but for VMCALL: whoever virtualizes VMX for the guest executes them (``Emulation.vmx``).

Without one they are #UD, as outside VMX operation. VMFUNC is #UD in any case: it exists only in guests of a hypervisor
that enables VM functions, of which none is offered. VMCALL is in :mod:`lasskvm.emulator.instructions.hypercalls`.

Source: Intel SDM volume 3C, chapter 31.
"""

from __future__ import annotations

from iced_x86 import Mnemonic

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import invalid_opcode
from lasskvm.emulator.operation import Handler

__all__ = ["HANDLERS"]


def _vmx(ctx: Emulation, decoded: Decoded) -> None:
    if ctx.vmx is None:
        raise invalid_opcode()
    ctx.vmx.execute(ctx, decoded)


def _vmfunc(ctx: Emulation, decoded: Decoded) -> None:
    raise invalid_opcode()


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {
    Mnemonic.INVEPT: _vmx,
    Mnemonic.INVVPID: _vmx,
    Mnemonic.VMCLEAR: _vmx,
    Mnemonic.VMFUNC: _vmfunc,
    Mnemonic.VMLAUNCH: _vmx,
    Mnemonic.VMPTRLD: _vmx,
    Mnemonic.VMPTRST: _vmx,
    Mnemonic.VMREAD: _vmx,
    Mnemonic.VMRESUME: _vmx,
    Mnemonic.VMWRITE: _vmx,
    Mnemonic.VMXOFF: _vmx,
    Mnemonic.VMXON: _vmx,
}
