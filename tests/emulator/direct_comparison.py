"""One instruction with many inputs, by direct execution and by the emulator: do the results agree?

Direct execution runs a loop over records in guest memory, each with registers, flags and the memory around the operand,
which it replaces by what the instruction makes of them. User code, 64-bit or compatibility mode.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from emulator_guest import DPL3, MAPPED, USER_CS32, USER_SS
from emulator_guest import Guest as EmulatorGuest
from iced_x86 import RflagsBits

from lasskvm.conformance.guest import Guest as DirectGuest
from lasskvm.emulator.decode import Decoded, decode
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.instructions import PLAIN
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import RAX, RBX, RCX, RDI, RDX, RFLAGS, RSI, Segment
from lasskvm.x86.paging import PTE_U
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_DATA,
    CS,
    DS,
    ES,
    RFLAGS_AF,
    RFLAGS_ARITHMETIC,
    RFLAGS_CF,
    RFLAGS_DF,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_OF,
    RFLAGS_PF,
    RFLAGS_SF,
    RFLAGS_ZF,
)

#: The operand; the page is mapped at the same place for both.
MEMORY = 0x70000
_REGISTERS = (RAX, RCX, RDX, RBX, RSI)
_NAMES = ("ax", "cx", "dx", "bx", "si")
_COMPARED = RFLAGS_ARITHMETIC | RFLAGS_DF
#: Bytes before and from the operand that are recorded.
_BEFORE, _FROM = 16, 32
_RECORDS, _RECORDS_GPA, _RECORDS_PAGES = 0x800000, 0x200000, 16
_RECORD_BYTES, _RFLAGS_AT, _MEMORY_AT = 128, 40, 48
_SLOT_BYTES, _ADDRESS_BYTES = 16, 4
_NOP = b"\x90"
#: Stands where the end of the records goes, with all of its four bytes.
_NO_END = 0x7FFFFFFF
_FLAGS = (
    (RflagsBits.OF, RFLAGS_OF), (RflagsBits.SF, RFLAGS_SF), (RflagsBits.ZF, RFLAGS_ZF),
    (RflagsBits.AF, RFLAGS_AF), (RflagsBits.CF, RFLAGS_CF), (RflagsBits.PF, RFLAGS_PF),
)  # fmt: skip
_EDGES = (
    0, 1, 2, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32,
    (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 0x80, (1 << 64) - 0x80000000,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What an instruction starts with, or ends in: rAX, rCX, rDX, rBX, rSI; RFLAGS; the bytes around the operand."""

    registers: tuple[int, ...]
    rflags: int
    memory: bytes


