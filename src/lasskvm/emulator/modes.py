"""What mode the processor is in, read off the state words (SDM volume 3A, 2.2 and table 3-1).

Plain functions over integers; compiled code calls them too.
"""

from lasskvm.state import ATTRIBUTES, CR0, CR4, EFER, RFLAGS, SEGMENT_WORDS, SEGMENTS, Words
from lasskvm.x86.address import linear_bits
from lasskvm.x86.registers import AR_DB, AR_L, CR0_PE, CS, EFER_LMA, MASK32, MASK64, RFLAGS_VM

__all__ = [
    "code_bits",
    "in_64bit_mode",
    "in_ia32e_mode",
    "in_protected_mode",
    "in_real_mode",
    "in_virtual_8086_mode",
    "instruction_pointer_mask",
    "linear_address_bits",
]

_CS_ATTRIBUTES = SEGMENTS + SEGMENT_WORDS * CS + ATTRIBUTES


def in_ia32e_mode(state: Words) -> bool:
    """IA-32e mode: 64-bit or compatibility mode."""
    return state[EFER] & EFER_LMA != 0


def in_64bit_mode(state: Words) -> bool:
    """The 64-bit sub-mode of IA-32e mode."""
    return state[EFER] & EFER_LMA != 0 and state[_CS_ATTRIBUTES] & AR_L != 0


def in_real_mode(state: Words) -> bool:
    """Real-address mode."""
    return state[CR0] & CR0_PE == 0


def in_virtual_8086_mode(state: Words) -> bool:
    """Virtual-8086 mode."""
    return state[CR0] & CR0_PE != 0 and state[RFLAGS] & RFLAGS_VM != 0


def in_protected_mode(state: Words) -> bool:
    """Protected mode proper (IA-32e mode included): segment registers are loaded through descriptors."""
    return state[CR0] & CR0_PE != 0 and state[RFLAGS] & RFLAGS_VM == 0


def code_bits(state: Words) -> int:
    """The default operand and address size that instructions are decoded with: 64, 32 or 16."""
    if in_64bit_mode(state):
        return 64
    if in_protected_mode(state) and state[_CS_ATTRIBUTES] & AR_DB != 0:
        return 32
    return 16


def linear_address_bits(state: Words) -> int:
    """How many bits of a linear address are significant in IA-32e mode: 48, or 57 with CR4.LA57."""
    return linear_bits(state[CR4])


def instruction_pointer_mask(state: Words) -> int:
    """The bits of RIP that exist in the current mode.

    Outside 64-bit mode that is EIP: a 16-bit code segment does not truncate it, its limit does.
    """
    if in_64bit_mode(state):
        return MASK64
    return MASK32
