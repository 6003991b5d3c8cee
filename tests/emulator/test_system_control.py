"""Completion, privilege, halting, caches, software interrupts and system calls, executed from their bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from emulator_guest import (
    CODE,
    DPL3,
    UPPER,
    USER_CODE,
    Guest,
)
from iced_x86 import Mnemonic

from lasskvm.emulator.decode import fetch_instruction
from lasskvm.emulator.execution import emulate_instruction, execute
from lasskvm.emulator.faults import GuestFault, Unhandleable
from lasskvm.emulator.instructions import HANDLERS
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    CR0,
    DR6,
    EFER,
    INTERRUPT_SHADOW,
    LSTAR,
    RAX,
    RCX,
    RFLAGS,
    RIP,
    STAR,
    TLB_FLUSH,
    segment_word,
)
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.descriptors import SYS_INTERRUPT_GATE
from lasskvm.x86.exceptions import BP, DB, ERROR_IDT, GP, OF, PF, PF_U, UD
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_P,
    CR0_PG,
    CR0_TS,
    CS,
    DR6_BS,
    DR6_FIXED,
    EFER_LMA,
    FS,
    RFLAGS_AC,
    RFLAGS_OF,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
)

DATA = UPPER + 0x70000
USER_DATA = 0x70000

HLT = "f4"
CPUID = "0fa2"
WRMSR = "0f30"
RDMSR = "0f32"
RDTSC = "0f31"
CLTS = "0f06"
MOV_CR4_RAX = "0f22e0"
MOV_RAX_CR4 = "0f20e0"
MOV_DR7_RAX = "0f23f8"
LGDT_RAX = "0f0110"
LIDT_RAX = "0f0118"
LMSW_AX = "0f01f0"
INVLPG_RAX = "0f0138"


# ------------------------------------------------------------------------------------------------- completion


def test_completed_instruction_steps_rip_and_ends_shadow_and_rf(guest: Guest) -> None:
    guest.words[INTERRUPT_SHADOW] = 1
    guest.words[RFLAGS] |= RFLAGS_RF
    guest.run(CLTS)
    assert guest.words[RIP] == CODE + 2
    assert guest.words[INTERRUPT_SHADOW] == 0
    assert not guest.words[RFLAGS] & RFLAGS_RF


def test_trap_flag_raises_debug_after_the_instruction(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_TF
    guest.words[CR0] |= CR0_TS
    guest.write_code(bytes.fromhex(CLTS))
    emulate_instruction(guest.ctx)
    assert not guest.words[CR0] & CR0_TS
    assert guest.words[DR6] == DR6_FIXED | DR6_BS
    assert guest.words[RIP] == CODE + 16 * DB
    assert guest.frame(1) == [CODE + 2]


def test_faulting_instruction_is_delivered_with_its_own_rip(user: Guest) -> None:
    user.write_code(bytes.fromhex(CLTS))
    emulate_instruction(user.ctx)
    assert user.words[RIP] == CODE + 16 * GP
    assert user.frame(2) == [0, USER_CODE]


def test_32_bit_code_wraps_eip(guest: Guest) -> None:
    words = guest.words
    words[segment_word(CS, ATTRIBUTES)] = AR_CODE32
    words[EFER] &= ~EFER_LMA
    words[CR0] &= ~CR0_PG
    words[segment_word(CS, BASE)] = USER_CODE + 2
    words[RIP] = 0xFFFFFFFE
    guest.memory.write(USER_CODE, bytes.fromhex(CLTS))
    execute(guest.ctx, fetch_instruction(guest.ctx))
    assert words[RIP] == 0


def test_unimplemented_instruction_says_which(guest: Guest) -> None:
    guest.write_code(bytes.fromhex("d9fe"))
    with pytest.raises(Unhandleable, match="fsin"):
        emulate_instruction(guest.ctx)


@pytest.mark.parametrize(
    "code",
    [
        HLT, WRMSR, RDMSR, CLTS, MOV_CR4_RAX, MOV_RAX_CR4, "440f20c0", MOV_DR7_RAX, LMSW_AX, INVLPG_RAX,
        "0f08", "0f09", LGDT_RAX, LIDT_RAX, "0f00d0", "0f00d8", "0f35", "480f07",
    ],
)  # fmt: skip
def test_privileged_instructions_are_a_general_protection_at_cpl_3(user: Guest, code: str) -> None:
    user.words[RAX] = user.words[RCX] = USER_DATA
    assert user.fault_of(code) == (GP, 0)


# ----------------------------------------------------------------------------------- halting, caches, monitor


def test_hlt_halts_behind_the_instruction(guest: Guest) -> None:
    guest.run(HLT)
    assert guest.ctx.halted
    assert guest.words[RIP] == CODE + 1


def test_single_stepped_hlt_traps_instead(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_TF
    guest.write_code(bytes.fromhex(HLT))
    emulate_instruction(guest.ctx)
    assert not guest.ctx.halted
    assert guest.words[RIP] == CODE + 16 * DB


def test_invlpg_of_any_address_flushes_and_never_faults(guest: Guest) -> None:
    for address in (USER_DATA, DATA, 1 << 47, (1 << 64) - 1):
        guest.words[RIP], guest.words[RAX], guest.words[TLB_FLUSH] = CODE, address, 0
        guest.run(INVLPG_RAX)
        assert guest.words[TLB_FLUSH] == 1


def test_clflush_is_a_read_that_lass_and_paging_check(user: Guest) -> None:
    clflush = "0fae38"
    user.words[RAX] = USER_DATA
    user.run(clflush)
    user.words[RIP], user.words[RAX] = USER_CODE, DATA
    assert user.fault_of(clflush) == (GP, 0)
    user.words[RAX] = USER_DATA
    user.unmap(USER_DATA)
    assert user.fault_of(clflush) == (PF, PF_U)


@pytest.mark.parametrize("code", ["660fae38", "660fae30"])
def test_clflushopt_and_clwb_need_cpuid(guest: Guest, code: str) -> None:
    guest.words[RAX] = DATA
    assert guest.fault_of(code) == (UD, None)


@pytest.mark.parametrize("code", ["0f01c8", "0f01c9"])
def test_monitor_and_mwait_need_cpuid(guest: Guest, code: str) -> None:
    guest.words[RAX], guest.words[RCX] = DATA, 0
    assert guest.fault_of(code) == (UD, None)


@pytest.fixture
def with_monitor(guest: Guest) -> Guest:
    model = parse_cpu("max")
    model = replace(model, features=model.features | {"monitor"})
    guest.ctx.cpuid = CpuidTable(model.entries())
    guest.words[RCX] = 0
    return guest


def test_monitor_reads_through_lass_and_its_segment(with_monitor: Guest) -> None:
    words = with_monitor.words
    words[RAX] = DATA
    with_monitor.run("0f01c8")
    words[RIP], words[RAX] = CODE, USER_DATA
    assert with_monitor.fault_of("0f01c8") == (GP, 0)
    words[segment_word(FS, BASE)] = UPPER
    with_monitor.run("640f01c8")
    assert words[RIP] == CODE + 4


def test_monitor_and_mwait_reject_unknown_extensions_and_user_mode(with_monitor: Guest) -> None:
    with_monitor.words[RAX] = DATA
    with_monitor.run("0f01c9")
    with_monitor.words[RCX] = 2
    assert with_monitor.fault_of("0f01c8") == (GP, 0)
    assert with_monitor.fault_of("0f01c9") == (GP, 0)
    with_monitor.enter_user()
    assert with_monitor.fault_of("0f01c8") == (UD, None)


# ---------------------------------------------------------------------------------------- software interrupts


def test_int_n_pushes_the_next_rip(guest: Guest) -> None:
    guest.run("cd80")
    assert guest.words[RIP] == CODE + 16 * 0x80
    assert guest.frame(1) == [CODE + 2]


def test_int_n_without_privilege_faults_on_the_instruction(user: Guest) -> None:
    user.run("cd80")
    assert user.words[RIP] == CODE + 16 * GP
    assert user.frame(2) == [0x80 << 3 | ERROR_IDT, USER_CODE]


def test_int3_is_subject_to_the_gates_dpl_and_int1_is_not(user: Guest) -> None:
    user.run("f1")
    assert user.words[RIP] == CODE + 16 * DB
    assert user.frame(1) == [USER_CODE + 1]
    assert user.words[DR6] == DR6_FIXED
    user.enter_user()
    user.run("cc")
    assert user.words[RIP] == CODE + 16 * GP
    user.set_gate(BP, CODE + 16 * BP, attributes=AR_P | SYS_INTERRUPT_GATE | DPL3)
    user.enter_user()
    user.run("cc")
    assert user.words[RIP] == CODE + 16 * BP


def test_into_depends_on_of_and_does_not_exist_in_64_bit_mode(user: Guest) -> None:
    user.write_code(bytes.fromhex("ce") + bytes(14))
    with pytest.raises(GuestFault) as caught:
        fetch_instruction(user.ctx)
    assert caught.value.vector == UD
    user.words[segment_word(CS, ATTRIBUTES)] = AR_CODE32 | DPL3
    user.set_gate(OF, CODE + 16 * OF, attributes=AR_P | SYS_INTERRUPT_GATE | DPL3)
    user.run("ce")
    assert user.words[RIP] == USER_CODE + 1
    user.words[RFLAGS] |= RFLAGS_OF
    user.run("ce")
    assert user.words[RIP] == CODE + 16 * OF


def test_int_n_in_virtual_8086_mode_needs_iopl_3(user: Guest) -> None:
    words = user.words
    words[EFER] &= ~EFER_LMA
    words[CR0] &= ~CR0_PG
    words[RFLAGS] |= RFLAGS_VM
    assert user.fault_of("cd80") == (GP, 0)


# ----------------------------------------------------------------------------------------------- system calls


def test_syscall_with_tf_left_set_traps_at_the_entry(user: Guest) -> None:
    user.words[STAR], user.words[LSTAR] = 8 << 32, CODE + 0x800
    # The trap comes at CPL 0 and still on the user's stack, which LASS lets through because of AC.
    user.words[RFLAGS] |= RFLAGS_TF | RFLAGS_AC
    user.write_code(bytes.fromhex("0f05"))
    emulate_instruction(user.ctx)
    assert user.words[RIP] == CODE + 16 * DB
    assert user.frame(1) == [CODE + 0x800]


def test_syscall_with_a_user_stack_and_a_trap_is_a_stack_fault_under_lass(user: Guest) -> None:
    user.words[STAR], user.words[LSTAR] = 8 << 32, CODE + 0x800
    user.words[RFLAGS] |= RFLAGS_TF
    user.set_gate(STACK_FAULT, CODE + 16 * STACK_FAULT, ist=1)
    user.write_code(bytes.fromhex("0f05"))
    emulate_instruction(user.ctx)
    assert user.words[RIP] == CODE + 16 * STACK_FAULT


def test_sysret_faults_carry_error_code_zero(guest: Guest) -> None:
    guest.words[RCX] = 1 << 47
    assert guest.fault_of("480f07") == (GP, 0)
    guest.words[RCX] = USER_CODE
    guest.run("480f07")
    assert (guest.words[RIP], guest.words[CPL]) == (USER_CODE, 3)


def test_sysenter_without_a_selector_faults(user: Guest) -> None:
    assert user.fault_of("0f34") == (GP, 0)
    assert user.fault_of("0f35") == (GP, 0)


def test_table_has_every_exit_of_direct_execution() -> None:
    needed = (
        "CPUID RDMSR WRMSR CLTS LMSW SMSW INVLPG LGDT LIDT SGDT SIDT SLDT STR LLDT LTR HLT INVD WBINVD "
        "RDPMC RDTSC RDTSCP MONITOR MWAIT CLFLUSH CLFLUSHOPT CLWB INT INT3 INTO INT1 XSETBV "
        "SYSCALL SYSRET SYSRETQ SYSENTER SYSEXIT SYSEXITQ"
    )
    for name in needed.split():
        assert getattr(Mnemonic, name) in HANDLERS, name
