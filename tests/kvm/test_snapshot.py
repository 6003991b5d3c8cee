"""Snapshots of a VM: everything comes back, and what is no whole snapshot is refused with a sentence."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from lasskvm.errors import SnapshotError
from lasskvm.kvm import (
    ExecutionEngine,
    HostClock,
    IoExit,
    MmioExit,
    MpState,
    MsrFilterRange,
    Regs,
    VcpuEvents,
    Vm,
)
from lasskvm.kvm.snapshot import FORMAT_VERSION
from lasskvm.kvm.structures import Fpu
from lasskvm.memory import PAGE_DIRTY, PAGE_SIZE, SLOT_LOG_DIRTY_PAGES
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.exceptions import GP
from lasskvm.x86.msr import MSR_IA32_LSTAR, MSR_IA32_TSC

MIB = 1 << 20
CODE = 0x1000
HIGH_GPA = 1 << 32
#: RIP behind INIT.
RESET_VECTOR = 0xFFF0


def build(engine: ExecutionEngine = "emulator") -> Vm:
    """A VM with two slots, in-kernel devices and something in every part of its state."""
    vm = Vm(engine, forced_emulation=True)
    vm.set_user_memory_region(0, 0, vm.allocate(5 * MIB))
    vm.set_user_memory_region(7, HIGH_GPA, vm.allocate(MIB), SLOT_LOG_DIRTY_PAGES)
    vm.create_irqchip()
    vm.create_pit2()
    vcpu = vm.create_vcpu()
    vcpu.set_cpuid2(parse_cpu("max,-popcnt").entries())
    vcpu.set_regs(Regs(*range(1, 17), rip=CODE, rflags=0x246))
    vcpu.set_msrs({MSR_IA32_LSTAR: 0x5000, 0x2FF: 0xC06, MSR_IA32_TSC: 1 << 40})
    vcpu.set_fpu(Fpu(fpr=[3] * 8, xmm=list(range(16)), fsw=0x3800, ftwx=0x81, mxcsr=0x1FA0))
    vcpu.set_vcpu_events(VcpuEvents(pending_exception=GP, exception_error_code=4, nmi_pending=True))
    vm.memory.write(0x2FFF, b"across pages")
    vm.memory.write(5 * MIB - 1, b"!")
    vm.memory.write(HIGH_GPA + 0x8000, b"high")
    vm.irq_line(3, True)
    vm.ports.write(0x43, 1, 0x34)
    vm.ports.write(0x40, 1, 0x10)
    vm.ports.write(0x40, 1, 0x27)
    vm.set_msr_filter([MsrFilterRange(0x10, nmsrs=1, bitmap=b"\0", write=False)])
    return vm


@pytest.mark.parametrize("engine", ["jit", "emulator"])
def test_every_part_of_a_vm_comes_back(tmp_path: Path, engine: ExecutionEngine) -> None:
    vm = build(engine)
    vm.save(tmp_path / "vm")
    loaded = Vm.load(tmp_path / "vm")
    assert (loaded.engine, loaded.forced_emulation) == (engine, True)
    assert vm.vcpu is not None
    assert loaded.vcpu is not None
    for name in (
        "get_regs", "get_sregs2", "get_cpuid2", "get_fpu", "get_xsave", "get_debugregs", "get_vcpu_events",
        "get_mp_state",
    ):  # fmt: skip
        assert getattr(loaded.vcpu, name)() == getattr(vm.vcpu, name)(), name
    indices = [MSR_IA32_LSTAR, 0x2FF, MSR_IA32_TSC]
    assert loaded.vcpu.get_msrs(indices) == vm.vcpu.get_msrs(indices)
    assert (loaded.get_irqchip(), loaded.get_pit2()) == (vm.get_irqchip(), vm.get_pit2())
    assert loaded.clock.next_deadline() == vm.clock.next_deadline() is not None
    assert loaded.msr_filter is not None
    assert not loaded.msr_filter.allows(0x10, is_write=False)
    assert [(slot.number, slot.gpa, slot.size, slot.flags) for slot in loaded.memory] == [
        (0, 0, 5 * MIB, 0),
        (7, HIGH_GPA, MIB, SLOT_LOG_DIRTY_PAGES),
    ]
    for slot, other in zip(vm.memory, loaded.memory, strict=True):
        assert slot.buffer[:] == other.buffer[:]
    assert loaded.get_dirty_log(7) == (1 << 8).to_bytes(32, "little")


def test_pages_of_zeros_take_no_room(tmp_path: Path) -> None:
    vm = Vm()
    vm.set_user_memory_region(0, 0, vm.allocate(256 * MIB))
    vm.create_vcpu()
    vm.memory.write(100 * MIB, os.urandom(PAGE_SIZE))
    vm.save(tmp_path / "vm")
    assert PAGE_SIZE < (tmp_path / "vm").stat().st_size < 4 * PAGE_SIZE


def test_a_halted_vcpu_is_halted_still(tmp_path: Path) -> None:
    vm = build()
    assert vm.vcpu is not None
    vm.vcpu.set_mp_state(MpState.HALTED)
    vm.save(tmp_path / "vm")
    loaded = Vm.load(tmp_path / "vm")
    assert loaded.vcpu is not None
    assert loaded.vcpu.get_mp_state() is MpState.HALTED


def test_an_init_signal_that_has_come_is_not_forgotten(tmp_path: Path) -> None:
    vm = build()
    assert vm.vcpu is not None
    vm.vcpu.init()
    vm.save(tmp_path / "vm")
    loaded = Vm.load(tmp_path / "vm")
    assert loaded.vcpu is not None
    assert loaded.vcpu.get_regs().rip == CODE
    loaded.vcpu.immediate_exit = True
    loaded.vcpu.run()
    assert loaded.vcpu.get_regs().rip == RESET_VECTOR


def test_the_cpuid_of_a_vcpu_that_has_run_is_settled_behind_a_load_too(tmp_path: Path) -> None:
    vm = build()
    assert vm.vcpu is not None
    vm.vcpu.immediate_exit = True
    vm.vcpu.run()
    vm.save(tmp_path / "vm")
    loaded = Vm.load(tmp_path / "vm")
    assert loaded.vcpu is not None
    with pytest.raises(OSError, match="has run"):
        loaded.vcpu.set_cpuid2(parse_cpu("max").entries())


def test_a_clock_that_follows_the_host_goes_on_from_where_it_was(tmp_path: Path) -> None:
    vm = Vm("emulator")
    vm.set_clock(HostClock(3_600_000_000_000))
    vm.create_vcpu()
    before = vm.clock.now()
    vm.save(tmp_path / "vm")
    loaded = Vm.load(tmp_path / "vm")
    assert isinstance(loaded.clock, HostClock)
    assert loaded.clock.now() > before >= 3_600_000_000_000
    assert abs(loaded.clock.wall_clock() - vm.clock.wall_clock()) <= 1


@pytest.mark.parametrize("code", ["e499", "a100000000"])  # in al, 0x99; mov eax, [0]: device exits
def test_a_vm_amid_an_instruction_is_not_saved_until_that_is_complete(tmp_path: Path, code: str) -> None:
    vm = Vm("emulator")
    vm.set_user_memory_region(0, 0x1000, vm.allocate(0x1000))
    vcpu = vm.create_vcpu()
    vm.memory.write(CODE, bytes.fromhex(code))
    sregs = vcpu.get_sregs()
    sregs.cs = replace(sregs.cs, selector=0, base=0)
    vcpu.set_sregs(sregs)
    vcpu.set_regs(Regs(rip=CODE))
    assert isinstance(vcpu.run(), IoExit | MmioExit)
    with pytest.raises(SnapshotError, match="immediate_exit"):
        vm.save(tmp_path / "vm")
    vcpu.immediate_exit = True
    vcpu.run()
    vm.save(tmp_path / "vm")
    loaded = Vm.load(tmp_path / "vm")
    assert loaded.vcpu is not None
    assert loaded.vcpu.get_regs() == vcpu.get_regs()
    assert vcpu.get_regs().rip > CODE


def test_a_vm_without_a_vcpu_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="create_vcpu"):
        Vm().save(tmp_path / "vm")


# ---------------------------------------------------------------------------------------------------- damaged files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build().save(tmp_path / "vm")
    return tmp_path / "vm"


def test_a_file_that_was_cut_off_anywhere_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in (*range(13, len(whole), 97), len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(SnapshotError, match="damaged or incomplete"):
            Vm.load(saved)


def test_a_file_with_a_wrong_bit_anywhere_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for place in range(12, len(whole), 41):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        saved.write_bytes(damaged)
        with pytest.raises(SnapshotError, match="damaged or incomplete"):
            Vm.load(saved)


def test_a_file_with_something_behind_its_end_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(SnapshotError, match="damaged or incomplete"):
        Vm.load(saved)


@pytest.mark.parametrize(
    ("version", "words"),
    [(FORMAT_VERSION + 1, "use the newer lasskvm"), (FORMAT_VERSION - 1, "save it again")],
)
def test_another_version_of_the_format_is_refused(saved: Path, version: int, words: str) -> None:
    whole = bytearray(saved.read_bytes())
    struct.pack_into("<I", whole, 8, version)
    saved.write_bytes(whole)
    with pytest.raises(SnapshotError, match=words):
        Vm.load(saved)


@pytest.mark.parametrize("content", [b"", b"LASSKVM", b"\x7fELF" + bytes(100)])
def test_what_is_no_snapshot_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(SnapshotError, match="is no snapshot of lasskvm"):
        Vm.load(tmp_path / "file")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SnapshotError, match="cannot be read"):
            Vm.load(path)


# ------------------------------------------------------------------------------------------------- writing safely


def test_a_folder_that_does_not_exist_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"cannot be written .*folder"):
        build().save(tmp_path / "missing" / "vm")


def test_a_full_disk_leaves_the_former_file_and_nothing_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SnapshotError, match="No space left on device"):
        build().save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_kill_amid_saving_leaves_the_former_file_intact(saved: Path) -> None:
    before = saved.read_bytes()
    program = textwrap.dedent("""
        import os, sys, time
        from lasskvm.kvm import Vm

        def wait(descriptor):
            print("writing", flush=True)
            time.sleep(60)

        vm = Vm.load(sys.argv[1])
        vm.memory.write(0, bytes(range(256)))
        os.fsync = wait
        vm.save(sys.argv[1])
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(saved)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert saved.read_bytes() == before
    loaded = Vm.load(saved)
    assert loaded.memory.read(0x2FFF, 6) == b"across"
    loaded.save(saved)
    assert Vm.load(saved).memory.read(0x2FFF, 6) == b"across"


def test_saving_does_not_disturb_the_dirty_log(tmp_path: Path) -> None:
    vm = build()
    flags = [slot.page_flags.copy() for slot in vm.memory]
    vm.save(tmp_path / "vm")
    assert [
        ((slot.page_flags ^ was) & PAGE_DIRTY).any() for slot, was in zip(vm.memory, flags, strict=True)
    ] == [
        False,
        False,
    ]
