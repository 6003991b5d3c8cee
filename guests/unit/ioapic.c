/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The IOAPIC: registers, routing, edge and level with remote IRR. The PC test device moves the lines.
 * Source: 82093AA datasheet; SDM volume 3, "EOI".
 */
#include "apic.h"

/* A pin that no device uses, and another. */
#define PIN 14
#define OTHER_PIN 10
#define LOW 0x54
#define HIGH 0x66
#define ID_BITS 0x0f000000
#define DESTINATION_SHIFT 24
#define NOBODY 5
#define DELIVER_NMI (4 << 8)

static volatile int count;
static bool remote_irr, level_in_apic;
static int times_left_high;

static void registers(void)
{
	u32 version = ioapic_read(IOAPIC_VERSION);
	u32 entry = IOAPIC_TABLE + 2 * PIN;

	check((version & 0xff) == 0x11 || (version & 0xff) == 0x20, "version %x", version & 0xff);
	check((version >> 16 & 0xff) == IOAPIC_PINS - 1, "%d pins", IOAPIC_PINS);
	ioapic_write(IOAPIC_VERSION, 0);
	check(ioapic_read(IOAPIC_VERSION) == version, "the version is read-only");
	ioapic_write(IOAPIC_ID, 0xffffffff);
	check(ioapic_read(IOAPIC_ID) == ID_BITS, "the ID has four bits");
	ioapic_write(IOAPIC_ID, 0);
	ioapic_write(entry, ROUTE_MASKED | ROUTE_PENDING | ROUTE_REMOTE_IRR | ROUTE_LEVEL | LOW);
	check(ioapic_read(entry) == (ROUTE_MASKED | ROUTE_LEVEL | LOW), "delivery status and remote IRR are read-only");
	ioapic_write(entry + 1, NOBODY << DESTINATION_SHIFT);
	check(ioapic_read(entry + 1) == NOBODY << DESTINATION_SHIFT, "a destination");
	check(ioapic_read(entry) == (ROUTE_MASKED | ROUTE_LEVEL | LOW), "which does not touch the lower half");
}

/* How many interrupts come while the line takes these levels. */
static int edges_of(const char *line_levels)
{
	interrupts[LOW] = 0;
	for (; *line_levels; line_levels++) {
		set_line(PIN, *line_levels == '1');
		let_interrupts_in();
	}
	return interrupts[LOW];
}

static void edges(void)
{
	count_interrupts(LOW);
	set_route(PIN, LOW);
	set_line(PIN, 0);
	check(edges_of("1") == 1, "a rising edge is an interrupt");
	check(!(route_of(PIN) & ROUTE_REMOTE_IRR), "an edge has no remote IRR");
	check(edges_of("0") == 0, "a falling edge is none");
	check(edges_of("1010") == 2, "each rising edge is one");
	interrupts[LOW] = 0;
	set_line(PIN, 1);
	set_line(PIN, 0);
	set_line(PIN, 1);
	set_line(PIN, 0);
	let_interrupts_in();
	let_interrupts_in();
	check(interrupts[LOW] == 1, "two edges while IF=0 are one interrupt");
	set_route(PIN, ROUTE_MASKED | LOW);
	check(edges_of("10") == 0, "a masked pin is silent");
	set_route(PIN, LOW);
	edges_of("0");
	check(edges_of("11") == 1, "a line that stays high is one edge");
	edges_of("0");
}

/* Leaves the line high some times, as a device does that is not served yet. */
static void serve(struct trap *regs)
{
	count++;
	remote_irr = route_of(PIN) & ROUTE_REMOTE_IRR;
	level_in_apic = apic_bit(APIC_TMR, regs->vector);
	if (!times_left_high--)
		set_line(PIN, 0);
	eoi();
}

