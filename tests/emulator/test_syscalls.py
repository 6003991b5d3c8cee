"""SYSCALL, SYSRET, SYSENTER and SYSEXIT."""

from __future__ import annotations

import pytest
from emulator_guest import CODE, KERNEL_CS, KERNEL_SS, KERNEL_STACK, USER_CODE, Guest

from lasskvm.emulator.syscalls import syscall64, sysenter, sysexit, sysret
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    CR0,
    CR4,
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
    SELECTOR,
    SFMASK,
    STAR,
    SYSENTER_CS,
    SYSENTER_EIP,
    SYSENTER_ESP,
    segment_word,
)
from lasskvm.x86.exceptions import GP, UD
from lasskvm.x86.registers import (
    AR_CODE32,
    AR_CODE64,
    AR_DATA,
    AR_DPL_SHIFT,
    AR_L,
    CR0_PE,
    CR4_LA57,
    CS,
    EFER_LMA,
    EFER_SCE,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    SS,
)

USER_DPL = 3 << AR_DPL_SHIFT
SYSRET_BASE = 0x18
NOT_CANONICAL = 1 << 47


@pytest.fixture
def caller(user: Guest) -> Guest:
    words = user.words
    words[STAR] = SYSRET_BASE << 48 | KERNEL_CS << 32
    words[LSTAR] = CODE
    words[SFMASK] = RFLAGS_IF | RFLAGS_TF
    words[SYSENTER_CS], words[SYSENTER_ESP], words[SYSENTER_EIP] = KERNEL_CS, KERNEL_STACK, CODE
    return user


@pytest.fixture
def kernel(caller: Guest) -> Guest:
    caller.enter_kernel()
    return caller


def segments(guest: Guest) -> tuple[int, int, int, int]:
    words = guest.words
    return (
        words[segment_word(CS, SELECTOR)],
        words[segment_word(CS, ATTRIBUTES)],
        words[segment_word(SS, SELECTOR)],
        words[segment_word(SS, ATTRIBUTES)],
    )


def unchanged(guest: Guest, before: bytes) -> bool:
    return guest.snapshot() == before


def test_syscall_enters_the_kernel_at_lstar(caller: Guest) -> None:
    words = caller.words
    words[RFLAGS] |= RFLAGS_RF
    words[INTERRUPT_SHADOW] = 1
    flags = words[RFLAGS]
    assert syscall64(words, 2) == 0
    assert words[RIP] == CODE
    assert words[RCX] == USER_CODE + 2
    assert words[R11] == flags & ~RFLAGS_RF
    assert words[RFLAGS] == RFLAGS_FIXED
    assert words[CPL] == 0
    assert words[INTERRUPT_SHADOW] == 0
    assert segments(caller) == (KERNEL_CS, AR_CODE64, KERNEL_SS, AR_DATA)


def test_syscall_leaves_the_stack_pointer_alone(caller: Guest) -> None:
    rsp = caller.words[RSP]
    syscall64(caller.words, 2)
    assert caller.words[RSP] == rsp


def test_syscall_needs_sce(caller: Guest) -> None:
    caller.words[EFER] &= ~EFER_SCE
    before = caller.snapshot()
    assert syscall64(caller.words, 2) == UD
    assert unchanged(caller, before)


def test_syscall_in_compatibility_mode_is_an_invalid_opcode(caller: Guest) -> None:
    caller.words[segment_word(CS, ATTRIBUTES)] &= ~AR_L
    assert syscall64(caller.words, 2) == UD


def test_sysret_returns_to_64_bit_user_code(kernel: Guest) -> None:
    words = kernel.words
    words[RCX], words[R11] = USER_CODE, RFLAGS_IF | RFLAGS_RF | RFLAGS_VM | 1 << 3
    assert sysret(words, 1) == 0
    assert words[RIP] == USER_CODE
    assert words[RFLAGS] == RFLAGS_FIXED | RFLAGS_IF
    assert words[CPL] == 3
    assert segments(kernel) == (0x2B, AR_CODE64 | USER_DPL, 0x23, AR_DATA | USER_DPL)


def test_sysret_without_rex_w_returns_to_compatibility_mode(kernel: Guest) -> None:
    words = kernel.words
    words[RCX], words[R11] = 0xFFFF_FFFF_0000_1000, RFLAGS_FIXED
    assert sysret(words, 0) == 0
    assert words[RIP] == 0x1000
    assert segments(kernel) == (0x1B, AR_CODE32 | USER_DPL, 0x23, AR_DATA | USER_DPL)


