"""VM entries and exits with CR4.LASS in the host and in the guest state, on processors with LASS and without.

CR4 has to keep to the fixed bits. Addresses in the host and in the guest state have to be canonical, and nothing else:
LASS speaks when they are accessed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, Mode, completes, fault, gp, vm_exit, vm_fail
from lasskvm.conformance.cases.nested_common import (
    IDENTITY,
    exception_exit,
    guest_case,
    with_and_without_ept,
)
from lasskvm.conformance.nested import Nested
from lasskvm.conformance.setup import IdtImage
from lasskvm.kvm.structures import DescriptorTable
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import ERROR_EXT, GP
from lasskvm.x86.registers import CR4_LASS, RFLAGS_IF
from lasskvm.x86.vmx import VmInstructionError
from lasskvm.x86.vmx_exits import EXIT_REASON_FAILED_VMENTRY, ExitReason
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["CASES"]

_LASS = frozenset({"lass"})
_VMCALL = "access: vmcall"
_INVALID_STATE = EXIT_REASON_FAILED_VMENTRY | ExitReason.INVALID_STATE
_HOST_ERROR = VmInstructionError.ENTRY_INVALID_HOST_STATE_FIELD
#: RFLAGS without the bit that is always 1: guest state that no processor takes.
_BAD_STATE = {VmcsField.GUEST_RFLAGS: 0}
#: A host state that no processor takes: CR0 without protection and paging.
_BAD_HOST = {VmcsField.HOST_CR0: 0}
_LOW = layout.LOW_SUPERVISOR


def _called(**state: int) -> Expected:
    return vm_exit(ExitReason.VMCALL, exit_qualification=0, vm_exit_instruction_len=3, **state)


def _entry(name: str, words: str, lass: Expected, off: Expected | None = None, **more: Any) -> Case:
    """A case of L2 that does nothing but VMCALL."""
    return guest_case(f"entry-{name}", words, _VMCALL, lass, off, forced=False, **more)


def _without(name: str, words: str, lass: Expected, **more: Any) -> Case:
    """The same on a processor without LASS; L1 cannot have set the bit for itself."""
    nested = replace(more.pop("nested", Nested()), l1_lass=False)
    return _entry(f"without-{name}", words, lass, enabled=False, without=_LASS, nested=nested, **more)


_WITH_LASS = (
    _entry("both", "CR4.LASS of L2 is what the guest state says, that of L1 what the host state says",
           _called(cr4_lass=1, l1_cr4_lass=1), _called(cr4_lass=0, l1_cr4_lass=1)),
    _entry("host-without", "the same with L1 without LASS", _called(cr4_lass=1, l1_cr4_lass=0),
           _called(cr4_lass=0, l1_cr4_lass=0), nested=Nested(l1_lass=False)),
    _entry("exit-sets", "a VM exit sets CR4.LASS of L1, which was 0 at VM entry", _called(l1_cr4_lass=1),
           _called(l1_cr4_lass=1), nested=Nested(l1_lass=False, host_lass=True)),
    _entry("exit-clears", "a VM exit clears CR4.LASS of L1, which was 1 at VM entry", _called(l1_cr4_lass=0),
           _called(l1_cr4_lass=0), nested=Nested(l1_lass=True, host_lass=False)),
    _entry("invalid-sets", "so does a VM entry that fails for the guest state",
           vm_exit(_INVALID_STATE, None, exit_qualification=0, l1_cr4_lass=1), None,
           nested=Nested(l1_lass=False, host_lass=True, fields=_BAD_STATE)),
    _entry("invalid-clears", "also the other way round",
           vm_exit(_INVALID_STATE, None, exit_qualification=0, l1_cr4_lass=0), None,
           nested=Nested(l1_lass=True, host_lass=False, fields=_BAD_STATE)),
    _entry("vmfail-keeps", "a VM entry that fails for the host state leaves CR4.LASS of L1 alone",
           vm_fail(_HOST_ERROR, l1_cr4_lass=1), None,
           nested=Nested(l1_lass=True, host_lass=False, fields=_BAD_HOST)),
)  # fmt: skip

_WITHOUT_LASS = (
    _without("guest", "guest CR4.LASS without LASS in CPUID: the VM entry fails for the guest state",
             vm_exit(_INVALID_STATE, None, exit_qualification=0), cr4=CR4_LASS),
    _without("host", "host CR4.LASS without LASS in CPUID: VMfailValid", vm_fail(_HOST_ERROR),
             nested=Nested(host_lass=True)),
    _without("both", "the host state is checked first", vm_fail(_HOST_ERROR), cr4=CR4_LASS,
             nested=Nested(host_lass=True)),
    _without("neither", "without CR4.LASS in either, L2 is entered", _called(cr4_lass=0, l1_cr4_lass=0)),
    _without("guest-masked", "a mask and a shadow of CR4.LASS are L1's own affair",
             _called(cr4_lass=0), nested=Nested(cr4_mask=CR4_LASS, cr4_shadow=CR4_LASS)),
)  # fmt: skip


def _place(name: str, words: str, program: str, lass: Expected, off: Expected | None, **more: Any) -> Case:
    return guest_case(f"entry-{name}", words, program, lass, off, forced=False, **more)


#: An interrupt that the VM entry injects; L2 has to be ready for it.
_VECTOR = 0x20
_INJECTED = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_EXT_INTR | _VECTOR
_INJECTION = {VmcsField.VM_ENTRY_INTR_INFO_FIELD: _INJECTED}
_LOW_IDT: dict[str, Any] = {
    "sregs": {"idt": DescriptorTable(_LOW, layout.VECTORS * layout.GATE_BYTES - 1)},
    "setup": (IdtImage(_LOW),), "operand": _LOW,
}  # fmt: skip
_NONE, _READ = Effect.NONE, Effect.READ
_ADDRESSES = (
    _place("host-rip-low", "HOST_RIP below the split passes; behind the exit, L1 cannot fetch there", _VMCALL,
           gp(_LOW), gp(_LOW), operand=_LOW, nested=Nested(fields={VmcsField.HOST_RIP: _LOW})),
    _place("host-rip-low-without", "without LASS in the host state it can", _VMCALL, completes(_READ),
           completes(_READ), operand=_LOW, nested=Nested(host_lass=False, fields={VmcsField.HOST_RIP: _LOW})),
    _place("host-tables-low", "HOST_GDTR_BASE and HOST_IDTR_BASE below the split pass", _VMCALL, _called(),
           _called(), nested=Nested(fields={VmcsField.HOST_GDTR_BASE: _LOW, VmcsField.HOST_IDTR_BASE: _LOW})),
    _place("guest-rip-low", "GUEST_RIP below the split passes; L2 cannot fetch there", "access: vmcall", gp(),
           _called(), at=_LOW + 0x100, operand=_LOW),
    _place("guest-rip-high-user", "the same for a program of L2 above the split", "access: cpuid",
           exception_exit(GP), vm_exit(ExitReason.CPUID), cpl=3, at=layout.HIGH_USER + 0x100,
           operand=layout.HIGH_USER, nested=Nested(exceptions=1 << GP)),
    _place("injection", "a VM entry injects an event", "access: nop", fault(_VECTOR),
           fault(_VECTOR), rflags=RFLAGS_IF, nested=Nested(fields=_INJECTION)),
    _place("injection-low-idt", "an injected event with L2's IDT below the split: triple fault", "access: nop",
           vm_exit(ExitReason.TRIPLE_FAULT).but(effect=_NONE), fault(_VECTOR).but(effect=_READ),
           rflags=RFLAGS_IF, nested=Nested(fields=_INJECTION), **_LOW_IDT),
    _place("injection-low-idt-intercepted", "L1 intercepts the #GP, and learns what was being delivered",
           "access: nop", exception_exit(GP, ERROR_EXT, idt_vectoring_info_field=_INJECTED),
           fault(_VECTOR).but(effect=_READ), rflags=RFLAGS_IF,
           nested=Nested(fields=_INJECTION, exceptions=1 << GP),
           **_LOW_IDT),
)  # fmt: skip

#: Outside IA-32e mode, L2's CR4.LASS has no effect, and neither has L1's.
_MODES = (
    _place("pae", "L2 with PAE paging may have CR4.LASS, which has no effect there", "access: mov eax, [ebx]; vmcall",
           vm_exit(ExitReason.VMCALL, None, cr4_lass=1), vm_exit(ExitReason.VMCALL, None, cr4_lass=0),
           mode=Mode.PAE, registers={"rbx": layout.DATA_GPA}),
    _place("pae-ept", "the same with EPT", "access: mov eax, [ebx]; vmcall",
           vm_exit(ExitReason.VMCALL, None, cr4_lass=1), vm_exit(ExitReason.VMCALL, None, cr4_lass=0),
           mode=Mode.PAE, registers={"rbx": layout.DATA_GPA}, nested=Nested(ept=IDENTITY)),
    _place("protected", "nor without paging", "access: mov eax, [ebx]; vmcall",
           vm_exit(ExitReason.VMCALL, None, cr4_lass=1), vm_exit(ExitReason.VMCALL, None, cr4_lass=0),
           mode=Mode.PROTECTED, registers={"rbx": layout.DATA_GPA}, nested=Nested(ept=IDENTITY)),
    _place("real", "nor in real mode", "access: mov eax, [bx]; vmcall",
           vm_exit(ExitReason.VMCALL, None, cr4_lass=1), vm_exit(ExitReason.VMCALL, None, cr4_lass=0),
           mode=Mode.REAL, registers={"rbx": 0x100}, nested=Nested(ept=IDENTITY)),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    *(case for entry in (*_WITH_LASS, *_WITHOUT_LASS) for case in with_and_without_ept(entry)),
    *_ADDRESSES,
    *_MODES,
)
