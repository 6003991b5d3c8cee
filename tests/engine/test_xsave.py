"""XSAVE and its relatives in running guests, by direct execution and by the emulator."""

from __future__ import annotations

import struct

import pytest
from xsave_processor import ALL, xsave_entries

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_ABSENT, HIGH_SUPERVISOR, HIGH_USER, LOW_SUPERVISOR, LOW_USER
from lasskvm.engine import context as c
from lasskvm.kvm import Fpu
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import PKRU
from lasskvm.x86.exceptions import GP, NM, PF, PF_P, PF_PK, PF_U, PF_W, SS, UD
from lasskvm.x86.paging import PTE_KEY_SHIFT, PTE_U
from lasskvm.x86.registers import CR0_TS, CR4_LASS, CR4_OSXSAVE, CR4_PKE, RFLAGS_AC
from lasskvm.x86.xsave import (
    COMPONENT_PKRU,
    COMPONENT_SSE,
    COMPONENT_X87,
    PKRU_OFFSET,
    XSAVE_HEADER,
    XSAVE_HEADER_BYTES,
)

MXCSR, XMM0, XMM1 = 24, 160, 176
OPERATIONS = ("xsave [rbx]", "xsave64 [rbx]", "xsaveopt [rbx]", "xrstor [rbx]", "xrstor64 [rbx]")
KEY = 3
ACCESS_DISABLE, WRITE_DISABLE = 1 << 2 * KEY, 2 << 2 * KEY


@pytest.fixture(scope="module", params=["jit", "emulator"])
def shared_machine(request: pytest.FixtureRequest) -> Guest:
    guest = Guest(engine=request.param)
    guest.vcpu.set_cpuid2(xsave_entries("xsaveopt", "xgetbv1"))
    return guest


@pytest.fixture
def machine(shared_machine: Guest) -> Guest:
    """A guest with XSAVE, its components in XCR0; the area at HIGH_SUPERVISOR, and at LOW_USER, is full of zeros."""
    shared_machine.reset()
    shared_machine.cr4 |= CR4_OSXSAVE
    for gva in (HIGH_SUPERVISOR, LOW_USER):
        shared_machine.write(gva, bytes(PAGE_SIZE))
    return shared_machine


def set_xcr0(value: int) -> str:
    return f"xor ecx, ecx; xor edx, edx; mov eax, {value:#x}; xsetbv;"


def word(guest: Guest, offset: int, at: int = HIGH_SUPERVISOR) -> int:
    return guest.read(at + offset)


# ---------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("save", ["xsave", "xsave64", "xsaveopt", "xsaveopt64"])
def test_registers_come_back_as_they_were_saved(machine: Guest, save: str) -> None:
    restore = "xrstor64" if save.endswith("64") else "xrstor"
    outcome = machine.execute(
        f"""
        {set_xcr0(ALL)} movq xmm1, r8; movq xmm15, r9; fninit; fld1; fldpi; {save} [rbx]
        pxor xmm1, xmm1; pcmpeqd xmm15, xmm15; fninit; fldz
        {restore} [rbx]; movq r10, xmm1; movq r11, xmm15; fstp qword [rbx + 0xF00]; fstp qword [rbx + 0xF08]
        """,
        rbx=HIGH_SUPERVISOR, r8=0x1122_3344_5566_7788, r9=0x99,
    )  # fmt: skip
    assert outcome.completed
    assert (outcome.registers.r10, outcome.registers.r11) == (0x1122_3344_5566_7788, 0x99)
    assert word(machine, 0xF00) == 0x4009_21FB_5444_2D18
    assert word(machine, 0xF08) == 0x3FF0_0000_0000_0000
    assert word(machine, XMM1) == 0x1122_3344_5566_7788
    assert word(machine, XSAVE_HEADER) == COMPONENT_X87 | COMPONENT_SSE


