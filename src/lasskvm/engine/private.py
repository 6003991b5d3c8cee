"""Unicorn's private fields, and nothing else touches them.

Unicorn has no API for the privilege level, segment caches, pending interrupts or SVM intercepts, so direct execution
reads and writes the translator's own structures: ``CPUX86State`` ("env"), ``CPUState`` ("cpu") and ``uc_struct``
("uc"). The offsets below are those of Unicorn 2.1.4 for x86-64 hosts; :mod:`lasskvm.engine.calibration` checks those
that the public API reaches on a live instance, and the version for the others (SVM intercepts, the pending event).

All functions are of the compiled subset: they run in Numba code and, in tests, as plain Python. ``env``, ``cpu`` and
``uc`` are host addresses, ``state`` is a vCPU's words (:mod:`lasskvm.state`).
"""

from lasskvm.engine.native import (
    foreign_function,
    load8,
    load32,
    load64,
    store8,
    store16,
    store32,
    store64,
)
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CPL,
    CR0,
    CR2,
    CR3,
    CR4,
    DR0,
    DR6,
    EFER,
    GDT_BASE,
    GDT_LIMIT,
    IDT_BASE,
    IDT_LIMIT,
    INTERRUPT_SHADOW,
    KERNEL_GS_BASE,
    LIMIT,
    NMI_BLOCKED,
    RFLAGS,
    RIP,
    SEGMENT_WORDS,
    SEGMENTS,
    SELECTOR,
    Words,
)
from lasskvm.x86.registers import (
    AR_DB,
    AR_L,
    AR_P,
    AR_UNUSABLE,
    CR0_EM,
    CR0_MP,
    CR0_PE,
    CR0_TS,
    CR4_OSFXSR,
    CR4_PKE,
    CR4_SMAP,
    CS,
    DS,
    EFER_LMA,
    EFER_SCE,
    ES,
    LDTR,
    MASK32,
    MASK64,
    RFLAGS_ARITHMETIC,
    RFLAGS_DF,
    RFLAGS_FIXED,
    RFLAGS_VM,
    SS,
    TR,
)

UNICORN_VERSION = "2.1.4"

# uc_struct
_UC_CPU = 440
_UC_NO_EXIT_REQUEST = 2034

# CPUState
_CPU_INTERRUPT_REQUEST = 28
_CPU_EXCEPTION_INDEX = 33184
CPU_ENV = 35408
CPU_TLB_FILL = 42840

# TranslatorOps, a table of functions; DisasContextBase: the linear address of the instruction to translate next
TRANSLATOR_FUNCTIONS, TRANSLATE_INSTRUCTION = 7, 4
BLOCK_NEXT = 0x10

# CPUX86State
_REGS, _EIP, _EFLAGS, _CC_SRC, _CC_OP, _DF = 0x00, 0x80, 0x88, 0x98, 0xA8, 0xAC
_HFLAGS, _HFLAGS2, _SEGS, _LDT, _TR, _GDT, _IDT = 0xB0, 0xB4, 0xB8, 0x148, 0x160, 0x178, 0x190
_CR, _EFER, _KERNEL_GS_BASE = 0x1A8, 0x250, 0x1300
_CSTAR = 0x12F0
#: Where :func:`context_of` looks.
CPU_CONTEXT = CPU_ENV + _CSTAR
_ERROR_CODE, _EXCEPTION_IS_INT, _DR, _OLD_EXCEPTION = 0x1508, 0x150C, 0x1518, 0x1578
_VM_VMCB, _INTERCEPT, _INTERCEPT_CR_READ, _INTERCEPT_CR_WRITE = 0x1580, 0x1590, 0x1598, 0x159A
_INTERCEPT_DR_READ, _INTERCEPT_DR_WRITE, _INTERCEPT_EXCEPTIONS = 0x159C, 0x159E, 0x15A0
_FEATURES = 0x1600
#: Words of ``env->features`` in use: CPUID 1 EDX, 1 ECX, 7.0 EBX, 7.0 ECX, 7.0 EDX, 7.1 EAX, 80000001 EDX, ECX.
FEATURE_WORDS = 8

