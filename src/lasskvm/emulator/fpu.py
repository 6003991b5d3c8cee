"""x87, MMX and SSE registers of one vCPU, and what they do on their own account.

They are no state words: in direct execution they stay in the translator, and instructions reach them through an object
with the interface :class:`Fpu`; where there is no translator, :class:`FpuState` holds them. Physical x87 registers are
numbered R0 to R7, ``ST(i)`` is R(TOP + i), and MMX register *n* is the low half of R *n*.

Source: Intel SDM volume 1, 8.1 (x87 FPU execution environment), 9.2.1 (MMX state), 10.2 (SSE state).
"""

from __future__ import annotations

from typing import Protocol

from lasskvm.x86.fpu import (
    EXCEPTIONS,
    FCW_FIXED,
    FCW_INITIAL,
    FCW_WRITABLE,
    FSW_B,
    FSW_ES,
    FSW_TOP,
    FSW_TOP_SHIFT,
    MXCSR_INITIAL,
    TAG_EMPTY,
    TAG_SPECIAL,
    TAG_VALID,
    TAG_ZERO,
)
from lasskvm.x86.registers import MASK64

__all__ = [
    "ALL_TAGS",
    "Fpu",
    "FpuState",
    "Registers",
    "abridged_tags",
    "copy_fpu",
    "enter_mmx",
    "full_tag_word",
    "initialize",
    "read_mmx",
    "set_control_word",
    "set_status_word",
    "status_word",
    "update_summary",
    "write_mmx",
]

XMM_REGISTERS = 16
XMM_BYTES = 16
X87_REGISTERS = 8
X87_BYTES = 10
#: The room that an x87 register has in FXSAVE images.
X87_SPACING = 16
#: Abridged tags of eight registers in use.
ALL_TAGS = (1 << X87_REGISTERS) - 1

_STATUS_MASK = 0xFFFF & ~FSW_TOP
_EXPONENT_SHIFT = 64
_EXPONENT_MASK = 0x7FFF
_INTEGER_BIT = 1 << 63
#: What a write of an MMX register leaves in bits 79:64 of the x87 register (SDM volume 1, 9.2.1).
_MMX_EXPONENT = 0xFFFF << _EXPONENT_SHIFT


class Registers(Protocol):
    """Some registers of one kind, by number."""

    def __getitem__(self, number: int, /) -> int:
        """The value of register *number*, unsigned."""
        ...

    def __setitem__(self, number: int, value: int, /) -> None:
        """Set register *number*; *value* must fit."""
        ...


class Fpu(Protocol):
    """The registers, wherever they are kept.

    ``fsw`` is the status word without TOP, which is ``top``. ``ftw`` is the abridged tag word: bit *n* is set when
    R *n* is in use. The last x87 instruction that is no control instruction was at ``fcs``:``fip``, its last operand in
    memory at ``fds``:``fdp``. ``fop`` is for its opcode (11 bits), which processors have long ceased to note; it is
    only loaded and stored.
    """

    mxcsr: int
    fcw: int
    fsw: int
    top: int
    ftw: int
    fop: int
    fip: int
    fcs: int
    fdp: int
    fds: int

    @property
    def xmm(self) -> Registers:
        """XMM0 to XMM15, of 128 bits."""
        ...

    @property
    def registers(self) -> Registers:
        """R0 to R7, of 80 bits."""
        ...

    def xmm_image(self, count: int) -> bytes:
        """XMM0 to XMM(*count* - 1) as they lie in memory."""
        ...

    def load_xmm_image(self, image: bytes) -> None:
        """Set as many registers, from XMM0 on, as *image* has."""
        ...

    def x87_image(self) -> bytes:
        """R0 to R7 in :data:`X87_SPACING` bytes each, zeros behind their 80 bits."""
        ...

    def load_x87_image(self, image: bytes) -> None:
        """The inverse of :meth:`x87_image`; what is behind the 80 bits does not matter."""
        ...


