"""Features that save and restore the registers of x87, SSE and protection keys: FXSAVE and the XSAVE family."""

from __future__ import annotations

from features.instruction_sets import THIRD, integers
from features.probe import (
    HIGH_SUPERVISOR_PAGE,
    Probe,
    all_of,
    completed,
    faults,
    is_undefined,
    refuses_cr4,
)
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import (
    HIGH_SUPERVISOR,
)
from lasskvm.x86.cpuid import LEAF_FEATURES
from lasskvm.x86.exceptions import GP, UD
from lasskvm.x86.registers import (
    CR4_OSFXSR,
    CR4_OSXSAVE,
    CR4_PKE,
)

MXCSR = 0x9F80
#: Offsets in the area of FXSAVE and XSAVE.
FCW, MXCSR_OFFSET, ST0, XMM0, XSTATE_BV, XCOMP_BV, PKRU_OFFSET = 0, 24, 32, 160, 512, 520, 2688
X87, SSE, AVX, PKRU = 1 << 0, 1 << 1, 1 << 2, 1 << 9
#: 1/3 on top of the x87 stack, and a number in XMM0.
LOAD_STATE = "fninit; fld1; fidiv dword [rsi]; movq xmm0, r8; ldmxcsr dword [rsi + 4]; "
LOSE_STATE = "fninit; pxor xmm0, xmm0; ldmxcsr dword [rsi + 8]; "
SHOW_STATE = "movq r9, xmm0; stmxcsr dword [rsi + 12]; mov r10d, [rsi + 12]; fstp tbyte [rsi + 16]; "
NUMBERS = integers("3I", 3, MXCSR, 0x1F80)


def _state_operands(guest: Guest) -> dict[str, int]:
    """The area, which is empty, and the numbers behind it."""
    guest.memory.write(HIGH_SUPERVISOR_PAGE, bytes(0x1000) + NUMBERS.ljust(64, b"\0"))
    return {"rdi": HIGH_SUPERVISOR, "rsi": HIGH_SUPERVISOR + 0x1000, "r8": 0x1122_3344_5566_7788}


def _in_area(guest: Guest, offset: int, size: int) -> bytes:
    return guest.memory.read(HIGH_SUPERVISOR_PAGE + offset, size)


def _assert_state_is_saved(guest: Guest) -> None:
    assert _in_area(guest, FCW, 2) == integers("H", 0x37F)
    assert _in_area(guest, MXCSR_OFFSET, 4) == integers("I", MXCSR)
    assert _in_area(guest, ST0, 10) == THIRD
    assert _in_area(guest, XMM0, 16) == integers("2Q", 0x1122_3344_5566_7788, 0)


def _assert_state_is_back(guest: Guest, r9: int, r10: int) -> None:
    assert (r9, r10) == (0x1122_3344_5566_7788, MXCSR)
    assert guest.memory.read(HIGH_SUPERVISOR_PAGE + 0x1010, 10) == THIRD


def _fxsr(guest: Guest) -> None:
    registers = _state_operands(guest)
    assert guest.cr4 & CR4_OSFXSR
    found = completed(
        guest, f"{LOAD_STATE} fxsave [rdi]; {LOSE_STATE} fxrstor [rdi]; {SHOW_STATE}", **registers
    )
    _assert_state_is_saved(guest)
    _assert_state_is_back(guest, found.r9, found.r10)
    faults(guest, "fxsave [rdi + 8]", GP, 0, **registers)


def enable_xsave(components: int) -> str:
    """Write *components* to XCR0, and leave the same in EDX:EAX."""
    return f"xor ecx, ecx; xor edx, edx; mov eax, {components:#x}; xsetbv; "


def _xsave(guest: Guest) -> None:
    registers = _state_operands(guest)
    faults(guest, "xgetbv", UD)
    shown = f"mov eax, {LEAF_FEATURES}; cpuid"
    assert not completed(guest, shown).rcx >> 27 & 1
    guest.cr4 |= CR4_OSXSAVE
    assert completed(guest, shown).rcx >> 27 & 1
    found = completed(guest, "xor ecx, ecx; xgetbv", cpl=3)
    assert (found.rax, found.rdx) == (X87, 0)
    found = completed(
        guest,
        f"{enable_xsave(X87 | SSE)} {LOAD_STATE} xsave [rdi]; {LOSE_STATE} xrstor [rdi]; {SHOW_STATE}",
        **registers,
    )
    _assert_state_is_saved(guest)
    assert _in_area(guest, XSTATE_BV, 24) == integers("3Q", X87 | SSE, 0, 0)
    _assert_state_is_back(guest, found.r9, found.r10)


def _xsave_components(guest: Guest) -> None:
    """The instruction mask chooses; a component that is marked as initial is not read, but initialized."""
    guest.cr4 |= CR4_OSXSAVE
    registers = _state_operands(guest)
    enable = enable_xsave(X87 | SSE)
    completed(guest, f"{enable} {LOAD_STATE} mov eax, {SSE}; xsave [rdi]", **registers)
    assert _in_area(guest, ST0, 10) == bytes(10)
    assert _in_area(guest, XMM0, 8) == integers("Q", registers["r8"])
    found = completed(
        guest,
        f"{enable} {LOAD_STATE} mov qword [rdi + {XSTATE_BV}], 0; xrstor [rdi]; movq r9, xmm0",
        **registers,
    )
    assert found.r9 == 0
    for offset, value in ((XSTATE_BV, AVX), (XCOMP_BV, 1), (XCOMP_BV + 8, 1)):
        faults(guest, f"{enable} mov qword [rdi + {offset}], {value}; fault: xrstor [rdi]", GP, 0,
               **_state_operands(guest))  # fmt: skip
    faults(guest, f"{enable} fault: xsave [rdi + 32]", GP, 0, **registers)


