"""The x87 and SSE registers as a case finds them, and what they are at its end.

They are no state words. Where a case starts from follows from its ``data_seed``: numbers of all kinds in the registers,
some of the x87 registers empty, most of the time everything masked.
"""

from __future__ import annotations

import random
from functools import cache

from lasskvm.emulator.fpu import X87_REGISTERS, XMM_REGISTERS, Fpu, FpuState

__all__ = ["FpuImage", "fpu_image", "start_fpu"]

#: All registers: XMM0 to XMM15, R0 to R7, then the fields named by ``FIELDS``.
FpuImage = tuple[int, ...]
FIELDS = ("mxcsr", "fcw", "fsw", "top", "ftw", "fop", "fip", "fdp")

_VARIANTS = 256
_MXCSR_VALUES = (0x1F80,) * 8 + (0x3F80, 0x7F80, 0x9FC0, 0x1FA5)
_FCW_VALUES = (0x37F,) * 8 + (0x27F, 0xF7F, 0x77F, 0x07F)
#: Floating-point numbers of 32 bits: zeros, ones, the largest, the smallest, infinities, NaNs.
_SINGLES = (
    0, 0x8000_0000, 0x3F80_0000, 0xBF80_0000, 0x4000_0000, 0x7F7F_FFFF, 0x0080_0000, 0x0000_0001, 0x7F80_0000,
    0xFF80_0000, 0x7FC0_0000, 0x7F80_0001, 0x4F00_0000, 0x4B00_0001,
)  # fmt: skip
_DOUBLES = (
    0, 1 << 63, 0x3FF0 << 48, 0xBFF0 << 48, 0x4008 << 48, 0x7FEF_FFFF_FFFF_FFFF, 1, 0x7FF0 << 48, 0xFFF0 << 48,
    0x7FF8 << 48, 0x7FF0_0000_0000_0001, 0x41E0 << 48, 0x43E0 << 48,
)  # fmt: skip
#: The same of 80 bits: exponent and significand.
_EXTENDED = (
    0, 1 << 79, 0x3FFF << 64 | 1 << 63, 0xBFFF << 64 | 1 << 63, 0x4000 << 64 | 0xC000 << 48, 0x7FFF << 64 | 1 << 63,
    0x7FFF << 64 | 0xC000 << 48, 0x7FFF << 64 | 0xA000 << 48, 1, 0x4005 << 64 | 0x9000 << 48, 0x403E << 64 | 1 << 63,
)  # fmt: skip


@cache
def start_fpu(data_seed: int) -> FpuState:
    """The registers of a case with *data_seed*; for 0 those of a new processor."""
    if data_seed >= _VARIANTS:
        return start_fpu(1 + data_seed % (_VARIANTS - 1))
    state = FpuState()
    if not data_seed:
        return state
    rng = random.Random(data_seed)
    for number in range(XMM_REGISTERS):
        state.xmm[number] = _xmm(rng)
    for number in range(X87_REGISTERS):
        state.registers[number] = _extended(rng)
    state.ftw = rng.choice((0, 0xFF, rng.getrandbits(8), rng.getrandbits(8)))
    state.top = rng.choice((0, rng.randrange(X87_REGISTERS)))
    state.mxcsr, state.fcw = rng.choice(_MXCSR_VALUES), rng.choice(_FCW_VALUES)
    return state


def _xmm(rng: random.Random) -> int:
    kind = rng.randrange(4)
    if kind == 0:
        return sum(rng.choice(_SINGLES) << 32 * lane for lane in range(4))
    if kind == 1:
        return sum(rng.choice(_DOUBLES) << 64 * lane for lane in range(2))
    return rng.getrandbits(128) if kind == 2 else rng.randrange(256)


def _extended(rng: random.Random) -> int:
    if rng.random() < 0.7:
        return rng.choice(_EXTENDED)
    # A number between 2**-16 and 2**16.
    return rng.choice((0, 1 << 79)) | (0x3FFF + rng.randrange(-16, 17)) << 64 | 1 << 63 | rng.getrandbits(63)


def fpu_image(fpu: Fpu) -> FpuImage:
    """What *fpu* holds now."""
    xmm, registers = fpu.xmm, fpu.registers
    return (
        *(xmm[number] for number in range(XMM_REGISTERS)),
        *(registers[number] for number in range(X87_REGISTERS)),
        *(getattr(fpu, name) for name in FIELDS),
    )


def names() -> tuple[str, ...]:
    """The names of what a :data:`FpuImage` holds, in order."""
    xmm = (f"xmm{number}" for number in range(XMM_REGISTERS))
    return *xmm, *(f"r{number} (x87)" for number in range(X87_REGISTERS)), *FIELDS
