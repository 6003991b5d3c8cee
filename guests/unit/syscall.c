/* SPDX-License-Identifier: GPL-2.0-or-later */
/* SYSCALL, SYSRET, SYSENTER, SYSEXIT. Source: SDM volume 2. */
#include "lib.h"

#define NON_CANONICAL 0x0000800000000000ull
/* SYSCALL: CS and, by 8 more, SS. SYSRET: SS by 8 more, 64-bit CS by 16 more. */
#define STAR_VALUE ((u64)KERNEL_CS << 32 | (u64)(USER_CS32) << 48)

extern const char syscall_entry[], sysenter_entry[];
/* INT 20h on a stack of our own: the record has all registers as the instruction has left them, but RSP. */
asm(".pushsection .text\n"
    "syscall_entry: mov %rsp, entry_rsp; mov $entry_stack_top, %rsp; int $0x20\n"
    "sysenter_entry: mov %rsp, entry_rsp; mov $entry_stack_top, %rsp; int $0x20\n"
    ".popsection\n"
    ".pushsection .bss\n"
    ".balign 16\n.skip 8192\nentry_stack_top: entry_rsp: .skip 8\n"
    ".popsection\n");
extern u64 entry_rsp;

USER_CODE(user_syscall, "syscall");
USER_CODE(user_sysenter, "sysenter");
USER_CODE(user_sysret, "sysretq");
USER_CODE(user_sysexit, "sysexitq");
USER_CODE(user_end, "mov %rcx, %rax; pushfq; pop %rdx");

static void syscall_in(void)
{
	wrmsr(MSR_EFER, rdmsr(MSR_EFER) & ~EFER_SCE);
	RUN_USER(user_syscall);
	check_fault(VECTOR_UD, 0, "SYSCALL without EFER.SCE");
	TRY("sysretq", ::"c"(0) : "r11", "memory");
	check_fault(VECTOR_UD, 0, "SYSRET without EFER.SCE");
	wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
	wrmsr(MSR_STAR, STAR_VALUE);
	wrmsr(MSR_LSTAR, (u64)syscall_entry);
	wrmsr(MSR_SYSCALL_MASK, FLAG_AC | FLAG_DF);
	RUN_USER(user_syscall, .flags = FLAG_AC | FLAG_DF | FLAG_CF);
	check(last_fault.vector == USER_EXIT_VECTOR && last_fault.regs.cs == KERNEL_CS, "SYSCALL loads CS");
	check(last_fault.regs.ss == KERNEL_DS, "and SS");
	check(last_fault.regs.rcx == USER_CODE_PAGE + 2, "RCX has the next RIP");
	check((last_fault.regs.r11 & (FLAG_AC | FLAG_DF | FLAG_CF)) == (FLAG_AC | FLAG_DF | FLAG_CF), "R11 has RFLAGS");
	check(!(last_fault.regs.rflags & (FLAG_AC | FLAG_DF)), "the mask's flags are clear");
	check(last_fault.regs.rflags & FLAG_CF, "the others are not");
	check(entry_rsp == USER_STACK_TOP, "RSP is the user's");
}

static void sysret_out(void)
{
	/* Puts the code where SYSRET goes. */
	RUN_USER(user_end);
	TRY("mov %[stack], %%rsp\n\tsysretq", ::[stack] "r"(USER_STACK_TOP), "c"(USER_CODE_PAGE)
	    : "r11", "rax", "rdx", "memory");
	check(last_fault.vector == USER_EXIT_VECTOR, "SYSRET");
	check(last_fault.regs.cs == USER_CS && last_fault.regs.ss == USER_DS, "loads CS and SS with RPL 3");
	check(last_fault.regs.rax == USER_CODE_PAGE, "and RIP from RCX");
	TRY("mov %[stack], %%rsp\n\tmov %[flags], %%r11d\n\tsysretq",
	    ::[stack] "r"(USER_STACK_TOP), "c"(USER_CODE_PAGE), [flags] "i"(FLAG_CF | FLAG_RF | FLAG_AC)
	    : "r11", "rax", "rdx", "memory");
	check((last_fault.regs.rflags & (FLAG_CF | FLAG_AC)) == (FLAG_CF | FLAG_AC), "RFLAGS from R11");
	TRY("mov %[stack], %%rsp\n\tsysretq", ::[stack] "r"(USER_STACK_TOP), "c"(NON_CANONICAL) : "r11", "memory");
	check_fault(VECTOR_GP, 0, "SYSRET to a non-canonical address");
	check(last_fault.regs.cs == KERNEL_CS, "faults at CPL 0");
	RUN_USER(user_sysret);
	check_fault(VECTOR_GP, 0, "SYSRET at CPL 3");
}

