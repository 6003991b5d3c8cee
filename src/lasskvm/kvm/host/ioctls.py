"""The ioctls of /dev/kvm: their numbers, one way to call them, and what their failures mean.

A request number says which way a structure goes and how large it is (``linux/ioctl.h``); it is computed here from the
structures of :mod:`lasskvm.kvm.host.abi` and :mod:`lasskvm.kvm.host.irqchip_abi`, so a wrong structure is a wrong
number, which the kernel refuses.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from dataclasses import dataclass

from lasskvm.errors import HostError
from lasskvm.kvm.host import abi
from lasskvm.kvm.host import irqchip_abi as chips

__all__ = ["API_VERSION", "Ioctl", "KvmIoctlError"]

#: ``KVM_GET_API_VERSION`` of every kernel since Linux 2.6.22.
API_VERSION = 12

_KVMIO = 0xAE
_TYPE_SHIFT, _SIZE_SHIFT, _DIRECTION_SHIFT = 8, 16, 30
_NONE, _WRITE, _READ = 0, 1, 2
#: ``fcntl.ioctl`` takes integers up to this one.
_LARGEST_FCNTL_INTEGER = 0x7FFF_FFFF

_libc_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_libc_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)

#: What a failure means where the errno alone does not tell.
_HINTS = {
    ("KVM_CREATE_VM", errno.EBUSY): "another hypervisor holds the processor's virtualization; stop it",
    ("KVM_CREATE_VM", errno.ENOMEM): "the host is out of memory; end other virtual machines",
    ("KVM_CREATE_VCPU", errno.EEXIST): "this VM has its vCPU already",
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "the slot overlaps another slot, or memory that KVM uses itself",
    ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL): "this KVM takes no such slot: look at its number, range and flags",
    ("KVM_GET_DIRTY_LOG", errno.ENOENT): "the slot does not exist or does not log dirty pages",
    ("KVM_CREATE_IRQCHIP", errno.EEXIST): "this VM has its irqchip already",
    ("KVM_CREATE_IRQCHIP", errno.EINVAL): "the irqchip must come before the vCPU",
    ("KVM_CREATE_PIT2", errno.ENOENT): "the PIT needs an irqchip; call create_irqchip() first",
    ("KVM_IRQ_LINE", errno.ENXIO): "this VM has no irqchip; call create_irqchip() first",
    ("KVM_GET_IRQCHIP", errno.ENXIO): "this VM has no irqchip; call create_irqchip() first",
    ("KVM_SET_IRQCHIP", errno.ENXIO): "this VM has no irqchip; call create_irqchip() first",
    ("KVM_SET_GSI_ROUTING", errno.EINVAL): "this VM has no irqchip; call create_irqchip() first",
    ("KVM_SIGNAL_MSI", errno.EINVAL): "this VM has no irqchip; call create_irqchip() first",
    ("KVM_GET_PIT2", errno.ENXIO): "this VM has no PIT; call create_pit2() first",
    ("KVM_SET_PIT2", errno.ENXIO): "this VM has no PIT; call create_pit2() first",
    ("KVM_GET_LAPIC", errno.EINVAL): "there is no local APIC; create the irqchip before the vCPU",
    ("KVM_SET_LAPIC", errno.EINVAL): "there is no local APIC, or the state is none of this vCPU's",
    ("KVM_SET_CPUID2", errno.EINVAL): "the CPUID of a vCPU that has run cannot change, or is contradictory",
    ("KVM_SET_SREGS", errno.EINVAL): "the guest's CPUID, or this host, does not allow this CR0, CR4 and EFER",
    ("KVM_SET_SREGS2", errno.EINVAL): "the guest's CPUID, or this host, does not allow this CR0, CR4 and EFER",
    ("KVM_INTERRUPT", errno.ENXIO): "interrupts come from the irqchip of this VM; use irq_line()",
    ("KVM_INTERRUPT", errno.EEXIST): "an interrupt waits already",
    ("KVM_SET_GUEST_DEBUG", errno.EBUSY): "an exception is about to be delivered",
}  # fmt: skip
_UNKNOWN_REQUEST = "the KVM of this host does not know it"


class KvmIoctlError(OSError, HostError):
    """An ioctl on /dev/kvm failed: ``errno`` says how, ``ioctl`` which; the text says both and, if known, why.

    It is an OSError like those of the soft provider, and a refusal of the host where nobody expects it.
    """

    def __init__(self, ioctl: str, number: int, hint: str = "") -> None:
        self.ioctl = ioctl
        if not hint:
            hint = _HINTS.get((ioctl, number), _UNKNOWN_REQUEST if number == errno.ENOTTY else "")
        text = f"{ioctl}: {os.strerror(number)}"
        super().__init__(number, f"{text}; {hint}" if hint else text)

    def __reduce__(self) -> tuple[type[KvmIoctlError], tuple[str, int]]:
        return type(self), (self.ioctl, self.errno or 0)


@dataclass(frozen=True)
class Ioctl:
    """One request: its name in ``linux/kvm.h`` and its number."""

    name: str
    number: int

    def __call__(
        self, descriptor: int, argument: ctypes.Structure | ctypes.Array[ctypes.c_char] | int = 0
    ) -> int:
        """Do it on *descriptor*; a structure is passed by reference and comes back filled in.

        Raises :class:`KvmIoctlError`, EINTR among its reasons. Nothing is tried again.
        """
        if descriptor < 0:
            raise KvmIoctlError(self.name, errno.EBADF, "what it belongs to has been closed")
        try:
            if isinstance(argument, int):
                if argument > _LARGEST_FCNTL_INTEGER:
                    return self._by_value(descriptor, argument)
                return fcntl.ioctl(descriptor, self.number, argument)
            result: int = fcntl.ioctl(descriptor, self.number, argument, True)
            return result
        except OSError as error:
            raise KvmIoctlError(self.name, error.errno or 0) from None

    def _by_value(self, descriptor: int, argument: int) -> int:
        result: int = _libc_ioctl(descriptor, self.number, argument)
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result


def _ioc(direction: int, number: int, structure: type[ctypes.Structure] | None) -> int:
    size = 0 if structure is None else ctypes.sizeof(structure)
    return direction << _DIRECTION_SHIFT | size << _SIZE_SHIFT | _KVMIO << _TYPE_SHIFT | number


def _io(name: str, number: int) -> Ioctl:
    return Ioctl(name, _ioc(_NONE, number, None))


def _ior(name: str, number: int, structure: type[ctypes.Structure]) -> Ioctl:
    return Ioctl(name, _ioc(_READ, number, structure))


def _iow(name: str, number: int, structure: type[ctypes.Structure]) -> Ioctl:
    return Ioctl(name, _ioc(_WRITE, number, structure))


def _iowr(name: str, number: int, structure: type[ctypes.Structure]) -> Ioctl:
    return Ioctl(name, _ioc(_READ | _WRITE, number, structure))


# On /dev/kvm
KVM_GET_API_VERSION = _io("KVM_GET_API_VERSION", 0x00)
KVM_CREATE_VM = _io("KVM_CREATE_VM", 0x01)
KVM_GET_MSR_INDEX_LIST = _iowr("KVM_GET_MSR_INDEX_LIST", 0x02, abi.MsrList)
KVM_CHECK_EXTENSION = _io("KVM_CHECK_EXTENSION", 0x03)
KVM_GET_VCPU_MMAP_SIZE = _io("KVM_GET_VCPU_MMAP_SIZE", 0x04)
KVM_GET_SUPPORTED_CPUID = _iowr("KVM_GET_SUPPORTED_CPUID", 0x05, abi.Cpuid2)

# On a VM
KVM_CREATE_VCPU = _io("KVM_CREATE_VCPU", 0x41)
KVM_GET_DIRTY_LOG = _iow("KVM_GET_DIRTY_LOG", 0x42, abi.DirtyLog)
KVM_SET_USER_MEMORY_REGION = _iow("KVM_SET_USER_MEMORY_REGION", 0x46, abi.UserspaceMemoryRegion)
KVM_SET_TSS_ADDR = _io("KVM_SET_TSS_ADDR", 0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow("KVM_SET_IDENTITY_MAP_ADDR", 0x48, abi.Address)
KVM_CREATE_IRQCHIP = _io("KVM_CREATE_IRQCHIP", 0x60)
KVM_IRQ_LINE = _iow("KVM_IRQ_LINE", 0x61, abi.IrqLevel)
KVM_GET_IRQCHIP = _iowr("KVM_GET_IRQCHIP", 0x62, chips.Irqchip)
# The kernel's header has the direction of this one wrong, for ever.
KVM_SET_IRQCHIP = _ior("KVM_SET_IRQCHIP", 0x63, chips.Irqchip)
KVM_SET_GSI_ROUTING = _iow("KVM_SET_GSI_ROUTING", 0x6A, chips.IrqRouting)
KVM_CREATE_PIT2 = _iow("KVM_CREATE_PIT2", 0x77, abi.PitConfig)
KVM_SET_CLOCK = _iow("KVM_SET_CLOCK", 0x7B, abi.ClockData)
KVM_GET_CLOCK = _ior("KVM_GET_CLOCK", 0x7C, abi.ClockData)
KVM_GET_PIT2 = _ior("KVM_GET_PIT2", 0x9F, chips.PitState2)
KVM_SET_PIT2 = _iow("KVM_SET_PIT2", 0xA0, chips.PitState2)
KVM_ENABLE_CAP = _iow("KVM_ENABLE_CAP", 0xA3, abi.EnableCap)
KVM_SIGNAL_MSI = _iow("KVM_SIGNAL_MSI", 0xA5, chips.Msi)
KVM_X86_SET_MSR_FILTER = _iow("KVM_X86_SET_MSR_FILTER", 0xC6, abi.MsrFilter)

# On a vCPU
KVM_RUN = _io("KVM_RUN", 0x80)
KVM_GET_REGS = _ior("KVM_GET_REGS", 0x81, abi.Regs)
KVM_SET_REGS = _iow("KVM_SET_REGS", 0x82, abi.Regs)
KVM_GET_SREGS = _ior("KVM_GET_SREGS", 0x83, abi.Sregs)
KVM_SET_SREGS = _iow("KVM_SET_SREGS", 0x84, abi.Sregs)
KVM_TRANSLATE = _iowr("KVM_TRANSLATE", 0x85, abi.Translation)
KVM_INTERRUPT = _iow("KVM_INTERRUPT", 0x86, abi.Interrupt)
KVM_GET_MSRS = _iowr("KVM_GET_MSRS", 0x88, abi.Msrs)
KVM_SET_MSRS = _iow("KVM_SET_MSRS", 0x89, abi.Msrs)
KVM_SET_SIGNAL_MASK = _iow("KVM_SET_SIGNAL_MASK", 0x8B, abi.SignalMaskHeader)
KVM_GET_FPU = _ior("KVM_GET_FPU", 0x8C, abi.Fpu)
KVM_SET_FPU = _iow("KVM_SET_FPU", 0x8D, abi.Fpu)
KVM_GET_LAPIC = _ior("KVM_GET_LAPIC", 0x8E, chips.LapicState)
KVM_SET_LAPIC = _iow("KVM_SET_LAPIC", 0x8F, chips.LapicState)
KVM_SET_CPUID2 = _iow("KVM_SET_CPUID2", 0x90, abi.Cpuid2)
KVM_GET_CPUID2 = _iowr("KVM_GET_CPUID2", 0x91, abi.Cpuid2)
KVM_GET_MP_STATE = _ior("KVM_GET_MP_STATE", 0x98, abi.MpState)
KVM_SET_MP_STATE = _iow("KVM_SET_MP_STATE", 0x99, abi.MpState)
KVM_NMI = _io("KVM_NMI", 0x9A)
KVM_GET_TSC_KHZ = _io("KVM_GET_TSC_KHZ", 0xA3)
KVM_SET_GUEST_DEBUG = _iow("KVM_SET_GUEST_DEBUG", 0x9B, abi.GuestDebug)
KVM_GET_VCPU_EVENTS = _ior("KVM_GET_VCPU_EVENTS", 0x9F, abi.VcpuEvents)
KVM_SET_VCPU_EVENTS = _iow("KVM_SET_VCPU_EVENTS", 0xA0, abi.VcpuEvents)
KVM_GET_DEBUGREGS = _ior("KVM_GET_DEBUGREGS", 0xA1, abi.DebugRegs)
KVM_SET_DEBUGREGS = _iow("KVM_SET_DEBUGREGS", 0xA2, abi.DebugRegs)
KVM_GET_XSAVE = _ior("KVM_GET_XSAVE", 0xA4, abi.Xsave)
KVM_SET_XSAVE = _iow("KVM_SET_XSAVE", 0xA5, abi.Xsave)
KVM_GET_XCRS = _ior("KVM_GET_XCRS", 0xA6, abi.Xcrs)
KVM_SET_XCRS = _iow("KVM_SET_XCRS", 0xA7, abi.Xcrs)
KVM_GET_NESTED_STATE = _iowr("KVM_GET_NESTED_STATE", 0xBE, abi.NestedState)
KVM_SET_NESTED_STATE = _iow("KVM_SET_NESTED_STATE", 0xBF, abi.NestedState)
KVM_GET_SREGS2 = _ior("KVM_GET_SREGS2", 0xCC, abi.Sregs2)
KVM_SET_SREGS2 = _iow("KVM_SET_SREGS2", 0xCD, abi.Sregs2)
KVM_GET_XSAVE2 = _ior("KVM_GET_XSAVE2", 0xCF, abi.Xsave)