_SEGMENT_CACHE_SIZE = 24
_CACHE_BASE, _CACHE_LIMIT, _CACHE_FLAGS = 8, 16, 20
_CACHE_ATTRIBUTES = 0xF0FF
_CACHE_ATTRIBUTES_SHIFT = 8

_CC_OP_EFLAGS = 1
_DF_DOWN = 0xFFFFFFFF

_HF_CPL = 3
_HF_INHIBIT_IRQ, _HF_CS32, _HF_SS32, _HF_ADDSEG, _HF_PE = 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7
_HF_LMA, _HF_CS64, _HF_GUEST, _HF_OSFXSR, _HF_SMAP = 1 << 14, 1 << 15, 1 << 21, 1 << 22, 1 << 23
_HF_IOBPT = 1 << 24
#: MP, EM and TS stand in hflags 8 bits above their places in CR0.
_HF_CR0_SHIFT = 8
_HF2_NMI = 1 << 2

_CPU_INTERRUPT_HARD = 2
_DR7_FIXED = 0x400

#: MMU indexes: supervisor-mode accesses with SMAP in force, user-mode accesses, supervisor-mode accesses without SMAP.
MMU_KERNEL = 0
MMU_USER = 1
MMU_KERNEL_NO_SMAP = 2

_cc_compute_all = foreign_function(32, 64, 32)
_update_dr7 = foreign_function(0, 64, 32)

# ------------------------------------------------------------------------------------ finding one's way around


def cpu_of(uc: int) -> int:
    """The CPUState of a Unicorn instance."""
    return load64(uc + _UC_CPU)


def context_of(cpu: int) -> int:
    """The engine's context, kept where SYSCALL's compatibility-mode target would be: no translated code uses it."""
    return load64(cpu + CPU_CONTEXT)


def set_context(cpu: int, context: int) -> None:
    """Set what :func:`context_of` returns."""
    store64(cpu + CPU_CONTEXT, context)


def tlb_fill(cpu: int) -> int:
    """The address of the CPU class's ``tlb_fill``."""
    return load64(cpu + CPU_TLB_FILL)


def replace_tlb_fill(cpu: int, function: int) -> None:
    """Make *function* the ``tlb_fill`` of this instance's CPU class."""
    store64(cpu + CPU_TLB_FILL, function)


def hardware_efer(env: int) -> int:
    """IA32_EFER as the translator has it (for calibration)."""
    return load64(env + _EFER)


def descriptor_tables(env: int) -> tuple[int, int, int, int]:
    """GDT base and limit, IDT base and limit (for calibration)."""
    return (
        load64(env + _GDT + _CACHE_BASE),
        load32(env + _GDT + _CACHE_LIMIT),
        load64(env + _IDT + _CACHE_BASE),
        load32(env + _IDT + _CACHE_LIMIT),
    )


def feature(env: int, word: int) -> int:
    """Word *word* of the feature bits that gate the translator."""
    return load64(env + _FEATURES + 8 * word)


def set_feature(env: int, word: int, value: int) -> None:
    """Set what :func:`feature` returns."""
    store64(env + _FEATURES + 8 * word, value)


# ----------------------------------------------------------------------------------------- while the guest runs


def guest_cpl(env: int) -> int:
    """The current privilege level."""
    return load32(env + _HFLAGS) & _HF_CPL


def guest_rflags(env: int) -> int:
    """RFLAGS without the arithmetic flags and DF, which the translator keeps lazily."""
    return load64(env + _EFLAGS)


def guest_linear_rip(env: int) -> int:
    """The linear address of the next instruction."""
    rip = load64(env + _EIP)
    if load32(env + _HFLAGS) & _HF_CS64 == 0:
        rip = (rip + load64(env + _SEGS + CS * _SEGMENT_CACHE_SIZE + _CACHE_BASE)) & MASK32
    return rip


def guest_runs_64bit_code(env: int) -> bool:
    """Whether CS selects 64-bit mode."""
    return load32(env + _HFLAGS) & _HF_CS64 != 0


def set_guest_rip(env: int, rip: int) -> None:
    """Set RIP."""
    store64(env + _EIP, rip)


def set_guest_rax_rdx(env: int, rax: int, rdx: int) -> None:
    """Set RAX and RDX, for RDTSC."""
    store64(env + _REGS, rax)
    store64(env + _REGS + 16, rdx)


