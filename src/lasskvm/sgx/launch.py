"""Launch control: whether EINIT lets an enclave run, and what it puts into the SECS then.

There is no launch enclave here, so nothing in a guest can make an EINITTOKEN. An enclave without one (VALID is 0) has
to be signed with the key whose hash is in IA32_SGXLEPUBKEYHASH0..3. A token that says it is valid is checked as the
manual wants, against a launch key which only this VM's processor knows.

Source: Intel SDM volume 3D, 35.14 (EINITTOKEN), 36.1.4 (EINIT), 38.3 (EINIT, the order of its checks), 38.4 (EGETKEY,
the EINITTOKEN key). How a key is derived is not architectural.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC

from lasskvm.sgx import measurement
from lasskvm.sgx.fields import field, is_zero, u32, u64
from lasskvm.sgx.secs import Secs
from lasskvm.sgx.sigstruct import Sigstruct
from lasskvm.x86 import sgx
from lasskvm.x86.sgx import SgxError

__all__ = ["CPUSVN", "EinitToken", "LaunchControl", "hash_of_msrs", "initialize"]

#: The security version of this processor: it has no other.
CPUSVN = bytes(sgx.CPUSVN_SIZE)

_KEY_LABEL = b"SGX launch key"
_KEY_BYTES = 16
_HASH_MSR_BYTES = 8


@dataclass(frozen=True, slots=True)
class EinitToken:
    """The fields of one EINITTOKEN."""

    data: bytes
    attributes: int
    xfrm: int
    mrenclave: bytes
    mrsigner: bytes
    cpusvn: bytes
    #: The launch enclave's ATTRIBUTES, masked, without XFRM.
    masked_attributes: int
    mac: bytes

    @classmethod
    def parse(cls, data: bytes) -> EinitToken:
        """The fields of the 304 bytes *data*, whatever they are."""
        return cls(
            data=data,
            attributes=u64(data, sgx.EINITTOKEN_ATTRIBUTES),
            xfrm=u64(data, sgx.EINITTOKEN_ATTRIBUTES + 8),
            mrenclave=field(data, sgx.EINITTOKEN_MRENCLAVE, sgx.DIGEST_SIZE),
            mrsigner=field(data, sgx.EINITTOKEN_MRSIGNER, sgx.DIGEST_SIZE),
            cpusvn=field(data, sgx.EINITTOKEN_CPUSVNLE, sgx.CPUSVN_SIZE),
            masked_attributes=u64(data, sgx.EINITTOKEN_MASKEDATTRIBUTESLE),
            mac=field(data, sgx.EINITTOKEN_MAC, sgx.EINITTOKEN_MAC_SIZE),
        )

    @property
    def is_valid(self) -> bool:
        """Whether the token claims to be one: bit 0 of VALID."""
        return u32(self.data, sgx.EINITTOKEN_VALID) & sgx.EINITTOKEN_VALID_BIT != 0

    @property
    def reserved_is_zero(self) -> bool:
        """Whether the reserved bytes, and the upper bits of VALID, are zero."""
        return not u32(self.data, sgx.EINITTOKEN_VALID) & ~sgx.EINITTOKEN_VALID_BIT and is_zero(
            self.data, sgx.EINITTOKEN_RESERVED
        )


class LaunchControl:
    """The launch control of one VM; its launch keys come from *secret*."""

    def __init__(self, secret: bytes) -> None:
        self._root = hmac.digest(secret, _KEY_LABEL, hashlib.sha256)

    def check(self, secs: Secs, sigstruct: Sigstruct, token: EinitToken, key_hash: bytes) -> SgxError:
        """Whether the enclave of *secs*, which is not initialized yet, may be.

        *sigstruct* has passed its own :meth:`~lasskvm.sgx.sigstruct.Sigstruct.check`. *key_hash* is what is in
        IA32_SGXLEPUBKEYHASH0..3, 32 bytes (:func:`hash_of_msrs`). Checks are in the manual's order.
        """
        mrenclave = measurement.digest(secs)
        if sigstruct.enclave_hash != mrenclave:
            return SgxError.INVALID_MEASUREMENT
        if secs.attributes & sgx.CONTROLLED_ATTRIBUTES and sigstruct.mrsigner != key_hash:
            return SgxError.INVALID_ATTRIBUTE
        if (
            (secs.attributes ^ sigstruct.attributes) & sigstruct.attribute_mask
            or (secs.xfrm ^ sigstruct.xfrm) & sigstruct.xfrm_mask
            or (secs.miscselect ^ sigstruct.miscselect) & sigstruct.miscmask
        ):
            return SgxError.INVALID_ATTRIBUTE
        if not token.is_valid:
            return SgxError.SUCCESS if sigstruct.mrsigner == key_hash else SgxError.INVALID_EINITTOKEN
        return self._check_token(secs, sigstruct, token, mrenclave, key_hash)

    def _check_token(
        self, secs: Secs, sigstruct: Sigstruct, token: EinitToken, mrenclave: bytes, key_hash: bytes
    ) -> SgxError:
        if token.masked_attributes & sgx.ATTRIBUTE_DEBUG and not secs.is_debug:
            # A launch enclave that can be debugged lets only such enclaves run as can be debugged, too.
            return SgxError.INVALID_EINITTOKEN
        if not token.reserved_is_zero:
            return SgxError.INVALID_EINITTOKEN
        if int.from_bytes(token.cpusvn, "little") > int.from_bytes(CPUSVN, "little"):
            return SgxError.INVALID_CPUSVN
        if not hmac.compare_digest(token.mac, self.token_mac(token.data, key_hash)):
            return SgxError.INVALID_EINITTOKEN
        if (token.mrenclave, token.mrsigner) != (mrenclave, sigstruct.mrsigner):
            return SgxError.INVALID_MEASUREMENT
        if (token.attributes, token.xfrm) != (secs.attributes, secs.xfrm):
            return SgxError.INVALID_ATTRIBUTE
        return SgxError.SUCCESS

    def token_mac(self, data: bytes, key_hash: bytes) -> bytes:
        """The MAC, 16 bytes, that the EINITTOKEN *data* needs when the launch enclave's signer is *key_hash*.

        The launch key depends on the launch enclave that the token tells of: on its product, version and attributes.
        """
        dependencies = field(data, sgx.EINITTOKEN_CPUSVNLE, sgx.EINITTOKEN_MAC - sgx.EINITTOKEN_CPUSVNLE)
        key = hmac.digest(self._root, key_hash + dependencies, hashlib.sha256)[:_KEY_BYTES]
        mac = CMAC(AES(key))
        mac.update(field(data, 0, sgx.EINITTOKEN_MACED))
        return mac.finalize()


def initialize(secs: Secs, sigstruct: Sigstruct) -> None:
    """What EINIT does to *secs* when all checks have been passed: the enclave has its identity and can be entered."""
    secs.mrenclave = measurement.digest(secs)
    secs.measured_blocks = 0
    secs.mrsigner = sigstruct.mrsigner
    secs.isvprodid, secs.isvsvn = sigstruct.isvprodid, sigstruct.isvsvn
    secs.attributes |= sgx.ATTRIBUTE_INIT


def hash_of_msrs(values: tuple[int, int, int, int]) -> bytes:
    """The 32 bytes that the *values* of IA32_SGXLEPUBKEYHASH0..3 are."""
    return b"".join(value.to_bytes(_HASH_MSR_BYTES, "little") for value in values)
