/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The part of the console that only the library uses. */
#ifndef LIB_CONSOLE_H
#define LIB_CONSOLE_H

#include <stdarg.h>

#include "lib.h"

void init_console(void);
void print_list(const char *format, va_list list);
/* check() with arguments in a list, and without the end of the line if it fails. */
bool check_list(bool holds, const char *format, va_list list);

#endif
