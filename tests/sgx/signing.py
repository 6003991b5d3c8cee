"""What a developer of enclaves has (:mod:`lasskvm.conformance.signing`), and somebody else's key."""

from __future__ import annotations

from lasskvm.conformance.signing import (
    CHUNK,
    DEBUG,
    EINITTOKENKEY,
    MODE64BIT,
    MODULUS_BYTES,
    NO_TOKEN,
    PAGE,
    PROVISIONKEY,
    REG_R,
    REG_RW,
    REG_RX,
    SIGNER,
    TCS,
    XFRM_X87_SSE,
    Key,
    Page,
    Signing,
    mrenclave,
    pageinfo,
    secinfo,
    secs_page,
)

__all__ = [
    "CHUNK", "DEBUG", "EINITTOKENKEY", "Key", "MODE64BIT", "MODULUS_BYTES", "NO_TOKEN", "PAGE", "PROVISIONKEY", "Page",
    "REG_R", "REG_RW", "REG_RX", "SIGNER", "STRANGER", "Signing", "TCS", "XFRM_X87_SSE",
    "mrenclave", "pageinfo", "secinfo", "secs_page",
]  # fmt: skip

#: Somebody else's key.
STRANGER = Key(
    int(
        "c8018f60ed10cd0bef1cd4e6b56f8358d46981262e2bcd96b9cd145b7b2db2558c4648d69d51e9614dd5c595b41ba9c6"
        "5adb95167a64120db998aeee80128d3c4c9f4e8533796f89e76249707e82928b35c2700db668edc8c830e89c9605dec8"
        "eb81234abf68c503ec3409a7a1a0520e36f3f2c268d3205f464e50ca68a72f6c50dd0d04ff64d6edb718e36f0bd1417a"
        "8cef49ff1027368b68153f10e1c0a9af781a299bce6f8f5372a064e65db5c6b1895f56344d6b770943b00b16cd397f77",
        16,
    ),
    int(
        "c3b4c9cc4346d8eba1695acf1856eaf2def05a71c85f6b5226030b240bafd8448c83d118a9d7c56835b007eb59484ed7"
        "0a8d1de8b533cba96476d45e4f15dda12dbf0c0ceba29a1e2ca2ad6ff054861eca9d6e268582f6389e6137ae523bc2ba"
        "711cb1c6c68da5b807b732231f00e9a217ba4da301c8cfd9f088692f0d6122d4713e6768f28cea1933a2c48fc2bd2a49"
        "f68c7aa63502630e04399c7ebc22d67c12da4c5c31f7c64238ac1b5b66e5096b67ead46f78ab5957dd9e1163d2238163",
        16,
    ),
)