def random_value(rng: random.Random) -> int:
    """A number that is likely to be a special one in some operand size."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.getrandbits(64)
    if kind == 1:
        return rng.randrange(0x48)
    return rng.choice(_EDGES)


def random_case(rng: random.Random) -> Case:
    """A case of such numbers."""
    registers = tuple(random_value(rng) for _ in _REGISTERS)
    memory = b"".join(random_value(rng).to_bytes(8, "little") for _ in range((_BEFORE + _FROM) // 8))
    return Case(registers, rng.getrandbits(12) & _COMPARED, memory)


def defined_flags(decoded: Decoded) -> int:
    """The flags that *decoded* leaves in a state that the manual defines."""
    undefined = decoded.instruction.rflags_undefined
    return _COMPARED & ~sum(flag for bit, flag in _FLAGS if undefined & bit)


class Comparison:
    """The two machines, for code of *bits* bits."""

    def __init__(self, bits: int, direct: DirectGuest) -> None:
        self.bits = bits
        self._mask = (1 << bits) - 1
        self._direct = direct
        self._program = self._loop()
        direct.tables.map(MEMORY - PAGE_SIZE, MEMORY - PAGE_SIZE, PTE_U, pages=2)
        direct.tables.map(_RECORDS, _RECORDS_GPA, PTE_U, pages=_RECORDS_PAGES)
        self._emulated = EmulatorGuest()
        self._emulated.enter_user()
        if bits != 64:
            state = self._emulated.state
            state.set_segment(CS, Segment(USER_CS32, 0, 0xFFFFFFFF, AR_CODE32 | DPL3))
            for number in (DS, ES):
                state.set_segment(number, Segment(USER_SS, 0, 0xFFFFFFFF, AR_DATA | DPL3))
        tlb = self._emulated.ctx.tlb
        tlb.enabled = True
        tlb.select(self._emulated.words)

    def emulate(self, code: bytes, cases: list[Case]) -> list[Case | int]:
        """What the emulator makes of *cases*: the case behind the instruction, or the vector of its fault."""
        decoded = decode(self.bits, code)
        assert isinstance(decoded, Decoded)
        run = PLAIN[decoded.instruction.mnemonic](decoded)
        guest = self._emulated
        words = guest.words
        results: list[Case | int] = []
        for case in cases:
            for word, value in zip(_REGISTERS, case.registers, strict=True):
                words[word] = value & self._mask
            words[RDI] = MEMORY
            words[RFLAGS] = case.rflags | RFLAGS_FIXED | RFLAGS_IF
            guest.memory.write(MEMORY - _BEFORE & MAPPED - 1, case.memory)
            try:
                run(guest.ctx)
            except GuestFault as fault:
                results.append(fault.vector)
                continue
            assert words[RFLAGS] & ~_COMPARED == RFLAGS_FIXED | RFLAGS_IF
            registers = tuple(words[word] for word in _REGISTERS)
            memory = guest.memory.read(MEMORY - _BEFORE & MAPPED - 1, _BEFORE + _FROM)
            results.append(Case(registers, words[RFLAGS] & _COMPARED, memory))
        return results

    def execute(self, code: bytes, cases: list[Case]) -> list[Case]:
        """What direct execution makes of *cases*, none of which may fault."""
        assert len(cases) * _RECORD_BYTES <= _RECORDS_PAGES * PAGE_SIZE
        records = b"".join(
            b"".join((value & self._mask).to_bytes(8, "little") for value in case.registers)
            + (case.rflags | RFLAGS_FIXED).to_bytes(8, "little")
            + case.memory.ljust(_RECORD_BYTES - _MEMORY_AT, b"\0")
            for case in cases
        )
        end = (_RECORDS + len(records)).to_bytes(_ADDRESS_BYTES, "little")
        memory = self._direct.memory
        memory.write(_RECORDS_GPA, records)
        program = self._direct.start(self._program, cpl=3, bits=self.bits, rbp=_RECORDS)
        self._direct.write(program.labels["instruction"], code.ljust(_SLOT_BYTES, _NOP))
        self._direct.write(program.labels["end"] - _ADDRESS_BYTES, end)
        outcome = self._direct.run()
        assert outcome.completed, f"{code.hex()}: {outcome}"
        results = []
        for at in range(_RECORDS_GPA, _RECORDS_GPA + len(records), _RECORD_BYTES):
            registers = tuple(memory.load(at + 8 * number, 8) for number in range(len(_REGISTERS)))
            rflags = memory.load(at + _RFLAGS_AT, 8) & _COMPARED
            results.append(Case(registers, rflags, memory.read(at + _MEMORY_AT, _BEFORE + _FROM)))
        return results

    def fault_vector(self, code: bytes, case: Case) -> int | None:
        """The vector that direct execution of *code* ends in."""
        registers = {
            f"r{name}": value & self._mask for name, value in zip(_NAMES, case.registers, strict=True)
        }
        self._direct.memory.write(MEMORY - _BEFORE, case.memory)
        source = "db " + ", ".join(f"{byte:#x}" for byte in code)
        outcome = self._direct.execute(
            source, cpl=3, bits=self.bits, rflags=case.rflags, rdi=MEMORY, **registers
        )
        return outcome.vector

    def _loop(self) -> str:
        """The program; its instruction, and the end of the records it is to compare with, get filled in."""
        prefix, size, word = ("r", 8, "qword") if self.bits == 64 else ("e", 4, "dword")
        places = range(0, _BEFORE + _FROM, size)
        a, pointer, record = f"{prefix}ax", f"{prefix}di", f"{prefix}bp"
        registers = [f"[{record} + {8 * number}]" for number in range(len(_NAMES))]
        load_memory = [
            f"mov {a}, [{record} + {_MEMORY_AT + at}]; mov [{pointer} + {at}], {a}" for at in places
        ]
        save_memory = [
            f"mov {a}, [{pointer} + {at}]; mov [{record} + {_MEMORY_AT + at}], {a}" for at in places
        ]
        lines = [
            "next:",
            f"mov {pointer}, {MEMORY - _BEFORE:#x}",
            *load_memory,
            f"mov {pointer}, {MEMORY:#x}",
            f"push {word} [{record} + {_RFLAGS_AT}]",
            "popfq" if self.bits == 64 else "popfd",
            *(f"mov {prefix}{name}, {place}" for name, place in zip(_NAMES, registers, strict=True)),
            "instruction: db " + ", ".join(["0x90"] * _SLOT_BYTES),
            *(f"mov {place}, {prefix}{name}" for name, place in zip(_NAMES, registers, strict=True)),
            "pushfq" if self.bits == 64 else "pushfd",
            f"pop {word} [{record} + {_RFLAGS_AT}]",
            f"mov {pointer}, {MEMORY - _BEFORE:#x}",
            *save_memory,
            f"add {record}, {_RECORD_BYTES}",
            f"cmp {record}, {_NO_END:#x}",
            "end: jne next",
        ]
        return "\n".join(lines)
