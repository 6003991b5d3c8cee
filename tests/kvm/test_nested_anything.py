"""Whatever L1 puts into a VMCS or into EPT tables, the outcome is one that the manual defines, and no error of ours."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from nested_machine import (
    ENGINES,
    EPT_PD,
    EPT_PDPT,
    EPT_PML4,
    EPT_PT,
    EPT_RWX,
    EPT_WB,
    EPTP,
    MSR_LIST,
    VMCS,
    VMXON_REGION,
    NestedMachine,
    nested_machine,
)

from lasskvm.conformance import layout
from lasskvm.conformance.layout import HIGH_SUPERVISOR, UPPER
from lasskvm.kvm import Exit, HltExit, InternalErrorExit, IntrExit, MmioExit, Regs, vcpu
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86 import vmx
from lasskvm.x86.registers import CR4_VMXE, RFLAGS_IF, RFLAGS_VM
from lasskvm.x86.vmx_exits import EXIT_REASON_FAILED_VMENTRY, ExitReason
from lasskvm.x86.vmx_fields import FieldType, VmcsField, field_type
from lasskvm.x86.vmx_fields import VmcsField as F

#: Memory that the guests of these tests use, with the EPT tables.
USED = ((0, 0x80000), (layout.TABLES_GPA, 0x20000), (EPT_PML4, 0x5000))
ROUNDS = 20_000
WILD_EVERY = 25
EPT_ROUNDS = {"jit": 1_000, "emulator": 2_000}
NO_REASON = 0xDEAD
PAGE, HEADER_BYTES = 4096, 128
SHORT_SLICE = 60

_WRITABLE = [field for field in VmcsField if field_type(field) is not FieldType.READ_ONLY]
_CONTROLS = [field for field in _WRITABLE if field_type(field) is FieldType.CONTROL]
_GUEST = [field for field in _WRITABLE if field_type(field) is FieldType.GUEST_STATE]
_VALUES = (
    0,
    1,
    2,
    7,
    0x10,
    0x80,
    0xFF,
    0x1000,
    MSR_LIST,
    0xFFFF,
    1 << 31,
    (1 << 32) - 1,
    1 << 47,
    UPPER,
    (1 << 64) - 1,
)


@pytest.fixture
def emulated() -> NestedMachine:
    return nested_machine("emulator").reset()


class Spoiler:
    """Makes VMCSs: valid ones of several kinds with something changed, and some that are nothing but noise."""

    def __init__(self, machine: NestedMachine) -> None:
        self.rng = random.Random("VMCSs")
        machine.place("nop; cpuid")
        plain = Vmcs12(fields={int(field): value for field, value in machine.read().items()})
        plain[F.VM_EXIT_REASON] = NO_REASON
        self.kinds = [plain, self._changed(plain, ept=True), self._changed(plain, ept=True, real=True)]
        self.kinds.append(self._changed(plain, every_control=machine))

    @staticmethod
    def _changed(
        vmcs: Vmcs12, *, ept: bool = False, real: bool = False, every_control: NestedMachine | None = None
    ) -> Vmcs12:
        vmcs = vmcs.copy()
        if ept:
            vmcs[F.SECONDARY_VM_EXEC_CONTROL] |= vmx.SECONDARY_EXEC_ENABLE_EPT
            vmcs[F.EPT_POINTER] = EPTP
        if real:
            vmcs[F.SECONDARY_VM_EXEC_CONTROL] |= vmx.SECONDARY_EXEC_UNRESTRICTED_GUEST
            vmcs[F.GUEST_CR0], vmcs[F.GUEST_CR4], vmcs[F.GUEST_IA32_EFER] = 0x20, CR4_VMXE, 0
            vmcs[F.VM_ENTRY_CONTROLS] &= ~vmx.VM_ENTRY_IA32E_MODE
            vmcs[F.GUEST_RIP] = 0x7C00
            for name in ("ES", "CS", "SS", "DS", "FS", "GS"):
                for part, value in (("SELECTOR", 0), ("BASE", 0), ("LIMIT", 0xFFFF), ("AR_BYTES", 0x93)):
                    vmcs[F[f"GUEST_{name}_{part}"]] = value
            vmcs[F.GUEST_CS_AR_BYTES] = 0x9B
        if every_control is not None:
            for field, index in (
                (F.PIN_BASED_VM_EXEC_CONTROL, 0x48D),
                (F.CPU_BASED_VM_EXEC_CONTROL, 0x48E),
                (F.VM_EXIT_CONTROLS, 0x48F),
                (F.VM_ENTRY_CONTROLS, 0x490),
                (F.SECONDARY_VM_EXEC_CONTROL, 0x48B),
            ):
                vmcs[field] = every_control.vcpu.get_msr(index) >> 32
            vmcs[F.EPT_POINTER] = EPTP
            vmcs[F.GUEST_IA32_PAT] = vmcs[F.HOST_IA32_PAT] = 0x0007_0406_0007_0406
        return vmcs

    def next(self, number: int) -> Vmcs12:
        rng = self.rng
        vmcs = Vmcs12(fields=dict(rng.choice(self.kinds)))
        if number % WILD_EVERY == 0:
            for field in _WRITABLE:
                vmcs[field] = rng.getrandbits(64)
            return vmcs
        for _ in range(rng.randrange(4)):
            field = rng.choice(rng.choice((_WRITABLE, _CONTROLS, _GUEST, _GUEST)))
            change = rng.random()
            if change < 0.5:
                vmcs[field] = vmcs[field] ^ 1 << rng.randrange(64 if change < 0.1 else 20)
            elif change < 0.8:
                vmcs[field] = rng.choice(_VALUES)
            elif change < 0.9:
                vmcs[field] = vmcs[rng.choice(_WRITABLE)]
            else:
                vmcs[field] = rng.getrandbits(64)
        if number % 5 == 0:
            vmcs[F.VM_ENTRY_INTR_INFO_FIELD] = (
                vmx.INTR_INFO_VALID_MASK | rng.randrange(8) << 8 | rng.choice((0, 1, 2, 6, 8, 13, 14, 0x44))
            )
            vmcs[F.GUEST_RFLAGS] |= rng.choice((0, RFLAGS_IF, RFLAGS_VM, 0x100))
        if number % 7 == 0:
            vmcs[F.VM_ENTRY_MSR_LOAD_COUNT], vmcs[F.VM_ENTRY_MSR_LOAD_ADDR] = rng.randrange(4), MSR_LIST
        return vmcs


def state_with(vmcs: Vmcs12) -> bytes:
    header = (0).to_bytes(4, "little") + (HEADER_BYTES + PAGE).to_bytes(4, "little")
    header += VMXON_REGION.to_bytes(8, "little") + VMCS.to_bytes(8, "little")
    return header.ljust(HEADER_BYTES, b"\0") + vmcs.pack().ljust(PAGE, b"\0")


def outcome(machine: NestedMachine, found: Exit, failed: int) -> str:
    """Which of the defined outcomes of VMLAUNCH this is."""
    state = machine.vcpu.get_nested_state()
    if state[0] & 1:
        return "runs"
    vmcs = Vmcs12.unpack(state[HEADER_BYTES:]) if len(state) > HEADER_BYTES else Vmcs12()
    reason = vmcs[F.VM_EXIT_REASON]
    if reason == NO_REASON:
        assert isinstance(found, HltExit), found
        assert machine.vcpu.get_regs().rip == failed
        return f"error {vmcs[F.VM_INSTRUCTION_ERROR]}"
    if reason & EXIT_REASON_FAILED_VMENTRY:
        return f"failed {reason & 0xFFFF}"
    assert reason in set(ExitReason)
    return "exit"


def test_a_random_vmcs_fails_to_enter_as_the_manual_says_or_runs(
    emulated: NestedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = emulated
    monkeypatch.setattr(vcpu, "_SLICE_INTERPRETED_BLOCKS", SHORT_SLICE)
    spoiler = Spoiler(machine)
    machine.memory.write(0x7C00, bytes.fromhex("90 0fa2"))
    machine.memory.store(MSR_LIST, 8, 0xC000_0081)
    machine.memory.store(MSR_LIST + 16, 8, 0xC000_0080)
    machine.begin()
    regs, sregs, failed = machine.vcpu.get_regs(), machine.vcpu.get_sregs(), machine.failed
    pristine = machine.memory.read(0, 0x80000)
    tables = machine.memory.read(layout.TABLES_GPA, 0x20000)
    seen: Counter[str] = Counter()
    for number in range(ROUNDS):
        vmcs = spoiler.next(number)
        machine.vcpu.set_nested_state(state_with(vmcs))
        machine.vcpu.set_sregs(sregs)
        machine.vcpu.set_regs(regs)
        found = machine.vcpu.run()
        assert isinstance(found, Exit)
        seen[outcome(machine, found, failed)] += 1
        if not isinstance(found, HltExit):
            machine.vcpu.reset()
            machine.memory.write(0, pristine)
            machine.memory.write(layout.TABLES_GPA, tables)
    assert set(seen) == {"error 7", "error 8", "failed 33", "failed 34", "exit", "runs"}, seen
    assert min(seen.values()) > ROUNDS // 1000, seen
    # And nothing is left of it all.
    assert machine.reset().launch("nop").completed


def random_entry(rng: random.Random, memory_type: int) -> int:
    """An EPT entry that may lead anywhere: to a table, to itself, out of memory, to nothing that has a meaning."""
    place = rng.choice((EPT_PML4, EPT_PDPT, EPT_PD, EPT_PT, 0x40000, 0x3FF000, 0x400000, 1 << 40, 1 << 46))
    flags = rng.choice((EPT_RWX, EPT_RWX, EPT_RWX, 1, 2, 3, 4, 5, 6)) | rng.choice(
        (memory_type, memory_type, 0, 2 << 3)
    )
    flags |= rng.choice((0, 0, 0, 0, 1 << 7, 1 << 8, 1 << 9, 1 << 5))
    return rng.getrandbits(64) if rng.random() < 0.1 else place | flags


@pytest.mark.parametrize("engine", ENGINES)
def test_garbage_in_ept_tables_is_l1s_business(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vcpu, "_SLICE_INTERPRETED_BLOCKS", SHORT_SLICE)
    monkeypatch.setattr(vcpu, "_SLICE_BLOCKS", 2_000)
    machine = nested_machine(engine).reset()  # type: ignore[arg-type]
    machine.use_ept()
    machine.add({F.PIN_BASED_VM_EXEC_CONTROL: vmx.PIN_BASED_VMX_PREEMPTION_TIMER})
    machine.write({F.VMX_PREEMPTION_TIMER_VALUE: 200})
    machine.place("mov rax, [rbx]; mov [rbx + 8], rax; push rax; inc dword [rcx]; ud2")
    machine.begin(rbx=HIGH_SUPERVISOR, rcx=layout.HIGH_ABSENT)
    regs, sregs = machine.vcpu.get_regs(), machine.vcpu.get_sregs()
    good = machine.vcpu.get_nested_state()
    pristine = [(place, machine.memory.read(place, size)) for place, size in USED]
    rng = random.Random(f"EPT {engine}")
    vcpu_ = machine.vcpu
    seen: Counter[object] = Counter()
    for _ in range(EPT_ROUNDS[engine]):
        pages = [
            layout.KERNEL_CODE_GPA,
            layout.DATA_GPA + 0xC000,
            layout.IDT_GPA,
            layout.TABLES_GPA,
            0x32000 - PAGE,
        ]
        for _ in range(rng.randrange(1, 4)):
            if rng.random() < 0.7:
                machine.set_ept(rng.choice(pages), random_entry(rng, EPT_WB))
            else:
                machine.memory.store(rng.choice((EPT_PML4, EPT_PDPT, EPT_PD)), 8, random_entry(rng, 0))
        vcpu_.set_nested_state(good)
        vcpu_.set_sregs(sregs)
        vcpu_.set_regs(Regs(**vars(regs)))
        for _ in range(40):
            found = vcpu_.run()
            if not isinstance(found, IntrExit | MmioExit):
                break
        assert isinstance(found, Exit)
        state = vcpu_.get_nested_state()
        if isinstance(found, HltExit) and not state[0] & 1:
            seen[ExitReason(Vmcs12.unpack(state[HEADER_BYTES:])[F.VM_EXIT_REASON] & 0xFFFF)] += 1
        else:
            # Code where there is no memory, or an L2 that waits for a device.
            assert isinstance(found, InternalErrorExit | MmioExit | IntrExit | HltExit), found
            seen[type(found)] += 1
        vcpu_.reset()
        for place, content in pristine:
            machine.memory.write(place, content)
    assert seen[ExitReason.EPT_VIOLATION] > EPT_ROUNDS[engine] // 10, seen
    assert seen[ExitReason.EPT_MISCONFIG] > EPT_ROUNDS[engine] // 10, seen
    assert machine.reset().launch("nop").completed
