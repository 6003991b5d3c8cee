"""The state of nested virtualization as data: the ioctls, and snapshots taken in the middle of L2."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from nested_machine import (
    CALL,
    ENGINES,
    L1_CODE,
    L1_HANDLER,
    VMCS,
    VMXON_REGION,
    NestedMachine,
    nested_machine,
)

from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, LOW_USER, UPPER
from lasskvm.errors import SnapshotError
from lasskvm.kvm import (
    ExecutionEngine,
    Exit,
    GuestDebug,
    HltExit,
    IntrExit,
    IoExit,
    Regs,
    ShutdownExit,
    System,
    Vcpu,
    Vm,
)
from lasskvm.kvm.snapshot import open_snapshot, write_snapshot
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.exceptions import GP
from lasskvm.x86.registers import RFLAGS_IF
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

KVM_CAP_NESTED_STATE = 157
GUEST_MODE, RUN_PENDING, MTF_PENDING = 1, 2, 8
HEADER = struct.Struct("<HHIQQHHIQ")
HEADER_BYTES, PAGE = 128, 4096
NO_POINTER = (1 << 64) - 1
COUNTING = "again: inc rcx; jmp again"


@pytest.fixture(params=ENGINES)
def machine(request: pytest.FixtureRequest) -> NestedMachine:
    return nested_machine(request.param).reset()


@pytest.fixture
def emulated() -> NestedMachine:
    return nested_machine("emulator").reset()


def header(
    flags: int = 0,
    *,
    format_: int = 0,
    size: int | None = None,
    vmxon: int = VMXON_REGION,
    vmcs: int = VMCS,
    smm: int = 0,
    timer: int | None = None,
    page: bytes = b"",
) -> bytes:
    size = HEADER_BYTES + len(page) if size is None else size
    words = HEADER.pack(flags, format_, size, vmxon, vmcs, smm, 0, 0 if timer is None else 1, timer or 0)
    return words.ljust(HEADER_BYTES, b"\0") + page


def refused(vcpu: Vcpu, state: bytes) -> str:
    with pytest.raises(OSError, match="KVM_SET_NESTED_STATE: ") as caught:
        vcpu.set_nested_state(state)
    assert caught.value.errno == errno.EINVAL
    return str(caught.value)


def stop_in_l2(machine: NestedMachine, source: str = COUNTING, **registers: int) -> None:
    """Let L2 run the program *source*, which has to call first, up to a boundary behind the call."""
    machine.place(f"{CALL}; {source}")
    machine.begin(**registers)
    assert isinstance(machine.vcpu.run(), IoExit)
    machine.vcpu.immediate_exit = True
    assert isinstance(machine.vcpu.run(), IntrExit)
    machine.vcpu.immediate_exit = False


# ----------------------------------------------------------------------------------------------------- the ioctls


def test_the_capability_is_the_size_of_the_longest_state(emulated: NestedMachine) -> None:
    longest = System().check_extension(KVM_CAP_NESTED_STATE)
    assert len(emulated.vcpu.get_nested_state()) == longest == HEADER_BYTES + PAGE


def test_outside_vmx_operation_there_is_a_header_without_pointers() -> None:
    vcpu = Vm("emulator").create_vcpu()
    state = vcpu.get_nested_state()
    assert state == header(vmxon=NO_POINTER, vmcs=NO_POINTER)
    vcpu.set_nested_state(state)


def test_a_vcpu_without_vmx_has_a_state_too_but_takes_no_other() -> None:
    vcpu = Vm("emulator").create_vcpu()
    vcpu.set_cpuid2(parse_cpu("max,-vmx").entries())
    vcpu.set_nested_state(vcpu.get_nested_state())
    assert "has no VMX" in refused(vcpu, header(vmcs=NO_POINTER))


def test_the_state_in_root_operation_has_the_pointers_and_the_current_vmcs(emulated: NestedMachine) -> None:
    emulated.write({F.TSC_OFFSET: 0x1234_5678_9ABC})
    state = emulated.vcpu.get_nested_state()
    assert state[: HEADER.size] == header(size=HEADER_BYTES + PAGE)[: HEADER.size]
    # Somebody else's VMCS, and back.
    emulated.reset()
    assert emulated.read()[F.TSC_OFFSET] == 0
    emulated.vcpu.set_nested_state(state)
    assert emulated.read()[F.TSC_OFFSET] == 0x1234_5678_9ABC
    assert emulated.launch("nop").completed


def test_vmx_operation_without_a_vmcs_is_a_state(emulated: NestedMachine) -> None:
    emulated.vcpu.set_nested_state(header(vmcs=NO_POINTER))
    assert emulated.vcpu.get_nested_state() == header(vmcs=NO_POINTER)
    emulated.step("vmptrst [rbx]; mov rax, [rbx]; hlt", rbx=HIGH_SUPERVISOR)
    assert emulated.vcpu.get_regs().rax == NO_POINTER
    # The VMCS can be made current again.
    emulated.memory.store(layout.DATA_GPA + 0xC000, 8, VMCS)
    emulated.step("vmptrld [rbx]; hlt", rbx=HIGH_SUPERVISOR)
    assert emulated.vcpu.get_nested_state()[: HEADER.size] == header(size=HEADER_BYTES + PAGE)[: HEADER.size]


def test_the_state_in_l2_has_its_registers_and_goes_back(machine: NestedMachine) -> None:
    stop_in_l2(machine, "cpuid; inc rbx; cpuid", rbx=5)
    vcpu = machine.vcpu
    state, regs, sregs = vcpu.get_nested_state(), vcpu.get_regs(), vcpu.get_sregs()
    assert HEADER.unpack_from(state)[0] == GUEST_MODE
    vcpu.set_nested_state(state)
    assert vcpu.get_nested_state() == state
    assert (vcpu.get_regs(), vcpu.get_sregs()) == (regs, sregs)
    found = machine.finish()
    assert (found.reason, found.registers.rbx) == (ExitReason.CPUID, 5)
    found = machine.enter(resume=True, rbx=5, fields={F.GUEST_RIP: found.rip + 2})
    assert found.registers.rbx == 6


def test_another_vcpu_goes_on_in_l2(machine: NestedMachine) -> None:
    """Migration as QEMU does it: special registers, nested state, then the rest."""
    machine.write({F.EXCEPTION_BITMAP: 1 << GP})
    stop_in_l2(machine, "bad: mov rax, [rbx]", rbx=LOW_USER)
    old = machine.vcpu
    other = NestedMachine(Guest(engine=machine.vm.engine))
    new = other.vcpu
    other.memory.write(0, machine.memory.read(0, layout.MEMORY_BYTES))
    new.set_sregs2(old.get_sregs2())
    new.set_nested_state(old.get_nested_state())
    new.set_regs(old.get_regs())
    new.set_debugregs(old.get_debugregs())
    other.program, other.failed = machine.program, machine.failed
    found = other.finish()
    assert (found.reason, found.label) == (ExitReason.EXCEPTION_NMI, "bad")


def test_a_vm_entry_whose_event_is_still_to_be_delivered_is_pending(machine: NestedMachine) -> None:
    event = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_EXT_INTR | 0x55
    machine.place("nop", rflags=RFLAGS_IF, fields={F.VM_ENTRY_INTR_INFO_FIELD: event})
    state = pending_state(machine)
    flags, *_ = HEADER.unpack_from(state)
    assert flags == GUEST_MODE | RUN_PENDING
    machine.vcpu.set_nested_state(state)
    assert machine.vcpu.get_nested_state() == state
    assert machine.finish().vector == 0x55


def pending_state(machine: NestedMachine) -> bytes:
    """The state right behind VMLAUNCH: the VMM's debugger stops there."""
    machine.begin()
    machine.vcpu.set_guest_debug(GuestDebug(enable=True, singlestep=True))
    machine.vcpu.run()
    machine.vcpu.set_guest_debug(GuestDebug())
    return machine.vcpu.get_nested_state()


