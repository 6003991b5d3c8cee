"""Loaders: they write a guest image into guest memory and say how the vCPU must start.

:func:`load_image` takes a bzImage (:mod:`.bzimage`, :mod:`.setup_header`, :mod:`.decompress`) or a 64-bit
ELF file (:mod:`.elf`), adds what the 64-bit boot protocol of Linux asks for (:mod:`.linux`, :mod:`.e820`)
at the places given by :mod:`.layout`, and returns the registers to start with (:mod:`.entry`). Nothing here
knows a Vm or a vCPU.
"""

from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.entry import LongModeEntry
from lasskvm.machine.boot.linux import PROGRAM_STATUS_PORT
from lasskvm.machine.boot.loader import LoadedImage, load_image

__all__ = ["PROGRAM_STATUS_PORT", "E820Map", "LoadedImage", "LongModeEntry", "load_image"]
