"""VM entries that fail for their controls or their host state."""

from __future__ import annotations

import mmap
from dataclasses import replace
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lasskvm.memory import PAGE_SIZE, GuestMemory
from lasskvm.state import CR4_ALLOWED, EFER, EFER_ALLOWED, MAXPHYADDR, VcpuState
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.entry_checks import check_controls_and_host_state, secondary_controls
from lasskvm.vmx.vmcs import Vmcs12, VmFailValid
from lasskvm.x86 import vmx
from lasskvm.x86.cpuid import FEATURES, CpuidEntry, CpuidTable, cr4_allowed, efer_allowed, significant_index
from lasskvm.x86.exceptions import BP, DF, GP, NMI, PF, UD
from lasskvm.x86.registers import (
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR3_LAM_U57,
    CR4_LA57,
    CR4_LASS,
    CR4_PAE,
    CR4_PCIDE,
    CR4_SMAP,
    CR4_VMXE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
)
from lasskvm.x86.vmx_fields import VmcsField as F

CONTROL, HOST = 7, 8
MAXIMUM = 1 << 46
VIRTUAL_APIC = 0x5000
KERNEL = 0xFFFF_FFFF_8000_0000
#: Canonical with 57 bits, and not with 48.
FIVE_LEVEL_ADDRESS = 0xFF00_0000_0000_0000
PAT = 0x0007_0406_0007_0406
EPTP = 0x8000 | vmx.VMX_EPTP_AD_ENABLE_BIT | vmx.VMX_EPTP_PWL_4 | vmx.MEMORY_TYPE_WB
FEATURES_OF_L1 = (
    "vmx", "lm", "nx", "syscall", "pae", "pcid", "smap", "lass", "lam", "rdtscp", "invpcid"
)  # fmt: skip


class Entry:
    """A VM entry of a 64-bit L1 that succeeds, to be spoilt."""

    def __init__(self, *features: str) -> None:
        leaves: dict[tuple[int, int], list[int]] = {}
        for name in features or FEATURES_OF_L1:
            feature = FEATURES[name]
            registers = leaves.setdefault((feature.leaf, feature.subleaf), [0, 0, 0, 0])
            registers[feature.register] |= 1 << feature.bit
        cpuid = CpuidTable(
            CpuidEntry(*place, significant_index(place[0]), *registers) for place, registers in leaves.items()
        )
        self.words = VcpuState().words
        self.words[MAXPHYADDR] = 46
        self.words[CR4_ALLOWED], self.words[EFER_ALLOWED] = cr4_allowed(cpuid), efer_allowed(cpuid)
        self.words[EFER] = EFER_SCE | EFER_LME | EFER_LMA
        self.capabilities = VmxCapabilities.of(cpuid, self.words[CR4_ALLOWED])
        self.memory = GuestMemory()
        self.memory.set_slot(0, 0, mmap.mmap(-1, 0x10000))
        self.vmcs = Vmcs12()
        self.set(
            {
                F.PIN_BASED_VM_EXEC_CONTROL: self.capabilities.pin_based.must_be_1,
                F.CPU_BASED_VM_EXEC_CONTROL: self.capabilities.cpu_based.must_be_1,
                F.VM_EXIT_CONTROLS: self.capabilities.vm_exit.must_be_1 | vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE,
                F.VM_ENTRY_CONTROLS: self.capabilities.vm_entry.must_be_1 | vmx.VM_ENTRY_IA32E_MODE,
                F.GUEST_CR0: CR0_PG | CR0_PE,
                F.HOST_CR0: CR0_PG | CR0_NE | CR0_WP | CR0_PE,
                F.HOST_CR3: 0x1000,
                F.HOST_CR4: CR4_PAE | CR4_VMXE,
                F.HOST_CS_SELECTOR: 0x10,
                F.HOST_TR_SELECTOR: 0x40,
                F.HOST_RIP: KERNEL,
                F.HOST_GDTR_BASE: KERNEL,
            }
        )

    def set(self, values: dict[F, int]) -> Entry:
        for key, value in values.items():
            self.vmcs[key] = value
        return self

    def add(self, controls: dict[F, int]) -> Entry:
        """Set more bits of fields."""
        return self.set({key: self.vmcs[key] | bits for key, bits in controls.items()})

    def secondary(self, controls: int) -> Entry:
        self.add({F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_ACTIVATE_SECONDARY_CONTROLS})
        return self.set({F.SECONDARY_VM_EXEC_CONTROL: controls})

    def outside_ia32e_mode(self) -> Entry:
        """The same for a 32-bit L1."""
        self.words[EFER] = 0
        self.vmcs[F.VM_EXIT_CONTROLS] &= ~vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE
        self.vmcs[F.VM_ENTRY_CONTROLS] &= ~vmx.VM_ENTRY_IA32E_MODE
        return self.set({F.HOST_RIP: 0xC010_0000, F.HOST_SS_SELECTOR: 0x18, F.HOST_GDTR_BASE: 0xC020_0000})

    def inject(self, kind: int, vector: int, *, error_code: int | None = None, length: int = 0) -> Entry:
        information = vmx.INTR_INFO_VALID_MASK | kind | vector
        if error_code is not None:
            information |= vmx.INTR_INFO_DELIVER_CODE_MASK
        return self.set(
            {
                F.VM_ENTRY_INTR_INFO_FIELD: information,
                F.VM_ENTRY_EXCEPTION_ERROR_CODE: error_code or 0,
                F.VM_ENTRY_INSTRUCTION_LEN: length,
            }
        )

    @property
    def error(self) -> int | None:
        """The VM-instruction error, or None when the checks pass."""
        try:
            check_controls_and_host_state(self.vmcs, self.capabilities, self.memory, self.words)
        except VmFailValid as failure:
            return failure.error
        return None


