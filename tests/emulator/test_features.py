"""Instructions of optional features, executed from their bytes: privilege, CR4 bits, operands."""

from __future__ import annotations

import pytest
from emulator_guest import CODE, MAPPED, UPPER, USER_CODE, Guest

from lasskvm.emulator.control import set_segment_base
from lasskvm.state import (
    BASE,
    CPL,
    CR0,
    CR4,
    EFER,
    KERNEL_GS_BASE,
    PKRS,
    PKRU,
    R9,
    RAX,
    RBP,
    RBX,
    RCX,
    RDX,
    RFLAGS,
    RIP,
    TLB_FLUSH,
    TSC_AUX,
    Segment,
    segment_word,
)
from lasskvm.x86 import msr
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import BR, GP, PF, PF_P, PF_PK, PF_U, PF_W, UD
from lasskvm.x86.exceptions import SS as STACK_FAULT
from lasskvm.x86.paging import PTE_KEY_SHIFT
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_DATA,
    CR0_PE,
    CR0_PG,
    CR4_FSGSBASE,
    CR4_LA57,
    CR4_PCIDE,
    CR4_PKE,
    CR4_TSD,
    CS,
    DS,
    FS,
    GS,
    MASK32,
    RFLAGS_AC,
    RFLAGS_TF,
    RFLAGS_VM,
)

DATA, USER_DATA = UPPER + 0x70000, 0x70000
FS_BASE, GS_BASE = segment_word(FS, BASE), segment_word(GS, BASE)
NOT_CANONICAL = 0x8000_0000_0000_0000
ONES = (1 << 64) - 1

# Of the form INVPCID type, [descriptor]
INVPCID_RCX_RAX = "660f388208"
INVPCID_RCX_RBP = "660f38824d00"
RDFSBASE_RAX, RDFSBASE_EAX, RDGSBASE_R9 = "f3480faec0", "f30faec0", "f3490faec9"
WRFSBASE_RAX, WRFSBASE_EAX, WRGSBASE_RAX = "f3480faed0", "f30faed0", "f3480faed8"
RDPID_RAX, RDPKRU, WRPKRU = "f30fc7f8", "0f01ee", "0f01ef"
SWAPGS, STAC, CLAC, SERIALIZE = "0f01f8", "0f01cb", "0f01ca", "0f01e8"
WRMSR, RDMSR = "0f30", "0f32"


def with_cpu(guest: Guest, cpu: str) -> Guest:
    guest.ctx.cpuid = CpuidTable(parse_cpu(cpu).entries())
    return guest


def enter_32_bit_code(guest: Guest) -> None:
    """Protected mode at CPL 0 without paging, flat segments."""
    guest.words[CR0], guest.words[EFER] = CR0_PE, 0
    guest.state.set_segment(CS, Segment(8, 0, MASK32, AR_CODE32))
    guest.state.set_segment(DS, Segment(16, 0, MASK32, AR_DATA))
    guest.words[RIP] = CODE & MAPPED - 1


# --------------------------------------------------------------------------------------------------- INVPCID


def set_descriptor(guest: Guest, pcid: int, address: int = 0, *, at: int = DATA) -> None:
    guest.store(at, 8, pcid)
    guest.store(at + 8, 8, address)
    guest.words[RAX] = at


@pytest.mark.parametrize("kind", range(4))
def test_invpcid_forgets_translations(guest: Guest, kind: int) -> None:
    guest.words[CR4] |= CR4_PCIDE
    set_descriptor(guest, 0x123, UPPER)
    guest.words[RCX] = kind
    guest.run(INVPCID_RCX_RAX)
    assert guest.words[TLB_FLUSH] == 1
    assert guest.words[RIP] == CODE + 5


@pytest.mark.parametrize("kind", [4, MASK32, 1 << 32, ONES])
def test_an_invpcid_type_beyond_3_is_a_general_protection(guest: Guest, kind: int) -> None:
    """In 64-bit mode all 64 bits of the register are the type."""
    set_descriptor(guest, 0)
    guest.words[RCX] = kind
    assert guest.fault_of(INVPCID_RCX_RAX) == (GP, 0)


