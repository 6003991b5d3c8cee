"""Loaders: they write a guest image into guest memory and say how the vCPU must start.

:func:`load_image` (:mod:`.loader`) finds out what a file is (:mod:`.recognition`): a bzImage (:mod:`.bzimage`,
:mod:`.setup_header`, :mod:`.decompress`), an ELF file of 32 or 64 bits (:mod:`.elf`), a multiboot image
(:mod:`.multiboot`) or one with a PVH entry (:mod:`.pvh`). It places it (:mod:`.placement`, :mod:`.layout`), adds what
its boot protocol asks for (:mod:`.linux`, :mod:`.information`, :mod:`.modules`, :mod:`.e820`), and returns how to enter
it (:mod:`.entry`). :func:`load_firmware` and :func:`place_firmware` (:mod:`.firmware`) are for a ROM that starts at the
reset vector instead.
"""

from lasskvm.machine.boot.e820 import E820Entry, E820Map, E820Type
from lasskvm.machine.boot.entry import Entry, LongModeEntry, ProtectedModeEntry
from lasskvm.machine.boot.firmware import load_firmware, place_firmware, shadow_firmware
from lasskvm.machine.boot.linux import PROGRAM_STATUS_PORT
from lasskvm.machine.boot.loader import LoadedImage, load_image
from lasskvm.machine.boot.modules import Module
from lasskvm.machine.boot.recognition import BootProtocol, probe_image

__all__ = [
    "PROGRAM_STATUS_PORT",
    "BootProtocol",
    "E820Entry",
    "E820Map",
    "E820Type",
    "Entry",
    "LoadedImage",
    "LongModeEntry",
    "Module",
    "ProtectedModeEntry",
    "load_firmware",
    "load_image",
    "place_firmware",
    "probe_image",
    "shadow_firmware",
]
