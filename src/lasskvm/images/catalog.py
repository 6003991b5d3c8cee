"""From what a person names to an image: a pulled one, or a file."""

from __future__ import annotations

from pathlib import Path

from lasskvm.errors import ImageError
from lasskvm.images.cache import Image, ImageCache

__all__ = ["DEBIAN", "DEBIAN_KVM", "IMAGE_NAMES", "MEMTEST", "SEABIOS", "resolve"]

DEBIAN = "debian"
#: The same with the modules of KVM, which are loaded when it is run: a guest that is a hypervisor.
DEBIAN_KVM = "debian-kvm"
SEABIOS = "seabios"
MEMTEST = "memtest86+"
#: The names of images that can be pulled; the one whose busybox other kernels use first.
IMAGE_NAMES = (DEBIAN, DEBIAN_KVM, SEABIOS, MEMTEST)


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
