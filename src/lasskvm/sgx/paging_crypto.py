"""Pages outside the EPC: the encryption, the MAC and the metadata (PCMD) of EWB and ELDB/ELDU.

A page is sealed by AES-GCM under a key that only this VM's processor has. The nonce is the version that EWB puts into
a slot of a version array, and the MAC covers what the page is: its SECINFO flags, its address and its enclave. So a
page comes back only unchanged, to its own place in its own enclave, in the last version that was written out.

Source: Intel SDM volume 3D, 35.12 (PCMD), 38.3 (EWB, ELDB/ELDU). The layout of the MAC header is not architectural.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lasskvm.sgx.fields import field, is_zero, u64
from lasskvm.x86 import sgx

__all__ = ["MacHeader", "PagingCrypto", "Pcmd"]

_KEY_LABEL = b"SGX page sealing"
_KEY_BYTES = 16
_NONCE_BYTES = 12
_MAC_HEADER = struct.Struct("<QQQ104x")
#: Flags and the rest of the SECINFO, ENCLAVEID, what is reserved, MAC.
_PCMD = struct.Struct("<Q56xQ40x16s")


@dataclass(frozen=True, slots=True)
class MacHeader:
    """What a sealed page is (MAC_HDR)."""

    #: SECINFO.FLAGS.
    flags: int
    linear_address: int
    #: The enclave identifier; 0 for SECS and VA pages.
    eid: int

    def pack(self) -> bytes:
        """128 bytes."""
        return _MAC_HEADER.pack(self.flags, self.linear_address, self.eid)


@dataclass(frozen=True, slots=True)
class Pcmd:
    """The metadata of a page outside the EPC."""

    #: SECINFO.FLAGS of the page.
    flags: int
    #: The identifier of the enclave, for software; 0 for VA pages.
    enclave_id: int
    mac: bytes

    @classmethod
    def parse(cls, data: bytes) -> Pcmd:
        """The fields of the 128 bytes *data*; whether reserved ones are zero tells :meth:`reserved_is_zero`."""
        return cls(
            flags=u64(data, sgx.PCMD_SECINFO),
            enclave_id=u64(data, sgx.PCMD_ENCLAVEID),
            mac=field(data, sgx.PCMD_MAC, sgx.PCMD_MAC_SIZE),
        )

    @staticmethod
    def reserved_is_zero(data: bytes) -> bool:
        """Whether the reserved fields of the 128 bytes *data* are zero, those of the SECINFO included."""
        return not u64(data, sgx.PCMD_SECINFO) & ~sgx.SECINFO_DEFINED and is_zero(data, sgx.PCMD_RESERVED)

    def pack(self) -> bytes:
        """128 bytes, the inverse of :meth:`parse`."""
        return _PCMD.pack(self.flags, self.enclave_id, self.mac)


class PagingCrypto:
    """Seals and opens pages under a key that is derived from *secret*, the VM's (CR_BASE_PK).

    >>> crypto, header = PagingCrypto(b"one VM"), MacHeader(flags=0x203, linear_address=0x1000, eid=1)
    >>> ciphertext, mac = crypto.seal(bytes(4096), 7, header)
    >>> crypto.open(ciphertext, mac, 7, header) == bytes(4096), crypto.open(ciphertext, mac, 8, header)
    (True, None)
    """

    def __init__(self, secret: bytes) -> None:
        self._cipher = AESGCM(hmac.digest(secret, _KEY_LABEL, hashlib.sha256)[:_KEY_BYTES])

    def seal(self, page: bytes, version: int, header: MacHeader) -> tuple[bytes, bytes]:
        """EWB: the ciphertext of 4096 bytes *page*, and the MAC of 16 bytes."""
        sealed = self._cipher.encrypt(_nonce(version), page, header.pack())
        return sealed[: len(page)], sealed[len(page) :]

    def open(self, ciphertext: bytes, mac: bytes, version: int, header: MacHeader) -> bytes | None:
        """ELDB/ELDU: the page, or None when the MAC is not right for this page, version and header."""
        try:
            return self._cipher.decrypt(_nonce(version), ciphertext + mac, header.pack())
        except InvalidTag:
            return None


def _nonce(version: int) -> bytes:
    return version.to_bytes(_NONCE_BYTES, "big")
