"""CR4.LASS of L2, as L1 lets L2 have it: owned by L2, or intercepted by guest/host mask and read shadow."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance.case import Case, Effect, Expected, completes, gp, vm_exit
from lasskvm.conformance.cases.common import LOW_SUPERVISOR
from lasskvm.conformance.cases.nested_common import guest_case
from lasskvm.conformance.nested import Nested, Turn
from lasskvm.x86.registers import CR4_LASS, CR4_TSD
from lasskvm.x86.vmx_exits import CrAccess, ExitReason, cr_access_qualification
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["CASES"]

_LASS_BIT, _VMXE_BIT, _TSD_BIT = 27, 13, 2
_LASS = frozenset({"lass"})
_MOV_TO_CR4 = cr_access_qualification(4, CrAccess.MOV_TO_CR)


def _change(change: str, label: str = "access: ") -> str:
    return f"mov rax, cr4; {change}; {label}mov cr4, rax"


_SET, _CLEAR = f"bts rax, {_LASS_BIT}", f"btr rax, {_LASS_BIT}"
_READ_LASS = f"mov rcx, cr4; shr rcx, {_LASS_BIT}; and ecx, 1"
_LOAD = "low: mov rdx, [rbx]"
_NONE, _READ = Effect.NONE, Effect.READ


def _exits(**state: int) -> Expected:
    """The MOV to CR4 from RAX exits."""
    return vm_exit(ExitReason.CR_ACCESS, exit_qualification=_MOV_TO_CR4, **state)


def _owns(shadow: bool, **more: Any) -> Nested:
    """L1 owns CR4.LASS; *shadow* is what L2 reads."""
    return Nested(cr4_mask=CR4_LASS, cr4_shadow=CR4_LASS if shadow else 0, **more)


def _case(name: str, words: str, program: str, lass: Expected, off: Expected | None, **more: Any) -> Case:
    """A case of L2 whose RBX has an address below the split."""
    fields: dict[str, Any] = {
        "operand": LOW_SUPERVISOR,
        "registers": {"rbx": LOW_SUPERVISOR},
        "forced": False,
        **more,
    }
    return guest_case(f"cr4-{name}", words, program, lass, off, **fields)


_OWNED_BY_L2 = (
    _case("set", "L2 sets its CR4.LASS, which counts at once", f"{_change(_SET)}; {_LOAD}",
          gp("low", cr4_lass=1, l1_cr4_lass=1), None, enabled=False, needs=frozenset({"vmx", "lass"})),
    _case("clear", "L2 clears its CR4.LASS, which counts at once; L1 keeps its own", f"{_change(_CLEAR)}; {_LOAD}",
          completes(_READ, cr4_lass=0, l1_cr4_lass=1), None),
    _case("set-l1-without", "L2 sets its CR4.LASS; L1 has none, and gets none", f"{_change(_SET)}; next: vmcall",
          vm_exit(ExitReason.VMCALL, "next", cr4_lass=1, l1_cr4_lass=0), None, enabled=False,
          needs=frozenset({"vmx", "lass"}), nested=Nested(l1_lass=False)),
    _case("read", "L2 reads its own CR4.LASS", f"access: {_READ_LASS}", completes(rcx=1), completes(rcx=0)),
    _case("other-bit", "L2 changes another bit", f"{_change(f'btc rax, {_TSD_BIT}')}; {_LOAD}",
          gp("low", cr4_lass=1), completes(_READ, cr4_lass=0)),
    _case("clear-vmxe", "a MOV to CR4 of L2 that faults for CR4.VMXE leaves CR4.LASS alone",
          _change(f"btr rax, {_VMXE_BIT}; {_CLEAR}"), gp(cr4_lass=1), gp(cr4_lass=0)),
    _case("set-without", "without LASS in CPUID, L2's MOV to CR4 with bit 27 is #GP(0) in L2", _change(_SET),
          gp(cr4_lass=0), None, enabled=False, without=_LASS, nested=Nested(l1_lass=False)),
)  # fmt: skip

_OWNED_BY_L1 = (
    _case("mask-set", "L1 intercepts that L2 sets CR4.LASS", _change(_SET), _exits(cr4_lass=0), None, enabled=False,
          needs=frozenset({"vmx", "lass"}), nested=_owns(shadow=False)),
    _case("mask-clear", "L1 intercepts that L2 clears CR4.LASS", _change(_CLEAR), _exits(cr4_lass=1), None,
          nested=_owns(shadow=True)),
    _case("mask-set-without", "also where the processor has no LASS: the exit comes before the #GP(0)",
          _change(_SET), _exits(cr4_lass=0), None, enabled=False, without=_LASS,
          nested=_owns(shadow=False, l1_lass=False)),
    _case("mask-user", "at CPL 3 the #GP(0) for the privilege comes before the exit", "access: mov cr4, rax", gp(),
          gp(), cpl=3, registers={"rax": 0}, operand=None, nested=_owns(shadow=True)),
    _case("shadow-1", "L2 reads CR4.LASS from the shadow: 1", f"access: {_READ_LASS}", completes(rcx=1),
          completes(rcx=1), nested=_owns(shadow=True)),
    _case("shadow-0", "L2 reads CR4.LASS from the shadow: 0", f"access: {_READ_LASS}", completes(rcx=0),
          completes(rcx=0), nested=_owns(shadow=False)),
    _case("shadow-does-not-count", "the shadow says 1: what counts is CR4", f"access: {_LOAD}", gp(),
          completes(_READ), nested=_owns(shadow=True)),
    _case("shadow-0-does-not-count", "the shadow says 0: what counts is CR4", f"access: {_LOAD}", gp(),
          completes(_READ), nested=_owns(shadow=False)),
    _case("write-shadow-1", "L2 writes what the shadow says: no exit, and CR4.LASS stays",
          f"{_change(_SET)}; {_LOAD}", gp("low", cr4_lass=1), completes(_READ, cr4_lass=0), nested=_owns(shadow=True)),
    _case("write-shadow-0", "also when that is 0", f"{_change(_CLEAR)}; {_LOAD}", gp("low", cr4_lass=1),
          completes(_READ, cr4_lass=0), nested=_owns(shadow=False)),
    _case("other-bit-masked", "L2 changes a bit that it owns: no exit, and CR4.LASS stays",
          f"{_change(f'btc rax, {_TSD_BIT}')}; {_LOAD}", gp("low", cr4_lass=1), completes(_READ, cr4_lass=0),
          nested=_owns(shadow=False)),
    _case("mask-of-another-bit", "L1 owns another bit: L2 sets CR4.LASS by itself", f"{_change(_SET)}; {_LOAD}",
          gp("low", cr4_lass=1), None, enabled=False, needs=frozenset({"vmx", "lass"}),
          nested=Nested(cr4_mask=CR4_TSD)),
)  # fmt: skip


def _vmcs_bit(field: VmcsField, change: str) -> str:
    """L1 changes CR4.LASS in *field*."""
    return f"mov ecx, {field:#x}; vmread rax, rcx; {change}; vmwrite rcx, rax"


_EMULATE_SET = f"{_vmcs_bit(VmcsField.GUEST_CR4, _SET)}; {_vmcs_bit(VmcsField.CR4_READ_SHADOW, _SET)}"
_PRETEND_SET = _vmcs_bit(VmcsField.CR4_READ_SHADOW, _SET)
_TURNS = (
    _case("emulated", "L1 sets CR4.LASS for L2, whose attempt it has intercepted",
          f"{_change(_SET)}; {_READ_LASS}; {_LOAD}", gp("low", rcx=1, cr4_lass=1), None, enabled=False,
          needs=frozenset({"vmx", "lass"}),
          nested=_owns(shadow=False, turns=(Turn(program=_EMULATE_SET, reason=ExitReason.CR_ACCESS),))),
    _case("pretended", "L1 sets it in the shadow only", f"{_change(_SET)}; {_READ_LASS}; {_LOAD}",
          completes(_READ, rcx=1, cr4_lass=0), None, enabled=False,
          nested=_owns(shadow=False, turns=(Turn(program=_PRETEND_SET, reason=ExitReason.CR_ACCESS),))),
    _case("set-behind-l2", "L1 sets L2's CR4.LASS while L2 waits", f"access: mov rax, [rbx]; vmcall; {_LOAD}",
          gp("low", cr4_lass=1).but(effect=_READ), None, enabled=False, needs=frozenset({"vmx", "lass"}),
          nested=Nested(turns=(Turn(program=_vmcs_bit(VmcsField.GUEST_CR4, _SET)),))),
    _case("cleared-behind-l2", "L1 clears it", f"access: vmcall; {_LOAD}", completes(_READ, cr4_lass=0),
          completes(_READ), nested=Nested(turns=(Turn(program=_vmcs_bit(VmcsField.GUEST_CR4, _CLEAR)),))),
    _case("l1-changes-its-own", "L1 clears its own CR4.LASS while L2 waits: L2 keeps its own",
          f"access: vmcall; {_LOAD}", gp("low", cr4_lass=1), completes(_READ, cr4_lass=0),
          nested=Nested(turns=(Turn(program=f"mov rax, cr4; {_CLEAR}; mov cr4, rax"),))),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_OWNED_BY_L2, *_OWNED_BY_L1, *_TURNS)
