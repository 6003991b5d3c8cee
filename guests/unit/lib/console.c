/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The console: COM1 without interrupts, and enough of printf for numbers and texts. */
#include <stdarg.h>

#include "console.h"

enum uart {
	COM1 = 0x3f8,
	DIVISOR_LOW = COM1,
	DIVISOR_HIGH = COM1 + 1,
	INTERRUPT_ENABLE = COM1 + 1,
	LINE_CONTROL = COM1 + 3,
	LINE_STATUS = COM1 + 5,
	DIVISOR_ACCESS = 0x80,
	EIGHT_BITS = 3,
	TRANSMITTER_EMPTY = 0x20,
};

void init_console(void)
{
	outb(0, INTERRUPT_ENABLE);
	outb(DIVISOR_ACCESS, LINE_CONTROL);
	outb(1, DIVISOR_LOW);
	outb(0, DIVISOR_HIGH);
	outb(EIGHT_BITS, LINE_CONTROL);
}

static void put(char c)
{
	while (!(inb(LINE_STATUS) & TRANSMITTER_EMPTY))
		pause();
	outb(c, COM1);
}

static void put_text(const char *text)
{
	while (*text)
		put(*text++);
}

static void put_number(u64 value, unsigned int base, int width, char fill)
{
	char digits[24];
	int n = 0;

	do
		digits[n++] = "0123456789abcdef"[value % base];
	while (value /= base);
	while (width-- > n)
		put(fill);
	while (n)
		put(digits[--n]);
}

static void put_signed(long value)
{
	if (value < 0)
		put('-');
	put_number(value < 0 ? -(u64)value : (u64)value, 10, 0, ' ');
}

/* Understands %c %s %d %u %x with a width, "0" and "l" or "ll". */
void print_list(const char *format, va_list list)
{
	for (; *format; format++) {
		if (*format != '%') {
			put(*format);
			continue;
		}
		char fill = *++format == '0' ? *format++ : ' ';
		int width = 0;
		bool is_long = false;

		for (; *format >= '0' && *format <= '9'; format++)
			width = width * 10 + *format - '0';
		for (; *format == 'l'; format++)
			is_long = true;
		switch (*format) {
		case 'c':
			put(va_arg(list, int));
			break;
		case 's':
			put_text(va_arg(list, const char *));
			break;
		case 'd':
			put_signed(is_long ? va_arg(list, long) : va_arg(list, int));
			break;
		case 'u':
		case 'x':
			put_number(is_long ? va_arg(list, u64) : va_arg(list, u32), *format == 'x' ? 16 : 10,
				   width, fill);
			break;
		default:
			put(*format);
		}
	}
}

void print(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	print_list(format, list);
	va_end(list);
}
