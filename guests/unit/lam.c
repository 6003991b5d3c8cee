/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * LAM: linear-address masking of user and supervisor pointers. Source: Intel's instruction set extensions reference,
 * chapter "Linear Address Masking".
 */
#include "lib.h"

/* Metadata bits; bit 63 is none of them. */
#define TAG_57 (0x2aull << 57)
#define TAG_48 (0x2aaaull << 48)
#define HIGH_ALIAS 0xffff800000000000ull
/* Clears metadata bits of a supervisor pointer, and not its bit 63. */
#define SUPERVISOR_TAG (~(0x1555ull << 48))

USER_CODE(user_read, "mov (%rdi), %rax");
USER_CODE(user_write, "movq $7, (%rdi)");
USER_CODE(user_jump, "jmp *%rdi; int $0x20");
USER_CODE(user_string, "mov %rsi, %rcx; mov $1, %ecx; rep movsb");

static u64 value = 0x5a5a;

static void set_user_lam(u64 bits) { write_cr3((read_cr3() & ~(CR3_LAM_U48 | CR3_LAM_U57)) | bits); }

static void user_pointers(void)
{
	RUN_USER(user_read, .rdi = USER_DATA | TAG_57);
	check_fault(VECTOR_GP, 0, "a tagged pointer without LAM");
	set_user_lam(CR3_LAM_U57);
	check(read_cr3() & CR3_LAM_U57, "CR3.LAM_U57");
	RUN_USER(user_write, .rdi = USER_DATA | TAG_57);
	check_user_ended("LAM_U57: a write by a tagged pointer");
	RUN_USER(user_read, .rdi = USER_DATA | TAG_57);
	check_user_ended("LAM_U57: a read");
	check(last_fault.regs.rax == 7, "which reads what it should");
	RUN_USER(user_read, .rdi = USER_DATA | TAG_48);
	check_fault(VECTOR_GP, 0, "LAM_U57: bits 56:48 are no metadata");
	RUN_USER(user_read, .rdi = USER_DATA | BIT(63));
	check_fault(VECTOR_GP, 0, "LAM_U57: bit 63 is no metadata");
	set_user_lam(CR3_LAM_U48);
	RUN_USER(user_read, .rdi = USER_DATA | TAG_48);
	check_user_ended("LAM_U48: a read by a tagged pointer");
	RUN_USER(user_read, .rdi = USER_DATA | TAG_48 | BIT(47));
	check_fault(VECTOR_GP, 0, "LAM_U48: bit 47 is no metadata");
	RUN_USER(user_string, .rdi = USER_DATA | TAG_48, .rsi = (USER_DATA + 8) | TAG_57);
	check_user_ended("MOVS by tagged pointers");
	check(last_fault.regs.rdi == ((USER_DATA | TAG_48) + 1), "RDI keeps its tag");
	RUN_USER(user_jump, .rdi = USER_CODE_PAGE | TAG_48);
	check_fault(VECTOR_GP, 0, "a jump to a tagged address");
	TRY("mov (%0), %%rax", ::"r"(USER_DATA | TAG_48) : "rax", "memory");
	check_no_fault("the supervisor's accesses by user pointers are masked, too");
	set_user_lam(CR3_LAM_U48 | CR3_LAM_U57);
	RUN_USER(user_read, .rdi = USER_DATA | TAG_48);
	check_fault(VECTOR_GP, 0, "with both bits, LAM_U57 it is");
	set_user_lam(0);
}

static void supervisor_pointers(void)
{
	u64 pointer = HIGH_ALIAS + physical_of(&value), seen = 0;

	TRY("mov (%1), %0", : "=r"(seen) : "r"(pointer & SUPERVISOR_TAG) : "memory");
	check_fault(VECTOR_GP, 0, "a tagged supervisor pointer without LAM");
	write_cr4(read_cr4() | CR4_LAM_SUP);
	TRY("mov (%1), %0", : "+r"(seen) : "r"(pointer & SUPERVISOR_TAG) : "memory");
	/* With four-level paging, bits 62:48. */
	check_no_fault("CR4.LAM_SUP: a read by a tagged pointer");
	check(seen == value, "which reads what it should");
	TRY("mov (%0), %%rax", ::"r"(pointer & SUPERVISOR_TAG & ~BIT(47)) : "rax", "memory");
	check_fault(VECTOR_GP, 0, "bit 47 must be bit 63");
	TRY("mov (%0), %%rax", ::"r"(USER_DATA | TAG_57) : "rax", "memory");
	check_fault(VECTOR_GP, 0, "a user pointer is not masked by CR4.LAM_SUP");
	TRY("call *%0", ::"r"(pointer & SUPERVISOR_TAG) : "memory");
	check_fault(VECTOR_GP, 0, "a call to a tagged address");
	TRY("invlpg (%0)", ::"r"(pointer & SUPERVISOR_TAG) : "memory");
	check_no_fault("INVLPG of a tagged address does nothing");
	TRY("wrmsr", ::"c"(MSR_GS_BASE), "a"(0), "d"((u32)((pointer & SUPERVISOR_TAG) >> 32)) : "memory");
	check_fault(VECTOR_GP, 0, "WRMSR of a tagged address");
	write_cr4(read_cr4() & ~CR4_LAM_SUP);
}

static void run(void)
{
	RUN_USER(user_jump, .rdi = USER_CODE_PAGE + 2);
	if (!require(HAS_LAM, "LAM")) {
		TRY("mov %0, %%cr3", ::"r"(read_cr3() | CR3_LAM_U57) : "memory");
		check_fault(VECTOR_GP, 0, "then CR3.LAM_U57 is a reserved bit");
		return;
	}
	user_pointers();
	supervisor_pointers();
}

const struct subject subjects[] = {{.name = "lam", .run = run}, {}};
