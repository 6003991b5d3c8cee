"""CPUID: where features are, what a model offers, and how lookups answer."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasskvm.errors import CpuFeatureError
from lasskvm.x86.cpu_models import SUPPORTED, CpuModel, list_models, parse_cpu
from lasskvm.x86.cpuid import (
    FEATURE_WORDS,
    FEATURES,
    SIGNIFICANT_INDEX,
    CpuidEntry,
    CpuidTable,
    cr4_allowed,
    efer_allowed,
    feature_word,
)
from lasskvm.x86.registers import (
    CR4_FSGSBASE,
    CR4_LA57,
    CR4_LAM_SUP,
    CR4_LASS,
    CR4_MCE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PKE,
    CR4_PKS,
    CR4_SMAP,
    CR4_SMEP,
    CR4_UMIP,
    CR4_VMXE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
)

EAX, EBX, ECX, EDX = range(4)


def table(cpu: str) -> CpuidTable:
    return CpuidTable(parse_cpu(cpu).entries())


# Positions from the manual, written out where the table under test counts.
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("fpu", (1, 0, EDX, 0)),
        ("apic", (1, 0, EDX, 9)),
        ("sse2", (1, 0, EDX, 26)),
        ("pni", (1, 0, ECX, 0)),
        ("vmx", (1, 0, ECX, 5)),
        ("pcid", (1, 0, ECX, 17)),
        ("x2apic", (1, 0, ECX, 21)),
        ("tsc_deadline_timer", (1, 0, ECX, 24)),
        ("xsave", (1, 0, ECX, 26)),
        ("arat", (6, 0, EAX, 2)),
        ("tsc_adjust", (7, 0, EBX, 1)),
        ("xsaveopt", (0xD, 1, EAX, 0)),
        ("xgetbv1", (0xD, 1, EAX, 2)),
        ("kvmclock", (0x40000001, 0, EAX, 0)),
        ("kvm_nopiodelay", (0x40000001, 0, EAX, 1)),
        ("kvmclock2", (0x40000001, 0, EAX, 3)),
        ("kvm_steal_time", (0x40000001, 0, EAX, 5)),
        ("kvm_pv_unhalt", (0x40000001, 0, EAX, 7)),
        ("kvm_pv_ipi", (0x40000001, 0, EAX, 11)),
        ("kvm_msi_ext_dest_id", (0x40000001, 0, EAX, 15)),
        ("kvmclock_stable_bit", (0x40000001, 0, EAX, 24)),
        ("osxsave", (1, 0, ECX, 27)),
        ("avx", (1, 0, ECX, 28)),
        ("hypervisor", (1, 0, ECX, 31)),
        ("fsgsbase", (7, 0, EBX, 0)),
        ("sgx", (7, 0, EBX, 2)),
        ("smep", (7, 0, EBX, 7)),
        ("invpcid", (7, 0, EBX, 10)),
        ("adx", (7, 0, EBX, 19)),
        ("smap", (7, 0, EBX, 20)),
        ("umip", (7, 0, ECX, 2)),
        ("pku", (7, 0, ECX, 3)),
        ("ospke", (7, 0, ECX, 4)),
        ("shstk", (7, 0, ECX, 7)),
        ("la57", (7, 0, ECX, 16)),
        ("rdpid", (7, 0, ECX, 22)),
        ("sgx_lc", (7, 0, ECX, 30)),
        ("fsrm", (7, 0, EDX, 4)),
        ("ibt", (7, 0, EDX, 20)),
        ("spec_ctrl", (7, 0, EDX, 26)),
        ("arch_capabilities", (7, 0, EDX, 29)),
        ("lass", (7, 1, EAX, 6)),
        ("fred", (7, 1, EAX, 17)),
        ("lam", (7, 1, EAX, 26)),
        ("lahf_lm", (0x80000001, 0, ECX, 0)),
        ("syscall", (0x80000001, 0, EDX, 11)),
        ("nx", (0x80000001, 0, EDX, 20)),
        ("pdpe1gb", (0x80000001, 0, EDX, 26)),
        ("rdtscp", (0x80000001, 0, EDX, 27)),
        ("lm", (0x80000001, 0, EDX, 29)),
        ("nonstop_tsc", (0x80000007, 0, EDX, 8)),
        ("constant_tsc", (0x80000007, 0, EDX, 8)),
        ("3dnowprefetch", (0x80000001, 0, ECX, 8)),
        ("wbnoinvd", (0x80000008, 0, EBX, 9)),
        ("serialize", (7, 0, EDX, 14)),
        ("cldemote", (7, 0, ECX, 25)),
        ("pks", (7, 0, ECX, 31)),
    ],
)
def test_a_feature_is_where_the_manual_says(name: str, place: tuple[int, int, int, int]) -> None:
    assert tuple(FEATURES[name]) == place


def test_no_two_features_but_aliases_share_a_bit() -> None:
    names = set(FEATURES) - {"constant_tsc", "sse3"}
    assert len({FEATURES[name] for name in names}) == len(names)


def test_every_feature_bit_fits_its_register() -> None:
    assert all(0 <= feature.bit < 32 for feature in FEATURES.values())


# ----------------------------------------------------------------------------------------------------- models


#: Offered when asked for: they make a guest slower, or hardly any guest expects them.
ON_REQUEST = {"la57", "erms", "fsrm", "serialize", "pks", "lam", "sgx", "sgx1", "sgx_lc", "nonstop_tsc"}


def test_max_offers_lass_and_everything_supported_but_what_slows_a_guest_down() -> None:
    assert parse_cpu("max").features == SUPPORTED - ON_REQUEST
    assert table("max").has("lass")


def test_every_listed_model_parses_to_itself() -> None:
    for model in list_models():
        assert parse_cpu(model.name) == model


def test_a_model_shows_exactly_its_features() -> None:
    shown = {name for name in FEATURES if table("max").has(name)}
    assert shown - {"constant_tsc", "sse3"} == SUPPORTED - ON_REQUEST


@pytest.mark.parametrize("name", ["pcid", "invpcid", "umip", "fsgsbase", "rdpid"])
def test_max_offers_what_direct_execution_lacks(name: str) -> None:
    assert table("max").has(name)
    assert not table(f"max,-{name}").has(name)


@pytest.mark.parametrize("name", ["pks", "serialize", "lam"])
def test_offered_on_request(name: str) -> None:
    assert table(f"max,+{name}").has(name)


def test_features_of_64_bit_mode_go_with_it() -> None:
    assert not parse_cpu("max,-lm").features & {"lass", "pcid", "fsgsbase"}


def test_lass_can_be_hidden() -> None:
    without = table("max,-lass")
    assert not without.has("lass")
    assert without.has("smap")
    assert without.lookup(7, 1)[EAX] == 0


def test_the_last_word_on_a_feature_counts() -> None:
    assert table("max,-lass,+lass").has("lass")
    assert not table("max,+lass,-lass").has("lass")


def test_case_and_spaces_do_not_matter() -> None:
    assert parse_cpu(" MAX, -LASS ").features == parse_cpu("max,-lass").features


def test_five_level_paging_widens_linear_addresses() -> None:
    assert parse_cpu("max").linear_address_bits == 48
    assert parse_cpu("max,+la57").linear_address_bits == 57
    assert table("max,+la57").lookup(0x80000008, 0)[EAX] == 57 << 8 | 46


def test_both_names_of_the_invariant_tsc_are_one_feature() -> None:
    assert not table("max,-constant_tsc").has("nonstop_tsc")


def test_lass_without_smap_is_allowed() -> None:
    assert table("max,-smap").has("lass")


def test_taking_a_feature_away_takes_away_what_needs_it() -> None:
    features = parse_cpu("max,-sse").features
    assert not features & {"sse", "sse2", "pni", "ssse3", "sse4_1", "sse4_2", "aes", "pclmulqdq"}
    assert "lass" in features


def test_lass_goes_away_with_long_mode() -> None:
    assert not table("max,-lm").has("lass")


def test_asking_for_a_feature_without_what_it_needs_names_what_is_missing() -> None:
    with pytest.raises(CpuFeatureError, match=r'"lass" needs "lm"'):
        parse_cpu("max,-lm,+lass")


def test_an_unmet_need_is_found_through_several_features() -> None:
    with pytest.raises(CpuFeatureError, match=r'"lass" needs "lm"'):
        parse_cpu("max,-pae,+lass")


@pytest.mark.parametrize(
    ("cpu", "sentence"),
    [
        ("mx", r'no CPU model "mx"; did you mean "max"\?'),
        ("pentium", r'no CPU model "pentium"; choose from: max'),
        ("", r'no CPU model "".*max'),
        ("max,-las", r'no CPU feature "las"; did you mean "lass"\?'),
        ("max,+qqqqqqqq", r'no CPU feature "qqqqqqqq"; .*/proc/cpuinfo'),
        ("max,+avx", r'"avx" exists, but lasskvm does not virtualize it yet; leave it out'),
        ("max,lass", r'write "\+lass" or "-lass"'),
        ("max,", r"lacks a feature"),
        ("max,+", r"lacks a feature"),
    ],
)
def test_a_cpu_that_cannot_be_says_why_and_what_to_do(cpu: str, sentence: str) -> None:
    with pytest.raises(CpuFeatureError, match=sentence):
        parse_cpu(cpu)


def test_a_feature_that_is_not_there_anyway_can_be_taken_away() -> None:
    assert parse_cpu("max,-avx").features == parse_cpu("max").features


@given(st.text(max_size=20))
def test_any_text_is_a_model_or_a_cpu_feature_error(text: str) -> None:
    for cpu in (text, "max," + text, "max,-" + text):
        with contextlib.suppress(CpuFeatureError):
            assert parse_cpu(cpu).features <= SUPPORTED


# ----------------------------------------------------------------------------------------------------- leaves


def test_entries_are_sorted_and_unique() -> None:
    places = [(entry.function, entry.index) for entry in parse_cpu("max").entries()]
    assert places == sorted(set(places))


def test_leaf_7_is_by_subleaf() -> None:
    entries = {(entry.function, entry.index): entry for entry in parse_cpu("max").entries()}
    assert entries[7, 0].flags == entries[7, 1].flags == SIGNIFICANT_INDEX
    assert entries[1, 0].flags == 0
    assert entries[7, 0].eax == 1


def test_the_vendor_is_genuine_intel() -> None:
    _, ebx, ecx, edx = table("max").lookup(0, 0)
    assert b"".join(word.to_bytes(4, "little") for word in (ebx, edx, ecx)) == b"GenuineIntel"


def test_the_maximum_leaves_are_16h_and_80000008h() -> None:
    assert table("max").lookup(0, 0)[EAX] == 0x16
    assert table("max").lookup(0x80000000, 0)[EAX] == 0x80000008


def test_leaf_1_has_the_signature_and_an_8_quadword_clflush_line() -> None:
    eax, ebx, _, _ = table("max").lookup(1, 0)
    assert eax == 0x606A6
    assert ebx >> 8 & 0xFF == 8
    assert ebx >> 24 == 0


def test_the_brand_string() -> None:
    words = [word for leaf in (0x80000002, 0x80000003, 0x80000004) for word in table("max").lookup(leaf, 0)]
    assert b"".join(word.to_bytes(4, "little") for word in words).rstrip(b"\0") == b"lasskvm virtual CPU"


@pytest.mark.parametrize("tsc_khz", [1_000_000, 2_400_000, 3_693_061, 999_999, 1])
def test_leaf_15h_gives_the_exact_tsc_frequency(tsc_khz: int) -> None:
    model = CpuModel("test", SUPPORTED, tsc_khz=tsc_khz)
    denominator, numerator, crystal_hz, _ = CpuidTable(model.entries()).lookup(0x15, 0)
    assert crystal_hz == 1_000_000_000
    assert crystal_hz * numerator == tsc_khz * 1000 * denominator
    assert max(denominator, numerator) < 1 << 32


def test_leaf_80000008h_has_the_address_widths() -> None:
    model = CpuModel("test", SUPPORTED - {"la57"}, maxphyaddr=39)
    assert CpuidTable(model.entries()).lookup(0x80000008, 0)[EAX] == 48 << 8 | 39
    assert CpuidTable(model.entries()).maxphyaddr == 39


def test_without_the_address_size_leaf_there_are_36_physical_address_bits() -> None:
    assert CpuidTable([]).maxphyaddr == 36


def test_leaf_4_and_leaf_80000006h_agree_on_the_l2_cache() -> None:
    cpuid = table("max")
    sizes = {}
    for index in range(3):
        eax, ebx, ecx, _ = cpuid.lookup(4, index)
        sizes[eax & 0x1F] = ((ebx >> 22) + 1) * ((ebx & 0xFFF) + 1) * (ecx + 1)
    assert sizes == {1: 48 << 10, 2: 32 << 10, 3: 2 << 20}
    assert cpuid.lookup(0x80000006, 0)[ECX] >> 16 == sizes[3] >> 10
    assert cpuid.lookup(4, 3) == (0, 0, 0, 0)


# ---------------------------------------------------------------------------------------------------- lookups


def test_a_gap_within_a_range_returns_zeros() -> None:
    assert table("max").lookup(0x13, 0) == (0, 0, 0, 0)
    assert table("max").lookup(0x80000005, 0) == (0, 0, 0, 0)


def test_a_subleaf_that_does_not_exist_returns_zeros() -> None:
    assert table("max").lookup(7, 2) == (0, 0, 0, 0)


def test_a_leaf_without_subleaves_ignores_ecx() -> None:
    assert table("max").lookup(0, 77) == table("max").lookup(0, 0)


@pytest.mark.parametrize("leaf", [0x17, 0x1000, 0x3FFFFFFF, 0x80000009, 0xC0000000, 0xFFFFFFFF])
def test_a_leaf_out_of_range_returns_the_highest_basic_leaf(leaf: int) -> None:
    assert table("max").lookup(leaf, 0) == table("max").lookup(0x16, 0) == (1000, 1000, 100, 0)


def test_amd_processors_return_zeros_out_of_range() -> None:
    amd = table("amd")
    assert amd.lookup(0xE, 0) == amd.lookup(0x80000009, 0) == amd.lookup(0x40000002, 0) == (0, 0, 0, 0)
    assert amd.lookup(0xD, 0) != (0, 0, 0, 0)


def test_hypervisor_ranges_begin_every_100h() -> None:
    second_range = CpuidEntry(0x40000100, 0, 0, 0x40000101, 1, 2, 3)
    cpuid = CpuidTable([*parse_cpu("max").entries(), second_range])
    assert cpuid.lookup(0x40000100, 0) == (0x40000101, 1, 2, 3)
    assert cpuid.lookup(0x40000101, 0) == (0, 0, 0, 0)
    assert cpuid.lookup(0x40000102, 0) == cpuid.lookup(0x40000002, 0) == cpuid.lookup(0x16, 0)


def test_an_empty_table_returns_zeros() -> None:
    assert CpuidTable([]).lookup(0, 0) == CpuidTable([]).lookup(0x80000001, 5) == (0, 0, 0, 0)
    assert not CpuidTable([]).has("lass")


def test_an_absent_topology_level_returns_its_number_and_the_apic_id() -> None:
    level = CpuidEntry(0xB, 1, SIGNIFICANT_INDEX, 4, 2, 0x201, 0x15)
    cpuid = CpuidTable([CpuidEntry(0, 0, 0, 0x16, 0, 0, 0), level])
    assert cpuid.lookup(0xB, 1) == (4, 2, 0x201, 0x15)
    assert cpuid.lookup(0xB, 0x107) == (0, 0, 7, 0x15)


def test_of_two_entries_for_one_leaf_the_first_counts() -> None:
    cpuid = CpuidTable([CpuidEntry(1, 0, 0, 1, 0, 0, 0), CpuidEntry(1, 0, 0, 2, 0, 0, 0)])
    assert cpuid.lookup(1, 0)[EAX] == 1


def test_feature_words_are_empty_where_there_is_no_leaf() -> None:
    """A lookup out of range returns the highest basic leaf; that must not pass for features."""
    few = CpuidTable([CpuidEntry(0, 0, 0, 1, 0, 0, 0), CpuidEntry(1, 0, 0, 0x606A6, 0, 3, 5)])
    assert few.lookup(7, 0)[EAX] == 0x606A6
    assert [feature_word(few, place) for place in FEATURE_WORDS] == [5, 3, 0, 0, 0, 0, 0, 0]
    assert not few.has("smep")


def test_osxsave_follows_cr4() -> None:
    cpuid = table("max")
    assert cpuid.lookup(1, 0, osxsave=True)[ECX] ^ cpuid.lookup(1, 0)[ECX] == 1 << 27
    assert table("max,-xsave").lookup(1, 0, osxsave=True)[ECX] >> 27 & 1 == 0


def test_ospke_follows_cr4() -> None:
    cpuid = table("max")
    assert cpuid.lookup(7, 0, ospke=True)[ECX] ^ cpuid.lookup(7, 0)[ECX] == 1 << 4
    assert cpuid.lookup(7, 1, ospke=True) == cpuid.lookup(7, 1)


def test_the_apic_bit_follows_the_apic_base_register() -> None:
    cpuid = table("max")
    assert cpuid.lookup(1, 0)[EDX] ^ cpuid.lookup(1, 0, apic_enabled=False)[EDX] == 1 << 9
    assert table("max,-apic").lookup(1, 0)[EDX] >> 9 & 1 == 0


# The XSAVE area has 512 bytes of legacy region and 64 of header, then PKRU at 2688.
@pytest.mark.parametrize(("xcr0", "size"), [(0b1, 576), (0b11, 576), (0x201, 2696), (0x203, 2696)])
def test_the_size_of_the_xsave_area_follows_xcr0(xcr0: int, size: int) -> None:
    assert table("max").lookup(0xD, 0, xcr0=xcr0) == (0x203, size, 2696, 0)


def test_at_reset_xcr0_has_the_x87_state_only() -> None:
    assert table("max").lookup(0xD, 0)[EBX] == 576


COMPONENTS = [
    CpuidEntry(0xD, 0, SIGNIFICANT_INDEX, 7, 832, 832, 0),
    CpuidEntry(0xD, 2, SIGNIFICANT_INDEX, 256, 576, 0, 0),
    CpuidEntry(0xD, 5, SIGNIFICANT_INDEX, 60, 1088, 0, 0),
    CpuidEntry(0xD, 6, SIGNIFICANT_INDEX, 512, 1152, 2, 0),
]


@pytest.mark.parametrize(
    ("features", "xcr0", "size"),
    [(0b1, 0x67, 0), (0b10, 0x3, 576), (0b10, 0x7, 832), (0b10, 0x23, 636), (0b1000, 0x63, 1152)],
)
def test_the_size_of_the_compacted_format_follows_xcr0(features: int, xcr0: int, size: int) -> None:
    """Components follow one another, some of them aligned to 64 bytes; without XSAVEC and XSAVES it is 0."""
    cpuid = CpuidTable([*COMPONENTS, CpuidEntry(0xD, 1, SIGNIFICANT_INDEX, features, 0, 0, 0)])
    assert cpuid.lookup(0xD, 1, xcr0=xcr0)[EBX] == size
    assert cpuid.lookup(0xD, 0, xcr0=0x47)[EBX] == 1664


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_every_lookup_returns_four_32_bit_words(leaf: int, subleaf: int) -> None:
    words = table("max").lookup(leaf, subleaf)
    assert len(words) == 4
    assert all(0 <= word < 1 << 32 for word in words)


# ------------------------------------------------------------------------------------------ control registers


def test_cr4_lass_is_allowed_only_with_lass_in_cpuid() -> None:
    assert cr4_allowed(table("max")) & CR4_LASS
    assert cr4_allowed(table("max")) ^ cr4_allowed(table("max,-lass")) == CR4_LASS


@pytest.mark.parametrize(
    ("name", "bit"),
    [
        ("smep", CR4_SMEP),
        ("smap", CR4_SMAP),
        ("la57", CR4_LA57),
        ("pcid", CR4_PCIDE),
        ("vmx", CR4_VMXE),
        ("fsgsbase", CR4_FSGSBASE),
        ("xsave", CR4_OSXSAVE),
        ("lam", CR4_LAM_SUP),
        ("umip", CR4_UMIP),
        ("pku", CR4_PKE),
        ("pks", CR4_PKS),
    ],
)
def test_a_cr4_bit_is_allowed_exactly_with_its_feature(name: str, bit: int) -> None:
    with_feature = CpuidTable(CpuModel("test", SUPPORTED | {name}).entries())
    without = CpuidTable(CpuModel("test", SUPPORTED - {name}).entries())
    assert cr4_allowed(with_feature) ^ cr4_allowed(without) == bit


def test_bits_that_firmware_sets_unasked_are_always_allowed() -> None:
    always = CR4_PAE | CR4_MCE | CR4_OSFXSR | CR4_OSXMMEXCPT
    assert cr4_allowed(CpuidTable([])) & always == always


def test_cr4_bits_without_a_meaning_are_never_allowed() -> None:
    everything = CpuidTable(CpuModel("test", frozenset(FEATURES)).entries())
    assert cr4_allowed(everything) & (1 << 15 | 1 << 19 | 1 << 26 | ~((1 << 29) - 1)) == 0


def test_efer_bits_follow_their_features() -> None:
    assert efer_allowed(table("max")) == EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
    assert efer_allowed(table("max,-nx")) == EFER_SCE | EFER_LME | EFER_LMA
    assert efer_allowed(table("max,-lm")) == EFER_NXE
