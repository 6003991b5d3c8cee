"""Instructions that the translator gets wrong: direct execution leaves them to the emulator, and no others.

Direct execution alone is looked at: an instruction that is left to the emulator ends the run with #UD and its bytes.
"""

from __future__ import annotations

import mmap
import random

import pytest
import unicorn
from compiled_twins import ROUNDS, native
from iced_x86 import (
    Code,
    Decoder,
    EncodingKind,
    FlowControl,
    Instruction,
    MemorySize,
    Mnemonic,
    OpCodeInfo,
    OpKind,
    Register,
)
from unicorn import x86_const

from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_ABSENT, HIGH_SUPERVISOR, LOW_USER
from lasskvm.engine import context as c
from lasskvm.engine import interpose, translation
from lasskvm.engine.calibration import library_function
from lasskvm.engine.engine import EngineExit
from lasskvm.engine.translation import (
    LOCK,
    OPERAND_SIZE,
    REP,
    REPNE,
    REX_W,
    is_left_to_emulator,
    is_native_vex,
    modrm_decides,
)
from lasskvm.engine.undefined import is_undefined_form
from lasskvm.errors import HostError
from lasskvm.kvm import Vm
from lasskvm.lass import FETCH
from lasskvm.memory import PAGE_SIZE, SLOT_READONLY
from lasskvm.x86.exceptions import PF, UD
from lasskvm.x86.opcodes import TWO_BYTE, is_prefix
from lasskvm.x86.paging import PTE_U
from lasskvm.x86.registers import CR4_LASS, CR4_SMAP, CR4_SMEP