def test_outside_64_bit_mode_the_type_has_32_bits(guest: Guest) -> None:
    enter_32_bit_code(guest)
    set_descriptor(guest, 0)
    guest.words[RAX], guest.words[RCX] = DATA & MAPPED - 1, 1 << 32
    guest.run(INVPCID_RCX_RAX)
    assert guest.words[TLB_FLUSH] == 1


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("bit", [12, 31, 63])
def test_reserved_bits_of_an_invpcid_descriptor(guest: Guest, kind: int, bit: int) -> None:
    guest.words[CR4] |= CR4_PCIDE
    set_descriptor(guest, 1 << bit)
    guest.words[RCX] = kind
    assert guest.fault_of(INVPCID_RCX_RAX) == (GP, 0)


@pytest.mark.parametrize(("kind", "allowed"), [(0, False), (1, False), (2, True), (3, True)])
def test_without_pcide_types_0_and_1_take_pcid_0_only(guest: Guest, kind: int, allowed: bool) -> None:
    set_descriptor(guest, 1)
    guest.words[RCX] = kind
    if allowed:
        guest.run(INVPCID_RCX_RAX)
        assert guest.words[TLB_FLUSH] == 1
    else:
        assert guest.fault_of(INVPCID_RCX_RAX) == (GP, 0)
        set_descriptor(guest, 0)
        guest.run(INVPCID_RCX_RAX)


@pytest.mark.parametrize(("kind", "allowed"), [(0, False), (1, True), (2, True), (3, True)])
def test_only_type_0_asks_for_a_canonical_address(guest: Guest, kind: int, allowed: bool) -> None:
    set_descriptor(guest, 0, NOT_CANONICAL)
    guest.words[RCX] = kind
    if allowed:
        guest.run(INVPCID_RCX_RAX)
    else:
        assert guest.fault_of(INVPCID_RCX_RAX) == (GP, 0)


def test_canonical_in_an_invpcid_descriptor_follows_la57(guest: Guest) -> None:
    set_descriptor(guest, 0, 1 << 55)
    guest.words[RCX] = 0
    assert guest.fault_of(INVPCID_RCX_RAX) == (GP, 0)
    enter_32_bit_code(guest)
    guest.words[RAX] = DATA & MAPPED - 1
    assert guest.fault_of(INVPCID_RCX_RAX) == (GP, 0)
    guest.words[CR4] |= CR4_LA57
    guest.run(INVPCID_RCX_RAX)


def test_the_address_in_an_invpcid_descriptor_is_not_subject_to_lass(guest: Guest) -> None:
    """It is only named; the page need not exist either."""
    set_descriptor(guest, 0, 0x7FFF_FFFF_F000)
    guest.words[RCX] = 0
    guest.run(INVPCID_RCX_RAX)
    assert guest.words[TLB_FLUSH] == 1


def test_the_invpcid_descriptor_itself_is_subject_to_lass(guest: Guest) -> None:
    set_descriptor(guest, 0, at=USER_DATA)
    guest.words[RCX] = 2
    assert guest.fault_of(INVPCID_RCX_RAX) == (GP, 0)
    guest.words[RBP] = USER_DATA
    assert guest.fault_of(INVPCID_RCX_RBP) == (STACK_FAULT, 0)
    guest.words[RFLAGS] |= RFLAGS_AC
    guest.run(INVPCID_RCX_RBP)


def test_an_invpcid_descriptor_that_is_not_there_is_a_page_fault(guest: Guest) -> None:
    """It is read for every type, and both pages of one that crosses a page end are needed."""
    guest.words[RAX], guest.words[RCX] = DATA + 0xFF8, 2
    guest.store(DATA + 0xFF8, 8, 0)
    guest.unmap(DATA + 0x1000)
    assert guest.fault_of(INVPCID_RCX_RAX) == (PF, 0)


def test_invpcid_is_privileged(user: Guest) -> None:
    set_descriptor(user, 0, at=USER_DATA)
    user.words[RCX] = 2
    assert user.fault_of(INVPCID_RCX_RAX) == (GP, 0)


