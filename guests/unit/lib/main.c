/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From the boot code to the tests and out: the multiboot command line, results, the exit port.
 *
 * The command line's first word is the image. Words with "=" are arguments; any other word is a subject to run, and
 * without one all of them run that are not on request.
 */
#include "apic.h"
#include "console.h"

enum { EXIT_PORT = 0xf4, EXIT_PASS = 0, EXIT_FAIL = 1 };
enum { MULTIBOOT_MAGIC = 0x2badb002, MULTIBOOT_HAS_COMMAND_LINE = 1 << 2, MULTIBOOT_COMMAND_LINE = 16 };
enum { MAX_WORDS = 32, MAX_COMMAND_LINE = 512 };

const u32 *boot_info;
static int passed, failed, skipped;
static char command_line[MAX_COMMAND_LINE];
static const char *words[MAX_WORDS];
static int word_count;

bool check_list(bool holds, const char *format, va_list list)
{
	print(holds ? "PASS: " : "FAIL: ");
	print_list(format, list);
	if (holds)
		print("\n");
	*(holds ? &passed : &failed) += 1;
	return holds;
}

bool check(bool holds, const char *format, ...)
{
	va_list list;

	va_start(list, format);
	check_list(holds, format, list);
	va_end(list);
	if (!holds)
		print("\n");
	return holds;
}

void skip(const char *format, ...)
{
	va_list list;

	print("SKIP: ");
	va_start(list, format);
	print_list(format, list);
	va_end(list);
	print("\n");
	skipped++;
}

bool require(struct feature feature, const char *name)
{
	bool has = cpu_has(feature);

	if (!has)
		skip("CPUID offers no %s", name);
	return has;
}

const char *argument(const char *name)
{
	size_t length = strlen(name);

	for (int i = 0; i < word_count; i++)
		if (!strncmp(words[i], name, length) && words[i][length] == '=')
			return words[i] + length + 1;
	return NULL;
}

u64 number(const char *text)
{
	u64 value = 0;

	for (; *text >= '0' && *text <= '9'; text++)
		value = value * 10 + *text - '0';
	return value;
}

void leave(u32 code)
{
	outl(code, EXIT_PORT);
	/* Nobody has that port: stay where a debugger finds us. */
	for (;;)
		asm volatile("cli; hlt");
}

void summary_and_leave(void)
{
	print("SUMMARY: %d passed, %d failed, %d skipped\n", passed, failed, skipped);
	leave(failed || !(passed + skipped) ? EXIT_FAIL : EXIT_PASS);
}

static bool is_selector(const char *word)
{
	for (; *word; word++)
		if (*word == '=')
			return false;
	return true;
}

static bool is_wanted(const struct subject *subject)
{
	bool any = false;

	for (int i = 0; i < word_count; i++) {
		if (!is_selector(words[i]))
			continue;
		any = true;
		if (!strncmp(words[i], subject->name, MAX_COMMAND_LINE))
			return true;
	}
	return !any && !subject->on_request;
}

static void split_command_line(const char *text)
{
	char *to = command_line;
	bool inside = false;
	int seen = 0;

	while (*text && to < command_line + sizeof(command_line) - 1) {
		if (*text != ' ' && !inside && seen++ && word_count < MAX_WORDS)
			words[word_count++] = to;
		inside = *text != ' ';
		*to++ = inside ? *text : 0;
		text++;
	}
}

/* Called by start.S with what the boot loader had in EAX and EBX. */
void start_c(u32 magic, u32 info)
{
	init_console();
	init_traps();
	mask_pic();
	if (magic != MULTIBOOT_MAGIC) {
		check(false, "multiboot: EAX is %x on entry", magic);
		summary_and_leave();
	}
	boot_info = direct(info);
	if (boot_info[0] & MULTIBOOT_HAS_COMMAND_LINE)
		split_command_line(direct(boot_info[MULTIBOOT_COMMAND_LINE / sizeof(u32)]));
	for (const struct subject *subject = subjects; subject->name; subject++)
		if (is_wanted(subject))
			subject->run();
	summary_and_leave();
}
