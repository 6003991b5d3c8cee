"""A processor and its interrupt hardware are put back into the state behind power-on, on both providers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from lasskvm.conformance.assembler import assemble
from lasskvm.errors import HostError
from lasskvm.kvm import (
    DebugRegs,
    Exit,
    IntrExit,
    IoExit,
    MmioExit,
    MpState,
    Regs,
    System,
    VcpuEvents,
    Vm,
    host,
)
from lasskvm.kvm.interface import VcpuInterface, VmInterface
from lasskvm.machine.power_on import PowerOnState
from lasskvm.x86.msr import (
    APIC_BASE_X2APIC,
    MSR_IA32_APIC_BASE,
    MSR_IA32_FS_BASE,
    MSR_IA32_LSTAR,
    MSR_IA32_MTRR_DEF_TYPE,
    MSR_IA32_PAT,
    MSR_IA32_STAR,
    MSR_IA32_SYSENTER_EIP,
    MSR_IA32_TSC,
    MSR_IA32_TSC_ADJUST,
    MSR_KVM_STEAL_TIME,
    MSR_KVM_SYSTEM_TIME_NEW,
)
from lasskvm.x86.registers import CR0_ET, CR0_PE, CR4_OSFXSR, CR4_PAE

#: The last page below 4 GiB, and what the reset vector is in it.
ROM_GPA = 0xFFFF_F000
RESET_VECTOR = ROM_GPA + 0xFF0
PAGE = 0x1000
#: Where the program in the ROM begins, in the segment that CS is behind power-on; and the jump to it (E9).
ENTRY = 0xF000
JUMP_TO_ENTRY = b"\xe9" + ((ENTRY - 0xFFF3) & 0xFFFF).to_bytes(2, "little")
#: More than any of these guests takes, so that a hang is a failed test and not a hung one.
PATIENCE = 20.0

REPORT, RESET = 0xE9, 0x64
SPIV, LVT_TIMER, TMICT, TDCR, TPR = 0xF0, 0x320, 0x380, 0x3E0, 0x80


class Machine:
    """A VM with 64 KiB of memory, a ROM at the reset vector, interrupt chips and a timer."""

    def __init__(self, provider: str) -> None:
        self.vm: VmInterface
        if provider == "host":
            with host.System() as system:
                self.vm = system.create_vm()
                cpuid = system.get_supported_cpuid()
        else:
            self.vm = Vm("emulator")
            cpuid = System().get_supported_cpuid()
        self.vm.set_user_memory_region(0, 0, self.vm.allocate(0x10000))
        self.vm.set_user_memory_region(1, ROM_GPA, self.vm.allocate(PAGE))
        self.vm.create_irqchip()
        self.vm.create_pit2()
        self.vcpu: VcpuInterface = self.vm.create_vcpu()
        self.vcpu.set_cpuid2(cpuid)
        self.power_on = PowerOnState.capture(self.vm, self.vcpu)

    def burn(self, source: str) -> None:
        """Have the guest start with *source*, in real mode."""
        self.vm.memory.write(ROM_GPA, assemble(source, ENTRY, bits=16).code)
        self.vm.memory.write(RESET_VECTOR, JUMP_TO_ENTRY)

    def run(self) -> Exit:
        """Run until the guest needs somebody."""
        while True:
            if isinstance(self.vcpu, host.Vcpu):
                vm_exit = self.vcpu.run(PATIENCE)
                assert not isinstance(vm_exit, IntrExit), "the guest hangs"
            else:
                vm_exit = self.vcpu.run()
            if not isinstance(vm_exit, IntrExit):
                return vm_exit

    def reset(self) -> None:
        self.power_on.restore(self.vm, self.vcpu)

    def state(self) -> PowerOnState:
        """What is the state now; without the timer, whose has times in it."""
        return replace(PowerOnState.capture(self.vm, self.vcpu), pit={})


@pytest.fixture(params=["soft", "host"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine of each provider in turn."""
    try:
        machine = Machine(request.param)
    except HostError as error:
        pytest.skip(str(error))
    yield machine
    machine.vm.close()


@pytest.fixture
def soft_machine() -> Iterator[Machine]:
    machine = Machine("soft")
    yield machine
    machine.vm.close()


# ------------------------------------------------------------------------------------------------ one thing at a time


def change_registers(machine: Machine) -> None:
    machine.vcpu.set_regs(Regs(rax=1, rcx=2, rsp=3, rsi=4, r8=5, r15=6, rip=0x1234, rflags=0x246))


