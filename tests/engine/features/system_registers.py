"""Features that are registers and instructions of the system: MSRs, system calls, saved state, bases, counters."""

from __future__ import annotations

from features.instruction_sets import OF_EVERY_64_BIT_PROCESSOR, integers
from features.probe import (
    Probe,
    all_of,
    completed,
    faults,
    has_no_msr,
    is_undefined,
    refuses_cr4,
)
from lasskvm.conformance import layout
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import (
    HIGH_SUPERVISOR,
    KERNEL_CODE,
    KERNEL_CS,
    KERNEL_STACK_TOP,
    LOW_USER,
    USER_CS,
    USER_CS32,
    USER_STACK_TOP,
)
from lasskvm.kvm import IoExit
from lasskvm.state import DR6
from lasskvm.x86 import msr
from lasskvm.x86.cpuid import LEAF_HYPERVISOR
from lasskvm.x86.exceptions import DB, GP, UD
from lasskvm.x86.registers import (
    CR4_DE,
    CR4_FSGSBASE,
    CR4_PVI,
    CR4_TSD,
    CR4_UMIP,
    CR4_VME,
    DR6_B0,
    MASK32,
    MASK64,
    RFLAGS_CF,
    RFLAGS_IF,
    RFLAGS_VIF,
)

NOT_CANONICAL = 1 << 63
#: Where a system call leads.
ENTRY = KERNEL_CODE + 0x800
UNKNOWN_MSR = 0x12345


# --------------------------------------------------------------------------------------------------- MSRs, counters


def _msr(guest: Guest) -> None:
    found = completed(
        guest, "wrmsr; xor eax, eax; xor edx, edx; rdmsr",
        rcx=msr.MSR_IA32_SYSENTER_EIP, rax=0xFFFF_FFFF_8765_4321, rdx=0xFFFF_8000,
    )  # fmt: skip
    # The upper halves of RAX and RDX are no part of the value, and RDMSR clears them.
    assert (found.rax, found.rdx) == (0x8765_4321, 0xFFFF_8000)
    for source in ("rdmsr", "wrmsr"):
        faults(guest, source, GP, 0, rcx=UNKNOWN_MSR)
        faults(guest, source, GP, 0, rcx=msr.MSR_IA32_SYSENTER_EIP, cpl=3)
    faults(guest, "wrmsr", GP, 0, rcx=msr.MSR_IA32_SYSENTER_EIP, rax=0, rdx=0x8000_0000)


READ_COUNTER = "rdtsc; shl rdx, 32; or rax, rdx; "


def _tsc(guest: Guest) -> None:
    source = f"{READ_COUNTER} mov r8, rax; jmp next; next: {READ_COUNTER} nop"
    found = completed(guest, source, cpl=3)
    assert 0 < found.r8 < found.rax < found.r8 + 1_000_000
    found = completed(guest, f"wrmsr; {READ_COUNTER} nop", rcx=msr.MSR_IA32_TSC, rax=0, rdx=0x1234_0000)
    assert 0 <= found.rax - (0x1234_0000 << 32) < 1_000_000
    guest.cr4 |= CR4_TSD
    faults(guest, "rdtsc", GP, 0, cpl=3)
    completed(guest, "rdtsc")


def _rdtscp(guest: Guest) -> None:
    guest.msrs[msr.MSR_IA32_TSC_AUX] = 0x1003
    source = f"{READ_COUNTER} mov r8, rax; jmp next; next: rdtscp; shl rdx, 32; or rax, rdx"
    found = completed(guest, source, cpl=3, rcx=MASK64)
    assert found.r8 < found.rax < found.r8 + 1_000_000
    assert found.rcx == 0x1003
    guest.cr4 |= CR4_TSD
    faults(guest, "rdtscp", GP, 0, cpl=3)


def _rdpid(guest: Guest) -> None:
    """At any privilege level, whatever CR4.TSD says."""
    guest.msrs[msr.MSR_IA32_TSC_AUX] = 0x1003
    guest.cr4 |= CR4_TSD
    for register in ("rax", "r9"):
        found = completed(guest, f"rdpid {register}", cpl=3, **{register: MASK64})
        assert getattr(found, register) == 0x1003