def test_invpcid_in_virtual_8086_mode_is_a_general_protection(guest: Guest) -> None:
    enter_32_bit_code(guest)
    guest.words[CPL] = 3
    guest.words[RFLAGS] |= RFLAGS_VM
    guest.words[RIP] = 0x1000
    assert guest.fault_of(INVPCID_RCX_RAX) == (GP, 0)


# -------------------------------------------------------------------------------------------------- FSGSBASE


@pytest.mark.parametrize("cpl", [0, 3])
def test_bases_are_read_and_written_at_any_privilege_level(guest: Guest, cpl: int) -> None:
    words = guest.words
    if cpl:
        guest.enter_user()
    words[CR4] |= CR4_FSGSBASE
    words[FS_BASE], words[GS_BASE] = 0xFFFF_8000_1234_5678, 0x7000_0000_1000
    guest.run(RDFSBASE_RAX)
    guest.run(RDGSBASE_R9)
    assert (words[RAX], words[R9]) == (0xFFFF_8000_1234_5678, 0x7000_0000_1000)
    guest.run(WRGSBASE_RAX)
    assert words[GS_BASE] == 0xFFFF_8000_1234_5678
    assert words[FS_BASE] == 0xFFFF_8000_1234_5678
    words[RAX] = 0x1000
    guest.run(WRFSBASE_RAX)
    assert words[FS_BASE] == 0x1000


def test_32_bit_forms_use_the_lower_half(guest: Guest) -> None:
    words = guest.words
    words[CR4] |= CR4_FSGSBASE
    words[FS_BASE], words[RAX] = 0xFFFF_8000_1234_5678, ONES
    guest.run(RDFSBASE_EAX)
    assert words[RAX] == 0x1234_5678
    words[RAX] = NOT_CANONICAL | 0x9ABC_DEF0
    guest.run(WRFSBASE_EAX)
    assert words[FS_BASE] == 0x9ABC_DEF0


def test_a_base_has_to_be_canonical(guest: Guest) -> None:
    guest.words[CR4] |= CR4_FSGSBASE
    guest.words[RAX] = NOT_CANONICAL
    assert guest.fault_of(WRFSBASE_RAX) == (GP, 0)
    assert guest.fault_of(WRGSBASE_RAX) == (GP, 0)
    guest.words[RAX] = 1 << 55
    assert guest.fault_of(WRGSBASE_RAX) == (GP, 0)
    guest.words[CR4] |= CR4_LA57
    assert set_segment_base(guest.words, GS, 1 << 55) == 0
    assert guest.words[GS_BASE] == 1 << 55


def test_a_base_may_lie_on_the_other_side_of_the_split(user: Guest) -> None:
    """LASS judges accesses, not registers."""
    user.words[CR4] |= CR4_FSGSBASE
    user.words[RAX] = UPPER
    user.run(WRFSBASE_RAX)
    assert user.words[FS_BASE] == UPPER


@pytest.mark.parametrize("code", [RDFSBASE_RAX, RDGSBASE_R9, WRFSBASE_EAX, WRGSBASE_RAX])
def test_base_instructions_need_cr4_fsgsbase(guest: Guest, code: str) -> None:
    assert guest.fault_of(code) == (UD, None)


def test_base_instructions_do_not_exist_outside_64_bit_mode(guest: Guest) -> None:
    guest.words[CR4] |= CR4_FSGSBASE
    enter_32_bit_code(guest)
    assert guest.fault_of(RDFSBASE_EAX) == (UD, None)


def test_swapgs_exchanges_the_base_of_gs(guest: Guest) -> None:
    guest.words[GS_BASE], guest.words[KERNEL_GS_BASE] = 1, 2
    guest.run(SWAPGS)
    assert (guest.words[GS_BASE], guest.words[KERNEL_GS_BASE]) == (2, 1)


def test_swapgs_is_privileged_and_belongs_to_64_bit_mode(user: Guest) -> None:
    assert user.fault_of(SWAPGS) == (GP, 0)
    user.enter_kernel()
    enter_32_bit_code(user)
    assert user.fault_of(SWAPGS) == (UD, None)


