/* SPDX-License-Identifier: GPL-2.0-or-later */
/* QEMU's firmware configuration device (its specification: docs/specs/fw_cfg). */
#ifndef LIB_FW_CFG_H
#define LIB_FW_CFG_H

#include "lib.h"

enum fw_cfg_item {
	FW_CFG_SIGNATURE = 0x00,
	FW_CFG_ID = 0x01,
	FW_CFG_RAM_SIZE = 0x03,
	FW_CFG_CPUS = 0x05,
	FW_CFG_MAX_CPUS = 0x0f,
	FW_CFG_FILES = 0x19,
	FW_CFG_NONE = 0x7fff,
};
enum { FW_CFG_HAS_PORT = 1 << 0, FW_CFG_HAS_DMA = 1 << 1 };

/* One entry of the directory; numbers are big-endian. */
struct fw_cfg_file {
	u32 size;
	u16 item, reserved;
	char name[56];
};

enum fw_cfg_command {
	FW_CFG_ERROR = 1 << 0,
	FW_CFG_READ = 1 << 1,
	FW_CFG_SKIP = 1 << 2,
	FW_CFG_SELECT = 1 << 3,
};

void fw_cfg_select(u16 item);
u8 fw_cfg_byte(void);
/* Goes on in the selected item. */
void fw_cfg_read(void *to, size_t size);
void fw_cfg_item(u16 item, void *to, size_t size);
/* Gives the control field back, as the device has left it: 0 when it is done. */
u32 fw_cfg_dma(u32 control, void *to, u32 size);
/* The item of a file, or 0; *size gets its size. */
u16 fw_cfg_file(const char *name, u32 *size);

#endif
