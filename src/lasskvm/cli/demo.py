"""``lasskvm demo``: a guest switches LASS on, and a table of what that blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lasskvm.cli.reporting import reports_errors, say

if TYPE_CHECKING:
    pass

__all__ = ["EXAMPLE", "demo", "render"]

EXAMPLE = """[bold]Example:[/] what LASS blocks, in a few seconds, without Linux and without a download

lasskvm demo"""


@reports_errors
def demo(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Run a small guest that commits accesses across the split, with LASS off and on, and show what happened.

    The exit status is 0 when every access came out as the manual says.
    """
    from lasskvm.conformance.demo import run_demo

    result = run_demo(_no_progress if quiet else say)
    console = Console(highlight=False)
    console.print(render(result))
