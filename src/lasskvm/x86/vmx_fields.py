"""VMCS fields: their encodings, and what an encoding says about its field.

:class:`VmcsField` has every field that belongs to a VMX feature of this VMM, by KVM's names. Software names a field by
its encoding, in which width, kind and index of the field stand, and whether VMREAD and VMWRITE mean all of a 64-bit
field or its upper half. Who accepts which encodings is told in :mod:`lasskvm.vmx.vmcs`.

Source: Intel SDM volume 3C, 25.11.2 (structure of an encoding) and appendix B (fields).
"""

from enum import IntEnum

__all__ = [
    "ENCODING_HIGH_ACCESS",
    "ENCODING_RESERVED",
    "FIELD_BYTES",
    "FieldType",
    "FieldWidth",
    "VmcsField",
    "field_encoding",
    "field_index",
    "field_type",
    "field_width",
    "is_high_access",
]

#: Bit 0 of an encoding: the upper half of a 64-bit field.
ENCODING_HIGH_ACCESS = 1 << 0
_INDEX_SHIFT, _INDEX_MASK = 1, 0x1FF
_TYPE_SHIFT, _TYPE_MASK = 10, 0b11
_WIDTH_SHIFT, _WIDTH_MASK = 13, 0b11
#: Bits that are 0 in every encoding: 12, and 15 and up.
ENCODING_RESERVED = ((1 << 64) - (1 << 15)) | 1 << 12


class FieldWidth(IntEnum):
    """How wide a field is; bits 14:13 of its encoding."""

    BITS_16 = 0
    BITS_64 = 1
    BITS_32 = 2
    #: 64 bits on processors with Intel 64, which all of ours are.
    NATURAL = 3


#: Bytes of a field, by :class:`FieldWidth`.
FIELD_BYTES = (2, 8, 4, 8)


class FieldType(IntEnum):
    """What a field is for; bits 11:10 of its encoding."""

    CONTROL = 0
    #: VM-exit information, and the VM-instruction error.
    READ_ONLY = 1
    GUEST_STATE = 2
    HOST_STATE = 3


def field_encoding(width: FieldWidth, kind: FieldType, index: int) -> int:
    """The encoding of a field's full access.

    >>> hex(field_encoding(FieldWidth.NATURAL, FieldType.GUEST_STATE, 1))
    '0x6802'
    """
    return width << _WIDTH_SHIFT | kind << _TYPE_SHIFT | index << _INDEX_SHIFT


def field_width(encoding: int) -> FieldWidth:
    """The width of the field that *encoding* names."""
    return FieldWidth(encoding >> _WIDTH_SHIFT & _WIDTH_MASK)


def field_type(encoding: int) -> FieldType:
    """What the field that *encoding* names is for."""
    return FieldType(encoding >> _TYPE_SHIFT & _TYPE_MASK)


def field_index(encoding: int) -> int:
    """The number of the field among those of its width and type."""
    return encoding >> _INDEX_SHIFT & _INDEX_MASK


def is_high_access(encoding: int) -> bool:
    """Whether *encoding* names the upper half of its field; defined for 64-bit fields only."""
    return encoding & ENCODING_HIGH_ACCESS != 0


