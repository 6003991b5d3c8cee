"""QEMU's ``pc-testdev``, the device by which unit-test kernels raise interrupt lines and reach memory-mapped I/O.

- Ports 0x2000 to 0x2017: a write drives the interrupt line (GSI) of that number, high unless the value is 0.
- Ports 0xe0 to 0xe3 and 0xe8 to 0xeb: one 32-bit register, in both places; but 0xe9 is left to the debug console.
- Ports 0xe4 to 0xe7: an address whose page the host is to drop from its mappings. The guest can see nothing of it.
- 64 KiB of memory at 0xff000000 that is a device: each access to it is emulated.

Source: the interface that QEMU's ``hw/misc/pc-testdev.c`` describes in its heading comment.
"""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.kvm.iobus import ALL_ONES, DeviceState
from lasskvm.machine.devices.debug_console import DEBUG_CONSOLE_PORT

__all__ = ["PcTestDevice", "DeviceMemory"]

_LINES = range(0x2000, 0x2018)
_REGISTER = range(0xE0, 0xE4)
_FLUSH_PAGE = range(0xE4, 0xE8)
_BYTE_REGISTER = range(0xE8, 0xEC)
_REGISTER_BYTES = 4

_MEMORY_BASE = 0xFF00_0000
_MEMORY_BYTES = 0x1_0000


class PcTestDevice:
    """The ports. ``irq_line(gsi, level)`` drives an interrupt line."""

    # The debug console has a port amid those of the byte register.
    ports = (
        _LINES,
        _REGISTER,
        _FLUSH_PAGE,
        range(_BYTE_REGISTER.start, DEBUG_CONSOLE_PORT),
        range(DEBUG_CONSOLE_PORT + 1, _BYTE_REGISTER.stop),
    )
    register_size = _REGISTER_BYTES
    __slots__ = ("_irq_line", "_register")

    def __init__(self, irq_line: Callable[[int, bool], None]) -> None:
        self._irq_line = irq_line
        self.reset()

    def reset(self) -> None:
        """Clear the register. Lines stay as they were driven."""
        self._register = 0

    def get_state(self) -> DeviceState:
        """The register."""
        return {"register": self._register}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        self._register = int(state["register"]) & ALL_ONES[_REGISTER_BYTES]

    def read_port(self, port: int, size: int) -> int:
        """Read the register; other ports read as 0."""
        if port in _REGISTER or port in _BYTE_REGISTER:
            return self._register >> 8 * (port % _REGISTER_BYTES) & ALL_ONES[size]
        return 0

    def write_port(self, port: int, size: int, value: int) -> None:
        """Write the register, or drive a line."""
        if port in _LINES:
            self._irq_line(port - _LINES.start, value != 0)
        elif port not in _FLUSH_PAGE:
            shift = 8 * (port % _REGISTER_BYTES)
            mask = ALL_ONES[size] << shift & ALL_ONES[_REGISTER_BYTES]
            self._register = self._register & ~mask | value << shift & mask


class DeviceMemory:
    """The memory behind memory-mapped I/O."""

    base = _MEMORY_BASE
    size = _MEMORY_BYTES
    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = bytearray(_MEMORY_BYTES)

    def get_state(self) -> DeviceState:
        """Its content, in hexadecimal digits."""
        return {"bytes": self._bytes.hex()}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        content = bytes.fromhex(state["bytes"])
        if len(content) != _MEMORY_BYTES:
            raise ValueError(f"{len(content)} bytes of test memory")
        self._bytes[:] = content

    def read_mmio(self, gpa: int, size: int) -> int:
        """Load *size* bytes."""
        start = gpa - _MEMORY_BASE
        return int.from_bytes(self._bytes[start : start + size], "little")

    def write_mmio(self, gpa: int, size: int, value: int) -> None:
        """Store *size* bytes."""
        start = gpa - _MEMORY_BASE
        self._bytes[start : start + size] = value.to_bytes(size, "little")
