"""MRENCLAVE: the SHA-256 of how an enclave was built.

Every step of the building adds blocks of 64 bytes, which is just what SHA-256 takes at a time. In between, the SECS
holds the chaining value and the number of blocks, and nothing else does: an SECS can be written out of the EPC, saved
and restored in the middle of a measurement, and a guest that never comes to an end takes no memory. The standard
library cannot stop and go on like that, so the compression function is here; digests of whole things come from
:mod:`hashlib`.

Source: Intel SDM volume 3D, 36.1.1 to 36.1.4, 38.3 (ECREATE, EADD, EEXTEND, EINIT); FIPS PUB 180-4, 4.1.2 to 6.2.
"""

from __future__ import annotations

import struct

from lasskvm.sgx.secs import Secs
from lasskvm.x86 import sgx

__all__ = ["begin", "digest", "extend", "measure_add", "measure_create", "measure_extend"]

_WORDS = struct.Struct(">8I")
_BLOCK_WORDS = struct.Struct(">16I")
_U64 = struct.Struct("<Q")
_ECREATE = struct.Struct("<8sIQ44x")
_EADD = struct.Struct("<8sQ48s")
_EEXTEND = struct.Struct("<8sQ48x")
_MASK = 0xFFFF_FFFF
#: Times this, a word stands twice, side by side.
_TWICE = 1 << 32 | 1
_ROUNDS = 64
_BITS_PER_BYTE = 8
_PADDING_START = 0x80
_LENGTH_BYTES = 8


def begin() -> bytes:
    """The chaining value before the first block (SHA256INITIALIZE), 32 bytes."""
    return _WORDS.pack(*_INITIAL)


def measure_create(secs: Secs) -> None:
    """ECREATE: begin the measurement of *secs*, with the size of its SSA frames and its own size."""
    secs.mrenclave, secs.measured_blocks = begin(), 0
    extend(secs, _ECREATE.pack(sgx.MEASURED_ECREATE, secs.ssa_frame_size, secs.size))


def measure_add(secs: Secs, offset: int, secinfo: bytes) -> None:
    """EADD: measure a page at *offset* from the enclave's base, and its *secinfo*: 64 bytes, as EADD adjusts it."""
    extend(secs, _EADD.pack(sgx.MEASURED_EADD, offset, secinfo[: sgx.MEASURED_SECINFO]))


def measure_extend(secs: Secs, offset: int, chunk: bytes) -> None:
    """EEXTEND: measure *chunk*, 256 bytes of a page, which are at *offset* from the enclave's base."""
    extend(secs, _EEXTEND.pack(sgx.MEASURED_EEXTEND, offset) + chunk)


def extend(secs: Secs, data: bytes) -> None:
    """Add *data*, a multiple of 64 bytes, to the measurement of *secs*."""
    secs.mrenclave = _compress(secs.mrenclave, data)
    secs.measured_blocks += len(data) // sgx.SHA256_BLOCK


def digest(secs: Secs) -> bytes:
    """EINIT: the digest over all that was measured (SHA256FINAL), 32 bytes. *secs* is left as it is."""
    length = (
        secs.measured_blocks * sgx.SHA256_BLOCK * _BITS_PER_BYTE & (1 << _BITS_PER_BYTE * _LENGTH_BYTES) - 1
    )
    padding = bytes((_PADDING_START, *bytes(sgx.SHA256_BLOCK - _LENGTH_BYTES - 1)))
    return _compress(secs.mrenclave, padding + length.to_bytes(_LENGTH_BYTES, "big"))


# ------------------------------------------------------------------------------------------------------------ SHA-256


def _primes(count: int) -> list[int]:
    found: list[int] = []
    candidate = 2
    while len(found) < count:
        if all(candidate % prime for prime in found):
            found.append(candidate)
        candidate += 1
    return found


def _root_fraction(number: int, degree: int) -> int:
    """The first 32 bits of the fraction of the *degree*-th root of *number*, by bisection in integers."""
    low, high = 0, number << 32
    target = number << 32 * degree
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= target else (low, middle)
    return low & _MASK


_INITIAL = tuple(_root_fraction(prime, 2) for prime in _primes(8))
_CONSTANTS = tuple(_root_fraction(prime, 3) for prime in _primes(_ROUNDS))


def _compress(chaining_value: bytes, data: bytes) -> bytes:
    """The chaining value after the 64-byte blocks of *data* (FIPS 180-4, 6.2.2).

    Rotations are shifts of a word that stands twice, side by side; what that leaves above 32 bits does not reach the
    lower ones in a sum, so it goes where the sum is cut.
    """
    state = _WORDS.unpack(chaining_value)
    for words in _BLOCK_WORDS.iter_unpack(data):
        schedule = list(words)
        for t in range(len(schedule), _ROUNDS):
            x, y = schedule[t - 15], schedule[t - 2]
            xx, yy = x * _TWICE, y * _TWICE
            small_0, small_1 = xx >> 7 ^ xx >> 18 ^ x >> 3, yy >> 17 ^ yy >> 19 ^ y >> 10
            schedule.append(schedule[t - 16] + schedule[t - 7] + small_0 + small_1 & _MASK)
        a, b, c, d, e, f, g, h = state
        for constant, word in zip(_CONSTANTS, schedule, strict=True):
            ee, aa = e * _TWICE, a * _TWICE
            first = h + (ee >> 6 ^ ee >> 11 ^ ee >> 25) + (g ^ e & (f ^ g)) + constant + word
            second = (aa >> 2 ^ aa >> 13 ^ aa >> 22) + (a & b | c & (a | b))
            h, g, f, e, d, c, b, a = g, f, e, d + first & _MASK, c, b, a, first + second & _MASK
        state = tuple(x + y & _MASK for x, y in zip(state, (a, b, c, d, e, f, g, h), strict=True))
    return _WORDS.pack(*state)
