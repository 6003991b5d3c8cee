"""What an emulated instruction may touch: state words, guest memory, CPUID, MSRs, time-stamp counter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lasskvm.emulator.fpu import Fpu, FpuState
from lasskvm.emulator.mmio import Mmio
from lasskvm.emulator.mmu import translate
from lasskvm.emulator.msrs import MsrFile
from lasskvm.emulator.tlb import Tlb
from lasskvm.memory import GuestMemory
from lasskvm.state import Words
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.paging import PhysicalMemory

if TYPE_CHECKING:
    from lasskvm.emulator.decode import Decoded
    from lasskvm.emulator.events import Event

__all__ = [
    "DebugMonitor",
    "Emulation",
    "MsrPermission",
    "NonRoot",
    "PortRead",
    "PortWrite",
    "SgxHandler",
    "Translate",
    "VmxHandler",
]

#: A function with the parameters and results of :func:`lasskvm.emulator.mmu.translate`.
Translate = Callable[[Words, PhysicalMemory, int, int, int, int, int], tuple[int, int, int, int]]

#: ``read(port, size)`` gives the value, or None when no device is there.
PortRead = Callable[[int, int], int | None]
#: ``write(port, size, value)`` tells whether a device has taken it.
PortWrite = Callable[[int, int, int], bool]
#: ``permission(index, is_write)`` tells whether the guest may access an MSR, or the VMM is to be asked.
MsrPermission = Callable[[int, bool], bool]


class DebugMonitor(Protocol):
    """The VMM's debugger (``KVM_SET_GUEST_DEBUG``), as emulated instructions meet it."""

    #: Whether INT3 goes to the VMM.
    reports_int3: bool

    def filter_debug_trap(self, dr6: int) -> int:
        """A #DB with the bits *dr6* is due: the bits that the guest gets.

        Raises :class:`~lasskvm.emulator.faults.DebugReport` when the VMM gets it.
        """

    def guest_registers(self) -> AbstractContextManager[object]:
        """While this is entered, DR0 to DR3 and DR7 of the state words are the guest's own."""


class VmxHandler(Protocol):
    """VMX of a guest that is a hypervisor itself, as emulated instructions meet it."""

    def execute(self, ctx: Emulation, decoded: Decoded) -> None:
        """Execute a VMX instruction (other than VMCALL and VMFUNC) and complete it, as a handler does."""

    def written_control_register(self, words: Words, number: int, value: int) -> int:
        """What MOV of *value* to CR0 or CR4 is to write; #GP(0) for what VMX operation does not allow there."""


class SgxHandler(Protocol):
    """SGX of a guest, as emulated instructions meet it."""

    def execute(self, ctx: Emulation, decoded: Decoded) -> None:
        """Execute the leaf function of ENCLS that EAX selects, one of SGX1, and complete it, as a handler does."""

    def is_epc(self, gpa: int) -> bool:
        """Whether guest-physical *gpa* is in the enclave page cache, where fetches find all ones."""


class NonRoot(Protocol):
    """VMX non-root operation, while a nested guest runs: what its hypervisor has to say about its instructions."""

    #: What the nested guest's time-stamp counter is ahead of its hypervisor's.
    tsc_offset: int
    #: Whether IRET ends the blocking of NMIs.
    iret_unblocks_nmis: bool

    def is_sensitive(self, decoded: Decoded) -> bool:
        """Whether :meth:`before_instruction` has to be asked about *decoded*."""

    def before_instruction(self, ctx: Emulation, decoded: Decoded) -> None:
        """The nested guest is about to execute *decoded*.

        Raises :class:`GuestFault` or a VM exit, an exception that goes through to the run loop, if that is what
        happens instead.
        """

    def before_event(self, event: Event, vectoring: Event | None) -> None:
        """*event* is due, *vectoring* was being delivered when it came up; may raise a VM exit."""

    def visible_control_register(self, words: Words, number: int) -> int:
        """What the nested guest reads from CR0, CR4 or CR8."""

    def write_task_priority(self, value: int) -> bool:
        """MOV to CR8: whether it was done, without the processor's own CR8; #GP(0) for reserved bits then."""


def _no_port_reads(port: int, size: int) -> int | None:
    return None


def _no_port_writes(port: int, size: int, value: int) -> bool:
    return False


def _nobody() -> None:
    """What a write to CR8 means without a local APIC."""


@dataclass
class Emulation:
    """The context that every handler gets; KVM's ``struct x86_emulate_ctxt``, without the instruction.

    ``read_tsc`` gives the host side of the time-stamp counter; what the guest reads is that plus the offset
    that the MSR file keeps. ``halted`` is set by HLT and cleared by whoever delivers an event.
    ``translate`` is :func:`lasskvm.emulator.mmu.translate`; direct execution puts a compiled form there,
    because it makes the instruction fetch of every exit several times faster. ``prefetched`` holds the bytes
    at RIP where direct execution has left them; whoever sets it takes it back when RIP moves.
    ``leave_block`` is set when the interpreter must not just go on with the next instruction: code has been stored to,
    or a device accessed. ``forced_emulation`` says whether UD2 with "kvm" behind it is the forced emulation prefix.
    ``decoded`` is the instruction in progress, for when it has to be executed once more.
    ``fpu`` has the x87 and SSE registers, which are no state words.
    ``read_port`` and ``write_port`` ask the VM's own devices; what they do not claim is the VMM's to answer.
    ``watch_hits`` are the data and I/O breakpoints (bits 3:0 as in DR6) that the instruction in progress has met.
    ``msr_permission`` is the VM's MSR filter, if it has one, and ``debugger`` that of the VMM.
    ``hypercall`` answers VMCALL and VMMCALL, which are #UD without it. ``vmx`` executes the other VMX instructions, #UD
    without it, too, and ``sgx`` the leaf functions of ENCLS. ``non_root`` is there while a nested guest runs.
    ``task_priority_written`` is called behind each MOV to CR8, for the local APIC. ``stepping`` says that somebody has
    a look at the guest behind each instruction, and behind each element of a repeated one.
    """

    words: memoryview[int]
    memory: GuestMemory
    cpuid: CpuidTable
    msrs: MsrFile
    read_tsc: Callable[[], int]
    halted: bool = False
    translate: Translate = translate
    prefetched: bytes = b""
    mmio: Mmio = field(default_factory=Mmio)
    tlb: Tlb = field(default_factory=Tlb)
    fpu: Fpu = field(default_factory=FpuState)
    read_port: PortRead = _no_port_reads
    write_port: PortWrite = _no_port_writes
    watch_hits: int = 0
    leave_block: bool = False
    forced_emulation: bool = False
    msr_permission: MsrPermission | None = None
    debugger: DebugMonitor | None = None
    hypercall: Callable[[Emulation], None] | None = None
    vmx: VmxHandler | None = None
    sgx: SgxHandler | None = None
    non_root: NonRoot | None = None
    task_priority_written: Callable[[], None] = _nobody
    stepping: bool = False
    decoded: Decoded | None = None