BLOCKS = 10_000
MARK = 0x1234
#: Instructions that refer to LOW_USER + 0x100 by RBX.
EMULATED = {
    # code: (bits, privilege levels)
    "lock mov eax, [rbx]": ("f0 8b 03", 64, (0, 3)),
    "lock cmp [rbx], eax": ("f0 39 03", 64, (0, 3)),
    "lock add ecx, eax": ("f0 01 c1", 64, (3,)),
    "lock test byte [rbx], 1": ("f0 f6 03 01", 64, (3,)),
    "lock bt dword [rbx], 1": ("f0 0f ba 23 01", 64, (3,)),
    "lock prefix behind others": ("66 67 f0 89 03", 64, (3,)),
    "rex before 66": ("48 66 89 c1", 64, (3,)),
    "iretq": ("48 cf", 64, (3,)),
    "iretd": ("cf", 64, (3,)),
    "iretd in 32-bit code": ("cf", 32, (0, 3)),
    "retf": ("48 cb", 64, (0, 3)),
    "retf imm": ("ca 08 00", 64, (0, 3)),
    "call far m16:32": ("ff 1b", 64, (0, 3)),
    "jmp far m16:64": ("48 ff 2b", 64, (0, 3)),
    "call far register": ("ff d8", 64, (3,)),
    "call far immediate": ("9a 00 00 40 00 1b 00", 32, (0, 3)),
    "jmp far immediate": ("ea 00 00 40 00 1b 00", 32, (0, 3)),
    "mov ds": ("8e d8", 32, (0, 3)),
    "pop es": ("07", 32, (3,)),
    "pop ss": ("17", 32, (3,)),
    "pop ds": ("1f", 32, (3,)),
    "pop fs": ("0f a1", 32, (3,)),
    "pop gs": ("0f a9", 32, (3,)),
    "les": ("c4 03", 32, (3,)),
    "lds": ("c5 03", 32, (3,)),
    "lss": ("0f b2 03", 32, (3,)),
    "lfs": ("0f b4 03", 32, (3,)),
    "lgs": ("0f b5 03", 32, (3,)),
    "arpl": ("63 03", 32, (3,)),
    "66 call": ("66 e8 10 00 00 00", 64, (0, 3)),
    "66 jmp": ("66 e9 10 00 00 00", 64, (3,)),
    "66 jmp short": ("66 eb 10", 64, (3,)),
    "66 je short": ("66 74 10", 64, (3,)),
    "66 je near": ("66 0f 84 10 00 00 00", 64, (3,)),
    "66 ret": ("66 c3", 64, (3,)),
    "66 ret imm": ("66 c2 08 00", 64, (3,)),
    "66 loop": ("66 e2 10", 64, (3,)),
    "66 jrcxz": ("66 e3 10", 64, (3,)),
    "66 call rbx": ("66 ff d3", 64, (3,)),
    "66 jmp [rbx]": ("66 ff 23", 64, (3,)),
    "lar": ("0f 02 c1", 64, (0, 3)),
    "lsl": ("48 0f 03 c1", 64, (0, 3)),
    "66 movsxd": ("66 63 03", 64, (3,)),
    "xop": ("8f e9 78 01 c9", 64, (3,)),
    "c6 with a reg field": ("c6 0b 01", 64, (3,)),
    "xbegin": ("c7 f8 00 00 00 00", 64, (3,)),
    "vmovups xmm0, [rbx]": ("c5 f8 10 03", 64, (3,)),
    "vpaddd xmm0, xmm1, xmm2": ("c5 f1 fe c2", 64, (3,)),
    "vmovups in 32-bit code": ("c5 f8 10 c1", 32, (3,)),
    "blsr eax, ecx": ("c4 e2 78 f3 c9", 64, (3,)),
    "rex before vex": ("48 c5 f8 10 03", 64, (3,)),
    "extrq xmm0, xmm1": ("66 0f 79 c1", 64, (3,)),
    "lock neg behind 67": ("67 f0 f7 1b", 64, (3,)),
    "shld relative to rip": ("0f a4 05 00 00 00 00 01", 64, (3,)),
    "movntss [rbx], xmm0": ("f3 0f 2b 03", 64, (3,)),
    "xsave [rbx]": ("0f ae 23", 64, (0, 3)),
    "xsave64 [rbx]": ("48 0f ae 23", 64, (3,)),
    "xsaveopt [rbx]": ("0f ae 33", 64, (3,)),
    "xrstor [rbx]": ("0f ae 2b", 64, (0, 3)),
    "xrstor [rbx] in 32-bit code": ("0f ae 2b", 32, (3,)),
    "xgetbv": ("0f 01 d0", 64, (0, 3)),
    "xsetbv": ("0f 01 d1", 64, (0, 3)),
}
#: Neighbours of those, which run.
DIRECT = {
    "lock inc dword [rbx]": ("f0 ff 03", 64, (0, 3)),
    "lock add [rbx], eax": ("f0 01 03", 64, (3,)),
    "lock xchg": ("f0 87 03", 64, (3,)),
    "lock cmpxchg8b": ("f0 0f c7 0b", 64, (3,)),
    "lock bts": ("f0 0f ba 2b 01", 64, (3,)),
    "shld [rbx], eax, 1": ("0f a4 03 01", 64, (3,)),
    "neg [rbx]": ("f7 1b", 64, (3,)),
    "66 before rex": ("66 48 89 c1", 64, (3,)),
    "mov ds": ("8e d9", 64, (0, 3)),
    "pop gs": ("0f a9", 64, (3,)),
    "66 rex.w jmp": ("66 48 e9 00 00 00 00", 64, (0, 3)),
    "jmp": ("eb 00", 64, (3,)),
    "66 movsxd": ("66 48 63 03", 64, (3,)),
    "movsxd": ("63 03", 64, (3,)),
    "verw": ("0f 00 e9", 64, (0, 3)),
    "pop [rbx]": ("8f 03", 64, (3,)),
    "mov byte [rbx], 1": ("c6 03 01", 64, (3,)),
    "movntps [rbx], xmm0": ("0f 2b 03", 64, (3,)),
    "endbr64": ("f3 0f 1e fa", 64, (0, 3)),
    "fxsave [rbx]": ("0f ae 03", 64, (0, 3)),
    "mfence": ("0f ae f0", 64, (3,)),
    "long nop": ("66 2e 0f 1f 84 00 00 00 00 00", 64, (0, 3)),
    "66 je in 32-bit code": ("66 0f 84 00 00", 32, (3,)),
}


def resume(guest: Guest) -> EngineExit:
    guest.vcpu.engine.stop_after(BLOCKS)
    return guest.vcpu.engine.run()


def execute(
    guest: Guest, code: bytes, *, bits: int = 64, cpl: int = 0, at: int | None = None
) -> tuple[int, EngineExit]:
    """Execute MOV EDX, MARK; then *code* with operands that do no harm; where *code* is, and the exit."""
    guest.tables.map(LOW_USER, guest.gpa(LOW_USER), PTE_U if cpl == 3 else 0)
    data = LOW_USER + 0x100 if cpl == 3 or bits == 32 else HIGH_SUPERVISOR + 0x100
    stack = data + 0x400
    values = ", ".join(str(byte) for byte in code)
    source = f"mov edx, {MARK:#x}; code: db {values}"
    program = guest.start(source, bits=bits, cpl=cpl, at=at, rbx=data, rax=0, rcx=0, rsp=stack)
    return program.labels["code"], resume(guest)


