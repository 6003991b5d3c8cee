/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Interrupt controllers: local APIC in both modes, IOAPIC, PIC. Source: SDM volume 3, "APIC"; 82093AA; 8259A. */
#ifndef LIB_APIC_H
#define LIB_APIC_H

#include "lib.h"

#define APIC_DEFAULT_BASE 0xfee00000ull
#define APIC_BASE_BSP BIT(8)
#define APIC_BASE_X2APIC BIT(10)
#define APIC_BASE_ENABLE BIT(11)

/* Offsets in the xAPIC's page; the x2APIC's MSR is 0x800 + offset / 16. */
enum apic_register {
	APIC_ID = 0x20,
	APIC_VERSION = 0x30,
	APIC_TPR = 0x80,
	APIC_PPR = 0xa0,
	APIC_EOI = 0xb0,
	APIC_LDR = 0xd0,
	APIC_DFR = 0xe0,
	APIC_SVR = 0xf0,
	APIC_ISR = 0x100,
	APIC_TMR = 0x180,
	APIC_IRR = 0x200,
	APIC_ESR = 0x280,
	APIC_ICR = 0x300,
	APIC_ICR_HIGH = 0x310,
	APIC_LVT_TIMER = 0x320,
	APIC_LVT_LINT0 = 0x350,
	APIC_LVT_LINT1 = 0x360,
	APIC_LVT_ERROR = 0x370,
	APIC_TIMER_INITIAL = 0x380,
	APIC_TIMER_CURRENT = 0x390,
	APIC_TIMER_DIVIDE = 0x3e0,
	APIC_SELF_IPI = 0x3f0, /* x2APIC only */
};

enum {
	SPURIOUS_VECTOR = 0xff,
	SVR_ENABLE = 1 << 8,
	LVT_MASKED = 1 << 16,
	TIMER_ONE_SHOT = 0 << 17,
	TIMER_PERIODIC = 1 << 17,
	TIMER_TSC_DEADLINE = 2 << 17,
	DIVIDE_BY_1 = 0xb,
	DIVIDE_BY_2 = 0x0,
	DIVIDE_BY_16 = 0x3,
	ICR_FIXED = 0 << 8,
	ICR_NMI = 4 << 8,
	ICR_LOGICAL = 1 << 11,
	ICR_BUSY = 1 << 12,
	ICR_ASSERT = 1 << 14,
	ICR_SELF = 1 << 18,
	ICR_ALL = 2 << 18,
	ICR_OTHERS = 3 << 18,
	ESR_SEND_ILLEGAL = 1 << 5,
	ESR_RECEIVE_ILLEGAL = 1 << 6,
};

/* In the mode that IA32_APIC_BASE says. */
u32 apic_read(enum apic_register offset);
void apic_write(enum apic_register offset, u32 value);
void apic_send(u32 destination, u32 command);
bool in_x2apic_mode(void);
/* One bit of the 256 of ISR, TMR or IRR. */
bool apic_bit(enum apic_register first, u8 vector);

void enable_apic(void);
void set_apic_base(u64 flags);
void self_ipi(u8 vector);
static inline void eoi(void) { apic_write(APIC_EOI, 0); }

/* The interrupts of a vector since count_interrupts(vector); its handler sends an EOI. */
void count_interrupts(u8 vector);
extern volatile int interrupts[VECTORS];
/* Lets interrupts in until `*count` has reached `wanted`; false after a while. */
bool wait_for(volatile int *count, int wanted);

enum { IOAPIC_ID = 0, IOAPIC_VERSION = 1, IOAPIC_ARBITRATION = 2, IOAPIC_TABLE = 0x10, IOAPIC_PINS = 24 };
enum {
	ROUTE_LOGICAL = 1 << 11,
	ROUTE_PENDING = 1 << 12,
	ROUTE_ACTIVE_LOW = 1 << 13,
	ROUTE_REMOTE_IRR = 1 << 14,
	ROUTE_LEVEL = 1 << 15,
	ROUTE_MASKED = 1 << 16,
};
u32 ioapic_read(u8 index);
void ioapic_write(u8 index, u32 value);
/* An interrupt for processor 0. */
void set_route(int pin, u32 low);
static inline u32 route_of(int pin) { return ioapic_read(IOAPIC_TABLE + 2 * pin); }

enum pic { PIC1 = 0x20, PIC1_DATA = 0x21, PIC2 = 0xa0, PIC2_DATA = 0xa1, PIC_EOI = 0x20 };
void mask_pic(void);
/* Vectors from `base` on, everything masked. */
void init_pic(u8 base);

/* The PC test device: the lines of the interrupt controllers. */
static inline void set_line(int gsi, u8 level) { outb(level, 0x2000 + gsi); }

#endif
