"""The command line as a whole: which commands there are."""

from __future__ import annotations

from typing import Annotated

import typer

import lasskvm
from lasskvm.cli import demo, explain, fuzz, images, run, verify

__all__ = ["app"]

_EXAMPLE = """[bold]Example:[/] see what LASS blocks, then boot Linux with it

lasskvm demo

lasskvm images pull debian && lasskvm run debian"""

app = typer.Typer(
    name="lasskvm",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXAMPLE,
)
_images_app = typer.Typer(no_args_is_help=True, epilog=images.PULL_EXAMPLE)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lasskvm {lasskvm.__version__}")
        raise typer.Exit


@app.callback()
def _application(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Run kernels with Intel LASS (Linear Address Space Separation) enforced, on any machine."""


app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
app.command("run", epilog=run.EXAMPLE)(run.run)
app.command("explain", epilog=explain.EXAMPLE)(explain.explain)
app.command("fuzz", epilog=fuzz.EXAMPLE)(fuzz.fuzz)
app.command("verify", epilog=verify.EXAMPLE)(verify.verify)
_images_app.command("pull", epilog=images.PULL_EXAMPLE)(images.pull)
_images_app.command("list", epilog=images.LIST_EXAMPLE)(images.list_images)
app.add_typer(_images_app, name="images", help="Pull guest kernels, and list them.")
