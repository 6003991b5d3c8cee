/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Exceptions and interrupts: every vector comes to trap_entry(), which calls the test's handler or, in a TRY(), records
 * the fault and goes on behind it. An exception that nobody expects ends the run.
 *
 * Exceptions come in on a stack of their own (IST), so that tests can have any stack pointer.
 */
#include "console.h"

enum { STACK_SIZE = 8192, FIRST_INTERRUPT = 32, STUB_SIZE = 16, TSS_TYPE = 0x89 };

struct fault last_fault;
u64 recovery_rip, recovery_rsp, recovery_rbp, recovery_rbx, recovery_flags;
struct gate idt[VECTORS] __attribute__((aligned(16)));
struct tss tss;
extern const u8 trap_stubs[];

static handler handlers[VECTORS];
static u8 stacks[4][STACK_SIZE] __attribute__((aligned(16)));

void set_handler(int vector, handler function) { handlers[vector] = function; }

static void __attribute__((noreturn)) die(const struct trap *regs)
{
	check(false, "unexpected exception %d, error %lx, rip %lx:%lx, rsp %lx, cr2 %lx, rax %lx", (int)regs->vector,
	      regs->error, regs->cs, regs->rip, regs->rsp, read_cr2(), regs->rax);
	summary_and_leave();
}

/* Called by the stubs of vectors.S; what it leaves in *regs is what IRET returns to. */
void trap_entry(struct trap *regs)
{
	if (handlers[regs->vector]) {
		handlers[regs->vector](regs);
		return;
	}
	if (!recovery_rip)
		die(regs);
	last_fault = (struct fault){.vector = regs->vector, .cr2 = read_cr2(), .dr6 = read_dr6(), .regs = *regs};
	regs->rip = recovery_rip;
	regs->rsp = recovery_rsp;
	regs->rbp = recovery_rbp;
	regs->rbx = recovery_rbx;
	regs->rflags = recovery_flags;
	regs->cs = KERNEL_CS;
	regs->ss = KERNEL_DS;
	recovery_rip = 0;
}

static void describe_last(void)
{
	if (last_fault.vector == NO_FAULT)
		print(": no fault\n");
	else
		print(": got vector %d, error %lx, cr2 %lx, rip %lx:%lx\n", last_fault.vector, last_fault.regs.error,
		      last_fault.cr2, last_fault.regs.cs, last_fault.regs.rip);
}

bool check_no_fault(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	bool holds = check_list(last_fault.vector == NO_FAULT, format, list);
	va_end(list);
	if (!holds)
		describe_last();
	return holds;
}

bool check_fault(int vector, u64 error, const char *format, ...)
{
	va_list list;

	va_start(list, format);
	bool holds = check_list(last_fault.vector == vector && last_fault.regs.error == error, format, list);
	va_end(list);
	if (!holds)
		describe_last();
	return holds;
}

bool check_page_fault(u64 error, u64 address, const char *format, ...)
{
	bool holds = last_fault.vector == VECTOR_PF && last_fault.regs.error == error && last_fault.cr2 == address;
	va_list list;

	va_start(list, format);
	check_list(holds, format, list);
	va_end(list);
	if (!holds)
		describe_last();
	return holds;
}

static void set_gate(int vector, u8 type, u8 ist)
{
	u64 target = (u64)trap_stubs + STUB_SIZE * vector;

	idt[vector] = (struct gate){
		.offset_low = target,
		.selector = KERNEL_CS,
		.ist = ist,
		.type = type,
		.offset_middle = target >> 16,
		.offset_high = target >> 32,
	};
}

static void init_tss(void)
{
	u64 base = (u64)&tss;
	u64 limit = sizeof(tss) - 1;

	tss.rsp[0] = (u64)stacks[1];
	tss.ist[EXCEPTION_IST - 1] = (u64)stacks[2];
	tss.ist[DOUBLE_FAULT_IST - 1] = (u64)stacks[3];
	tss.ist[NMI_IST - 1] = (u64)stacks[4];
	tss.io_map = offsetof(struct tss, io_permission);
	memset(tss.io_permission, 0xff, sizeof(tss.io_permission));
	gdt[TSS_SELECTOR / 8] = (limit & 0xffff) | (base & 0xffffff) << 16 | (u64)TSS_TYPE << 40 |
				(base >> 24 & 0xff) << 56;
	gdt[TSS_SELECTOR / 8 + 1] = base >> 32;
	asm volatile("ltr %w0" ::"r"(TSS_SELECTOR));
}

void init_traps(void)
{
	for (int vector = 0; vector < VECTORS; vector++)
		set_gate(vector, GATE_PRESENT | GATE_INTERRUPT, vector < FIRST_INTERRUPT ? EXCEPTION_IST : 0);
	idt[VECTOR_DF].ist = DOUBLE_FAULT_IST;
	idt[VECTOR_NMI].ist = NMI_IST;
	idt[USER_EXIT_VECTOR].type |= GATE_USER;
	init_tss();
	struct table_register idtr = {sizeof(idt) - 1, (u64)idt};
	asm volatile("lidt %0" ::"m"(idtr));
}
