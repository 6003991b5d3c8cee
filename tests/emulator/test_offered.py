"""CPUID honesty of the emulator: an instruction exists when its feature is offered."""

from __future__ import annotations

from functools import cache

import pytest
from emulator_guest import UPPER, Guest
from iced_x86 import CpuidFeature, EncodingKind, Mnemonic

from lasskvm.emulator.decode import Decoded, decode
from lasskvm.emulator.execution import compile_instruction
from lasskvm.emulator.faults import GuestFault, Unhandleable
from lasskvm.emulator.offered import as_offered, is_offered
from lasskvm.state import RAX, RCX, RIP
from lasskvm.x86.cpu_models import CpuModel, parse_cpu
from lasskvm.x86.cpuid import FEATURES, CpuidTable
from lasskvm.x86.exceptions import GP, UD

DATA = UPPER + 0x70000
_PADDING = bytes(12)


@cache
def cpu(text: str) -> CpuidTable:
    return CpuidTable(parse_cpu(text).entries())


@cache
def cpu_with(*names: str) -> CpuidTable:
    return CpuidTable(CpuModel("test", parse_cpu("max").features | set(names)).entries())


def instruction(code: str, bits: int = 64) -> Decoded:
    decoded = decode(bits, bytes.fromhex(code))
    assert isinstance(decoded, Decoded), code
    return decoded