def test_well_formed_entry_passes() -> None:
    assert Entry().error is None
    assert Entry().outside_ia32e_mode().error is None


# ------------------------------------------------------------------------------------------------ execution controls


@pytest.mark.parametrize(
    ("field", "bit"),
    [
        (F.PIN_BASED_VM_EXEC_CONTROL, 7),  # posted interrupts
        (F.CPU_BASED_VM_EXEC_CONTROL, 17),  # tertiary controls
        (F.VM_EXIT_CONTROLS, 12),  # load IA32_PERF_GLOBAL_CTRL
        (F.VM_ENTRY_CONTROLS, 10),  # entry to SMM
    ],
)
def test_controls_that_are_not_offered_are_refused(field: F, bit: int) -> None:
    assert Entry().add({field: 1 << bit}).error == CONTROL


@pytest.mark.parametrize(
    "field",
    [
        F.PIN_BASED_VM_EXEC_CONTROL,
        F.CPU_BASED_VM_EXEC_CONTROL,
        F.VM_EXIT_CONTROLS,
        F.VM_ENTRY_CONTROLS,
    ],
)
def test_controls_that_must_be_1_are_missed(field: F) -> None:
    entry = Entry()
    lowest = entry.vmcs[field] & -entry.vmcs[field]
    assert entry.set({field: entry.vmcs[field] & ~lowest}).error == CONTROL


def test_secondary_controls_count_only_when_they_are_activated() -> None:
    entry = Entry().set({F.SECONDARY_VM_EXEC_CONTROL: (1 << 32) - 1})
    assert entry.error is None
    assert secondary_controls(entry.vmcs) == 0
    vm_functions = 1 << 13
    assert Entry().secondary(vm_functions).error == CONTROL
    assert secondary_controls(Entry().secondary(vm_functions).vmcs) == vm_functions


def test_there_are_no_cr3_targets() -> None:
    assert Entry().set({F.CR3_TARGET_COUNT: 1}).error == CONTROL


@pytest.mark.parametrize(
    ("control", "field"),
    [
        (vmx.CPU_BASED_USE_IO_BITMAPS, F.IO_BITMAP_A),
        (vmx.CPU_BASED_USE_IO_BITMAPS, F.IO_BITMAP_B),
        (vmx.CPU_BASED_USE_MSR_BITMAPS, F.MSR_BITMAP),
        (vmx.CPU_BASED_TPR_SHADOW, F.VIRTUAL_APIC_PAGE_ADDR),
    ],
)
def test_structures_are_pages_of_physical_memory(control: int, field: F) -> None:
    for address, error in ((0x6000, None), (0x6800, CONTROL), (MAXIMUM, CONTROL), (MAXIMUM - 0x1000, None)):
        assert Entry().set({field: address}).error is None
        entry = Entry().add({F.CPU_BASED_VM_EXEC_CONTROL: control})
        assert entry.set({field: address}).error == error


