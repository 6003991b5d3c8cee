"""What became of a case on a provider, and whether that is what was expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lasskvm.conformance.case import ACCESS, Effect, Ending, Expected, Value
from lasskvm.kvm.structures import Regs, Sregs
from lasskvm.x86.exceptions import vector_name
from lasskvm.x86.registers import (
    CR4_LASS,
    EFER_LMA,
    RFLAGS_AC,
    RFLAGS_CF,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_ZF,
)
from lasskvm.x86.vmx_exits import EXIT_REASON_BASIC, EXIT_REASON_FAILED_VMENTRY, ExitReason

__all__ = ["CR2_UNTOUCHED", "Observed", "describe", "differences", "register", "summary"]

#: CR2 before each case.
CR2_UNTOUCHED = 0xFFFF_8BAD_0000_0CE2

_FLAGS = {
    "ac": RFLAGS_AC, "cf": RFLAGS_CF, "zf": RFLAGS_ZF, "tf": RFLAGS_TF, "rf": RFLAGS_RF, "if": RFLAGS_IF,
}  # fmt: skip
_SPECIAL: dict[str, Callable[[Sregs], int]] = {
    "cr0": lambda sregs: sregs.cr0,
    "cr4": lambda sregs: sregs.cr4,
    "cr4_lass": lambda sregs: int(bool(sregs.cr4 & CR4_LASS)),
    "efer_lma": lambda sregs: int(bool(sregs.efer & EFER_LMA)),
    "gdt_base": lambda sregs: sregs.gdt.base,
    "idt_base": lambda sregs: sregs.idt.base,
    "ldt_base": lambda sregs: sregs.ldt.base,
    "ldt": lambda sregs: sregs.ldt.selector,
    "tr": lambda sregs: sregs.tr.selector,
    "fs": lambda sregs: sregs.fs.selector,
    "gs": lambda sregs: sregs.gs.selector,
    "ds": lambda sregs: sregs.ds.selector,
    "es": lambda sregs: sregs.es.selector,
    "fs_base": lambda sregs: sregs.fs.base,
    "gs_base": lambda sregs: sregs.gs.base,
}


@dataclass(frozen=True)
class Observed:
    """How a case has ended.

    *rip* to *ss* are the interrupted program's, from the frame of the event, where there is one. *effect* is what has
    happened to the operand's page, None when it is none of :class:`Effect`'s; *page* says it in detail. *memory* holds
    the words that the case asks for. *labels* are the addresses of the program's labels, *start* the registers at
    its begin. *mmio_accesses* counts the accesses to the operand's page that came to the VMM.
    """

    ending: Ending
    vector: int | None
    error_code: int | None
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    regs: Regs
    sregs: Sregs
    dr6: int
    memory: Mapping[int, int]
    labels: Mapping[str, int]
    start: Regs
    #: Whether nothing runs before the instruction under test.
    is_first: bool
    effect: Effect | None = None
    page: str = ""
    #: None where it was no MMIO.
    mmio_accesses: int | None = None
    #: That of the VM exit, where one has ended the case.
    exit_reason: int | None = None
    #: Fields of L1's VMCS, by their names in lower case, and ``l1_cr4_lass``.
    fields: Mapping[str, int] = field(default_factory=dict)

    def place(self, address: int) -> str:
        """*address*, as a label when it is one's."""
        return next((name for name, at in self.labels.items() if at == address), f"{address:#x}")

    def resolve(self, value: Value) -> int:
        """*value*, or the address of the label of that name."""
        return self.labels[value] if isinstance(value, str) else value


def register(observed: Observed, name: str) -> int:
    """A register behind the case by *name*.

    ``rax`` to ``r15``; of the interrupted program ``rsp``, ``cs``, ``ss`` and the flags ``ac``, ``cf``, ``zf``, ``tf``,
    ``rf`` and ``if``; of the processor ``cr0``, ``cr4``, ``cr4_lass``, ``efer_lma``, ``gdt_base``, ``idt_base``,
    ``ldt``, ``ldt_base``, ``tr``, ``fs``, ``gs``, ``ds``, ``es``, ``fs_base``, ``gs_base`` and ``dr6``. With nested
    virtualization, fields of the VMCS by KVM's names (``exit_qualification``), and L1's ``l1_cr4_lass``.
    """
    if name in observed.fields:
        return observed.fields[name]
    if name in _FLAGS:
        return int(bool(observed.rflags & _FLAGS[name]))
    if name in _SPECIAL:
        return _SPECIAL[name](observed.sregs)
    if name in ("rsp", "cs", "ss"):
        return int(getattr(observed, name))
    if name == "dr6":
        return observed.dr6
    return int(getattr(observed.regs, name))


