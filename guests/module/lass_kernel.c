// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A kernel module that commits one supervisor access below the split while it is loaded.
 *
 *	insmod lass_kernel.ko access=read [address=0x10000]
 *
 * With LASS on, Linux reports a general protection fault and names the violation; with LASS off the same
 * access reaches paging. Either way the process that loads the module dies in the middle of it. Where the
 * access does no harm the module says so and declines to stay.
 */
#include <linux/module.h>

#define RFLAGS_AC_SET ".byte 0x0f, 0x01, 0xcb" /* stac */
#define RFLAGS_AC_CLEAR ".byte 0x0f, 0x01, 0xca" /* clac */

static char *access = "read";
module_param(access, charp, 0444);
MODULE_PARM_DESC(access, "read, write, string, stack, call, stac-read, stac-call or nothing");

/* Canonical, in the lower half, above the range Linux calls a null pointer, and mapped by nobody. */
static unsigned long address = 0x10000;
module_param(address, ulong, 0444);
MODULE_PARM_DESC(address, "the linear address to touch");

static void read_there(void)
{
	(void)*(volatile unsigned long *)address;
}

static void write_there(void)
{
	*(volatile unsigned long *)address = 0;
}

static void string_from_there(void)
{
	unsigned long buffer, count = sizeof(buffer);
	unsigned long from = address;
	void *to = &buffer;

	asm volatile("rep movsb" : "+S"(from), "+D"(to), "+c"(count) : : "memory");
}

/* An operand based on RBP makes it a stack access. */
static void stack_read_there(void)
{
	asm volatile("mov %%rbp, %%rcx\n\t"
		     "mov %0, %%rbp\n\t"
		     "mov (%%rbp), %%rdx\n\t"
		     "mov %%rcx, %%rbp"
		     :
		     : "a"(address)
		     : "rcx", "rdx", "memory");
}

static void call_there(void)
{
	((void (*)(void))address)();
}

/* RFLAGS.AC lets data accesses through, for copy_from_user() and its like ... */
static void read_there_with_ac(void)
{
	asm volatile(RFLAGS_AC_SET "\n\t"
		     "mov (%0), %%rdx\n\t"
		     RFLAGS_AC_CLEAR
		     :
		     : "a"(address)
		     : "rdx", "memory", "cc");
}

/* ... and never a fetch. */
static void call_there_with_ac(void)
{
	asm volatile(RFLAGS_AC_SET ::: "memory", "cc");
	call_there();
	asm volatile(RFLAGS_AC_CLEAR ::: "memory", "cc");
}

static void nothing(void)
{
}

static const struct {
	const char *name;
	void (*commit)(void);
} accesses[] = {
	{ "read", read_there },
	{ "write", write_there },
	{ "string", string_from_there },
	{ "stack", stack_read_there },
	{ "call", call_there },
	{ "stac-read", read_there_with_ac },
	{ "stac-call", call_there_with_ac },
	{ "nothing", nothing },
};

static int __init lass_kernel_init(void)
{
	unsigned int i;

	for (i = 0; i < sizeof(accesses) / sizeof(accesses[0]); i++) {
		if (strcmp(accesses[i].name, access))
			continue;
		pr_info("lass_kernel: %s at %#lx\n", access, address);
		accesses[i].commit();
		pr_info("lass_kernel: %s did no harm\n", access);
		return -ECANCELED;
	}
	pr_err("lass_kernel: there is no access called %s\n", access);
	return -EINVAL;
}

module_init(lass_kernel_init);
MODULE_DESCRIPTION("One supervisor access to a user address, to see LASS refuse it");
MODULE_LICENSE("GPL");
