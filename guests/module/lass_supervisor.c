// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What Linux says when supervisor mode touches the lower half, with LASS and without.
 *
 * Loads the module lass_kernel, which this program carries inside, once for each access, and reads the
 * kernel log: with LASS on the kernel's own report has to name the violation, with LASS off it has to be
 * about a page fault. Needs to be root; every access that faults costs the kernel an oops and a process.
 */
#include "../guest.h"

#include <errno.h>
#include <sys/klog.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* syslog(2) */
enum log_action { READ_ALL = 3, CLEAR = 5 };

#define MODULE_NAME "lass_kernel"
#define ADDRESS 0x10000UL
#define NULL_POINTER 0x10UL

asm(".section .rodata\n"
    ".globl module_image, module_image_end\n"
    "module_image: .incbin \"" MODULE_IMAGE "\"\n"
    "module_image_end:\n"
    ".previous\n");
extern const char module_image[], module_image_end[];

struct access {
	const char *name;
	const char *access;
	unsigned long address;
	const char *with_lass;
	const char *without;
};

/* What Linux 7.2 says. It looks for the address in the instruction, so a fetch gives it nothing to name. */
#define REFUSED "general protection fault"
#define VIOLATION REFUSED ", probably LASS violation for address 0x10000"
#define PAGE_FAULT "unable to handle page fault for address: 0000000000010000"

static const struct access accesses[] = {
	{ "no access", "nothing", ADDRESS, "did no harm", "did no harm" },
	{ "read", "read", ADDRESS, VIOLATION, PAGE_FAULT },
	{ "write", "write", ADDRESS, VIOLATION, PAGE_FAULT },
	/* Linux cannot tell the address of an instruction without a ModRM byte and names a wrong one. */
	{ "rep movs", "string", ADDRESS, REFUSED, PAGE_FAULT },
	{ "read [rbp]", "stack", ADDRESS, "stack segment", PAGE_FAULT },
	{ "read a null pointer", "read", NULL_POINTER, "NULL pointer dereference", "NULL pointer dereference" },
	{ "call", "call", ADDRESS, REFUSED, PAGE_FAULT },
	{ "read with AC=1", "stac-read", ADDRESS, PAGE_FAULT, PAGE_FAULT },
	{ "call with AC=1", "stac-call", ADDRESS, REFUSED, PAGE_FAULT },
};

/*
 * A module that died while it was being loaded keeps its name for ever, so every load gets its own: the last
 * letter of each mention of the name changes.
 */
static void load(const struct access *access, char letter)
{
	static char image[1 << 20];
	const size_t length = module_image_end - module_image;
	char parameters[64];

	memcpy(image, module_image, length);
	for (char *name = image; (name = memmem(name, image + length - name, MODULE_NAME, sizeof(MODULE_NAME)));)
		name[strlen(MODULE_NAME) - 1] = letter;
	snprintf(parameters, sizeof(parameters), "access=%s address=%#lx", access->access, access->address);
	syscall(SYS_init_module, image, length, parameters);
	_exit(errno);
}

/* The line of the kernel log that tells what happened, without its time stamp. */
static const char *verdict(char *log)
{
	static const char *const marks[] = { "BUG: unable", "BUG: kernel NULL", "Oops: ", "did no harm" };

	for (size_t i = 0; i < sizeof(marks) / sizeof(marks[0]); i++) {
		char *line = strstr(log, marks[i]);

		if (!line)
			continue;
		line[strcspn(line, "\n")] = '\0';
		return line;
	}
	return "nothing in the kernel log";
}

static void check(const struct access *access, char letter, bool lass)
{
	static char log[1 << 16];
	const char *expected = lass ? access->with_lass : access->without;
	int status, length;
	bool held;
	pid_t child;

	klogctl(CLEAR, NULL, 0);
	child = fork();
	if (child == 0)
		load(access, letter);
	waitpid(child, &status, 0);
	length = klogctl(READ_ALL, log, sizeof(log) - 1);
	log[length < 0 ? 0 : length] = '\0';

	held = strstr(log, expected) && !strstr(log, "Oops") == WIFEXITED(status);
	if (WIFEXITED(status) && WEXITSTATUS(status) != ECANCELED)
		expect(access->name, false, "the module was not loaded: %s", strerror(WEXITSTATUS(status)));
	else
		expect(access->name, held, "%s", verdict(log));
}

int main(void)
{
	bool lass = has_cpu_flag("lass");

	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("LASS is %s\n", lass ? "on" : "off");
	for (size_t i = 0; i < sizeof(accesses) / sizeof(accesses[0]); i++)
		check(&accesses[i], (char)('A' + i), lass);
	return summary("lass_supervisor");
}
