"""CPU models: what the leaves of max and amd say beyond feature bits, and what belongs together."""

from __future__ import annotations

import pytest

from lasskvm.errors import CpuFeatureError
from lasskvm.x86.cpu_models import SUPPORTED, CpuModel, list_models, parse_cpu
from lasskvm.x86.cpuid import SIGNIFICANT_INDEX, CpuidTable, cr4_allowed
from lasskvm.x86.registers import CR4_LAM_SUP, CR4_LASS, CR4_OSXSAVE, CR4_PKE

EAX, EBX, ECX, EDX = range(4)
NOTHING = (0, 0, 0, 0)
INTEL_ONLY = {"vmx", "lass", "lam", "pks", "cldemote", "serialize", "sgx", "sgx1", "sgx_lc"}


def table(cpu: str) -> CpuidTable:
    return CpuidTable(parse_cpu(cpu).entries())


def text_of(*words: int) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


# ------------------------------------------------------------------------------------------------ what max offers


@pytest.mark.parametrize(
    "name",
    [
        "apic", "x2apic", "tsc_adjust", "tsc_deadline_timer", "arat", "xsave", "xsaveopt", "xgetbv1", "pku", "pcid",
        "umip", "fsgsbase", "rdtscp", "rdpid", "pdpe1gb", "nx", "kvmclock", "kvmclock2", "kvmclock_stable_bit",
        "kvm_nopiodelay",
    ],
)  # fmt: skip
@pytest.mark.parametrize("cpu", ["max", "amd"])
def test_every_model_offers(cpu: str, name: str) -> None:
    assert table(cpu).has(name)
    assert not table(f"{cpu},-{name}").has(name)


@pytest.mark.parametrize("name", ["xsavec", "xsaves", "avx", "kvm_steal_time", "kvm_pv_eoi", "kvm_asyncpf"])
def test_not_offered(name: str) -> None:
    assert not table("max").has(name)
    with pytest.raises(CpuFeatureError, match=f'"{name}" exists, but lasskvm does not virtualize it'):
        parse_cpu(f"max,+{name}")


@pytest.mark.parametrize(
    ("without", "gone"),
    [
        ("apic", {"x2apic", "arat", "tsc_deadline_timer"}),
        ("tsc", {"rdtscp", "tsc_adjust", "tsc_deadline_timer", "kvmclock", "kvmclock2"}),
        ("xsave", {"xsaveopt", "xgetbv1"}),
        ("sse", {"xsave", "xsaveopt"}),
        ("hypervisor", {"kvmclock", "kvmclock2", "kvmclock_stable_bit", "kvm_nopiodelay"}),
    ],
)
def test_what_goes_with_a_feature(without: str, gone: set[str]) -> None:
    assert gone <= parse_cpu("max").features
    assert not parse_cpu(f"max,-{without}").features & gone


@pytest.mark.parametrize(
    ("cpu", "sentence"),
    [
        ("max,-apic,+x2apic", '"x2apic" needs "apic"'),
        ("max,-tsc,+tsc_deadline_timer", '"tsc_deadline_timer" needs "tsc"'),
        ("max,-xsave,+xsaveopt", '"xsaveopt" needs "xsave"'),
        ("max,-lm,+lam", '"lam" needs "lm"'),
        ("max,-hypervisor,+kvmclock", '"kvmclock" needs "hypervisor"'),
    ],
)
def test_asking_for_a_feature_without_what_it_needs(cpu: str, sentence: str) -> None:
    with pytest.raises(CpuFeatureError, match=sentence):
        parse_cpu(cpu)


def test_protection_keys_do_without_xsave() -> None:
    assert table("max,-xsave").has("pku")


@pytest.mark.parametrize(("name", "bit"), [("xsave", CR4_OSXSAVE), ("pku", CR4_PKE)])
def test_max_allows_the_cr4_bit_of(name: str, bit: int) -> None:
    assert cr4_allowed(table("max")) & bit
    assert not cr4_allowed(table(f"max,-{name}")) & bit


def test_lam_on_request_allows_its_cr4_bit() -> None:
    assert not cr4_allowed(table("max")) & CR4_LAM_SUP
    assert cr4_allowed(table("max,+lam")) & CR4_LAM_SUP


# ---------------------------------------------------------------------------------------------------------- leaves


def test_leaf_0bh_has_one_thread_on_one_core_and_the_x2apic_id_of_leaf_1() -> None:
    cpuid = table("max")
    initial_apic_id = cpuid.lookup(1, 0)[EBX] >> 24
    assert cpuid.lookup(0xB, 0) == (0, 1, 0x100, initial_apic_id)
    assert cpuid.lookup(0xB, 1) == (0, 1, 0x201, initial_apic_id)
    assert cpuid.lookup(0xB, 2) == (0, 0, 2, initial_apic_id)


def test_without_x2apic_there_is_no_leaf_0bh() -> None:
    assert table("max,-x2apic").lookup(0xB, 0) == NOTHING


def test_leaf_0dh_describes_x87_sse_and_pkru() -> None:
    cpuid = table("max")
    assert cpuid.lookup(0xD, 0) == (0x203, 576, 2696, 0)
    assert cpuid.lookup(0xD, 1) == (0b101, 0, 0, 0)
    assert cpuid.lookup(0xD, 9) == (8, 2688, 0, 0)
    assert cpuid.lookup(0xD, 2) == cpuid.lookup(0xD, 8) == cpuid.lookup(0xD, 63) == NOTHING


def test_leaf_0dh_without_protection_keys() -> None:
    cpuid = table("max,-pku")
    assert cpuid.lookup(0xD, 0, xcr0=3) == (3, 576, 576, 0)
    assert cpuid.lookup(0xD, 9) == NOTHING


