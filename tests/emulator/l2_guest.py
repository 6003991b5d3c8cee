"""The emulator's test guest as an L2: with the VMCS of an L1 that intercepts what a test asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from emulator_guest import MAPPED, Guest

from lasskvm.conformance.assembler import assemble
from lasskvm.emulator.decode import Decoded, fetch_instruction
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.modes import code_bits
from lasskvm.state import RIP
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.intercepts import intercept_of, is_sensitive
from lasskvm.vmx.intercepts_faults import faults_before_exit
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.cpuid import FEATURES, CpuidEntry, CpuidTable, significant_index
from lasskvm.x86.registers import CS
from lasskvm.x86.vmx_fields import VmcsField as F

#: Guest-physical pages for L1's structures, where L2 has nothing.
IO_BITMAP_A, IO_BITMAP_B, MSR_BITMAP, VIRTUAL_APIC = 0x100000, 0x101000, 0x102000, 0x103000
#: Features that the CPU models may lack, for which there are controls.
FEATURES_OF_L1 = (
    "vmx",
    "smx",
    "sgx",
    "monitor",
    "rdrand",
    "rdseed",
    "xsave",
    "xsaves",
    "wbnoinvd",
    "invpcid",
    "rdpid",
)

_REGISTERS = ("eax", "ebx", "ecx", "edx")


def with_features(cpuid: CpuidTable, *names: str) -> CpuidTable:
    """*cpuid* with the features *names* added."""
    entries = {(entry.function, entry.index): entry for entry in cpuid.entries}
    for name in names:
        feature = FEATURES[name]
        place = feature.leaf, feature.subleaf
        entry = entries.get(place) or CpuidEntry(*place, significant_index(feature.leaf), 0, 0, 0, 0)
        register = _REGISTERS[feature.register]
        entries[place] = replace(entry, **{register: getattr(entry, register) | 1 << feature.bit})
    return CpuidTable(entries.values())


class L2(Guest):
    """A 64-bit kernel in VMX non-root operation. Without controls, L1 gets the unconditional exits only."""

    def __init__(self) -> None:
        super().__init__()
        self.use_cpuid(with_features(self.cpuid, *FEATURES_OF_L1))
        self.vmcs = Vmcs12()
        self.vmcs[F.IO_BITMAP_A], self.vmcs[F.IO_BITMAP_B] = IO_BITMAP_A, IO_BITMAP_B
        self.vmcs[F.MSR_BITMAP], self.vmcs[F.VIRTUAL_APIC_PAGE_ADDR] = MSR_BITMAP, VIRTUAL_APIC
        self.primary(vmx.CPU_BASED_USE_MSR_BITMAPS)

    def use_cpuid(self, cpuid: CpuidTable) -> None:
        """Let the processor have *cpuid*."""
        self.cpuid = self.ctx.cpuid = cpuid

    def pin_based(self, controls: int) -> None:
        """Set more pin-based controls."""
        self.vmcs[F.PIN_BASED_VM_EXEC_CONTROL] |= controls

    def primary(self, controls: int) -> None:
        """Set more primary controls."""
        self.vmcs[F.CPU_BASED_VM_EXEC_CONTROL] |= controls

    def secondary(self, controls: int) -> None:
        """Set more secondary controls."""
        self.primary(vmx.CPU_BASED_ACTIVATE_SECONDARY_CONTROLS)
        self.vmcs[F.SECONDARY_VM_EXEC_CONTROL] |= controls

    def exit_of(self, source: str) -> NestedExit | None:
        """The VM exit of the instruction *source* at CS:RIP; the state must be as before."""
        decoded = self.fetch(source)
        before = self.snapshot()
        faults_before_exit(self.ctx, decoded, self.vmcs)
        nested_exit = intercept_of(self.ctx, decoded, self.vmcs)
        assert self.snapshot() == before, "asking for a VM exit changed the state"
        assert is_sensitive(decoded) or nested_exit is None
        return nested_exit

    def fault_before_exit(self, source: str) -> tuple[int, int | None]:
        """The vector and error code of the fault that *source* ends in instead of a VM exit."""
        decoded = self.fetch(source)
        assert is_sensitive(decoded)
        before = self.snapshot()
        with pytest.raises(GuestFault) as caught:
            faults_before_exit(self.ctx, decoded, self.vmcs)
        assert self.snapshot() == before, "a fault changed the state"
        return caught.value.vector, caught.value.error_code

    def fetch(self, source: str) -> Decoded:
        """Assemble *source* to CS:RIP and decode it."""
        words = self.words
        code = assemble(source, 0, code_bits(words)).code
        self.memory.write(linear_address(words, CS, words[RIP]) & MAPPED - 1, code)
        return fetch_instruction(self.ctx)
