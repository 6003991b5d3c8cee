"""Writing control and debug registers, PKRU and segment bases: every check, and what a write entails.

A write that may change translations asks direct execution to forget them (``TLB_FLUSH``). Privilege is
checked by the instruction handlers, except for debug registers, where it comes between two other checks.

:func:`set_cr3` and what it calls are in the compiled subset, because a kernel with page-table isolation writes CR3 at
every entry and exit, and so is :func:`set_segment_base`. The others raise :class:`GuestFault`.

Source: Intel SDM volume 2B, MOV (control registers) and MOV (debug registers); volume 3A, 2.5, 4.4.1, 4.10.4.1 (PCIDs),
10.8.5; volume 3B, 18.2; KVM's ``kvm_set_cr0()``, ``kvm_set_cr3()``, ``kvm_set_cr4()``, ``set_efer()`` and
``kvm_set_dr()``.
"""

from __future__ import annotations

from lasskvm.emulator.faults import debug_trap, general_protection, invalid_opcode, raise_linear_fault
from lasskvm.emulator.modes import in_64bit_mode, linear_address_bits
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    CR0,
    CR3,
    CR4,
    CR4_ALLOWED,
    CR8,
    DR0,
    DR6,
    DR7,
    EFER,
    EFER_ALLOWED,
    EPT_FAULT_GPA,
    EPT_OUTCOME,
    EPTP,
    MAXPHYADDR,
    PDPTR0,
    PKRU,
    SEGMENT_WORDS,
    SEGMENTS,
    SELECTOR,
    TLB_FLUSH,
    Words,
    segment_word,
)
from lasskvm.x86.address import is_canonical
from lasskvm.x86.ept import EPT_EXIT, GPA_OF_PDPTES, ept_walk
from lasskvm.x86.exceptions import GP
from lasskvm.x86.paging import PhysicalMemory, load_physical, pdpte_reserved
from lasskvm.x86.registers import (
    AR_L,
    AR_TSS16_BUSY,
    AR_TYPE,
    CR0_AM,
    CR0_CD,
    CR0_EM,
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    CR3_LAM_U48,
    CR3_LAM_U57,
    CR4_CET,
    CR4_DE,
    CR4_LA57,
    CR4_LAM_SUP,
    CR4_LASS,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_PKE,
    CR4_PKS,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    CS,
    DR6_B0,
    DR6_BD,
    DR6_BS,
    DR6_BT,
    DR6_FIXED,
    DR7_FIXED,
    DR7_GD,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    MASK32,
    MASK64,
    TR,
)

__all__ = [
    "get_dr",
    "is_legal_cr3",
    "set_cr0",
    "set_cr3",
    "set_cr4",
    "set_cr8",
    "set_dr",
    "set_efer",
    "set_pkru",
    "set_segment_base",
    "with_machine_status_word",
]

_CR0_DEFINED = (
    CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG
)  # fmt: skip
#: CR0 and CR4 bits that take part in translation.
_CR0_TRANSLATION = CR0_PE | CR0_PG | CR0_WP
_CR4_TRANSLATION = (
    CR4_PSE
    | CR4_PAE
    | CR4_PGE
    | CR4_LA57
    | CR4_PCIDE
    | CR4_SMEP
    | CR4_SMAP
    | CR4_PKE
    | CR4_CET
    | CR4_PKS
    | CR4_LASS
    | CR4_LAM_SUP
)
#: A change of one of these makes PAE paging load its PDPTE registers again (SDM volume 3A, 4.4.1).
_CR0_LOADS_PDPTES = CR0_PG | CR0_CD | CR0_NW
_CR4_LOADS_PDPTES = CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP
#: The CR0 bits that LMSW loads.
_MACHINE_STATUS_WORD = CR0_PE | CR0_MP | CR0_EM | CR0_TS
#: With CR4.PCIDE, the bit of MOV to CR3's operand that asks to keep translations; it is not written to CR3.
_CR3_NO_FLUSH = 1 << 63
_CR3_PCID = 0xFFF
_CR3_LAM = CR3_LAM_U48 | CR3_LAM_U57
_CR3_PDPT_ADDRESS = 0xFFFFFFE0
_PDPTE_BYTES = 8
_CR8_TPR = 0xF

_DR6_WRITABLE = DR6_B0 * 0xF | DR6_BD | DR6_BS | DR6_BT
#: Enable bits, LE, GE, GD, and the length and type fields; RTM (bit 11) needs a feature that is not
#: virtualized.
_DR7_WRITABLE = 0xFFFF03FF | DR7_GD
_LAST_ADDRESS_REGISTER = 3


