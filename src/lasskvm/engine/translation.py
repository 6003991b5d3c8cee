"""What is kept from the translator: instructions that it gets wrong go to the emulator.

:func:`translate_instruction` is called in place of the translator's own function for one instruction. It looks at
prefixes, opcode and ModRM byte, which a decoder of that instruction reads in any case, so that no fetch faults that
would not have. Nearly every instruction then goes on to the translator. For those of :func:`is_left_to_emulator` it is
shown an undefined opcode instead: the guest's #UD there ends the run (``EXIT_EXCEPTION``), with RIP on the instruction,
and the exit handler emulates what is really there.
"""

from lasskvm.engine.context import (
    CODE_HOST,
    CODE_PAGE,
    FN_CODE_PAGE,
    FN_TRANSLATE_INSTRUCTION,
    RUN_UNTIL,
)
from lasskvm.engine.native import callback, foreign_function, load8, load64, store8, store64
from lasskvm.engine.private import (
    BLOCK_NEXT,
    CPU_ENV,
    context_of,
    feature,
    guest_cpl,
    guest_runs_64bit_code,
)
from lasskvm.engine.undefined import is_undefined_form, may_be_undefined_form
from lasskvm.x86.opcodes import (
    OPCODE_MASK,
    TWO_BYTE,
    has_opcode,
    is_lockable,
    is_prefix,
    is_rex,
    may_be_lockable,
    opcode_mask,
)
from lasskvm.x86.registers import MASK64

__all__ = ["is_left_to_emulator", "is_native_vex", "translate_instruction"]

_PAGE_OFFSET = 0xFFF
_PAGE_MASK = MASK64 ^ _PAGE_OFFSET
_LONGEST_INSTRUCTION = 15
#: INT1, which the translator does not know in any mode.
_UNDEFINED = 0xF1
_USER_CPL = 3

# Prefixes as is_left_to_emulator() gets them
LOCK, REPNE, REP, OPERAND_SIZE, REX_W, STALE_REX = (1 << number for number in range(6))
_LOCK, _REPNE, _REP, _OPERAND_SIZE = 0xF0, 0xF2, 0xF3, 0x66
_REX_W_BIT = 8

_ESCAPE = 0x0F
_ENTER, _LOOPNE, _LOOPE, _INSB, _OUTSD = 0xC8, 0xE0, 0xE1, 0x6C, 0x6F
_GROUP3_BYTE, _GROUP3, _GROUP3_TEST_ALIAS, _GROUP3_NEG = 0xF6, 0xF7, 1, 3
_IRET, _CALL_FAR, _JMP_FAR, _RETF_IMM, _RETF = 0xCF, 0x9A, 0xEA, 0xCA, 0xCB
_GROUP5, _GROUP5_CALL, _GROUP5_CALL_FAR, _GROUP5_JMP, _GROUP5_JMP_FAR = 0xFF, 2, 3, 4, 5
_GROUP1A, _GROUP11_BYTE, _GROUP11 = 0x8F, 0xC6, 0xC7
_MOVSXD = 0x63
_VEX3, _VEX2 = 0xC4, 0xC5
_LAR, _LSL = TWO_BYTE + 0x02, TWO_BYTE + 0x03
_GROUP7, _XGETBV, _XSETBV = TWO_BYTE + 0x01, 0xD0, 0xD1
_GROUP15 = TWO_BYTE + 0xAE
_WRFSBASE, _WRGSBASE = 2, 3
_XSAVE, _XSAVEOPT = 4, 6
_MOVNTS, _EXTRQ, _INSERTQ = TWO_BYTE + 0x2B, TWO_BYTE + 0x78, TWO_BYTE + 0x79
_FEATURES_80000001_ECX, _SSE4A = 7, 1 << 6

_ESCAPE_38, _MOVBE_LOAD, _MOVBE_STORE = TWO_BYTE + 0x38, 0xF0, 0xF1

_MOD_REGISTER, _REGISTER_SHIFT = 0xC0, 3
#: The ModRM byte without its register field, where the address is relative to RIP.
_MOD_AND_RM, _RIP_RELATIVE = 0xC7, 5

