"""A VM with an EPC, on both engines: ENCLS end to end, the EPC on the bus, resets, snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest
import signing
from signing import PAGE, REG_RW, SIGNER, Page, Signing

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest, Outcome
from lasskvm.conformance.layout import HIGH_SUPERVISOR, LOW_SUPERVISOR, LOW_USER, SPARE_GPA, UPPER
from lasskvm.errors import LassKvmError, MemoryLayoutError, SnapshotError
from lasskvm.kvm import ExecutionEngine, ShutdownExit, Vm
from lasskvm.kvm.snapshot_state import restore_vm
from lasskvm.sgx.enumeration import with_epc
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.exceptions import DB, GP, PF, PF_P, UD
from lasskvm.x86.msr import MSR_IA32_FEATURE_CONTROL, MSR_IA32_SGXLEPUBKEYHASH0
from lasskvm.x86.registers import CR4_LASS, MASK64, RFLAGS_AC, RFLAGS_ZF
from lasskvm.x86.sgx import EnclsLeaf, PageType

ENGINES: tuple[ExecutionEngine, ...] = ("jit", "emulator")
CPU = "max,+sgx"
EPC_GPA, EPC_PAGES = 0x1_0000_0000, 16
#: Where the EPC is mapped for the kernel.
EPC = UPPER + 0x4080_0000
LOCKED_AND_ENABLED = 1 << 18 | 1 << 0
BASE, SIZE = 0x7000_0000_0000, 0x10_0000
SOURCE, SECINFO, SIGSTRUCT, TOKEN = (UPPER + SPARE_GPA + PAGE * number for number in range(4))
TEXT = Page(0x1000, REG_RW, bytes(range(256)) * 16)


def give_epc(guest: Guest) -> None:
    """An EPC, which is mapped for the kernel and enabled by firmware."""
    epc = guest.vm.create_epc(EPC_GPA, EPC_PAGES * PAGE)
    guest.vcpu.set_cpuid2(with_epc(parse_cpu(CPU).entries(), epc))
    guest.tables.map(EPC, EPC_GPA, pages=EPC_PAGES)
    guest.msrs[MSR_IA32_FEATURE_CONTROL] = LOCKED_AND_ENABLED


@pytest.fixture(params=ENGINES)
def guest(request: pytest.FixtureRequest) -> Guest:
    """A kernel with LASS, SMAP and SMEP on, and an EPC."""
    made = Guest(CPU, engine=request.param)
    give_epc(made)
    return made


def encls(guest: Guest, leaf: int, rbx: int = 0, rcx: int = 0, rdx: int = 0, **more: int) -> Outcome:
    return guest.execute("access: encls", rax=leaf, rbx=rbx, rcx=rcx, rdx=rdx, **more)


def done(guest: Guest, leaf: int, rbx: int = 0, rcx: int = 0, rdx: int = 0) -> Outcome:
    outcome = encls(guest, leaf, rbx, rcx, rdx)
    assert outcome.completed, f"{leaf!r}: {outcome}"
    assert not outcome.rflags & RFLAGS_ZF, f"{leaf!r}: error {outcome.registers.rax}"
    return outcome


def put_create(guest: Guest, pageinfo: int) -> None:
    """The operands of ECREATE, with the PAGEINFO at *pageinfo*."""
    guest.write(SOURCE, signing.secs_page(SIZE, BASE))
    guest.write(SECINFO, signing.secinfo(0))
    guest.write(pageinfo, signing.pageinfo(0, SOURCE, SECINFO, 0))


def build(guest: Guest) -> None:
    """ECREATE, EADD and EEXTEND of one page, from the kernel's half."""
    put_create(guest, HIGH_SUPERVISOR)
    done(guest, EnclsLeaf.ECREATE, HIGH_SUPERVISOR, EPC)
    guest.write(SOURCE, TEXT.content)
    guest.write(SECINFO, signing.secinfo(TEXT.flags))
    guest.write(HIGH_SUPERVISOR, signing.pageinfo(BASE + TEXT.offset, SOURCE, SECINFO, EPC))
    done(guest, EnclsLeaf.EADD, HIGH_SUPERVISOR, EPC + PAGE)
    for start in range(0, PAGE, signing.CHUNK):
        done(guest, EnclsLeaf.EEXTEND, EPC, EPC + PAGE + start)


