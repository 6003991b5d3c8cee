"""``lasskvm explain``: one access in words."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lasskvm.cli.explanation import Access, Explanation, Named, Verdict
from lasskvm.cli.explanation import explain as explain_access
from lasskvm.cli.reporting import reports_errors
from lasskvm.lass import FETCH, IMPLICIT, STACK, WRITE
from lasskvm.x86.registers import MASK64

__all__ = ["EXAMPLE", "explain"]

EXAMPLE = """[bold]Example:[/] a system call handler reads user memory without STAC

lasskvm explain --cpl 0 --access read --address 0x7fff00001000"""

_MASK32 = (1 << 32) - 1
_LARGEST_SIZE = 1 << 20
_WORD = 8


class Kind(StrEnum):
    """What an access does."""

    READ = "read"
    WRITE = "write"
    FETCH = "fetch"


class Format(StrEnum):
    """How to print an explanation."""

    TEXT = "text"
    JSON = "json"


def _address(text: str) -> int:
    try:
        address = int(text, 0)
    except ValueError:
        raise typer.BadParameter(f'"{text}" is not a number; write it like 0xffff800000000000') from None
    if not 0 <= address <= MASK64:
        raise typer.BadParameter(f'"{text}" does not fit into 64 bits')
    return address


_Cpl = Annotated[int, typer.Option(help="Current privilege level of the code.", min=0, max=3)]
_Address = Annotated[
    int, typer.Option(help="Linear address of the first byte.", parser=_address, metavar="ADDRESS")
]
_Access = Annotated[Kind, typer.Option(help="What the access does.")]
_Size = Annotated[
    int | None,
    typer.Option(
        help="Bytes accessed; every byte counts.", min=0, max=_LARGEST_SIZE, show_default="8, for a fetch 1"
    ),
]
_Smap = Annotated[bool, typer.Option("--smap/--no-smap", help="CR4.SMAP.")]
_Ac = Annotated[bool, typer.Option("--ac", help="RFLAGS.AC is 1, as after STAC.")]
_Implicit = Annotated[
    bool, typer.Option("--implicit", help="Made by the processor on its own account: GDT, LDT, IDT, TSS.")
]
_Stack = Annotated[bool, typer.Option("--stack", help="A stack access: push, pop, or based on RSP or RBP.")]
_Lass = Annotated[bool, typer.Option("--lass/--no-lass", help="CR4.LASS.")]
_LongMode = Annotated[
    bool, typer.Option("--long-mode/--no-long-mode", help="IA-32e mode: 64-bit or compatibility mode.")
]
_Named = Annotated[Named | None, typer.Option(help="The address is only named by something, not accessed.")]
_La57 = Annotated[bool, typer.Option("--la57", help="CR4.LA57: five-level paging, 57-bit linear addresses.")]
_Format = Annotated[Format, typer.Option("--format", help="How to print it.")]


@reports_errors
def explain(
    cpl: _Cpl,
    address: _Address,
    access: _Access = Kind.READ,
    size: _Size = None,
    smap: _Smap = True,
    ac: _Ac = False,
    implicit: _Implicit = False,
    stack: _Stack = False,
    lass: _Lass = True,
    long_mode: _LongMode = True,
    named: _Named = None,
    la57: _La57 = False,
    output_format: _Format = Format.TEXT,
) -> None:
    """Say what LASS does with one memory access, step by step."""
    if access is Kind.FETCH and (stack or implicit):
        raise typer.BadParameter(
            "a fetch is neither a stack access nor implicit; leave --stack and --implicit out"
        )
    if named is not None and (stack or implicit or size is not None or access is not Kind.READ):
        raise typer.BadParameter("an address that is only named is not accessed; leave out how")
    if not long_mode and (address > _MASK32 or la57):
        raise typer.BadParameter("outside IA-32e mode linear addresses have 32 bits; give a lower one")
    flags = {Kind.READ: 0, Kind.WRITE: WRITE, Kind.FETCH: FETCH}[access]
    flags |= IMPLICIT * implicit | STACK * stack | (named.flag if named is not None else 0)
    if size is None:
        size = _WORD if named is None and access is not Kind.FETCH else 1
    described = Access(cpl, address, size, flags, smap, ac, lass, long_mode, la57)
    explanation = explain_access(described)
    if output_format is Format.JSON:
        typer.echo(json.dumps(_as_json(described, explanation), indent=2))
    else:
        _print(described, explanation)


def _as_json(access: Access, explanation: Explanation) -> dict[str, object]:
    return {
        "address": hex(access.address),
        "last_byte": hex(access.last),
        "verdict": explanation.verdict.value,
        "violation": explanation.verdict is Verdict.VIOLATION,
        "exception": explanation.exception,
        "vector": explanation.vector,
        "error_code": None if explanation.vector is None else 0,
        "steps": [{"question": step.question, "answer": step.answer} for step in explanation.steps],
        "consequences": list(explanation.consequences),
    }


def _print(access: Access, explanation: Explanation) -> None:
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim")
    table.add_column(style="bold")
    table.add_column()
    for number, step in enumerate(explanation.steps, 1):
        table.add_row(str(number), step.question, step.answer)
    console.print(table)
    console.print()
    color = "green" if explanation.verdict is Verdict.PASSES else "red"
    verdict = {
        Verdict.PASSES: f"LASS lets the access at {access.address:#x} pass.",
        Verdict.VIOLATION: f"LASS violation: {explanation.exception}.",
        Verdict.NOT_CANONICAL: f"Not canonical: {explanation.exception}, whatever LASS says.",
    }[explanation.verdict]
    console.print(Text(verdict, style=f"bold {color}"))
    for sentence in explanation.consequences:
        console.print(sentence)
