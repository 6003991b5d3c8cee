"""What a guest's processor does not have raises #UD in direct execution too: every encoding, one by one.

iced-x86 says what the encodings are; what a processor with the guest's CPUID makes of them is the emulator's knowledge
(``emulator/offered.py``), held against the manual in its own tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from iced_x86 import Decoder, DecoderError

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR
from lasskvm.emulator.decode import Decoded, decode
from lasskvm.emulator.offered import as_offered, is_offered
from lasskvm.engine.undefined import is_undefined_form
from lasskvm.x86.exceptions import UD

PREFIXES = (b"", b"\x66", b"\xf3", b"\xf2")
#: Every reg field with a memory operand and with a register; all registers where they select an instruction.
MODRM = (*range(0, 0x40, 8), *range(0xC0, 0x100, 8), 0xC1)
MODRM_OF_GROUPS = (*range(0, 0x40, 8), *range(0xC0, 0x100))
GROUPS = (0x01, 0xAE, 0x1E)
_PADDING = bytes(15)


def two_byte_encodings() -> Iterator[bytes]:
    for prefix in PREFIXES:
        for opcode in range(256):
            for modrm in MODRM_OF_GROUPS if opcode in GROUPS else MODRM:
                yield prefix + bytes((0x0F, opcode, modrm))


def other_encodings() -> Iterator[bytes]:
    """One-byte opcodes, three-byte maps, VEX, XOP and EVEX."""
    for prefix in (*PREFIXES, b"\x48", b"\xf3\x48"):
        for opcode in range(256):
            for modrm in (0x00, 0x08, 0x30, 0x38, 0xC1, 0xF8):
                yield from (
                    prefix + escape + bytes((opcode, modrm)) for escape in (b"", b"\x0f\x38", b"\x0f\x3a")
                )
    for opcode in range(256):
        for modrm in (0x00, 0x08, 0xC1):
            for pp in range(4):
                for map_number in (1, 2, 3):
                    yield bytes((0xC4, 0xE0 | map_number, 0x78 | pp, opcode, modrm))
                    yield bytes((0xC4, 0xE0 | map_number, 0xF8 | pp, opcode, modrm))
                    yield bytes((0x62, 0xF0 | map_number, 0x7C | pp, 0x48, opcode, modrm))
                yield bytes((0xC5, 0xF8 | pp, opcode, modrm))
            for map_number in (8, 9, 10):
                yield bytes((0x8F, 0xE0 | map_number, 0x78, opcode, modrm))


def survivors(guest: Guest, encodings: Iterable[bytes]) -> list[str]:
    """Those of *encodings* that do not raise #UD on the instruction, with what became of them."""
    guest.start("nop", rax=HIGH_SUPERVISOR)
    found = []
    for code in encodings:
        guest.start("nop", rax=HIGH_SUPERVISOR)
        guest.write(layout.KERNEL_CODE, code + b"\xcd\x80" * 6)
        outcome = guest.run()
        if (outcome.vector, outcome.rip) != (UD, layout.KERNEL_CODE):
            found.append(f"{code.hex()}: {outcome}")
    return found


def unoffered(guest: Guest, encodings: Iterable[bytes]) -> list[bytes]:
    """One encoding for each ``iced_x86.Code`` that the guest's processor does not have."""
    cpuid = guest.vcpu.cpuid
    found: dict[int, bytes] = {}
    for code in encodings:
        decoded = decode(64, code + _PADDING)
        if not isinstance(decoded, Decoded) or decoded.instruction.code in found:
            continue
        if not is_offered(as_offered(decoded, cpuid), cpuid):
            found[decoded.instruction.code] = code
    return list(found.values())


def test_instructions_of_features_that_are_not_offered(guest: Guest) -> None:
    judged = unoffered(guest, [*two_byte_encodings(), *other_encodings()])
    assert len(judged) > 1000
    assert survivors(guest, judged) == []


def test_a_processor_with_hardly_any_feature() -> None:
    """What 64-bit mode and SSE2 consist of is always there (``docs/differences.md``)."""
    gone = (
        "ssse3", "movbe", "popcnt", "adx", "pclmulqdq", "aes", "cx16", "sep", "lahf_lm", "rdtscp", "clflush", "pcid",
        "invpcid", "rdpid", "fsgsbase",
    )  # fmt: skip
    guest = Guest(f"max,-{',-'.join(gone)}")
    judged = unoffered(guest, two_byte_encodings())
    judged += unoffered(
        guest, (code for code in other_encodings() if code[0] not in (0x62, 0x8F, 0xC4, 0xC5))
    )
    without_prefix = {code.lstrip(b"\x66\xf3\xf2") for code in judged}
    popcnt, aesenc = b"\x0f\xb8\x00", b"\x0f\x38\xdc\x00"
    assert {popcnt, aesenc} <= without_prefix
    assert survivors(guest, judged) == []


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix.hex() or "none")
def test_two_byte_opcodes_that_are_no_instruction(guest: Guest, prefix: bytes) -> None:
    """The mandatory prefix belongs to the opcode, and so does whether the operand is memory or a register."""
    undefined = []
    for code in two_byte_encodings():
        if code[: len(prefix)] == prefix and code[len(prefix)] == 0x0F:
            decoder = Decoder(64, code + _PADDING)
            decoder.decode()
            if decoder.last_error == DecoderError.INVALID_INSTRUCTION:
                undefined.append(code)
    assert len(undefined) > 100
    assert survivors(guest, undefined) == []


@pytest.mark.parametrize("code", ["0f38f0c1", "0f38f1c8", "660f38f0c1", "66480f38f1c1", "f30f38f0c1"])
def test_movbe_between_registers_is_no_instruction(guest: Guest, code: str) -> None:
    assert survivors(guest, [bytes.fromhex(code)]) == []


def test_crc32_of_a_register_is_one(guest: Guest) -> None:
    assert len(survivors(guest, [bytes.fromhex("f20f38f1c1"), bytes.fromhex("66f20f38f0c1")])) == 2


def test_no_instruction_that_exists_is_taken_for_an_undefined_form(guest: Guest) -> None:
    cpuid = guest.vcpu.cpuid
    for code in two_byte_encodings():
        decoded = decode(64, code + _PADDING)
        operand_size, repeat = code[0] == 0x66, code[0] in (0xF2, 0xF3)
        if is_undefined_form(code[-2], code[-1], operand_size, repeat) and isinstance(decoded, Decoded):
            assert not is_offered(decoded, cpuid), code.hex()