def test_tpr_threshold_is_at_most_the_class_of_the_virtual_tpr() -> None:
    entry = Entry().add({F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_TPR_SHADOW})
    entry.memory.store(VIRTUAL_APIC + 0x80, 1, 0x4F)
    entry.set({F.VIRTUAL_APIC_PAGE_ADDR: VIRTUAL_APIC, F.TPR_THRESHOLD: 4})
    assert entry.error is None
    assert entry.set({F.TPR_THRESHOLD: 5}).error == CONTROL
    assert entry.set({F.TPR_THRESHOLD: 0x10}).error == CONTROL


def test_virtual_nmis_need_nmi_exiting_and_the_nmi_window_needs_virtual_nmis() -> None:
    window = {F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_NMI_WINDOW_EXITING}
    both = vmx.PIN_BASED_NMI_EXITING | vmx.PIN_BASED_VIRTUAL_NMIS
    assert Entry().add({F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VIRTUAL_NMIS}).error == CONTROL
    assert Entry().add({F.PIN_BASED_VM_EXEC_CONTROL: both}).error is None
    assert Entry().add({F.PIN_BASED_VM_EXEC_CONTROL: both}).add(window).error is None
    assert Entry().add(window).error == CONTROL


def test_vpid_0_is_the_hosts() -> None:
    entry = Entry().secondary(vmx.SECONDARY_EXEC_ENABLE_VPID)
    assert entry.error == CONTROL
    assert entry.set({F.VIRTUAL_PROCESSOR_ID: 1}).error is None


def test_unrestricted_guest_needs_ept() -> None:
    unrestricted = vmx.SECONDARY_EXEC_UNRESTRICTED_GUEST
    assert Entry().secondary(unrestricted).set({F.EPT_POINTER: EPTP}).error == CONTROL
    entry = Entry().secondary(unrestricted | vmx.SECONDARY_EXEC_ENABLE_EPT)
    assert entry.set({F.EPT_POINTER: EPTP}).error is None


@pytest.mark.parametrize(
    ("eptp", "error"),
    [
        (EPTP, None),
        (EPTP & ~vmx.VMX_EPTP_AD_ENABLE_BIT, None),
        (EPTP & ~7, None),  # uncacheable
        (EPTP & ~7 | 4, CONTROL),  # write-through
        (EPTP & ~vmx.VMX_EPTP_PWL_MASK | 4 << 3, CONTROL),  # five levels
        (EPTP & ~vmx.VMX_EPTP_PWL_MASK | 2 << 3, CONTROL),
        (EPTP | 1 << 7, CONTROL),
        (EPTP | 1 << 11, CONTROL),
        (EPTP | MAXIMUM, CONTROL),
        (EPTP | MAXIMUM >> 1, None),
    ],
)
def test_ept_pointer(eptp: int, error: int | None) -> None:
    entry = Entry().secondary(vmx.SECONDARY_EXEC_ENABLE_EPT).set({F.EPT_POINTER: eptp})
    assert entry.error == error
    assert Entry().set({F.EPT_POINTER: eptp}).error is None


def test_ept_pointer_needs_accessed_and_dirty_bits_only_where_they_are_offered() -> None:
    entry = Entry().secondary(vmx.SECONDARY_EXEC_ENABLE_EPT).set({F.EPT_POINTER: EPTP})
    without = entry.capabilities.ept_vpid & ~vmx.VMX_EPT_AD_BIT
    entry.capabilities = replace(entry.capabilities, ept_vpid=without)
    assert entry.error == CONTROL


# -------------------------------------------------------------------------------------------- exit and entry controls


def test_preemption_timer_is_saved_only_while_it_is_active() -> None:
    entry = Entry().add({F.VM_EXIT_CONTROLS: vmx.VM_EXIT_SAVE_VMX_PREEMPTION_TIMER})
    assert entry.error == CONTROL
    assert entry.add({F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VMX_PREEMPTION_TIMER}).error is None


