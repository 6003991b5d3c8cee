/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Page tables beside the identity map that start.S makes. */
#include "lib.h"

enum { POOL_PAGES = 192, INDEX_BITS = 9, INDEX_MASK = 511, PAGE_SHIFT = 12, TOP_LEVEL = 4 };

static u8 pool[POOL_PAGES][PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
static int used;

void *alloc_page(void)
{
	if (used == POOL_PAGES) {
		check(false, "the image's pool of pages is too small");
		summary_and_leave();
	}
	return pool[used++];
}

u64 *entry_of(u64 address, int level)
{
	u64 *table = top_table;

	for (int at = TOP_LEVEL;; at--) {
		u64 *entry = &table[address >> (PAGE_SHIFT + INDEX_BITS * (at - 1)) & INDEX_MASK];

		if (at == level)
			return entry;
		if (!(*entry & PTE_P))
			*entry = physical_of(alloc_page()) | PTE_P | PTE_W | PTE_U;
		/* Tables are part of the image, which is mapped at KERNEL_BASE. */
		table = (u64 *)(KERNEL_BASE + (*entry & PTE_ADDRESS));
	}
}

void map_page(u64 address, u64 physical, u64 flags)
{
	*entry_of(address, 1) = physical | flags;
	invlpg(address);
}