def cases(table: dict[str, tuple[str, int, tuple[int, ...]]]) -> list[object]:
    return [
        pytest.param(bytes.fromhex(code), bits, cpl, id=f"{name}_at_cpl_{cpl}".replace(" ", "_"))
        for name, (code, bits, levels) in table.items()
        for cpl in levels
    ]


@pytest.mark.parametrize(("code", "bits", "cpl"), cases(EMULATED))
def test_instruction_is_left_to_the_emulator(guest: Guest, code: bytes, bits: int, cpl: int) -> None:
    guest.cr4 &= ~(CR4_LASS | CR4_SMAP | CR4_SMEP)
    address, engine_exit = execute(guest, code, bits=bits, cpl=cpl)
    assert (engine_exit.reason, engine_exit.vector) == (c.EXIT_EXCEPTION, UD)
    assert engine_exit.instruction.startswith(code)
    regs = guest.vcpu.get_regs()
    assert (regs.rip, regs.rdx, regs.rax, regs.rcx) == (address, MARK, 0, 0)
    assert guest.memory.read(guest.gpa(address), len(code)) == code


@pytest.mark.parametrize(("code", "bits", "cpl"), cases(DIRECT))
def test_instruction_is_executed_directly(guest: Guest, code: bytes, bits: int, cpl: int) -> None:
    guest.cr4 &= ~(CR4_LASS | CR4_SMAP | CR4_SMEP)
    address, engine_exit = execute(guest, code, bits=bits, cpl=cpl)
    assert (engine_exit.reason, engine_exit.vector) == (c.EXIT_INTERCEPT, c.SVM_EXIT_SWINT)
    assert guest.vcpu.get_regs().rip == address + len(code)


def test_kernel_iret_is_executed_directly(guest: Guest) -> None:
    program = guest.start(
        "mov rcx, rsp; push 0x10; push rcx; push 2; push 8; lea rax, [rip + there]; push rax; iretq; there: nop"
    )
    assert resume(guest).reason == c.EXIT_INTERCEPT
    assert guest.vcpu.get_regs().rip == program.labels["there"] + 1


def test_legal_instructions_in_the_same_block_are_executed_first(guest: Guest) -> None:
    program = guest.start("mov eax, 5; add eax, 6; left: db 0xf0, 0x90; mov eax, 1")
    assert resume(guest).vector == UD
    regs = guest.vcpu.get_regs()
    assert (regs.rip, regs.rax) == (program.labels["left"], 11)


def test_execution_goes_on_behind_an_emulated_instruction(guest: Guest) -> None:
    """As if the emulator had stepped over it, again and again: nothing of the first time sticks."""
    program = guest.start("again: inc eax; left: db 0xf0, 0x90; behind: jmp again")
    for count in range(1, 5):
        assert resume(guest).vector == UD
        regs = guest.vcpu.get_regs()
        assert (regs.rip, regs.rax) == (program.labels["left"], count)
        regs.rip = program.labels["behind"]
        guest.vcpu.set_regs(regs)


def test_the_same_code_is_judged_for_each_mode_and_privilege_level(guest: Guest) -> None:
    code = bytes((0x8E, 0xD9))
    assert execute(guest, code, bits=64, cpl=3)[1].reason == c.EXIT_INTERCEPT
    assert execute(guest, code, bits=32, cpl=3)[1].reason == c.EXIT_EXCEPTION
    assert execute(guest, code, bits=64, cpl=3)[1].reason == c.EXIT_INTERCEPT


# ------------------------------------------------------------------------------------------------- page boundaries


@pytest.mark.parametrize("code", ["cb", "f0 90", "66 c3", "0f 02 c1", "ff d8", "c5 f8 10 c1"])
def test_instruction_that_ends_at_a_page_end_needs_no_next_page(guest: Guest, code: str) -> None:
    code_bytes = bytes.fromhex(code)
    end = HIGH_SUPERVISOR + 2 * PAGE_SIZE
    guest.write(end - len(code_bytes), code_bytes)
    guest.start("jmp rbx", rbx=end - len(code_bytes))
    engine_exit = resume(guest)
    assert (engine_exit.reason, engine_exit.vector) == (c.EXIT_EXCEPTION, UD)
    assert guest.vcpu.get_regs().rip == end - len(code_bytes)


