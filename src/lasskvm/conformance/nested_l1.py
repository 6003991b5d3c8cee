"""L1, driven step by step from outside: registers set, a few instructions executed, and a HLT.

Each VMX instruction that L1 needs for its own work stands in its code once, with a HLT behind it. :class:`L1` sets the
registers, runs the vCPU to that HLT, and looks at the flags. All is done through the KVM API, and VMCS fields are read
and written by VMREAD and VMWRITE, whatever a VMCS looks like in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lasskvm.conformance import nested_layout as place
from lasskvm.conformance.assembler import Assembled, assemble
from lasskvm.conformance.testbed import ProviderError
from lasskvm.kvm.exits import Exit, HltExit
from lasskvm.kvm.structures import Regs, Sregs
from lasskvm.memory import GuestMemory
from lasskvm.x86.registers import RFLAGS_CF, RFLAGS_FIXED, RFLAGS_ZF
from lasskvm.x86.vmx import VMCS_REVISION_ID, VMX_BASIC_REVISION
from lasskvm.x86.vmx_fields import VmcsField

if TYPE_CHECKING:
    from lasskvm.kvm.interface import VcpuInterface

__all__ = ["L1"]

_CODE = """
vmxon: vmxon [rbx]; hlt
vmxon_end:
vmxoff: vmxoff; hlt
vmxoff_end:
vmclear: vmclear [rbx]; hlt
vmclear_end:
vmptrld: vmptrld [rbx]; hlt
vmptrld_end:
vmwrite: mov rax, [rsi]; vmwrite rax, [rsi + 8]; jbe vmwrite_stop; add rsi, 16; loop vmwrite
vmwrite_stop: hlt
vmwrite_end:
vmread: mov rax, [rsi]; vmread [rsi + 8], rax; jbe vmread_stop; add rsi, 16; loop vmread
vmread_stop: hlt
vmread_end:
invept: invept rax, [rbx]; hlt
invept_end:
invvpid: invvpid rax, [rbx]; hlt
invvpid_end:
store: mov [rbx], rax; hlt
store_end:
vmlaunch: vmlaunch; hlt
vmlaunch_end:
vmresume: vmresume; hlt
vmresume_end:
exit: hlt
exit_end:
"""
_WORD_BYTES, _PAIR_BYTES = 8, 16
_REVISION_BYTES = 4
_FAILED = RFLAGS_CF | RFLAGS_ZF


class L1:
    """L1 on *vcpu*, whose memory has what :mod:`lasskvm.conformance.nested_layout` describes mapped.

    *basic* is IA32_VMX_BASIC; *run* runs the vCPU to its next HLT or shutdown. Every step raises
    :class:`~lasskvm.conformance.testbed.ProviderError` when it does not do what it should.
    """

    def __init__(self, vcpu: VcpuInterface, memory: GuestMemory, basic: int, run: Callable[[], Exit]) -> None:
        self._vcpu = vcpu
        self._memory = memory
        self._run = run
        self.code = assemble(_CODE, place.CODE)
        #: Where VM exits come to.
        self.exit_rip = self.code.labels["exit"]
        memory.write(place.CODE_GPA, self.code.code)
        for gpa in (place.VMXON_GPA, place.VMCS_GPA, place.OTHER_VMCS_GPA, place.FREE_VMCS_GPA):
            memory.store(gpa + VMCS_REVISION_ID, _REVISION_BYTES, basic & VMX_BASIC_REVISION)

    # -------------------------------------------------------------------------------------------------- the state

    def begin(self, sregs: Sregs) -> None:
        """Set the special registers, outside VMX operation, whatever was before."""
        self._vcpu.set_sregs(sregs)
        # Outside VMX operation this is #UD, and L1's handler halts as well.
        self._vcpu.set_regs(self._start("vmxoff"))
        self._run()
        self._vcpu.set_sregs(sregs)

    def enter_vmx_operation(self) -> None:
        """VMXON."""
        self._with_pointer("vmxon", place.VMXON_GPA)

    def make_current(self, gpa: int) -> None:
        """VMCLEAR and VMPTRLD: the VMCS at *gpa* is current, and its launch state is clear."""
        self._with_pointer("vmclear", gpa)
        self._with_pointer("vmptrld", gpa)

    def write(self, fields: Mapping[VmcsField, int]) -> None:
        """VMWRITE of all *fields*."""
        for number, (field, value) in enumerate(fields.items()):
            self._memory.store(place.FIELDS_GPA + number * _PAIR_BYTES, _WORD_BYTES, field)
            self._memory.store(place.FIELDS_GPA + number * _PAIR_BYTES + _WORD_BYTES, _WORD_BYTES, value)
        self._all_fields("vmwrite", list(fields))

    def read(self, fields: Iterable[VmcsField]) -> dict[VmcsField, int]:
        """VMREAD of all *fields*."""
        wanted = list(fields)
        for number, field in enumerate(wanted):
            self._memory.store(place.FIELDS_GPA + number * _PAIR_BYTES, _WORD_BYTES, field)
        self._all_fields("vmread", wanted)
        values = place.FIELDS_GPA + _WORD_BYTES
        return {
            field: self._memory.load(values + number * _PAIR_BYTES, _WORD_BYTES)
            for number, field in enumerate(wanted)
        }

    def invalidate(self, instruction: str, kind: int) -> None:
        """INVEPT or INVVPID of *kind*, one that needs nothing from the descriptor."""
        self._memory.write(place.POINTERS_GPA, bytes(_PAIR_BYTES))
        self._succeed(instruction, rax=kind, rbx=place.POINTERS)

    def store(self, address: int, value: int) -> None:
        """Store 64 bits at linear *address*."""
        self._step("store", rax=value, rbx=address)

    # ------------------------------------------------------------------------------------------------ going on

    def enter(self, regs: Regs, *, launch: bool) -> tuple[Exit, Regs]:
        """VMLAUNCH, or VMRESUME, with the general-purpose registers of *regs*; where that leads L1."""
        start = self.code.labels["vmlaunch" if launch else "vmresume"]
        return self._continue(replace(regs, rip=start, rsp=place.STACK_TOP, rflags=RFLAGS_FIXED))

    def execute(
        self, program: Assembled, registers: Mapping[str, int], rflags: int = RFLAGS_FIXED
    ) -> tuple[Exit, Regs]:
        """Run *program*, which is for ``nested_layout.PROGRAM``; *rflags* are those that a VM exit has left."""
        self._memory.write(place.PROGRAM_GPA, program.code)
        known = {"rip": program.address, "rsp": place.STACK_TOP, "rflags": rflags}
        return self._continue(Regs(**{**known, **registers}))

    def has_exited(self, regs: Regs) -> bool:
        """Whether L1 has halted where VM exits come to."""
        return regs.rip == self.code.labels["exit_end"]

    def has_failed(self, regs: Regs) -> bool:
        """Whether VMLAUNCH or VMRESUME has ended in VMfailValid."""
        behind = (self.code.labels["vmlaunch_end"], self.code.labels["vmresume_end"])
        return regs.rip in behind and bool(regs.rflags & RFLAGS_ZF)

    # ---------------------------------------------------------------------------------------------------- steps

    def _continue(self, regs: Regs) -> tuple[Exit, Regs]:
        self._vcpu.set_regs(regs)
        return self._run(), self._vcpu.get_regs()

    def _start(self, name: str, **registers: int) -> Regs:
        return Regs(**{"rip": self.code.labels[name], "rsp": place.STACK_TOP, **registers})

    def _step(self, name: str, **registers: int) -> Regs:
        """Run the step of that *name* to its HLT."""
        reason, regs = self._continue(self._start(name, **registers))
        if not isinstance(reason, HltExit) or regs.rip != self.code.labels[f"{name}_end"]:
            raise ProviderError(f"L1 could not execute {name.upper()}: {reason} at {regs.rip:#x}")
        return regs

    def _succeed(self, name: str, **registers: int) -> None:
        """Run a step whose last instruction tells by the flags how it has ended."""
        flags = self._step(name, **registers).rflags & _FAILED
        if flags:
            kind = "VMfailValid" if flags & RFLAGS_ZF else "VMfailInvalid"
            raise ProviderError(f"{name.upper()} of L1 ended in {kind}")

    def _with_pointer(self, name: str, gpa: int) -> None:
        self._memory.store(place.POINTERS_GPA, _WORD_BYTES, gpa)
        self._succeed(name, rbx=place.POINTERS)

    def _all_fields(self, name: str, fields: list[VmcsField]) -> None:
        if not fields:
            return
        left = self._step(name, rcx=len(fields), rsi=place.FIELDS).rcx
        if left:
            raise ProviderError(f"{name.upper()} of L1 failed for {fields[len(fields) - left].name}")
