"""The LASS rule.

Linear Address Space Separation splits the linear address space by bit 63. This module is the only place where the
rule is written: the TLB fill calls it compiled, the emulator calls it as it is, and :func:`lass_violations` applies
the same function to NumPy arrays. It is written without branches, over plain integers, so that all three can.

Source: Intel Architecture Instruction Set Extensions Programming Reference, chapter "Linear Address Space Separation";
flags as in KVM's ``X86EMUL_F_*`` and ``vmx_is_lass_violation()``.

The flags say what an access *is*. Which of them LASS ignores is known here and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "BRANCH",
    "DT_LOAD",
    "FETCH",
    "IMPLICIT",
    "INVLPG",
    "MSR",
    "STACK",
    "WRITE",
    "is_lass_violation",
    "lass_violations",
]

#: The access writes (otherwise it reads).
WRITE = 1 << 0
#: An instruction fetch.
FETCH = 1 << 1
#: Made by the processor on its own account (GDT, LDT, IDT, TSS): supervisor-mode at any CPL, AC does not help.
IMPLICIT = 1 << 2
#: The address is only named by INVLPG, or stands inside an INVPCID or INVVPID descriptor.
INVLPG = 1 << 3
#: The address is written to a model-specific register.
MSR = 1 << 4
#: The address is loaded into a descriptor-table register.
DT_LOAD = 1 << 5
#: The address is loaded into RIP; the fetch at the target is another access.
BRANCH = 1 << 6
#: A stack access: a violation is #SS(0) and not #GP(0).
STACK = 1 << 7

_NAMED_ONLY = INVLPG | MSR | DT_LOAD | BRANCH

_CR4_SMAP_BIT = 21
_CR4_LASS_BIT = 27
_EFER_LMA_BIT = 10
_RFLAGS_AC_BIT = 18
_MASK64 = (1 << 64) - 1


def is_lass_violation(
    address: int, size: int, flags: int, cpl: int, cr4: int, efer: int, rflags: int
) -> bool:
    """Whether an access of *size* bytes at linear *address* violates LASS.

    *size* counts bytes (0 means the one address, as KVM has it; below 2**63); every byte must be on the allowed side,
    also where the access wraps past 2**64. *flags* is a union of this module's access flags. *cpl*, *cr4*, *efer* and
    *rflags* are the vCPU's. The caller untags LAM addresses first, and checks that the address is canonical first.

    A violation raises #GP(0), or #SS(0) for a ``STACK`` access; CR2 and the page tables stay untouched.

    >>> is_lass_violation(0xFFFF_8000_0000_0000, 8, 0, cpl=3, cr4=1 << 27, efer=1 << 10, rflags=0)
    True
    """
    active = (cr4 >> _CR4_LASS_BIT) & (efer >> _EFER_LMA_BIT) & ((flags & _NAMED_ONLY) == 0) & 1
    last = (address + size - (size != 0)) & _MASK64
    any_upper = (address | last) >> 63
    all_upper = (address & last) >> 63
    implicit = (flags & IMPLICIT) != 0
    fetch = (flags & FETCH) != 0
    user = (cpl == 3) & (implicit == 0)
    smap_applies = (cr4 >> _CR4_SMAP_BIT) & (((rflags >> _RFLAGS_AC_BIT) & 1 == 0) | implicit) & 1
    supervisor_violation = (all_upper == 0) & (fetch | (smap_applies != 0))
    return (active != 0) & ((user & (any_upper != 0)) | ((user == 0) & supervisor_violation))


def lass_violations(
    addresses: ArrayLike,
    sizes: ArrayLike,
    flags: ArrayLike,
    cpl: ArrayLike,
    cr4: ArrayLike,
    efer: ArrayLike,
    rflags: ArrayLike,
) -> NDArray[np.bool_]:
    """:func:`is_lass_violation` over arrays, broadcast against each other; all are taken as unsigned 64-bit.

    >>> lass_violations([0x1000, 1 << 63], 8, FETCH, 0, 1 << 27, 1 << 10, 0).tolist()
    [True, False]
    """
    import numpy as np

    arrays = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(a, np.uint64)) for a in (addresses, sizes, flags, cpl, cr4, efer, rflags))
    )
    result: NDArray[np.bool_] = is_lass_violation(*arrays)  # type: ignore[arg-type, assignment]
    return result
