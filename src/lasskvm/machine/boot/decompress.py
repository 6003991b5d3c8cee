"""Unpacking the payload of a bzImage, with bounded output.

The payload formats and their magic numbers are listed under ``payload_offset`` in
Documentation/arch/x86/boot.rst. Whatever the format, the last four bytes of a payload give the unpacked
size: gzip has it by itself, the kernel's build appends it to the others. That number bounds the output, and
the caller bounds that number, so a decompression bomb costs no more host memory than an honest kernel.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable

import lz4.block
import zstandard

from lasskvm.errors import ImageError
from lasskvm.machine.boot.layout import MIB

__all__ = ["MAX_VMLINUX_SIZE", "decompress"]

#: The most a payload may unpack to: the kernel's own mapping of itself, KERNEL_IMAGE_SIZE, has 512 MiB.
MAX_VMLINUX_SIZE = 512 * MIB

_SIZE_BYTES = 4
#: Memory for the dictionary of xz, lzma and zstd; kernels are built with windows of up to 128 MiB.
_WINDOW_LIMIT = 256 * MIB
_ZSTD_WINDOW_LIMIT = 128 * MIB
_GZIP_WBITS = 16 + zlib.MAX_WBITS
#: Each block of an lz4 legacy stream unpacks to at most this (LZ4_LEGACY_BLOCKSIZE).
_LZ4_BLOCK = 8 * MIB
_LZ4_MAGIC = b"\x02\x21\x4c\x18"
_ELF_MAGIC = b"\x7fELF"


def decompress(payload: bytes | memoryview, limit: int = MAX_VMLINUX_SIZE) -> bytes:
    """Unpack the *payload* of a bzImage, its trailing four-byte size included; the result is the vmlinux.

    *limit* is the most bytes the result may have. Raises :class:`ImageError` for an unknown format, for
    damaged data and for a result above the limit; the sentence starts with "the payload".
    """
    payload = memoryview(payload)
    unpack = _unpacker(bytes(payload[:_MAGIC_LENGTH]))
    if unpack is _stored:
        size = len(payload)
    else:
        size = _unpacked_size(payload)
    if size > MAX_VMLINUX_SIZE:
        raise ImageError(
            f"the payload says that it unpacks to {size} bytes, which no kernel has; get it again"
        )
    if size > limit:
        raise ImageError(
            f"the payload unpacks to {size / MIB:.1f} MiB and there is room for {limit / MIB:.1f} MiB; "
            "give the guest more memory"
        )
    try:
        vmlinux = unpack(payload, size)
    except _DECODER_ERRORS as error:
        raise ImageError("the payload is damaged and cannot be unpacked; get the kernel again") from error
    if len(vmlinux) != size:
        raise ImageError("the payload does not have the size it says and is damaged; get the kernel again")
    return vmlinux


_DECODER_ERRORS = (
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
    lz4.block.LZ4BlockError,
    OSError,
    EOFError,
    ValueError,
)


def _unpacked_size(payload: memoryview) -> int:
    if len(payload) < _SIZE_BYTES:
        raise ImageError("the payload is truncated; get the kernel again")
    return int.from_bytes(payload[-_SIZE_BYTES:], "little")


def _unpacker(magic: bytes) -> Callable[[memoryview, int], bytes]:
    for prefix, unpack in _FORMATS.items():
        if magic.startswith(prefix):
            if unpack is None:
                raise ImageError(
                    "the payload is packed with lzo, which is not supported; use zstd, lz4, xz or gzip"
                )
            return unpack
    raise ImageError(
        f"the payload has an unknown format (it starts with {magic.hex(' ')}); get the kernel again"
    )


# An unpacker may return more than `size`, which tells a stream that is too long, but not without bound: one
# byte more, or one block more for lz4.


def _stored(payload: memoryview, size: int) -> bytes:
    return bytes(payload)


def _gzip(payload: memoryview, size: int) -> bytes:
    stream = zlib.decompressobj(_GZIP_WBITS)
    return _complete(stream.decompress(payload, size + 1), stream.eof)


def _bzip2(payload: memoryview, size: int) -> bytes:
    stream = bz2.BZ2Decompressor()
    return _complete(stream.decompress(payload, size + 1), stream.eof)


def _xz(payload: memoryview, size: int) -> bytes:
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, _WINDOW_LIMIT)
    return _complete(stream.decompress(payload, size + 1), stream.eof)


def _lzma(payload: memoryview, size: int) -> bytes:
    # An lzma stream may end without a mark when its header has the size, so only the length can be checked.
    stream = lzma.LZMADecompressor(lzma.FORMAT_ALONE, _WINDOW_LIMIT)
    return stream.decompress(payload, size + 1)


def _zstd(payload: memoryview, size: int) -> bytes:
    # A content size in the frame header would decide on the allocation alone, so it has to agree first.
    content_size = zstandard.get_frame_parameters(payload).content_size
    if content_size not in (zstandard.CONTENTSIZE_UNKNOWN, size):
        raise ValueError("the frame's content size differs from the payload's")
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_LIMIT).decompress(
        payload, max_output_size=size
    )


def _lz4(payload: memoryview, size: int) -> bytes:
    result = bytearray()
    position, end = len(_LZ4_MAGIC), len(payload) - _SIZE_BYTES
    while position < end and len(result) <= size:
        (length,) = struct.unpack_from("<I", payload, position)
        position += _SIZE_BYTES
        if position + length > end:
            raise EOFError("a block goes beyond the end of the payload")
        block = payload[position : position + length]
        result += lz4.block.decompress(block, uncompressed_size=_LZ4_BLOCK)
        position += length
    return bytes(result)


def _complete(data: bytes, ended: bool) -> bytes:
    if not ended:
        raise EOFError("the compressed stream does not end where it should")
    return data


_FORMATS: dict[bytes, Callable[[memoryview, int], bytes] | None] = {
    b"\x1f\x8b": _gzip,
    b"BZh": _bzip2,
    b"\x5d\x00": _lzma,
    b"\xfd7zXZ\x00": _xz,
    b"\x89LZO": None,
    _LZ4_MAGIC: _lz4,
    b"\x28\xb5\x2f\xfd": _zstd,
    _ELF_MAGIC: _stored,
}
_MAGIC_LENGTH = max(map(len, _FORMATS))
