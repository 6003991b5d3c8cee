"""``lasskvm demo``: a guest switches LASS on, and a table of what that blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lasskvm.cli.engine import EngineChoice, EngineOption
from lasskvm.cli.reporting import STATUS_FAILED, ignore, reports_errors, say

__all__ = ["EXAMPLE", "Result", "Row", "conclusion", "demo", "render"]

EXAMPLE = """[bold]Example:[/] what LASS blocks, in seconds, without Linux and without a download

lasskvm demo

lasskvm demo --engine emulator"""


class Row(Protocol):
    """One access that the guest made twice."""

    @property
    def access(self) -> str:
        """What the guest did."""

    @property
    def without_lass(self) -> str:
        """What happened with CR4.LASS = 0."""

    @property
    def with_lass(self) -> str:
        """What happened with CR4.LASS = 1."""

    @property
    def blocked(self) -> bool:
        """Whether LASS kept the access from happening."""


class Result(Protocol):
    """What a demo found, as :mod:`lasskvm.conformance.demo` gives it."""

    @property
    def rows(self) -> Sequence[Row]:
        """The accesses, in the order in which they were made."""

    @property
    def as_documented(self) -> bool:
        """Whether every access had the outcome that the manual gives."""


@reports_errors
def demo(
    engine: EngineOption = EngineChoice.JIT,
    forced_emulation: Annotated[
        bool, typer.Option("--forced-emulation", help="Have each access emulated, by KVM's prefix for that.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Run a small guest that makes accesses with LASS off and on, and show what happened.

    The exit status is 0 when every access came out as the manual says, else 1.
    """
    from lasskvm import kvm
    from lasskvm.conformance.demo import run_demo

    progress = ignore if quiet else say
    if engine is EngineChoice.JIT:
        kvm.prepare(progress)
    result: Result = run_demo(progress, engine=engine.value, forced_emulation=forced_emulation)
    console = Console(highlight=False)
    console.print(render(result))
    console.print(conclusion(result))
    if not result.as_documented:
        raise typer.Exit(STATUS_FAILED)


def render(result: Result) -> Table:
    """The table of all accesses; what LASS blocked stands out."""
    table = Table("access", "without LASS", "with LASS")
    for row in result.rows:
        style = "bold red" if row.blocked else "green"
        table.add_row(Text(row.access), Text(row.without_lass), Text(row.with_lass, style=style))
    return table


def conclusion(result: Result) -> str:
    """The sentence behind the table."""
    blocked = sum(row.blocked for row in result.rows)
    counted = f"LASS blocked {blocked} of {len(result.rows)} accesses"
    if result.as_documented:
        return f"{counted}, and each came out as the manual says."
    return f"{counted}, but not each came out as the manual says: please report this."
