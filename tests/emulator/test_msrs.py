"""RDMSR and WRMSR: existence, reserved bits, canonical addresses, the time-stamp counter."""

from __future__ import annotations

import pytest
from emulator_guest import Guest

from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.msrs import MSRS, NOT_A_BASE_MSR, guest_tsc, read_msr, write_base_msr, write_msr
from lasskvm.state import (
    BASE,
    CR4,
    EFER,
    KERNEL_GS_BASE,
    LSTAR,
    MAXPHYADDR,
    PAT,
    TSC_AUX,
    VcpuState,
    segment_word,
)
from lasskvm.x86 import msr
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import GP
from lasskvm.x86.registers import CR4_LA57, EFER_LMA, FS, GS

NOT_CANONICAL = 1 << 47
UNKNOWN = 0x12345


def rejects_write(guest: Guest, index: int, value: int) -> bool:
    before, values = guest.snapshot(), dict(guest.ctx.msrs.values)
    with pytest.raises(GuestFault) as caught:
        write_msr(guest.ctx, index, value)
    assert guest.snapshot() == before
    assert guest.ctx.msrs.values == values
    return (caught.value.vector, caught.value.error_code) == (GP, 0)


def rejects_read(guest: Guest, index: int) -> bool:
    with pytest.raises(GuestFault) as caught:
        read_msr(guest.ctx, index)
    return caught.value.vector == GP


def with_cpu(guest: Guest, text: str) -> Guest:
    guest.ctx.cpuid = CpuidTable(parse_cpu(text).entries())
    return guest


def test_unknown_msrs_are_a_general_protection(guest: Guest) -> None:
    assert rejects_read(guest, UNKNOWN)
    assert rejects_write(guest, UNKNOWN, 0)


def test_every_readable_msr_reads_its_reset_value(guest: Guest) -> None:
    guest.state.reset()
    for index, entry in MSRS.items():
        if entry.write_only:
            assert rejects_read(guest, index)
            continue
        value = read_msr(guest.ctx, index, host_initiated=True)
        expected = entry.default if entry.word is None else VcpuState().words[entry.word]
        if index == msr.MSR_IA32_FEATURE_CONTROL:
            expected |= msr.FEATURE_CONTROL_VMX_OUTSIDE_SMX
        assert value == expected, hex(index)


@pytest.mark.parametrize(
    "index",
    [
        msr.MSR_IA32_FS_BASE,
        msr.MSR_IA32_GS_BASE,
        msr.MSR_IA32_KERNEL_GS_BASE,
        msr.MSR_IA32_LSTAR,
        msr.MSR_IA32_CSTAR,
        msr.MSR_IA32_SYSENTER_ESP,
        msr.MSR_IA32_SYSENTER_EIP,
    ],
)
def test_address_msrs_take_canonical_values_of_either_half(guest: Guest, index: int) -> None:
    for value in (0x1000, 0xFFFF_8000_0000_0000):
        write_msr(guest.ctx, index, value)
        assert read_msr(guest.ctx, index) == value
    assert rejects_write(guest, index, NOT_CANONICAL)


def test_canonical_width_follows_la57(guest: Guest) -> None:
    guest.words[CR4] |= CR4_LA57
    write_msr(guest.ctx, msr.MSR_IA32_LSTAR, NOT_CANONICAL)
    assert guest.words[LSTAR] == NOT_CANONICAL


def test_fs_and_gs_base_are_the_segment_bases(guest: Guest) -> None:
    write_msr(guest.ctx, msr.MSR_IA32_FS_BASE, 0x1000)
    write_msr(guest.ctx, msr.MSR_IA32_GS_BASE, 0x2000)
    assert guest.words[segment_word(FS, BASE)] == 0x1000
    assert guest.words[segment_word(GS, BASE)] == 0x2000


def test_compiled_base_write_agrees_with_wrmsr(guest: Guest) -> None:
    words = guest.words
    for index, word in (
        (msr.MSR_IA32_FS_BASE, segment_word(FS, BASE)),
        (msr.MSR_IA32_GS_BASE, segment_word(GS, BASE)),
        (msr.MSR_IA32_KERNEL_GS_BASE, KERNEL_GS_BASE),
    ):
        assert write_base_msr(words, index, 0xFFFF_8000_0000_1000) == 0
        assert words[word] == 0xFFFF_8000_0000_1000
        before = guest.snapshot()
        assert write_base_msr(words, index, NOT_CANONICAL) == GP
        assert guest.snapshot() == before
    assert write_base_msr(words, msr.MSR_IA32_LSTAR, 0) == NOT_A_BASE_MSR


