"""L2 behind EPT and VPIDs: violations of LASS come before the EPT walk; what L1 changes counts when it says so."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import ACCESS, Case, Expected, Value, completes, gp, ss, vm_exit
from lasskvm.conformance.cases.common import HIGH_SUPERVISOR, HIGH_USER, LOW_SUPERVISOR
from lasskvm.conformance.cases.nested_common import IDENTITY, exception_exit, guest_case
from lasskvm.conformance.nested import Ept, Nested, Turn
from lasskvm.conformance.setup import Words
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86 import vmx
from lasskvm.x86.ept import EPT_R, EPT_W, EPT_X
from lasskvm.x86.exceptions import GP, SS
from lasskvm.x86.vmx_exits import EptViolation, ExitReason

__all__ = ["CASES"]

_OFFSET = LOW_SUPERVISOR % PAGE_SIZE
#: Where the pages of operands are in L2's memory.
_LOW_GPA, _USER_GPA = layout.DATA_GPA + 0x4000, layout.DATA_GPA + 0x8000
_ADDRESS_BITS = EptViolation.GVA_IS_VALID | EptViolation.GVA_TRANSLATED
_RW, _X_ONLY, _W_ONLY = EPT_R | EPT_W, EPT_X, EPT_W


def _violation(access: int, gva: int, gpa: int, allowed: int = 0, rip: Value = ACCESS) -> Expected:
    """An EPT violation of *access* to a page that EPT allows *allowed* for; L2's own tables have been walked."""
    return vm_exit(
        ExitReason.EPT_VIOLATION, rip, exit_qualification=access | _ADDRESS_BITS | allowed, guest_linear_address=gva,
        guest_physical_address=gpa,
    )  # fmt: skip


def _hole(
    name: str, words: str, program: str, lass: Expected, off: Expected, gpa: int, entry: int = 0, **more: Any
) -> Case:
    """A case of L2 with *entry* in the EPT tables for the page at *gpa*."""
    nested = Nested(ept=Ept(((gpa, entry),)), exceptions=more.pop("exceptions", 0))
    return guest_case(f"ept-{name}", words, program, lass, off, nested=nested, **more)


