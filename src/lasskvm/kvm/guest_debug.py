"""The VMM's debugger (``KVM_SET_GUEST_DEBUG``): single steps, breakpoints of its own, INT3.

The guest sees none of it. Single steps are made by the emulator, one instruction at a time, on either engine, so
RFLAGS.TF stays the guest's. Breakpoints of the VMM take the place of the guest's debug registers in the state words for
as long as the guest runs; the guest's own are put back for its MOVs from and to them, and between two runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lasskvm.emulator.faults import DebugReport
from lasskvm.kvm.events import EventQueue, QueuedException
from lasskvm.kvm.structures import GuestDebug
from lasskvm.state import DR0, DR6, DR7, Words
from lasskvm.x86.exceptions import DB
from lasskvm.x86.registers import DR6_B0, DR6_FIXED, DR7_FIXED, DR7_GD

__all__ = ["GuestDebugger"]

_BREAKPOINTS = 4
_DR6_HITS = DR6_B0 * 0xF


class GuestDebugger:
    """The debugger of one vCPU; a :class:`~lasskvm.emulator.context.DebugMonitor`.

    ``singlestep`` and ``reports_int3`` are what :meth:`configure` was told, ``has_breakpoints`` whether the VMM's
    breakpoints are in force instead of the guest's.
    """

    def __init__(self, words: Words, events: EventQueue) -> None:
        self._words = words
        self._events = events
        self._guests = [0] * (_BREAKPOINTS + 1)
        self._dr6 = DR6_FIXED
        self.configure(GuestDebug())

    def configure(self, settings: GuestDebug) -> None:
        """Take *settings*; between two runs."""
        self.settings = settings
        self.singlestep = settings.enable and settings.singlestep
        self.reports_int3 = settings.enable and settings.use_sw_bp
        self.has_breakpoints = settings.enable and settings.breakpoints is not None

    @property
    def is_active(self) -> bool:
        """Whether there is anything to do."""
        return self.settings.enable

    @property
    def dr7(self) -> int:
        """DR7 as it is in force while the guest runs."""
        return self.settings.dr7 | DR7_FIXED if self.has_breakpoints else self._words[DR7]

    def enter(self) -> None:
        """The guest is about to run: put the VMM's breakpoints in force, if there are any."""
        if self.settings.breakpoints is None or not self.has_breakpoints:
            return
        words = self._words
        self._guests = [words[DR0 + number] for number in range(_BREAKPOINTS)] + [words[DR7]]
        for number, address in enumerate(self.settings.breakpoints):
            words[DR0 + number] = address
        # General detection is the guest's affair: it concerns MOVs, not addresses.
        words[DR7] = self.dr7 & ~DR7_GD | words[DR7] & DR7_GD

    def leave(self) -> None:
        """The guest has run: give it back its debug registers."""
        if not self.has_breakpoints:
            return
        words = self._words
        for number in range(_BREAKPOINTS):
            words[DR0 + number] = self._guests[number]
        words[DR7] = self._guests[_BREAKPOINTS] & ~DR7_GD | words[DR7] & DR7_GD

    @contextmanager
    def guest_registers(self) -> Iterator[None]:
        """While this is entered, DR0 to DR3 and DR7 of the state words are the guest's own."""
        self.leave()
        try:
            yield
        finally:
            self.enter()

    def note_dr6(self) -> None:
        """Direct execution is about to run, which records the hits of breakpoints in DR6 before it tells of them."""
        self._dr6 = self._words[DR6]

    def undo_dr6(self) -> None:
        """Give the guest back the DR6 of :meth:`note_dr6`."""
        self._words[DR6] = self._dr6

    def filter_debug_trap(self, dr6: int) -> int:
        """A #DB with the bits *dr6* is due: the bits that the guest gets.

        Raises :class:`DebugReport` for hits of the VMM's breakpoints; what else has come up at the same time waits
        for the next entry.
        """
        hits = dr6 & _DR6_HITS
        if not self.has_breakpoints or not hits:
            return dr6
        if dr6 != hits:
            self._events.queue_exception(QueuedException(DB, payload=dr6 & ~_DR6_HITS))
        raise DebugReport(DB, hits | DR6_FIXED)
