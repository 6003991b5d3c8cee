"""The test guest itself: what it reports, and that one program leaves nothing to the next."""

from __future__ import annotations

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.guest import CR2_UNTOUCHED, Guest
from lasskvm.conformance.layout import (
    HIGH_SUPERVISOR,
    KERNEL_CODE,
    LOW_ABSENT,
    LOW_USER,
    USER_CS,
    USER_SS,
    USER_STACK_TOP,
)
from lasskvm.kvm import HltExit
from lasskvm.x86.exceptions import PF, UD
from lasskvm.x86.registers import CR4_LASS, CR4_SMAP, CR4_SMEP


@pytest.fixture(scope="module")
def guest() -> Guest:
    return Guest()


def test_program_that_ends_is_completed(guest: Guest) -> None:
    outcome = guest.execute("mov eax, 5")
    assert outcome.completed
    assert str(outcome) == "completed"
    assert outcome.registers.rax == 5


def test_exception_is_reported_with_its_frame(guest: Guest) -> None:
    outcome = guest.execute("nop; fault: mov rax, [rbx]", cpl=3, rbx=LOW_ABSENT)
    assert (outcome.vector, outcome.error_code, outcome.cr2) == (PF, 4, LOW_ABSENT)
    assert (outcome.label, outcome.cs, outcome.ss, outcome.rsp) == ("fault", USER_CS, USER_SS, USER_STACK_TOP)
    assert str(outcome) == "#PF(0x4) at fault"


def test_exception_without_error_code(guest: Guest) -> None:
    outcome = guest.execute("ud2")
    assert (outcome.vector, outcome.error_code, outcome.rip) == (UD, None, KERNEL_CODE)
    assert outcome.cr2 == CR2_UNTOUCHED


def test_halt_of_the_program_is_no_event(guest: Guest) -> None:
    outcome = guest.execute("hlt; behind: nop")
    assert outcome.vector is None
    assert outcome.exit == HltExit(interrupts_enabled=False)
    assert outcome.label == "behind"


@pytest.mark.parametrize("cpl", [0, 1, 2, 3])
def test_program_runs_at_its_level(guest: Guest, cpl: int) -> None:
    assert guest.execute("mov eax, cs", cpl=cpl).registers.rax & 3 == cpl


def test_reset_restores_memory_tables_and_registers(guest: Guest) -> None:
    guest.cr4 &= ~CR4_LASS
    guest.write(LOW_USER, b"changed")
    guest.tables.map(0x1234_5678_9000, layout.DATA_GPA)
    layout.set_gate(guest.memory, UD, 0, present=False)
    guest.reset()
    assert guest.read(LOW_USER) == 0
    assert guest.tables.entry(0x1234_5678_9000) == 0
    assert guest.cr4 & (CR4_LASS | CR4_SMAP | CR4_SMEP) == CR4_LASS | CR4_SMAP | CR4_SMEP
    assert guest.execute("ud2").vector == UD


def test_memory_is_written_across_pages(guest: Guest) -> None:
    guest.write(HIGH_SUPERVISOR + 0xFFE, b"abcd")
    assert guest.read(HIGH_SUPERVISOR + 0xFFE, 2) == int.from_bytes(b"ab", "little")
    assert guest.read(HIGH_SUPERVISOR + 0x1000, 2) == int.from_bytes(b"cd", "little")


def test_lookup_makes_no_tables(guest: Guest) -> None:
    before = guest.tables.next_free
    assert guest.tables.entry(0x7777_0000_0000) == 0
    assert guest.tables.next_free == before