#: Opcodes whose ModRM byte decides, one byte and behind 0F.
_MODRM_DECIDES = opcode_mask((_GROUP5, _GROUP1A, _GROUP11_BYTE, _GROUP11, _GROUP3_BYTE, _GROUP3))
_MODRM_DECIDES_TWO_BYTE = opcode_mask((_GROUP15 - TWO_BYTE, 0xA4, 0xAC))
#: SHLD and SHRD by an immediate; LSS, LFS and LGS.
_DOUBLE_SHIFTS_TWO_BYTE = opcode_mask((0xA4, 0xAC))
_FAR_POINTER_LOADS_TWO_BYTE = opcode_mask((0xB2, 0xB4, 0xB5))
#: Loads of segment registers: POP, MOV, LES, LDS; POP FS and GS, LSS, LFS, LGS.
_SEGMENT_LOADS = opcode_mask((0x07, 0x17, 0x1F, 0x8E, 0xC4, 0xC5))
_SEGMENT_LOADS_TWO_BYTE = opcode_mask((0xA1, 0xA9, 0xB2, 0xB4, 0xB5))
#: Near branches: Jcc, RET, LOOP, JRCXZ, CALL, JMP.
_NEAR_BRANCHES = opcode_mask((*range(0x70, 0x80), 0xC2, 0xC3, *range(0xE0, 0xE4), 0xE8, 0xE9, 0xEB))
_NEAR_BRANCHES_TWO_BYTE = opcode_mask(tuple(range(0x80, 0x90)))

# VEX-encoded instructions that the translator gets right (BMI1, BMI2): map, opcode, and the "pp" field
_VEX_0F38, _VEX_0F3A, _VEX_MAP_MASK = 2, 3, 0x1F
_ANDN, _PEXT_PDEP, _MULX, _SHIFTS, _RORX = 0xF2, 0xF5, 0xF6, 0xF7, 0xF0
_PP_MASK, _PP_NONE, _PP_F3, _PP_F2 = 3, 0, 2, 3
_VEX_L, _VEX_VVVV, _VEX_NO_VVVV = 1 << 2, 0xF << 3, 0xF << 3

_translate_insn = foreign_function(0, 64, 64)
_code_page = foreign_function(64, 64, 64, 64)


@callback(0, 64, 64)
def translate_instruction(block, cpu):  # type: ignore[no-untyped-def]
    """``TranslatorOps.translate_insn``: *block* is the DisasContextBase of the block being translated."""
    translate_or_leave(block, cpu)


def translate_or_leave(block: int, cpu: int) -> None:
    """The body of :func:`translate_instruction`."""
    context = context_of(cpu)
    env = cpu + CPU_ENV
    original = load64(context + 8 * FN_TRANSLATE_INSTRUCTION)
    start = load64(block + BLOCK_NEXT)
    looked_at = 0
    # Where the run ends, the translator reads no code either.
    if start != load64(context + 8 * RUN_UNTIL):
        looked_at = bytes_for_emulator(context, env, start)
    if looked_at == 0:
        _translate_insn(original, block, cpu)
        return
    first = code_byte(context, env, start)
    host = load64(context + 8 * CODE_HOST) + (start & _PAGE_OFFSET)
    store8(host, _UNDEFINED)
    _translate_insn(original, block, cpu)
    store8(host, first)
    # What the decision depends on belongs to the block, which is forgotten when one of these bytes changes.
    store64(block + BLOCK_NEXT, (start + looked_at) & MASK64)


def bytes_for_emulator(context: int, env: int, start: int) -> int:
    """How many bytes tell that the instruction at linear *start* is for the emulator; 0 when it is not."""
    code64 = guest_runs_64bit_code(env)
    prefixes = 0
    length = 1
    opcode = code_byte(context, env, start)
    rex = False
    while is_prefix(opcode, code64):
        if length == _LONGEST_INSTRUCTION:
            # Too long for an instruction: the translator knows that.
            return 0
        prefixes = with_prefix(prefixes, opcode, code64, rex)
        rex = is_rex(opcode, code64)
        opcode = code_byte(context, env, (start + length) & MASK64)
        length += 1
    if opcode == _ESCAPE:
        opcode = TWO_BYTE + code_byte(context, env, (start + length) & MASK64)
        length += 1
    elif opcode == _VEX3 and code64 and not rex and prefixes & (LOCK | REPNE | REP | OPERAND_SIZE) == 0:
        return _bytes_for_vex(context, env, start, length)
    if opcode == _ESCAPE_38:
        return _bytes_for_movbe(context, env, start, length, prefixes)
    modrm = 0
    if modrm_decides(opcode, prefixes):
        modrm = code_byte(context, env, (start + length) & MASK64)
        length += 1
    sse4a = feature(env, _FEATURES_80000001_ECX) & _SSE4A != 0
    if is_left_to_emulator(code64, guest_cpl(env), prefixes, opcode, modrm, sse4a):
        return length
    return 0


def _bytes_for_vex(context: int, env: int, start: int, length: int) -> int:
    """:func:`bytes_for_emulator` behind C4H in 64-bit mode."""
    opcode_map = code_byte(context, env, (start + length) & MASK64) & _VEX_MAP_MASK
    if opcode_map != _VEX_0F38 and opcode_map != _VEX_0F3A:
        return length + 1
    payload = code_byte(context, env, (start + length + 1) & MASK64)
    opcode = code_byte(context, env, (start + length + 2) & MASK64)
    if is_native_vex(opcode_map, opcode, payload):
        return 0
    return length + 3


