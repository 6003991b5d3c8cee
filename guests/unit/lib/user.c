/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Code at CPL 3: four pages for it, and the way in. The way out is a fault or INT 20h. */
#include "console.h"

enum { STACK_OFFSET = 0x2000, DATA_OFFSET = 0x4000 };

static void *code_page;

static void map_user_pages(void)
{
	code_page = alloc_page();
	map_page(USER_CODE_PAGE, physical_of(code_page), PTE_P | PTE_U);
	map_page(USER_BASE + STACK_OFFSET, physical_of(alloc_page()), PTE_P | PTE_W | PTE_U);
	map_page(USER_BASE + DATA_OFFSET, physical_of(alloc_page()), PTE_P | PTE_W | PTE_U);
}

void run_user(const char *code, const char *end, struct user_registers registers)
{
	if (!code_page)
		map_user_pages();
	memcpy(code_page, code, end - code);
	u64 frame[] = {USER_CODE_PAGE, USER_CS, registers.flags | FLAG_FIXED, USER_STACK_TOP, USER_DS};

	TRY("mov %[frame], %%rsp\n\t"
	    "iretq",
	    ::[frame] "r"(frame), "D"(registers.rdi), "S"(registers.rsi), "d"(registers.rdx)
	    : "memory", "rax", "rcx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15");
}

bool check_user_ended(const char *format, ...)
{
	bool ended = last_fault.vector == USER_EXIT_VECTOR;
	va_list list;

	va_start(list, format);
	check_list(ended, format, list);
	va_end(list);
	if (!ended)
		print(": vector %d, error %lx, cr2 %lx, rip %lx\n", last_fault.vector, last_fault.regs.error,
		      last_fault.cr2, last_fault.regs.rip);
	return ended;
}
