/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Protection keys of user pages. Source: SDM volume 3, "Protection Keys". */
#include "lib.h"

#define KEY 3
#define ACCESS_DISABLE (1u << 2 * KEY)
#define WRITE_DISABLE (2u << 2 * KEY)
#define DATA USER_DATA
#define XCR0_PKRU BIT(9)
#define XCR0_X87 BIT(0)
#define XSAVE_HEADER 512
#define LEAF_XSAVE 0xd
#define PKRU_COMPONENT 9

USER_CODE(user_read, "mov (%rdi), %rax");
USER_CODE(user_write, "movq $1, (%rdi)");
USER_CODE(user_nothing, "nop");

static u64 *entry;

static void wrpkru(u32 value) { TRY("wrpkru", ::"a"(value), "c"(0), "d"(0) : "memory"); }

static u32 rdpkru(void)
{
	u32 value, upper;

	asm volatile("rdpkru" : "=a"(value), "=d"(upper) : "c"(0));
	return value;
}

static void instructions(void)
{
	TRY("rdpkru", ::"c"(0) : "rax", "rdx");
	check_fault(VECTOR_UD, 0, "RDPKRU without CR4.PKE");
	wrpkru(0);
	check_fault(VECTOR_UD, 0, "WRPKRU without CR4.PKE");
	check(!cpu_has(HAS_OSPKE), "no OSPKE yet");
	write_cr4(read_cr4() | CR4_PKE);
	check(cpu_has(HAS_OSPKE), "OSPKE follows CR4.PKE");
	wrpkru(0x12345678);
	check_no_fault("WRPKRU");
	check(rdpkru() == 0x12345678, "RDPKRU");
	TRY("rdpkru", ::"c"(1) : "rax", "rdx");
	check_fault(VECTOR_GP, 0, "RDPKRU with ECX=1");
	TRY("wrpkru", ::"a"(0), "c"(1), "d"(0));
	check_fault(VECTOR_GP, 0, "WRPKRU with ECX=1");
	TRY("wrpkru", ::"a"(0), "c"(0), "d"(1));
	check_fault(VECTOR_GP, 0, "WRPKRU with EDX=1");
	wrpkru(0);
}

static void user_accesses(void)
{
	RUN_USER(user_write, .rdi = DATA);
	check_user_ended("a page with a key, and PKRU=0");
	wrpkru(ACCESS_DISABLE);
	RUN_USER(user_read, .rdi = DATA);
	check_page_fault(PF_PRESENT | PF_USER | PF_KEY, DATA, "AD: a user read");
	RUN_USER(user_write, .rdi = DATA);
	check_page_fault(PF_PRESENT | PF_USER | PF_WRITE | PF_KEY, DATA, "AD: a user write");
	wrpkru(WRITE_DISABLE);
	RUN_USER(user_read, .rdi = DATA);
	check_user_ended("WD: a user read");
	RUN_USER(user_write, .rdi = DATA);
	check_page_fault(PF_PRESENT | PF_USER | PF_WRITE | PF_KEY, DATA, "WD: a user write");
	wrpkru(~(ACCESS_DISABLE | WRITE_DISABLE) & ~3u);
	RUN_USER(user_write, .rdi = DATA);
	check_user_ended("rights of other keys");
	*entry &= ~(u64)PTE_P;
	invlpg(DATA);
	wrpkru(ACCESS_DISABLE);
	RUN_USER(user_read, .rdi = DATA);
	check_page_fault(PF_USER, DATA, "a page that is not present has no key");
	*entry |= PTE_P;
	invlpg(DATA);
}

