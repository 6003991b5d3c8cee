"""VM entries that fail for the guest's segment registers: valid guests of every mode, spoilt in one place each."""

from __future__ import annotations

import pytest
from nested_guests import (
    DATA,
    FIVE_LEVEL_ADDRESS,
    FLAT,
    KERNEL,
    NOT_CANONICAL,
    SIX,
    Entry,
    Fields,
    Rows,
    each,
    rows,
    segment,
)

from lasskvm.vmx.guest_mode import guest_segment
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_CODE64,
    AR_CONFORMING,
    AR_DATA,
    AR_DB,
    AR_DPL,
    AR_EXPAND_DOWN,
    AR_G,
    AR_LDT,
    AR_P,
    AR_REAL_MODE,
    AR_S,
    AR_TSS16_BUSY,
    AR_TSS64_BUSY,
    AR_UNUSABLE,
    CS,
    TR,
)
from lasskvm.x86.vmx_fields import VmcsField as F

EVERY_KIND = {"CS": AR_CODE32, **dict.fromkeys(("SS", *DATA), AR_DATA)}
#: Accessed code segments with DPL 0.
EXECUTE_ONLY = AR_CODE32 & ~2
CONFORMING = AR_CODE32 | AR_CONFORMING


SEGMENTS: Rows = [
    # Selectors
    *rows(
        "TR is not in the GDT",
        ("64-bit", {F.GUEST_TR_SELECTOR: 0x44}),
        ("virtual-8086", {F.GUEST_TR_SELECTOR: 0x44}),
    ),
    *rows("LDTR is not in the GDT", ("64-bit", segment("LDTR", 0x24, AR_LDT, limit=0xFF))),
    *rows(
        "SS and CS have different RPLs",
        ("64-bit", {F.GUEST_CS_SELECTOR: 0x13}),
        ("protected user", {F.GUEST_CS_SELECTOR: 0x10}),
    ),
    # Bases
    *(
        (
            "virtual-8086",
            {key: 0x12350},
            f"the base of {name} is not its selector times 16 in virtual-8086 mode",
        )
        for name, key in each("BASE", *SIX)
    ),
    *(
        (mode, {key: NOT_CANONICAL}, f"the base of {name} is not canonical")
        for name, key in each("BASE", "TR", "FS", "GS")
        for mode in ("64-bit", "protected", "real")
    ),
    *(
        ("64-bit", segment(name, 0, AR_UNUSABLE, FIVE_LEVEL_ADDRESS), f"the base of {name} is not canonical")
        for name in ("FS", "GS")
    ),
    *rows(
        "the base of LDTR is not canonical", ("64-bit", segment("LDTR", 0x20, AR_LDT, NOT_CANONICAL, 0xFF))
    ),
    *(
        (mode, {key: base}, f"the base of {name} has more than 32 bits")
        for name, key in each("BASE", "CS", "SS", "DS", "ES")
        for mode, base in (("64-bit", KERNEL), ("protected", 1 << 32), ("real", 1 << 32))
    ),
    *rows(
        "the base of CS has more than 32 bits",
        ("protected", {F.GUEST_CS_BASE: 1 << 32, F.GUEST_CS_AR_BYTES: AR_CODE32 | AR_UNUSABLE}),
    ),
    # Limits and access rights of virtual-8086 mode
    *(
        ("virtual-8086", {key: 0xFFFE}, f"the limit of {name} is not 64 KiB in virtual-8086 mode")
        for name, key in each("LIMIT", *SIX)
    ),
    *(
        ("virtual-8086", {key: rights}, f"the access rights of {name} are not those of virtual-8086 mode")
        for name, key in each("AR_BYTES", *SIX)
        for rights in (0xF2, 0xE3, 0xD3, 0x73, 0xFB, 0x1F3, 0x10F3, 0x20F3, 0x40F3, 0x80F3, 0x100F3, 0x200F3)
    ),
    # Type
    *rows(
        "CS is no accessed code segment",
        *(("protected", {F.GUEST_CS_AR_BYTES: AR_P | AR_S | kind}) for kind in (0, 1, 2, 7, 8, 10, 12, 14)),
        ("64-bit", {F.GUEST_CS_AR_BYTES: AR_CODE64 & ~1}),
        *(("real", {F.GUEST_CS_AR_BYTES: rights}) for rights in (0x91, 0x97, 0x9A)),
    ),
    *rows(
        "CS is a data segment, and the guest is not unrestricted",
        ("protected", {F.GUEST_CS_AR_BYTES: AR_DATA}),
    ),
    *rows(
        "SS is no accessed and writable data segment",
        *(
            ("protected", {F.GUEST_SS_AR_BYTES: AR_P | AR_S | AR_G | kind})
            for kind in (0, 1, 2, 5, 6, 11, 15)
        ),
        ("real", {F.GUEST_SS_AR_BYTES: 0x91}),
    ),
    *(
        ("protected", {key: AR_P | AR_S | AR_G | kind}, f"{name} is not accessed")
        for name, key in each("AR_BYTES", *DATA)
        for kind in (0, 2, 6, 10)
    ),
    *(
        ("64-bit", {key: EXECUTE_ONLY}, f"{name} is a code segment that cannot be read")
        for name, key in each("AR_BYTES", *DATA)
    ),
    # S, P, reserved bits and G
    *(
        ("protected", {key: EVERY_KIND[name] & ~bit}, f"{name} {reason}")
        for name, key in each("AR_BYTES", *SIX)
        for bit, reason in ((AR_S, "has the wrong S flag"), (AR_P, "is not present"))
    ),
    *rows("TR has the wrong S flag", ("64-bit", {F.GUEST_TR_AR_BYTES: AR_TSS64_BUSY | AR_S})),
    *rows("LDTR has the wrong S flag", ("64-bit", segment("LDTR", 0x20, AR_LDT | AR_S, limit=0xFF))),
    *rows("TR is not present", ("64-bit", {F.GUEST_TR_AR_BYTES: AR_TSS64_BUSY & ~AR_P})),
    *rows("LDTR is not present", ("64-bit", segment("LDTR", 0x20, AR_LDT & ~AR_P, limit=0xFF))),
    *(
        ("protected", {key: EVERY_KIND[name] | 1 << bit}, f"{name} has reserved access rights")
        for name, key in each("AR_BYTES", *SIX)
        for bit in (*range(8, 12), *range(17, 32))
    ),
    *rows("TR has reserved access rights", ("64-bit", {F.GUEST_TR_AR_BYTES: AR_TSS64_BUSY | 1 << 17})),
    *rows("LDTR has reserved access rights", ("64-bit", segment("LDTR", 0x20, AR_LDT | 1 << 9, limit=0xFF))),
    *(
        ("protected", {key: limit}, f"{name} has a limit in pages that does not end with one")
        for name, key in each("LIMIT", *SIX)
        for limit in (0xFFFF_FFFE, 0xF7FF, 0)
    ),
    *(
        ("real", {key: limit}, f"{name} has a limit in bytes of more than 20 bits")
        for name, key in each("LIMIT", *SIX, "TR")
        for limit in (0x10_0000, 0x8000_0FFF)
    ),
    *rows(
        "LDTR has a limit in bytes of more than 20 bits",
        ("64-bit", segment("LDTR", 0x20, AR_LDT, limit=1 << 20)),
    ),
    # DPL
    *rows("CS is a data segment with another DPL than 0", ("real", {F.GUEST_CS_AR_BYTES: 0xF3})),
    *rows(
        "CS and SS have different privilege levels",
        ("protected", {F.GUEST_CS_AR_BYTES: AR_CODE32 | AR_DPL}),
        ("protected", {F.GUEST_CS_AR_BYTES: EXECUTE_ONLY | 1 << 5}),
        ("64-bit user", {F.GUEST_CS_AR_BYTES: AR_CODE64}),
    ),
    *rows(
        "conforming CS is less privileged than SS",
        ("protected", {F.GUEST_CS_AR_BYTES: CONFORMING | 1 << 5}),
        ("protected", {F.GUEST_CS_AR_BYTES: CONFORMING & ~2 | 1 << 5}),
    ),
    *rows(
        "SS has another RPL than DPL",
        ("protected", {F.GUEST_CS_AR_BYTES: CONFORMING, F.GUEST_SS_AR_BYTES: AR_DATA | 1 << 5}),
        ("64-bit", {F.GUEST_CS_SELECTOR: 0x11, F.GUEST_SS_SELECTOR: 1, F.GUEST_SS_AR_BYTES: AR_UNUSABLE}),
    ),
    *rows(
        "SS has another DPL than 0 in real mode",
        ("real", {F.GUEST_SS_AR_BYTES: 0xF3}),
        ("real", {F.GUEST_SS_AR_BYTES: AR_UNUSABLE | 1 << 5}),
        ("real", {F.GUEST_CS_AR_BYTES: 0x9B | AR_DPL, F.GUEST_SS_AR_BYTES: 0xF3}),
        (
            "protected without paging",
            {F.GUEST_CS_AR_BYTES: AR_DATA, F.GUEST_SS_AR_BYTES: AR_DATA | AR_DPL},
        ),
    ),
    *(
        (mode, {key: rights}, f"{name} is more privileged than its RPL")
        for name, key in each("AR_BYTES", *DATA)
        for mode, rights in (
            ("protected user", AR_DATA | 2 << 5),
            ("protected user", AR_DATA | AR_EXPAND_DOWN),
            ("64-bit user", AR_CODE32),
        )
    ),
    # D/B
    *rows("CS has both L and D", ("64-bit", {F.GUEST_CS_AR_BYTES: AR_CODE64 | AR_DB})),
    # TR and LDTR
    *rows(
        "TR is no busy TSS of the guest's mode",
        *(("64-bit", {F.GUEST_TR_AR_BYTES: AR_P | kind}) for kind in (0, 2, 3, 9, 15)),
        *(("protected", {F.GUEST_TR_AR_BYTES: AR_P | kind}) for kind in (1, 2, 9, 15)),
        ("compatibility", {F.GUEST_TR_AR_BYTES: AR_TSS16_BUSY}),
        ("real", {F.GUEST_TR_AR_BYTES: AR_LDT}),
    ),
    *rows("TR is unusable", ("64-bit", {F.GUEST_TR_AR_BYTES: AR_TSS64_BUSY | AR_UNUSABLE})),
    *rows(
        "LDTR is no LDT",
        ("64-bit", segment("LDTR", 0x20, AR_P | 3, limit=0xFF)),
        ("virtual-8086", segment("LDTR", 0x20, AR_P | 9, limit=0xFF)),
    ),
]


