"""Whatever bytes a guest executes on the emulator, ``run()`` ends in an exit; and corners of instruction bytes."""

from __future__ import annotations

import os
import random
from itertools import product

import pytest
from iced_x86 import Code, Decoder, Instruction

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import (
    HIGH_ABSENT,
    HIGH_SUPERVISOR,
    KERNEL_CODE,
    LOW_USER,
    UPPER,
    USER_CODE,
)
from lasskvm.kvm import HltExit, InternalErrorExit, IntrExit, IoExit, MmioExit, Regs, ShutdownExit
from lasskvm.kvm import vcpu as vcpu_module
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.exceptions import GP, PF, PF_W, UD
from lasskvm.x86.registers import RFLAGS_FIXED

EXITS = (HltExit, InternalErrorExit, IntrExit, IoExit, MmioExit, ShutdownExit)
#: Instructions of random code. A million of them (``WILD_STEPS=1000000``) take some minutes: nearly all have never been
#: seen before, and every fifth faults.
STEPS = int(os.environ.get("WILD_STEPS", "60000"))
STEPS_PER_PROGRAM = 2_000
RUNS_PER_PROGRAM = 40
CODE_BYTES = 2 * PAGE_SIZE
#: Guest-physical, and nothing is there.
HOLE = 0xD000_0000
LONGEST = 15
#: Instructions that LOCK may stand before, by mnemonic, where their destination is in memory.
LOCKABLE = {
    "add", "adc", "and", "btc", "btr", "bts", "cmpxchg", "cmpxchg8b", "cmpxchg16b", "dec", "inc", "neg", "not", "or",
    "sbb", "sub", "xadd", "xchg", "xor",
}  # fmt: skip


@pytest.fixture(scope="module")
def machine() -> Guest:
    return Guest(engine="emulator")


@pytest.fixture
def guest(machine: Guest) -> Guest:
    machine.reset()
    return machine