@pytest.mark.parametrize("code", ["f0", "66", "ff", "0f", "0f 00", "66 0f", "c4", "c4 e2", "c4 e2 78", "48"])
def test_bytes_on_a_missing_page_fault(guest: Guest, code: str) -> None:
    """The decision needs what is not there: the fetch faults as it does on a processor."""
    code_bytes = bytes.fromhex(code)
    end = HIGH_SUPERVISOR + 2 * PAGE_SIZE
    guest.write(end - len(code_bytes), code_bytes)
    guest.start("jmp rbx", rbx=end - len(code_bytes))
    engine_exit = resume(guest)
    assert (engine_exit.reason, engine_exit.vector) == (c.EXIT_MEMORY_FAULT, PF)
    assert (engine_exit.address, engine_exit.flags) == (end, FETCH)


@pytest.mark.parametrize("split", range(1, 4))
def test_instruction_across_two_pages_is_left_to_the_emulator(guest: Guest, split: int) -> None:
    code = bytes((0x67, 0xF0, 0x8B, 0x03))
    start = HIGH_SUPERVISOR + PAGE_SIZE - split
    guest.write(start, code)
    guest.start("jmp rbx", rbx=start)
    engine_exit = resume(guest)
    assert engine_exit.vector == UD
    assert guest.vcpu.get_regs().rip == start
    assert guest.memory.read(guest.gpa(start), split) == code[:split]


def test_byte_on_the_second_page_that_changes_changes_the_decision(guest: Guest) -> None:
    start = HIGH_SUPERVISOR + PAGE_SIZE - 1
    guest.write(start, bytes((0xFF, 0xD8)))
    guest.start("again: jmp rbx; mov [rsi], al; jmp again", rbx=start, rcx=LOW_USER)
    assert resume(guest).vector == UD
    # JMP [RCX] this time: the VMM writes to the second page only.
    guest.write(start + 1, bytes((0xE1,)))
    guest.tables.map(LOW_USER, guest.gpa(LOW_USER), 0)
    engine_exit = resume(guest)
    assert (engine_exit.reason, engine_exit.address) == (c.EXIT_MEMORY_FAULT, LOW_USER)


@pytest.mark.parametrize("code", ["f0 90", "66 90", "ff 1b", "48 cf"])
def test_run_that_ends_before_an_instruction_does_not_look_at_it(guest: Guest, code: str) -> None:
    """Half of it is on a page that is missing."""
    code_bytes = bytes.fromhex(code)
    end = HIGH_SUPERVISOR + 2 * PAGE_SIZE
    guest.write(end - 2, bytes((0x90, code_bytes[0])))
    guest.start("jmp rbx", rbx=end - 2)
    guest.vcpu.engine.stop_after(BLOCKS)
    assert guest.vcpu.engine.run_until(end - 1).reason == c.EXIT_STOPPED
    assert guest.vcpu.get_regs().rip == end - 1


def test_code_in_read_only_memory_is_left_alone(guest: Guest) -> None:
    rom = mmap.mmap(-1, PAGE_SIZE)
    rom[:2] = bytes((0xF0, 0x90))
    guest.vm.set_user_memory_region(1, 0x800000, rom, SLOT_READONLY)
    try:
        guest.tables.map(HIGH_ABSENT, 0x800000)
        guest.start("jmp rbx", rbx=HIGH_ABSENT)
        assert resume(guest).vector == UD
        assert rom[:2] == bytes((0xF0, 0x90))
    finally:
        guest.vm.set_user_memory_region(1, 0x800000, None)


# ----------------------------------------------------------------------------------------------------- start-up


def test_other_unicorn_instances_are_not_interposed(guest: Guest) -> None:
    """A plain instance runs MOV with LOCK, wrong as it is."""
    plain = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    plain.mem_map(0x1000, PAGE_SIZE)
    plain.mem_write(0x1000, bytes((0xF0, 0x8B, 0x03)))
    plain.reg_write(x86_const.UC_X86_REG_RBX, 0x1000)
    plain.emu_start(0x1000, 0x1003)
    assert plain.reg_read(x86_const.UC_X86_REG_EAX) == 0x038BF0


