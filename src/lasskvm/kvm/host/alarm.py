"""Getting a thread out of ``KVM_RUN`` at a deadline.

A signal that arrives just before ``KVM_RUN`` would be handled too early, and the guest would run on. So the signal of
an alarm, :data:`KICK`, is blocked in threads that run vCPUs, and let through by KVM while the guest runs
(``KVM_SET_SIGNAL_MASK``): one that is pending already makes ``KVM_RUN`` return EINTR at once. It is sent by a thread
that does nothing else; it never touches the guest.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from contextlib import suppress

__all__ = ["KICK", "Alarm"]

#: The signal of an :class:`Alarm`. It is blocked where it can arrive, so no handler sees it.
KICK = signal.SIGRTMIN

_this_thread = threading.local()


class Alarm:
    """Sends :data:`KICK` to a thread that is still busy at its deadline."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._deadline: float | None = None
        #: When the watching thread looks next. Deadlines that lie behind it need not wake it.
        self._looks_at = math.inf
        self._target = 0
        self._rang = False
        self._closed = False

    def set(self, deadline: float) -> None:
        """Kick the calling thread at *deadline* of ``time.monotonic()``, unless :meth:`cancel` comes first.

        From here on the thread has KICK blocked, for good: nothing could be lost or end the process that way.
        """
        if not getattr(_this_thread, "has_kick_blocked", False):
            signal.pthread_sigmask(signal.SIG_BLOCK, (KICK,))
            _this_thread.has_kick_blocked = True
        with self._condition:
            self._deadline = deadline
            self._target = threading.get_ident()
            if self._thread is None:
                self._start()
            elif deadline < self._looks_at:
                self._condition.notify()

    def cancel(self) -> bool:
        """No kick any more; one that has been sent is taken back. Returns whether it had been.

        To be called by the thread that has set the alarm.
        """
        with self._condition:
            self._deadline = None
            rang, self._rang = self._rang, False
            if rang:
                signal.sigtimedwait((KICK,), 0)
            return rang

    def close(self) -> None:
        """End the watching thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        # The thread inherits the mask: no signal of the process may be handled where it interrupts nothing.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread = threading.Thread(target=self._watch, name="lasskvm-alarm", daemon=True)
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)

    def _watch(self) -> None:
        with self._condition:
            while not self._closed:
                now = time.monotonic()
                if self._deadline is not None and self._deadline <= now:
                    self._deadline = None
                    self._rang = True
                    with suppress(ProcessLookupError):
                        signal.pthread_kill(self._target, KICK)
                self._looks_at = math.inf if self._deadline is None else self._deadline
                self._condition.wait(None if self._deadline is None else self._deadline - now)