class VmcsField(IntEnum):
    """The fields of a VMCS, by the encoding of their full access."""

    # 16-bit control field
    VIRTUAL_PROCESSOR_ID = 0x0000
    # 16-bit guest state
    GUEST_ES_SELECTOR = 0x0800
    GUEST_CS_SELECTOR = 0x0802
    GUEST_SS_SELECTOR = 0x0804
    GUEST_DS_SELECTOR = 0x0806
    GUEST_FS_SELECTOR = 0x0808
    GUEST_GS_SELECTOR = 0x080A
    GUEST_LDTR_SELECTOR = 0x080C
    GUEST_TR_SELECTOR = 0x080E
    # 16-bit host state
    HOST_ES_SELECTOR = 0x0C00
    HOST_CS_SELECTOR = 0x0C02
    HOST_SS_SELECTOR = 0x0C04
    HOST_DS_SELECTOR = 0x0C06
    HOST_FS_SELECTOR = 0x0C08
    HOST_GS_SELECTOR = 0x0C0A
    HOST_TR_SELECTOR = 0x0C0C
    # 64-bit control fields
    IO_BITMAP_A = 0x2000
    IO_BITMAP_B = 0x2002
    MSR_BITMAP = 0x2004
    VM_EXIT_MSR_STORE_ADDR = 0x2006
    VM_EXIT_MSR_LOAD_ADDR = 0x2008
    VM_ENTRY_MSR_LOAD_ADDR = 0x200A
    TSC_OFFSET = 0x2010
    VIRTUAL_APIC_PAGE_ADDR = 0x2012
    EPT_POINTER = 0x201A
    XSS_EXIT_BITMAP = 0x202C
    ENCLS_EXITING_BITMAP = 0x202E
    # 64-bit read-only field
    GUEST_PHYSICAL_ADDRESS = 0x2400
    # 64-bit guest state
    VMCS_LINK_POINTER = 0x2800
    GUEST_IA32_DEBUGCTL = 0x2802
    GUEST_IA32_PAT = 0x2804
    GUEST_IA32_EFER = 0x2806
    GUEST_PDPTR0 = 0x280A
    GUEST_PDPTR1 = 0x280C
    GUEST_PDPTR2 = 0x280E
    GUEST_PDPTR3 = 0x2810
    # 64-bit host state
    HOST_IA32_PAT = 0x2C00
    HOST_IA32_EFER = 0x2C02
    # 32-bit control fields
    PIN_BASED_VM_EXEC_CONTROL = 0x4000
    CPU_BASED_VM_EXEC_CONTROL = 0x4002
    EXCEPTION_BITMAP = 0x4004
    PAGE_FAULT_ERROR_CODE_MASK = 0x4006
    PAGE_FAULT_ERROR_CODE_MATCH = 0x4008
    CR3_TARGET_COUNT = 0x400A
    VM_EXIT_CONTROLS = 0x400C
    VM_EXIT_MSR_STORE_COUNT = 0x400E
    VM_EXIT_MSR_LOAD_COUNT = 0x4010
    VM_ENTRY_CONTROLS = 0x4012
    VM_ENTRY_MSR_LOAD_COUNT = 0x4014
    VM_ENTRY_INTR_INFO_FIELD = 0x4016
    VM_ENTRY_EXCEPTION_ERROR_CODE = 0x4018
    VM_ENTRY_INSTRUCTION_LEN = 0x401A
    TPR_THRESHOLD = 0x401C
    SECONDARY_VM_EXEC_CONTROL = 0x401E
    # 32-bit read-only fields
    VM_INSTRUCTION_ERROR = 0x4400
    VM_EXIT_REASON = 0x4402
    VM_EXIT_INTR_INFO = 0x4404
    VM_EXIT_INTR_ERROR_CODE = 0x4406
    IDT_VECTORING_INFO_FIELD = 0x4408
    IDT_VECTORING_ERROR_CODE = 0x440A
    VM_EXIT_INSTRUCTION_LEN = 0x440C
    VMX_INSTRUCTION_INFO = 0x440E
    # 32-bit guest state
    GUEST_ES_LIMIT = 0x4800
    GUEST_CS_LIMIT = 0x4802
    GUEST_SS_LIMIT = 0x4804
    GUEST_DS_LIMIT = 0x4806
    GUEST_FS_LIMIT = 0x4808
    GUEST_GS_LIMIT = 0x480A
    GUEST_LDTR_LIMIT = 0x480C
    GUEST_TR_LIMIT = 0x480E
    GUEST_GDTR_LIMIT = 0x4810
    GUEST_IDTR_LIMIT = 0x4812
    GUEST_ES_AR_BYTES = 0x4814
    GUEST_CS_AR_BYTES = 0x4816
    GUEST_SS_AR_BYTES = 0x4818
    GUEST_DS_AR_BYTES = 0x481A
    GUEST_FS_AR_BYTES = 0x481C
    GUEST_GS_AR_BYTES = 0x481E
    GUEST_LDTR_AR_BYTES = 0x4820
    GUEST_TR_AR_BYTES = 0x4822
    GUEST_INTERRUPTIBILITY_INFO = 0x4824
    GUEST_ACTIVITY_STATE = 0x4826
    GUEST_SYSENTER_CS = 0x482A
    VMX_PREEMPTION_TIMER_VALUE = 0x482E
    # 32-bit host state
    HOST_IA32_SYSENTER_CS = 0x4C00
    # Natural-width control fields
    CR0_GUEST_HOST_MASK = 0x6000
    CR4_GUEST_HOST_MASK = 0x6002
    CR0_READ_SHADOW = 0x6004
    CR4_READ_SHADOW = 0x6006
    # Natural-width read-only fields
    EXIT_QUALIFICATION = 0x6400
    GUEST_LINEAR_ADDRESS = 0x640A
    # Natural-width guest state
    GUEST_CR0 = 0x6800
    GUEST_CR3 = 0x6802
    GUEST_CR4 = 0x6804
    GUEST_ES_BASE = 0x6806
    GUEST_CS_BASE = 0x6808
    GUEST_SS_BASE = 0x680A
    GUEST_DS_BASE = 0x680C
    GUEST_FS_BASE = 0x680E
    GUEST_GS_BASE = 0x6810
    GUEST_LDTR_BASE = 0x6812
    GUEST_TR_BASE = 0x6814
    GUEST_GDTR_BASE = 0x6816
    GUEST_IDTR_BASE = 0x6818
    GUEST_DR7 = 0x681A
    GUEST_RSP = 0x681C
    GUEST_RIP = 0x681E
    GUEST_RFLAGS = 0x6820
    GUEST_PENDING_DBG_EXCEPTIONS = 0x6822
    GUEST_SYSENTER_ESP = 0x6824
    GUEST_SYSENTER_EIP = 0x6826
    # Natural-width host state
    HOST_CR0 = 0x6C00
    HOST_CR3 = 0x6C02
    HOST_CR4 = 0x6C04
    HOST_FS_BASE = 0x6C06
    HOST_GS_BASE = 0x6C08
    HOST_TR_BASE = 0x6C0A
    HOST_GDTR_BASE = 0x6C0C
    HOST_IDTR_BASE = 0x6C0E
    HOST_IA32_SYSENTER_ESP = 0x6C10
    HOST_IA32_SYSENTER_EIP = 0x6C12
    HOST_RSP = 0x6C14
    HOST_RIP = 0x6C16
