"""Checking that the Unicorn at hand is laid out as :mod:`lasskvm.engine.private` says.

Each field is checked by what it does: a value written through Unicorn's public API must appear in the private field.
A different build is refused with one sentence before it can corrupt anything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import unicorn
from unicorn import x86_const
from unicorn.unicorn_py3.unicorn import uclib

from lasskvm.engine import private
from lasskvm.engine.private_fpu import fpu_fields
from lasskvm.errors import HostError
from lasskvm.state import CR2, DR6, KERNEL_GS_BASE, RFLAGS, Segment, VcpuState
from lasskvm.x86.msr import MSR_IA32_CSTAR, MSR_IA32_EFER, MSR_IA32_KERNEL_GS_BASE
from lasskvm.x86.registers import FS, GS, LDTR, TR

__all__ = ["calibrate", "library_function", "refusal"]

_MAGIC = 0x5A17_C3D1_1E9B_4000
#: -1, EXCP_INTERRUPT and EXCP_HLT: an instance that has run nothing, or ended a run.
_IDLE_EXCEPTION_INDICES = (0xFFFFFFFF, 0x10000, 0x10001)
_GENERAL_REGISTERS = (
    x86_const.UC_X86_REG_RAX, x86_const.UC_X86_REG_RCX, x86_const.UC_X86_REG_RDX, x86_const.UC_X86_REG_RBX,
    x86_const.UC_X86_REG_RSP, x86_const.UC_X86_REG_RBP, x86_const.UC_X86_REG_RSI, x86_const.UC_X86_REG_RDI,
    x86_const.UC_X86_REG_R8, x86_const.UC_X86_REG_R9, x86_const.UC_X86_REG_R10, x86_const.UC_X86_REG_R11,
    x86_const.UC_X86_REG_R12, x86_const.UC_X86_REG_R13, x86_const.UC_X86_REG_R14, x86_const.UC_X86_REG_R15,
)  # fmt: skip
_FPU_STACK = tuple(range(x86_const.UC_X86_REG_FP0, x86_const.UC_X86_REG_FP7 + 1))
_FPU_VECTORS = tuple(range(x86_const.UC_X86_REG_XMM0, x86_const.UC_X86_REG_XMM15 + 1))
_CPUID_FEATURES, _CPUID_STRUCTURED_FEATURES, _CPUID_EXTENDED_FEATURES = 1, 7, 0x8000_0001
_MASK16 = 0xFFFF
_EAX, _EBX, _ECX, _EDX = range(4)


class _Mismatch(Exception):
    """The named field is not where it should be."""


def library_function(name: str) -> int:
    """The address of Unicorn's internal function *name* for x86-64 guests; HostError when it is not exported."""
    try:
        return _address(getattr(uclib, f"{name}_x86_64"))
    except AttributeError:
        raise refusal(f"the function {name}") from None


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def calibrate(uc: unicorn.Uc) -> None:
    """Check the layout on *uc*, which must be in 64-bit mode; raises :class:`HostError`. Registers are left at zero."""
    try:
        with _checking("version"):
            _require(unicorn.__version__ == private.UNICORN_VERSION)
        _check(uc)
    except _Mismatch as mismatch:
        raise refusal(str(mismatch)) from None


def refusal(field: str) -> HostError:
    """The error for a Unicorn whose *field* is not where it is expected."""
    return HostError(
        f"this Unicorn ({unicorn.__version__}) is not laid out as lasskvm expects ({field} differs); install the wheel "
        f"of the pinned version with: pip install --force-reinstall unicorn=={private.UNICORN_VERSION}"
    )


@contextmanager
def _checking(field: str) -> Iterator[None]:
    try:
        yield
    except (_Mismatch, AttributeError):
        raise _Mismatch(field) from None


def _require(condition: bool) -> None:
    if not condition:
        raise _Mismatch


def _check(uc: unicorn.Uc) -> None:
    handle = uc._uch.value
    cpu = private.cpu_of(handle)
    with _checking("uc_struct.cpu"):
        # A wrong address here would crash rather than differ: it must at least be a heap address near the handle's.
        _require(cpu != 0 and cpu % 8 == 0 and cpu >> 40 == handle >> 40)
    env = cpu + private.CPU_ENV
    with _checking("uc_struct.no_exit_request"):
        _require(private.no_exit_request_field(handle) == 0)
    with _checking("CPUState.exception_index"):
        _require(private.exception_index_field(cpu) in _IDLE_EXCEPTION_INDICES)
    with _checking("CPUClass.tlb_fill"):
        _require(private.tlb_fill(cpu) == library_function("unicorn_fill_tlb"))
    _check_registers(uc, env)
    _check_fpu(uc, env)
    _check_features(env)


