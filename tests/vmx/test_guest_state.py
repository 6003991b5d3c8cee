"""Guest state on its way from a VMCS to the state words and back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nested_guests import MODES, PDPTES
from transition_guest import CPUID, GUEST_PAT, HOST_PAT, WINDOW, Nested

from lasskvm import state as s
from lasskvm.emulator.modes import code_bits
from lasskvm.state import segment_word
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.guest_state import load_guest_state, save_guest_state
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import BP, DB, GP, NMI, PF
from lasskvm.x86.msr import MSR_IA32_DEBUGCTL
from lasskvm.x86.registers import (
    AR_DPL,
    AR_LDT,
    AR_UNUSABLE,
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_TS,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    ES,
    GS,
    LDTR,
    MASK64,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_TF,
    SS,
)
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import FIELD_BYTES, FieldType, FieldWidth, field_type, field_width
from lasskvm.x86.vmx_fields import VmcsField as F

STI, MOV_SS, NMI_BLOCKING = vmx.GUEST_INTR_STATE_STI, vmx.GUEST_INTR_STATE_MOV_SS, vmx.GUEST_INTR_STATE_NMI
EVERYTHING_LOADED = (
    vmx.VM_ENTRY_LOAD_DEBUG_CONTROLS | vmx.VM_ENTRY_LOAD_IA32_PAT | vmx.VM_ENTRY_LOAD_IA32_EFER
)
EVERYTHING_SAVED = vmx.VM_EXIT_SAVE_DEBUG_CONTROLS | vmx.VM_EXIT_SAVE_IA32_PAT | vmx.VM_EXIT_SAVE_IA32_EFER
DEBUG_BTF = 1 << 1

PDPTE_FIELDS = (F.GUEST_PDPTR0, F.GUEST_PDPTR1, F.GUEST_PDPTR2, F.GUEST_PDPTR3)
#: Guest fields whose values are tied to others, or not loaded at all.
SPECIAL = {
    F.GUEST_CR0,
    F.GUEST_CR4,
    F.GUEST_RFLAGS,
    F.GUEST_DR7,
    F.GUEST_IA32_DEBUGCTL,
    F.GUEST_IA32_EFER,
    F.GUEST_INTERRUPTIBILITY_INFO,
    F.GUEST_ACTIVITY_STATE,
    F.GUEST_PENDING_DBG_EXCEPTIONS,
    F.VMCS_LINK_POINTER,
    F.VMX_PREEMPTION_TIMER_VALUE,
    *PDPTE_FIELDS,
}
PLAIN = [field for field in F if field_type(field) == FieldType.GUEST_STATE and field not in SPECIAL]
BASES_OF_32_BITS = {F.GUEST_ES_BASE, F.GUEST_SS_BASE, F.GUEST_DS_BASE}
ACCESS_RIGHTS = {field for field in PLAIN if field.name.endswith("AR_BYTES")}


def values_of(field: F) -> st.SearchStrategy[int]:
    if field in ACCESS_RIGHTS:
        return st.integers(0, 0x1FFFF).map(lambda value: value & vmx.SEGMENT_AR_WRITABLE)
    bits = 32 if field in BASES_OF_32_BITS else 8 * FIELD_BYTES[field_width(field)]
    return st.integers(0, (1 << bits) - 1)


plain_values = st.fixed_dictionaries({field: values_of(field) for field in PLAIN})


def loaded(guest: Nested) -> Nested:
    load_guest_state(guest.ctx, guest.vmcs)
    return guest


def saved(guest: Nested, record: NestedExit = WINDOW, pending_debug: int = 0) -> Nested:
    save_guest_state(guest.ctx, guest.vmcs, record, pending_debug)
    return guest


def exception(vector: int, kind: int = vmx.INTR_TYPE_HARD_EXCEPTION) -> NestedExit:
    information = vmx.INTR_INFO_VALID_MASK | kind | vector
    return NestedExit(ExitReason.EXCEPTION_NMI, interruption_information=information)


# ------------------------------------------------------------------------------------------------ there and back


@settings(max_examples=60)
@given(values=plain_values)
def test_what_is_loaded_is_saved_again(values: dict[F, int]) -> None:
    guest = Nested("64-bit", values)
    guest.add({F.VM_ENTRY_CONTROLS: EVERYTHING_LOADED, F.VM_EXIT_CONTROLS: EVERYTHING_SAVED})
    guest.vmcs[F.GUEST_IA32_EFER] = EFER_SCE | EFER_LME | EFER_LMA
    before = guest.guest_fields()
    if values[F.GUEST_LDTR_AR_BYTES] & AR_UNUSABLE:
        before[F.GUEST_LDTR_BASE] = 0
    before[F.GUEST_CR0] |= CR0_ET
    saved(loaded(guest))
    assert guest.guest_fields() == before


@pytest.mark.parametrize("mode", MODES)
def test_guest_of_each_mode_is_valid_and_comes_back_valid(mode: str) -> None:
    guest = Nested(mode)
    guest.check()
    l1 = guest.snapshot()
    before = guest.guest_fields()
    saved(loaded(guest))
    before[F.GUEST_CR0] |= CR0_ET
    assert guest.guest_fields() == before
    guest.state.load_bytes(l1)
    guest.check()


@pytest.mark.parametrize(
    "mode, bits",
    [("64-bit", 64), ("compatibility", 32), ("protected", 32), ("virtual-8086", 16), ("real", 16)],
)
def test_the_guest_runs_in_its_mode(mode: str, bits: int) -> None:
    assert code_bits(loaded(Nested(mode)).words) == bits


@pytest.mark.parametrize("mode, cpl", [("64-bit", 0), ("64-bit user", 3), ("virtual-8086", 3), ("real", 0)])
def test_the_privilege_level_is_that_of_ss(mode: str, cpl: int) -> None:
    assert loaded(Nested(mode)).words[s.CPL] == cpl


def test_the_privilege_level_is_saved_in_ss_whatever_the_register_has() -> None:
    guest = loaded(Nested("64-bit user"))
    guest.words[segment_word(SS, s.ATTRIBUTES)] &= ~AR_DPL
    assert saved(guest).vmcs[F.GUEST_SS_AR_BYTES] & AR_DPL == AR_DPL


def test_registers_outside_the_vmcs_are_shared() -> None:
    guest = Nested()
    shared = [number for number in range(16) if number != s.RSP]
    shared += [s.CR2, s.CR8, s.DR0, s.DR3, s.DR6, s.XCR0, s.STAR, s.LSTAR, s.KERNEL_GS_BASE, s.TSC_AUX]
    for number in shared:
        guest.words[number] = 0x1000 + number
    loaded(guest)
    assert [guest.words[number] for number in shared] == [0x1000 + number for number in shared]


def test_translations_are_forgotten() -> None:
    guest = Nested()
    guest.words[s.TLB_FLUSH] = 0
    assert loaded(guest).words[s.TLB_FLUSH] == 1


def test_bits_that_a_field_has_no_room_for_are_not_saved() -> None:
    guest = loaded(Nested())
    guest.words[s.SYSENTER_CS] = 1 << 32 | 8
    guest.words[segment_word(ES, s.ATTRIBUTES)] = MASK64
    vmcs = saved(guest).vmcs
    assert vmcs[F.GUEST_SYSENTER_CS] == 8
    assert vmcs[F.GUEST_ES_AR_BYTES] == vmx.SEGMENT_AR_WRITABLE


# ------------------------------------------------------------------------------------------- control registers


def test_cache_control_bits_of_cr0_are_not_loaded() -> None:
    guest = Nested()
    guest.add({F.GUEST_CR0: CR0_CD | CR0_NW | CR0_TS})
    loaded(guest)
    assert guest.words[s.CR0] & (CR0_CD | CR0_NW | CR0_ET | CR0_TS) == CR0_ET | CR0_TS
    guest = Nested()
    guest.words[s.CR0] |= CR0_CD
    assert loaded(guest).words[s.CR0] & CR0_CD


def test_pdptes_come_from_the_vmcs_with_ept_and_from_memory_without() -> None:
    for mode in ("PAE", "PAE with EPT"):
        guest = loaded(Nested(mode))
        assert tuple(guest.words[s.PDPTR0 + number] for number in range(4)) == PDPTES
    guest = Nested("PAE with EPT", {F.GUEST_PDPTR1: 0x9001})
    assert loaded(guest).words[s.PDPTR0 + 1] == 0x9001


@pytest.mark.parametrize("mode, expected", [("PAE with EPT", 0x9001), ("PAE", 0), ("real", 0), ("64-bit", 0)])
def test_pdptes_are_saved_with_ept_and_pae_paging_only(mode: str, expected: int) -> None:
    guest = loaded(Nested(mode))
    guest.words[s.PDPTR0 + 3] = 0x9001
    assert saved(guest).vmcs[F.GUEST_PDPTR3] == expected


# --------------------------------------------------------------------------------------------------- controls


def test_entry_without_load_controls_keeps_the_registers_of_l1() -> None:
    guest = Nested("64-bit", {F.GUEST_DR7: 0x401, F.GUEST_IA32_EFER: 0, F.GUEST_IA32_PAT: GUEST_PAT})
    guest.words[s.DR7], guest.words[s.PAT] = 0x455, HOST_PAT
    efer = guest.words[s.EFER]
    loaded(guest)
    assert (guest.words[s.DR7], guest.words[s.PAT], guest.words[s.EFER]) == (0x455, HOST_PAT, efer)


def test_load_debug_controls_loads_dr7_with_its_fixed_bits() -> None:
    guest = Nested("64-bit", {F.GUEST_DR7: 0xFFFF_FFFF, F.GUEST_IA32_DEBUGCTL: DEBUG_BTF})
    guest.ctx.msrs.values[MSR_IA32_DEBUGCTL] = DEBUG_BTF
    loaded(guest.add({F.VM_ENTRY_CONTROLS: vmx.VM_ENTRY_LOAD_DEBUG_CONTROLS}))
    assert guest.words[s.DR7] == 0xFFFF_27FF
    # Branches are not single-stepped here, and the bit does not stick when WRMSR sets it either.
    assert guest.ctx.msrs.values[MSR_IA32_DEBUGCTL] == 0
    guest.vmcs[F.GUEST_DR7] = 0
    assert loaded(guest).words[s.DR7] == 0x400


def test_load_pat_loads_it() -> None:
    guest = Nested().add({F.VM_ENTRY_CONTROLS: vmx.VM_ENTRY_LOAD_IA32_PAT})
    assert loaded(guest).words[s.PAT] == GUEST_PAT


def test_load_efer_loads_all_of_it() -> None:
    guest = Nested().add({F.VM_ENTRY_CONTROLS: vmx.VM_ENTRY_LOAD_IA32_EFER})
    guest.vmcs[F.GUEST_IA32_EFER] = EFER_LME | EFER_LMA
    assert loaded(guest).words[s.EFER] == EFER_LME | EFER_LMA


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("64-bit", EFER_SCE | EFER_NXE | EFER_LME | EFER_LMA),
        ("protected", EFER_SCE | EFER_NXE),
        ("real", EFER_SCE | EFER_NXE | EFER_LME),
    ],
)
def test_without_load_efer_the_mode_bits_follow_the_controls(mode: str, expected: int) -> None:
    guest = Nested(mode)
    guest.words[s.EFER] = EFER_SCE | EFER_NXE | EFER_LME | EFER_LMA
    assert loaded(guest).words[s.EFER] == expected


@pytest.mark.parametrize(
    "control, field, word, value",
    [
        (vmx.VM_EXIT_SAVE_DEBUG_CONTROLS, F.GUEST_DR7, s.DR7, 0x455),
        (vmx.VM_EXIT_SAVE_IA32_PAT, F.GUEST_IA32_PAT, s.PAT, HOST_PAT),
        (vmx.VM_EXIT_SAVE_IA32_EFER, F.GUEST_IA32_EFER, s.EFER, EFER_LME | EFER_LMA | EFER_NXE),
    ],
)
def test_save_controls_save_one_register_each(control: int, field: F, word: int, value: int) -> None:
    guest = Nested()
    guest.vmcs[F.VM_EXIT_CONTROLS] &= ~EVERYTHING_SAVED
    loaded(guest)
    before = guest.vmcs[field]
    guest.words[word] = value
    assert saved(guest).vmcs[field] == before != value
    assert saved(guest.add({F.VM_EXIT_CONTROLS: control})).vmcs[field] == value


# ------------------------------------------------------------------------------- activity, interruptibility, RF


def test_halted_guest_is_halted_and_saved_as_halted() -> None:
    guest = loaded(Nested("64-bit", {F.GUEST_ACTIVITY_STATE: vmx.GUEST_ACTIVITY_HLT}))
    assert guest.ctx.halted
    assert saved(guest).vmcs[F.GUEST_ACTIVITY_STATE] == vmx.GUEST_ACTIVITY_HLT
    guest.ctx.halted = False
    assert saved(guest).vmcs[F.GUEST_ACTIVITY_STATE] == vmx.GUEST_ACTIVITY_ACTIVE


@pytest.mark.parametrize(
    "blocking", [0, STI, MOV_SS, NMI_BLOCKING, STI | NMI_BLOCKING, MOV_SS | NMI_BLOCKING]
)
def test_interruptibility_is_loaded_into_its_words(blocking: int) -> None:
    words = loaded(Nested("64-bit", {F.GUEST_INTERRUPTIBILITY_INFO: blocking})).words
    assert words[s.INTERRUPT_SHADOW] == int(blocking & (STI | MOV_SS) != 0)
    assert words[s.NMI_BLOCKED] == int(blocking & NMI_BLOCKING != 0)


def test_injected_event_ends_shadow_and_hlt_but_not_nmi_blocking() -> None:
    event = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_EXT_INTR | 0x20
    guest = Nested(
        "64-bit",
        {
            F.VM_ENTRY_INTR_INFO_FIELD: event,
            F.GUEST_INTERRUPTIBILITY_INFO: STI | NMI_BLOCKING,
            F.GUEST_ACTIVITY_STATE: vmx.GUEST_ACTIVITY_HLT,
        },
    )
    words = loaded(guest).words
    assert (words[s.INTERRUPT_SHADOW], words[s.NMI_BLOCKED], guest.ctx.halted) == (0, 1, False)


def test_pending_monitor_trap_leaves_shadow_and_hlt_alone() -> None:
    event = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_OTHER_EVENT
    fields = {F.VM_ENTRY_INTR_INFO_FIELD: event, F.GUEST_ACTIVITY_STATE: vmx.GUEST_ACTIVITY_HLT}
    assert loaded(Nested("64-bit", fields)).ctx.halted


@pytest.mark.parametrize(
    "rflags, kind",
    [
        (RFLAGS_IF, STI),
        (0, MOV_SS),
        (RFLAGS_IF | RFLAGS_TF, MOV_SS),
        (RFLAGS_TF, MOV_SS),
    ],
)
def test_a_shadow_is_saved_as_one_that_the_flags_allow(rflags: int, kind: int) -> None:
    guest = Nested()
    l1 = guest.snapshot()
    loaded(guest)
    guest.words[s.RFLAGS] = RFLAGS_FIXED | rflags
    guest.words[s.INTERRUPT_SHADOW] = 1
    saved(guest, CPUID)
    assert guest.vmcs[F.GUEST_INTERRUPTIBILITY_INFO] == kind
    guest.state.load_bytes(l1)
    guest.check()


def test_single_step_over_mov_ss_is_still_pending_after_an_exit() -> None:
    guest = loaded(Nested())
    guest.words[s.RFLAGS] |= RFLAGS_TF
    guest.words[s.INTERRUPT_SHADOW] = 1
    assert saved(guest, CPUID).vmcs[F.GUEST_PENDING_DBG_EXCEPTIONS] == vmx.PENDING_DEBUG_BS
    for other in (exception(GP), exception(NMI, vmx.INTR_TYPE_NMI_INTR), NestedExit(ExitReason.NMI_WINDOW)):
        assert saved(guest, other).vmcs[F.GUEST_PENDING_DBG_EXCEPTIONS] == vmx.PENDING_DEBUG_BS
    assert saved(guest, exception(DB)).vmcs[F.GUEST_PENDING_DBG_EXCEPTIONS] == 0
    guest.vmcs[F.GUEST_IA32_DEBUGCTL] = DEBUG_BTF
    guest.vmcs[F.VM_EXIT_CONTROLS] &= ~vmx.VM_EXIT_SAVE_DEBUG_CONTROLS
    assert saved(guest, CPUID).vmcs[F.GUEST_PENDING_DBG_EXCEPTIONS] == 0


@pytest.mark.parametrize(
    "reason, kept",
    [
        (ExitReason.MONITOR_TRAP_FLAG, True),
        (ExitReason.TPR_BELOW_THRESHOLD, True),
        (ExitReason.INIT_SIGNAL, True),
        (ExitReason.CPUID, False),
        (ExitReason.EXTERNAL_INTERRUPT, False),
    ],
)
def test_pending_debug_exceptions_are_saved_by_exits_that_come_before_them(
    reason: ExitReason, kept: bool
) -> None:
    guest = loaded(Nested("64-bit", {F.GUEST_PENDING_DBG_EXCEPTIONS: vmx.PENDING_DEBUG_BS}))
    pending = vmx.PENDING_DEBUG_ENABLED_BREAKPOINT | 1
    saved(guest, NestedExit(reason), pending)
    assert guest.vmcs[F.GUEST_PENDING_DBG_EXCEPTIONS] == (pending if kept else 0)


VALID_PF = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_HARD_EXCEPTION | PF
VALID_INT = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_SOFT_INTR | 0x80
AS_IT_IS, SET, CLEAR = "as it is", "set", "clear"


@pytest.mark.parametrize(
    "record, expected",
    [
        (exception(PF), SET),
        (exception(GP), SET),
        (exception(DB), AS_IT_IS),
        (exception(NMI, vmx.INTR_TYPE_NMI_INTR), AS_IT_IS),
        (exception(BP, vmx.INTR_TYPE_SOFT_EXCEPTION), CLEAR),
        (exception(DB, vmx.INTR_TYPE_PRIV_SW_EXCEPTION), AS_IT_IS),
        (NestedExit(ExitReason.EXTERNAL_INTERRUPT), AS_IT_IS),
        (NestedExit(ExitReason.TRIPLE_FAULT), AS_IT_IS),
        (NestedExit(ExitReason.PREEMPTION_TIMER), AS_IT_IS),
        (NestedExit(ExitReason.MONITOR_TRAP_FLAG), AS_IT_IS),
        (NestedExit(ExitReason.EPT_VIOLATION), SET),
        (NestedExit(ExitReason.EPT_MISCONFIG), SET),
        (NestedExit(ExitReason.EPT_VIOLATION, idt_vectoring_information=VALID_PF), SET),
        (NestedExit(ExitReason.EPT_VIOLATION, idt_vectoring_information=VALID_INT), CLEAR),
        (NestedExit(ExitReason.TASK_SWITCH, idt_vectoring_information=VALID_PF), SET),
        (NestedExit(ExitReason.TASK_SWITCH), CLEAR),
        (CPUID, CLEAR),
        (NestedExit(ExitReason.IO_INSTRUCTION), CLEAR),
        (NestedExit(ExitReason.HLT), CLEAR),
    ],
)
def test_resume_flag_is_saved_as_the_exit_asks(record: NestedExit, expected: str) -> None:
    for before in (0, RFLAGS_RF):
        guest = loaded(Nested("64-bit", {F.GUEST_RFLAGS: RFLAGS_FIXED | before}))
        rf = saved(guest, record).vmcs[F.GUEST_RFLAGS] & RFLAGS_RF
        assert rf == {AS_IT_IS: before, SET: RFLAGS_RF, CLEAR: 0}[expected]


# ---------------------------------------------------------------------------------------------------- segments


def test_access_rights_are_loaded_without_their_reserved_bits() -> None:
    guest = loaded(Nested("64-bit", {F.GUEST_GS_AR_BYTES: 0xFFFF_FFFF}))
    assert guest.words[segment_word(GS, s.ATTRIBUTES)] == vmx.SEGMENT_AR_WRITABLE


def test_unusable_segments_have_bases_that_can_be_used() -> None:
    fields = {F.GUEST_ES_BASE: MASK64, F.GUEST_ES_AR_BYTES: AR_UNUSABLE, F.GUEST_LDTR_BASE: 1 << 63}
    words = loaded(Nested("64-bit", fields | {F.GUEST_LDTR_AR_BYTES: AR_UNUSABLE})).words
    assert words[segment_word(ES, s.BASE)] == 0xFFFF_FFFF
    assert words[segment_word(LDTR, s.BASE)] == 0


def test_bases_of_fs_and_gs_are_loaded_and_saved_without_a_segment() -> None:
    base = 0xFFFF_8880_0000_0000
    guest = loaded(Nested("64-bit", {F.GUEST_GS_BASE: base, F.GUEST_GS_AR_BYTES: AR_UNUSABLE}))
    assert guest.words[segment_word(GS, s.BASE)] == base
    assert saved(guest).vmcs[F.GUEST_GS_BASE] == base


def test_every_guest_field_but_those_of_the_vmcs_itself_is_loaded() -> None:
    """A field that is added later must not be forgotten here."""
    widths = {field_width(field) for field in PLAIN}
    assert widths == set(FieldWidth)
    for field in PLAIN:
        guest, other = (
            Nested("64-bit", {F.GUEST_LDTR_AR_BYTES: AR_LDT}).add({F.VM_ENTRY_CONTROLS: EVERYTHING_LOADED})
            for _ in range(2)
        )
        # Bit 4 exists in every one of them.
        other.vmcs[field] ^= 1 << 4
        assert loaded(guest).snapshot() != loaded(other).snapshot(), field.name
