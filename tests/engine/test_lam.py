"""Linear-address masking where translations are kept: tagged pointers, their aliases, and what forgets them.

Everything that a single access can show is in the conformance group ``lam``; these tests run on both engines, too.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from compiled_twins import (
    ROUNDS,
    Twins,
    native,
    plain_result,
    random_address,
    random_flags,
    random_mode,
    tables,
)

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import (
    HIGH_ABSENT,
    HIGH_SUPERVISOR,
    KERNEL_CODE,
    LDT_DATA,
    LOW_ABSENT,
    LOW_USER,
    UPPER,
)
from lasskvm.emulator import mmu
from lasskvm.kvm import ExecutionEngine, MmioExit
from lasskvm.memory import PAGE_SIZE, SLOT_LOG_DIRTY_PAGES
from lasskvm.state import CR3, CR4, DR6, Segment
from lasskvm.x86.address import untag
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import FEATURES, CpuidEntry
from lasskvm.x86.descriptors import make_segment
from lasskvm.x86.exceptions import DB, GP, PF, PF_U, PF_W
from lasskvm.x86.paging import PTE_G, PTE_U
from lasskvm.x86.registers import (
    AR_DATA,
    AR_DPL_SHIFT,
    AR_LDT,
    CR3_LAM_U48,
    CR3_LAM_U57,
    CR4_LA57,
    CR4_LAM_SUP,
    CR4_LASS,
    CR4_PCIDE,
    DR6_B0,
    MASK32,
    RFLAGS_AC,
)

METADATA48 = 0x7FFF << 48
TAG, OTHER_TAG = 0x2A5A << 48, 0x1234 << 48
OLD, NEW = 0x1111, 0x2222
TABLES_GVA = UPPER + 0x200000
HANDLER = KERNEL_CODE + 0x1000
#: Guest-physical pages of the layout to access.
LOW_USER_PAGE, HIGH_SUPERVISOR_PAGE = layout.DATA_GPA, layout.DATA_GPA + 0xC000
#: No memory is there.
HOLE = 0xD000_0000
#: MOV EAX, imm32; RET: the immediate is at offset 1.
RETURN_1 = assemble("mov eax, 1; ret", 0).code
#: Below the split, but above what LAM_U48 leaves of a pointer: with 5-level paging an address of its own.
ALIAS = 0x00FF_0000_0000_0000
OTHER_BASE = 0x123000
#: DR7: breakpoint 0 on accesses of 8 bytes.
WATCH_0 = 1 << 1 | 3 << 16 | 2 << 18


def tagged(address: int, tag: int = TAG) -> int:
    """*address* with *tag* in bits 62:48."""
    return address & ~METADATA48 | tag


def with_lam(cpu: str) -> list[CpuidEntry]:
    """The CPUID of model *cpu* with LAM."""
    place = FEATURES["lam"]
    return [
        replace(entry, eax=entry.eax | 1 << place.bit)
        if (entry.function, entry.index) == (place.leaf, place.subleaf)
        else entry
        for entry in parse_cpu(cpu).entries()
    ]


@pytest.fixture(scope="module", params=["jit", "emulator"])
def engine(request: pytest.FixtureRequest) -> ExecutionEngine:
    name: ExecutionEngine = request.param
    return name


@pytest.fixture(scope="module")
def kept_guest(engine: ExecutionEngine) -> Guest:
    guest = Guest(engine=engine)
    guest.vcpu.set_cpuid2(with_lam("max"))
    return guest


@pytest.fixture(scope="module")
def kept_guest57(engine: ExecutionEngine) -> Guest:
    guest = Guest("max,+la57", engine=engine, levels=5)
    guest.vcpu.set_cpuid2(with_lam("max,+la57"))
    return guest


@pytest.fixture
def masking(kept_guest: Guest) -> Guest:
    """A guest with LAM_U48 and LAM_SUP on, with LASS."""
    kept_guest.reset()
    kept_guest.cr4 |= CR4_LAM_SUP
    kept_guest.sregs["cr3"] = kept_guest.tables.root | CR3_LAM_U48
    return kept_guest


@pytest.fixture
def masking57(kept_guest57: Guest) -> Guest:
    """The same with 5-level paging, where LAM_U48 masks bits that are translated."""
    kept_guest57.reset()
    kept_guest57.sregs["cr3"] = kept_guest57.tables.root | CR3_LAM_U48
    return kept_guest57


def remapping(guest: Guest, gva: int, gpa: int) -> tuple[int, int]:
    """RDI and RSI for ``mov [rdi], rsi``, by which the guest maps the page of *gva* to *gpa*."""
    pages = (layout.TABLES_END - layout.TABLES_GPA) // PAGE_SIZE
    guest.tables.map(TABLES_GVA, layout.TABLES_GPA, pages=pages)
    entry = guest.tables.entry(gva)
    place = TABLES_GVA + guest.tables.entry_gpa(gva) - layout.TABLES_GPA
    return place, entry - guest.tables.frame(gva) + gpa


# ---------------------------------------------------------------------------------------- what forgets translations


@pytest.mark.parametrize("flags", [0, PTE_G])
@pytest.mark.parametrize(
    "forget",
    ["invlpg [rcx]", "push rcx; push 0; xor eax, eax; invpcid rax, [rsp]"],
    ids=["invlpg", "invpcid"],
)
def test_invalidation_of_an_address_forgets_its_tagged_aliases(
    masking: Guest, forget: str, flags: int
) -> None:
    masking.tables.map(HIGH_SUPERVISOR, HIGH_SUPERVISOR_PAGE, flags)
    masking.memory.store(HIGH_SUPERVISOR_PAGE, 8, OLD)
    masking.memory.store(LOW_USER_PAGE, 8, NEW)
    rdi, rsi = remapping(masking, HIGH_SUPERVISOR, LOW_USER_PAGE)
    outcome = masking.execute(
        f"mov r8, [rbx]; mov [rdx], r8; mov [rdi], rsi; {forget}; mov r9, [rbx]; mov r10, [rdx]",
        rbx=tagged(HIGH_SUPERVISOR), rdx=tagged(HIGH_SUPERVISOR, OTHER_TAG), rcx=HIGH_SUPERVISOR,
        rdi=rdi, rsi=rsi,
    )  # fmt: skip
    assert outcome.completed, str(outcome)
    assert (outcome.registers.r8, outcome.registers.r9, outcome.registers.r10) == (OLD, NEW, NEW)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_write_of_cr3_forgets_the_tagged_aliases_of_local_pages(masking: Guest, count: int) -> None:
    masking.memory.store(HIGH_SUPERVISOR_PAGE, 8, OLD)
    masking.memory.store(LOW_USER_PAGE, 8, NEW)
    step = 1 << 48
    visit = f"mov rbx, r14; mov ecx, {count}; next: add r8, [rbx]; add rbx, r15; dec ecx; jne next; "
    rdi, rsi = remapping(masking, HIGH_SUPERVISOR, LOW_USER_PAGE)
    outcome = masking.execute(
        f"{visit}mov [rdi], rsi; mov rax, cr3; mov cr3, rax; mov r9, r8; xor r8, r8; {visit.replace('next', 'on')}nop",
        r14=tagged(HIGH_SUPERVISOR, 0), r15=step, rdi=rdi, rsi=rsi,
    )  # fmt: skip
    assert outcome.completed, str(outcome)
    assert (outcome.registers.r9, outcome.registers.r8) == (count * OLD, count * NEW)


@pytest.mark.parametrize("flags", [0, PTE_G])
@pytest.mark.parametrize("keep", [0, 1 << 63], ids=["plain", "no-flush"])
def test_clearing_lam_in_cr3_ends_it_for_global_pages_too(masking: Guest, flags: int, keep: int) -> None:
    masking.cr4 |= CR4_PCIDE
    masking.tables.map(LOW_USER, LOW_USER_PAGE, PTE_U | flags)
    root = masking.tables.root
    outcome = masking.execute(
        "mov r8, [rbx]; mov cr3, rax; fault: mov r8, [rbx]",
        rflags=RFLAGS_AC, rbx=tagged(LOW_USER), rax=root | keep,
    )  # fmt: skip
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")
    outcome = masking.execute(
        "mov r8, [rbx]; mov cr3, rax; mov r9, [rcx]; fault: mov r8, [rbx]",
        rflags=RFLAGS_AC, rbx=LOW_USER | 1 << 52, rcx=LOW_USER | 1 << 58, rax=root | CR3_LAM_U57 | keep,
    )  # fmt: skip
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_setting_lam_in_cr3_moves_what_five_level_paging_has_translated(masking57: Guest) -> None:
    """With LAM_U48 the address is no longer that of the global page that it was."""
    masking57.cr4 &= ~CR4_LASS
    masking57.sregs.clear()
    masking57.tables.map(ALIAS, HIGH_SUPERVISOR_PAGE, PTE_U | PTE_G)
    masking57.tables.map(0, LOW_USER_PAGE, PTE_U | PTE_G)
    masking57.memory.store(HIGH_SUPERVISOR_PAGE, 8, OLD)
    masking57.memory.store(LOW_USER_PAGE, 8, NEW)
    outcome = masking57.execute(
        "mov r8, [rbx]; mov cr3, rax; mov r9, [rbx]; mov cr3, rcx; mov r10, [rbx]",
        rflags=RFLAGS_AC, rbx=ALIAS, rax=masking57.tables.root | CR3_LAM_U48, rcx=masking57.tables.root,
    )  # fmt: skip
    assert outcome.completed, str(outcome)
    assert (outcome.registers.r8, outcome.registers.r9, outcome.registers.r10) == (OLD, NEW, OLD)


def test_every_tag_of_a_user_program_reaches_the_same_page(masking: Guest) -> None:
    """All 2**15 of them, one after the other: no translation is taken for another."""
    masking.memory.store(LOW_USER_PAGE, 8, 0)
    outcome = masking.execute(
        "next: inc qword [rbx]; add rbx, r15; dec ecx; jne next; mov rax, [rdx]",
        cpl=3, rbx=LOW_USER, rdx=LOW_USER, r15=1 << 48, rcx=1 << 15,
    )  # fmt: skip
    assert outcome.completed, str(outcome)
    assert outcome.registers.rax == 1 << 15


# ------------------------------------------------------------------------------------------------ code and data


def test_code_rewritten_through_tagged_pointers(masking: Guest) -> None:
    masking.write(LOW_USER, RETURN_1)
    outcome = masking.execute(
        "xor r8, r8; again: mov [rbx + 1], ecx; call rdx; add r8, rax; mov [rsi + 1], edi; call rdx; add r8, rax;"
        "dec ecx; jne again",
        cpl=3, rbx=tagged(LOW_USER), rsi=tagged(LOW_USER, OTHER_TAG), rdx=LOW_USER, rcx=20, rdi=1000,
    )  # fmt: skip
    assert outcome.completed, str(outcome)
    assert outcome.registers.r8 == 210 + 20 * 1000


@pytest.mark.parametrize("first", ["mov al, [rbx]", "mov al, [rbx]; mov [rbx - 8], al", "nop"])
def test_instruction_rewritten_by_the_one_before_it_through_a_tagged_pointer(
    masking: Guest, first: str
) -> None:
    source = f"{first}; mov byte [rbx + 1], 7; changed: mov eax, 1; int 0x80"
    changed = assemble(source, LOW_USER).labels["changed"]
    masking.write(LOW_USER, assemble(source, LOW_USER).code)
    outcome = masking.execute("jmp rdx", cpl=3, rdx=LOW_USER, rbx=tagged(changed))
    assert outcome.completed, str(outcome)
    assert outcome.registers.rax == 7


@pytest.mark.parametrize("cpl", [0, 3])
def test_code_cannot_be_fetched_by_a_tagged_address_that_data_was_read_by(masking: Guest, cpl: int) -> None:
    page = LOW_USER if cpl else HIGH_SUPERVISOR
    masking.write(page, RETURN_1)
    outcome = masking.execute(
        "mov rax, [rbx]; call rcx; mov rax, [rbx]; fault: jmp rbx", cpl=cpl, rbx=tagged(page), rcx=page
    )
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "fault")


def test_an_address_is_code_of_one_page_and_data_of_another(masking57: Guest) -> None:
    """With 5-level paging and LAM_U48; read, written and executed in turn."""
    place = ALIAS | LOW_USER
    source = "next: inc qword [rbx]; jmp on; db 1, 2, 3, 4, 5, 6, 7, 8; on: add r8, [rbx]; dec ecx; jne next; int 0x80"
    program = assemble(source, place)
    masking57.tables.map(place, layout.SPARE_GPA, PTE_U)
    masking57.write(place, program.code)
    masking57.memory.store(LOW_USER_PAGE, 8, 0)
    outcome = masking57.execute("jmp rbx", cpl=3, rbx=place, rcx=10)
    assert outcome.completed, str(outcome)
    assert outcome.registers.r8 == 55
    assert masking57.memory.read(layout.SPARE_GPA, len(program.code)) == program.code
    assert masking57.memory.load(LOW_USER_PAGE, 8) == 10


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("rflags", [0, RFLAGS_AC])
def test_an_ldt_is_not_masked_where_data_at_its_address_is(masking57: Guest, cpl: int, rflags: int) -> None:
    """An LDT below the split, at an address that LAM_U48 makes another one of: there lies another descriptor."""
    guest = masking57
    guest.cr4 &= ~CR4_LASS
    place = ALIAS | LOW_ABSENT
    descriptor = make_segment(OTHER_BASE, MASK32, AR_DATA | 3 << AR_DPL_SHIFT)
    guest.tables.map(place, layout.LDT_GPA)
    guest.tables.map(LOW_ABSENT, LOW_USER_PAGE, PTE_U if cpl or rflags else 0)
    guest.memory.store(LOW_USER_PAGE + (LDT_DATA & ~7), 8, descriptor)
    guest.sregs["ldt"] = Segment(layout.LDT_SELECTOR, place, layout.LDT_BYTES - 1, AR_LDT)
    outcome = guest.execute(
        "mov r8, [rbx]; mov fs, eax; mov r9, [rbx]; mov gs, eax; mov r10, [rbx]",
        cpl=cpl, rflags=rflags, rax=LDT_DATA, rbx=place + (LDT_DATA & ~7),
    )  # fmt: skip
    assert outcome.completed, str(outcome)
    assert {outcome.registers.r8, outcome.registers.r9, outcome.registers.r10} == {descriptor}
    sregs = guest.vcpu.get_sregs()
    assert (sregs.fs.selector, sregs.fs.base, sregs.gs.selector, sregs.gs.base) == (LDT_DATA, 0, LDT_DATA, 0)


# ------------------------------------------------------------------------------------------------ faults and traps


def test_a_page_fault_handler_sees_no_metadata_and_the_instruction_restarts(masking: Guest) -> None:
    masking.tables.map(LOW_ABSENT, LOW_USER_PAGE, PTE_U)
    entry = masking.tables.entry(LOW_ABSENT)
    masking.tables.unmap(LOW_ABSENT)
    masking.memory.store(LOW_USER_PAGE, 8, OLD)
    rdi, _ = remapping(masking, LOW_ABSENT, 0)
    masking.place(assemble("pop r13; mov r12, cr2; mov [rdi], rsi; iretq", HANDLER))
    layout.set_gate(masking.memory, PF, HANDLER, ist=layout.IST)
    outcome = masking.execute(
        "add [rbx], rcx; mov rax, [rbx]", cpl=3, rbx=tagged(LOW_ABSENT), rcx=1, rdi=rdi, rsi=entry
    )
    assert outcome.completed, str(outcome)
    assert outcome.registers.rax == OLD + 1
    assert (outcome.registers.r12, outcome.registers.r13) == (LOW_ABSENT, PF_U | PF_W)


def test_an_event_is_delivered_on_a_tagged_kernel_stack(masking: Guest) -> None:
    """The frame is data of the stack pointer's, which keeps its metadata."""
    layout.set_gate(masking.memory, 3, HANDLER)
    masking.place(assemble("mov r8, rsp; iretq", HANDLER))
    top = tagged(HIGH_SUPERVISOR + 0x800)
    outcome = masking.execute("int3; mov r9, rsp", rsp=top)
    assert outcome.completed, str(outcome)
    assert (outcome.registers.r8, outcome.registers.r9) == (top - 40, top)
    assert masking.read(HIGH_SUPERVISOR + 0x800 - 16) == top


