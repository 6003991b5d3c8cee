"""The testbed of cases in which VMX is used: before the case's program, L1 is brought to where the case wants it.

Up to :attr:`~lasskvm.conformance.nested.Stage.CURRENT` the program is L1's and runs as any other. For L2, L1 enters it
with the state that the program of an ordinary case would have, and what L2 does comes back as VM exits: a HLT in one of
its handlers tells of an event that was delivered in L2, as it does without nesting.

Only the KVM API is used, and only while L1 runs: no case ends inside L2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lasskvm.conformance import layout, nested_layout
from lasskvm.conformance.assembler import Assembled, assemble
from lasskvm.conformance.backends import Backend
from lasskvm.conformance.case import COMPLETION, Case, Ending, Mode
from lasskvm.conformance.nested import Nested, Stage, Turn
from lasskvm.conformance.nested_l1 import L1
from lasskvm.conformance.nested_layout import EptTables, map_areas
from lasskvm.conformance.nested_vmcs import (
    CAPABILITY_MSRS,
    OBSERVED,
    changed_by_entry_and_exit,
    guest_pdptes,
    vmcs_fields,
)
from lasskvm.conformance.observation import CR2_UNTOUCHED, Observed
from lasskvm.conformance.testbed import Device, ProviderError, Testbed
from lasskvm.kvm.exits import Exit, HltExit
from lasskvm.kvm.structures import DebugRegs, Regs, Segment, Sregs
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86 import vmx
from lasskvm.x86.cpuid import CpuidEntry
from lasskvm.x86.msr import (
    FEATURE_CONTROL_LOCK,
    FEATURE_CONTROL_VMX_OUTSIDE_SMX,
    MSR_IA32_FEATURE_CONTROL,
    MSR_IA32_VMX_BASIC,
)
from lasskvm.x86.registers import CR0_PG, CR4_LASS, CR4_VMXE, EFER_LMA
from lasskvm.x86.vmx_exits import EXIT_REASON_BASIC, ExitReason
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["NestedTestbed"]

_VMX_ENABLED = FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMX_OUTSIDE_SMX
_HLT_BYTES = 1
#: What the VMCS of :attr:`Stage.CURRENT` holds for VMREAD to find.
MARKER_FIELD, MARKER = VmcsField.TSC_OFFSET, 0x1122_3344_5566_7788


class NestedTestbed(Testbed):
    """A VM whose guest is a hypervisor. *backend*, *entries*, *levels* and *timeout* are those of :class:`Testbed`."""

    __test__ = False

    def __init__(
        self,
        backend: Backend,
        entries: Iterable[CpuidEntry],
        *,
        levels: int = layout.DEFAULT_LEVELS,
        timeout: float,
    ) -> None:
        super().__init__(backend, entries, levels=levels, timeout=timeout)
        #: The capability MSRs that the VMCS is made by.
        self.capabilities = self._vcpu.get_msrs(CAPABILITY_MSRS)
        basic = self.capabilities.get(MSR_IA32_VMX_BASIC, 0)
        #: For further steps, between cases.
        self.l1 = L1(self._vcpu, self._memory, basic, lambda: self._run(self._device))
        self._device = Device()
        self._ept = EptTables(self._memory)
        #: What L1 has written into the VMCS of L2, as far as it is still there.
        self._written: dict[VmcsField, int] = {}

    def _build_memory(self) -> None:
        map_areas(self._tables)
        super()._build_memory()

    # ------------------------------------------------------------------------------------------------- one run

    def _execute(self, case: Case, program: Assembled, lass: bool, device: Device) -> Observed:
        nested = case.nested
        assert nested is not None
        self._device = device
        self._vcpu.set_msrs({MSR_IA32_FEATURE_CONTROL: _VMX_ENABLED})
        if nested.stage is Stage.GUEST:
            return self._execute_in_guest(case, nested, program, lass, device)
        self.l1.begin(self._l1_sregs(lass=nested.l1_lass))
        if nested.stage is not Stage.ENABLED:
            self.l1.enter_vmx_operation()
        if nested.stage is Stage.CURRENT:
            self.l1.make_current(nested_layout.OTHER_VMCS_GPA)
            self.l1.write({MARKER_FIELD: MARKER})
        return super()._execute(case, program, lass, device)

    def _sregs(self, case: Case, lass: bool) -> Sregs:
        sregs = super()._sregs(case, lass)
        sregs.cr4 |= CR4_VMXE
        return sregs

    def _l1_sregs(self, *, lass: bool) -> Sregs:
        """L1's own special registers, in which it does its work."""
        sregs = layout.initial_sregs(self._power_on, 0, Mode.LONG.bits, self._cr3)
        null = Segment(0, 0, 0, sregs.ds.attributes)
        cr4 = sregs.cr4 & ~CR4_LASS | CR4_VMXE | (CR4_LASS if lass else 0)
        return replace(sregs, ds=null, es=null, fs=null, gs=null, cr2=CR2_UNTOUCHED, cr4=cr4)

    def _execute_in_guest(
        self, case: Case, nested: Nested, program: Assembled, lass: bool, device: Device
    ) -> Observed:
        guest = self._sregs(case, lass)
        start = self._registers(case, program)
        host = self._l1_sregs(lass=nested.l1_lass)
        self.l1.begin(host)
        self._set_msrs(case, program)
        self._vcpu.set_debugregs(DebugRegs())
        self.l1.enter_vmx_operation()
        self.l1.make_current(nested_layout.VMCS_GPA)
        self._write_vmcs(nested, host, guest, start)
        self._invalidate(nested)
        end = self.l1.enter(start, launch=True)
        labels = dict(program.labels)
        exits: dict[VmcsField, int] | None = None
        for turn in nested.turns:
            if not self._is_due(turn, end):
                break
            if not turn.resumes:
                exits = self.l1.read(OBSERVED)
                code = assemble(f"{turn.program}\n{COMPLETION}", nested_layout.PROGRAM)
                labels |= code.labels
                end = self.l1.execute(code, turn.registers, end[1].rflags)
                break
            end = self._take(turn, case, nested, end)
        self._forget_written(nested)
        observed = self._observe_end(case, replace(program, labels=labels), start, end, device, exits)
        self._put_back(case, nested)
        return observed

    def _write_vmcs(self, nested: Nested, host: Sregs, guest: Sregs, start: Regs) -> None:
        """Everything the first time; then what is different."""
        if nested.host_lass is not None:
            host = replace(host, cr4=host.cr4 & ~CR4_LASS | (CR4_LASS if nested.host_lass else 0))
        eptp = 0 if nested.ept is None else self._ept.pointer(nested.ept)
        fields = vmcs_fields(nested, self.capabilities, host, guest, start, eptp, self.l1.exit_rip)
        if nested.ept is not None and guest.cr0 & CR0_PG and not guest.efer & EFER_LMA:
            fields |= guest_pdptes(self._memory, guest.cr3)
        self.l1.write({name: value for name, value in fields.items() if self._written.get(name) != value})
        self._written |= fields

    def _forget_written(self, nested: Nested) -> None:
        if nested.turns:
            # L1's own programs write whatever they like.
            self._written.clear()
        for name in changed_by_entry_and_exit():
            self._written.pop(name, None)

    def _invalidate(self, nested: Nested) -> None:
        """The VMM has changed page tables, which L2's VPID and L1's EPT pointer may have translations of."""
        if nested.ept is not None:
            self.l1.invalidate("invept", vmx.VMX_EPT_EXTENT_GLOBAL)
        if nested.vpid:
            self.l1.invalidate("invvpid", vmx.VMX_VPID_EXTENT_ALL_CONTEXT)

    # ----------------------------------------------------------------------------------------- behind VM exits

    def _is_due(self, turn: Turn, end: tuple[Exit, Regs]) -> bool:
        """Whether L2 has exited for what *turn* is for."""
        reason, regs = end
        if not isinstance(reason, HltExit) or not self.l1.has_exited(regs):
            return False
        return self.l1.read((VmcsField.VM_EXIT_REASON,))[VmcsField.VM_EXIT_REASON] == turn.reason

    def _take(self, turn: Turn, case: Case, nested: Nested, end: tuple[Exit, Regs]) -> tuple[Exit, Regs]:
        regs = end[1]
        program = assemble(f"{turn.program}\nhlt", nested_layout.PROGRAM)
        known = {"rbx": nested_layout.SCRATCH}
        if case.operand is not None:
            known["rsi"] = layout.UPPER + self._tables.entry_gpa(case.operand)
            if nested.ept is not None:
                known["rdi"] = self._ept.entry(nested.ept, self._tables.frame(case.operand))
        reason, there = self.l1.execute(program, {**known, **turn.registers}, regs.rflags)
        if not isinstance(reason, HltExit) or there.rip != program.end:
            raise ProviderError(f"L1 could not execute {turn.program!r}: {reason} at {there.rip:#x}")
        if turn.skips:
            fields = self.l1.read((VmcsField.GUEST_RIP, VmcsField.VM_EXIT_INSTRUCTION_LEN))
            self.l1.write({VmcsField.GUEST_RIP: sum(fields.values())})
        return self.l1.enter(regs, launch=False)

    def _put_back(self, case: Case, nested: Nested) -> None:
        """L1 itself makes its EPT tables what they were, so that nobody misses it."""
        if nested.ept is None or case.operand is None or not nested.turns:
            return
        gpa = self._tables.frame(case.operand)
        if gpa < layout.MEMORY_BYTES:
            self.l1.store(
                self._ept.entry(nested.ept, gpa), self._ept.pristine_entry(nested.ept, gpa & -PAGE_SIZE)
            )

    # ------------------------------------------------------------------------------------------------- the outcome

    def _observe_end(
        self,
        case: Case,
        program: Assembled,
        start: Regs,
        end: tuple[Exit, Regs],
        device: Device,
        exits: dict[VmcsField, int] | None,
    ) -> Observed:
        """*exits* are the fields of the VMCS when L1 has done something since."""
        reason, regs = end
        sregs = self._vcpu.get_sregs()
        l1_lass = int(bool(sregs.cr4 & CR4_LASS))
        if exits is None and self.l1.has_failed(regs):
            observed = self._observe(case, program, start, reason, device, regs, sregs)
            fields = _named(self.l1.read(OBSERVED)) | {"l1_cr4_lass": l1_lass}
            return replace(observed, ending=Ending.VM_FAIL, fields=fields)
        if exits is not None or not self.l1.has_exited(regs):
            observed = self._observe(case, program, start, reason, device, regs, sregs)
            # Without an exit there is nothing to read; L1 itself has come to an end.
            fields = _named(exits or dict.fromkeys(OBSERVED, 0)) | {"l1_cr4_lass": l1_lass}
            return replace(observed, fields=fields)
        found = self.l1.read(OBSERVED)
        regs, sregs = _l2_registers(found, regs, sregs)
        observed = self._observe(case, program, start, reason, device, regs, sregs)
        observed = replace(observed, fields=_named(found) | {"l1_cr4_lass": l1_lass})
        exit_reason = found[VmcsField.VM_EXIT_REASON]
        if exit_reason == ExitReason.HLT:
            return observed
        return replace(
            observed, ending=Ending.VM_EXIT, exit_reason=exit_reason, vector=None, error_code=None,
            rip=regs.rip, rflags=regs.rflags, rsp=regs.rsp, cs=sregs.cs.selector, ss=sregs.ss.selector,
        )  # fmt: skip


