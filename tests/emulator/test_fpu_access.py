"""Emulated and translated instructions share one set of x87 and SSE registers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import LOW_USER
from lasskvm.emulator.fpu import Fpu, FpuState, copy_fpu
from lasskvm.emulator.fpu_images import fxsave_image
from lasskvm.x86.fpu import FCW_INITIAL, MXCSR_INITIAL, MXCSR_RC_SHIFT, ROUND_UP

ONE = 0x3FFF_8000_0000_0000_0000
#: 1 / 3 in single precision, rounded down and up.
THIRD_DOWN, THIRD_UP = 0x3EAA_AAAA, 0x3EAA_AAAB


@pytest.fixture(scope="module")
def shared_guest() -> Guest:
    return Guest()


@pytest.fixture
def guest(shared_guest: Guest) -> Guest:
    shared_guest.reset()
    return shared_guest


@pytest.fixture
def fpu(guest: Guest) -> Fpu:
    """The registers of the engine, as in a new vCPU."""
    assert guest.execute("nop", cpl=3).completed
    registers = guest.vcpu.emulation.fpu
    assert not isinstance(registers, FpuState)
    copy_fpu(FpuState(), registers)
    return registers


def run(guest: Guest, source: str) -> None:
    outcome = guest.execute(source, cpl=3, rbx=LOW_USER)
    assert outcome.completed, str(outcome)


def test_new_vcpu_has_its_exceptions_masked() -> None:
    guest = Guest()
    run(guest, "stmxcsr [rbx]; fnstcw [rbx + 4]; fnstenv_m28byte [rbx + 8]")
    assert guest.read(LOW_USER, 4) == MXCSR_INITIAL
    assert guest.read(LOW_USER + 4, 2) == FCW_INITIAL
    assert guest.read(LOW_USER + 16, 2) == 0xFFFF


def test_what_translated_code_writes_is_seen(guest: Guest, fpu: Fpu) -> None:
    guest.write(LOW_USER, bytes(range(1, 17)) + (0x5F80).to_bytes(4, "little"))
    run(guest, "movdqu xmm13, [rbx]; ldmxcsr [rbx + 16]; fld1; fldz")
    assert fpu.xmm[13] == int.from_bytes(bytes(range(1, 17)), "little")
    assert fpu.mxcsr == 0x5F80
    assert (fpu.top, fpu.ftw, fpu.registers[7], fpu.registers[6]) == (6, 0xC0, ONE, 0)


def test_what_emulated_instructions_write_is_seen(guest: Guest, fpu: Fpu) -> None:
    fpu.xmm[9] = 0x1234 << 100
    fpu.top, fpu.ftw, fpu.fsw = 5, 0xE0, 0x4000
    fpu.registers[5], fpu.registers[6] = ONE, ONE | 1 << 79
    run(guest, "fnstsw_m2byte [rbx + 32]; movdqu [rbx], xmm9; faddp_sti_st0 st1, st0; fstp_m80fp [rbx + 16]")
    assert guest.read(LOW_USER) | guest.read(LOW_USER + 8) << 64 == 0x1234 << 100
    assert guest.read(LOW_USER + 16, 8) == 0
    assert guest.read(LOW_USER + 32, 2) == 0x4000 | 5 << 11


def test_rounding_set_by_an_emulated_instruction_counts_at_once(guest: Guest, fpu: Fpu) -> None:
    ones = (0x3F80_0000).to_bytes(4, "little") + (0x4040_0000).to_bytes(4, "little")
    program = "movss xmm0, [rbx]; divss xmm0, [rbx + 4]; movss [rbx + 8], xmm0"
    for mxcsr, expected in (
        (MXCSR_INITIAL | 3 << MXCSR_RC_SHIFT, THIRD_DOWN),
        (MXCSR_INITIAL | ROUND_UP << MXCSR_RC_SHIFT, THIRD_UP),
    ):
        guest.write(LOW_USER, ones)
        fpu.mxcsr = mxcsr
        run(guest, program)
        assert guest.read(LOW_USER + 8, 4) == expected


def test_precision_set_by_an_emulated_instruction_counts_at_once(guest: Guest, fpu: Fpu) -> None:
    program = "fild_m32int [rbx]; fild_m32int [rbx + 4]; fdivp_sti_st0 st1, st0; fstp_m64fp [rbx + 8]"
    for fcw, expected in ((FCW_INITIAL, 0x3FD5_5555_5555_5555), (0x007F, 0x3FD5_5555_6000_0000)):
        guest.write(LOW_USER, (1).to_bytes(4, "little") + (3).to_bytes(4, "little"))
        fpu.fcw = fcw
        run(guest, program)
        assert guest.read(LOW_USER + 8) == expected


@pytest.mark.parametrize("name", ["fop", "fip", "fdp", "fcs", "fds"])
def test_pointers_of_the_last_instruction_are_kept(fpu: Fpu, name: str) -> None:
    setattr(fpu, name, 0x5A5)
    assert getattr(fpu, name) == 0x5A5


def test_fxsave_of_direct_execution_is_the_image_of_the_registers(guest: Guest, fpu: Fpu) -> None:
    for number in range(16):
        fpu.xmm[number] = (number + 1) * 0x1111_2222_3333_4444
    for number in range(8):
        fpu.registers[number] = ONE + number
    fpu.top, fpu.ftw, fpu.fsw = 3, 0x5A, 0x0100
    run(guest, "fxsave64 [rbx]")
    image = fxsave_image(fpu, wide_pointers=True)
    stored = b"".join(guest.read(LOW_USER + at).to_bytes(8, "little") for at in range(0, len(image), 8))
    assert stored == image


@pytest.mark.parametrize("kind", [FpuState, None], ids=["own storage", "engine"])
def test_registers_hold_what_is_put_there(fpu: Fpu, kind: Callable[[], Fpu] | None) -> None:
    registers = kind() if kind else fpu
    original = FpuState()
    original.xmm[:] = [1 << 127 | number for number in range(16)]
    original.registers[:] = [1 << 79 | number for number in range(8)]
    original.mxcsr, original.fcw, original.fsw = 0xFFC0, 0x0B40, 0xC7FF
    original.top, original.ftw = 7, 0x81
    original.fcs, original.fds = 0xFFFF, 0x1234
    original.fop, original.fip, original.fdp = 0x7FF, (1 << 64) - 1, 1 << 63
    copy_fpu(original, registers)
    copied = FpuState()
    copy_fpu(registers, copied)
    for name in FpuState.__slots__:
        assert getattr(copied, name) == getattr(original, name), name
    copy_fpu(FpuState(), registers)
