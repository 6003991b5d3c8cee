"""MOV to and from control and debug registers, MSRs, CPUID and time stamps, executed from their bytes."""

from __future__ import annotations

import pytest
from emulator_guest import (
    CODE,
    UPPER,
    Guest,
)

from lasskvm.emulator.execution import emulate_instruction
from lasskvm.state import (
    CPL,
    CR0,
    CR2,
    CR3,
    CR4,
    CR8,
    DR0,
    DR6,
    DR7,
    LSTAR,
    R8,
    RAX,
    RCX,
    RDX,
    RIP,
    TLB_FLUSH,
    TSC_AUX,
)
from lasskvm.x86 import msr
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import DB, GP, UD
from lasskvm.x86.registers import (
    CR0_PE,
    CR0_TS,
    CR4_LASS,
    CR4_TSD,
    DR6_BD,
    DR6_FIXED,
    DR7_GD,
)

DATA = UPPER + 0x70000

CPUID = "0fa2"
WRMSR = "0f30"
RDMSR = "0f32"
RDTSC = "0f31"
MOV_CR4_RAX = "0f22e0"
MOV_RAX_CR4 = "0f20e0"
MOV_CR3_RAX = "0f22d8"
MOV_CR0_RAX = "0f22c0"
MOV_DR7_RAX = "0f23f8"
MOV_RAX_DR7 = "0f21f8"
LMSW_AX = "0f01f0"
SMSW_RAX = "480f01e0"


# ------------------------------------------------------------------------------------------ control registers


def test_mov_to_cr4_sets_lass(guest: Guest) -> None:
    guest.words[CR4] &= ~CR4_LASS
    guest.words[RAX] = guest.words[CR4] | CR4_LASS
    guest.run(MOV_CR4_RAX)
    assert guest.words[CR4] & CR4_LASS
    assert guest.words[TLB_FLUSH] == 1


def test_mov_to_cr4_with_a_reserved_bit_faults(guest: Guest) -> None:
    guest.words[RAX] = guest.words[CR4] | 1 << 15
    assert guest.fault_of(MOV_CR4_RAX) == (GP, 0)


def test_mov_from_control_registers_reads_them(guest: Guest) -> None:
    guest.run(MOV_RAX_CR4)
    assert guest.words[RAX] == guest.words[CR4]
    guest.words[CR8] = 9
    guest.run("440f20c0")  # mov rax, cr8
    assert guest.words[RAX] == 9


def test_mov_to_each_control_register_reaches_it(guest: Guest) -> None:
    guest.words[RAX] = 0x1234
    guest.run("0f22d0")  # mov cr2, rax
    assert guest.words[CR2] == 0x1234
    guest.words[RAX] = guest.words[CR3] | 8
    guest.run(MOV_CR3_RAX)
    assert guest.words[CR3] == guest.words[RAX]
    guest.words[RAX] = guest.words[CR0] | CR0_TS
    guest.run(MOV_CR0_RAX)
    assert guest.words[CR0] & CR0_TS
    guest.words[RAX] = 0xF
    guest.run("440f22c0")  # mov cr8, rax
    assert guest.words[CR8] == 0xF


@pytest.mark.parametrize("code", ["0f22c8", "0f22e8", "0f20f8"])
def test_control_registers_that_do_not_exist_are_an_invalid_opcode(guest: Guest, code: str) -> None:
    assert guest.fault_of(code) == (UD, None)


def test_extended_general_purpose_registers_are_operands_too(guest: Guest) -> None:
    guest.run("410f20e0")  # mov r8, cr4
    assert guest.words[R8] == guest.words[CR4]


def test_lmsw_and_smsw_exchange_the_low_half_of_cr0(guest: Guest) -> None:
    guest.words[RAX] = CR0_PE | CR0_TS
    guest.run(LMSW_AX)
    assert guest.words[CR0] & CR0_TS
    guest.run(SMSW_RAX)
    assert guest.words[RAX] == guest.words[CR0]
    guest.words[RAX] = DATA
    guest.store(DATA, 8, (1 << 64) - 1)
    guest.run("0f0120")  # smsw [rax]
    assert guest.load(DATA) == (1 << 64) - 1 & ~0xFFFF | guest.words[CR0] & 0xFFFF


# -------------------------------------------------------------------------------------------- debug registers


def test_mov_to_and_from_debug_registers(guest: Guest) -> None:
    guest.words[RAX] = 0x1234
    guest.run("0f23c0")  # mov dr0, rax
    assert guest.words[DR0] == 0x1234
    guest.run(MOV_RAX_DR7)
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
    guest.run(WRMSR)
    assert words[LSTAR] == 0xFFFF_8000_0000_1000
    guest.run(RDMSR)
    assert (words[RDX], words[RAX]) == (0xFFFF8000, 0x1000)


def test_wrmsr_to_an_unknown_register_faults(guest: Guest) -> None:
    guest.words[RCX] = 0x12345
    assert guest.fault_of(WRMSR) == (GP, 0)
    assert guest.fault_of(RDMSR) == (GP, 0)


def test_cpuid_reports_lass_in_leaf_7_1(guest: Guest) -> None:
    guest.words[RAX], guest.words[RCX] = 7 | 1 << 32, 1
    guest.run(CPUID)
    assert guest.words[RAX] >> 6 & 1
    assert guest.words[RIP] == CODE + 2


def test_cpuid_without_lass_does_not(guest: Guest) -> None:
    guest.ctx.cpuid = CpuidTable(parse_cpu("max,-lass").entries())
    guest.words[RAX], guest.words[RCX] = 7, 1
    guest.run(CPUID)
    assert not guest.words[RAX] >> 6 & 1


def test_cpuid_faulting_makes_cpuid_privileged(user: Guest) -> None:
    user.words[RAX] = 0
    user.run(CPUID)
    user.ctx.msrs.values[msr.MSR_MISC_FEATURE_ENABLES] = 1
    assert user.fault_of(CPUID) == (GP, 0)


def test_rdtsc_is_privileged_with_tsd(user: Guest) -> None:
    user.run(RDTSC)
    assert user.words[RAX] == user.tsc
    user.words[CR4] |= CR4_TSD
    assert user.fault_of(RDTSC) == (GP, 0)
    user.words[CPL] = 0
    user.enter_kernel()
    user.run(RDTSC)


def test_rdtscp_adds_tsc_aux_and_needs_cpuid(guest: Guest) -> None:
    guest.words[TSC_AUX] = 5
    guest.run("0f01f9")
    assert (guest.words[RAX], guest.words[RDX], guest.words[RCX]) == (guest.tsc, 0, 5)
    guest.ctx.cpuid = CpuidTable(parse_cpu("max,-rdtscp").entries())
    assert guest.fault_of("0f01f9") == (UD, None)


def test_there_are_no_performance_counters(guest: Guest) -> None:
    assert guest.fault_of("0f33") == (GP, 0)


def test_xsetbv_is_an_invalid_opcode_without_osxsave(guest: Guest) -> None:
    assert guest.fault_of("0f01d1") == (UD, None)
