"""The snapshot file: a document that describes a machine, and the memory that it has touched.

A file is a header (magic, format version) and sections. Each section has a kind, a place, its size and a BLAKE2b digest
over all of that and its payload, which is compressed with Zstandard. The first section is the document, JSON; then
comes memory in chunks of 2 MiB, without pages that are all zeros; the last section counts the others, so a file that
was cut off is recognized wherever it was.

A file is written beside its place and renamed when it is on the disk, so its place always holds a whole snapshot or
what was there before.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import zstandard

from lasskvm.errors import SnapshotError
from lasskvm.memory import PAGE_SIZE

__all__ = ["FORMAT_VERSION", "Document", "Region", "SnapshotReader", "open_snapshot", "write_snapshot"]

#: What a machine is described by: names and values that JSON can hold.
Document = dict[str, Any]

#: Files of a newer format are refused, and so are those of an older one: nothing converts them.
FORMAT_VERSION = 3

_MAGIC = b"LASSKVM\x1a"
_HEADER = struct.Struct("<8sI")
#: Kind, place (a guest-physical address for memory), size of the payload in the file.
_SECTION = struct.Struct("<4sQQ")
_DIGEST_BYTES = 32
_DOCUMENT, _MEMORY, _END = b"DOCU", b"MEMO", b"LAST"
_CHUNK_PAGES = 512
_CHUNK_BYTES = _CHUNK_PAGES * PAGE_SIZE
_BITS_PER_BYTE = 8
#: Larger than any document, and than any chunk that does not compress.
_MAX_PAYLOAD = 1 << 28
_LEVEL = 3
_PREFIX = ".lasskvm-snapshot-"


class Region(Protocol):
    """Memory that is saved: a slot, or what else has a range of guest-physical addresses of its own."""

    @property
    def gpa(self) -> int:
        """Where it begins."""

    @property
    def size(self) -> int:
        """How long it is, in bytes, a multiple of 4096."""

    @property
    def view(self) -> memoryview:
        """Its bytes."""


class _Section(NamedTuple):
    kind: bytes
    place: int
    payload: bytes


# --------------------------------------------------------------------------------------------------------- writing


def write_snapshot(path: Path, document: Document, regions: Iterable[Region]) -> None:
    """Write *document* and the memory of *regions* to *path*, at once or not at all.

    Raises :class:`SnapshotError` when the host refuses; *path* is then what it was.
    """
    try:
        with _replacing(path) as file:
            _write(file, document, regions)
    except OSError as error:
        raise SnapshotError(
            f"the snapshot {path} cannot be written ({error.strerror or error}); choose a folder with room for it"
        ) from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of *path* when everything has worked and is on the disk."""
    descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(file: BinaryIO, document: Document, regions: Iterable[Region]) -> None:
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    file.write(_HEADER.pack(_MAGIC, FORMAT_VERSION))
    count = 0
    for section in _sections(document, regions):
        _write_section(file, section._replace(payload=compressor.compress(section.payload)))
        count += 1
    _write_section(file, _Section(_END, count, b""))


def _sections(document: Document, regions: Iterable[Region]) -> Iterator[_Section]:
    yield _Section(_DOCUMENT, 0, json.dumps(document).encode())
    for region in regions:
        for start in range(0, region.size, _CHUNK_BYTES):
            pages = np.frombuffer(region.view[start : start + _CHUNK_BYTES], np.uint64).reshape(
                -1, PAGE_SIZE // 8
            )
            used = pages.any(axis=1)
            if used.any():
                bitmap = np.packbits(used, bitorder="little").tobytes()
                yield _Section(_MEMORY, region.gpa + start, bitmap + pages[used].tobytes())


def _write_section(file: BinaryIO, section: _Section) -> None:
    head = _SECTION.pack(section.kind, section.place, len(section.payload))
    file.write(head + _digest(head, section.payload))
    file.write(section.payload)


