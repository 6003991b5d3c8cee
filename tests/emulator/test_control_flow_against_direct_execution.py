"""Near branches, stack and string instructions, by direct execution and by the emulator: both end up the same."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from both_paths import Result, run_on_both_paths

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import KERNEL_STACK_TOP
from lasskvm.x86.exceptions import GP
from lasskvm.x86.registers import RFLAGS_AC, RFLAGS_DF

NOT_CANONICAL = 1 << 47
VALUE = 0x8877_6655_4433_2211


@pytest.fixture(scope="module")
def whole_guest() -> Guest:
    """A guest with both ways to execute."""
    return Guest()


# --------------------------------------------------------------------------------------------------- branches

BRANCHES = {
    "loop over calls": "mov rcx, 3; again: call sub; loop again; jrcxz out; nop; sub: inc rax; ret; out: nop",
    "conditions": "cmp rax, rbx; jl less; jo less; or dl, 1; less: ja above; or dl, 2; above: jp end; inc dl; end: nop",
    "loope": "again: cmp rax, rcx; loopne again; loope out; nop; out: nop",
    "16-bit immediate": "push 1; push 2; call sub; jmp out; sub: ret 16; out: nop",
    "jump to a hole": "jmp rbx",
    "ret to a hole": "push rbx; ret",
    "kernel stack": "mov rsp, rdi; call out; out: nop",
}


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("name", BRANCHES)
def test_branches_lead_where_they_do_in_direct_execution(whole_guest: Guest, name: str, cpl: int) -> None:
    direct, emulated = run_on_both_paths(
        whole_guest,
        BRANCHES[name],
        cpl=cpl,
        rax=5,
        rbx=0x8000_0000_0000,
        rcx=9,
        rdi=KERNEL_STACK_TOP,
    )
    assert emulated == direct


def test_call_into_the_canonical_hole_faults_as_in_direct_execution(whole_guest: Guest) -> None:
    """What is below the stack pointer may differ: direct execution has pushed before it finds out."""
    direct, emulated = run_on_both_paths(whole_guest, "call rbx", rbx=NOT_CANONICAL)
    assert replace(emulated, memory="") == replace(direct, memory="")
    assert direct.event == str(GP)


@pytest.mark.parametrize("name", ["loop over calls", "16-bit immediate"])
def test_branches_of_compatibility_mode_lead_where_they_do_in_direct_execution(
    whole_guest: Guest, name: str
) -> None:
    source = BRANCHES[name].replace("rcx", "ecx").replace("rax", "eax").replace("jrcxz", "jecxz")
    direct, emulated = run_on_both_paths(whole_guest, source.replace("16", "8"), cpl=3, bits=32)
    assert emulated == direct


# ------------------------------------------------------------------------------------------------------ stack

STACK64 = {
    "registers": "push rax; push bx; pop cx; pop rdx; push rsp; pop r8",
    "memory": "mov rbp, rsp; push qword [rbp + 8]; pop qword [rsp + 16]; push word [rbp + 2]; pop word [rbp - 32]",
    "immediates": "push -5; push 0x12345678; pop rax; pop rbx",
    "flags": "pushfq; pop rax; or rax, 0x4cd5; push rax; popfq; pushfq; pop rbx; push 2; popfq",
    "frames": "enter 32, 0; enter 16, 1; enter 16, 2; enter 8, 4; leave; leave",
    "supervisor stack": "mov rsp, rdi; push rax",
    "absent stack": "mov rsp, rsi; enter 16, 3",
    "frame in a hole": "mov rbp, rbx; leave",
}
STACK32 = {
    "all": "pushad; popad; pushaw; popaw",
    "registers": "push eax; push bx; pop cx; pop edx; push esp; pop edi",
    "frames": "enter 32, 0; enter 16, 1; enter 16, 2; enter 8, 4; leave; leave",
    "flags": "pushfd; pop eax; or eax, 0x244cd5; push eax; popfd; pushfd; pop ebx; push 2; popfd",
}


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("name", STACK64)
def test_stack_ends_up_as_in_direct_execution(whole_guest: Guest, name: str, cpl: int) -> None:
    direct, emulated = run_on_both_paths(
        whole_guest,
        STACK64[name],
        cpl=cpl,
        rax=VALUE,
        rbx=0x8000_0000_0000,
        rcx=3,
        rdi=0xFFFF_8000_0003_2000,
        rsi=0x700010,
    )
    assert emulated == direct


@pytest.mark.parametrize("name", STACK32)
def test_stack_of_compatibility_mode_ends_up_as_in_direct_execution(whole_guest: Guest, name: str) -> None:
    direct, emulated = run_on_both_paths(
        whole_guest, STACK32[name], cpl=3, bits=32, rax=0x44332211, rbx=0x12345678
    )
    assert emulated == direct


# ---------------------------------------------------------------------------------------------------- strings

#: Places near the ends of pages: of each kind that there is, and in the canonical hole.
PLACES = (
    *(page + offset for page in (layout.LOW_USER, layout.HIGH_SUPERVISOR) for offset in (0, 0xFF0, 0x1FE0)),
    layout.LOW_SUPERVISOR, layout.LOW_ABSENT, layout.LOW_ABSENT - 0x20, layout.HIGH_USER, layout.HIGH_ABSENT,
    0x7FFF_FFFF_FFF0,
)  # fmt: skip


COMPARISONS = ("cmps", "scas")


@pytest.mark.parametrize("seed", range(80))
def test_repetition_ends_up_as_in_direct_execution(whole_guest: Guest, seed: int) -> None:
    """Two liberties of direct execution are left out: it loads the second operand of CMPS first, which shows where
    neither can be loaded, and keeps the flags of the last element when a repeated comparison faults.
    """
    rng = random.Random(seed)
    name = rng.choice(("movs", "stos", "lods", *COMPARISONS))
    cpl = rng.choice((0, 3))
    source, destination = rng.choice(PLACES), rng.choice(PLACES)
    if name == "cmps":
        source = layout.LOW_USER if cpl == 3 else layout.HIGH_SUPERVISOR
    prefixes = ("", "rep ", "repne ") if name in COMPARISONS else ("", "rep ")
    direct, emulated = run_on_both_paths(
        whole_guest,
        rng.choice(prefixes) + name + rng.choice("bwdq"),
        cpl=cpl,
        rflags=rng.choice((0, RFLAGS_DF)) | rng.choice((0, RFLAGS_AC)),
        rax=rng.choice((0, rng.getrandbits(64))),
        rcx=rng.choice((0, 1, 5, 9, 40, 600)),
        rsi=source + rng.randrange(0x18),
        rdi=destination + rng.randrange(0x18),
    )
    if name in COMPARISONS and direct.event != str(layout.DONE_VECTOR):
        direct, emulated = _without_flags(direct), _without_flags(emulated)
    assert emulated == direct


def _without_flags(result: Result) -> Result:
    """Memory has them too, in the frame of the fault."""
    return replace(result, rflags=0, registers=replace(result.registers, rflags=0), memory="")


@pytest.mark.parametrize("seed", range(20))
def test_repetition_of_compatibility_mode_ends_up_as_in_direct_execution(
    whole_guest: Guest, seed: int
) -> None:
    rng = random.Random(seed)
    name = rng.choice(("movs", "stos", "lods")) + rng.choice("bwd")
    direct, emulated = run_on_both_paths(
        whole_guest,
        rng.choice(("", "rep ")) + name,
        cpl=3,
        bits=32,
        rflags=rng.choice((0, RFLAGS_DF)),
        rax=rng.getrandbits(32),
        rcx=rng.choice((0, 1, 9, 600)),
        rsi=layout.LOW_USER + rng.choice((0, 0xFF0, 0x1FF0)) + rng.randrange(0x10),
        rdi=layout.LOW_USER + rng.choice((0, 0x10, 0x800, 0x1FF0)) + rng.randrange(0x10),
    )
    assert emulated == direct
