"""Boot modules: files that a multiboot or PVH image finds in memory beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lasskvm.errors import ImageError
from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.files import open_file, size_of
from lasskvm.machine.boot.layout import MIB
from lasskvm.machine.boot.placement import Placement, find_high_room

__all__ = ["Module", "PlacedModule", "place_modules"]

#: What separates a module's file from its arguments.
_SEPARATOR = ","
#: An initrd that has no file, made by the caller, is called so.
_UNNAMED = Path("initrd")


@dataclass(frozen=True)
class Module:
    """A file to load beside the image, and the arguments that the image finds with it."""

    path: Path
    arguments: str = ""
    #: The contents, for a module that is no file.
    data: bytes | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The module that a person writes as FILE[,ARGS].

        >>> Module.parse("disk.img,ro fast").arguments
        'ro fast'
        """
        path, _, arguments = text.partition(_SEPARATOR)
        if not path:
            raise ImageError(f'the module "{text}" has no file; write FILE[,ARGS]')
        return cls(Path(path), arguments)

    @classmethod
    def of_initrd(cls, initrd: Path | bytes) -> Self:
        """An initrd as a module: images that are not Linux find it as their first one, as with QEMU."""
        return cls(_UNNAMED, data=initrd) if isinstance(initrd, bytes) else cls(initrd)

    @property
    def command_line(self) -> str:
        """What the image is told of the module: its file, then its arguments."""
        return f"{self.path} {self.arguments}" if self.arguments else str(self.path)


@dataclass(frozen=True)
class PlacedModule:
    """A module that has its place, page-aligned."""

    module: Module
    placement: Placement


def place_modules(modules: Sequence[Module], e820: E820Map, behind: int) -> list[PlacedModule]:
    """Read *modules* and place them one after the other from gpa *behind* on, above 1 MiB, each on a page boundary.

    Raises :class:`ImageError` when one cannot be read or there is no room for it.
    """
    placed = []
    for module in modules:
        if module.data is None:
            with open_file(module.path, "module") as stream:
                gpa = _room_for(module, size_of(stream), e820, behind)
                data = stream.read(size_of(stream))
        else:
            gpa, data = _room_for(module, len(module.data), e820, behind), module.data
        placed.append(PlacedModule(module, Placement.of(gpa, data)))
        behind = gpa + len(data)
    return placed


def _room_for(module: Module, size: int, e820: E820Map, behind: int) -> int:
    gpa = find_high_room(size, e820, behind)
    if gpa is None:
        raise ImageError(
            f"module {module.path} has {size / MIB:.1f} MiB and does not fit beside the image into the guest's "
            f"{e820.ram_size / MIB:.1f} MiB of memory; give the guest more memory or use a smaller module"
        )
    return gpa