def test_rounding_follows_the_restored_control_registers(machine: Guest) -> None:
    """What is restored rules the instructions behind it, not only what is stored later."""
    machine.write(HIGH_SUPERVISOR, b"\x7f\x0b")  # FCW: round up
    machine.write(HIGH_SUPERVISOR + MXCSR, (0x1F80 | 1 << 13).to_bytes(4, "little"))  # round down
    machine.write(HIGH_SUPERVISOR + 0xF00, struct.pack("<dd", 0.25, -0.5))

    def rounded(components: int) -> tuple[int, int]:
        """0.25 by x87 and -0.5 by SSE, as integers, behind XRSTOR of *components*."""
        machine.write(HIGH_SUPERVISOR + XSAVE_HEADER, bytes((components,)))
        outcome = machine.execute(
            f"""
            fninit; {set_xcr0(3)} xrstor [rbx]
            fld qword [rbx + 0xF00]; fistp qword [rbx + 0xF10]; cvtsd2si r8, [rbx + 0xF08]
            """,
            rbx=HIGH_SUPERVISOR,
        )
        assert outcome.completed
        return word(machine, 0xF10), outcome.registers.r8

    assert rounded(COMPONENT_X87 | COMPONENT_SSE) == (1, (1 << 64) - 1)
    assert rounded(0) == (0, (1 << 64) - 1)
    machine.write(HIGH_SUPERVISOR + MXCSR, (0x1F80).to_bytes(4, "little"))
    assert rounded(COMPONENT_X87) == (1, 0)


def test_components_without_their_bit_are_initialized(machine: Guest) -> None:
    machine.write(HIGH_SUPERVISOR + MXCSR, (0x1F80).to_bytes(4, "little"))
    outcome = machine.execute(
        f"{set_xcr0(3)} fninit; fld1; pcmpeqd xmm3, xmm3; xrstor [rbx]; movq r8, xmm3",
        rbx=HIGH_SUPERVISOR,
    )
    assert outcome.completed
    assert outcome.registers.r8 == 0
    assert machine.vcpu.get_fpu() == Fpu(fcw=0x37F, mxcsr=0x1F80)


def test_only_what_the_guest_has_enabled_is_saved(machine: Guest) -> None:
    """The processor that is borrowed for direct execution has more components, and an XCR0 of its own."""
    machine.write(HIGH_SUPERVISOR + 576, b"\xa5" * (PAGE_SIZE - 576))
    outcome = machine.execute(
        f"{set_xcr0(1)} pcmpeqd xmm0, xmm0; fld1; or eax, -1; or edx, -1; xsave [rbx]; mov ecx, 0; xgetbv",
        rbx=HIGH_SUPERVISOR,
    )
    assert outcome.completed
    assert (outcome.registers.rax, outcome.registers.rdx) == (1, 0)
    assert (word(machine, XSAVE_HEADER), word(machine, XMM0)) == (1, 0)
    assert machine.memory.read(machine.gpa(HIGH_SUPERVISOR + 576), PAGE_SIZE - 576) == b"\xa5" * (
        PAGE_SIZE - 576
    )


def test_xgetbv_tells_xcr0_and_what_is_in_use(machine: Guest) -> None:
    outcome = machine.execute(
        f"{set_xcr0(3)} fninit; pcmpeqd xmm0, xmm0; xgetbv; mov r8, rax; mov ecx, 1; xgetbv; mov r9, rax"
    )
    assert (outcome.registers.r8, outcome.registers.r9) == (3, 2 | outcome.registers.r9 & 1)
    cleared = machine.execute(f"{set_xcr0(3)} xrstor [rbx]; mov ecx, 1; xgetbv", rbx=HIGH_SUPERVISOR)
    assert cleared.registers.rax == 0