@pytest.mark.parametrize(
    ("address", "count"),
    [
        (F.VM_EXIT_MSR_STORE_ADDR, F.VM_EXIT_MSR_STORE_COUNT),
        (F.VM_EXIT_MSR_LOAD_ADDR, F.VM_EXIT_MSR_LOAD_COUNT),
        (F.VM_ENTRY_MSR_LOAD_ADDR, F.VM_ENTRY_MSR_LOAD_COUNT),
    ],
)
def test_msr_lists_are_aligned_and_end_in_physical_memory(address: F, count: F) -> None:
    def error(gpa: int, entries: int) -> int | None:
        return Entry().set({address: gpa, count: entries}).error

    assert error(0x7000, 3) is None
    assert error(0x7008, 3) == CONTROL
    assert error(0x7008, 0) is None
    assert error(MAXIMUM - 32, 2) is None
    assert error(MAXIMUM - 32, 3) == CONTROL
    assert error((1 << 64) - 16, 0xFFFF_FFFF) == CONTROL


ERROR_CODES = pytest.mark.parametrize(
    ("kind", "vector", "error_code", "checked", "unchecked"),
    [
        (vmx.INTR_TYPE_HARD_EXCEPTION, GP, 0, None, None),
        (vmx.INTR_TYPE_HARD_EXCEPTION, PF, 0xFFFF, None, None),
        (vmx.INTR_TYPE_HARD_EXCEPTION, DF, 0x1_0000, CONTROL, CONTROL),
        (vmx.INTR_TYPE_HARD_EXCEPTION, GP, None, CONTROL, None),
        (vmx.INTR_TYPE_HARD_EXCEPTION, UD, 0, CONTROL, None),
        (vmx.INTR_TYPE_HARD_EXCEPTION, UD, None, None, None),
        (vmx.INTR_TYPE_EXT_INTR, 13, 0, CONTROL, CONTROL),
    ],
)


@ERROR_CODES
def test_error_codes_of_injected_events(
    kind: int, vector: int, error_code: int | None, checked: int | None, unchecked: int | None
) -> None:
    entry = Entry().inject(kind, vector, error_code=error_code)
    assert entry.error == unchecked
    basic = entry.capabilities.basic & ~vmx.VMX_BASIC_NO_HW_ERROR_CODE_CC
    entry.capabilities = replace(entry.capabilities, basic=basic)
    assert entry.error == checked


def test_unrestricted_guest_in_real_mode_gets_no_error_code() -> None:
    entry = Entry().secondary(vmx.SECONDARY_EXEC_UNRESTRICTED_GUEST | vmx.SECONDARY_EXEC_ENABLE_EPT)
    entry.set({F.EPT_POINTER: EPTP}).inject(vmx.INTR_TYPE_HARD_EXCEPTION, GP, error_code=0)
    assert entry.error is None
    assert entry.set({F.GUEST_CR0: 0}).error == CONTROL
    assert entry.inject(vmx.INTR_TYPE_HARD_EXCEPTION, GP).error is None


@pytest.mark.parametrize(
    ("kind", "vector", "error"),
    [
        (vmx.INTR_TYPE_EXT_INTR, 0xFF, None),
        (vmx.INTR_TYPE_RESERVED, 0x20, CONTROL),
        (vmx.INTR_TYPE_NMI_INTR, NMI, None),
        (vmx.INTR_TYPE_NMI_INTR, 3, CONTROL),
        (vmx.INTR_TYPE_HARD_EXCEPTION, 31, None),
        (vmx.INTR_TYPE_HARD_EXCEPTION, 32, CONTROL),
        (vmx.INTR_TYPE_OTHER_EVENT, 0, None),
        (vmx.INTR_TYPE_OTHER_EVENT, 1, CONTROL),
        (vmx.INTR_INFO_UNBLOCK_NMI, 0x20, CONTROL),
        (1 << 30, 0x20, CONTROL),
    ],
)
def test_types_and_vectors_of_injected_events(kind: int, vector: int, error: int | None) -> None:
    assert Entry().inject(kind, vector).error == error