def differences(expected: Expected, observed: Observed) -> list[str]:
    """What is not as expected, each in a few words; empty when the case has passed."""
    found = []
    if _event(expected) != _observed_event(observed):
        found.append(_event_text(observed))
    elif _is_elsewhere(expected, observed):
        found.append(f"RIP {observed.place(observed.rip)}")
    if expected.ending not in (Ending.SHUTDOWN, Ending.REFUSED):
        cr2 = CR2_UNTOUCHED if expected.cr2 is None else expected.cr2
        if observed.sregs.cr2 != cr2:
            found.append(f"CR2 {observed.sregs.cr2:#x}")
    if expected.effect is not None and observed.page and observed.effect is not expected.effect:
        found.append(f"page {observed.page}")
    found += _changed_registers(expected, observed)
    if observed.mmio_accesses is not None:
        found += _mmio_differences(expected, observed.mmio_accesses)
    for name, value in expected.state.items():
        got = register(observed, name)
        if got != observed.resolve(value):
            found.append(f"{name} {observed.place(got) if isinstance(value, str) else hex(got)}")
    for gva, value in expected.memory.items():
        if observed.memory[gva] != observed.resolve(value):
            found.append(f"[{gva:#x}] {observed.memory[gva]:#x}")
    return found


def _is_elsewhere(expected: Expected, observed: Observed) -> bool:
    if expected.rip is None or expected.ending not in _AT_A_PLACE:
        return False
    return observed.rip != observed.resolve(expected.rip)


def _changed_registers(expected: Expected, observed: Observed) -> list[str]:
    """An instruction that faults or exits has changed no register; looked at where nothing ran before it."""
    if (
        expected.ending not in (Ending.EVENT, Ending.VM_EXIT)
        or expected.rip != ACCESS
        or not observed.is_first
    ):
        return []
    if observed.rip != observed.labels[ACCESS]:
        return []
    return [
        f"{name} {register(observed, name):#x}"
        for name, value in vars(observed.start).items()
        if name not in ("rip", "rflags", *expected.state) and register(observed, name) != value
    ]


def _mmio_differences(expected: Expected, accesses: int) -> list[str]:
    if expected.ending is Ending.COMPLETES and expected.effect is not Effect.NONE and not accesses:
        return ["no MMIO exit"]
    if expected.effect is Effect.NONE and accesses:
        return [f"{accesses} MMIO exits"]
    return []


def describe(expected: Expected) -> str:
    """*expected* as one line."""
    parts = [_event_name(*_event(expected))]
    if expected.rip is not None and expected.ending in _AT_A_PLACE:
        parts[0] += f" at {expected.rip if isinstance(expected.rip, str) else hex(expected.rip)}"
    if expected.ending is Ending.EVENT:
        parts.append("CR2 unchanged" if expected.cr2 is None else f"CR2 {expected.cr2:#x}")
    if expected.effect is not None:
        parts.append(f"page {expected.effect.value}")
    for name, value in expected.state.items():
        parts.append(f"{name} {value if isinstance(value, str) else hex(value)}")
    for gva, value in expected.memory.items():
        parts.append(f"[{gva:#x}] {value if isinstance(value, str) else hex(value)}")
    return ", ".join(parts)


def summary(observed: Observed) -> str:
    """What became of the case, as one line."""
    parts = [_event_text(observed)]
    if observed.ending is Ending.EVENT and observed.sregs.cr2 != CR2_UNTOUCHED:
        parts.append(f"CR2 {observed.sregs.cr2:#x}")
    if observed.page:
        parts.append(f"page {observed.page}")
    return ", ".join(parts)


#: An exception's vector and error code, or the reason of a VM exit.
_Event = tuple[Ending, int | None, int | None, int | None]
#: Endings that have a RIP to look at.
_AT_A_PLACE = (Ending.EVENT, Ending.HALTS, Ending.VM_EXIT)


def _event(expected: Expected) -> _Event:
    return expected.ending, expected.vector, expected.error_code, expected.exit_reason


def _observed_event(observed: Observed) -> _Event:
    return observed.ending, observed.vector, observed.error_code, observed.exit_reason


def _event_name(ending: Ending, vector: int | None, error_code: int | None, reason: int | None) -> str:
    if ending is Ending.VM_EXIT and reason is not None:
        return f"{ending.value} {_reason_name(reason)}"
    if ending is not Ending.EVENT or vector is None:
        return ending.value
    return vector_name(vector) + ("" if error_code is None else f"({error_code:#x})" if error_code else "(0)")


def _event_text(observed: Observed) -> str:
    name = _event_name(*_observed_event(observed))
    if observed.ending in _AT_A_PLACE:
        return f"{name} at {observed.place(observed.rip)}"
    return name


def _reason_name(reason: int) -> str:
    """KVM's name of an exit reason, and its number."""
    basic = reason & EXIT_REASON_BASIC
    known = {member.value: member.name for member in ExitReason}
    failed = " of a failed VM entry" if reason & EXIT_REASON_FAILED_VMENTRY else ""
    return f"{basic} ({known.get(basic, 'unknown')}){failed}"
