"""Single-stepping, breakpoints, and the debug registers themselves."""

from __future__ import annotations

from itertools import accumulate

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, KERNEL_CODE, LOW_USER
from lasskvm.kvm import IoExit
from lasskvm.state import DR6
from lasskvm.x86.exceptions import DB, GP, PF, UD
from lasskvm.x86.msr import MSR_IA32_LSTAR, MSR_IA32_SFMASK, MSR_IA32_STAR
from lasskvm.x86.registers import (
    CR4_DE,
    DR6_B0,
    DR6_BD,
    DR6_BS,
    DR6_FIXED,
    DR7_GD,
    RFLAGS_RF,
    RFLAGS_TF,
)

HANDLER = KERNEL_CODE + 0x1000
WATCHED = HIGH_SUPERVISOR + 0x100
#: DR7: breakpoint 0 enabled, and its type and length fields.
ENABLE_0 = 1 << 1
EXECUTE, ON_WRITE, ON_IO, ON_ACCESS = (kind << 16 for kind in range(4))
BYTES_1, BYTES_2, BYTES_8, BYTES_4 = (length << 18 for length in range(4))


def dr6(guest: Guest) -> int:
    """What DR6 says, without its fixed bits."""
    return guest.vcpu.state.words[DR6] & ~DR6_FIXED


def breakpoint_program(address: str, dr7: int, source: str) -> str:
    return f"mov rax, {address}; mov dr0, rax; mov eax, {dr7:#x}; mov dr7, rax; {source}"


def trace(guest: Guest, source: str, *, cpl: int = 0, **registers: int) -> list[int]:
    """Run *source* with TF set: how far into it each single-step trap came, in bytes."""
    traps = layout.DATA_GPA + 0xC000 + 0x800
    guest.place(assemble("push rax; mov rax, [rsp + 8]; mov [r15], rax; add r15, 8; pop rax; iretq", HANDLER))
    layout.set_gate(guest.memory, DB, HANDLER, ist=layout.IST)
    base = HIGH_SUPERVISOR + 0x800
    outcome = guest.execute(source, cpl=cpl, rflags=RFLAGS_TF, r15=base, **registers)
    assert outcome.completed, str(outcome)
    count = (outcome.registers.r15 - base) // 8
    return [guest.memory.load(traps + 8 * number, 8) - outcome.program.address for number in range(count)]


@pytest.mark.parametrize("cpl", [0, 3])
def test_single_step_traps_behind_every_instruction(guest: Guest, cpl: int) -> None:
    assert trace(guest, "nop; nop; mov ecx, 5; nop", cpl=cpl) == [1, 2, 7, 8]


@pytest.mark.parametrize(
    "source",
    [
        "db 0x0f, 0xa2",  # CPUID
        "mov rdx, cr4",
        "mov cr0, rbx",
        "mov rdx, dr6",
        "mov dr6, rdx",
        "rdmsr",
        "wrmsr",
        "invlpg [rsp]",
        "clflush [rsp]",
        "sgdt [rsp - 0x20]",
        "wbinvd",
        "rdtsc",
        "mov edx, 0x5c0; out dx, al",
        "lldt si",
    ],
)
def test_single_step_traps_behind_instructions_that_exit(guest: Guest, source: str) -> None:
    lengths = [len(assemble(statement, 0).code) for statement in f"{source}; nop".split("; ")]
    assert trace(guest, f"{source}; nop", rcx=0xC0000102, rbx=guest.cr0) == list(accumulate(lengths))


def test_single_step_trap_sets_bs_and_ends_tf_in_the_handler(guest: Guest) -> None:
    outcome = guest.execute("nop; after: nop", rflags=RFLAGS_TF)
    assert (outcome.vector, outcome.label) == (DB, "after")
    assert dr6(guest) == DR6_BS
    assert outcome.rflags & RFLAGS_TF
    assert not outcome.registers.rflags & RFLAGS_TF


def test_popf_that_sets_tf_traps_behind_the_next_instruction(guest: Guest) -> None:
    outcome = guest.execute("pushfq; bts qword [rsp], 8; popfq; nop; after: nop")
    assert (outcome.vector, outcome.label) == (DB, "after")


def test_taken_branch_is_stepped_to_its_target(guest: Guest) -> None:
    outcome = guest.execute("jmp target; hlt; target: nop", rflags=RFLAGS_TF)
    assert (outcome.vector, outcome.label) == (DB, "target")


def test_repeated_string_instruction_is_stepped_for_each_iteration(guest: Guest) -> None:
    assert trace(guest, "rep stosb; nop", rcx=3, rdi=HIGH_SUPERVISOR) == [0, 0, 2, 3]


def test_mov_ss_holds_back_the_single_step_trap(guest: Guest) -> None:
    outcome = guest.execute("mov ss, ebx; nop; after: nop", rflags=RFLAGS_TF, rbx=layout.KERNEL_SS)
    assert (outcome.vector, outcome.label) == (DB, "after")


