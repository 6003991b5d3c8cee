"""Random machine code: instruction encodings, from all that iced-x86 knows to plain noise.

Forms of instructions are grouped by what they have to do with the subject: those whose memory accesses and faults are
KVM's business come up more often than one of the thousand vector instructions. Operand bytes are random, with a bias to
memory operands and to values at the edges; what does not decode is drawn again, most of the time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from iced_x86 import (
    Code,
    CpuidFeature,
    Decoder,
    EncodingKind,
    Instruction,
    MandatoryPrefix,
    Mnemonic,
    OpCodeInfo,
    OpCodeOperandKind,
    OpCodeTableKind,
)

from lasskvm.fuzz import layout
from lasskvm.fuzz.case import Case

__all__ = ["code_in_memory", "decode_at", "instructions_of", "random_instruction", "reads_time"]

_MAX_LENGTH = 15
_TRIES = 12


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


#: Instructions with implied, wide, repeated, stack or descriptor accesses, and those that change what is allowed.
_CENTRAL = _names("""
    MOVSB MOVSW MOVSD MOVSQ CMPSB CMPSW CMPSD CMPSQ STOSB STOSW STOSD STOSQ LODSB LODSW LODSD LODSQ SCASB SCASW
    SCASD SCASQ INSB INSW INSD OUTSB OUTSW OUTSD PUSH POP PUSHA PUSHAD POPA POPAD PUSHF PUSHFD PUSHFQ POPF POPFD
    POPFQ ENTER LEAVE CALL RET RETF IRET IRETD IRETQ JMP INT INT3 INT1 INTO BOUND MOV LES LDS LSS LFS LGS LGDT
    LIDT SGDT SIDT LLDT LTR SLDT STR LAR LSL VERR VERW ARPL CMPXCHG CMPXCHG8B CMPXCHG16B XADD XCHG FXSAVE FXRSTOR
    FXSAVE64 FXRSTOR64 XSAVE XRSTOR INVLPG INVPCID CLFLUSH CLFLUSHOPT CLWB MOVNTI MOVBE BT BTS BTR BTC SYSCALL
    SYSRET SYSRETQ SYSENTER SYSEXIT SYSEXITQ SWAPGS STAC CLAC STI CLI HLT SMSW LMSW CLTS RDMSR WRMSR RDFSBASE
    RDGSBASE WRFSBASE WRGSBASE XLATB LEA CPUID RDPID RDPKRU WRPKRU LAHF SAHF CLD STD PREFETCHT0 PREFETCHNTA
    PREFETCHW CRC32 POPCNT ADD SUB CMP AND INC DEC DIV IDIV MUL IMUL SHL SHR SAR ROL RCR SHLD SHRD MOVZX MOVSX
    MOVSXD CMOVE SETE LOOP LOOPE JCXZ JECXZ JRCXZ IN OUT
""")

_GENERAL_FEATURES = _names("""
    INTEL8086 INTEL186 INTEL286 INTEL386 INTEL486 INTEL8086_ONLY X64 CPUID CX8 CMOV SYSCALL SEP MSR CMPXCHG16B
    MOVBE POPCNT LZCNT BMI1 BMI2 ADX CLFSH CLFLUSHOPT CLWB SMAP FSGSBASE INVPCID RDPID XSAVE FXSR PKU MULTIBYTENOP
    PAUSE PREFETCHW MOVDIRI MOVDIR64B CLDEMOTE SERIALIZE MONITOR RDPMC WBNOINVD CET_SS CET_IBT
""")
_VECTOR_FEATURES = _names("""
    SSE SSE2 SSE3 SSSE3 SSE4_1 SSE4_2 AES PCLMULQDQ MMX GFNI SHA SSE4A
""")
_X87_FEATURES = _names("""
    FPU FPU287 FPU387
