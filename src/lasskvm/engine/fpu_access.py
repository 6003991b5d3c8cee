"""x87 and SSE registers of direct execution, for instructions that are emulated amid it.

:class:`FpuAccess` is an :class:`~lasskvm.emulator.fpu.Fpu` that has nothing of its own: what an emulated instruction
writes, the next translated one reads, and the other way round.
"""

from __future__ import annotations

import ctypes

import numpy as np
from unicorn import x86_const
from unicorn.unicorn_py3.unicorn import uclib

from lasskvm.emulator.fpu import (
    ALL_TAGS,
    X87_BYTES,
    X87_REGISTERS,
    X87_SPACING,
    XMM_BYTES,
    Fpu,
    Registers,
    copy_fpu,
)
from lasskvm.engine import context as c
from lasskvm.engine.engine import Engine
from lasskvm.engine.private_fpu import fpu_fields
from lasskvm.x86.fpu import FSW_TOP

__all__ = ["FpuAccess"]

_NUMBER_MASK = X87_REGISTERS - 1
#: What the translator's tags are for each abridged tag word: a byte for each register, 1 for an empty one.
_TAGS = [bytes(1 - (word >> number & 1) for number in range(X87_REGISTERS)) for word in range(ALL_TAGS + 1)]
_ABRIDGED_TAGS = {tags: word for word, tags in enumerate(_TAGS)}


class _Registers:
    """Registers of *size* bytes, *spacing* bytes apart."""

    def __init__(self, array: ctypes.Array[ctypes.Array[ctypes.c_uint8]], size: int) -> None:
        self._bytes = np.ctypeslib.as_array(array).reshape(-1).data
        self._spacing = ctypes.sizeof(array[0])
        self._size = size

    def __getitem__(self, number: int) -> int:
        start = self._spacing * number
        return int.from_bytes(self._bytes[start : start + self._size], "little")

    def __setitem__(self, number: int, value: int) -> None:
        start = self._spacing * number
        self._bytes[start : start + self._size] = value.to_bytes(self._size, "little")


class FpuAccess:
    """The registers of *engine*, which become those of *initial*."""

    def __init__(self, engine: Engine, initial: Fpu) -> None:
        self._handle = ctypes.c_void_p(int(engine.context[c.UC]))
        self._fields = fpu_fields(int(engine.context[c.ENV]))
        self._xmm = _Registers(self._fields.xmm_regs, XMM_BYTES)
        self._registers = _Registers(self._fields.fpregs, X87_BYTES)
        self._xmm_rows = np.ctypeslib.as_array(self._fields.xmm_regs)[:, :XMM_BYTES]
        self._x87_rows = np.ctypeslib.as_array(self._fields.fpregs)[:, :X87_BYTES]
        self._tags = np.ctypeslib.as_array(self._fields.fptags).data
        copy_fpu(initial, self)

    @property
    def xmm(self) -> Registers:
        """XMM0 to XMM15, of 128 bits."""
        return self._xmm

    @property
    def registers(self) -> Registers:
        """R0 to R7, of 80 bits."""
        return self._registers

    def xmm_image(self, count: int) -> bytes:
        """XMM0 to XMM(*count* - 1) as they lie in memory."""
        return self._xmm_rows[:count].tobytes()

    def load_xmm_image(self, image: bytes) -> None:
        """Set as many registers, from XMM0 on, as *image* has."""
        rows = np.frombuffer(image, np.uint8).reshape(-1, XMM_BYTES)
        self._xmm_rows[: len(rows)] = rows

    def x87_image(self) -> bytes:
        """R0 to R7 in 16 bytes each, zeros behind their 80 bits."""
        rows = np.zeros((X87_REGISTERS, X87_SPACING), np.uint8)
        rows[:, :X87_BYTES] = self._x87_rows
        return rows.tobytes()

    def load_x87_image(self, image: bytes) -> None:
        """The inverse of :meth:`x87_image`; what is behind the 80 bits does not matter."""
        rows = np.frombuffer(image, np.uint8).reshape(X87_REGISTERS, X87_SPACING)
        self._x87_rows[:] = rows[:, :X87_BYTES]

    @property
    def mxcsr(self) -> int:
        """MXCSR."""
        return int(self._fields.mxcsr)

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        """Set what :attr:`mxcsr` gives."""
        # The translator keeps rounding and flushing apart, too; its own function for writes knows how.
        if value != self._fields.mxcsr:
            self._write(x86_const.UC_X86_REG_MXCSR, ctypes.c_uint32(value))

    @property
    def fcw(self) -> int:
        """The x87 control word."""
        return int(self._fields.fpuc)

    @fcw.setter
    def fcw(self, value: int) -> None:
        """Set what :attr:`fcw` gives."""
        if value != self._fields.fpuc:
            self._write(x86_const.UC_X86_REG_FPCW, ctypes.c_uint16(value))

    def _write(self, register: int, value: ctypes.c_uint32 | ctypes.c_uint16) -> None:
        uclib.uc_reg_write(self._handle, register, ctypes.byref(value))

    @property
    def fsw(self) -> int:
        """The x87 status word without TOP."""
        return int(self._fields.fpus) & ~FSW_TOP

    @fsw.setter
    def fsw(self, value: int) -> None:
        """Set what :attr:`fsw` gives."""
        self._fields.fpus = value

    @property
    def top(self) -> int:
        """TOP."""
        return int(self._fields.fpstt) & _NUMBER_MASK

    @top.setter
    def top(self, value: int) -> None:
        """Set what :attr:`top` gives."""
        self._fields.fpstt = value

    @property
    def ftw(self) -> int:
        """The abridged tag word: a bit for each register in use."""
        return _ABRIDGED_TAGS[bytes(self._tags)]

    @ftw.setter
    def ftw(self, value: int) -> None:
        """Set what :attr:`ftw` gives."""
        self._tags[:] = _TAGS[value]

    @property
    def fop(self) -> int:
        """The opcode of the last x87 instruction."""
        return int(self._fields.fpop)

    @fop.setter
    def fop(self, value: int) -> None:
        """Set what :attr:`fop` gives."""
        self._fields.fpop = value

    @property
    def fip(self) -> int:
        """The offset of the last x87 instruction."""
        return int(self._fields.fpip)

    @fip.setter
    def fip(self, value: int) -> None:
        """Set what :attr:`fip` gives."""
        self._fields.fpip = value

    @property
    def fcs(self) -> int:
        """The code segment of the last x87 instruction."""
        return int(self._fields.fpcs)

    @fcs.setter
    def fcs(self, value: int) -> None:
        """Set what :attr:`fcs` gives."""
        self._fields.fpcs = value

    @property
    def fds(self) -> int:
        """The segment of the operand of the last x87 instruction."""
        return int(self._fields.fpds)

    @fds.setter
    def fds(self, value: int) -> None:
        """Set what :attr:`fds` gives."""
        self._fields.fpds = value

    @property
    def fdp(self) -> int:
        """The offset of the operand of the last x87 instruction."""
        return int(self._fields.fpdp)

    @fdp.setter
    def fdp(self, value: int) -> None:
        """Set what :attr:`fdp` gives."""
        self._fields.fpdp = value
