// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Debugging as a debugger does it: single steps counted through every kind of instruction that a monitor
 * intercepts, and the processor's own breakpoints, set with ptrace in another process.
 */
#include "guest.h"

#include <stddef.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>

#define LOOPS 100
#define STRING_LENGTH 10
#define SYSCALL_GETPPID 110
#define CHILD_STATUS 7
#define STRINGIFY(x) #x
#define TEXT(x) STRINGIFY(x)

/* From stepped_first to stepped_last, what one step is in the order of the code below. */
enum steps {
	LOOP_STEPS = 1 + 3 * LOOPS,
	/* xor, xor, cpuid, rdtsc */
	INTERCEPTED_STEPS = 4,
	/* lea, mov, and one step for each iteration */
	STRING_STEPS = 2 + STRING_LENGTH,
	/* mov, syscall */
	SYSCALL_STEPS = 2,
	/* pushf, pop */
	FLAGS_STEPS = 2,
	/* mov from ss; mov to ss holds the trap back until the nop behind it has run */
	SHADOW_STEPS = 2,
	ALL_STEPS = LOOP_STEPS + INTERCEPTED_STEPS + STRING_STEPS + SYSCALL_STEPS + FLAGS_STEPS + SHADOW_STEPS,
	GIVE_UP = 10 * ALL_STEPS,
};

void stepped(void);
extern char stepped_last[];
asm(".globl stepped, stepped_last\n"
    "stepped:\n\t"
    "push %rbx\n\t"
    "int3\n\t"
    "mov $" TEXT(LOOPS) ", %ecx\n"
    "1:\n\t"
    "nop\n\t"
    "dec %ecx\n\t"
    "jnz 1b\n\t"
    "xor %eax, %eax\n\t"
    "xor %ecx, %ecx\n\t"
    "cpuid\n\t"
    "rdtsc\n\t"
    "lea -64(%rsp), %rdi\n\t"
    "mov $" TEXT(STRING_LENGTH) ", %ecx\n\t"
    "rep stosb\n\t"
    "mov $" TEXT(SYSCALL_GETPPID) ", %eax\n\t"
    "syscall\n\t"
    "pushf\n\t"
    "pop %rax\n\t"
    "mov %ss, %eax\n\t"
    "mov %eax, %ss\n\t"
    "nop\n"
    "stepped_last:\n\t"
    "pop %rbx\n\t"
    "ret\n");

void watched(void);
extern char watched_execute[], watched_written[], watched_read[];
static volatile uint64_t watched_variable __attribute__((used)) = 1;
asm(".globl watched, watched_execute, watched_written, watched_read\n"
    "watched:\n\t"
    "nop\n"
    "watched_execute:\n\t"
    "xor %eax, %eax\n\t"
    "mov %rax, watched_variable(%rip)\n"
    "watched_written:\n\t"
    "nop\n\t"
    "mov watched_variable(%rip), %rax\n"
    "watched_read:\n\t"
    "ret\n");

/* Start a child that stops, calls `run` when it is let go, and exits with CHILD_STATUS. */
static pid_t start(void (*run)(void))
{
	pid_t child = fork();
	int status;

	if (child == 0) {
		signal(SIGTRAP, SIG_DFL);
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		raise(SIGSTOP);
		run();
		_exit(CHILD_STATUS);
	}
	waitpid(child, &status, 0);
	return child;
}

/* Let the child go by one `request`; true while it stops with SIGTRAP. */
static bool resume(pid_t child, enum __ptrace_request request, int *status)
{
	if (ptrace(request, child, NULL, NULL) < 0) {
		perror("ptrace");
		_exit(1);
	}
	waitpid(child, status, 0);
	return WIFSTOPPED(*status) && WSTOPSIG(*status) == SIGTRAP;
}

static unsigned long peek_rip(pid_t child)
{
	return ptrace(PTRACE_PEEKUSER, child, offsetof(struct user, regs.rip), NULL);
}