def change_system_registers(machine: Machine) -> None:
    sregs = machine.vcpu.get_sregs2()
    sregs.cr0, sregs.cr4 = CR0_PE | CR0_ET, CR4_PAE | CR4_OSFXSR
    sregs.cr2, sregs.cr3, sregs.cr8 = 0x1234, 0x5000, 7
    sregs.cs = replace(sregs.cs, selector=8, base=0, limit=0xFFFFF)
    sregs.gdt = sregs.idt = type(sregs.gdt)(0x4000, 0x77)
    machine.vcpu.set_sregs2(sregs)


def change_fpu(machine: Machine) -> None:
    fpu = machine.vcpu.get_fpu()
    fpu.fcw, fpu.ftwx, fpu.fpr[0], fpu.xmm[3] = 0x27F, 1, 1 << 79 | 5, 1 << 100
    machine.vcpu.set_fpu(fpu)


def change_msrs(machine: Machine) -> None:
    values = {
        MSR_IA32_STAR: 0x0008_0010_0000_0000,
        MSR_IA32_LSTAR: 0xFFFF_8000_0000_1000,
        MSR_IA32_SYSENTER_EIP: 0x8000,
        MSR_IA32_FS_BASE: 0x7000,
        MSR_IA32_PAT: 0x0606_0606_0606_0606,
        MSR_IA32_MTRR_DEF_TYPE: 0xC06,
        MSR_IA32_TSC_ADJUST: 0x1000,
    }
    assert machine.vcpu.set_msrs(values) == len(values)


def change_debug_registers(machine: Machine) -> None:
    machine.vcpu.set_debugregs(DebugRegs((1, 2, 3, 4), 0xFFFF_0FF1, 0x401))


def change_events(machine: Machine) -> None:
    machine.vcpu.set_vcpu_events(VcpuEvents(nmi_pending=True, nmi_masked=True))


def halt(machine: Machine) -> None:
    machine.vcpu.set_mp_state(MpState.HALTED)


def change_local_apic(machine: Machine) -> None:
    registers = bytearray(machine.vcpu.get_lapic())
    for offset, value in (
        (SPIV, 0x1FF),
        (LVT_TIMER, 0x2_00EF),
        (TDCR, 0xB),
        (TPR, 0x20),
        (TMICT, 0x7FFF_FFFF),
    ):
        registers[offset : offset + 4] = value.to_bytes(4, "little")
    machine.vcpu.set_lapic(bytes(registers))


def send_message(machine: Machine) -> None:
    change_local_apic(machine)
    assert machine.vm.signal_msi(0xFEE0_0000, 0x51)


def change_apic_mode(machine: Machine) -> None:
    base = machine.vcpu.get_sregs().apic_base
    assert machine.vcpu.set_msrs({MSR_IA32_APIC_BASE: base | APIC_BASE_X2APIC}) == 1


def raise_lines(machine: Machine) -> None:
    for line in (1, 8, 20):
        machine.vm.irq_line(line, True)


CHANGES = [
    change_registers,
    change_system_registers,
    change_fpu,
    change_msrs,
    change_debug_registers,
    change_events,
    halt,
    change_local_apic,
    send_message,
    change_apic_mode,
    raise_lines,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__))
def test_what_has_changed_is_as_behind_power_on(machine: Machine, change: Callable[[Machine], None]) -> None:
    before = machine.state()
    change(machine)
    assert machine.state() != before
    machine.reset()
    assert machine.state() == before


def test_all_of_it_together_is_as_behind_power_on(machine: Machine) -> None:
    before = machine.state()
    for change in CHANGES:
        change(machine)
    machine.reset()
    assert machine.state() == before


def test_memory_is_kept(machine: Machine) -> None:
    machine.vm.memory.write(0x2000, b"kept")
    machine.reset()
    assert machine.vm.memory.read(0x2000, 4) == b"kept"


def test_a_reset_can_follow_a_reset(machine: Machine) -> None:
    before = machine.state()
    for _ in range(3):
        change_system_registers(machine)
        machine.reset()
    assert machine.state() == before


# ----------------------------------------------------------------------------------------------------------- running

#: Reports the 8259A's mask, changes what a guest at start can change, and asks for a reset from protected mode.
PROGRAM = """
    in al, 0x21
    out 0xe9, al
    mov al, 0x5a; out 0x21, al
    mov al, 0x34; out 0x43, al; mov al, 0; out 0x40, al; out 0x40, al
    mov ecx, 0x277; xor edx, edx; mov eax, 0x606; wrmsr
    mov eax, cr0; or al, 1; mov cr0, eax
    mov al, 0xfe; out 0x64, al
again: jmp again
"""


