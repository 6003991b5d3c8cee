"""The instructions that exit from direct execution, executed from their bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from emulator_guest import (
    CODE,
    DPL3,
    KERNEL_STACK,
    LDT,
    LDT_SELECTOR,
    TSS,
    TSS_SELECTOR,
    UPPER,
    USER_CODE,
    USER_STACK,
    Guest,
)
from iced_x86 import Mnemonic

from lasskvm.emulator.decode import fetch_instruction
from lasskvm.emulator.faults import GuestFault, Unhandleable
from lasskvm.emulator.system import HANDLERS, emulate_instruction, execute
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    CR0,
    CR2,
    CR3,
    CR4,
    CR4_ALLOWED,
    CR8,
    DR0,
    DR6,
    DR7,
    EFER,
    GDT_BASE,
    GDT_LIMIT,
    IDT_BASE,
    IDT_LIMIT,
    INTERRUPT_SHADOW,
    LSTAR,
    R8,
    RAX,
    RBP,
    RBX,
    RCX,
    RDX,
    RFLAGS,
    RIP,
    RSP,
    SELECTOR,
    STAR,
    TLB_FLUSH,
    TSC_AUX,
    segment_word,
)
from lasskvm.x86 import msr
from lasskvm.x86.cpuid import CpuidTable, parse_cpu
from lasskvm.x86.descriptors import SYS_INTERRUPT_GATE, SYS_TSS_AVAILABLE, make_segment
from lasskvm.x86.exceptions import BP, DB, ERROR_IDT, GP, OF, PF, PF_U, UD
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_DATA,
    AR_P,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR4_LASS,
    CR4_TSD,
    CR4_UMIP,
    CS,
    DR6_BD,
    DR6_BS,
    DR6_FIXED,
    DR7_GD,
    DS,
    EFER_LMA,
    FS,
    LDTR,
    RFLAGS_AC,
    RFLAGS_OF,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    TR,
)

DATA = UPPER + 0x70000
USER_DATA = 0x70000

HLT, CPUID, WRMSR, RDMSR, RDTSC, CLTS = "f4", "0fa2", "0f30", "0f32", "0f31", "0f06"
MOV_CR4_RAX, MOV_RAX_CR4, MOV_CR3_RAX, MOV_CR0_RAX = "0f22e0", "0f20e0", "0f22d8", "0f22c0"
MOV_DR7_RAX, MOV_RAX_DR7 = "0f23f8", "0f21f8"
LGDT_RAX, LIDT_RAX, SGDT_RAX, SIDT_RAX = "0f0110", "0f0118", "0f0100", "0f0108"
LMSW_AX, SMSW_RAX, INVLPG_RAX = "0f01f0", "480f01e0", "0f0138"


def run(guest: Guest, code: str) -> None:
    """Execute one instruction; a fault is raised."""
    guest.write_code(bytes.fromhex(code))
    execute(guest.ctx, fetch_instruction(guest.ctx))


def fault_of(guest: Guest, code: str) -> tuple[int, int | None]:
    """The vector and error code that the instruction faults with; the state must be as before."""
    guest.write_code(bytes.fromhex(code))
    before = guest.snapshot()
    with pytest.raises(GuestFault) as caught:
        execute(guest.ctx, fetch_instruction(guest.ctx))
    assert guest.snapshot() == before, "a faulting instruction changed the state"
    return caught.value.vector, caught.value.error_code


# ------------------------------------------------------------------------------------------------- completion


def test_completed_instruction_steps_rip_and_ends_shadow_and_rf(guest: Guest) -> None:
    guest.words[INTERRUPT_SHADOW] = 1
    guest.words[RFLAGS] |= RFLAGS_RF
    run(guest, CLTS)
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
    guest.write_code(bytes.fromhex("0f58c1"))
    with pytest.raises(Unhandleable, match="addps"):
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
    assert fault_of(user, code) == (GP, 0)


# ------------------------------------------------------------------------------------------ control registers


def test_mov_to_cr4_sets_lass(guest: Guest) -> None:
    guest.words[CR4] &= ~CR4_LASS
    guest.words[RAX] = guest.words[CR4] | CR4_LASS
    run(guest, MOV_CR4_RAX)
    assert guest.words[CR4] & CR4_LASS
    assert guest.words[TLB_FLUSH] == 1


def test_mov_to_cr4_with_a_reserved_bit_faults(guest: Guest) -> None:
    guest.words[RAX] = guest.words[CR4] | 1 << 15
    assert fault_of(guest, MOV_CR4_RAX) == (GP, 0)


def test_mov_from_control_registers_reads_them(guest: Guest) -> None:
    run(guest, MOV_RAX_CR4)
    assert guest.words[RAX] == guest.words[CR4]
    guest.words[CR8] = 9
    run(guest, "440f20c0")  # mov rax, cr8
    assert guest.words[RAX] == 9


def test_mov_to_each_control_register_reaches_it(guest: Guest) -> None:
    guest.words[RAX] = 0x1234
    run(guest, "0f22d0")  # mov cr2, rax
    assert guest.words[CR2] == 0x1234
    guest.words[RAX] = guest.words[CR3] | 8
    run(guest, MOV_CR3_RAX)
    assert guest.words[CR3] == guest.words[RAX]
    guest.words[RAX] = guest.words[CR0] | CR0_TS
    run(guest, MOV_CR0_RAX)
    assert guest.words[CR0] & CR0_TS
    guest.words[RAX] = 0xF
    run(guest, "440f22c0")  # mov cr8, rax
    assert guest.words[CR8] == 0xF


@pytest.mark.parametrize("code", ["0f22c8", "0f22e8", "0f20f8"])
def test_control_registers_that_do_not_exist_are_an_invalid_opcode(guest: Guest, code: str) -> None:
    assert fault_of(guest, code) == (UD, None)


def test_extended_general_purpose_registers_are_operands_too(guest: Guest) -> None:
    run(guest, "410f20e0")  # mov r8, cr4
    assert guest.words[R8] == guest.words[CR4]


def test_lmsw_and_smsw_exchange_the_low_half_of_cr0(guest: Guest) -> None:
    guest.words[RAX] = CR0_PE | CR0_TS
    run(guest, LMSW_AX)
    assert guest.words[CR0] & CR0_TS
    run(guest, SMSW_RAX)
    assert guest.words[RAX] == guest.words[CR0]
    guest.words[RAX] = DATA
    guest.store(DATA, 8, (1 << 64) - 1)
    run(guest, "0f0120")  # smsw [rax]
    assert guest.load(DATA) == (1 << 64) - 1 & ~0xFFFF | guest.words[CR0] & 0xFFFF


# -------------------------------------------------------------------------------------------- debug registers


def test_mov_to_and_from_debug_registers(guest: Guest) -> None:
    guest.words[RAX] = 0x1234
    run(guest, "0f23c0")  # mov dr0, rax
    assert guest.words[DR0] == 0x1234
    run(guest, MOV_RAX_DR7)
    assert guest.words[RAX] == guest.words[DR7]


def test_general_detect_traps_before_the_access_and_is_then_off(guest: Guest) -> None:
    guest.words[DR7] |= DR7_GD
    guest.write_code(bytes.fromhex(MOV_DR7_RAX))
    emulate_instruction(guest.ctx)
    assert guest.words[RIP] == CODE + 16 * DB
    assert guest.frame(1) == [CODE]
    assert guest.words[DR6] == DR6_FIXED | DR6_BD
    assert not guest.words[DR7] & DR7_GD


# ----------------------------------------------------------------------------------- MSRs, CPUID, time stamps


def test_wrmsr_and_rdmsr_use_edx_eax_and_clear_the_upper_halves(guest: Guest) -> None:
    words = guest.words
    words[RCX], words[RDX], words[RAX] = msr.MSR_IA32_LSTAR | 1 << 40, 0xFFFF8000 | 1 << 35, 0x1000 | 1 << 35
    run(guest, WRMSR)
    assert words[LSTAR] == 0xFFFF_8000_0000_1000
    run(guest, RDMSR)
    assert (words[RDX], words[RAX]) == (0xFFFF8000, 0x1000)


def test_wrmsr_to_an_unknown_register_faults(guest: Guest) -> None:
    guest.words[RCX] = 0x12345
    assert fault_of(guest, WRMSR) == (GP, 0)
    assert fault_of(guest, RDMSR) == (GP, 0)


def test_cpuid_reports_lass_in_leaf_7_1(guest: Guest) -> None:
    guest.words[RAX], guest.words[RCX] = 7 | 1 << 32, 1
    run(guest, CPUID)
    assert guest.words[RAX] >> 6 & 1
    assert guest.words[RIP] == CODE + 2


def test_cpuid_without_lass_does_not(guest: Guest) -> None:
    guest.ctx.cpuid = CpuidTable(parse_cpu("max,-lass").entries())
    guest.words[RAX], guest.words[RCX] = 7, 1
    run(guest, CPUID)
    assert not guest.words[RAX] >> 6 & 1


def test_cpuid_faulting_makes_cpuid_privileged(user: Guest) -> None:
    user.words[RAX] = 0
    run(user, CPUID)
    user.ctx.msrs.values[msr.MSR_MISC_FEATURE_ENABLES] = 1
    assert fault_of(user, CPUID) == (GP, 0)


def test_rdtsc_is_privileged_with_tsd(user: Guest) -> None:
    run(user, RDTSC)
    assert user.words[RAX] == user.tsc
    user.words[CR4] |= CR4_TSD
    assert fault_of(user, RDTSC) == (GP, 0)
    user.words[CPL] = 0
    user.enter_kernel()
    run(user, RDTSC)


def test_rdtscp_adds_tsc_aux_and_needs_cpuid(guest: Guest) -> None:
    guest.words[TSC_AUX] = 5
    run(guest, "0f01f9")
    assert (guest.words[RAX], guest.words[RDX], guest.words[RCX]) == (guest.tsc, 0, 5)
    guest.ctx.cpuid = CpuidTable(parse_cpu("max,-rdtscp").entries())
    assert fault_of(guest, "0f01f9") == (UD, None)


def test_there_are_no_performance_counters(guest: Guest) -> None:
    assert fault_of(guest, "0f33") == (GP, 0)


def test_xsetbv_is_an_invalid_opcode_without_osxsave(guest: Guest) -> None:
    assert fault_of(guest, "0f01d1") == (UD, None)


# ------------------------------------------------------------------------------------------ descriptor tables


def test_lgdt_reads_ten_bytes_through_lass_and_paging(guest: Guest) -> None:
    guest.store(DATA, 2, 0x77)
    guest.store(DATA + 2, 8, UPPER + 0x9000)
    guest.words[RAX] = DATA
    run(guest, LGDT_RAX)
    assert (guest.words[GDT_BASE], guest.words[GDT_LIMIT]) == (UPPER + 0x9000, 0x77)


def test_lidt_may_load_a_low_base_which_is_only_named(guest: Guest) -> None:
    guest.store(DATA, 2, 0xFFF)
    guest.store(DATA + 2, 8, 0x3000)
    guest.words[RAX] = DATA
    run(guest, LIDT_RAX)
    assert (guest.words[IDT_BASE], guest.words[IDT_LIMIT]) == (0x3000, 0xFFF)


def test_lgdt_operand_in_the_user_half_violates_lass_unless_ac(guest: Guest) -> None:
    guest.words[RAX] = USER_DATA
    assert fault_of(guest, LGDT_RAX) == (GP, 0)
    guest.words[RFLAGS] |= RFLAGS_AC
    guest.store(USER_DATA, 2, 0x77)
    guest.store(USER_DATA + 2, 8, UPPER)
    run(guest, LGDT_RAX)
    assert guest.words[GDT_LIMIT] == 0x77


def test_lgdt_operand_on_the_stack_faults_as_a_stack_access(guest: Guest) -> None:
    guest.words[RBP] = USER_STACK
    assert fault_of(guest, "0f015500") == (STACK_FAULT, 0)  # lgdt [rbp]


def test_lgdt_base_must_be_canonical(guest: Guest) -> None:
    guest.store(DATA + 2, 8, 1 << 47)
    guest.words[RAX] = DATA
    assert fault_of(guest, LGDT_RAX) == (GP, 0)


def test_lgdt_with_a_16_bit_operand_size_loads_24_bits_of_base(guest: Guest) -> None:
    words = guest.words
    words[segment_word(CS, ATTRIBUTES)] = AR_CODE32
    words[EFER] &= ~EFER_LMA
    words[CR0] &= ~CR0_PG
    words[RIP] = USER_CODE
    guest.state.set_segment(DS, guest.state.segment(2))
    words[segment_word(DS, ATTRIBUTES)] = AR_DATA
    guest.store(0x7000, 8, 0x12345678_0077)
    words[RAX] = 0x7000
    run(guest, "660f0110")
    assert (words[GDT_BASE], words[GDT_LIMIT]) == (0x345678, 0x77)
    run(guest, "0f0110")
    assert words[GDT_BASE] == 0x12345678


def test_sgdt_and_sidt_store_ten_bytes(guest: Guest) -> None:
    guest.words[RAX] = DATA
    run(guest, SGDT_RAX)
    assert (guest.load(DATA, 2), guest.load(DATA + 2)) == (guest.words[GDT_LIMIT], guest.words[GDT_BASE])
    run(guest, SIDT_RAX)
    assert (guest.load(DATA, 2), guest.load(DATA + 2)) == (guest.words[IDT_LIMIT], guest.words[IDT_BASE])


@pytest.mark.parametrize("code", [SGDT_RAX, SIDT_RAX, "0f00c0", "0f00c8", SMSW_RAX])
def test_umip_hides_the_tables_from_user_mode(user: Guest, code: str) -> None:
    user.words[RAX] = USER_DATA
    run(user, code)
    user.words[CR4] |= CR4_UMIP
    assert fault_of(user, code) == (GP, 0)


def test_sgdt_to_an_upper_half_address_from_user_mode_violates_lass(user: Guest) -> None:
    user.words[RAX] = DATA
    assert fault_of(user, SGDT_RAX) == (GP, 0)


def test_sldt_and_str_zero_extend_into_registers_and_store_16_bits(guest: Guest) -> None:
    guest.words[RAX] = (1 << 64) - 1
    run(guest, "480f00c0")  # sldt rax
    assert guest.words[RAX] == LDT_SELECTOR
    guest.words[RAX] = DATA
    guest.store(DATA, 8, (1 << 64) - 1)
    run(guest, "0f0008")  # str [rax]
    assert guest.load(DATA) == (1 << 64) - 1 & ~0xFFFF | TSS_SELECTOR


def test_lldt_and_ltr_load_from_the_gdt(guest: Guest) -> None:
    guest.words[RAX] = 0
    run(guest, "0f00d0")  # lldt ax
    assert guest.words[segment_word(LDTR, SELECTOR)] == 0
    guest.words[RAX] = LDT_SELECTOR
    run(guest, "0f00d0")
    assert guest.words[segment_word(LDTR, BASE)] == LDT
    guest.set_descriptor(TSS_SELECTOR, make_segment(TSS & 0xFFFFFFFF, 0x67, AR_P | SYS_TSS_AVAILABLE))
    guest.words[RAX] = TSS_SELECTOR
    run(guest, "0f00d8")  # ltr ax
    assert guest.words[segment_word(TR, BASE)] == TSS


@pytest.mark.parametrize("code", ["0f00d0", "0f00d8", "0f00c0", "0f00c8"])
def test_ldt_and_task_register_do_not_exist_in_real_mode(guest: Guest, code: str) -> None:
    guest.state.reset()
    guest.words[RIP], guest.words[segment_word(CS, BASE)] = 0x100, 0
    guest.words[segment_word(CS, ATTRIBUTES)] = AR_DATA
    assert fault_of(guest, code) == (UD, None)


# ----------------------------------------------------------------------------------- halting, caches, monitor


def test_hlt_halts_behind_the_instruction(guest: Guest) -> None:
    run(guest, HLT)
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
        run(guest, INVLPG_RAX)
        assert guest.words[TLB_FLUSH] == 1


def test_clflush_is_a_read_that_lass_and_paging_check(user: Guest) -> None:
    clflush = "0fae38"
    user.words[RAX] = USER_DATA
    run(user, clflush)
    user.words[RIP], user.words[RAX] = USER_CODE, DATA
    assert fault_of(user, clflush) == (GP, 0)
    user.words[RAX] = USER_DATA
    user.unmap(USER_DATA)
    assert fault_of(user, clflush) == (PF, PF_U)


@pytest.mark.parametrize("code", ["660fae38", "660fae30"])
def test_clflushopt_and_clwb_need_cpuid(guest: Guest, code: str) -> None:
    guest.words[RAX] = DATA
    assert fault_of(guest, code) == (UD, None)


@pytest.mark.parametrize("code", ["0f01c8", "0f01c9"])
def test_monitor_and_mwait_need_cpuid(guest: Guest, code: str) -> None:
    guest.words[RAX], guest.words[RCX] = DATA, 0
    assert fault_of(guest, code) == (UD, None)


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
    run(with_monitor, "0f01c8")
    words[RIP], words[RAX] = CODE, USER_DATA
    assert fault_of(with_monitor, "0f01c8") == (GP, 0)
    words[segment_word(FS, BASE)] = UPPER
    run(with_monitor, "640f01c8")
    assert words[RIP] == CODE + 4


def test_monitor_and_mwait_reject_unknown_extensions_and_user_mode(with_monitor: Guest) -> None:
    with_monitor.words[RAX] = DATA
    run(with_monitor, "0f01c9")
    with_monitor.words[RCX] = 2
    assert fault_of(with_monitor, "0f01c8") == (GP, 0)
    assert fault_of(with_monitor, "0f01c9") == (GP, 0)
    with_monitor.enter_user()
    assert fault_of(with_monitor, "0f01c8") == (UD, None)


# ---------------------------------------------------------------------------------------- software interrupts


def test_int_n_pushes_the_next_rip(guest: Guest) -> None:
    run(guest, "cd80")
    assert guest.words[RIP] == CODE + 16 * 0x80
    assert guest.frame(1) == [CODE + 2]


def test_int_n_without_privilege_faults_on_the_instruction(user: Guest) -> None:
    run(user, "cd80")
    assert user.words[RIP] == CODE + 16 * GP
    assert user.frame(2) == [0x80 << 3 | ERROR_IDT, USER_CODE]


def test_int3_is_subject_to_the_gates_dpl_and_int1_is_not(user: Guest) -> None:
    run(user, "f1")
    assert user.words[RIP] == CODE + 16 * DB
    assert user.frame(1) == [USER_CODE + 1]
    assert user.words[DR6] == DR6_FIXED
    user.enter_user()
    run(user, "cc")
    assert user.words[RIP] == CODE + 16 * GP
    user.set_gate(BP, CODE + 16 * BP, attributes=AR_P | SYS_INTERRUPT_GATE | DPL3)
    user.enter_user()
    run(user, "cc")
    assert user.words[RIP] == CODE + 16 * BP


def test_into_depends_on_of_and_does_not_exist_in_64_bit_mode(user: Guest) -> None:
    user.write_code(bytes.fromhex("ce") + bytes(14))
    with pytest.raises(GuestFault) as caught:
        fetch_instruction(user.ctx)
    assert caught.value.vector == UD
    user.words[segment_word(CS, ATTRIBUTES)] = AR_CODE32 | DPL3
    user.set_gate(OF, CODE + 16 * OF, attributes=AR_P | SYS_INTERRUPT_GATE | DPL3)
    run(user, "ce")
    assert user.words[RIP] == USER_CODE + 1
    user.words[RFLAGS] |= RFLAGS_OF
    run(user, "ce")
    assert user.words[RIP] == CODE + 16 * OF


def test_int_n_in_virtual_8086_mode_needs_iopl_3(user: Guest) -> None:
    words = user.words
    words[EFER] &= ~EFER_LMA
    words[CR0] &= ~CR0_PG
    words[RFLAGS] |= RFLAGS_VM
    assert fault_of(user, "cd80") == (GP, 0)
    words[CR4] = words[CR4_ALLOWED] | 1
    with pytest.raises(Unhandleable, match="VME"):
        run(user, "cd80")


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
    assert fault_of(guest, "480f07") == (GP, 0)
    guest.words[RCX] = USER_CODE
    run(guest, "480f07")
    assert (guest.words[RIP], guest.words[CPL]) == (USER_CODE, 3)


def test_sysenter_without_a_selector_faults(user: Guest) -> None:
    assert fault_of(user, "0f34") == (GP, 0)
    assert fault_of(user, "0f35") == (GP, 0)


def test_table_has_every_exit_of_direct_execution() -> None:
    needed = (
        "CPUID RDMSR WRMSR MOV CLTS LMSW SMSW INVLPG LGDT LIDT SGDT SIDT SLDT STR LLDT LTR HLT INVD WBINVD "
        "RDPMC RDTSC RDTSCP MONITOR MWAIT CLFLUSH CLFLUSHOPT CLWB INT INT3 INTO INT1 XSETBV "
        "SYSCALL SYSRET SYSRETQ SYSENTER SYSEXIT SYSEXITQ"
    )
    for name in needed.split():
        assert getattr(Mnemonic, name) in HANDLERS, name


def test_mov_between_general_purpose_registers_is_not_for_this_table(guest: Guest) -> None:
    guest.words[RBX] = 7
    with pytest.raises(Unhandleable, match="mov"):
        run(guest, "4889d8")
    assert guest.words[RSP] == KERNEL_STACK