static void levels(void)
{
	set_handler(LOW, serve);
	count = times_left_high = 0;
	set_route(PIN, ROUTE_LEVEL | LOW);
	set_line(PIN, 1);
	let_interrupts_in();
	check(count == 1, "a high level is an interrupt");
	check(remote_irr, "remote IRR is set until EOI");
	check(level_in_apic, "TMR of the local APIC says level");
	check(!(route_of(PIN) & ROUTE_REMOTE_IRR), "EOI clears remote IRR");
	let_interrupts_in();
	check(count == 1, "a low level is none");
	count = 0;
	times_left_high = 2;
	set_line(PIN, 1);
	for (int i = 0; i < 6; i++)
		let_interrupts_in();
	check(count == 3, "a level that stays high comes again after each EOI");
	count = times_left_high = 0;
	set_line(PIN, 1);
	set_line(PIN, 0);
	set_line(PIN, 1);
	let_interrupts_in();
	let_interrupts_in();
	check(count == 1, "a level that went high twice before it was served comes once");
	count = times_left_high = 0;
	set_route(PIN, ROUTE_MASKED | ROUTE_LEVEL | LOW);
	set_line(PIN, 1);
	let_interrupts_in();
	check(!count, "a masked level is silent");
	set_route(PIN, ROUTE_LEVEL | LOW);
	let_interrupts_in();
	check(count == 1, "until it is unmasked");
	set_line(PIN, 0);
	set_route(PIN, ROUTE_MASKED | ROUTE_LEVEL | LOW);
}

static void two_pins(void)
{
	count_interrupts(LOW);
	count_interrupts(HIGH);
	set_route(PIN, LOW);
	set_route(OTHER_PIN, HIGH);
	set_line(PIN, 1);
	set_line(OTHER_PIN, 1);
	let_interrupts_in();
	let_interrupts_in();
	check(interrupts[LOW] == 1 && interrupts[HIGH] == 1, "two pins, two vectors");
	set_line(PIN, 0);
	set_line(OTHER_PIN, 0);
	set_route(OTHER_PIN, LOW);
	set_line(PIN, 1);
	set_line(OTHER_PIN, 1);
	let_interrupts_in();
	let_interrupts_in();
	check(interrupts[LOW] == 2, "two edges with one vector before it is served are one interrupt");
	set_line(PIN, 0);
	set_line(OTHER_PIN, 0);
	set_route(OTHER_PIN, ROUTE_MASKED);
}

static void pulse(void)
{
	set_line(PIN, 1);
	set_line(PIN, 0);
	let_interrupts_in();
}

static void destinations(void)
{
	u32 upper = IOAPIC_TABLE + 2 * PIN + 1;

	count_interrupts(LOW);
	set_route(PIN, LOW);
	ioapic_write(upper, NOBODY << DESTINATION_SHIFT);
	pulse();
	check(!interrupts[LOW], "a destination that is not there");
	ioapic_write(upper, 0xffu << DESTINATION_SHIFT);
	pulse();
	check(interrupts[LOW] == 1, "a broadcast");
	apic_write(APIC_DFR, 0xffffffff);
	apic_write(APIC_LDR, 4 << DESTINATION_SHIFT);
	set_route(PIN, ROUTE_LOGICAL | LOW);
	ioapic_write(upper, 6 << DESTINATION_SHIFT);
	pulse();
	check(interrupts[LOW] == 2, "a logical destination");
	ioapic_write(upper, 3 << DESTINATION_SHIFT);
	pulse();
	check(interrupts[LOW] == 2, "a logical destination of others");
	set_route(PIN, ROUTE_MASKED);
}

static void count_nmi(struct trap *regs)
{
	(void)regs;
	count++;
}

static void delivery_modes(void)
{
	count = 0;
	set_handler(VECTOR_NMI, count_nmi);
	set_route(PIN, DELIVER_NMI);
	set_line(PIN, 1);
	for (int i = 0; i < 1000; i++)
		pause();
	set_line(PIN, 0);
	check(count == 1, "a pin can raise an NMI, with IF=0");
	set_route(PIN, ROUTE_MASKED);
	set_handler(VECTOR_NMI, NULL);
}

static void run(void)
{
	enable_apic();
	registers();
	for (int pin = 0; pin < IOAPIC_PINS; pin++)
		set_route(pin, ROUTE_MASKED);
	edges();
	levels();
	two_pins();
	destinations();
	delivery_modes();
}

const struct subject subjects[] = {{.name = "ioapic", .run = run}, {}};
