"""A guest hypervisor to ask questions: L1 on a whole vCPU, on either engine, driven step by step through the KVM API.

The guest of :mod:`lasskvm.conformance.layout` is L2's world; L1 lives in the same address space, in pages of its own.
L1 halts behind each of its steps, so that a test can look at everything and change it. L2's handlers halt, too, and HLT
is one of the exits; so an exit tells which event L2 has got.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import Assembled, assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import DONE_VECTOR, UPPER
from lasskvm.kvm import ExecutionEngine, Exit, GuestDebug, HltExit, IntrExit, IoExit, MpState, Regs
from lasskvm.vmx.vmcs import VMCS12_REVISION
from lasskvm.x86 import vmx
from lasskvm.x86.cpuid import cr4_allowed, efer_allowed
from lasskvm.x86.ept import EPT_R, EPT_TYPE_SHIFT, EPT_W, EPT_X
from lasskvm.x86.msr import (
    MSR_IA32_VMX_TRUE_ENTRY_CTLS,
    MSR_IA32_VMX_TRUE_EXIT_CTLS,
    MSR_IA32_VMX_TRUE_PINBASED_CTLS,
    MSR_IA32_VMX_TRUE_PROCBASED_CTLS,
)
from lasskvm.x86.registers import CR4_VMXE, EFER_LMA, MASK32, RFLAGS_FIXED
from lasskvm.x86.vmx_exits import EXIT_REASON_FAILED_VMENTRY, ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

Fields = Mapping[F, int]
ENGINES: tuple[ExecutionEngine, ...] = ("jit", "emulator")

# Guest-physical addresses: L1's code, its VM-exit handler, a table of fields, its stack, VMX structures, EPT tables.
L1_CODE, L1_HANDLER, L1_FIELDS, L1_STACK = 0x60000, 0x61000, 0x62000, 0x67000
VMXON_REGION, VMCS, IO_BITMAP_A, IO_BITMAP_B, MSR_BITMAP, VIRTUAL_APIC, MSR_LIST = range(
    0x68000, 0x6F000, 0x1000
)
EPT_PML4, EPT_PDPT, EPT_PD, EPT_PT = 0x200000, 0x201000, 0x202000, 0x203000
EPT_RWX = EPT_R | EPT_W | EPT_X
EPT_WB = vmx.MEMORY_TYPE_WB << EPT_TYPE_SHIFT
EPTP = EPT_PML4 | vmx.VMX_EPTP_PWL_4 | vmx.MEMORY_TYPE_WB
#: A port that nobody has claimed: L2 uses it to call the test.
CALL_PORT = 0x99
CALL = f"out {CALL_PORT:#x}, al"

_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_WORD_BYTES, _PAGE = 8, 0x1000
_EPT_ENTRIES = 512
_MAX_RUNS = 400
_END = (1 << 64) - 1
_START_L1 = "vmxon [rbx]; jbe bad; vmclear [rbx + 8]; jbe bad; vmptrld [rbx + 8]; jbe bad; hlt; bad: ud2"
_WRITE_FIELDS = f"""
    again: mov rax, [rsi]; cmp rax, -1; je done; vmwrite rax, [rsi + 8]; jbe bad; add rsi, {2 * _WORD_BYTES}; jmp again
    done: hlt
    bad: ud2
"""
_READ_FIELDS = _WRITE_FIELDS.replace("vmwrite rax, [rsi + 8]", "vmread [rsi + 8], rax")


@dataclass(frozen=True)
class L2Exit:
    """What L1 found at its VM-exit handler, or, with ``error``, behind a VM entry that failed.

    ``exit`` is how the run of the vCPU ended: with L1's HLT, unless something went wrong. ``fields`` are those of the
    VMCS, ``registers`` the vCPU's, which L2 has left there. ``error`` is None for a VM exit, 0 for VMfailInvalid, else
    the error number.
    """

    exit: Exit
    fields: Fields
    registers: Regs
    program: Assembled
    error: int | None = None

    def __getitem__(self, field: F) -> int:
        return self.fields[field]

    @property
    def reason(self) -> ExitReason:
        """The basic exit reason."""
        assert self.error is None, f"VMfail, error {self.error}"
        return ExitReason(self[F.VM_EXIT_REASON] & ~EXIT_REASON_FAILED_VMENTRY)

    @property
    def failed_entry(self) -> bool:
        """Whether the guest state or an MSR list was refused."""
        return self.error is None and self[F.VM_EXIT_REASON] & EXIT_REASON_FAILED_VMENTRY != 0

    @property
    def rip(self) -> int:
        return self[F.GUEST_RIP]

    @property
    def label(self) -> str | None:
        """L2's label at RIP."""
        return next((name for name, address in self.program.labels.items() if address == self.rip), None)

    @property
    def vector(self) -> int | None:
        """The vector of the event that L2 has got: the exit is the HLT of its handler."""
        offset = self.rip - layout.HANDLERS
        if self.reason is not ExitReason.HLT or offset % layout.HANDLER_BYTES:
            return None
        vector = offset // layout.HANDLER_BYTES
        return vector if 0 <= vector < layout.VECTORS else None

    @property
    def completed(self) -> bool:
        """Whether L2's program ran to its end."""
        return self.vector == DONE_VECTOR