def _check_registers(uc: unicorn.Uc, env: int) -> None:
    """Write through the public API, read through ``save_state``; then the other way round."""
    for number, register in enumerate(_GENERAL_REGISTERS):
        uc.reg_write(register, _MAGIC + number)
    uc.reg_write(x86_const.UC_X86_REG_RIP, _MAGIC + 16)
    uc.reg_write(x86_const.UC_X86_REG_RFLAGS, 0xCD7)
    uc.reg_write(x86_const.UC_X86_REG_CR2, _MAGIC + 17)
    uc.reg_write(x86_const.UC_X86_REG_DR6, 0xFFFF0FF5)
    uc.reg_write(x86_const.UC_X86_REG_FS_BASE, _MAGIC + 18)
    uc.reg_write(x86_const.UC_X86_REG_GS_BASE, _MAGIC + 19)
    uc.reg_write(x86_const.UC_X86_REG_TR, (0x48, _MAGIC + 20, 0x2067, 0x8B00))
    uc.reg_write(x86_const.UC_X86_REG_LDTR, (0x50, _MAGIC + 21, 0x17, 0x8200))
    old = uc.msr_read(MSR_IA32_KERNEL_GS_BASE)
    uc.msr_write(MSR_IA32_KERNEL_GS_BASE, _MAGIC + 22)
    state = VcpuState()
    private.save_state(env, state.words, library_function("cpu_cc_compute_all"))
    with _checking("CPUX86State.regs"):
        _require(list(state.words[:17]) == [_MAGIC + number for number in range(17)])
    with _checking("CPUX86State.eflags, cc_src, cc_op, df"):
        _require(state.words[RFLAGS] == 0xCD7)
    with _checking("CPUX86State.cr"):
        _require(state.words[CR2] == _MAGIC + 17)
    with _checking("CPUX86State.dr"):
        _require(state.words[DR6] == 0xFFFF0FF5)
    with _checking("CPUX86State.segs"):
        _require((state.segment(FS).base, state.segment(GS).base) == (_MAGIC + 18, _MAGIC + 19))
    with _checking("CPUX86State.tr, ldt"):
        _require(state.segment(TR) == Segment(0x48, _MAGIC + 20, 0x2067, 0x8B))
        _require(state.segment(LDTR) == Segment(0x50, _MAGIC + 21, 0x17, 0x82))
    with _checking("CPUX86State.kernelgsbase"):
        _require(state.words[KERNEL_GS_BASE] == _MAGIC + 22)
    uc.msr_write(MSR_IA32_KERNEL_GS_BASE, old)
    with _checking("CPUX86State.efer"):
        _require(private.hardware_efer(env) == uc.msr_read(MSR_IA32_EFER))
    uc.reg_write(x86_const.UC_X86_REG_GDTR, (0, _MAGIC, 0x77, 0))
    uc.reg_write(x86_const.UC_X86_REG_IDTR, (0, _MAGIC + 1, 0x88, 0))
    with _checking("CPUX86State.gdt, idt"):
        _require(private.descriptor_tables(env) == (_MAGIC, 0x77, _MAGIC + 1, 0x88))
    with _checking("CPUX86State.star to cstar"):
        uc.msr_write(MSR_IA32_CSTAR, _MAGIC)
        _require(private.context_of(env - private.CPU_ENV) == _MAGIC)
    for register in _GENERAL_REGISTERS:
        uc.reg_write(register, 0)


def _check_fpu(uc: unicorn.Uc, env: int) -> None:
    """Write x87 and SSE registers through the public API, read the fields, and leave them as they were."""
    fields = fpu_fields(env)
    values = {
        **{register: _MAGIC << 64 | register for register in _FPU_VECTORS},
        **{register: (_MAGIC + register, register) for register in _FPU_STACK},
        x86_const.UC_X86_REG_FPSW: 0x2A41,
        x86_const.UC_X86_REG_FPCW: 0x0F7F,
        x86_const.UC_X86_REG_FPTAG: 0xFF00,
        x86_const.UC_X86_REG_FOP: 0x123,
        x86_const.UC_X86_REG_FCS: 0x4567,
        x86_const.UC_X86_REG_FDS: 0x89AB,
        x86_const.UC_X86_REG_FIP: _MAGIC + 1,
        x86_const.UC_X86_REG_FDP: _MAGIC + 2,
        x86_const.UC_X86_REG_MXCSR: 0x5F80,
    }
    old = {register: uc.reg_read(register) for register in values}
    for register, value in values.items():
        uc.reg_write(register, value)
    with _checking("CPUX86State.xmm_regs"):
        for number, register in enumerate(_FPU_VECTORS):
            _require(bytes(fields.xmm_regs[number][:16]) == (_MAGIC << 64 | register).to_bytes(16, "little"))
    with _checking("CPUX86State.fpregs"):
        for number, register in enumerate(_FPU_STACK):
            expected = (_MAGIC + register).to_bytes(8, "little") + register.to_bytes(2, "little")
            _require(bytes(fields.fpregs[number][:10]) == expected)
    with _checking("CPUX86State.fpstt to fptags"):
        _require((fields.fpstt, fields.fpus & 0xC7FF, fields.fpuc) == (5, 0x241, 0x0F7F))
        _require(list(fields.fptags) == [0] * 4 + [1] * 4)
    with _checking("CPUX86State.fpop to fpdp"):
        _require((fields.fpop, fields.fpcs, fields.fpds) == (0x123, 0x4567, 0x89AB))
        _require((fields.fpip, fields.fpdp) == (_MAGIC + 1, _MAGIC + 2))
    with _checking("CPUX86State.mxcsr"):
        _require(fields.mxcsr == 0x5F80)
    for register, value in old.items():
        uc.reg_write(register, value)


def _check_features(env: int) -> None:
    """The feature words must be those that Unicorn's own CPUID reports."""
    cpuid = uclib.cpu_x86_cpuid_x86_64
    results = [ctypes.c_uint32() for _ in range(4)]

    def leaf(function: int) -> tuple[int, ...]:
        cpuid(
            ctypes.c_void_p(env),
            ctypes.c_uint32(function),
            ctypes.c_uint32(0),
            *(ctypes.byref(r) for r in results),
        )
        return tuple(result.value for result in results)

    with _checking("CPUX86State.features"):
        _require(private.feature(env, 0) & _MASK16 == leaf(_CPUID_FEATURES)[_EDX] & _MASK16)
        _require(private.feature(env, 2) == leaf(_CPUID_STRUCTURED_FEATURES)[_EBX])
        _require(private.feature(env, 7) == leaf(_CPUID_EXTENDED_FEATURES)[_ECX])
