"""From what a person names to an image: a pulled one, or a file."""

from __future__ import annotations

from pathlib import Path

from lasskvm.errors import ImageError
from lasskvm.images.cache import Image, ImageCache

__all__ = ["DEBIAN", "IMAGE_NAMES", "MEMTEST", "SEABIOS", "resolve"]

DEBIAN = "debian"
SEABIOS = "seabios"
MEMTEST = "memtest86+"
#: The names of images that can be pulled; the one with a busybox first.
IMAGE_NAMES = (DEBIAN, SEABIOS, MEMTEST)


def resolve(name_or_path: str | Path, cache: ImageCache | None = None) -> Image:
    """The image pulled last under a name of ``IMAGE_NAMES``, or else the kernel file at that path.

    A file that is called like an image is meant when it is written with a slash ("./debian"). Raises
    :class:`ImageError` when the image has not been pulled or the file does not exist.
    """
    if name_or_path in IMAGE_NAMES:
        pulled = (cache or ImageCache()).images(str(name_or_path))
        if not pulled:
            raise ImageError(
                f"image {name_or_path} has not been pulled; run `lasskvm images pull {name_or_path}`"
            )
        return pulled[-1]
    path = Path(name_or_path)
    if not path.exists():
        raise ImageError(
            f"there is no file {path}, nor an image of that name; give a kernel file or {', '.join(IMAGE_NAMES)}"
        )
    return Image(name=path.name, version="", kernel=path)
