"""CPUID leaf 12H, IA32_FEATURE_CONTROL and the launch-key MSRs of a guest with SGX."""

from __future__ import annotations

import hashlib

import pytest
from sgx_guest import EPC_GPA, EPC_PAGES, SgxGuest

from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.msrs import read_msr, write_msr
from lasskvm.errors import CpuFeatureError
from lasskvm.sgx.enumeration import Limits, with_epc
from lasskvm.sgx.epc import Epc
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.msr import (
    FEATURE_CONTROL_LOCK,
    FEATURE_CONTROL_SGX_LAUNCH_CONTROL,
    MSR_IA32_FEATURE_CONTROL,
    MSR_IA32_SGXLEPUBKEYHASH0,
    MSR_IA32_SGXLEPUBKEYHASH3,
)

LEAF = 0x12
HASH_MSRS = range(MSR_IA32_SGXLEPUBKEYHASH0, MSR_IA32_SGXLEPUBKEYHASH3 + 1)


def table(cpu: str, base: int = 0x1_8000_0000, size: int = 0x80_0000) -> CpuidTable:
    return CpuidTable(with_epc(parse_cpu(cpu).entries(), Epc(base, size)))


def test_there_are_the_leaf_functions_of_sgx1_and_no_others() -> None:
    assert table("max,+sgx").lookup(LEAF, 0) == (0b1, 0, 0, 36 << 8 | 31)


def test_attributes_are_debug_mode64bit_provisionkey_einittokenkey() -> None:
    eax, ebx, _, _ = table("max,+sgx").lookup(LEAF, 1)
    assert (eax, ebx) == (0x36, 0)


@pytest.mark.parametrize("cpu, xfrm", (("max,+sgx", 0x203), ("max,+sgx,-pku", 3), ("max,+sgx,-xsave", 3)))
def test_xfrm_can_be_what_xcr0_can(cpu: str, xfrm: int) -> None:
    assert table(cpu).lookup(LEAF, 1)[2:] == (xfrm, 0)


def test_the_epc_is_one_section_that_is_protected() -> None:
    assert table("max,+sgx").lookup(LEAF, 2) == (0x8000_0001, 1, 0x80_0001, 0)


def test_no_section_follows() -> None:
    assert table("max,+sgx").lookup(LEAF, 3) == (0, 0, 0, 0)


def test_without_sgx_the_entries_stay_as_they_are() -> None:
    entries = parse_cpu("max").entries()
    assert with_epc(entries, Epc(EPC_GPA, 0x1000)) == entries


def test_the_other_leaves_stay_as_they_are() -> None:
    before = parse_cpu("max,+sgx").entries()
    after = with_epc(before, Epc(EPC_GPA, 0x1000))
    assert [entry for entry in after if entry.function != LEAF] == [
        entry for entry in before if entry.function != LEAF
    ]


def test_entries_come_in_ascending_order() -> None:
    places = [
        (entry.function, entry.index) for entry in with_epc(parse_cpu("max,+sgx").entries(), Epc(0, 0x1000))
    ]
    assert places == sorted(set(places))


def test_sgx_is_off_unless_it_is_asked_for() -> None:
    assert not {"sgx", "sgx1", "sgx_lc"} & parse_cpu("max").features


@pytest.mark.parametrize("feature", ("sgx", "sgx1", "sgx_lc"))
def test_asking_for_one_asks_for_all_that_makes_it_useful(feature: str) -> None:
    assert parse_cpu(f"max,+{feature}").features >= {"sgx", "sgx1", "sgx_lc"}


def test_each_can_be_taken_away_again() -> None:
    assert parse_cpu("max,+sgx,-sgx_lc").features >= {"sgx", "sgx1"}
    assert not {"sgx1", "sgx_lc"} & parse_cpu("max,+sgx,-sgx1,-sgx_lc").features
    assert not {"sgx", "sgx1", "sgx_lc"} & parse_cpu("max,+sgx,-sgx").features


@pytest.mark.parametrize("feature", ("sgx1", "sgx_lc"))
def test_what_makes_sgx_useful_is_no_use_without_it(feature: str) -> None:
    with pytest.raises(CpuFeatureError, match=f'"{feature}" needs "sgx"'):
        parse_cpu(f"max,+{feature},-sgx")


