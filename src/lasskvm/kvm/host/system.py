"""``/dev/kvm``: whether it can be used, what it offers, and how a VM is made."""

from __future__ import annotations

import ctypes
import errno
import os
from types import TracebackType
from typing import Self

from lasskvm.errors import HostError
from lasskvm.kvm.host import abi
from lasskvm.kvm.host import ioctls as ioctl
from lasskvm.kvm.host.cpuid import read_cpuid
from lasskvm.kvm.host.descriptor import Descriptor
from lasskvm.kvm.host.ioctls import KvmIoctlError
from lasskvm.kvm.host.vm import Vm
from lasskvm.x86.cpuid import CpuidEntry

__all__ = ["DEVICE", "System"]

DEVICE = "/dev/kvm"

_OTHERWISE = "or use the software provider, which needs none"
_OPEN_ADVICE = {
    errno.ENOENT: f"this host has no {DEVICE}; load kvm_intel or kvm_amd, {_OTHERWISE}",
    errno.EACCES: f"{DEVICE} may not be opened; join the group that owns it (often: kvm), {_OTHERWISE}",
    errno.EPERM: f"{DEVICE} may not be opened; join the group that owns it (often: kvm), {_OTHERWISE}",
    errno.ENODEV: f"{DEVICE} has no driver behind it; load kvm_intel or kvm_amd, {_OTHERWISE}",
    errno.ENXIO: f"{DEVICE} has no driver behind it; load kvm_intel or kvm_amd, {_OTHERWISE}",
}


class System:
    """``/dev/kvm`` of this host; a context manager that closes it.

    Raises :class:`HostError` when it is missing, may not be opened, or does not speak version 12 of the API.

    >>> with System() as system, system.create_vm() as vm:       # doctest: +SKIP
    ...     vm.set_user_memory_region(0, 0, vm.allocate(0x10000))
    ...     vcpu = vm.create_vcpu()
    ...     vcpu.set_cpuid2(system.get_supported_cpuid())
    """

    def __init__(self, device: str = DEVICE) -> None:
        self._descriptor = Descriptor(_open(device))
        try:
            version = ioctl.KVM_GET_API_VERSION(self._descriptor.number)
        except KvmIoctlError:
            self.close()
            raise HostError(
                f"{device} is not KVM; give the device of KVM, normally {DEVICE}, {_OTHERWISE}"
            ) from None
        if version != ioctl.API_VERSION:
            self.close()
            raise HostError(
                f"{device} speaks version {version} of the KVM API, not {ioctl.API_VERSION}; "
                f"update the host's kernel, {_OTHERWISE}"
            )

    @property
    def provider(self) -> str:
        """``"host"``."""
        return "host"

    def check_extension(self, capability: int) -> int:
        """``KVM_CHECK_EXTENSION``: 0 when *capability* (``KVM_CAP_*``) is not there, else what it is worth."""
        return ioctl.KVM_CHECK_EXTENSION(self._descriptor.number, capability)

    def get_supported_cpuid(self) -> list[CpuidEntry]:
        """``KVM_GET_SUPPORTED_CPUID``: what this host's KVM can give to a guest."""
        return read_cpuid(ioctl.KVM_GET_SUPPORTED_CPUID, self._descriptor.number)

    def get_msr_index_list(self) -> list[int]:
        """``KVM_GET_MSR_INDEX_LIST``: the MSRs to save and restore."""
        number = self._descriptor.number
        raw = abi.with_entries(abi.MsrList, ctypes.c_uint32, 0)
        try:
            ioctl.KVM_GET_MSR_INDEX_LIST(number, raw)
        except KvmIoctlError as error:
            if error.errno != errno.E2BIG:
                raise
            # The kernel says how many there are.
            count = raw.nmsrs
            raw = abi.with_entries(abi.MsrList, ctypes.c_uint32, count)
            raw.nmsrs = count
            ioctl.KVM_GET_MSR_INDEX_LIST(number, raw)
        return list(raw.entries[: raw.nmsrs])

    def create_vm(self) -> Vm:
        """``KVM_CREATE_VM``."""
        descriptor = Descriptor(ioctl.KVM_CREATE_VM(self._descriptor.number))
        return Vm(descriptor, ioctl.KVM_GET_VCPU_MMAP_SIZE(self._descriptor.number))

    def close(self) -> None:
        """Close the device; VMs made from it live on."""
        self._descriptor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(device: str) -> int:
    try:
        return os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        number = error.errno or 0
        advice = _OPEN_ADVICE.get(number, f"{device} cannot be opened ({error.strerror}); look at its driver")
        raise HostError(advice.replace(DEVICE, device)) from None
