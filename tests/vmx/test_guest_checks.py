"""VM entries that fail for the guest state: valid guests of every mode, spoilt in one place each.

Segment registers have a file of their own.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nested_guests import (
    AN_NMI,
    BAD_PDPTES,
    BTF,
    CURRENT,
    EFER_LONG,
    ENABLED,
    EVERY_GUEST,
    FEATURES_OF_L1,
    FIVE_LEVEL_ADDRESS,
    FLAT,
    HLT,
    INTERRUPT,
    KERNEL,
    MAXIMUM,
    MODES,
    MOV_SS,
    NMI_BLOCKED,
    NO_VMCS,
    NOT_CANONICAL,
    OTHER_VMCS,
    PDPT,
    PDPTES,
    SHADOW_VMCS,
    STI,
    UNRESTRICTED,
    Entry,
    Fields,
    Rows,
    in_64_bit,
    inject,
    loading,
    rows,
)

from lasskvm.memory import PAGE_SIZE
from lasskvm.state import CR4_ALLOWED
from lasskvm.vmx.guest_checks import GuestStateViolation
from lasskvm.vmx.guest_mode import guest_pdptes
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import DB, MC
from lasskvm.x86.registers import (
    AR_CODE32,
    CR0_CD,
    CR0_NE,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR3_LAM_U57,
    CR4_CET,
    CR4_LASS,
    CR4_PAE,
    CR4_PCIDE,
    CR4_VMXE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_TF,
    RFLAGS_VM,
)
from lasskvm.x86.vmx import VmEntryFailure
from lasskvm.x86.vmx_fields import FIELD_BYTES, FieldType, field_type, field_width
from lasskvm.x86.vmx_fields import VmcsField as F

PAGING = CR0_PG | CR0_NE | CR0_PE


@pytest.mark.parametrize("mode", MODES)
def test_valid_guest_of_each_mode_is_entered(mode: str) -> None:
    assert Entry(mode).violation is None


# ------------------------------------------------------------------------- what the manual's bullets forbid, by section

REGISTERS: Rows = [
    *rows(
        "guest CR0 has bits that VMX operation does not allow",
        ("64-bit", {F.GUEST_CR0: CR0_PG | CR0_PE}),  # no NE
        ("64-bit", {F.GUEST_CR0: 1 << 32 | PAGING}),
        ("protected", {F.GUEST_CR0: CR0_NE | CR0_PE}),  # paging is optional for unrestricted guests
        ("protected", {F.GUEST_CR0: CR0_NE | CR0_PG}),
        ("real", {F.GUEST_CR0: 0}),  # NE is not
    ),
    *rows("guest CR0 has PG without PE", ("real", {F.GUEST_CR0: CR0_NE | CR0_PG})),
    *rows(
        "guest CR4 has bits that VMX operation does not allow",
        ("64-bit", {F.GUEST_CR4: CR4_PAE}),  # no VMXE
        ("64-bit", {F.GUEST_CR4: CR4_PAE | CR4_VMXE | 1 << 15}),
        ("64-bit", {F.GUEST_CR4: CR4_PAE | CR4_VMXE | CR4_CET}),
        ("64-bit", {F.GUEST_CR4: CR4_PAE | CR4_VMXE | 1 << 63}),
        ("real", {F.GUEST_CR4: 0}),
    ),
    *rows(
        "IA-32e mode needs paging, and PAE in guest CR4",
        ("64-bit", {F.GUEST_CR4: CR4_VMXE}),
        ("compatibility", {F.GUEST_CR4: CR4_VMXE}),
        ("unrestricted 64-bit", {F.GUEST_CR0: CR0_NE | CR0_PE}),
    ),
    *rows(
        "guest CR4 has PCIDE outside IA-32e mode",
        ("PAE", {F.GUEST_CR4: CR4_VMXE | CR4_PAE | CR4_PCIDE}),
        ("real", {F.GUEST_CR4: CR4_VMXE | CR4_PCIDE}),
    ),
    *rows(
        "guest CR3 is beyond physical memory",
        ("64-bit", {F.GUEST_CR3: MAXIMUM}),
        ("64-bit", {F.GUEST_CR3: 1 << 63}),
        ("protected", {F.GUEST_CR3: MAXIMUM}),
    ),
    *rows(
        "guest IA32_DEBUGCTL has reserved bits",
        *(loading("64-bit", {F.GUEST_IA32_DEBUGCTL: 1 << bit}) for bit in (2, 32, 63)),
    ),
    *rows("guest DR7 has more than 32 bits", loading("64-bit", {F.GUEST_DR7: 1 << 32})),
    *rows(
        "a guest SYSENTER address is not canonical",
        ("64-bit", {F.GUEST_SYSENTER_ESP: NOT_CANONICAL}),
        ("protected", {F.GUEST_SYSENTER_EIP: FIVE_LEVEL_ADDRESS}),
    ),
    *rows(
        "guest IA32_PAT has a memory type that does not exist",
        *(loading("64-bit", {F.GUEST_IA32_PAT: bad << 8 * byte}) for byte, bad in ((0, 2), (3, 3), (7, 8))),
    ),
    *rows(
        "guest IA32_EFER has reserved bits",
        loading("64-bit", {F.GUEST_IA32_EFER: EFER_LONG | 1 << 12}),
        loading("real", {F.GUEST_IA32_EFER: 1 << 63}),
    ),
    *rows(
        "guest IA32_EFER has another mode than the controls",
        loading("64-bit", {F.GUEST_IA32_EFER: EFER_SCE}),
        loading("64-bit", {F.GUEST_IA32_EFER: EFER_LME}),
        loading("protected", {F.GUEST_IA32_EFER: EFER_LONG}),
        loading("real", {F.GUEST_IA32_EFER: EFER_LMA}),
    ),
    *rows(
        "guest IA32_EFER has LMA and LME apart while paging is on",
        loading("64-bit", {F.GUEST_IA32_EFER: EFER_LMA}),
        loading("protected", {F.GUEST_IA32_EFER: EFER_LME}),
    ),
]

V86_SEGMENTS: Fields = {
    key: value for key, value in MODES["virtual-8086"].items() if key is not F.GUEST_RFLAGS
}

TABLES_AND_FLAGS: Rows = [
    *(
        (mode, {F[f"GUEST_{name}_BASE"]: NOT_CANONICAL}, f"the base of guest {name} is not canonical")
        for name in ("GDTR", "IDTR")
        for mode in ("64-bit", "real")
    ),
    *(
        ("64-bit", {F[f"GUEST_{name}_LIMIT"]: 0x10000}, f"the limit of guest {name} has more than 16 bits")
        for name in ("GDTR", "IDTR")
    ),
    *rows(
        "guest RIP has more than 32 bits outside 64-bit mode",
        *((mode, {F.GUEST_RIP: 1 << 32}) for mode in MODES if "64-bit" not in mode),
        # The L flag says nothing there.
        ("protected", {F.GUEST_RIP: 1 << 32, F.GUEST_CS_AR_BYTES: AR_CODE32 | 1 << 13}),
    ),
    *in_64_bit(
        "guest RIP has more bits than linear addresses have", F.GUEST_RIP, 1 << 48, FIVE_LEVEL_ADDRESS
    ),
    *in_64_bit(
        "guest RFLAGS has reserved bits, or lacks bit 1",
        F.GUEST_RFLAGS,
        0,
        *(RFLAGS_FIXED | 1 << bit for bit in (3, 5, 15, *range(22, 64))),
    ),
    *rows(
        "guest RFLAGS has VM in IA-32e mode or without CR0.PE",
        ("unrestricted 64-bit", {**V86_SEGMENTS, F.GUEST_RFLAGS: RFLAGS_FIXED | RFLAGS_VM}),
        ("virtual-8086", {**UNRESTRICTED, F.GUEST_CR0: CR0_NE}),
    ),
    *rows("an interrupt is to be injected while guest RFLAGS.IF is 0", ("64-bit", INTERRUPT)),
]

BS: Fields = {F.GUEST_PENDING_DBG_EXCEPTIONS: vmx.PENDING_DEBUG_BS}
TRAP: Fields = {F.GUEST_RFLAGS: RFLAGS_FIXED | RFLAGS_TF}
STI_TRAP: Fields = {**STI, F.GUEST_RFLAGS: RFLAGS_FIXED | RFLAGS_IF | RFLAGS_TF}
SHADOWS_WITH_TRAP: tuple[Fields, ...] = (STI_TRAP, {**MOV_SS, **TRAP}, {**HLT, **TRAP})

NON_REGISTER: Rows = [
    # Activity
    *in_64_bit("the activity state is not supported", F.GUEST_ACTIVITY_STATE, 2, 3, 4, 0x8000_0000),
    *rows(
        "the guest has halted at a privilege level that cannot",
        ("64-bit user", HLT),
        ("virtual-8086", HLT),
    ),
    *rows(
        "the guest is not active in the shadow of an instruction",
        ("64-bit", {**HLT, **STI}),
        ("64-bit", {**HLT, **MOV_SS}),
    ),
    *rows(
        "the activity state blocks the event to inject",
        ("64-bit", {**HLT, **inject(vmx.INTR_TYPE_HARD_EXCEPTION, 14)}),
        ("64-bit", {**HLT, **inject(vmx.INTR_TYPE_SOFT_INTR, DB)}),
        ("64-bit", {**HLT, **inject(vmx.INTR_TYPE_SOFT_EXCEPTION, MC)}),
        ("64-bit", {**HLT, **inject(vmx.INTR_TYPE_PRIV_SW_EXCEPTION, DB)}),
        ("64-bit", {**HLT, **inject(vmx.INTR_TYPE_OTHER_EVENT, 1)}),
    ),
    # Interruptibility
    *in_64_bit(
        "reserved bits of the interruptibility state are set",
        F.GUEST_INTERRUPTIBILITY_INFO,
        *(1 << bit for bit in range(5, 32)),
    ),
    *rows(
        "STI and MOV SS cannot both be blocking",
        ("64-bit", {**ENABLED, F.GUEST_INTERRUPTIBILITY_INFO: 0b11}),
    ),
    *rows("STI is blocking while guest RFLAGS.IF is 0", ("64-bit", {F.GUEST_INTERRUPTIBILITY_INFO: 1})),
    *rows(
        "an interrupt is to be injected into the shadow of an instruction",
        ("64-bit", {**STI, **INTERRUPT}),
        ("64-bit", {**ENABLED, **MOV_SS, **INTERRUPT}),
    ),
    *rows("an NMI is to be injected into the shadow of MOV SS", ("64-bit", {**MOV_SS, **AN_NMI})),
    *rows(
        "an NMI is to be injected while virtual NMIs are blocked",
        ("64-bit", {**AN_NMI, **NMI_BLOCKED, F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VIRTUAL_NMIS}),
    ),
    *in_64_bit("SMIs are blocked outside SMM", F.GUEST_INTERRUPTIBILITY_INFO, vmx.GUEST_INTR_STATE_SMI),
    *in_64_bit(
        "an enclave is interrupted, and there are no enclaves",
        F.GUEST_INTERRUPTIBILITY_INFO,
        vmx.GUEST_INTR_STATE_ENCLAVE_INTR,
    ),
    # Pending debug exceptions
    *in_64_bit(
        "reserved bits of the pending debug exceptions are set",
        F.GUEST_PENDING_DBG_EXCEPTIONS,
        *(1 << bit for bit in (*range(4, 12), 13, 15, *range(16, 64))),
    ),
    *rows(
        "the pending single step does not agree with guest RFLAGS.TF and IA32_DEBUGCTL.BTF",
        *(("64-bit", {**shadow, **BS}) for shadow in (STI, MOV_SS, HLT)),
        *(("64-bit", shadow) for shadow in SHADOWS_WITH_TRAP),
        *(("64-bit", {**shadow, **BS, F.GUEST_IA32_DEBUGCTL: BTF}) for shadow in SHADOWS_WITH_TRAP),
    ),
]

FORBIDDEN = [
    pytest.param(*row, id=f"{section}-{row[0]}-{row[2]}")
    for section, table in (
        ("registers", REGISTERS),
        ("tables and flags", TABLES_AND_FLAGS),
        ("non-register state", NON_REGISTER),
    )
    for row in table
]


@pytest.mark.parametrize(("mode", "fields", "reason"), FORBIDDEN)
def test_single_fault_in_the_guest_state_is_found(mode: str, fields: Fields, reason: str) -> None:
    assert Entry(mode, fields).violation == (0, reason)


# --------------------------------------------------------------------------------------- what is allowed all the same

ALLOWED: dict[str, tuple[str, Fields]] = {
    "CR0.NW and CR0.CD are not checked": ("64-bit", {F.GUEST_CR0: PAGING | CR0_NW}),
    "CR0.CD without NW": ("real", {F.GUEST_CR0: CR0_NE | CR0_CD}),
    "paging is an unrestricted guest's choice": ("real", {F.GUEST_CR0: PAGING}),
    "CR3 in the last page": ("64-bit", {F.GUEST_CR3: MAXIMUM - 0x1000}),
    "CR3 with the bits of LAM": ("64-bit", {F.GUEST_CR3: CR3_LAM_U57 | PDPT}),
    "debug controls that are not loaded": ("64-bit", {F.GUEST_IA32_DEBUGCTL: 1 << 63, F.GUEST_DR7: 1 << 63}),
    "debug controls": loading("64-bit", {F.GUEST_IA32_DEBUGCTL: BTF | 1, F.GUEST_DR7: FLAT}),
    "PAT and EFER that are not loaded": ("64-bit", {F.GUEST_IA32_PAT: 2, F.GUEST_IA32_EFER: 1 << 63}),
    "EFER of protected mode": loading("protected", {F.GUEST_IA32_EFER: EFER_NXE}),
    "EFER.LME before paging is on": loading("protected without paging", {F.GUEST_IA32_EFER: EFER_LME}),
    "SYSENTER of a kernel": ("64-bit", {F.GUEST_SYSENTER_ESP: KERNEL, F.GUEST_SYSENTER_EIP: KERNEL}),
    "GDTR and IDTR": ("64-bit", {F.GUEST_GDTR_BASE: KERNEL, F.GUEST_GDTR_LIMIT: 0xFFFF, F.GUEST_IDTR_LIMIT: 0xFFFF}),
    "RIP behind the end of the lower half": ("64-bit", {F.GUEST_RIP: 1 << 47}),
    "RIP of 32 bits": ("protected", {F.GUEST_RIP: FLAT}),
    "all flags": ("64-bit", {F.GUEST_RFLAGS: 0x3D7FD7}),
    "interrupts while they are enabled": ("64-bit", {**ENABLED, **INTERRUPT}),
    "invalid interruption information": ("64-bit", {**MOV_SS, F.VM_ENTRY_INTR_INFO_FIELD: 0x202}),
    "NMI while NMIs are blocked, without virtual NMIs": ("64-bit", {**AN_NMI, **NMI_BLOCKED}),
    "virtual NMI": ("64-bit", {**AN_NMI, F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VIRTUAL_NMIS}),
    "blocked virtual NMIs": (
        "64-bit",
        {**NMI_BLOCKED, F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VIRTUAL_NMIS},
    ),
    "exception in a shadow": ("64-bit", {**STI, **inject(vmx.INTR_TYPE_HARD_EXCEPTION, DB)}),
    "interrupt for a halted guest": ("64-bit", {**HLT, **ENABLED, **INTERRUPT}),
    "NMI for a halted guest": ("64-bit", {**HLT, **AN_NMI}),
    "#DB for a halted guest": ("64-bit", {**HLT, **inject(vmx.INTR_TYPE_HARD_EXCEPTION, DB)}),
    "#MC for a halted guest": ("64-bit", {**HLT, **inject(vmx.INTR_TYPE_HARD_EXCEPTION, MC)}),
    "monitor trap for a halted guest": ("64-bit", {**HLT, **inject(vmx.INTR_TYPE_OTHER_EVENT, 0)}),
    "halted guest with blocked NMIs": ("64-bit", {**HLT, **NMI_BLOCKED}),
    "pending breakpoints": ("64-bit", {F.GUEST_PENDING_DBG_EXCEPTIONS: 0x500F}),
    "pending single step without a shadow": ("64-bit", BS),
    "no pending single step without a shadow": ("64-bit", TRAP),
    "pending single step in a shadow": ("64-bit", {**MOV_SS, **TRAP, **BS}),
    "branches are stepped": ("64-bit", {**MOV_SS, **TRAP, F.GUEST_IA32_DEBUGCTL: BTF}),
}  # fmt: skip


@pytest.mark.parametrize("what", ALLOWED)
def test_guest_is_entered_all_the_same(what: str) -> None:
    mode, fields = ALLOWED[what]
    assert Entry(mode, fields).violation is None


@pytest.mark.parametrize("mode", MODES)
def test_host_state_and_exit_information_are_none_of_the_guests_business(mode: str) -> None:
    entry = Entry(mode)
    others = [key for key in F if field_type(key) in (FieldType.HOST_STATE, FieldType.READ_ONLY)]
    assert entry.set(dict.fromkeys(others, (1 << 64) - 1)).violation is None


# ------------------------------------------------------------------------------------------- LASS and other features


@pytest.mark.parametrize("mode", MODES)
def test_guest_cr4_with_lass_is_refused_exactly_without_lass(mode: str) -> None:
    lass = {F.GUEST_CR4: (EVERY_GUEST | MODES[mode])[F.GUEST_CR4] | CR4_LASS}
    assert Entry(mode, lass).violation is None
    features = [name for name in FEATURES_OF_L1 if name != "lass"]
    assert Entry(mode, lass, features).violation == (
        0,
        "guest CR4 has bits that VMX operation does not allow",
    )
    assert Entry(mode, {F.GUEST_CR4: lass[F.GUEST_CR4] & ~CR4_LASS}, features).violation is None


def test_lass_has_no_say_in_guest_addresses() -> None:
    user: Fields = {
        F.GUEST_RIP: 0x40_0000,
        F.GUEST_GDTR_BASE: 0x40_1000,
        F.GUEST_TR_BASE: 0x40_2000,
        F.GUEST_SYSENTER_EIP: 0x40_3000,
    }
    assert MODES["64-bit"][F.GUEST_CR4] & CR4_LASS
    assert Entry("64-bit", user).violation is None
    assert Entry("64-bit user", {F.GUEST_RIP: KERNEL}).violation is None


def test_cet_needs_write_protection() -> None:
    features = (*FEATURES_OF_L1, "shstk")
    cet = {F.GUEST_CR4: CR4_VMXE | CR4_PAE | CR4_CET}
    assert Entry("64-bit", cet, features).violation is None
    violation = Entry("64-bit", {**cet, F.GUEST_CR0: PAGING}, features).violation
    assert violation == (0, "guest CR4 has CET without CR0.WP")


def test_guest_cr3_has_the_bits_of_lam_only_with_lam() -> None:
    features = [name for name in FEATURES_OF_L1 if name != "lam"]
    violation = Entry("64-bit", {F.GUEST_CR3: CR3_LAM_U57}, features).violation
    assert violation == (0, "guest CR3 is beyond physical memory")


@pytest.mark.parametrize(
    "key", [F.GUEST_RIP, F.GUEST_FS_BASE, F.GUEST_TR_BASE, F.GUEST_IDTR_BASE, F.GUEST_SYSENTER_ESP]
)
def test_five_level_addresses_need_the_feature_and_not_cr4(key: F) -> None:
    features = (*FEATURES_OF_L1, "la57")
    assert Entry("64-bit", {key: FIVE_LEVEL_ADDRESS}).violation is not None
    assert Entry("64-bit", {key: FIVE_LEVEL_ADDRESS}, features).violation is None
    assert Entry("64-bit", {key: 1 << 57}, features).violation is not None


def test_interrupted_enclaves_need_sgx_and_cannot_have_executed_mov_ss() -> None:
    features = (*FEATURES_OF_L1, "sgx")
    enclave = vmx.GUEST_INTR_STATE_ENCLAVE_INTR
    assert Entry("64-bit", {F.GUEST_INTERRUPTIBILITY_INFO: enclave}, features).violation is None
    blocking = {F.GUEST_INTERRUPTIBILITY_INFO: enclave | vmx.GUEST_INTR_STATE_MOV_SS}
    violation = Entry("64-bit", blocking, features).violation
    assert violation == (0, "an enclave is interrupted in the shadow of MOV SS, which it cannot execute")


@pytest.mark.parametrize(
    ("activity", "misc", "allowed"),
    [
        (vmx.GUEST_ACTIVITY_SHUTDOWN, vmx.VMX_MISC_ACTIVITY_SHUTDOWN, {"NMI", "#MC"}),
        (vmx.GUEST_ACTIVITY_WAIT_SIPI, vmx.VMX_MISC_ACTIVITY_WAIT_SIPI, set()),
    ],
)
def test_activity_states_of_other_processors_let_few_events_through(
    activity: int, misc: int, allowed: set[str]
) -> None:
    events = {
        "interrupt": INTERRUPT,
        "NMI": AN_NMI,
        "#DB": inject(vmx.INTR_TYPE_HARD_EXCEPTION, DB),
        "#MC": inject(vmx.INTR_TYPE_HARD_EXCEPTION, MC),
        "monitor trap": inject(vmx.INTR_TYPE_OTHER_EVENT, 0),
    }

    def violation(fields: Fields) -> GuestStateViolation | None:
        entry = Entry("64-bit user", {**ENABLED, F.GUEST_ACTIVITY_STATE: activity, **fields})
        entry.capabilities = replace(entry.capabilities, misc=entry.capabilities.misc | misc)
        return entry.violation

    assert violation({}) is None
    assert {name for name, event in events.items() if violation(event) is None} == allowed


# ------------------------------------------------------------------------------------ failures with a qualification


def test_nmi_in_the_shadow_of_sti_has_a_qualification_of_its_own() -> None:
    violation = Entry("64-bit", {**STI, **AN_NMI}).violation
    assert violation == (3, "an NMI is to be injected into the shadow of STI")


@pytest.mark.parametrize(
    ("pointer", "reason"),
    [
        (vmx.VMCS_NO_POINTER, None),
        (OTHER_VMCS, None),
        (OTHER_VMCS | 0x800, "is not the address of a page"),
        (OTHER_VMCS | MAXIMUM, "is not the address of a page"),
        (vmx.VMCS_NO_POINTER - 1, "is not the address of a page"),
        (NO_VMCS, "does not point to a VMCS"),
        (SHADOW_VMCS, "does not point to a VMCS"),
        (MAXIMUM - PAGE_SIZE, "does not point to a VMCS"),
        (CURRENT, "points to the current VMCS"),
    ],
)
def test_vmcs_link_pointer(pointer: int, reason: str | None) -> None:
    violation = Entry("64-bit", {F.VMCS_LINK_POINTER: pointer}).violation
    if reason is None:
        assert violation is None
    else:
        assert violation == (4, f"the VMCS link pointer {reason}")


@pytest.mark.parametrize("pdpte", BAD_PDPTES)
@pytest.mark.parametrize("number", range(4))
def test_reserved_bits_of_pdptes_in_memory(number: int, pdpte: int) -> None:
    expected = (2, f"guest PDPTE {number} has reserved bits")
    entry = Entry("PAE")
    entry.memory.store(PDPT + 8 * number, 8, pdpte)
    assert entry.violation == expected
    entry.memory.store(PDPT + 8 * number, 8, pdpte & ~1)
    assert entry.violation is None


@pytest.mark.parametrize("pdpte", BAD_PDPTES)
@pytest.mark.parametrize("number", range(4))
def test_reserved_bits_of_pdptes_in_the_vmcs(number: int, pdpte: int) -> None:
    key = F(F.GUEST_PDPTR0 + 2 * number)
    expected = (2, f"guest PDPTE {number} has reserved bits")
    assert Entry("PAE with EPT", {key: pdpte}).violation == expected
    assert Entry("PAE with EPT", {key: pdpte & ~1}).violation is None


def test_pdptes_come_from_memory_without_ept_and_from_the_vmcs_with_it() -> None:
    entry = Entry("PAE", {F.GUEST_PDPTR0: BAD_PDPTES[0]})
    assert entry.violation is None
    assert guest_pdptes(entry.vmcs, entry.memory) == PDPTES
    # Neither the low five bits of CR3 nor those from 32 up are part of the table's address.
    assert guest_pdptes(entry.set({F.GUEST_CR3: 1 << 32 | PDPT | 0x1F}).vmcs, entry.memory) == PDPTES
    entry = Entry("PAE with EPT", {F.GUEST_CR3: 0x9000})
    entry.memory.store(0x9000, 8, BAD_PDPTES[0])
    assert entry.violation is None
    assert guest_pdptes(entry.vmcs, entry.memory) == PDPTES


def test_pdptes_behind_the_end_of_memory_are_reserved() -> None:
    violation = Entry("PAE", {F.GUEST_CR3: 0x8000_0000}).violation
    assert violation == (2, "guest PDPTE 0 has reserved bits")


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("PAE")])
def test_other_guests_have_no_pdptes(mode: str) -> None:
    entry = Entry(mode, {F.GUEST_CR3: PDPT, F.GUEST_PDPTR0: BAD_PDPTES[0]})
    entry.memory.store(PDPT, 8, BAD_PDPTES[0])
    assert entry.violation is None
    assert guest_pdptes(entry.vmcs, entry.memory) is None


def test_pae_without_paging_has_no_pdptes() -> None:
    entry = Entry(
        "protected without paging", {F.GUEST_CR4: CR4_VMXE | CR4_PAE, F.GUEST_PDPTR0: BAD_PDPTES[0]}
    )
    assert entry.violation is None


# ------------------------------------------------------------------------------------------------------ hostile VMCSs


def assert_defined(entry: Entry) -> None:
    """The check ends in nothing or in a failure that L1 can be told; what passes has what the processor relies on."""
    violation, vmcs = entry.violation, entry.vmcs
    if violation is not None:
        assert violation.qualification in VmEntryFailure
        return
    assert vmcs[F.GUEST_CR4] & ~entry.words[CR4_ALLOWED] == 0
    assert vmcs[F.GUEST_RFLAGS] & RFLAGS_FIXED
    assert vmcs[F.GUEST_CR0] & CR0_PE or not vmcs[F.GUEST_CR0] & CR0_PG
    if vmcs[F.VM_ENTRY_CONTROLS] & vmx.VM_ENTRY_IA32E_MODE:
        assert vmcs[F.GUEST_CR0] & CR0_PG
        assert vmcs[F.GUEST_CR4] & CR4_PAE
    else:
        assert vmcs[F.GUEST_RIP] < 1 << 32
    assert vmcs[F.GUEST_CS_BASE] < 1 << 32


ROUNDS = 100


@given(st.integers())
def test_random_pages_end_in_defined_failures(seed: int) -> None:
    random, entry = Random(seed), Entry("64-bit")
    for _ in range(ROUNDS):
        entry.memory.write(0x9000, random.randbytes(PAGE_SIZE))
        entry.vmcs = Vmcs12.load(entry.memory, 0x9000)
        assert_defined(entry)


GUEST_FIELDS = [key for key in F if field_type(key) == FieldType.GUEST_STATE]
CONTROL_FIELDS = [
    F.VM_ENTRY_CONTROLS, F.VM_ENTRY_INTR_INFO_FIELD, F.PIN_BASED_VM_EXEC_CONTROL,
    F.CPU_BASED_VM_EXEC_CONTROL, F.SECONDARY_VM_EXEC_CONTROL,
]  # fmt: skip


@given(st.sampled_from(list(MODES)), st.integers())
def test_valid_guests_with_random_fields_end_in_defined_ways(mode: str, seed: int) -> None:
    random, entry = Random(seed), Entry(mode)
    whole = dict(entry.vmcs)
    for _ in range(ROUNDS):
        entry.vmcs.update(whole)
        for key in random.sample(GUEST_FIELDS + CONTROL_FIELDS, random.randrange(1, 4)):
            bits = random.getrandbits(64)
            entry.vmcs[key] = bits if random.random() < 0.5 else whole[key] ^ 1 << random.randrange(64)
        assert_defined(entry)


@pytest.mark.parametrize("mode", MODES)
def test_every_guest_with_one_bit_flipped_ends_in_a_defined_way(mode: str) -> None:
    entry = Entry(mode)
    failures = 0
    for key in GUEST_FIELDS:
        for bit in range(8 * FIELD_BYTES[field_width(key)]):
            entry.vmcs[key] ^= 1 << bit
            assert_defined(entry)
            failures += entry.violation is not None
            entry.vmcs[key] ^= 1 << bit
    assert entry.violation is None
    assert failures > len(GUEST_FIELDS)
