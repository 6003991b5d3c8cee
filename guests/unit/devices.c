/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Devices for tests and for debugging: QEMU's PC test device, and (on request, because not every machine has it) the
 * debug console at port E9H.
 */
#include "lib.h"

enum { TEST_PORT = 0xe0, FLUSH_PORT = 0xe4, CONSOLE_PORT = 0xe9, POST_PORT = 0x80, NO_PORT = 0x5678 };
#define TEST_MEMORY 0xff000000ull
#define TEST_MEMORY_SIZE 0x10000

static void test_ports(void)
{
	outl(0x12345678, TEST_PORT);
	check(inl(TEST_PORT) == 0x12345678, "port E0H keeps 32 bits");
	outw(0xabcd, TEST_PORT);
	check(inw(TEST_PORT) == 0xabcd, "and 16");
	outb(0x5a, TEST_PORT);
	check(inb(TEST_PORT) == 0x5a, "and 8");
	u32 buffer[2] = {0x11223344, 0x55667788};
	u32 *from = buffer;
	u64 count = 2;
	asm volatile("rep outsl" : "+S"(from), "+c"(count) : "d"(TEST_PORT) : "memory");
	check(inl(TEST_PORT) == 0x55667788 && from == buffer + 2 && !count, "REP OUTS");
	u32 *to = buffer;
	count = 2;
	asm volatile("rep insl" : "+D"(to), "+c"(count) : "d"(TEST_PORT) : "memory");
	check(buffer[0] == 0x55667788 && buffer[1] == 0x55667788 && to == buffer + 2, "REP INS");
	outl(physical_of(buffer), FLUSH_PORT);
	check(buffer[0] == 0x55667788, "the flush port leaves memory as it is");
	outb(0x42, POST_PORT);
	check(inl(NO_PORT) == 0xffffffff, "a port that nobody has reads as ones");
}

static void test_memory(void)
{
	volatile u8 *memory = direct(TEST_MEMORY);

	*(volatile u64 *)memory = 0x1122334455667788;
	check(*(volatile u64 *)memory == 0x1122334455667788, "8 bytes of MMIO");
	check(*(volatile u32 *)(memory + 4) == 0x11223344, "4 of them");
	check(*(volatile u16 *)(memory + 2) == 0x5566, "2 of them");
	check(memory[7] == 0x11, "1 of them");
	memory[TEST_MEMORY_SIZE - 1] = 0x99;
	check(memory[TEST_MEMORY_SIZE - 1] == 0x99, "the last byte");
	asm volatile("lock addl $1, (%0)" ::"r"(memory) : "memory", "cc");
	check(*(volatile u32 *)memory == 0x55667789, "a locked read-modify-write of MMIO");
	u8 copy[8] = {0};
	memcpy(copy, (const void *)memory, sizeof(copy));
	check(copy[0] == 0x89 && copy[7] == 0x11, "REP MOVSB from MMIO");
	*(volatile u32 *)(memory + 13) = 0xa5a5a5a5;
	check(*(volatile u32 *)(memory + 13) == 0xa5a5a5a5, "an access that is not aligned");
	u64 seen;
	asm volatile("push (%1)\n\tpop %0" : "=r"(seen) : "r"(memory) : "memory");
	check((u32)seen == 0x55667789, "PUSH of an MMIO operand");
}

USER_CODE(user_in, "in $0x80, %al");
USER_CODE(user_out_dx, "mov $0xe0, %edx; out %eax, %dx");
USER_CODE(user_cli, "cli");
static void test_permissions(void)
{
	RUN_USER(user_in);
	check_fault(VECTOR_GP, 0, "IN at CPL 3 with IOPL 0 and the port's bit set");
	RUN_USER(user_in, .flags = FLAG_IOPL);
	check_user_ended("IN at CPL 3 with IOPL 3");
	RUN_USER(user_cli);
	check_fault(VECTOR_GP, 0, "CLI at CPL 3 with IOPL 0");
	tss.io_permission[POST_PORT / 8] = 0xfe;
	RUN_USER(user_in);
	check_user_ended("IN at CPL 3 of a port that the TSS permits");
	tss.io_permission[TEST_PORT / 8] = 0xf8;
	RUN_USER(user_out_dx);
	check_fault(VECTOR_GP, 0, "OUT of 4 bytes where the TSS permits 3");
	tss.io_permission[TEST_PORT / 8] = 0xf0;
	RUN_USER(user_out_dx);
	check_user_ended("OUT of 4 bytes where it permits 4");
	tss.io_permission[TEST_PORT / 8] = tss.io_permission[POST_PORT / 8] = 0xff;
}

static void console(void)
{
	check(inb(CONSOLE_PORT) == CONSOLE_PORT, "port E9H reads as E9H");
	for (const char *text = "written to port E9H\n"; *text; text++)
		outb(*text, CONSOLE_PORT);
}

const struct subject subjects[] = {
	{.name = "ports", .run = test_ports},
	{.name = "mmio", .run = test_memory},
	{.name = "permissions", .run = test_permissions},
	{.name = "console", .run = console, .on_request = true},
	{},
};
