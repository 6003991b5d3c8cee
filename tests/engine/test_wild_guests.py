"""Guests that make no sense: whatever they do, ``run()`` returns an exit, and the next guest works."""

from __future__ import annotations

import random

import pytest
from legacy_machine import LegacyMachine

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, KERNEL_CODE, UPPER, USER_CODE
from lasskvm.kvm import (
    HltExit,
    InternalErrorExit,
    IntrExit,
    IoExit,
    MmioExit,
    Regs,
    ShutdownExit,
    vcpu,
)
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.exceptions import PF
from lasskvm.x86.paging import PTE_P, PTE_U, PTE_W

EXITS = (HltExit, InternalErrorExit, IntrExit, IoExit, MmioExit, ShutdownExit)
CODE_BYTES = 256
HOLE = 1 << 32
GENERAL = (
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rbp",
    "rsi",
    "rdi",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
)
RUNS_PER_GUEST = 3


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let endless programs come back soon."""
    monkeypatch.setattr(vcpu, "_SLICE_BLOCKS", 2_000)


def random_registers(rng: random.Random) -> dict[str, int]:
    """Some registers hold addresses, some small numbers, some anything."""
    choices = (
        lambda: (
            rng.choice((HIGH_SUPERVISOR, layout.LOW_USER, UPPER, KERNEL_CODE, USER_CODE))
            + rng.randrange(PAGE_SIZE)
        ),
        lambda: rng.randrange(256),
        lambda: rng.getrandbits(64),
    )
    return {name: rng.choice(choices)() for name in GENERAL}


def run_wild(guest: Guest) -> None:
    """A few short runs; port reads get random answers."""
    for _ in range(RUNS_PER_GUEST):
        reason = guest.vcpu.run()
        assert isinstance(reason, EXITS)
        if not isinstance(reason, IoExit | IntrExit):
            return


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("seed", range(60))
def test_random_bytes_as_code(guest: Guest, cpl: int, seed: int) -> None:
    rng = random.Random(f"code {cpl} {seed}")
    guest.start("nop", cpl=cpl, rflags=rng.choice((0, 1 << 8, 1 << 18, 1 << 9)), **random_registers(rng))
    address = USER_CODE if cpl == 3 else KERNEL_CODE
    guest.write(address, rng.randbytes(CODE_BYTES) + b"\xcd\x80")
    run_wild(guest)


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_as_16_bit_and_32_bit_code(guest: Guest, seed: int) -> None:
    rng = random.Random(f"legacy {seed}")
    machine = LegacyMachine(guest)
    code = ", ".join(str(byte) for byte in rng.randbytes(CODE_BYTES))
    run = machine.run_real if seed % 2 else machine.run_protected
    assert isinstance(run(f"db {code}", **{name: rng.getrandbits(16) for name in GENERAL[:7]}), EXITS)


def tables_on_the_way_to(guest: Guest, gva: int) -> set[int]:
    """The page tables that translate *gva*."""
    found, table = set(), guest.tables.root
    for shift in (39, 30, 21, 12):
        found.add(table)
        table = guest.memory.load(table + 8 * (gva >> shift & 0x1FF), 8) & ((1 << 52) - PAGE_SIZE)
    return found


def scramble(guest: Guest, rng: random.Random, spared: set[int]) -> None:
    """Write nonsense into page tables, but not into those in *spared*."""
    first = layout.TABLES_GPA
    for _ in range(300):
        entry = rng.randrange(first, guest.tables.next_free, 8)
        if entry & -PAGE_SIZE not in spared:
            guest.memory.store(
                entry, 8, rng.choice((rng.getrandbits(64), first | PTE_P | PTE_W | PTE_U, HOLE | PTE_P))
            )


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("seed", range(30))
def test_random_page_tables(guest: Guest, cpl: int, seed: int) -> None:
    rng = random.Random(f"tables {cpl} {seed}")
    guest.start("mov rax, [rbx]; mov [rcx], rax; push rax; call rdx", cpl=cpl, **random_registers(rng))
    scramble(guest, rng, tables_on_the_way_to(guest, layout.HANDLERS))
    run_wild(guest)


def test_page_fault_handler_that_faults_itself_comes_back_to_the_vmm(guest: Guest) -> None:
    """Each delivery succeeds, on the IST stack, and the fetch of the handler is the next page fault."""
    layout.set_gate(guest.memory, PF, layout.HIGH_ABSENT, ist=layout.IST)
    guest.start("mov rax, [rbx]", rbx=layout.HIGH_ABSENT)
    assert isinstance(guest.vcpu.run(), IntrExit)


@pytest.mark.parametrize("seed", range(20))
def test_random_descriptor_tables(guest: Guest, seed: int) -> None:
    rng = random.Random(f"descriptors {seed}")
    for gpa in (layout.GDT_GPA, layout.IDT_GPA, layout.TSS_GPA, layout.LDT_GPA):
        for _ in range(100):
            guest.memory.store(gpa + rng.randrange(0, 0x100, 2), 2, rng.getrandbits(16))
    guest.start(
        "mov fs, eax; int 0x33; ud2; lldt ax; ltr ax; retfq", cpl=rng.choice((0, 3)), **random_registers(rng)
    )
    run_wild(guest)


def test_jump_to_a_hole_is_an_internal_error(guest: Guest) -> None:
    guest.tables.map(HIGH_SUPERVISOR, HOLE)
    outcome = guest.execute("jmp rbx", rbx=HIGH_SUPERVISOR + 0x123)
    assert isinstance(outcome.exit, InternalErrorExit)
    assert hex(HOLE + 0x123) in outcome.exit.detail or hex(HOLE) in outcome.exit.detail
    assert outcome.rip == HIGH_SUPERVISOR + 0x123


def test_running_into_a_hole_executes_what_lies_before_it(guest: Guest) -> None:
    guest.tables.map(HIGH_SUPERVISOR + PAGE_SIZE, HOLE)
    start = HIGH_SUPERVISOR + PAGE_SIZE - 6
    guest.write(start, bytes((0x48, 0xFF, 0xC0)) * 2)
    outcome = guest.execute("jmp rbx", rbx=start)
    assert isinstance(outcome.exit, InternalErrorExit)
    assert outcome.registers.rax == 2
    assert outcome.rip == HIGH_SUPERVISOR + PAGE_SIZE


def test_page_tables_in_a_hole_are_all_ones(guest: Guest) -> None:
    """All ones has reserved bits set: every translation is a page fault, and delivery fails too."""
    guest.sregs["cr3"] = HOLE
    assert isinstance(guest.execute("nop").exit, ShutdownExit)


def test_loads_from_a_hole_are_all_ones_and_stores_are_dropped_unless_the_vmm_answers(guest: Guest) -> None:
    guest.tables.map(HIGH_SUPERVISOR, HOLE)
    guest.start("mov [rbx], rbx; mov rax, [rbx]; mov cl, [rbx + 5]", rbx=HIGH_SUPERVISOR)
    exits = [guest.vcpu.run() for _ in range(3)]
    assert exits == [
        MmioExit(HOLE, 8, write=True, data=HIGH_SUPERVISOR),
        MmioExit(HOLE, 8, write=False, data=2**64 - 1),
        MmioExit(HOLE + 5, 1, write=False, data=0xFF),
    ]
    outcome = guest.run()
    assert outcome.completed
    assert (outcome.registers.rax, outcome.registers.rcx) == (2**64 - 1, 0xFF)


@pytest.mark.parametrize(
    "source",
    [
        "loop: jmp loop",
        "loop: inc rax; jmp loop",
        "loop: mov [rbx], rax; jmp loop",
        "cpuid; loop: cpuid; jmp loop",
    ],
)
def test_endless_loop_comes_back_to_the_vmm(guest: Guest, source: str) -> None:
    guest.start(source, rbx=HIGH_SUPERVISOR)
    for _ in range(2):
        assert isinstance(guest.vcpu.run(), IntrExit)


def test_endless_exceptions_come_back_to_the_vmm(guest: Guest) -> None:
    layout.set_gate(guest.memory, 6, KERNEL_CODE)
    guest.start("ud2")
    assert isinstance(guest.vcpu.run(), IntrExit | ShutdownExit)


def test_shutdown_leaves_a_vcpu_that_can_be_set_up_again(guest: Guest) -> None:
    guest.sregs["cr3"] = HOLE
    guest.execute("nop")
    guest.reset()
    outcome = guest.execute("mov eax, 5", cpl=3)
    assert outcome.completed
    assert isinstance(outcome.registers, Regs)
    assert outcome.registers.rax == 5
