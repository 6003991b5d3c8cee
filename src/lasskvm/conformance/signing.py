"""What a developer of enclaves has: a key, signed SIGSTRUCTs, and a measurement of the enclave's pages.

None of it uses :mod:`lasskvm.sgx`, whose results it is there to judge: the measurement is a SHA-256 of :mod:`hashlib`
over records that are put together here, the signature is made with plain modular arithmetic, and the layouts are
written down once more, as the manual gives them.

Source: Intel SDM volume 3D, 35.7 to 35.13 (layouts), 36.1 (what is measured).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

__all__ = [
    "CHUNK", "DEBUG", "EINITTOKENKEY", "Key", "MODE64BIT", "MODULUS_BYTES", "NO_TOKEN", "PAGE", "PROVISIONKEY", "Page",
    "REG_R", "REG_RW", "REG_RX", "SIGNER", "Signing", "TCS", "XFRM_X87_SSE", "mrenclave", "pageinfo", "secinfo",
    "secs_page",
]  # fmt: skip

PAGE = 4096
CHUNK = 256
MODULUS_BYTES = 384

#: SECINFO.FLAGS of pages that are added.
REG_R, REG_RW, REG_RX = 0x201, 0x203, 0x205
TCS = 0x100

MODE64BIT, DEBUG, PROVISIONKEY, EINITTOKENKEY = 1 << 2, 1 << 1, 1 << 4, 1 << 5
XFRM_X87_SSE = 3

_SHA256_DIGEST_INFO = bytes.fromhex("3031300d060960864801650304020105000420")
_HEADER = bytes.fromhex("06000000e10000000000010000000000")
_HEADER2 = bytes.fromhex("01010000600000006000000001000000")


@dataclass(frozen=True)
class Key:
    """An RSA key with the exponent 3 and 3072 bits, given by its primes."""

    p: int
    q: int

    @cached_property
    def modulus(self) -> int:
        """What everybody may know of it."""
        return self.p * self.q

    @property
    def modulus_bytes(self) -> bytes:
        """As it is in a SIGSTRUCT."""
        return self.modulus.to_bytes(MODULUS_BYTES, "little")

    @property
    def mrsigner(self) -> bytes:
        """What IA32_SGXLEPUBKEYHASH0..3 have to be for this signer, and what MRSIGNER becomes."""
        return hashlib.sha256(self.modulus_bytes).digest()

    def sign(self, message: bytes) -> int:
        """The signature of *message*: PKCS #1 v1.5 with SHA-256."""
        info = _SHA256_DIGEST_INFO + hashlib.sha256(message).digest()
        encoded = b"\0\1" + b"\xff" * (MODULUS_BYTES - len(info) - 3) + b"\0" + info
        number = int.from_bytes(encoded, "big")
        # Modulo each prime, where the exponent is short, and then together again: many times faster than at once.
        modulo_p = pow(number, pow(3, -1, self.p - 1), self.p)
        modulo_q = pow(number, pow(3, -1, self.q - 1), self.q)
        return modulo_q + self.q * ((modulo_p - modulo_q) * pow(self.q, -1, self.p) % self.p)


@dataclass(frozen=True)
class Page:
    """A page of an enclave as its developer sees it."""

    offset: int
    #: SECINFO.FLAGS as they are measured: without permissions for a TCS.
    flags: int
    content: bytes = bytes(PAGE)
    #: Whether EEXTEND is used on it.
    is_measured: bool = True


def mrenclave(size: int, ssa_frame_size: int, pages: Iterable[Page]) -> bytes:
    """The MRENCLAVE of an enclave of *size* bytes built by ECREATE, and EADD and sixteen EEXTENDs for each page."""
    log = hashlib.sha256(b"ECREATE\0" + struct.pack("<IQ", ssa_frame_size, size) + bytes(44))
    for page in pages:
        log.update(b"EADD\0\0\0\0" + struct.pack("<QQ", page.offset, page.flags) + bytes(40))
        if page.is_measured:
            for start in range(0, PAGE, CHUNK):
                log.update(b"EEXTEND\0" + struct.pack("<Q", page.offset + start) + bytes(48))
                log.update(page.content[start : start + CHUNK])
    return log.digest()


