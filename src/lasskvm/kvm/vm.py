"""A virtual machine: memory slots, in-kernel devices, time, and its vCPU; KVM's VM file descriptor."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from lasskvm.engine.engine import Transmitter
from lasskvm.errors import LassKvmError, MemoryLayoutError
from lasskvm.kvm.clock import Clock, VirtualClock
from lasskvm.kvm.iobus import DeviceState, MmioBus, PortBus
from lasskvm.kvm.irqchip import InterruptChips, Pit
from lasskvm.kvm.irqchip.pit import PIT_IRQ
from lasskvm.kvm.irqchip.routing import Route
from lasskvm.kvm.msr_filter import MsrFilter
from lasskvm.kvm.snapshot_state import load_vm, save_vm
from lasskvm.kvm.structures import MsrFilterRange
from lasskvm.kvm.vcpu import Vcpu
from lasskvm.memory import PAGE_DIRTY, SLOT_LOG_DIRTY_PAGES, GuestMemory, allocate
from lasskvm.sgx.epc import Epc
from lasskvm.state import TLB_FLUSH

if TYPE_CHECKING:
    from lasskvm.sgx.encls import Encls

__all__ = ["ExecutionEngine", "Vm"]

#: What executes guest code.
ExecutionEngine = Literal["jit", "emulator"]

#: What an EPC's keys are derived from when nobody says otherwise: with it, two runs of a guest print the same.
DEFAULT_EPC_SECRET = b"lasskvm"
#: The bitmap of a dirty log comes in words of this many bytes.
_DIRTY_WORD_BYTES = 8


class Vm:
    """One virtual machine of the soft provider.

    *engine* says what executes the guest: ``"jit"``, direct execution with the emulator behind it, or ``"emulator"``
    alone. With *forced_emulation*, UD2 followed by the letters "kvm" has the next instruction emulated (the
    ``force_emulation_prefix`` parameter of KVM). Without *nested*, no vCPU is offered VMX, whatever its CPUID entries
    say (the ``nested`` parameter).

    >>> vm = Vm()
    >>> vm.set_user_memory_region(0, 0x0, vm.allocate(0x10000))
    >>> vm.memory.load(0x1000, 8)
    0
    """

    def __init__(
        self, engine: ExecutionEngine = "jit", *, forced_emulation: bool = False, nested: bool = True
    ) -> None:
        self.engine: ExecutionEngine = engine
        self.forced_emulation = forced_emulation
        self.nested = nested
        self.memory = GuestMemory()
        self.ports = PortBus()
        #: Devices in guest-physical memory space; what none of them claims is an ``MmioExit``.
        self.mmio = MmioBus()
        self.irqchip: InterruptChips | None = None
        self.pit: Pit | None = None
        self.vcpu: Vcpu | None = None
        #: ENCLS of the guest and its EPC (:meth:`create_epc`); without, ENCLS is #UD.
        self.sgx: Encls | None = None
        #: Which accesses of the guest to MSRs leave for the VMM; None: none.
        self.msr_filter: MsrFilter | None = None
        #: The console whose output is coalesced (``KVM_REGISTER_COALESCED_MMIO`` with ``pio``); set it before the first
        #: run. What the guest has written comes at the end of each run, and before any other port access.
        self.transmitter: Transmitter | None = None
        self.clock: Clock = VirtualClock(self._executed_blocks)

    def _executed_blocks(self) -> int:
        return 0 if self.vcpu is None else self.vcpu.executed_blocks

    @staticmethod
    def allocate(size: int) -> mmap.mmap:
        """:func:`lasskvm.memory.allocate`."""
        return allocate(size)

    def set_user_memory_region(self, slot: int, gpa: int, memory: mmap.mmap | None, flags: int = 0) -> None:
        """``KVM_SET_USER_MEMORY_REGION``: map *memory* at *gpa* as slot *slot*; None deletes the slot.

        *flags* are ``SLOT_*`` of :mod:`lasskvm.memory`. Raises :class:`MemoryLayoutError` for overlaps and ranges that
        are not page-aligned.
        """
        if memory is None:
            self.memory.delete_slot(slot)
        else:
            if self.epc is not None and _overlap(self.epc, gpa, len(memory)):
                raise MemoryLayoutError(
                    f"memory slot {slot} at {gpa:#x} overlaps the EPC at {self.epc.base:#x}; move one of them"
                )
            self.memory.set_slot(slot, gpa, memory, flags)
        self._forget_translations()

    @property
    def epc(self) -> Epc | None:
        """The guest's enclave page cache, if it has one."""
        return None if self.sgx is None else self.sgx.epc

    def create_epc(self, base: int, size: int, secret: bytes = DEFAULT_EPC_SECRET) -> Epc:
        """Give the guest its only EPC, *size* bytes at gpa *base*: in KVM a memory slot of ``/dev/sgx_vepc``.

        The guest knows of it by CPUID: :func:`lasskvm.sgx.enumeration.with_epc`. For all but ENCLS it is a device that
        answers with all ones and drops what is written; fetches from it are #UD. *secret* is what the keys of the
        guest's processor come from. A VMM empties the EPC when it resets the machine (``Epc.reset()``). Every attribute
        that leaf 12H offers can be used, PROVISIONKEY too: there is no key behind it that KVM_CAP_SGX_ATTRIBUTE would
        have to guard.

        Raises :class:`MemoryLayoutError` for a range that is not page-aligned, overlaps memory, or is more than the
        host has, and :class:`LassKvmError` for a second EPC or one that overlaps a device.

        >>> vm = Vm()
        >>> vm.create_epc(0x1_0000_0000, 0x80_0000).free_pages
        2048
        """
        if self.epc is not None:
            raise LassKvmError("this VM has its EPC already; make one of the size that is needed")
        # It brings a library of cryptography along, for which a guest without enclaves should not wait.
        from lasskvm.sgx.encls import Encls

        epc = Epc(base, size)
        for slot in self.memory:
            if _overlap(epc, slot.gpa, slot.size):
                raise MemoryLayoutError(
                    f"the EPC at {base:#x} overlaps memory slot {slot.number} at {slot.gpa:#x}; move one of them"
                )
        self.mmio.register(epc)
        self.sgx = Encls(epc, secret)
        if self.vcpu is not None:
            self.vcpu.emulation.sgx = self.sgx
        return epc

    def _forget_translations(self) -> None:
        if self.vcpu is not None:
            self.vcpu.state.words[TLB_FLUSH] = 1

    def get_dirty_log(self, slot: int) -> bytes:
        """``KVM_GET_DIRTY_LOG``: a bit for each page written since the last call, in whole 64-bit words.

        The slot must have been set with ``SLOT_LOG_DIRTY_PAGES``; OSError with ENOENT otherwise. Unlike the kernel's,
        this log also has what the VMM writes through ``memory``.

        >>> from lasskvm.memory import SLOT_LOG_DIRTY_PAGES
        >>> vm = Vm()
        >>> vm.set_user_memory_region(0, 0, vm.allocate(0x10000), SLOT_LOG_DIRTY_PAGES)
        >>> vm.memory.write(0x3000, b"dirty")
        >>> vm.get_dirty_log(0).hex(), vm.get_dirty_log(0).hex()
        ('0800000000000000', '0000000000000000')
        """
        known = next((other for other in self.memory if other.number == slot), None)
        if known is None or not known.flags & SLOT_LOG_DIRTY_PAGES:
            raise OSError(
                errno.ENOENT, "KVM_GET_DIRTY_LOG: the slot does not exist or does not log dirty pages"
            )
        dirty = known.page_flags & PAGE_DIRTY
        known.page_flags &= ~np.uint8(PAGE_DIRTY)
        # What is writable without a look at the page flags is so no longer.
        self._forget_translations()
        bitmap = np.packbits(dirty != 0, bitorder="little").tobytes()
        return bitmap.ljust(-(-len(bitmap) // _DIRTY_WORD_BYTES) * _DIRTY_WORD_BYTES, b"\0")

    def set_clock(self, clock: Clock) -> None:
        """Follow *clock* instead of the deterministic one; before any device or vCPU is made."""
        if self.vcpu is not None or self.pit is not None:
            raise LassKvmError("the clock of a VM must be chosen before its devices and vCPU are created")
        self.clock = clock

    def create_irqchip(self) -> None:
        """``KVM_CREATE_IRQCHIP``: two 8259As, an IOAPIC, and a local APIC for the vCPU that is created afterwards.

        OSError with EEXIST when there is an irqchip, with EINVAL when there is a vCPU already.
        """
        if self.irqchip is not None:
            raise OSError(errno.EEXIST, "KVM_CREATE_IRQCHIP: this VM has an irqchip already")
        if self.vcpu is not None:
            raise OSError(errno.EINVAL, "KVM_CREATE_IRQCHIP: create the irqchip before the vCPU")
        self.irqchip = InterruptChips(self._kick)
        self.ports.register(self.irqchip.pic)
        self.mmio.register(self.irqchip.ioapic)

    def create_pit2(self) -> None:
        """``KVM_CREATE_PIT2``: an 8254 on IRQ 0; the irqchip must exist."""
        if self.irqchip is None:
            raise LassKvmError("the PIT needs an irqchip; call create_irqchip() first")
        self.pit = Pit(self.clock, partial(self.irqchip.set_line, PIT_IRQ))
        self.ports.register(self.pit)

    def create_vcpu(self) -> Vcpu:
        """``KVM_CREATE_VCPU``: the VM's only vCPU, in the state after power-on."""
        if self.vcpu is not None:
            raise LassKvmError("this VM has its vCPU already; lasskvm virtualizes one processor")
        self.vcpu = Vcpu(self)
        return self.vcpu

    def irq_line(self, line: int, level: bool) -> None:
        """``KVM_IRQ_LINE``: drive the interrupt line (GSI) *line* of the irqchip, by its routes."""
        if self.irqchip is None:
            raise LassKvmError("this VM has no irqchip; call create_irqchip() first")
        self.irqchip.set_line(line, level)

    def signal_msi(self, address: int, data: int) -> bool:
        """``KVM_SIGNAL_MSI``: whether the vCPU has taken the message; OSError with ENXIO without an irqchip."""
        return self._chips("KVM_SIGNAL_MSI").signal_msi(address, data)

    def set_gsi_routing(self, routes: Sequence[Route]) -> None:
        """``KVM_SET_GSI_ROUTING``: where interrupt lines lead; the ones without a route lead nowhere."""
        self._chips("KVM_SET_GSI_ROUTING").set_routes(routes)

    def get_irqchip(self) -> DeviceState:
        """``KVM_GET_IRQCHIP`` of the 8259As and the IOAPIC; OSError with ENXIO without an irqchip."""
        return self._chips("KVM_GET_IRQCHIP").get_state()

    def set_irqchip(self, state: DeviceState) -> None:
        """``KVM_SET_IRQCHIP`` of what :meth:`get_irqchip` gave."""
        self._chips("KVM_SET_IRQCHIP").set_state(state)

    def get_pit2(self) -> DeviceState:
        """``KVM_GET_PIT2``; OSError with ENXIO without a PIT."""
        return self._pit("KVM_GET_PIT2").get_state()

    def set_pit2(self, state: DeviceState) -> None:
        """``KVM_SET_PIT2`` of what :meth:`get_pit2` gave, on a VM whose clock reads the same time."""
        self._pit("KVM_SET_PIT2").set_state(state)

    def _chips(self, ioctl: str) -> InterruptChips:
        if self.irqchip is None:
            raise OSError(errno.ENXIO, f"{ioctl}: this VM has no irqchip; call create_irqchip() first")
        return self.irqchip

    def _pit(self, ioctl: str) -> Pit:
        if self.pit is None:
            raise OSError(errno.ENXIO, f"{ioctl}: this VM has no PIT; call create_pit2() first")
        return self.pit

    def set_msr_filter(self, ranges: Sequence[MsrFilterRange], *, default_allow: bool = True) -> None:
        """``KVM_X86_SET_MSR_FILTER``: accesses that the filter denies leave as :class:`~lasskvm.kvm.exits.MsrExit`.

        At most 16 ranges; OSError as of :class:`~lasskvm.kvm.msr_filter.MsrFilter`. No range at all ends the filtering.
        """
        wanted = MsrFilter(ranges, default_allow=default_allow)
        self.msr_filter = wanted if wanted.ranges else None
        if self.vcpu is not None:
            self.vcpu.apply_msr_filter()

    def save(self, path: Path | str) -> None:
        """Write the whole VM to the snapshot file *path*, which is replaced at once or not at all.

        The VM goes on exactly as one does that is loaded from the file; saved at a checkpoint
        (``vcpu.at_checkpoint``), also exactly as one that was never saved. Raises :class:`SnapshotError` when the file
        cannot be written, and amid an instruction: behind an I/O, MMIO or MSR exit, run the vCPU with
        ``immediate_exit`` first.
        """
        save_vm(self, Path(path))

    @classmethod
    def load(cls, path: Path | str) -> Vm:
        """The VM in the snapshot file *path*.

        Raises :class:`SnapshotError` for a file that is no snapshot of a VM, damaged, cut off, or of a newer version.
        """
        return load_vm(Path(path), cls)

    def close(self) -> None:
        """Let go of the memory, which goes with its last reference; no other call is valid afterwards."""
        if self.vcpu is not None:
            self.vcpu.close()
        for slot in list(self.memory):
            self.memory.delete_slot(slot.number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _kick(self) -> None:
        if self.vcpu is not None:
            self.vcpu.kick()

    @property
    def memory_size(self) -> int:
        """Bytes of guest memory in all slots."""
        return sum(slot.size for slot in self.memory)


def _overlap(epc: Epc, gpa: int, size: int) -> bool:
    return gpa < epc.base + epc.size and epc.base < gpa + size
