"""Each function that direct execution compiles, against the same source as plain Python, on random input.

What changes memory or state words is compared by what it leaves there, too. (Event delivery, system calls, CR3 and MSR
writes are held against themselves in the emulator's tests.)
"""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lasskvm.emulator import mmu
from lasskvm.emulator.io_permission import check_port_access
from lasskvm.engine import implicit, opcode, physical, private, watch
from lasskvm.engine.native import compiled
from lasskvm.lass import BRANCH, FETCH, IMPLICIT, INVLPG, STACK, WRITE, is_lass_violation
from lasskvm.memory import PAGE_SIZE, SLOT_READONLY, GuestMemory
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    CR0,
    CR3,
    CR4,
    DR0,
    DR7,
    EFER,
    GDT_BASE,
    GDT_LIMIT,
    IDT_LIMIT,
    INTERRUPT_SHADOW,
    LIMIT,
    MAXPHYADDR,
    NMI_BLOCKED,
    PDPTR0,
    RFLAGS,
    RIP,
    STATE_WORDS,
    VcpuState,
    segment_word,
)
from lasskvm.x86 import paging
from lasskvm.x86.paging import PTE_A, PTE_D, PTE_P, PTE_PS, PTE_U, PTE_W, PTE_XD
from lasskvm.x86.registers import (
    AR_CODE64,
    AR_TSS64_BUSY,
    AR_UNUSABLE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_LASS,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    CS,
    EFER_LMA,
    EFER_NXE,
    LDTR,
    RFLAGS_AC,
    TR,
)

MEMORY_BYTES = 16 * PAGE_SIZE
ROM_GPA, ROM_BYTES = 0x40000, PAGE_SIZE
UPPER = 0xFFFF_8000_0000_0000
ENV_BYTES = 0x4000
PHYSICAL_BITS = 46
ROUNDS = 400


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


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
    for rare in (PTE_PS, PTE_XD, 1 << 50, 1 << 13):
        entry |= rare * (rng.random() < 0.05)
    return entry