def test_without_xsave_there_is_no_leaf_0dh() -> None:
    assert table("max,-xsave").lookup(0xD, 0) == table("max,-xsave").lookup(0xD, 1) == NOTHING


def test_every_subleaf_of_leaf_0dh_is_an_entry_of_its_own() -> None:
    entries = [entry for entry in parse_cpu("max").entries() if entry.function in (0xB, 0xD)]
    assert [(entry.function, entry.index) for entry in entries] == [
        (0xB, 0), (0xB, 1), (0xD, 0), (0xD, 1), (0xD, 9),
    ]  # fmt: skip
    assert all(entry.flags == SIGNIFICANT_INDEX for entry in entries)


def test_the_crystal_is_the_1_ghz_clock_of_the_apic_timer() -> None:
    assert table("max").lookup(0x15, 0) == (1, 1, 1_000_000_000, 0)


# ------------------------------------------------------------------------------------------------- the hypervisor


@pytest.mark.parametrize("cpu", ["max", "amd"])
def test_the_hypervisor_is_kvm(cpu: str) -> None:
    maximum, ebx, ecx, edx = table(cpu).lookup(0x40000000, 0)
    assert maximum == 0x40000001
    assert text_of(ebx, ecx, edx) == b"KVMKVMKVM\0\0\0"
    assert table(cpu).lookup(0x40000001, 0) == (1 << 24 | 0b1011, 0, 0, 0)


def test_without_its_features_kvm_is_a_hypervisor_without_a_name() -> None:
    cpuid = table("max,-kvmclock,-kvmclock2,-kvm_nopiodelay,-kvmclock_stable_bit")
    assert cpuid.has("hypervisor")
    assert cpuid.lookup(0x40000000, 0) == NOTHING


def test_one_feature_is_enough_for_the_signature() -> None:
    cpuid = table("max,-kvmclock,-kvmclock2,-kvmclock_stable_bit")
    assert cpuid.lookup(0x40000000, 0)[EAX] == 0x40000001
    assert cpuid.lookup(0x40000001, 0) == (0b10, 0, 0, 0)


def test_without_a_hypervisor_the_range_is_out_of_range() -> None:
    bare = table("max,-hypervisor")
    assert bare.lookup(0x40000000, 0) == bare.lookup(0x40000001, 0) == bare.lookup(0x16, 0)
    assert table("amd,-hypervisor").lookup(0x40000000, 0) == NOTHING


# ------------------------------------------------------------------------------------------------------------ AMD


def test_amd_says_so() -> None:
    maximum, ebx, ecx, edx = table("amd").lookup(0, 0)
    assert text_of(ebx, edx, ecx) == b"AuthenticAMD"
    assert maximum == 0xD
    signature = table("amd").lookup(1, 0)[EAX]
    assert (signature >> 8 & 0xF) + (signature >> 20 & 0xFF) == 0x19


def test_amd_has_everything_that_max_has_but_what_is_intels() -> None:
    assert parse_cpu("max").features - parse_cpu("amd").features == {"vmx", "lass", "cldemote"}
    assert parse_cpu("amd").features < parse_cpu("max").features
    assert parse_cpu("amd").available == SUPPORTED - INTEL_ONLY
    assert parse_cpu("max").available == SUPPORTED


def test_amd_has_no_lass_to_set() -> None:
    assert not cr4_allowed(table("amd")) & CR4_LASS


@pytest.mark.parametrize("leaf", [2, 4, 0x15, 0x16])
def test_amd_lacks_the_leaves_of_intel(leaf: int) -> None:
    assert table("max").lookup(leaf, 0) != NOTHING
    assert table("amd").lookup(leaf, 0) == NOTHING


def test_amds_caches_are_those_of_max() -> None:
    _, _, l1_data, l1_instructions = table("amd").lookup(0x80000005, 0)
    assert [(word >> 24, word >> 16 & 0xFF, word & 0xFF) for word in (l1_data, l1_instructions)] == [
        (48, 12, 64), (32, 8, 64),
    ]  # fmt: skip
    l2 = table("amd").lookup(0x80000006, 0)[ECX]
    assert l2 >> 12 == table("max").lookup(0x80000006, 0)[ECX] >> 12
    assert l1_data >> 8 & 0xFF == l1_instructions >> 8 & 0xFF == l2 >> 8 & 0xF == 1


def test_amd_repeats_the_bits_of_leaf_1() -> None:
    repeated = 0x0183F3FF
    leaf1, extended = table("amd").lookup(1, 0)[EDX], table("amd").lookup(0x80000001, 0)[EDX]
    assert extended & repeated == leaf1 & repeated != 0
    assert table("max").lookup(0x80000001, 0)[EDX] & repeated == 0


def test_hygons_leaves_are_amds() -> None:
    hygon = CpuidTable(CpuModel("test", SUPPORTED - INTEL_ONLY, vendor="HygonGenuine").entries())
    assert hygon.lookup(0x80000005, 0) == table("amd").lookup(0x80000005, 0)


@pytest.mark.parametrize("name", sorted(INTEL_ONLY))
def test_what_is_intels_cannot_be_asked_of_amd(name: str) -> None:
    sentence = f'"{name}" is a feature of Intel\'s processors, which the CPU model "amd" is not; .* another model: max'
    with pytest.raises(CpuFeatureError, match=sentence):
        parse_cpu(f"amd,+{name}")
    assert parse_cpu(f"amd,-{name}").features == parse_cpu("amd").features - {name}


def test_the_models_and_their_order() -> None:
    assert [model.name for model in list_models()] == ["max", "amd"]
