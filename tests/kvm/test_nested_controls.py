"""Instructions of L2 that L1 asks about, by execution controls and bitmaps, also where direct execution has them."""

from __future__ import annotations

import pytest
from nested_machine import (
    ENGINES,
    IO_BITMAP_A,
    IO_BITMAP_B,
    L1_CODE,
    MSR_BITMAP,
    VIRTUAL_APIC,
    NestedMachine,
    nested_machine,
)

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.layout import LOW_SUPERVISOR, LOW_USER, UPPER
from lasskvm.kvm import HltExit, IoExit
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import GP, UD
from lasskvm.x86.msr import MSR_IA32_FS_BASE, MSR_IA32_SYSENTER_EIP, MSR_IA32_TSC
from lasskvm.x86.registers import CR0_TS, CR4_LASS, RFLAGS_IOPL
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

VTPR = VIRTUAL_APIC + 0x80
_WRITES = 0x800
#: Enough for direct execution to have translated what it runs.
OFTEN = "mov r8d, 300; again: dec r8d; jne again"


@pytest.fixture(params=ENGINES)
def machine(request: pytest.FixtureRequest) -> NestedMachine:
    return nested_machine(request.param).reset()


def primary(machine: NestedMachine, controls: int) -> None:
    machine.add({F.CPU_BASED_VM_EXEC_CONTROL: controls})


def without(machine: NestedMachine, controls: int) -> None:
    found = machine.read()[F.CPU_BASED_VM_EXEC_CONTROL]
    machine.write({F.CPU_BASED_VM_EXEC_CONTROL: found & ~controls})


# ------------------------------------------------------------------------------------------------ unconditional exits


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("cpuid", ExitReason.CPUID),
        ("vmcall", ExitReason.VMCALL),
        ("vmxoff", ExitReason.VMXOFF),
        ("vmlaunch", ExitReason.VMLAUNCH),
        ("vmresume", ExitReason.VMRESUME),
        ("vmread rax, rbx", ExitReason.VMREAD),
        ("vmwrite rax, rbx", ExitReason.VMWRITE),
        ("vmxon [rbx]", ExitReason.VMXON),
        ("vmclear [rbx]", ExitReason.VMCLEAR),
        ("vmptrld [rbx]", ExitReason.VMPTRLD),
        ("vmptrst [rbx]", ExitReason.VMPTRST),
        ("invept rax, xmmword [rbx]", ExitReason.INVEPT),
        ("invvpid rax, xmmword [rbx]", ExitReason.INVVPID),
        ("invd", ExitReason.INVD),
    ],
)
def test_an_instruction_that_always_exits_does_so_and_can_be_stepped_over(
    machine: NestedMachine, source: str, reason: ExitReason
) -> None:
    found = machine.launch(f"{OFTEN}; start: {source}; next: nop", rbx=LOW_USER)
    assert (found.reason, found.label) == (reason, "start")
    length = found.program.labels["next"] - found.program.labels["start"]
    assert found[F.VM_EXIT_INSTRUCTION_LEN] == length
    assert machine.enter(resume=True, fields={F.GUEST_RIP: found.rip + length}).completed


@pytest.mark.parametrize("source", ["vmcall", "vmxoff", "vmread rax, rbx", "invd"])
def test_privilege_comes_before_the_exit(machine: NestedMachine, source: str) -> None:
    found = machine.launch(source, cpl=3)
    if source == "vmcall":
        assert found.reason is ExitReason.VMCALL
    elif source == "invd":
        assert found.vector == GP
    else:
        # VM exits come before the privilege check of VMX instructions.
        assert found.reason in (ExitReason.VMXOFF, ExitReason.VMREAD)


# ------------------------------------------------------------------------------------------------------ port I/O, MSRs


