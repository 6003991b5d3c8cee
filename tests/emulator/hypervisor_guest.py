"""A guest for the tests that is a hypervisor: :class:`emulator_guest.Guest` with VMX, and regions prepared for it."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from emulator_guest import MAPPED, UPPER, Guest

from lasskvm.conformance.assembler import assemble
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import fetch_instruction
from lasskvm.emulator.execution import execute
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.linearize import linear_address
from lasskvm.emulator.modes import code_bits
from lasskvm.emulator.msrs import MsrFile
from lasskvm.state import CR4, CR4_ALLOWED, RAX, RBX, RCX, RFLAGS, RIP
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.instructions import VmxInstructions
from lasskvm.vmx.nested import NestedVmx
from lasskvm.vmx.vmcs import VMCS12_REVISION, Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.cpu_models import CpuModel, parse_cpu
from lasskvm.x86.cpuid import CpuidTable, cr4_allowed
from lasskvm.x86.msr import (
    FEATURE_CONTROL_LOCK,
    FEATURE_CONTROL_VMX_OUTSIDE_SMX,
    MSR_IA32_FEATURE_CONTROL,
)
from lasskvm.x86.registers import (
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    CR4_VMXE,
    CS,
    RFLAGS_ARITHMETIC,
    RFLAGS_CF,
    RFLAGS_ZF,
)
from lasskvm.x86.vmx import VmInstructionError
from lasskvm.x86.vmx_fields import VmcsField as F

#: Guest-physical addresses: the VMXON region, two VMCSs, a page with another revision.
VMXON_REGION, VMCS_A, VMCS_B, OTHER_REVISION = 0x100000, 0x101000, 0x102000, 0x103000
#: Where memory operands are: guest-physical, for the kernel, and the same page in the lower half.
DATA_GPA = 0x70000
DATA, USER_DATA = UPPER + DATA_GPA, DATA_GPA
NO_POINTER = (1 << 64) - 1


class Ending(Enum):
    """How a VMX instruction ends, when not with an error number."""

    SUCCEED = "VMsucceed"
    FAIL_INVALID = "VMfailInvalid"


SUCCEED, FAIL_INVALID = Ending.SUCCEED, Ending.FAIL_INVALID
Outcome = Ending | VmInstructionError


class Hypervisor(Guest):
    """A 64-bit kernel with LASS, SMAP and CR4.VMXE on, outside VMX operation at first.

    RBX points to a memory operand in the upper half. ``entries`` collects what VM entries were asked for.
    """

    def __init__(self, features: Iterable[str] = ("vmx",)) -> None:
        super().__init__()
        self.cpuid = CpuidTable(CpuModel("test", parse_cpu("max").features | set(features)).entries())
        self.ctx.cpuid, self.ctx.msrs = self.cpuid, MsrFile(self.cpuid)
        self.words[CR4_ALLOWED] = cr4_allowed(self.cpuid)
        self.words[CR4] |= CR4_VMXE
        self.words[RBX] = DATA
        self.set_feature_control(FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMX_OUTSIDE_SMX)
        for region in (VMXON_REGION, VMCS_A, VMCS_B):
            self.memory.store(region, 4, VMCS12_REVISION)
        self.memory.store(OTHER_REVISION, 4, VMCS12_REVISION ^ 1)
        self.nested = NestedVmx(VmxCapabilities.of(self.cpuid, self.words[CR4_ALLOWED]))
        self.instructions = VmxInstructions(self.nested, self._enter_guest)
        self.ctx.vmx = self.instructions
        self.entries: list[str] = []

    def _enter_guest(self, ctx: Emulation, launch: bool) -> None:
        self.entries.append("launch" if launch else "resume")

    def in_operation(self, current: int | None = VMCS_A) -> Hypervisor:
        """In VMX operation, by the instructions themselves; with a current VMCS if wanted."""
        assert self.with_pointer("vmxon [rbx]", VMXON_REGION) is SUCCEED
        if current is not None:
            assert self.with_pointer("vmptrld [rbx]", current) is SUCCEED
        return self

    @property
    def vmcs(self) -> Vmcs12:
        """The current VMCS, which must be there."""
        assert self.nested.current is not None
        return self.nested.current

    def set_feature_control(self, value: int) -> None:
        """What firmware has left in IA32_FEATURE_CONTROL."""
        self.ctx.msrs.values[MSR_IA32_FEATURE_CONTROL] = value

    def with_pointer(self, source: str, gpa: int) -> Outcome:
        """:meth:`vmx` of an instruction whose operand at DATA is the pointer *gpa*."""
        self.store(DATA, 8, gpa)
        return self.vmx(source)

    def with_descriptor(self, source: str, kind: int, first: int, second: int = 0) -> Outcome:
        """:meth:`vmx` of INVEPT or INVVPID with type *kind* in RCX and a descriptor of two words at DATA."""
        self.words[RCX] = kind
        self.store(DATA, 8, first)
        self.store(DATA + 8, 8, second)
        return self.vmx(source)

    def step(self, source: str) -> int:
        """Assemble the instruction *source* to CS:RIP and execute it; its length. A fault is raised."""
        words = self.words
        code = assemble(source, 0, code_bits(words)).code
        self.memory.write(linear_address(words, CS, words[RIP]) & MAPPED - 1, code)
        execute(self.ctx, fetch_instruction(self.ctx))
        return len(code)

    def vmx(self, source: str) -> Outcome:
        """Execute the VMX instruction *source* and say how it ends.

        Of RFLAGS it changes the arithmetic flags and nothing else, and it goes on behind itself.
        """
        words = self.words
        words[RFLAGS] |= RFLAGS_ARITHMETIC
        rip, others = words[RIP], words[RFLAGS] & ~RFLAGS_ARITHMETIC
        length = self.step(source)
        assert words[RIP] == rip + length
        assert words[RFLAGS] & ~RFLAGS_ARITHMETIC == others
        flags = words[RFLAGS] & RFLAGS_ARITHMETIC
        if flags == RFLAGS_ZF:
            return VmInstructionError(self.vmcs[F.VM_INSTRUCTION_ERROR])
        return {0: SUCCEED, RFLAGS_CF: FAIL_INVALID}[flags]

    def vmx_fault(self, source: str) -> tuple[int, int | None]:
        """The vector and error code that *source* faults with; state, VMX and the operand's page stay as they were."""
        before = self._everything()
        try:
            self.step(source)
        except GuestFault as fault:
            assert self._everything() == before, "a faulting instruction changed something"
            return fault.vector, fault.error_code
        raise AssertionError(f"{source} does not fault")

    def _everything(self) -> tuple[object, ...]:
        nested = self.nested
        fields = None if nested.current is None else dict(nested.current)
        return self.snapshot(), nested.vmxon_gpa, nested.current_gpa, fields, self.memory.read(DATA_GPA, 64)

    def prepare_entry(self) -> Hypervisor:
        """Make the current VMCS one whose controls and host state pass the checks of a VM entry."""
        offered = self.nested.capabilities
        for field, value in {
            F.PIN_BASED_VM_EXEC_CONTROL: offered.pin_based.must_be_1,
            F.CPU_BASED_VM_EXEC_CONTROL: offered.cpu_based.must_be_1,
            F.VM_EXIT_CONTROLS: offered.vm_exit.must_be_1 | vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE,
            F.VM_ENTRY_CONTROLS: offered.vm_entry.must_be_1 | vmx.VM_ENTRY_IA32E_MODE,
            F.HOST_CR0: CR0_PG | CR0_NE | CR0_PE,
            F.HOST_CR4: CR4_PAE | CR4_VMXE,
            F.HOST_CS_SELECTOR: 0x10,
            F.HOST_TR_SELECTOR: 0x40,
        }.items():
            self.vmwrite(field, value)
        return self

    def vmwrite(self, field: int, value: int) -> Outcome:
        """VMWRITE, by the instruction."""
        self.words[RAX], self.words[RCX] = value, field
        return self.vmx("vmwrite rcx, rax")

    def vmread(self, field: int) -> int:
        """What VMREAD returns, by the instruction, which must succeed."""
        self.words[RCX] = field
        assert self.vmx("vmread rax, rcx") is SUCCEED
        return self.words[RAX]