def test_the_guest_starts_again_at_the_reset_vector_as_the_first_time(machine: Machine) -> None:
    machine.burn(PROGRAM)
    for _ in range(2):
        assert machine.run() == IoExit(REPORT, 1, write=True, data=0)
        assert machine.vcpu.get_sregs().cr0 == machine.power_on.sregs.cr0
        assert machine.run() == IoExit(RESET, 1, write=True, data=0xFE)
        assert machine.vcpu.get_sregs().cr0 & CR0_PE
        machine.reset()


@pytest.mark.parametrize(
    ("source", "left_open"),
    [
        ("in al, 0x80", IoExit(0x80, 1, write=False, data=0xFF)),
        ("mov ax, 0x1000; mov ds, ax; mov al, [0]", MmioExit(0x10000, 1, write=False, data=0xFF)),
        ("mov ax, 0x1000; mov ds, ax; mov byte [0], 7", MmioExit(0x10000, 1, write=True, data=7)),
        ("mov dx, 0x64; mov cx, 0xffff; rep outsb", IoExit(0x64, 1, write=True, data=0)),
        ("mov di, 0x3000; mov dx, 0x64; mov cx, 0xffff; rep insb", IoExit(0x64, 1, write=False, data=0xFF)),
    ],
    ids=["in", "load", "store", "rep outs", "rep ins"],
)
def test_what_an_exit_has_left_open_comes_to_nothing(machine: Machine, source: str, left_open: Exit) -> None:
    before = machine.state()
    machine.burn(f"{source}; again: jmp again")
    assert machine.run() == left_open
    machine.reset()
    assert machine.state() == before
    machine.burn("mov al, 0x42; out 0xe9, al")
    assert machine.run() == IoExit(REPORT, 1, write=True, data=0x42)


def test_the_vmm_can_still_let_the_guest_run_afterwards(machine: Machine) -> None:
    machine.reset()
    assert machine.vcpu.immediate_exit is False


# ------------------------------------------------------------------------------------------------ the soft provider's


def test_no_timer_is_left(soft_machine: Machine) -> None:
    soft_machine.burn(PROGRAM)
    for _ in range(2):
        soft_machine.run()
    change_local_apic(soft_machine)
    assert isinstance(soft_machine.vm, Vm)
    assert soft_machine.vm.clock.next_deadline() is not None
    soft_machine.reset()
    assert soft_machine.vm.clock.next_deadline() is None


def test_the_time_stamp_counter_restarts_at_0(soft_machine: Machine) -> None:
    soft_machine.burn(PROGRAM)
    soft_machine.run()
    soft_machine.vcpu.set_msrs({MSR_IA32_TSC: 1 << 40})
    soft_machine.reset()
    assert soft_machine.vcpu.get_msrs([MSR_IA32_TSC]) == {MSR_IA32_TSC: 0}


def test_an_init_signal_that_was_on_its_way_is_gone(soft_machine: Machine) -> None:
    soft_machine.vcpu.init()
    soft_machine.reset()
    soft_machine.vcpu.set_regs(Regs(rip=0x1234, rflags=2))
    soft_machine.vcpu.immediate_exit = True
    soft_machine.vcpu.run()
    assert soft_machine.vcpu.get_regs().rip == 0x1234


def test_xcr0_allows_the_x87_only(soft_machine: Machine) -> None:
    soft_machine.vcpu.set_xcrs({0: 3})
    soft_machine.reset()
    assert soft_machine.vcpu.get_xcrs() == {0: 1}


def test_kvmclock_is_off(soft_machine: Machine) -> None:
    soft_machine.vcpu.set_msrs({MSR_KVM_SYSTEM_TIME_NEW: 0x3001})
    soft_machine.reset()
    assert soft_machine.vcpu.get_msrs([MSR_KVM_SYSTEM_TIME_NEW])[MSR_KVM_SYSTEM_TIME_NEW] == 0


def test_msrs_that_do_not_exist_hide_no_others(soft_machine: Machine) -> None:
    msrs = soft_machine.power_on.msrs
    assert MSR_KVM_STEAL_TIME not in msrs
    assert max(msrs) > MSR_KVM_STEAL_TIME > min(msrs)


def test_an_msr_that_cannot_be_set_keeps_no_other_from_it(soft_machine: Machine) -> None:
    no_such_msr = 0x1234_5678
    wanted = {no_such_msr: 1, **soft_machine.power_on.msrs}
    soft_machine.vcpu.set_msrs({MSR_IA32_LSTAR: 0x8000})
    replace(soft_machine.power_on, msrs=wanted).restore(soft_machine.vm, soft_machine.vcpu)
    assert soft_machine.vcpu.get_msrs([MSR_IA32_LSTAR]) == {MSR_IA32_LSTAR: 0}