class FpuState:
    """Registers with storage of their own, as they are in a new vCPU (KVM's ``fpstate_init_user()``)."""

    __slots__ = (
        "fcs", "fcw", "fdp", "fds", "fip", "fop", "fsw", "ftw", "mxcsr", "registers", "top", "xmm",
    )  # fmt: skip

    def __init__(self) -> None:
        self.xmm = [0] * XMM_REGISTERS
        self.registers = [0] * X87_REGISTERS
        self.mxcsr = MXCSR_INITIAL
        self.fcw = FCW_INITIAL
        self.fsw = self.top = self.ftw = 0
        self.fop = self.fip = self.fcs = self.fdp = self.fds = 0

    def xmm_image(self, count: int) -> bytes:
        """XMM0 to XMM(*count* - 1) as they lie in memory."""
        return b"".join([value.to_bytes(XMM_BYTES, "little") for value in self.xmm[:count]])

    def load_xmm_image(self, image: bytes) -> None:
        """Set as many registers, from XMM0 on, as *image* has."""
        for number in range(len(image) // XMM_BYTES):
            start = XMM_BYTES * number
            self.xmm[number] = int.from_bytes(image[start : start + XMM_BYTES], "little")

    def x87_image(self) -> bytes:
        """R0 to R7 in :data:`X87_SPACING` bytes each, zeros behind their 80 bits."""
        return b"".join([value.to_bytes(X87_SPACING, "little") for value in self.registers])

    def load_x87_image(self, image: bytes) -> None:
        """The inverse of :meth:`x87_image`; what is behind the 80 bits does not matter."""
        for number in range(X87_REGISTERS):
            start = X87_SPACING * number
            self.registers[number] = int.from_bytes(image[start : start + X87_BYTES], "little")


def copy_fpu(source: Fpu, target: Fpu) -> None:
    """Make the registers of *target* those of *source*."""
    for number in range(XMM_REGISTERS):
        target.xmm[number] = source.xmm[number]
    for number in range(X87_REGISTERS):
        target.registers[number] = source.registers[number]
    target.mxcsr, target.fcw, target.fsw = source.mxcsr, source.fcw, source.fsw
    target.top, target.ftw = source.top, source.ftw
    target.fop = source.fop
    target.fip, target.fcs = source.fip, source.fcs
    target.fdp, target.fds = source.fdp, source.fds


def initialize(fpu: Fpu) -> None:
    """FNINIT: the x87 registers become empty, keeping their bits, and control and status are as after reset."""
    fpu.fcw = FCW_INITIAL
    fpu.fsw = fpu.top = fpu.ftw = 0
    fpu.fop = fpu.fip = fpu.fcs = fpu.fdp = fpu.fds = 0


def status_word(fpu: Fpu) -> int:
    """The x87 status word, TOP included."""
    return fpu.fsw | fpu.top << FSW_TOP_SHIFT


def set_status_word(fpu: Fpu, value: int) -> None:
    """Load the status word, TOP included. ES and B follow from the exceptions and the masks of the control word."""
    fpu.fsw = value & _STATUS_MASK
    fpu.top = (value & FSW_TOP) >> FSW_TOP_SHIFT
    update_summary(fpu)


def set_control_word(fpu: Fpu, value: int) -> None:
    """Load the control word. An exception that this unmasks is pending from now on."""
    fpu.fcw = value & FCW_WRITABLE | FCW_FIXED
    update_summary(fpu)


def update_summary(fpu: Fpu) -> None:
    """Make ES and B say whether an unmasked exception is pending."""
    status = fpu.fsw & ~(FSW_ES | FSW_B)
    if status & ~fpu.fcw & EXCEPTIONS:
        status |= FSW_ES | FSW_B
    fpu.fsw = status


def full_tag_word(fpu: Fpu) -> int:
    """The tag word of 16 bits, as FNSTENV stores it."""
    tags = 0
    for number in range(X87_REGISTERS):
        tag = _tag_of(fpu.registers[number]) if fpu.ftw >> number & 1 else TAG_EMPTY
        tags |= tag << 2 * number
    return tags


def abridged_tags(tag_word: int) -> int:
    """The abridged form of a full tag word: a bit for each register in use."""
    return sum((tag_word >> 2 * number & 3 != TAG_EMPTY) << number for number in range(X87_REGISTERS))


def _tag_of(value: int) -> int:
    significand = value & MASK64
    exponent = value >> _EXPONENT_SHIFT & _EXPONENT_MASK
    if exponent == 0 and significand == 0:
        return TAG_ZERO
    if exponent in (0, _EXPONENT_MASK) or not significand & _INTEGER_BIT:
        return TAG_SPECIAL
    return TAG_VALID


def enter_mmx(fpu: Fpu) -> None:
    """What every MMX instruction but EMMS does: TOP becomes 0 and all registers are in use."""
    fpu.top = 0
    fpu.ftw = ALL_TAGS


def read_mmx(fpu: Fpu, number: int) -> int:
    """MMX register *number*."""
    return fpu.registers[number] & MASK64


def write_mmx(fpu: Fpu, number: int, value: int) -> None:
    """Set MMX register *number*; the rest of the x87 register becomes all ones."""
    fpu.registers[number] = _MMX_EXPONENT | value