def tables(rng: random.Random) -> bytes:
    return b"".join(random_entry(rng).to_bytes(8, "little") for _ in range(MEMORY_BYTES // 8))


def random_mode(rng: random.Random) -> dict[int, int]:
    """Control registers for some paging mode, mostly that of 64-bit kernels."""
    cr4 = sum(bit for bit in (CR4_PSE, CR4_SMEP, CR4_SMAP, CR4_LASS) if rng.random() < 0.5)
    efer = rng.choice((0, EFER_NXE))
    kind = rng.choice(("long", "long", "long", "la57", "pae", "32-bit", "none"))
    if kind in ("long", "la57"):
        cr4, efer = cr4 | CR4_PAE | CR4_LA57 * (kind == "la57"), efer | EFER_LMA
    elif kind == "pae":
        cr4 |= CR4_PAE
    cr0 = CR0_PE | rng.choice((0, CR0_WP)) | (CR0_PG if kind != "none" else 0)
    mode = {CR0: cr0, CR3: 0, CR4: cr4, EFER: efer, MAXPHYADDR: PHYSICAL_BITS}
    return mode | {PDPTR0 + number: random_entry(rng) & ~PTE_XD for number in range(4)}


def random_flags(rng: random.Random) -> int:
    return rng.choice((0, WRITE, FETCH, IMPLICIT, IMPLICIT | WRITE, STACK, STACK | WRITE, INVLPG, BRANCH))


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


def random_watch_state(rng: random.Random) -> dict[int, int]:
    addresses = {DR0 + number: 0x5000 + rng.randrange(0x20) for number in range(4)}
    return addresses | {DR7: rng.getrandbits(32)}


def test_data_breakpoints(rng: random.Random) -> None:
    twins = Twins(rng, b"")
    hits = 0
    for _ in range(ROUNDS * 2):
        twins.set_words(random_watch_state(rng))
        plain_state, native_state = twins.states[0].words, twins.states[1].array
        dr7 = plain_state[DR7]
        assert native(watch.translated_dr7, dr7) == watch.translated_dr7(dr7)
        address = rng.choice((0x5000, 0x4FFC, 0x7000)) + rng.randrange(0x20)
        assert native(watch.watched_page, native_state, address) == int(
            watch.watched_page(plain_state, address)
        )
        arguments = address, rng.choice((1, 2, 4, 8)), rng.choice((0, WRITE))
        plain = watch.watch_hit(plain_state, *arguments)
        assert native(watch.watch_hit, native_state, *arguments) == plain
        hits += plain != 0
    assert hits


def test_opcode_and_implicit_accesses(rng: random.Random) -> None:
    """Real-looking instructions at RIP, with prefixes, in 64-bit and in 32-bit code."""
    prefixes = (0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x2E, 0x64, 0x48, 0x4D)
    opcodes = (0x8E, 0xCF, 0xCB, 0x07, 0xFF, 0x0F, 0x90, 0x9A, 0xC4, 0x63)
    found = 0
    for _ in range(ROUNDS):
        code = bytes(rng.choices(prefixes, k=rng.randrange(4))) + bytes((rng.choice(opcodes),))
        code += rng.choice((b"\x00", b"\x02", b"\x03", b"\xb2", b"\x1f", b"\x2b", b"\xa1"))
        twins = Twins(rng, bytes(0x1000) + code.ljust(64, b"\x00"))
        mode = {CR0: CR0_PE, CR4: rng.choice((0, CR4_SMAP)), EFER: 0, RIP: 0x1000, CPL: 0, RFLAGS: 2}
        twins.set_words(mode | {segment_word(CS, BASE): 0, segment_word(CS, ATTRIBUTES): AR_CODE64})
        for state, env in zip(twins.states, twins.envs, strict=True):
            private.load_state(env, state.words)
            private.set_guest_rip(env, 0x1000)
        plain_env, native_env = twins.envs
        plain_state, native_state = twins.states[0].words, twins.states[1].array
        plain = opcode.opcode_at_rip(plain_env, plain_state, twins.memories[0])  # type: ignore[arg-type]
        assert native(opcode.opcode_at_rip, native_env, native_state, twins.table) == plain_result(plain), (
            code.hex()
        )
        is_implicit = implicit.is_implicit(plain_env, plain_state, twins.memories[0])  # type: ignore[arg-type]
        assert native(implicit.is_implicit, native_env, native_state, twins.table) == int(is_implicit), (
            code.hex()
        )
        found += is_implicit
    assert 0 < found < ROUNDS


def test_pages_of_system_tables(rng: random.Random) -> None:
    twins = Twins(rng, b"")
    found = 0
    for _ in range(ROUNDS):
        base = rng.choice((0, (1 << 64) - 0x800, UPPER))
        twins.set_words(
            {
                CR4: rng.choice((0, CR4_SMAP, CR4_SMAP)), GDT_BASE: base, GDT_LIMIT: rng.choice((0xFF, 0xFFF, 0xFFFF)),
                segment_word(LDTR, BASE): 0x7000, segment_word(LDTR, LIMIT): 0x1F,
                segment_word(TR, BASE): 0x9F80, segment_word(TR, LIMIT): 0x2067,
            }
        )  # fmt: skip
        address = rng.choice((base, 0x7000, 0x9F80, 0xB000)) + rng.randrange(0x3000)
        arguments = address % (1 << 64), rng.choice((0, RFLAGS_AC, RFLAGS_AC))
        plain = implicit.may_be_implicit(twins.states[0].words, *arguments)
        assert native(implicit.may_be_implicit, twins.states[1].array, *arguments) == int(plain), arguments
        found += plain
    assert 0 < found < ROUNDS


@ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint32)
def compute_flags(env: int, operation: int) -> int:
    """In place of ``cpu_cc_compute_all``: some arithmetic flags."""
    return 0x8D5 & (operation * 0x9E3779B1 >> 7)


def plausible_state(rng: random.Random, twins: Twins) -> None:
    """Values that fit into the fields they go to."""
    values = {CPL: rng.randrange(4), RFLAGS: rng.getrandbits(22) & ~0x8028 | 2}
    values |= {GDT_LIMIT: rng.getrandbits(32), IDT_LIMIT: rng.getrandbits(32)}
    for number in range(8):
        values[segment_word(number, 0)] = rng.getrandbits(16)
        values[segment_word(number, LIMIT)] = rng.getrandbits(32)
        values[segment_word(number, ATTRIBUTES)] = rng.getrandbits(16) & 0xF0FF | rng.choice((0, AR_UNUSABLE))
    twins.set_words(values | {INTERRUPT_SHADOW: rng.randrange(2), NMI_BLOCKED: rng.randrange(2)})


def test_state_goes_into_the_translator_and_back(rng: random.Random) -> None:
    function = ctypes.cast(compute_flags, ctypes.c_void_p).value or 0
    for _ in range(ROUNDS // 8):
        twins = Twins(rng, b"")
        plausible_state(rng, twins)
        plain_env, native_env = twins.envs
        plain_state, native_state = twins.states[0].words, twins.states[1].array
        assert native(private.hflags_of, native_state) == private.hflags_of(plain_state)
        assert native(private.tables_moved, native_env, native_state) == int(
            private.tables_moved(plain_env, plain_state)
        )
        dr7 = rng.getrandbits(32)
        assert native(private.breakpoints_differ, native_env, native_state, dr7) == int(
            private.breakpoints_differ(plain_env, plain_state, dr7)
        )
        private.load_state(plain_env, plain_state)
        compiled(private.load_state)(np.uint64(native_env), native_state)
        assert twins.env[0].raw == twins.env[1].raw
        assert not private.tables_moved(plain_env, plain_state)
        private.save_state(plain_env, plain_state, function)
        compiled(private.save_state)(np.uint64(native_env), native_state, np.uint64(function))
        twins.assert_same_state()


def test_state_is_the_same_after_a_round_trip(rng: random.Random) -> None:
    function = ctypes.cast(_no_flags, ctypes.c_void_p).value or 0
    for _ in range(ROUNDS // 8):
        twins = Twins(rng, b"")
        plausible_state(rng, twins)
        state, env = twins.states[0], twins.envs[0]
        for number in range(8):
            attributes = segment_word(number, ATTRIBUTES)
            present = state.words[attributes] & 0xF0FF | 0x80
            state.words[attributes] = present
        before = state.to_bytes()
        private.load_state(env, state.words)
        flags = state.words[RFLAGS]
        private.save_state(env, state.words, function)
        state.words[RFLAGS] |= flags & 0x8D5
        assert state.to_bytes() == before


@ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint32)
def _no_flags(env: int, operation: int) -> int:
    """In place of ``cpu_cc_compute_all`` when the arithmetic flags are looked at elsewhere."""
    return 0
