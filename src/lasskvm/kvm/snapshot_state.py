"""A VM as the document of a snapshot, and back: everything that it needs to go on as if nothing had happened.

What a vCPU keeps for speed is not saved. Most of it makes no difference; of the rest, translations of linear addresses
can outlive the page-table entries they came from, and code that the emulator has decoded says where blocks end. A vCPU
therefore forgets both at its checkpoints and when it is saved (``Vcpu.forget_caches()``); see
``docs/adr/0010-snapshots.md``.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lasskvm.emulator.fpu import X87_REGISTERS, XMM_REGISTERS, Fpu, FpuState, copy_fpu
from lasskvm.errors import SnapshotError
from lasskvm.kvm.clock import HostClock, VirtualClock
from lasskvm.kvm.nested_state import nested_document, restore_nested
from lasskvm.kvm.snapshot import Document, Region, open_snapshot, write_snapshot
from lasskvm.kvm.structures import MpState, MsrFilterRange, VcpuEvents
from lasskvm.memory import TABLE_CODE_STORES
from lasskvm.state import STATE_WORDS, TLB_FLUSH
from lasskvm.x86.cpuid import CpuidEntry

if TYPE_CHECKING:
    from lasskvm.kvm.vcpu import Vcpu
    from lasskvm.kvm.vm import Vm

__all__ = ["load_vm", "memory_regions", "restore_vm", "save_vm", "saved_clock", "saved_cpuid"]

_FPU_SCALARS = ("mxcsr", "fcw", "fsw", "top", "ftw", "fop", "fip", "fdp")
_VIRTUAL, _HOST = "virtual", "host"


def save_vm(vm: Vm, path: Path, machine: Document | None = None) -> None:
    """Write *vm* to the snapshot *path*, with *machine*, what is around it, if it is not alone.

    Raises :class:`SnapshotError` when that cannot be done: amid an instruction, or when the file cannot be written.
    """
    vcpu = vm.vcpu
    if vcpu is None:
        raise SnapshotError("a VM without a vCPU cannot be saved; call create_vcpu() first")
    if vcpu.is_amid_instruction:
        raise SnapshotError(
            "the VM cannot be saved amid an instruction; run its vCPU with immediate_exit set until an IntrExit comes"
        )
    vcpu.forget_caches()
    write_snapshot(path, {"machine": machine, "vm": _vm_document(vm, vcpu)}, memory_regions(vm))


def memory_regions(vm: Vm) -> Iterator[Region]:
    """What of *vm* is saved as memory: its slots, and what the pages of its EPC hold."""
    yield from vm.memory
    if vm.epc is not None:
        yield vm.epc


def load_vm(path: Path, vm_type: type[Vm]) -> Vm:
    """The VM that has been saved alone to *path*; :class:`SnapshotError` for anything else."""
    with open_snapshot(path) as snapshot:
        if snapshot.document["machine"] is not None:
            raise SnapshotError(f"{path} is a snapshot of a whole machine; load it with `lasskvm run --load`")
        document = snapshot.document["vm"]
        vm = vm_type(document["engine"], forced_emulation=document["forced_emulation"])
        clock = saved_clock(document)
        if clock is not None:
            vm.set_clock(clock)
        for slot in document["slots"]:
            vm.set_user_memory_region(slot["number"], slot["gpa"], vm.allocate(slot["size"]), slot["flags"])
        if document["irqchip"] is not None:
            vm.create_irqchip()
        if document["pit"] is not None:
            vm.create_pit2()
        if document["sgx"] is not None:
            vm.create_epc(document["sgx"]["epc"]["base"], document["sgx"]["epc"]["size"])
        vm.create_vcpu()
        snapshot.load_memory(memory_regions(vm))
        restore_vm(vm, document)
        return vm


def saved_clock(document: Document) -> HostClock | None:
    """The clock for a VM to be restored from *document*; None for the deterministic one."""
    clock = document["clock"]
    return HostClock(clock["now_ns"]) if clock["kind"] == _HOST else None


def saved_cpuid(document: Document) -> list[CpuidEntry]:
    """The CPUID of the vCPU in *document*."""
    return [CpuidEntry(*entry) for entry in document["vcpu"]["cpuid"]]


def restore_vm(vm: Vm, document: Document) -> None:
    """Give *vm*, made anew with the same slots, in-kernel devices and clock, the state in *document*.

    Raises :class:`SnapshotError` when it was made otherwise, and KeyError, TypeError, ValueError or OverflowError for
    what is no such document.
    """
    vcpu = vm.vcpu
    made_alike = (
        vcpu is not None
        and [(slot.number, slot.gpa, slot.size) for slot in vm.memory]
        == [(slot["number"], slot["gpa"], slot["size"]) for slot in document["slots"]]
        and (vm.irqchip is None, vm.pit is None, vm.sgx is None)
        == (document["irqchip"] is None, document["pit"] is None, document["sgx"] is None)
    )
    if vcpu is None or not made_alike:
        raise SnapshotError(
            "the snapshot is of a machine with other memory or devices; load it as what it is"
        )
    if vm.sgx is not None:
        vm.sgx.set_state(document["sgx"])
    _restore_vcpu(vcpu, document["vcpu"])
    if isinstance(vm.clock, VirtualClock):
        vm.clock.restore_skipped(document["clock"]["skipped_ns"])
    for slot, saved in zip(vm.memory, document["slots"], strict=True):
        slot.page_flags[:] = np.frombuffer(base64.b64decode(saved["page_flags"]), np.uint8)
    vm.memory.table[TABLE_CODE_STORES:] = document["code_stores"]
    if document["msr_filter"] is not None:
        ranges, default_allow = document["msr_filter"]
        wanted = [
            MsrFilterRange(base, nmsrs, bytes.fromhex(bitmap), read, write)
            for base, nmsrs, bitmap, read, write in ranges
        ]
        vm.set_msr_filter(wanted, default_allow=default_allow)
    if vm.irqchip is not None:
        vm.irqchip.router.set_state(document["routes"])
        vm.irqchip.set_state(document["irqchip"])
    if vm.pit is not None:
        vm.pit.set_state(document["pit"])


def _vm_document(vm: Vm, vcpu: Vcpu) -> Document:
    clock = vm.clock
    return {
        "engine": vm.engine,
        "forced_emulation": vm.forced_emulation,
        "clock": {"kind": _VIRTUAL, "skipped_ns": clock.skipped_ns}
        if isinstance(clock, VirtualClock)
        else {"kind": _HOST, "now_ns": clock.now()},
        "slots": [
            {
                "number": slot.number,
                "gpa": slot.gpa,
                "size": slot.size,
                "flags": slot.flags,
                "page_flags": base64.b64encode(slot.page_flags.tobytes()).decode(),
            }
            for slot in vm.memory
        ],
        "code_stores": vm.memory.table[TABLE_CODE_STORES:].tolist(),
        "msr_filter": _msr_filter_document(vm),
        "irqchip": None if vm.irqchip is None else vm.irqchip.get_state(),
        "routes": None if vm.irqchip is None else vm.irqchip.router.get_state(),
        "pit": None if vm.pit is None else vm.pit.get_state(),
        "sgx": None if vm.sgx is None else vm.sgx.get_state(),
        "vcpu": _vcpu_document(vcpu),
    }


def _msr_filter_document(vm: Vm) -> list[object] | None:
    if vm.msr_filter is None:
        return None
    ranges = [
        (wanted.base, wanted.nmsrs, wanted.bitmap.hex(), wanted.read, wanted.write)
        for wanted in vm.msr_filter.ranges
    ]
    return [ranges, vm.msr_filter.default_allow]


def _vcpu_document(vcpu: Vcpu) -> Document:
    msrs = vcpu.emulation.msrs
    return {
        "cpuid": [list(vars(entry).values()) for entry in vcpu.get_cpuid2()],
        "words": vcpu.state.array.tolist(),
        "fpu": _fpu_document(vcpu.emulation.fpu),
        "msrs": sorted(msrs.values.items()),
        "tsc": [msrs.tsc_offset, msrs.tsc_adjust],
        "events": vars(vcpu.get_vcpu_events()),
        "event_instruction_length": vcpu.events.instruction_length,
        "interrupt_is_held": vcpu.events.interrupt_is_held,
        "mp_state": vcpu.get_mp_state(),
        "init_pending": vcpu.init_pending,
        "devices": vcpu.devices.get_state(),
        "nested": nested_document(vcpu.nested),
        "has_run": vcpu.has_run,
        "blocks": vcpu.executed_blocks,
        "next_checkpoint_ns": vcpu.next_checkpoint_ns,
        "engine": vcpu.engine.transient_state() if vcpu.vm.engine == "jit" else None,
    }


def _restore_vcpu(vcpu: Vcpu, document: Document) -> None:
    vcpu.set_cpuid2(CpuidEntry(*entry) for entry in document["cpuid"])
    # Before the words, two of which it sets.
    vcpu.set_vcpu_events(VcpuEvents(**document["events"]))
    vcpu.events.instruction_length = document["event_instruction_length"]
    vcpu.events.interrupt_is_held = document["interrupt_is_held"]
    words = document["words"]
    if len(words) != STATE_WORDS:
        raise ValueError(f"{len(words)} state words")
    for index, value in enumerate(words):
        vcpu.state.words[index] = value
    vcpu.state.words[TLB_FLUSH] = 1
    _restore_fpu(vcpu.emulation.fpu, document["fpu"])
    msrs = vcpu.emulation.msrs
    msrs.values.update((index, value) for index, value in document["msrs"])
    msrs.tsc_offset, msrs.tsc_adjust = document["tsc"]
    vcpu.set_mp_state(MpState(document["mp_state"]))
    vcpu.init_pending = document["init_pending"]
    vcpu.devices.set_state(document["devices"])
    restore_nested(vcpu.nested, document["nested"])
    vcpu.has_run = document["has_run"]
    vcpu.blocks_before = document["blocks"] - (vcpu.executed_blocks - vcpu.blocks_before)
    vcpu.next_checkpoint_ns = document["next_checkpoint_ns"]
    if document["engine"] is not None:
        vcpu.engine.load_transient_state(document["engine"])


def _fpu_document(fpu: Fpu) -> Document:
    registers = {
        "xmm": [fpu.xmm[number] for number in range(XMM_REGISTERS)],
        "registers": [fpu.registers[number] for number in range(X87_REGISTERS)],
    }
    return registers | {name: getattr(fpu, name) for name in _FPU_SCALARS}


def _restore_fpu(fpu: Fpu, document: Document) -> None:
    saved = FpuState()
    saved.xmm, saved.registers = document["xmm"], document["registers"]
    for name in _FPU_SCALARS:
        setattr(saved, name, document[name])
    copy_fpu(saved, fpu)
