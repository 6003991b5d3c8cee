"""L2's accesses: violations that are delivered in L2, and violations that L1 intercepts, with EPT and without.

What counts is L2's CR4, CPL and RFLAGS. What L1 has in its own registers does not matter to L2, nor L2's to L1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, Mode, completes, fault, gp, pf, ss, vm_exit
from lasskvm.conformance.cases.common import (
    HIGH_SUPERVISOR,
    HIGH_USER,
    LAST_PAGE,
    LOW_ABSENT,
    LOW_SUPERVISOR,
    LOW_USER,
    last_and_first_page,
)
from lasskvm.conformance.cases.nested_common import exception_exit, guest_case, with_and_without_ept
from lasskvm.conformance.nested import Nested, Turn
from lasskvm.conformance.setup import IdtImage, Words
from lasskvm.kvm.structures import DescriptorTable
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import DF, ERROR_EXT, GP, PF, PF_P, PF_U, SS, UD
from lasskvm.x86.registers import RFLAGS_AC
from lasskvm.x86.vmx_exits import ExitReason

__all__ = ["CASES"]

_READ, _WRITTEN, _NONE = Effect.READ, Effect.WRITTEN, Effect.NONE
_LOW_CODE, _HIGH_CODE = layout.LOW_SUPERVISOR, layout.HIGH_USER
_VIOLATIONS = 1 << GP | 1 << SS
_INTERCEPTED = Nested(exceptions=_VIOLATIONS)


@dataclass(frozen=True)
class _Access:
    """A violation of L2: the program finds *operand*, and *bias* behind it, in the register *at*."""

    name: str
    words: str
    program: str
    operand: int
    cpl: int = 0
    at: str = "rbx"
    bias: int = 0
    effect: Effect = _READ
    stack: bool = False
    rip: int | str = "access"
    mmio: bool = True

    def cases(self) -> tuple[Case, ...]:
        """Delivered in L2, and intercepted by L1; each with EPT and without."""
        vector = SS if self.stack else GP
        fields: dict[str, Any] = {
            "cpl": self.cpl, "operand": self.operand, "registers": {self.at: self.operand + self.bias},
            "mmio": (self.operand,) if self.mmio else (),
        }  # fmt: skip
        allowed = completes(self.effect)
        delivered = guest_case(
            f"l2-{self.name}", f"{self.words} in L2 is delivered in L2", self.program,
            fault(vector, 0, self.rip), allowed, **fields,
        )  # fmt: skip
        intercepted = guest_case(
            f"l2-{self.name}-intercepted", f"{self.words} in L2 exits to L1, which intercepts #GP and #SS",
            self.program, exception_exit(vector, rip=self.rip), allowed, nested=_INTERCEPTED, **fields,
        )  # fmt: skip
        return (*with_and_without_ept(delivered), *with_and_without_ept(intercepted))


_ACCESSES = (
    _Access("user-read-high", "a user read above the split", "access: mov rax, [rbx]", HIGH_USER, cpl=3),
    _Access("user-write-high", "a user write above the split", "access: mov [rbx], rbx", HIGH_USER, cpl=3,
            effect=_WRITTEN),
    _Access("user-fetch-high", "a user fetch above the split", "access: jmp rbx", _HIGH_CODE, cpl=3,
            rip=_HIGH_CODE, mmio=False),
    _Access("user-push-high", "a user push above the split", "access: push rbx", HIGH_USER, cpl=3, at="rsp", bias=8,
            effect=_WRITTEN, stack=True),
    _Access("supervisor-read-low", "a supervisor read below the split", "access: mov rax, [rbx]", LOW_SUPERVISOR),
    _Access("supervisor-add-low", "a supervisor read-modify-write below the split", "access: add [rbx], rbx",
            LOW_SUPERVISOR, effect=_WRITTEN),
    _Access("supervisor-fetch-low", "a supervisor fetch below the split", "access: jmp rbx", _LOW_CODE,
            rip=_LOW_CODE, mmio=False),
    _Access("supervisor-pop-low", "a supervisor pop below the split", "access: pop rax", LOW_SUPERVISOR, at="rsp",
            stack=True),
    _Access("supervisor-rbp-low", "a supervisor operand at [RBP] below the split", "access: mov rax, [rbp]",
            LOW_SUPERVISOR, at="rbp", stack=True),
)  # fmt: skip


def _low(name: str, words: str, program: str, lass: Expected, off: Expected | None, **more: Any) -> Case:
    """An access of L2's kernel below the split, whose address is in RBX."""
    fields: dict[str, Any] = {"registers": {"rbx": LOW_SUPERVISOR}, "operand": LOW_SUPERVISOR, **more}
    return guest_case(name, words, program, lass, off, **fields)


