"""VMX as L1 finds it: CPUID, the capability MSRs, and CR4.LASS in VMX root operation."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance.case import Case, Effect, Expected, completes, gp
from lasskvm.conformance.cases.common import LOW_SUPERVISOR
from lasskvm.conformance.nested import Nested, Stage
from lasskvm.conformance.nested_layout import POINTERS, VMXON_GPA
from lasskvm.conformance.setup import Words
from lasskvm.x86 import msr
from lasskvm.x86.registers import CR4_LASS

__all__ = ["CASES"]

_GROUP = "nested"
_LASS_BIT, _VMXE_BIT = 27, 13
_BOTH = frozenset({"vmx", "lass"})
_VMX, _LASS = frozenset({"vmx"}), frozenset({"lass"})
_ROOT = Nested(stage=Stage.ROOT)
#: On a processor without LASS, L1 is without it, too.
_ROOT_WITHOUT = Nested(stage=Stage.ROOT, l1_lass=False)


def _case(name: str, words: str, program: str, lass: Expected, **more: Any) -> Case:
    """A case on a processor with VMX and LASS that begins with CR4.LASS = 0."""
    fields: dict[str, Any] = {"enabled": False, "smap": False, "smep": False, "needs": _BOTH, **more}
    return Case(id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, **fields)


def _without_lass(name: str, words: str, program: str, lass: Expected, **more: Any) -> Case:
    return _case(name, words, program, lass, **{"needs": _VMX, "without": _LASS, **more})


def _without_vmx(name: str, words: str, program: str, lass: Expected, **more: Any) -> Case:
    return _case(name, words, program, lass, needs=frozenset(), without=_VMX, **more)


def _rdmsr(index: int) -> str:
    return f"mov ecx, {index:#x}; access: rdmsr"


_FIXED1_LASS = f"{_rdmsr(msr.MSR_IA32_VMX_CR4_FIXED1)}; shr eax, {_LASS_BIT}; and eax, 1"
_FIXED0_LASS = f"{_rdmsr(msr.MSR_IA32_VMX_CR4_FIXED0)}; shr eax, {_LASS_BIT}; and eax, 1"
_CPUID_VMX = "mov eax, 1; access: cpuid; shr ecx, 5; and ecx, 1"
_VMXE_SET = f"mov rax, cr4; bts rax, {_VMXE_BIT}; access: mov cr4, rax"
_LASS_SET = f"mov rax, cr4; bts rax, {_LASS_BIT}; access: mov cr4, rax"
_VMXON: dict[str, Any] = {
    "program": "access: vmxon [rbx]", "registers": {"rbx": POINTERS}, "setup": (Words(POINTERS, (VMXON_GPA,)),),
}  # fmt: skip
_LASS_CLEAR = f"mov rax, cr4; btr rax, {_LASS_BIT}; access: mov cr4, rax"

_ENUMERATION = (
    _case("cpuid-vmx", "CPUID.1:ECX[5] = 1", _CPUID_VMX, completes(rcx=1), needs=_VMX),
    _case("cr4-fixed1-with-lass", "IA32_VMX_CR4_FIXED1[27] = 1 with LASS in CPUID", _FIXED1_LASS, completes(rax=1)),
    _without_lass("cr4-fixed1-without-lass", "IA32_VMX_CR4_FIXED1[27] = 0 without LASS in CPUID", _FIXED1_LASS,
                  completes(rax=0)),
    _case("cr4-fixed0-with-lass", "VMX operation does not require CR4.LASS", _FIXED0_LASS, completes(rax=0)),
    _without_lass("cr4-fixed0-without-lass", "VMX operation does not require CR4.LASS", _FIXED0_LASS,
                  completes(rax=0)),
    _case("cr4-fixed0-vmxe", "VMX operation requires CR4.VMXE",
          f"{_rdmsr(msr.MSR_IA32_VMX_CR4_FIXED0)}; shr eax, {_VMXE_BIT}; and eax, 1", completes(rax=1), needs=_VMX),
    _case("revision-bit-31", "IA32_VMX_BASIC[31] = 0", f"{_rdmsr(msr.MSR_IA32_VMX_BASIC)}; shr eax, 31",
          completes(rax=0), needs=_VMX),
    _case("fixed1-read-only", "WRMSR to IA32_VMX_CR4_FIXED1 is #GP(0)",
          f"mov ecx, {msr.MSR_IA32_VMX_CR4_FIXED1:#x}; xor eax, eax; xor edx, edx; access: wrmsr", gp(), needs=_VMX),
    _case("feature-control", "IA32_FEATURE_CONTROL is locked, with VMX enabled",
          f"{_rdmsr(msr.MSR_IA32_FEATURE_CONTROL)}; and eax, 5", completes(rax=5), needs=_VMX,
          nested=Nested(stage=Stage.ENABLED, l1_lass=False)),
    _case("feature-control-locked", "WRMSR to the locked IA32_FEATURE_CONTROL is #GP(0)",
          f"mov ecx, {msr.MSR_IA32_FEATURE_CONTROL:#x}; xor eax, eax; xor edx, edx; access: wrmsr", gp(), needs=_VMX,
          nested=Nested(stage=Stage.ENABLED, l1_lass=False)),
    _without_vmx("cpuid-no-vmx", "CPUID.1:ECX[5] = 0 without VMX", _CPUID_VMX, completes(rcx=0)),
    _without_vmx("no-vmx-msrs", "without VMX there are no capability MSRs", _rdmsr(msr.MSR_IA32_VMX_CR4_FIXED1), gp()),
    _without_vmx("no-vmx-cr4", "without VMX, CR4.VMXE is reserved", _VMXE_SET, gp()),
)  # fmt: skip

_ROOT_OPERATION = (
    _case("set-lass", "L1 sets CR4.LASS in VMX root operation", _LASS_SET, completes(cr4_lass=1), nested=_ROOT),
    _case("clear-lass", "L1 clears CR4.LASS in VMX root operation", _LASS_CLEAR, completes(cr4_lass=0),
          cr4=CR4_LASS, nested=_ROOT),
    _without_lass("set-without-lass", "without LASS in CPUID, CR4 bit 27 is reserved in VMX root operation, too",
                  _LASS_SET, gp(cr4_lass=0), nested=_ROOT_WITHOUT),
    _case("clear-vmxe-and-lass", "a MOV to CR4 that faults for CR4.VMXE leaves CR4.LASS alone",
          f"mov rax, cr4; btr rax, {_VMXE_BIT}; btr rax, {_LASS_BIT}; access: mov cr4, rax", gp(cr4_lass=1),
          cr4=CR4_LASS, nested=_ROOT),
    _case("vmxoff-keeps-lass", "VMXOFF leaves CR4.LASS alone", "access: vmxoff", completes(cr4_lass=1, cf=0, zf=0),
          cr4=CR4_LASS, nested=_ROOT),
    Case(id=f"{_GROUP}/root-read-low", group=_GROUP, words="LASS applies to L1 in VMX root operation",
         program="access: mov rax, [rbx]", registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR,
         lass=gp(), off=completes(Effect.READ), needs=_VMX, nested=_ROOT, mmio=(LOW_SUPERVISOR,)),
    Case(id=f"{_GROUP}/vmxon", group=_GROUP, words="VMXON with CR4.LASS set",
         lass=completes(cf=0, zf=0, cr4_lass=1), off=completes(cf=0, zf=0, cr4_lass=0),
         needs=_VMX, nested=Nested(stage=Stage.ENABLED), **_VMXON),
    _without_lass("vmxon-without-lass", "VMXON without LASS in CPUID", lass=completes(cf=0, zf=0),
                  nested=Nested(stage=Stage.ENABLED, l1_lass=False), **_VMXON),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_ENUMERATION, *_ROOT_OPERATION)
