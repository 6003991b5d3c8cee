"""The devices that a person adds to a PC, as QEMU's ``-device`` names them.

>>> parse_device("isa-debugcon,iobase=0x402")
DeviceRequest(name='isa-debugcon', iobase=1026, iosize=None)
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lasskvm.errors import DeviceError

__all__ = ["DEBUG_CONSOLE", "DEBUG_EXIT", "PC_TESTDEV", "DeviceRequest", "parse_device"]

PC_TESTDEV = "pc-testdev"
DEBUG_EXIT = "isa-debug-exit"
DEBUG_CONSOLE = "isa-debugcon"
#: What can be set of each device, and the largest value.
_PROPERTIES = {
    PC_TESTDEV: {},
    DEBUG_EXIT: {"iobase": 0xFFFF, "iosize": 4},
    DEBUG_CONSOLE: {"iobase": 0xFFFF},
}


@dataclass(frozen=True)
class DeviceRequest:
    """One device, where it is to be: *iobase* and *iosize* are its I/O ports; None: as usual."""

    name: str
    iobase: int | None = None
    iosize: int | None = None


def parse_device(text: str) -> DeviceRequest:
    """The device described by ``NAME[,PROPERTY=NUMBER]...``; :class:`DeviceError` for anything else."""
    name, *settings = text.split(",")
    if name not in _PROPERTIES:
        nearest = difflib.get_close_matches(name, _PROPERTIES, n=1)
        advice = f'did you mean "{nearest[0]}"?' if nearest else f"choose from: {', '.join(_PROPERTIES)}"
        raise DeviceError(f'there is no device "{name}"; {advice}')
    known = _PROPERTIES[name]
    values: dict[str, int] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            offered = f"it has: {', '.join(known)}" if known else "it has none"
            raise DeviceError(f'the device {name} has no property "{key}"; {offered}')
        try:
            number = int(value, 0)
        except ValueError:
            raise DeviceError(f'"{value}" is no number; write it like {key}=0x{known[key]:x}') from None
        if not 0 < number <= known[key]:
            raise DeviceError(f"{key} of {name} can be 1 to {known[key]:#x}, not {number:#x}")
        values[key] = number
    return DeviceRequest(name, **values)
