/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What every guest program here needs: run a few instructions, catch the fault they cause together with
 * the numbers Linux reports about it, and count which expectations held.
 *
 * A handler on its own stack records the fault and jumps back to where CATCH() was called, so the code
 * under test may destroy its stack pointer, its frame pointer and any register.
 */
#ifndef GUEST_H
#define GUEST_H

#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096UL

/* Exception vectors (SDM volume 3, table 7-1); Linux passes them on as REG_TRAPNO. */
enum trap {
	TRAP_NONE = -1,
	TRAP_DE = 0,
	TRAP_DB = 1,
	TRAP_BP = 3,
	TRAP_UD = 6,
	TRAP_SS = 12,
	TRAP_GP = 13,
	TRAP_PF = 14,
	TRAP_AC = 17,
};

/* Page-fault error code bits (SDM volume 3, section 5.7). */
enum pf_error {
	PF_PRESENT = 1 << 0,
	PF_WRITE = 1 << 1,
	PF_USER = 1 << 2,
	PF_FETCH = 1 << 4,
};

#define RFLAGS_AC (1 << 18)

struct fault {
	int signal;
	long trap;
	unsigned long error;
	unsigned long cr2;
	unsigned long rip;
	unsigned long rsp;
	unsigned long rbx;
	unsigned long rcx;
	unsigned long rdi;
};

/* The last fault; trap is TRAP_NONE when the code ran to its end. */
static volatile struct fault fault;
static sigjmp_buf fault_return;

static int expectations;
static int failures;

__attribute__((unused)) static void on_fault(int signal, siginfo_t *info, void *context)
{
	const greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;

	(void)info;
	/* Linux starts handlers with the AC flag as it was; no C code is ready for alignment checks. */
	asm volatile("pushfq\n\tandl %0, (%%rsp)\n\tpopfq" : : "i"(~RFLAGS_AC) : "memory", "cc");
	fault.signal = signal;
	fault.trap = regs[REG_TRAPNO];
	fault.error = regs[REG_ERR];
	fault.cr2 = regs[REG_CR2];
	fault.rip = regs[REG_RIP];
	fault.rsp = regs[REG_RSP];
	fault.rbx = regs[REG_RBX];
	fault.rcx = regs[REG_RCX];
	fault.rdi = regs[REG_RDI];
	siglongjmp(fault_return, 1);
}

/* Install `handler` for every signal a processor exception can become. */
static inline void catch_faults(void (*handler)(int, siginfo_t *, void *))
{
	static const int signals[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP };
	static unsigned char stack[16 * PAGE];
	stack_t alternate = { .ss_sp = stack, .ss_size = sizeof(stack) };
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK };

	sigaltstack(&alternate, NULL);
	for (size_t i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
		sigaction(signals[i], &action, NULL);
	/* A line must be out before the next case runs: a machine that dies should name its killer. */
	setvbuf(stdout, NULL, _IOLBF, 0);
}

/* Run a statement; true when it faulted, with the details in `fault`. */
#define CATCH(statement)                                  \
	({                                                \
		memset((void *)&fault, 0, sizeof(fault)); \
		fault.trap = TRAP_NONE;                   \
		if (!sigsetjmp(fault_return, 1)) {        \
			statement;                        \
		}                                         \
		fault.trap != TRAP_NONE;                  \
	})

/* Whether /proc/cpuinfo has the word `wanted` among its flags: what Linux uses, not all that CPUID offers. */
__attribute__((unused)) static bool has_cpu_flag(const char *wanted)
{
	static char line[8192];
	FILE *cpuinfo = fopen("/proc/cpuinfo", "r");
	bool found = false;

	if (!cpuinfo) {
		perror("/proc/cpuinfo");
		_exit(1);
	}
	while (!found && fgets(line, sizeof(line), cpuinfo)) {
		if (strncmp(line, "flags", strlen("flags")))
			continue;
		for (char *word = strtok(line, " \t\n"); word && !found; word = strtok(NULL, " \t\n"))
			found = !strcmp(word, wanted);
		break;
	}
	fclose(cpuinfo);
	return found;
}

/* Count one expectation and print its line. Returns `held`. */
__attribute__((format(printf, 3, 4), unused)) static bool expect(const char *name, bool held,
								 const char *details, ...)
{
	va_list arguments;

	expectations++;
	failures += !held;
	printf("%-4s %-34s ", held ? "ok" : "FAIL", name);
	va_start(arguments, details);
	vprintf(details, arguments);
	va_end(arguments);
	putchar('\n');
	return held;
}

/* The last line and the exit status of a program. */
static inline int summary(const char *program)
{
	printf("%s: %d of %d expectations hold\n", program, expectations - failures, expectations);
	return failures != 0;
}

#endif
