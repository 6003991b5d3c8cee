"""Enclaves: one that is created, extended and initialized, with the measurement that its developer has computed; what
EINIT says of bad signatures, what leaf functions say of pages in the wrong state; and the EPC as others see it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lasskvm.conformance import enclaves as place
from lasskvm.conformance import signing
from lasskvm.conformance.case import Case, Effect, Expected, completes, fault, gp
from lasskvm.conformance.cases.sgx_common import (
    CALLS,
    ENABLED,
    GOOD_SIGSTRUCT,
    MEASUREMENT,
    SIGNED_BY_US,
    Call,
    epc_fault,
    other,
)
from lasskvm.conformance.enclaves import Built, Enclaves, Side
from lasskvm.conformance.setup import Bytes
from lasskvm.conformance.signing import NO_TOKEN, SIGNER, Signing
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.exceptions import UD
from lasskvm.x86.msr import MSR_IA32_SGXLEPUBKEYHASH0
from lasskvm.x86.registers import MASK64, RFLAGS_AC
from lasskvm.x86.sgx import EnclsLeaf, PageType, SgxError

__all__ = ["CASES"]

_high, _low = Side.HIGH.at, Side.LOW.at
_L = EnclsLeaf
_REGULAR, _SECS, _FREE = _high(place.REGULAR), _high(place.SECS), _high(place.FREE)


def _failed(error: SgxError) -> Expected:
    return completes(rax=error, zf=1, cf=0)


def _noted(error: SgxError) -> Expected:
    return completes(rax=error, zf=0, cf=1)


def _same(call: Call, name: str, words: str, expected: Expected, **more: Any) -> Case:
    """A case in which LASS makes no difference."""
    return call.case(name, words, expected, expected, **more)


# ---------------------------------------------------------------------------------------------- building an enclave

#: A second PAGEINFO and SECINFO, behind the first.
_SECOND = 0x80
#: ECREATE, EADD, sixteen EEXTEND, EINIT; RSI is the start of a side.
_BUILD = f"""
    lea rbx, [rsi + {place.PAGEINFO}]; lea rcx, [rsi + {place.SECS}]; mov eax, {_L.ECREATE}; encls
    lea rbx, [rsi + {place.PAGEINFO + _SECOND}]; lea rcx, [rsi + {place.REGULAR}]; mov eax, {_L.EADD}; encls
    lea rbx, [rsi + {place.SECS}]; mov edi, 16
measure: mov eax, {_L.EEXTEND}; encls; add rcx, {signing.CHUNK}; dec edi; jne measure
    lea rbx, [rsi + {place.SIGSTRUCT}]; lea rcx, [rsi + {place.SECS}]; lea rdx, [rsi + {place.TOKEN}]
    mov eax, {_L.EINIT}