def set_guest_rcx(env: int, rcx: int) -> None:
    """Set RCX, for RDTSCP."""
    store64(env + _REGS + 8, rcx)


def set_single_step(env: int, trap_flag: int) -> None:
    """Set RFLAGS.TF (*trap_flag*) behind the guest's back."""
    store64(env + _EFLAGS, load64(env + _EFLAGS) | trap_flag)


def clear_single_step(env: int, trap_flag: int) -> None:
    """Undo :func:`set_single_step`."""
    store64(env + _EFLAGS, load64(env + _EFLAGS) & (MASK32 ^ trap_flag))


def exception_error_code(env: int) -> int:
    """The error code of the exception that the interrupt hook is called for."""
    return load32(env + _ERROR_CODE)


def forget_exception(env: int) -> None:
    """Clear what Unicorn keeps of the last event: the next would get its RIP from it, or become a double fault."""
    store32(env + _EXCEPTION_IS_INT, 0)
    store32(env + _OLD_EXCEPTION, 0xFFFFFFFF)


def set_exception_index(cpu: int, index: int) -> None:
    """Choose the number with which the next ``cpu_loop_exit`` reaches the interrupt hook."""
    store32(cpu + _CPU_EXCEPTION_INDEX, index)


def request_interrupt_window(cpu: int) -> None:
    """Ask for an exit as soon as the guest can take an interrupt (IF=1, no STI or MOV SS shadow)."""
    store32(cpu + _CPU_INTERRUPT_REQUEST, load32(cpu + _CPU_INTERRUPT_REQUEST) | _CPU_INTERRUPT_HARD)


def clear_interrupt_window(cpu: int) -> None:
    """Withdraw :func:`request_interrupt_window`; Unicorn loops for ever when the exit is not withdrawn in its hook."""
    request = load32(cpu + _CPU_INTERRUPT_REQUEST)
    store32(cpu + _CPU_INTERRUPT_REQUEST, request & (MASK32 ^ _CPU_INTERRUPT_HARD))


# ------------------------------------------------------------------------------------------------------- set-up


def set_no_exit_request(uc: int) -> None:
    """Let the guest stop between translation blocks only, so that no instruction runs twice."""
    store8(uc + _UC_NO_EXIT_REQUEST, 1)


def no_exit_request_field(uc: int) -> int:
    """The byte that :func:`set_no_exit_request` sets (for calibration)."""
    return load8(uc + _UC_NO_EXIT_REQUEST)


def exception_index_field(cpu: int) -> int:
    """CPUState's ``exception_index`` (for calibration)."""
    return load32(cpu + _CPU_EXCEPTION_INDEX)


def set_instruction_intercepts(env: int, instructions: int) -> None:
    """Intercept *instructions*: bit *n* is SVM exit code 0x60 + n (VMCB offset 0x00C)."""
    store64(env + _INTERCEPT, instructions)


def set_cr_read_intercepts(env: int, registers: int) -> None:
    """Intercept MOV from the control registers whose bits are set (VMCB offset 0x000)."""
    store16(env + _INTERCEPT_CR_READ, registers)


def set_intercepts(env: int, vmcb_gpa: int, cr_read: int, cr_write: int, dr_read: int, dr_write: int) -> None:
    """Enter SVM guest mode with these intercept masks, as VMCB offsets 0x000 to 0x008, and every exception.

    ``vmcb_gpa`` is a page whose offset 0x48 holds the address of the MSR permission map.
    """
    store64(env + _VM_VMCB, vmcb_gpa)
    store16(env + _INTERCEPT_CR_READ, cr_read)
    store16(env + _INTERCEPT_CR_WRITE, cr_write)
    store16(env + _INTERCEPT_DR_READ, dr_read)
    store16(env + _INTERCEPT_DR_WRITE, dr_write)
    store32(env + _INTERCEPT_EXCEPTIONS, 0xFFFFFFFF)


# ------------------------------------------------------------------------------- between env and the state words


