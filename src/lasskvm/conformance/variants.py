"""The ways in which a case is run, and which of them make sense where.

Every case runs with LASS on. For most there is also the contrast without it, the same under forced emulation, and the
same with the operand in MMIO, where a KVM must emulate, whatever the processor could do by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from iced_x86 import Decoder, Mnemonic

from lasskvm.conformance.backends import Backend, missing_features
from lasskvm.conformance.case import ACCESS, Case, Ending, Expected
from lasskvm.x86.cpuid import CpuidEntry

__all__ = ["Variant", "VariantRun", "plan", "why_not"]


class Variant(Enum):
    """How a case is run."""

    #: CR4.LASS = 1 (or, for cases about CR4.LASS itself, as they say).
    LASS = "lass"
    #: CR4.LASS = 0: what happens without.
    OFF = "off"
    #: The instruction under test has KVM's forced emulation prefix.
    FORCED = "forced"
    #: The operand's page is mapped to where no memory is.
    MMIO = "mmio"


@dataclass(frozen=True)
class VariantRun:
    """A case in one of its variants."""

    case: Case
    variant: Variant

    @property
    def expected(self) -> Expected:
        """What has to become of it."""
        if self.variant is Variant.OFF:
            assert self.case.off is not None
            return self.case.off
        return self.case.lass

    @property
    def lass(self) -> bool:
        """CR4.LASS at the start."""
        return self.case.enabled and self.variant is not Variant.OFF

    @property
    def name(self) -> str:
        """The case's id with the variant."""
        return f"{self.case.id} [{self.variant.value}]"


def plan(cases: Iterable[Case]) -> Iterator[VariantRun]:
    """All runs of *cases*, each case's together, LASS first."""
    for case in cases:
        yield VariantRun(case, Variant.LASS)
        if case.off is not None:
            yield VariantRun(case, Variant.OFF)
        if case.forced and f"{ACCESS}:" in case.program:
            yield VariantRun(case, Variant.FORCED)
        if case.mmio:
            yield VariantRun(case, Variant.MMIO)


def why_not(run: VariantRun, backend: Backend, entries: list[CpuidEntry], code: bytes) -> str:
    """Why *run* cannot be made on *backend*, whose processor has *entries*; empty when it can.

    *code* are the bytes of the instruction under test.
    """
    case = run.case
    missing = missing_features(entries, case.features)
    if "lass" in missing:
        return "the KVM of this host does not offer LASS to guests"
    if missing:
        return f"the processor of this provider lacks {', '.join(missing)}"
    if case.sgx is not None and (reason := backend.why_no_epc()):
        return reason
    if run.variant is Variant.FORCED and (reason := backend.why_not_forced()):
        return reason
    if run.variant in (Variant.FORCED, Variant.MMIO) and backend.emulates_like_kvm:
        needs_emulator = run.variant is Variant.FORCED or case.lass.ending is not Ending.EVENT
        mnemonic = Decoder(case.bits, code).decode().mnemonic
        if needs_emulator and mnemonic in _NOT_IN_KVMS_EMULATOR:
            return "KVM's emulator does not know this instruction"
    return ""


#: Of the instructions under test, those that KVM's emulator has no code for (its opcode tables in emulate.c).
_NOT_IN_KVMS_EMULATOR = frozenset(
    (
        Mnemonic.CLWB, Mnemonic.CMPXCHG16B, Mnemonic.CVTSI2SD, Mnemonic.ENCLS, Mnemonic.ENCLU, Mnemonic.ENTER,
        Mnemonic.FBLD, Mnemonic.FBSTP,
        Mnemonic.FILD, Mnemonic.FISTP, Mnemonic.FLD, Mnemonic.FLDCW, Mnemonic.FLDENV, Mnemonic.FNSAVE,
        Mnemonic.FNSTENV, Mnemonic.FRSTOR, Mnemonic.FSTP, Mnemonic.INT, Mnemonic.INT1, Mnemonic.INT3, Mnemonic.INVEPT,
        Mnemonic.INVPCID, Mnemonic.INVVPID, Mnemonic.IRETD, Mnemonic.IRETQ, Mnemonic.LAR, Mnemonic.LDDQU,
        Mnemonic.LDMXCSR, Mnemonic.LSL, Mnemonic.MASKMOVDQU, Mnemonic.MASKMOVQ, Mnemonic.MOVD, Mnemonic.MOVHPS,
        Mnemonic.MOVQ, Mnemonic.MOVSS, Mnemonic.PADDB, Mnemonic.PCMPISTRI, Mnemonic.PEXTRQ, Mnemonic.PINSRW,
        Mnemonic.POPCNT, Mnemonic.STMXCSR, Mnemonic.SWAPGS, Mnemonic.SYSRET, Mnemonic.SYSEXIT, Mnemonic.UD2,
        Mnemonic.VERR, Mnemonic.VERW, Mnemonic.VMCLEAR, Mnemonic.VMLAUNCH, Mnemonic.VMPTRLD, Mnemonic.VMPTRST,
        Mnemonic.VMREAD, Mnemonic.VMWRITE, Mnemonic.VMXOFF, Mnemonic.VMXON, Mnemonic.XRSTOR, Mnemonic.XRSTOR64,
        Mnemonic.XSAVE, Mnemonic.XSAVE64, Mnemonic.XSAVEOPT,
    )
)  # fmt: skip