@pytest.mark.parametrize(
    ("source", "port", "qualification"),
    [
        ("in al, 0x71", 0x71, 0x71 << 16 | 0x40 | 8),
        ("out dx, ax", 0x3F8, 0x3F8 << 16 | 1),
        ("in eax, dx", 0x8005, 0x8005 << 16 | 8 | 3),
    ],
)
def test_a_port_of_the_bitmaps_exits_and_its_neighbours_do_not(
    machine: NestedMachine, source: str, port: int, qualification: int
) -> None:
    bitmap, number = (IO_BITMAP_B, port - 0x8000) if port >= 0x8000 else (IO_BITMAP_A, port)
    machine.memory.store(bitmap + number // 8, 1, 1 << number % 8)
    found = machine.launch(f"{OFTEN}; start: {source}", rdx=port)
    assert (found.reason, found.label) == (ExitReason.IO_INSTRUCTION, "start")
    assert found[F.EXIT_QUALIFICATION] == qualification
    machine.memory.store(bitmap + number // 8, 1, 0xFF & ~(1 << number % 8))
    machine.begin(resume=True, rdx=port, fields={F.GUEST_RIP: found.rip})
    if source == "in al, 0x71":
        access = machine.vcpu.run()
        assert isinstance(access, IoExit)
        assert access.port == port


def test_an_access_to_several_ports_exits_for_any_of_them(machine: NestedMachine) -> None:
    machine.memory.store(IO_BITMAP_A + 0x60 // 8, 1, 1 << 3)
    assert machine.launch("in eax, dx", rdx=0x60).reason is ExitReason.IO_INSTRUCTION


def test_unconditional_io_exiting_needs_no_bitmap_and_iopl_comes_first(machine: NestedMachine) -> None:
    without(machine, vmx.CPU_BASED_USE_IO_BITMAPS)
    primary(machine, vmx.CPU_BASED_UNCOND_IO_EXITING)
    machine.guest.memory.write(0x4068, b"\xff" * 16)
    found = machine.launch("in al, 0x71", cpl=3)
    assert found.vector == GP
    machine.place("start: in al, 0x71", cpl=3, rflags=RFLAGS_IOPL)
    found = machine.enter(resume=True)
    assert (found.reason, found.label) == (ExitReason.IO_INSTRUCTION, "start")


@pytest.mark.parametrize("write", [False, True])
def test_the_msr_bitmap_chooses_registers_and_directions(machine: NestedMachine, write: bool) -> None:
    index, other = MSR_IA32_FS_BASE, MSR_IA32_SYSENTER_EIP
    place = MSR_BITMAP + 0x400 + _WRITES * write + (index & 0x1FFF) // 8
    machine.memory.store(place, 1, 1 << index % 8)
    found = machine.launch(
        f"{OFTEN}; mov ecx, {other:#x}; rdmsr; wrmsr; mov ecx, {index:#x}; read: rdmsr; write: wrmsr"
    )
    reason = ExitReason.MSR_WRITE if write else ExitReason.MSR_READ
    assert (found.reason, found.label) == (reason, "write" if write else "read")


def test_without_msr_bitmaps_all_registers_exit_before_gp_and_behind_privilege(
    machine: NestedMachine,
) -> None:
    without(machine, vmx.CPU_BASED_USE_MSR_BITMAPS)
    found = machine.launch("start: rdmsr", rcx=0x1234_5678)
    assert (found.reason, found.label) == (ExitReason.MSR_READ, "start")
    machine.place("rdmsr", cpl=3)
    assert machine.enter(resume=True, rcx=0x1234_5678).vector == GP


# ----------------------------------------------------------------------------------------------------- the time stamp


def test_rdtsc_exiting_takes_rdtsc_and_rdtscp(machine: NestedMachine) -> None:
    primary(machine, vmx.CPU_BASED_RDTSC_EXITING)
    machine.add({F.SECONDARY_VM_EXEC_CONTROL: vmx.SECONDARY_EXEC_ENABLE_RDTSCP})
    found = machine.launch(f"{OFTEN}; start: rdtsc; next: rdtscp")
    assert (found.reason, found.label) == (ExitReason.RDTSC, "start")
    found = machine.enter(resume=True, fields={F.GUEST_RIP: found.rip + 2})
    assert (found.reason, found.label) == (ExitReason.RDTSCP, "next")


def test_l2_reads_the_time_stamp_counter_with_its_offset(machine: NestedMachine) -> None:
    offset = 1 << 50
    primary(machine, vmx.CPU_BASED_USE_TSC_OFFSETTING)
    machine.add({F.SECONDARY_VM_EXEC_CONTROL: vmx.SECONDARY_EXEC_ENABLE_RDTSCP})
    machine.write({F.TSC_OFFSET: offset})
    read = "shl rdx, 32; or rax, rdx; mov"
    before = machine.vcpu.get_msr(MSR_IA32_TSC)
    found = machine.launch(
        f"{OFTEN}; rdtsc; {read} rsi, rax; rdtscp; {read} rdi, rax; mov ecx, {MSR_IA32_TSC:#x}; rdmsr; {read} rbx, rax"
    )
    assert found.completed
    regs, after = found.registers, machine.vcpu.get_msr(MSR_IA32_TSC)
    assert before < regs.rsi - offset <= regs.rdi - offset <= regs.rbx - offset <= after


def test_rdtscp_and_rdpid_are_undefined_in_l2_without_their_control(machine: NestedMachine) -> None:
    assert machine.launch(f"{OFTEN}; rdtscp").vector == UD
    machine.place(f"{OFTEN}; rdpid rax")
    assert machine.enter(resume=True).vector == UD
    # And are defined for L1 as before.
    machine.step("rdtscp; rdpid rax; hlt")


# --------------------------------------------------------------------------------------------------- other instructions


@pytest.mark.parametrize(
    ("control", "source", "reason"),
    [
        (vmx.CPU_BASED_PAUSE_EXITING, "pause", ExitReason.PAUSE_INSTRUCTION),
        (vmx.CPU_BASED_INVLPG_EXITING, "invlpg [rbx]", ExitReason.INVLPG),
        (vmx.CPU_BASED_MOV_DR_EXITING, "mov rax, dr3", ExitReason.DR_ACCESS),
        (vmx.CPU_BASED_MOV_DR_EXITING, "mov dr7, rax", ExitReason.DR_ACCESS),
        (vmx.CPU_BASED_CR3_LOAD_EXITING, "mov cr3, rax", ExitReason.CR_ACCESS),
        (vmx.CPU_BASED_CR3_STORE_EXITING, "mov rax, cr3", ExitReason.CR_ACCESS),
        (vmx.CPU_BASED_CR8_LOAD_EXITING, "mov cr8, rax", ExitReason.CR_ACCESS),
        (vmx.CPU_BASED_CR8_STORE_EXITING, "mov rax, cr8", ExitReason.CR_ACCESS),
        (vmx.CPU_BASED_RDPMC_EXITING, "rdpmc", ExitReason.RDPMC),
    ],
)
def test_a_control_decides_whether_an_instruction_exits(
    machine: NestedMachine, control: int, source: str, reason: ExitReason
) -> None:
    program = f"mov rax, cr3; {OFTEN}; {'' if 'cr3' in source else 'xor eax, eax;'} start: {source}"
    if control != vmx.CPU_BASED_RDPMC_EXITING:
        found = machine.launch(program, rbx=LOW_USER)
        assert found.completed, found.reason
    else:
        assert machine.launch(program).vector == GP
    primary(machine, control)
    machine.place(f"mov rax, [rbx]; start: {source}", fields={F.GUEST_RFLAGS: 2 | 1 << 18})
    found = machine.enter(resume=True, rbx=LOW_USER)
    assert (found.reason, found.label) == (reason, "start")


def test_l2_loads_cr3_by_itself_and_keeps_its_own_translations(machine: NestedMachine) -> None:
    cr3 = machine.guest.tables.root
    found = machine.launch("mov rax, cr3; mov cr3, rax; mov rax, cr3; mov rbx, rax")
    assert found.completed
    assert found.registers.rbx == found[F.GUEST_CR3] == cr3


@pytest.mark.parametrize(("value", "exits"), [(4, False), (5, False), (3, True)])
def test_cr8_below_the_threshold_exits_behind_the_instruction(
    machine: NestedMachine, value: int, exits: bool
) -> None:
    primary(machine, vmx.CPU_BASED_TPR_SHADOW)
    machine.memory.store(VTPR, 4, 0x70)
    machine.write({F.TPR_THRESHOLD: 4})
    found = machine.launch(
        "mov rbx, cr8; mov cr8, rax; next: mov rcx, cr8; mov edx, 9; again: dec edx; jne again", rax=value
    )
    assert found.registers.rbx == 7
    assert machine.memory.load(VTPR, 4) == value << 4
    if exits:
        assert (found.reason, found.label) == (ExitReason.TPR_BELOW_THRESHOLD, "next")
    else:
        assert found.completed
        assert found.registers.rcx == value
    # The processor's own CR8 is L1's.
    assert machine.vcpu.get_sregs().cr8 == 0


def test_masks_and_shadows_hide_lass_from_l2_and_its_writes_exit(machine: NestedMachine) -> None:
    machine.write({F.CR4_GUEST_HOST_MASK: CR4_LASS, F.CR4_READ_SHADOW: 0})
    cr4 = machine.read()[F.GUEST_CR4]
    assert cr4 & CR4_LASS
    found = machine.launch(
        f"mov rbx, cr4; mov rax, rbx; mov cr4, rax; mov rcx, cr4; or rax, {CR4_LASS:#x}; start: mov cr4, rax"
    )
    assert (found.reason, found.label) == (ExitReason.CR_ACCESS, "start")
    assert found.registers.rbx == found.registers.rcx == cr4 & ~CR4_LASS
    assert found[F.GUEST_CR4] == cr4
    # LASS is on all the same.
    machine.place("mov rax, [rbx]")
    assert machine.enter(resume=True, rbx=LOW_USER).vector == GP


def test_a_bit_of_cr0_that_l1_owns_exits_by_clts_and_mov_only_when_it_differs(machine: NestedMachine) -> None:
    machine.write({F.CR0_GUEST_HOST_MASK: CR0_TS, F.CR0_READ_SHADOW: CR0_TS})
    found = machine.launch("mov rax, cr0; mov rbx, rax; mov cr0, rax; start: clts")
    assert (found.reason, found.label) == (ExitReason.CR_ACCESS, "start")
    assert found.registers.rbx & CR0_TS
    assert not found[F.GUEST_CR0] & CR0_TS


@pytest.mark.parametrize("lass", [False, True])
def test_l2s_own_cr4_decides_about_l2s_accesses_and_l1s_about_l1s(machine: NestedMachine, lass: bool) -> None:
    # SMAP, without which data is free of LASS, does not mind a supervisor's page.
    with_lass = machine.read()[F.GUEST_CR4]
    without_lass = with_lass & ~CR4_LASS
    guest, host = (with_lass, without_lass) if lass else (without_lass, with_lass)
    machine.write({F.GUEST_CR4: guest, F.HOST_CR4: host})
    found = machine.launch("mov rax, [rbx]", rbx=LOW_SUPERVISOR)
    assert found.vector == GP if lass else found.completed
    assert machine.vcpu.get_sregs().cr4 == host
    layout.set_gate(machine.memory, GP, machine_handler := UPPER + L1_CODE + 0x800)
    machine.memory.write(L1_CODE + 0x800, bytes.fromhex("bb 99000000 f4"))  # mov ebx, 0x99; hlt
    program = assemble("mov rax, [rbx]; hlt", UPPER + L1_CODE)
    machine.memory.write(L1_CODE, program.code)
    machine.begin_at(program.address, rbx=LOW_SUPERVISOR)
    assert isinstance(machine.run(), HltExit)
    assert (machine.vcpu.get_regs().rip > machine_handler) != lass
