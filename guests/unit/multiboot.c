/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a multiboot 1 loader tells: memory, its map, the command line, modules. Arguments: `modules=N`, how many there
 * are; the first one must start with the text "module". Source: Multiboot Specification 0.6.96, section 3.3.
 */
#include "lib.h"

enum flag { HAS_MEMORY = 1 << 0, HAS_COMMAND_LINE = 1 << 2, HAS_MODULES = 1 << 3, HAS_MAP = 1 << 6 };
enum field { FLAGS, MEMORY_LOWER, MEMORY_UPPER, COMMAND_LINE = 4, MODULE_COUNT, MODULES, MAP_LENGTH = 11, MAP };
enum { AVAILABLE = 1, KIB = 1024, MAX_LOWER = 640 };
#define ONE_MIB 0x100000ull

struct range {
	u32 size; /* of what follows */
	u64 base, length;
	u32 type;
} __attribute__((packed));
struct module {
	u32 start, end, text, reserved;
};

/* Part of the image. */
extern const u8 trap_stubs[];

static const struct range *range_of(u64 address)
{
	const u8 *at = direct(boot_info[MAP]), *end = at + boot_info[MAP_LENGTH];

	for (const struct range *range = (void *)at; at < end; at += range->size + sizeof(range->size)) {
		range = (const void *)at;
		if (address - range->base < range->length)
			return range;
	}
	return NULL;
}

static void memory(void)
{
	if (!check((boot_info[FLAGS] & (HAS_MEMORY | HAS_MAP)) == (HAS_MEMORY | HAS_MAP), "memory and its map are told"))
		return;
	u32 upper = boot_info[MEMORY_UPPER];
	check(boot_info[MEMORY_LOWER] && boot_info[MEMORY_LOWER] <= MAX_LOWER, "%u KiB of lower memory",
	      boot_info[MEMORY_LOWER]);
	check(upper >= 4 * KIB, "%u KiB of upper memory", upper);
	const struct range *low = range_of(0), *image = range_of(physical_of(trap_stubs));
	check(low && low->type == AVAILABLE, "the map has memory at 0");
	check(image && image->type == AVAILABLE && image->base <= ONE_MIB, "and where the image is");
	check(image && image->base + image->length >= ONE_MIB, "it begins at 1 MiB");
	const struct range *last = range_of(ONE_MIB + upper * (u64)KIB - 1);
	check(last && last->type == AVAILABLE, "upper memory is in the map up to its end");
	const struct range *rom = range_of(0xf0000);
	check(!rom || rom->type != AVAILABLE, "the firmware's place is not free memory");
}

static void command_line(void)
{
	check(boot_info[FLAGS] & HAS_COMMAND_LINE, "there is a command line");
	const char *text = direct(boot_info[COMMAND_LINE]);
	check(strlen(text) < PAGE_SIZE && *text != ' ' && *text, "its first word is the image: %s", text);
}

static void modules(void)
{
	const struct module *module = direct(boot_info[MODULES]);
	u32 count = boot_info[FLAGS] & HAS_MODULES ? boot_info[MODULE_COUNT] : 0;

	check(count == (argument("modules") ? number(argument("modules")) : 0), "%u modules", count);
	for (u32 i = 0; i < count; i++) {
		check(module[i].start < module[i].end && !(module[i].start & (PAGE_SIZE - 1)),
		      "module %u is at a page boundary, %u bytes: %s", i, module[i].end - module[i].start,
		      (const char *)direct(module[i].text));
		check(module[i].end <= physical_of(top_table) || module[i].start > physical_of(top_table),
		      "not where the image is");
	}
	if (count)
		check(!memcmp(direct(module[0].start), "module", 6), "and has its content");
}

const struct subject subjects[] = {
	{.name = "memory", .run = memory},
	{.name = "command_line", .run = command_line},
	{.name = "modules", .run = modules},
	{},
};