def test_a_monitor_trap_that_is_pending_is_in_the_state(machine: NestedMachine) -> None:
    machine.add({F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_MONITOR_TRAP_FLAG})
    stop_in_l2(machine, "next: nop")
    state = machine.vcpu.get_nested_state()
    assert HEADER.unpack_from(state)[0] == GUEST_MODE | MTF_PENDING
    machine.vcpu.set_nested_state(state)
    found = machine.finish()
    assert (found.reason, found.label) == (ExitReason.MONITOR_TRAP_FLAG, "next")


def test_the_deadline_of_the_preemption_timer_is_in_ticks_of_l1s_time_stamp_counter(
    machine: NestedMachine,
) -> None:
    machine.add({F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VMX_PREEMPTION_TIMER})
    machine.write({F.VMX_PREEMPTION_TIMER_VALUE: 20_000})
    machine.vcpu.set_msr(0x10, 1 << 40)
    stop_in_l2(machine, COUNTING)
    state = machine.vcpu.get_nested_state()
    *_, timer_flags, deadline = HEADER.unpack_from(state)
    now = machine.vcpu.get_msr(0x10) >> 5
    assert timer_flags == 1
    assert 0 < deadline - now <= 20_000
    machine.vcpu.set_nested_state(state)
    assert machine.vcpu.get_nested_state() == state
    assert machine.finish().reason is ExitReason.PREEMPTION_TIMER
    assert machine.vcpu.get_msr(0x10) >> 5 >= deadline


