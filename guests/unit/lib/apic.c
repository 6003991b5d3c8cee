/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Interrupt controllers, and handlers that count. */
#include "apic.h"

enum { ID_SHIFT = 24, PENDING_TRIES = 1000, SELECT = 0, WINDOW = 0x10 };
#define IOAPIC_BASE 0xfec00000ull
/* How long wait_for() waits, in TSC cycles: a quarter of a second at 2 GHz. */
#define PATIENCE 500000000ull

volatile int interrupts[VECTORS];

bool in_x2apic_mode(void) { return rdmsr(MSR_APIC_BASE) & APIC_BASE_X2APIC; }
static u32 msr_of(enum apic_register offset) { return MSR_X2APIC_FIRST + offset / 16; }

u32 apic_read(enum apic_register offset)
{
	if (in_x2apic_mode())
		return rdmsr(msr_of(offset));
	return *(volatile u32 *)direct(APIC_DEFAULT_BASE + offset);
}

void apic_write(enum apic_register offset, u32 value)
{
	if (in_x2apic_mode())
		wrmsr(msr_of(offset), value);
	else
		*(volatile u32 *)direct(APIC_DEFAULT_BASE + offset) = value;
}

void apic_send(u32 destination, u32 command)
{
	if (in_x2apic_mode()) {
		wrmsr(msr_of(APIC_ICR), (u64)destination << 32 | command);
		return;
	}
	apic_write(APIC_ICR_HIGH, destination << ID_SHIFT);
	apic_write(APIC_ICR, command);
	for (int i = 0; i < PENDING_TRIES && apic_read(APIC_ICR) & ICR_BUSY; i++)
		pause();
}

bool apic_bit(enum apic_register first, u8 vector)
{
	return apic_read(first + vector / 32 * 16) >> vector % 32 & 1;
}

void set_apic_base(u64 flags)
{
	wrmsr(MSR_APIC_BASE, APIC_DEFAULT_BASE | (rdmsr(MSR_APIC_BASE) & APIC_BASE_BSP) | flags);
}

static void ignore(struct trap *regs) { (void)regs; }

void enable_apic(void)
{
	set_handler(SPURIOUS_VECTOR, ignore);
	apic_write(APIC_LVT_LINT0, LVT_MASKED);
	apic_write(APIC_LVT_TIMER, LVT_MASKED);
	apic_write(APIC_SVR, SVR_ENABLE | SPURIOUS_VECTOR);
	apic_write(APIC_TPR, 0);
}

void self_ipi(u8 vector) { apic_send(0, ICR_SELF | ICR_ASSERT | vector); }

static void count(struct trap *regs)
{
	interrupts[regs->vector]++;
	eoi();
}

void count_interrupts(u8 vector)
{
	interrupts[vector] = 0;
	set_handler(vector, count);
}

bool wait_for(volatile int *count, int wanted)
{
	u64 start = rdtsc();

	do {
		let_interrupts_in();
		if (*count >= wanted)
			return true;
	} while (rdtsc() - start < PATIENCE);
	return false;
}

u32 ioapic_read(u8 index)
{
	volatile u32 *ioapic = direct(IOAPIC_BASE);

	ioapic[SELECT / sizeof(u32)] = index;
	return ioapic[WINDOW / sizeof(u32)];
}

void ioapic_write(u8 index, u32 value)
{
	volatile u32 *ioapic = direct(IOAPIC_BASE);

	ioapic[SELECT / sizeof(u32)] = index;
	ioapic[WINDOW / sizeof(u32)] = value;
}

void set_route(int pin, u32 low)
{
	ioapic_write(IOAPIC_TABLE + 2 * pin + 1, 0);
	ioapic_write(IOAPIC_TABLE + 2 * pin, low);
}

void mask_pic(void)
{
	outb(0xff, PIC1_DATA);
	outb(0xff, PIC2_DATA);
}

void init_pic(u8 base)
{
	enum { ICW1 = 0x11, ICW3_MASTER = 4, ICW3_SLAVE = 2, ICW4 = 1 };

	outb(ICW1, PIC1);
	outb(ICW1, PIC2);
	outb(base, PIC1_DATA);
	outb(base + 8, PIC2_DATA);
	outb(ICW3_MASTER, PIC1_DATA);
	outb(ICW3_SLAVE, PIC2_DATA);
	outb(ICW4, PIC1_DATA);
	outb(ICW4, PIC2_DATA);
	mask_pic();
}
