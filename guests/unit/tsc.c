/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The time-stamp counter, IA32_TSC_ADJUST, RDTSCP, RDPID. Source: SDM volume 3, "Time-Stamp Counter". */
#include "lib.h"

/* Far more than passes between two instructions here. */
#define FAR (1ull << 44)
#define AUX 0x12345678

static bool is_near(u64 value, u64 wanted) { return value - wanted < FAR / 4; }

static void counter(void)
{
	u64 last = rdtsc();
	bool grows = true;

	for (int i = 0; i < 1000; i++) {
		u64 now = rdtsc();

		grows &= now >= last;
		last = now;
	}
	check(grows, "RDTSC does not go back");
	check(is_near(rdmsr(MSR_TSC), last), "the MSR is the same counter");
	wrmsr(MSR_TSC, FAR);
	check(is_near(rdtsc(), FAR), "WRMSR sets it");
	wrmsr(MSR_TSC, 0);
	check(is_near(rdtsc(), 0), "to 0");
}

USER_CODE(user_rdtsc, "rdtsc");
USER_CODE(user_rdtscp, "rdtscp");
USER_CODE(user_rdpid, ".byte 0xf3, 0x0f, 0xc7, 0xf8");
static void user_mode(void)
{
	RUN_USER(user_rdtsc);
	check_user_ended("RDTSC at CPL 3");
	write_cr4(read_cr4() | CR4_TSD);
	RUN_USER(user_rdtsc);
	check_fault(VECTOR_GP, 0, "RDTSC at CPL 3 with CR4.TSD");
	TRY("rdtsc", ::: "rax", "rdx");
	check_no_fault("CR4.TSD is nothing to CPL 0");
	if (cpu_has(HAS_RDTSCP)) {
		RUN_USER(user_rdtscp);
		check_fault(VECTOR_GP, 0, "RDTSCP at CPL 3 with CR4.TSD");
	}
	write_cr4(read_cr4() & ~CR4_TSD);
}

static void processor_number(void)
{
	u64 seen;

	if (!require(HAS_RDTSCP, "RDTSCP")) {
		TRY("rdtscp", ::: "rax", "rcx", "rdx");
		check_fault(VECTOR_UD, 0, "RDTSCP without RDTSCP");
		return;
	}
	wrmsr(MSR_TSC_AUX, AUX);
	asm volatile("rdtscp" : "=c"(seen)::"rax", "rdx");
	check(seen == AUX, "RDTSCP reads IA32_TSC_AUX");
	if (!require(HAS_RDPID, "RDPID"))
		return;
	asm volatile(".byte 0xf3, 0x0f, 0xc7, 0xf8" : "=a"(seen));
	check(seen == AUX, "RDPID reads IA32_TSC_AUX");
	write_cr4(read_cr4() | CR4_TSD);
	RUN_USER(user_rdpid);
	write_cr4(read_cr4() & ~CR4_TSD);
	check_user_ended("RDPID at CPL 3 does not look at CR4.TSD");
	check(last_fault.regs.rax == AUX, "and reads the same");
}

static void adjust(void)
{
	if (!require(HAS_TSC_ADJUST, "TSC_ADJUST")) {
		TRY("rdmsr", ::"c"(MSR_TSC_ADJUST) : "rax", "rdx");
		check_fault(VECTOR_GP, 0, "then there is no IA32_TSC_ADJUST");
		return;
	}
	wrmsr(MSR_TSC_ADJUST, 0);
	u64 before = rdtsc();
	wrmsr(MSR_TSC_ADJUST, FAR);
	check(rdmsr(MSR_TSC_ADJUST) == FAR, "IA32_TSC_ADJUST keeps what is written");
	check(is_near(rdtsc(), before + FAR), "and moves the counter by the difference");
	wrmsr(MSR_TSC_ADJUST, -FAR);
	check(is_near(rdtsc(), before - FAR), "also back");
	wrmsr(MSR_TSC_ADJUST, 0);
	before = rdtsc();
	wrmsr(MSR_TSC, before + 2 * FAR);
	check(is_near(rdmsr(MSR_TSC_ADJUST) + FAR / 8, 2 * FAR), "a write of IA32_TIME_STAMP_COUNTER moves IA32_TSC_ADJUST");
	wrmsr(MSR_TSC_ADJUST, 0);
	check(is_near(rdtsc(), before), "which undoes it");
}

static void run(void)
{
	counter();
	user_mode();
	processor_number();
	adjust();
}

const struct subject subjects[] = {{.name = "tsc", .run = run}, {}};
