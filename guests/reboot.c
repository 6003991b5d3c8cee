// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Restarts the machine once, and says the second time that it is the second time.
 *
 * What tells the two apart is a byte of the CMOS memory, which a reset leaves alone. The first time it is 0, and the
 * program asks the kernel to restart the machine; the second time the program ends with status 42.
 */

#include <stdio.h>
#include <sys/io.h>
#include <sys/reboot.h>
#include <unistd.h>

enum { CMOS_INDEX = 0x70, CMOS_DATA = 0x71, SPARE_BYTE = 0x6f, SECOND_TIME = 42 };

int main(void)
{
	if (ioperm(CMOS_INDEX, 2, 1)) {
		perror("ioperm");
		return 1;
	}
	outb(SPARE_BYTE, CMOS_INDEX);
	if (inb(CMOS_DATA) == SECOND_TIME) {
		puts("restarted");
		return SECOND_TIME;
	}
	outb(SPARE_BYTE, CMOS_INDEX);
	outb(SECOND_TIME, CMOS_DATA);
	puts("restarting");
	fflush(stdout);
	sync();
	reboot(RB_AUTOBOOT);
	perror("reboot");
	return 1;
}
