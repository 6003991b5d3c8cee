/* SPDX-License-Identifier: GPL-2.0-or-later */
/* XSAVE, its variants and XCR0. Source: SDM volume 1, chapter "Managing State Using the XSAVE Feature Set". */
#include "lib.h"

#define X87 BIT(0)
#define SSE BIT(1)
#define AVX BIT(2)
#define LEAF_XSAVE 0xd
#define HEADER 512
#define XSTATE_BV (*(volatile u64 *)(area + HEADER))
#define XCOMP_BV (*(volatile u64 *)(area + HEADER + 8))
#define COMPACTED BIT(63)
#define XMM0 (area + 160)
#define MXCSR (*(volatile u32 *)(area + 24))
#define PATTERN 0x1122334455667788ull
#define OSXSAVE FEATURE(1, 0, ECX, 27)

static u8 area[PAGE_SIZE] __attribute__((aligned(64)));

static void set_xmm0(u64 value) { asm volatile("movq %0, %%xmm0\n\tmovddup %%xmm0, %%xmm0" ::"r"(value)); }

static u64 get_xmm0(void)
{
	u64 value;

	asm volatile("movq %%xmm0, %0" : "=r"(value));
	return value;
}

static void xsetbv(u32 index, u64 value)
{
	TRY("xsetbv", ::"c"(index), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

#define SAVE(instruction, mask)                                                                         \
	TRY(instruction " (%0)", ::"r"(area), "a"((u32)(mask)), "d"((u32)((mask) >> 32)) : "memory")

static void control(void)
{
	u64 seen_low, seen_high;

	check(!cpu_has(OSXSAVE), "no OSXSAVE yet");
	SAVE("xsave", X87);
	check_fault(VECTOR_UD, 0, "XSAVE without CR4.OSXSAVE");
	TRY("xgetbv", ::"c"(0) : "rax", "rdx");
	check_fault(VECTOR_UD, 0, "XGETBV without CR4.OSXSAVE");
	write_cr4(read_cr4() | CR4_OSXSAVE);
	check(cpu_has(OSXSAVE), "OSXSAVE follows CR4.OSXSAVE");
	asm volatile("xgetbv" : "=a"(seen_low), "=d"(seen_high) : "c"(0));
	check(seen_low == X87 && !seen_high, "XCR0 is 1 after a reset");
	xsetbv(0, X87 | SSE);
	check_no_fault("XCR0 with x87 and SSE");
	check(cpuid(LEAF_XSAVE, 0).output[EBX] == 576, "CPUID says 576 bytes for these");
	xsetbv(0, SSE);
	check_fault(VECTOR_GP, 0, "XCR0 without x87");
	xsetbv(0, X87 | AVX);
	check_fault(VECTOR_GP, 0, "AVX without SSE");
	xsetbv(0, X87 | SSE | BIT(62));
	check_fault(VECTOR_GP, 0, "a reserved bit of XCR0");
	xsetbv(7, X87);
	check_fault(VECTOR_GP, 0, "XCR7");
	TRY("xgetbv", ::"c"(7) : "rax", "rdx");
	check_fault(VECTOR_GP, 0, "XGETBV of XCR7");
}

USER_CODE(user_xsetbv, "xor %ecx, %ecx; mov $3, %eax; xor %edx, %edx; xsetbv");
USER_CODE(user_xgetbv, "xor %ecx, %ecx; xgetbv");
static void user_mode(void)
{
	RUN_USER(user_xsetbv);
	check_fault(VECTOR_GP, 0, "XSETBV at CPL 3");
	RUN_USER(user_xgetbv);
	check_user_ended("XGETBV at CPL 3");
	check(last_fault.regs.rax == (X87 | SSE), "reads XCR0");
}

static void save_and_restore(void)
{
	memset(area, 0, sizeof(area));
	set_xmm0(PATTERN);
	SAVE("xsave", X87 | SSE);
	check_no_fault("XSAVE");
	check(*(u64 *)XMM0 == PATTERN && *(u64 *)(XMM0 + 8) == PATTERN, "saves XMM0");
	check(XSTATE_BV & SSE && !XCOMP_BV, "and says so in XSTATE_BV, not compacted");
	set_xmm0(0);
	SAVE("xrstor", X87 | SSE);
	check(get_xmm0() == PATTERN, "XRSTOR restores XMM0");
	set_xmm0(1);
	SAVE("xrstor", X87);
	check(get_xmm0() == 1, "not when it is not asked for");
	XSTATE_BV = X87;
	SAVE("xrstor", X87 | SSE);
	check(!get_xmm0(), "XRSTOR of the initial state clears XMM0");
	set_xmm0(PATTERN);
	memset(XMM0, 0xee, 16);
	SAVE("xsave", X87);
	check(XMM0[0] == 0xee, "XSAVE of x87 leaves XMM0's place alone");
	SAVE("xsave", SSE | BIT(40));
	check_no_fault("components that XCR0 does not have are not asked for");
}

static void bad_areas(void)
{
	TRY("xsave (%0)", ::"r"(area + 16), "a"(3), "d"(0) : "memory");
	check_fault(VECTOR_GP, 0, "an area that is not aligned to 64 bytes");
	SAVE("xsave", X87 | SSE);
	XSTATE_BV = BIT(40);
	SAVE("xrstor", X87 | SSE);
	check_fault(VECTOR_GP, 0, "a bit of XSTATE_BV that XCR0 does not have");
	XSTATE_BV = X87 | SSE;
	area[HEADER + 20] = 1;
	SAVE("xrstor", X87 | SSE);
	check_fault(VECTOR_GP, 0, "a reserved byte of the header");
	area[HEADER + 20] = 0;
	MXCSR |= 1u << 31;
	SAVE("xrstor", X87 | SSE);
	check_fault(VECTOR_GP, 0, "a reserved bit of MXCSR");
	MXCSR &= ~(1u << 31);
	XCOMP_BV = BIT(1);
	SAVE("xrstor", X87 | SSE);
	check_fault(VECTOR_GP, 0, "XCOMP_BV without its bit 63");
	XCOMP_BV = 0;
	write_cr0(read_cr0() | CR0_TS);
	SAVE("xsave", X87);
	check_fault(VECTOR_NM, 0, "XSAVE with CR0.TS");
	TRY("xgetbv", ::"c"(0) : "rax", "rdx");
	check_no_fault("CR0.TS is nothing to XGETBV");
	write_cr0(read_cr0() & ~CR0_TS);
}

static void variants(void)
{
	if (require(HAS_XSAVEOPT, "XSAVEOPT")) {
		memset(area, 0, sizeof(area));
		set_xmm0(PATTERN + 1);
		SAVE("xsaveopt", X87 | SSE);
		check(*(u64 *)XMM0 == PATTERN + 1, "XSAVEOPT saves what has changed");
	}
	if (require(HAS_XGETBV1, "XGETBV with ECX=1")) {
		u64 in_use, upper;

		set_xmm0(PATTERN);
		asm volatile("xgetbv" : "=a"(in_use), "=d"(upper) : "c"(1));
		check(in_use & SSE && !(in_use & ~(X87 | SSE)), "XGETBV of the state in use");
	} else {
		TRY("xgetbv", ::"c"(1) : "rax", "rdx");
		check_fault(VECTOR_GP, 0, "then XGETBV with ECX=1 is #GP");
	}
	if (require(HAS_XSAVEC, "XSAVEC")) {
		memset(area, 0, sizeof(area));
		set_xmm0(PATTERN + 2);
		SAVE("xsavec", X87 | SSE);
		check(XCOMP_BV == (COMPACTED | X87 | SSE) && *(u64 *)XMM0 == PATTERN + 2, "XSAVEC");
		set_xmm0(0);
		SAVE("xrstor", X87 | SSE);
		check(get_xmm0() == PATTERN + 2, "XRSTOR of the compacted form");
	} else {
		SAVE("xsavec", X87);
		check_fault(VECTOR_UD, 0, "then XSAVEC is #UD");
	}
	if (!require(HAS_XSAVES, "XSAVES")) {
		SAVE("xsaves", X87);
		check_fault(VECTOR_UD, 0, "then XSAVES is #UD");
	}
}

static void run(void)
{
	if (!require(HAS_XSAVE, "XSAVE")) {
		TRY("mov %0, %%cr4", ::"r"(read_cr4() | CR4_OSXSAVE) : "memory");
		check_fault(VECTOR_GP, 0, "then CR4.OSXSAVE is a reserved bit");
		return;
	}
	control();
	user_mode();
	save_and_restore();
	bad_areas();
	variants();
}

const struct subject subjects[] = {{.name = "xsave", .run = run}, {}};
