"""Segment selectors, descriptors, gates and task-state segments: where their fields are.

Pure functions over integers, in the compiled subset (``docs/architecture.md``). A descriptor is the 64-bit
integer that lies in the table; in IA-32e mode, system descriptors and gates have a second one behind it
(*high*). Attributes use the layout of :mod:`lasskvm.x86.registers` (``AR_*``).

Source: Intel SDM volume 3A, 3.4.2 (selectors), 3.4.5 (segment descriptors), 3.5 (system descriptor types),
6.8.3 (call gates), 7.11 and 7.14.1 (interrupt and trap gates), chapter 9 (task-state segments).
"""

from lasskvm.x86.registers import AR_G, MASK32

# Selectors
SELECTOR_RPL = 3
SELECTOR_TI = 1 << 2
#: The selector without RPL and TI is the descriptor's offset in its table.
SELECTOR_OFFSET = 0xFFF8

DESCRIPTOR_BYTES = 8
#: System descriptors and gates in IA-32e mode.
DESCRIPTOR_BYTES64 = 16

# System descriptor types, ``AR_TYPE`` of a descriptor with ``AR_S`` clear. In IA-32e mode, 2 (LDT), 9 and 11
# (64-bit TSS), 12, 14 and 15 (64-bit gates) exist and the others are reserved.
SYS_TSS16_AVAILABLE = 1
SYS_LDT = 2
SYS_TSS16_BUSY = 3
SYS_CALL_GATE16 = 4
SYS_TASK_GATE = 5
SYS_INTERRUPT_GATE16 = 6
SYS_TRAP_GATE16 = 7
SYS_TSS_AVAILABLE = 9
SYS_TSS_BUSY = 11
SYS_CALL_GATE = 12
SYS_INTERRUPT_GATE = 14
SYS_TRAP_GATE = 15
#: The type bit that makes an available TSS a busy one, and the same bit within the descriptor.
SYS_TSS_BUSY_BIT = 1 << 1
DESCRIPTOR_TSS_BUSY = SYS_TSS_BUSY_BIT << 40
#: The accessed bit of a code or data descriptor.
DESCRIPTOR_ACCESSED = 1 << 40

# 64-bit task-state segment: byte offsets
TSS64_RSP0 = 0x04
TSS64_RSP1 = 0x0C
TSS64_RSP2 = 0x14
TSS64_IST1 = 0x24
TSS64_IST7 = 0x54
TSS64_IO_MAP_BASE = 0x66
TSS64_BYTES = 0x68
#: Distance between the RSPn fields and between the ISTn fields.
TSS64_STACK_BYTES = 8

# 32-bit task-state segment
TSS32_LINK = 0x00
TSS32_ESP0 = 0x04
TSS32_SS0 = 0x08
TSS32_ESP1 = 0x0C
TSS32_SS1 = 0x10
TSS32_ESP2 = 0x14
TSS32_SS2 = 0x18
TSS32_CR3 = 0x1C
TSS32_EIP = 0x20
TSS32_EFLAGS = 0x24
#: EAX, then the others in the order of their encodings, four bytes each.
TSS32_EAX = 0x28
#: ES, CS, SS, DS, FS, GS, four bytes each.
TSS32_ES = 0x48
TSS32_LDT = 0x60
#: Bit 0 of this word is the debug trap flag.
TSS32_TRAP = 0x64
TSS32_IO_MAP_BASE = 0x66
TSS32_BYTES = 0x68
#: Distance from one privilege level's ESPn to the next, and from ESPn to SSn.
TSS32_STACK_BYTES = 8
TSS32_STACK_SS = 4

# 16-bit task-state segment
TSS16_LINK = 0x00
TSS16_SP0 = 0x02
TSS16_SS0 = 0x04
TSS16_SP1 = 0x06
TSS16_SS1 = 0x08
TSS16_SP2 = 0x0A
TSS16_SS2 = 0x0C
TSS16_IP = 0x0E
TSS16_FLAGS = 0x10
#: AX, then the others in the order of their encodings, two bytes each.
TSS16_AX = 0x12
#: ES, CS, SS, DS, two bytes each.
TSS16_ES = 0x22
TSS16_LDT = 0x2A
TSS16_BYTES = 0x2C
TSS16_STACK_BYTES = 4
TSS16_STACK_SS = 2

