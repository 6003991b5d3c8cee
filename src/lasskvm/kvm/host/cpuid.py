"""Reading CPUID entries from the kernel, which does not say beforehand how many there are."""

from __future__ import annotations

import errno
from typing import Any

from lasskvm.kvm.host import abi, conversion
from lasskvm.kvm.host.ioctls import Ioctl, KvmIoctlError
from lasskvm.x86.cpuid import CpuidEntry

__all__ = ["read_cpuid"]

_FIRST_ENTRIES = 64
#: More than any kernel gives.
_MOST_ENTRIES = 4096


def read_cpuid(request: Ioctl, descriptor: int) -> list[CpuidEntry]:
    """The entries that *request* gives, asked for with ever more room while it says E2BIG."""
    count = _FIRST_ENTRIES
    while True:
        raw: Any = abi.with_entries(abi.Cpuid2, abi.CpuidEntry2, count)
        raw.nent = count
        try:
            request(descriptor, raw)
        except KvmIoctlError as error:
            if error.errno != errno.E2BIG or count >= _MOST_ENTRIES:
                raise
            count *= 2
        else:
            return conversion.cpuid_entries(raw)
