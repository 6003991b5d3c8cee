"""VMCALL and VMMCALL in a guest of a hypervisor that answers hypercalls.

Each vendor has its own instruction; KVM accepts either, by patching the other one. Here both are executed as they are.
Without a hypervisor that answers (``Emulation.hypercall`` is None) they are #UD, as on a processor without VMX and SVM.

Source: Intel SDM volume 3C, VMCALL; AMD APM volume 3, VMMCALL; KVM's ``emulator_fix_hypercall()``.
"""

from __future__ import annotations

from iced_x86 import Mnemonic

from lasskvm.emulator.completion import complete
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import invalid_opcode
from lasskvm.emulator.operation import Handler

__all__ = ["HANDLERS"]


def _hypercall(ctx: Emulation, decoded: Decoded) -> None:
    """At any CPL, and in any mode: who may call is the hypervisor's to say."""
    if ctx.hypercall is None:
        raise invalid_opcode()
    ctx.hypercall(ctx)
    complete(ctx, decoded)


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {Mnemonic.VMCALL: _hypercall, Mnemonic.VMMCALL: _hypercall}