def _bytes_for_movbe(context: int, env: int, start: int, length: int, prefixes: int) -> int:
    """:func:`bytes_for_emulator` behind 0F 38: of a register, there is no MOVBE; with F2 it is CRC32."""
    if prefixes & (LOCK | STALE_REX) != 0:
        return length
    third = code_byte(context, env, (start + length) & MASK64)
    if prefixes & REPNE != 0 or (third != _MOVBE_LOAD and third != _MOVBE_STORE):
        return 0
    if code_byte(context, env, (start + length + 1) & MASK64) & _MOD_REGISTER != _MOD_REGISTER:
        return 0
    return length + 2


def code_byte(context: int, env: int, address: int) -> int:
    """The byte of code at linear *address*. Does not return when it cannot be fetched."""
    page = address & _PAGE_MASK
    host = context + 8 * CODE_HOST
    if page != load64(context + 8 * CODE_PAGE):
        _code_page(load64(context + 8 * FN_CODE_PAGE), env, address, host)
        store64(host, load64(host) - (address & _PAGE_OFFSET))
        store64(context + 8 * CODE_PAGE, page)
    return load8(load64(host) + (address & _PAGE_OFFSET))


# ----------------------------------------------------------------------------------------------------- the rules


def with_prefix(prefixes: int, byte: int, code64: bool, behind_rex: bool) -> int:
    """*prefixes* with that of *byte*. A REX prefix counts only directly before the opcode."""
    if behind_rex:
        prefixes = (prefixes | STALE_REX) & (MASK64 ^ REX_W)
    if byte == _LOCK:
        return prefixes | LOCK
    if byte == _REPNE:
        return prefixes | REPNE
    if byte == _REP:
        return prefixes | REP
    if byte == _OPERAND_SIZE:
        return prefixes | OPERAND_SIZE
    if is_rex(byte, code64) and byte & _REX_W_BIT != 0:
        return prefixes | REX_W
    return prefixes


def modrm_decides(opcode: int, prefixes: int) -> bool:
    """Whether :func:`is_left_to_emulator` needs the ModRM byte of *opcode*; all these opcodes have one."""
    if opcode >= TWO_BYTE:
        second = opcode & OPCODE_MASK
        decides = has_opcode(_MODRM_DECIDES_TWO_BYTE, second) or may_be_undefined_form(second)
    else:
        decides = has_opcode(_MODRM_DECIDES, opcode)
    return decides or (prefixes & LOCK != 0 and may_be_lockable(opcode))


