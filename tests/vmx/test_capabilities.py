"""The VMX capability MSRs that a guest hypervisor reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasskvm.vmx.capabilities import ControlBits, FixedBits, VmxCapabilities
from lasskvm.vmx.vmcs import VMCS12_REVISION
from lasskvm.x86 import vmx
from lasskvm.x86.cpuid import FEATURES, CpuidEntry, CpuidTable, cr4_allowed, significant_index
from lasskvm.x86.registers import CR4_LASS, CR4_MCE, CR4_PAE, CR4_SMAP, CR4_SMEP, CR4_VMXE

ALL_CONTROLS = (1 << 32) - 1
#: CR4 bits with the features that they need, as KVM's ``nested_vmx_cr_fixed1_bits_update()`` pairs them.
CR4_FEATURES = {
    0: "vme", 1: "vme", 11: "umip", 12: "la57", 13: "vmx", 16: "fsgsbase", 17: "pcid", 18: "xsave", 20: "smep",
    21: "smap", 22: "pku", 24: "pks", 27: "lass", 28: "lam",
}  # fmt: skip


def table(*features: str) -> CpuidTable:
    leaves: dict[tuple[int, int], list[int]] = {}
    for name in ("vmx", *features):
        feature = FEATURES[name]
        registers = leaves.setdefault((feature.leaf, feature.subleaf), [0, 0, 0, 0])
        registers[feature.register] |= 1 << feature.bit
    return CpuidTable(
        CpuidEntry(leaf, subleaf, significant_index(leaf), *registers)
        for (leaf, subleaf), registers in leaves.items()
    )


def capabilities(*features: str) -> VmxCapabilities:
    cpuid = table(*features)
    return VmxCapabilities.of(cpuid, cr4_allowed(cpuid))


def msrs(*features: str) -> dict[int, int]:
    return capabilities(*features).msrs()


def test_there_is_a_register_for_each_index_from_480h_to_491h() -> None:
    assert sorted(msrs()) == [*range(0x480, 0x492)]


# ------------------------------------------------------------------------------------------------ fixed bits, LASS


def test_cr4_fixed1_has_lass_exactly_when_cpuid_has_it() -> None:
    assert msrs("lass")[0x489] & 1 << 27
    assert not msrs("smap", "smep", "lam")[0x489] & 1 << 27


@given(st.sets(st.sampled_from(sorted(set(CR4_FEATURES.values())))))
def test_cr4_fixed1_follows_the_guests_cpuid(features: set[str]) -> None:
    fixed1 = msrs(*features)[0x489]
    for bit, feature in CR4_FEATURES.items():
        assert fixed1 >> bit & 1 == (feature in features | {"vmx"}), feature


def test_fixed_bits_of_cr0_and_cr4() -> None:
    registers = msrs()
    assert registers[0x486] == 0x8000_0021
    assert registers[0x487] == 0xFFFF_FFFF
    assert registers[0x488] == 0x2000


def test_host_cr4_with_lass_is_right_only_with_lass() -> None:
    cr4 = CR4_VMXE | CR4_PAE | CR4_LASS | CR4_SMAP | CR4_SMEP
    assert capabilities("lass", "smap", "smep").cr4.allow(cr4)
    assert not capabilities("smap", "smep").cr4.allow(cr4)
    assert not capabilities("lass", "smap", "smep").cr4.allow(cr4 & ~CR4_VMXE)


def test_cr4_bits_without_a_feature_are_never_in_the_way() -> None:
    assert capabilities().cr4.allow(CR4_VMXE | CR4_MCE)


def test_unrestricted_guests_are_exempt_from_paging_and_protection() -> None:
    cr0 = FixedBits(0x8000_0021, 0xFFFF_FFFF)
    assert not cr0.allow(0x20)
    assert cr0.allow(0x20, exempt=0x8000_0001)
    assert not cr0.allow(0, exempt=0x8000_0001)
    assert not cr0.allow(1 << 32 | 0x8000_0021)


# -------------------------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize(
    ("old", "true", "must_old", "must_true"),
    [
        (0x481, 0x48D, 0x16, 0x16),
        (0x482, 0x48E, 0x0401E172, 0x04006172),
        (0x483, 0x48F, 0x00036DFF, 0x00036DFB),
        (0x484, 0x490, 0x000011FF, 0x000011FB),
    ],
)
def test_true_registers_free_the_controls_that_kvm_frees(
    old: int, true: int, must_old: int, must_true: int
) -> None:
    registers = msrs()
    assert registers[old] & ALL_CONTROLS == must_old
    assert registers[true] & ALL_CONTROLS == must_true
    assert registers[old] >> 32 == registers[true] >> 32


# Every control offered, by bit number, without the default1 class.
@pytest.mark.parametrize(
    ("index", "default1", "bits"),
    [
        (0x48D, 0x16, (0, 3, 5, 6)),
        (
            0x48E,
            0x0401E172,
            (2, 3, 7, 9, 10, 11, 12, 15, 16, 19, 20, 21, 22, 23, 24, 25, 27, 28, 29, 30, 31),
        ),
        (0x48F, 0x00036DFF, (2, 9, 15, 18, 19, 20, 21, 22)),
        (0x490, 0x000011FF, (2, 9, 14, 15)),
        (0x48B, 0, (1, 2, 5, 6, 7)),
    ],
)
def test_controls_offered(index: int, default1: int, bits: tuple[int, ...]) -> None:
    assert msrs()[index] >> 32 == default1 | sum({1 << bit for bit in bits if not default1 >> bit & 1})


@pytest.mark.parametrize(
    ("feature", "bit"),
    [
        ("rdtscp", 3),
        ("rdpid", 3),
        ("rdrand", 11),
        ("invpcid", 12),
        ("sgx", 15),
        ("rdseed", 16),
        ("xsaves", 20),
    ],
)
def test_control_of_an_instruction_is_offered_with_the_instruction(feature: str, bit: int) -> None:
    assert msrs(feature)[0x48B] ^ msrs()[0x48B] == 1 << 32 + bit


def test_secondary_controls_may_all_be_0() -> None:
    assert msrs()[0x48B] & ALL_CONTROLS == 0


def test_what_kvm_intel_needs_is_offered() -> None:
    """The controls without which Linux's module refuses to load on a 64-bit host."""
    offered = capabilities()
    assert not ~offered.pin_based.may_be_1 & (vmx.PIN_BASED_EXT_INTR_MASK | vmx.PIN_BASED_NMI_EXITING)
    needed = (
        vmx.CPU_BASED_HLT_EXITING | vmx.CPU_BASED_CR8_LOAD_EXITING | vmx.CPU_BASED_CR8_STORE_EXITING
        | vmx.CPU_BASED_CR3_LOAD_EXITING | vmx.CPU_BASED_CR3_STORE_EXITING | vmx.CPU_BASED_UNCOND_IO_EXITING
        | vmx.CPU_BASED_MOV_DR_EXITING | vmx.CPU_BASED_USE_TSC_OFFSETTING | vmx.CPU_BASED_MWAIT_EXITING
        | vmx.CPU_BASED_MONITOR_EXITING | vmx.CPU_BASED_INVLPG_EXITING | vmx.CPU_BASED_RDPMC_EXITING
        | vmx.CPU_BASED_INTR_WINDOW_EXITING
    )  # fmt: skip
    assert not ~offered.cpu_based.may_be_1 & needed
    needed = vmx.VM_EXIT_SAVE_DEBUG_CONTROLS | vmx.VM_EXIT_ACK_INTR_ON_EXIT | vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE
    assert not ~offered.vm_exit.may_be_1 & needed
    needed = vmx.VM_ENTRY_LOAD_DEBUG_CONTROLS | vmx.VM_ENTRY_IA32E_MODE
    assert not ~offered.vm_entry.may_be_1 & needed