static void sysenter_in(void)
{
	if (!require(HAS_SEP, "SYSENTER"))
		return;
	wrmsr(MSR_SYSENTER_CS, 0);
	RUN_USER(user_sysenter);
	check_fault(VECTOR_GP, 0, "SYSENTER with IA32_SYSENTER_CS = 0");
	wrmsr(MSR_SYSENTER_CS, KERNEL_CS);
	wrmsr(MSR_SYSENTER_EIP, (u64)sysenter_entry);
	wrmsr(MSR_SYSENTER_ESP, 0x123456789000);
	RUN_USER(user_sysenter);
	check(last_fault.vector == USER_EXIT_VECTOR && last_fault.regs.cs == KERNEL_CS, "SYSENTER loads CS");
	check(last_fault.regs.ss == KERNEL_DS, "and SS");
	check(entry_rsp == 0x123456789000, "and RSP");
	check(!(last_fault.regs.rflags & FLAG_IF), "and clears IF");
}

static void sysexit_out(void)
{
	if (!cpu_has(HAS_SEP))
		return;
	/* SYSEXIT counts from IA32_SYSENTER_CS: 64-bit user code by 32 more, SS by 40 more. */
	gdt[SPARE_SELECTOR / 8 + 4] = gdt[USER_CS / 8];
	gdt[SPARE_SELECTOR / 8 + 5] = gdt[USER_DS / 8];
	wrmsr(MSR_SYSENTER_CS, SPARE_SELECTOR);
	RUN_USER(user_end);
	TRY("sysexitq", ::"c"(USER_STACK_TOP), "d"(USER_CODE_PAGE) : "rax", "memory");
	check(last_fault.vector == USER_EXIT_VECTOR, "SYSEXIT");
	check(last_fault.regs.cs == ((SPARE_SELECTOR + 32) | 3) && last_fault.regs.ss == ((SPARE_SELECTOR + 40) | 3),
	      "loads CS and SS with RPL 3");
	check(last_fault.regs.rsp == USER_STACK_TOP, "and RSP from RCX");
	TRY("sysexitq", ::"c"(USER_STACK_TOP), "d"(NON_CANONICAL) : "rax", "memory");
	check_fault(VECTOR_GP, 0, "SYSEXIT to a non-canonical address");
	TRY("sysexitq", ::"c"(NON_CANONICAL), "d"(USER_CODE_PAGE) : "rax", "memory");
	check_fault(VECTOR_GP, 0, "SYSEXIT with a non-canonical stack");
	wrmsr(MSR_SYSENTER_CS, 0);
	TRY("sysexitq", ::"c"(USER_STACK_TOP), "d"(USER_CODE_PAGE) : "rax", "memory");
	check_fault(VECTOR_GP, 0, "SYSEXIT with IA32_SYSENTER_CS = 0");
	RUN_USER(user_sysexit);
	check_fault(VECTOR_GP, 0, "SYSEXIT at CPL 3");
}

static void run(void)
{
	syscall_in();
	sysret_out();
	sysenter_in();
	sysexit_out();
}

const struct subject subjects[] = {{.name = "syscall", .run = run}, {}};
