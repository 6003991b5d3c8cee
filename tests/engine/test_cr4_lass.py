"""Enumerating LASS, enabling it, and what follows at once."""

from __future__ import annotations

import errno

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_USER, LOW_SUPERVISOR, LOW_USER
from lasskvm.x86.exceptions import GP
from lasskvm.x86.registers import CR4_LASS, RFLAGS_AC

ENABLE = "mov rax, cr4; bts rax, 27; enable: mov cr4, rax; "
DISABLE = "mov rax, cr4; btr rax, 27; mov cr4, rax; "
CPUID_7_1 = "mov eax, 7; mov ecx, 1; cpuid"
LASS_BIT = 1 << 6
RETURN = bytes((0xC3,))


@pytest.fixture(scope="module")
def guest_without_lass() -> Guest:
    return Guest("max,-lass")


def test_cpuid_shows_lass(guest: Guest) -> None:
    assert guest.execute(CPUID_7_1).registers.rax & LASS_BIT


def test_cpuid_hides_lass_on_request(guest_without_lass: Guest) -> None:
    guest_without_lass.cr4 &= ~CR4_LASS
    assert not guest_without_lass.execute(CPUID_7_1).registers.rax & LASS_BIT


def test_without_the_cpuid_bit_cr4_lass_is_reserved(guest_without_lass: Guest) -> None:
    guest_without_lass.cr4 &= ~CR4_LASS
    outcome = guest_without_lass.execute(ENABLE)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "enable")
    assert not guest_without_lass.vcpu.get_sregs().cr4 & CR4_LASS


def test_without_the_cpuid_bit_the_vmm_cannot_set_it_either(guest_without_lass: Guest) -> None:
    sregs = guest_without_lass.vcpu.get_sregs()
    sregs.cr4 |= CR4_LASS
    with pytest.raises(OSError, match="CPUID") as raised:
        guest_without_lass.vcpu.set_sregs(sregs)
    assert raised.value.errno == errno.EINVAL


def test_the_guest_sets_and_reads_cr4_lass(guest: Guest) -> None:
    guest.cr4 &= ~CR4_LASS
    outcome = guest.execute(ENABLE + "mov rbx, cr4")
    assert outcome.completed
    assert outcome.registers.rbx & CR4_LASS
    assert guest.vcpu.get_sregs().cr4 & CR4_LASS


def test_user_mode_cannot_write_cr4(guest: Guest) -> None:
    outcome = guest.execute("fault: mov cr4, rax", cpl=3)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_switching_lass_on_forgets_data_translations(guest: Guest) -> None:
    guest.cr4 &= ~CR4_LASS
    outcome = guest.execute(f"mov rcx, [rbx]; {ENABLE}fault: mov rcx, [rbx]", rbx=LOW_SUPERVISOR)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_switching_lass_on_forgets_code_translations(guest: Guest) -> None:
    guest.cr4 &= ~CR4_LASS
    guest.write(LOW_SUPERVISOR, RETURN)
    outcome = guest.execute(f"call rbx; {ENABLE}call rbx", rbx=LOW_SUPERVISOR, rflags=RFLAGS_AC)
    assert (outcome.vector, outcome.error_code, outcome.rip) == (GP, 0, LOW_SUPERVISOR)


def test_switching_lass_on_takes_effect_for_user_mode(guest: Guest) -> None:
    """The user program reads an upper-half user page, asks the kernel to enable LASS, and reads it again."""
    guest.cr4 &= ~CR4_LASS
    kernel = layout.KERNEL_CODE
    guest.place(assemble(f"push rax; {ENABLE}pop rax; iretq", kernel))
    layout.set_gate(guest.memory, 3, kernel, dpl=3)
    outcome = guest.execute("mov rcx, [rbx]; int3; fault: mov rcx, [rbx]", cpl=3, rbx=HIGH_USER)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_switching_lass_off_takes_effect_at_once(guest: Guest) -> None:
    outcome = guest.execute(
        "mov rcx, [rbx]; jmp done; handler: push rax; " + DISABLE + "pop rax; add rsp, 8; iretq; done: nop",
        rbx=LOW_SUPERVISOR, handlers={GP: "handler"},
    )  # fmt: skip
    assert outcome.completed


def test_clac_ends_what_stac_allowed(guest: Guest) -> None:
    outcome = guest.execute("stac; mov rcx, [rbx]; clac; fault: mov rcx, [rbx]", rbx=LOW_USER)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_popf_of_ac_allows_what_stac_allows(guest: Guest) -> None:
    outcome = guest.execute("pushfq; bts qword [rsp], 18; popfq; mov rcx, [rbx]", rbx=LOW_USER)
    assert outcome.completed