static void supervisor_accesses(void)
{
	wrpkru(ACCESS_DISABLE);
	TRY("mov (%0), %%rax", ::"r"(DATA) : "rax", "memory");
	check_page_fault(PF_PRESENT | PF_KEY, DATA, "AD: a supervisor read of a user page");
	wrpkru(WRITE_DISABLE);
	TRY("movq $1, (%0)", ::"r"(DATA) : "memory");
	check_page_fault(PF_PRESENT | PF_WRITE | PF_KEY, DATA, "WD: a supervisor write");
	write_cr0(read_cr0() & ~CR0_WP);
	TRY("movq $1, (%0)", ::"r"(DATA) : "memory");
	check_no_fault("WD: a supervisor write with CR0.WP=0");
	wrpkru(ACCESS_DISABLE);
	TRY("movq $1, (%0)", ::"r"(DATA) : "memory");
	check_page_fault(PF_PRESENT | PF_WRITE | PF_KEY, DATA, "AD: a supervisor write with CR0.WP=0");
	write_cr0(read_cr0() | CR0_WP);
	*entry &= ~(u64)PTE_U;
	invlpg(DATA);
	TRY("mov (%0), %%rax", ::"r"(DATA) : "rax", "memory");
	check_no_fault("a supervisor page has no such key");
	*entry |= PTE_U;
	invlpg(DATA);
	write_cr4(read_cr4() & ~CR4_PKE);
	TRY("mov (%0), %%rax", ::"r"(DATA) : "rax", "memory");
	check_no_fault("without CR4.PKE keys are ignored");
	write_cr4(read_cr4() | CR4_PKE);
}

static void fetches(void)
{
	u64 *code = entry_of(USER_CODE_PAGE, 1);

	wrpkru(ACCESS_DISABLE | WRITE_DISABLE);
	*code |= PTE_KEY(KEY);
	invlpg(USER_CODE_PAGE);
	RUN_USER(user_nothing);
	check_user_ended("keys are not for fetches");
	*code &= ~PTE_KEY(15);
	invlpg(USER_CODE_PAGE);
	wrpkru(0);
}

/* XRSTOR is the other way to write PKRU. */
static void xrstor(void)
{
	static u8 area[4096] __attribute__((aligned(64)));
	struct cpuid component = cpuid(LEAF_XSAVE, PKRU_COMPONENT);
	u32 offset = component.output[EBX];

	if (!require(HAS_XSAVE, "XSAVE"))
		return;
	if (!(cpuid(LEAF_XSAVE, 0).output[EAX] & XCR0_PKRU)) {
		skip("XCR0 has no PKRU state");
		return;
	}
	check(component.output[EAX] == 8 && offset >= XSAVE_HEADER + 64, "PKRU state is 8 bytes at %u", offset);
	write_cr4(read_cr4() | CR4_OSXSAVE);
	asm volatile("xsetbv" ::"c"(0), "a"((u32)(XCR0_X87 | XCR0_PKRU)), "d"(0));
	wrpkru(0x30);
	asm volatile("xsave (%0)" ::"r"(area), "a"((u32)XCR0_PKRU), "d"(0) : "memory");
	check(*(u32 *)(area + offset) == 0x30, "XSAVE saves PKRU");
	check(*(u64 *)(area + XSAVE_HEADER) & XCR0_PKRU, "XSTATE_BV says so");
	*(u32 *)(area + offset) = ACCESS_DISABLE;
	asm volatile("xrstor (%0)" ::"r"(area), "a"((u32)XCR0_PKRU), "d"(0) : "memory");
	check(rdpkru() == ACCESS_DISABLE, "XRSTOR loads PKRU");
	RUN_USER(user_read, .rdi = DATA);
	check_page_fault(PF_PRESENT | PF_USER | PF_KEY, DATA, "which has its effect at once");
	*(u64 *)(area + XSAVE_HEADER) = 0;
	asm volatile("xrstor (%0)" ::"r"(area), "a"((u32)XCR0_PKRU), "d"(0) : "memory");
	check(!rdpkru(), "XRSTOR of the initial state is PKRU=0");
	RUN_USER(user_read, .rdi = DATA);
	check_user_ended("which has its effect, too");
}

static void run(void)
{
	if (!require(HAS_PKU, "PKU")) {
		TRY("mov %0, %%cr4", ::"r"(read_cr4() | CR4_PKE) : "memory");
		check_fault(VECTOR_GP, 0, "then CR4.PKE is a reserved bit");
		wrpkru(0);
		check_fault(VECTOR_UD, 0, "and WRPKRU is #UD");
		return;
	}
	instructions();
	RUN_USER(user_nothing);
	entry = entry_of(DATA, 1);
	*entry |= PTE_KEY(KEY);
	invlpg(DATA);
	user_accesses();
	supervisor_accesses();
	fetches();
	xrstor();
}

const struct subject subjects[] = {{.name = "pku", .run = run}, {}};
