"""An independent reader of newc cpio archives."""

from __future__ import annotations

from dataclasses import dataclass

FIELDS = (
    "ino",
    "mode",
    "uid",
    "gid",
    "nlink",
    "mtime",
    "filesize",
    "devmajor",
    "devminor",
    "rdevmajor",
    "rdevminor",
)


@dataclass(frozen=True)
class Entry:
    name: str
    data: bytes
    fields: dict[str, int]


def parse_newc(archive: bytes) -> list[Entry]:
    """The entries before the trailer, by the layout in the kernel's early-userspace documentation."""
    entries, position = [], 0
    while True:
        assert archive[position : position + 6] == b"070701"
        numbers = [int(archive[at : at + 8], 16) for at in range(position + 6, position + 110, 8)]
        fields = dict(zip(FIELDS, numbers, strict=False))
        name_size, checksum = numbers[11], numbers[12]
        assert checksum == 0
        name = archive[position + 110 : position + 110 + name_size]
        assert name.endswith(b"\0")
        start = (position + 110 + name_size + 3) // 4 * 4
        end = start + fields["filesize"]
        if name == b"TRAILER!!!\0":
            assert not any(archive[end:])
            return entries
        entries.append(Entry(name[:-1].decode(), archive[start:end], fields))
        position = (end + 3) // 4 * 4
