"""Features of the local APIC, of time that goes on while the guest sleeps, and of KVM's paravirtual clock."""

from __future__ import annotations

from features.probe import HIGH_SUPERVISOR_PAGE, Probe, completed, faults, has_no_msr
from features.system_registers import READ_COUNTER
from lasskvm.conformance.guest import Guest, Outcome
from lasskvm.conformance.layout import HIGH_SUPERVISOR, UPPER
from lasskvm.x86 import msr
from lasskvm.x86.exceptions import GP
from lasskvm.x86.kvm_para import PVCLOCK_TIME_INFO, PVCLOCK_WALL_CLOCK
from lasskvm.x86.msr import APIC_BASE_BSP, APIC_BASE_ENABLE, APIC_BASE_X2APIC
from lasskvm.x86.registers import MASK32

APIC_GPA = 0xFEE00000
#: Where the guest has the APIC's page.
APIC = UPPER + 0x300000
#: Registers of the APIC, as offsets in its page.
VERSION, SPURIOUS, ISR_OF_VECTOR, COMMAND, TIMER_ENTRY = 0x30, 0xF0, 0x120, 0x300, 0x320
INITIAL_COUNT, CURRENT_COUNT, DIVIDE = 0x380, 0x390, 0x3E0
X2APIC_ID, X2APIC_SPURIOUS, X2APIC_SELF_IPI = 0x802, 0x80F, 0x83F
SOFTWARE_ENABLE = 1 << 8
TSC_DEADLINE_MODE = 2 << 17
TO_SELF = 1 << 18
DIVIDE_BY_1 = 0b1011
VECTOR = 0x51
ONE_MS = 1_000_000
#: A while that a guest can spend in a loop.
DEADLINE = 50_000
ENABLE_APIC = f"mov dword [rbx + {SPURIOUS}], {SOFTWARE_ENABLE | 0xFF:#x}; "
#: Switch to x2APIC mode and enable the APIC.
ENABLE_X2APIC = f"""
    mov ecx, {msr.MSR_IA32_APIC_BASE:#x}; rdmsr; or eax, {APIC_BASE_X2APIC:#x}; enter: wrmsr
    mov ecx, {X2APIC_SPURIOUS:#x}; mov eax, {SOFTWARE_ENABLE | 0xFF:#x}; xor edx, edx; wrmsr;
"""


def _interrupted(guest: Guest, source: str, **registers: int) -> Outcome:
    """What *source* comes to, at the interrupt of the APIC."""
    guest.tables.map(APIC, APIC_GPA)
    outcome = guest.execute(source, handlers=None, rbx=APIC, **registers)
    assert outcome.vector == VECTOR, outcome
    return outcome


def _counter(guest: Guest) -> int:
    return guest.vcpu.get_msr(msr.MSR_IA32_TSC)


def _apic(guest: Guest) -> None:
    """It answers in memory, and an interrupt that it is told to send to its own processor comes and is in service."""
    outcome = _interrupted(
        guest,
        f"{ENABLE_APIC} mov r8d, [rbx + {VERSION}]; mov dword [rbx + {COMMAND}], {TO_SELF | VECTOR:#x}; sti; nop; hlt",
    )
    assert outcome.registers.r8 & 0xFF == 0x14
    in_service = int.from_bytes(guest.vcpu.get_lapic()[ISR_OF_VECTOR:][:4], "little")
    assert in_service == 1 << VECTOR % 32
    assert guest.vcpu.get_msr(msr.MSR_IA32_APIC_BASE) == APIC_GPA | APIC_BASE_BSP | APIC_BASE_ENABLE


def _no_apic(guest: Guest) -> None:
    """It is switched off, and where it was reads as all ones, as under KVM."""
    assert guest.vcpu.get_msr(msr.MSR_IA32_APIC_BASE) == APIC_GPA | APIC_BASE_BSP
    guest.tables.map(APIC, APIC_GPA)
    assert completed(guest, f"mov eax, [rbx + {VERSION}]", rbx=APIC).rax == MASK32


def _x2apic(guest: Guest) -> None:
    outcome = _interrupted(
        guest,
        f"{ENABLE_X2APIC} mov ecx, {X2APIC_ID:#x}; rdmsr; mov r8d, eax; "
        f"mov ecx, {X2APIC_SELF_IPI:#x}; mov eax, {VECTOR:#x}; xor edx, edx; wrmsr; sti; nop; hlt",
    )
    assert outcome.registers.r8 == 0
    enabled = APIC_BASE_BSP | APIC_BASE_ENABLE | APIC_BASE_X2APIC
    assert guest.vcpu.get_msr(msr.MSR_IA32_APIC_BASE) == APIC_GPA | enabled
    has_no_msr(X2APIC_ID)(guest)


def _no_x2apic(guest: Guest) -> None:
    faults(guest, ENABLE_X2APIC.replace("enter", "fault"), GP, 0)
    has_no_msr(X2APIC_ID)(guest)


ARM = f"""
    mov dword [rbx + {TIMER_ENTRY}], {TSC_DEADLINE_MODE | VECTOR:#x}
    {READ_COUNTER} mov r8, rax; add rax, {DEADLINE}; mov rdx, rax; shr rdx, 32; mov ecx, {msr.MSR_IA32_TSC_DEADLINE:#x}
"""