@dataclass(frozen=True)
class Signing:
    """What to sign; :meth:`sigstruct` gives the 1808 bytes, and ``replace`` makes another one."""

    enclave_hash: bytes
    key: Key
    attributes: int = MODE64BIT
    attribute_mask: int = 0xFFFF_FFFF_FFFF_FFFF & ~DEBUG
    xfrm: int = XFRM_X87_SSE
    xfrm_mask: int = 0xFFFF_FFFF_FFFF_FFFF
    miscselect: int = 0
    miscmask: int = 0xFFFF_FFFF
    isvprodid: int = 0x1234
    isvsvn: int = 5
    vendor: int = 0
    date: int = 0x20260101
    header: bytes = _HEADER
    header2: bytes = _HEADER2

    def replace(self, **changes: Any) -> Signing:
        """The same with *changes*."""
        return replace(self, **changes)

    @cache  # noqa: B019 - the few objects there are live as long as the suite
    def sigstruct(self) -> bytes:
        """Signed, with Q1 and Q2."""
        head = struct.pack("<16sII16sI84x", self.header, self.vendor, self.date, self.header2, 0)
        body = struct.pack(
            "<II20xQQQQ32s32xHH",
            self.miscselect,
            self.miscmask,
            self.attributes,
            self.xfrm,
            self.attribute_mask,
            self.xfrm_mask,
            self.enclave_hash,
            self.isvprodid,
            self.isvsvn,
        )
        signature = self.key.sign(head + body)
        modulus = self.key.modulus
        q1 = signature**2 // modulus
        q2 = (signature**3 - q1 * signature * modulus) // modulus
        return b"".join(
            (
                head,
                self.key.modulus_bytes,
                struct.pack("<I", 3),
                signature.to_bytes(MODULUS_BYTES, "little"),
                body,
                bytes(12),
                q1.to_bytes(MODULUS_BYTES, "little"),
                q2.to_bytes(MODULUS_BYTES, "little"),
            )
        )


def secs_page(
    size: int,
    base: int,
    ssa_frame_size: int = 1,
    attributes: int = MODE64BIT,
    xfrm: int = XFRM_X87_SSE,
    miscselect: int = 0,
) -> bytes:
    """The 4096 bytes that software hands to ECREATE."""
    page = struct.pack("<QQII24xQQ", size, base, ssa_frame_size, miscselect, attributes, xfrm)
    return page.ljust(PAGE, b"\0")


def secinfo(flags: int) -> bytes:
    """64 bytes."""
    return struct.pack("<Q56x", flags)


def pageinfo(linaddr: int, srcpge: int, secinfo_or_pcmd: int, secs: int) -> bytes:
    """32 bytes."""
    return struct.pack("<QQQQ", linaddr, srcpge, secinfo_or_pcmd, secs)


NO_TOKEN = bytes(304)

#: The key that enclaves are signed with here. It is no secret, and worth nothing elsewhere.
SIGNER = Key(
    int(
        "e012dc5a768c09de666cf5c58542e98faf186ecbd7b14c33cf039c6dd4e9a6e1b5e8d629251cf6d6bc42eb4446867f9a"
        "faa2eca785f2003926d523aad8d952568ffc166be4efe83409c425f82e935d41face7f429a10ef3706561f983e675bea"
        "e52618215bbad10adedd2e8db16fac724447d9d68abf0cb9de279f589fde9f0e5a59ffcb8409e2d595fea1259c711cb9"
        "25830580b77ecffdb3327493299e47f70e601594e4a91a7806f6d2cad0704dbd240a11a0d07e0a570eb5eae690d3361f",
        16,
    ),
    int(
        "d6042c2ca483a6786a25fa95aed06519dd5ac96db83ab8af534c096a591dbfea54656331f9395fbc7c9b1d7c975e5211"
        "c85adc09dc2fbdeed6b736b3b5e635c7de092bae3ee1a60b4ff6fb972fb7dfbfd6dd54df235479e7864a7f64f1eeec51"
        "62eb462d05864810ed9070c6af8e86ef41074882dd78d4d1bce7b1c17d6baf879bd9e8513526af06827e9f3f77c32a97"
        "700ad2a619ff61c89efb37b9498567d7be2b238f98585fef2f2d5b40e9d723df6465a5eaea1564ef1714279e170835d9",
        16,
    ),
)