@pytest.mark.parametrize(
    ("kind", "vector"),
    [
        (vmx.INTR_TYPE_SOFT_INTR, 0x80),
        (vmx.INTR_TYPE_PRIV_SW_EXCEPTION, 1),
        (vmx.INTR_TYPE_SOFT_EXCEPTION, BP),
    ],
)
def test_injected_software_event_has_the_length_of_an_instruction(kind: int, vector: int) -> None:
    lengths = [length for length in range(18) if Entry().inject(kind, vector, length=length).error is None]
    assert lengths == [*range(1, 16)]
    entry = Entry().inject(kind, vector, length=0)
    entry.capabilities = replace(entry.capabilities, misc=entry.capabilities.misc | vmx.VMX_MISC_ZERO_LEN_INS)
    assert entry.error is None


def test_event_that_is_not_valid_is_not_looked_at() -> None:
    assert Entry().set({F.VM_ENTRY_INTR_INFO_FIELD: 0x7FFF_FFFF}).error is None


# ------------------------------------------------------------------------------------------------------- host state


def test_host_cr4_with_lass_is_refused_exactly_without_lass() -> None:
    assert Entry().add({F.HOST_CR4: CR4_LASS}).error is None
    assert Entry().add({F.HOST_CR4: CR4_LASS | CR4_SMAP}).error is None
    entry = Entry(*(name for name in FEATURES_OF_L1 if name != "lass"))
    assert entry.error is None
    assert entry.add({F.HOST_CR4: CR4_LASS}).error == HOST


def test_lass_has_no_say_in_host_addresses() -> None:
    user = {F.HOST_RIP: 0x40_0000, F.HOST_GDTR_BASE: 0x40_1000, F.HOST_FS_BASE: 0x40_2000}
    assert Entry().add({F.HOST_CR4: CR4_LASS}).set(user).error is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (F.HOST_CR0, CR0_PG | CR0_PE),  # no NE
        (F.HOST_CR0, CR0_PE | CR0_NE),
        (F.HOST_CR0, 1 << 32 | CR0_PG | CR0_PE | CR0_NE),
        (F.HOST_CR4, CR4_PAE),  # no VMXE
        (F.HOST_CR4, CR4_VMXE),  # no PAE
        (F.HOST_CR4, CR4_PAE | CR4_VMXE | 1 << 15),
        (F.HOST_CR3, MAXIMUM),
        (F.HOST_CS_SELECTOR, 0),
        (F.HOST_TR_SELECTOR, 0),
        (F.HOST_RIP, 1 << 47),
        *((selector, 0x13) for selector in (F.HOST_ES_SELECTOR, F.HOST_CS_SELECTOR, F.HOST_GS_SELECTOR)),
        *((selector, 0x14) for selector in (F.HOST_SS_SELECTOR, F.HOST_FS_SELECTOR, F.HOST_TR_SELECTOR)),
        *((base, 1 << 47) for base in (F.HOST_FS_BASE, F.HOST_GS_BASE, F.HOST_TR_BASE)),
        *((base, 1 << 63) for base in (F.HOST_GDTR_BASE, F.HOST_IDTR_BASE)),
        (F.HOST_IA32_SYSENTER_ESP, FIVE_LEVEL_ADDRESS),
        (F.HOST_IA32_SYSENTER_EIP, 1 << 62),
    ],
)
def test_host_state_is_refused(field: F, value: int) -> None:
    assert Entry().set({field: value}).error == HOST


def test_null_host_ss_is_for_64_bit_hosts() -> None:
    assert Entry().set({F.HOST_SS_SELECTOR: 0}).error is None
    assert Entry().outside_ia32e_mode().set({F.HOST_SS_SELECTOR: 0}).error == HOST


def test_host_cr3_may_have_the_bits_of_lam() -> None:
    assert Entry().add({F.HOST_CR3: CR3_LAM_U57}).error is None
    entry = Entry(*(name for name in FEATURES_OF_L1 if name != "lam"))
    assert entry.add({F.HOST_CR3: CR3_LAM_U57}).error == HOST


def test_host_pat_and_efer_are_looked_at_only_when_they_are_loaded() -> None:
    bad = {F.HOST_IA32_PAT: 0x02, F.HOST_IA32_EFER: 1 << 63}
    assert Entry().set(bad).error is None
    pat, efer = vmx.VM_EXIT_LOAD_IA32_PAT, vmx.VM_EXIT_LOAD_IA32_EFER
    assert Entry().set(bad).add({F.VM_EXIT_CONTROLS: pat}).error == HOST
    assert Entry().set({F.HOST_IA32_PAT: PAT}).add({F.VM_EXIT_CONTROLS: pat}).error is None
    assert Entry().set(bad).add({F.VM_EXIT_CONTROLS: efer}).error == HOST