def test_a_page_fault_on_a_tagged_stack_during_delivery_reports_no_metadata(masking: Guest) -> None:
    layout.set_gate(masking.memory, 3, HANDLER)
    outcome = masking.execute("fault: int3", rsp=tagged(HIGH_ABSENT + 0x800))
    assert (outcome.vector, outcome.label, outcome.cr2) == (PF, "fault", HIGH_ABSENT + 0x800 - 8)


@pytest.mark.parametrize("watched", [LOW_USER, LOW_USER + 7])
@pytest.mark.parametrize("source", ["mov rax, [rbx]", "mov [rbx], rax", "push qword [rbx]"])
def test_data_breakpoints_are_compared_with_masked_addresses(
    masking: Guest, source: str, watched: int
) -> None:
    arm = f"mov rax, {watched & ~7:#x}; mov dr0, rax; mov eax, {WATCH_0:#x}; mov dr7, rax"
    outcome = masking.execute(f"{arm}; {source}; after: nop", rbx=tagged(LOW_USER), rflags=RFLAGS_AC)
    assert (outcome.vector, outcome.label) == (DB, "after")
    assert masking.vcpu.state.words[DR6] & 0xF == DR6_B0


def test_a_data_breakpoint_at_a_tagged_address_is_never_met(masking: Guest) -> None:
    arm = f"mov rax, {tagged(LOW_USER):#x}; mov dr0, rax; mov eax, {WATCH_0:#x}; mov dr7, rax"
    assert masking.execute(f"{arm}; mov rax, [rbx]", rbx=tagged(LOW_USER), rflags=RFLAGS_AC).completed


