"""Random page tables of a nested guest, and the EPT tables that its memory lies under."""

from __future__ import annotations

import random

from lasskvm.x86.ept import EPT_A, EPT_D, EPT_PS, EPT_R, EPT_TYPE_SHIFT, EPT_W, EPT_X
from lasskvm.x86.paging import PTE_A, PTE_D, PTE_G, PTE_P, PTE_PS, PTE_U, PTE_W, PTE_XD
from lasskvm.x86.vmx import MEMORY_TYPE_WB

PAGES = 16
#: The guest's tables, at guest-physical addresses, and as many pages of EPT tables: two for each level.
GUEST_PAGES = 8
EPT_ROOTS = (GUEST_PAGES, GUEST_PAGES + 1)
#: Where the guest's tables have entries. (EPT tables have those for all of the guest's pages, and one more.)
INDICES = (0, 1, 511)

_RWX = EPT_R | EPT_W | EPT_X
_WB = MEMORY_TYPE_WB << EPT_TYPE_SHIFT
_PTE_ALL = PTE_P | PTE_W | PTE_U


def nested_tables(rng: random.Random) -> bytes:
    """Memory of ``PAGES`` pages: pages of the guest's tables first, then two EPT tables for each level."""
    content = bytearray(PAGES << 12)
    for page in range(PAGES):
        for index in INDICES if page < GUEST_PAGES else range(PAGES + 1):
            if page < GUEST_PAGES:
                entry = _random_table_entry(rng)
            else:
                entry = _random_ept_entry(rng, (page - GUEST_PAGES) // 2)
            place = page << 12 | index * 8
            content[place : place + 8] = entry.to_bytes(8, "little")
    return bytes(content)


def _random_table_entry(rng: random.Random) -> int:
    """An entry of the guest's tables that mostly leads to another one."""
    if rng.random() < 0.03:
        return rng.getrandbits(64)
    entry = rng.randrange(GUEST_PAGES) << 12 | rng.choice((0, PTE_A, PTE_A | PTE_D)) | _PTE_ALL
    if rng.random() < 0.1:
        entry ^= rng.choice((PTE_P, PTE_W, PTE_U, PTE_PS, PTE_XD, PTE_G, 1 << 50, PAGES << 12))
    return entry


def _random_ept_entry(rng: random.Random, level: int) -> int:
    """An entry of EPT tables that mostly leads to a table of the next level, the last one to any page."""
    entry = rng.choice((_RWX, _RWX, _RWX, _RWX, _RWX, EPT_R | EPT_W, EPT_R | EPT_X, EPT_R, EPT_X))
    entry |= rng.choice((0, 0, EPT_A, EPT_A | EPT_D))
    if rng.random() < 0.05:
        entry ^= rng.choice((_RWX, EPT_R, _WB, EPT_PS, 1 << 50))
    if level == 3:
        return entry | rng.randrange(PAGES) << 12 | _WB
    return entry | (GUEST_PAGES + 2 * (level + 1) + rng.randrange(2)) << 12