def test_software_interrupt_is_not_stepped(guest: Guest) -> None:
    """Delivery clears TF before a trap could come."""
    outcome = guest.execute("int3", cpl=3, rflags=RFLAGS_TF)
    assert outcome.vector == 3


def test_faulting_instruction_is_not_stepped(guest: Guest) -> None:
    outcome = guest.execute("fault: mov rax, [rbx]", rflags=RFLAGS_TF, rbx=layout.HIGH_ABSENT)
    assert (outcome.vector, outcome.label) == (PF, "fault")


@pytest.mark.parametrize("masked", [False, True])
def test_syscall_is_stepped_unless_sfmask_clears_tf(guest: Guest, masked: bool) -> None:
    guest.place(assemble("nop; hlt", HANDLER))
    guest.msrs = {
        MSR_IA32_STAR: layout.KERNEL_CS << 32 | layout.USER_CS32 << 48, MSR_IA32_LSTAR: HANDLER,
        MSR_IA32_SFMASK: RFLAGS_TF if masked else 0,
    }  # fmt: skip
    outcome = guest.execute("syscall", cpl=3, rflags=RFLAGS_TF)
    if masked:
        assert outcome.rip == HANDLER + 2
    else:
        assert (outcome.vector, outcome.rip) == (DB, HANDLER)


# -------------------------------------------------------------------------------------------------- breakpoints


def test_instruction_breakpoint_comes_before_its_instruction(guest: Guest) -> None:
    outcome = guest.execute(breakpoint_program("here", ENABLE_0 | EXECUTE, "nop; here: inc rcx"))
    assert (outcome.vector, outcome.label, outcome.registers.rcx) == (DB, "here", 0)
    assert dr6(guest) == DR6_B0


def test_instruction_breakpoint_is_seen_by_code_that_was_translated_before(guest: Guest) -> None:
    function = "jmp start; here: inc rcx; ret; start: call here; "
    outcome = guest.execute(function + breakpoint_program("here", ENABLE_0 | EXECUTE, "call here"))
    assert (outcome.vector, outcome.label, outcome.registers.rcx) == (DB, "here", 1)


@pytest.mark.xfail(strict=True, reason="RF that IRET sets survives until the next block")
def test_rf_lets_the_instruction_run(guest: Guest) -> None:
    guest.place(assemble("inc r8; or qword [rsp + 16], 0x10000; iretq", HANDLER))
    layout.set_gate(guest.memory, DB, HANDLER, ist=layout.IST)
    outcome = guest.execute(
        breakpoint_program("here", ENABLE_0 | EXECUTE, "here: inc rcx; cmp ecx, 3; jne here")
    )
    assert outcome.completed
    assert (outcome.registers.r8, outcome.registers.rcx) == (3, 3)


def test_instruction_breakpoint_does_not_set_rf_in_its_frame(guest: Guest) -> None:
    outcome = guest.execute(breakpoint_program("here", ENABLE_0 | EXECUTE, "here: nop"))
    assert not outcome.rflags & RFLAGS_RF


@pytest.mark.parametrize(
    "source", ["mov [rbx], rcx", "add [rbx], rcx", "mov rcx, 1; stosq", "push rcx", "fstp qword [rbx]"]
)
def test_write_breakpoint_traps_behind_the_write(guest: Guest, source: str) -> None:
    *_, last = source.split("; ")
    registers = {"rbx": WATCHED, "rdi": WATCHED}
    if last == "push rcx":
        registers["rsp"] = WATCHED + 8
    outcome = guest.execute(
        breakpoint_program(hex(WATCHED), ENABLE_0 | ON_WRITE | BYTES_8, f"{source}; after: nop"), **registers
    )
    assert (outcome.vector, outcome.label) == (DB, "after")
    assert dr6(guest) == DR6_B0


def test_write_breakpoint_ignores_reads(guest: Guest) -> None:
    assert guest.execute(
        breakpoint_program(hex(WATCHED), ENABLE_0 | ON_WRITE | BYTES_8, "mov rcx, [rbx]"), rbx=WATCHED
    ).completed


@pytest.mark.parametrize("source", ["mov rcx, [rbx]", "mov [rbx], rcx", "cmp byte [rbx + 3], 0"])
def test_access_breakpoint_traps_behind_reads_and_writes(guest: Guest, source: str) -> None:
    outcome = guest.execute(
        breakpoint_program(hex(WATCHED), ENABLE_0 | ON_ACCESS | BYTES_4, f"{source}; after: nop"), rbx=WATCHED
    )
    assert (outcome.vector, outcome.label) == (DB, "after")