def set_cr3(state: Words, memory: PhysicalMemory, value: int) -> int:
    """MOV to CR3: 0, or with nothing changed #GP's vector (error code 0) or ``EPT_EXIT``.

    In IA-32e mode reserved bits are refused (:func:`is_legal_cr3`); with PAE paging the PDPTE registers are loaded and
    checked. With CR4.PCIDE, bit 63 of *value* permits to keep translations. They are forgotten nevertheless, as the
    manual allows: there is one set of them, and it belongs to the current PCID.
    """
    if state[EFER] & EFER_LMA != 0:
        if state[CR4] & CR4_PCIDE != 0:
            value = value & (MASK64 ^ _CR3_NO_FLUSH)
        if not is_legal_cr3(state, value):
            return GP
    else:
        value = value & MASK32
        if state[CR0] & CR0_PG != 0 and state[CR4] & CR4_PAE != 0:
            vector = load_pdptes(state, memory, value)
            if vector != 0:
                return vector
    state[CR3] = value
    state[TLB_FLUSH] = 1
    return 0


def is_legal_cr3(state: Words, value: int) -> bool:
    """Whether CR3 may hold *value* in IA-32e mode: bits from MAXPHYADDR up are reserved, but for those of LAM.

    Those exist for processors that have LAM, which CR4.LAM_SUP tells. KVM's ``kvm_vcpu_is_legal_cr3()``.
    """
    if state[CR4_ALLOWED] & CR4_LAM_SUP != 0:
        value = value & (MASK64 ^ _CR3_LAM)
    return value >> state[MAXPHYADDR] == 0


def load_pdptes(state: Words, memory: PhysicalMemory, cr3: int) -> int:
    """Load the PDPTE registers from the table at *cr3*: 0, or with nothing changed #GP's vector or ``EPT_EXIT``."""
    table = cr3 & _CR3_PDPT_ADDRESS
    if state[EPTP] != 0:
        gpa = table
        table, _, outcome = ept_walk(memory, gpa, 0, state[EPTP], state[MAXPHYADDR], GPA_OF_PDPTES)
        if outcome != 0:
            state[EPT_FAULT_GPA] = gpa
            state[EPT_OUTCOME] = outcome
            return EPT_EXIT
    first = load_physical(memory, table, _PDPTE_BYTES)
    second = load_physical(memory, table + _PDPTE_BYTES, _PDPTE_BYTES)
    third = load_physical(memory, table + 2 * _PDPTE_BYTES, _PDPTE_BYTES)
    fourth = load_physical(memory, table + 3 * _PDPTE_BYTES, _PDPTE_BYTES)
    bits = state[MAXPHYADDR]
    if (
        pdpte_reserved(first, bits)
        or pdpte_reserved(second, bits)
        or pdpte_reserved(third, bits)
        or pdpte_reserved(fourth, bits)
    ):
        return GP
    state[PDPTR0] = first
    state[PDPTR0 + 1] = second
    state[PDPTR0 + 2] = third
    state[PDPTR0 + 3] = fourth
    return 0


def set_cr0(words: Words, memory: PhysicalMemory, value: int) -> None:
    """MOV to CR0. Setting PG with EFER.LME activates IA-32e mode, clearing it deactivates the mode.

    Reserved bits among the low 32 are ignored, ET reads as 1 (SDM volume 3A, 2.5).
    """
    if value > MASK32:
        raise general_protection()
    old, new = words[CR0], value & _CR0_DEFINED | CR0_ET
    efer, cr4 = words[EFER], words[CR4]
    if new & CR0_NW and not new & CR0_CD:
        raise general_protection()
    if new & CR0_PG and not new & CR0_PE:
        raise general_protection()
    if cr4 & CR4_CET and not new & CR0_WP:
        raise general_protection()
    if new & CR0_PG and not old & CR0_PG and efer & EFER_LME:
        _check_ia32e_activation(words)
    if old & CR0_PG and not new & CR0_PG and (in_64bit_mode(words) or cr4 & CR4_PCIDE):
        raise general_protection()

    pae_paging = new & CR0_PG and cr4 & CR4_PAE and not efer & EFER_LME
    if pae_paging and (old ^ new) & _CR0_LOADS_PDPTES:
        _load_pdptes_or_fault(words, memory)
    words[CR0] = new
    if new & CR0_PG and efer & EFER_LME:
        words[EFER] = efer | EFER_LMA
    else:
        words[EFER] = efer & ~EFER_LMA
    if (old ^ new) & _CR0_TRANSLATION:
        words[TLB_FLUSH] = 1


