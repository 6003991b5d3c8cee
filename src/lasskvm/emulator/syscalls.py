"""SYSCALL, SYSRET, SYSENTER and SYSEXIT on the state words.

Plain functions over integers, called compiled while direct execution runs and as they are by the emulator.
Each checks everything first and changes the state only when nothing can fault any more: it returns 0, or the
vector of the fault (#UD, or #GP with error code 0) with the state untouched.

A completed instruction ends the interrupt shadow. A single-step trap is the caller's business: whether it is
due follows from RFLAGS.TF *after* SYSCALL (SFMASK usually clears it) and after SYSRET.

Source: Intel SDM volume 2B, the four instructions; volume 3A, 6.8.7 and 6.8.8.
"""

from lasskvm.emulator.modes import linear_address_bits
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    CR0,
    EFER,
    INTERRUPT_SHADOW,
    LIMIT,
    LSTAR,
    R11,
    RCX,
    RDX,
    RFLAGS,
    RIP,
    RSP,
    SEGMENT_WORDS,
    SEGMENTS,
    SELECTOR,
    SFMASK,
    STAR,
    SYSENTER_CS,
    SYSENTER_EIP,
    SYSENTER_ESP,
    Words,
)
from lasskvm.x86.address import is_canonical
from lasskvm.x86.exceptions import GP, UD
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_CODE64,
    AR_DATA,
    AR_DPL_SHIFT,
    AR_L,
    CR0_PE,
    CS,
    EFER_LMA,
    EFER_SCE,
    MASK32,
    MASK64,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_VM,
    SS,
)

__all__ = ["syscall64", "sysenter", "sysexit", "sysret"]

_CS = SEGMENTS + SEGMENT_WORDS * CS
_SS = SEGMENTS + SEGMENT_WORDS * SS

_USER = 3
_SELECTOR_MASK = 0xFFFC
#: IA32_STAR[47:32] and [63:48]: the selector bases of SYSCALL and SYSRET.
_STAR_SYSCALL_SHIFT = 32
_STAR_SYSRET_SHIFT = 48
#: Distances between the selectors that each instruction derives from one base.
_SYSCALL_SS = 8
_SYSRET_CS64 = 16
_SYSRET_SS = 8
_SYSENTER_SS = 8
_SYSEXIT_CS32 = 16
_SYSEXIT_CS64 = 32
_SYSEXIT_SS = 8
#: The flags SYSRET takes from R11: all but VM, RF and the reserved ones.
_SYSRET_FLAGS = 0x3C7FD7


def syscall64(state: Words, instruction_length: int) -> int:
    """SYSCALL. #UD outside 64-bit mode (Intel has none in compatibility mode) and without EFER.SCE.

    R11 gets RFLAGS with RF clear, since RF ends with the instruction's successful completion (SDM volume 3B,
    18.3.1.1).
    """
    if state[EFER] & EFER_LMA == 0 or state[EFER] & EFER_SCE == 0 or state[_CS + ATTRIBUTES] & AR_L == 0:
        return UD
    rflags = state[RFLAGS] & (MASK64 ^ RFLAGS_RF)
    state[RCX] = (state[RIP] + instruction_length) & MASK64
    state[R11] = rflags
    state[RFLAGS] = (rflags & (MASK64 ^ state[SFMASK])) | RFLAGS_FIXED
    state[RIP] = state[LSTAR]
    selector = (state[STAR] >> _STAR_SYSCALL_SHIFT) & _SELECTOR_MASK
    _enter(state, 0, selector, AR_CODE64, selector + _SYSCALL_SS)
    return 0


