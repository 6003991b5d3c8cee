"""Unicorn's private x87 and SSE registers: the part of :mod:`lasskvm.engine.private` that only Python uses.

They are members of ``CPUX86State`` ("env"); :mod:`lasskvm.engine.calibration` checks the layout.
"""

from __future__ import annotations

import ctypes

__all__ = ["FpuFields", "fpu_fields"]

_FPU = 0x25C


class FpuFields(ctypes.Structure):
    """The x87 and SSE registers in CPUX86State, between them the translator's own copies of rounding and masks.

    ``fptags`` are 1 for empty registers; ``fpregs`` has 80 bits for each, ``xmm_regs`` what would be ZMM registers.
    """

    _pack_ = 1
    _fields_ = (
        ("fpstt", ctypes.c_uint32), ("fpus", ctypes.c_uint16), ("fpuc", ctypes.c_uint16),
        ("fptags", ctypes.c_uint8 * 8), ("_1", ctypes.c_uint32), ("fpregs", ctypes.c_uint8 * 16 * 8),
        ("fpop", ctypes.c_uint16), ("fpcs", ctypes.c_uint16), ("fpds", ctypes.c_uint16), ("_2", ctypes.c_uint16),
        ("fpip", ctypes.c_uint64),
        ("fpdp", ctypes.c_uint64), ("_3", ctypes.c_uint64 * 5), ("mxcsr", ctypes.c_uint32), ("_4", ctypes.c_uint32),
        ("xmm_regs", ctypes.c_uint8 * 64 * 16),
    )  # fmt: skip


def fpu_fields(env: int) -> FpuFields:
    """The x87 and SSE registers, to read and, but for ``fpuc`` and ``mxcsr``, to write."""
    return FpuFields.from_address(env + _FPU)
