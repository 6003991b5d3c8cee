"""A PC in a snapshot file: its VM, and what of it belongs to the VMM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lasskvm.errors import SnapshotError
from lasskvm.kvm import StatefulDevice, Vm
from lasskvm.kvm.interface import VmInterface
from lasskvm.kvm.snapshot import Document
from lasskvm.kvm.snapshot_state import save_vm

__all__ = ["device_states", "machine_of", "restore_devices", "save_machine"]


def save_machine(vm: VmInterface, path: Path, machine: Document) -> None:
    """Write *vm* with *machine*, the state of what is around it, to *path*.

    Raises :class:`SnapshotError` for a VM on /dev/kvm, and when the file cannot be written.
    """
    if not isinstance(vm, Vm):
        raise SnapshotError("a machine on /dev/kvm cannot be saved; run it with --backend soft")
    save_vm(vm, path, machine)


def machine_of(document: Document, path: Path) -> Document:
    """The machine's part of a snapshot's *document*; :class:`SnapshotError` for a VM that was saved alone."""
    machine: Document | None = document["machine"]
    if machine is None:
        raise SnapshotError(f"{path} is a snapshot of a VM without a machine; load it with Vm.load()")
    return machine


def device_states(devices: Mapping[str, StatefulDevice]) -> Document:
    """The states of *devices*, by name."""
    return {name: device.get_state() for name, device in devices.items()}


def restore_devices(devices: Mapping[str, StatefulDevice], states: Document) -> None:
    """The inverse of :func:`device_states`; KeyError when one is missing."""
    for name, device in devices.items():
        device.set_state(states[name])
