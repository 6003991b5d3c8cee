"""Far transfers, returns and segment instructions lead where they do in direct execution, as far as that is right."""

from __future__ import annotations

import pytest
from both_paths import run_on_both_paths

from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import (
    FREE_SELECTOR,
    GDT,
    HANDLER_BYTES,
    HANDLERS,
    HIGH_SUPERVISOR,
    KERNEL_CS,
    KERNEL_SS,
    LDT_DATA,
    LOW_USER,
    RING1_CS,
    RING1_SS,
    TSS_SELECTOR,
    UPPER,
    USER_CODE,
    USER_CODE_GPA,
    USER_CS,
    USER_CS32,
    USER_SS,
    USER_STACK,
    USER_STACK_GPA,
    USER_STACK_TOP,
)
from lasskvm.x86.descriptors import SYS_CALL_GATE, make_gate, make_segment
from lasskvm.x86.registers import AR_CODE64, AR_DATA, AR_DPL_SHIFT, AR_P, MASK32

#: A handler that halts: where call gates lead, so that the frame on the stack can be read.
GATE_VECTOR = 0x55
GATE_ENTRY = HANDLERS + GATE_VECTOR * HANDLER_BYTES
DPL3 = 3 << AR_DPL_SHIFT
GATE = make_gate(GATE_ENTRY, KERNEL_CS, AR_P | SYS_CALL_GATE | DPL3, 0)
#: Where a kernel program can write the user program.
USER_PROGRAM = UPPER + USER_CODE_GPA


def descriptor(value: int, high: int = 0) -> str:
    """Statements that write the free GDT entry, and the one behind it."""
    return (
        f"mov rbx, {GDT + FREE_SELECTOR:#x}; mov rax, {value:#x}; mov [rbx], rax; "
        f"mov rax, {high:#x}; mov [rbx + 8], rax; "
    )


def user_program(code: str) -> str:
    """Statements that write a user program of up to 8 bytes."""
    value = int.from_bytes(bytes.fromhex(code), "little")
    return f"mov rbx, {USER_PROGRAM:#x}; mov rax, {value:#x}; mov [rbx], rax; "


def push(*values: object) -> str:
    """Statements that push 64-bit *values*, the last one deepest."""
    return "".join(f"mov rax, {value}; push rax; " for value in reversed(values))


def to_user(code: str, *, rax: int = 0) -> str:
    """Statements that start a user program by IRET."""
    frame = push(f"{USER_CODE:#x}", USER_CS, "0x202", f"{USER_STACK_TOP:#x}", USER_SS)
    return f"{user_program(code)}{frame} mov rax, {rax:#x}; iretq"