# ------------------------------------------------------------------------------------------- devices and the VMM


def test_a_device_is_reached_by_tagged_pointers(masking: Guest) -> None:
    masking.tables.map(LOW_USER, HOLE, PTE_U)
    masking.start("mov eax, [rbx + 0x10]", cpl=3, rbx=tagged(LOW_USER))
    access = masking.vcpu.run()
    assert isinstance(access, MmioExit)
    assert (access.gpa, access.size, access.write) == (HOLE + 0x10, 4, False)
    access.data = NEW
    outcome = masking.run()
    assert outcome.completed
    assert outcome.registers.rax == NEW


def test_stores_by_tagged_pointers_are_in_the_dirty_log(masking: Guest) -> None:
    memory = next(iter(masking.memory)).buffer
    masking.vm.set_user_memory_region(0, 0, memory, SLOT_LOG_DIRTY_PAGES)
    try:
        masking.vm.get_dirty_log(0)
        source = "mov rax, [rbx]; mov [rbx], rax"
        assert masking.execute(source, cpl=3, rbx=tagged(LOW_USER)).completed
        dirty = int.from_bytes(masking.vm.get_dirty_log(0), "little")
    finally:
        masking.vm.set_user_memory_region(0, 0, memory)
    assert dirty >> LOW_USER_PAGE // PAGE_SIZE & 1


