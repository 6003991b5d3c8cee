"""``lasskvm images``: pulling guest kernels and firmware, and listing them."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lasskvm.cli.reporting import nearest, reports_errors
from lasskvm.errors import ImageError

if TYPE_CHECKING:
    from lasskvm.images import Image

# lasskvm.images is imported by the commands: it brings the loaders along, and --help should not wait for
# them.

__all__ = ["LIST_EXAMPLE", "PULL_EXAMPLE", "list_images", "pull"]

PULL_EXAMPLE = """[bold]Examples:[/] Debian's newest cloud kernel, from the mirror this host uses; the same with KVM

lasskvm images pull debian

lasskvm images pull debian-kvm"""
LIST_EXAMPLE = """[bold]Example:[/] where is the kernel that `lasskvm run debian` boots?

lasskvm images list --format json"""

_DEFAULT_SUITE = "sid"


class Format(StrEnum):
    """How to print the list."""

    TABLE = "table"
    JSON = "json"


@reports_errors
def pull(
    name: Annotated[str, typer.Argument(help="The image: debian, debian-kvm, seabios or memtest86+.")],
    suite: Annotated[str, typer.Option(help="The release to take it from.")] = _DEFAULT_SUITE,
) -> None:
    """Get an image, from Debian and with signatures checked, into the cache.

    debian is a current kernel and a static busybox, debian-kvm the same with the modules of KVM, seabios a PC
    firmware, memtest86+ a memory test.
    """
    from lasskvm import images

    if name not in images.IMAGE_NAMES:
        raise ImageError(f'there is no image "{name}" to pull; {nearest(name, images.IMAGE_NAMES)}')
    console = Console(stderr=True, highlight=False)
    with console.status("starting") as status:

        def progress(line: str) -> None:
            console.print(line, markup=False)
            status.update(line)

        image = images.pull(name, suite=suite, progress=progress)
    console.print(f"{image.name} {image.version}: {image.path}", markup=False, soft_wrap=True)


@reports_errors
def list_images(
    output_format: Annotated[Format, typer.Option("--format", help="How to print the list.")] = Format.TABLE,
) -> None:
    """List the images in the cache; `lasskvm run NAME` takes the last one of a name."""
    from lasskvm.images import IMAGE_NAMES, ImageCache

    images = ImageCache().images()
    if output_format is Format.JSON:
        typer.echo(json.dumps([_as_json(image) for image in images], indent=2))
        return
    if not images:
        names = ", ".join(IMAGE_NAMES)
        typer.echo(f"No image has been pulled yet; `lasskvm images pull NAME` gets one of: {names}", err=True)
        return
    table = Table("name", "version", "suite", "pulled")
    for image in images:
        manifest = image.manifest
        table.add_row(
            image.name, image.version, manifest.suite if manifest else "", manifest.date if manifest else ""
        )
    Console(highlight=False).print(table)


def _as_json(image: Image) -> dict[str, object]:
    manifest = image.manifest
    return {
        "name": image.name,
        "version": image.version,
        "kernel": _as_text(image.kernel),
        "busybox": _as_text(image.busybox),
        "firmware": _as_text(image.firmware),
        "modules": [str(module) for module in image.modules],
        "suite": manifest.suite if manifest else None,
        "date": manifest.date if manifest else None,
        "packages": manifest.packages if manifest else {},
        "sha256": manifest.sha256 if manifest else {},
    }


def _as_text(path: Path | None) -> str | None:
    return None if path is None else str(path)
