"""Guest images: pulling and caching kernels, and building an initramfs for them.

:func:`resolve` (:mod:`.catalog`) finds the image a person names; :func:`pull` (:mod:`.pulling`) gets a current
one (:mod:`.debian`, :mod:`.programs`) out of Debian's packages (:mod:`.packages`, :mod:`.apt`, :mod:`.apt_sources`)
into the :class:`ImageCache` (:mod:`.cache`). :class:`Initramfs` (:mod:`.initramfs`) builds archives;
:func:`program_initramfs` and :func:`shell_initramfs` (:mod:`.guest_init`) build the two that ``lasskvm run`` uses,
with :class:`KernelModules` (:mod:`.kernel_modules`) where an image has some.
"""

from lasskvm.images.cache import Image, ImageCache, Manifest
from lasskvm.images.catalog import IMAGE_NAMES, resolve
from lasskvm.images.debian import pull as pull_debian
from lasskvm.images.guest_init import program_initramfs, shell_initramfs
from lasskvm.images.initramfs import Initramfs
from lasskvm.images.kernel_modules import KernelModules
from lasskvm.images.pulling import pull

__all__ = [
    "IMAGE_NAMES",
    "Image",
    "ImageCache",
    "Initramfs",
    "KernelModules",
    "Manifest",
    "program_initramfs",
    "pull",
    "pull_debian",
    "resolve",
    "shell_initramfs",
]