_LOAD, _STORE, _JUMP = "access: mov rax, [rbx]", "access: mov [rbx], rax", "access: jmp rbx"
_LOW: dict[str, Any] = {"registers": {"rbx": LOW_SUPERVISOR}, "operand": LOW_SUPERVISOR}
_USER: dict[str, Any] = {"registers": {"rbx": HIGH_USER}, "operand": HIGH_USER, "cpl": 3}
_LOW_GPA_OPERAND, _USER_GPA_OPERAND = _LOW_GPA + _OFFSET, _USER_GPA + _OFFSET
_ACC_READ, _ACC_WRITE, _ACC_INSTR = EptViolation.ACC_READ, EptViolation.ACC_WRITE, EptViolation.ACC_INSTR
_PROT_EXEC, _PROT_READ = EptViolation.PROT_EXEC, EptViolation.PROT_READ
_HOLES = (
    _hole("read", "LASS comes before the EPT violation, and is delivered in L2", _LOAD, gp(),
          _violation(_ACC_READ, LOW_SUPERVISOR, _LOW_GPA_OPERAND), _LOW_GPA, **_LOW),
    _hole("read-intercepted", "LASS comes before the EPT violation; L1 intercepts #GP", _LOAD, exception_exit(GP),
          _violation(_ACC_READ, LOW_SUPERVISOR, _LOW_GPA_OPERAND), _LOW_GPA, exceptions=1 << GP, **_LOW),
    _hole("user-read", "the same for a program of L2 above the split", _LOAD, gp(),
          _violation(_ACC_READ, HIGH_USER, _USER_GPA_OPERAND), _USER_GPA, **_USER),
    _hole("user-read-intercepted", "and with #GP intercepted", _LOAD, exception_exit(GP),
          _violation(_ACC_READ, HIGH_USER, _USER_GPA_OPERAND), _USER_GPA, exceptions=1 << GP, **_USER),
    _hole("write-read-only", "LASS comes before the EPT violation of a write to a page that EPT lets L2 read only",
          _STORE, gp(), _violation(_ACC_WRITE, LOW_SUPERVISOR, _LOW_GPA_OPERAND, _PROT_READ), _LOW_GPA, EPT_R,
          **_LOW),
    _hole("read-execute-only", "LASS comes before the EPT violation of a read from an execute-only page", _LOAD, gp(),
          _violation(_ACC_READ, LOW_SUPERVISOR, _LOW_GPA_OPERAND, _PROT_EXEC), _LOW_GPA, _X_ONLY, **_LOW),
    _hole("fetch", "LASS comes before the EPT violation of a fetch", _JUMP, gp(layout.LOW_SUPERVISOR),
          _violation(_ACC_INSTR, layout.LOW_SUPERVISOR, _LOW_GPA, _PROT_READ | EptViolation.PROT_WRITE,
                     layout.LOW_SUPERVISOR), _LOW_GPA, _RW,
          registers={"rbx": layout.LOW_SUPERVISOR}, operand=layout.LOW_SUPERVISOR),
    _hole("stack", "a stack access is #SS(0), not an EPT violation", "access: pop rax", ss(),
          _violation(_ACC_READ, LOW_SUPERVISOR, _LOW_GPA_OPERAND), _LOW_GPA,
          registers={"rsp": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR),
    _hole("stack-intercepted", "and exits as one", "access: pop rax", exception_exit(SS),
          _violation(_ACC_READ, LOW_SUPERVISOR, _LOW_GPA_OPERAND), _LOW_GPA, exceptions=1 << SS,
          registers={"rsp": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR),
    _hole("misconfiguration", "LASS comes before an EPT misconfiguration", _LOAD, gp(),
          vm_exit(ExitReason.EPT_MISCONFIG, guest_physical_address=_LOW_GPA_OPERAND), _LOW_GPA, _W_ONLY, **_LOW),
)  # fmt: skip

#: The two pages at ``HIGH_SUPERVISOR`` hold different words at the same place.
_OLD, _NEW = 0x0101_0101, 0x0202_0202
_TWO_PAGES = (Words(HIGH_SUPERVISOR, (_OLD,)), Words(HIGH_SUPERVISOR + PAGE_SIZE, (_NEW,)))
_VPID = 1
#: L1 maps the first page to the frame of the second: in L2's page tables, in the EPT tables.
_REMAP_PTE, _REMAP_EPT = (f"mov rax, [{at} + 8]; mov [{at}], rax" for at in ("rsi", "rdi"))


def _invalidate(instruction: str, kind: int, descriptor: tuple[int, int]) -> str:
    low, high = descriptor
    return (
        f"mov rax, {low:#x}; mov [rbx], rax; mov rax, {high:#x}; mov [rbx + 8], rax; "
        f"mov eax, {kind}; {instruction} rax, [rbx]"
    )


def _changed(name: str, words: str, program: str, **more: Any) -> Case:
    """L2 reads, L1 changes a translation, and L2 reads again."""
    outcome = completes(rcx=_OLD, rax=_NEW)
    return guest_case(
        name, words, "mov rcx, [rbx]; vmcall; access: mov rax, [rbx]", outcome, outcome,
        registers={"rbx": HIGH_SUPERVISOR}, operand=HIGH_SUPERVISOR, setup=_TWO_PAGES,
        nested=Nested(turns=(Turn(program=program),), **more),
    )  # fmt: skip


_INVALIDATIONS = (
    _changed("vpid-none", "without a VPID, a VM entry forgets L2's translations", _REMAP_PTE),
    *(
        _changed(f"invvpid-{name}", f"INVVPID, {name}: L2 sees what L1 has changed in its page tables",
                 f"{_REMAP_PTE}; {_invalidate('invvpid', kind, descriptor)}", vpid=_VPID)
        for name, kind, descriptor in (
            ("address", vmx.VMX_VPID_EXTENT_INDIVIDUAL_ADDR, (_VPID, HIGH_SUPERVISOR)),
            ("context", vmx.VMX_VPID_EXTENT_SINGLE_CONTEXT, (_VPID, 0)),
            ("all", vmx.VMX_VPID_EXTENT_ALL_CONTEXT, (0, 0)),
        )
    ),
    _changed("invept-all", "INVEPT of everything: L2 sees what L1 has changed in the EPT tables",
             f"{_REMAP_EPT}; {_invalidate('invept', vmx.VMX_EPT_EXTENT_GLOBAL, (0, 0))}", ept=IDENTITY),
    _changed("invept-all-vpid", "the same with a VPID",
             f"{_REMAP_EPT}; {_invalidate('invept', vmx.VMX_EPT_EXTENT_GLOBAL, (0, 0))}", ept=IDENTITY, vpid=_VPID),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_HOLES, *_INVALIDATIONS)
