"""The engine's own compiled functions, against the same source as plain Python, on random input.

Bytes stand in for the translator's structure.
"""

from __future__ import annotations

import ctypes
import random

import numpy as np
from compiled_twins import (
    ROUNDS,
    UPPER,
    Twins,
    native,
    plain_result,
)

from lasskvm.emulator import watch
from lasskvm.engine import implicit, opcode, private
from lasskvm.engine.compiler import compiled
from lasskvm.lass import WRITE
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    CR0,
    CR4,
    DR0,
    DR7,
    EFER,
    EPTP,
    GDT_BASE,
    GDT_LIMIT,
    IDT_LIMIT,
    INTERRUPT_SHADOW,
    LIMIT,
    NMI_BLOCKED,
    RFLAGS,
    RIP,
    segment_word,
)
from lasskvm.x86.registers import (
    AR_CODE64,
    AR_UNUSABLE,
    CR0_PE,
    CR4_SMAP,
    CS,
    LDTR,
    RFLAGS_AC,
    TR,
)


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
        mode = {CR0: CR0_PE, CR4: rng.choice((0, CR4_SMAP)), EFER: 0, EPTP: 0, RIP: 0x1000, CPL: 0, RFLAGS: 2}
        twins.set_words(mode | {segment_word(CS, BASE): 0, segment_word(CS, ATTRIBUTES): AR_CODE64})
        for state, env in zip(twins.states, twins.envs, strict=True):
            private.load_state(env, state.words)
            private.set_guest_rip(env, 0x1000)
        plain_env, native_env = twins.envs
        plain_state, native_state = twins.states[0].words, twins.states[1].array
        plain = opcode.opcode_at_rip(plain_env, plain_state, twins.memories[0])
        assert native(opcode.opcode_at_rip, native_env, native_state, twins.table) == plain_result(plain), (
            code.hex()
        )
        is_implicit = implicit.is_implicit(plain_env, plain_state, twins.memories[0])
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
