/* SPDX-License-Identifier: GPL-2.0-or-later */
/* SMAP: supervisor accesses to user pages (SDM volume 3, "Determination of Access Rights"). */
#include "lib.h"

#define DATA USER_DATA
/* A present, writable data segment of DPL 0. */
#define DATA_SEGMENT 0x00cf93000000ffffull

static u64 *data_entry;

static void stac(void) { asm volatile("stac" ::: "cc", "memory"); }
static void clac(void) { asm volatile("clac" ::: "cc", "memory"); }
static void read_data(void) { TRY("mov (%0), %%rax", ::"r"(DATA) : "rax", "memory"); }
static void write_data(void) { TRY("movq $1, (%0)", ::"r"(DATA) : "memory"); }

static void instructions(void)
{
	stac();
	check(read_flags() & FLAG_AC, "STAC sets AC");
	clac();
	check(!(read_flags() & FLAG_AC), "CLAC clears AC");
	write_cr4(read_cr4() & ~CR4_SMAP);
	TRY("stac; clac", ::: "cc");
	check_no_fault("STAC and CLAC without CR4.SMAP");
	write_cr4(read_cr4() | CR4_SMAP);
}

USER_CODE(user_stac, "stac");
USER_CODE(user_clac, "clac");
static void instructions_of_a_user(void)
{
	RUN_USER(user_stac);
	check_fault(VECTOR_UD, 0, "STAC at CPL 3 is #UD");
	RUN_USER(user_clac);
	check_fault(VECTOR_UD, 0, "CLAC at CPL 3 is #UD");
}

static void data_accesses(void)
{
	clac();
	read_data();
	check_page_fault(PF_PRESENT, DATA, "read with AC=0");
	write_data();
	check_page_fault(PF_PRESENT | PF_WRITE, DATA, "write with AC=0");
	TRY("lock incl (%0)", ::"r"(DATA) : "memory");
	check_page_fault(PF_PRESENT | PF_WRITE, DATA, "locked read-modify-write with AC=0");
	TRY("rep stosb", ::"D"(DATA), "a"(0), "c"(1) : "memory");
	check_page_fault(PF_PRESENT | PF_WRITE, DATA, "REP STOSB with AC=0");
	stac();
	read_data();
	clac();
	check_no_fault("read with AC=1");
	stac();
	write_data();
	clac();
	check_no_fault("write with AC=1");
	write_cr4(read_cr4() & ~CR4_SMAP);
	read_data();
	check_no_fault("read with AC=0 and CR4.SMAP=0");
	write_cr4(read_cr4() | CR4_SMAP);
	read_data();
	check_page_fault(PF_PRESENT, DATA, "read after CR4.SMAP has been set again");
}

static void flags_of_entries(void)
{
	*data_entry &= ~(u64)(PTE_A | PTE_D);
	invlpg(DATA);
	write_data();
	check_page_fault(PF_PRESENT | PF_WRITE, DATA, "write with AC=0 to a page that was not accessed");
	check(!(*data_entry & (PTE_A | PTE_D)), "A and D stay clear");
	stac();
	write_data();
	clac();
	check((*data_entry & (PTE_A | PTE_D)) == (PTE_A | PTE_D), "the write with AC=1 sets A and D");
	*data_entry &= ~(u64)PTE_P;
	invlpg(DATA);
	read_data();
	check_page_fault(0, DATA, "a page that is not present says so");
	*data_entry |= PTE_P;
	*data_entry &= ~(u64)PTE_W;
	invlpg(DATA);
	stac();
	write_data();
	clac();
	check_page_fault(PF_PRESENT | PF_WRITE, DATA, "AC=1 does not make a page writable");
	write_cr0(read_cr0() & ~CR0_WP);
	stac();
	write_data();
	clac();
	check_no_fault("write to a read-only page with AC=1 and CR0.WP=0");
	write_data();
	check_page_fault(PF_PRESENT | PF_WRITE, DATA, "write to a read-only page with AC=0 and CR0.WP=0");
	write_cr0(read_cr0() | CR0_WP);
	*data_entry |= PTE_W;
	*data_entry &= ~(u64)PTE_U;
	invlpg(DATA);
	write_data();
	check_no_fault("a supervisor page is no concern of SMAP");
	*data_entry |= PTE_U;
	invlpg(DATA);
}

static void user_bit_of_upper_levels(void)
{
	u64 *directory = entry_of(DATA, 2);

	*directory &= ~(u64)PTE_U;
	flush_tlb();
	read_data();
	check_no_fault("a page is the supervisor's if one level says so");
	*directory |= PTE_U;
	flush_tlb();
}