def is_left_to_emulator(code64: bool, cpl: int, prefixes: int, opcode: int, modrm: int, sse4a: bool) -> bool:
    """Whether the translator gets this instruction wrong.

    *prefixes* are ``LOCK`` to ``STALE_REX``, *opcode* has ``TWO_BYTE`` added behind 0F, *modrm* counts where
    :func:`modrm_decides`; *sse4a* says that SSE4A is offered. In the translator:

    ====================================  ==============================================================================
    instruction                           what is wrong
    ====================================  ==============================================================================
    any with LOCK that cannot have it     it runs, where #UD is due
    any with a prefix between REX and     REX still counts
    opcode
    IRET at CPL 3; far CALL, RET, JMP     their stack accesses are made in supervisor mode, so neither LASS nor the U/S
                                          bit is asked where a supervisor translation is at hand; far transfers through
                                          a register are not refused; RIP is not checked
    IRET of 16 or 32 bits in 64-bit mode  RSP is truncated
    LOOPE, LOOPNE                         RFLAGS are garbage behind them when the count reaches 0
    ENTER                                 its last write is not checked, and a fault leaves pushes behind
    INS, OUTS                             memory is accessed before the permission is checked
    SHLD, SHRD of a RIP-relative operand  the address is too low by the immediate's size
    TEST, second encoding (F6, F7 /1)     likewise
    LOCK NEG                              SF and PF are those of the old value
    LSS, LFS, LGS                         REX.W is ignored
    IRET and loads of segment registers   limits, types and bases that are not flat take effect too late: the run loop
    outside 64-bit mode                   has to see them
    near branches with 66H, without       RIP is truncated to 16 bits, and displacements are taken as 16 bits
    REX.W, in 64-bit mode
    LAR, LSL                              descriptor types are accepted that IA-32e mode does not have
    ARPL                                  writes its operand also where it does not change it
    MOVSXD likewise                       reads 32 bits of memory
    8F, C6, C7 with a reg field           run as POP and MOV, where #UD (or XOP, XABORT, XBEGIN) is due
    VEX (C4, C5)                          SSE forms run as without VEX, whatever CPUID says; :func:`is_native_vex` names
                                          those that are right
    WRFSBASE, WRGSBASE                    accept addresses that are not canonical
    RDFSBASE, RDGSBASE with 66H           read 64 bits
    EXTRQ, INSERTQ, MOVNTSS, MOVNTSD      run without SSE4A
    XSAVE, XSAVEOPT, XRSTOR, XGETBV,      XCR0 is the translator's own, and components are known that the guest has not;
    XSETBV                                with their prefixes these are PTWRITE, CLWB and CLRSSBSY
    forms that do not exist               run (:mod:`lasskvm.engine.undefined`)
    ====================================  ==============================================================================
    """
    operation = (modrm >> _REGISTER_SHIFT) & 7
    if prefixes & LOCK != 0 and not is_lockable(opcode, modrm):
        return True
    if prefixes & STALE_REX != 0:
        return True
    truncated = code64 and prefixes & (OPERAND_SIZE | REX_W) == OPERAND_SIZE
    if opcode >= TWO_BYTE:
        second = opcode & OPCODE_MASK
        if is_undefined_form(second, modrm, prefixes & OPERAND_SIZE != 0, prefixes & (REP | REPNE) != 0):
            return True
        if opcode == _LAR or opcode == _LSL or has_opcode(_FAR_POINTER_LOADS_TWO_BYTE, second):
            return True
        if has_opcode(_DOUBLE_SHIFTS_TWO_BYTE, second):
            return code64 and modrm & _MOD_AND_RM == _RIP_RELATIVE
        if opcode == _EXTRQ or opcode == _INSERTQ:
            return prefixes & (OPERAND_SIZE | REPNE) != 0 and not sse4a
        if opcode == _MOVNTS:
            return prefixes & (REP | REPNE) != 0 and not sse4a
        if opcode == _GROUP15:
            if modrm & _MOD_REGISTER == _MOD_REGISTER:
                writes_base = operation == _WRFSBASE or operation == _WRGSBASE
                return prefixes & REP != 0 and (writes_base or prefixes & OPERAND_SIZE != 0)
            return operation >= _XSAVE and operation <= _XSAVEOPT
        if opcode == _GROUP7:
            return modrm == _XGETBV or modrm == _XSETBV
        if truncated and has_opcode(_NEAR_BRANCHES_TWO_BYTE, second):
            return True
        return not code64 and has_opcode(_SEGMENT_LOADS_TWO_BYTE, second)
    if opcode == _IRET:
        return not code64 or cpl == _USER_CPL or prefixes & REX_W == 0
    if opcode == _LOOPE or opcode == _LOOPNE or opcode == _ENTER or (opcode >= _INSB and opcode <= _OUTSD):
        return True
    if opcode == _GROUP3_BYTE or opcode == _GROUP3:
        return operation == _GROUP3_TEST_ALIAS or (operation == _GROUP3_NEG and prefixes & LOCK != 0)
    if opcode == _RETF or opcode == _RETF_IMM or opcode == _CALL_FAR or opcode == _JMP_FAR:
        return True
    if opcode == _GROUP5:
        if operation == _GROUP5_CALL or operation == _GROUP5_JMP:
            return truncated
        return operation == _GROUP5_CALL_FAR or operation == _GROUP5_JMP_FAR
    if opcode == _GROUP1A or opcode == _GROUP11_BYTE or opcode == _GROUP11:
        return operation != 0
    if opcode == _MOVSXD:
        return truncated or not code64
    if opcode == _VEX2 or opcode == _VEX3:
        return True
    if truncated and has_opcode(_NEAR_BRANCHES, opcode):
        return True
    return not code64 and has_opcode(_SEGMENT_LOADS, opcode)


def is_native_vex(opcode_map: int, opcode: int, payload: int) -> bool:
    """Whether the translator is right about a VEX-encoded *opcode* of map 2 or 3 in 64-bit mode.

    *payload* is the byte before the opcode. These are ANDN, PEXT, PDEP, MULX, SHLX, SARX, SHRX and RORX; without their
    CPUID feature the translator itself refuses them. It gets the flags of the other BMI instructions wrong.
    """
    if payload & _VEX_L != 0:
        return False
    pp = payload & _PP_MASK
    if opcode_map == _VEX_0F3A:
        return opcode == _RORX and pp == _PP_F2 and payload & _VEX_VVVV == _VEX_NO_VVVV
    if opcode == _ANDN:
        return pp == _PP_NONE
    if opcode == _PEXT_PDEP:
        return pp == _PP_F3 or pp == _PP_F2
    if opcode == _MULX:
        return pp == _PP_F2
    return opcode == _SHIFTS and pp != _PP_NONE
