/* SPDX-License-Identifier: GPL-2.0-or-later */
/* QEMU's firmware configuration device. `memory=MIB` says how much memory it has to report. */
#include "fw_cfg.h"

#define FIRST_FILE_ITEM 0x20
#define MANY_FILES 256

static char text[8];

static void ports(void)
{
	u32 id = 0;
	u16 cpus = 0, max_cpus = 0;
	u64 memory = 0;

	fw_cfg_item(FW_CFG_SIGNATURE, text, 4);
	check(!memcmp(text, "QEMU", 4), "the signature is QEMU");
	u8 behind = fw_cfg_byte();
	check(!behind, "behind an item there are zeros");
	fw_cfg_select(FW_CFG_SIGNATURE);
	fw_cfg_read(text, 4);
	check(!memcmp(text, "QEMU", 4), "a selection starts again");
	fw_cfg_item(FW_CFG_ID, &id, sizeof(id));
	check(id & FW_CFG_HAS_PORT, "the ID says: ports");
	fw_cfg_item(FW_CFG_CPUS, &cpus, sizeof(cpus));
	fw_cfg_item(FW_CFG_MAX_CPUS, &max_cpus, sizeof(max_cpus));
	check(cpus == 1, "one processor");
	check(max_cpus >= cpus, "and not less at most");
	fw_cfg_item(FW_CFG_RAM_SIZE, &memory, sizeof(memory));
	u64 expected = argument("memory") ? number(argument("memory")) : memory >> 20;
	check(memory >= 8 << 20 && memory == expected << 20, "%lu MiB of memory", memory >> 20);
	fw_cfg_item(FW_CFG_NONE, text, 4);
	check(!memcmp(text, "\0\0\0\0", 4), "an item that is not there is zeros");
}

static void dma(void)
{
	u32 id = 0;

	fw_cfg_item(FW_CFG_ID, &id, sizeof(id));
	if (!(id & FW_CFG_HAS_DMA)) {
		skip("the ID says: no DMA");
		return;
	}
	check(inl(0x514) == __builtin_bswap32(0x51454d55) && inl(0x518) == __builtin_bswap32(0x20434647),
	      "the DMA address register reads as a signature");
	memset(text, 0xff, sizeof(text));
	u32 control = fw_cfg_dma(FW_CFG_SIGNATURE << 16 | FW_CFG_SELECT | FW_CFG_READ, text, 4);
	check(!control && !memcmp(text, "QEMU\xff", 5), "a DMA read of the signature");
	control = fw_cfg_dma(FW_CFG_SIGNATURE << 16 | FW_CFG_SELECT | FW_CFG_SKIP, NULL, 2);
	check(!control && fw_cfg_byte() == 'M', "a DMA skip, and then a port read");
	memset(text, 0xff, sizeof(text));
	control = fw_cfg_dma(FW_CFG_READ, text, 2);
	check(!control && !memcmp(text, "U\0\xff", 3), "a DMA read goes on, and there are zeros behind the item");
	control = fw_cfg_dma(FW_CFG_NONE << 16 | FW_CFG_SELECT | FW_CFG_READ, text, 2);
	check(!(control & ~(u32)FW_CFG_ERROR), "a DMA read of an item that is not there ends");
}

static void files(void)
{
	u32 count, size = 0;
	u16 item;
	static const struct {
		const char *name;
		u32 size;
	} wanted[] = {{"etc/acpi/rsdp", 20}, {"etc/acpi/tables", 36}, {"etc/e820", 20}};

	fw_cfg_item(FW_CFG_FILES, &count, sizeof(count));
	count = __builtin_bswap32(count);
	check(count && count < MANY_FILES, "a directory of %u files", count);
	for (unsigned int i = 0; i < ARRAY_SIZE(wanted); i++) {
		item = fw_cfg_file(wanted[i].name, &size);
		if (!item)
			skip("no file %s", wanted[i].name);
		else
			check(item >= FIRST_FILE_ITEM && size >= wanted[i].size, "%s is item %x, %u bytes",
			      wanted[i].name, item, size);
	}
}

const struct subject subjects[] = {
	{.name = "ports", .run = ports}, {.name = "dma", .run = dma}, {.name = "files", .run = files}, {},
};