@pytest.mark.parametrize(("mode", "fields", "reason"), SEGMENTS)
def test_single_fault_in_a_segment_register_is_found(mode: str, fields: Fields, reason: str) -> None:
    assert Entry(mode, fields).violation == (0, reason)


GARBAGE = 0xFFF_FFFF & ~AR_DPL | AR_UNUSABLE
UNUSABLE: Fields = {
    key: value
    for name in ("SS", *DATA, "LDTR")
    for key, value in segment(name, 0xFFFC, GARBAGE, KERNEL, 0x1234_5678).items()
}

ALLOWED: dict[str, tuple[str, Fields]] = {
    "unusable segments with anything in them": ("64-bit", UNUSABLE),
    "unusable LDTR with a base that is not canonical": ("64-bit", {F.GUEST_LDTR_BASE: NOT_CANONICAL}),
    "LDTR": ("64-bit", segment("LDTR", 0x20, AR_LDT, KERNEL, 0xFFFFF)),
    "bases of 64 bits": ("64-bit", {F.GUEST_FS_BASE: KERNEL, F.GUEST_GS_BASE: KERNEL, F.GUEST_TR_BASE: KERNEL}),
    "bases of 32 bits": ("protected", {F.GUEST_CS_BASE: 1 << 31, F.GUEST_SS_BASE: FLAT}),
    "LDTR of virtual-8086 mode": ("virtual-8086", segment("LDTR", 0x20, AR_LDT, KERNEL, 0xFF)),
    "CS with the unusable bit": ("protected", {F.GUEST_CS_AR_BYTES: AR_CODE32 | AR_UNUSABLE}),
    "execute-only CS": ("protected", {F.GUEST_CS_AR_BYTES: EXECUTE_ONLY}),
    "conforming CS of the same level": ("protected", {F.GUEST_CS_AR_BYTES: CONFORMING}),
    "conforming CS of another level": ("protected user", {F.GUEST_CS_AR_BYTES: CONFORMING}),
    "conforming code in a data segment": ("protected user", {F.GUEST_DS_AR_BYTES: CONFORMING}),
    "SS that expands down": ("protected", {F.GUEST_SS_AR_BYTES: AR_DATA | AR_EXPAND_DOWN}),
    "data of a lower privilege level": ("protected", {F.GUEST_DS_AR_BYTES: AR_DATA | AR_DPL}),
    "read-only data": ("protected", {F.GUEST_ES_AR_BYTES: AR_DATA & ~2}),
    "available bits of access rights": ("64-bit", {F.GUEST_DS_AR_BYTES: AR_DATA | 1 << 12 | 1 << 13}),
    "L and D outside IA-32e mode": ("protected", {F.GUEST_CS_AR_BYTES: AR_CODE32 | 1 << 13}),
    "16-bit TSS in protected mode": ("protected", {F.GUEST_TR_AR_BYTES: AR_TSS16_BUSY}),
    "TSS with a limit in pages": ("protected", segment("TR", 0x40, AR_TSS64_BUSY | AR_G, limit=0xFFFF)),
    "code segment in real mode": ("real", {F.GUEST_CS_AR_BYTES: 0x9B}),
    "real-mode selectors": ("real", {F.GUEST_CS_SELECTOR: 0xF000, F.GUEST_SS_SELECTOR: 3, F.GUEST_DS_SELECTOR: 3}),
    "real-mode selectors after real mode": (
        "protected without paging",
        {F.GUEST_SS_SELECTOR: 3, F.GUEST_DS_SELECTOR: 3},
    ),
    "real-mode CS after real mode": ("protected without paging", {F.GUEST_CS_AR_BYTES: AR_DATA}),
    "real-mode segments with large limits": ("real", segment("DS", 0, AR_REAL_MODE | AR_G)),
}  # fmt: skip


@pytest.mark.parametrize("what", ALLOWED)
def test_guest_is_entered_all_the_same(what: str) -> None:
    mode, fields = ALLOWED[what]
    assert Entry(mode, fields).violation is None


def test_segment_registers_are_read_from_their_own_fields() -> None:
    entry = Entry("64-bit", segment("CS", 1, 2, 3, 4) | segment("TR", 5, 6, 7, 8))
    assert tuple(vars(guest_segment(entry.vmcs, CS)).values()) == (1, 3, 4, 2)
    assert tuple(vars(guest_segment(entry.vmcs, TR)).values()) == (5, 7, 8, 6)
