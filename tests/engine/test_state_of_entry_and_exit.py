"""What goes into direct execution and comes out of it: registers, flags, segment bases, time."""

from __future__ import annotations

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, KERNEL_CS
from lasskvm.kvm import IoExit
from lasskvm.x86.msr import MSR_IA32_FS_BASE, MSR_IA32_GS_BASE, MSR_IA32_KERNEL_GS_BASE
from lasskvm.x86.registers import RFLAGS_ARITHMETIC, RFLAGS_CF, RFLAGS_DF, RFLAGS_FIXED, RFLAGS_ZF

GENERAL = (
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rbp",
    "rsi",
    "rdi",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
)


def test_general_registers_go_in_and_come_out(guest: Guest) -> None:
    values = {name: 0x1111_2222_3333_0000 + number for number, name in enumerate(GENERAL)}
    increments = "; ".join(f"inc {name}" for name in GENERAL)
    registers = guest.execute(increments, **values).registers
    assert {name: getattr(registers, name) for name in GENERAL} == {
        name: value + 1 for name, value in values.items()
    }


@pytest.mark.parametrize("flags", [RFLAGS_CF, RFLAGS_ZF, RFLAGS_DF, RFLAGS_ARITHMETIC | RFLAGS_DF])
def test_flags_that_the_vmm_sets_reach_the_guest(guest: Guest, flags: int) -> None:
    outcome = guest.execute("pushfq; pop rax", rflags=flags)
    assert outcome.registers.rax == RFLAGS_FIXED | flags


@pytest.mark.parametrize(
    "source",
    ["mov rbx, cr4", "mov cr3, rdx", "cpuid", "rdmsr", "invlpg [rsp]", "clflush [rsp]", "out 0x99, al"],
)
def test_flags_survive_an_instruction_that_exits(guest: Guest, source: str) -> None:
    guest.start(
        f"cmp rax, rax; stc; std; {source}; pushfq; pop rsi",
        rax=7,
        rcx=MSR_IA32_GS_BASE,
        rdx=guest.tables.root,
    )
    outcome = guest.run()
    if isinstance(outcome.exit, IoExit):
        outcome = guest.run()
    wanted = RFLAGS_CF | RFLAGS_ZF | RFLAGS_DF
    assert outcome.registers.rsi & wanted == wanted


@pytest.mark.parametrize("source", ["stc", "clc; stc", "std", "xor eax, eax; stc; std"])
def test_flags_come_out_in_the_frame(guest: Guest, source: str) -> None:
    flags = guest.execute(f"{source}; ud2", cpl=3).rflags
    assert bool(flags & RFLAGS_CF) == ("stc" in source)
    assert bool(flags & RFLAGS_DF) == ("std" in source)


def test_iret_restores_arithmetic_flags_and_df(guest: Guest) -> None:
    guest.place(assemble("iretq", layout.KERNEL_CODE + 0x1000))
    layout.set_gate(guest.memory, 3, layout.KERNEL_CODE + 0x1000, dpl=3)
    outcome = guest.execute("stc; std; int3; pushfq; pop rax", cpl=3)
    assert outcome.registers.rax & (RFLAGS_CF | RFLAGS_DF) == RFLAGS_CF | RFLAGS_DF


def test_page_fault_handled_natively_keeps_flags(guest: Guest) -> None:
    handler = layout.KERNEL_CODE + 0x1000
    guest.place(assemble("add qword [rsp + 8], 3; add rsp, 8; iretq", handler))
    layout.set_gate(guest.memory, 14, handler, ist=layout.IST)
    outcome = guest.execute("stc; std; mov rcx, [rbx]; pushfq; pop rax", rbx=layout.HIGH_ABSENT)
    assert outcome.completed
    assert outcome.registers.rax & (RFLAGS_CF | RFLAGS_DF) == RFLAGS_CF | RFLAGS_DF


def test_fs_and_gs_bases(guest: Guest) -> None:
    guest.write(HIGH_SUPERVISOR + 0x18, (0x1234).to_bytes(8, "little"))
    guest.write(HIGH_SUPERVISOR + 0x108, (0x5678).to_bytes(8, "little"))
    guest.msrs = {
        MSR_IA32_FS_BASE: HIGH_SUPERVISOR + 0x10, MSR_IA32_GS_BASE: 0x55,
        MSR_IA32_KERNEL_GS_BASE: HIGH_SUPERVISOR + 0x100,
    }  # fmt: skip
    outcome = guest.execute("mov rax, fs:[8]; swapgs; mov rcx, gs:[8]")
    assert outcome.completed
    assert (outcome.registers.rax, outcome.registers.rcx) == (0x1234, 0x5678)
    assert guest.vcpu.get_msr(MSR_IA32_KERNEL_GS_BASE) == 0x55


def test_wrmsr_of_a_segment_base_takes_effect_at_once(guest: Guest) -> None:
    guest.write(HIGH_SUPERVISOR, (0x77).to_bytes(8, "little"))
    outcome = guest.execute(
        "wrmsr; mov rbx, gs:[0]",
        rcx=MSR_IA32_GS_BASE, rax=HIGH_SUPERVISOR & 0xFFFFFFFF, rdx=HIGH_SUPERVISOR >> 32,
    )  # fmt: skip
    assert outcome.registers.rbx == 0x77


def test_x87_and_sse_state_survives_exits(guest: Guest) -> None:
    outcome = guest.execute(
        "mov rax, 0x4045000000000000; movq xmm0, rax; fld1; mov rdx, cr8; "
        "movq rdi, xmm0; fstp qword [rbp]; mov rsi, [rbp]",
        rbp=HIGH_SUPERVISOR,
    )
    assert outcome.registers.rdi == 0x4045000000000000
    assert outcome.registers.rsi == 0x3FF0000000000000


def test_time_stamp_counter_never_stands_still(guest: Guest) -> None:
    outcome = guest.execute(
        "rdtsc; mov ecx, eax; rdtsc; cmp eax, ecx; seta bl; rdtscp; cmp eax, ecx; seta bh"
    )
    assert outcome.registers.rbx & 0xFFFF == 0x0101


def test_far_jump_reloads_cs(guest: Guest) -> None:
    outcome = guest.execute(
        "push rax; lea rbx, [rip + there]; push rbx; retfq; hlt; there: mov ecx, cs", rax=KERNEL_CS
    )
    assert outcome.completed
    assert outcome.registers.rcx == KERNEL_CS
