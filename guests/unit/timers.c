/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The devices of the old PC that keep time and ask for attention: 8254 PIT, 8259 PICs, MC146818 RTC with its CMOS.
 * Sources: their data sheets; the PIC reaches the processor by LINT0 as ExtINT.
 */
#include "apic.h"

enum pit {
	PIT_CHANNEL0 = 0x40,
	PIT_CHANNEL2 = 0x42,
	PIT_COMMAND = 0x43,
	SPEAKER = 0x61,
	SPEAKER_GATE = 1 << 0,
	SPEAKER_DATA = 1 << 1,
	SPEAKER_OUT2 = 1 << 5,
	PIT_BOTH_BYTES = 3 << 4,
	PIT_MODE0 = 0 << 1,
	PIT_MODE2 = 2 << 1,
	PIT_READ_BACK = 3 << 6,
	PIT_NO_COUNT = 1 << 5,
	PIT_STATUS_MODE = 0x3f,
};
#define PIT_SELECT(channel) ((channel) << 6)
#define PIT_READ_BACK_CHANNEL(channel) (2 << (channel))

enum rtc {
	RTC_INDEX = 0x70,
	RTC_DATA = 0x71,
	RTC_SECONDS = 0,
	RTC_MINUTES = 2,
	RTC_HOURS = 4,
	RTC_MONTH = 8,
	RTC_A = 10,
	RTC_B = 11,
	RTC_C = 12,
	RTC_D = 13,
	RTC_UPDATING = 1 << 7,
	RTC_24_HOURS = 1 << 1,
	RTC_BINARY = 1 << 2,
	RTC_PERIODIC = 1 << 6,
	RTC_INTERRUPTED = 1 << 7,
	RTC_VALID = 1 << 7,
	RTC_1024_HZ = 0x26,
	/* Memory behind the clock's registers: 640 KiB below 1 MiB; what is above. */
	CMOS_BASE_MEMORY = 0x15,
	CMOS_MEMORY_ABOVE_16M = 0x34,
	CMOS_FREE = 0x50,
};

/* Edge or level, one bit for each line; firmware may have left some at level. */
enum elcr { ELCR1 = 0x4d0, ELCR2 = 0x4d1 };
enum { PIC_BASE = 0x90, LINE = 10, SECOND_LINE = 5, RTC_IRQ = 8, CASCADE = 2 };
enum { LVT_EXTINT = 7 << 8, OCW3_ISR = 0x0b, OCW3_IRR = 0x0a };
#define PATIENCE 1000000000ull
#define SEVERAL_PERIODS 3000000ull

static int order[4], taken;

static void pic_eoi(int irq)
{
	if (irq >= 8)
		outb(PIC_EOI, PIC2);
	outb(PIC_EOI, PIC1);
}

static u8 isr_inside;
static void note(struct trap *regs)
{
	int irq = regs->vector - PIC_BASE;

	outb(OCW3_ISR, irq >= 8 ? PIC2 : PIC1);
	isr_inside = inb(irq >= 8 ? PIC2 : PIC1);
	if (taken < (int)ARRAY_SIZE(order))
		order[taken++] = irq;
	interrupts[regs->vector]++;
	/* A device that is served at the second time. */
	if (taken == 2)
		set_line(irq, 0);
	pic_eoi(irq);
}

static void unmask(u16 irqs)
{
	irqs |= 1 << CASCADE;
	outb(~irqs, PIC1_DATA);
	outb(~irqs >> 8, PIC2_DATA);
}

static void begin(void)
{
	enable_apic();
	init_pic(PIC_BASE);
	outb(0, ELCR1);
	outb(0, ELCR2);
	apic_write(APIC_LVT_LINT0, LVT_EXTINT);
	for (int irq = 0; irq < 16; irq++)
		set_handler(PIC_BASE + irq, note);
	for (int pin = 0; pin < IOAPIC_PINS; pin++)
		set_route(pin, ROUTE_MASKED);
}

static void pic(void)
{
	begin();
	outb(0xa5, PIC1_DATA);
	check(inb(PIC1_DATA) == 0xa5, "the mask register can be read");
	mask_pic();
	taken = 0;
	set_line(LINE, 1);
	let_interrupts_in();
	check(!taken, "a masked line is silent");
	outb(OCW3_IRR, PIC2);
	check(inb(PIC2) & 1 << (LINE - 8), "and in IRR");
	unmask(1 << LINE);
	let_interrupts_in();
	check(taken == 1 && order[0] == LINE, "unmasked, it comes through the cascade");
	check(isr_inside == 1 << (LINE - 8), "in ISR while it is served");
	let_interrupts_in();
	check(taken == 1, "and once: lines are edge-triggered");
	set_line(LINE, 0);
	unmask(1 << LINE | 1 << SECOND_LINE);
	taken = 0;
	set_line(SECOND_LINE, 1);
	set_line(LINE, 1);
	let_interrupts_in();
	let_interrupts_in();
	check(taken == 2 && order[0] == LINE && order[1] == SECOND_LINE, "IRQ 8 to 15 come before IRQ 3 to 7");
	set_line(SECOND_LINE, 0);
	set_line(LINE, 0);
	outb(1 << (LINE - 8), ELCR2);
	check(inb(ELCR2) == 1 << (LINE - 8), "ELCR makes it a level");
	taken = 0;
	set_line(LINE, 1);
	let_interrupts_in();
	let_interrupts_in();
	set_line(LINE, 0);
	check(taken == 2, "which comes again after each EOI");
	outb(0, ELCR2);
	apic_write(APIC_LVT_LINT0, LVT_EXTINT | LVT_MASKED);
	taken = 0;
	set_line(LINE, 1);
	let_interrupts_in();
	check(!taken, "nothing comes while LINT0 is masked");
	set_line(LINE, 0);
	mask_pic();
}

