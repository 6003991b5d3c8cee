"""SSE and MMX operations do what direct execution does: every register form, with random and special operands."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

import pytest
from emulator_guest import Guest as EmulatorGuest
from iced_x86 import (
    Code,
    Encoder,
    EncodingKind,
    Instruction,
    Mnemonic,
    OpCodeInfo,
    OpCodeOperandKind,
    Register,
)

from lasskvm.conformance.guest import Guest
from lasskvm.emulator.decode import Decoded, decode
from lasskvm.emulator.instructions import PLAIN, sse_crypto, sse_float, sse_integer, sse_shuffles
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import CR4
from lasskvm.x86.paging import PTE_U
from lasskvm.x86.registers import CR4_OSFXSR, CR4_OSXMMEXCPT

_CASES = 8
_CASE_BYTES = 32
_RECORDS, _RECORDS_GPA, _RECORDS_PAGES = 0x800000, 0x200000, 64
_INPUTS_BYTES = PAGE_SIZE
_KIND_NAMES = {getattr(OpCodeOperandKind, name): name for name in dir(OpCodeOperandKind) if name.isupper()}
#: Operand kinds that take a vector register, with memory or without.
_XMM_KINDS = frozenset(("XMM_REG", "XMM_OR_MEM", "XMM_RM"))
_MMX_KINDS = frozenset(("MM_REG", "MM_OR_MEM", "MM_RM"))
#: Approximations, which may differ; PTEST sets flags only.
_LEFT_OUT = frozenset((Mnemonic.RCPPS, Mnemonic.RCPSS, Mnemonic.RSQRTPS, Mnemonic.RSQRTSS, Mnemonic.PTEST))
_COMPARISONS = frozenset((Mnemonic.CMPPS, Mnemonic.CMPPD, Mnemonic.CMPSS, Mnemonic.CMPSD))
_PREDICATES = range(8)
_SPECIAL_BYTES = (0, 1, 0x7F, 0x80, 0xFF)


@pytest.fixture(scope="module")
def direct() -> Guest:
    guest = Guest()
    guest.tables.map(_RECORDS, _RECORDS_GPA, PTE_U, pages=_RECORDS_PAGES)
    return guest


@pytest.fixture
def emulated() -> EmulatorGuest:
    guest = EmulatorGuest()
    guest.words[CR4] |= CR4_OSFXSR | CR4_OSXMMEXCPT
    return guest


def _forms(mnemonics: set[int], kinds: frozenset[str], rng: random.Random) -> Iterator[bytes]:
    """Encodings of *mnemonics* with registers 2 and 1 of a kind as operands, and two immediates each."""
    first = Register.XMM0 if kinds is _XMM_KINDS else Register.MM0
    for name in sorted(name for name in dir(Code) if name.isupper()):
        info = OpCodeInfo(getattr(Code, name))
        if info.mnemonic not in mnemonics or info.encoding != EncodingKind.LEGACY:
            continue
        names = [_KIND_NAMES[kind] for kind in info.op_kinds()]
        registers = [kind for kind in names if kind in kinds]
        if names not in (registers, [*registers, "IMM8"]):
            continue
        operands = [first + 2, first + 1][: len(registers)]
        if names == registers:
            immediates: list[list[int]] = [[]]
        elif info.mnemonic in _COMPARISONS:
            immediates = [[value] for value in _PREDICATES]
        else:
            immediates = [[rng.randrange(24)], [rng.getrandbits(8)]]
        for immediate in immediates:
            create = getattr(
                Instruction, "create_" + "_".join(["reg"] * len(operands) + ["u32"] * len(immediate))
            )
            encoder = Encoder(64)
            encoder.encode(create(info.code, *operands, *immediate), 0)
            yield encoder.take_buffer()


def _integers(rng: random.Random) -> bytes:
    if rng.getrandbits(1):
        return rng.randbytes(_CASE_BYTES)
    return bytes(rng.choice(_SPECIAL_BYTES) for _ in range(_CASE_BYTES))


def _singles(rng: random.Random) -> bytes:
    values = [
        rng.choice((0.0, -0.0, 1.5, -1.0, rng.uniform(-1e6, 1e6), rng.uniform(-1, 1))) for _ in range(8)
    ]
    return struct.pack("<8f", *values)


def _doubles(rng: random.Random) -> bytes:
    values = [
        rng.choice((0.0, -0.0, 1.5, -1.0, rng.uniform(-1e12, 1e12), rng.uniform(-1, 1))) for _ in range(4)
    ]
    return struct.pack("<4d", *values)


def _check(
    direct: Guest,
    emulated: EmulatorGuest,
    mnemonics: dict[int, object],
    kinds: frozenset[str],
    operands: Callable[[random.Random], bytes],
) -> None:
    """Both ways of execution agree about every form of *mnemonics*."""
    rng = random.Random(5)
    forms = list(_forms(set(mnemonics) - _LEFT_OUT, kinds, rng))
    assert len(forms) > 5
    cases = [operands(rng) for _ in range(_CASES)]
    expected = _execute(direct, forms, cases, kinds)
    emulate = _emulate_xmm if kinds is _XMM_KINDS else _emulate_mmx
    different = set()
    for number, code in enumerate(forms):
        decoded = decode(64, code)
        assert isinstance(decoded, Decoded)
        run = PLAIN[decoded.instruction.mnemonic](decoded)
        results = [emulate(emulated, run, case) for case in cases]
        if results != expected[number * _CASES : (number + 1) * _CASES]:
            different.add(str(decoded.instruction))
    assert not different


def _execute(direct: Guest, forms: list[bytes], cases: list[bytes], kinds: frozenset[str]) -> list[int]:
    """The results of direct execution: of all cases of the first form, then of the next."""
    move, register, size = ("movdqu", "xmm", 16) if kinds is _XMM_KINDS else ("movq", "mm", 8)
    lines = [f"mov rdi, {_RECORDS + _INPUTS_BYTES:#x}"]
    for number, code in enumerate(forms):
        lines += [
            f"mov rsi, {_RECORDS:#x}",
            f"mov ecx, {_CASES}",
            f"next{number}: {move} {register}2, [rsi]",
            f"{move} {register}1, [rsi + 16]",
            f"{move} {register}0, [rsi + 8]",
            "db " + ", ".join(f"{byte:#x}" for byte in code),
            f"{move} [rdi], {register}2",
            f"add rsi, {_CASE_BYTES}",
            "add rdi, 16",
            "dec ecx",
            f"jne next{number}",
        ]
    assert len(forms) * _CASES * 16 <= (_RECORDS_PAGES - 1) * PAGE_SIZE
    direct.memory.write(_RECORDS_GPA, b"".join(cases))
    outcome = direct.execute("\n".join(lines), cpl=3)
    assert outcome.completed, str(outcome)
    results = _RECORDS_GPA + _INPUTS_BYTES
    return [
        int.from_bytes(direct.memory.read(results + 16 * place, size), "little")
        for place in range(len(forms) * _CASES)
    ]


def _emulate_xmm(guest: EmulatorGuest, run: Callable[..., None], case: bytes) -> int:
    xmm = guest.ctx.fpu.xmm
    for number, start in ((2, 0), (1, 16), (0, 8)):
        xmm[number] = int.from_bytes(case[start : start + 16], "little")
    run(guest.ctx)
    return xmm[2]


def _emulate_mmx(guest: EmulatorGuest, run: Callable[..., None], case: bytes) -> int:
    registers = guest.ctx.fpu.registers
    for number, start in ((2, 0), (1, 16), (0, 8)):
        registers[number] = int.from_bytes(case[start : start + 8], "little")
    run(guest.ctx)
    return registers[2] & (1 << 64) - 1


@pytest.mark.parametrize("kinds", [_XMM_KINDS, _MMX_KINDS], ids=["xmm", "mmx"])
@pytest.mark.parametrize("module", [sse_integer, sse_shuffles], ids=["integer", "shuffles"])
def test_packed_integers(
    direct: Guest, emulated: EmulatorGuest, module: object, kinds: frozenset[str]
) -> None:
    _check(direct, emulated, module.PLAIN, kinds, _integers)  # type: ignore[attr-defined]


def test_aes_and_carry_less_multiplication(direct: Guest, emulated: EmulatorGuest) -> None:
    _check(direct, emulated, sse_crypto.PLAIN, _XMM_KINDS, _integers)


@pytest.mark.parametrize("operands", [_singles, _doubles], ids=["singles", "doubles"])
def test_floating_point(
    direct: Guest, emulated: EmulatorGuest, operands: Callable[[random.Random], bytes]
) -> None:
    _check(direct, emulated, sse_float.PLAIN, _XMM_KINDS, operands)
