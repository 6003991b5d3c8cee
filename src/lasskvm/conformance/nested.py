"""How VMX comes into a conformance case, as data: how far L1 has got, what it gives L2, what it does behind VM exits.

A case with a :class:`Nested` runs in :class:`~lasskvm.conformance.nested_testbed.NestedTestbed`, which plays L1. The
case's program is either a piece of L1 itself (:attr:`Stage.ENABLED` to :attr:`Stage.CURRENT`), or it is L2
(:attr:`Stage.GUEST`). L2 has the tables, the handlers and the page tables of L1, and halts as L1 would; L1 takes each
HLT of it for its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField

__all__ = ["Ept", "Nested", "Stage", "Turn"]


class Stage(Enum):
    """How far L1 has got when the case's program starts."""

    #: CR4.VMXE is 1; no VMXON yet. The program is L1's.
    ENABLED = "VMX is enabled"
    #: In VMX root operation, without a current VMCS. The program is L1's.
    ROOT = "VMX root operation"
    #: A VMCS is current. The program is L1's.
    CURRENT = "a VMCS is current"
    #: The program is L2.
    GUEST = "L2"


@dataclass(frozen=True)
class Ept:
    """EPT tables that map everything one to one, with exceptions.

    *pages* are guest-physical pages of L2 and the low bits (``EPT_R``, ``EPT_W``, ``EPT_X``) of the entries that they
    have instead; 0 is an absent page.
    """

    pages: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Turn:
    """L2 exits for *reason*; L1 executes *program*, and resumes L2.

    The program finds the linear address of the page-table entry of the case's operand in RSI, that of its EPT entry in
    RDI, and a place for descriptors in RBX; L2's registers are put back behind it. With *skips*, L2 goes on behind the
    instruction that has exited. Without *resumes* the case ends in L1: what becomes of *program* is its outcome, with
    *registers* at its start, and labels of its own.
    """

    program: str = "nop"
    reason: ExitReason = ExitReason.VMCALL
    skips: bool = True
    resumes: bool = True
    registers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Nested:
    """The part of L1 in a case. The fields behind *stage* count for :attr:`Stage.GUEST` only."""

    stage: Stage = Stage.GUEST
    #: CR4.LASS of L1 at VM entry; and behind VM exits, when *host_lass* does not say otherwise.
    l1_lass: bool = True
    host_lass: bool | None = None
    #: EPT, where L1 uses it.
    ept: Ept | None = None
    #: The VPID that L1 gives to L2; 0: none.
    vpid: int = 0
    #: The exceptions that exit: a bit for each vector.
    exceptions: int = 0
    #: Bits of CR4 that L1 owns, and what L2 reads in them.
    cr4_mask: int = 0
    cr4_shadow: int = 0
    #: VMCS fields that differ from what the rest says, and secondary controls to add.
    fields: Mapping[VmcsField, int] = field(default_factory=dict)
    secondary: int = 0
    #: What L1 does behind the first exits, one after the other. Behind an exit that none is for, the case ends.
    turns: tuple[Turn, ...] = ()