def test_a_halted_l2_stays_halted() -> None:
    machine = nested_machine("emulator", irqchip=True).reset()
    machine.place("nop", fields={F.GUEST_ACTIVITY_STATE: vmx.GUEST_ACTIVITY_HLT})
    machine.begin()
    assert isinstance(machine.vcpu.run(), HltExit)
    state = machine.vcpu.get_nested_state()
    before = machine.vcpu.get_mp_state()
    machine.vcpu.set_nested_state(state)
    assert machine.vcpu.get_mp_state() is before


# name, what is wrong, part of the sentence
GARBAGE: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("nothing", lambda page: b"", "too few"),
    ("half a header", lambda page: header()[:64], "too few"),
    ("another format", lambda page: header(format_=1, page=page), "format 1"),
    ("unknown flags", lambda page: header(0x200, page=page), "flags"),
    ("an enlightened VMCS", lambda page: header(4, page=page), "flags"),
    ("SMM", lambda page: header(smm=1, page=page), "flags"),
    ("pending outside L2", lambda page: header(RUN_PENDING, page=page), "unless L2 runs"),
    ("a size beyond the data", lambda page: header(size=0x2000, page=page), "its size"),
    ("a size below the header", lambda page: header(size=8, page=page), "its size"),
    ("a VMXON pointer amid a page", lambda page: header(vmxon=0x1008, page=page), "VMXON pointer"),
    ("a VMXON pointer beyond memory", lambda page: header(vmxon=1 << 60, page=page), "VMXON pointer"),
    ("a VMCS pointer amid a page", lambda page: header(vmcs=0x1008, page=page), "current-VMCS pointer"),
    ("the VMXON region as VMCS", lambda page: header(vmcs=VMXON_REGION, page=page), "current-VMCS pointer"),
    ("a page without a pointer", lambda page: header(vmcs=NO_POINTER, page=page), "current-VMCS pointer"),
    ("a pointer without a page", lambda page: header(), "missing"),
    ("L2 without a page", lambda page: header(GUEST_MODE, vmcs=NO_POINTER), "missing"),
    ("a VMCS outside VMX operation", lambda page: header(vmxon=NO_POINTER, page=page), "outside VMX"),
    ("L2 outside VMX operation", lambda page: header(1, vmxon=NO_POINTER, vmcs=NO_POINTER), "outside VMX"),
    ("another revision", lambda page: header(page=b"\1\2\3\4" + page[4:]), "revision"),
    ("an L2 without controls", lambda page: header(GUEST_MODE, page=page[:4] + bytes(PAGE - 4)), "entered"),
    (
        "an L2 with a bad RFLAGS",
        lambda page: header(GUEST_MODE, page=with_field(page, F.GUEST_RFLAGS, 0)),
        "entered",
    ),
]  # fmt: skip


def with_field(page: bytes, field: F, value: int) -> bytes:
    vmcs = Vmcs12.unpack(page)
    vmcs[field] = value
    return vmcs.pack().ljust(PAGE, b"\0")


@pytest.mark.parametrize(("spoil", "sentence"), [row[1:] for row in GARBAGE], ids=[row[0] for row in GARBAGE])
def test_garbage_is_refused_with_a_sentence(
    emulated: NestedMachine, spoil: Callable[[bytes], bytes], sentence: str
) -> None:
    page = emulated.vcpu.get_nested_state()[HEADER_BYTES:]
    assert sentence in refused(emulated.vcpu, spoil(page))


def test_random_states_are_taken_or_refused_and_the_vcpu_runs_on(emulated: NestedMachine) -> None:
    rng = random.Random("nested states")
    emulated.place(COUNTING)
    vcpu, good = emulated.vcpu, emulated.vcpu.get_nested_state()
    taken, refusals = 0, set()
    for _ in range(400):
        state = bytearray(good)
        state[0] = rng.choice((0, 1, 1, 3, 9, rng.randrange(256)))
        for _ in range(rng.randrange(6)):
            place = rng.choice((rng.randrange(64), rng.randrange(HEADER_BYTES, HEADER_BYTES + 0xB40)))
            state[place] = rng.randrange(256)
        try:
            vcpu.set_nested_state(bytes(state))
        except OSError as error:
            refusals.add(error.errno)
            continue
        taken += 1
        vcpu.immediate_exit = rng.random() < 0.9
        assert isinstance(vcpu.run(), Exit)
        vcpu.get_nested_state()
    assert taken > 50
    assert refusals == {errno.EINVAL}


