"""A virtual machine of the host's KVM: memory slots, interrupt controllers, the clock, MSR filters, its vCPU."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from lasskvm.errors import LassKvmError, MemoryLayoutError
from lasskvm.kvm.host import abi
from lasskvm.kvm.host import capabilities as cap
from lasskvm.kvm.host import ioctls as ioctl
from lasskvm.kvm.host import irqchip_abi as chips
from lasskvm.kvm.host import irqchip_conversion as conversion
from lasskvm.kvm.host.descriptor import Descriptor
from lasskvm.kvm.host.ioctls import KvmIoctlError
from lasskvm.kvm.host.vcpu import Vcpu, VcpuTraits
from lasskvm.kvm.iobus import DeviceState
from lasskvm.kvm.irqchip.routing import IrqChip, Route, check_routes
from lasskvm.kvm.structures import MsrFilterRange
from lasskvm.memory import PAGE_SIZE, GuestMemory, Slot, allocate

__all__ = ["Vm"]

#: Where Intel's KVM may put a task state segment (three pages) and an identity-mapped page table (one page) for real
#: mode: just below the APIC's page, where a PC has neither memory nor devices.
_TSS_ADDRESS = 0xFEFF_D000
_IDENTITY_MAP_ADDRESS = 0xFEFF_C000
_VCPU_NUMBER = 0

_PIT_SPEAKER_DUMMY = 1 << 0
# KVM_MSR_FILTER_*, and KVM_MSR_EXIT_REASON_FILTER
_FILTER_READ = 1 << 0
_FILTER_WRITE = 1 << 1
_FILTER_DEFAULT_DENY = 1 << 0
_EXIT_REASON_FILTER = 1 << 2
_BITS_PER_BYTE = 8
#: What the opaque state of the PIT is called.
_PIT_STATE = "pit_state2"
#: The bitmap of a dirty log comes in words of this many bits.
_DIRTY_WORD_BITS = 64


class Vm:
    """One VM of the host provider; made by ``System.create_vm()``. A context manager that closes it.

    ``memory`` is the guest-physical address space for the VMM's own accesses; as in the kernel, these do not
    appear in the dirty log.
    """

    def __init__(self, descriptor: Descriptor, run_size: int) -> None:
        self._descriptor = descriptor
        self._run_size = run_size
        self.memory = GuestMemory()
        self.vcpu: Vcpu | None = None
        self._irqchip = False
        if self.check_extension(cap.KVM_CAP_SET_IDENTITY_MAP_ADDR):
            ioctl.KVM_SET_IDENTITY_MAP_ADDR(descriptor.number, abi.Address(_IDENTITY_MAP_ADDRESS))
        if self.check_extension(cap.KVM_CAP_SET_TSS_ADDR):
            ioctl.KVM_SET_TSS_ADDR(descriptor.number, _TSS_ADDRESS)
        # Both make vCPU events say all there is to say.
        self._payload = self._enable_if_offered(cap.KVM_CAP_EXCEPTION_PAYLOAD)
        self._triple_fault = self._enable_if_offered(cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT)

    # ---------------------------------------------------------------------------------------------- capabilities

    def check_extension(self, capability: int) -> int:
        """``KVM_CHECK_EXTENSION`` of this VM: 0 when *capability* (``KVM_CAP_*``) is not there."""
        return ioctl.KVM_CHECK_EXTENSION(self._descriptor.number, capability)

    def enable_cap(self, capability: int, *arguments: int) -> None:
        """``KVM_ENABLE_CAP``: switch *capability* (``KVM_CAP_*``) on, with up to four arguments."""
        raw = abi.EnableCap(cap=capability)
        raw.args[: len(arguments)] = arguments
        ioctl.KVM_ENABLE_CAP(self._descriptor.number, raw)

    def _enable_if_offered(self, capability: int) -> bool:
        offered = bool(self.check_extension(capability))
        if offered:
            self.enable_cap(capability, 1)
        return offered

    # ---------------------------------------------------------------------------------------------------- memory

    @staticmethod
    def allocate(size: int) -> mmap.mmap:
        """:func:`lasskvm.memory.allocate`."""
        return allocate(size)

    def set_user_memory_region(self, slot: int, gpa: int, memory: mmap.mmap | None, flags: int = 0) -> None:
        """``KVM_SET_USER_MEMORY_REGION``: map *memory* at *gpa* as slot *slot*; None deletes the slot.

        *flags* are ``SLOT_*`` of :mod:`lasskvm.memory`. Other memory takes the place of what the slot had. Raises
        :class:`MemoryLayoutError` for overlaps and ranges that are not page-aligned.
        """
        former = self._slot(slot)
        if memory is None:
            if former is None:
                raise MemoryLayoutError(f"there is no memory slot {slot}")
            self._tell_region(slot, former.gpa, 0, 0, 0)
            self.memory.delete_slot(slot)
            return
        new = self.memory.set_slot(slot, gpa, memory, flags)
        try:
            if former is not None and (former.size, former.host_address) != (new.size, new.host_address):
                # The kernel changes place and flags of a slot only.
                self._tell_region(slot, former.gpa, 0, 0, 0)
                former = None
            self._tell_region(slot, gpa, new.size, new.host_address, flags)
        except KvmIoctlError:
            if former is None:
                self.memory.delete_slot(slot)
            else:
                self.memory.set_slot(slot, former.gpa, former.buffer, former.flags)
            raise

    def _slot(self, number: int) -> Slot | None:
        return next((slot for slot in self.memory if slot.number == number), None)

    def _tell_region(self, slot: int, gpa: int, size: int, host_address: int, flags: int) -> None:
        ioctl.KVM_SET_USER_MEMORY_REGION(
            self._descriptor.number,
            abi.UserspaceMemoryRegion(
                slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=host_address
            ),
        )

    def get_dirty_log(self, slot: int) -> bytes:
        """``KVM_GET_DIRTY_LOG``: a bit for each page written since the last call, in whole 64-bit words."""
        known = self._slot(slot)
        if known is None:
            raise KvmIoctlError("KVM_GET_DIRTY_LOG", errno.ENOENT)
        words = -(-(known.size // PAGE_SIZE) // _DIRTY_WORD_BITS)
        bitmap = (ctypes.c_uint64 * words)()
        ioctl.KVM_GET_DIRTY_LOG(
            self._descriptor.number, abi.DirtyLog(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
        )
        return bytes(bitmap)

    @property
    def memory_size(self) -> int:
        """Bytes of guest memory in all slots."""
        return sum(slot.size for slot in self.memory)

    # --------------------------------------------------------------------------------------- devices of the kernel

    def create_irqchip(self) -> None:
        """``KVM_CREATE_IRQCHIP``: two 8259As, an I/O APIC, and a local APIC in the vCPU to come."""
        ioctl.KVM_CREATE_IRQCHIP(self._descriptor.number)
        self._irqchip = True

    def create_pit2(self) -> None:
        """``KVM_CREATE_PIT2``: an 8254 on IRQ 0, and port 61H, which gates its channel 2; the irqchip must exist."""
        ioctl.KVM_CREATE_PIT2(self._descriptor.number, abi.PitConfig(flags=_PIT_SPEAKER_DUMMY))

    def irq_line(self, line: int, level: bool) -> None:
        """``KVM_IRQ_LINE``: drive the interrupt line (GSI) *line* of the irqchip, by its routes."""
        ioctl.KVM_IRQ_LINE(self._descriptor.number, abi.IrqLevel(irq=line, level=int(level)))

    def set_gsi_routing(self, routes: Iterable[Route]) -> None:
        """``KVM_SET_GSI_ROUTING``: where interrupt lines lead; the ones without a route lead nowhere.

        OSError with EINVAL as of :func:`~lasskvm.kvm.irqchip.routing.check_routes`, and without an irqchip.
        """
        ioctl.KVM_SET_GSI_ROUTING(self._descriptor.number, conversion.routing_structure(check_routes(routes)))

    def signal_msi(self, address: int, data: int) -> bool:
        """``KVM_SIGNAL_MSI``: whether the vCPU has taken the message that storing *data* at *address* is.

        Not when the guest does not let it in, or the message is for another processor. EINVAL without an irqchip.
        """
        try:
            taken = ioctl.KVM_SIGNAL_MSI(self._descriptor.number, conversion.msi_structure(address, data))
        except KvmIoctlError as error:
            # What the kernel's -1 for "there is no such processor" looks like.
            if error.errno != errno.EPERM:
                raise
            return False
        return bool(taken)

    def get_chip(self, chip: IrqChip) -> bytes:
        """``KVM_GET_IRQCHIP`` of one chip: a ``struct kvm_pic_state`` or ``struct kvm_ioapic_state``."""
        raw = chips.Irqchip(chip_id=chip)
        ioctl.KVM_GET_IRQCHIP(self._descriptor.number, raw)
        return conversion.chip_from(raw)

    def set_chip(self, chip: IrqChip, state: bytes) -> None:
        """``KVM_SET_IRQCHIP`` of one chip; ValueError when *state* has not the size of the chip's structure."""
        ioctl.KVM_SET_IRQCHIP(self._descriptor.number, conversion.chip_to(chip, state))

    def get_irqchip(self) -> DeviceState:
        """``KVM_GET_IRQCHIP`` of the 8259As and the I/O APIC, by name."""
        return {chip.name.lower(): self.get_chip(chip).hex() for chip in IrqChip}

    def set_irqchip(self, state: DeviceState) -> None:
        """``KVM_SET_IRQCHIP`` of what :meth:`get_irqchip` gave."""
        # The first 8259A comes last: what the other one still asks for would be noted in it.
        for chip in reversed(IrqChip):
            self.set_chip(chip, bytes.fromhex(state[chip.name.lower()]))

    def get_pit2(self) -> DeviceState:
        """``KVM_GET_PIT2``."""
        raw = chips.PitState2()
        ioctl.KVM_GET_PIT2(self._descriptor.number, raw)
        return {_PIT_STATE: bytes(raw).hex()}

    def set_pit2(self, state: DeviceState) -> None:
        """``KVM_SET_PIT2`` of what :meth:`get_pit2` gave; channel 0 starts to count anew."""
        raw = chips.PitState2.from_buffer_copy(bytes.fromhex(state[_PIT_STATE]))
        ioctl.KVM_SET_PIT2(self._descriptor.number, raw)

    def get_clock(self) -> int:
        """``KVM_GET_CLOCK``: the nanoseconds of kvmclock, which run from the VM's creation."""
        raw = abi.ClockData()
        ioctl.KVM_GET_CLOCK(self._descriptor.number, raw)
        return int(raw.clock)

    def set_clock(self, nanoseconds: int) -> None:
        """``KVM_SET_CLOCK``."""
        ioctl.KVM_SET_CLOCK(self._descriptor.number, abi.ClockData(clock=nanoseconds))

    # ------------------------------------------------------------------------------------------------- processors

    def set_msr_filter(self, ranges: Sequence[MsrFilterRange], *, default_allow: bool = True) -> None:
        """``KVM_X86_SET_MSR_FILTER``: accesses that the filter denies leave as MSR exits.

        At most 16 ranges. The kernel never filters the x2APIC's MSRs.
        """
        raw = abi.MsrFilter(flags=0 if default_allow else _FILTER_DEFAULT_DENY)
        bitmaps = []
        if len(ranges) > len(raw.ranges):
            raise KvmIoctlError(
                ioctl.KVM_X86_SET_MSR_FILTER.name, errno.E2BIG, f"it takes at most {len(raw.ranges)} ranges"
            )
        for place, wanted in zip(raw.ranges, ranges, strict=False):
            # The kernel reads whole words of the bitmap.
            words = -(-wanted.nmsrs // (_BITS_PER_BYTE * ctypes.sizeof(ctypes.c_uint64)))
            bitmap = (ctypes.c_uint64 * words).from_buffer_copy(
                wanted.bitmap.ljust(words * ctypes.sizeof(ctypes.c_uint64), b"\0")
            )
            bitmaps.append(bitmap)
            place.flags = wanted.read * _FILTER_READ | wanted.write * _FILTER_WRITE
            place.base, place.nmsrs, place.bitmap = wanted.base, wanted.nmsrs, ctypes.addressof(bitmap)
        self.enable_cap(cap.KVM_CAP_X86_USER_SPACE_MSR, _EXIT_REASON_FILTER)
        ioctl.KVM_X86_SET_MSR_FILTER(self._descriptor.number, raw)

    def create_vcpu(self) -> Vcpu:
        """``KVM_CREATE_VCPU``: the VM's only vCPU, in the state after power-on and without any CPUID yet."""
        if self.vcpu is not None:
            raise LassKvmError("this VM has its vCPU already; lasskvm virtualizes one processor")
        descriptor = Descriptor(ioctl.KVM_CREATE_VCPU(self._descriptor.number, _VCPU_NUMBER))
        traits = VcpuTraits(
            run_size=self._run_size,
            irqchip=self._irqchip,
            payload=self._payload,
            triple_fault=self._triple_fault,
            xsave_size=self.check_extension(cap.KVM_CAP_XSAVE2),
            nested_size=self.check_extension(cap.KVM_CAP_NESTED_STATE),
        )
        self.vcpu = Vcpu(descriptor, traits)
        return self.vcpu

    def close(self) -> None:
        """Give everything back to the host; no other call is valid afterwards."""
        if self.vcpu is not None:
            self.vcpu.close()
        self._descriptor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
