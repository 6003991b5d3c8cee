/* SPDX-License-Identifier: GPL-2.0-or-later */
/* QEMU's firmware configuration device, by ports and by DMA. */
#include "fw_cfg.h"

enum { SELECTOR = 0x510, DATA = 0x511, DMA_HIGH = 0x514, DMA_LOW = 0x518, DMA_TRIES = 1000000 };

struct dma {
	u32 control, length;
	u64 address;
} __attribute__((aligned(16)));

void fw_cfg_select(u16 item) { outw(item, SELECTOR); }
u8 fw_cfg_byte(void) { return inb(DATA); }

void fw_cfg_read(void *to, size_t size)
{
	for (u8 *byte = to; size; size--)
		*byte++ = fw_cfg_byte();
}

void fw_cfg_item(u16 item, void *to, size_t size)
{
	fw_cfg_select(item);
	fw_cfg_read(to, size);
}

u32 fw_cfg_dma(u32 control, void *to, u32 size)
{
	static volatile struct dma dma;

	dma.length = __builtin_bswap32(size);
	dma.address = __builtin_bswap64(physical_of(to));
	dma.control = __builtin_bswap32(control);
	outl(__builtin_bswap32(physical_of((void *)&dma) >> 32), DMA_HIGH);
	outl(__builtin_bswap32(physical_of((void *)&dma)), DMA_LOW);
	for (int i = 0; i < DMA_TRIES; i++)
		if (!(dma.control & ~__builtin_bswap32(FW_CFG_ERROR)))
			break;
	return __builtin_bswap32(dma.control);
}

u16 fw_cfg_file(const char *name, u32 *size)
{
	u32 count;
	struct fw_cfg_file file;

	fw_cfg_item(FW_CFG_FILES, &count, sizeof(count));
	for (count = __builtin_bswap32(count); count; count--) {
		fw_cfg_read(&file, sizeof(file));
		if (strncmp(file.name, name, sizeof(file.name)))
			continue;
		*size = __builtin_bswap32(file.size);
		return __builtin_bswap16(file.item);
	}
	return 0;
}
