"""x87 and SSE registers of direct execution, for instructions that are emulated amid it.

:class:`FpuAccess` is an :class:`~lasskvm.emulator.fpu.Fpu` that has nothing of its own: what an emulated instruction
writes, the next translated one reads, and the other way round.
"""

from __future__ import annotations

import ctypes

import numpy as np
from unicorn import x86_const
from unicorn.unicorn_py3.unicorn import uclib

from lasskvm.emulator.fpu import X87_REGISTERS, Fpu, Registers, copy_fpu
from lasskvm.engine import context as c
from lasskvm.engine.engine import Engine
from lasskvm.engine.private_fpu import fpu_fields
from lasskvm.x86.fpu import FSW_TOP

__all__ = ["FpuAccess"]

_XMM_BYTES = 16
_X87_BYTES = 10
_NUMBER_MASK = X87_REGISTERS - 1
_EMPTY = 1


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
        self._xmm = _Registers(self._fields.xmm_regs, _XMM_BYTES)
        self._registers = _Registers(self._fields.fpregs, _X87_BYTES)
        copy_fpu(initial, self)

    @property
    def xmm(self) -> Registers:
        """XMM0 to XMM15, of 128 bits."""
        return self._xmm

    @property
    def registers(self) -> Registers:
        """R0 to R7, of 80 bits."""
        return self._registers

    @property
    def mxcsr(self) -> int:
        """MXCSR."""
        return int(self._fields.mxcsr)

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        """Set what :attr:`mxcsr` gives."""
        # The translator keeps rounding and flushing apart, too; its own function for writes knows how.
        self._write(x86_const.UC_X86_REG_MXCSR, ctypes.c_uint32(value))

    @property
    def fcw(self) -> int:
        """The x87 control word."""
        return int(self._fields.fpuc)

    @fcw.setter
    def fcw(self, value: int) -> None:
        """Set what :attr:`fcw` gives."""
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
        return sum((tag != _EMPTY) << number for number, tag in enumerate(self._fields.fptags))

    @ftw.setter
    def ftw(self, value: int) -> None:
        """Set what :attr:`ftw` gives."""
        for number in range(X87_REGISTERS):
            self._fields.fptags[number] = 0 if value >> number & 1 else _EMPTY

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
