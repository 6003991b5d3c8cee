"""Drawing cases: case *i* of seed *s* is always the same one.

The state is drawn around the instruction: where it has memory operands, registers are aimed so that most of the time
the address lies in one of the data pages or close to its end, and every check on the way to memory has a chance to
decide.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

from lasskvm.fuzz import layout
from lasskvm.fuzz.aiming import aim, pointer
from lasskvm.fuzz.case import Case, Mode, Paging
from lasskvm.fuzz.encoding import decode_at, random_instruction, reads_time
from lasskvm.fuzz.segments import draw_segments
from lasskvm.fuzz.undefined import leaves_flags_undefined
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable, cr4_allowed
from lasskvm.x86.registers import (
    CR0_AM,
    CR0_EM,
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    CR4_DE,
    CR4_FSGSBASE,
    CR4_LA57,
    CR4_LASS,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    CR4_PCE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_PKE,
    CR4_PKS,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    CR4_TSD,
    CR4_UMIP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    MASK32,
    MASK64,
    RFLAGS_AC,
    RFLAGS_ARITHMETIC,
    RFLAGS_DF,
    RFLAGS_FIXED,
    RFLAGS_ID,
    RFLAGS_IF,
    RFLAGS_IOPL_SHIFT,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
)

__all__ = ["MODE_WEIGHTS", "generate"]

#: How often each mode is drawn.
MODE_WEIGHTS = {
    Mode.LONG64: 62, Mode.COMPATIBILITY32: 10, Mode.COMPATIBILITY16: 3, Mode.PROTECTED32: 13, Mode.PROTECTED16: 4,
    Mode.REAL: 5, Mode.VIRTUAL8086: 3,
}  # fmt: skip
_CPUS = {
    "max": 72, "max,-lass": 6, "max,+la57": 8, "max,-popcnt,-movbe,-sse4_2,-cx16,-fsgsbase,-rdtscp": 6,
    "max,+pku": 8,
}  # fmt: skip
_LONG_CPUS = frozenset(("max,+la57",))
_CODE_LENGTH = 15
_HLT, _INT3 = 0xF4, 0xCC
#: CR4 bits and how likely they are to be drawn, where CPUID allows them.
_CR4_CHANCES = {
    CR4_OSFXSR: 0.9, CR4_OSXMMEXCPT: 0.7, CR4_PGE: 0.5, CR4_SMEP: 0.5, CR4_SMAP: 0.6, CR4_LASS: 0.6, CR4_TSD: 0.05,
    CR4_DE: 0.1, CR4_PCE: 0.1, CR4_UMIP: 0.3, CR4_FSGSBASE: 0.6, CR4_PCIDE: 0.3, CR4_PKE: 0.6, CR4_PKS: 0.3,
    CR4_OSXSAVE: 0.6,
}  # fmt: skip
_EDGES = (
    0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, MASK32, 1 << 32,
    MASK64 >> 1, 1 << 63, MASK64, MASK64 - 1, MASK64 - 7, MASK32 - 3, 0x8000_0000_0000, 0xFFFF_7FFF_FFFF_FFF8,
)  # fmt: skip
#: MSRs worth asking for.
_MSRS = (0x10, 0x1B, 0x174, 0x175, 0x176, 0x1A0, 0x277, 0xC000_0080, 0xC000_0081, 0xC000_0082, 0xC000_0084,
         0xC000_0100, 0xC000_0101, 0xC000_0102, 0xC000_0103, 0xDEAD)  # fmt: skip
_TSC_MSR = 0x10
_RDMSR = b"\x0f\x32"
_RSP, _RCX, _RDX = 4, 1, 2


def generate(seed: str | int, index: int, modes: tuple[Mode, ...] = tuple(MODE_WEIGHTS)) -> Case:
    """Case *index* of *seed*, in one of *modes*."""
    rng = random.Random(f"{seed}:{index}")
    (mode,) = rng.choices(modes, weights=[MODE_WEIGHTS[mode] for mode in modes])
    case = _draw_system(rng, mode)
    case = _draw_code(rng, case)
    return _draw_registers(rng, case)


def _chance(rng: random.Random, probability: float) -> bool:
    return rng.random() < probability


# ------------------------------------------------------------------------------------------------ system registers


def _draw_system(rng: random.Random, mode: Mode) -> Case:
    """Control registers, privilege, segments and pages; code and registers are still missing."""
    (cpu,) = rng.choices(tuple(_CPUS), weights=tuple(_CPUS.values()))
    if not mode.is_ia32e and cpu in _LONG_CPUS:
        cpu = "max"
    cpl = _draw_cpl(rng, mode)
    cr0, cr4, efer = _draw_control(rng, mode, cpu)
    if mode in (Mode.COMPATIBILITY32, Mode.COMPATIBILITY16) and cpl != 3 and _chance(rng, 0.8):
        # Otherwise hardly an instruction of supervisor code, which lies in the lower half, would be fetched.
        cr4 &= ~CR4_LASS
    case = Case(
        mode=mode, cpu=cpu, code=b"", registers=(), rip=0, rflags=_draw_rflags(rng, mode), cpl=cpl,
        cr0=cr0, cr4=cr4, efer=efer, segments=(), pages=_draw_pages(rng, efer), data_seed=rng.randrange(1, 1 << 16),
        own_stacks=_chance(rng, 0.85), filler=_HLT if _chance(rng, 0.8) else _INT3,
    )  # fmt: skip
    return replace(case, segments=draw_segments(rng, case))


def _draw_cpl(rng: random.Random, mode: Mode) -> int:
    if mode is Mode.REAL:
        return 0
    if mode is Mode.VIRTUAL8086:
        return 3
    if mode in (Mode.COMPATIBILITY32, Mode.COMPATIBILITY16):
        return rng.choices((0, 3), weights=(20, 80))[0]
    return rng.choices((0, 1, 2, 3), weights=(46, 2, 2, 50))[0]


def _draw_control(rng: random.Random, mode: Mode, cpu: str) -> tuple[int, int, int]:
    cr0 = CR0_ET
    for bit, probability in ((CR0_MP, 0.3), (CR0_TS, 0.12), (CR0_EM, 0.04), (CR0_NE, 0.9)):
        cr0 |= bit * _chance(rng, probability)
    if mode is Mode.REAL:
        return cr0, 0, 0
    cr0 |= CR0_PE | CR0_WP * _chance(rng, 0.8) | CR0_AM * _chance(rng, 0.4)
    cr4, efer = 0, 0
    for bit, probability in _CR4_CHANCES.items():
        cr4 |= bit * _chance(rng, probability)
    efer |= EFER_NXE * _chance(rng, 0.8) | EFER_SCE * _chance(rng, 0.8)
    if mode.is_ia32e:
        cr0, cr4, efer = cr0 | CR0_PG, cr4 | CR4_PAE, efer | EFER_LME | EFER_LMA
        if cpu in _LONG_CPUS:
            cr4 |= CR4_LA57
    else:
        cr4 &= ~CR4_PCIDE
        kind = rng.choice((Paging.NONE, Paging.BITS32, Paging.PAE))
        if mode is Mode.VIRTUAL8086:
            # All its pages are user pages, those of the handlers too.
            cr4 &= ~(CR4_SMEP | CR4_SMAP)
            kind = rng.choice((kind, Paging.NONE))
        if kind is not Paging.NONE:
            cr0, cr4 = cr0 | CR0_PG, cr4 | (CR4_PAE if kind is Paging.PAE else CR4_PSE)
    return cr0, cr4 & _cr4_of(cpu), efer


@cache
def _cr4_of(cpu: str) -> int:
    return cr4_allowed(CpuidTable(parse_cpu(cpu).entries()))


def _draw_rflags(rng: random.Random, mode: Mode) -> int:
    rflags = RFLAGS_FIXED | rng.getrandbits(12) & RFLAGS_ARITHMETIC
    for bit, probability in (
        (RFLAGS_DF, 0.2), (RFLAGS_AC, 0.3), (RFLAGS_IF, 0.5), (RFLAGS_TF, 0.5), (RFLAGS_RF, 0.03), (RFLAGS_NT, 0.03),
        (RFLAGS_ID, 0.05),
    ):  # fmt: skip
        rflags |= bit * _chance(rng, probability)
    rflags |= rng.choices((0, 3, rng.randrange(4)), weights=(50, 40, 10))[0] << RFLAGS_IOPL_SHIFT
    if mode is Mode.VIRTUAL8086:
        rflags |= RFLAGS_VM
    return rflags


def _draw_pages(rng: random.Random, efer: int) -> tuple[int, ...]:
    """Attributes of the data pages: half are plain, of the others each attribute is drawn by itself.

    Where it is possible, most cannot be executed: a jump into data makes a long case that says little.
    """
    no_execute = layout.PAGE_NX if efer & EFER_NXE and _chance(rng, 0.85) else 0
    return tuple(_draw_page(rng) | no_execute for _ in range(layout.DATA_PAGES))


def _draw_page(rng: random.Random) -> int:
    bits = rng.getrandbits(24)
    if bits & 3 == 0:
        return layout.PAGE_PLAIN
    attributes = layout.PAGE_PLAIN if bits & 3 == 1 else layout.PAGE_PRESENT | layout.PAGE_WRITABLE
    for shift, attribute in (
        (2, layout.PAGE_USER), (4, layout.PAGE_WRITABLE), (6, layout.PAGE_ACCESSED), (8, layout.PAGE_DIRTY),
    ):  # fmt: skip
        attributes ^= attribute * (bits >> shift & 3 == 0)
    attributes ^= layout.PAGE_PRESENT * (bits >> 10 & 7 == 0)
    for shift, mask, attribute in ((13, 15, layout.PAGE_RESERVED), (17, 15, layout.PAGE_HOLE)):
        attributes |= attribute * (bits >> shift & mask == 0)
    attributes |= layout.PAGE_NX * (bits >> 19 & 7 == 0)
    if bits >> 22 & 3 == 0:
        attributes |= rng.randrange(4) << layout.PAGE_KEY_SHIFT
    return attributes


# ------------------------------------------------------------------------------------------------------------- code


def _draw_code(rng: random.Random, case: Case) -> Case:
    bits = case.mode.bits
    code = b""
    while not code or reads_time(code):
        code = random_instruction(rng, bits)
        if not case.is_stepped and _chance(rng, 0.35):
            code = _continue(rng, code, bits)
    user = case.cpl == 3
    base = layout.code_base(
        case.mode, case.paging, user=user ^ _chance(rng, 0.03), upper=case.mode is Mode.LONG64
    )
    offset = _draw_offset(rng, len(code))
    if case.mode is not Mode.LONG64:
        # The segment base says where the code pages are; CS has been drawn for the usual ones.
        base = base - case.segments[1].base & MASK32
        if base > 0xFFFF and bits == 16:
            base = 0
    return replace(case, code=code, rip=base + offset & MASK64)


def _continue(rng: random.Random, code: bytes, bits: int) -> bytes:
    """*code* with one to three more instructions behind it, as long as what they depend on is defined."""
    for _ in range(rng.randrange(1, 4)):
        last = decode_at(bits, code[-_CODE_LENGTH:])
        if last is None or leaves_flags_undefined(bits, code):
            break
        code += random_instruction(rng, bits)
    return code


def _draw_offset(rng: random.Random, length: int) -> int:
    """Where in the code pages the code begins: sometimes so that it reaches over the end of the first or second."""
    kind = rng.random()
    if kind < 0.04:
        return layout.PAGE - rng.randrange(1, length + 1)
    if kind < 0.06:
        return layout.CODE_BYTES - rng.randrange(1, length + 1)
    return rng.randrange(0x100, layout.PAGE - 0x100)


# -------------------------------------------------------------------------------------------------------- registers


def _draw_registers(rng: random.Random, case: Case) -> Case:
    registers = [_draw_register(rng, case) for _ in range(16)]
    registers[_RSP] = _draw_stack_pointer(rng, case)
    if _chance(rng, 0.5):
        registers[_RCX] = rng.randrange(6)
    if _chance(rng, 0.1):
        registers[_RDX] = rng.choice((rng.randrange(0x100), 0, 0xFFFF))
    if case.code[:2] in (_RDMSR, b"\x0f\x30") or _chance(rng, 0.02):
        registers[_RCX] = rng.choice(_MSRS)
    if _RDMSR in case.code and registers[_RCX] & MASK32 == _TSC_MSR:
        registers[_RCX] ^= 1
    if case.mode is not Mode.LONG64:
        # What is in the upper halves outside 64-bit mode is undefined (SDM volume 1, 3.4.1.1).
        registers = [value & MASK32 for value in registers]
    return aim(rng, replace(case, registers=tuple(registers), kernel_gs_base=pointer(rng, case)))


def _draw_register(rng: random.Random, case: Case) -> int:
    kind = rng.random()
    if kind < 0.42:
        return pointer(rng, case)
    if kind < 0.60:
        return rng.randrange(24)
    if kind < 0.72:
        return rng.choice(_EDGES)
    if kind < 0.80:
        return rng.choice(layout.SELECTORS)
    if kind < 0.84:
        return rng.choice(_EDGES) ^ rng.getrandbits(16)
    if kind < 0.88:
        return case.rip
    return rng.getrandbits(64)


def _draw_stack_pointer(rng: random.Random, case: Case) -> int:
    if _chance(rng, 0.2):
        return pointer(rng, case)
    if case.mode in (Mode.REAL, Mode.VIRTUAL8086, Mode.PROTECTED16, Mode.COMPATIBILITY16):
        return rng.choice((0x1000, 0xFFE, 0x800, rng.randrange(0x1000)))
    user = case.cpl == 3 and case.paging is not Paging.NONE
    if user:
        base = layout.USER_STACK
    elif case.mode.is_ia32e and case.mode is Mode.LONG64:
        base = layout.UPPER + layout.KERNEL_STACK_GPA
    elif case.mode.is_ia32e:
        base = layout.USER_STACK
    else:
        base = layout.KERNEL_STACK_GPA
    top = base + layout.STACK_BYTES
    return top - rng.choice((0, 8, 0x40, 0x800, rng.randrange(0x1800)))