def test_efer_goes_through_its_checks(guest: Guest) -> None:
    assert read_msr(guest.ctx, msr.MSR_IA32_EFER) == guest.words[EFER]
    assert rejects_write(guest, msr.MSR_IA32_EFER, 0)
    write_msr(guest.ctx, msr.MSR_IA32_EFER, guest.words[EFER] & ~EFER_LMA)
    assert guest.words[EFER] & EFER_LMA


def test_sfmask_and_tsc_aux_have_32_bits(guest: Guest) -> None:
    assert rejects_write(guest, msr.MSR_IA32_SFMASK, 1 << 32)
    assert rejects_write(guest, msr.MSR_IA32_TSC_AUX, 1 << 32)
    write_msr(guest.ctx, msr.MSR_IA32_TSC_AUX, 7)
    assert guest.words[TSC_AUX] == 7


def test_tsc_aux_needs_rdtscp_or_rdpid(guest: Guest) -> None:
    with_cpu(guest, "max,-rdtscp,-rdpid")
    assert rejects_read(guest, msr.MSR_IA32_TSC_AUX)
    assert rejects_write(guest, msr.MSR_IA32_TSC_AUX, 0)


def test_host_reaches_what_cpuid_hides_and_what_is_read_only(guest: Guest) -> None:
    with_cpu(guest, "max,-rdtscp")
    write_msr(guest.ctx, msr.MSR_IA32_TSC_AUX, 3, host_initiated=True)
    assert read_msr(guest.ctx, msr.MSR_IA32_TSC_AUX, host_initiated=True) == 3
    write_msr(guest.ctx, msr.MSR_PLATFORM_INFO, 0, host_initiated=True)
    assert read_msr(guest.ctx, msr.MSR_PLATFORM_INFO) == 0


@pytest.mark.parametrize("memory_type", [2, 3, 8, 0x10])
def test_pat_takes_only_memory_types(guest: Guest, memory_type: int) -> None:
    assert rejects_write(guest, msr.MSR_IA32_PAT, memory_type << 24)
    write_msr(guest.ctx, msr.MSR_IA32_PAT, 0x0007010600070106)
    assert guest.words[PAT] == 0x0007010600070106


def test_without_the_feature_there_are_no_mtrrs(guest: Guest) -> None:
    with_cpu(guest, "max,-mtrr")
    for index in (msr.MSR_IA32_MTRRCAP, msr.MSR_IA32_MTRR_DEF_TYPE, msr.MSR_IA32_MTRR_PHYSBASE0):
        assert rejects_read(guest, index)


def test_uc_minus_is_a_pat_type_and_no_mtrr_type(guest: Guest) -> None:
    write_msr(guest.ctx, msr.MSR_IA32_PAT, 7)
    assert rejects_write(guest, msr.MSR_IA32_MTRR_FIX64K_00000, 7)
    write_msr(guest.ctx, msr.MSR_IA32_MTRR_FIX64K_00000, 0x0606060606060606)
    assert read_msr(guest.ctx, msr.MSR_IA32_MTRR_FIX64K_00000) == 0x0606060606060606


def test_mtrr_ranges_have_reserved_bits_above_maxphyaddr(guest: Guest) -> None:
    too_high = 1 << guest.words[MAXPHYADDR]
    assert rejects_write(guest, msr.MSR_IA32_MTRR_PHYSBASE0, too_high)
    assert rejects_write(guest, msr.MSR_IA32_MTRR_PHYSMASK0, too_high)
    assert rejects_write(guest, msr.MSR_IA32_MTRR_PHYSBASE0, 2)
    write_msr(guest.ctx, msr.MSR_IA32_MTRR_PHYSBASE0, 0x8000_0000 | 6)
    write_msr(guest.ctx, msr.MSR_IA32_MTRR_PHYSMASK0, 0xFF80_0000 << 12 & too_high - 1 | 1 << 11)
    assert rejects_write(guest, msr.MSR_IA32_MTRR_DEF_TYPE, 1 << 12)
    assert rejects_write(guest, msr.MSR_IA32_MTRR_DEF_TYPE, 2)


def test_read_only_msrs_cannot_be_written_even_with_their_own_value(guest: Guest) -> None:
    for index in (msr.MSR_PLATFORM_INFO, msr.MSR_IA32_MTRRCAP, msr.MSR_IA32_FEATURE_CONTROL):
        assert rejects_write(guest, index, read_msr(guest.ctx, index))


