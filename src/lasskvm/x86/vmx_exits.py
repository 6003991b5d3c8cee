"""VM exits: basic reasons, exit qualifications, and the VM-exit instruction information.

The functions put a value together from its parts; what each part means is said where it is named. All numbers of
registers and segments are those of instruction encodings.

Source: Intel SDM volume 3C, 28.2 (exit qualifications: tables 28-3 to 28-7; instruction information: tables 28-8 to
28-15), appendix C (basic reasons).
"""

from enum import IntEnum

__all__ = [
    "EXIT_REASON_BASIC",
    "EXIT_REASON_FAILED_VMENTRY",
    "EXIT_REASON_FROM_ENCLAVE",
    "CrAccess",
    "EptViolation",
    "ExitReason",
    "TaskSwitchSource",
    "cr_access_qualification",
    "descriptor_table_information",
    "dr_access_qualification",
    "io_information",
    "io_qualification",
    "memory_operand_information",
    "random_information",
    "register_operand_information",
    "task_switch_qualification",
]

#: Bits 15:0 of the exit reason are the basic reason.
EXIT_REASON_BASIC = 0xFFFF
#: The exit was incident to enclave mode.
EXIT_REASON_FROM_ENCLAVE = 1 << 27
#: The VM entry failed; nothing of the guest has run.
EXIT_REASON_FAILED_VMENTRY = 1 << 31


class ExitReason(IntEnum):
    """Basic exit reasons (appendix C) that the features of this VMM have."""

    EXCEPTION_NMI = 0
    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    INIT_SIGNAL = 3
    SIPI_SIGNAL = 4
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    TASK_SWITCH = 9
    CPUID = 10
    GETSEC = 11
    HLT = 12
    INVD = 13
    INVLPG = 14
    RDPMC = 15
    RDTSC = 16
    VMCALL = 18
    VMCLEAR = 19
    VMLAUNCH = 20
    VMPTRLD = 21
    VMPTRST = 22
    VMREAD = 23
    VMRESUME = 24
    VMWRITE = 25
    VMXOFF = 26
    VMXON = 27
    CR_ACCESS = 28
    DR_ACCESS = 29
    IO_INSTRUCTION = 30
    MSR_READ = 31
    MSR_WRITE = 32
    INVALID_STATE = 33
    MSR_LOAD_FAIL = 34
    MWAIT_INSTRUCTION = 36
    MONITOR_TRAP_FLAG = 37
    MONITOR_INSTRUCTION = 39
    PAUSE_INSTRUCTION = 40
    MCE_DURING_VMENTRY = 41
    TPR_BELOW_THRESHOLD = 43
    GDTR_IDTR = 46
    LDTR_TR = 47
    EPT_VIOLATION = 48
    EPT_MISCONFIG = 49
    INVEPT = 50
    RDTSCP = 51
    PREEMPTION_TIMER = 52
    INVVPID = 53
    WBINVD = 54
    XSETBV = 55
    RDRAND = 57
    INVPCID = 58
    ENCLS = 60
    RDSEED = 61
    XSAVES = 63
    XRSTORS = 64


# ------------------------------------------------------------------------------------------------ qualifications


class CrAccess(IntEnum):
    """What was to be done to a control register; bits 5:4 of the qualification."""

    MOV_TO_CR = 0
    MOV_FROM_CR = 1
    CLTS = 2
    LMSW = 3


class TaskSwitchSource(IntEnum):
    """What asked for a task switch; bits 31:30 of the qualification."""

    CALL = 0
    IRET = 1
    JMP = 2
    GATE = 3


class EptViolation(IntEnum):
    """Bits of the qualification of an EPT violation: the access, what the EPT entries allow, and the linear address."""

    ACC_READ = 1 << 0
    ACC_WRITE = 1 << 1
    ACC_INSTR = 1 << 2
    PROT_READ = 1 << 3
    PROT_WRITE = 1 << 4
    PROT_EXEC = 1 << 5
    #: The guest-linear-address field is valid.
    GVA_IS_VALID = 1 << 7
    #: The access was to the translation of the linear address, not to a paging-structure entry on the way.
    GVA_TRANSLATED = 1 << 8
    #: The IRET that was interrupted has unblocked NMIs.
    UNBLOCK_NMI = 1 << 12


_CR_ACCESS_SHIFT = 4
_CR_LMSW_MEMORY_OPERAND = 1 << 6
_CR_REGISTER_SHIFT = 8
_CR_LMSW_SOURCE_SHIFT = 16
_DR_MOV_FROM = 1 << 4
_DR_REGISTER_SHIFT = 8
_IO_IN = 1 << 3
_IO_STRING = 1 << 4
_IO_REP = 1 << 5
_IO_IMMEDIATE = 1 << 6
_IO_PORT_SHIFT = 16
_TASK_SWITCH_SOURCE_SHIFT = 30