def test_user_code_saves_and_restores(machine: Guest) -> None:
    machine.start(
        "mov eax, 3; movq xmm1, r8; xsave [rbx]; pxor xmm1, xmm1; xrstor [rbx]; movq r9, xmm1; xor ecx, ecx; xgetbv",
        cpl=3, rbx=LOW_USER, r8=0x77,
    )  # fmt: skip
    machine.vcpu.set_xcrs({0: 3})
    outcome = machine.run()
    assert outcome.completed
    assert (outcome.registers.r9, outcome.registers.rax) == (0x77, 3)


def test_what_a_guest_has_saved_is_what_the_vmm_gets(machine: Guest) -> None:
    outcome = machine.execute(
        f"{set_xcr0(3)} pcmpeqd xmm0, xmm0; fninit; fldpi; xsave64 [rbx]", rbx=HIGH_SUPERVISOR
    )
    assert outcome.completed
    size = XSAVE_HEADER + XSAVE_HEADER_BYTES
    region = machine.vcpu.get_xsave()[:size]
    saved = machine.memory.read(machine.gpa(HIGH_SUPERVISOR), size)
    # PKRU is at its initial value, but the VMM gets everything.
    assert saved[:416] == region[:416]
    assert saved[XSAVE_HEADER] == 3


# ---------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("source", OPERATIONS)
def test_lass_is_asked_about_the_area(machine: Guest, source: str) -> None:
    program = f"{set_xcr0(3)} fault: {source}"
    outcome = machine.execute(program, rbx=LOW_SUPERVISOR)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    with_ac = machine.execute(program, rbx=LOW_USER, rflags=RFLAGS_AC)
    assert with_ac.completed
    user = machine.execute(f"fault: {source}", cpl=3, rbx=HIGH_USER, rax=1)
    assert (user.vector, user.error_code, user.label) == (GP, 0, "fault")
    machine.cr4 &= ~CR4_LASS
    assert machine.execute("fault: xsave [rbx]", cpl=3, rbx=HIGH_USER, rax=1).completed


def test_a_lass_violation_through_the_stack_is_a_stack_fault(machine: Guest) -> None:
    outcome = machine.execute("fault: xsave [rbp]", rbp=LOW_SUPERVISOR, rax=1)
    assert (outcome.vector, outcome.error_code, outcome.label) == (SS, 0, "fault")


@pytest.mark.parametrize("source", OPERATIONS)
@pytest.mark.parametrize(("cpl", "address"), [(0, HIGH_ABSENT), (3, layout.LOW_ABSENT)])
def test_a_missing_page_faults_with_its_address(machine: Guest, source: str, cpl: int, address: int) -> None:
    outcome = machine.execute(f"fault: {source}", cpl=cpl, rbx=address, rax=1)
    write = 0 if "xrstor" in source else PF_W
    assert (outcome.vector, outcome.error_code) == (PF, write | (PF_U if cpl else 0))
    assert (outcome.cr2, outcome.label) == (address, "fault")


def test_an_area_that_ends_on_a_missing_page_is_not_begun(machine: Guest) -> None:
    last = HIGH_SUPERVISOR + PAGE_SIZE - 512
    machine.tables.unmap(HIGH_SUPERVISOR + PAGE_SIZE)
    machine.write(last, b"\xa5" * 512)
    outcome = machine.execute("fld1; fault: xsave [rbx]", rbx=last, rax=1)
    assert (outcome.vector, outcome.error_code, outcome.label) == (PF, PF_W, "fault")
    assert outcome.cr2 == HIGH_SUPERVISOR + PAGE_SIZE
    assert machine.memory.read(machine.gpa(last), 512) == b"\xa5" * 512


@pytest.mark.parametrize("source", OPERATIONS)
def test_the_instructions_are_refused_as_the_manual_says(machine: Guest, source: str) -> None:
    program = f"fault: {source}"
    misaligned = machine.execute(program, rbx=HIGH_SUPERVISOR + 32, rax=1)
    assert (misaligned.vector, misaligned.error_code, misaligned.label) == (GP, 0, "fault")
    machine.cr0 |= CR0_TS
    assert machine.execute(program, rbx=HIGH_SUPERVISOR, rax=1).vector == NM
    machine.cr4 &= ~CR4_OSXSAVE
    undefined = machine.execute(program, rbx=HIGH_SUPERVISOR, rax=1)
    assert (undefined.vector, undefined.label) == (UD, "fault")
    for other in ("xgetbv", "xsetbv"):
        assert machine.execute(other, rax=1).vector == UD