def test_sysret_to_an_address_that_is_not_canonical_faults_in_the_kernel(kernel: Guest) -> None:
    kernel.words[RCX] = NOT_CANONICAL
    before = kernel.snapshot()
    assert sysret(kernel.words, 1) == GP
    assert unchanged(kernel, before)


def test_sysret_to_bit_47_is_canonical_with_five_level_paging(kernel: Guest) -> None:
    kernel.words[CR4] |= CR4_LA57
    kernel.words[RCX] = NOT_CANONICAL
    assert sysret(kernel.words, 1) == 0


def test_sysret_to_an_upper_half_address_is_loaded_without_a_lass_check(kernel: Guest) -> None:
    kernel.words[RCX] = CODE
    assert sysret(kernel.words, 1) == 0
    assert kernel.words[RIP] == CODE


def test_sysret_at_cpl_three_is_a_general_protection(caller: Guest) -> None:
    before = caller.snapshot()
    assert sysret(caller.words, 1) == GP
    assert unchanged(caller, before)


def test_sysret_without_sce_is_an_invalid_opcode_even_at_cpl_three(caller: Guest) -> None:
    caller.words[EFER] &= ~EFER_SCE
    assert sysret(caller.words, 1) == UD


def test_sysenter_in_ia32e_mode_enters_64_bit_code(caller: Guest) -> None:
    words = caller.words
    words[RFLAGS] |= RFLAGS_TF
    assert sysenter(words) == 0
    assert (words[RIP], words[RSP], words[CPL]) == (CODE, KERNEL_STACK, 0)
    assert words[RFLAGS] == RFLAGS_FIXED | RFLAGS_TF
    assert segments(caller) == (KERNEL_CS, AR_CODE64, KERNEL_SS, AR_DATA)


def test_sysenter_in_protected_mode_uses_32_bits(caller: Guest) -> None:
    words = caller.words
    words[EFER] &= ~EFER_LMA
    assert sysenter(words) == 0
    assert (words[RIP], words[RSP]) == (CODE & 0xFFFFFFFF, KERNEL_STACK & 0xFFFFFFFF)
    assert segments(caller)[1] == AR_CODE32


@pytest.mark.parametrize("selector", [0, 1, 2, 3, 0x10000])
def test_sysenter_with_a_null_selector_is_a_general_protection(caller: Guest, selector: int) -> None:
    caller.words[SYSENTER_CS] = selector
    before = caller.snapshot()
    assert sysenter(caller.words) == GP
    assert unchanged(caller, before)


def test_sysenter_in_real_mode_is_a_general_protection(caller: Guest) -> None:
    caller.words[CR0] &= ~CR0_PE
    assert sysenter(caller.words) == GP


def test_sysexit_returns_to_64_bit_or_32_bit_code(kernel: Guest) -> None:
    words = kernel.words
    words[RDX], words[RCX] = USER_CODE, 0x61000
    assert sysexit(words, 1) == 0
    assert (words[RIP], words[RSP], words[CPL]) == (USER_CODE, 0x61000, 3)
    assert segments(kernel) == (
        KERNEL_CS + 32 | 3,
        AR_CODE64 | USER_DPL,
        KERNEL_CS + 40 | 3,
        AR_DATA | USER_DPL,
    )
    kernel.enter_kernel()
    words[RDX], words[RCX] = 0x1_0000_2000, 0x1_0000_3000
    assert sysexit(words, 0) == 0
    assert (words[RIP], words[RSP]) == (0x2000, 0x3000)
    assert segments(kernel) == (
        KERNEL_CS + 16 | 3,
        AR_CODE32 | USER_DPL,
        KERNEL_CS + 24 | 3,
        AR_DATA | USER_DPL,
    )


@pytest.mark.parametrize("register", [RCX, RDX])
def test_sysexit_to_an_address_that_is_not_canonical_is_a_general_protection(
    kernel: Guest, register: int
) -> None:
    kernel.words[register] = NOT_CANONICAL
    before = kernel.snapshot()
    assert sysexit(kernel.words, 1) == GP
    assert unchanged(kernel, before)


def test_sysexit_at_cpl_three_is_a_general_protection(caller: Guest) -> None:
    assert sysexit(caller.words, 1) == GP


def test_all_four_load_flat_segments(kernel: Guest) -> None:
    kernel.words[segment_word(SS, BASE)] = 0x1000
    kernel.words[segment_word(SS, LIMIT)] = 0x10
    kernel.words[RCX] = USER_CODE
    assert sysret(kernel.words, 1) == 0
    assert kernel.words[segment_word(SS, BASE)] == 0
    assert kernel.words[segment_word(SS, LIMIT)] == 0xFFFFFFFF
