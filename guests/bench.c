// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What a guest program feels: integer speed, system calls, page faults, TLB misses, processes.
 *
 * Prints lines of the form `BENCH name value unit`, read by benchmarks/guest.py. The times are the guest's
 * own CLOCK_MONOTONIC: they mean something where guest time follows the host's.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define LOOPS 200000000UL
#define INSTRUCTIONS_PER_LOOP 4
#define SYSTEM_CALLS 100000
#define AREA (64UL << 20)
#define PAGES (AREA / PAGE)
#define SWEEPS 8
#define PROCESSES 20

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void report_microseconds(const char *name, double seconds, unsigned long events)
{
	printf("BENCH %s %.3f us\n", name, seconds / (double)events * 1e6);
}

static void integer_loop(void)
{
	uint64_t left = LOOPS;
	double start = now();

	asm volatile("1:\n\t"
		     "add $3, %%rax\n\t"
		     "xor %%rax, %%rdx\n\t"
		     "dec %0\n\t"
		     "jnz 1b"
		     : "+r"(left)
		     :
		     : "rax", "rdx", "cc");
	printf("BENCH integer-loop %.1f MIPS\n", LOOPS * INSTRUCTIONS_PER_LOOP / (now() - start) / 1e6);
}

static void system_calls(void)
{
	double start = now();

	for (int i = 0; i < SYSTEM_CALLS; i++)
		syscall(SYS_getppid);
	report_microseconds("getppid", now() - start, SYSTEM_CALLS);
}

/* First a fault for each page, then reads that each miss the TLB and find the page mapped. */
static int memory(void)
{
	volatile char *area = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned long sum = 0;
	double start;

	if (area == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	/* One page size on both sides of a comparison. */
	madvise((void *)area, AREA, MADV_NOHUGEPAGE);
	start = now();
	for (unsigned long i = 0; i < AREA; i += PAGE)
		area[i] = 1;
	report_microseconds("page-fault", now() - start, PAGES);

	start = now();
	for (int sweep = 0; sweep < SWEEPS; sweep++)
		for (unsigned long i = 0; i < AREA; i += PAGE)
			sum += (unsigned long)area[i];
	report_microseconds("tlb-miss", now() - start, SWEEPS * PAGES);
	munmap((void *)area, AREA);
	return sum != SWEEPS * PAGES;
}

static int processes(void)
{
	double start = now();
	int status, failed = 0;

	for (int i = 0; i < PROCESSES; i++) {
		pid_t child = fork();

		if (child == 0)
			_exit(0);
		failed |= child < 0 || waitpid(child, &status, 0) != child || status;
	}
	report_microseconds("fork-wait", now() - start, PROCESSES);
	return failed;
}

int main(void)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	integer_loop();
	system_calls();
	return memory() | processes();
}
