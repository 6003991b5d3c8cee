"""SYSCALL, SYSRET, SYSENTER, SYSEXIT, and IRET to user and compatibility mode."""

from __future__ import annotations

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import (
    KERNEL_CODE,
    KERNEL_CS,
    KERNEL_SS,
    KERNEL_STACK_TOP,
    LOW_USER,
    USER_CODE,
    USER_CS,
    USER_CS32,
    USER_SS,
    USER_STACK_TOP,
)
from lasskvm.x86.exceptions import GP, PF, PF_P, PF_U, PF_W, SS, UD
from lasskvm.x86.msr import (
    MSR_IA32_LSTAR,
    MSR_IA32_SFMASK,
    MSR_IA32_STAR,
    MSR_IA32_SYSENTER_CS,
    MSR_IA32_SYSENTER_EIP,
    MSR_IA32_SYSENTER_ESP,
)
from lasskvm.x86.registers import CR4_LASS, EFER_SCE, RFLAGS_AC, RFLAGS_FIXED, RFLAGS_IF

HANDLER = KERNEL_CODE + 0x1000
NOT_CANONICAL = 1 << 47
STAR = KERNEL_CS << 32 | layout.USER_CS32 << 48


@pytest.fixture(autouse=True)
def entry_points(guest: Guest) -> None:
    guest.msrs = {
        MSR_IA32_STAR: STAR, MSR_IA32_LSTAR: HANDLER, MSR_IA32_SFMASK: RFLAGS_IF | RFLAGS_AC,
        MSR_IA32_SYSENTER_CS: KERNEL_CS, MSR_IA32_SYSENTER_EIP: HANDLER, MSR_IA32_SYSENTER_ESP: KERNEL_STACK_TOP - 0x80,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------- SYSCALL, SYSRET


@pytest.mark.parametrize(
    ("source", "length"), [("syscall", 2), ("db 0x48, 0x0f, 0x05", 3), ("db 0x66, 0x48, 0x0f, 0x05", 4)]
)
@pytest.mark.parametrize("cpl", [0, 3])
def test_syscall(guest: Guest, source: str, length: int, cpl: int) -> None:
    guest.place(assemble("hlt", HANDLER))
    outcome = guest.execute(source, cpl=cpl, rflags=RFLAGS_IF | RFLAGS_AC)
    sregs = guest.vcpu.get_sregs()
    assert outcome.rip == HANDLER + 1
    assert outcome.registers.rcx == (USER_CODE if cpl == 3 else KERNEL_CODE) + length
    assert outcome.registers.r11 == RFLAGS_FIXED | RFLAGS_IF | RFLAGS_AC
    assert outcome.registers.rflags == RFLAGS_FIXED
    assert (sregs.cs.selector, sregs.ss.selector) == (KERNEL_CS, KERNEL_SS)
    assert outcome.registers.rsp == (USER_STACK_TOP if cpl == 3 else KERNEL_STACK_TOP)


def test_syscall_without_sce_is_undefined(guest: Guest) -> None:
    guest.efer &= ~EFER_SCE
    outcome = guest.execute("fault: syscall", cpl=3)
    assert (outcome.vector, outcome.label) == (UD, "fault")


def test_syscall_in_compatibility_mode_is_undefined(guest: Guest) -> None:
    outcome = guest.execute("fault: db 0x0f, 0x05", cpl=3, bits=32)
    assert (outcome.vector, outcome.label) == (UD, "fault")


def test_syscall_to_a_low_entry_point_faults_there(guest: Guest) -> None:
    """IA32_LSTAR may hold any canonical address; the fetch at a low one violates LASS."""
    guest.msrs[MSR_IA32_LSTAR] = LOW_USER
    outcome = guest.execute("syscall", cpl=3)
    assert (outcome.vector, outcome.error_code, outcome.rip) == (GP, 0, LOW_USER)
    assert outcome.cs == KERNEL_CS


def test_syscall_and_sysret_there_and_back(guest: Guest) -> None:
    guest.place(assemble("inc r8; sysretq", HANDLER))
    outcome = guest.execute("syscall; after: syscall; stc", cpl=3, rflags=RFLAGS_IF)
    assert outcome.completed
    assert outcome.registers.r8 == 2
    assert (outcome.cs, outcome.ss) == (USER_CS, USER_SS)
    assert outcome.rflags & RFLAGS_IF


def test_sysret_to_compatibility_mode(guest: Guest) -> None:
    guest.write(LOW_USER, assemble("mov eax, 0x12345678; int 0x80", LOW_USER, 32).code)
    outcome = guest.execute("db 0x0f, 0x07", rcx=LOW_USER | 0xABCD << 32, r11=RFLAGS_FIXED)
    assert outcome.completed
    assert (outcome.cs, outcome.ss) == (USER_CS32, USER_SS)
    assert outcome.registers.rax == 0x12345678


def test_sysret_to_an_address_that_is_not_canonical_faults_in_the_kernel(guest: Guest) -> None:
    outcome = guest.execute("fault: sysretq", rcx=NOT_CANONICAL, r11=RFLAGS_FIXED)
    assert (outcome.vector, outcome.error_code, outcome.label, outcome.cs) == (GP, 0, "fault", KERNEL_CS)


def test_sysret_to_an_upper_half_address_faults_in_user_mode(guest: Guest) -> None:
    outcome = guest.execute("sysretq", rcx=layout.HIGH_USER, r11=RFLAGS_FIXED)
    assert (outcome.vector, outcome.error_code, outcome.rip, outcome.cs) == (GP, 0, layout.HIGH_USER, USER_CS)


@pytest.mark.parametrize("source", ["sysretq", "sysexitq"])
def test_return_instructions_are_privileged(guest: Guest, source: str) -> None:
    outcome = guest.execute(f"fault: {source}", cpl=3, rcx=USER_CODE, rdx=USER_CODE)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_sysret_without_sce_is_undefined(guest: Guest) -> None:
    guest.efer &= ~EFER_SCE
    outcome = guest.execute("fault: sysretq", rcx=USER_CODE)
    assert (outcome.vector, outcome.label) == (UD, "fault")


# ------------------------------------------------------------------------------------------- SYSENTER, SYSEXIT


@pytest.mark.parametrize("bits", [32, 64])
def test_sysenter(guest: Guest, bits: int) -> None:
    guest.place(assemble("hlt", HANDLER))
    outcome = guest.execute("sysenter", cpl=3, bits=bits, rflags=RFLAGS_IF)
    sregs = guest.vcpu.get_sregs()
    assert outcome.rip == HANDLER + 1
    assert outcome.registers.rsp == KERNEL_STACK_TOP - 0x80
    assert outcome.registers.rflags == RFLAGS_FIXED
    assert (sregs.cs.selector, sregs.ss.selector) == (KERNEL_CS, KERNEL_SS)


@pytest.mark.parametrize("selector", [0, 3])
def test_sysenter_with_a_null_selector_is_gp(guest: Guest, selector: int) -> None:
    guest.msrs[MSR_IA32_SYSENTER_CS] = selector
    outcome = guest.execute("fault: sysenter", cpl=3)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_sysexit_to_64_bit_mode(guest: Guest) -> None:
    guest.write(LOW_USER, assemble("int 0x80", LOW_USER).code)
    outcome = guest.execute("sysexitq", rdx=LOW_USER, rcx=USER_STACK_TOP - 0x40)
    assert outcome.completed
    assert (outcome.cs, outcome.ss, outcome.rsp) == (USER_CS, USER_CS + 8, USER_STACK_TOP - 0x40)


def test_sysexit_to_compatibility_mode(guest: Guest) -> None:
    guest.write(LOW_USER, assemble("int 0x80", LOW_USER, 32).code)
    outcome = guest.execute("db 0x0f, 0x35", rdx=LOW_USER | 1 << 40, rcx=USER_STACK_TOP | 1 << 40)
    assert outcome.completed
    assert (outcome.cs, outcome.ss, outcome.rsp) == (USER_CS32, USER_SS, USER_STACK_TOP)


@pytest.mark.parametrize("register", ["rcx", "rdx"])
def test_sysexit_to_an_address_that_is_not_canonical_is_gp(guest: Guest, register: str) -> None:
    outcome = guest.execute(
        "fault: sysexitq", **({"rcx": USER_STACK_TOP, "rdx": LOW_USER} | {register: NOT_CANONICAL})
    )
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


# --------------------------------------------------------------------------------------------------------- IRET

IRETQ = "push r12; push r13; push r14; push r15; push rbx; fault: iretq"


def iret_frame(rip: int, cs: int, rsp: int, ss: int, rflags: int = RFLAGS_FIXED) -> dict[str, int]:
    return {"rbx": rip, "r15": cs, "r14": rflags, "r13": rsp, "r12": ss}


def test_iret_to_user_mode(guest: Guest) -> None:
    guest.write(LOW_USER, assemble("int 0x80", LOW_USER).code)
    outcome = guest.execute(
        IRETQ, **iret_frame(LOW_USER, USER_CS, USER_STACK_TOP - 8, USER_SS, RFLAGS_IF | 2)
    )
    assert outcome.completed
    assert (outcome.cs, outcome.ss, outcome.rsp) == (USER_CS, USER_SS, USER_STACK_TOP - 8)
    assert outcome.rflags & RFLAGS_IF


def test_iret_to_compatibility_mode(guest: Guest) -> None:
    guest.write(LOW_USER, assemble("push eax; pop ecx; mov edx, esp; int 0x80", LOW_USER, 32).code)
    outcome = guest.execute(IRETQ, rax=0xDEADBEEF, **iret_frame(LOW_USER, USER_CS32, USER_STACK_TOP, USER_SS))
    assert outcome.completed
    assert outcome.cs == USER_CS32
    assert (outcome.registers.rcx, outcome.registers.rdx) == (0xDEADBEEF, USER_STACK_TOP)


def test_iret_to_the_same_level_restores_the_stack(guest: Guest) -> None:
    outcome = guest.execute(
        IRETQ.replace("push rbx", "lea rbx, [rip + back]; push rbx") + "; back: nop",
        **iret_frame(0, KERNEL_CS, KERNEL_STACK_TOP - 0x77, KERNEL_SS),
    )  # fmt: skip
    assert outcome.completed
    assert outcome.rsp == KERNEL_STACK_TOP - 0x77


def test_iret_to_an_upper_half_address_in_user_mode_faults_there(guest: Guest) -> None:
    outcome = guest.execute(IRETQ, **iret_frame(layout.HIGH_USER, USER_CS, USER_STACK_TOP, USER_SS))
    assert (outcome.vector, outcome.error_code, outcome.rip, outcome.cs) == (GP, 0, layout.HIGH_USER, USER_CS)


def test_iret_to_a_low_kernel_address_faults_there(guest: Guest) -> None:
    outcome = guest.execute(
        IRETQ, **iret_frame(LOW_USER, KERNEL_CS, KERNEL_STACK_TOP, KERNEL_SS, RFLAGS_AC | 2)
    )
    assert (outcome.vector, outcome.error_code, outcome.rip, outcome.cs) == (GP, 0, LOW_USER, KERNEL_CS)


@pytest.mark.xfail(strict=True, reason="IRET to a non-canonical RIP completes and faults at its target")
@pytest.mark.parametrize("user", [False, True])
def test_iret_to_an_address_that_is_not_canonical_faults_itself(guest: Guest, user: bool) -> None:
    frame = (
        iret_frame(NOT_CANONICAL, USER_CS, USER_STACK_TOP, USER_SS)
        if user
        else iret_frame(NOT_CANONICAL, KERNEL_CS, KERNEL_STACK_TOP, KERNEL_SS)
    )
    outcome = guest.execute(IRETQ, **frame)
    assert (outcome.vector, outcome.error_code, outcome.label, outcome.cs) == (GP, 0, "fault", KERNEL_CS)


@pytest.mark.parametrize(
    ("cs", "ss", "error_code"),
    [(0x100, USER_SS, 0x100), (USER_SS, USER_SS, 0x20), (0, USER_SS, 0), (USER_CS, 0x103, 0x100)],
)
def test_iret_with_a_bad_selector_is_gp_at_the_iret(guest: Guest, cs: int, ss: int, error_code: int) -> None:
    outcome = guest.execute(IRETQ, **iret_frame(LOW_USER, cs, USER_STACK_TOP, ss))
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, error_code, "fault")