static void expect_end(const char *name, pid_t child)
{
	int status;

	resume(child, PTRACE_CONT, &status);
	expect(name, WIFEXITED(status) && WEXITSTATUS(status) == CHILD_STATUS, "wait status %#x", status);
	if (!WIFEXITED(status))
		kill(child, SIGKILL);
}

static void single_steps(void)
{
	pid_t child = start(stepped);
	int status, steps = 0;
	bool stopped = resume(child, PTRACE_CONT, &status);

	expect("int3 stops a traced process", stopped, "wait status %#x", status);
	while (peek_rip(child) != (unsigned long)stepped_last && steps < GIVE_UP &&
	       resume(child, PTRACE_SINGLESTEP, &status))
		steps++;
	expect("single steps", steps == ALL_STEPS, "%d, expected %d", steps, ALL_STEPS);
	expect_end("a stepped process goes on", child);
}

/* Debug register 7 (SDM volume 3, section 19.2.4): enable bits, condition and length of breakpoint 0. */
enum dr7 {
	DR7_L0 = 1 << 0,
	DR7_EXECUTE = 0 << 16,
	DR7_WRITE = 1 << 16,
	DR7_ACCESS = 3 << 16,
	DR7_ONE_BYTE = 0 << 18,
	DR7_EIGHT_BYTES = 2 << 18,
	DR7_FOUR_BYTES = 3 << 18,
};
#define DR6_B0 (1 << 0)

static bool poke_debug_register(pid_t child, int number, unsigned long value)
{
	size_t offset = offsetof(struct user, u_debugreg) + number * sizeof(unsigned long);

	return ptrace(PTRACE_POKEUSER, child, offset, value) == 0;
}

static unsigned long peek_debug_register(pid_t child, int number)
{
	size_t offset = offsetof(struct user, u_debugreg) + number * sizeof(unsigned long);

	return ptrace(PTRACE_PEEKUSER, child, offset, NULL);
}

static void breakpoints(void)
{
	const unsigned long variable = (unsigned long)&watched_variable;
	const unsigned long after_write = (unsigned long)watched_written;
	const unsigned long after_read = (unsigned long)watched_read;
	const unsigned long execute = (unsigned long)watched_execute;
	const struct {
		const char *name;
		unsigned long address;
		unsigned long dr7;
		unsigned long stops[2];
	} cases[] = {
		{ "execute breakpoint", execute, DR7_L0 | DR7_EXECUTE | DR7_ONE_BYTE, { execute } },
		{ "write breakpoint", variable, DR7_L0 | DR7_WRITE | DR7_EIGHT_BYTES, { after_write } },
		{ "access breakpoint", variable, DR7_L0 | DR7_ACCESS | DR7_EIGHT_BYTES, { after_write, after_read } },
		{ "one byte inside a write", variable + 3, DR7_L0 | DR7_WRITE | DR7_ONE_BYTE, { after_write } },
		{ "the upper half of a write", variable + 4, DR7_L0 | DR7_WRITE | DR7_FOUR_BYTES, { after_write } },
		{ "a neighbour is not watched", variable + 8, DR7_L0 | DR7_WRITE | DR7_EIGHT_BYTES, { 0 } },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		pid_t child = start(watched);
		bool held = poke_debug_register(child, 0, cases[i].address) &&
			    poke_debug_register(child, 7, cases[i].dr7);
		unsigned long rip = 0, dr6 = 0;
		int status;

		for (int stop = 0; stop < 2 && cases[i].stops[stop]; stop++) {
			held &= resume(child, PTRACE_CONT, &status);
			if (!WIFSTOPPED(status))
				break;
			rip = peek_rip(child);
			dr6 = peek_debug_register(child, 6);
			held &= rip == cases[i].stops[stop] && (dr6 & DR6_B0);
			poke_debug_register(child, 6, 0);
		}
		expect(cases[i].name, held, "last stop at %#lx, dr6 %#lx", rip, dr6);
		if (held)
			expect_end("and goes on to its end", child);
		else
			kill(child, SIGKILL);
	}
}

int main(void)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	single_steps();
	breakpoints();
	return summary("debug");
}
