"""Errors that a person can cause.

Every one of them carries one sentence that says what is wrong and what to do about it; the command line prints
that sentence and exits with status 2. A guest can never cause one: it gets a fault, or the caller of ``run()``
gets a typed exit.
"""

__all__ = [
    "CpuFeatureError",
    "DeviceError",
    "HostError",
    "ImageError",
    "LassKvmError",
    "MemoryLayoutError",
    "SnapshotError",
]


class LassKvmError(Exception):
    """The base of all errors a person can cause. ``str(error)`` is one sentence for that person."""


class ImageError(LassKvmError):
    """A kernel, initrd, program or ROM that cannot be loaded."""


class MemoryLayoutError(LassKvmError):
    """A memory layout that cannot be built: too small, misaligned, overlapping, or more than the host has."""


class CpuFeatureError(LassKvmError):
    """A CPU model or feature name that does not exist, or a combination the architecture does not allow."""


class DeviceError(LassKvmError):
    """A device that does not exist, or cannot be where it is asked to be."""


class HostError(LassKvmError):
    """Something this host lacks or refuses: apt, disk space, the pinned Unicorn version, /dev/kvm."""


class SnapshotError(LassKvmError):
    """A snapshot that cannot be taken, written or read: damaged, of another version, or of something else."""
