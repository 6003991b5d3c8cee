"""Virtual-8086 mode: the instructions that RFLAGS.IOPL gives to the program, or keeps for its monitor.

Source: Intel SDM volume 3A, 21.2.5 and 21.2.7 (sensitive instructions) and 21.3 (CR4.VME).
"""

from __future__ import annotations

from lasskvm.emulator.faults import Unhandleable, general_protection
from lasskvm.emulator.modes import in_virtual_8086_mode
from lasskvm.state import CR4, RFLAGS, Words
from lasskvm.x86.registers import CR4_VME, RFLAGS_IOPL

__all__ = ["check_iopl_sensitive"]


def check_iopl_sensitive(words: Words, name: str) -> None:
    """#GP(0) for the instruction *name* in virtual-8086 mode, unless IOPL is 3.

    Raises :class:`Unhandleable` with CR4.VME, which no CPU model offers.
    """
    if in_virtual_8086_mode(words) and words[RFLAGS] & RFLAGS_IOPL != RFLAGS_IOPL:
        if words[CR4] & CR4_VME:
            raise Unhandleable(f"{name} with CR4.VME: virtual-8086 mode extensions are not implemented")
        raise general_protection()