def test_xrstor_refuses_a_header_that_xsave_does_not_write(machine: Guest) -> None:
    for place, value in ((0, 1 << 2), (1, 1 << 1), (15, 0x80), (23, 1)):
        machine.write(HIGH_SUPERVISOR + XSAVE_HEADER, bytes(64))
        machine.write(HIGH_SUPERVISOR + XSAVE_HEADER + place, bytes((value,)))
        outcome = machine.execute("fault: xrstor [rbx]", rbx=HIGH_SUPERVISOR, rax=1)
        assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


@pytest.mark.parametrize("value", [0, 2, 5, 7, 0xE7])
def test_xcr0_takes_what_cpuid_enumerates(machine: Guest, value: int) -> None:
    outcome = machine.execute(f"xor ecx, ecx; mov eax, {value}; xor edx, edx; fault: xsetbv")
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    assert machine.vcpu.get_xcrs() == {0: 1}


def test_xsetbv_is_privileged(machine: Guest) -> None:
    outcome = machine.execute("fault: xsetbv", cpl=3, rax=1)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_without_xsave_in_cpuid_the_instructions_do_not_exist() -> None:
    hidden = Guest("max,-xsave")
    for source in (*OPERATIONS, "xgetbv", "xsetbv"):
        outcome = hidden.execute(f"fault: {source}", rbx=HIGH_SUPERVISOR, rax=1)
        assert (outcome.vector, outcome.label) == (UD, "fault")
    outcome = hidden.execute("mov rax, cr4; bts rax, 18; fault: mov cr4, rax")
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


# ------------------------------------------------------------------------------------------------------ PKRU


@pytest.fixture
def keys(machine: Guest) -> Guest:
    """Protection keys on; the page at LOW_USER has one."""
    machine.cr4 |= CR4_PKE
    machine.tables.map(LOW_USER, machine.gpa(LOW_USER), PTE_U | KEY << PTE_KEY_SHIFT)
    machine.tables.map(layout.LOW_ABSENT, machine.gpa(HIGH_SUPERVISOR), PTE_U)
    return machine


def set_rights(guest: Guest, rights: int) -> None:
    """Put them into the area at LOW_ABSENT, which the fixture maps."""
    guest.write(HIGH_SUPERVISOR + XSAVE_HEADER, COMPONENT_PKRU.to_bytes(8, "little"))
    guest.write(HIGH_SUPERVISOR + PKRU_OFFSET, rights.to_bytes(4, "little"))


def restores_rights(then: str, before: str = "inc byte [rdi]") -> str:
    """User code cannot write XCR0, so a program starts in the kernel; it makes user accesses by AC = 1."""
    return f"{set_xcr0(ALL)} {before}; mov eax, {COMPONENT_PKRU:#x}; xrstor [rbx]; fault: {then}"


@pytest.mark.parametrize(
    ("rights", "source", "error_code"),
    [
        (WRITE_DISABLE, "mov al, [rdi]", None),
        (WRITE_DISABLE, "mov [rdi], al", PF_P | PF_W | PF_PK),
        (ACCESS_DISABLE, "mov al, [rdi]", PF_P | PF_PK),
        (~(ACCESS_DISABLE | WRITE_DISABLE) & 0xFFFF_FFFC, "inc byte [rdi]", None),
    ],
)
def test_restored_rights_hold_for_the_next_access(
    keys: Guest, rights: int, source: str, error_code: int | None
) -> None:
    """Also when the page has been accessed before."""
    set_rights(keys, rights)
    outcome = keys.execute(restores_rights(source), rbx=HIGH_SUPERVISOR, rdi=LOW_USER, rflags=RFLAGS_AC)
    if error_code is None:
        assert outcome.completed
    else:
        assert (outcome.vector, outcome.error_code, outcome.label) == (PF, error_code, "fault")
        assert outcome.cr2 == LOW_USER


