"""CR4.LASS outside 64-bit mode, and across changes of mode: it may be set anywhere and works in IA-32e mode only."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, Mode, completes, gp, halts, shutdown
from lasskvm.conformance.cases.common import LOW_SUPERVISOR
from lasskvm.conformance.setup import Bytes, Map
from lasskvm.x86.msr import MSR_IA32_EFER
from lasskvm.x86.registers import CR0_PG, CR4_LASS, EFER_LME

__all__ = ["CASES"]

_GROUP = "modes"
_LASS_BIT = 27
_SET = f"mov eax, cr4; bts eax, {_LASS_BIT}; access: mov cr4, eax"
#: A program for compatibility mode at CPL 0, below the split: a supervisor page of its own.
_LOW_CODE = layout.LOW_SUPERVISOR + 0x100
_LEGACY = {"real": Mode.REAL, "protected": Mode.PROTECTED, "pae": Mode.PAE}


def _case(name: str, words: str, program: str, lass: Expected, **more: Any) -> Case:
    fields = {"smap": False, "smep": False, "enabled": False, **more}
    needs = fields.pop("needs", frozenset({"lass"}))
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, needs=needs, **fields
    )


def _for_each_legacy_mode() -> list[Case]:
    found = []
    for name, mode in _LEGACY.items():
        reserved = gp(cr4_lass=0)
        if mode is Mode.REAL:
            # Real mode pushes no error codes.
            reserved = Expected(reserved.ending, reserved.vector, None, reserved.rip, state=reserved.state)
        found += [
            _case(
                f"set-in-{name}-mode", f"CR4.LASS may be set in {mode.value}, where it has no effect",
                f"{_SET}; nop; mov ebx, cr4", completes(cr4_lass=1), mode=mode,
            ),
            _case(
                f"reserved-in-{name}-mode", f"without LASS in CPUID, bit 27 is reserved in {mode.value}, too",
                _SET, reserved, mode=mode, needs=frozenset(), without=frozenset({"lass"}),
            ),
            _case(
                f"data-in-{name}-mode", f"with CR4.LASS, data below the split stays open in {mode.value}",
                "mov bx, 0x500; access: mov ax, [bx]" if mode is Mode.REAL
                else "mov ebx, 0x500; access: mov eax, [ebx]",
                completes(), mode=mode, cr4=CR4_LASS,
            ),
        ]  # fmt: skip
    return found


#: From protected mode without paging into IA-32e mode: the page tables of the layout map this code one to one.
_ACTIVATE = f"""
    mov eax, cr3; mov ecx, {MSR_IA32_EFER:#x}; xor edx, edx; mov eax, {EFER_LME:#x}; wrmsr
    mov eax, {layout.TABLES_GPA:#x}; mov cr3, eax
    mov eax, cr0; or eax, {CR0_PG:#x}; access: mov cr0, eax; behind: nop; hlt; halted: nop
"""
_IDENTITY = Map(layout.KERNEL_CODE_GPA, layout.KERNEL_CODE_GPA)

_ACTIVATION = (
    _case(
        "activate-without", "IA-32e mode is entered from the lower half while CR4.LASS = 0", _ACTIVATE,
        halts("halted", efer_lma=1, cr4_lass=0), mode=Mode.PROTECTED, setup=(_IDENTITY,),
        needs=frozenset(), forced=False,
    ),
    _case(
        "activate-with", "with CR4.LASS = 1 the first fetch in IA-32e mode is a violation, and so is its IDT",
        _ACTIVATE, shutdown(efer_lma=1, cr4_lass=1).but(effect=None), mode=Mode.PROTECTED,
        setup=(_IDENTITY,), cr4=CR4_LASS, forced=False,
    ),
    _case(
        "kept-in-pae-mode", "switching paging off and on keeps CR4.LASS",
        """mov eax, cr0; mov ebx, eax; btr eax, 31; mov cr0, eax; access: nop; mov cr0, ebx
           mov eax, cr4; shr eax, 27; and eax, 1""",
        completes(rax=1), mode=Mode.PAE, cr4=CR4_LASS, forced=False,
    ),
    _case(
        "kept-from-real-to-protected-mode", "entering protected mode keeps CR4.LASS",
        "mov eax, cr0; or al, 1; access: mov cr0, eax; mov eax, cr4; shr eax, 27; and eax, 1; hlt; halted: nop",
        halts("halted", rax=1, cr4_lass=1), mode=Mode.REAL, cr4=CR4_LASS,
    ),
)  # fmt: skip


def _low(words: str, name: str, program: str, lass: Expected, off: Expected | None, **more: Any) -> Case:
    """A case in compatibility mode at CPL 0."""
    fields = {"smap": True, "smep": True, "enabled": True, "needs": frozenset(), **more}
    return _case(
        name, words, program, lass, off=off, mode=Mode.COMPATIBILITY, at=_LOW_CODE,
        operand=layout.LOW_SUPERVISOR, **fields,
    )  # fmt: skip


_COMPATIBILITY = (
    _low(
        "compatibility-supervisor", "compatibility mode at CPL 0 cannot fetch: its code is below the split",
        "access: nop", gp(_LOW_CODE), completes(Effect.READ), forced=False,
    ),
    _low(
        "compatibility-supervisor-ac1", "RFLAGS.AC does not matter for that", "access: nop", gp(_LOW_CODE),
        completes(Effect.READ), rflags=1 << 18, forced=False,
    ),
    _low(
        "compatibility-supervisor-no-smap", "nor does SMAP", "access: nop", gp(_LOW_CODE),
        completes(Effect.READ), smap=False, smep=False, forced=False,
    ),
    _low(
        "set-in-compatibility-mode", "CR4.LASS set in compatibility mode at CPL 0 takes effect at the next fetch",
        f"{_SET}; next: nop", gp("next", cr4_lass=1).but(effect=Effect.READ), None, enabled=False,
        needs=frozenset({"lass"}),
    ),
    _low(
        "reserved-in-compatibility-mode", "without LASS in CPUID, bit 27 is reserved there, too", _SET,
        gp(cr4_lass=0).but(effect=Effect.READ), None, enabled=False, smap=False, smep=False,
        without=frozenset({"lass"}),
    ),
)  # fmt: skip


def _far_pointer(offset: int, selector: int) -> bytes:
    return offset.to_bytes(4, "little") + selector.to_bytes(2, "little")


_POINTER = layout.HIGH_SUPERVISOR + 0x800
_ROUND_TRIP = (
    Case(
        id=f"{_GROUP}/to-compatibility-mode", group=_GROUP,
        words="a far jump to compatibility mode at CPL 0 completes; its first fetch is a violation",
        program="access: jmp fword [rbx]", registers={"rbx": _POINTER},
        setup=(Bytes(_POINTER, _far_pointer(layout.LOW_SUPERVISOR, layout.KERNEL_CS32)),),
        operand=layout.LOW_SUPERVISOR,
        lass=gp(layout.LOW_SUPERVISOR, cs=layout.KERNEL_CS32), off=completes(Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/kept-in-user-mode", group=_GROUP, cpl=3,
        words="a stay in user mode keeps CR4.LASS", program="access: nop",
        lass=completes(cr4_lass=1), off=completes(cr4_lass=0),
    ),
    Case(
        id=f"{_GROUP}/kept-in-user-compatibility-mode", group=_GROUP, cpl=3, mode=Mode.COMPATIBILITY,
        words="a stay in a 32-bit program keeps CR4.LASS", program="access: nop",
        lass=completes(cr4_lass=1), off=completes(cr4_lass=0),
    ),
    Case(
        id=f"{_GROUP}/kept-across-iret", group=_GROUP,
        words="IRET to user mode and the exception back keep CR4.LASS, and it is in force in between",
        program=f"push {layout.USER_SS}; push {layout.USER_STACK_TOP}; push 2; push {layout.USER_CS}; push rbx; "
        "access: iretq",
        registers={"rbx": layout.HIGH_USER}, operand=layout.HIGH_USER,
        lass=gp(layout.HIGH_USER, cs=layout.USER_CS, cr4_lass=1), off=completes(Effect.READ),
    ),
    Case(
        id=f"{_GROUP}/low-supervisor-page-needs-lma", group=_GROUP,
        words="in 64-bit mode CR4.LASS is in force", program="access: mov rax, [rbx]",
        registers={"rbx": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR,
        lass=gp(efer_lma=1), off=completes(Effect.READ),
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_for_each_legacy_mode(), *_ACTIVATION, *_COMPATIBILITY, *_ROUND_TRIP)