def save_state(env: int, state: Words, cc_compute_all: int) -> None:
    """Store the running state in the words. *cc_compute_all* is the address of ``cpu_cc_compute_all``.

    CR0, CR3, CR4, EFER, the debug registers but DR6 and the descriptor tables change only in intercepted instructions,
    so the words are already right for them.
    """
    for register in range(16):
        state[register] = load64(env + _REGS + 8 * register)
    state[RIP] = load64(env + _EIP)
    flags = load64(env + _EFLAGS) | _cc_compute_all(cc_compute_all, env, load32(env + _CC_OP))
    if load32(env + _DF) == _DF_DOWN:
        flags |= RFLAGS_DF
    state[RFLAGS] = flags | RFLAGS_FIXED
    hflags = load32(env + _HFLAGS)
    state[CPL] = hflags & _HF_CPL
    state[INTERRUPT_SHADOW] = (hflags & _HF_INHIBIT_IRQ) // _HF_INHIBIT_IRQ
    state[NMI_BLOCKED] = (load32(env + _HFLAGS2) & _HF2_NMI) // _HF2_NMI
    state[CR2] = load64(env + _CR + 16)
    state[DR6] = load64(env + _DR + 48)
    state[KERNEL_GS_BASE] = load64(env + _KERNEL_GS_BASE)
    for number in range(6):
        _save_segment(env + _SEGS + number * _SEGMENT_CACHE_SIZE, state, SEGMENTS + SEGMENT_WORDS * number)
    _save_segment(env + _LDT, state, SEGMENTS + SEGMENT_WORDS * LDTR)
    _save_segment(env + _TR, state, SEGMENTS + SEGMENT_WORDS * TR)


def _save_segment(cache: int, state: Words, first: int) -> None:
    attributes = (load32(cache + _CACHE_FLAGS) >> _CACHE_ATTRIBUTES_SHIFT) & _CACHE_ATTRIBUTES
    if attributes & AR_P == 0:
        attributes |= AR_UNUSABLE
    state[first + SELECTOR] = load32(cache) & 0xFFFF
    state[first + BASE] = load64(cache + _CACHE_BASE)
    state[first + LIMIT] = load32(cache + _CACHE_LIMIT)
    state[first + ATTRIBUTES] = attributes


def load_state(env: int, state: Words) -> None:
    """Make the words the running state."""
    for register in range(16):
        store64(env + _REGS + 8 * register, state[register])
    store64(env + _EIP, state[RIP])
    flags = state[RFLAGS]
    store64(env + _EFLAGS, (flags & (MASK32 ^ (RFLAGS_ARITHMETIC | RFLAGS_DF))) | RFLAGS_FIXED)
    store64(env + _CC_SRC, flags & RFLAGS_ARITHMETIC)
    store32(env + _CC_OP, _CC_OP_EFLAGS)
    direction = 1
    if flags & RFLAGS_DF != 0:
        direction = _DF_DOWN
    store32(env + _DF, direction)
    store32(env + _HFLAGS, hflags_of(state) | (load32(env + _HFLAGS) & _HF_IOBPT) | _HF_GUEST)
    store32(env + _HFLAGS2, (load32(env + _HFLAGS2) & (MASK32 ^ _HF2_NMI)) | (state[NMI_BLOCKED] * _HF2_NMI))
    store64(env + _CR, state[CR0])
    store64(env + _CR + 16, state[CR2])
    store64(env + _CR + 24, state[CR3])
    # Without PKE the translator's RDPKRU and WRPKRU are #UD, which we take over.
    store64(env + _CR + 32, state[CR4] & (MASK64 ^ CR4_PKE))
    # SYSCALL, SYSRET, SYSENTER and SYSEXIT are ours: without SCE the translator's SYSRET is #UD, which we take over.
    store64(env + _EFER, state[EFER] & (MASK32 ^ EFER_SCE))
    store64(env + _DR + 48, state[DR6])
    store64(env + _KERNEL_GS_BASE, state[KERNEL_GS_BASE])
    for number in range(6):
        _load_segment(env + _SEGS + number * _SEGMENT_CACHE_SIZE, state, SEGMENTS + SEGMENT_WORDS * number)
    _load_segment(env + _LDT, state, SEGMENTS + SEGMENT_WORDS * LDTR)
    _load_segment(env + _TR, state, SEGMENTS + SEGMENT_WORDS * TR)
    store64(env + _GDT + _CACHE_BASE, state[GDT_BASE])
    store32(env + _GDT + _CACHE_LIMIT, state[GDT_LIMIT])
    store64(env + _IDT + _CACHE_BASE, state[IDT_BASE])
    store32(env + _IDT + _CACHE_LIMIT, state[IDT_LIMIT])