def _digest(head: bytes, payload: bytes) -> bytes:
    digest = blake2b(head, digest_size=_DIGEST_BYTES)
    digest.update(payload)
    return digest.digest()


# --------------------------------------------------------------------------------------------------------- reading


@contextmanager
def open_snapshot(path: Path) -> Iterator[SnapshotReader]:
    """The snapshot in *path*, its document read.

    Raises :class:`SnapshotError` for what is no snapshot, damaged, cut off or of another version, and for whatever the
    body finds wrong with the document (KeyError, TypeError, ValueError, OverflowError).
    """
    try:
        with path.open("rb") as file:
            yield SnapshotReader(file, path)
    except OSError as error:
        raise SnapshotError(
            f"the snapshot {path} cannot be read ({error.strerror or error}); look at its name and permissions"
        ) from error
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise SnapshotError(
            f"the snapshot {path} describes a machine that cannot be ({error}); save it again"
        ) from error


class SnapshotReader:
    """A snapshot that is being read: ``document`` first, then :meth:`load_memory`."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._decompressor = zstandard.ZstdDecompressor()
        self._check_header()
        section = self._next()
        if section.kind != _DOCUMENT:
            raise self._damaged()
        self.document: Document = json.loads(section.payload)

    def load_memory(self, regions: Iterable[Region]) -> None:
        """Fill *regions*, which must be all zeros, and see that the file is complete."""
        known = list(regions)
        sections = 1
        while (section := self._next()).kind == _MEMORY:
            self._load_chunk(known, section)
            sections += 1
        if section.kind != _END or section.place != sections or self._file.read(1):
            raise self._damaged()

    def _load_chunk(self, regions: Iterable[Region], section: _Section) -> None:
        region = next((it for it in regions if it.gpa <= section.place < it.gpa + it.size), None)
        if region is None:
            raise self._damaged()
        start = section.place - region.gpa
        count = min(_CHUNK_PAGES, (region.size - start) // PAGE_SIZE)
        bitmap_bytes = -(-count // _BITS_PER_BYTE)
        bitmap = np.frombuffer(section.payload[:bitmap_bytes], np.uint8)
        used = np.unpackbits(bitmap, count=count, bitorder="little").astype(bool)
        content = np.frombuffer(section.payload[bitmap_bytes:], np.uint8).reshape(-1, PAGE_SIZE)
        pages = np.frombuffer(region.view[start : start + count * PAGE_SIZE], np.uint8).reshape(-1, PAGE_SIZE)
        pages[used] = content

    def _check_header(self) -> None:
        header = self._file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise SnapshotError(
                f"{self._path} is no snapshot of lasskvm; give a file that --save has written"
            )
        _, version = _HEADER.unpack(header)
        if version > FORMAT_VERSION:
            raise SnapshotError(
                f"the snapshot {self._path} has format {version}, and this lasskvm knows {FORMAT_VERSION}; "
                "use the newer lasskvm that has written it"
            )
        if version < FORMAT_VERSION:
            raise SnapshotError(
                f"the snapshot {self._path} has format {version}, which this lasskvm no longer reads; save it again"
            )

    def _next(self) -> _Section:
        head = self._file.read(_SECTION.size)
        digest = self._file.read(_DIGEST_BYTES)
        if len(digest) < _DIGEST_BYTES:
            raise self._damaged()
        kind, place, size = _SECTION.unpack(head)
        if size > _MAX_PAYLOAD:
            raise self._damaged()
        payload = self._file.read(size)
        if len(payload) < size or _digest(head, payload) != digest:
            raise self._damaged()
        if payload:
            try:
                payload = self._decompressor.decompress(payload, max_output_size=_MAX_PAYLOAD)
            except zstandard.ZstdError:
                raise self._damaged() from None
        return _Section(kind, place, payload)

    def _damaged(self) -> SnapshotError:
        return SnapshotError(
            f"the snapshot {self._path} is damaged or incomplete; use another copy, or save it again"
        )
