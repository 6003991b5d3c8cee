"""What ENCLS, ENCLU and ENCLV check before they look at a leaf function; flags and RAX behind it."""

from __future__ import annotations

import pytest
from emulator_guest import KERNEL_CS32, USER_CODE
from sgx_guest import (
    CARRY,
    ENCLS,
    ENCLU,
    ENCLV,
    EPC,
    GENERAL_PROTECTION,
    NONE,
    USER_EPC,
    ZERO,
    Left,
    SgxGuest,
)

from lasskvm.emulator.faults import GuestFault
from lasskvm.sgx.epc import Epc
from lasskvm.state import CR0, CR4, EFER, RAX, RFLAGS, RIP, Segment
from lasskvm.x86.exceptions import DB, NM, UD
from lasskvm.x86.msr import (
    FEATURE_CONTROL_LOCK,
    FEATURE_CONTROL_SGX_ENABLE,
    MSR_IA32_FEATURE_CONTROL,
)
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_DATA,
    AR_EXPAND_DOWN,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR4_LASS,
    CR4_SMAP,
    CR4_SMEP,
    CS,
    DS,
    EFER_LMA,
    RFLAGS_TF,
    RFLAGS_VM,
)
from lasskvm.x86.sgx import SGX1_ENCLS_LEAVES, EnclsLeaf, SgxError

UNDEFINED = (UD, None, None)
FREE_PAGE = EPC
FLAT_LIMIT = 0xFFFFFFFF


def leave_ia32e_mode(guest: SgxGuest) -> None:
    """32-bit code without paging."""
    guest.words[CR0] &= ~CR0_PG
    guest.words[EFER] &= ~EFER_LMA
    guest.state.set_segment(CS, Segment(KERNEL_CS32, 0, FLAT_LIMIT, AR_CODE32))
    guest.state.set_segment(DS, Segment(0x10, 0, FLAT_LIMIT, AR_DATA))
    guest.words[RIP] = USER_CODE


def test_encls_is_undefined_at_cpl_3(guest: SgxGuest) -> None:
    guest.enter_user()
    assert guest.fault(EnclsLeaf.EPA, 3, FREE_PAGE) == UNDEFINED


def test_encls_is_undefined_without_the_feature() -> None:
    assert SgxGuest("max").fault(EnclsLeaf.EPA, 3, FREE_PAGE) == UNDEFINED


@pytest.mark.parametrize("code", (ENCLS, ENCLU))
def test_both_instructions_are_undefined_without_sgx1(code: str) -> None:
    guest = SgxGuest("max,+sgx,-sgx1")
    if code == ENCLU:
        guest.enter_user()
    assert guest.fault(EnclsLeaf.EPA, 3, FREE_PAGE, code=code) == UNDEFINED


def test_encls_is_undefined_where_nobody_virtualizes_sgx(guest: SgxGuest) -> None:
    guest.ctx.sgx = None
    assert guest.fault(EnclsLeaf.EPA, 3, FREE_PAGE) == UNDEFINED


@pytest.mark.parametrize("code", (ENCLS, ENCLU))
def test_both_are_undefined_in_real_and_virtual_8086_mode(guest: SgxGuest, code: str) -> None:
    leave_ia32e_mode(guest)
    guest.words[CR0] &= ~CR0_PE
    assert guest.fault(EnclsLeaf.EPA, 3, code=code) == UNDEFINED
    guest.words[CR0] |= CR0_PE
    guest.words[RFLAGS] |= RFLAGS_VM
    assert guest.fault(EnclsLeaf.EPA, 3, code=code) == UNDEFINED


@pytest.mark.parametrize("prefix", ("66", "f2", "f3", "f0"))
def test_forbidden_prefixes_make_encls_undefined(guest: SgxGuest, prefix: str) -> None:
    assert guest.fault(EnclsLeaf.EPA, 3, FREE_PAGE, code=prefix + ENCLS) == UNDEFINED


@pytest.mark.parametrize("prefix", ("67", "64", "48"))
def test_segment_address_size_and_rex_prefixes_are_ignored(guest: SgxGuest, prefix: str) -> None:
    left = guest.encls(EnclsLeaf.EREMOVE, rcx=FREE_PAGE, code=prefix + ENCLS)
    assert left == Left(0, NONE)


@pytest.mark.parametrize("value", (0, FEATURE_CONTROL_LOCK, FEATURE_CONTROL_SGX_ENABLE))
def test_encls_is_gp_until_firmware_has_enabled_sgx_and_locked_that(guest: SgxGuest, value: int) -> None:
    guest.ctx.msrs.values[MSR_IA32_FEATURE_CONTROL] = value
    assert guest.fault(EnclsLeaf.EPA, 3, FREE_PAGE) == GENERAL_PROTECTION