@pytest.mark.slow
def test_random_bytes_as_code(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exceptions go on in random code, too, so that most of the steps are made in states that no program has."""
    monkeypatch.setattr(vcpu_module, "_SLICE_BLOCKS", 2_000)
    rng = random.Random(0x1A55)
    vcpu = guest.vcpu
    start = vcpu.interpreter.instructions
    while vcpu.interpreter.instructions - start < STEPS:
        guest.reset()
        cpl = rng.choice((0, 3))
        for vector in range(layout.VECTORS):
            layout.set_gate(
                guest.memory, vector, KERNEL_CODE + rng.randrange(CODE_BYTES // 2), ist=layout.IST
            )
        guest.start("nop", cpl=cpl, bits=rng.choice((64, 64, 32)), **random_registers(rng))
        guest.write(KERNEL_CODE, rng.randbytes(CODE_BYTES))
        guest.write(USER_CODE, rng.randbytes(CODE_BYTES))
        program_start = vcpu.interpreter.instructions
        for _ in range(RUNS_PER_PROGRAM):
            reason = vcpu.run()
            assert isinstance(reason, EXITS)
            if isinstance(reason, ShutdownExit | InternalErrorExit):
                break
            if vcpu.interpreter.instructions - program_start > STEPS_PER_PROGRAM:
                break
            if isinstance(reason, HltExit):
                vcpu.set_regs(
                    Regs(**{**vars(vcpu.get_regs()), "rip": KERNEL_CODE + rng.randrange(CODE_BYTES // 2)})
                )


def random_registers(rng: random.Random) -> dict[str, int]:
    """Some registers hold addresses, some small numbers, some anything."""
    names = ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12")
    choices = (
        lambda: (
            rng.choice((HIGH_SUPERVISOR, LOW_USER, UPPER, KERNEL_CODE, USER_CODE)) + rng.randrange(PAGE_SIZE)
        ),
        lambda: rng.randrange(256),
        lambda: rng.getrandbits(64),
    )
    return {name: rng.choice(choices)() for name in names}


@pytest.mark.parametrize("instruction", ["8b03", "0103", "a5", "c3", "e800000000", "ff30", "0fb103", "f7f1"])
def test_every_combination_of_length_changing_prefixes(guest: Guest, instruction: str) -> None:
    """The emulator's opinion on an instruction's length is the decoder's, up to the 15 bytes."""
    for operand, address, segment, repeat, rex in product(
        ("", "66"), ("", "67"), ("", "64", "2e"), ("", "f2", "f3"), ("", "48", "41")
    ):
        code = bytes.fromhex(operand + address + segment + repeat + rex + instruction)
        decoded = Decoder(64, code + b"\x00" * LONGEST).decode()
        outcome = execute_bytes(guest, code + b"\x90" * (LONGEST - len(code)))
        if decoded.code == Code.INVALID:
            assert outcome.vector == UD, code.hex()
        assert isinstance(outcome.exit, HltExit), code.hex()


@pytest.mark.parametrize("prefix", ["66", "2e", "f3", "48"])
def test_an_instruction_of_15_bytes_runs_and_one_of_16_is_gp(guest: Guest, prefix: str) -> None:
    fits = bytes.fromhex(prefix) * (LONGEST - 1) + b"\x90"
    assert execute_bytes(guest, fits).completed
    outcome = execute_bytes(guest, bytes.fromhex(prefix) + fits)
    assert (outcome.vector, outcome.error_code, outcome.rip) == (GP, 0, KERNEL_CODE)


@pytest.mark.parametrize("escape", ["", "0f"])
def test_lock_before_every_opcode(guest: Guest, escape: str) -> None:
    """#UD unless the instruction reads, modifies and writes memory; with a register as destination always."""
    for opcode, modrm in product(range(256), (0x03, 0x0B, 0x13, 0x1B, 0x23, 0x2B, 0x33, 0x3B, 0xC3, 0xEB)):
        code = b"\xf0" + bytes.fromhex(escape) + bytes((opcode, modrm)) + bytes(8)
        unlocked = Decoder(64, code[1:]).decode()
        if unlocked.code == Code.INVALID or is_prefix(opcode, escape):
            continue
        outcome = execute_bytes(guest, code)
        if is_lockable(unlocked, modrm):
            assert outcome.vector != UD, code.hex()
        else:
            assert outcome.vector == UD, f"{code.hex()}: {unlocked}"


def is_prefix(opcode: int, escape: str) -> bool:
    prefixes = (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x0F)
    return not escape and (opcode in prefixes or 0x40 <= opcode <= 0x4F)


def is_lockable(instruction: Instruction, modrm: int) -> bool:
    name = str(instruction).split()[0]
    writes_memory = modrm < 0xC0 and instruction.op_count > 0 and "[" in str(instruction).split(",")[0]
    exchanges = name == "xchg" and "[" in str(instruction)
    return name in LOCKABLE and (writes_memory or exchanges)


@pytest.mark.parametrize("distance", [1, 2, 4, 7])
@pytest.mark.parametrize(
    "instruction",
    ["mov [rbx], rax", "add [rbx], rax", "push rax", "movups [rbx], xmm0", "lock xadd [rbx], rax", "stosq"],
)
def test_a_store_across_a_page_end_with_the_second_page_missing(
    guest: Guest, instruction: str, distance: int
) -> None:
    last = HIGH_ABSENT - distance
    guest.tables.map(HIGH_ABSENT - PAGE_SIZE, layout.DATA_GPA)
    before = guest.read(last, distance)
    rsp = last + 8 if instruction.startswith("push") else layout.KERNEL_STACK_TOP
    outcome = guest.execute(f"fault: {instruction}", rax=0x1122334455667788, rbx=last, rdi=last, rsp=rsp)
    assert (outcome.vector, outcome.error_code, outcome.label) == (PF, PF_W, "fault")
    assert outcome.cr2 == HIGH_ABSENT
    assert guest.read(last, distance) == before


def test_an_access_across_the_end_of_the_address_space_wraps(guest: Guest) -> None:
    guest.cr4 = layout.DEFAULT_CR4 & ~(1 << 27 | 1 << 21)
    guest.tables.map((1 << 64) - PAGE_SIZE, layout.DATA_GPA)
    guest.tables.map(0, layout.DATA_GPA + PAGE_SIZE)
    outcome = guest.execute("mov [rbx], rax; mov rcx, [rbx]", rax=0x1122334455667788, rbx=(1 << 64) - 3)
    assert outcome.completed
    assert outcome.registers.rcx == 0x1122334455667788
    assert guest.read(0, 5) == 0x1122334455


def test_an_access_halfway_into_mmio_is_answered_by_halves(guest: Guest) -> None:
    guest.tables.map(HIGH_SUPERVISOR + PAGE_SIZE, HOLE)
    guest.write(HIGH_SUPERVISOR + PAGE_SIZE - 4, bytes.fromhex("11223344"))
    guest.start("mov rax, [rbx]; mov [rbx], rcx", rbx=HIGH_SUPERVISOR + PAGE_SIZE - 4, rcx=0x8877665544332211)
    vcpu = guest.vcpu
    read = vcpu.run()
    assert isinstance(read, MmioExit)
    assert (read.gpa, read.size, read.write) == (HOLE, 4, False)
    read.data = 0xDDCCBBAA
    write = vcpu.run()
    assert isinstance(write, MmioExit)
    assert (write.gpa, write.size, write.write, write.data) == (HOLE, 4, True, 0x88776655)
    outcome = guest.run()
    assert outcome.completed
    assert outcome.registers.rax == 0xDDCCBBAA44332211
    assert guest.read(HIGH_SUPERVISOR + PAGE_SIZE - 4, 4) == 0x44332211


def execute_bytes(guest: Guest, code: bytes):  # type: ignore[no-untyped-def]
    """Execute *code* in the kernel, with registers that point to data, and whatever follows ends it."""
    program = guest.start(
        "db " + ", ".join(hex(byte) for byte in code), rflags=RFLAGS_FIXED, rbx=HIGH_SUPERVISOR + 0x100,
        rsi=HIGH_SUPERVISOR + 0x200, rdi=HIGH_SUPERVISOR + 0x300, rcx=1,
    )  # fmt: skip
    # Behind the program only instructions that end it, for branches and misjudged lengths.
    guest.write(program.end, b"\xf4" * 0x100)
    return guest.run()