def initialize(guest: Guest) -> Outcome:
    """EINIT, with what its developer has signed."""
    guest.write(SIGSTRUCT, Signing(signing.mrenclave(SIZE, 1, [TEXT]), SIGNER).sigstruct())
    guest.write(TOKEN, signing.NO_TOKEN)
    for number in range(4):
        part = SIGNER.mrsigner[8 * number : 8 * number + 8]
        guest.msrs[MSR_IA32_SGXLEPUBKEYHASH0 + number] = int.from_bytes(part, "little")
    return encls(guest, EnclsLeaf.EINIT, SIGSTRUCT, EPC, TOKEN)


# ----------------------------------------------------------------------------------------------------- LASS end to end


@pytest.mark.parametrize("pageinfo", [LOW_USER, LOW_SUPERVISOR])
def test_a_pageinfo_in_the_users_half_is_gp_with_lass_and_ac_0_and_works_with_ac_1(
    guest: Guest, pageinfo: int
) -> None:
    put_create(guest, pageinfo)
    outcome = encls(guest, EnclsLeaf.ECREATE, pageinfo, EPC)
    assert (outcome.vector, outcome.error_code, outcome.label) == (GP, 0, "access")
    assert guest.accessed_and_dirty(pageinfo) == (False, False)
    assert guest.vm.epc is not None
    assert guest.vm.epc.free_pages == EPC_PAGES
    assert encls(guest, EnclsLeaf.ECREATE, pageinfo, EPC, rflags=RFLAGS_AC).completed
    assert guest.vm.epc.free_pages == EPC_PAGES - 1


def test_without_lass_a_pageinfo_in_a_user_page_is_smaps_page_fault(guest: Guest) -> None:
    put_create(guest, LOW_USER)
    guest.cr4 &= ~CR4_LASS
    outcome = encls(guest, EnclsLeaf.ECREATE, LOW_USER, EPC)
    assert (outcome.vector, outcome.error_code, outcome.cr2) == (PF, PF_P, LOW_USER)


def test_a_kernel_builds_and_initializes_an_enclave_with_lass_on(guest: Guest) -> None:
    build(guest)
    outcome = initialize(guest)
    assert outcome.completed
    assert outcome.registers.rax == 0
    assert guest.vm.epc is not None
    secs = guest.vm.epc.secs(EPC_GPA)
    assert secs.is_initialized
    assert secs.mrenclave == signing.mrenclave(SIZE, 1, [TEXT])


# -------------------------------------------------------------------------------------------------- the EPC on the bus


def test_loads_from_the_epc_give_all_ones_and_stores_are_dropped(guest: Guest) -> None:
    build(guest)
    outcome = guest.execute(
        "mov [rbx], rcx; mov rax, [rbx]; mov dl, [rbx + 5]; lock inc qword [rbx]", rbx=EPC + PAGE
    )
    assert outcome.completed
    assert (outcome.registers.rax, outcome.registers.rdx & 0xFF) == (MASK64, 0xFF)
    assert guest.vm.epc is not None
    assert guest.vm.epc.read(EPC_GPA + PAGE) == TEXT.content


def test_a_fetch_from_the_epc_is_an_undefined_instruction(guest: Guest) -> None:
    build(guest)
    outcome = guest.execute("jmp rbx", rbx=EPC + PAGE)
    assert (outcome.vector, outcome.rip) == (UD, EPC + PAGE)


def test_an_instruction_that_runs_on_into_the_epc_is_undefined_and_those_before_it_are_executed(
    guest: Guest,
) -> None:
    """INC EAX, and then FFH as the last byte before the EPC, where nothing but all ones follows."""
    page = EPC - PAGE
    guest.tables.map(page, layout.DATA_GPA)
    guest.write(EPC - 3, bytes.fromhex("ffc0 ff"))
    outcome = guest.execute("jmp rbx", rbx=EPC - 3, rax=41)
    assert (outcome.vector, outcome.rip, outcome.registers.rax) == (UD, EPC - 1, 42)