@cache
def all_encodings() -> dict[int, Decoded]:
    """One instruction for each ``iced_x86.Code`` that 64-bit legacy, VEX, XOP and EVEX encodings lead to."""
    found: dict[int, Decoded] = {}
    for prefix in (b"", b"\x66", b"\xf3", b"\xf2", b"\x48", b"\xf3\x48"):
        for escape in (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"):
            for opcode in range(256):
                for modrm in (*range(0, 0x40, 8), *range(0xC0, 0x100)):
                    _keep(found, prefix + escape + bytes((opcode, modrm)))
    for wl in (0x78, 0x7C, 0xF8, 0xFC):
        for opcode in range(256):
            for modrm in (0x00, 0x08, 0x10, 0x18, 0xC1):
                for map_number in (1, 2, 3):
                    for pp in range(4):
                        _keep(found, bytes((0xC4, 0xE0 | map_number, wl | pp, opcode, modrm)))
                        _keep(
                            found,
                            bytes((0x62, 0xF0 | map_number, wl & 0x80 | 0x7C | pp, 0x48, opcode, modrm)),
                        )
                for map_number in (8, 9, 10):
                    _keep(found, bytes((0x8F, 0xE0 | map_number, wl, opcode, modrm)))
    return found


def _keep(found: dict[int, Decoded], code: bytes) -> None:
    decoded = decode(64, code + _PADDING)
    if isinstance(decoded, Decoded):
        found.setdefault(decoded.instruction.code, decoded)


def belongs_to(decoded: Decoded, *features: int) -> bool:
    return not set(features).isdisjoint(decoded.instruction.cpuid_features())


# ------------------------------------------------------------------------------------------------- what is there


def test_there_are_instructions_to_judge() -> None:
    assert len(all_encodings()) > 3000


def test_every_instruction_of_a_486_and_of_64_bit_mode_is_offered() -> None:
    old = {
        CpuidFeature.INTEL8086, CpuidFeature.INTEL186, CpuidFeature.INTEL286, CpuidFeature.INTEL386,
        CpuidFeature.INTEL486, CpuidFeature.X64,
    }  # fmt: skip
    empty = CpuidTable([])
    flag_transfers = (Mnemonic.LAHF, Mnemonic.SAHF)
    for decoded in all_encodings().values():
        features = set(decoded.instruction.cpuid_features())
        if features <= old and decoded.instruction.mnemonic not in flag_transfers:
            assert is_offered(decoded, empty), decoded.instruction


def test_vex_xop_and_evex_instructions_are_never_offered_but_for_bmi() -> None:
    """Not even to a guest whose VMM claims AVX: nothing here executes it."""
    claimed = CpuidTable(CpuModel("test", frozenset(FEATURES)).entries())
    for decoded in all_encodings().values():
        is_new = decoded.instruction.encoding != EncodingKind.LEGACY
        if is_new and not belongs_to(decoded, CpuidFeature.BMI1, CpuidFeature.BMI2):
            assert not is_offered(decoded, claimed), decoded.instruction


@pytest.mark.parametrize(
    ("code", "feature"),
    [
        ("d9e8", "fpu"), ("dfe0", "fpu"), ("0f31", "tsc"), ("0f32", "msr"), ("0fc70f", "cx8"), ("0f34", "sep"),
        ("0f44c1", "cmov"), ("dac1", "cmov"), ("0fae38", "clflush"), ("0fefc0", "mmx"), ("0fae00", "fxsr"),
        ("0f58c1", "sse"), ("660f58c1", "sse2"), ("0fc3 08", "sse2"), ("0faef0", "sse2"), ("0faef8", "sse"),
        ("660f7cc1", "pni"), ("df08", "pni"), ("660f3a44c100", "pclmulqdq"), ("0f01c8", "monitor"),
        ("0f01c2", "vmx"), ("660f388008", "vmx"), ("660f388108", "vmx"), ("0f37", "smx"),
        ("660f3800c1", "ssse3"), ("480fc708", "cx16"), ("660f3814c1", "sse4_1"), ("f20f38f0c1", "sse4_2"),
        ("0f38f008", "movbe"), ("f30fb8c1", "popcnt"), ("660f38dcc1", "aes"), ("0fae20", "xsave"),
        ("0f01d0", "xsave"), ("0fc7f0", "rdrand"), ("f3480faec0", "fsgsbase"), ("0f01cf", "sgx"),
        ("c4e270f2c1", "bmi1"), ("c4e273f5c1", "bmi2"), ("660f388208", "invpcid"), ("0f01d5", "rtm"),
        ("0f01d6", "rtm"), ("0fc7f8", "rdseed"), ("660f38f6c1", "adx"), ("0f01cb", "smap"),
        ("660fae38", "clflushopt"), ("660fae30", "clwb"), ("0f38c8c1", "sha_ni"), ("0f01ee", "pku"),
        ("660faef0", "waitpkg"), ("f30faee8", "shstk"), ("660f38cfc1", "gfni"), ("f30fc7f8", "rdpid"),
        ("0f38f908", "movdiri"), ("660f38f808", "movdir64b"), ("f20f38f808", "enqcmd"), ("0f01e8", "serialize"),
        ("0f01c5", "pconfig"), ("0fae30", "xsaveopt"), ("0fc720", "xsavec"), ("0fc728", "xsaves"),
        ("660f79c1", "sse4a"), ("0f05", "syscall"), ("0f01f9", "rdtscp"), ("0f01d8", "svm"),
        ("9f", "lahf_lm"), ("9e", "lahf_lm"),
    ],
)  # fmt: skip
def test_an_instruction_exists_with_its_feature_only(code: str, feature: str) -> None:
    decoded = instruction(code)
    features = parse_cpu("max").features | {feature}
    assert is_offered(decoded, CpuidTable(CpuModel("test", features).entries()))
    assert not is_offered(decoded, CpuidTable(CpuModel("test", features - {feature}).entries()))


@pytest.mark.parametrize("code", ["0f01c1", "0f01d9"], ids=["vmcall", "vmmcall"])
def test_hypercalls_are_for_the_hypervisor_to_judge(code: str) -> None:
    assert is_offered(instruction(code), CpuidTable([]))


def test_lahf_outside_64_bit_mode_has_always_been_there() -> None:
    assert is_offered(instruction("9f", 32), CpuidTable([]))


@pytest.mark.parametrize(
    "code",
    [
        "f390", "f30f1efa", "f30f1efb", "f30f1ec8", "0f1c00", "0f0d00", "0f0d08", "0f0d10", "0f1800", "0f1808",
        "0f1f00", "90",
    ],
)  # fmt: skip
def test_hints_do_nothing_on_any_processor(guest: Guest, code: str) -> None:
    """The operand of a prefetch is not touched: there is no page, and it is not canonical."""
    guest.ctx.cpuid = CpuidTable([])
    guest.words[RAX], rip = 1 << 63, guest.words[RIP]
    before = guest.snapshot()
    guest.run(code)
    assert guest.words[RIP] == rip + len(code) // 2
    guest.words[RIP] = rip
    assert guest.snapshot() == before


@pytest.mark.parametrize("code", ["0f0e", "0f0fc1bf", "f30faee0", "f30f01ca", "f20f01ca", "0f3f", "c6f800"])
def test_other_vendors_and_later_processors_instructions_are_undefined(guest: Guest, code: str) -> None:
    guest.ctx.cpuid = cpu("max")
    assert guest.fault_of(code) == (UD, None)


# --------------------------------------------------------------------------------- encodings with two meanings


@pytest.mark.parametrize(
    ("with_prefix", "feature", "without"),
    [
        ("f3480fbdc1", "abm", "480fbdc1"), ("f30fbdc1", "abm", "0fbdc1"), ("66f30fbd00", "abm", "660fbd00"),
        ("f3480fbcc1", "bmi1", "480fbcc1"), ("f30fbc00", "bmi1", "0fbc00"), ("66f30fbcc1", "bmi1", "660fbcc1"),
        ("f30f09", "wbnoinvd", "0f09"),
    ],
)  # fmt: skip
def test_an_ignored_prefix_makes_an_older_instruction(with_prefix: str, feature: str, without: str) -> None:
    decoded, older = instruction(with_prefix), instruction(without)
    features = parse_cpu("max").features | {feature}
    assert as_offered(decoded, CpuidTable(CpuModel("test", features).entries())) is decoded
    taken_for = as_offered(decoded, CpuidTable(CpuModel("test", features - {feature}).entries()))
    assert taken_for.instruction.code == older.instruction.code
    assert taken_for.instruction.op0_register == older.instruction.op0_register
    assert taken_for.length == decoded.length
    assert decoded.instruction.code != older.instruction.code


def test_other_instructions_are_what_they_are() -> None:
    for decoded in all_encodings().values():
        if not belongs_to(decoded, CpuidFeature.LZCNT, CpuidFeature.BMI1, CpuidFeature.WBNOINVD):
            assert as_offered(decoded, cpu("max")) is decoded


def test_lzcnt_without_the_feature_is_bsr(guest: Guest) -> None:
    guest.words[RAX], guest.words[RCX] = 0, 0x10
    guest.run("f3480fbdc1")
    assert guest.words[RAX] == 4
    guest.ctx.cpuid = cpu_with("abm")
    guest.run("f3480fbdc1")
    assert guest.words[RAX] == 59


def test_tzcnt_without_the_feature_is_bsf(guest: Guest) -> None:
    """BSF leaves its destination alone when the source is zero; TZCNT counts 64."""
    guest.words[RAX], guest.words[RCX] = 7, 0
    guest.run("f3480fbcc1")
    assert guest.words[RAX] == 7
    guest.ctx.cpuid = cpu_with("bmi1")
    guest.run("f3480fbcc1")
    assert guest.words[RAX] == 64


# ---------------------------------------------------------------------------------------------------- all of them


def test_whatever_is_not_offered_raises_invalid_opcode(guest: Guest) -> None:
    cpuid = cpu("max")
    undefined = 0
    for decoded in all_encodings().values():
        if not is_offered(as_offered(decoded, cpuid), cpuid):
            with pytest.raises(GuestFault, match="#UD"):
                compile_instruction(decoded, cpuid).run(guest.ctx)
            undefined += 1
    assert undefined > 1000


def test_privilege_comes_after_existence(user: Guest) -> None:
    """INVPCID at CPL 3 is #GP(0) where it exists."""
    user.words[RAX] = 0x70000
    assert user.fault_of("660f388208") == (GP, 0)
    user.ctx.cpuid = cpu("max,-invpcid")
    assert user.fault_of("660f388208") == (UD, None)


def test_what_is_offered_but_not_implemented_is_no_invalid_opcode() -> None:
    """A VMM may claim what the emulator cannot do; that is an internal error, as in KVM, and not the guest's."""
    with pytest.raises(Unhandleable):
        compile_instruction(instruction("0f38f908"), cpu_with("movdiri"))
