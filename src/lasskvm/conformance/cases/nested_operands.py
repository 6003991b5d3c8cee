"""VMX instructions of L1 and their memory operands: data accesses like others, on both sides of the split.

INVVPID's descriptor is one of them; the address inside it is only named. What is wrong with the type of INVEPT and
INVVPID is found before the descriptor is read, #UD and the privilege before any operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lasskvm.conformance.case import Case, Effect, Expected, completes, gp, pf, ss
from lasskvm.conformance.case import fault as raises
from lasskvm.conformance.cases.common import (
    HIGH_SUPERVISOR,
    HIGH_USER,
    LAST_PAGE,
    LOW_ABSENT,
    LOW_SUPERVISOR,
    LOW_USER,
    last_and_first_page,
)
from lasskvm.conformance.nested import Nested, Stage
from lasskvm.conformance.nested_layout import FREE_VMCS_GPA, OTHER_VMCS_GPA, VMCS_GPA, VMXON_GPA
from lasskvm.conformance.nested_testbed import MARKER, MARKER_FIELD
from lasskvm.conformance.setup import Words
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.exceptions import PF_P, PF_W, UD
from lasskvm.x86.registers import RFLAGS_AC
from lasskvm.x86.vmx import VmInstructionError
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["CASES"]

_GROUP = "nested"
_VMX = frozenset({"vmx"})
_READ, _WRITTEN, _NONE = Effect.READ, Effect.WRITTEN, Effect.NONE
_CURRENT = Nested(stage=Stage.CURRENT)
_NOT_CANONICAL = 1 << 62
#: INVVPID's types, and INVEPT's.
_ADDRESS, _CONTEXT, _ALL, _ALL_BUT_GLOBAL = range(4)
_EPT_CONTEXT, _EPT_ALL = 1, 2
_EPTP = FREE_VMCS_GPA | 3 << 3 | 6
_VPID = 1
_SUCCEEDS = {"cf": 0, "zf": 0}


@dataclass(frozen=True)
class _Instruction:
    """A VMX instruction with a memory operand at ``[{at}]``: what the operand holds, and what happens to it."""

    name: str
    text: str
    content: tuple[int, ...]
    effect: Effect = _READ
    stage: Stage = Stage.CURRENT
    rax: int = 0
    #: What is to be seen of it when it has been executed.
    stored: int | None = None

    def case(self, name: str, words: str, operand: int, lass: Expected, off: Expected, **more: Any) -> Case:
        at = more.pop("at", "rbx")
        memory = {} if self.stored is None else {operand: self.stored}
        outcomes = [
            outcome.but(memory=memory, cf=0, zf=0) if outcome.effect is self.effect else outcome
            for outcome in (lass, off)
        ]
        registers = {"rbx": operand, "rax": self.rax, "rcx": self.rax} | more.pop("registers", {})
        if at == "rbp":
            registers["rbp"] = operand
        return Case(
            id=f"{_GROUP}/{self.name}-{name}", group=_GROUP, words=f"{self.name.upper()}: {words}",
            program=f"access: {self.text.format(at=at)}", registers=registers, operand=operand,
            setup=(*more.pop("setup", ()), Words(operand, self.content)), lass=outcomes[0], off=outcomes[1],
            needs=_VMX, nested=Nested(stage=self.stage), **more,
        )  # fmt: skip


_INSTRUCTIONS = (
    _Instruction("vmxon", "vmxon [{at}]", (VMXON_GPA,), stage=Stage.ENABLED),
    _Instruction("vmclear", "vmclear [{at}]", (VMCS_GPA,)),
    _Instruction("vmptrld", "vmptrld [{at}]", (VMCS_GPA,)),
    _Instruction("vmptrst", "vmptrst [{at}]", (0,), _WRITTEN, stored=OTHER_VMCS_GPA),
    _Instruction("vmread", "vmread [{at}], rax", (0,), _WRITTEN, rax=MARKER_FIELD, stored=MARKER),
    _Instruction("vmwrite", "vmwrite rax, [{at}]", (0x77,), rax=MARKER_FIELD),
    _Instruction("invept", "invept rax, [{at}]", (0, 0), rax=_EPT_ALL),
    _Instruction("invvpid", "invvpid rax, [{at}]", (_VPID, 0), rax=_ALL),
)


def _sides(instruction: _Instruction) -> tuple[Case, ...]:
    """The operand of an instruction everywhere."""
    done = completes(instruction.effect)
    written = PF_W if instruction.effect is _WRITTEN else 0
    case = instruction.case
    return (
        case("low", "an operand below the split", LOW_SUPERVISOR, gp(), done, mmio=(LOW_SUPERVISOR,)),
        case("high", "an operand above the split", HIGH_SUPERVISOR, done, done),
        case("low-ac1", "an operand below the split with AC=1", LOW_SUPERVISOR, done, done, rflags=RFLAGS_AC),
        case("low-no-smap", "an operand below the split without SMAP", LOW_SUPERVISOR, done, done, smap=False),
        case("low-user", "a low user page is a violation, or SMAP's page fault", LOW_USER, gp(),
             pf(PF_P | written, LOW_USER)),
        case("low-rbp", "an operand at [RBP] is a stack access", LOW_SUPERVISOR, ss(), done, at="rbp"),
    )  # fmt: skip


def _other(name: str, words: str, program: str, lass: Expected, off: Expected, **more: Any) -> Case:
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, off=off,
        **{"needs": _VMX, "nested": _CURRENT, **more},
    )  # fmt: skip


_ABSENT = LOW_ABSENT
_PLACES = (
    _other("vmptrld-low-absent", "VMPTRLD: LASS comes before the page fault", "access: vmptrld [rbx]", gp(),
           pf(0, _ABSENT), registers={"rbx": _ABSENT}, operand=_ABSENT),
    _other("vmptrst-low-absent", "VMPTRST: LASS comes before the page fault", "access: vmptrst [rbx]", gp(),
           pf(PF_W, _ABSENT), registers={"rbx": _ABSENT}, operand=_ABSENT),
    _other("vmread-not-canonical", "VMREAD: an address that is not canonical is #GP(0) with LASS and without",
           "access: vmread [rbx], rax", gp(), gp(), registers={"rbx": _NOT_CANONICAL, "rax": MARKER_FIELD}),
    _other("vmptrst-wrap", "VMPTRST across the end of the address space reaches into the lower half",
           "access: vmptrst [rbx]", gp(), completes(_WRITTEN, **_SUCCEEDS),
           registers={"rbx": LAST_PAGE + PAGE_SIZE - 4}, operand=LAST_PAGE + PAGE_SIZE - 4,
           setup=last_and_first_page()),
    _other("vmwrite-rbp-ds", "VMWRITE: a DS override does not change that [RBP] is a stack access",
           "access: vmwrite rax, ds:[rbp]", ss(), completes(_READ, **_SUCCEEDS),
           registers={"rbp": LOW_SUPERVISOR, "rax": MARKER_FIELD}, operand=LOW_SUPERVISOR),
    _other("vmwrite-rbp-fs", "VMWRITE: an FS override does: #GP(0)", "access: vmwrite rax, fs:[rbp]", gp(),
           completes(_READ, **_SUCCEEDS), registers={"rbp": LOW_SUPERVISOR, "rax": MARKER_FIELD},
           operand=LOW_SUPERVISOR),
    _other("vmread-register", "VMREAD to a register accesses no memory", "access: vmread rbx, rax",
           completes(_NONE, rbx=MARKER, **_SUCCEEDS), completes(_NONE, rbx=MARKER, **_SUCCEEDS),
           registers={"rbx": LOW_SUPERVISOR, "rax": MARKER_FIELD}, operand=LOW_SUPERVISOR),
    _other("vmclear-user", "VMCLEAR at CPL 3 is #GP(0) for its privilege", "access: vmclear [rbx]", gp(), gp(),
           cpl=3, registers={"rbx": HIGH_USER}, operand=HIGH_USER),
    _other("vmxon-user", "VMXON at CPL 3 is #GP(0) for its privilege", "access: vmxon [rbx]", gp(), gp(), cpl=3,
           registers={"rbx": LOW_USER}, operand=LOW_USER, nested=Nested(stage=Stage.ENABLED)),
    _other("vmptrld-outside", "VMPTRLD outside VMX operation is #UD, whatever its operand", "access: vmptrld [rbx]",
           raises(UD).but(effect=_NONE), raises(UD).but(effect=_NONE), registers={"rbx": LOW_SUPERVISOR},
           operand=LOW_SUPERVISOR, nested=Nested(stage=Stage.ENABLED)),
)  # fmt: skip


def _with_error(instruction: str) -> str:
    """A program that finds ZF in RCX behind *instruction*, and the VM-instruction error in RDX."""
    number = int(VmcsField.VM_INSTRUCTION_ERROR)
    return f"access: {instruction}; sete cl; movzx ecx, cl; mov eax, {number:#x}; vmread rdx, rax"


_FAILS = {"rcx": 1, "rdx": int(VmInstructionError.INVALID_OPERAND_TO_INVEPT_INVVPID)}


def _descriptor(
    name: str,
    words: str,
    kind: int,
    words_in_memory: tuple[int, int],
    lass: Expected,
    off: Expected,
    **more: Any,
) -> Case:
    """INVVPID, or INVEPT by its name, of *kind*."""
    instruction = name.partition("-")[0]
    operand = more.pop("operand", HIGH_SUPERVISOR)
    return _other(
        name, words, _with_error(f"{instruction} rax, [rbx]"), lass, off, registers={"rax": kind, "rbx": operand},
        operand=operand, setup=(Words(operand, words_in_memory),), **more,
    )  # fmt: skip


_DONE, _FAILED = completes(_READ, rcx=0), completes(_READ, **_FAILS)
_UNREAD = completes(_NONE, **_FAILS)
_LOW: dict[str, Any] = {"operand": LOW_SUPERVISOR, "mmio": (LOW_SUPERVISOR,)}
_DESCRIPTORS = (
    _descriptor("invvpid-target-low", "INVVPID's target address may be below the split", _ADDRESS,
                (_VPID, LOW_SUPERVISOR), _DONE, _DONE),
    _descriptor("invvpid-target-high", "INVVPID's target address may be above the split", _ADDRESS,
                (_VPID, HIGH_USER), _DONE, _DONE),
    _descriptor("invvpid-target-not-canonical", "INVVPID's target address must be canonical", _ADDRESS,
                (_VPID, _NOT_CANONICAL), _FAILED, _FAILED),
    _descriptor("invvpid-descriptor-low-address", "INVVPID's descriptor below the split, whatever its target",
                _ADDRESS, (_VPID, HIGH_SUPERVISOR), gp(), _DONE, **_LOW),
    _descriptor("invvpid-descriptor-low-context", "the descriptor is read for every type: single context",
                _CONTEXT, (_VPID, 0), gp(), _DONE, **_LOW),
    _descriptor("invvpid-descriptor-low-global", "the descriptor is read for every type: all but global translations",
                _ALL_BUT_GLOBAL, (_VPID, 0), gp(), _DONE, **_LOW),
    _descriptor("invvpid-vpid-0", "INVVPID of VPID 0 ends in VMfailValid", _CONTEXT, (0, 0), _FAILED, _FAILED),
    _descriptor("invvpid-type", "a type that does not exist is found before the descriptor is read", 4, (_VPID, 0),
                _UNREAD, _UNREAD, operand=LOW_SUPERVISOR),
    _descriptor("invept-context", "INVEPT's descriptor has an EPT pointer", _EPT_CONTEXT, (_EPTP, 0), _DONE, _DONE),
    _descriptor("invept-descriptor-low-context", "INVEPT's descriptor below the split", _EPT_CONTEXT, (_EPTP, 0),
                gp(), _DONE, **_LOW),
    _descriptor("invept-type", "a type that does not exist is found before the descriptor is read", 0, (_EPTP, 0),
                _UNREAD, _UNREAD, operand=LOW_SUPERVISOR),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    *(case for instruction in _INSTRUCTIONS for case in _sides(instruction)),
    *_PLACES,
    *_DESCRIPTORS,
)