_LOAD = "access: mov rax, [rbx]"
_ALLOWED = completes(_READ)
_ALLOWED_ACCESSES = (
    _low("l2-ac1", "with AC=1 in L2, its kernel reads below the split", _LOAD, _ALLOWED, _ALLOWED, rflags=RFLAGS_AC,
         mmio=(LOW_SUPERVISOR,)),
    _low("l2-no-smap", "without SMAP in L2, its kernel reads below the split", _LOAD, _ALLOWED, _ALLOWED, smap=False,
         mmio=(LOW_SUPERVISOR,)),
    guest_case("l2-supervisor-high", "L2's kernel reads its own half", _LOAD, _ALLOWED, _ALLOWED,
               registers={"rbx": HIGH_SUPERVISOR}, operand=HIGH_SUPERVISOR, mmio=(HIGH_SUPERVISOR,)),
    guest_case("l2-user-low", "L2's programs read their own half", _LOAD, _ALLOWED, _ALLOWED, cpl=3,
               registers={"rbx": LOW_USER}, operand=LOW_USER, mmio=(LOW_USER,)),
    guest_case("l2-user-write-low", "L2's programs write their own half", "access: mov [rbx], rbx",
               completes(_WRITTEN), completes(_WRITTEN), cpl=3,
               registers={"rbx": LOW_USER}, operand=LOW_USER, mmio=(LOW_USER,)),
    guest_case("l2-invlpg-low", "INVLPG of L2 names an address, and accesses none", "access: invlpg [rbx]",
               completes(_NONE), completes(_NONE), registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR),
    guest_case("l2-compatibility", "a 32-bit program in L2 has the lower half", "access: mov eax, [ebx]", _ALLOWED,
               _ALLOWED, mode=Mode.COMPATIBILITY, cpl=3, registers={"rbx": LOW_USER}, operand=LOW_USER),
)  # fmt: skip

_OTHERS = (
    _low("l2-gp-not-intercepted", "L1 intercepts #SS only: L2 gets its #GP", _LOAD, gp(), _ALLOWED,
         nested=Nested(exceptions=1 << SS)),
    guest_case("l2-ss-not-intercepted", "L1 intercepts #GP only: L2 gets its #SS", "access: push rbx", ss(),
               completes(_WRITTEN), registers={"rsp": LOW_SUPERVISOR + 8}, operand=LOW_SUPERVISOR,
               nested=Nested(exceptions=1 << GP)),
    guest_case("l2-before-page-fault", "LASS comes before the page fault, which L1 intercepts as well", _LOAD,
               exception_exit(GP), exception_exit(PF, PF_U, exit_qualification=HIGH_USER + PAGE_SIZE * 2), cpl=3,
               registers={"rbx": HIGH_USER + PAGE_SIZE * 2}, operand=HIGH_USER + PAGE_SIZE * 2,
               nested=Nested(exceptions=_VIOLATIONS | 1 << PF)),
    guest_case("l2-page-fault-delivered", "LASS comes before the page fault that L2 would get", _LOAD, gp(),
               pf(0, LOW_ABSENT), registers={"rbx": LOW_ABSENT}, operand=LOW_ABSENT),
    _low("l2-protection-fault", "a supervisor read of a user page: violation, or SMAP's page fault", _LOAD,
         exception_exit(GP), exception_exit(PF, PF_P, exit_qualification=LOW_USER),
         registers={"rbx": LOW_USER}, operand=LOW_USER, nested=Nested(exceptions=1 << GP | 1 << PF)),
    guest_case("l2-wrap", "a read of L2 across the end of the address space", _LOAD, exception_exit(GP), _ALLOWED,
               registers={"rbx": LAST_PAGE + PAGE_SIZE - 4}, operand=LAST_PAGE + PAGE_SIZE - 4,
               setup=last_and_first_page(), nested=_INTERCEPTED),
    guest_case("l2-movs", "REP MOVSB of L2 to the other half", "access: rep movsb", exception_exit(GP),
               completes(_WRITTEN), registers={"rsi": HIGH_SUPERVISOR, "rdi": LOW_SUPERVISOR + 9, "rcx": 4},
               operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,), nested=_INTERCEPTED),
    guest_case("l2-invpcid-low", "the descriptor of L2's INVPCID is data", "access: invpcid rax, [rbx]",
               exception_exit(GP), _ALLOWED, registers={"rax": 2, "rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR,
               setup=(Words(LOW_SUPERVISOR, (0, 0)),), needs=frozenset({"vmx", "invpcid"}),
               nested=Nested(exceptions=_VIOLATIONS, secondary=vmx.SECONDARY_EXEC_ENABLE_INVPCID)),
    _low("l2-vmread", "a VMX instruction of L2 exits before its operand is looked at", "access: vmread [rbx], rax",
         vm_exit(ExitReason.VMREAD).but(effect=_NONE), vm_exit(ExitReason.VMREAD).but(effect=_NONE),
         nested=_INTERCEPTED, forced=False),
    guest_case("l2-vmptrld-user", "also at CPL 3", "access: vmptrld [rbx]",
               vm_exit(ExitReason.VMPTRLD).but(effect=_NONE), vm_exit(ExitReason.VMPTRLD).but(effect=_NONE), cpl=3,
               registers={"rbx": HIGH_USER}, operand=HIGH_USER, nested=_INTERCEPTED, forced=False),
)  # fmt: skip