@pytest.mark.parametrize(
    ("efer", "error"),
    [
        (EFER_LMA | EFER_LME | EFER_SCE | EFER_NXE, None),
        (EFER_LME, HOST),
        (EFER_LMA, HOST),
        (0, HOST),
        (EFER_LMA | EFER_LME | 1 << 12, HOST),
    ],
)
def test_host_efer_is_of_the_mode_that_the_controls_say(efer: int, error: int | None) -> None:
    controls = {F.VM_EXIT_CONTROLS: vmx.VM_EXIT_LOAD_IA32_EFER}
    assert Entry().set({F.HOST_IA32_EFER: efer}).add(controls).error == error


def test_host_efer_outside_ia32e_mode() -> None:
    entry = Entry().outside_ia32e_mode().add({F.VM_EXIT_CONTROLS: vmx.VM_EXIT_LOAD_IA32_EFER})
    assert entry.set({F.HOST_IA32_EFER: EFER_NXE}).error is None
    assert entry.set({F.HOST_IA32_EFER: EFER_LME}).error == HOST


def test_host_address_space_size_is_that_of_l1() -> None:
    entry = Entry()
    entry.vmcs[F.VM_EXIT_CONTROLS] &= ~vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE
    assert entry.error == HOST
    entry = Entry().outside_ia32e_mode().add({F.VM_EXIT_CONTROLS: vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE})
    assert entry.error == HOST


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (F.HOST_CR4, CR4_VMXE | CR4_PCIDE),
        (F.HOST_RIP, 1 << 32),
    ],
)
def test_32_bit_host_has_nothing_of_a_64_bit_one(field: F, value: int) -> None:
    assert Entry().outside_ia32e_mode().set({field: value}).error == HOST


def test_32_bit_host_has_no_64_bit_guest() -> None:
    entry = Entry().outside_ia32e_mode().add({F.VM_ENTRY_CONTROLS: vmx.VM_ENTRY_IA32E_MODE})
    assert entry.error == HOST


def test_five_level_addresses_need_the_feature_and_rip_needs_cr4() -> None:
    bases = {F.HOST_GDTR_BASE: FIVE_LEVEL_ADDRESS, F.HOST_IA32_SYSENTER_EIP: FIVE_LEVEL_ADDRESS}
    assert Entry().set(bases).error == HOST
    entry = Entry(*FEATURES_OF_L1, "la57").set(bases)
    assert entry.error is None
    assert entry.set({F.HOST_RIP: FIVE_LEVEL_ADDRESS}).error == HOST
    assert entry.add({F.HOST_CR4: CR4_LA57}).error is None


def test_controls_are_judged_before_the_host_state() -> None:
    assert Entry().set({F.CR3_TARGET_COUNT: 1, F.HOST_CS_SELECTOR: 0}).error == CONTROL


def test_failure_says_what_was_wrong() -> None:
    entry = Entry().set({F.HOST_CR0: 0})
    with pytest.raises(VmFailValid, match="ENTRY_INVALID_HOST_STATE_FIELD: host CR0 has bits"):
        check_controls_and_host_state(entry.vmcs, entry.capabilities, entry.memory, entry.words)


# ------------------------------------------------------------------------------------------------------ hostile VMCSs


@given(st.integers())
def test_random_pages_end_in_defined_failures(seed: int) -> None:
    entry = Entry()
    entry.memory.write(0x3000, Random(seed).randbytes(PAGE_SIZE))
    entry.vmcs = Vmcs12.load(entry.memory, 0x3000)
    assert entry.error in (None, CONTROL, HOST)


@given(st.dictionaries(st.sampled_from(list(F)), st.integers(0, (1 << 64) - 1), max_size=6))
@example({F.VIRTUAL_APIC_PAGE_ADDR: (1 << 64) - 1})
def test_random_fields_end_in_defined_failures(values: dict[F, int]) -> None:
    entry = Entry().set(values)
    assert entry.error in (None, CONTROL, HOST)
    if all(key.name.startswith("GUEST_") for key in values):
        assert entry.error is None