@pytest.mark.parametrize(
    "leaf",
    (EnclsLeaf.EAUG, EnclsLeaf.EMODPR, EnclsLeaf.EMODT, 0x10, 0x12, 0x3F, 0x40, 0x7FFFFFFF, 0xFFFFFFFF),
)
def test_leaf_functions_that_are_not_sgx1_are_gp(guest: SgxGuest, leaf: int) -> None:
    assert guest.fault(leaf, rcx=FREE_PAGE) == GENERAL_PROTECTION


def test_the_upper_half_of_rax_is_ignored(guest: SgxGuest) -> None:
    assert guest.encls(EnclsLeaf.EREMOVE | 0xDEAD << 32, rcx=FREE_PAGE) == Left(0, NONE)


def test_encls_is_gp_without_paging(guest: SgxGuest) -> None:
    leave_ia32e_mode(guest)
    assert guest.fault(EnclsLeaf.EREMOVE, rcx=0x1000) == GENERAL_PROTECTION


def test_outside_64_bit_mode_ds_must_not_expand_down(guest: SgxGuest) -> None:
    """Even where its limit lets the operand through."""
    guest.words[CR4] &= ~(CR4_LASS | CR4_SMAP | CR4_SMEP)
    guest.state.set_segment(CS, Segment(KERNEL_CS32, 0, FLAT_LIMIT, AR_CODE32))
    guest.words[RIP] = USER_CODE
    guest.map(USER_CODE, USER_CODE, 0)
    guest.state.set_segment(DS, Segment(0x10, 0, FLAT_LIMIT, AR_DATA))
    assert guest.encls(EnclsLeaf.EREMOVE, rcx=USER_EPC) == Left(0, NONE)
    guest.state.set_segment(DS, Segment(0x10, 0, 0xFFF, AR_DATA | AR_EXPAND_DOWN))
    assert guest.fault(EnclsLeaf.EREMOVE, rcx=USER_EPC) == GENERAL_PROTECTION


def test_all_leaf_functions_of_sgx1_exist(guest: SgxGuest) -> None:
    """With all operands misaligned, each is #GP(0) before anything else; those without operands do not exist."""
    for leaf in SGX1_ENCLS_LEAVES:
        assert guest.fault(leaf, EPC + 1, EPC + 1, EPC + 1) == GENERAL_PROTECTION


def test_an_error_sets_zf_and_success_clears_all_arithmetic_flags(guest: SgxGuest) -> None:
    assert guest.encls(EnclsLeaf.EBLOCK, rcx=FREE_PAGE) == Left(SgxError.PG_INVLD, ZERO)
    assert guest.encls(EnclsLeaf.EREMOVE, rcx=FREE_PAGE) == Left(0, NONE)


def test_eblock_tells_of_pages_that_it_does_not_block_by_cf(guest: SgxGuest) -> None:
    address = guest.version_array(2)
    assert guest.encls(EnclsLeaf.EBLOCK, rcx=address) == Left(SgxError.NOTBLOCKABLE, CARRY)


def test_a_single_step_trap_comes_behind_a_leaf_function(guest: SgxGuest) -> None:
    rip = guest.words[RIP]
    guest.words[RFLAGS] |= RFLAGS_TF
    with pytest.raises(GuestFault) as caught:
        guest.encls(EnclsLeaf.EREMOVE, rcx=FREE_PAGE)
    assert caught.value.vector == DB
    assert (guest.words[RIP], guest.words[RAX]) == (rip + 3, 0)


# ---------------------------------------------------------------------------------------------------- ENCLU, ENCLV


@pytest.mark.parametrize("leaf", (*range(10), 0xFFFFFFFF))
def test_no_leaf_function_of_enclu_works(guest: SgxGuest, leaf: int) -> None:
    guest.enter_user()
    assert guest.fault(leaf, code=ENCLU) == GENERAL_PROTECTION


def test_enclu_is_undefined_for_the_kernel(guest: SgxGuest) -> None:
    assert guest.fault(0, code=ENCLU) == UNDEFINED


def test_enclu_is_nm_with_cr0_ts_before_the_privilege_is_looked_at(guest: SgxGuest) -> None:
    guest.words[CR0] |= CR0_TS
    assert guest.fault(0, code=ENCLU) == (NM, None, None)


def test_enclv_is_undefined(guest: SgxGuest) -> None:
    assert guest.fault(0, code=ENCLV) == UNDEFINED


def test_the_epc_is_that_of_the_handler(guest: SgxGuest) -> None:
    assert isinstance(guest.encls_unit.epc, Epc)
    assert guest.encls_unit.epc is guest.epc
