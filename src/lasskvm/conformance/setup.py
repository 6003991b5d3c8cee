"""What a conformance case changes in its guest's memory before it starts, as data.

A :class:`Step` is applied to a :class:`Site`: the guest's memory, its page tables, and the addresses of the case's
labels. Wherever a step takes a value, a label's name stands for its address.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from lasskvm.conformance import layout
from lasskvm.conformance.layout import PageTables
from lasskvm.memory import PAGE_SIZE, GuestMemory
from lasskvm.x86.paging import PTE_W

__all__ = [
    "Bytes",
    "Descriptor",
    "EveryGate",
    "Gate",
    "GdtImage",
    "IdtImage",
    "Map",
    "ReadOnly",
    "Site",
    "Step",
    "TableRegister",
    "TssWord",
    "Words",
]

_WORD_BYTES = 8
_LIMIT_BYTES = 2


@dataclass(frozen=True)
class Site:
    """Where steps are applied."""

    memory: GuestMemory
    tables: PageTables
    labels: Mapping[str, int]

    def resolve(self, value: int | str) -> int:
        """*value*, or the address of the label of that name."""
        return self.labels[value] if isinstance(value, str) else value


class Step(Protocol):
    """One change."""

    def apply(self, site: Site) -> None:
        """Make it."""


@dataclass(frozen=True)
class Bytes:
    """*data* at linear *gva*, which is mapped."""

    gva: int
    data: bytes

    def apply(self, site: Site) -> None:
        """Write it."""
        site.tables.write(self.gva, self.data)


@dataclass(frozen=True)
class Words:
    """64-bit *values* from linear *gva* on."""

    gva: int
    values: tuple[int | str, ...]

    def apply(self, site: Site) -> None:
        """Write it."""
        data = b"".join(site.resolve(value).to_bytes(_WORD_BYTES, "little") for value in self.values)
        site.tables.write(self.gva, data)


@dataclass(frozen=True)
class TableRegister:
    """At linear *gva*, the operand of LGDT or LIDT."""

    gva: int
    base: int
    limit: int

    def apply(self, site: Site) -> None:
        """Write it."""
        data = self.limit.to_bytes(_LIMIT_BYTES, "little") + self.base.to_bytes(_WORD_BYTES, "little")
        site.tables.write(self.gva, data)


@dataclass(frozen=True)
class Map:
    """*pages* pages at linear *gva* mapped to *gpa* with ``PTE_*`` *flags*, present and writable."""

    gva: int
    gpa: int
    flags: int = 0
    pages: int = 1

    def apply(self, site: Site) -> None:
        """Write it."""
        site.tables.map(self.gva, self.gpa, self.flags, self.pages)


@dataclass(frozen=True)
class ReadOnly:
    """The page at linear *gva*, which is mapped, cannot be written."""

    gva: int

    def apply(self, site: Site) -> None:
        """Write it."""
        site.tables.set_entry(self.gva, site.tables.entry(self.gva) & ~PTE_W)


@dataclass(frozen=True)
class Gate:
    """The interrupt gate of *vector*."""

    vector: int
    offset: int | str
    ist: int = layout.IST
    dpl: int = 3
    selector: int = layout.KERNEL_CS

    def apply(self, site: Site) -> None:
        """Write it."""
        layout.set_gate(
            site.memory,
            self.vector,
            site.resolve(self.offset),
            selector=self.selector,
            dpl=self.dpl,
            ist=self.ist,
        )


@dataclass(frozen=True)
class EveryGate:
    """All gates lead to their usual handlers, on stack *ist* (0: the stack that the privilege level gives)."""

    ist: int

    def apply(self, site: Site) -> None:
        """Write it."""
        for vector in range(layout.VECTORS):
            handler = layout.HANDLERS + vector * layout.HANDLER_BYTES
            layout.set_gate(site.memory, vector, handler, dpl=3, ist=self.ist)


@dataclass(frozen=True)
class Descriptor:
    """A GDT entry; with *high* of 16 bytes. *table* is the linear address of the GDT, where it is not the usual one."""

    selector: int
    low: int
    high: int | None = None
    table: int = layout.GDT

    def apply(self, site: Site) -> None:
        """Write it."""
        data = self.low.to_bytes(_WORD_BYTES, "little")
        if self.high is not None:
            data += self.high.to_bytes(_WORD_BYTES, "little")
        at = self.table + (self.selector & layout.SELECTOR_INDEX)
        # Byte by byte: a table may reach across the end of the address space.
        for number, byte in enumerate(data):
            site.tables.write((at + number) % (1 << 64), bytes((byte,)))


@dataclass(frozen=True)
class GdtImage:
    """A copy of the usual GDT at linear *gva*."""

    gva: int

    def apply(self, site: Site) -> None:
        """Write it."""
        site.tables.write(self.gva, site.memory.read(layout.GDT_GPA, layout.GDT_BYTES))


@dataclass(frozen=True)
class TssWord:
    """64 bits of the TSS at byte *offset*; *table* is the linear address of the TSS."""

    offset: int
    value: int
    table: int = layout.TSS

    def apply(self, site: Site) -> None:
        """Write it."""
        for number, byte in enumerate(self.value.to_bytes(_WORD_BYTES, "little")):
            site.tables.write((self.table + self.offset + number) % (1 << 64), bytes((byte,)))


@dataclass(frozen=True)
class IdtImage:
    """A copy of the usual IDT, as far as it reaches to the end of the page at linear *gva*."""

    gva: int

    def apply(self, site: Site) -> None:
        """Write it."""
        size = min(layout.VECTORS * layout.GATE_BYTES, PAGE_SIZE - self.gva % PAGE_SIZE)
        site.tables.write(self.gva, site.memory.read(layout.IDT_GPA, size))
