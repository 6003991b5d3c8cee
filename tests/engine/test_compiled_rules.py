"""The rules that direct execution compiles, against the same source as plain Python, on random input.

What changes memory or state words is compared by what it leaves there, too. (Event delivery, system calls, CR3 and MSR
writes are held against themselves in the emulator's tests.)
"""

from __future__ import annotations

import random

from compiled_twins import (
    MEMORY_BYTES,
    PHYSICAL_BITS,
    ROM_BYTES,
    ROM_GPA,
    ROUNDS,
    Twins,
    make_memory,
    native,
    plain_result,
    random_address,
    random_flags,
    random_mode,
    tables,
)

from lasskvm.emulator import mmu
from lasskvm.emulator.io_permission import check_port_access
from lasskvm.engine import physical
from lasskvm.lass import FETCH, INVLPG, WRITE, is_lass_violation
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CR0,
    CR3,
    CR4,
    EFER,
    LIMIT,
    MAXPHYADDR,
    PDPTR0,
    segment_word,
)
from lasskvm.x86 import paging
from lasskvm.x86.registers import (
    AR_TSS64_BUSY,
    AR_UNUSABLE,
    CR0_PE,
    CR4_LASS,
    CR4_SMAP,
    EFER_LMA,
    RFLAGS_AC,
    TR,
)


def test_lass_rule(rng: random.Random) -> None:
    for _ in range(ROUNDS * 5):
        arguments = (
            random_address(rng), rng.choice((0, 1, 2, 8, 16, 4096)), random_flags(rng), rng.randrange(4),
            rng.choice((0, CR4_LASS, CR4_LASS | CR4_SMAP, rng.getrandbits(32))), rng.choice((0, EFER_LMA)),
            rng.choice((0, RFLAGS_AC)),
        )  # fmt: skip
        assert native(is_lass_violation, *arguments) == int(is_lass_violation(*arguments)), arguments


def test_page_walk(rng: random.Random) -> None:
    twins = Twins(rng, tables(rng))
    faults = 0
    for _ in range(ROUNDS * 3):
        mode = random_mode(rng)
        address = random_address(rng)
        rest = (
            address, rng.choice((0, WRITE, FETCH)), rng.choice((False, True)), mode[CR0], mode[CR3], mode[CR4],
            mode[EFER], rng.choice((False, True)), PHYSICAL_BITS, mode[PDPTR0 + (address >> 30 & 3)],
            rng.getrandbits(32), rng.getrandbits(32), 0,
        )  # fmt: skip
        plain = paging.walk(twins.memories[0], *rest)
        assert native(paging.walk, twins.table, *rest) == plain_result(plain), rest
        faults += plain[1] == 0
    twins.assert_same_memory()
    assert ROUNDS // 2 < faults < ROUNDS * 5 // 2


def test_linear_accesses(rng: random.Random) -> None:
    twins = Twins(rng, tables(rng))
    for _ in range(ROUNDS):
        twins.set_words(random_mode(rng))
        address, size = random_address(rng), rng.choice((1, 2, 4, 8, 3))
        tail = (random_flags(rng) & ~INVLPG, rng.randrange(4), rng.choice((0, RFLAGS_AC)))
        plain_state, native_state = twins.states[0].words, twins.states[1].array
        plain_memory, table = twins.memories[0], twins.table
        circumstances = (hex(address), size, tail)
        assert native(mmu.check_linear, native_state, address, size, *tail) == mmu.check_linear(
            plain_state, address, size, *tail
        ), circumstances
        within = min(size, PAGE_SIZE - address % PAGE_SIZE)
        assert native(mmu.translate, native_state, table, address, within, *tail) == plain_result(
            mmu.translate(plain_state, plain_memory, address, within, *tail)
        ), circumstances
        assert native(mmu.load_linear, native_state, table, address, size, *tail) == plain_result(
            mmu.load_linear(plain_state, plain_memory, address, size, *tail)
        ), circumstances
        value = rng.getrandbits(8 * size)
        assert native(mmu.store_linear, native_state, table, address, size, value, *tail) == plain_result(
            mmu.store_linear(plain_state, plain_memory, address, size, value, *tail)
        ), circumstances
    twins.assert_same_memory()
    twins.assert_same_state()


def test_next_linear(rng: random.Random) -> None:
    twins = Twins(rng, b"")
    for _ in range(ROUNDS):
        twins.set_words({EFER: rng.choice((0, EFER_LMA))})
        arguments = random_address(rng), rng.randrange(PAGE_SIZE)
        assert native(mmu.next_linear, twins.states[1].array, *arguments) == mmu.next_linear(
            twins.states[0].words, *arguments
        )


def test_physical_memory_natively_and_through_the_slots(rng: random.Random) -> None:
    content = rng.randbytes(MEMORY_BYTES)
    by_table, by_slots = make_memory(content), make_memory(content)
    table = int(by_table.table.ctypes.data)
    for _ in range(ROUNDS * 5):
        gpa = rng.choice((0, MEMORY_BYTES, ROM_GPA, ROM_GPA + ROM_BYTES, 1 << 40)) + rng.randrange(-16, 32)
        gpa, size = max(gpa, 0), rng.randrange(1, 9)
        value = rng.getrandbits(8 * size)
        native(physical.store_physical, table, gpa, size, value)
        by_slots.store(gpa, size, value)
        loaded = native(physical.load_physical, table, gpa, size)
        assert loaded == by_slots.load(gpa, size) == physical.load_physical(table, gpa, size), (
            hex(gpa),
            size,
        )
    assert by_table.read(0, MEMORY_BYTES) == by_slots.read(0, MEMORY_BYTES)
    assert by_table.read(ROM_GPA, ROM_BYTES) == by_slots.read(ROM_GPA, ROM_BYTES)
    for native_slot, slot in zip(by_table, by_slots, strict=True):
        assert (native_slot.page_flags == slot.page_flags).all()


def test_io_permission(rng: random.Random) -> None:
    content = bytearray(rng.randbytes(MEMORY_BYTES))
    twins = Twins(rng, bytes(content))
    denied = 0
    for _ in range(ROUNDS):
        gpa = rng.randrange(0, 0x3000, 8)
        twins.memories[0].store(gpa + 0x66, 2, 0x68)
        twins.memories[1].store(gpa + 0x66, 2, 0x68)
        twins.set_words(
            {
                CR0: rng.choice((0, CR0_PE, CR0_PE)), EFER: 0, CR4: 0, MAXPHYADDR: PHYSICAL_BITS,
                segment_word(TR, BASE): gpa,
                segment_word(TR, LIMIT): rng.choice((0x20, 0x67, 0x2067)),
                segment_word(TR, ATTRIBUTES): rng.choice((AR_TSS64_BUSY, AR_TSS64_BUSY, AR_UNUSABLE, 0x82)),
            }
        )  # fmt: skip
        arguments = rng.randrange(1 << 16), rng.choice((1, 2, 4)), rng.randrange(4), rng.getrandbits(18)
        plain = check_port_access(twins.states[0].words, twins.memories[0], *arguments)
        assert native(check_port_access, twins.states[1].array, twins.table, *arguments) == plain_result(
            plain
        )
        denied += plain[0] != 0
    assert 0 < denied < ROUNDS