# ------------------------------------------------------------------------------------- RDPID, protection keys


def test_rdpid_reads_tsc_aux_at_any_privilege_level(user: Guest) -> None:
    user.words[CR4] |= CR4_TSD
    user.words[TSC_AUX], user.words[RAX] = 0x1002, ONES
    user.run(RDPID_RAX)
    assert user.words[RAX] == 0x1002


def protection_keys(guest: Guest) -> Guest:
    guest.words[CR4] |= CR4_PKE
    guest.words[RAX] = guest.words[RCX] = guest.words[RDX] = 0
    return with_cpu(guest, "max,+pku")


def test_pkru_is_written_and_read(user: Guest) -> None:
    protection_keys(user)
    user.words[RAX] = 0xABCD_0000_5555_4444
    user.words[RCX] = user.words[RDX] = 0xFFFF_FFFF_0000_0000
    user.run(WRPKRU)
    assert user.words[PKRU] == 0x5555_4444
    user.words[RDX] = ONES
    user.run(RDPKRU)
    assert (user.words[RAX], user.words[RDX]) == (0x5555_4444, 0)


def test_only_a_change_of_pkru_forgets_translations(user: Guest) -> None:
    protection_keys(user)
    user.run(WRPKRU)
    assert user.words[TLB_FLUSH] == 0
    user.words[RAX] = 4
    user.run(WRPKRU)
    assert user.words[TLB_FLUSH] == 1


def test_pkru_instructions_want_zeros(user: Guest) -> None:
    protection_keys(user)
    user.words[RDX] = 1
    assert user.fault_of(WRPKRU) == (GP, 0)
    user.run(RDPKRU)
    user.words[RDX], user.words[RCX] = 0, 1
    assert user.fault_of(WRPKRU) == (GP, 0)
    assert user.fault_of(RDPKRU) == (GP, 0)


@pytest.mark.parametrize("code", [RDPKRU, WRPKRU])
def test_pkru_instructions_need_cr4_pke(user: Guest, code: str) -> None:
    protection_keys(user).words[CR4] &= ~CR4_PKE
    user.words[RCX] = 1
    assert user.fault_of(code) == (UD, None)


def test_protection_keys_stop_emulated_data_accesses_but_no_fetch(user: Guest) -> None:
    protection_keys(user)
    for page in (USER_DATA, USER_CODE):
        entry = user.page_entry(page)
        user.memory.store(entry, 8, user.memory.load(entry, 8) | 3 << PTE_KEY_SHIFT)
    user.words[PKRU] = 1 << 2 * 3
    user.words[RAX] = USER_DATA
    assert user.fault_of("0f0100") == (PF, PF_P | PF_U | PF_W | PF_PK)  # sgdt [rax]
    assert user.fault_of("0fae38") == (PF, PF_P | PF_U | PF_PK)  # clflush [rax]
    user.words[PKRU] = 2 << 2 * 3
    user.run("0fae38")
    assert user.fault_of("0f0100") == (PF, PF_P | PF_U | PF_W | PF_PK)


def test_pkrs_is_a_32_bit_register_of_processors_with_pks(guest: Guest) -> None:
    guest.words[RCX], guest.words[RAX], guest.words[RDX] = msr.MSR_IA32_PKRS, 0x1234_5678, 0
    assert guest.fault_of(WRMSR) == (GP, 0)
    assert guest.fault_of(RDMSR) == (GP, 0)
    guest.ctx.msrs.cpuid = with_cpu(guest, "max,+pks").ctx.cpuid
    guest.run(WRMSR)
    assert guest.words[PKRS] == 0x1234_5678
    assert guest.words[TLB_FLUSH] == 1
    guest.words[RAX] = 0
    guest.run(RDMSR)
    assert guest.words[RAX] == 0x1234_5678
    guest.words[RDX] = 1
    assert guest.fault_of(WRMSR) == (GP, 0)


# ---------------------------------------------------------------------------------------- SMAP, and all the rest