_ATTRIBUTES_SHIFT = 40
#: Attributes without bits 11:8, where the descriptor holds limit bits 19:16.
_ATTRIBUTES = 0xF0FF
_PAGE_SHIFT = 12
_PAGE_OFFSET = 0xFFF
_MASK8 = 0xFF
_MASK16 = 0xFFFF
_MASK24 = 0xFFFFFF
_MASK_LIMIT_HIGH = 0xF
_MASK_PARAMETERS = 0x1F
_MASK_IST = 7
#: Bits 12:8 of the third doubleword, where a second descriptor's type would be: they must be 0.
_HIGH_TYPE_SHIFT = 40
_HIGH_TYPE = 0x1F


def segment_base(descriptor: int) -> int:
    """The 32-bit base of a code, data or system descriptor."""
    return ((descriptor >> 16) & _MASK24) | (((descriptor >> 56) & _MASK8) << 24)


def segment_base64(descriptor: int, high: int) -> int:
    """The 64-bit base of an LDT or TSS descriptor in IA-32e mode."""
    return segment_base(descriptor) | ((high & MASK32) << 32)


def segment_limit(descriptor: int) -> int:
    """The limit in bytes (the last valid offset), with the granularity bit applied."""
    limit = (descriptor & _MASK16) | (((descriptor >> 48) & _MASK_LIMIT_HIGH) << 16)
    if (segment_attributes(descriptor) & AR_G) != 0:
        limit = (limit << _PAGE_SHIFT) | _PAGE_OFFSET
    return limit


def segment_attributes(descriptor: int) -> int:
    """The attributes (``AR_*``) of any descriptor or gate; ``AR_UNUSABLE`` is never set."""
    return (descriptor >> _ATTRIBUTES_SHIFT) & _ATTRIBUTES


def high_is_valid(high: int) -> bool:
    """Whether *high* can be the second half of a 16-byte descriptor: its type field is 0."""
    return ((high >> _HIGH_TYPE_SHIFT) & _HIGH_TYPE) == 0


def gate_selector(descriptor: int) -> int:
    """The code-segment selector of a call, interrupt or trap gate, or the TSS selector of a task gate."""
    return (descriptor >> 16) & _MASK16


def gate_offset16(descriptor: int) -> int:
    """The entry point of a 16-bit gate."""
    return descriptor & _MASK16


def gate_offset32(descriptor: int) -> int:
    """The entry point of a 32-bit gate."""
    return (descriptor & _MASK16) | (((descriptor >> 48) & _MASK16) << 16)


def gate_offset64(descriptor: int, high: int) -> int:
    """The entry point of a 64-bit gate."""
    return gate_offset32(descriptor) | ((high & MASK32) << 32)


def gate_ist(descriptor: int) -> int:
    """The interrupt-stack-table index of a 64-bit interrupt or trap gate; 0 for none."""
    return (descriptor >> 32) & _MASK_IST


def gate_parameters(descriptor: int) -> int:
    """How many words (16-bit) or doublewords (32-bit) a call gate copies to the new stack."""
    return (descriptor >> 32) & _MASK_PARAMETERS


def make_segment(base: int, limit: int, attributes: int) -> int:
    """The descriptor with these fields; with ``AR_G``, the low 12 bits of *limit* are taken to be ones."""
    if (attributes & AR_G) != 0:
        limit = limit >> _PAGE_SHIFT
    return (
        (limit & _MASK16)
        | ((base & _MASK24) << 16)
        | ((attributes & _ATTRIBUTES) << _ATTRIBUTES_SHIFT)
        | (((limit >> 16) & _MASK_LIMIT_HIGH) << 48)
        | (((base >> 24) & _MASK8) << 56)
    )


def make_gate(offset: int, selector: int, attributes: int, ist_or_parameters: int) -> int:
    """The first 8 bytes of a gate; those behind it, in IA-32e mode, are ``offset >> 32``."""
    return (
        (offset & _MASK16)
        | ((selector & _MASK16) << 16)
        | ((ist_or_parameters & _MASK_PARAMETERS) << 32)
        | ((attributes & _MASK8) << _ATTRIBUTES_SHIFT)
        | (((offset >> 16) & _MASK16) << 48)
    )