def test_rights_that_are_not_in_the_area_are_given_back(keys: Guest) -> None:
    set_rights(keys, 0)
    keys.write(HIGH_SUPERVISOR + XSAVE_HEADER, bytes(8))
    before = f"xor ecx, ecx; xor edx, edx; mov eax, {ACCESS_DISABLE}; wrpkru"
    outcome = keys.execute(
        restores_rights("inc byte [rdi]", before), rbx=HIGH_SUPERVISOR, rdi=LOW_USER, rflags=RFLAGS_AC
    )
    assert outcome.completed
    assert keys.vcpu.state.words[PKRU] == 0


def test_rights_are_saved_and_restored(keys: Guest) -> None:
    outcome = keys.execute(
        f"""
        {set_xcr0(ALL)} mov eax, 0x5550; wrpkru; mov eax, {ALL:#x}; xsave [rbx]
        xor eax, eax; wrpkru; mov eax, {ALL:#x}; xrstor [rbx]; rdpkru
        """,
        rbx=HIGH_SUPERVISOR,
    )
    assert outcome.completed
    assert outcome.registers.rax == 0x5550
    assert word(keys, PKRU_OFFSET) == 0x5550
    assert word(keys, XSAVE_HEADER) & COMPONENT_PKRU


def test_the_area_itself_is_read_with_the_old_rights(keys: Guest) -> None:
    """And written with the rights that are saved."""
    set_rights(keys, 0)
    keys.tables.map(layout.LOW_ABSENT, keys.gpa(HIGH_SUPERVISOR), PTE_U | KEY << PTE_KEY_SHIFT)
    for operation, error_code in (("xrstor [rbx]", PF_P | PF_PK), ("xsave [rbx]", PF_P | PF_PK | PF_W)):
        outcome = keys.execute(
            f"{set_xcr0(ALL)} mov eax, {ACCESS_DISABLE}; wrpkru; mov eax, {COMPONENT_PKRU}; fault: {operation}",
            rbx=layout.LOW_ABSENT, rflags=RFLAGS_AC,
        )  # fmt: skip
        assert (outcome.vector, outcome.error_code, outcome.label) == (PF, error_code, "fault")


# ------------------------------------------------------------------------------------- direct execution alone


@pytest.mark.parametrize("source", [*OPERATIONS, "xgetbv", "xsetbv"])
@pytest.mark.parametrize("osxsave", [0, CR4_OSXSAVE])
def test_the_translator_never_executes_them(source: str, osxsave: int, native: Guest) -> None:
    """Whatever is in CR4: they end the run, with RIP on them."""
    native.reset()
    native.cr4 |= osxsave
    program = native.start(f"mov eax, 1; left: {source}", rbx=HIGH_SUPERVISOR)
    native.vcpu.engine.stop_after(1000)
    engine_exit = native.vcpu.engine.run()
    assert (engine_exit.reason, engine_exit.vector) == (c.EXIT_EXCEPTION, UD)
    assert native.vcpu.get_regs().rip == program.labels["left"]


@pytest.fixture(scope="module")
def native() -> Guest:
    guest = Guest()
    guest.vcpu.set_cpuid2(xsave_entries("xsaveopt", "xgetbv1"))
    return guest


def test_sse_mask_bits_do_not_reach_beyond_xcr0(machine: Guest) -> None:
    outcome = machine.execute(
        f"{set_xcr0(1)} pcmpeqd xmm0, xmm0; mov eax, {COMPONENT_SSE}; xrstor [rbx]; movq r8, xmm0",
        rbx=HIGH_SUPERVISOR,
    )
    assert outcome.completed
    assert outcome.registers.r8 == (1 << 64) - 1