#: INT 80H, where programs end.
DONE = "cd80"
#: A far pointer on the user's stack page, and where the kernel can write it.
USER_POINTER, USER_POINTER_ALIAS = USER_STACK, UPPER + USER_STACK_GPA
CALL_FREE_SELECTOR = f"mov rbx, {USER_POINTER_ALIAS:#x}; mov word [rbx + 8], {FREE_SELECTOR}; " + to_user(
    "48ff18", rax=USER_POINTER
)
KERNEL_PROGRAMS = {
    "far call and return": (
        f"lea rax, [rip + target]; mov rbx, {HIGH_SUPERVISOR:#x}; mov [rbx], rax; mov word [rbx + 8], {KERNEL_CS}; "
        "call_m1664 [rbx]; jmp end; target: mov rsi, [rsp]; mov rdi, [rsp + 8]; retfq; end: nop"
    ),
    "far jump": (
        f"lea rax, [rip + end]; mov rbx, {HIGH_SUPERVISOR:#x}; mov [rbx], rax; mov word [rbx + 8], {KERNEL_CS}; "
        "jmp_m1664 [rbx]; ud2; end: nop"
    ),
    "far return with parameters": f"lea rdx, [rip + end]; {push('rdx', KERNEL_CS)} retfq_imm16 16; end: nop",
    "return to ring 1": f"lea rdx, [rip + end]; {push('rdx', RING1_CS, 'rsp', RING1_SS)} retfq; end: nop",
    "return to ring 1 without a stack segment": (
        f"lea rdx, [rip + end]; {push('rdx', RING1_CS, 'rsp', 1)} retfq; end: nop"
    ),
    "return to user mode": to_user(DONE),
    "far return to user mode with parameters": (
        f"{user_program(DONE)}{push(f'{USER_CODE:#x}', USER_CS, 1, 2, f'{USER_STACK_TOP:#x}', USER_SS)}"
        "retfq_imm16 16"
    ),
    "return to compatibility mode": (
        f"{user_program(DONE)}"
        f"{push(f'{USER_CODE:#x}', USER_CS32, 0x202, f'{USER_STACK_TOP:#x}', USER_SS)} iretq"
    ),
    "interrupt return in the kernel": (
        f"lea rdx, [rip + end]; mov rcx, rsp; {push('rdx', KERNEL_CS, 0x46, 'rcx', KERNEL_SS)} iretq; end: nop"
    ),
    "interrupt return without a stack segment": (
        f"lea rdx, [rip + end]; mov rcx, rsp; {push('rdx', KERNEL_CS, 0x46, 'rcx', 0)} iretq; end: nop"
    ),
    "data segments of the kernel": (
        f"mov eax, {KERNEL_SS}; mov ds, eax; mov eax, {USER_SS}; mov es, eax; " + to_user("8cd98cc2" + DONE)
    ),
    "call gate from user mode": descriptor(GATE, GATE_ENTRY >> 32) + CALL_FREE_SELECTOR,
    "call gate from the kernel": (
        descriptor(GATE, GATE_ENTRY >> 32)
        + f"mov rbx, {HIGH_SUPERVISOR:#x}; mov word [rbx + 8], {FREE_SELECTOR}; call_m1664 [rbx]"
    ),
    "jump through a call gate": (
        descriptor(GATE, GATE_ENTRY >> 32)
        + f"mov rbx, {HIGH_SUPERVISOR:#x}; mov word [rbx + 8], {FREE_SELECTOR}; jmp_m1664 [rbx]"
    ),
    "fault: call gate of the kernel": (
        descriptor(GATE & ~(DPL3 << 40), GATE_ENTRY >> 32) + CALL_FREE_SELECTOR
    ),
    "fault: absent call gate": descriptor(GATE & ~(AR_P << 40), GATE_ENTRY >> 32) + CALL_FREE_SELECTOR,
    "fault: second half of a call gate": descriptor(GATE, GATE_ENTRY >> 32 | 1 << 40) + CALL_FREE_SELECTOR,
    "fault: call gate to compatibility mode": (
        descriptor(make_gate(0, USER_CS32, AR_P | SYS_CALL_GATE | DPL3, 0)) + CALL_FREE_SELECTOR
    ),
    "push and pop": f"mov eax, {KERNEL_SS}; mov fs, eax; push fs; pop gs; mov ecx, gs; mov rdx, fs; mov bx, ss",
    "mov ss": f"mov eax, {KERNEL_SS}; mov ss, eax; mov ebx, ss; mov eax, 0; mov ss, eax; mov ecx, ss",
    "far pointers": (
        f"mov rbx, {HIGH_SUPERVISOR:#x}; mov rax, 0x1122334455667788; mov [rbx], rax; "
        f"mov word [rbx + 8], {KERNEL_SS}; mov word [rbx + 4], {KERNEL_SS}; lfs ecx, [rbx]; lgs edx, [rbx]; "
        "mov r8, fs; mov r9, gs"
    ),
    "64-bit far pointer": (
        f"mov rbx, {HIGH_SUPERVISOR:#x}; mov rax, 0x1122334455667788; mov [rbx], rax; "
        f"mov word [rbx + 4], 0; mov word [rbx + 8], {KERNEL_SS}; lgs rdx, [rbx]"
    ),
    "fault: null cs": f"{push('rsp', 0)} fault: retfq",
    "fault: data as code": f"{push('rsp', KERNEL_SS)} fault: retfq",
    "fault: null ss for user": f"{push(0, USER_CS, 0, 0)} fault: retfq",
    "fault: stack segment of the kernel for user": f"{push(0, USER_CS, 2, 0, KERNEL_SS)} fault: iretq",
    "fault: inner code": f"{push(0, USER_CS & ~3)} fault: retfq",
    "fault: absent code": (
        descriptor(make_segment(0, MASK32, AR_CODE64 & ~AR_P)) + f"{push(0, FREE_SELECTOR)} fault: retfq"
    ),
    "fault: absent data": (
        descriptor(make_segment(0, MASK32, AR_DATA & ~AR_P)) + f"mov eax, {FREE_SELECTOR}; fault: mov ds, eax"
    ),
    "fault: absent stack": (
        descriptor(make_segment(0, MASK32, AR_DATA & ~AR_P)) + f"mov eax, {FREE_SELECTOR}; fault: mov ss, eax"
    ),
    "fault: tss as data": f"mov eax, {TSS_SELECTOR}; fault: mov ds, eax",
    "fault: far return beyond canonical addresses": f"{push('0x800000000000', KERNEL_CS)} fault: retfq",
    "fault: nested task": "pushfq; or dword [rsp], 0x4000; popfq; fault: iretq",
}
#: What direct execution gets wrong.
WRONG_DIRECTLY = {
    "fault: interrupt return beyond canonical addresses": (
        f"mov rcx, rsp; {push('0x800000000000', KERNEL_CS, 2, 'rcx', KERNEL_SS)} fault: iretq"
    ),
    "fault: null stack segment of another level": "mov eax, 3; fault: mov ss, eax",
}
USER_PROGRAMS = {
    "data segments": f"mov eax, {USER_SS}; mov ds, eax; mov eax, {LDT_DATA}; mov es, eax; mov ecx, ds; mov edx, es",
    "fault: data segment of the kernel": f"mov eax, {KERNEL_SS}; fault: mov ds, eax",
    "fault: code of the kernel": f"{push('rsp', KERNEL_CS)} fault: retfq",
    "fault: return into the kernel": f"{push(0, KERNEL_CS, 2, 0, KERNEL_SS)} fault: iretq",
    "far return": f"lea rdx, [rip + end]; {push('rdx', USER_CS)} retfq; end: nop",
    "interrupt return": (
        f"lea rdx, [rip + end]; mov rcx, rsp; {push('rdx', USER_CS, 0x3046, 'rcx', USER_SS)} iretq; end: nop"
    ),
}
COMPATIBILITY_PROGRAMS = {
    "far call and return": f"call far {USER_CS32}:target; jmp end; target: retf; end: nop",
    "far jump to 64-bit mode": f"jmp far {USER_CS}:end; end: nop",
    "interrupt return": f"pushfd; push {USER_CS32}; call next; next: add dword [esp], 5; iretd; end: nop",
    "push and pop": "push ds; pop es; push fs; pop gs; push cs; pop eax; mov ecx, es; mov edx, gs",
    "pop ss": "push ss; pop ss; mov ecx, ss",
    "arpl": "mov eax, 0x12340010; mov ecx, 0x12343; arpl ax, cx; mov edx, 3; arpl dx, cx",
    "far pointers": (
        f"mov dword [{LOW_USER:#x}], 0x11223344; mov dword [{LOW_USER + 4:#x}], {LDT_DATA}; "
        f"les ecx, [{LOW_USER:#x}]; lds edx, [{LOW_USER:#x}]; mov esi, es; mov edi, ds"
    ),
    "fault: kernel code": f"fault: call far {KERNEL_CS}:0",
    "fault: null code": "fault: jmp far 0:0",
}
#: Asks about 64 selectors in a row, and mixes the answers into EDX.
INSPECTION = (
    "mov ecx, {first}; mov edx, 0; mov eax, 0; next: {question}; jne no; rol edx, 1; xor edx, eax; no: rol edx, 3; "
    "add ecx, {step}; cmp ecx, {last}; jb next"
)


