"""AES rounds and carry-less multiplication.

Each function is a builder of plain instructions (:mod:`lasskvm.emulator.operation`).

Source: Intel SDM volume 1, 12.13 (AES, PCLMULQDQ); FIPS 197 for the functions that the manual names.
"""

from __future__ import annotations

from functools import partial
from operator import itemgetter

from iced_x86 import Mnemonic

from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.instructions.vector_operands import binary, unary
from lasskvm.emulator.operation import Builder, Executor
from lasskvm.x86.registers import MASK32, MASK64

__all__ = ["PLAIN"]

_BYTES = 16
#: The polynomial that bytes are multiplied modulo.
_POLYNOMIAL = 0x11B
#: Its powers are all bytes but 0.
_GENERATOR = 3
_AFFINE_CONSTANT = 0x63
_MIX, _UNMIX = (2, 3, 1, 1), (14, 11, 13, 9)


def _multiply(left: int, right: int) -> int:
    """The product of two bytes in the field of AES."""
    product = 0
    while right:
        if right & 1:
            product ^= left
        left <<= 1
        if left >> 8:
            left ^= _POLYNOMIAL
        right >>= 1
    return product


def _substitution() -> bytes:
    """SubBytes: the inverse in the field, then an affine transformation."""
    powers = [1]
    while (power := _multiply(powers[-1], _GENERATOR)) != 1:
        powers.append(power)
    table = bytearray([_AFFINE_CONSTANT] * 256)
    for exponent, value in enumerate(powers):
        rotations = powers[-exponent] * 0x101
        table[value] ^= (rotations ^ rotations >> 4 ^ rotations >> 5 ^ rotations >> 6 ^ rotations >> 7) & 0xFF
    return bytes(table)


_SUBSTITUTE = _substitution()
_UNSUBSTITUTE = bytes(_SUBSTITUTE.index(value) for value in range(256))
#: ShiftRows: row *r* of the state, bytes r, r + 4, ..., turns by *r* columns.
_shift_rows = itemgetter(*((byte + 4 * (byte % 4)) % _BYTES for byte in range(_BYTES)))
_unshift_rows = itemgetter(*((byte - 4 * (byte % 4)) % _BYTES for byte in range(_BYTES)))
_PRODUCTS = {
    factor: bytes(_multiply(value, factor) for value in range(256)) for factor in sorted({*_MIX, *_UNMIX})
}


def _mix_columns(state: bytes, factors: tuple[int, int, int, int]) -> bytes:
    """MixColumns: each column times a circulant matrix."""
    tables = [_PRODUCTS[factor] for factor in factors]
    mixed = bytearray()
    for start in range(0, _BYTES, 4):
        column = state[start : start + 4]
        for row in range(4):
            value = 0
            for place in range(4):
                value ^= tables[(place - row) % 4][column[place]]
            mixed.append(value)
    return bytes(mixed)


def _encryption_round(decoded: Decoded, *, last: bool) -> Executor:
    def operation(state: int, key: int) -> int:
        data = bytes(_shift_rows(state.to_bytes(_BYTES, "little"))).translate(_SUBSTITUTE)
        return int.from_bytes(data if last else _mix_columns(data, _MIX), "little") ^ key

    return binary(decoded, operation)


def _decryption_round(decoded: Decoded, *, last: bool) -> Executor:
    def operation(state: int, key: int) -> int:
        data = bytes(_unshift_rows(state.to_bytes(_BYTES, "little"))).translate(_UNSUBSTITUTE)
        return int.from_bytes(data if last else _mix_columns(data, _UNMIX), "little") ^ key

    return binary(decoded, operation)


def _aesimc(decoded: Decoded) -> Executor:
    """AESIMC: a round key for the equivalent inverse cipher."""
    return unary(
        decoded,
        lambda key: int.from_bytes(_mix_columns(key.to_bytes(_BYTES, "little"), _UNMIX), "little"),
    )


def _aeskeygenassist(decoded: Decoded) -> Executor:
    """AESKEYGENASSIST: SubWord and RotWord of the odd doublewords."""
    constant = int(decoded.instruction.immediate8)

    def operation(key: int) -> int:
        result = 0
        for place in (1, 3):
            word = (key >> 32 * place & MASK32).to_bytes(4, "little").translate(_SUBSTITUTE)
            plain = int.from_bytes(word, "little")
            rotated = (plain >> 8 | plain << 24) & MASK32 ^ constant
            result |= (plain | rotated << 32) << 32 * (place - 1)
        return result

    return unary(decoded, operation)


def _pclmulqdq(decoded: Decoded) -> Executor:
    """PCLMULQDQ: one quadword of each operand, multiplied without carries."""
    immediate = int(decoded.instruction.immediate8)
    left_shift, right_shift = 64 * (immediate & 1), 64 * (immediate >> 4 & 1)

    def operation(left: int, right: int) -> int:
        left, right = left >> left_shift & MASK64, right >> right_shift & MASK64
        product = 0
        while right:
            bit = right & -right
            product ^= left * bit
            right ^= bit
        return product

    return binary(decoded, operation)


#: The builders of this module, by ``iced_x86.Mnemonic``.
PLAIN: dict[int, Builder] = {
    Mnemonic.AESENC: partial(_encryption_round, last=False),
    Mnemonic.AESENCLAST: partial(_encryption_round, last=True),
    Mnemonic.AESDEC: partial(_decryption_round, last=False),
    Mnemonic.AESDECLAST: partial(_decryption_round, last=True),
    Mnemonic.AESIMC: _aesimc,
    Mnemonic.AESKEYGENASSIST: _aeskeygenassist,
    Mnemonic.PCLMULQDQ: _pclmulqdq,
}
