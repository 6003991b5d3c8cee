/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Resets the machine in the way that the command line names, and finds its memory as it was afterwards:
 * `triple`, `cf9`, `port92` or `keyboard`; `shutdown` writes to the ports that end a virtual machine.
 */
#include "lib.h"

/* Below the image, where no loader puts anything. */
#define COUNTER_ADDRESS 0x200000
#define MAGIC 0x7265736574210000ull

struct counter {
	u64 magic, boots;
};

enum {
	RESET_CONTROL = 0xcf9,
	RESET_CONTROL_SYSTEM = 2,
	RESET_CONTROL_CPU = 4,
	PORT_92 = 0x92,
	FAST_RESET = 1,
	KEYBOARD_COMMAND = 0x64,
	KEYBOARD_FULL = 2,
	PULSE_RESET = 0xfe,
	SHUTDOWN_PORT = 0x8900,
};

static volatile struct counter *const counter = (void *)COUNTER_ADDRESS;

/* True on the first boot. On the second one memory is judged. */
static bool is_first_boot(void)
{
	if (counter->magic != MAGIC) {
		counter->magic = MAGIC;
		counter->boots = 1;
		print("resetting\n");
		return true;
	}
	counter->boots++;
	check(counter->boots == 2, "the machine has been reset, and memory is as it was");
	counter->magic = 0;
	return false;
}

static void __attribute__((noreturn)) wait_for_the_end(const char *what)
{
	for (int i = 0; i < 1000000; i++)
		pause();
	counter->magic = 0;
	check(false, "%s", what);
	summary_and_leave();
}

static void triple_fault(void)
{
	struct table_register empty = {0};

	if (!is_first_boot())
		return;
	asm volatile("lidt %0\n\tud2" ::"m"(empty));
}

static void reset_control(void)
{
	if (!is_first_boot())
		return;
	outb(RESET_CONTROL_SYSTEM, RESET_CONTROL);
	outb(RESET_CONTROL_SYSTEM | RESET_CONTROL_CPU, RESET_CONTROL);
	wait_for_the_end("port CF9H resets the machine");
}

static void port_92(void)
{
	if (!is_first_boot())
		return;
	outb(inb(PORT_92) | FAST_RESET, PORT_92);
	wait_for_the_end("port 92H resets the machine");
}

static void keyboard(void)
{
	if (!is_first_boot())
		return;
	for (int i = 0; i < 1000 && inb(KEYBOARD_COMMAND) & KEYBOARD_FULL; i++)
		pause();
	outb(PULSE_RESET, KEYBOARD_COMMAND);
	wait_for_the_end("the keyboard controller resets the machine");
}

static void shutdown(void)
{
	for (const char *text = "Shutdown"; *text; text++)
		outb(*text, SHUTDOWN_PORT);
	wait_for_the_end("port 8900H ends the machine");
}

static void nothing(void) { skip("name a way to reset: triple, cf9, port92, keyboard, shutdown"); }

const struct subject subjects[] = {
	{.name = "none", .run = nothing},
	{.name = "triple", .run = triple_fault, .on_request = true},
	{.name = "cf9", .run = reset_control, .on_request = true},
	{.name = "port92", .run = port_92, .on_request = true},
	{.name = "keyboard", .run = keyboard, .on_request = true},
	{.name = "shutdown", .run = shutdown, .on_request = true},
	{},
};
