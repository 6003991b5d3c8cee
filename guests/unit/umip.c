/* SPDX-License-Identifier: GPL-2.0-or-later */
/* UMIP: SGDT, SIDT, SLDT, SMSW and STR in user mode. Source: SDM volume 3, CR4.UMIP. */
#include "lib.h"

USER_CODE(user_sgdt, "sgdt -16(%rsp)");
USER_CODE(user_sidt, "sidt -16(%rsp)");
USER_CODE(user_sldt, "sldt %eax");
USER_CODE(user_sldt_memory, "sldt -16(%rsp)");
USER_CODE(user_smsw, "smsw %eax");
USER_CODE(user_smsw_memory, "smsw -16(%rsp)");
USER_CODE(user_str, "str %eax");
USER_CODE(user_str_memory, "str -16(%rsp)");
USER_CODE(user_sgdt_unmapped, "sgdt (%rdi)");

static const struct {
	const char *name, *code, *end;
} instructions[] = {
	{"SGDT", user_sgdt, user_sgdt_end},
	{"SIDT", user_sidt, user_sidt_end},
	{"SLDT", user_sldt, user_sldt_end},
	{"SLDT to memory", user_sldt_memory, user_sldt_memory_end},
	{"SMSW", user_smsw, user_smsw_end},
	{"SMSW to memory", user_smsw_memory, user_smsw_memory_end},
	{"STR", user_str, user_str_end},
	{"STR to memory", user_str_memory, user_str_memory_end},
};

static void in_user_mode(bool allowed)
{
	for (unsigned int i = 0; i < ARRAY_SIZE(instructions); i++) {
		run_user(instructions[i].code, instructions[i].end, (struct user_registers){0});
		if (allowed)
			check_user_ended("%s at CPL 3 without UMIP", instructions[i].name);
		else
			check_fault(VECTOR_GP, 0, "%s at CPL 3 with UMIP", instructions[i].name);
	}
}

static void in_supervisor_mode(void)
{
	struct table_register table;
	u64 word;

	TRY("sgdt %0", : "=m"(table)::"memory");
	check(last_fault.vector == NO_FAULT && table.base == (u64)gdt, "SGDT at CPL 0");
	TRY("sidt %0", : "=m"(table)::"memory");
	check(last_fault.vector == NO_FAULT && table.base == (u64)idt, "SIDT at CPL 0");
	TRY("smsw %0", : "=r"(word)::"memory");
	check(last_fault.vector == NO_FAULT && (word & 0xffff) == (read_cr0() & 0xffff), "SMSW at CPL 0");
	TRY("str %0", : "=r"(word)::"memory");
	check(last_fault.vector == NO_FAULT && (word & 0xffff) == TSS_SELECTOR, "STR at CPL 0");
	TRY("sldt %0", : "=r"(word)::"memory");
	check(last_fault.vector == NO_FAULT && !(word & 0xffff), "SLDT at CPL 0");
}

static void run(void)
{
	in_user_mode(true);
	if (!require(HAS_UMIP, "UMIP")) {
		TRY("mov %0, %%cr4", ::"r"(read_cr4() | CR4_UMIP) : "memory");
		check_fault(VECTOR_GP, 0, "then CR4.UMIP is a reserved bit");
		return;
	}
	write_cr4(read_cr4() | CR4_UMIP);
	in_user_mode(false);
	run_user(user_sgdt_unmapped, user_sgdt_unmapped_end, (struct user_registers){.rdi = USER_SPARE});
	check_fault(VECTOR_GP, 0, "UMIP comes before the operand's page fault");
	in_supervisor_mode();
	write_cr4(read_cr4() & ~CR4_UMIP);
	in_user_mode(true);
}

const struct subject subjects[] = {{.name = "umip", .run = run}, {}};
