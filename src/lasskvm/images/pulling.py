"""Pulling an image by its name."""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.images.cache import Image, ImageCache
from lasskvm.images.catalog import DEBIAN, DEBIAN_KVM
from lasskvm.images.debian import pull as pull_debian
from lasskvm.images.packages import DEFAULT_SUITE
from lasskvm.images.programs import pull_program

__all__ = ["pull"]


def pull(
    name: str,
    cache: ImageCache | None = None,
    *,
    suite: str = DEFAULT_SUITE,
    mirror: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Image:
    """Get the image *name*, one of ``IMAGE_NAMES``, from *suite* into *cache*; the image, now the one pulled last.

    *mirror* is the URI of a Debian archive, by default the one that apt on this host is configured for. *progress* is
    called with a short line before each step. Raises :class:`~lasskvm.errors.HostError` when apt or dpkg is missing,
    the mirror cannot be reached, a signature is not good, the disk is full, or the suite does not have it.
    """
    if name in (DEBIAN, DEBIAN_KVM):
        return pull_debian(cache, name, suite=suite, mirror=mirror, progress=progress)
    return pull_program(name, cache, suite=suite, mirror=mirror, progress=progress)
