"""A virtual machine: memory slots, in-kernel devices, time, and its vCPU; KVM's VM file descriptor."""

from __future__ import annotations

import mmap
from typing import Literal

from lasskvm.engine.engine import Transmitter
from lasskvm.errors import LassKvmError, MemoryLayoutError
from lasskvm.kvm.clock import Clock, VirtualClock
from lasskvm.kvm.iobus import PortBus
from lasskvm.kvm.irqchip import Pic, Pit
from lasskvm.kvm.irqchip.pit import PIT_IRQ
from lasskvm.kvm.vcpu import Vcpu
from lasskvm.memory import GuestMemory

__all__ = ["ExecutionEngine", "Vm"]

#: What executes guest code.
ExecutionEngine = Literal["jit", "emulator"]


class Vm:
    """One virtual machine of the soft provider.

    *engine* says what executes the guest: ``"jit"``, direct execution with the emulator behind it, or ``"emulator"``
    alone. With *forced_emulation*, UD2 followed by the letters "kvm" has the next instruction emulated (the
    ``force_emulation_prefix`` parameter of KVM).

    >>> vm = Vm()
    >>> vm.set_user_memory_region(0, 0x0, vm.allocate(0x10000))
    >>> vm.memory.load(0x1000, 8)
    0
    """

    def __init__(self, engine: ExecutionEngine = "jit", *, forced_emulation: bool = False) -> None:
        self.engine: ExecutionEngine = engine
        self.forced_emulation = forced_emulation
        self.memory = GuestMemory()
        self.ports = PortBus()
        self.pic: Pic | None = None
        self.pit: Pit | None = None
        self.vcpu: Vcpu | None = None
        #: The console whose output is coalesced (``KVM_REGISTER_COALESCED_MMIO`` with ``pio``); set it before the first
        #: run. What the guest has written comes at the end of each run, and before any other port access.
        self.transmitter: Transmitter | None = None
        self.clock: Clock = VirtualClock(self._executed_blocks)

    def _executed_blocks(self) -> int:
        return 0 if self.vcpu is None else self.vcpu.executed_blocks

    @staticmethod
    def allocate(size: int) -> mmap.mmap:
        """Zeroed host memory for a slot, *size* bytes, taken from the host as the guest touches it.

        Raises :class:`MemoryLayoutError` when the host refuses.
        """
        try:
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryLayoutError(
                f"the host cannot give {size // (1 << 20)} MiB to the guest ({error}); ask for less with --memory"
            ) from None

    def set_user_memory_region(self, slot: int, gpa: int, memory: mmap.mmap | None, flags: int = 0) -> None:
        """``KVM_SET_USER_MEMORY_REGION``: map *memory* at *gpa* as slot *slot*; None deletes the slot.

        *flags* are ``SLOT_*`` of :mod:`lasskvm.memory`. Raises :class:`MemoryLayoutError` for overlaps and ranges that
        are not page-aligned.
        """
        if memory is None:
            self.memory.delete_slot(slot)
        else:
            self.memory.set_slot(slot, gpa, memory, flags)

    def set_clock(self, clock: Clock) -> None:
        """Follow *clock* instead of the deterministic one; before any device or vCPU is made."""
        if self.vcpu is not None or self.pit is not None:
            raise LassKvmError("the clock of a VM must be chosen before its devices and vCPU are created")
        self.clock = clock

    def create_irqchip(self) -> None:
        """``KVM_CREATE_IRQCHIP``: two 8259As."""
        self.pic = Pic(self._interrupt_line_changed)
        self.ports.register(self.pic)

    def create_pit2(self) -> None:
        """``KVM_CREATE_PIT2``: an 8254 on IRQ 0; the irqchip must exist."""
        if self.pic is None:
            raise LassKvmError("the PIT needs an irqchip; call create_irqchip() first")
        self.pit = Pit(self.clock, self.pic.line(PIT_IRQ))
        self.ports.register(self.pit)

    def create_vcpu(self) -> Vcpu:
        """``KVM_CREATE_VCPU``: the VM's only vCPU, in the state after power-on."""
        if self.vcpu is not None:
            raise LassKvmError("this VM has its vCPU already; lasskvm virtualizes one processor")
        self.vcpu = Vcpu(self)
        return self.vcpu

    def irq_line(self, line: int, level: bool) -> None:
        """``KVM_IRQ_LINE``: drive line *line* (0 to 15) of the irqchip."""
        if self.pic is None:
            raise LassKvmError("this VM has no irqchip; call create_irqchip() first")
        self.pic.set_irq(line, level)

    def _interrupt_line_changed(self, level: bool) -> None:
        if level and self.vcpu is not None:
            self.vcpu.kick()

    @property
    def memory_size(self) -> int:
        """Bytes of guest memory in all slots."""
        return sum(slot.size for slot in self.memory)
