"""What direct execution intercepts, SVM style: instructions and register accesses that the emulator executes."""

from __future__ import annotations

from lasskvm.engine import context as c
from lasskvm.engine import private

__all__ = ["Intercepts"]

_INTERCEPTED = (
    c.SVM_EXIT_INTR, c.SVM_EXIT_IDTR_READ, c.SVM_EXIT_GDTR_READ, c.SVM_EXIT_LDTR_READ, c.SVM_EXIT_TR_READ,
    c.SVM_EXIT_IDTR_WRITE, c.SVM_EXIT_GDTR_WRITE, c.SVM_EXIT_LDTR_WRITE, c.SVM_EXIT_TR_WRITE,
    c.SVM_EXIT_RDPMC, c.SVM_EXIT_CPUID, c.SVM_EXIT_SWINT, c.SVM_EXIT_INVD, c.SVM_EXIT_HLT, c.SVM_EXIT_INVLPG,
    c.SVM_EXIT_MSR, c.SVM_EXIT_ICEBP, c.SVM_EXIT_WBINVD, c.SVM_EXIT_MONITOR, c.SVM_EXIT_MWAIT, c.SVM_EXIT_XSETBV,
)  # fmt: skip
# Masks of control registers. CR0 is read by SMSW, too; CR4 differs from what the translator has.
_CR0, _CR3, _CR4, _CR8 = 1 << 0, 1 << 3, 1 << 4, 1 << 8
_CR_READS = _CR0 | _CR4 | _CR8
_CR_WRITES = _CR0 | _CR3 | _CR4 | _CR8
_ALL_DEBUG_REGISTERS = 0xFF


class Intercepts:
    """The intercepts of one instance, which is put into SVM guest mode for them.

    *env* is the address of its CPU state, *vmcb_gpa* as for :func:`lasskvm.engine.private.set_intercepts`.
    """

    def __init__(self, env: int, vmcb_gpa: int) -> None:
        self._env = env
        self._nmis_are_blocked = self._cr3_reads = self._pauses = False
        private.set_intercepts(
            env, vmcb_gpa, _CR_READS, _CR_WRITES, _ALL_DEBUG_REGISTERS, _ALL_DEBUG_REGISTERS
        )
        self._apply()

    def follow(self, *, nmis_are_blocked: bool) -> None:
        """Intercept IRET while NMIs are blocked: behind it, one that waits is due at once."""
        if nmis_are_blocked != self._nmis_are_blocked:
            self._nmis_are_blocked = nmis_are_blocked
            self._apply()

    def add(self, *, cr3_reads: bool, pauses: bool) -> None:
        """Intercept MOV from CR3 and PAUSE, too, or no more."""
        if (cr3_reads, pauses) != (self._cr3_reads, self._pauses):
            self._cr3_reads, self._pauses = cr3_reads, pauses
            private.set_cr_read_intercepts(self._env, _CR_READS | (_CR3 if cr3_reads else 0))
            self._apply()

    def _apply(self) -> None:
        codes = set(_INTERCEPTED)
        if self._nmis_are_blocked:
            codes.add(c.SVM_EXIT_IRET)
        if self._pauses:
            codes.add(c.SVM_EXIT_PAUSE)
        private.set_instruction_intercepts(
            self._env, sum(1 << (code - c.SVM_EXIT_FIRST_INSTRUCTION) for code in codes)
        )
