"""The assembler of the test guests, held against iced-x86's decoder."""

from __future__ import annotations

import pytest
from iced_x86 import Decoder, Formatter, FormatterSyntax

from lasskvm.conformance.assembler import assemble

KERNEL = 0xFFFF_8000_0000_1000


def disassemble(source: str, address: int = KERNEL, bits: int = 64) -> list[str]:
    formatter = Formatter(FormatterSyntax.INTEL)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    formatter.space_after_operand_separator = True
    return [
        formatter.format(instruction)
        for instruction in Decoder(bits, assemble(source, address, bits).code, ip=address)
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("mov rax, [rbx + rcx * 8 - 0x10]", "mov rax, [rbx+rcx*8-0x10]"),
        ("mov fs:[rax], ecx", "mov fs:[rax], ecx"),
        ("lock inc qword [rdi]", "lock inc qword ptr [rdi]"),
        ("rep stosq", "rep stosq [rdi]"),
        ("mov cr4, rax", "mov cr4, rax"),
        ("mov dr7, rcx", "mov dr7, rcx"),
        ("mov gs, [rax]", "mov gs, [rax]"),
        ("push 0x1234", "push 0x1234"),
        ("out dx, eax", "out dx, eax"),
        ("shl ecx, 1", "shl ecx, 1"),
        ("jmp tbyte [rax]", "jmp far tbyte ptr [rax]"),
        ("call fword [rax]", "call far fword ptr [rax]"),
        ("retfq", "data64 ret far"),
        ("movups xmm3, [rsp]", "movups xmm3, [rsp]"),
        ("mov rax, 0xffff800000001000", "mov rax, 0xFFFF800000001000"),
        ("mov rax, -1", "mov rax, 0xFFFFFFFFFFFFFFFF"),
        ("mov rax, 0xffffffff80000000", "mov rax, 0xFFFFFFFF80000000"),
    ],
)  # fmt: skip
def test_instruction(source: str, expected: str) -> None:
    assert disassemble(source) == [expected]


def test_smallest_encoding_is_taken() -> None:
    assert assemble("add rsp, 8", 0).code == bytes((0x48, 0x83, 0xC4, 0x08))
    assert assemble("mov rax, 5", 0).code == bytes((0x48, 0xC7, 0xC0, 5, 0, 0, 0))
    assert assemble("ret", 0).code == b"\xc3"


def test_labels_are_addresses() -> None:
    program = assemble("start: jmp end; nop; end: lea rax, [rip + start]; mov rbx, end", KERNEL)
    assert program.labels == {"start": KERNEL, "end": KERNEL + 6}
    assert program.end == KERNEL + len(program.code)
    _, _, lea, mov = disassemble("start: jmp end; nop; end: lea rax, [rip + start]; mov rbx, end")
    assert lea == f"lea rax, [{KERNEL:#x}]".replace("0xffff", "0xFFFF")
    assert mov.endswith(f"{KERNEL + 6:X}")


def test_comments_data_and_several_labels_in_one_line() -> None:
    program = assemble("a: b: db 1, 2 # bytes\n dw 0x304; dq b", 0x10)
    assert program.code == bytes((1, 2, 4, 3)) + (0x10).to_bytes(8, "little")
    assert program.labels == {"a": 0x10, "b": 0x10}


def test_16_bit_and_32_bit_code() -> None:
    assert disassemble("mov ax, [bx + si]; jmp far 8:0x7c10", 0x7C00, 16) == [
        "mov ax, [bx+si]",
        "jmp far 0x7C10, 8",
    ]
    assert disassemble("push eax; mov esp, [0x123456]; pop ds", 0x1000, 32) == [
        "push eax",
        "mov esp, [0x123456]",
        "pop ds",
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("frobnicate rax", "no instruction"),
        ("mov rax, ecx", "no 64-bit encoding"),
        ("inc [rax]", "needs a size"),
        ("mov al, 0x1234", "no 64-bit encoding"),
        ("a: nop; a: nop", "given twice"),
        ("mov rax, [rbx", "expression|literal"),
    ],
)
def test_mistakes_are_reported(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(source, 0)
