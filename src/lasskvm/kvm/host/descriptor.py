"""An owned file descriptor: what a system, a VM and a vCPU of the host are."""

from __future__ import annotations

import os
import weakref

__all__ = ["Descriptor"]

#: What a closed object has: every ioctl on it fails with EBADF.
_CLOSED = -1


class Descriptor:
    """File descriptor *number*, closed by :meth:`close` or with the last reference to this object."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._finalizer = weakref.finalize(self, os.close, number)

    def close(self) -> None:
        """Give it back; once is enough, more does no harm."""
        self.number = _CLOSED
        self._finalizer()