def _tsc_adjust(guest: Guest) -> None:
    """What is added to one is added to the other, whichever of them is written."""
    guest.vcpu.set_msr(msr.MSR_IA32_TSC_ADJUST, 0)
    step = 0x10_0000_0000
    source = f"{READ_COUNTER} mov r8, rax; mov eax, esi; mov edx, edi; wrmsr; {READ_COUNTER} mov r9, rax; "
    found = completed(
        guest, source + "rdmsr; shl rdx, 32; or rax, rdx",
        rcx=msr.MSR_IA32_TSC_ADJUST, rsi=step & MASK32, rdi=step >> 32,
    )  # fmt: skip
    assert found.rax == step
    assert step < found.r9 - found.r8 < step + 1_000_000
    target = 0x50_0000_0000
    before = guest.vcpu.get_msr(msr.MSR_IA32_TSC_ADJUST)
    found = completed(guest, source + "nop", rcx=msr.MSR_IA32_TSC, rsi=target & MASK32, rdi=target >> 32)
    moved = guest.vcpu.get_msr(msr.MSR_IA32_TSC_ADJUST) - before
    # Between the reading and the write, the counter has run on.
    assert (target - found.r8 - moved) % (1 << 64) < 1_000_000


def _de(guest: Guest) -> None:
    """DR4 and DR5 are no registers of their own any more, and breakpoints on I/O are met."""
    found = completed(guest, "mov rax, dr4; mov rcx, dr6; mov rdx, dr5; mov rsi, dr7")
    assert (found.rax, found.rdx) == (found.rcx, found.rsi)
    guest.cr4 |= CR4_DE
    for source in ("mov rax, dr4", "mov dr5, rax"):
        faults(guest, source, UD)
    enabled, on_io = 1 << 1, 2 << 16
    guest.start(
        f"mov dr0, rax; mov ecx, {enabled | on_io:#x}; mov dr7, rcx; out dx, al; after: nop",
        rax=0x99,
        rdx=0x99,
    )
    written = guest.vcpu.run()
    assert isinstance(written, IoExit)
    outcome = guest.run()
    assert (outcome.vector, outcome.label) == (DB, "after")
    assert guest.vcpu.state.words[DR6] & 0xF == DR6_B0


# ----------------------------------------------------------------------------------------------------- system calls


def _syscall(guest: Guest) -> None:
    guest.msrs |= {
        msr.MSR_IA32_STAR: KERNEL_CS << 32 | USER_CS32 << 48,
        msr.MSR_IA32_LSTAR: ENTRY,
        msr.MSR_IA32_SFMASK: RFLAGS_CF,
    }
    guest.place(assemble("mov r8d, cs; mov r9, rcx; mov r10, r11; setb bl; sysretq", ENTRY))
    outcome = guest.execute(
        "syscall; after: pushfq; pop rdx; mov eax, cs; nop", cpl=3, rflags=RFLAGS_CF, rbx=1
    )
    assert outcome.completed, outcome
    found, after = outcome.registers, outcome.program.labels["after"]
    assert (found.r8, found.r9, found.rcx) == (KERNEL_CS, after, after)
    assert found.r10 & RFLAGS_CF
    assert found.rbx == 0
    assert found.rdx & RFLAGS_CF
    assert found.rax == USER_CS


def _no_syscall(guest: Guest) -> None:
    is_undefined("syscall", "sysretq")(guest)
    faults(guest, "rdmsr; or eax, 1; fault: wrmsr", GP, 0, rcx=msr.MSR_IA32_EFER)


def _sep(guest: Guest) -> None:
    guest.msrs |= {
        msr.MSR_IA32_SYSENTER_CS: KERNEL_CS,
        msr.MSR_IA32_SYSENTER_ESP: KERNEL_STACK_TOP,
        msr.MSR_IA32_SYSENTER_EIP: ENTRY,
    }
    guest.place(
        assemble("mov r8d, cs; mov r9, rsp; pushfq; pop r10; mov rcx, rsi; mov rdx, rdi; sysexitq", ENTRY)
    )
    outcome = guest.execute(
        "mov rsi, rsp; mov rdi, after; sysenter; ud2; after: mov eax, cs; nop", cpl=3, rflags=RFLAGS_IF
    )
    assert outcome.completed, outcome
    found = outcome.registers
    assert (found.r8, found.r9, found.rax) == (KERNEL_CS, KERNEL_STACK_TOP, USER_CS)
    assert not found.r10 & RFLAGS_IF
    assert outcome.rsp == USER_STACK_TOP
    guest.msrs[msr.MSR_IA32_SYSENTER_CS] = 0
    faults(guest, "sysenter", GP, 0, cpl=3)