def test_the_limits_are_those_of_cpuid() -> None:
    limits = Limits.of(table("max,+sgx"))
    assert (limits.attributes, limits.xfrm, limits.miscselect) == (0x36, 0x203, 0)
    assert (limits.enclave_size(False), limits.enclave_size(True)) == (1 << 31, 1 << 36)


def test_a_processor_without_the_leaf_allows_nothing() -> None:
    limits = Limits.of(CpuidTable(()))
    assert (limits.attributes, limits.xfrm, limits.miscselect) == (0, 3, 0)
    assert (limits.enclave_size(False), limits.enclave_size(True)) == (1, 1)


# ------------------------------------------------------------------------------------------------------------ MSRs


def refuses(guest: SgxGuest, index: int, value: int | None = None) -> bool:
    """Whether RDMSR, or WRMSR of *value*, is #GP(0)."""
    try:
        if value is None:
            read_msr(guest.ctx, index)
        else:
            write_msr(guest.ctx, index, value)
    except GuestFault:
        return True
    return False


@pytest.mark.parametrize(
    "cpu, value", (("max", 1), ("max,+sgx", 1 | 1 << 17 | 1 << 18), ("max,+sgx,-sgx_lc", 1 | 1 << 18))
)
def test_firmware_has_enabled_what_there_is_and_locked_it(cpu: str, value: int) -> None:
    guest = SgxGuest(f"{cpu},-vmx")
    assert read_msr(guest.ctx, MSR_IA32_FEATURE_CONTROL) == value
    assert refuses(guest, MSR_IA32_FEATURE_CONTROL, 0)


def test_at_reset_the_launch_key_is_intels() -> None:
    guest = SgxGuest()
    values = [read_msr(guest.ctx, index) for index in HASH_MSRS]
    digest = b"".join(value.to_bytes(8, "little") for value in values)
    assert digest.hex() == "acb77012053e05a63d413b8bbae8fb6c5d73b3f2996d91c43bbbf90959c0f8d4"


def test_with_launch_control_the_guest_chooses_the_key() -> None:
    guest = SgxGuest()
    digest = hashlib.sha256(b"my key").digest()
    for number, index in enumerate(HASH_MSRS):
        value = int.from_bytes(digest[8 * number : 8 * number + 8], "little")
        write_msr(guest.ctx, index, value)
        assert read_msr(guest.ctx, index) == value


def test_without_launch_control_the_msrs_are_not_there() -> None:
    for cpu in ("max", "max,+sgx,-sgx_lc"):
        guest = SgxGuest(cpu)
        assert all(refuses(guest, index) and refuses(guest, index, 0) for index in HASH_MSRS)


def test_a_key_that_firmware_has_locked_can_be_read_only() -> None:
    guest = SgxGuest()
    values = guest.ctx.msrs.values
    values[MSR_IA32_FEATURE_CONTROL] &= ~FEATURE_CONTROL_SGX_LAUNCH_CONTROL
    assert not refuses(guest, MSR_IA32_SGXLEPUBKEYHASH0)
    assert refuses(guest, MSR_IA32_SGXLEPUBKEYHASH0, 1)
    values[MSR_IA32_FEATURE_CONTROL] &= ~FEATURE_CONTROL_LOCK
    assert not refuses(guest, MSR_IA32_SGXLEPUBKEYHASH0, 1)


def test_the_vmm_writes_the_key_whatever_is_locked() -> None:
    guest = SgxGuest("max")
    write_msr(guest.ctx, MSR_IA32_SGXLEPUBKEYHASH0, 5, host_initiated=True)
    assert read_msr(guest.ctx, MSR_IA32_SGXLEPUBKEYHASH0, host_initiated=True) == 5


def test_the_tests_guest_enumerates_its_epc() -> None:
    eax, ebx, ecx, _ = SgxGuest().cpuid.lookup(LEAF, 2)
    assert (ebx << 32 | eax & ~0xFFF, ecx & ~0xFFF) == (EPC_GPA, EPC_PAGES << 12)