def test_kvm_set_sregs_takes_lam_bits_from_guests_that_have_lam_only(masking: Guest) -> None:
    sregs = masking.vcpu.get_sregs()
    for bits in (CR3_LAM_U48, CR3_LAM_U57, CR3_LAM_U48 | CR3_LAM_U57):
        sregs.cr3 = masking.tables.root | bits
        masking.vcpu.set_sregs(sregs)
        assert masking.vcpu.get_sregs().cr3 == sregs.cr3
    sregs.cr3 |= 1 << 60
    with pytest.raises(OSError, match="beyond the physical address width"):
        masking.vcpu.set_sregs(sregs)


# ------------------------------------------------------------------------------------------------- compiled form


def test_masking_compiled_and_as_it_is(rng: random.Random) -> None:
    for _ in range(ROUNDS * 10):
        arguments = (
            random_address(rng), random_flags(rng), rng.getrandbits(3) << 60, rng.getrandbits(32),
        )  # fmt: skip
        assert native(untag, *arguments) == untag(*arguments), [hex(argument) for argument in arguments]


def test_linear_accesses_with_lam_compiled_and_as_they_are(rng: random.Random) -> None:
    twins = Twins(rng, tables(rng))
    for _ in range(ROUNDS):
        mode = random_mode(rng)
        mode[CR3] |= rng.choice((0, CR3_LAM_U48, CR3_LAM_U57))
        mode[CR4] |= rng.choice((0, CR4_LAM_SUP))
        twins.set_words(mode)
        address = random_address(rng) ^ rng.choice((0, TAG, rng.getrandbits(6) << 57))
        arguments = (
            address,
            rng.choice((1, 4, 8)),
            random_flags(rng),
            rng.randrange(4),
            rng.choice((0, RFLAGS_AC)),
        )
        plain = mmu.locate(twins.states[0].words, twins.memories[0], *arguments)
        assert native(mmu.locate, twins.states[1].array, twins.table, *arguments) == plain_result(plain), (
            arguments
        )
    twins.assert_same_memory()
    twins.assert_same_state()


def test_the_fixtures_have_what_the_tests_are_about(masking57: Guest) -> None:
    assert masking57.cr4 & CR4_LA57
    assert masking57.sregs["cr3"] == masking57.tables.root | CR3_LAM_U48
