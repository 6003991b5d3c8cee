"""What an emulated instruction may touch: state words, guest memory, CPUID, MSRs, time-stamp counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lasskvm.emulator.msrs import MsrFile
from lasskvm.memory import GuestMemory
from lasskvm.state import Words
from lasskvm.x86.cpuid import CpuidTable

__all__ = ["Emulation"]


@dataclass
class Emulation:
    """The context that every handler gets; KVM's ``struct x86_emulate_ctxt``, without the instruction.

    ``read_tsc`` gives the host side of the time-stamp counter; what the guest reads is that plus the offset
    that the MSR file keeps. ``halted`` is set by HLT and cleared by whoever delivers an event.
    """

    words: Words
    memory: GuestMemory
    cpuid: CpuidTable
    msrs: MsrFile
    read_tsc: Callable[[], int]
    halted: bool = False