def test_library_without_a_writable_slot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpose, "_jump_slot", lambda function: None)
    with pytest.raises(HostError, match=r"jump slot of translator_loop.*pip install"):
        _ = Vm().create_vcpu().engine


def test_jump_slot_in_read_only_memory_is_not_written() -> None:
    constant = library_function("translator_loop")
    assert not interpose._is_writable(constant)
    assert not interpose._is_writable(0)


# ------------------------------------------------------------------------------------- the rules, against a decoder

PREFIX_SETS = {
    (): 0, (0x66,): OPERAND_SIZE, (0xF2,): REPNE, (0xF3,): REP, (0x48,): REX_W, (0x66, 0x48): OPERAND_SIZE | REX_W,
}  # fmt: skip
MODRMS = tuple(mod | reg << 3 | 3 for mod in (0, 0xC0) for reg in range(8))
#: One byte, or two; 0F alone is none.
OPCODES = tuple(opcode for opcode in range(2 * TWO_BYTE) if opcode != 0x0F)
SEGMENT_REGISTERS = (Register.ES, Register.SS, Register.DS, Register.FS, Register.GS)
SEGMENT_POINTERS = (Mnemonic.LES, Mnemonic.LDS, Mnemonic.LSS, Mnemonic.LFS, Mnemonic.LGS)
INTERRUPT_RETURNS = (Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ)
SSE4A = (Mnemonic.EXTRQ, Mnemonic.INSERTQ, Mnemonic.MOVNTSS, Mnemonic.MOVNTSD)
#: XSAVE, and what its opcodes are with prefixes; they have a memory operand.
XSAVES = (
    Mnemonic.XSAVE, Mnemonic.XSAVE64, Mnemonic.XSAVEOPT, Mnemonic.XSAVEOPT64, Mnemonic.XRSTOR, Mnemonic.XRSTOR64,
    Mnemonic.PTWRITE, Mnemonic.CLWB, Mnemonic.CLRSSBSY,
)  # fmt: skip
ALWAYS = (
    Mnemonic.RETF, Mnemonic.LAR, Mnemonic.LSL, Mnemonic.ARPL, Mnemonic.XABORT, Mnemonic.XBEGIN, Mnemonic.WRFSBASE,
    Mnemonic.WRGSBASE, Mnemonic.LSS, Mnemonic.LFS, Mnemonic.LGS, Mnemonic.LOOPE, Mnemonic.LOOPNE, Mnemonic.ENTER,
    Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD, *SSE4A,
)  # fmt: skip
#: The second encoding of TEST.
TEST_ALIASES = (
    Code.TEST_RM8_IMM8_F6R1, Code.TEST_RM16_IMM16_F7R1, Code.TEST_RM32_IMM32_F7R1, Code.TEST_RM64_IMM32_F7R1,
)  # fmt: skip
TRUNCATED = (Mnemonic.RET, Mnemonic.MOVSXD)
BRANCHES = (
    FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH, FlowControl.CALL,
    FlowControl.INDIRECT_CALL,
)  # fmt: skip
FAR_POINTERS = (MemorySize.SEG_PTR16, MemorySize.SEG_PTR32, MemorySize.SEG_PTR64)
FAR_OPERANDS = (OpKind.FAR_BRANCH16, OpKind.FAR_BRANCH32)


def is_far_branch(instruction: Instruction) -> bool:
    if instruction.mnemonic not in (Mnemonic.CALL, Mnemonic.JMP):
        return False
    return instruction.memory_size in FAR_POINTERS or instruction.op0_kind in FAR_OPERANDS


def expected(instruction: Instruction, bits: int, cpl: int, prefixes: int) -> bool:
    """What the table of rules says, in the decoder's terms."""
    mnemonic = instruction.mnemonic
    if OpCodeInfo(instruction.code).encoding in (EncodingKind.VEX, EncodingKind.XOP):
        return True
    if mnemonic in ALWAYS or instruction.code in TEST_ALIASES or is_far_branch(instruction):
        return True
    if mnemonic in XSAVES:
        return instruction.op0_kind == OpKind.MEMORY
    if mnemonic in (Mnemonic.RDFSBASE, Mnemonic.RDGSBASE):
        return prefixes & OPERAND_SIZE != 0
    if mnemonic in INTERRUPT_RETURNS:
        return bits != 64 or cpl == 3 or not prefixes & REX_W
    if bits == 64:
        # SYSCALL counts as a call, but has no operand.
        is_branch = instruction.flow_control in BRANCHES and instruction.op_count
        truncated = mnemonic in TRUNCATED or is_branch
        return bool(truncated) and prefixes & (OPERAND_SIZE | REX_W) == OPERAND_SIZE
    loads = mnemonic in (Mnemonic.MOV, Mnemonic.POP) and instruction.op0_kind == OpKind.REGISTER
    return mnemonic in SEGMENT_POINTERS or (loads and instruction.op0_register in SEGMENT_REGISTERS)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("cpl", [0, 3])