def _named(fields: dict[VmcsField, int]) -> dict[str, int]:
    return {field.name.lower(): value for field, value in fields.items()}


def _l2_registers(found: dict[VmcsField, int], regs: Regs, sregs: Sregs) -> tuple[Regs, Sregs]:
    """L2's registers behind a VM exit; L1's are those of the vCPU. Behind a HLT, RIP is as without nesting."""
    rip = found[VmcsField.GUEST_RIP]
    if found[VmcsField.VM_EXIT_REASON] & EXIT_REASON_BASIC == ExitReason.HLT:
        rip += _HLT_BYTES
    regs = replace(regs, rip=rip, rsp=found[VmcsField.GUEST_RSP], rflags=found[VmcsField.GUEST_RFLAGS])
    cs = replace(sregs.cs, selector=found[VmcsField.GUEST_CS_SELECTOR], base=found[VmcsField.GUEST_CS_BASE])
    ss = replace(sregs.ss, selector=found[VmcsField.GUEST_SS_SELECTOR], base=found[VmcsField.GUEST_SS_BASE])
    return regs, replace(
        sregs, cs=cs, ss=ss, cr0=found[VmcsField.GUEST_CR0], cr4=found[VmcsField.GUEST_CR4],
        efer=found[VmcsField.GUEST_IA32_EFER],
    )  # fmt: skip
