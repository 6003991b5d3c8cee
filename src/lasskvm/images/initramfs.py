"""An initramfs builder: cpio archives in the "newc" format
(Documentation/driver-api/early-userspace/buffer-format.rst).

The output is deterministic: times are 0, inodes are numbered in order, everything belongs to root.
"""

from __future__ import annotations

import stat

from lasskvm.errors import ImageError

__all__ = ["Initramfs"]

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_ALIGNMENT = 4
_BLOCK = 512
#: Every number in a header is 8 hexadecimal digits.
_LARGEST = (1 << 32) - 1
_FIRST_INODE = 1


class Initramfs:
    """A root file system in the making. Paths are relative to its root; missing parent directories are added.

    >>> initramfs = Initramfs()
    >>> initramfs.add_file("etc/motd", b"hello", mode=0o644)
    >>> len(initramfs.build())
    512
    """

    def __init__(self) -> None:
        self._archive = bytearray()
        self._paths: dict[str, int] = {}

    def add_directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory; nothing happens when it is there already."""
        path = _normalized(path)
        if self._paths.get(path) != stat.S_IFDIR:
            self._add(path, stat.S_IFDIR, mode)

    def add_file(self, path: str, data: bytes, mode: int = 0o755) -> None:
        """Add a regular file with *data*; raises :class:`ImageError` when it is too large for the format."""
        if len(data) > _LARGEST:
            raise ImageError(
                f"{path} has {len(data)} bytes, an initramfs holds files up to 4 GiB; use a smaller one"
            )
        self._add(_normalized(path), stat.S_IFREG, mode, data)

    def add_symlink(self, path: str, target: str) -> None:
        """Add a symbolic link to *target*."""
        self._add(_normalized(path), stat.S_IFLNK, 0o777, target.encode("utf-8", "surrogateescape"))

    def add_device(self, path: str, kind: int, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a device node; *kind* is ``stat.S_IFCHR`` or ``stat.S_IFBLK``."""
        self._add(_normalized(path), kind, mode, device=(major, minor))

    def build(self) -> bytes:
        """The archive, ready to be given to a kernel as its initrd."""
        complete = bytearray(self._archive)
        _append_entry(complete, _TRAILER, inode=0, mode=0)
        return bytes(complete.ljust(-(-len(complete) // _BLOCK) * _BLOCK, b"\0"))

    def _add(
        self, path: str, kind: int, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        if path in self._paths:
            raise ValueError(f"{path} is in the initramfs already")
        parent = path.rpartition("/")[0]
        if parent:
            self.add_directory(parent)
        self._paths[path] = kind
        inode = _FIRST_INODE + len(self._paths)
        _append_entry(self._archive, path, inode=inode, mode=kind | mode, data=data, device=device)


def _normalized(path: str) -> str:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in path:
        raise ValueError(f"{path!r} does not name anything in an initramfs")
    return "/".join(parts)


def _append_entry(
    archive: bytearray,
    name: str,
    *,
    inode: int,
    mode: int,
    data: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> None:
    raw_name = name.encode("utf-8", "surrogateescape") + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    user = group = modified = own_major = own_minor = checksum = 0
    numbers = (inode, mode, user, group, links, modified, len(data), own_major, own_minor, *device)
    archive += _MAGIC + b"".join(b"%08x" % number for number in (*numbers, len(raw_name), checksum))
    archive += raw_name
    _pad(archive)
    archive += data
    _pad(archive)


def _pad(archive: bytearray) -> None:
    archive += bytes(-len(archive) % _ALIGNMENT)
