"""What a guest hypervisor feels, in this process: a VM exit to L1 and back, and code of L2 against the same in L1.

L1 is that of the conformance suite (:mod:`lasskvm.conformance.nested_l1`), with an exit handler of its own. All numbers
are by the host's clock; L1 and L2 take turns in one run.
"""

from __future__ import annotations

import time
from dataclasses import replace

from benchmarks.context import Context
from benchmarks.rows import BenchmarkError, Row, compared, limited, measured, median
from lasskvm.conformance import layout
from lasskvm.conformance import nested_layout as place
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.nested import Ept, Nested
from lasskvm.conformance.nested_l1 import L1
from lasskvm.conformance.nested_layout import EptTables, map_areas
from lasskvm.conformance.nested_vmcs import CAPABILITY_MSRS, vmcs_fields
from lasskvm.kvm import Exit, HltExit, IntrExit, Regs
from lasskvm.x86.msr import MSR_IA32_VMX_BASIC
from lasskvm.x86.registers import CR4_VMXE
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["run"]

#: The bar for a VM exit to L1 and back, in microseconds.
_EXIT_BAR = 100.0
#: L2's code may take this much longer than L1's: it is to run at 0.9 of the speed.
_LOOP_BAR = 1 / 0.9
_MICROSECONDS = 1e6

_EXITS = 5_000
_TURNS = 3_000_000
#: L2: an unconditional exit, again and again. L1 decides when it is enough.
_EXITING = "again: xor eax, eax; cpuid; jmp again"
#: Handlers of L1: one that only goes back, to the same CPUID, and one that does what a hypervisor does for one.
_BARE = "dec r8; je enough; vmresume; enough: hlt"
_READ_AND_SKIP = f"""
    mov rax, {VmcsField.VM_EXIT_REASON:#x}; vmread rbx, rax
    mov rax, {VmcsField.VM_EXIT_INSTRUCTION_LEN:#x}; vmread rdx, rax
    mov rax, {VmcsField.GUEST_RIP:#x}; vmread rbx, rax; add rbx, rdx; vmwrite rax, rbx
    dec r8; je enough; vmresume
    enough: hlt
"""
#: Integers and memory, then HLT, which is an exit in L2.
_LOOP = "again: mov rax, [rdi]; lea rbx, [rax + rcx]; xor rdx, rbx; mov [rdi], rdx; dec rcx; jne again; hlt"


def run(context: Context) -> list[Row]:
    """Rows for exits to L1, with and without EPT, and for a loop in L2."""
    machine = _Machine()
    rows: list[Row] = []
    for name, ept in (("with EPT", Ept()), ("without EPT", None)):
        context.progress(f"nested: exits, {name}")
        trips = [machine.round_trip(_BARE, ept) for _ in range(context.runs)]
        rows.append(limited(f"CPUID of L2 to L1 and back, {name}", median(trips), "us", at_most=_EXIT_BAR))
    context.progress("nested: exits that are handled")
    handled = [machine.round_trip(_READ_AND_SKIP, Ept()) for _ in range(context.runs)]
    rows.append(measured("the same, L1 reads three fields and writes RIP", median(handled), "us"))
    context.progress("nested: a loop in L1 and in L2")
    pairs = [(machine.loop_in_l2(), machine.loop_in_l1()) for _ in range(context.runs)]
    in_l2, in_l1 = (median(times) for times in zip(*pairs, strict=True))
    rows.append(compared("integer loop in L2, against L1", in_l2, in_l1, "s", at_most=_LOOP_BAR))
    return rows


class _Machine:
    """L1 with one VMCS, whose L2 is code of the same guest."""

    def __init__(self) -> None:
        self._guest = Guest()
        map_areas(self._guest.tables)
        vcpu = self._guest.vcpu
        self._capabilities = vcpu.get_msrs(CAPABILITY_MSRS)
        self._l1 = L1(vcpu, self._guest.memory, self._capabilities[MSR_IA32_VMX_BASIC], self._run)
        self._ept = EptTables(self._guest.memory)
        sregs = layout.initial_sregs(vcpu.get_sregs(), 0, 64, self._guest.tables.root)
        self._sregs = replace(sregs, cr4=sregs.cr4 | CR4_VMXE)

    def round_trip(self, handler: str, ept: Ept | None) -> float:
        """Microseconds from an instruction of L2 that exits, over *handler*, to its next one."""
        self._prepare(_EXITING, handler, ept)
        return self._enter(Regs(r8=_EXITS)) / _EXITS * _MICROSECONDS

    def loop_in_l2(self) -> float:
        """Seconds of the loop under EPT."""
        self._prepare(_LOOP, "hlt", Ept())
        return self._enter(Regs(rcx=_TURNS, rdi=layout.KERNEL_STACK_TOP - 64))

    def loop_in_l1(self) -> float:
        """Seconds of the same loop."""
        self._l1.begin(self._sregs)
        program = assemble(_LOOP, place.PROGRAM)
        start = time.perf_counter()
        self._l1.execute(program, {"rcx": _TURNS, "rdi": layout.KERNEL_STACK_TOP - 64})
        return time.perf_counter() - start

    def _prepare(self, program: str, handler: str, ept: Ept | None) -> None:
        """A fresh VMCS for an L2 that runs *program*, whose exits come to *handler*."""
        code = assemble(program, layout.KERNEL_CODE)
        self._guest.place(code)
        self._guest.memory.write(place.PROGRAM_GPA, assemble(handler, place.PROGRAM).code)
        self._l1.begin(self._sregs)
        self._l1.enter_vmx_operation()
        self._l1.make_current(place.VMCS_GPA)
        nested, eptp = Nested(ept=ept), 0 if ept is None else self._ept.pointer(ept)
        start = Regs(rip=code.address, rsp=layout.KERNEL_STACK_TOP)
        fields = vmcs_fields(nested, self._capabilities, self._sregs, self._sregs, start, eptp, place.PROGRAM)
        self._l1.write(fields)

    def _enter(self, registers: Regs) -> float:
        start = time.perf_counter()
        reason, _ = self._l1.enter(registers, launch=True)
        elapsed = time.perf_counter() - start
        if not isinstance(reason, HltExit):
            raise BenchmarkError(f"L1 did not come to its end: {reason}")
        return elapsed

    def _run(self) -> Exit:
        while isinstance(reason := self._guest.vcpu.run(), IntrExit):
            pass
        return reason
