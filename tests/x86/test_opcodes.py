"""Sets of opcodes and rules about them, against every legacy instruction form there is."""

from __future__ import annotations

import pytest
from iced_x86 import (
    Code,
    Decoder,
    EncodingKind,
    InstructionInfoFactory,
    OpAccess,
    OpCodeInfo,
    OpCodeTableKind,
    OpKind,
)

from lasskvm.x86.opcodes import (
    ONE_BYTE_RMW,
    TWO_BYTE,
    TWO_BYTE_RMW,
    has_opcode,
    is_lockable,
    is_prefix,
    is_rex,
)

PREFIXES = (b"", b"\x66", b"\xf2", b"\xf3", b"\x48", b"\x66\x48", b"\xf2\x48", b"\xf3\x48")
REX_W = 0x48
READ_AND_WRITE = (OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)
INSTRUCTION_BYTES = 15
#: The same as 80H, and undefined in 64-bit mode.
GROUP1_ALIAS = 0x82
ESCAPE = 0x0F


def read_modify_write_opcodes(escape: bytes, table: int) -> set[int]:
    """Every opcode of a map that has a legacy form with a memory operand that is read and written."""
    factory = InstructionInfoFactory()
    found = set()
    for bitness in (16, 32, 64):
        for prefix in PREFIXES:
            if bitness != 64 and prefix.endswith(bytes([REX_W])):
                continue
            for opcode in range(256):
                for register in range(8):
                    code = prefix + escape + bytes([opcode, register << 3])
                    instruction = Decoder(bitness, code.ljust(INSTRUCTION_BYTES, b"\0")).decode()
                    form = OpCodeInfo(instruction.code)
                    if form.encoding != EncodingKind.LEGACY or form.table != table:
                        continue
                    info = factory.info(instruction)
                    for operand in range(instruction.op_count):
                        is_memory = instruction.op_kind(operand) == OpKind.MEMORY
                        if is_memory and info.op_access(operand) in READ_AND_WRITE:
                            found.add(form.op_code & 0xFF)
    return found


@pytest.mark.parametrize(
    ("mask", "escape", "table"),
    [(ONE_BYTE_RMW, b"", OpCodeTableKind.NORMAL), (TWO_BYTE_RMW, b"\x0f", OpCodeTableKind.T0F)],
    ids=["one-byte", "two-byte"],
)
def test_the_read_modify_write_masks_are_exact(
    mask: tuple[int, int, int, int], escape: bytes, table: int
) -> None:
    masked = {opcode for opcode in range(256) if has_opcode(mask, opcode)}
    assert masked == read_modify_write_opcodes(escape, table)


def test_compare_and_test_alone_are_not_read_modify_write() -> None:
    assert not any(has_opcode(ONE_BYTE_RMW, opcode) for opcode in (0x38, 0x39, 0x3A, 0x84, 0x85, 0x88, 0x89))
    assert has_opcode(ONE_BYTE_RMW, 0x01)


@pytest.mark.parametrize("bits", [32, 64])
def test_lock_is_allowed_exactly_where_a_decoder_allows_it(bits: int) -> None:
    for opcode in range(2 * TWO_BYTE):
        if opcode == ESCAPE or (bits == 64 and opcode == GROUP1_ALIAS):
            continue
        escape = b"\x0f" if opcode >= TWO_BYTE else b""
        for modrm in range(256):
            code = escape + bytes((opcode & 0xFF, modrm)) + b"\x08" * 8
            if opcode < TWO_BYTE and is_prefix(opcode, bits == 64):
                continue
            locked = Decoder(bits, (b"\xf0" + code).ljust(INSTRUCTION_BYTES, b"\0")).decode()
            assert is_lockable(opcode, modrm) == (locked.code != Code.INVALID), f"lock {code.hex()}"


def test_prefixes_are_those_of_the_mode() -> None:
    legacy = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3}
    assert {byte for byte in range(256) if is_prefix(byte, code64=False)} == legacy
    assert {byte for byte in range(256) if is_prefix(byte, code64=True)} == legacy | set(range(0x40, 0x50))
    assert not any(is_rex(byte, code64=False) for byte in range(256))
