"""An encoder for the part of AML, the byte code of ACPI's definition blocks, that describes devices.

Each function returns the bytes of one term; terms are joined by concatenation.

Source: ACPI specification, "ACPI Machine Language (AML) Specification" and, for resource descriptors, "Resource Data
Types for ACPI".
"""

from __future__ import annotations

import re

__all__ = [
    "buffer",
    "device",
    "eisa_id",
    "integer",
    "io_ports",
    "irq",
    "name",
    "name_string",
    "package",
    "resource_template",
    "scope",
    "string",
]

# Opcodes
ZERO, ONE = 0x00, 0x01
NAME = 0x08
BYTE_PREFIX, WORD_PREFIX, DWORD_PREFIX, STRING_PREFIX, QWORD_PREFIX = 0x0A, 0x0B, 0x0C, 0x0D, 0x0E
SCOPE = 0x10
BUFFER = 0x11
PACKAGE = 0x12
EXTENDED = 0x5B
DEVICE = 0x82
#: What precedes each width of a number, by its size in bytes.
INTEGER_PREFIXES = ((1, BYTE_PREFIX), (2, WORD_PREFIX), (4, DWORD_PREFIX), (8, QWORD_PREFIX))

# Names
DUAL_NAME, MULTI_NAME, NULL_NAME = 0x2E, 0x2F, 0x00
SEGMENT_LENGTH = 4
_PATH = re.compile(r"(?P<prefix>\\|\^*)(?P<segments>[A-Z_][A-Z0-9_]{0,3}(?:\.[A-Z_][A-Z0-9_]{0,3})*)?")

#: A package length of one byte has 6 bits; a longer one has 4 in its first byte and 8 in each of up to three more.
SHORT_LENGTH_LIMIT = 1 << 6
FOLLOWING_BYTES_SHIFT = 6
FIRST_BYTE_BITS = 4
MAX_FOLLOWING_BYTES = 3

_EISA_ID = re.compile(r"(?P<vendor>[A-Z]{3})(?P<product>[0-9A-F]{4})")
EISA_LETTER_BITS = 5
EISA_PRODUCT_BITS = 16

# Resource descriptors
IO_DESCRIPTOR = 0x47
IO_DECODE_16 = 1 << 0
IO_ALIGNMENT = 1
#: An interrupt without flags: edge-triggered, active high, not shared.
IRQ_DESCRIPTOR = 0x22
#: The end, with a checksum of 0, which stands for a right one.
END_TAG = bytes((0x79, 0x00))


def integer(value: int) -> bytes:
    """A number of up to 64 bits, in its shortest form.

    >>> integer(0).hex(), integer(5).hex(), integer(0x1234).hex()
    ('00', '0a05', '0b3412')
    """
    if value in (0, 1):
        return bytes((ONE if value else ZERO,))
    for size, prefix in INTEGER_PREFIXES:
        if 0 <= value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} does not fit into 64 bits")


def string(text: str) -> bytes:
    """An ASCII string."""
    if "\0" in text:
        raise ValueError("an AML string cannot contain a zero")
    return bytes((STRING_PREFIX,)) + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """The number that stands for a PNP identifier such as ``PNP0501``.

    >>> eisa_id("PNP0501").hex()
    '0c41d00501'
    """
    match = _EISA_ID.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no EISA identifier")
    number = 0
    for letter in match["vendor"]:
        number = number << EISA_LETTER_BITS | ord(letter) - ord("@")
    number = number << EISA_PRODUCT_BITS | int(match["product"], 16)
    # The number is big-endian within a little-endian constant.
    return integer(int.from_bytes(number.to_bytes(4, "big"), "little"))


def name_string(path: str) -> bytes:
    """A path such as ``COM1``, ``\\_SB`` or ``\\_SB.COM1``; segments are filled up with underscores.

    >>> name_string("\\\\_SB.COM1")
    b'\\\\._SB_COM1'
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"{path!r} is no path of the ACPI name space")
    segments = match["segments"].split(".") if match["segments"] else []
    if not segments:
        kind = bytes((NULL_NAME,))
    elif len(segments) == 1:
        kind = b""
    elif len(segments) == 2:
        kind = bytes((DUAL_NAME,))
    else:
        kind = bytes((MULTI_NAME, len(segments)))
    body = "".join(segment.ljust(SEGMENT_LENGTH, "_") for segment in segments)
    return match["prefix"].encode("ascii") + kind + body.encode("ascii")


def name(path: str, value: bytes) -> bytes:
    """``Name (path, value)``, where *value* is an encoded data object."""
    return bytes((NAME,)) + name_string(path) + value


def package(*elements: bytes) -> bytes:
    """``Package () {elements}``; at most 255."""
    return bytes((PACKAGE,)) + _with_length(bytes((len(elements),)) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """``Buffer () {data}``."""
    return bytes((BUFFER,)) + _with_length(integer(len(data)) + data)


def scope(path: str, *terms: bytes) -> bytes:
    """``Scope (path) {terms}``."""
    return bytes((SCOPE,)) + _with_length(name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """``Device (path) {terms}``."""
    return bytes((EXTENDED, DEVICE)) + _with_length(name_string(path) + b"".join(terms))


def resource_template(*descriptors: bytes) -> bytes:
    """``ResourceTemplate () {descriptors}``."""
    return buffer(b"".join(descriptors) + END_TAG)


def io_ports(base: int, count: int) -> bytes:
    """``IO (Decode16, base, base, 1, count)``: I/O ports that do not move."""
    edge = base.to_bytes(2, "little")
    return bytes((IO_DESCRIPTOR, IO_DECODE_16)) + edge + edge + bytes((IO_ALIGNMENT, count))


def irq(number: int) -> bytes:
    """``IRQNoFlags () {number}``: an ISA interrupt, 0 to 15."""
    return bytes((IRQ_DESCRIPTOR,)) + (1 << number).to_bytes(2, "little")


def _with_length(body: bytes) -> bytes:
    """*body* behind its package length, which counts itself."""
    if len(body) + 1 < SHORT_LENGTH_LIMIT:
        return bytes((len(body) + 1,)) + body
    for following in range(1, MAX_FOLLOWING_BYTES + 1):
        length = len(body) + 1 + following
        if length < 1 << FIRST_BYTE_BITS + 8 * following:
            first = following << FOLLOWING_BYTES_SHIFT | length & (1 << FIRST_BYTE_BITS) - 1
            return bytes((first,)) + (length >> FIRST_BYTE_BITS).to_bytes(following, "little") + body
    raise ValueError(f"an AML package of {len(body):#x} bytes is too long")
