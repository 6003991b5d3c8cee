"""Two of everything, to run a function compiled on one and as plain Python on the other."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from lasskvm.engine.compiler import compiled
from lasskvm.lass import BRANCH, FETCH, IMPLICIT, INVLPG, STACK, WRITE
from lasskvm.memory import PAGE_SIZE, SLOT_READONLY, GuestMemory
from lasskvm.state import (
    CR0,
    CR3,
    CR4,
    EFER,
    MAXPHYADDR,
    PDPTR0,
    PKRS,
    PKRU,
    STATE_WORDS,
    VcpuState,
)
from lasskvm.x86.paging import PTE_A, PTE_D, PTE_KEY_SHIFT, PTE_P, PTE_PS, PTE_U, PTE_W, PTE_XD
from lasskvm.x86.registers import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_LASS,
    CR4_PAE,
    CR4_PKE,
    CR4_PKS,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
)

MEMORY_BYTES = 16 * PAGE_SIZE
ROM_GPA, ROM_BYTES = 0x40000, PAGE_SIZE
UPPER = 0xFFFF_8000_0000_0000
ENV_BYTES = 0x4000
PHYSICAL_BITS = 46
ROUNDS = 400


def make_memory(content: bytes) -> GuestMemory:
    memory = GuestMemory()
    memory.set_slot(0, 0, mmap.mmap(-1, MEMORY_BYTES))
    memory.set_slot(1, ROM_GPA, mmap.mmap(-1, ROM_BYTES), SLOT_READONLY)
    memory.write(0, content)
    return memory


def plain_result(result: Any) -> Any:
    """Numba's results as Python's: integers, and tuples of them."""
    if result is None:
        return None
    return tuple(int(item) for item in result) if isinstance(result, tuple) else int(result)


def native(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call *function* compiled; integers go in as 64-bit words."""
    words = (np.uint64(argument) if isinstance(argument, int | bool) else argument for argument in arguments)
    return plain_result(compiled(function)(*words))


class Twins:
    """Two of everything with the same content: vCPU state, memory, and bytes in place of the translator's structure.

    The first of each is for plain Python, the second for machine code.
    """

    def __init__(self, rng: random.Random, content: bytes) -> None:
        self.states = VcpuState(), VcpuState()
        self.memories = make_memory(content), make_memory(content)
        words = np.frombuffer(rng.randbytes(8 * STATE_WORDS), np.uint64)
        for state in self.states:
            state.load_bytes(words.tobytes())
        translator = rng.randbytes(ENV_BYTES)
        kind = ctypes.c_char * ENV_BYTES
        self.env = kind.from_buffer_copy(translator), kind.from_buffer_copy(translator)

    def set_words(self, values: dict[int, int]) -> None:
        for state in self.states:
            for index, value in values.items():
                state.words[index] = value

    def assert_same_memory(self) -> None:
        assert self.memories[0].read(0, MEMORY_BYTES) == self.memories[1].read(0, MEMORY_BYTES)

    def assert_same_state(self) -> None:
        assert self.states[0].to_bytes() == self.states[1].to_bytes()

    @property
    def table(self) -> int:
        return int(self.memories[1].table.ctypes.data)

    @property
    def envs(self) -> tuple[int, int]:
        return ctypes.addressof(self.env[0]), ctypes.addressof(self.env[1])


def random_address(rng: random.Random) -> int:
    base = rng.choice((0, UPPER, 1 << 47, (1 << 64) - PAGE_SIZE, 1 << 63, rng.getrandbits(64)))
    return (base + rng.choice((rng.randrange(MEMORY_BYTES), -rng.randrange(16)))) % (1 << 64)


def random_entry(rng: random.Random) -> int:
    """A page-table entry that mostly leads somewhere."""
    entry = rng.randrange(MEMORY_BYTES // PAGE_SIZE) * PAGE_SIZE
    for flag in (PTE_P, PTE_P, PTE_W, PTE_U, PTE_A, PTE_D):
        entry |= rng.choice((0, flag, flag))
    for rare in (PTE_PS, PTE_XD, 1 << 50, 1 << 13, 1 << PTE_KEY_SHIFT):
        entry |= rare * (rng.random() < 0.05)
    return entry


def tables(rng: random.Random) -> bytes:
    return b"".join(random_entry(rng).to_bytes(8, "little") for _ in range(MEMORY_BYTES // 8))


def random_mode(rng: random.Random) -> dict[int, int]:
    """Control registers for some paging mode, mostly that of 64-bit kernels."""
    cr4 = sum(bit for bit in (CR4_PSE, CR4_SMEP, CR4_SMAP, CR4_LASS, CR4_PKE, CR4_PKS) if rng.random() < 0.5)
    efer = rng.choice((0, EFER_NXE))
    kind = rng.choice(("long", "long", "long", "la57", "pae", "32-bit", "none"))
    if kind in ("long", "la57"):
        cr4, efer = cr4 | CR4_PAE | CR4_LA57 * (kind == "la57"), efer | EFER_LMA
    elif kind == "pae":
        cr4 |= CR4_PAE
    cr0 = CR0_PE | rng.choice((0, CR0_WP)) | (CR0_PG if kind != "none" else 0)
    mode = {CR0: cr0, CR3: 0, CR4: cr4, EFER: efer, MAXPHYADDR: PHYSICAL_BITS}
    mode |= {PKRU: rng.getrandbits(32) * rng.randrange(2), PKRS: rng.getrandbits(32) * rng.randrange(2)}
    return mode | {PDPTR0 + number: random_entry(rng) & ~PTE_XD for number in range(4)}


def random_flags(rng: random.Random) -> int:
    return rng.choice((0, WRITE, FETCH, IMPLICIT, IMPLICIT | WRITE, STACK, STACK | WRITE, INVLPG, BRANCH))
