"""The engine's context: one array of 64-bit words that native callbacks and Python share.

The constants are word indices. Addresses are host addresses; ``FN_*`` words hold addresses of C functions.
"""

# Where things are
UC, CPU, ENV, STATE, MEMORY = range(5)

# Functions of the Unicorn library and of this process
(
    FN_EMU_START, FN_EMU_STOP, FN_TLB_SET_PAGE, FN_TLB_FLUSH, FN_LOOP_EXIT_RESTORE, FN_RESTORE_STATE,
    FN_LOOP_EXIT_NOEXC, FN_CC_COMPUTE_ALL, FN_UPDATE_DR7, FN_INVALIDATE_RANGE, FN_MONOTONIC,
    FN_PORT_READ, FN_PORT_WRITE, FN_TLB_SET_DIRTY, FN_TLB_FLUSH_PAGE, FN_TLB_FLUSH_INDEXES,
) = range(8, 24)  # fmt: skip

# The exit record: why the guest stopped. What the detail words mean is said with the EXIT_* reasons.
EXIT_REASON, EXIT_VECTOR, EXIT_ERROR_CODE, EXIT_ADDRESS, EXIT_FLAGS = range(24, 29)

# A memory fault on its way from the TLB fill to the interrupt hook
FAULT_VECTOR, FAULT_ERROR_CODE, FAULT_ADDRESS, FAULT_FLAGS = range(30, 34)

# Time, counted in executed blocks
BLOCKS, BLOCK_DEADLINE, LAST_BLOCK, TSC_PER_BLOCK, TSC_BASE, HOST_DEADLINE, HOST_POLL_BLOCKS = range(34, 41)

# W^X bookkeeping: the current TLB epoch, and whether the fill maps guest-physical addresses one to one (set-up only)
EPOCH, IDENTITY_FILL = range(42, 44)
#: A data breakpoint was hit while its instruction is executed again under RFLAGS.TF: bits 3:0 as in DR6.
WATCH_HIT = 44
#: Whether the trap flag that single-steps over a watch hit is ours and not the guest's.
WATCH_BORROWED_TF = 45

# Private guest-physical pages of the engine, for implicit accesses to where no memory is: all ones (read-only), and a
# sink for dropped writes
ONES_GPA, SINK_GPA = range(46, 48)

# Counters
(
    COUNT_FILLS, COUNT_FAULTS, COUNT_EVENTS, COUNT_SYSCALLS, COUNT_CODE_INVALIDATIONS, COUNT_EXITS,
) = range(48, 54)  # fmt: skip

#: ``uc_emu_start``'s result of the last run.
EMU_RESULT = 56
#: Two words for ``clock_gettime``.
HOST_TIME = 58
#: Four words for the results of functions that Python calls.
RESULT = 60
#: The bytes at RIP of an intercepted instruction, two words, and how many of them there are (0: not known).
INSTRUCTION, INSTRUCTION_BYTES = 116, 118
#: Whether the guest's CPUID offers RDPID.
OFFERS_RDPID = 119
#: Whether to ask for an exit as soon as the guest can take an interrupt.
WANT_INTERRUPT_WINDOW = 57

#: What the next change of CR3 has to forget beside global pages: supervisor pages in a list, and user pages at all.
USER_PAGES, LOCAL_COUNT = 54, 55
LOCAL_PAGES = 100
LOCAL_PAGES_KEPT = 16

#: RAM addresses of the memory slots in Unicorn's own numbering, in slot-table order.
SLOT_RAM_ADDRESS = 64

#: Coalesced port output: a port whose bytes are only collected, and a port that reads as a constant meanwhile.
COALESCED_WRITE_PORT, COALESCED_READ_PORT, COALESCED_READ_VALUE, COALESCED_COUNT, COALESCED_BUFFER = range(
    120, 125
)
COALESCED_BYTES = 4096
#: No port has this number.
NO_PORT = 1 << 16

