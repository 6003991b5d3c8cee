"""Host state: what L1 finds at its VM-exit handler."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nested_guests import PDPT, PDPTES
from transition_guest import EXIT_HANDLER, GUEST_PAT, HOST_PAT, Nested

from lasskvm import state as s
from lasskvm.emulator.faults import TripleFault
from lasskvm.state import STATE_WORDS, Segment
from lasskvm.vmx.guest_state import load_guest_state
from lasskvm.vmx.host_state import VmxAborted, load_host_state
from lasskvm.x86 import vmx
from lasskvm.x86.msr import MSR_IA32_DEBUGCTL
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_CODE64,
    AR_DATA,
    AR_TSS64_BUSY,
    AR_UNUSABLE,
    CR0_CD,
    CR0_ET,
    CR0_NE,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_LASS,
    CR4_PAE,
    CR4_PCIDE,
    CR4_VMXE,
    CS,
    DS,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    ES,
    FS,
    GS,
    LDTR,
    RFLAGS_FIXED,
    SS,
    TR,
)
from lasskvm.x86.vmx import VmxAbort
from lasskvm.x86.vmx_fields import VmcsField as F

FLAT = 0xFFFF_FFFF
KERNEL_GS = 0xFFFF_8880_0000_0000
UNUSABLE = Segment(0, 0, 0, AR_UNUSABLE)

#: State words without a meaning.
UNUSED = {37, 38, 39, 89}
#: State words that L1 and L2 share: no VM exit changes them.
SHARED = {
    *(number for number in range(16) if number != s.RSP),
    s.CR2,
    s.CR8,
    *range(s.PDPTR0, s.PDPTR0 + 4),
    *range(s.DR0, s.DR6 + 1),
    s.PKRU,
    s.PKRS,
    *range(s.STAR, s.TSC_AUX + 1),
    *range(s.APIC_BASE, s.XCR0 + 1),
    *UNUSED,
    s.NMI_BLOCKED,
    s.MAXPHYADDR,
    s.CR4_ALLOWED,
    s.EFER_ALLOWED,
}
LOADED = [number for number in range(STATE_WORDS) if number not in SHARED]


def returned(guest: Nested) -> Nested:
    load_host_state(guest.ctx, guest.vmcs)
    return guest


def abort_of(guest: Nested) -> VmxAbort:
    with pytest.raises(VmxAborted) as caught:
        load_host_state(guest.ctx, guest.vmcs)
    assert isinstance(caught.value, TripleFault)
    return caught.value.indicator


def in_32bit_host(guest: Nested) -> Nested:
    """Let L1 be a 32-bit hypervisor, and the words those of an L2 outside IA-32e mode."""
    guest.words[s.EFER] = 0
    guest.vmcs[F.VM_EXIT_CONTROLS] &= ~vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE
    return guest.set({F.HOST_RIP: 0xC010_0000, F.HOST_CR4: CR4_VMXE})


# -------------------------------------------------------------------------------------------------------- registers


@settings(max_examples=50)
@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=STATE_WORDS, max_size=STATE_WORDS))
def test_nothing_of_the_guest_is_left_but_what_is_shared(junk: list[int]) -> None:
    guest = Nested()
    guest.add({F.VM_EXIT_CONTROLS: vmx.VM_EXIT_LOAD_IA32_PAT | vmx.VM_EXIT_LOAD_IA32_EFER})
    guest.vmcs[F.HOST_IA32_EFER] = EFER_LME | EFER_LMA
    returned(guest)
    expected = [guest.words[number] for number in LOADED]
    for number, value in enumerate(junk):
        guest.words[number] = value
    guest.words[s.CR0] = CR0_ET | CR0_PE
    returned(guest)
    assert [guest.words[number] for number in LOADED] == expected
    assert all(guest.words[number] == junk[number] for number in SHARED)


def test_l1_goes_on_at_its_handler_with_interrupts_off() -> None:
    guest = returned(Nested())
    words = guest.words
    assert words[s.RIP] == EXIT_HANDLER
    assert (words[s.RFLAGS], words[s.CPL], words[s.INTERRUPT_SHADOW]) == (RFLAGS_FIXED, 0, 0)
    assert words[s.TLB_FLUSH] == 1


def test_l1_is_awake_whatever_its_guest_was() -> None:
    guest = Nested()
    guest.ctx.halted = True
    assert not returned(guest).ctx.halted


def test_debug_registers_are_reset_but_for_dr6() -> None:
    guest = Nested()
    guest.words[s.DR7], guest.words[s.DR6] = 0x4FF, 0xFFFF_4FF1
    guest.ctx.msrs.values[MSR_IA32_DEBUGCTL] = 1
    words = returned(guest).words
    assert (words[s.DR7], words[s.DR6]) == (0x400, 0xFFFF_4FF1)
    assert guest.ctx.msrs.values[MSR_IA32_DEBUGCTL] == 0


def test_cache_control_bits_of_cr0_stay_as_they_are() -> None:
    guest = Nested().add({F.HOST_CR0: CR0_CD | CR0_NW})
    assert not returned(guest).words[s.CR0] & (CR0_CD | CR0_NW)
    guest.words[s.CR0] |= CR0_CD
    guest.vmcs[F.HOST_CR0] = CR0_PG | CR0_PE | CR0_NE
    assert returned(guest).words[s.CR0] == CR0_PG | CR0_PE | CR0_NE | CR0_ET | CR0_CD


def test_cr4_gets_pae_in_ia32e_mode_and_loses_pcide_outside() -> None:
    guest = Nested("64-bit", {F.HOST_CR4: CR4_VMXE | CR4_PCIDE | CR4_LASS})
    assert returned(guest).words[s.CR4] == CR4_VMXE | CR4_PCIDE | CR4_LASS | CR4_PAE
    guest = in_32bit_host(Nested("protected")).set({F.HOST_CR4: CR4_VMXE | CR4_PCIDE})
    assert returned(guest).words[s.CR4] == CR4_VMXE


def test_l1_gets_its_lass_back_and_not_that_of_its_guest() -> None:
    for l1, l2 in ((CR4_LASS, 0), (0, CR4_LASS)):
        guest = Nested()
        guest.vmcs[F.GUEST_CR4] = guest.vmcs[F.GUEST_CR4] & ~CR4_LASS | l2
        guest.vmcs[F.HOST_CR4] = guest.vmcs[F.HOST_CR4] & ~CR4_LASS | l1
        load_guest_state(guest.ctx, guest.vmcs)
        assert guest.words[s.CR4] & CR4_LASS == l2
        assert returned(guest).words[s.CR4] & CR4_LASS == l1


def test_efer_is_loaded_by_a_control_and_else_only_its_mode_bits() -> None:
    guest = Nested("64-bit", {F.HOST_IA32_EFER: EFER_LME | EFER_LMA | EFER_NXE})
    guest.words[s.EFER] = EFER_SCE
    assert returned(guest).words[s.EFER] == EFER_SCE | EFER_LME | EFER_LMA
    guest.add({F.VM_EXIT_CONTROLS: vmx.VM_EXIT_LOAD_IA32_EFER})
    assert returned(guest).words[s.EFER] == EFER_LME | EFER_LMA | EFER_NXE
    guest = in_32bit_host(Nested("protected"))
    guest.words[s.EFER] = EFER_LME | EFER_SCE
    assert returned(guest).words[s.EFER] == EFER_SCE


def test_pat_is_loaded_by_a_control() -> None:
    guest = Nested()
    guest.words[s.PAT] = GUEST_PAT
    assert returned(guest).words[s.PAT] == GUEST_PAT
    assert returned(guest.add({F.VM_EXIT_CONTROLS: vmx.VM_EXIT_LOAD_IA32_PAT})).words[s.PAT] == HOST_PAT


def test_sysenter_registers_and_table_bases_are_loaded() -> None:
    fields = {
        F.HOST_IA32_SYSENTER_CS: 0x10,
        F.HOST_IA32_SYSENTER_ESP: 0xFFFF_8000_0000_1000,
        F.HOST_IA32_SYSENTER_EIP: 0xFFFF_8000_0000_2000,
        F.HOST_GDTR_BASE: 0xFFFF_8000_0000_3000,
        F.HOST_IDTR_BASE: 0xFFFF_8000_0000_4000,
    }
    words = returned(Nested("64-bit", fields)).words
    loaded = [words[word] for word in (s.SYSENTER_CS, s.SYSENTER_ESP, s.SYSENTER_EIP, s.GDT_BASE, s.IDT_BASE)]
    assert loaded == list(fields.values())
    assert words[s.GDT_LIMIT] == words[s.IDT_LIMIT] == 0xFFFF


# --------------------------------------------------------------------------------------------------------- segments


def test_64bit_host_has_flat_segments_of_its_selectors() -> None:
    fields = {F.HOST_CS_SELECTOR: 0x10, F.HOST_SS_SELECTOR: 0x18, F.HOST_DS_SELECTOR: 0x20}
    state = returned(Nested("64-bit", fields | {F.HOST_TR_SELECTOR: 0x40, F.HOST_TR_BASE: KERNEL_GS})).state
    assert state.segment(CS) == Segment(0x10, 0, FLAT, AR_CODE64)
    assert state.segment(SS) == Segment(0x18, 0, FLAT, AR_DATA)
    assert state.segment(DS) == Segment(0x20, 0, FLAT, AR_DATA)
    assert state.segment(TR) == Segment(0x40, KERNEL_GS, 0x67, AR_TSS64_BUSY)
    assert state.segment(LDTR) == UNUSABLE


def test_32bit_host_has_32bit_code() -> None:
    assert returned(in_32bit_host(Nested("protected"))).state.segment(CS).attributes == AR_CODE32


def test_null_selectors_make_segments_unusable_and_keep_the_bases_of_fs_and_gs() -> None:
    fields = dict.fromkeys(
        (F.HOST_ES_SELECTOR, F.HOST_SS_SELECTOR, F.HOST_FS_SELECTOR, F.HOST_GS_SELECTOR), 0
    )
    state = returned(Nested("64-bit", fields | {F.HOST_GS_BASE: KERNEL_GS})).state
    assert state.segment(ES) == state.segment(SS) == state.segment(FS) == UNUSABLE
    assert state.segment(GS) == Segment(0, KERNEL_GS, 0, AR_UNUSABLE)
    state = returned(Nested("64-bit", {F.HOST_FS_SELECTOR: 0x28, F.HOST_FS_BASE: KERNEL_GS})).state
    assert state.segment(FS) == Segment(0x28, KERNEL_GS, FLAT, AR_DATA)


# ------------------------------------------------------------------------------------------------- PDPTEs and aborts


def test_32bit_host_with_pae_paging_gets_its_pdptes() -> None:
    guest = in_32bit_host(Nested("protected")).set({F.HOST_CR4: CR4_VMXE | CR4_PAE, F.HOST_CR3: PDPT})
    words = returned(guest).words
    assert tuple(words[s.PDPTR0 + number] for number in range(4)) == PDPTES


def test_wrong_pdptes_of_the_host_abort() -> None:
    guest = in_32bit_host(Nested("protected")).set({F.HOST_CR4: CR4_VMXE | CR4_PAE, F.HOST_CR3: PDPT})
    guest.memory.store(PDPT + 16, 8, 0x6003)
    assert abort_of(guest) is VmxAbort.HOST_PDPTE_FAIL


def test_guest_in_ia32e_mode_cannot_return_to_a_32bit_host() -> None:
    guest = in_32bit_host(Nested("protected"))
    guest.words[s.EFER] = EFER_LME | EFER_LMA
    before = guest.snapshot()
    assert abort_of(guest) is VmxAbort.HOST_ADDR_SPACE_SIZE
    assert guest.snapshot() == before