""")

# How often each group is drawn
_WEIGHTS = {"central": 44, "general": 34, "vector": 8, "x87": 3, "other": 3}

_PREFIXES = (0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)
_OPERAND_SIZE, _ADDRESS_SIZE, _REP, _LOCK = 0x66, 0x67, 0xF3, 0xF0
_EDGE_BYTES = (0x00, 0x00, 0x01, 0x7F, 0x80, 0xFF, 0xFF, 0x08, 0x10, 0x20, 0x3F, 0x40)
_REX, _REX_W = 0x40, 0x08
_VEX3 = 0xC4
_VEX_INVERTED = 0xE0
_ESCAPES = {
    OpCodeTableKind.NORMAL: b"",
    OpCodeTableKind.T0F: b"\x0f",
    OpCodeTableKind.T0F38: b"\x0f\x38",
    OpCodeTableKind.T0F3A: b"\x0f\x3a",
}
_MANDATORY = {
    MandatoryPrefix.P66: b"\x66",
    MandatoryPrefix.PF3: b"\xf3",
    MandatoryPrefix.PF2: b"\xf2",
}
_VEX_PREFIX = {MandatoryPrefix.P66: 1, MandatoryPrefix.PF3: 2, MandatoryPrefix.PF2: 3}
_OPCODE_REGISTERS = frozenset(
    getattr(OpCodeOperandKind, name) for name in dir(OpCodeOperandKind) if name.endswith("_OPCODE")
)
#: RDTSC and RDTSCP: what they give depends on how much has been executed on the path.
_TIME = (b"\x0f\x31", b"\x0f\x01\xf9")


@dataclass(frozen=True)
class _Form:
    """One encoding: bytes before and behind the REX prefix, and what its ModRM byte must have (-1: anything)."""

    prefixes: bytes
    rex_w: bool
    opcode: bytes
    register_in_opcode: bool
    reg: int
    rm: int
    vex: int


def reads_time(code: bytes) -> bool:
    """Whether *code* has an instruction in it that reads the time-stamp counter."""
    return any(pattern in code for pattern in _TIME)


def decode_at(bits: int, code: bytes, ip: int = 0) -> Instruction | None:
    """The first instruction of *code*, or None when there is none."""
    decoder = Decoder(bits, code, ip=ip)
    instruction = decoder.decode()
    return None if instruction.is_invalid else instruction


def code_in_memory(case: Case) -> tuple[bytes, int]:
    """What lies at the start of *case*'s code, what is behind it included, and how much of that is the case's."""
    code = case.code[: layout.CODE_BYTES - layout.code_offset(case)]
    behind = case.filler if len(code) == len(case.code) else layout.FREE_MEMORY
    return code + bytes([behind]) * _MAX_LENGTH, len(code)


def instructions_of(case: Case) -> tuple[Instruction, ...]:
    """The instructions of *case*, in a line from the first; the last one may reach into the filler."""
    code, length = code_in_memory(case)
    decoder = Decoder(case.mode.bits, code, ip=case.rip)
    found = []
    while decoder.position < length:
        found.append(decoder.decode())
    return tuple(found)


def random_instruction(rng: random.Random, bits: int) -> bytes:
    """The bytes of one instruction, or of something that looks like one, for *bits*-bit code."""
    if rng.random() < 0.08:
        return rng.randbytes(_MAX_LENGTH)
    for _ in range(_TRIES):
        code = _encode(rng, _choose(rng, bits), bits)
        instruction = decode_at(bits, code)
        if instruction is not None:
            return code[: instruction.len]
        if rng.random() < 0.02:
            return code[:_MAX_LENGTH]
    return b"\x90"


def _choose(rng: random.Random, bits: int) -> _Form:
    groups = _groups(bits)
    (name,) = rng.choices(tuple(_WEIGHTS), weights=tuple(_WEIGHTS.values()))
    mnemonic = rng.choice(groups[name])
    return rng.choice(mnemonic)


def _encode(rng: random.Random, form: _Form, bits: int) -> bytes:
    prefixes = form.prefixes
    while rng.random() < 0.2:
        prefixes = bytes([_random_prefix(rng)]) + prefixes
    opcode = bytearray(form.opcode)
    if form.register_in_opcode:
        opcode[-1] |= rng.randrange(8)
    if form.vex:
        return (
            prefixes[: rng.random() < 0.1]
            + _vex_prefix(rng, form, bits)
            + opcode
            + _operands(rng, form, bits)
        )
    rex = b""
    if bits == 64 and (form.rex_w or rng.random() < 0.35):
        rex = bytes([_REX | _REX_W * (form.rex_w or rng.random() < 0.3) | _extensions(rng)])
    return prefixes + rex + opcode + _operands(rng, form, bits)


def _random_prefix(rng: random.Random) -> int:
    if rng.random() < 0.4:
        return rng.choice((_REP, _LOCK))
    return rng.choice(_PREFIXES)


def _extensions(rng: random.Random) -> int:
    return rng.randrange(8) if rng.random() < 0.3 else 0


def _vex_prefix(rng: random.Random, form: _Form, bits: int) -> bytes:
    """A three-byte VEX prefix; ``form.vex`` is its third byte with vvvv clear, and the map above that."""
    extensions = _VEX_INVERTED if bits != 64 else _VEX_INVERTED ^ _extensions(rng) << 5
    vvvv = rng.choice((0xF, rng.randrange(8, 16)))
    return bytes([_VEX3, extensions | form.vex >> 8, form.vex & 0xFF | vvvv << 3])


def _operands(rng: random.Random, form: _Form, bits: int) -> bytes:
    """ModRM, and more than enough bytes behind it."""
    modrm = _random_modrm(rng, bits)
    if form.reg >= 0:
        modrm = modrm & 0xC7 | form.reg << 3
    if form.rm >= 0:
        modrm = modrm & 0x38 | 0xC0 | form.rm
    behind = bytes(
        rng.choice(_EDGE_BYTES) if rng.random() < 0.5 else rng.randrange(256) for _ in range(_MAX_LENGTH - 3)
    )
    if modrm >> 6 == 2:
        # A displacement of full size: a small one hits more often.
        sign = rng.choice((0, 0, 0xFF))
        behind = bytes([behind[0], behind[1]]) + bytes([sign]) * 4 + behind[6:]
    return bytes([modrm]) + behind


def _random_modrm(rng: random.Random, bits: int) -> int:
    mod = rng.choices((0, 1, 2, 3), weights=(28, 28, 10, 34))[0]
    rm = rng.randrange(8)
    if bits != 16 and mod != 3 and rm == 4 and rng.random() < 0.5:
        rm = rng.randrange(8)
    return mod << 6 | rng.randrange(8) << 3 | rm


# ------------------------------------------------------------------------------------------------- tables of forms


@cache
def _groups(bits: int) -> dict[str, tuple[tuple[_Form, ...], ...]]:
    """For each group its mnemonics, each with its forms; for *bits*-bit code."""
    central = {getattr(Mnemonic, name) for name in _CENTRAL}
    features = {
        getattr(CpuidFeature, name): group
        for group, names in (
            ("general", _GENERAL_FEATURES), ("vector", _VECTOR_FEATURES), ("x87", _X87_FEATURES),
        )
        for name in names
    }  # fmt: skip
    found: dict[str, dict[int, list[_Form]]] = {name: {} for name in _WEIGHTS}
    for name in sorted(dir(Code)):
        info = OpCodeInfo(getattr(Code, name)) if name.isupper() else None
        if info is None or not info.is_instruction or not info.is_available_in_mode(bits):
            continue
        if info.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX):
            continue
        group = "central" if info.mnemonic in central else _group_of(getattr(Code, name), features)
        found[group].setdefault(info.mnemonic, []).append(_form(info, bits))
    return {name: tuple(tuple(forms) for forms in group.values()) for name, group in found.items()}


def _group_of(code: int, features: dict[int, str]) -> str:
    instruction = Instruction()
    instruction.code = code  # type: ignore[assignment]
    groups = {features.get(feature, "other") for feature in instruction.cpuid_features()}
    return next(group for group in ("other", "x87", "vector", "general") if group in groups)


def _form(info: OpCodeInfo, bits: int) -> _Form:
    opcode = info.op_code.to_bytes(info.op_code_len, "big")
    prefixes = b""
    if info.operand_size and bits != 64 and info.operand_size != bits:
        prefixes += bytes([_OPERAND_SIZE])
    if bits == 64 and info.operand_size == 16:
        prefixes += bytes([_OPERAND_SIZE])
    if info.address_size and info.address_size != bits:
        prefixes += bytes([_ADDRESS_SIZE])
    vex = 0
    if info.encoding == EncodingKind.VEX:
        table = {OpCodeTableKind.T0F: 1, OpCodeTableKind.T0F38: 2, OpCodeTableKind.T0F3A: 3}.get(
            info.table, 1
        )
        vex = table << 8 | info.w << 7 | info.l << 2 | _VEX_PREFIX.get(info.mandatory_prefix, 0)
    else:
        prefixes += _MANDATORY.get(info.mandatory_prefix, b"")
        opcode = _ESCAPES.get(info.table, b"\x0f") + opcode
    return _Form(
        prefixes=prefixes,
        rex_w=info.operand_size == 64 and not info.default_op_size64 and not info.force_op_size64,
        opcode=opcode,
        register_in_opcode=any(kind in _OPCODE_REGISTERS for kind in info.op_kinds()),
        reg=info.group_index,
        rm=info.rm_group_index,
        vex=vex,
    )
