"""32-bit code in IA-32e mode: LASS applies there too, and every address is in the lower half."""

from __future__ import annotations

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import LDT_DATA, LOW_SUPERVISOR, LOW_USER, USER_CODE, USER_STACK_TOP
from lasskvm.kvm import DescriptorTable, ShutdownExit
from lasskvm.state import Segment
from lasskvm.x86.exceptions import GP, PF, PF_P, PF_U, SS
from lasskvm.x86.registers import (
    AR_DATA,
    AR_DPL_SHIFT,
    AR_LDT,
    CR4_LASS,
    CR4_SMAP,
    CR4_SMEP,
    MASK32,
    RFLAGS_AC,
)


def test_user_code_never_violates_lass(guest: Guest) -> None:
    outcome = guest.execute(
        "mov eax, [ebx]; mov [ebx], eax; push eax; call next; next: pop ecx", cpl=3, bits=32, rbx=LOW_USER
    )
    assert outcome.completed


def test_user_access_to_a_supervisor_page_is_a_page_fault(guest: Guest) -> None:
    outcome = guest.execute("fault: mov eax, [ebx]", cpl=3, bits=32, rbx=LOW_SUPERVISOR)
    assert (outcome.vector, outcome.error_code, outcome.cr2) == (PF, PF_P | PF_U, LOW_SUPERVISOR)


@pytest.mark.parametrize("ac", [False, True])
@pytest.mark.parametrize("smap", [False, True])
def test_supervisor_code_violates_lass_with_its_first_fetch(guest: Guest, ac: bool, smap: bool) -> None:
    guest.cr4 = guest.cr4 & ~CR4_SMAP | CR4_SMAP * smap
    outcome = guest.execute("nop", cpl=0, bits=32, rflags=RFLAGS_AC * ac)
    assert (outcome.vector, outcome.error_code, outcome.rip) == (GP, 0, USER_CODE)


def test_supervisor_code_runs_without_lass_and_smep(guest: Guest) -> None:
    guest.cr4 &= ~(CR4_LASS | CR4_SMEP | CR4_SMAP)
    assert guest.execute("mov eax, [ebx]", cpl=0, bits=32, rbx=LOW_USER).completed


@pytest.mark.parametrize(
    "source", ["mov es, eax", "mov fs, eax", "lar ecx, eax", "push eax; pop es", "les ecx, [ebx]"]
)
def test_descriptor_reads_are_implicit_supervisor_accesses(guest: Guest, source: str) -> None:
    guest.write(LOW_USER + 4, LDT_DATA.to_bytes(2, "little"))
    assert guest.execute(source, cpl=3, bits=32, rax=LDT_DATA, rbx=LOW_USER).completed
    guest.write(LOW_SUPERVISOR, guest.memory.read(layout.LDT_GPA, 0x100))
    guest.sregs["ldt"] = Segment(layout.LDT_SELECTOR, LOW_SUPERVISOR, 0xFFF, AR_LDT)
    outcome = guest.execute(source, cpl=3, bits=32, rax=LDT_DATA, rbx=LOW_USER)
    assert (outcome.vector, outcome.error_code) == (GP, 0)


def test_low_gdt_means_shutdown(guest: Guest) -> None:
    guest.write(LOW_SUPERVISOR, guest.memory.read(layout.GDT_GPA, 0x100))
    guest.sregs["gdt"] = DescriptorTable(LOW_SUPERVISOR, 0xFF)
    outcome = guest.execute("mov es, eax", cpl=3, bits=32, rax=layout.USER_SS)
    assert isinstance(outcome.exit, ShutdownExit)


def test_addresses_wrap_at_4_gib(guest: Guest) -> None:
    guest.write(LOW_USER + 0x10, (0x1234).to_bytes(4, "little"))
    outcome = guest.execute("mov eax, [ebx + 0x20]", cpl=3, bits=32, rbx=LOW_USER - 0x10)
    assert outcome.registers.rax == 0x1234
    segment = Segment(layout.USER_SS, 0xFFFF_FFF0, MASK32, AR_DATA | 3 << AR_DPL_SHIFT)
    guest.sregs["fs"] = segment
    outcome = guest.execute("mov eax, fs:[ebx]", cpl=3, bits=32, rbx=LOW_USER + 0x20)
    assert outcome.completed
    assert outcome.registers.rax == 0x1234


@pytest.mark.parametrize(
    ("source", "vector"), [("mov eax, fs:[ebx]", GP), ("mov eax, ss:[ebx]", SS), ("push eax", SS)]
)
def test_segment_limits_apply(guest: Guest, source: str, vector: int) -> None:
    limited = Segment(layout.USER_SS, 0, 0xFFF, AR_DATA | 3 << AR_DPL_SHIFT)
    guest.sregs["fs"] = guest.sregs["ss"] = limited
    outcome = guest.execute(f"fault: {source}", cpl=3, bits=32, rbx=LOW_USER)
    assert (outcome.vector, outcome.error_code, outcome.label) == (vector, 0, "fault")


def test_frame_of_a_compatibility_mode_program(guest: Guest) -> None:
    outcome = guest.execute("fault: ud2", cpl=3, bits=32)
    assert (outcome.cs, outcome.ss, outcome.rsp, outcome.label) == (
        layout.USER_CS32, layout.USER_SS, USER_STACK_TOP, "fault",
    )  # fmt: skip