# ------------------------------------------------------------------------------------------------------ snapshots


L1_LOOP = """
    handler: mov r12, rax; mov r13, rdx
    mov eax, 0x4402; vmread rbx, rax; mov eax, 0x681e; vmread rdx, rax
    mov [r15], rbx; mov [r15 + 8], rdx; mov [r15 + 16], rcx; add r15, 24
    cmp ebx, 12; je over
    cmp ebx, 10; jne go
    add rdx, 2; vmwrite rax, rdx
    go: mov eax, 0x482e; mov edx, 700; vmwrite rax, rdx
    mov rax, r12; mov rdx, r13; dec r14d; je over; vmresume
    over: hlt
"""
L2_PROGRAM = """
    mov ecx, 12000; outer: mov eax, ecx; and eax, 0xfff; jne inner; mov r8, rcx; cpuid; mov rcx, r8
    inner: add rsi, rcx; rol rsi, 3; mov [rdi], rsi; dec ecx; jne outer; hlt
"""
RESULTS = layout.DATA_GPA + 0xD000


def start_transcript(engine: ExecutionEngine, *, ept: bool) -> Vm:
    """A VM about to enter an L2 that computes, exits now and then, and is interrupted by the preemption timer."""
    machine = NestedMachine(Guest(engine=engine)).reset()
    if ept:
        machine.use_ept()
    machine.add({F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VMX_PREEMPTION_TIMER})
    machine.write({F.VMX_PREEMPTION_TIMER_VALUE: 700})
    machine.memory.write(L1_HANDLER, assemble(L1_LOOP, UPPER + L1_HANDLER).code)
    machine.place(L2_PROGRAM)
    machine.begin(rdi=HIGH_SUPERVISOR, r15=HIGH_SUPERVISOR + 0x1000, r14=60)
    machine.memory.write(L1_CODE + 0x100, b"\xf4")
    return machine.vm


def advance(vm: Vm, blocks: int) -> bool:
    """Run for about *blocks*; whether the guest has come to its end."""
    vcpu = vm.vcpu
    assert vcpu is not None
    end = vcpu.executed_blocks + blocks
    timer = vm.clock.call_at(vm.clock.now() + 10 * blocks, lambda: setattr(vcpu, "immediate_exit", True))
    while vcpu.executed_blocks < end:
        found = vcpu.run()
        vcpu.immediate_exit = False
        if not isinstance(found, IntrExit):
            timer.cancel()
            assert isinstance(found, HltExit), found
            return True
    timer.cancel()
    return False


def transcript(vm: Vm) -> tuple[bytes, Regs, int]:
    """Everything that L1 has seen, and the time."""
    assert vm.vcpu is not None
    return vm.memory.read(RESULTS, 0x1000), vm.vcpu.get_regs(), vm.vcpu.get_msr(0x10)


