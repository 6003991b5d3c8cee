"""Linear-address masking: pointers that carry metadata, with LASS and without.

Masking comes before the canonical check, and that before LASS; bit 63 is never masked, so LASS judges a pointer as if
there were no LAM. It is for explicit data accesses only, of 64-bit code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lasskvm.conformance import layout
from lasskvm.conformance.case import Case, Effect, Expected, Mode, completes, fault, gp, pf, refused, ss
from lasskvm.conformance.cases.common import (
    HIGH_ABSENT,
    HIGH_SUPERVISOR,
    HIGH_USER,
    LOW_ABSENT,
    LOW_SUPERVISOR,
    LOW_USER,
)
from lasskvm.conformance.setup import Bytes, Descriptor, Map, TableRegister, Words
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.descriptors import make_segment
from lasskvm.x86.exceptions import GP, PF_I, PF_P, PF_U, PF_W
from lasskvm.x86.msr import MSR_IA32_FS_BASE, MSR_IA32_KERNEL_GS_BASE, MSR_IA32_LSTAR
from lasskvm.x86.registers import (
    AR_LDT,
    CR3_LAM_U48,
    CR3_LAM_U57,
    CR4_FSGSBASE,
    CR4_LAM_SUP,
    MASK32,
    RFLAGS_AC,
)

__all__ = ["CASES"]

_GROUP = "lam"
_LAM = frozenset({"lam"})
_W, _R = Effect.WRITTEN, Effect.READ
#: Metadata for bits 62:48, and for bits 62:57 only.
_TAG48, _TAG57 = 0x2A5A << 48, 0x2A << 56
_METADATA48, _METADATA57 = 0x7FFF << 48, 0x7E << 56
_READ = "access: mov rax, [rbx]"
_USER: dict[str, Any] = {"cpl": 3, "cr3": CR3_LAM_U48}
_SUPERVISOR: dict[str, Any] = {"cr4": CR4_LAM_SUP}
_LA57: dict[str, Any] = {"levels": 5, "needs": _LAM | {"la57"}}


def _tagged(address: int) -> int:
    """*address* with metadata in bits 62:48, in place of the copies of bit 47."""
    return address & ~_METADATA48 | _TAG48


def _tagged57(address: int) -> int:
    """*address* with metadata in bits 62:57, in place of the copies of bit 56."""
    return address & ~_METADATA57 | _TAG57


def _case(name: str, words: str, program: str, lass: Expected, off: Expected | None, **more: Any) -> Case:
    fields = {"needs": _LAM, **more}
    return Case(
        id=f"{_GROUP}/{name}", group=_GROUP, words=words, program=program, lass=lass, off=off, **fields
    )


def _both(name: str, words: str, program: str, outcome: Expected, **more: Any) -> Case:
    """A case whose outcome LASS does not change."""
    return _case(name, words, program, outcome, outcome, **more)


def _at(
    address: int, operand: int | None = None, *, mmio: bool = True, **registers: int | str
) -> dict[str, Any]:
    """RBX is *address*; the page of *operand* is looked at, and is the one for MMIO."""
    fields: dict[str, Any] = {"registers": {"rbx": address, **registers}}
    if operand is not None:
        fields |= {"operand": operand, "mmio": (operand,) if mmio else ()}
    return fields


@dataclass(frozen=True, kw_only=True)
class _Instruction:
    """An instruction with its memory operand at the address in *at*, less *bias*."""

    name: str
    program: str
    effect: Effect = _R
    at: str = "rbx"
    bias: int = 0
    stack: bool = False
    content: Sequence[int | str] = ()
    registers: Mapping[str, int | str] = field(default_factory=dict)
    #: How far the register *at* moves.
    moves: int = 0
    mmio: bool = True
    needs: frozenset[str] = frozenset()


_INSTRUCTIONS = (
    _Instruction(name="read", program=_READ),
    _Instruction(name="write", program="access: mov [rbx], eax", effect=_W),
    _Instruction(name="add", program="access: add qword [rbx], 1", effect=_W),
    _Instruction(name="lock-xadd", program="access: lock xadd [rbx], rax", effect=_W, registers={"rax": 3}),
    _Instruction(name="cmpxchg16b", program="access: lock cmpxchg16b [rbx]", effect=_W, content=(1, 0), mmio=False,
                 registers={"rax": 1, "rdx": 0, "rcx": 5}, needs=frozenset({"cx16"})),
    _Instruction(name="bit-offset", program="access: bts [rbx], rax", effect=_W, content=(0, 0),
                 registers={"rax": 70}),
    _Instruction(name="xlatb", program="access: db 0xd7", registers={"rax": 5}),
    _Instruction(name="push", program="access: push rax", effect=_W, at="rsp", bias=8, stack=True, moves=-8),
    _Instruction(name="pop", program="access: pop rax", at="rsp", stack=True, moves=8),
    _Instruction(name="call", program="access: call next; next: nop", effect=_W, at="rsp", bias=8, stack=True,
                 moves=-8),
    _Instruction(name="ret", program="access: ret; next: nop", at="rsp", stack=True, content=("next",), moves=8),
    _Instruction(name="rbp-operand", program="access: mov rax, [rbp]", at="rbp", stack=True),
    _Instruction(name="lodsb", program="access: lodsb", at="rsi", moves=1),
    _Instruction(name="rep-stosb", program="access: rep stosb", effect=_W, at="rdi", moves=16,
                 registers={"rcx": 16}),
    _Instruction(name="scasq", program="access: scasq", at="rdi", moves=8),
    _Instruction(name="fld", program="fninit; access: fld qword [rbx]", content=(0,)),
    _Instruction(name="fistp", program="fninit; fldz; access: fistp qword [rbx]", effect=_W),
    _Instruction(name="movaps", program="access: movaps xmm0, [rbx]"),
    _Instruction(name="movups-store", program="pxor xmm1, xmm1; access: movups [rbx], xmm1", effect=_W),
    _Instruction(name="fxsave", program="access: fxsave [rbx]", effect=_W),
    _Instruction(name="clflush", program="access: clflush [rbx]", mmio=False),
    _Instruction(name="jump-through-memory", program="access: jmp qword [rbx]; int3; next: nop", content=("next",)),
)  # fmt: skip


def _matrix() -> list[Case]:
    """Each instruction by a tagged pointer: masked, in the half of its privilege level, and the same without LAM."""
    cases = []
    for instruction in _INSTRUCTIONS:
        for side, page, lam in (("user", LOW_USER, _USER), ("supervisor", HIGH_SUPERVISOR, _SUPERVISOR)):
            pointer = _tagged(page) + instruction.bias
            fields: dict[str, Any] = {
                "registers": {instruction.at: pointer, **instruction.registers},
                "operand": page,
                "setup": (Words(page, tuple(instruction.content)),) if instruction.content else (),
                "needs": _LAM | instruction.needs,
            }
            state = {instruction.at: (pointer + instruction.moves) % (1 << 64)} if instruction.moves else {}
            cases += [
                _both(
                    f"{instruction.name}-{side}", f"a tagged {side} pointer: {instruction.name}", instruction.program,
                    completes(instruction.effect, **state), mmio=(page,) if instruction.mmio else (), **fields, **lam,
                ),
                _both(
                    f"{instruction.name}-{side}-without", f"the same with LAM off: {instruction.name}",
                    instruction.program, ss() if instruction.stack else gp(), cpl=lam.get("cpl", 0), **fields,
                ),
            ]  # fmt: skip
    return cases


#: Bit 47 differs from bit 63, in a user pointer and in a supervisor pointer.
_USER_MISMATCH, _SUPERVISOR_MISMATCH = _tagged(LOW_USER) | 1 << 47, _tagged(HIGH_SUPERVISOR) & ~(1 << 47)
_WIDTHS = (
    _both("u57", "LAM_U57 masks bits 62:57", _READ, completes(_R), cpl=3, cr3=CR3_LAM_U57,
          **_at(_tagged57(LOW_USER), LOW_USER)),
    _both("u57-tag48", "LAM_U57 does not mask bits 56:48", _READ, gp(), cpl=3, cr3=CR3_LAM_U57,
          **_at(_tagged(LOW_USER), LOW_USER)),
    _both("u57-bit-56", "with LAM_U57 bit 56 must be 0 in a user pointer", _READ, gp(), cpl=3, cr3=CR3_LAM_U57,
          **_at(LOW_USER | 1 << 56, LOW_USER)),
    _both("u57-before-u48", "with LAM_U57 and LAM_U48 the former counts", _READ, gp(), cpl=3,
          cr3=CR3_LAM_U57 | CR3_LAM_U48, **_at(_tagged(LOW_USER), LOW_USER)),
    _both("u57-and-u48", "with LAM_U57 and LAM_U48 bits 62:57 are masked", _READ, completes(_R), cpl=3,
          cr3=CR3_LAM_U57 | CR3_LAM_U48, **_at(_tagged57(LOW_USER), LOW_USER)),
    _both("u48-all-ones", "LAM_U48 masks metadata that is all ones", _READ, completes(_R), cpl=3, cr3=CR3_LAM_U48,
          **_at(LOW_USER | _METADATA48, LOW_USER)),
    _both("u48-bit-47", "bit 47 of a user pointer is not masked, and must be 0", _READ, gp(), **_USER,
          **_at(_USER_MISMATCH, LOW_USER)),
    _both("sup-all-zeros", "CR4.LAM_SUP masks metadata that is all zeros", _READ, completes(_R), **_SUPERVISOR,
          **_at(HIGH_SUPERVISOR & ~_METADATA48, HIGH_SUPERVISOR)),
    _both("sup-bit-47", "bit 47 of a supervisor pointer must be 1", _READ, gp(), **_SUPERVISOR,
          **_at(_SUPERVISOR_MISMATCH, HIGH_SUPERVISOR)),
    _both("u48-bit-47-push", "for a push that is #SS(0)", "access: push rax", ss(), **_USER,
          registers={"rsp": _USER_MISMATCH}),
    _both("sup-bit-47-rbp", "and for an operand based on RBP", "access: mov rax, [rbp]", ss(), **_SUPERVISOR,
          registers={"rbp": _SUPERVISOR_MISMATCH}),
    _both("u48-supervisor-pointer", "CR3's bits are not for supervisor pointers", _READ, gp(), cr3=CR3_LAM_U48,
          **_at(_tagged(HIGH_SUPERVISOR), HIGH_SUPERVISOR)),
    _both("sup-user-pointer", "CR4.LAM_SUP is not for user pointers", _READ, gp(), cpl=3, cr4=CR4_LAM_SUP,
          **_at(_tagged(LOW_USER), LOW_USER)),
    _both("untagged", "pointers without metadata are what they were", _READ, completes(_R), **_USER,
          **_at(LOW_USER, LOW_USER)),
)  # fmt: skip

_SPLIT = (
    _case("user-pointer-at-cpl0", "bit 63 chooses the mask, not the CPL; then LASS forbids the lower half", _READ,
          gp(), completes(_R), cr3=CR3_LAM_U48, **_at(_tagged(LOW_SUPERVISOR), LOW_SUPERVISOR)),
    _case("supervisor-pointer-at-cpl3", "a user program's tagged supervisor pointer is masked, and a violation",
          _READ, gp(), completes(_R), cpl=3, cr4=CR4_LAM_SUP, **_at(_tagged(HIGH_USER), HIGH_USER)),
    _case("write-at-cpl0", "a write of the kernel by a tagged user pointer", "access: mov [rbx], rax",
          gp(), completes(_W), cr3=CR3_LAM_U57, **_at(_tagged57(LOW_SUPERVISOR), LOW_SUPERVISOR)),
    _case("push-at-cpl0", "a push of the kernel by a tagged user pointer is #SS(0)", "access: push rax",
          ss(), completes(_W), cr3=CR3_LAM_U48, operand=LOW_SUPERVISOR, mmio=(LOW_SUPERVISOR,),
          registers={"rsp": _tagged(LOW_SUPERVISOR) + 8}),
    _both("user-pointer-at-cpl0-ac1", "AC=1 allows the kernel tagged user pointers", _READ, completes(_R),
          cr3=CR3_LAM_U48, rflags=RFLAGS_AC, **_at(_tagged(LOW_USER), LOW_USER)),
    _both("user-pointer-at-cpl0-no-smap", "so does CR4.SMAP = 0", _READ, completes(_R),
          cr3=CR3_LAM_U48, smap=False, **_at(_tagged(LOW_USER), LOW_USER)),
    _case("smap", "without LASS it is SMAP that forbids them; CR2 has no metadata", _READ, gp(), pf(PF_P, LOW_USER),
          cr3=CR3_LAM_U48, **_at(_tagged(LOW_USER), LOW_USER)),
    _case("absent-supervisor-pointer-at-cpl3", "LASS comes before paging, behind masking", _READ, gp(),
          pf(PF_U, HIGH_ABSENT), cpl=3, cr4=CR4_LAM_SUP, **_at(_tagged(HIGH_ABSENT))),
    _both("mismatch-at-cpl3", "the canonical rule comes first: bit 47 differs from bit 63", _READ, gp(), cpl=3,
          cr4=CR4_LAM_SUP, **_at(_SUPERVISOR_MISMATCH)),
)  # fmt: skip

_LAST_BYTES = PAGE_SIZE * 2 - 4 - LOW_USER % PAGE_SIZE
_PAGING = (
    _both("page-fault", "CR2 reports the address without metadata", _READ, pf(PF_U, LOW_ABSENT), **_USER,
          **_at(_tagged(LOW_ABSENT))),
    _both("page-fault-write", "for a write", "access: mov [rbx], al", pf(PF_U | PF_W, LOW_ABSENT), **_USER,
          **_at(_tagged(LOW_ABSENT))),
    _both("page-fault-add", "the read half of a read-modify-write reports a write", "access: add [rbx], rax",
          pf(PF_U | PF_W, LOW_ABSENT), **_USER, **_at(_tagged(LOW_ABSENT))),
    _both("page-fault-push", "for a push", "access: push rax", pf(PF_U | PF_W, LOW_ABSENT), **_USER,
          registers={"rsp": _tagged(LOW_ABSENT) + 8}),
    _both("page-fault-supervisor", "for a supervisor pointer", _READ, pf(0, HIGH_ABSENT), **_SUPERVISOR,
          **_at(_tagged(HIGH_ABSENT))),
    _both("page-fault-second-page", "for the second page of an access", _READ,
          pf(PF_U, layout.LOW_USER + 2 * PAGE_SIZE), **_USER, **_at(_tagged(LOW_USER + _LAST_BYTES))),
    _both("page-fault-rep-movsb", "in the middle of a string: RSI keeps its metadata", "access: rep movsb",
          pf(PF_U, layout.LOW_USER + 2 * PAGE_SIZE, rsi=_tagged(layout.LOW_USER) + 2 * PAGE_SIZE, rcx=4,
             rdi=LOW_USER + 4), **_USER,
          registers={"rsi": _tagged(LOW_USER + _LAST_BYTES), "rdi": LOW_USER, "rcx": 8}),
    _both("across-pages", "an access across a page end", _READ, completes(_R, rax=0x8877_6655_4433_2211), **_USER,
          setup=(Bytes(layout.LOW_USER + PAGE_SIZE - 4, bytes.fromhex("1122334455667788")),),
          **_at(_tagged(layout.LOW_USER + PAGE_SIZE - 4), LOW_USER, mmio=False)),
    _both("across-pages-write", "a write across a page end", "access: mov [rbx], rax",
          completes(_W).but(memory={layout.LOW_USER + PAGE_SIZE: 0x55667788}), **_USER,
          setup=(Words(layout.LOW_USER + PAGE_SIZE, (0,)),),
          **_at(_tagged(layout.LOW_USER + PAGE_SIZE - 4), LOW_USER, mmio=False, rax=0x55667788_11223344)),
    _both("two-tags", "two tags of one address are one place", "mov [rbx], rax; access: mov rdx, [rcx]",
          completes(_W, rdx=0x1234), **_USER,
          **_at(_tagged(LOW_USER), LOW_USER, mmio=False, rax=0x1234, rcx=LOW_USER | 5 << 57)),
)  # fmt: skip

_FS_BASE = {"msrs": {MSR_IA32_FS_BASE: LOW_USER}}
_FORMED = (
    _both("fs-base", "the sum of base and offset is masked", "access: mov rax, fs:[rbx]", completes(_R), **_USER,
          **_FS_BASE, **_at(_TAG48, LOW_USER)),
    _both("index", "the sum of base and index is", "access: mov rax, [rbx + rcx * 8]", completes(_R), **_USER,
          **_at(_TAG48, LOW_USER, rcx=LOW_USER // 8)),
    _both("absolute", "an absolute address is", "access: db 0x48, 0xa1; dq 0x2a5a000000500800", completes(_R), **_USER,
          operand=LOW_USER, mmio=(LOW_USER,)),
    _both("lea", "LEA computes, and masks nothing", "access: lea rax, [rbx + 8]",
          completes(Effect.NONE, rax=_tagged(LOW_USER) + 8), **_USER, **_at(_tagged(LOW_USER), LOW_USER, mmio=False)),
    _both("prefetch", "prefetches never fault", "access: prefetcht0 [rbx]", completes(), **_USER,
          **_at(_USER_MISMATCH)),
    _both("lgdt-operand", "LGDT's operand is data, and masked", "access: lgdt [rbx]", completes(_R), **_SUPERVISOR,
          setup=(TableRegister(HIGH_SUPERVISOR, layout.GDT, layout.GDT_BYTES - 1),),
          **_at(_tagged(HIGH_SUPERVISOR), HIGH_SUPERVISOR)),
    _both("sgdt-operand", "SGDT's operand is", "access: sgdt [rbx]", completes(_W), **_SUPERVISOR,
          **_at(_tagged(HIGH_SUPERVISOR), HIGH_SUPERVISOR)),
    _both("retfq", "a far RET's stack is", "access: retfq; next: nop", completes(_R, rsp=_tagged(HIGH_SUPERVISOR) + 16),
          **_SUPERVISOR, setup=(Words(HIGH_SUPERVISOR, ("next", layout.KERNEL_CS)),), operand=HIGH_SUPERVISOR,
          registers={"rsp": _tagged(HIGH_SUPERVISOR)}),
    _both("iretq", "IRET's stack is", "access: iretq; next: nop", completes(_R, rsp=layout.KERNEL_STACK_TOP),
          **_SUPERVISOR, operand=HIGH_SUPERVISOR, registers={"rsp": _tagged(HIGH_SUPERVISOR)},
          setup=(Words(HIGH_SUPERVISOR, ("next", layout.KERNEL_CS, 2, layout.KERNEL_STACK_TOP, layout.KERNEL_SS)),)),
    _both("iretq-user", "IRET's stack is at CPL 3", "access: iretq; next: nop",
          completes(_R, rsp=layout.USER_STACK_TOP),
          **_USER, operand=LOW_USER, registers={"rsp": _tagged(LOW_USER)},
          setup=(Words(LOW_USER, ("next", layout.USER_CS, 2, layout.USER_STACK_TOP, layout.USER_SS)),)),
    _both("enter-nested", "ENTER's nested frame reads and pushes are", "access: enter 0x10, 2", completes(_W), **_USER,
          operand=LOW_USER, registers={"rbp": _tagged(LOW_USER) + 0x100, "rsp": _tagged(LOW_USER) + 0x80}),
)  # fmt: skip

_USER_TARGET, _SUPERVISOR_TARGET = _tagged(layout.LOW_USER), _tagged(layout.HIGH_SUPERVISOR)
_NOT_MASKED = (
    _both("jump", "a branch target is not masked: the JMP faults", "access: jmp rbx", gp(), **_USER,
          **_at(_USER_TARGET)),
    _both("jump-supervisor", "a supervisor's JMP likewise", "access: jmp rbx", gp(), **_SUPERVISOR,
          **_at(_SUPERVISOR_TARGET)),
    _both("call", "a CALL likewise: nothing is pushed", "access: call rbx", gp(), **_USER, **_at(_USER_TARGET)),
    _both("ret-target", "a RET likewise: nothing is popped", "push rbx; access: ret", gp(), **_USER,
          **_at(_USER_TARGET)),
    _both("jump-after-read", "a JMP to where a tagged read has been", "mov rax, [rbx]; access: jmp rbx", gp(), **_USER,
          **_at(_USER_TARGET)),
    _both("jump-after-read-supervisor", "and in the kernel", "mov rax, [rbx]; access: jmp rbx", gp(), **_SUPERVISOR,
          **_at(_SUPERVISOR_TARGET)),
    _both("invlpg", "INVLPG names an address: any", "access: invlpg [rbx]", completes(Effect.NONE), **_SUPERVISOR,
          **_at(_tagged(HIGH_SUPERVISOR), HIGH_SUPERVISOR, mmio=False)),
    _both("invpcid-target", "INVPCID's target must be canonical", "access: invpcid rax, [rbx]", gp().but(effect=_R),
          **_SUPERVISOR, setup=(Words(HIGH_SUPERVISOR, (0, _tagged(HIGH_SUPERVISOR))),),
          **{"needs": _LAM | {"invpcid"}, **_at(HIGH_SUPERVISOR, HIGH_SUPERVISOR, mmio=False, rax=0)}),
    _both("invpcid-descriptor", "INVPCID's descriptor is data, and masked", "access: invpcid rax, [rbx]", completes(_R),
          **_SUPERVISOR, setup=(Words(HIGH_SUPERVISOR, (0, HIGH_SUPERVISOR)),),
          **{"needs": _LAM | {"invpcid"}, **_at(_tagged(HIGH_SUPERVISOR), HIGH_SUPERVISOR, mmio=False, rax=0)}),
    _both("lgdt-base", "LGDT's base must be canonical", "access: lgdt [rbx]", gp(gdt_base=layout.GDT).but(effect=_R),
          **_SUPERVISOR, setup=(TableRegister(HIGH_SUPERVISOR, _tagged(layout.GDT), layout.GDT_BYTES - 1),),
          **_at(HIGH_SUPERVISOR, HIGH_SUPERVISOR, mmio=False)),
    _both("lidt-base", "LIDT's base likewise", "access: lidt [rbx]", gp(idt_base=layout.IDT).but(effect=_R),
          **_SUPERVISOR, setup=(TableRegister(HIGH_SUPERVISOR, _tagged(layout.IDT), layout.VECTORS * 16 - 1),),
          **_at(HIGH_SUPERVISOR, HIGH_SUPERVISOR, mmio=False)),
    _both("lldt-base", "the base in an LDT descriptor likewise: #GP with its selector", "access: lldt ax",
          fault(GP, layout.FREE_SELECTOR), **_SUPERVISOR, registers={"rax": layout.FREE_SELECTOR},
          setup=(Descriptor(layout.FREE_SELECTOR, make_segment(layout.LDT & MASK32, layout.LDT_BYTES - 1, AR_LDT),
                            _tagged(layout.LDT) >> 32),)),
    _both("wrfsbase", "WRFSBASE's address likewise", "access: wrfsbase rbx", gp(), cpl=3, cr3=CR3_LAM_U48,
          cr4=CR4_FSGSBASE, **{"needs": _LAM | {"fsgsbase"}, **_at(_tagged(LOW_USER))}),
    *(
        _both(f"wrmsr-{name}", f"WRMSR's address likewise: {name}", "access: wrmsr", gp(), **_SUPERVISOR,
              registers={"rcx": index, "rax": _SUPERVISOR_TARGET & MASK32, "rdx": _SUPERVISOR_TARGET >> 32})
        for name, index in (("lstar", MSR_IA32_LSTAR), ("fs-base", MSR_IA32_FS_BASE),
                            ("kernel-gs-base", MSR_IA32_KERNEL_GS_BASE))
    ),
)  # fmt: skip

#: With 5-level paging, an address below the split that LAM_U48 makes one of the low 47 bits.
_ALIAS = 0x00FF_0000_0000_0000
_ALIAS_CODE = _ALIAS | layout.LOW_USER
_FIVE_LEVELS = (
    _both("la57-sup", "with 5-level paging CR4.LAM_SUP masks bits 62:57", _READ, completes(_R), cr4=CR4_LAM_SUP,
          **_LA57, **_at(_tagged57(HIGH_SUPERVISOR), HIGH_SUPERVISOR)),
    _both("la57-sup-bit-50", "and none below: another address", _READ, pf(0, HIGH_SUPERVISOR & ~(1 << 50)),
          cr4=CR4_LAM_SUP, **_LA57, **_at(_tagged57(HIGH_SUPERVISOR) & ~(1 << 50))),
    _both("la57-sup-bit-56", "bit 56 must be 1 in a supervisor pointer", _READ, gp(), cr4=CR4_LAM_SUP, **_LA57,
          **_at(_tagged57(HIGH_SUPERVISOR) & ~(1 << 56))),
    _both("la57-u57", "LAM_U57 with 5-level paging", _READ, completes(_R), cpl=3, cr3=CR3_LAM_U57, **_LA57,
          **_at(_tagged57(LOW_USER), LOW_USER)),
    _both("la57-u57-bit-50", "masks no bit below 57: another address", _READ, pf(PF_U, LOW_USER | 1 << 50), cpl=3,
          cr3=CR3_LAM_U57, **_LA57, **_at(_tagged57(LOW_USER) | 1 << 50)),
    _both("la57-u48", "LAM_U48 with 5-level paging masks bits that are translated", _READ, completes(_R), **_USER,
          **_LA57, **_at(_tagged(LOW_USER), LOW_USER)),
    _both("la57-u48-bit-47", "bit 47 must be 0 with it, whatever is mapped", _READ, gp(), **_USER, **_LA57,
          **_at(LOW_USER | 1 << 47)),
    _both("la57-u48-fetch", "a fetch is not masked: another address than a read's", "mov rax, [rbx]; access: jmp rbx",
          pf(PF_U | PF_I, _ALIAS_CODE, _ALIAS_CODE), **_USER, **_LA57, **_at(_ALIAS_CODE)),
    _both("la57-u48-code-and-data", "an address may be code of one page and data of another",
          "access: mov rax, [rbx]; mov rcx, [rbx]; jmp next; next: mov rdx, [rbx]",
          completes(_R, rax=0x1234, rcx=0x1234, rdx=0x1234), **_USER, **_LA57, at=_ALIAS_CODE + 0x100,
          setup=(Map(_ALIAS_CODE, layout.SPARE_GPA, layout.USER_PAGE), Words(LOW_USER, (0x1234,))),
          **_at(_ALIAS | LOW_USER, LOW_USER)),
)  # fmt: skip

_BIT_U57, _BIT_U48, _BIT_SUP = 61, 62, 28
_SET_U48 = f"mov rax, cr3; bts rax, {_BIT_U48}; mov cr3, rax"
_CLEAR_U48 = f"mov rax, cr3; btr rax, {_BIT_U48}; mov cr3, rax"
_SET_SUP = f"mov rax, cr4; bts rax, {_BIT_SUP}; mov cr4, rax"
_CLEAR_SUP = f"mov rax, cr4; btr rax, {_BIT_SUP}; mov cr4, rax"
_NO_LAM: dict[str, Any] = {"needs": frozenset(), "without": _LAM}
_CONTROL = (
    _both("set-u48", "MOV to CR3 turns LAM_U48 on", f"{_SET_U48}; access: mov rcx, [rbx]", completes(_R),
          rflags=RFLAGS_AC, **_at(_tagged(LOW_USER), LOW_USER)),
    _both("clear-u48", "and off, also for a page that has been read by the pointer",
          f"mov rcx, [rbx]; {_CLEAR_U48}; access: mov rcx, [rbx]", gp().but(effect=_R), rflags=RFLAGS_AC,
          cr3=CR3_LAM_U48, **_at(_tagged(LOW_USER), LOW_USER, mmio=False)),
    _both("set-sup", "MOV to CR4 turns LAM_SUP on", f"{_SET_SUP}; access: mov rcx, [rbx]", completes(_R),
          **_at(_tagged(HIGH_SUPERVISOR), HIGH_SUPERVISOR)),
    _both("clear-sup", "and off, also for a page that has been read by the pointer",
          f"mov rcx, [rbx]; {_CLEAR_SUP}; access: mov rcx, [rbx]", gp().but(effect=_R), **_SUPERVISOR,
          **_at(_tagged(HIGH_SUPERVISOR), HIGH_SUPERVISOR, mmio=False)),
    *(
        _both(f"cr3-{name}-reads-back", f"CR3 reads as written: {name}",
              f"mov rax, cr3; bts rax, {bit}; mov rbx, rax; access: mov cr3, rax; mov rax, cr3; xor rax, rbx",
              completes(rax=0))
        for name, bit in (("LAM_U57", _BIT_U57), ("LAM_U48", _BIT_U48))
    ),
    *(
        _both(f"cr3-{bit}-without-cpuid", f"without LAM in CPUID, bit {bit} of CR3 is reserved",
              f"mov rax, cr3; bts rax, {bit}; access: mov cr3, rax", gp(), **_NO_LAM)
        for bit in (_BIT_U57, _BIT_U48)
    ),
    _both("cr3-bit-60", "with LAM the bits below are still reserved", "mov rax, cr3; bts rax, 60; access: mov cr3, rax",
          gp()),
    _both("sup-without-cpuid", "without LAM in CPUID, CR4.LAM_SUP is reserved",
          f"mov rax, cr4; bts rax, {_BIT_SUP}; access: mov cr4, rax", gp(), **_NO_LAM),
    _both("sregs-cr3-without-cpuid", "KVM_SET_SREGS refuses LAM_U48 without LAM in CPUID", "access: nop", refused(),
          cr3=CR3_LAM_U48, forced=False, **_NO_LAM),
    _both("sregs-cr4-without-cpuid", "KVM_SET_SREGS refuses CR4.LAM_SUP without LAM in CPUID", "access: nop", refused(),
          cr4=CR4_LAM_SUP, forced=False, **_NO_LAM),
    _both("cpuid", "CPUID.(EAX=07H,ECX=1):EAX[26] says that there is LAM",
          "mov eax, 7; mov ecx, 1; access: cpuid; shr eax, 26; and eax, 1", completes(rax=1)),
    _case("sup-protected", "CR4.LAM_SUP may be set outside IA-32e mode",
          f"mov eax, cr4; bts eax, {_BIT_SUP}; access: mov cr4, eax; mov eax, cr4; shr eax, {_BIT_SUP}; and eax, 1",
          completes(rax=1), None, mode=Mode.PAE, enabled=False),
    _both("compatibility", "in compatibility mode addresses have 32 bits, and nothing to mask",
          "access: mov eax, [ebx]",
          completes(_R), mode=Mode.COMPATIBILITY, cpl=3, cr3=CR3_LAM_U48, cr4=CR4_LAM_SUP,
          **_at(LOW_USER, LOW_USER)),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    *_matrix(),
    *_WIDTHS,
    *_SPLIT,
    *_PAGING,
    *_FORMED,
    *_NOT_MASKED,
    *_FIVE_LEVELS,
    *_CONTROL,
)