access: encls
"""


def _built_by_the_guest(name: str, words: str, side: Side, lass: Expected, **more: Any) -> Case:
    """All structures of the enclave, and its EPC pages, on one *side*."""
    at = side.at
    infos = signing.pageinfo(0, at(place.ORDINARY), at(place.SECINFO), 0).ljust(_SECOND, b"\0")
    infos += signing.pageinfo(
        place.BASE + place.MEMBER.offset, at(place.SOURCE), at(place.SECINFO + _SECOND), at(place.SECS)
    )
    secinfos = signing.secinfo(PageType.SECS).ljust(_SECOND, b"\0") + signing.secinfo(place.MEMBER.flags)
    content = {
        place.PAGEINFO: infos,
        place.SECINFO: secinfos,
        place.ORDINARY: signing.secs_page(place.SIZE, place.BASE, attributes=place.ATTRIBUTES),
        place.SOURCE: place.CONTENT,
        place.SIGSTRUCT: GOOD_SIGSTRUCT,
        place.TOKEN: NO_TOKEN,
    }
    setup = tuple(Bytes(_high(where), data) for where, data in content.items())
    return other(
        name, words, _BUILD, lass, completes(rax=0, zf=0), registers={"rsi": side.value}, setup=setup,
        msrs=ENABLED | SIGNED_BY_US, **more,
    )  # fmt: skip


_INITIALIZED = completes(rax=0, zf=0)
_BUILDING = (
    _built_by_the_guest("build-high", "an enclave is built from the upper half, and has the MRENCLAVE it must have",
                        Side.HIGH, _INITIALIZED),
    _built_by_the_guest("build-low-ac1", "an enclave is built from the users' half with AC=1", Side.LOW_USER,
                        _INITIALIZED, rflags=RFLAGS_AC),
    replace(
        _built_by_the_guest("build-low", "a kernel that builds an enclave from the lower half fails at once",
                            Side.LOW, gp(rip="first")),
        program=_BUILD.replace("encls", "first: encls", 1),
    ),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ EINIT


def _changed(offset: int) -> bytes:
    data = bytearray(GOOD_SIGSTRUCT)
    data[offset] ^= 1
    return bytes(data)


def _einit(name: str, words: str, expected: Expected, sigstruct: bytes = GOOD_SIGSTRUCT, **more: Any) -> Case:
    content = ((place.SIGSTRUCT, sigstruct), (place.TOKEN, NO_TOKEN))
    call = replace(CALLS[_L.EINIT], built=more.pop("built", Built.MEASURED), content=content)
    return _same(call, f"einit-{name}", words, expected, **more)


_HEADER, _EXPONENT, _SIGNATURE, _Q1 = 0, 512, 516, 1040
_LAUNCH = (
    _einit("good", "the measurement is what the signer says", completes(rax=0, zf=0, cf=0)),
    _einit("not-measured", "the page was not measured", _failed(SgxError.INVALID_MEASUREMENT), built=Built.ADDED),
    _einit("other-enclave", "the signer has signed something else", _failed(SgxError.INVALID_MEASUREMENT),
           Signing(bytes(32), SIGNER, attributes=place.ATTRIBUTES).sigstruct()),
    _einit("other-attributes", "the signer forbids the attributes", _failed(SgxError.INVALID_ATTRIBUTE),
           Signing(MEASUREMENT, SIGNER, attributes=0).sigstruct()),
    _einit("bad-header", "the SIGSTRUCT is none", _failed(SgxError.INVALID_SIG_STRUCT), _changed(_HEADER)),
    _einit("bad-exponent", "the exponent is not 3", _failed(SgxError.INVALID_SIG_STRUCT), _changed(_EXPONENT)),
    _einit("bad-signature", "the signature is not the signer's", _failed(SgxError.INVALID_SIGNATURE),
           _changed(_SIGNATURE)),
    _einit("bad-q1", "Q1 is wrong", _failed(SgxError.INVALID_SIGNATURE), _changed(_Q1)),
    _einit("other-signer", "another signer may launch enclaves, and there is no token",
           _failed(SgxError.INVALID_EINITTOKEN),
           msrs=ENABLED | SIGNED_BY_US | {MSR_IA32_SGXLEPUBKEYHASH0: 0}),
    _einit("twice", "the enclave is initialized already", gp(),
           program=f"encls; mov eax, {_L.EINIT}; access: encls"),
    _einit("then-eextend", "nothing is measured behind EINIT", gp(), program=f"""
        encls; mov rbx, {_SECS:#x}; mov rcx, {_REGULAR:#x}; mov eax, {_L.EEXTEND}; access: encls"""),
)  # fmt: skip

# ----------------------------------------------------------------------------------------------- pages and their states

_CREATE, _ADD = CALLS[_L.ECREATE], CALLS[_L.EADD]


def _created(name: str, words: str, **fields: int) -> Case:
    """ECREATE of an SECS that cannot be."""
    values = {"size": place.SIZE, "base": place.BASE} | fields
    page = signing.secs_page(**values)
    call = replace(_CREATE, content=((place.SOURCE, page), *_CREATE.content[1:]))
    return _same(call, f"ecreate-{name}", words, gp())


_STATES = (
    _created("size", "the size is no power of two", size=0x18000),
    _created("base", "the base is no multiple of the size", base=place.BASE + PAGE_SIZE),
    _created("attributes", "an attribute that is not offered", attributes=1 << 7),
    _created("frame", "no room for a state save area frame", ssa_frame_size=0),
    _same(_CREATE.with_operand("secs", _SECS), "ecreate-secs", "PAGEINFO.SECS has to be 0", gp()),
    _same(_CREATE.with_operand("linear_address", place.BASE), "ecreate-linaddr", "PAGEINFO.LINADDR has to be 0", gp()),
    _same(replace(_CREATE, built=Built.ADDED, rcx=_REGULAR), "ecreate-in-use", "the page is in use",
          epc_fault(_REGULAR)),
    _same(_ADD.with_operand("rcx", _REGULAR), "eadd-in-use", "the page is in use", epc_fault(_REGULAR)),
    _same(_ADD.with_operand("secs", _REGULAR), "eadd-no-secs", "PAGEINFO.SECS is no SECS", epc_fault(_REGULAR)),
    _same(_ADD.with_operand("linear_address", place.BASE + place.SIZE), "eadd-beyond",
          "the page is beyond the enclave", gp()),
    _same(_ADD.with_operand("linear_address", place.BASE + 8), "eadd-linaddr", "PAGEINFO.LINADDR is no page's", gp()),
    _same(CALLS[_L.EPA].with_operand("rbx", 2), "epa-type", "another type of page than VA", gp()),
    _same(CALLS[_L.EREMOVE].with_operand("rcx", _SECS), "eremove-parent", "the enclave has pages",
          _failed(SgxError.CHILD_PRESENT)),
    _same(CALLS[_L.EREMOVE].with_operand("rcx", _FREE), "eremove-free", "a free page is left alone",
          completes(rax=0, zf=0, cf=0)),
    _same(CALLS[_L.EBLOCK].with_operand("rcx", _FREE), "eblock-free", "a free page", _failed(SgxError.PG_INVLD)),
    _same(CALLS[_L.EBLOCK].with_operand("rcx", _SECS), "eblock-secs", "an SECS", _noted(SgxError.PG_IS_SECS)),
    _same(replace(CALLS[_L.EBLOCK], built=Built.BLOCKED), "eblock-twice", "the page is blocked already",
          _noted(SgxError.BLKSTATE)),
    _same(CALLS[_L.ETRACK].with_operand("rcx", _REGULAR), "etrack-no-secs", "no SECS", epc_fault(_REGULAR)),
    _same(replace(CALLS[_L.EWB], built=Built.ADDED), "ewb-not-blocked", "the page is not blocked",
          _failed(SgxError.PAGE_NOT_BLOCKED)),
    _same(CALLS[_L.ELDU], "eldu-damaged", "the page has changed outside", _failed(SgxError.MAC_COMPARE_FAIL),
          setup=(Bytes(_high(place.SOURCE), b"!"),)),
    _same(CALLS[_L.ELDU], "eldu-twice", "the version is used up", _failed(SgxError.MAC_COMPARE_FAIL),
          program=f"encls; add rcx, {PAGE_SIZE}; mov eax, {_L.ELDU}; access: encls"),
    _same(CALLS[_L.ELDU], "eldu-content", "the page comes back as it was", completes(rax=0, rbx=int.from_bytes(
        place.CONTENT[0x10:0x18], "little")), program=f"encls; add rcx, 0x10; mov eax, {_L.EDBGRD}; access: encls"),
)  # fmt: skip

