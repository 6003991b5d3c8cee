"""A conformance case: one small program, the state in which it runs, and what the manual says becomes of it.

Cases are data. Nothing here, and nothing in :mod:`lasskvm.conformance.cases`, computes an expected outcome from the
rule in :mod:`lasskvm.lass`, so that the suite can find a fault in it. The words for outcomes (:func:`gp`, :func:`pf`,
:func:`completes` ...) are what case tables are written in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from lasskvm.conformance import layout
from lasskvm.conformance.enclaves import Enclaves
from lasskvm.conformance.nested import Nested
from lasskvm.conformance.setup import Step
from lasskvm.x86.exceptions import GP, PF, SS, has_error_code
from lasskvm.x86.registers import RFLAGS_AC

__all__ = [
    "ACCESS",
    "COMPLETION",
    "COMPLETION_CODE",
    "Case",
    "Effect",
    "Ending",
    "Expected",
    "Mode",
    "Value",
    "completes",
    "fault",
    "gp",
    "halts",
    "pf",
    "refused",
    "shutdown",
    "ss",
    "vm_exit",
    "vm_fail",
]

#: The label of the instruction under test. The forced emulation prefix goes in front of it.
ACCESS = "access"

#: How a program says that it has come to its end: #UD at an UD2 with these bytes behind it. Unlike INT, that takes
#: nothing that a KVM without hardware support does not have, and unlike HLT it works at any privilege level.
COMPLETION = "ud2; db 0x64, 0x6f, 0x6e, 0x65"
COMPLETION_CODE = b"\x0f\x0bdone"

#: A number, or a label of the case's program: its address.
Value = int | str


class Effect(Enum):
    """What has happened to the page of a case's operand."""

    #: Neither accessed nor dirty; unchanged.
    NONE = "untouched"
    #: Accessed, not dirty; unchanged.
    READ = "read"
    #: Accessed and dirty; changed.
    WRITTEN = "written"
    #: Accessed and dirty; the bytes are what they were.
    REWRITTEN = "written with what it held"


class Ending(Enum):
    """How a case ends."""

    #: The program runs to its end.
    COMPLETES = "completes"
    #: An exception or interrupt is delivered.
    EVENT = "event"
    #: The program itself halts.
    HALTS = "halts"
    #: A triple fault.
    SHUTDOWN = "shutdown (triple fault)"
    #: KVM_SET_SREGS fails with EINVAL: the program does not start.
    REFUSED = "KVM_SET_SREGS refused with EINVAL"
    #: L2 exits to L1, or its VM entry fails behind the checks of controls and host state.
    VM_EXIT = "VM exit"
    #: VMLAUNCH or VMRESUME ends in VMfailValid.
    VM_FAIL = "VM entry ends in VMfailValid"


@dataclass(frozen=True)
class Expected:
    """What becomes of a case.

    *rip* is what an event reports, or where the program halts; None: anywhere. *cr2* is None when CR2 stays as it is.
    *effect* None: not looked at. *state* holds registers behind the event by name (those of
    :func:`lasskvm.conformance.observation.register`), *memory* 64-bit words by linear address. *exit_reason* is that of
    a VM exit.
    """

    ending: Ending
    vector: int | None = None
    error_code: int | None = None
    rip: Value | None = None
    cr2: int | None = None
    effect: Effect | None = None
    state: Mapping[str, Value] = field(default_factory=dict)
    memory: Mapping[int, Value] = field(default_factory=dict)
    exit_reason: int | None = None

    def but(
        self,
        *,
        effect: Effect | None = None,
        memory: Mapping[int, Value] | None = None,
        **state: Value,
    ) -> Expected:
        """The same with another effect, or with more registers or memory to look at."""
        return replace(
            self,
            effect=effect or self.effect,
            state={**self.state, **state},
            memory={**self.memory, **(memory or {})},
        )


def completes(effect: Effect | None = None, **state: Value) -> Expected:
    """The program runs to its end."""
    return Expected(Ending.COMPLETES, effect=effect, state=state)


def fault(vector: int, error_code: int | None = None, rip: Value | None = ACCESS, **state: Value) -> Expected:
    """Exception *vector*, or the interrupt of an INT instruction."""
    effect = Effect.NONE if has_error_code(vector) else None
    return Expected(Ending.EVENT, vector, error_code, rip, effect=effect, state=state)


def gp(rip: Value | None = ACCESS, **state: Value) -> Expected:
    """#GP(0): no page is touched, CR2 stays."""
    return fault(GP, 0, rip, **state)