def set_flags_for_entry(env: int, state: Words) -> None:
    """Put all of RFLAGS into one field: at the start of a run the translator takes them apart itself."""
    store64(env + _EFLAGS, state[RFLAGS] | RFLAGS_FIXED)


def _load_segment(cache: int, state: Words, first: int) -> None:
    attributes = state[first + ATTRIBUTES]
    if attributes & AR_UNUSABLE != 0:
        attributes &= MASK32 ^ AR_P
    store32(cache, state[first + SELECTOR])
    store64(cache + _CACHE_BASE, state[first + BASE])
    store32(cache + _CACHE_LIMIT, state[first + LIMIT])
    store32(cache + _CACHE_FLAGS, (attributes & _CACHE_ATTRIBUTES) << _CACHE_ATTRIBUTES_SHIFT)


def hflags_of(state: Words) -> int:
    """The translator's summary of the mode (``hflags``) of *state*, without the SVM and breakpoint bits."""
    code = state[SEGMENTS + SEGMENT_WORDS * CS + ATTRIBUTES]
    stack = state[SEGMENTS + SEGMENT_WORDS * SS + ATTRIBUTES]
    flags = state[CPL] | (state[INTERRUPT_SHADOW] * _HF_INHIBIT_IRQ)
    flags |= (state[CR0] & (CR0_MP | CR0_EM | CR0_TS)) << _HF_CR0_SHIFT
    protected = state[CR0] & CR0_PE != 0
    if protected:
        flags |= _HF_PE
    if state[CR4] & CR4_OSFXSR != 0:
        flags |= _HF_OSFXSR
    if state[CR4] & CR4_SMAP != 0:
        flags |= _HF_SMAP
    if stack & AR_DB != 0:
        flags |= _HF_SS32
    long_mode = state[EFER] & EFER_LMA != 0
    if long_mode:
        flags |= _HF_LMA
    if long_mode and code & AR_L != 0:
        return flags | _HF_CS64 | _HF_CS32
    if code & AR_DB != 0:
        flags |= _HF_CS32
    flat = (
        state[SEGMENTS + SEGMENT_WORDS * DS + BASE]
        | state[SEGMENTS + SEGMENT_WORDS * ES + BASE]
        | state[SEGMENTS + SEGMENT_WORDS * SS + BASE]
    ) == 0
    if not (protected and flat and flags & _HF_CS32 != 0) or state[RFLAGS] & RFLAGS_VM != 0:
        flags |= _HF_ADDSEG
    return flags


def load_breakpoints(env: int, state: Words, translated_dr7: int, update_dr7: int) -> None:
    """Give the translator DR0 to DR3 and *translated_dr7*, the part of DR7 that it implements.

    *update_dr7* is the address of ``cpu_x86_update_dr7``. The former breakpoints go first, while their addresses stand.
    """
    _update_dr7(update_dr7, env, _DR7_FIXED)
    for number in range(4):
        store64(env + _DR + 8 * number, state[DR0 + number])
    _update_dr7(update_dr7, env, translated_dr7)


def breakpoints_differ(env: int, state: Words, translated_dr7: int) -> bool:
    """Whether :func:`load_breakpoints` has something to do."""
    changed = load64(env + _DR + 56) != translated_dr7
    for number in range(4):
        changed = changed or load64(env + _DR + 8 * number) != state[DR0 + number]
    return changed


def tables_moved(env: int, state: Words) -> bool:
    """Whether the GDT, LDT or TSS of *state* lies elsewhere than the running one's (before :func:`load_state`)."""
    return (
        load64(env + _GDT + _CACHE_BASE) != state[GDT_BASE]
        or load32(env + _GDT + _CACHE_LIMIT) != state[GDT_LIMIT]
        or load64(env + _LDT + _CACHE_BASE) != state[SEGMENTS + SEGMENT_WORDS * LDTR + BASE]
        or load64(env + _TR + _CACHE_BASE) != state[SEGMENTS + SEGMENT_WORDS * TR + BASE]
    )