def test_a_user_program_that_jumps_into_the_epc_gets_undefined_opcode(guest: Guest) -> None:
    guest.tables.map(LOW_USER, EPC_GPA, layout.USER_PAGE)
    outcome = guest.execute("jmp rbx", cpl=3, rbx=LOW_USER)
    assert (outcome.vector, outcome.rip) == (UD, LOW_USER)


def test_a_stepped_jump_into_the_epc_is_undefined_behind_its_trap(guest: Guest) -> None:
    guest.tables.map(LOW_USER, EPC_GPA, layout.USER_PAGE)
    outcome = guest.execute("jmp rbx", cpl=3, rbx=LOW_USER, rflags=1 << 8)
    assert (outcome.vector, outcome.rip) == (DB, LOW_USER)


def test_page_tables_in_the_epc_translate_nothing_and_break_nothing(guest: Guest) -> None:
    """All ones: an entry with reserved bits."""
    guest.sregs["cr3"] = EPC_GPA
    outcome = guest.execute("nop")
    assert isinstance(outcome.exit, ShutdownExit)


# ------------------------------------------------------------------------------------------------- how it gets its EPC


def test_without_an_epc_encls_is_undefined_whatever_cpuid_says() -> None:
    guest = Guest(CPU, engine="emulator")
    guest.msrs[MSR_IA32_FEATURE_CONTROL] = LOCKED_AND_ENABLED
    assert encls(guest, EnclsLeaf.EPA, PageType.VA, HIGH_SUPERVISOR).vector == UD


def test_an_epc_that_comes_behind_the_vcpu_is_there_at_once_and_stays_when_cpuid_changes() -> None:
    guest = Guest(CPU, engine="emulator")
    give_epc(guest)
    done(guest, EnclsLeaf.EPA, PageType.VA, EPC)
    fresh = Vm("emulator")
    fresh.create_epc(EPC_GPA, PAGE)
    vcpu = fresh.create_vcpu()
    vcpu.set_cpuid2(parse_cpu(CPU).entries())
    assert vcpu.emulation.sgx is fresh.sgx is not None


def test_cpuid_tells_where_the_epc_is(guest: Guest) -> None:
    outcome = guest.execute("cpuid", rax=0x12, rcx=2)
    found = outcome.registers
    assert (found.rax, found.rbx, found.rcx, found.rdx) == (1, 1, EPC_PAGES * PAGE | 1, 0)
    table = CpuidTable(guest.vcpu.get_cpuid2())
    assert table.has("sgx")
    assert table.has("sgx1")


@pytest.mark.parametrize(
    "base, size, said",
    [
        (0x1000, PAGE, "overlaps memory slot 0"),
        (0, 0x20_0000, "overlaps memory slot 0"),
        (EPC_GPA + 1, PAGE, "multiple of 4 KiB"),
        (EPC_GPA, PAGE - 1, "multiple of 4 KiB"),
        (EPC_GPA, 0, "multiple of 4 KiB"),
        (1 << 51, 1 << 51, "the host cannot give"),
        (1 << 52, PAGE, "below 4 PiB"),
    ],
)
def test_an_epc_that_cannot_be_is_refused_with_a_sentence(base: int, size: int, said: str) -> None:
    vm = Vm("emulator")
    vm.set_user_memory_region(0, 0, vm.allocate(0x10_0000))
    with pytest.raises(MemoryLayoutError, match=said):
        vm.create_epc(base, size)
    assert vm.epc is None
    assert vm.mmio.read(EPC_GPA, 8) is None


def test_an_epc_and_memory_or_devices_do_not_overlap() -> None:
    vm = Vm("emulator")
    vm.create_irqchip()
    with pytest.raises(LassKvmError, match="overlaps"):
        vm.create_epc(0xFEC0_0000, PAGE)
    vm.create_epc(EPC_GPA, PAGE)
    with pytest.raises(LassKvmError, match="has its EPC already"):
        vm.create_epc(EPC_GPA + PAGE, PAGE)
    with pytest.raises(MemoryLayoutError, match="overlaps the EPC"):
        vm.set_user_memory_region(0, EPC_GPA - PAGE, vm.allocate(2 * PAGE))
    vm.set_user_memory_region(0, EPC_GPA - PAGE, vm.allocate(PAGE))


# ------------------------------------------------------------------------------------------------------------ snapshots


