"""A case in words: its code, and what about the machine is not ordinary."""

from __future__ import annotations

from iced_x86 import Formatter, FormatterSyntax

from lasskvm.fuzz import layout
from lasskvm.fuzz.case import SEGMENT_NAMES, Case
from lasskvm.fuzz.encoding import code_in_memory, instructions_of
from lasskvm.fuzz.segments import plain_segments
from lasskvm.x86 import registers as r

__all__ = ["describe", "disassemble"]

_REGISTERS = (
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rsp",
    "rbp",
    "rsi",
    "rdi",
    *(f"r{number}" for number in range(8, 16)),
)
_PAGE_BITS = {
    layout.PAGE_PRESENT: "present", layout.PAGE_WRITABLE: "writable", layout.PAGE_USER: "user",
    layout.PAGE_ACCESSED: "accessed", layout.PAGE_DIRTY: "dirty", layout.PAGE_HOLE: "hole",
    layout.PAGE_RESERVED: "reserved bit", layout.PAGE_NX: "no-execute",
}  # fmt: skip


def disassemble(case: Case) -> list[str]:
    """One line for each instruction of *case*: address, bytes, text."""
    formatter = Formatter(FormatterSyntax.INTEL)
    code, _ = code_in_memory(case)
    lines = []
    for instruction in instructions_of(case):
        start = instruction.ip - case.rip
        encoded = code[start : start + instruction.len].hex()
        lines.append(f"{instruction.ip:#x}  {encoded:30}  {formatter.format(instruction)}")
    return lines


def describe(case: Case) -> list[str]:
    """*case* line by line."""
    lines = [f"{case.mode} mode, CPL {case.cpl}, {case.paging} paging, CPU {case.cpu}", *disassemble(case)]
    for name, value in (("CR0", case.cr0), ("CR4", case.cr4), ("EFER", case.efer), ("RFLAGS", case.rflags)):
        lines.append(f"{name} {value:#x}: {' '.join(_bit_names(name, value))}")
    lines.append(
        ", ".join(
            f"{name} {value:#x}" for name, value in zip(_REGISTERS, case.registers, strict=True) if value
        )
    )
    for name, segment, plain in zip(SEGMENT_NAMES, case.segments, plain_segments(case), strict=True):
        if segment != plain:
            lines.append(
                f"{name}: selector {segment.selector:#x}, base {segment.base:#x}, limit {segment.limit:#x}, "
                f"attributes {segment.attributes:#x}"
            )
    for gva, attributes in zip(layout.data_pages(case.paging), case.pages, strict=False):
        if attributes != layout.PAGE_PLAIN:
            names = ", ".join(name for bit, name in _PAGE_BITS.items() if attributes & bit) or "absent"
            lines.append(f"page {gva:#x}: {names}")
    if not case.own_stacks:
        lines.append("handlers have no stacks of their own")
    return lines


def _bit_names(register: str, value: int) -> list[str]:
    """The names of the bits of a control register that are set."""
    prefix = f"{register}_"
    return [
        name.removeprefix(prefix)
        for name, mask in vars(r).items()
        if name.startswith(prefix) and not name.endswith("_SHIFT") and value & mask == mask
        and mask.bit_count() == 1
    ]  # fmt: skip