class NestedMachine:
    """L1 in *guest*, whose CPUID has VMX, used for many questions.

    :meth:`reset` makes it anew, in VMX operation with a VMCS that is current. ``vcpu``, ``vm``, ``memory`` and
    ``guest``, L2's world, may be used at will between two steps.
    """

    def __init__(self, guest: Guest) -> None:
        self.guest, self.vm, self.memory, self.vcpu = guest, guest.vm, guest.memory, guest.vcpu
        #: RIP behind a VM entry that has failed.
        self.failed = 0
        self.program = Assembled(0, b"", {})
        #: What is called when L2 executes :data:`CALL`.
        self.at_call: Callable[[], None] = lambda: None

    def reset(self) -> NestedMachine:
        """L1 has executed VMXON and VMPTRLD; the VMCS describes an L2 like the guest itself, without EPT."""
        self.guest.reset()
        self.vcpu.reset()
        self.vcpu.immediate_exit = False
        self.vcpu.set_guest_debug(GuestDebug())
        self.at_call = lambda: None
        for page in range(L1_CODE, MSR_LIST + _PAGE, _PAGE):
            self.memory.write(page, bytes(_PAGE))
        for region in (VMXON_REGION, VMCS):
            self.memory.store(region, 4, VMCS12_REVISION)
        self.memory.write(L1_HANDLER, assemble("hlt", UPPER + L1_HANDLER).code)
        self._write_ept()
        sregs = layout.initial_sregs(self.vcpu.get_sregs(), 0, 64, self.guest.tables.root)
        cpuid = self.vcpu.cpuid
        sregs.cr4 = sregs.cr4 & cr4_allowed(cpuid) | CR4_VMXE
        sregs.efer &= efer_allowed(cpuid) | EFER_LMA
        self.vcpu.set_sregs(sregs)
        self.memory.write(L1_FIELDS, VMXON_REGION.to_bytes(8, "little") + VMCS.to_bytes(8, "little"))
        self.step(_START_L1, rbx=UPPER + L1_FIELDS)
        self.write(self._initial_fields())
        return self

    # ---------------------------------------------------------------------------------------------------- L1's steps

    def step(self, source: str, **registers: int) -> Regs:
        """Let L1 execute the program *source*, which ends in HLT; the registers behind it."""
        program = assemble(source, UPPER + L1_CODE)
        self.memory.write(L1_CODE, program.code)
        self.begin_at(program.address, **registers)
        found = self.run()
        regs = self.vcpu.get_regs()
        last = self.memory.load(regs.rip - 1 - UPPER, 1) if isinstance(found, HltExit) else 0
        assert last == 0xF4, f"{found} at {regs.rip:#x}"
        assert program.address <= regs.rip <= program.address + len(program.code), hex(regs.rip)
        return regs

    def write(self, fields: Fields) -> None:
        """VMWRITE of *fields*."""
        self._field_table([(field, value) for field, value in fields.items()])
        self.step(_WRITE_FIELDS, rsi=UPPER + L1_FIELDS)

    def read(self) -> dict[F, int]:
        """VMREAD of all fields."""
        self._field_table([(field, 0) for field in F])
        self.step(_READ_FIELDS, rsi=UPPER + L1_FIELDS)
        return {
            field: self.memory.load(L1_FIELDS + 2 * _WORD_BYTES * number + _WORD_BYTES, _WORD_BYTES)
            for number, field in enumerate(F)
        }

    def add(self, controls: Fields) -> None:
        """Set more bits of fields."""
        fields = self.read()
        self.write({field: fields[field] | bits for field, bits in controls.items()})

    def use_ept(self, secondary: int = 0) -> None:
        """Give L2 memory by EPT tables that map everything to itself, with *secondary* controls beside."""
        self.add({F.SECONDARY_VM_EXEC_CONTROL: secondary | vmx.SECONDARY_EXEC_ENABLE_EPT})
        self.write({F.EPT_POINTER: EPTP})

    def place(self, source: str, *, cpl: int = 0, rflags: int = 0, fields: Fields | None = None) -> Assembled:
        """Make L2 begin with the program *source* at *cpl*, which ``INT 80H`` follows, as *fields* say otherwise."""
        address = layout.USER_CODE if cpl else layout.KERNEL_CODE
        self.program = assemble(f"{source}\nint {DONE_VECTOR:#x}", address)
        self.guest.place(self.program)
        stack = layout.USER_STACK_TOP if cpl else layout.KERNEL_STACK_TOP
        start = {F.GUEST_RIP: address, F.GUEST_RSP: stack, F.GUEST_RFLAGS: rflags | RFLAGS_FIXED}
        self.write(self._segments(cpl) | start | dict(fields or {}))
        return self.program

    def launch(
        self,
        source: str,
        *,
        cpl: int = 0,
        rflags: int = 0,
        fields: Fields | None = None,
        **registers: int,
    ) -> L2Exit:
        """VMLAUNCH of the program *source*, up to the VM exit."""
        self.place(source, cpl=cpl, rflags=rflags, fields=fields)
        return self.enter(**registers)

    def enter(self, *, resume: bool = False, fields: Fields | None = None, **registers: int) -> L2Exit:
        """VMLAUNCH or VMRESUME, with *registers* for L2, up to the VM exit."""
        self.begin(resume=resume, fields=fields, **registers)
        return self.finish()

    def begin(self, *, resume: bool = False, fields: Fields | None = None, **registers: int) -> None:
        """Make L1 ready to execute VMLAUNCH or VMRESUME."""
        if fields:
            self.write(fields)
        program = assemble(f"{'vmresume' if resume else 'vmlaunch'}; failed: hlt", UPPER + L1_CODE)
        self.memory.write(L1_CODE, program.code)
        self.begin_at(program.address, **registers)
        self.failed = program.labels["failed"] + 1

    def finish(self) -> L2Exit:
        """Run until L1 has the VM exit."""
        found = self.run()
        return self.result(found)

    def result(self, found: Exit) -> L2Exit:
        """What there is to know, behind a run of the vCPU that has ended in *found*."""
        regs = self.vcpu.get_regs()
        if not isinstance(found, HltExit) or regs.rip not in (UPPER + L1_HANDLER + 1, self.failed):
            return L2Exit(found, {}, regs, self.program, error=None)
        error = None
        if regs.rip == self.failed:
            valid = regs.rflags & 0x40
            error = 0 if not valid else -1
        fields = self.read()
        if error:
            error = fields[F.VM_INSTRUCTION_ERROR]
        return L2Exit(found, fields, regs, self.program, error)

    def run(self) -> Exit:
        """Run the vCPU until it needs the VMM; what L2 calls is served."""
        for _ in range(_MAX_RUNS):
            found = self.vcpu.run()
            if isinstance(found, IoExit) and found.port == CALL_PORT and found.write:
                self.at_call()
            elif not isinstance(found, IntrExit):
                return found
        return found

    def begin_at(self, rip: int, **registers: int) -> None:
        """Make the vCPU ready to go on at *rip*."""
        if self.vm.irqchip is not None:
            self.vcpu.set_mp_state(MpState.RUNNABLE)
        self.vcpu.set_regs(Regs(**{"rip": rip, "rsp": UPPER + L1_STACK, "rflags": RFLAGS_FIXED} | registers))

    def _field_table(self, pairs: list[tuple[F, int]]) -> None:
        words = [word for pair in pairs for word in pair]
        data = b"".join(int(word).to_bytes(_WORD_BYTES, "little") for word in [*words, _END])
        self.memory.write(L1_FIELDS, data)

    # ------------------------------------------------------------------------------------------------------- fields

    def must_be_1(self, index: int) -> int:
        """The bits of controls that the capability MSR *index* wants."""
        return self.vcpu.get_msr(index) & MASK32

    def _initial_fields(self) -> dict[F, int]:
        sregs = self.vcpu.get_sregs()
        must = self.must_be_1
        return {
            **self._segments(0),
            F.PIN_BASED_VM_EXEC_CONTROL: must(MSR_IA32_VMX_TRUE_PINBASED_CTLS),
            F.CPU_BASED_VM_EXEC_CONTROL: must(MSR_IA32_VMX_TRUE_PROCBASED_CTLS)
            | vmx.CPU_BASED_HLT_EXITING
            | vmx.CPU_BASED_USE_MSR_BITMAPS
            | vmx.CPU_BASED_USE_IO_BITMAPS
            | vmx.CPU_BASED_ACTIVATE_SECONDARY_CONTROLS,
            F.SECONDARY_VM_EXEC_CONTROL: 0,
            F.VM_EXIT_CONTROLS: must(MSR_IA32_VMX_TRUE_EXIT_CTLS)
            | vmx.VM_EXIT_HOST_ADDR_SPACE_SIZE
            | vmx.VM_EXIT_SAVE_IA32_EFER
            | vmx.VM_EXIT_LOAD_IA32_EFER,
            F.VM_ENTRY_CONTROLS: must(MSR_IA32_VMX_TRUE_ENTRY_CTLS)
            | vmx.VM_ENTRY_IA32E_MODE
            | vmx.VM_ENTRY_LOAD_IA32_EFER,
            F.IO_BITMAP_A: IO_BITMAP_A,
            F.IO_BITMAP_B: IO_BITMAP_B,
            F.MSR_BITMAP: MSR_BITMAP,
            F.VIRTUAL_APIC_PAGE_ADDR: VIRTUAL_APIC,
            F.VIRTUAL_PROCESSOR_ID: 1,
            F.VMCS_LINK_POINTER: vmx.VMCS_NO_POINTER,
            F.GUEST_CR0: sregs.cr0,
            F.GUEST_CR3: sregs.cr3,
            F.GUEST_CR4: sregs.cr4,
            F.GUEST_IA32_EFER: sregs.efer,
            F.GUEST_DR7: 0x400,
            F.HOST_CR0: sregs.cr0,
            F.HOST_CR3: sregs.cr3,
            F.HOST_CR4: sregs.cr4,
            F.HOST_IA32_EFER: sregs.efer,
            F.HOST_CS_SELECTOR: layout.KERNEL_CS,
            F.HOST_SS_SELECTOR: layout.KERNEL_SS,
            F.HOST_TR_SELECTOR: layout.TSS_SELECTOR,
            F.HOST_TR_BASE: layout.TSS,
            F.HOST_GDTR_BASE: layout.GDT,
            F.HOST_IDTR_BASE: layout.IDT,
            F.HOST_RSP: UPPER + L1_STACK,
            F.HOST_RIP: UPPER + L1_HANDLER,
        }

    def _segments(self, cpl: int) -> dict[F, int]:
        sregs = layout.initial_sregs(self.vcpu.get_sregs(), cpl, 64, self.guest.tables.root)
        fields: dict[F, int] = {}
        named = {name: getattr(sregs, name) for name in _SEGMENTS} | {"ldtr": sregs.ldt, "tr": sregs.tr}
        for name, segment in named.items():
            prefix = f"GUEST_{name.upper()}"
            fields |= {
                F[f"{prefix}_SELECTOR"]: segment.selector,
                F[f"{prefix}_BASE"]: segment.base,
                F[f"{prefix}_LIMIT"]: segment.limit,
                F[f"{prefix}_AR_BYTES"]: segment.attributes,
            }
        for name, table in (("GDTR", sregs.gdt), ("IDTR", sregs.idt)):
            fields |= {F[f"GUEST_{name}_BASE"]: table.base, F[f"GUEST_{name}_LIMIT"]: table.limit}
        return fields

    # ---------------------------------------------------------------------------------------------------------- EPT

    def _write_ept(self) -> None:
        self.memory.write(EPT_PML4, bytes(3 * _PAGE))
        self.memory.store(EPT_PML4, 8, EPT_PDPT | EPT_RWX)
        self.memory.store(EPT_PDPT, 8, EPT_PD | EPT_RWX)
        for table in range(layout.MEMORY_BYTES // _PAGE // _EPT_ENTRIES):
            self.memory.store(EPT_PD + 8 * table, 8, EPT_PT + table * _PAGE | EPT_RWX)
        for page in range(layout.MEMORY_BYTES // _PAGE):
            self.set_ept(page * _PAGE, page * _PAGE | EPT_RWX | EPT_WB)

    def set_ept(self, gpa: int, entry: int) -> None:
        """Write the EPT entry of the 4 KiB page at *gpa*."""
        self.memory.store(EPT_PT + gpa // _PAGE * _WORD_BYTES, 8, entry)

    def get_ept(self, gpa: int) -> int:
        """The EPT entry of the 4 KiB page at *gpa*."""
        return self.memory.load(EPT_PT + gpa // _PAGE * _WORD_BYTES, 8)


@cache
def nested_machine(engine: ExecutionEngine, *, irqchip: bool = False) -> NestedMachine:
    """The machine that tests share; reset it."""
    return NestedMachine(Guest(engine=engine, irqchip=irqchip))