static void write_count(int channel, int mode, u16 count)
{
	outb(PIT_SELECT(channel) | PIT_BOTH_BYTES | mode, PIT_COMMAND);
	outb(count, PIT_CHANNEL0 + channel);
	outb(count >> 8, PIT_CHANNEL0 + channel);
}

static u16 read_count(int channel)
{
	outb(PIT_SELECT(channel), PIT_COMMAND);
	u8 low = inb(PIT_CHANNEL0 + channel);

	return low | inb(PIT_CHANNEL0 + channel) << 8;
}

static bool out2(void) { return inb(SPEAKER) & SPEAKER_OUT2; }

static void pit(void)
{
	begin();
	outb(inb(SPEAKER) & ~(SPEAKER_GATE | SPEAKER_DATA), SPEAKER);
	write_count(2, PIT_MODE0, 2000);
	outb(inb(SPEAKER) | SPEAKER_GATE, SPEAKER);
	check(!out2(), "mode 0: OUT is low while it counts");
	u16 first = read_count(2), second = first;
	for (int i = 0; i < 1000 && second == first; i++)
		second = read_count(2);
	check(second < first && first <= 2000, "it counts down");
	u64 start = rdtsc();
	while (!out2() && rdtsc() - start < PATIENCE)
		pause();
	check(out2(), "OUT is high at the end");
	write_count(0, PIT_MODE2, 600);
	outb(PIT_READ_BACK | PIT_NO_COUNT | PIT_READ_BACK_CHANNEL(0), PIT_COMMAND);
	check((inb(PIT_CHANNEL0) & PIT_STATUS_MODE) == (PIT_BOTH_BYTES | PIT_MODE2), "read-back tells the mode");
	unmask(1 << 0);
	interrupts[PIC_BASE] = 0;
	check(wait_for(&interrupts[PIC_BASE], 5), "mode 2: IRQ 0 comes again and again");
	write_count(0, PIT_MODE0, 1000);
	let_interrupts_in();
	interrupts[PIC_BASE] = 0;
	check(wait_for(&interrupts[PIC_BASE], 1), "mode 0: IRQ 0");
	start = rdtsc();
	while (rdtsc() - start < SEVERAL_PERIODS)
		let_interrupts_in();
	check(interrupts[PIC_BASE] == 1, "comes once");
	mask_pic();
}

static u8 cmos_read(u8 index)
{
	outb(index, RTC_INDEX);
	return inb(RTC_DATA);
}

static void cmos_write(u8 index, u8 value)
{
	outb(index, RTC_INDEX);
	outb(value, RTC_DATA);
}

static int from_bcd(u8 value) { return cmos_read(RTC_B) & RTC_BINARY ? value : (value >> 4) * 10 + (value & 15); }

static void rtc(void)
{
	u32 memory;

	begin();
	cmos_write(RTC_B, RTC_24_HOURS);
	check(cmos_read(RTC_D) & RTC_VALID, "register D: the memory is valid");
	check(from_bcd(cmos_read(RTC_SECONDS)) < 60 && from_bcd(cmos_read(RTC_MINUTES)) < 60 &&
		      from_bcd(cmos_read(RTC_HOURS)) < 24,
	      "a time of day");
	int month = from_bcd(cmos_read(RTC_MONTH));
	check(month >= 1 && month <= 12, "a month");
	cmos_read(RTC_C);
	cmos_write(RTC_A, RTC_1024_HZ);
	unmask(1 << RTC_IRQ);
	interrupts[PIC_BASE + RTC_IRQ] = 0;
	cmos_write(RTC_B, RTC_24_HOURS | RTC_PERIODIC);
	check(wait_for(&interrupts[PIC_BASE + RTC_IRQ], 1), "a periodic interrupt");
	check((cmos_read(RTC_C) & (RTC_INTERRUPTED | RTC_PERIODIC)) == (RTC_INTERRUPTED | RTC_PERIODIC),
	      "register C says which");
	check(wait_for(&interrupts[PIC_BASE + RTC_IRQ], 2), "when it has been read, the next one comes");
	cmos_write(RTC_B, RTC_24_HOURS);
	cmos_read(RTC_C);
	mask_pic();
	u8 kept = cmos_read(CMOS_FREE), other = kept + 0x55;
	cmos_write(CMOS_FREE, other);
	check(cmos_read(CMOS_FREE) == other, "CMOS memory keeps a byte");
	cmos_write(CMOS_FREE, kept);
	memory = cmos_read(CMOS_BASE_MEMORY) | cmos_read(CMOS_BASE_MEMORY + 1) << 8;
	check(memory == 640, "CMOS says %u KiB below 1 MiB", memory);
	memory = cmos_read(CMOS_MEMORY_ABOVE_16M) | cmos_read(CMOS_MEMORY_ABOVE_16M + 1) << 8;
	check(memory, "CMOS says %u MiB above 16 MiB", memory / 16);
}

const struct subject subjects[] = {
	{.name = "pic", .run = pic}, {.name = "pit", .run = pit}, {.name = "rtc", .run = rtc}, {},
};
