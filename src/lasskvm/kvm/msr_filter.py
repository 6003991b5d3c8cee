"""MSR filters: which accesses of the guest leave for the VMM (``KVM_X86_SET_MSR_FILTER``)."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from lasskvm.kvm.structures import MsrFilterRange

__all__ = ["MsrFilter"]

_MAX_RANGES = 16
_MAX_BITMAP_BYTES = 0x600
_BITS_PER_BYTE = 8
#: The x2APIC's MSRs, which KVM never filters.
_X2APIC_MSRS = range(0x800, 0x900)


class MsrFilter:
    """The filter of a VM: *ranges* in order, the first that covers an access decides, *default_allow* for the rest.

    Raises OSError as KVM does: E2BIG for more than 16 ranges, EINVAL for bitmaps that are too large or too small, and
    for a filter that denies everything without a range.

    >>> deny = MsrFilterRange(0x10, nmsrs=1, bitmap=b"\\0", read=False)
    >>> tsc_is_read_only = MsrFilter([deny])
    >>> tsc_is_read_only.allows(0x10, is_write=False), tsc_is_read_only.allows(0x10, is_write=True)
    (True, False)
    """

    def __init__(self, ranges: Sequence[MsrFilterRange], *, default_allow: bool = True) -> None:
        self.ranges = tuple(wanted for wanted in ranges if wanted.nmsrs)
        self.default_allow = default_allow
        if len(ranges) > _MAX_RANGES:
            raise _refusal(errno.E2BIG, f"it takes at most {_MAX_RANGES} ranges")
        if not default_allow and not self.ranges:
            raise _refusal(errno.EINVAL, "a filter that denies by default needs a range")
        for wanted in self.ranges:
            size = -(-wanted.nmsrs // _BITS_PER_BYTE)
            if size > _MAX_BITMAP_BYTES or len(wanted.bitmap) < size:
                raise _refusal(
                    errno.EINVAL,
                    f"{wanted.nmsrs} MSRs take a bitmap of {size} bytes, of {_MAX_BITMAP_BYTES} at most",
                )

    def allows(self, index: int, is_write: bool) -> bool:
        """Whether the guest may access MSR *index*; otherwise the VMM is asked."""
        if index in _X2APIC_MSRS:
            return True
        for wanted in self.ranges:
            covers = wanted.write if is_write else wanted.read
            place = index - wanted.base
            if covers and 0 <= place < wanted.nmsrs:
                return bool(wanted.bitmap[place // _BITS_PER_BYTE] >> place % _BITS_PER_BYTE & 1)
        return self.default_allow


def _refusal(number: int, reason: str) -> OSError:
    return OSError(number, f"KVM_X86_SET_MSR_FILTER: {reason}")