def test_stac_and_clac_switch_ac(guest: Guest) -> None:
    guest.run(STAC)
    assert guest.words[RFLAGS] & RFLAGS_AC
    guest.run(CLAC)
    assert not guest.words[RFLAGS] & RFLAGS_AC


@pytest.mark.parametrize("code", [STAC, CLAC])
def test_stac_and_clac_are_undefined_for_users_and_without_smap(user: Guest, code: str) -> None:
    assert user.fault_of(code) == (UD, None)
    user.enter_kernel()
    with_cpu(user, "max,-smap")
    assert user.fault_of(code) == (UD, None)


def test_a_single_stepped_stac_traps_behind_it(guest: Guest) -> None:
    guest.words[RFLAGS] |= RFLAGS_TF
    guest.write_code(bytes.fromhex(STAC))
    with pytest.raises(Exception, match="#DB"):
        guest.run(STAC)
    assert guest.words[RIP] == CODE + 3
    assert guest.words[RFLAGS] & RFLAGS_AC


def test_serialize_does_nothing_where_it_is_offered(user: Guest) -> None:
    assert user.fault_of(SERIALIZE) == (UD, None)
    with_cpu(user, "max,+serialize").run(SERIALIZE)
    assert user.words[RIP] == USER_CODE + 3


@pytest.mark.parametrize("code", ["0fff00", "0fb900", "0f0b", "0faa"], ids=["ud0", "ud1", "ud2", "rsm"])
@pytest.mark.parametrize("cpl", [0, 3])
def test_undefined_instructions_do_not_touch_their_operands(guest: Guest, code: str, cpl: int) -> None:
    if cpl:
        guest.enter_user()
    guest.words[RAX] = NOT_CANONICAL
    assert guest.fault_of(code) == (UD, None)


@pytest.mark.parametrize("code", ["0f01c1", "0f01d9", "0f01c2", "0f01d8", "0f37", "0f01cf", "0f01d7"])
def test_hypercalls_virtualization_smx_and_sgx_are_undefined(guest: Guest, code: str) -> None:
    assert guest.fault_of(code) == (UD, None)


@pytest.mark.parametrize("code", ["0f09", "f30f09"], ids=["wbinvd", "wbnoinvd"])
def test_write_back_instructions_are_privileged(guest: Guest, code: str) -> None:
    guest.run(code)
    guest.enter_user()
    assert guest.fault_of(code) == (GP, 0)


# ----------------------------------------------------------------------------------------------------- BOUND


@pytest.mark.parametrize(
    ("index", "inside"), [(-5 & MASK32, True), (7, True), (0, True), (-6 & MASK32, False), (8, False)]
)
def test_bound_compares_with_signs(guest: Guest, index: int, inside: bool) -> None:
    enter_32_bit_code(guest)
    at = DATA & MAPPED - 1
    guest.store(at, 4, -5 & MASK32)
    guest.store(at + 4, 4, 7)
    guest.words[RAX], guest.words[RBX] = index, at
    if inside:
        guest.run("6203")
        assert guest.words[RIP] == (CODE & MAPPED - 1) + 2
    else:
        assert guest.fault_of("6203") == (BR, None)


def test_bound_has_a_16_bit_form(guest: Guest) -> None:
    enter_32_bit_code(guest)
    at = DATA & MAPPED - 1
    guest.store(at, 4, 0x0010_FFFF)
    guest.words[RBX] = at
    guest.words[RAX] = 0xABCD_0010
    guest.run("666203")
    guest.words[RAX] = 0xABCD_0011
    assert guest.fault_of("666203") == (BR, None)


def test_compatibility_mode_can_read_pkru(guest: Guest) -> None:
    protection_keys(guest)
    guest.state.set_segment(CS, Segment(8, 0, MASK32, AR_CODE32))
    guest.words[CR0] |= CR0_PG
    guest.words[RIP] = USER_CODE
    guest.words[CPL] = 3
    guest.words[PKRU] = 0x1234
    guest.run(RDPKRU)
    assert guest.words[RAX] == 0x1234
