"""A vCPU's state through the soft provider: what comes back, what the guest sees of it, and what is refused."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace
from typing import Any

import pytest

from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, LOW_ABSENT, LOW_SUPERVISOR
from lasskvm.kvm import Vcpu, Vm
from lasskvm.kvm.structures import DebugRegs, Fpu, MpState, Sregs2, Translation
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidEntry
from lasskvm.x86.msr import MSR_IA32_FS_BASE, MSR_IA32_LSTAR, MSR_IA32_STAR
from lasskvm.x86.registers import (
    AR_CODE64,
    AR_L,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
)

NO_SUCH_MSR = 0x4B56_4DFF
XSTATE_BV, XMM0, PKRU = 512, 160, 2688
ONE = 0x3FFF_8000_0000_0000_0000


@pytest.fixture
def vm() -> Vm:
    vm = Vm("emulator")
    vm.set_user_memory_region(0, 0, vm.allocate(1 << 16))
    return vm


@pytest.fixture
def vcpu(vm: Vm) -> Vcpu:
    return vm.create_vcpu()


def refused(call: Any, *arguments: Any) -> tuple[int | None, str]:
    with pytest.raises(OSError, match="KVM_") as refusal:
        call(*arguments)
    return refusal.value.errno, str(refusal.value)


# ------------------------------------------------------------------------------------------------------- registers


def pae_sregs(vcpu: Vcpu) -> Sregs2:
    sregs = vcpu.get_sregs2()
    sregs.cr0, sregs.cr3, sregs.cr4 = CR0_PE | CR0_PG, 0x3000, CR4_PAE
    return sregs


def test_sregs2_come_back_with_the_pdptes_that_were_given(vcpu: Vcpu) -> None:
    sregs = pae_sregs(vcpu)
    sregs.pdptrs_valid, sregs.pdptrs = True, (0x5001, 0x6001, 0, 0x7001)
    vcpu.set_sregs2(sregs)
    assert vcpu.get_sregs2() == sregs


def test_sregs2_without_valid_pdptes_load_them_from_memory(vm: Vm, vcpu: Vcpu) -> None:
    vm.memory.store(0x3008, 8, 0x9001)
    vcpu.set_sregs2(pae_sregs(vcpu))
    assert vcpu.get_sregs2().pdptrs == (0, 0x9001, 0, 0)


def test_pdptes_without_pae_paging_are_refused(vcpu: Vcpu) -> None:
    sregs = vcpu.get_sregs2()
    sregs.pdptrs_valid = True
    number, text = refused(vcpu.set_sregs2, sregs)
    assert number == errno.EINVAL
    assert "PAE paging only" in text


LONG_MODE = {"cr0": CR0_PE | CR0_PG, "cr4": CR4_PAE, "efer": EFER_LME | EFER_LMA}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"cr0": 1 << 32}, "CR0"),
        ({"cr0": CR0_NW}, "CR0"),
        ({"cr0": CR0_PG}, "CR0"),
        ({"cr4": 1 << 30}, "CPUID does not allow CR4"),
        ({"efer": 1 << 20}, "CPUID does not allow EFER"),
        ({**LONG_MODE, "cr4": 0}, "CR4.PAE"),
        ({**LONG_MODE, "efer": EFER_LME}, "EFER.LMA"),
        ({**LONG_MODE, "cr3": 1 << 50}, "CR3"),
        ({"efer": EFER_LMA}, "EFER.LMA and CS.L"),
        ({"apic_base": 1}, "APIC base"),
    ],
)
def test_contradictory_sregs_are_refused_and_change_nothing(
    vcpu: Vcpu, fields: dict[str, int], reason: str
) -> None:
    before = vcpu.get_sregs()
    number, text = refused(vcpu.set_sregs, replace(before, **fields))  # type: ignore[arg-type]
    assert number == errno.EINVAL
    assert reason in text
    assert vcpu.get_sregs() == before


def test_a_64_bit_code_segment_outside_long_mode_is_refused(vcpu: Vcpu) -> None:
    sregs = vcpu.get_sregs()
    sregs.cs = replace(sregs.cs, attributes=AR_CODE64 | AR_L)
    assert refused(vcpu.set_sregs, sregs)[0] == errno.EINVAL


def test_msrs_are_read_and_written_in_batches_up_to_the_first_bad_one(vcpu: Vcpu) -> None:
    wanted = {MSR_IA32_LSTAR: 0x1000, NO_SUCH_MSR: 1, MSR_IA32_STAR: 0x8}
    assert vcpu.set_msrs(wanted) == 1
    assert vcpu.get_msrs(wanted) == {MSR_IA32_LSTAR: 0x1000}
    assert vcpu.get_msrs([MSR_IA32_STAR]) == {MSR_IA32_STAR: 0}


def test_a_value_that_an_msr_cannot_hold_stops_the_batch(vcpu: Vcpu) -> None:
    assert vcpu.set_msrs({MSR_IA32_STAR: 5, MSR_IA32_FS_BASE: 1 << 63, MSR_IA32_LSTAR: 0x1000}) == 1
    assert vcpu.get_msrs([MSR_IA32_STAR, MSR_IA32_LSTAR]) == {MSR_IA32_STAR: 5, MSR_IA32_LSTAR: 0}


def test_cpuid_comes_back(vcpu: Vcpu) -> None:
    entries = [CpuidEntry(0, 0, 0, 1, 2, 3, 4), CpuidEntry(1, 0, 0, 5, 6, 7, 8)]
    vcpu.set_cpuid2(entries)
    assert vcpu.get_cpuid2() == entries


def test_a_new_cpuid_leaves_msrs_and_fpu_as_they_were(vcpu: Vcpu) -> None:
    vcpu.set_msr(0x2FF, 0xC06)  # MTRR_DEF_TYPE, kept beside the state words
    vcpu.set_fpu(Fpu(fcw=0x27F))
    vcpu.set_cpuid2(parse_cpu("max,-lass").entries())
    assert (vcpu.get_msr(0x2FF), vcpu.get_fpu().fcw) == (0xC06, 0x27F)


# ---------------------------------------------------------------------------------------------- extended registers


FPU = Fpu(
    fpr=[ONE + index for index in range(8)],
    fcw=0x27F,
    fsw=0x3800,
    ftwx=0xFF,
    last_opcode=0x1D9,
    last_ip=0xFFFF_8000_0000_1234,
    last_dp=0x5678,
    xmm=[0x0102_0304_0506_0708_090A_0B0C_0D0E_0F00 + index for index in range(16)],
    mxcsr=0x1FA0,
)


def test_fpu_registers_come_back_on_either_engine(guest: Guest) -> None:
    guest.execute("nop")
    guest.vcpu.set_fpu(FPU)
    assert guest.vcpu.get_fpu() == FPU


def test_the_guest_sees_the_fpu_that_was_set_and_the_vmm_what_the_guest_computed(guest: Guest) -> None:
    guest.start("movq rax, xmm3; movq xmm5, rdx; fld1; mov ecx, 1", rdx=0x77)
    guest.vcpu.set_fpu(replace(FPU, fsw=0, ftwx=0))
    outcome = guest.run()
    assert outcome.registers.rax == FPU.xmm[3] & (1 << 64) - 1
    fpu = guest.vcpu.get_fpu()
    assert (fpu.xmm[5], fpu.fpr[0], fpu.fsw >> 11 & 7, fpu.ftwx) == (0x77, ONE, 7, 0x80)


def test_reserved_bits_of_mxcsr_are_refused(vcpu: Vcpu) -> None:
    assert refused(vcpu.set_fpu, Fpu(mxcsr=1 << 16, fcw=0x200)) == (
        errno.EINVAL,
        "[Errno 22] KVM_SET_FPU: MXCSR 0x10000 has reserved bits",
    )
    assert vcpu.get_fpu().fcw == 0x37F


def test_the_xsave_region_is_an_fxsave_image_with_a_header(guest: Guest) -> None:
    guest.vcpu.set_fpu(FPU)
    region = guest.vcpu.get_xsave()
    assert len(region) == 4096
    assert struct.unpack_from("<HHB", region) == (FPU.fcw, FPU.fsw, FPU.ftwx)
    assert int.from_bytes(region[XMM0 : XMM0 + 16], "little") == FPU.xmm[0]
    assert struct.unpack_from("<QQ", region, XSTATE_BV) == (0x203, 0)
    guest.vcpu.set_fpu(Fpu())
    guest.vcpu.set_xsave(region)
    assert guest.vcpu.get_fpu() == FPU


@pytest.mark.parametrize(
    ("components", "x87", "sse"), [(0, False, False), (1, True, False), (2, False, True)]
)
def test_components_that_are_not_in_use_get_their_initial_state(
    guest: Guest, components: int, x87: bool, sse: bool
) -> None:
    guest.vcpu.set_fpu(FPU)
    region = bytearray(guest.vcpu.get_xsave())
    region[XSTATE_BV] = components
    guest.vcpu.set_xsave(bytes(region))
    fpu = guest.vcpu.get_fpu()
    assert (fpu.fcw, fpu.fpr[0]) == ((FPU.fcw, FPU.fpr[0]) if x87 else (0x37F, 0))
    assert fpu.xmm[1] == (FPU.xmm[1] if sse else 0)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (XSTATE_BV, 1 << 2, "does not have"),
        (XSTATE_BV + 1, 1 << 1, "does not have"),
        (XSTATE_BV + 15, 0x80, "standard format"),
        (XSTATE_BV + 63, 1, "standard format"),
        (26, 1, "MXCSR"),
    ],
)
def test_a_region_that_no_processor_would_load_is_refused(
    vcpu: Vcpu, place: int, value: int, reason: str
) -> None:
    vcpu.set_cpuid2(parse_cpu("max,-pku").entries())
    region = bytearray(vcpu.get_xsave())
    region[place] |= value
    number, text = refused(vcpu.set_xsave, bytes(region))
    assert number == errno.EINVAL
    assert reason in text


def test_pkru_is_in_the_xsave_region_of_a_guest_with_protection_keys(vcpu: Vcpu) -> None:
    region = bytearray(vcpu.get_xsave())
    assert region[XSTATE_BV + 1] == 1 << 1
    region[PKRU : PKRU + 4] = (0x5555_5554).to_bytes(4, "little")
    vcpu.set_xsave(bytes(region))
    assert vcpu.get_xsave() == bytes(region)


def test_xcr0_is_what_cpuid_allows(vcpu: Vcpu) -> None:
    vcpu.set_cpuid2(parse_cpu("max,-xsave").entries())
    vcpu.set_xcrs({0: 1})
    assert vcpu.get_xcrs() == {0: 1}
    for values in ({0: 3}, {0: 0}, {1: 1}):
        assert refused(vcpu.set_xcrs, values)[0] == errno.EINVAL
    vcpu.set_cpuid2(parse_cpu("max").entries())
    vcpu.set_xcrs({0: 3})
    assert vcpu.get_xcrs() == {0: 3}


def test_debug_registers_come_back_and_the_guest_reads_them(guest: Guest) -> None:
    registers = DebugRegs((0x1000, 0x2000, 0x3000, 0x4000), 0xFFFF_0FF1, 0x401)
    guest.start("mov rax, dr1; mov rcx, dr6; mov rdx, dr7")
    guest.vcpu.set_debugregs(replace(registers, dr7=0x400))
    outcome = guest.run()
    assert (outcome.registers.rax, outcome.registers.rcx, outcome.registers.rdx) == (
        0x2000,
        0xFFFF_0FF1,
        0x400,
    )
    guest.vcpu.set_debugregs(registers)
    assert guest.vcpu.get_debugregs() == registers


def test_upper_halves_of_dr6_and_dr7_are_refused(vcpu: Vcpu) -> None:
    assert refused(vcpu.set_debugregs, DebugRegs(dr7=1 << 32))[0] == errno.EINVAL


# --------------------------------------------------------------------------------------------------------- the rest


def test_mp_state_without_an_irqchip_is_runnable_only(vcpu: Vcpu) -> None:
    assert vcpu.get_mp_state() is MpState.RUNNABLE
    for state in (MpState.HALTED, MpState.SIPI_RECEIVED):
        assert refused(vcpu.set_mp_state, state)[0] == errno.EINVAL


def test_a_vcpu_that_is_made_halted_waits_and_one_that_is_made_runnable_goes_on(vm: Vm) -> None:
    vm.create_irqchip()
    vcpu = vm.create_vcpu()
    vcpu.set_mp_state(MpState.HALTED)
    regs = vcpu.get_regs()
    vcpu.run()
    assert (vcpu.get_mp_state(), vcpu.get_regs()) == (MpState.HALTED, regs)
    vcpu.set_mp_state(MpState.RUNNABLE)
    assert vcpu.get_mp_state() is MpState.RUNNABLE


def test_translate_sees_through_smap_and_lass(guest: Guest) -> None:
    guest.start("nop")
    translate = guest.vcpu.translate
    assert translate(HIGH_SUPERVISOR + 5) == Translation(guest.gpa(HIGH_SUPERVISOR) + 5, valid=True)
    assert translate(LOW_SUPERVISOR) == Translation(guest.gpa(LOW_SUPERVISOR), valid=True)
    assert not translate(LOW_ABSENT).valid
    assert not translate(1 << 63).valid