def cr_access_qualification(
    cr: int, access: CrAccess, register: int = 0, lmsw_source: int = 0, lmsw_from_memory: bool = False
) -> int:
    """Control-register accesses (table 28-3): *cr* is 0, 3, 4 or 8, and 0 for CLTS and LMSW.

    *register* is the general-purpose register of a MOV; *lmsw_source* the 16 bits that LMSW was to load.
    """
    qualification = cr | access << _CR_ACCESS_SHIFT | register << _CR_REGISTER_SHIFT
    if lmsw_from_memory:
        qualification |= _CR_LMSW_MEMORY_OPERAND
    return qualification | lmsw_source << _CR_LMSW_SOURCE_SHIFT


def dr_access_qualification(dr: int, register: int, *, reads: bool) -> int:
    """MOV DR (table 28-4): debug register *dr*, general-purpose *register*; *reads* is MOV from DR."""
    return dr | (_DR_MOV_FROM if reads else 0) | register << _DR_REGISTER_SHIFT


def io_qualification(
    port: int, size: int, *, reads: bool, string: bool = False, rep: bool = False, immediate: bool = False
) -> int:
    """Port I/O (table 28-5): *size* in bytes; *reads* is IN and INS; *immediate*: the port stands in the instruction.

    >>> hex(io_qualification(0x3F8, 1, reads=False))
    '0x3f80000'
    """
    flags = (_IO_IN if reads else 0) | (_IO_STRING if string else 0)
    flags |= (_IO_REP if rep else 0) | (_IO_IMMEDIATE if immediate else 0)
    return size - 1 | flags | port << _IO_PORT_SHIFT


def task_switch_qualification(selector: int, source: TaskSwitchSource) -> int:
    """Task switches (table 28-2): *selector* of the TSS that was to be the new one."""
    return selector | source << _TASK_SWITCH_SOURCE_SHIFT


# --------------------------------------------------------------------------------------- instruction information

_REGISTER1_SHIFT = 3
_ADDRESS_SIZE_SHIFT = 7
_REGISTER_OPERAND = 1 << 10
_OPERAND_SIZE_SHIFT = 11
_SEGMENT_SHIFT = 15
_INDEX_SHIFT = 18
_NO_INDEX = 1 << 22
_BASE_SHIFT = 23
_NO_BASE = 1 << 27
_REGISTER2_SHIFT = 28
#: Codes of address sizes and operand sizes, by bytes.
_SIZE_CODES = {2: 0, 4: 1, 8: 2}
#: Codes of scaling factors.
_SCALE_CODES = {1: 0, 2: 1, 4: 2, 8: 3}


def memory_operand_information(
    *,
    address_size: int,
    segment: int,
    base: int | None,
    index: int | None,
    scale: int = 1,
    register2: int = 0,
) -> int:
    """An instruction with a memory operand, ``segment:[base + index * scale + displacement]`` (28-9, 28-13, 28-14).

    *address_size* is in bytes; the displacement is the exit qualification. *register2* is the register operand of
    INVEPT, INVPCID, INVVPID, VMREAD and VMWRITE, and says which instruction on LDTR or TR it was, as in
    :func:`register_operand_information`. For XSAVES, XRSTORS, VMCLEAR, VMPTRLD, VMPTRST and VMXON it stays 0.
    """
    information = _SIZE_CODES[address_size] << _ADDRESS_SIZE_SHIFT | segment << _SEGMENT_SHIFT
    information |= _NO_BASE if base is None else base << _BASE_SHIFT
    information |= _NO_INDEX if index is None else index << _INDEX_SHIFT | _SCALE_CODES[scale]
    return information | register2 << _REGISTER2_SHIFT


def register_operand_information(register1: int, register2: int = 0) -> int:
    """VMREAD, VMWRITE, and the instructions on LDTR and TR, where *register1* stands in for the memory operand.

    *register2* is the register that has the encoding of the VMCS field (table 28-14), or the instruction: 0 SLDT,
    1 STR, 2 LLDT, 3 LTR (table 28-11).
    """
    return _REGISTER_OPERAND | register1 << _REGISTER1_SHIFT | register2 << _REGISTER2_SHIFT


def descriptor_table_information(operand: int, instruction: int, operand_size: int) -> int:
    """GDTR and IDTR (table 28-10): *operand* is that of :func:`memory_operand_information`.

    *instruction* is 0 for SGDT, 1 for SIDT, 2 for LGDT, 3 for LIDT. *operand_size* is 2 or 4 bytes; 4 in 64-bit mode,
    where the bit is undefined.
    """
    return operand | _SIZE_CODES[operand_size] << _OPERAND_SIZE_SHIFT | instruction << _REGISTER2_SHIFT


def random_information(register: int, operand_size: int) -> int:
    """RDRAND and RDSEED (table 28-12): the destination *register*, and its size in bytes."""
    return register << _REGISTER1_SHIFT | _SIZE_CODES[operand_size] << _OPERAND_SIZE_SHIFT


def io_information(address_size: int, segment: int) -> int:
    """INS and OUTS (table 28-8): *address_size* in bytes, and the *segment* that OUTS reads from (for INS, ES)."""
    return _SIZE_CODES[address_size] << _ADDRESS_SIZE_SHIFT | segment << _SEGMENT_SHIFT