@pytest.fixture(scope="module")
def machine() -> Guest:
    """A guest with both ways to execute."""
    return Guest()


@pytest.mark.parametrize("name", KERNEL_PROGRAMS)
def test_kernel_programs(machine: Guest, name: str) -> None:
    direct, emulated = run_on_both_paths(machine, KERNEL_PROGRAMS[name])
    assert emulated == direct


@pytest.mark.parametrize("name", WRONG_DIRECTLY)
@pytest.mark.xfail(strict=True, reason="the translator does not check it, or knows 32-bit offsets only")
def test_kernel_programs_that_direct_execution_gets_wrong(machine: Guest, name: str) -> None:
    direct, emulated = run_on_both_paths(machine, WRONG_DIRECTLY[name])
    assert emulated == direct


@pytest.mark.parametrize("name", USER_PROGRAMS)
def test_user_programs(machine: Guest, name: str) -> None:
    direct, emulated = run_on_both_paths(machine, USER_PROGRAMS[name], cpl=3)
    assert emulated == direct


@pytest.mark.parametrize("name", COMPATIBILITY_PROGRAMS)
def test_programs_of_compatibility_mode(machine: Guest, name: str) -> None:
    direct, emulated = run_on_both_paths(machine, COMPATIBILITY_PROGRAMS[name], cpl=3, bits=32)
    assert emulated == direct


@pytest.mark.parametrize("question", ["lar eax, ecx", "lsl eax, ecx", "verr ecx", "verw ecx"])
@pytest.mark.parametrize("rpl", [0, 3])
@pytest.mark.parametrize("cpl", [0, 3])
def test_what_selectors_stand_for(machine: Guest, cpl: int, rpl: int, question: str) -> None:
    source = INSPECTION.format(question=question, first=rpl, step=4, last=0x108)
    direct, emulated = run_on_both_paths(machine, source, cpl=cpl)
    assert emulated == direct
