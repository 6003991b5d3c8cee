"""Every kind of access from every privilege level to every kind of page, with LASS on and off.

What must happen is worked out here once more from the manual's words, in :func:`expected`, so that the rule, the page
walk and direct execution are held against something that is none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest

from lasskvm.conformance import layout
from lasskvm.conformance.guest import CR2_UNTOUCHED, Guest
from lasskvm.conformance.layout import (
    HIGH_ABSENT,
    HIGH_SUPERVISOR,
    HIGH_USER,
    LOW_ABSENT,
    LOW_SUPERVISOR,
    LOW_USER,
    UPPER,
    USER_STACK,
)
from lasskvm.x86.exceptions import GP, PF, PF_I, PF_P, PF_U, PF_W, SS
from lasskvm.x86.registers import CR4_LASS, CR4_SMAP, CR4_SMEP, RFLAGS_AC

PAGES = (LOW_USER, LOW_SUPERVISOR, LOW_ABSENT, HIGH_USER, HIGH_SUPERVISOR, HIGH_ABSENT)
ABSENT = (LOW_ABSENT, HIGH_ABSENT)
USER_PAGES = (LOW_USER, HIGH_USER)

# What lies in the pages that are accessed: offsets of an IRETQ frame and of two pseudo-descriptors
FRAME, POPPED_FLAGS, SELECTOR, GDT_POINTER, IDT_POINTER, ZEROS = 0x100, 0x110, 0x120, 0x140, 0x150, 0x200


@dataclass(frozen=True)
class Access:
    """An instruction that accesses ``target``, whose address is in the register ``at``, ``bias`` bytes behind it."""

    name: str
    source: str
    at: str = "rbx"
    bias: int = 0
    writes: bool = False
    stack: bool = False
    offset: int = FRAME
    checked: bool = True
    privileged: bool = False

    @property
    def program(self) -> str:
        *before, last = self.source.split("; ")
        setup = "".join(f"{statement}; " for statement in before)
        return f"jmp setup; landing: int {layout.DONE_VECTOR:#x}; setup: {setup}nop; fault: {last}"


def push(name: str, source: str, **options: bool) -> Access:
    return Access(name, source, at="rsp", bias=8, writes=True, stack=True, **options)


def pop(name: str, source: str, offset: int = FRAME) -> Access:
    return Access(name, source, at="rsp", stack=True, offset=offset)


def names(name: str, source: str, **options: bool) -> Access:
    """An instruction that names an address without accessing it."""
    return Access(name, source, checked=False, **options)


ACCESSES = (
    Access("read_of_8_bytes", "mov rax, [rbx]"),
    Access("read_of_1_byte", "mov al, [rbx]"),
    Access("sse_read", "movups xmm0, [rbx]"),
    Access("x87_read", "fld qword [rbx]"),
    Access("ldmxcsr", "ldmxcsr [rbx + 0x80]", bias=-0x80, offset=ZEROS),
    Access("fxrstor", "fxrstor [rbx + 0x100]", bias=-0x100, offset=ZEROS),
    Access("lodsq", "lodsq", at="rsi"),
    Access("cmpsb_first_operand", "cmpsb", at="rsi"),
    Access("cmpsb_second_operand", "cmpsb", at="rdi"),
    Access("scasb", "scasb", at="rdi"),
    Access("movsb_source", "movsb", at="rsi"),
    Access("rep_movsb_source", "mov ecx, 4; rep movsb", at="rsi"),
    Access("xlatb", "xor eax, eax; db 0xd7"),
    Access("clflush", "clflush [rbx]"),
    Access("verr", "verr word [rbx]", offset=SELECTOR),
    Access("load_of_fs", "mov fs, [rbx]", offset=SELECTOR),
    Access("indirect_jump_operand", "jmp qword [rbx]"),
    Access("indirect_call_operand", "call qword [rbx]"),
    Access("far_jump_operand", "jmp tbyte [rbx]"),
    Access("push_of_memory_operand", "push qword [rbx]"),
    Access("read_through_ss_override", "mov rax, ss:[rbx]"),
    Access("read_through_fs_and_rbp", "mov rax, fs:[rbp]", at="rbp"),
    Access("bit_test", "bt qword [rbx], 5"),
    Access("lgdt", "lgdt [rbx]", offset=GDT_POINTER, privileged=True),
    Access("lidt", "lidt [rbx]", offset=IDT_POINTER, privileged=True),
    Access("lmsw", "lmsw word [rbx]", offset=SELECTOR, privileged=True),
    Access("write_of_8_bytes", "mov [rbx], rax", writes=True),
    Access("write_of_1_byte", "mov [rbx], al", writes=True),
    Access("sse_write", "movups [rbx], xmm0", writes=True),
    Access("x87_write", "fstp qword [rbx]", writes=True),
    Access("nontemporal_write", "movnti [rbx], rax", writes=True),
    Access("stmxcsr", "stmxcsr [rbx]", writes=True),
    Access("fxsave", "fxsave [rbx]", writes=True),
    Access("stosq", "stosq", at="rdi", writes=True),
    Access("movsb_destination", "movsb", at="rdi", writes=True),
    Access("rep_stosq", "mov ecx, 4; rep stosq", at="rdi", writes=True),
    Access("pop_of_memory_operand", "pop qword [rbx]", writes=True),
    Access("sgdt", "sgdt [rbx]", writes=True),
    Access("sidt", "sidt [rbx]", writes=True),
    Access("sldt", "sldt word [rbx]", writes=True),
    Access("str", "str word [rbx]", writes=True),
    Access("smsw", "smsw word [rbx]", writes=True),
    Access("setcc", "setne byte [rbx]", writes=True),
    Access("add_to_memory", "add [rbx], rax", writes=True),
    Access("inc_of_memory", "inc byte [rbx]", writes=True),
    Access("xchg", "xchg [rbx], rax", writes=True),
    Access("lock_xadd", "lock xadd [rbx], rax", writes=True),
    Access("cmpxchg", "cmpxchg [rbx], rcx", writes=True),
    Access("cmpxchg16b", "lock cmpxchg16b [rbx]", writes=True),
    Access("bit_test_and_set", "bts qword [rbx], 5", writes=True),
    Access("shift_of_memory", "shl qword [rbx], 3", writes=True),
    Access("read_based_on_rbp", "mov rax, [rbp]", at="rbp", stack=True),
    Access("read_based_on_rsp", "mov rax, [rsp]", at="rsp", stack=True),
    Access("read_based_on_rbp_through_ds", "mov rax, ds:[rbp]", at="rbp", stack=True),
    Access("write_based_on_rbp", "mov [rbp + 8], rax", at="rbp", bias=-8, writes=True, stack=True),
    Access("leave", "leave", at="rbp", stack=True),
    push("push", "push rax"),
    push("push_immediate", "push 5"),
    push("pushfq", "pushfq"),
    push("enter", "enter 0, 0"),
    push("call", "call landing"),
    push("indirect_call", "call r9"),
    push("far_call", "call tbyte [r10]"),
    pop("pop", "pop rax"),
    pop("popfq", "popfq", POPPED_FLAGS),
    pop("ret", "ret"),
    pop("far_return", "retfq"),
    pop("iretq", "iretq"),
    pop("pop_fs", "pop fs", SELECTOR),
    names("lea", "lea rax, [rbx]"),
    names("prefetch", "prefetcht0 [rbx]"),
    names("prefetch_nta", "prefetchnta [rbx]"),
    names("nop_with_memory_operand", "nop dword [rbx]"),
    names("invlpg", "invlpg [rbx]", privileged=True),
)
ONCE_FOR_EVERY_LEVEL = ("read_of_8_bytes", "write_of_8_bytes", "add_to_memory", "push", "pop", "prefetch")


@dataclass(frozen=True)
class Expected:
    vector: int = layout.DONE_VECTOR
    error_code: int | None = None


def expected(access: Access, page: int, cpl: int, lass: bool, smap: bool, ac: bool) -> Expected:
    if not access.checked:
        return Expected()
    upper, user = page >= UPPER, cpl == 3
    if lass and (upper if user else not upper and smap and not ac):
        return Expected(SS if access.stack else GP, 0)
    code = (PF_W if access.writes else 0) | (PF_U if user else 0)
    if page in ABSENT:
        return Expected(PF, code)
    if (page not in USER_PAGES) if user else (page in USER_PAGES and smap and not ac):
        return Expected(PF, code | PF_P)
    return Expected()


def fill_page(guest: Guest, page: int, cpl: int, landing: int) -> None:
    """What the instructions find where they read."""
    cs, ss = layout.code_selectors(64, cpl)
    rsp = USER_STACK + 0x800 if cpl == 3 else layout.KERNEL_STACK_TOP
    frame = (landing, cs, 2, rsp, ss)
    guest.write(page + FRAME, b"".join(value.to_bytes(8, "little") for value in frame))
    for offset, base, limit in ((GDT_POINTER, layout.GDT, 0xFF), (IDT_POINTER, layout.IDT, 0xFFF)):
        guest.write(page + offset, limit.to_bytes(2, "little") + base.to_bytes(8, "little"))


def check(guest: Guest, access: Access, page: int, cpl: int, lass: bool, smap: bool, ac: bool) -> None:
    guest.cr4 = layout.DEFAULT_CR4 & ~(CR4_LASS | CR4_SMAP) | CR4_LASS * lass | CR4_SMAP * smap
    target = page + access.offset
    harmless = USER_STACK + 0x400 if cpl == 3 else UPPER + 0x60000
    registers = dict.fromkeys(("rsi", "rdi", "rbp", "rbx", "rsp"), harmless)
    registers[access.at] = target + access.bias
    landing = (layout.USER_CODE if cpl == 3 else layout.KERNEL_CODE) + LANDING_OFFSET
    if page not in ABSENT:
        fill_page(guest, page, cpl, landing)
        guest.tables.clear_accessed_and_dirty(page)
    far_pointer = landing.to_bytes(8, "little") + layout.code_selectors(64, cpl)[0].to_bytes(2, "little")
    guest.write(harmless + 0x80, far_pointer)
    outcome = guest.execute(
        access.program,
        cpl=cpl, rflags=RFLAGS_AC * ac, r9=landing, r10=harmless + 0x80, rcx=0x10, **registers,
    )  # fmt: skip
    want = expected(access, page, cpl, lass, smap, ac)
    got = Expected(outcome.vector if outcome.vector is not None else -1, outcome.error_code)
    circumstances = f"{access.name} at {target:#x}, CPL {cpl}, LASS {lass}, SMAP {smap}, AC {ac}: {outcome}"
    assert got == want, circumstances
    if want.vector != layout.DONE_VECTOR:
        assert outcome.label == "fault", circumstances
        assert outcome.cr2 == (target if want.vector == PF else CR2_UNTOUCHED), circumstances
    untouched = want.vector != layout.DONE_VECTOR or not access.checked
    if page not in ABSENT:
        assert guest.accessed_and_dirty(page) == ((False, False) if untouched else (True, access.writes)), (
            circumstances
        )


#: Where ``landing`` is in every program: behind the jump over it.
LANDING_OFFSET = 5


@pytest.mark.parametrize("access", ACCESSES, ids=lambda access: access.name)
@pytest.mark.parametrize("cpl", [0, 3])
def test_access_to_every_kind_of_page(guest: Guest, access: Access, cpl: int) -> None:
    if access.privileged and cpl != 0:
        outcome = guest.execute(access.program, cpl=cpl, rbx=LOW_USER)
        assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
        return
    for page, lass, smap, ac in product(PAGES, (True, False), (True, False), (False, True)):
        check(guest, access, page, cpl, lass, smap, ac)


@pytest.mark.parametrize("name", ONCE_FOR_EVERY_LEVEL)
@pytest.mark.parametrize("cpl", [1, 2])
def test_privilege_levels_1_and_2_are_supervisor_mode(guest: Guest, name: str, cpl: int) -> None:
    access = next(access for access in ACCESSES if access.name == name)
    for page, lass, smap, ac in product(PAGES, (True, False), (True, False), (False, True)):
        check(guest, access, page, cpl, lass, smap, ac)


@pytest.mark.parametrize("branch", ["jmp rbx", "call rbx", "push rbx; ret", "jmp qword [r10]"])
@pytest.mark.parametrize("cpl", [0, 1, 2, 3])
def test_fetch_from_every_kind_of_page(guest: Guest, branch: str, cpl: int) -> None:
    """The branch completes; the fetch at its target faults, and RIP is the target."""
    user = cpl == 3
    pointer = USER_STACK + 0x400 if user else UPPER + 0x60000
    for page, lass, smap, ac, smep in product(PAGES, *[(True, False)] * 4):
        guest.cr4 = layout.DEFAULT_CR4 & ~(CR4_LASS | CR4_SMAP | CR4_SMEP)
        guest.cr4 |= CR4_LASS * lass | CR4_SMAP * smap | CR4_SMEP * smep
        if page not in ABSENT:
            guest.tables.clear_accessed_and_dirty(page)
            guest.write(page, bytes((0xCD, layout.DONE_VECTOR)))
        guest.write(pointer, page.to_bytes(8, "little"))
        outcome = guest.execute(f"{branch}; hlt", cpl=cpl, rflags=RFLAGS_AC * ac, rbx=page, r10=pointer)
        code = PF_I | (PF_U if user else 0)
        if lass and (page >= UPPER) == user:
            want = Expected(GP, 0)
        elif page in ABSENT:
            want = Expected(PF, code)
        elif (page not in USER_PAGES) if user else (page in USER_PAGES and smep):
            want = Expected(PF, code | PF_P)
        else:
            want = Expected()
        circumstances = (
            f"{branch} to {page:#x}, CPL {cpl}, LASS {lass}, SMAP {smap}, AC {ac}, SMEP {smep}: {outcome}"
        )
        assert (outcome.vector, outcome.error_code) == (want.vector, want.error_code), circumstances
        if want.vector != layout.DONE_VECTOR:
            assert outcome.rip == page, circumstances
            assert outcome.cr2 == (page if want.vector == PF else CR2_UNTOUCHED), circumstances
        if page not in ABSENT:
            assert guest.accessed_and_dirty(page) == (want.vector == layout.DONE_VECTOR, False), circumstances
