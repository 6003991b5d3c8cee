"""SIGSTRUCT: what the signer of an enclave says of it, and whether the signature holds.

Source: Intel SDM volume 3D, 35.13 (layout, Q1 and Q2), 38.3 (EINIT).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.hashes import SHA256

from lasskvm.sgx.fields import field, is_zero, u16, u32, u64
from lasskvm.x86 import sgx
from lasskvm.x86.sgx import SgxError

__all__ = ["Sigstruct"]


@dataclass(frozen=True, slots=True)
class Sigstruct:
    """The fields of one SIGSTRUCT.

    >>> Sigstruct.parse(bytes(1808)).check().name
    'INVALID_SIG_STRUCT'
    """

    data: bytes
    miscselect: int
    miscmask: int
    attributes: int
    xfrm: int
    attribute_mask: int
    xfrm_mask: int
    #: The MRENCLAVE that the enclave must have.
    enclave_hash: bytes
    isvprodid: int
    isvsvn: int
    #: SHA-256 of the modulus as it is in memory.
    mrsigner: bytes

    @classmethod
    def parse(cls, data: bytes) -> Sigstruct:
        """The fields of the 1808 bytes *data*, whatever they are; :meth:`check` tells whether they mean anything."""
        return cls(
            data=data,
            miscselect=u32(data, sgx.SIGSTRUCT_MISCSELECT),
            miscmask=u32(data, sgx.SIGSTRUCT_MISCMASK),
            attributes=u64(data, sgx.SIGSTRUCT_ATTRIBUTES),
            xfrm=u64(data, sgx.SIGSTRUCT_XFRM),
            attribute_mask=u64(data, sgx.SIGSTRUCT_ATTRIBUTEMASK),
            xfrm_mask=u64(data, sgx.SIGSTRUCT_XFRMMASK),
            enclave_hash=field(data, sgx.SIGSTRUCT_ENCLAVEHASH, sgx.DIGEST_SIZE),
            isvprodid=u16(data, sgx.SIGSTRUCT_ISVPRODID),
            isvsvn=u16(data, sgx.SIGSTRUCT_ISVSVN),
            mrsigner=hashlib.sha256(field(data, sgx.SIGSTRUCT_MODULUS, sgx.RSA_BYTES)).digest(),
        )

    def check(self) -> SgxError:
        """Whether it is well formed and correctly signed with the key it contains.

        Gives ``SUCCESS``, ``INVALID_SIG_STRUCT`` or ``INVALID_SIGNATURE``.
        """
        if not self._is_well_formed():
            return SgxError.INVALID_SIG_STRUCT
        if not self._is_correctly_signed():
            return SgxError.INVALID_SIGNATURE
        return SgxError.SUCCESS

    def _is_well_formed(self) -> bool:
        data = self.data
        return (
            field(data, sgx.SIGSTRUCT_HEADER, len(sgx.SIGSTRUCT_HEADER_VALUE)) == sgx.SIGSTRUCT_HEADER_VALUE
            and field(data, sgx.SIGSTRUCT_HEADER2, len(sgx.SIGSTRUCT_HEADER2_VALUE))
            == sgx.SIGSTRUCT_HEADER2_VALUE
            and u32(data, sgx.SIGSTRUCT_VENDOR) in (sgx.SIGSTRUCT_VENDOR_OTHER, sgx.SIGSTRUCT_VENDOR_INTEL)
            and u32(data, sgx.SIGSTRUCT_EXPONENT) == sgx.RSA_EXPONENT
            and is_zero(data, sgx.SIGSTRUCT_RESERVED)
        )

    def _is_correctly_signed(self) -> bool:
        modulus = _number(self.data, sgx.SIGSTRUCT_MODULUS)
        signature = _number(self.data, sgx.SIGSTRUCT_SIGNATURE)
        if modulus.bit_length() != sgx.RSA_BITS:
            return False
        # The processor computes with Q1 and Q2 instead of dividing, so they have to be right, too.
        q1, rest = divmod(signature * signature, modulus)
        q2 = rest * signature // modulus
        if (q1, q2) != (
            _number(self.data, sgx.SIGSTRUCT_Q1),
            _number(self.data, sgx.SIGSTRUCT_Q2),
        ):
            return False
        signed = b"".join(field(self.data, offset, size) for offset, size in sgx.SIGSTRUCT_SIGNED)
        try:
            RSAPublicNumbers(sgx.RSA_EXPONENT, modulus).public_key().verify(
                signature.to_bytes(sgx.RSA_BYTES, "big"), signed, padding.PKCS1v15(), SHA256()
            )
        except (InvalidSignature, UnsupportedAlgorithm, ValueError):
            # ValueError: a number that is no modulus at all.
            return False
        return True


def _number(data: bytes, offset: int) -> int:
    """One of the 3072-bit integers."""
    return int.from_bytes(field(data, offset, sgx.RSA_BYTES), "little")