def _tsc_deadline_timer(guest: Guest) -> None:
    """The interrupt comes when the counter has reached the deadline, not before, and disarms the timer."""
    for wait in ("hlt", "next: jmp next"):
        outcome = _interrupted(guest, f"{ENABLE_APIC} {ARM} wrmsr; rdmsr; mov r9d, eax; sti; {wait}")
        started = outcome.registers.r8
        assert outcome.registers.r9 == started + DEADLINE & MASK32
        assert started + DEADLINE <= _counter(guest) < started + 2 * DEADLINE
        assert guest.vcpu.get_msr(msr.MSR_IA32_TSC_DEADLINE) == 0
    outcome = _interrupted(
        guest, f"{ENABLE_APIC} {ARM} xor eax, eax; mov edx, eax; inc eax; wrmsr; sti; nop; hlt"
    )
    assert _counter(guest) < outcome.registers.r8 + DEADLINE


def _no_tsc_deadline_timer(guest: Guest) -> None:
    """The mode's bit cannot be set, either: the timer stays one-shot."""
    has_no_msr(msr.MSR_IA32_TSC_DEADLINE)(guest)
    guest.tables.map(APIC, APIC_GPA)
    found = completed(
        guest, f"{ENABLE_APIC} mov dword [rbx + {TIMER_ENTRY}], {TSC_DEADLINE_MODE:#x}; mov eax, [rbx + {TIMER_ENTRY}]",
        rbx=APIC,
    )  # fmt: skip
    assert not found.rax & TSC_DEADLINE_MODE


COUNT_DOWN = f"""
    {ENABLE_APIC}
    mov dword [rbx + {TIMER_ENTRY}], {VECTOR:#x}; mov dword [rbx + {DIVIDE}], {DIVIDE_BY_1}
    mov dword [rbx + {INITIAL_COUNT}], {ONE_MS}
    {READ_COUNTER} mov r8, rax; sti; hlt
"""


def _sleeps_for_a_millisecond(guest: Guest) -> None:
    """The APIC timer ends HLT in time, and the counter has counted while the processor slept."""
    outcome = _interrupted(guest, COUNT_DOWN)
    assert ONE_MS // 2 < _counter(guest) - outcome.registers.r8 < 2 * ONE_MS
    assert guest.vcpu.get_lapic()[CURRENT_COUNT:][:4] == bytes(4)


# --------------------------------------------------------------------------------------------------- KVM's own features

CLOCK_GPA = HIGH_SUPERVISOR_PAGE + 0x40
#: As a guest reads it: ticks since the structure was written, scaled.
READ_KVMCLOCK = f"""
    wrmsr; {READ_COUNTER} mov r8, rax; mov r9, [rbx + 8]; mov r10, [rbx + 16]; mov r11d, [rbx + 24]
    movzx ecx, byte [rbx + 28]; sub rax, r9; shl rax, cl; mul r11; shrd rax, rdx, 32; add rax, r10
"""


def _clock(wall_clock: int, system_time: int) -> Probe:
    def works(guest: Guest) -> None:
        found = completed(
            guest, READ_KVMCLOCK, rbx=HIGH_SUPERVISOR + 0x40, rcx=system_time, rax=CLOCK_GPA | 1, rdx=0
        )
        version, _, _, _, _, _, _ = PVCLOCK_TIME_INFO.unpack(
            guest.memory.read(CLOCK_GPA, PVCLOCK_TIME_INFO.size)
        )
        assert version
        assert version % 2 == 0
        assert 0 <= guest.vm.clock.now() - found.rax < ONE_MS
        completed(guest, "wrmsr", rcx=wall_clock, rax=CLOCK_GPA, rdx=0)
        _, seconds, nanoseconds = PVCLOCK_WALL_CLOCK.unpack(
            guest.memory.read(CLOCK_GPA, PVCLOCK_WALL_CLOCK.size)
        )
        assert seconds * 1_000_000_000 + nanoseconds == guest.vm.clock.epoch_ns

    return Probe(works, has_no_msr(wall_clock, system_time))


def _clock_flags(guest: Guest) -> int:
    completed(guest, "wrmsr", rcx=msr.MSR_KVM_SYSTEM_TIME_NEW, rax=CLOCK_GPA | 1, rdx=0)
    return int(PVCLOCK_TIME_INFO.unpack(guest.memory.read(CLOCK_GPA, PVCLOCK_TIME_INFO.size))[6])


def _is_stable(guest: Guest) -> None:
    assert _clock_flags(guest) == 1


def _is_not_stable(guest: Guest) -> None:
    assert _clock_flags(guest) == 0


#: The mask register of the first interrupt controller.
PIC_MASK = 0x21


def _ports_need_no_delay(guest: Guest) -> None:
    """Accesses one right after the other lose nothing."""
    found = completed(
        guest, f"mov al, 0xA5; out {PIC_MASK}, al; mov al, 0x5A; out {PIC_MASK}, al; in al, {PIC_MASK}", rax=0
    )
    assert found.rax == 0x5A


PROBES = {
    "apic": Probe(_apic, _no_apic, irqchip=True),
    "x2apic": Probe(_x2apic, _no_x2apic, irqchip=True),
    "tsc_deadline_timer": Probe(_tsc_deadline_timer, _no_tsc_deadline_timer, irqchip=True),
    "arat": Probe(
        _sleeps_for_a_millisecond, only_cpuid="a promise: the APIC timer does not stop in HLT", irqchip=True
    ),
    "nonstop_tsc": Probe(
        _sleeps_for_a_millisecond, only_cpuid="a promise: the counter does not stop in HLT", irqchip=True
    ),
    "kvmclock": _clock(msr.MSR_KVM_WALL_CLOCK, msr.MSR_KVM_SYSTEM_TIME),
    "kvmclock2": _clock(msr.MSR_KVM_WALL_CLOCK_NEW, msr.MSR_KVM_SYSTEM_TIME_NEW),
    "kvmclock_stable_bit": Probe(_is_stable, _is_not_stable),
    "kvm_nopiodelay": Probe(
        _ports_need_no_delay, only_cpuid="a promise: no device is too slow for the next access", irqchip=True
    ),
}