#: While a block is translated: the translator's own function for one instruction, ``get_page_addr_code_hostp``, and the
#: linear page of code that was looked at last with its host address.
FN_TRANSLATE_INSTRUCTION, FN_CODE_PAGE, CODE_PAGE, CODE_HOST = range(128, 132)
#: Where a run ends before the instruction at this linear address.
RUN_UNTIL = 132
#: What otherwise happens natively and is left to the emulator now, because the VM's MSR filter or the hypervisor of a
#: nested guest may have something to say about it: ``LEAVE_*`` bits.
LEFT_TO_EMULATOR = 133
LEAVE_CR3, LEAVE_MSRS, LEAVE_PORTS, LEAVE_RDPID, LEAVE_RDTSC, LEAVE_RDTSCP = (
    1 << number for number in range(6)
)
#: No page and no instruction has this linear address: it is not canonical, and more than 32 bits.
NO_ADDRESS = 1 << 62

CONTEXT_WORDS = 136

# ------------------------------------------------------------------------------------------------- exit reasons
#: The block deadline was reached, or somebody called stop.
EXIT_STOPPED = 0
#: The guest can take an interrupt.
EXIT_INTERRUPT_WINDOW = 1
#: A memory access faulted (vector, error code, address, lass flags) and native delivery did not apply.
EXIT_MEMORY_FAULT = 2
#: The translator raised an exception (vector, error code).
EXIT_EXCEPTION = 3
#: An intercepted instruction; EXIT_VECTOR holds the SVM exit code.
EXIT_INTERCEPT = 4
#: A data access (lass flags) to guest-physical EXIT_ADDRESS, where no memory is, or a write to read-only memory; RIP is
#: on the instruction, which is not done.
EXIT_MMIO = 5
#: An instruction fetch from guest-physical EXIT_ADDRESS, where no memory is.
EXIT_FETCH_FROM_HOLE = 6
#: Port I/O that nobody on the bus claims; RIP is on the instruction, which is not done.
EXIT_PORT_IO = 7

# ------------------------------------------------------------------------------- numbers in the interrupt hook
#: Unicorn adds this to SVM exit codes.
SVM_EXIT_BASE = 0x100
SVM_EXIT_EXCEPTION = 0x40
SVM_EXIT_CR_READ = 0x00
SVM_EXIT_CR_WRITE = 0x10
SVM_EXIT_DR_READ = 0x20
SVM_EXIT_DR_WRITE = 0x30
SVM_EXIT_INTR = 0x60
SVM_EXIT_IDTR_READ, SVM_EXIT_GDTR_READ, SVM_EXIT_LDTR_READ, SVM_EXIT_TR_READ = range(0x66, 0x6A)
SVM_EXIT_IDTR_WRITE, SVM_EXIT_GDTR_WRITE, SVM_EXIT_LDTR_WRITE, SVM_EXIT_TR_WRITE = range(0x6A, 0x6E)
SVM_EXIT_RDTSC = 0x6E
SVM_EXIT_RDPMC = 0x6F
SVM_EXIT_CPUID = 0x72
SVM_EXIT_IRET = 0x74
SVM_EXIT_SWINT = 0x75
SVM_EXIT_INVD = 0x76
SVM_EXIT_PAUSE = 0x77
SVM_EXIT_HLT = 0x78
SVM_EXIT_INVLPG = 0x79
SVM_EXIT_IOIO = 0x7B
SVM_EXIT_MSR = 0x7C
SVM_EXIT_RDTSCP = 0x87
SVM_EXIT_ICEBP = 0x88
SVM_EXIT_WBINVD = 0x89
SVM_EXIT_MONITOR = 0x8A
SVM_EXIT_MWAIT = 0x8B
SVM_EXIT_XSETBV = 0x8D
SVM_EXIT_FIRST_INSTRUCTION = 0x60

#: Our own numbers, beyond all SVM exit codes: what ends an instruction from within one of our callbacks.
EVENT_MEMORY_FAULT = 0x300
EVENT_FETCH_FROM_HOLE = 0x301
EVENT_SYSCALL = 0x302
EVENT_SYSENTER = 0x303
EVENT_PORT = 0x304
EVENT_MMIO = 0x305

#: Set in a port handler's answer, above the value, when a device has claimed the access.
PORT_CLAIMED = 1 << 32