def test_microcode_revision_ignores_the_zero_that_software_writes_first(guest: Guest) -> None:
    write_msr(guest.ctx, msr.MSR_IA32_BIOS_SIGN_ID, 0)
    assert read_msr(guest.ctx, msr.MSR_IA32_BIOS_SIGN_ID) == 1 << 32


def test_apic_base_rejects_reserved_bits_and_x2apic_mode(guest: Guest) -> None:
    value = read_msr(guest.ctx, msr.MSR_IA32_APIC_BASE)
    assert rejects_write(guest, msr.MSR_IA32_APIC_BASE, value | 1)
    assert rejects_write(guest, msr.MSR_IA32_APIC_BASE, value | msr.APIC_BASE_X2APIC)
    write_msr(guest.ctx, msr.MSR_IA32_APIC_BASE, value & ~msr.APIC_BASE_ENABLE)
    assert read_msr(guest.ctx, msr.MSR_IA32_APIC_BASE) == value & ~msr.APIC_BASE_ENABLE


def test_misc_enable_keeps_its_read_only_bits(guest: Guest) -> None:
    write_msr(guest.ctx, msr.MSR_IA32_MISC_ENABLE, msr.MISC_ENABLE_FAST_STRINGS | msr.MISC_ENABLE_MONITOR)
    assert rejects_write(guest, msr.MSR_IA32_MISC_ENABLE, 1 << 11)


def test_speculation_controls_need_cpuid(guest: Guest) -> None:
    assert rejects_read(guest, msr.MSR_IA32_SPEC_CTRL)
    assert rejects_read(guest, msr.MSR_IA32_ARCH_CAPABILITIES)


def test_debugctl_accepts_and_drops_what_records_nothing(guest: Guest) -> None:
    write_msr(guest.ctx, msr.MSR_IA32_DEBUGCTL, msr.DEBUGCTL_BTF | msr.DEBUGCTL_LBR)
    assert read_msr(guest.ctx, msr.MSR_IA32_DEBUGCTL) == 0
    assert rejects_write(guest, msr.MSR_IA32_DEBUGCTL, 1 << 6)


def test_writing_the_tsc_moves_it_and_it_goes_on_from_there(guest: Guest) -> None:
    assert read_msr(guest.ctx, msr.MSR_IA32_TSC) == guest.tsc
    write_msr(guest.ctx, msr.MSR_IA32_TSC, 5)
    guest.tsc += 10
    assert read_msr(guest.ctx, msr.MSR_IA32_TSC) == guest_tsc(guest.ctx) == 15


def test_tsc_adjust_follows_and_moves_the_tsc(guest: Guest) -> None:
    write_msr(guest.ctx, msr.MSR_IA32_TSC_ADJUST, 100)
    assert guest_tsc(guest.ctx) == guest.tsc + 100
    write_msr(guest.ctx, msr.MSR_IA32_TSC, 0)
    assert read_msr(guest.ctx, msr.MSR_IA32_TSC_ADJUST) == -guest.tsc % (1 << 64)


def test_what_kernels_look_at_on_amds_processors_is_there(guest: Guest) -> None:
    hwcr, tsc_runs_at_p0 = 0xC0010015, 1 << 24
    de_cfg, lfence_serializes = 0xC0011029, 1 << 1
    assert read_msr(guest.ctx, hwcr) == tsc_runs_at_p0
    assert read_msr(guest.ctx, de_cfg) == lfence_serializes
    assert read_msr(guest.ctx, 0xC0010010) == read_msr(guest.ctx, 0xC001001F) == 0
    write_msr(guest.ctx, hwcr, tsc_runs_at_p0 | 1 << 18 | 1 << 6)
    assert read_msr(guest.ctx, hwcr) == tsc_runs_at_p0 | 1 << 18
    assert rejects_write(guest, hwcr, 1 << 0)
    assert rejects_write(guest, de_cfg, 0)


def test_tsc_adjust_needs_cpuid(guest: Guest) -> None:
    without = with_cpu(guest, "max,-tsc_adjust")
    assert rejects_read(without, msr.MSR_IA32_TSC_ADJUST)
    assert rejects_write(without, msr.MSR_IA32_TSC_ADJUST, 0)


def test_devices_attach_msrs_of_their_own(guest: Guest) -> None:
    written: list[int] = []
    guest.ctx.msrs.attach(msr.MSR_IA32_TSC_DEADLINE, lambda: 42, written.append)
    assert read_msr(guest.ctx, msr.MSR_IA32_TSC_DEADLINE) == 42
    write_msr(guest.ctx, msr.MSR_IA32_TSC_DEADLINE, 7)
    assert written == [7]