static void stack_accesses(void)
{
	u64 stack = DATA + 64;

	TRY("mov %0, %%rsp\n\tpush %%rax", ::"r"(stack) : "memory");
	check_page_fault(PF_PRESENT | PF_WRITE, stack - 8, "PUSH with AC=0");
	TRY("mov %0, %%rsp\n\tpop %%rax", ::"r"(stack) : "rax", "memory");
	check_page_fault(PF_PRESENT, stack, "POP with AC=0");
	TRY("mov %0, %%rsp\n\tcall 1f\n1:", ::"r"(stack) : "memory");
	check_page_fault(PF_PRESENT | PF_WRITE, stack - 8, "CALL with AC=0");
	/* POPF gets its AC from the stack after it has read the stack. */
	TRY("mov %0, %%rsp\n\tpopfq", ::"r"(stack) : "cc", "memory");
	check_page_fault(PF_PRESENT, stack, "POPF with AC=0");
}

/* A GDT of two pages: the first is the supervisor's, as exceptions need it, the second is a user page. */
static void implicit_accesses(void)
{
	u64 first_page = DATA - PAGE_SIZE;
	struct table_register normal, test = {.limit = 2 * PAGE_SIZE - 1, .base = first_page};

	map_page(first_page, physical_of(alloc_page()), PTE_P | PTE_W);
	memcpy((void *)first_page, gdt, sizeof(gdt));
	stac();
	*(u64 *)DATA = DATA_SEGMENT;
	clac();
	asm volatile("sgdt %0" : "=m"(normal));
	asm volatile("lgdt %0" ::"m"(test));
	TRY("mov %w0, %%fs", ::"r"(PAGE_SIZE) : "memory");
	check_page_fault(PF_PRESENT, DATA, "a descriptor in a user page, AC=0");
	stac();
	TRY("mov %w0, %%fs", ::"r"(PAGE_SIZE) : "memory");
	clac();
	check_page_fault(PF_PRESENT, DATA, "a descriptor in a user page, AC=1: AC is not for implicit accesses");
	write_cr4(read_cr4() & ~CR4_SMAP);
	TRY("mov %w0, %%fs", ::"r"(PAGE_SIZE) : "memory");
	check_no_fault("a descriptor in a user page, CR4.SMAP=0");
	write_cr4(read_cr4() | CR4_SMAP);
	asm volatile("lgdt %0" ::"m"(normal));
	asm volatile("mov %w0, %%fs" ::"r"(0));
}

USER_CODE(user_interrupt, "mov %cs, %eax");
static void delivery_clears_nothing(void)
{
	RUN_USER(user_interrupt, .flags = FLAG_AC);
	check_user_ended("a user with AC=1 runs");
	check(last_fault.regs.rflags & FLAG_AC, "the saved RFLAGS have the user's AC");
	stac();
	TRY("ud2", ::: "memory");
	clac();
	check(last_fault.vector == VECTOR_UD && last_fault.regs.rflags & FLAG_AC, "an exception keeps AC in the frame");
}

USER_CODE(user_access, "movq $5, (%rdi); mov (%rdi), %rax");
static void user_accesses(void)
{
	RUN_USER(user_access, .rdi = DATA);
	check_user_ended("SMAP does not concern user accesses");
	check(last_fault.regs.rax == 5, "and they do what they should");
}

static void run(void)
{
	if (!require(HAS_SMAP, "SMAP")) {
		TRY("stac", ::: "cc");
		check_fault(VECTOR_UD, 0, "STAC without SMAP is #UD");
		TRY("mov %0, %%cr4", ::"r"(read_cr4() | CR4_SMAP) : "memory");
		check_fault(VECTOR_GP, 0, "CR4.SMAP without SMAP is #GP");
		return;
	}
	write_cr4(read_cr4() | CR4_SMAP);
	check(read_cr4() & CR4_SMAP, "CR4.SMAP can be set");
	/* Makes the user's pages. */
	RUN_USER(user_interrupt);
	data_entry = entry_of(DATA, 1);
	instructions();
	instructions_of_a_user();
	data_accesses();
	flags_of_entries();
	user_bit_of_upper_levels();
	stack_accesses();
	implicit_accesses();
	delivery_clears_nothing();
	user_accesses();
}

const struct subject subjects[] = {{.name = "smap", .run = run}, {}};