#: L2 has its IDT below the split: nothing can be delivered in it.
_LOW_IDT: dict[str, Any] = {
    "sregs": {"idt": DescriptorTable(layout.LOW_SUPERVISOR, layout.VECTORS * layout.GATE_BYTES - 1)},
    "setup": (IdtImage(layout.LOW_SUPERVISOR),), "registers": {}, "operand": layout.LOW_SUPERVISOR,
    "forced": False,
}  # fmt: skip
_UD = "access: ud2; next: nop"
_UD_VECTORING = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_HARD_EXCEPTION | UD
_DELIVERED = fault(UD).but(effect=_READ)
_IMPLICIT = (
    _low("l2-low-idt", "L2's IDT below the split: a triple fault, which is an exit", _UD,
         vm_exit(ExitReason.TRIPLE_FAULT).but(effect=_NONE), _DELIVERED, **_LOW_IDT),
    _low("l2-low-idt-ac1", "AC=1 does not help an implicit access", _UD,
         vm_exit(ExitReason.TRIPLE_FAULT).but(effect=_NONE), _DELIVERED, rflags=RFLAGS_AC, **_LOW_IDT),
    _low("l2-low-idt-user", "nor does CPL 3", _UD,
         vm_exit(ExitReason.TRIPLE_FAULT).but(effect=_NONE), _DELIVERED, cpl=3, **_LOW_IDT),
    _low("l2-low-idt-gp", "the #GP during the delivery of #UD exits, and L1 learns about the #UD", _UD,
         exception_exit(GP, ERROR_EXT, idt_vectoring_info_field=_UD_VECTORING), _DELIVERED,
         nested=Nested(exceptions=1 << GP), **_LOW_IDT),
    _low("l2-low-idt-df", "the double fault exits", _UD, exception_exit(DF), _DELIVERED,
         nested=Nested(exceptions=1 << DF), **_LOW_IDT),
)  # fmt: skip

_L1_READS_LOW = Turn(
    program="l1_access: mov rax, [rbx]", resumes=False, registers={"rbx": LOW_SUPERVISOR}, skips=False
)  # fmt: skip


def _apart(name: str, words: str, outcome: Expected, **more: Any) -> Case:
    """A case in which one of L1 and L2 has LASS, and the other has not: L2 with LASS in the variant ``lass``."""
    return _low(name, words, "access: vmcall", outcome, None, forced=False, **more)


_VIOLATION_IN_L1, _NO_VIOLATION_IN_L1 = gp("l1_access", exit_qualification=0), completes(_READ)
_APART = (
    _low("l2-lass-alone", "L2's LASS applies although L1 has none", _LOAD, gp(), _ALLOWED,
         nested=Nested(l1_lass=False), mmio=(LOW_SUPERVISOR,)),
    _low("l2-lass-alone-intercepted", "L2's LASS applies although L1 has none, and L1 intercepts #GP", _LOAD,
         exception_exit(GP, l1_cr4_lass=0), _ALLOWED, nested=Nested(l1_lass=False, exceptions=1 << GP)),
    guest_case("l2-user-lass-alone", "L2's LASS applies to its programs although L1 has none", _LOAD, gp(), _ALLOWED,
               cpl=3, registers={"rbx": HIGH_USER}, operand=HIGH_USER, nested=Nested(l1_lass=False)),
    _apart("l1-lass-behind-l2-with", "L1's LASS applies behind an exit of L2 that has LASS", _VIOLATION_IN_L1,
           nested=Nested(turns=(_L1_READS_LOW,))),
    _apart("l1-lass-behind-l2-without", "L1's LASS applies behind an exit of L2 that has none", _VIOLATION_IN_L1,
           enabled=False, nested=Nested(turns=(_L1_READS_LOW,))),
    _apart("l1-without-behind-l2-with", "L2's LASS does not apply to L1", _NO_VIOLATION_IN_L1,
           nested=Nested(l1_lass=False, turns=(_L1_READS_LOW,))),
    _apart("l1-lass-behind-l2-ac1", "L2's AC=1 does not help L1", _VIOLATION_IN_L1, rflags=RFLAGS_AC,
           nested=Nested(turns=(_L1_READS_LOW,))),
    _apart("l1-lass-behind-l2-no-smap", "nor does L2 without SMAP", _VIOLATION_IN_L1, smap=False,
           nested=Nested(turns=(_L1_READS_LOW,))),
    guest_case("l1-lass-behind-l2-user", "L1 is a supervisor behind an exit of a program of L2", "access: cpuid",
               _VIOLATION_IN_L1, None, cpl=3, operand=LOW_SUPERVISOR, forced=False,
               nested=Nested(turns=(replace(_L1_READS_LOW, reason=ExitReason.CPUID),))),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    *(case for access in _ACCESSES for case in access.cases()),
    *(case for allowed in _ALLOWED_ACCESSES for case in with_and_without_ept(allowed)),
    *_OTHERS,
    *(case for implicit in _IMPLICIT for case in with_and_without_ept(implicit)),
    *_APART,
)