def ss(rip: Value | None = ACCESS, **state: Value) -> Expected:
    """#SS(0): as :func:`gp`."""
    return fault(SS, 0, rip, **state)


def pf(error_code: int, cr2: int, rip: Value | None = ACCESS, **state: Value) -> Expected:
    """#PF at *cr2*."""
    return replace(fault(PF, error_code, rip, **state), cr2=cr2)


def halts(rip: Value | None = None, **state: Value) -> Expected:
    """The program executes a HLT of its own; *rip* is the label behind it."""
    return Expected(Ending.HALTS, rip=rip, state=state)


def shutdown(**state: Value) -> Expected:
    """A triple fault."""
    return Expected(Ending.SHUTDOWN, effect=Effect.NONE, state=state)


def refused() -> Expected:
    """KVM_SET_SREGS fails with EINVAL."""
    return Expected(Ending.REFUSED)


def vm_exit(reason: int, rip: Value | None = ACCESS, **state: Value) -> Expected:
    """L2 exits to L1 at *rip* for *reason*, an :class:`~lasskvm.x86.vmx_exits.ExitReason` and its high bits."""
    return Expected(Ending.VM_EXIT, rip=rip, state=state, exit_reason=reason)


def vm_fail(error: int, **state: Value) -> Expected:
    """The VM entry ends in VMfailValid with VM-instruction *error*; L1 goes on behind VMLAUNCH."""
    return Expected(Ending.VM_FAIL, state={"vm_instruction_error": error, **state})


class Mode(Enum):
    """The processor's mode when a case begins."""

    LONG = "64-bit mode"
    COMPATIBILITY = "compatibility mode"
    PROTECTED = "protected mode without paging"
    PAE = "protected mode with PAE paging"
    REAL = "real mode"

    @property
    def bits(self) -> int:
        """How wide code is."""
        return {Mode.LONG: 64, Mode.REAL: 16}.get(self, 32)

    @property
    def is_ia32e(self) -> bool:
        """Whether EFER.LMA is 1."""
        return self in (Mode.LONG, Mode.COMPATIBILITY)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case.

    *program* is assembly, its ``access`` label at the instruction under test; :data:`COMPLETION` follows it. *lass* is
    what becomes of it with CR4.LASS = 1, *off* with CR4.LASS = 0 (None: there is no such contrast). The state at its
    begin is that of :mod:`lasskvm.conformance.layout` with *registers*, *rflags* (added to the fixed ones), *sregs*
    (fields of ``Sregs``), *msrs*, the *setup* steps on memory, CR4.SMAP and CR4.SMEP as *smap* and *smep* say, and
    *cr4* and, in IA-32e mode, *cr3* added.
    """

    id: str
    group: str
    words: str
    program: str
    lass: Expected
    off: Expected | None = None
    cpl: int = 0
    mode: Mode = Mode.LONG
    #: Where the program is, when it is not the usual place of its privilege level.
    at: int | None = None
    registers: Mapping[str, Value] = field(default_factory=dict)
    rflags: int = 0
    smap: bool = True
    smep: bool = True
    cr4: int = 0
    cr3: int = 0
    #: CR4.LASS at the start, where *lass* is expected.
    enabled: bool = True
    sregs: Mapping[str, object] = field(default_factory=dict)
    msrs: Mapping[int, Value] = field(default_factory=dict)
    setup: tuple[Step, ...] = ()
    #: The linear address whose page is watched for :class:`Effect`.
    operand: int | None = None
    #: Pages, by a linear address in each, that the ``mmio`` variant maps to where no memory is; empty: no such variant.
    mmio: tuple[int, ...] = ()
    #: Whether the instruction under test can carry the forced emulation prefix.
    forced: bool = True
    #: CPUID features that the case needs beside LASS, SMAP and SMEP, and those that its processor must not have.
    needs: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    #: Levels of page tables.
    levels: int = layout.DEFAULT_LEVELS
    #: How VMX comes in, where it does: the program is a part of L1, or it is L2.
    nested: Nested | None = None
    #: What the EPC holds, for a case with one.
    sgx: Enclaves | None = None

    @property
    def features(self) -> frozenset[str]:
        """All CPUID features that the case needs with LASS on."""
        lass = self.enabled or (self.nested is not None and self.nested.l1_lass)
        wanted = {"smap": self.smap, "smep": self.smep, "lass": lass}
        return self.needs | {name for name, needed in wanted.items() if needed}

    @property
    def bits(self) -> int:
        """How wide the program's code is."""
        return self.mode.bits

    @property
    def ac(self) -> bool:
        """RFLAGS.AC at the start."""
        return bool(self.rflags & RFLAGS_AC)