# -------------------------------------------------------------------------------------------- debugging, other accesses

_WORD = int.from_bytes(place.CONTENT[8:16], "little")
_ONES = completes(Effect.READ, rax=MASK64)
_ADDED: dict[str, Any] = {"sgx": Enclaves(Built.ADDED)}
_UNCHANGED = completes(Effect.REWRITTEN, rbx=_WORD, rax=0)
_OUTSIDE = (
    _same(CALLS[_L.EDBGRD], "edbgrd-value", "what EADD has put there", completes(Effect.READ, rax=0, rbx=_WORD),
          operand=_REGULAR),
    _same(CALLS[_L.EDBGWR], "edbgwr-value", "what EDBGWR writes is there",
          completes(rax=0, rbx=CALLS[_L.EDBGWR].rbx),
          program=f"access: encls; xor ebx, ebx; mov eax, {_L.EDBGRD}; encls"),
    other("read-epc", "a load from the EPC gives all ones", "access: mov rax, [rbx]", _ONES, _ONES,
          registers={"rbx": _REGULAR}, operand=_REGULAR, **_ADDED),
    other("write-epc", "a store to the EPC is dropped", f"""
        access: mov [rcx], rcx; mov eax, {_L.EDBGRD}; encls""", _UNCHANGED, _UNCHANGED,
          registers={"rcx": _REGULAR + 8}, operand=_REGULAR, **_ADDED),
    other("fetch-epc", "a fetch from the EPC finds all ones, which are no instruction", "access: jmp rbx",
          fault(UD, rip=_REGULAR), fault(UD, rip=_REGULAR), registers={"rbx": _REGULAR}, **_ADDED),
    other("read-epc-low", "a load from EPC mapped below the split", "access: mov rax, [rbx]", gp(),
          _ONES, registers={"rbx": _low(place.REGULAR)}, operand=_low(place.REGULAR),
          **_ADDED),
    other("write-epc-low", "a store to EPC mapped below the split", "access: mov [rbx], rax", gp(),
          completes(Effect.REWRITTEN), registers={"rbx": _low(place.REGULAR)}, operand=_low(place.REGULAR), **_ADDED),
    other("fetch-epc-low", "a fetch from EPC mapped below the split is a violation first", "access: jmp rbx",
          gp(rip=_low(place.REGULAR)), fault(UD, rip=_low(place.REGULAR)), registers={"rbx": _low(place.REGULAR)},
          **_ADDED),
    other("fetch-epc-user", "a user fetch from the EPC, as from an enclave that is not entered", "access: jmp rbx",
          fault(UD, rip=Side.LOW_USER.at(place.REGULAR)), fault(UD, rip=Side.LOW_USER.at(place.REGULAR)), cpl=3,
          registers={"rbx": Side.LOW_USER.at(place.REGULAR)}, **_ADDED),
    _same(_CREATE.with_operand("source", _FREE), "ecreate-srcpge-epc", "SRCPGE in the EPC is all ones, no SECS", gp()),
    _same(_CREATE.with_operand("secinfo", _FREE + PAGE_SIZE), "ecreate-secinfo-epc",
          "SECINFO in the EPC is all ones: reserved bits", gp()),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_BUILDING, *_LAUNCH, *_STATES, *_OUTSIDE)
