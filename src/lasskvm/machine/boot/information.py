"""What multiboot and PVH have in common: structures in low memory, modules behind the image, a flat 32-bit entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lasskvm.machine.boot.e820 import E820Map
from lasskvm.machine.boot.entry import FLAT_CS, FLAT_DS, ProtectedModeEntry, flat_gdt
from lasskvm.machine.boot.modules import Module, PlacedModule, place_modules
from lasskvm.machine.boot.placement import Arena, Placement, find_low_room
from lasskvm.memory import PAGE_SIZE

__all__ = ["Describe", "Information", "place_information"]

#: Writes a protocol's structures for the placed modules into an arena; the address that goes into EBX.
Describe = Callable[[Arena, Sequence[PlacedModule]], int]


@dataclass(frozen=True)
class Information:
    """What surrounds an image: how it is entered, what has to be written, and its modules."""

    entry: ProtectedModeEntry
    placements: tuple[Placement, ...]
    modules: tuple[PlacedModule, ...]


def place_information(
    image: Sequence[Placement],
    eip: int,
    modules: Sequence[Module],
    e820: E820Map,
    describe: Describe,
    *,
    eax: int = 0,
) -> Information:
    """Place *modules* and the structures that *describe* writes around *image*, which starts at *eip* with that *eax*.

    Before the structures there is a page of stack, though neither protocol promises one. Raises :class:`ImageError`
    when a module cannot be read or there is no room, and whatever *describe* raises.
    """
    placed = place_modules(modules, e820, max(placement.end for placement in image))
    measured = Arena(0)
    _fill(measured, placed, eip, eax, describe)
    arena = Arena(find_low_room(len(measured.data), e820, image))
    entry = _fill(arena, placed, eip, eax, describe)
    return Information(entry, (arena.placement(), *(module.placement for module in placed)), tuple(placed))


def _fill(
    arena: Arena, modules: Sequence[PlacedModule], eip: int, eax: int, describe: Describe
) -> ProtectedModeEntry:
    stack = arena.add(bytes(PAGE_SIZE))
    ebx = describe(arena, modules)
    gdt = flat_gdt(FLAT_CS, FLAT_DS)
    return ProtectedModeEntry(
        eip=eip,
        esp=stack + PAGE_SIZE,
        eax=eax,
        ebx=ebx,
        gdt_base=arena.add(gdt),
        gdt_limit=len(gdt) - 1,
    )
