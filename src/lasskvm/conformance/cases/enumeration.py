"""CPUID and CR4.LASS: with the feature and without it, read and written by guest and VMM.

CR4.LASS is a reserved bit for a guest whose CPUID lacks LASS, whatever the host has. These cases need neither SMAP nor
SMEP, so that most of them run on any KVM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, Mode, completes, gp, refused
from lasskvm.conformance.cases.common import HIGH_SUPERVISOR, HIGH_USER, LOW_SUPERVISOR
from lasskvm.x86.registers import CR4_LASS, CR4_SMAP, CR4_UMIP

__all__ = ["CASES"]

_GROUP = "enumeration"
_LASS_BIT = 27
_ENUMERATE = "mov eax, 7; mov ecx, 1; access: cpuid; shr eax, 6; and eax, 1"
_SET = f"mov rax, cr4; bts rax, {_LASS_BIT}; access: mov cr4, rax"
_CLEAR = f"mov rax, cr4; btr rax, {_LASS_BIT}; access: mov cr4, rax"
_LASS = frozenset({"lass"})


def _case(name: str, words: str, program: str, lass: Expected, *, has_lass: bool = True, **more: Any) -> Case:
    """A case on a processor with or without LASS in its CPUID; CR4.LASS is 0 at its start."""
    fields: Mapping[str, Any] = {
        "smap": False, "smep": False, "enabled": False,
        "needs": _LASS if has_lass else frozenset(), "without": frozenset() if has_lass else _LASS, **more,
    }  # fmt: skip
    return Case(id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, **fields)


_WITHOUT_CPUID = (
    _case(
        "cpuid-without", "a processor without LASS says so: CPUID.(EAX=07H,ECX=1):EAX[6] = 0", _ENUMERATE,
        completes(rax=0), has_lass=False,
    ),
    _case(
        "set-without", "CR4 bit 27 is reserved without LASS in CPUID: MOV to CR4 is #GP(0)", _SET,
        gp(cr4_lass=0), has_lass=False,
    ),
    _case(
        "set-without-with-other-bits", "a MOV to CR4 that faults for bit 27 changes no other bit",
        f"mov rax, cr4; mov rbx, rax; bts rax, {_LASS_BIT}; btc rax, 2; access: mov cr4, rax",
        gp(cr4_lass=0), has_lass=False,
    ),
    _case(
        "set-without-twice", "the second attempt faults as the first does",
        f"mov rax, cr4; bts rax, {_LASS_BIT}; mov rbx, rax; access: mov cr4, rbx", gp(), has_lass=False,
    ),
    _case(
        "set-without-user", "at CPL 3, MOV to CR4 is #GP(0) whatever its value", "access: mov cr4, rax",
        gp(), has_lass=False, cpl=3,
    ),
    _case(
        "rewrite-without", "writing CR4 as it is works without LASS", "mov rax, cr4; access: mov cr4, rax",
        completes(cr4_lass=0), has_lass=False,
    ),
    _case(
        "sregs-without", "KVM_SET_SREGS refuses CR4.LASS without LASS in CPUID", "access: nop", refused(),
        has_lass=False, cr4=CR4_LASS, forced=False,
    ),
    _case(
        "sregs-without-protected", "also for a guest outside IA-32e mode", "access: nop", refused(),
        has_lass=False, cr4=CR4_LASS, mode=Mode.PROTECTED, forced=False,
    ),
    _case(
        "sregs-without-real", "also for a guest in real mode", "access: nop", refused(),
        has_lass=False, cr4=CR4_LASS, mode=Mode.REAL, forced=False,
    ),
    _case(
        "low-data-without", "a processor without LASS lets the kernel use the lower half",
        "access: mov rax, [rbx]", completes(Effect.READ), has_lass=False,
        registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,),
    ),
    _case(
        "low-fetch-without", "a processor without LASS lets the kernel execute in the lower half",
        "access: jmp rbx", completes(Effect.READ), has_lass=False,
        registers={"rbx": layout.LOW_SUPERVISOR}, operand=layout.LOW_SUPERVISOR,
    ),
)  # fmt: skip

_WITH_CPUID = (
    _case("cpuid-with", "CPUID.(EAX=07H,ECX=1):EAX[6] = 1", _ENUMERATE, completes(rax=1)),
    _case("set-with", "MOV to CR4 sets CR4.LASS", _SET, completes(cr4_lass=1)),
    _case(
        "read-back", "MOV from CR4 shows the bit", f"{_SET}; mov rbx, cr4; shr rbx, 27; and ebx, 1",
        completes(rbx=1),
    ),
    _case(
        "clear-with", "MOV to CR4 clears it again", f"{_SET.replace('access: ', '')}; {_CLEAR}",
        completes(cr4_lass=0),
    ),
    _case(
        "set-user", "at CPL 3, MOV to CR4 is #GP(0), and CR4.LASS stays 0", "access: mov cr4, rax",
        gp(cr4_lass=0), cpl=3, registers={"rax": layout.DEFAULT_CR4},
    ),
    _case(
        "set-with-reserved-bit", "with a bit that no processor has, nothing is set",
        f"mov rax, cr4; bts rax, {_LASS_BIT}; bts rax, 63; access: mov cr4, rax", gp(cr4_lass=0),
    ),
    _case(
        "sregs-with", "KVM_SET_SREGS takes CR4.LASS", "access: mov rax, cr4; shr rax, 27; and eax, 1",
        completes(rax=1, cr4_lass=1), cr4=CR4_LASS,
    ),
    _case(
        "sregs-with-protected", "also for a guest outside IA-32e mode",
        "access: mov eax, cr4; shr eax, 27; and eax, 1", completes(rax=1), cr4=CR4_LASS, mode=Mode.PROTECTED,
    ),
    _case(
        "effect-at-once", "the access behind MOV to CR4 is judged by the new value",
        f"mov rdx, [rbx]; {_SET.replace('access: ', '')}; access: mov rax, [rbx]",
        gp().but(effect=Effect.READ), registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR, cr4=CR4_SMAP,
        needs=frozenset({"lass", "smap"}),
    ),
    _case(
        "no-effect-any-more", "the access behind a MOV to CR4 that clears the bit is allowed",
        f"{_CLEAR.replace('access: ', '')}; access: mov rax, [rbx]", completes(Effect.READ),
        registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR, cr4=CR4_SMAP | CR4_LASS,
        needs=frozenset({"lass", "smap"}),
    ),
    _case(
        "set-while-low", "a kernel that runs in the lower half has executed its last instruction",
        f"{_SET}; next: nop", gp("next", cr4_lass=1), at=0x600100,
    ),
    _case(
        "other-bits-keep-it", "changing another CR4 bit leaves CR4.LASS alone",
        "mov rax, cr4; btc rax, 2; access: mov cr4, rax; btc rax, 2; mov cr4, rax",
        completes(cr4_lass=1), cr4=CR4_LASS,
    ),
    _case(
        "with-umip", "CR4.LASS and CR4.UMIP do not disturb each other", _SET, completes(cr4_lass=1),
        cr4=CR4_UMIP, needs=frozenset({"lass", "umip"}),
    ),
)  # fmt: skip


def _without_smap(name: str, words: str, program: str, lass: Expected, off: Expected, **more: Any) -> Case:
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, off=off, smap=False,
        smep=False, without=frozenset({"smap"}), **more,
    )  # fmt: skip


#: LASS on a processor without SMAP: fetches and user-mode accesses only.
_SMAP_MISSING = (
    _without_smap(
        "no-smap-supervisor-data", "without SMAP, supervisor data is not restricted", "access: mov rax, [rbx]",
        completes(Effect.READ), completes(Effect.READ), registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR,
        mmio=(LOW_SUPERVISOR,),
    ),
    _without_smap(
        "no-smap-supervisor-fetch", "without SMAP, supervisor fetches are", "access: jmp rbx",
        gp(layout.LOW_SUPERVISOR), completes(Effect.READ), registers={"rbx": layout.LOW_SUPERVISOR},
        operand=layout.LOW_SUPERVISOR,
    ),
    _without_smap(
        "no-smap-user-data", "without SMAP, user-mode accesses are", "access: mov rax, [rbx]", gp(),
        completes(Effect.READ), cpl=3, registers={"rbx": HIGH_USER}, operand=HIGH_USER, mmio=(HIGH_USER,),
    ),
    _without_smap(
        "no-smap-own-half", "without SMAP, the kernel's own half is open", "access: mov [rbx], rax",
        completes(Effect.WRITTEN), completes(Effect.WRITTEN), registers={"rbx": HIGH_SUPERVISOR},
        operand=HIGH_SUPERVISOR, mmio=(HIGH_SUPERVISOR,),
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_WITHOUT_CPUID, *_WITH_CPUID, *_SMAP_MISSING)