def test_rules_hold_for_every_opcode(bits: int, cpl: int) -> None:
    left = 0
    for prefix_bytes, prefixes in PREFIX_SETS.items():
        if bits != 64 and prefixes & REX_W:
            continue
        for opcode in OPCODES:
            if opcode < TWO_BYTE and is_prefix(opcode, bits == 64):
                continue
            escape = (0x0F,) if opcode >= TWO_BYTE else ()
            for modrm in MODRMS:
                code = bytes((*prefix_bytes, *escape, opcode & 0xFF, modrm)).ljust(15, b"\x08")
                instruction = Decoder(bits, code).decode()
                encoding = OpCodeInfo(instruction.code).encoding
                if instruction.code == Code.INVALID or (encoding == EncodingKind.VEX and bits == 64):
                    continue
                repeat = prefixes & (REP | REPNE) != 0
                if escape and is_undefined_form(opcode & 0xFF, modrm, prefixes & OPERAND_SIZE != 0, repeat):
                    continue
                judged = is_left_to_emulator(bits == 64, cpl, prefixes, opcode, modrm, False)
                assert judged == expected(instruction, bits, cpl, prefixes), f"{code.hex()} {instruction}"
                left += judged
    assert left > 100


def test_the_modrm_byte_matters_only_where_it_is_asked_for() -> None:
    for opcode in OPCODES:
        for prefixes in (0, LOCK, OPERAND_SIZE, REP):
            if not modrm_decides(opcode, prefixes):
                answers = {
                    is_left_to_emulator(True, 3, prefixes, opcode, modrm, False) for modrm in range(256)
                }
                assert len(answers) == 1, hex(opcode)


def test_sse4a_runs_where_it_is_offered() -> None:
    assert is_left_to_emulator(True, 3, OPERAND_SIZE, TWO_BYTE + 0x79, 0xC1, False)
    assert not is_left_to_emulator(True, 3, OPERAND_SIZE, TWO_BYTE + 0x79, 0xC1, True)


def test_exactly_the_bmi_instructions_without_flags_are_native() -> None:
    names = set()
    for opcode_map in (2, 3):
        for payload in range(0x78, 0x80):
            for opcode in range(256):
                code = bytes((0xC4, 0xE0 | opcode_map, payload, opcode, 0xC1, 1)).ljust(15, b"\0")
                if is_native_vex(opcode_map, opcode, payload):
                    names.add(Decoder(64, code).decode().mnemonic)
    assert names == {
        Mnemonic.ANDN, Mnemonic.PEXT, Mnemonic.PDEP, Mnemonic.MULX, Mnemonic.SHLX, Mnemonic.SARX, Mnemonic.SHRX,
        Mnemonic.RORX,
    }  # fmt: skip


def test_compiled_rules_are_the_same(rng: random.Random) -> None:
    for _ in range(ROUNDS * 4):
        arguments = (
            rng.choice((True, False)), rng.choice((0, 3)), rng.getrandbits(6), rng.randrange(2 * TWO_BYTE),
            rng.getrandbits(8), rng.choice((True, False)),
        )  # fmt: skip
        assert native(is_left_to_emulator, *arguments) == int(is_left_to_emulator(*arguments)), arguments
        vex = rng.choice((2, 3)), rng.choice((0xF0, 0xF2, 0xF3, 0xF5, 0xF6, 0xF7)), rng.getrandbits(8)
        assert native(is_native_vex, *vex) == int(is_native_vex(*vex)), vex
        prefix = rng.getrandbits(6), rng.choice((0x66, 0xF0, 0x48, 0x2E)), True, rng.choice((True, False))
        assert native(translation.with_prefix, *prefix) == translation.with_prefix(*prefix), prefix