@pytest.mark.parametrize(("length", "size"), [(BYTES_1, 1), (BYTES_2, 2), (BYTES_4, 4), (BYTES_8, 8)])
def test_data_breakpoint_covers_its_length(guest: Guest, length: int, size: int) -> None:
    program = breakpoint_program(hex(WATCHED), ENABLE_0 | ON_WRITE | length, "mov [rbx], cl; after: nop")
    assert guest.execute(program, rbx=WATCHED - 1).completed
    assert guest.execute(program, rbx=WATCHED + size).completed
    outcome = guest.execute(program, rbx=WATCHED + size - 1)
    assert (outcome.vector, outcome.label) == (DB, "after")


def test_data_breakpoint_in_user_mode(guest: Guest) -> None:
    guest.place(assemble(breakpoint_program(hex(LOW_USER), ENABLE_0 | ON_WRITE | BYTES_4, "iretq"), HANDLER))
    layout.set_gate(guest.memory, 3, HANDLER, dpl=3)
    outcome = guest.execute("int3; mov [rbx], ecx; after: nop", cpl=3, rbx=LOW_USER)
    assert (outcome.vector, outcome.label) == (DB, "after")


def test_watched_and_stepped_instruction_traps_once(guest: Guest) -> None:
    program = breakpoint_program(
        hex(WATCHED),
        ENABLE_0 | ON_WRITE | BYTES_8,
        "pushfq; bts qword [rsp], 8; popfq; mov [rbx], rcx; after: nop",
    )
    outcome = guest.execute(program, rbx=WATCHED)
    assert (outcome.vector, outcome.label) == (DB, "after")
    assert dr6(guest) == DR6_B0 | DR6_BS
    assert outcome.rflags & RFLAGS_TF


def test_watching_does_not_leave_tf_behind(guest: Guest) -> None:
    outcome = guest.execute(
        breakpoint_program(hex(WATCHED), ENABLE_0 | ON_WRITE | BYTES_8, "mov [rbx], rcx; after: nop"),
        rbx=WATCHED,
    )
    assert not outcome.rflags & RFLAGS_TF


def test_breakpoint_on_another_quadword_of_the_page_does_not_hit(guest: Guest) -> None:
    outcome = guest.execute(
        breakpoint_program(hex(WATCHED), ENABLE_0 | ON_ACCESS | BYTES_8, "mov [rbx], rcx; mov rcx, [rbx + 16]"),
        rbx=WATCHED + 8,
    )  # fmt: skip
    assert outcome.completed


def test_io_breakpoint_traps_behind_the_port_access(guest: Guest) -> None:
    guest.cr4 |= CR4_DE
    outcome = guest.execute(
        breakpoint_program("0x5c0", ENABLE_0 | ON_IO, "mov edx, 0x5c0; out dx, al; after: nop")
    )
    assert (outcome.vector, outcome.label) == (DB, "after")
    assert dr6(guest) == DR6_B0


def test_io_breakpoint_traps_behind_a_port_access_that_the_vmm_answered(guest: Guest) -> None:
    guest.cr4 |= CR4_DE
    outcome = guest.execute(breakpoint_program("0x99", ENABLE_0 | ON_IO, "in al, 0x99; after: nop"))
    assert isinstance(outcome.exit, IoExit)
    outcome = guest.run()
    assert (outcome.vector, outcome.label) == (DB, "after")
    assert dr6(guest) == DR6_B0


def test_disabled_breakpoints_do_nothing(guest: Guest) -> None:
    assert guest.execute(breakpoint_program("here", EXECUTE, "here: nop")).completed
    assert guest.execute(breakpoint_program(hex(WATCHED), ON_ACCESS, "mov [rbx], rcx"), rbx=WATCHED).completed


# ---------------------------------------------------------------------------------------------- debug registers


@pytest.mark.parametrize("source", ["mov rcx, dr0", "mov dr0, rcx", "mov rcx, dr7", "mov dr6, rcx"])
def test_general_detect_comes_before_the_access_and_is_cleared(guest: Guest, source: str) -> None:
    outcome = guest.execute(f"mov eax, {DR7_GD | 0x400:#x}; mov dr7, rax; fault: {source}")
    assert (outcome.vector, outcome.label) == (DB, "fault")
    assert dr6(guest) == DR6_BD
    assert guest.execute("mov rax, dr7").completed


@pytest.mark.parametrize("number", [6, 7])
def test_upper_half_of_dr6_and_dr7_must_be_zero(guest: Guest, number: int) -> None:
    outcome = guest.execute(f"mov rax, 0x100000000; fault: mov dr{number}, rax")
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_dr4_is_dr6_unless_cr4_de_is_set(guest: Guest) -> None:
    assert guest.execute("mov rax, dr4").registers.rax == DR6_FIXED
    guest.cr4 |= CR4_DE
    outcome = guest.execute("fault: mov rax, dr4")
    assert (outcome.vector, outcome.label) == (UD, "fault")


def test_debug_registers_are_privileged(guest: Guest) -> None:
    outcome = guest.execute("fault: mov dr0, rax", cpl=3)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
