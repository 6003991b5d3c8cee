"""Port I/O: who may, what the VMM sees, and how string instructions go on."""

from __future__ import annotations

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, KERNEL_CODE, LOW_USER
from lasskvm.kvm import IoExit
from lasskvm.x86.exceptions import GP, PF
from lasskvm.x86.registers import RFLAGS_DF

PORT = 0x99
IOPL_3 = 3 << 12


@pytest.mark.parametrize(
    ("source", "size", "value"),
    [
        ("out 0x99, al", 1, 0x44),
        ("out dx, al", 1, 0x44),
        ("out dx, ax", 2, 0x3344),
        ("out dx, eax", 4, 0x11223344),
    ],
)
def test_out_is_an_exit_with_the_value(guest: Guest, source: str, size: int, value: int) -> None:
    outcome = guest.execute(f"fault: {source}", rax=0x11223344, rdx=PORT)
    assert outcome.exit == IoExit(PORT, size, write=True, data=value)
    assert guest.run().completed


@pytest.mark.parametrize(
    ("source", "size", "result"),
    [
        ("in al, 0x99", 1, 0xFFFF_FFFF_FFFF_FFA5),
        ("in al, dx", 1, 0xFFFF_FFFF_FFFF_FFA5),
        ("in ax, dx", 2, 0xFFFF_FFFF_FFFF_A5A5),
        ("in eax, dx", 4, 0xA5A5_A5A5),
    ],
)
def test_in_takes_what_the_vmm_answers(guest: Guest, source: str, size: int, result: int) -> None:
    outcome = guest.execute(source, rax=2**64 - 1, rdx=PORT)
    assert isinstance(outcome.exit, IoExit)
    assert (outcome.exit.port, outcome.exit.size, outcome.exit.write) == (PORT, size, False)
    outcome.exit.data = 0xA5A5A5A5 & (1 << 8 * size) - 1
    outcome = guest.run()
    assert outcome.completed
    assert outcome.registers.rax == result


def test_unanswered_in_reads_all_ones(guest: Guest) -> None:
    guest.execute("in al, dx", rdx=PORT)
    assert guest.run().registers.rax == 0xFF


def test_repeated_output_exits_once_for_each_element(guest: Guest) -> None:
    guest.write(HIGH_SUPERVISOR, b"hello")
    guest.start("rep outsb", rsi=HIGH_SUPERVISOR, rcx=5, rdx=PORT)
    text = b""
    while isinstance(reason := guest.vcpu.run(), IoExit):
        text += bytes((reason.data,))
    assert text == b"hello"
    regs = guest.vcpu.get_regs()
    assert (regs.rcx, regs.rsi) == (0, HIGH_SUPERVISOR + 5)


def test_repeated_input_stores_each_element(guest: Guest) -> None:
    guest.start("rep insw", rdi=HIGH_SUPERVISOR, rcx=3, rdx=PORT)
    for value in (0x1111, 0x2222, 0x3333):
        reason = guest.vcpu.run()
        assert isinstance(reason, IoExit)
        assert (reason.size, reason.write) == (2, False)
        reason.data = value
    outcome = guest.run()
    assert outcome.completed
    assert guest.read(HIGH_SUPERVISOR, 6) == 0x3333_2222_1111
    assert outcome.registers.rdi == HIGH_SUPERVISOR + 6


def test_direction_flag_turns_string_output_around(guest: Guest) -> None:
    guest.write(HIGH_SUPERVISOR, b"abc")
    guest.start("rep outsb", rsi=HIGH_SUPERVISOR + 2, rcx=3, rdx=PORT, rflags=RFLAGS_DF)
    text = b""
    while isinstance(reason := guest.vcpu.run(), IoExit):
        text += bytes((reason.data,))
    assert text == b"cba"


def test_repeated_input_with_count_zero_does_nothing(guest: Guest) -> None:
    assert guest.execute("rep insb", rdi=layout.HIGH_ABSENT, rcx=0, rdx=PORT).completed


def test_string_input_into_an_absent_page_faults_before_the_port_is_read(guest: Guest) -> None:
    outcome = guest.execute("fault: insb", rdi=layout.HIGH_ABSENT, rdx=PORT)
    assert (outcome.vector, outcome.cr2, outcome.label) == (PF, layout.HIGH_ABSENT, "fault")


def test_string_output_from_a_low_address_violates_lass(guest: Guest) -> None:
    outcome = guest.execute("fault: outsb", rsi=LOW_USER, rdx=PORT)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


@pytest.mark.parametrize("source", ["in al, dx", "out dx, al", "in eax, 0x99", "insb", "outsb", "rep outsb"])
def test_user_mode_needs_iopl_or_the_bitmap(guest: Guest, source: str) -> None:
    registers = {"rdx": PORT, "rdi": LOW_USER, "rsi": LOW_USER, "rcx": 1}
    outcome = guest.execute(f"fault: {source}", cpl=3, **registers)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    assert isinstance(guest.execute(source, cpl=3, rflags=IOPL_3, **registers).exit, IoExit)
    guest.memory.write(layout.TSS_GPA + layout.IO_BITMAP, bytes(0x100))
    assert isinstance(guest.execute(source, cpl=3, **registers).exit, IoExit)


@pytest.mark.parametrize(("source", "bits"), [("in al, dx", 1), ("in ax, dx", 3), ("in eax, dx", 0xF)])
def test_every_port_of_an_access_needs_its_bit_clear(guest: Guest, source: str, bits: int) -> None:
    gpa = layout.TSS_GPA + layout.IO_BITMAP + 0x100 // 8
    guest.memory.store(gpa, 2, 0xFFFF & ~(bits << 5))
    assert isinstance(guest.execute(source, cpl=3, rdx=0x105).exit, IoExit)
    guest.memory.store(gpa, 2, 0xFFFF & ~(bits >> 1 << 5))
    assert guest.execute(source, cpl=3, rdx=0x105).vector == GP


def test_bitmap_beyond_the_tss_limit_denies(guest: Guest) -> None:
    guest.memory.write(layout.TSS_GPA + layout.IO_BITMAP, bytes(0x2000))
    assert isinstance(guest.execute("in al, dx", cpl=3, rdx=0xFFFF).exit, IoExit)
    guest.memory.store(layout.TSS_GPA + 0x66, 2, 0xFFFF)
    assert guest.execute("in al, dx", cpl=3, rdx=0).vector == GP


def test_kernel_ignores_the_bitmap(guest: Guest) -> None:
    outcome = guest.execute("in al, dx", rdx=PORT)
    assert isinstance(outcome.exit, IoExit)
    assert outcome.rip == KERNEL_CODE