def test_iret_from_a_stack_that_lass_forbids_is_ss(guest: Guest) -> None:
    outcome = guest.execute("mov rsp, rbx; fault: iretq", rbx=LOW_USER)
    assert (outcome.vector, outcome.error_code, outcome.label) == (SS, 0, "fault")
    assert outcome.rsp == LOW_USER


@pytest.mark.parametrize("source", ["retfq", "iretq", "call tbyte [rsi]"])
@pytest.mark.parametrize("lass", [False, True])
def test_far_transfer_in_user_mode_may_not_use_the_kernels_memory_as_stack(
    guest: Guest, source: str, lass: bool
) -> None:
    """Even if the kernel has used the page just before, so that its translation is at hand."""
    guest.cr4 = guest.cr4 & ~CR4_LASS | CR4_LASS * lass
    guest.write(LOW_USER, assemble(source, LOW_USER).code)
    guest.write(LOW_USER + 0x100, USER_CODE.to_bytes(8, "little") + USER_CS.to_bytes(2, "little"))
    stack = layout.HIGH_SUPERVISOR + 0x800
    outcome = guest.execute(
        f"mov [r9 - 8], r9; mov rax, [r9]; {IRETQ}",
        r9=stack, rsi=LOW_USER + 0x100, **iret_frame(LOW_USER, USER_CS, stack, USER_SS),
    )  # fmt: skip
    assert (outcome.rip, outcome.rsp) == (LOW_USER, stack)
    if lass:
        assert (outcome.vector, outcome.error_code) == (SS, 0)
    else:
        assert outcome.vector == PF
        assert outcome.error_code == PF_P | PF_U | (PF_W if "call" in source else 0)
        assert outcome.cr2 == (stack - 8 if "call" in source else stack)
