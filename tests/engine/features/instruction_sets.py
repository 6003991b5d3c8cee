"""Features that are instructions for programs: their results, by the manual's tables and published examples."""

from __future__ import annotations

import struct

from features.probe import (
    Probe,
    completed,
    faults,
    is_undefined,
    result_of,
    sse_result_of,
)
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, LOW_ABSENT, LOW_USER, UPPER
from lasskvm.kvm import Regs
from lasskvm.x86.exceptions import GP, PF, PF_U
from lasskvm.x86.registers import (
    MASK32,
    MASK64,
    RFLAGS_AF,
    RFLAGS_ARITHMETIC,
    RFLAGS_CF,
    RFLAGS_FIXED,
    RFLAGS_OF,
    RFLAGS_PF,
    RFLAGS_SF,
    RFLAGS_ZF,
)

OF_EVERY_64_BIT_PROCESSOR = "the translator has no switch for what every 64-bit processor can do"
ONLY_SPEED = "the feature is a promise of speed; string instructions do the same on every processor"
ONLY_HINT = "a hint: where the feature is missing, the encoding is a no-operation as well"


def doubles(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def singles(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def integers(layout: str, *values: int) -> bytes:
    """*values* in memory, as :mod:`struct` understands *layout*."""
    return struct.pack(f"<{layout}", *values)


def number(hexadecimal: str) -> bytes:
    """128 bits as the examples of AES-NI and PCLMULQDQ print them: highest byte first."""
    return bytes.fromhex(hexadecimal)[::-1]


def flags_of(regs: Regs) -> int:
    """The arithmetic flags that a program has left in RDX by PUSHF and POP."""
    return regs.rdx & RFLAGS_ARITHMETIC


# ----------------------------------------------------------------------------------------------- x87, MMX and SSE

#: 1/3 with a 64-bit mantissa, rounded to nearest.
THIRD = bytes.fromhex("abaaaaaaaaaaaaaafd3f")


def _fpu(guest: Guest) -> None:
    third = result_of(
        guest, "fninit; fld1; fidiv dword [rbx]; fstp tbyte [rdi]; fnstcw word [rdi + 12]", integers("i", 3)
    )
    assert third[:10] == THIRD
    assert third[12:14] == integers("H", 0x37F)


def _mmx(guest: Guest) -> None:
    operands = integers("4h", 32767, -32768, 5, -5), integers("4h", 1, -1, 6, -6)
    found = result_of(guest, "movq mm0, [rbx]; paddsw mm0, [rbx + 16]; movq [rdi], mm0; emms", *operands)
    assert found[:8] == integers("4h", 32767, -32768, 11, -11)


def _sse(guest: Guest) -> None:
    operands = singles(1.5, -2.25, 9.0, 0.0), singles(2.0, 4.0, 0.5, -1.0)
    assert sse_result_of(guest, "addps xmm0, xmm1; sfence", *operands) == singles(3.5, 1.75, 9.5, -1.0)
    assert sse_result_of(guest, "shufps xmm0, xmm1, 0x1B", *operands) == singles(0.0, 9.0, 4.0, 2.0)
    assert sse_result_of(
        guest, "sqrtss xmm0, xmm0; mulss xmm0, xmm1", singles(9, 1, 2, 3), singles(2, 0, 0, 0)
    ) == (singles(6, 1, 2, 3))


def _sse2(guest: Guest) -> None:
    assert sse_result_of(guest, "divpd xmm0, xmm1; lfence; mfence", doubles(1, -7), doubles(8, 2)) == (
        doubles(0.125, -3.5)
    )
    assert sse_result_of(
        guest, "paddq xmm0, xmm1", integers("2Q", MASK64, 1 << 40), integers("2Q", 2, 3)
    ) == (integers("2Q", 1, (1 << 40) + 3))
    assert completed(guest, "cvtsi2sd xmm0, rax; addsd xmm0, xmm0; cvttsd2si rcx, xmm0", rax=21).rcx == 42


def _pni(guest: Guest) -> None:
    assert sse_result_of(guest, "haddpd xmm0, xmm1", doubles(1, 2), doubles(3, 4)) == doubles(3, 7)
    assert sse_result_of(guest, "addsubps xmm0, xmm1", singles(1, 2, 3, 4), singles(10, 20, 30, 40)) == (
        singles(-9, 22, -27, 44)
    )
    assert sse_result_of(guest, "movddup xmm0, xmm1", bytes(16), doubles(5, 6)) == doubles(5, 5)
    # FISTTP truncates, whatever the rounding control says.
    found = result_of(guest, "fninit; fld qword [rbx]; fisttp dword [rdi]", doubles(-2.75))
    assert found[:4] == integers("i", -2)


def _ssse3(guest: Guest) -> None:
    letters, order = b"0123456789abcdef", bytes((15, 0, 0x80, 14, *range(12)))
    assert sse_result_of(guest, "pshufb xmm0, xmm1", letters, order) == b"f0\0e0123456789ab"
    assert sse_result_of(guest, "palignr xmm0, xmm1, 5", letters, b"ABCDEFGHIJKLMNOP") == b"FGHIJKLMNOP01234"
    assert sse_result_of(
        guest, "pabsw xmm0, xmm1", bytes(16), integers("8h", -1, 2, -3, -32768, 0, 5, -6, 7)
    ) == (integers("8H", 1, 2, 3, 32768, 0, 5, 6, 7))


def _sse4_1(guest: Guest) -> None:
    operands = integers("4i", 3, -4, 70000, -1), integers("4i", 5, 6, 70000, -1)
    products = integers("4I", 15, -24 & MASK32, 70000 * 70000 & MASK32, 1)
    assert sse_result_of(guest, "pmulld xmm0, xmm1", *operands) == products
    assert sse_result_of(guest, "roundpd xmm0, xmm1, 1", bytes(16), doubles(-1.5, 2.5)) == doubles(-2, 2)
    assert sse_result_of(
        guest, "pmovsxbw xmm0, xmm1", bytes(16), integers("8b", *range(-4, 4)) + bytes(8)
    ) == (integers("8h", *range(-4, 4)))
    source = "movq xmm0, rax; movq xmm1, rcx; ptest xmm0, xmm1; pushfq; pop rdx"
    assert flags_of(completed(guest, source, rax=0b1100, rcx=0b0011)) == RFLAGS_ZF
    assert flags_of(completed(guest, source, rax=0b0111, rcx=0b0011)) == RFLAGS_CF
    assert completed(guest, "movq xmm0, rax; pextrb ecx, xmm0, 3", rax=0x11223344).rcx == 0x11


#: The check value of CRC-32C: that of the digits 1 to 9.
DIGITS, DIGITS_CRC = b"123456789", 0xE3069283


def _sse4_2(guest: Guest) -> None:
    source = "mov eax, -1; crc32 rax, qword [rbx]; crc32 eax, byte [rbx + 8]; not eax; mov [rdi], eax"
    assert result_of(guest, source, DIGITS)[:4] == integers("I", DIGITS_CRC)
    assert sse_result_of(guest, "pcmpgtq xmm0, xmm1", integers("2q", 1, -1), integers("2q", -1, 1)) == (
        integers("2q", -1, 0)
    )
    # Equal any: the index of the first letter that is a vowel.
    search = "movups xmm0, [rbx]; pcmpistri xmm0, [rbx + 16], 0; mov [rdi], ecx; setb byte [rdi + 4]"
    assert result_of(guest, search, b"aeiou".ljust(16, b"\0"), b"rhythm and blues")[:5] == integers(
        "IB", 7, 1
    )


def _popcnt(guest: Guest) -> None:
    source = "popcnt rcx, rax; pushfq; pop rdx"
    found = completed(guest, source, cpl=3, rax=0xF0F0_0000_0000_8001, rflags=RFLAGS_ARITHMETIC)
    assert (found.rcx, flags_of(found)) == (10, 0)
    found = completed(guest, source, cpl=3, rax=0, rflags=RFLAGS_CF)
    assert (found.rcx, flags_of(found)) == (0, RFLAGS_ZF)
    assert completed(guest, "popcnt cx, ax", cpl=3, rax=0xFFFF_FFFF, rcx=MASK64).rcx == MASK64 - 0xFFFF + 16


# ---------------------------------------------------------------------------------------------------- cryptography

#: The operands of the examples in Intel's white papers on both instruction sets, and what processors make of them.
STATE, ROUND_KEY = number("7b5b54657374566563746f725d53475d"), number("48692853686179295b477565726f6e5d")
AES_RESULTS = {
    "aesenc xmm0, xmm1": "a8311c2f9fdba3c58b104b58ded7e595",
    "aesenclast xmm0, xmm1": "c7fb881e938c5964177ec42553fdc611",
    "aesdec xmm0, xmm1": "138ac342faea2787b58eb95eb730392a",
    "aesdeclast xmm0, xmm1": "c5a391ef6b317f95d410637b72a593d0",
    "aesimc xmm0, xmm1": "597f8df109efaa15f39bc5a119d859b6",
}
CARRYLESS_PRODUCTS = {
    0x00: "1d4d84c85c3440c0929633d5d36f0451",
    0x01: "1a2bf6db3a30862fbabf262df4b7d5c9",
    0x10: "1bd17c8d556ab5a17fa540ac2a281315",
    0x11: "1d1e1f2c592e7c45d66ee03e410fd4ed",
}
KEY, KEY_ASSISTED = "3c4fcf098815f7aba6d2ae2816157e2b", "01eb848beb848a013424b5e524b5e434"


def _aes(guest: Guest) -> None:
    for instruction, expected in AES_RESULTS.items():
        assert sse_result_of(guest, instruction, STATE, ROUND_KEY) == number(expected), instruction
    found = sse_result_of(guest, "aeskeygenassist xmm0, xmm1, 1", bytes(16), number(KEY))
    assert found == number(KEY_ASSISTED)


def _pclmulqdq(guest: Guest) -> None:
    for selection, expected in CARRYLESS_PRODUCTS.items():
        found = sse_result_of(guest, f"pclmulqdq xmm0, xmm1, {selection}", STATE, ROUND_KEY)
        assert found == number(expected), hex(selection)


# ---------------------------------------------------------------------------------------------- integer instructions


def _cmov(guest: Guest) -> None:
    source = "cmp rax, rcx; cmovb r8, rdx; cmovae r9, rdx; cmove r10d, edx"
    values = {"rdx": 0x1_2345_6789, "r8": MASK64, "r9": MASK64, "r10": MASK64}
    found = completed(guest, source, cpl=3, rax=1, rcx=2, **values)
    # Where the condition is false, a 32-bit destination still loses its upper half.
    assert (found.r8, found.r9, found.r10) == (0x1_2345_6789, MASK64, MASK32)
    found = completed(guest, source, cpl=3, rax=2, rcx=2, **values)
    assert (found.r8, found.r9, found.r10) == (MASK64, 0x1_2345_6789, 0x2345_6789)
    chosen = result_of(guest, "fninit; fldz; fld1; stc; fcmovb st0, st1; fstp qword [rdi]")
    assert chosen[:8] == doubles(0)


def _cx8(guest: Guest) -> None:
    source = "lock cmpxchg8b [rdi]; pushfq; pop rdx"
    guest.write(LOW_USER, integers("Q", 0x1111_2222_3333_4444))
    pair = {"rcx": 0xAAAA, "rbx": 0xBBBB, "rdi": LOW_USER, "cpl": 3}
    found = completed(guest, source, rax=0x3333_4444, rdx=0x1111_2222, rflags=RFLAGS_CF, **pair)
    assert (guest.read(LOW_USER), flags_of(found)) == (0xAAAA_0000_BBBB, RFLAGS_ZF | RFLAGS_CF)
    found = completed(guest, source.replace("rdx", "rsi"), rax=0, rdx=0, rflags=RFLAGS_ZF, **pair)
    assert guest.read(LOW_USER) == 0xAAAA_0000_BBBB
    assert (found.rax, found.rdx, found.rsi & RFLAGS_ZF) == (0xBBBB, 0xAAAA, 0)


def _cx16(guest: Guest) -> None:
    source = "lock cmpxchg16b [rdi]; pushfq; pop rsi"
    guest.write(LOW_USER, integers("2Q", 0x1111, 0x2222))
    pair = {"rcx": 0xAAAA, "rbx": 0xBBBB, "rdi": LOW_USER, "cpl": 3}
    found = completed(guest, source, rax=0x1111, rdx=0x2222, **pair)
    assert (guest.read(LOW_USER), guest.read(LOW_USER + 8)) == (0xBBBB, 0xAAAA)
    assert found.rsi & RFLAGS_ZF
    found = completed(guest, source, rax=0, rdx=0, **pair)
    assert (found.rax, found.rdx, found.rsi & RFLAGS_ZF) == (0xBBBB, 0xAAAA, 0)
    faults(guest, "cmpxchg16b [rdi + 8]", GP, 0, rdi=LOW_USER, cpl=3)


def _movbe(guest: Guest) -> None:
    found = result_of(guest, "movbe rax, qword [rbx]; mov [rdi], rax; movbe dword [rdi + 8], ecx", b"12345678",
                      rcx=0x41424344)  # fmt: skip
    assert found == b"87654321ABCD\0\0\0\0"
    guest.write(LOW_USER, b"12")
    assert (
        completed(guest, "movbe cx, word [rbx]", cpl=3, rbx=LOW_USER, rcx=MASK64).rcx
        == MASK64 - 0xFFFF + 0x3132
    )


def _adx(guest: Guest) -> None:
    """Two chains of carries at a time, each in a flag of its own; all other flags stay."""
    source = "adcx rax, rcx; adox r8, r9; pushfq; pop rdx"
    others = RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF
    found = completed(guest, source, cpl=3, rax=MASK64, rcx=0, r8=1, r9=2, rflags=RFLAGS_CF | others)
    assert (found.rax, found.r8, flags_of(found)) == (0, 3, RFLAGS_CF | others)
    found = completed(guest, source, cpl=3, rax=1, rcx=2, r8=MASK64, r9=5, rflags=RFLAGS_OF)
    assert (found.rax, found.r8, flags_of(found)) == (3, 5, RFLAGS_OF)
    found = completed(guest, source, cpl=3, rax=1, rcx=2, r8=3, r9=5, rflags=RFLAGS_OF | RFLAGS_CF)
    assert (found.rax, found.r8, flags_of(found)) == (4, 9, 0)


def _lahf_lm(guest: Guest) -> None:
    source = "lahf; mov r8, rax; mov eax, ecx; sahf; pushfq; pop rdx"
    flags = RFLAGS_SF | RFLAGS_PF | RFLAGS_CF
    found = completed(guest, source, cpl=3, rax=0, rcx=(RFLAGS_ZF | RFLAGS_AF) << 8, rflags=flags | RFLAGS_OF)
    assert found.r8 == (flags | RFLAGS_FIXED) << 8
    assert flags_of(found) == RFLAGS_ZF | RFLAGS_AF | RFLAGS_OF


# ------------------------------------------------------------------------------------------- strings, caches and hints


def _fast_strings(guest: Guest) -> None:
    """Across a page boundary, and with operands that overlap as they do in a fill by MOVSB."""
    start = LOW_USER + 0xFF0
    found = completed(guest, "rep stosb", cpl=3, rdi=start, rcx=0x21, rax=0x5A)
    assert (found.rcx, found.rdi) == (0, start + 0x21)
    assert guest.memory.read(guest.gpa(LOW_USER) + 0xFF0, 0x22) == b"\x5a" * 0x21 + b"\0"
    guest.write(LOW_USER, b"abc")
    found = completed(guest, "rep movsb", cpl=3, rsi=LOW_USER, rdi=LOW_USER + 3, rcx=7)
    assert (found.rcx, found.rsi, found.rdi) == (0, LOW_USER + 7, LOW_USER + 10)
    assert guest.memory.read(guest.gpa(LOW_USER), 10) == b"abcabcabca"


def _clflush(guest: Guest) -> None:
    """A read to paging, and nothing to the data. CPUID says how long a line is."""
    guest.write(LOW_USER, b"kept")
    guest.tables.clear_accessed_and_dirty(LOW_USER)
    completed(guest, "clflush byte [rbx]", cpl=3, rbx=LOW_USER)
    assert guest.accessed_and_dirty(LOW_USER) == (True, False)
    assert guest.read(LOW_USER, 4) == int.from_bytes(b"kept", "little")
    faults(guest, "clflush byte [rbx]", PF, PF_U, cpl=3, rbx=LOW_ABSENT)
    assert completed(guest, "mov eax, 1; cpuid").rbx >> 8 & 0xFF == 64 // 8


def _touches_nothing(*hints: str) -> Probe:
    def works(guest: Guest) -> None:
        for hint in hints:
            guest.tables.clear_accessed_and_dirty(LOW_USER)
            for address in (LOW_USER, LOW_ABSENT, UPPER, 1 << 63):
                found = completed(guest, f"{hint}; pushfq; pop rdx", cpl=3, rbx=address, rflags=RFLAGS_CF)
                assert flags_of(found) == RFLAGS_CF
            assert guest.accessed_and_dirty(LOW_USER) == (False, False)

    return Probe(works, only_cpuid=ONLY_HINT)


def _wbnoinvd(guest: Guest) -> None:
    guest.write(HIGH_SUPERVISOR, b"written")
    found = completed(guest, "wbnoinvd; mov rax, [rbx]", rbx=HIGH_SUPERVISOR)
    assert found.rax == int.from_bytes(b"written", "little")
    faults(guest, "wbnoinvd", GP, 0, cpl=3)


def _serialize(guest: Guest) -> None:
    """It does nothing but wait; flags and registers stay, and code written before it is what is executed behind it."""
    found = completed(guest, "serialize; pushfq; pop rdx", cpl=3, rax=7, rflags=RFLAGS_ARITHMETIC)
    assert (found.rax, flags_of(found)) == (7, RFLAGS_ARITHMETIC)
    # MOV EAX, imm32: the immediate is its second byte.
    found = completed(guest, "mov byte [rcx + patched + 1], 9; serialize; patched: mov eax, 1", cpl=3, rcx=0)
    assert found.rax == 9


PROBES = {
    "fpu": Probe(_fpu, is_undefined("fld1", "fnstcw word [rbx]"), runs_anyway=OF_EVERY_64_BIT_PROCESSOR),
    "mmx": Probe(_mmx, is_undefined("movq mm0, [rbx]", "emms"), runs_anyway=OF_EVERY_64_BIT_PROCESSOR),
    "sse": Probe(_sse, is_undefined("addps xmm0, xmm1", "sfence"), runs_anyway=OF_EVERY_64_BIT_PROCESSOR),
    "sse2": Probe(_sse2, is_undefined("paddq xmm0, xmm1", "lfence"), runs_anyway=OF_EVERY_64_BIT_PROCESSOR),
    "pni": Probe(_pni, is_undefined("haddpd xmm0, xmm1", "fisttp dword [rbx]"),
                 runs_anyway=OF_EVERY_64_BIT_PROCESSOR),
    "ssse3": Probe(_ssse3, is_undefined("pshufb xmm0, xmm1", "pshufb mm0, mm1", "palignr xmm0, xmm1, 5")),
    "sse4_1": Probe(_sse4_1, is_undefined("pmulld xmm0, xmm1", "ptest xmm0, xmm1", "roundpd xmm0, xmm1, 1")),
    "sse4_2": Probe(_sse4_2, is_undefined("crc32 eax, cl", "pcmpgtq xmm0, xmm1", "pcmpistri xmm0, xmm1, 0")),
    "popcnt": Probe(_popcnt, is_undefined("popcnt rax, rcx", "popcnt eax, [rbx]")),
    "aes": Probe(_aes, is_undefined("aeskeygenassist xmm0, xmm1, 1", *AES_RESULTS)),
    "pclmulqdq": Probe(_pclmulqdq, is_undefined("pclmulqdq xmm0, xmm1, 0")),
    "cmov": Probe(_cmov, is_undefined("cmovb eax, ecx", "fcmovb st0, st1")),
    "cx8": Probe(_cx8, is_undefined("cmpxchg8b [rbx]")),
    "cx16": Probe(_cx16, is_undefined("cmpxchg16b [rbx]")),
    "movbe": Probe(_movbe, is_undefined("movbe rax, qword [rbx]", "movbe dword [rbx], ecx")),
    "adx": Probe(_adx, is_undefined("adcx rax, rcx", "adox rax, [rbx]")),
    "lahf_lm": Probe(_lahf_lm, is_undefined("lahf", "sahf")),
    "erms": Probe(_fast_strings, only_cpuid=ONLY_SPEED),
    "fsrm": Probe(_fast_strings, only_cpuid=ONLY_SPEED),
    "clflush": Probe(_clflush, is_undefined("clflush byte [rbx]")),
    "3dnowprefetch": _touches_nothing("prefetchw byte [rbx]", "prefetch byte [rbx]"),
    "cldemote": _touches_nothing("cldemote byte [rbx]"),
    "wbnoinvd": Probe(_wbnoinvd, only_cpuid="without the feature the F3 prefix is ignored, and WBINVD does no less"),
    "serialize": Probe(_serialize, is_undefined("serialize")),
}  # fmt: skip