def _xsave_protection_keys(guest: Guest) -> None:
    guest.cr4 |= CR4_OSXSAVE | CR4_PKE
    registers = _state_operands(guest)
    found = completed(
        guest,
        f"{enable_xsave(X87 | SSE | PKRU)} mov eax, 0x5554; wrpkru; mov eax, {PKRU}; xsave [rdi]; "
        f"xor eax, eax; wrpkru; mov eax, {PKRU}; xrstor [rdi]; rdpkru",
        **registers,
    )
    assert _in_area(guest, PKRU_OFFSET, 4) == integers("I", 0x5554)
    assert found.rax == 0x5554


def _xsetbv(guest: Guest) -> None:
    guest.cr4 |= CR4_OSXSAVE
    found = completed(guest, f"{enable_xsave(X87 | SSE)} xor eax, eax; xgetbv")
    assert (found.rax, found.rdx) == (X87 | SSE, 0)
    faults(guest, "xsetbv", GP, 0, cpl=3, rax=X87, rcx=0, rdx=0)
    for rax, rcx, rdx in ((0, 0, 0), (SSE, 0, 0), (X87 | SSE | AVX, 0, 0), (X87, 1, 0), (X87, 0, 1)):
        faults(guest, "xsetbv", GP, 0, rax=rax, rcx=rcx, rdx=rdx)


def _no_xsave(guest: Guest) -> None:
    refuses_cr4(CR4_OSXSAVE)(guest)
    is_undefined("xgetbv", "xsetbv", "xsave [rbx]", "xrstor [rbx]", registers={"rcx": 0, "rax": 1, "rdx": 0})(
        guest
    )


def _xsaveopt(guest: Guest) -> None:
    """What is not initial, and was not restored from this area, is written."""
    guest.cr4 |= CR4_OSXSAVE
    registers = _state_operands(guest)
    completed(guest, f"{enable_xsave(X87 | SSE)} {LOAD_STATE} xsaveopt [rdi]", **registers)
    _assert_state_is_saved(guest)
    assert _in_area(guest, XSTATE_BV, 24) == integers("3Q", X87 | SSE, 0, 0)
    # What has been restored from it and changed since is written, too.
    completed(
        guest, f"{enable_xsave(X87 | SSE)} xrstor [rdi]; mov r8d, 77; movq xmm0, r8; xsaveopt [rdi]",
        rdi=HIGH_SUPERVISOR,
    )  # fmt: skip
    assert _in_area(guest, XMM0, 8) == integers("Q", 77)
    assert _in_area(guest, ST0, 10) == THIRD


def _no_xsaveopt(guest: Guest) -> None:
    guest.cr4 |= CR4_OSXSAVE
    is_undefined(f"{enable_xsave(X87 | SSE)} fault: xsaveopt [rbx]")(guest)


def _xgetbv1(guest: Guest) -> None:
    """XGETBV of 1: the components of XCR0 that are not in their initial state."""
    guest.cr4 |= CR4_OSXSAVE
    registers = _state_operands(guest)
    source = f"{LOAD_STATE} mov ecx, 1; xgetbv"
    found = completed(guest, f"{enable_xsave(X87 | SSE)} {source}", **registers)
    assert (found.rax, found.rdx) == (X87 | SSE, 0)
    found = completed(guest, f"{enable_xsave(X87)} {source}", **registers)
    assert (found.rax, found.rdx) == (X87, 0)
    # XRSTOR initializes what the header does not mark.
    initialize = f"mov dword [rdi + {MXCSR_OFFSET}], 0x1F80; xrstor [rdi]; "
    for spoil, in_use in (("nop", 0), ("fld1", X87), ("movq xmm9, rdi", SSE)):
        source = f"{enable_xsave(X87 | SSE)} {LOAD_STATE} {initialize} {spoil}; mov ecx, 1; xgetbv"
        assert completed(guest, source, **_state_operands(guest)).rax == in_use
    faults(guest, "xgetbv", GP, 0, rcx=2)


def _no_xgetbv1(guest: Guest) -> None:
    guest.cr4 |= CR4_OSXSAVE
    completed(guest, "xgetbv", rcx=0)
    faults(guest, "xgetbv", GP, 0, rcx=1)


PROBES = {
    "fxsr": Probe(_fxsr, is_undefined("fxsave [rbx]", "fxrstor [rbx]")),
    "xsave": Probe(all_of(_xsave, _xsave_components, _xsave_protection_keys, _xsetbv), _no_xsave),
    "xsaveopt": Probe(_xsaveopt, _no_xsaveopt),
    "xgetbv1": Probe(_xgetbv1, _no_xgetbv1),
}
