/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a unit-test image is written with: results, faults that are expected, handlers, user mode, page tables.
 *
 * An image defines `subjects`; main() in lib/main.c runs those that the command line names, or all.
 */
#ifndef LIB_LIB_H
#define LIB_LIB_H

#include "cpu.h"

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/* ---- console.c: COM1, polled ---- */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- string.c ---- */
void *memset(void *to, int byte, size_t size);
void *memcpy(void *to, const void *from, size_t size);
int memcmp(const void *a, const void *b, size_t size);
size_t strlen(const char *text);
int strncmp(const char *a, const char *b, size_t size);

/* ---- main.c: which tests run, and what came of them ---- */
struct subject {
	const char *name;
	void (*run)(void);
	/* Only runs when the command line names it: it does not come back, or needs an argument. */
	bool on_request;
};
extern const struct subject subjects[];

/* One expectation: prints PASS or FAIL with the text, and gives `holds` back. */
bool check(bool holds, const char *format, ...) __attribute__((format(printf, 2, 3)));
void skip(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* True if CPUID offers the feature; else says that what follows is skipped. */
bool require(struct feature feature, const char *name);
/* The value of a word `name=value` of the command line, or NULL. */
const char *argument(const char *name);
/* The decimal number at the start of a text. */
u64 number(const char *text);
/* The information structure of the boot loader, in 32-bit fields. */
extern const u32 *boot_info;
/* Ends the run without a summary. */
void leave(u32 code) __attribute__((noreturn));
void summary_and_leave(void) __attribute__((noreturn));

/* ---- trap.c: exceptions and interrupts ---- */
struct trap {
	u64 r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
	u64 vector, error, rip, cs, rflags, rsp, ss;
};

/* What stopped the last TRY() or run_user(); `vector` is NO_FAULT if nothing did. */
#define NO_FAULT (-1)
struct fault {
	int vector;
	u64 cr2;
	u64 dr6;
	struct trap regs;
};
extern struct fault last_fault;
extern u64 recovery_rip, recovery_rsp, recovery_rbp, recovery_rbx, recovery_flags;

/*
 * Executes TEXT. An exception is recorded in last_fault, and execution goes on behind TEXT with the stack, RBP, RBX
 * and flags as they were before. Registers that TEXT or the code it runs into may destroy have to be named as
 * clobbers. Operands must not be relative to RSP if TEXT moves it.
 */
#define TRY(text, ...)                                                                                  \
	asm volatile("movl $-1, last_fault\n\t"                                                         \
		     "pushfq\n\t"                                                                       \
		     "popq recovery_flags\n\t"                                                          \
		     "movq %%rsp, recovery_rsp\n\t"                                                     \
		     "movq %%rbp, recovery_rbp\n\t"                                                     \
		     "movq %%rbx, recovery_rbx\n\t"                                                     \
		     "movq $771f, recovery_rip\n\t" text "\n771:\n\t"                                   \
		     "movq $0, recovery_rip\n\t" __VA_ARGS__)

/* Expectations about last_fault. */
bool check_no_fault(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool check_fault(int vector, u64 error, const char *format, ...) __attribute__((format(printf, 3, 4)));
bool check_page_fault(u64 error, u64 address, const char *format, ...) __attribute__((format(printf, 3, 4)));

typedef void (*handler)(struct trap *regs);
/* Calls `function` for a vector from now on; NULL: back to recovery. */
void set_handler(int vector, handler function);

/* Interrupt and trap gates, and segments (SDM volume 3, "64-Bit Mode IDT", "Segment Descriptors"). */
struct gate {
	u16 offset_low, selector;
	u8 ist, type;
	u16 offset_middle;
	u32 offset_high, zero;
};
extern struct gate idt[VECTORS];
extern u64 gdt[32];
enum gate_type { GATE_PRESENT = 0x80, GATE_USER = 0x60, GATE_INTERRUPT = 0xe, GATE_TRAP = 0xf };

struct tss {
	u32 reserved0;
	u64 rsp[3];
	u64 reserved1;
	u64 ist[7];
	u64 reserved2;
	u16 reserved3, io_map;
	/* All ports but those that a test sets. The byte behind the map must be all ones. */
	u8 io_permission[0x2000 + 1];
} __attribute__((packed));
extern struct tss tss;

enum selector {
	KERNEL_CS = 0x08,
	KERNEL_DS = 0x10,
	KERNEL_CS32 = 0x18,
	KERNEL_CS16 = 0x20,
	KERNEL_DS16 = 0x28,
	USER_CS32 = 0x33,
	USER_DS = 0x3b,
	USER_CS = 0x43,
	TSS_SELECTOR = 0x50,
	SPARE_SELECTOR = 0x60, /* ... 0xf8: for tests */
};
enum { EXCEPTION_IST = 1, DOUBLE_FAULT_IST = 2, NMI_IST = 3, USER_EXIT_VECTOR = 0x20, FIRST_FREE_VECTOR = 0x30 };

void init_traps(void);

/* ---- user.c: code at CPL 3 ---- */
#define USER_BASE 0x8000000000ull
#define USER_CODE_PAGE USER_BASE
#define USER_STACK_TOP (USER_BASE + 0x3000)
#define USER_DATA (USER_BASE + 0x4000)
#define USER_SPARE (USER_BASE + 0x10000)

/* Code that run_user() copies: position-independent, it ends by INT into the kernel. */
#define USER_CODE(name, text)                                                                           \
	asm(".pushsection .rodata\n" #name ": " text "\nint $0x20\n" #name "_end:\n.popsection");       \
	extern const char name[], name##_end[]
#define RUN_USER(name, ...) run_user(name, name##_end, (struct user_registers){__VA_ARGS__})

struct user_registers {
	u64 rdi, rsi, rdx;
	u64 flags;
};
/* Runs code at CPL 3; the fault or the INT 20h that ends it is in last_fault. */
void run_user(const char *code, const char *end, struct user_registers registers);
/* Did it get to its end? */
bool check_user_ended(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- paging.c: page tables ---- */
enum pte {
	PTE_P = 1 << 0,
	PTE_W = 1 << 1,
	PTE_U = 1 << 2,
	PTE_A = 1 << 5,
	PTE_D = 1 << 6,
	PTE_PS = 1 << 7,
	PTE_G = 1 << 8,
};
#define PTE_NX BIT(63)
#define PTE_KEY(key) ((u64)(key) << 59)
#define PTE_ADDRESS 0x000ffffffffff000ull
#define PAGE_SIZE 4096ull

extern u64 top_table[512];
/* A zeroed page; its address as C has it. */
void *alloc_page(void);
/* The entry of level 1 (4 KiB page) to 4 that translates an address, made with its tables if need be. */
u64 *entry_of(u64 address, int level);
void map_page(u64 address, u64 physical, u64 flags);
static inline u64 physical_of(const void *pointer) { return (u64)pointer - KERNEL_BASE; }
/* Where all of the first 4 GiB of physical memory can be accessed. */
#define DIRECT_MAP (KERNEL_BASE ? 0xffff800000000000ull : 0)
static inline void *direct(u64 physical) { return (void *)(DIRECT_MAP + physical); }
static inline void flush_tlb(void) { write_cr3(read_cr3()); }

#endif
