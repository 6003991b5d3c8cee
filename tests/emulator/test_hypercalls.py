"""VMCALL and VMMCALL: undefined without a hypervisor that answers, KVM's hypercalls with one."""

from __future__ import annotations

import pytest
from emulator_guest import Guest
from legacy_modes import enter_compatibility_mode, enter_protected_mode, enter_real_mode, run

from lasskvm.conformance.guest import Guest as DirectGuest
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.faults import GuestFault
from lasskvm.kvm.paravirt import emulate_hypercall
from lasskvm.state import CPL, RAX, RFLAGS, RIP
from lasskvm.x86.cpu_models import CpuModel, parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import DB, UD
from lasskvm.x86.registers import RFLAGS_TF

VMCALL, VMMCALL = "0f01c1", "0f01d9"
BOTH = pytest.mark.parametrize("code", [VMCALL, VMMCALL], ids=["vmcall", "vmmcall"])
VAPIC_POLL_IRQ, KICK_CPU, CLOCK_PAIRING, SEND_IPI = 1, 5, 9, 10
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
NOT_PERMITTED, NO_SUCH_CALL = -1, -1000


@pytest.fixture
def kvm_guest(guest: Guest) -> Guest:
    guest.ctx.hypercall = emulate_hypercall
    return guest


# ------------------------------------------------------------------------------------------------ the instructions


@BOTH
def test_without_a_hypervisor_it_is_undefined(guest: Guest, code: str) -> None:
    assert guest.fault_of(code) == (UD, None)


@BOTH
def test_without_a_hypervisor_it_is_undefined_on_a_processor_that_claims_virtualization(
    guest: Guest, code: str
) -> None:
    features = parse_cpu("max").features | {"vmx", "svm"}
    guest.ctx.cpuid = CpuidTable(CpuModel("test", features).entries())
    assert guest.fault_of(code) == (UD, None)


@BOTH
@pytest.mark.parametrize("cpu", ["max", "amd", "max,-hypervisor"])
def test_a_hypervisor_answers_both_whatever_cpuid_says(kvm_guest: Guest, code: str, cpu: str) -> None:
    kvm_guest.ctx.cpuid = CpuidTable(parse_cpu(cpu).entries())
    called: list[Emulation] = []
    kvm_guest.ctx.hypercall = called.append
    rip = kvm_guest.words[RIP]
    kvm_guest.run(code)
    assert called == [kvm_guest.ctx]
    assert kvm_guest.words[RIP] == rip + 3


def test_a_single_stepped_hypercall_traps_behind_it(kvm_guest: Guest) -> None:
    kvm_guest.words[RFLAGS] |= RFLAGS_TF
    kvm_guest.words[RAX], rip = VAPIC_POLL_IRQ, kvm_guest.words[RIP]
    with pytest.raises(GuestFault) as trapped:
        kvm_guest.run(VMCALL)
    assert trapped.value.vector == DB
    assert (kvm_guest.words[RAX], kvm_guest.words[RIP]) == (0, rip + 3)


# ------------------------------------------------------------------------------------------------------- the calls


@BOTH
@pytest.mark.parametrize(
    ("number", "result"),
    [
        (VAPIC_POLL_IRQ, 0),
        (0, NO_SUCH_CALL),
        (KICK_CPU, NO_SUCH_CALL),
        (CLOCK_PAIRING, NO_SUCH_CALL),
        (SEND_IPI, NO_SUCH_CALL),
        (MASK64, NO_SUCH_CALL),
        (1 << 32 | VAPIC_POLL_IRQ, NO_SUCH_CALL),
    ],
)
def test_the_kernel_of_a_64_bit_guest_calls(kvm_guest: Guest, code: str, number: int, result: int) -> None:
    kvm_guest.words[RAX] = number
    before = list(kvm_guest.words)  # type: ignore[call-overload]
    kvm_guest.run(code)
    assert kvm_guest.words[RAX] == result & MASK64
    changed = {index for index, value in enumerate(before) if kvm_guest.words[index] != value}
    assert changed <= {RAX, RIP}


@pytest.mark.parametrize("number", [VAPIC_POLL_IRQ, KICK_CPU])
@pytest.mark.parametrize("cpl", [1, 2, 3])
def test_users_are_not_permitted_to(kvm_guest: Guest, number: int, cpl: int) -> None:
    if cpl == 3:
        kvm_guest.enter_user()
    kvm_guest.words[CPL] = cpl
    kvm_guest.words[RAX] = number
    kvm_guest.run(VMCALL)
    assert kvm_guest.words[RAX] == NOT_PERMITTED & MASK64


@pytest.mark.parametrize("bits", [16, 32])
def test_outside_64_bit_mode_number_and_result_have_32_bits(kvm_guest: Guest, bits: int) -> None:
    enter_protected_mode(kvm_guest, bits)
    kvm_guest.words[RAX] = 0xFFFF_FFFF << 32 | VAPIC_POLL_IRQ
    run(kvm_guest, VMCALL)
    assert kvm_guest.words[RAX] == 0
    kvm_guest.words[RAX] = KICK_CPU
    run(kvm_guest, VMCALL)
    assert kvm_guest.words[RAX] == NO_SUCH_CALL & MASK32


def test_in_compatibility_mode_the_result_has_32_bits(kvm_guest: Guest) -> None:
    enter_compatibility_mode(kvm_guest)
    run(kvm_guest, VMCALL)
    assert kvm_guest.words[RAX] == NOT_PERMITTED & MASK32


def test_real_mode_calls_as_well(kvm_guest: Guest) -> None:
    enter_real_mode(kvm_guest)
    kvm_guest.words[RAX] = VAPIC_POLL_IRQ
    run(kvm_guest, VMMCALL)
    assert kvm_guest.words[RAX] == 0


# ------------------------------------------------------------------------------------------------ direct execution


@BOTH
@pytest.mark.parametrize(("number", "result"), [(VAPIC_POLL_IRQ, 0), (KICK_CPU, NO_SUCH_CALL)])
def test_direct_execution_leaves_hypercalls_to_the_emulator(code: str, number: int, result: int) -> None:
    guest = DirectGuest()
    guest.vcpu.emulation.hypercall = emulate_hypercall
    name = {VMCALL: "vmcall", VMMCALL: "vmmcall"}[code]
    outcome = guest.execute(f"mov rcx, 7; {name}; mov rbx, rax; mov rdx, rcx", rax=number)
    assert outcome.completed
    assert (outcome.registers.rbx, outcome.registers.rdx) == (result & MASK64, 7)


@BOTH
def test_direct_execution_without_a_hypervisor_raises_invalid_opcode(code: str) -> None:
    guest = DirectGuest()
    guest.vcpu.emulation.hypercall = None
    name = {VMCALL: "vmcall", VMMCALL: "vmmcall"}[code]
    outcome = guest.execute(f"fault: {name}")
    assert str(outcome) == "#UD at fault"