@given(st.integers(0, ALL_CONTROLS), st.integers(0, ALL_CONTROLS), st.integers(0, ALL_CONTROLS))
def test_control_value_is_judged_bit_by_bit(must: int, may: int, value: int) -> None:
    expected = all(
        (value >> bit & 1 or not must >> bit & 1) and (may >> bit & 1 or not value >> bit & 1)
        for bit in range(32)
    )
    assert ControlBits(must, may).allow(value) == expected


# --------------------------------------------------------------------------------------------------- other registers


def test_basic_tells_revision_size_memory_type_and_true_controls() -> None:
    basic = msrs()[0x480]
    assert basic & 0xFFFF_FFFF == VMCS12_REVISION
    assert basic >> 32 & 0x1FFF == 4096
    assert basic >> 50 & 0xF == 6
    # No 32-bit limit, no SMM monitor; INS/OUTS information, true controls, error codes as software likes.
    assert [bit for bit in (48, 49, 54, 55, 56) if basic >> bit & 1] == [54, 55, 56]
    assert not basic >> 57


def test_misc_register() -> None:
    offered = capabilities()
    misc = offered.msrs()[0x485]
    assert misc & 0x1F == 5
    # LMA is stored, which unrestricted guests need; HLT is the only activity state.
    assert misc >> 5 & 0xF == 0b0011
    assert misc >> 16 & 0x1FF == offered.cr3_targets == 0
    assert misc >> 25 & 7 == 0
    assert offered.msr_list_entries == 512
    assert offered.vmwrite_any_field == bool(misc >> 29 & 1) is True
    assert not misc >> 30


def test_vmcs_enum_is_the_highest_field_index() -> None:
    assert msrs()[0x48A] == 0x17 << 1


def test_ept_and_vpid_capabilities() -> None:
    bits = [bit for bit in range(64) if msrs()[0x48C] >> bit & 1]
    assert bits == [0, 6, 8, 14, 16, 17, 20, 21, 25, 26, 32, 40, 41, 42, 43]


def test_there_are_no_vm_functions() -> None:
    assert msrs()[0x491] == 0