def loaded_twin(guest: Guest, path: Path) -> Guest:
    """A guest like *guest*, on what its VM has saved."""
    guest.vm.save(path)
    twin = Guest(CPU, engine=guest.vm.engine)
    twin.vm = Vm.load(path)
    assert twin.vm.vcpu is not None
    twin.memory, twin.vcpu = twin.vm.memory, twin.vm.vcpu
    twin.tables = layout.PageTables(twin.memory)
    twin.msrs = dict(guest.msrs)
    return twin


def test_an_enclave_is_finished_behind_a_snapshot(guest: Guest, tmp_path: Path) -> None:
    build(guest)
    twin = loaded_twin(guest, tmp_path / "vm")
    assert guest.vm.epc is not None
    assert twin.vm.epc is not None
    assert bytes(twin.vm.epc.view) == bytes(guest.vm.epc.view)
    assert twin.vm.epc.get_state() == guest.vm.epc.get_state()
    assert initialize(twin).registers.rax == 0
    assert twin.vm.epc.secs(EPC_GPA).is_initialized
    assert not guest.vm.epc.secs(EPC_GPA).is_initialized


def test_a_page_that_was_sealed_before_a_snapshot_comes_back_behind_it(tmp_path: Path) -> None:
    """The secret goes along; another VM's is another one."""
    guest = Guest(CPU, engine="emulator")
    epc = guest.vm.create_epc(EPC_GPA, EPC_PAGES * PAGE, secret=b"of this VM alone")
    guest.vcpu.set_cpuid2(with_epc(parse_cpu(CPU).entries(), epc))
    guest.tables.map(EPC, EPC_GPA, pages=EPC_PAGES)
    guest.msrs[MSR_IA32_FEATURE_CONTROL] = LOCKED_AND_ENABLED
    build(guest)
    slot = EPC + 2 * PAGE
    done(guest, EnclsLeaf.EPA, PageType.VA, slot)
    done(guest, EnclsLeaf.EBLOCK, rcx=EPC + PAGE)
    done(guest, EnclsLeaf.ETRACK, rcx=EPC)
    guest.write(HIGH_SUPERVISOR, signing.pageinfo(0, SOURCE, SECINFO, 0))
    done(guest, EnclsLeaf.EWB, HIGH_SUPERVISOR, EPC + PAGE, slot)
    twin = loaded_twin(guest, tmp_path / "vm")
    twin.write(HIGH_SUPERVISOR, signing.pageinfo(BASE + TEXT.offset, SOURCE, SECINFO, EPC))
    done(twin, EnclsLeaf.ELDU, HIGH_SUPERVISOR, EPC + 3 * PAGE, slot)
    assert twin.vm.epc is not None
    assert twin.vm.epc.read(EPC_GPA + 3 * PAGE) == TEXT.content


def test_what_the_epc_holds_is_saved_as_memory_is(tmp_path: Path) -> None:
    """Free pages take no room, and no page is in the document."""
    vm = Vm("emulator")
    vm.create_epc(EPC_GPA, 64 << 20)
    vm.create_vcpu()
    vm.save(tmp_path / "vm")
    assert (tmp_path / "vm").stat().st_size < 2 * PAGE
    loaded = Vm.load(tmp_path / "vm")
    assert loaded.epc is not None
    assert (loaded.epc.base, loaded.epc.size, loaded.epc.free_pages) == (
        EPC_GPA,
        64 << 20,
        (64 << 20) // PAGE,
    )


def test_a_snapshot_with_an_epc_is_not_restored_into_a_vm_without() -> None:
    vm = Vm("emulator")
    vm.create_vcpu()
    with pytest.raises(SnapshotError, match="other memory or devices"):
        restore_vm(vm, {"slots": [], "irqchip": None, "pit": None, "sgx": {"epc": {}}})


def test_a_reset_of_the_vcpu_leaves_the_epc_alone_and_one_of_the_machine_empties_it(guest: Guest) -> None:
    build(guest)
    assert guest.vm.epc is not None
    guest.vcpu.reset()
    assert guest.vm.epc.free_pages == EPC_PAGES - 2
    guest.vm.epc.reset()
    assert guest.vm.epc.free_pages == EPC_PAGES
    assert bytes(guest.vm.epc.view) == bytes(EPC_PAGES * PAGE)