def sysret(state: Words, operand_size_64: int) -> int:
    """SYSRET to 64-bit mode (*operand_size_64* 1: REX.W), or to compatibility mode (0).

    A non-canonical RCX is a #GP(0) at CPL 0, before anything changes: the behaviour that kernels guard
    against.
    """
    if state[EFER] & EFER_LMA == 0 or state[EFER] & EFER_SCE == 0 or state[_CS + ATTRIBUTES] & AR_L == 0:
        return UD
    if state[CPL] != 0:
        return GP
    if operand_size_64 != 0 and not is_canonical(state[RCX], linear_address_bits(state)):
        return GP
    selector = (state[STAR] >> _STAR_SYSRET_SHIFT) & _SELECTOR_MASK
    state[RFLAGS] = (state[R11] & _SYSRET_FLAGS) | RFLAGS_FIXED
    if operand_size_64 != 0:
        state[RIP] = state[RCX]
        _enter(state, _USER, selector + _SYSRET_CS64, AR_CODE64, selector + _SYSRET_SS)
    else:
        state[RIP] = state[RCX] & MASK32
        _enter(state, _USER, selector, AR_CODE32, selector + _SYSRET_SS)
    return 0


def sysenter(state: Words) -> int:
    """SYSENTER, in protected and IA-32e mode. #GP(0) in real mode and while IA32_SYSENTER_CS is null."""
    if state[CR0] & CR0_PE == 0 or state[SYSENTER_CS] & _SELECTOR_MASK == 0:
        return GP
    state[RFLAGS] = state[RFLAGS] & (MASK64 ^ (RFLAGS_VM | RFLAGS_IF | RFLAGS_RF))
    selector = state[SYSENTER_CS] & _SELECTOR_MASK
    if state[EFER] & EFER_LMA != 0:
        state[RSP] = state[SYSENTER_ESP]
        state[RIP] = state[SYSENTER_EIP]
        _enter(state, 0, selector, AR_CODE64, selector + _SYSENTER_SS)
    else:
        state[RSP] = state[SYSENTER_ESP] & MASK32
        state[RIP] = state[SYSENTER_EIP] & MASK32
        _enter(state, 0, selector, AR_CODE32, selector + _SYSENTER_SS)
    return 0


def sysexit(state: Words, operand_size_64: int) -> int:
    """SYSEXIT to RDX with stack RCX: to 64-bit mode (*operand_size_64* 1: REX.W) or to 32-bit code (0)."""
    if state[CR0] & CR0_PE == 0 or state[SYSENTER_CS] & _SELECTOR_MASK == 0 or state[CPL] != 0:
        return GP
    selector = state[SYSENTER_CS] & _SELECTOR_MASK
    if operand_size_64 != 0:
        bits = linear_address_bits(state)
        if not is_canonical(state[RCX], bits) or not is_canonical(state[RDX], bits):
            return GP
        state[RSP] = state[RCX]
        state[RIP] = state[RDX]
        selector += _SYSEXIT_CS64
        _enter(state, _USER, selector, AR_CODE64, selector + _SYSEXIT_SS)
    else:
        state[RSP] = state[RCX] & MASK32
        state[RIP] = state[RDX] & MASK32
        selector += _SYSEXIT_CS32
        _enter(state, _USER, selector, AR_CODE32, selector + _SYSEXIT_SS)
    state[RFLAGS] = state[RFLAGS] & (MASK64 ^ RFLAGS_RF)
    return 0


def _enter(state: Words, cpl: int, code_selector: int, code_attributes: int, stack_selector: int) -> None:
    """Load CS and SS with the fixed flat descriptors of these instructions; no descriptor table is read."""
    dpl = cpl << AR_DPL_SHIFT
    state[_CS + SELECTOR] = (code_selector | cpl) & 0xFFFF
    state[_CS + BASE] = 0
    state[_CS + LIMIT] = MASK32
    state[_CS + ATTRIBUTES] = code_attributes | dpl
    state[_SS + SELECTOR] = (stack_selector | cpl) & 0xFFFF
    state[_SS + BASE] = 0
    state[_SS + LIMIT] = MASK32
    state[_SS + ATTRIBUTES] = AR_DATA | dpl
    state[CPL] = cpl
    state[INTERRUPT_SHADOW] = 0
