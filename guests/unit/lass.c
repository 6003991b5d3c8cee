/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * LASS: accesses to the half of the address space that belongs to the other mode. This image is linked to the upper
 * half and leaves nothing of itself in the lower one, which is what it takes to set CR4.LASS at all.
 * Source: Intel's instruction set extensions reference, chapter "Linear Address Space Separation".
 */
#include "lib.h"

/* Pages of the lower half: a supervisor's, a user's, and none. */
#define LOW_PAGE USER_SPARE
#define LOW_USER USER_DATA
#define LOW_UNMAPPED (USER_BASE + 0x50000000)
#define HIGH ((u64)high_page)
#define LAST_BYTES 0xfffffffffffffffcull
#define NON_CANONICAL 0x0000800000000000ull
#define LDT_SELECTOR SPARE_SELECTOR
#define LDT_TYPE 0x82ull
#define DATA_SEGMENT 0x00cf93000000ffffull
/* INT 20h: where a call that gets through ends. */
#define INT_20 0x20cd

static u8 high_page[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
static u64 *low_entry;

static void stac(void) { asm volatile("stac" ::: "cc", "memory"); }
static void clac(void) { asm volatile("clac" ::: "cc", "memory"); }
static void read_at(u64 address) { TRY("mov (%0), %%rax", ::"r"(address) : "rax", "memory"); }
static void write_at(u64 address) { TRY("movb $0xcd, (%0)", ::"r"(address) : "memory"); }
static void call_at(u64 address) { TRY("call *%0", ::"r"(address) : "memory"); }

static void violation(const char *what) { check_fault(VECTOR_GP, 0, "%s", what); }
static void stack_violation(const char *what) { check_fault(VECTOR_SS, 0, "%s", what); }

static void supervisor_data(void)
{
	read_at(LOW_PAGE);
	violation("a supervisor read of the lower half");
	write_at(LOW_PAGE);
	violation("a supervisor write to the lower half");
	read_at(LOW_UNMAPPED);
	violation("of a page that is not mapped: no page fault");
	read_at(LOW_USER);
	violation("of a user page: LASS comes before SMAP");
	read_at(HIGH);
	check_no_fault("the upper half can be read");
	stac();
	read_at(LOW_PAGE);
	clac();
	check_no_fault("AC=1 lets a read through");
	stac();
	read_at(LOW_UNMAPPED);
	clac();
	check_page_fault(0, LOW_UNMAPPED, "and then paging decides");
	write_cr4(read_cr4() & ~CR4_SMAP);
	read_at(LOW_PAGE);
	write_cr4(read_cr4() | CR4_SMAP);
	check_no_fault("CR4.SMAP=0 lets a read through");
	read_at(NON_CANONICAL);
	violation("a non-canonical address is what it was");
	TRY("mov %%gs:(%0), %%rax", ::"r"(LOW_PAGE) : "rax", "memory");
	violation("through GS");
	wrmsr(MSR_GS_BASE, HIGH - LOW_PAGE);
	TRY("mov %%gs:(%0), %%rax", ::"r"(LOW_PAGE) : "rax", "memory");
	check_no_fault("what counts is the linear address, GS.base included");
	wrmsr(MSR_GS_BASE, 0);
}

static void nothing_happened(void)
{
	u64 mark = 0x1234000;

	*low_entry &= ~(u64)(PTE_A | PTE_D);
	invlpg(LOW_PAGE);
	write_cr2(mark);
	write_at(LOW_PAGE);
	check(last_fault.cr2 == mark, "a violation leaves CR2 alone");
	check(!(*low_entry & (PTE_A | PTE_D)), "and the accessed and dirty bits");
}

static void supervisor_fetch(void)
{
	call_at(LOW_PAGE);
	violation("a supervisor fetch from the lower half");
	check(last_fault.regs.rip == LOW_PAGE, "the fault is at the target, not at the CALL");
	stac();
	call_at(LOW_PAGE);
	clac();
	violation("AC=1 does not let a fetch through");
	write_cr4(read_cr4() & ~CR4_SMAP);
	call_at(LOW_PAGE);
	write_cr4(read_cr4() | CR4_SMAP);
	violation("nor does CR4.SMAP=0");
	TRY("jmp *%0", ::"r"(LOW_UNMAPPED) : "memory");
	violation("from a page that is not mapped");
	TRY("push %0\n\tret", ::"r"(LOW_PAGE) : "memory");
	check(last_fault.vector == VECTOR_GP && last_fault.regs.rip == LOW_PAGE, "RET to the lower half");
	TRY("mov %%rsp, %%rax\n\tpush %[ss]\n\tpush %%rax\n\tpush $2\n\tpush %[cs]\n\tpush %[rip]\n\tiretq",
	    ::[ss] "i"(KERNEL_DS), [cs] "i"(KERNEL_CS), [rip] "r"(LOW_PAGE)
	    : "rax", "memory");
	check(last_fault.vector == VECTOR_GP && last_fault.regs.rip == LOW_PAGE, "IRET to the lower half");
	*(u16 *)high_page = INT_20;
	call_at(HIGH);
	check(last_fault.vector == USER_EXIT_VECTOR, "a fetch from the upper half");
}

static void supervisor_stack(void)
{
	TRY("mov %0, %%rsp\n\tpush %%rax", ::"r"(LOW_PAGE + 64) : "memory");
	stack_violation("PUSH to the lower half");
	TRY("mov %0, %%rsp\n\tpop %%rax", ::"r"(LOW_PAGE) : "rax", "memory");
	stack_violation("POP");
	TRY("mov %0, %%rsp\n\tret", ::"r"(LOW_PAGE) : "memory");
	stack_violation("RET");
	TRY("mov %0, %%rsp\n\tcall 1f\n1:", ::"r"(LOW_PAGE + 64) : "memory");
	stack_violation("CALL");
	TRY("mov %0, %%rbp\n\tleave", ::"r"(LOW_PAGE) : "memory");
	stack_violation("LEAVE");
	TRY("mov %0, %%rbp\n\tmov (%%rbp), %%rax", ::"r"(LOW_PAGE) : "rax", "memory");
	stack_violation("an operand based on RBP");
	TRY("mov %0, %%rsp\n\tmov 8(%%rsp), %%rax", ::"r"(LOW_PAGE) : "rax", "memory");
	stack_violation("an operand based on RSP");
	TRY("mov %0, %%rbp\n\tmov %%fs:(%%rbp), %%rax", ::"r"(LOW_PAGE) : "rax", "memory");
	violation("an operand based on RBP, with FS");
}

static void instructions(void)
{
	TRY("rep movsb", ::"S"(LOW_PAGE), "D"(HIGH), "c"(1) : "memory");
	violation("MOVS from the lower half");
	TRY("rep movsb", ::"S"(HIGH), "D"(LOW_PAGE), "c"(1) : "memory");
	violation("MOVS to the lower half");
	TRY("rep movsb", ::"S"(LOW_PAGE), "D"(LOW_PAGE), "c"(0) : "memory");
	check_no_fault("MOVS of nothing");
	TRY("lock cmpxchg16b (%0)", ::"r"(LOW_PAGE) : "rax", "rdx", "memory", "cc");
	violation("CMPXCHG16B");
	TRY("fxsave (%0)", ::"r"(LOW_PAGE) : "memory");
	violation("FXSAVE");
	TRY("lidt (%0)", ::"r"(LOW_PAGE) : "memory");
	violation("the operand of LIDT");
	TRY("clflush (%0)", ::"r"(LOW_PAGE) : "memory");
	violation("CLFLUSH");
	TRY("invlpg (%0)", ::"r"(LOW_PAGE) : "memory");
	check_no_fault("INVLPG names an address and does not access it");
	TRY("prefetcht0 (%0)", ::"r"(LOW_PAGE) : "memory");
	check_no_fault("PREFETCH never faults");
	TRY("nopl (%0)", ::"r"(LOW_PAGE) : "memory");
	check_no_fault("nor does NOP");
	TRY("mov (%0), %%rax", ::"r"(LAST_BYTES) : "rax", "memory");
	violation("a read that starts in the upper half and wraps into the lower one");
	TRY("mov -8(%0), %%rax", ::"r"(LAST_BYTES & ~7ull) : "rax", "memory");
	check(last_fault.vector == VECTOR_PF || last_fault.vector == NO_FAULT, "one that does not wrap");
}

/* An LDT in the lower half. */
static void implicit_accesses(void)
{
	stac();
	*(u64 *)LOW_PAGE = DATA_SEGMENT;
	clac();
	gdt[LDT_SELECTOR / 8] = (PAGE_SIZE - 1) | (LOW_PAGE & 0xffffff) << 16 | LDT_TYPE << 40 |
				(LOW_PAGE >> 24 & 0xff) << 56;
	gdt[LDT_SELECTOR / 8 + 1] = LOW_PAGE >> 32;
	TRY("lldt %w0", ::"r"(LDT_SELECTOR));
	check_no_fault("LLDT does not access the LDT");
	TRY("mov %w0, %%fs", ::"r"(ERROR_TI) : "memory");
	violation("a descriptor in the lower half");
	stac();
	TRY("mov %w0, %%fs", ::"r"(ERROR_TI) : "memory");
	clac();
	violation("AC=1 is not for implicit accesses");
	write_cr4(read_cr4() & ~CR4_SMAP);
	TRY("mov %w0, %%fs", ::"r"(ERROR_TI) : "memory");
	write_cr4(read_cr4() | CR4_SMAP);
	check_no_fault("without CR4.SMAP it is loaded");
	asm volatile("mov %w0, %%fs\n\tlldt %w0" ::"r"(0));
}

USER_CODE(user_read, "mov (%rdi), %rax");
USER_CODE(user_write, "movb $1, (%rdi)");
USER_CODE(user_jump, "jmp *%rdi");
USER_CODE(user_push, "mov %rdi, %rsp; push %rax");
USER_CODE(user_segment, "mov %rdi, %rax; mov $0x33, %ecx; lar %ecx, %edx; mov (%rsi), %rax");
static void user_accesses(void)
{
	RUN_USER(user_read, .rdi = HIGH);
	violation("a user read of the upper half");
	check((last_fault.regs.cs & 3) == 3, "at CPL 3");
	RUN_USER(user_write, .rdi = HIGH);
	violation("a user write to the upper half");
	RUN_USER(user_read, .rdi = HIGH, .flags = FLAG_AC);
	violation("AC is nothing to users");
	RUN_USER(user_read, .rdi = ~0xfffull);
	violation("of a page that is not mapped: no page fault");
	RUN_USER(user_jump, .rdi = HIGH);
	violation("a user fetch from the upper half");
	check(last_fault.regs.rip == HIGH, "at the target");
	RUN_USER(user_push, .rdi = HIGH + 64);
	stack_violation("a user's PUSH to the upper half");
	RUN_USER(user_read, .rdi = LOW_USER);
	check_user_ended("a user read of the lower half");
	RUN_USER(user_read, .rdi = LOW_PAGE);
	check_page_fault(PF_PRESENT | PF_USER, LOW_PAGE, "of a supervisor page there: a page fault");
	RUN_USER(user_segment, .rsi = LOW_USER);
	check_user_ended("LAR of a user reads the GDT as the supervisor");
}

static void switched_off(void)
{
	write_cr4(read_cr4() & ~CR4_LASS);
	stac();
	call_at(LOW_PAGE);
	check(last_fault.vector != VECTOR_GP, "without CR4.LASS the lower half can be executed");
	clac();
	RUN_USER(user_read, .rdi = HIGH);
	check_page_fault(PF_PRESENT | PF_USER, HIGH, "and a user's read of the upper half is a page fault");
	write_cr4(read_cr4() | CR4_LASS);
	call_at(LOW_PAGE);
	violation("until it is set again");
}

static void run(void)
{
	/* From here on nothing of the kernel is in the lower half. */
	top_table[0] = 0;
	flush_tlb();
	if (!require(HAS_LASS, "LASS")) {
		TRY("mov %0, %%cr4", ::"r"(read_cr4() | CR4_LASS) : "memory");
		check_fault(VECTOR_GP, 0, "then CR4.LASS is a reserved bit");
		return;
	}
	if (!require(HAS_SMAP, "SMAP, which LASS needs for data"))
		return;
	map_page(LOW_PAGE, physical_of(alloc_page()), PTE_P | PTE_W);
	low_entry = entry_of(LOW_PAGE, 1);
	*(u16 *)LOW_PAGE = INT_20;
	RUN_USER(user_jump, .rdi = USER_CODE_PAGE + 2);
	write_cr4(read_cr4() | CR4_SMAP | CR4_LASS);
	check(read_cr4() & CR4_LASS, "CR4.LASS is set, and the image goes on");
	supervisor_data();
	nothing_happened();
	supervisor_fetch();
	supervisor_stack();
	instructions();
	implicit_accesses();
	user_accesses();
	switched_off();
}

const struct subject subjects[] = {{.name = "lass", .run = run}, {}};
