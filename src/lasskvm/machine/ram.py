"""The memory of a PC, and its enclave page cache: how much it can have, and where it is."""

from __future__ import annotations

import os

from lasskvm.errors import MemoryLayoutError
from lasskvm.kvm.interface import VmInterface
from lasskvm.memory import PAGE_SIZE

__all__ = ["HIGH_MEMORY_START", "RAM_SLOTS", "epc_base", "place_ram"]

_MIB = 1 << 20
_MINIMUM_MEMORY = 4 * _MIB
#: RAM stops here and goes on at 4 GiB: the space between belongs to devices and firmware.
_LOW_MEMORY_END = 0xC000_0000
HIGH_MEMORY_START = 1 << 32
#: The memory slots that RAM takes, from 0 on.
RAM_SLOTS = 2
_LOW_SLOT, _HIGH_SLOT = range(RAM_SLOTS)


def place_ram(vm: VmInterface, size: int) -> tuple[int, int]:
    """Give *vm* RAM of *size* bytes; how much of it is below 4 GiB, and how much above.

    Raises :class:`MemoryLayoutError` for too little, or more than this host has.
    """
    if size < _MINIMUM_MEMORY:
        raise MemoryLayoutError(
            f"{size / _MIB:g} MiB of memory is too little for a PC; give at least {_MINIMUM_MEMORY // _MIB}"
        )
    _check_available(size, "memory")
    low = min(size, _LOW_MEMORY_END)
    vm.set_user_memory_region(_LOW_SLOT, 0, vm.allocate(low))
    if size > low:
        vm.set_user_memory_region(_HIGH_SLOT, HIGH_MEMORY_START, vm.allocate(size - low))
    return low, size - low


def epc_base(high_memory: int, size: int, maxphyaddr: int) -> int:
    """Where an EPC of *size* bytes begins: behind all RAM, *high_memory* bytes of which are above 4 GiB.

    Raises :class:`MemoryLayoutError` for a size that is no multiple of 4 KiB, for more than this host has, and for what
    the processor cannot address with *maxphyaddr* bits.
    """
    base = HIGH_MEMORY_START + high_memory
    if size <= 0 or size % PAGE_SIZE:
        raise MemoryLayoutError(f"an EPC of {size} bytes cannot be; give it a multiple of 4 KiB, such as 8M")
    _check_available(size, "EPC")
    if base + size > 1 << maxphyaddr:
        raise MemoryLayoutError(
            f"an EPC of {size // _MIB} MiB behind the guest's memory is beyond {maxphyaddr} physical address bits; "
            "give it less"
        )
    return base


def _check_available(size: int, what: str) -> None:
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > available:
        raise MemoryLayoutError(
            f"the guest cannot have {size // _MIB} MiB of {what}, this host has {available // _MIB}; give it less"
        )