# -------------------------------------------------------------------------------------- bases, UMIP and the hypervisor


def _fsgsbase(guest: Guest) -> None:
    faults(guest, "rdfsbase rax", UD, cpl=3)
    guest.cr4 |= CR4_FSGSBASE
    guest.write(LOW_USER + 8, integers("Q", 0x1234))
    found = completed(
        guest, "wrfsbase rbx; wrgsbase r8; rdfsbase rax; rdgsbase rcx; mov rdx, fs:[8]",
        cpl=3, rbx=LOW_USER, r8=0x7FFF_1234_5678,
    )  # fmt: skip
    assert (found.rax, found.rcx, found.rdx) == (LOW_USER, 0x7FFF_1234_5678, 0x1234)
    faults(guest, "wrgsbase rax", GP, 0, cpl=3, rax=NOT_CANONICAL)


UMIP_INSTRUCTIONS = ("sgdt [rbx]", "sidt [rbx]", "sldt eax", "str eax", "smsw eax")


def _vme(guest: Guest) -> None:
    """The half of it that is there outside virtual-8086 mode: a virtual interrupt flag for CPL 3 (CR4.PVI)."""
    faults(guest, "sti", GP, 0, cpl=3)
    guest.cr4 |= CR4_PVI
    assert completed(guest, "sti; pushfq; pop rax", cpl=3).rax & RFLAGS_VIF
    assert not completed(guest, "sti; cli; pushfq; pop rax", cpl=3).rax & RFLAGS_VIF


def _umip(guest: Guest) -> None:
    for source in UMIP_INSTRUCTIONS:
        completed(guest, source, cpl=3, rbx=LOW_USER)
    guest.cr4 |= CR4_UMIP
    for source in UMIP_INSTRUCTIONS:
        faults(guest, source, GP, 0, cpl=3, rbx=LOW_USER)
        completed(guest, source, rbx=HIGH_SUPERVISOR)
    assert completed(guest, "sgdt [rbx]; mov rax, [rbx + 2]", rbx=HIGH_SUPERVISOR).rax == layout.GDT


HYPERVISOR_NAME = f"mov eax, {LEAF_HYPERVISOR:#x}; cpuid"


def _hypervisor(guest: Guest) -> None:
    found = completed(guest, HYPERVISOR_NAME, cpl=3)
    assert integers("3I", found.rbx, found.rcx, found.rdx) == b"KVMKVMKVM\0\0\0"
    for call in ("vmcall", "vmmcall"):
        assert completed(guest, call, rax=1).rax == 0
        assert completed(guest, call, rax=0x1234).rax == -1000 % (1 << 64)
        assert completed(guest, call, cpl=3, rax=1).rax == -1 % (1 << 64)


def _no_hypervisor(guest: Guest) -> None:
    found = completed(guest, HYPERVISOR_NAME)
    assert integers("3I", found.rbx, found.rcx, found.rdx) != b"KVMKVMKVM\0\0\0"
    is_undefined("vmcall", "vmmcall")(guest)


PROBES = {
    "msr": Probe(_msr, is_undefined("rdmsr", "wrmsr", registers={"rcx": msr.MSR_IA32_PAT})),
    "tsc": Probe(_tsc, is_undefined("rdtsc"), runs_anyway=OF_EVERY_64_BIT_PROCESSOR),
    "rdtscp": Probe(_rdtscp, is_undefined("rdtscp")),
    "rdpid": Probe(_rdpid, is_undefined("rdpid rax", "rdpid r9")),
    "tsc_adjust": Probe(_tsc_adjust, has_no_msr(msr.MSR_IA32_TSC_ADJUST)),
    "de": Probe(_de, only_cpuid="every processor since the Pentium has it, and firmware does not ask"),
    "syscall": Probe(_syscall, _no_syscall),
    "sep": Probe(_sep, is_undefined("sysenter", "sysexitq")),
    "fsgsbase": Probe(
        _fsgsbase,
        all_of(refuses_cr4(CR4_FSGSBASE), is_undefined("rdfsbase rax", "wrfsbase rax", "rdgsbase rax", "wrgsbase rax")),
    ),
    "vme": Probe(_vme, all_of(refuses_cr4(CR4_VME), refuses_cr4(CR4_PVI))),
    "umip": Probe(_umip, refuses_cr4(CR4_UMIP)),
    "hypervisor": Probe(_hypervisor, _no_hypervisor),
}  # fmt: skip