def _check_ia32e_activation(words: Words) -> None:
    """The consistency checks of SDM volume 3A, 10.8.5."""
    if not words[CR4] & CR4_PAE or words[segment_word(CS, ATTRIBUTES)] & AR_L:
        raise general_protection()
    # TR is also of a 16-bit type before the first LTR, where processors do not object.
    task_type = words[segment_word(TR, ATTRIBUTES)] & AR_TYPE
    if words[segment_word(TR, SELECTOR)] and task_type == AR_TSS16_BUSY & AR_TYPE:
        raise general_protection()


def set_cr4(words: Words, memory: PhysicalMemory, value: int) -> None:
    """MOV to CR4. Bits that this guest's CPUID does not give are reserved, LASS among them.

    CR4.LASS may be set in any mode; outside IA-32e mode it has no effect.
    """
    if value & ~words[CR4_ALLOWED]:
        raise general_protection()
    old, changed = words[CR4], words[CR4] ^ value
    in_ia32e = words[EFER] & EFER_LMA
    if in_ia32e and changed & (CR4_PAE | CR4_LA57):
        raise general_protection()
    if value & CR4_PCIDE and not old & CR4_PCIDE and (not in_ia32e or words[CR3] & _CR3_PCID):
        raise general_protection()
    if value & CR4_CET and not words[CR0] & CR0_WP:
        raise general_protection()
    if words[CR0] & CR0_PG and value & CR4_PAE and not in_ia32e and changed & _CR4_LOADS_PDPTES:
        _load_pdptes_or_fault(words, memory)
    words[CR4] = value
    if changed & _CR4_TRANSLATION:
        words[TLB_FLUSH] = 1


def set_segment_base(state: Words, number: int, value: int) -> int:
    """WRFSBASE and WRGSBASE: 0, or #GP's vector (error code 0) with nothing changed.

    *number* is ``x86.registers.FS`` or ``GS``, *value* the linear address, which has to be canonical.
    """
    if not is_canonical(value, linear_address_bits(state)):
        return GP
    state[SEGMENTS + SEGMENT_WORDS * number + BASE] = value
    return 0


def set_pkru(words: Words, value: int) -> None:
    """WRPKRU: the rights of the protection keys of user pages, two bits each."""
    if words[PKRU] != value:
        words[PKRU] = value
        words[TLB_FLUSH] = 1


def set_cr8(words: Words, value: int) -> None:
    """MOV to CR8: the task-priority class, four bits."""
    if value & ~_CR8_TPR:
        raise general_protection()
    words[CR8] = value


def set_efer(words: Words, value: int) -> None:
    """WRMSR to IA32_EFER. LMA is read-only and ignored; LME must not change while paging is on."""
    if value & ~words[EFER_ALLOWED]:
        raise general_protection()
    old = words[EFER]
    if (old ^ value) & EFER_LME and words[CR0] & CR0_PG:
        raise general_protection()
    words[EFER] = value & ~EFER_LMA | old & EFER_LMA
    if (old ^ value) & (EFER_NXE | EFER_LME):
        words[TLB_FLUSH] = 1


def with_machine_status_word(cr0: int, value: int) -> int:
    """What LMSW of *value* makes of *cr0*: the low four bits are loaded; it can set PE but not clear it."""
    return cr0 & ~_MACHINE_STATUS_WORD | value & _MACHINE_STATUS_WORD | cr0 & CR0_PE


def get_dr(words: Words, number: int) -> int:
    """MOV from DR*number*; raises as :func:`set_dr` does."""
    number = _debug_register(words, number)
    if number <= _LAST_ADDRESS_REGISTER:
        return words[DR0 + number]
    return words[DR6 if number == 6 else DR7]


def set_dr(words: Words, number: int, value: int) -> None:
    """MOV to DR*number* at the current CPL.

    DR4 and DR5 are DR6 and DR7, or #UD with CR4.DE; CPL 1 to 3 is #GP(0); DR7.GD is #DB with DR6.BD, which is
    a fault: the access does not happen. The upper halves of DR6 and DR7 must be 0; the address registers take
    any value.
    """
    number = _debug_register(words, number)
    if number <= _LAST_ADDRESS_REGISTER:
        words[DR0 + number] = value
        return
    if value > MASK32:
        raise general_protection()
    if number == 6:
        words[DR6] = value & _DR6_WRITABLE | DR6_FIXED
    else:
        words[DR7] = value & _DR7_WRITABLE | DR7_FIXED


def _debug_register(words: Words, number: int) -> int:
    if number in (4, 5):
        if words[CR4] & CR4_DE:
            raise invalid_opcode()
        number += 2
    if words[CPL]:
        raise general_protection()
    if words[DR7] & DR7_GD:
        raise debug_trap(DR6_BD)
    return number


def _load_pdptes_or_fault(words: Words, memory: PhysicalMemory) -> None:
    raise_linear_fault(load_pdptes(words, memory, words[CR3]), 0, 0)