@pytest.mark.parametrize("point", [1_201, 2_750, 4_000, 7_777])
@pytest.mark.parametrize("ept", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_is_saved_in_l2_and_loaded_goes_on_as_the_saved_one(
    tmp_path: Path, engine: ExecutionEngine, ept: bool, point: int
) -> None:
    vm = start_transcript(engine, ept=ept)
    assert not advance(vm, point)
    assert vm.vcpu is not None
    assert vm.vcpu.get_nested_state()[0] & GUEST_MODE
    vm.save(tmp_path / "vm")
    loaded = Vm.load(tmp_path / "vm")
    while not advance(vm, 100_000):
        pass
    while not advance(loaded, 100_000):
        pass
    expected = transcript(vm)
    reasons = {reason for (reason, _, _) in struct.iter_unpack("<3Q", expected[0][: 24 * 16])}
    assert {ExitReason.PREEMPTION_TIMER, ExitReason.CPUID, ExitReason.HLT} <= reasons
    assert transcript(loaded) == expected


def saved_document(tmp_path: Path, vm: Vm) -> dict[str, object]:
    vm.save(tmp_path / "vm")
    with open_snapshot(tmp_path / "vm") as snapshot:
        return snapshot.document["vm"]["vcpu"]["nested"]  # type: ignore[no-any-return]


def test_everything_of_l2_is_in_a_snapshot(tmp_path: Path, machine: NestedMachine) -> None:
    machine.add(
        {
            F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VMX_PREEMPTION_TIMER,
            F.CPU_BASED_VM_EXEC_CONTROL: vmx.CPU_BASED_MONITOR_TRAP_FLAG,
        }
    )
    machine.write({F.VMX_PREEMPTION_TIMER_VALUE: 1 << 20})
    stop_in_l2(machine, "nop")
    document = saved_document(tmp_path, machine.vm)
    loaded = Vm.load(tmp_path / "vm")
    assert saved_document(tmp_path, loaded) == document
    assert (document["in_guest"], document["monitor_trap_pending"]) == (True, True)
    assert document["preemption_timer"] is not None
    assert loaded.vcpu is not None
    assert loaded.vcpu.get_nested_state() == machine.vcpu.get_nested_state()
    assert loaded.clock.next_deadline() == machine.vm.clock.next_deadline() is not None


def test_a_snapshot_right_behind_a_vm_entry_keeps_what_is_to_be_injected(
    tmp_path: Path, machine: NestedMachine
) -> None:
    event = vmx.INTR_INFO_VALID_MASK | vmx.INTR_TYPE_EXT_INTR | 0x55
    machine.place("nop", rflags=RFLAGS_IF, fields={F.VM_ENTRY_INTR_INFO_FIELD: event})
    pending_state(machine)
    machine.vm.save(tmp_path / "vm")
    loaded = Vm.load(tmp_path / "vm")
    assert loaded.vcpu is not None
    found = loaded.vcpu.run()
    assert isinstance(found, HltExit)
    assert machine.finish().vector == 0x55
    vmcs = loaded.vcpu.nested.vmx
    assert vmcs is not None
    assert vmcs.current is not None
    assert vmcs.current[F.GUEST_RIP] == layout.HANDLERS + 0x55 * layout.HANDLER_BYTES


def test_an_interrupt_that_waits_for_l1_waits_behind_a_load_too(
    tmp_path: Path, emulated: NestedMachine
) -> None:
    emulated.add({F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_EXT_INTR_MASK})
    emulated.at_call = lambda: emulated.vcpu.interrupt(0x44)
    assert emulated.launch(f"{CALL}; {COUNTING}").reason is ExitReason.EXTERNAL_INTERRUPT
    emulated.vm.save(tmp_path / "vm")
    loaded = Vm.load(tmp_path / "vm").vcpu
    assert loaded is not None
    program = assemble("nop; sti; nop; nop; hlt", UPPER + L1_CODE)
    for vcpu in (emulated.vcpu, loaded):
        vcpu.vm.memory.write(L1_CODE, program.code)
        emulated.begin_at(program.address)
        vcpu.set_regs(emulated.vcpu.get_regs())
    for vcpu in (emulated.vcpu, loaded):
        assert isinstance(vcpu.run(), HltExit)
        assert vcpu.get_regs().rip == layout.HANDLERS + 0x44 * layout.HANDLER_BYTES + 1


def test_a_vcpu_without_vmx_has_none_in_its_snapshot(tmp_path: Path) -> None:
    vm = Vm("emulator")
    vm.create_vcpu().set_cpuid2(parse_cpu("max,-vmx").entries())
    assert saved_document(tmp_path, vm) is None  # type: ignore[comparison-overlap]
    Vm.load(tmp_path / "vm")


@pytest.mark.parametrize(
    "spoil",
    [
        {"vmcs": None},
        {"vmcs": "00"},
        {"vmcs": "no hexadecimal"},
        {"current": NO_POINTER},
        {"preemption_timer": ["soon"]},
        {"vmxon": "here"},
    ],
)
def test_a_snapshot_with_a_wrong_state_of_vmx_is_refused(
    tmp_path: Path, emulated: NestedMachine, spoil: dict[str, object]
) -> None:
    stop_in_l2(emulated)
    emulated.vm.save(tmp_path / "vm")
    with open_snapshot(tmp_path / "vm") as snapshot:
        document = snapshot.document
    document["vm"]["vcpu"]["nested"] |= spoil
    write_snapshot(tmp_path / "vm", document, emulated.memory)
    with pytest.raises(SnapshotError, match="cannot be"):
        Vm.load(tmp_path / "vm")


def test_a_vmx_abort_behind_a_load_is_a_shutdown(tmp_path: Path, machine: NestedMachine) -> None:
    machine.write({F.VM_EXIT_MSR_LOAD_COUNT: 1, F.VM_EXIT_MSR_LOAD_ADDR: 0x6E000})
    machine.memory.store(0x6E000, 8, 0x1234_5678)
    stop_in_l2(machine, "cpuid")
    machine.vm.save(tmp_path / "vm")
    loaded = Vm.load(tmp_path / "vm")
    assert loaded.vcpu is not None
    assert isinstance(loaded.vcpu.run(), ShutdownExit)
    assert isinstance(machine.vcpu.run(), ShutdownExit)
