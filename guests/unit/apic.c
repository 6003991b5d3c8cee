/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The local APIC: registers, priorities, IPIs, errors, timer, both modes. Source: SDM volume 3, chapter "APIC". */
#include "apic.h"

#define LOW 0x50
#define HIGH 0x61
#define BEHIND_HIGH 0x62
#define ERROR_VECTOR 0x70
#define TIMER_VECTOR 0x80
/* Below 16; not one with an error code, should it come. */
#define ILLEGAL 5
#define NOBODY 5
#define ID_SHIFT 24
#define LONG_TIME 0xffffffff
#define SHORT_TIME 100000
/* In TSC cycles. */
#define MOMENT 50000ull
#define HAS_APIC FEATURE(1, 0, EDX, 9)

static u8 order[8];
static int taken;

static void note_order(struct trap *regs)
{
	if (taken < (int)ARRAY_SIZE(order))
		order[taken++] = regs->vector;
	eoi();
}

static void identification(void)
{
	u32 version = apic_read(APIC_VERSION);
	u32 id = apic_read(APIC_ID);

	check(rdmsr(MSR_APIC_BASE) == (APIC_DEFAULT_BASE | APIC_BASE_BSP | APIC_BASE_ENABLE |
				       (in_x2apic_mode() ? APIC_BASE_X2APIC : 0)),
	      "IA32_APIC_BASE: at FEE00000H, enabled, the boot processor");
	check((in_x2apic_mode() ? id : id >> ID_SHIFT) == cpuid(1, 0).output[EBX] >> ID_SHIFT, "the ID is CPUID's");
	check((version & 0xff) >= 0x10 && (version & 0xff) < 0x20, "version %x is of an integrated APIC",
	      version & 0xff);
	check((version >> 16 & 0xff) >= 3, "it has 4 LVT entries at least");
	check(cpu_has(HAS_APIC), "CPUID says that there is an APIC");
}

static void requests_and_service(void)
{
	count_interrupts(LOW);
	self_ipi(LOW);
	check(apic_bit(APIC_IRR, LOW) && !apic_bit(APIC_ISR, LOW), "a self IPI is requested while IF=0");
	let_interrupts_in();
	check(interrupts[LOW] == 1, "and comes when IF=1");
	check(!apic_bit(APIC_IRR, LOW) && !apic_bit(APIC_ISR, LOW), "EOI ends it");
	check(!apic_bit(APIC_TMR, LOW), "it was edge-triggered");
	self_ipi(LOW);
	self_ipi(LOW);
	let_interrupts_in();
	let_interrupts_in();
	check(interrupts[LOW] == 2, "two requests of a vector are one interrupt");
}

static u32 ppr_inside;
static bool served_inside;
static void nest(struct trap *regs)
{
	ppr_inside = apic_read(APIC_PPR);
	served_inside = apic_bit(APIC_ISR, regs->vector);
	self_ipi(BEHIND_HIGH);
	self_ipi(LOW);
	let_interrupts_in();
	note_order(regs);
}

static void nest_higher(struct trap *regs)
{
	self_ipi(HIGH);
	let_interrupts_in();
	note_order(regs);
}

static void priorities(void)
{
	set_handler(LOW, note_order);
	set_handler(HIGH, note_order);
	set_handler(BEHIND_HIGH, note_order);
	taken = 0;
	self_ipi(LOW);
	self_ipi(HIGH);
	let_interrupts_in();
	let_interrupts_in();
	check(taken == 2 && order[0] == HIGH && order[1] == LOW, "the higher vector comes first");
	taken = 0;
	set_handler(HIGH, nest);
	self_ipi(HIGH);
	let_interrupts_in();
	let_interrupts_in();
	check(served_inside, "ISR has the vector that is in service");
	check((ppr_inside & 0xf0) == (HIGH & 0xf0), "PPR has its class");
	check(taken == 3 && order[0] == HIGH && order[1] == BEHIND_HIGH && order[2] == LOW,
	      "none of its own class or below comes before EOI");
	taken = 0;
	set_handler(LOW, nest_higher);
	set_handler(HIGH, note_order);
	self_ipi(LOW);
	let_interrupts_in();
	check(taken == 2 && order[0] == HIGH && order[1] == LOW, "one of a higher class does");
}

static void task_priority(void)
{
	count_interrupts(LOW);
	apic_write(APIC_TPR, LOW & 0xf0);
	check(apic_read(APIC_PPR) == (LOW & 0xf0), "PPR follows TPR when nothing is in service");
	check(read_cr8() == LOW >> 4, "CR8 is the upper half of TPR");
	self_ipi(LOW);
	let_interrupts_in();
	check(!interrupts[LOW] && apic_bit(APIC_IRR, LOW), "TPR holds off its class");
	apic_write(APIC_TPR, (LOW & 0xf0) - 1);
	let_interrupts_in();
	check(interrupts[LOW] == 1, "but not the next class");
	write_cr8(0xf);
	check(apic_read(APIC_TPR) == 0xf0, "a write of CR8 sets TPR");
	self_ipi(LOW);
	let_interrupts_in();
	check(interrupts[LOW] == 1, "CR8 holds off all");
	write_cr8(0);
	let_interrupts_in();
	check(interrupts[LOW] == 2, "CR8 = 0 lets it in");
	TRY("mov %0, %%cr8", ::"r"(16ull) : "memory");
	check_fault(VECTOR_GP, 0, "CR8 has four bits");
	apic_write(APIC_TPR, 0);
}

static bool arrives(u32 destination, u32 command)
{
	int before = interrupts[LOW];

	apic_send(destination, command | LOW | ICR_ASSERT);
	let_interrupts_in();
	return interrupts[LOW] == before + 1;
}

static void destinations(void)
{
	bool x2 = in_x2apic_mode();
	u32 self = x2 ? apic_read(APIC_ID) : apic_read(APIC_ID) >> ID_SHIFT;

	count_interrupts(LOW);
	check(arrives(self, ICR_FIXED), "an IPI to our ID");
	check(!arrives(NOBODY, ICR_FIXED), "not one to another ID");
	check(arrives(x2 ? 0xffffffff : 0xff, ICR_FIXED), "a broadcast");
	check(arrives(0, ICR_ALL), "the shorthand for all");
	check(!arrives(0, ICR_OTHERS), "not the one for all others");
	if (x2) {
		u32 logical = apic_read(APIC_LDR);

		check(logical == ((self >> 4) << 16 | 1 << (self & 15)), "LDR is made from the ID");
		check(arrives(logical, ICR_LOGICAL), "a logical destination");
		check(!arrives(logical << 1, ICR_LOGICAL), "not one to the next in the cluster");
		return;
	}
	apic_write(APIC_DFR, 0xffffffff);
	apic_write(APIC_LDR, 2 << ID_SHIFT);
	check(apic_read(APIC_LDR) == 2 << ID_SHIFT, "LDR keeps its upper byte");
	check(arrives(3, ICR_LOGICAL), "a flat logical destination with our bit");
	check(!arrives(5, ICR_LOGICAL), "not one without");
	apic_write(APIC_DFR, 0x0fffffff);
	apic_write(APIC_LDR, 0x32 << ID_SHIFT);
	check(arrives(0x33, ICR_LOGICAL), "a cluster with our bit");
	check(!arrives(0x22, ICR_LOGICAL), "not another cluster");
	apic_write(APIC_DFR, 0xffffffff);
	apic_write(APIC_LDR, 1 << ID_SHIFT);
}

static void errors(void)
{
	count_interrupts(ERROR_VECTOR);
	apic_write(APIC_LVT_ERROR, ERROR_VECTOR);
	apic_write(APIC_ESR, 0);
	apic_write(APIC_ESR, 0);
	check(!apic_read(APIC_ESR), "no error yet");
	count_interrupts(ILLEGAL);
	self_ipi(ILLEGAL);
	let_interrupts_in();
	check(!interrupts[ILLEGAL], "an IPI with vector %d does not arrive", ILLEGAL);
	set_handler(ILLEGAL, NULL);
	check(interrupts[ERROR_VECTOR] == 1, "it raises the error interrupt");
	check(!apic_read(APIC_ESR), "ESR shows it only after a write");
	apic_write(APIC_ESR, 0);
	check(apic_read(APIC_ESR) & (ESR_SEND_ILLEGAL | ESR_RECEIVE_ILLEGAL), "then it says: illegal vector");
	apic_write(APIC_ESR, 0);
	check(!apic_read(APIC_ESR), "a second write clears it");
	apic_write(APIC_LVT_ERROR, LVT_MASKED);
}

static void software_disable(void)
{
	apic_write(APIC_LVT_ERROR, ERROR_VECTOR);
	apic_write(APIC_SVR, SPURIOUS_VECTOR);
	check(apic_read(APIC_LVT_ERROR) == (LVT_MASKED | ERROR_VECTOR), "software disable masks the LVT");
	apic_write(APIC_LVT_ERROR, ERROR_VECTOR);
	check(apic_read(APIC_LVT_ERROR) & LVT_MASKED, "and keeps it masked");
	count_interrupts(LOW);
	self_ipi(LOW);
	let_interrupts_in();
	check(!interrupts[LOW], "no interrupt comes");
	enable_apic();
	check(apic_read(APIC_LVT_ERROR) & LVT_MASKED, "enabling it does not unmask");
	let_interrupts_in();
	apic_write(APIC_LVT_ERROR, LVT_MASKED);
}

static void wait_cycles(u64 cycles)
{
	for (u64 start = rdtsc(); rdtsc() - start < cycles;)
		pause();
}

static u32 ticks_in_a_moment(u32 divide)
{
	apic_write(APIC_TIMER_DIVIDE, divide);
	apic_write(APIC_TIMER_INITIAL, LONG_TIME);
	wait_cycles(10 * MOMENT);
	return LONG_TIME - apic_read(APIC_TIMER_CURRENT);
}

static void timer(void)
{
	count_interrupts(TIMER_VECTOR);
	apic_write(APIC_LVT_TIMER, LVT_MASKED | TIMER_VECTOR);
	u32 slow = ticks_in_a_moment(DIVIDE_BY_16), fast = ticks_in_a_moment(DIVIDE_BY_1);
	check(slow && slow < fast / 4, "it counts down, and by 16 more slowly than by 1");
	apic_write(APIC_TIMER_INITIAL, 0);
	check(!apic_read(APIC_TIMER_CURRENT), "an initial count of 0 stops it");
	apic_write(APIC_LVT_TIMER, TIMER_ONE_SHOT | TIMER_VECTOR);
	apic_write(APIC_TIMER_INITIAL, SHORT_TIME);
	check(wait_for(&interrupts[TIMER_VECTOR], 1), "one shot: an interrupt");
	check(!apic_read(APIC_TIMER_CURRENT), "then the count is 0");
	wait_cycles(MOMENT);
	let_interrupts_in();
	check(interrupts[TIMER_VECTOR] == 1, "and no more come");
	apic_write(APIC_LVT_TIMER, TIMER_ONE_SHOT | LVT_MASKED | TIMER_VECTOR);
	apic_write(APIC_TIMER_INITIAL, SHORT_TIME);
	for (u64 start = rdtsc(); apic_read(APIC_TIMER_CURRENT) && rdtsc() - start < 1000 * MOMENT;)
		pause();
	let_interrupts_in();
	check(!apic_read(APIC_TIMER_CURRENT) && interrupts[TIMER_VECTOR] == 1, "masked, it runs and is silent");
	apic_write(APIC_LVT_TIMER, TIMER_PERIODIC | TIMER_VECTOR);
	apic_write(APIC_TIMER_INITIAL, 3 * SHORT_TIME);
	check(wait_for(&interrupts[TIMER_VECTOR], 5), "periodic: interrupts go on coming");
	apic_write(APIC_TIMER_INITIAL, 0);
	let_interrupts_in();
	interrupts[TIMER_VECTOR] = 0;
	wait_cycles(10 * MOMENT);
	let_interrupts_in();
	check(!interrupts[TIMER_VECTOR], "until the initial count is 0");
	apic_write(APIC_LVT_TIMER, LVT_MASKED);
}

static void tsc_deadline(void)
{
	if (!require(HAS_TSC_DEADLINE, "TSC deadline")) {
		TRY("rdmsr", ::"c"(MSR_TSC_DEADLINE) : "rax", "rdx");
		check_fault(VECTOR_GP, 0, "then there is no IA32_TSC_DEADLINE");
		return;
	}
	count_interrupts(TIMER_VECTOR);
	wrmsr(MSR_TSC_DEADLINE, rdtsc() + MOMENT);
	check(!rdmsr(MSR_TSC_DEADLINE), "IA32_TSC_DEADLINE stays 0 in other modes");
	apic_write(APIC_LVT_TIMER, TIMER_TSC_DEADLINE | TIMER_VECTOR);
	asm volatile("mfence");
	u64 deadline = rdtsc() + 20 * MOMENT;
	wrmsr(MSR_TSC_DEADLINE, deadline);
	check(rdmsr(MSR_TSC_DEADLINE) == deadline, "a deadline can be read back");
	check(!apic_read(APIC_TIMER_CURRENT), "the current count is 0 in this mode");
	apic_write(APIC_TIMER_INITIAL, SHORT_TIME);
	check(!apic_read(APIC_TIMER_CURRENT), "and the initial count is not written");
	let_interrupts_in();
	check(!interrupts[TIMER_VECTOR] || rdtsc() >= deadline, "it does not come early");
	check(wait_for(&interrupts[TIMER_VECTOR], 1) && rdtsc() >= deadline, "it comes at the deadline");
	check(!rdmsr(MSR_TSC_DEADLINE), "then there is none");
	wrmsr(MSR_TSC_DEADLINE, 1);
	check(wait_for(&interrupts[TIMER_VECTOR], 2), "a deadline in the past is over at once");
	wrmsr(MSR_TSC_DEADLINE, rdtsc() + 10 * MOMENT);
	wrmsr(MSR_TSC_DEADLINE, 0);
	wait_cycles(20 * MOMENT);
	let_interrupts_in();
	check(interrupts[TIMER_VECTOR] == 2, "0 disarms it");
	wrmsr(MSR_TSC_DEADLINE, rdtsc() + 100000 * MOMENT);
	apic_write(APIC_LVT_TIMER, TIMER_ONE_SHOT | LVT_MASKED | TIMER_VECTOR);
	check(!rdmsr(MSR_TSC_DEADLINE), "a change of mode disarms it");
}

static void all_registers(void)
{
	identification();
	requests_and_service();
	priorities();
	task_priority();
	destinations();
	errors();
	software_disable();
	timer();
	tsc_deadline();
}

static void xapic(void)
{
	enable_apic();
	all_registers();
}

static bool base_faults(u64 flags)
{
	u64 value = APIC_DEFAULT_BASE | APIC_BASE_BSP | flags;

	TRY("wrmsr", ::"c"(MSR_APIC_BASE), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
	return last_fault.vector == VECTOR_GP && !last_fault.regs.error;
}

static void x2apic_faults(void)
{
	/* Offset, value, and whether a read or a write of it raises #GP. */
	static const struct {
		u16 offset;
		u64 value;
		bool read, write;
		const char *name;
	} rows[] = {
		{APIC_ID, 0, false, true, "ID"},
		{APIC_VERSION, 0, false, true, "version"},
		{APIC_TPR, 0x100, false, true, "TPR, nine bits"},
		{APIC_PPR, 0, false, true, "PPR"},
		{APIC_EOI, 0, true, false, "EOI"},
		{APIC_EOI, 1, true, true, "EOI with 1"},
		{APIC_LDR, 1, false, true, "LDR"},
		{APIC_DFR, 0, true, true, "DFR"},
		{APIC_SVR, BIT(13), false, true, "SVR, reserved bit"},
		{APIC_ISR, 0, false, true, "ISR"},
		{APIC_ESR, 1, false, true, "ESR with 1"},
		{APIC_ICR_HIGH, 0, true, true, "the upper half of ICR"},
		{APIC_TIMER_CURRENT, 0, false, true, "current count"},
		{APIC_SELF_IPI, 0x100, true, true, "SELF IPI, nine bits"},
		{0, 0, true, true, "offset 0"},
		{APIC_LVT_TIMER, BIT(32) | LVT_MASKED, false, true, "LVT, upper half"},
	};

	for (unsigned int i = 0; i < ARRAY_SIZE(rows); i++) {
		u32 msr = MSR_X2APIC_FIRST + rows[i].offset / 16;

		TRY("rdmsr", ::"c"(msr) : "rax", "rdx", "memory");
		bool read = last_fault.vector == VECTOR_GP;
		TRY("wrmsr", ::"c"(msr), "a"((u32)rows[i].value), "d"((u32)(rows[i].value >> 32)) : "memory");
		bool write = last_fault.vector == VECTOR_GP;
		check(read == rows[i].read && write == rows[i].write, "x2APIC %s: %s, %s", rows[i].name,
		      rows[i].read ? "no read" : "read", rows[i].write ? "no write" : "write");
	}
}

static void x2apic(void)
{
	TRY("rdmsr", ::"c"(MSR_X2APIC_FIRST + APIC_ID / 16) : "rax", "rdx");
	check_fault(VECTOR_GP, 0, "no x2APIC registers in xAPIC mode");
	if (!require(HAS_X2APIC, "x2APIC")) {
		check(base_faults(APIC_BASE_ENABLE | APIC_BASE_X2APIC), "then there is no such mode");
		return;
	}
	check(base_faults(APIC_BASE_X2APIC), "x2APIC without enable is #GP");
	check(base_faults(APIC_BASE_ENABLE | BIT(9)), "a reserved bit is #GP");
	check(base_faults(APIC_BASE_ENABLE | BIT(60)), "an address that is too wide is #GP");
	set_apic_base(APIC_BASE_ENABLE | APIC_BASE_X2APIC);
	check(in_x2apic_mode(), "x2APIC mode");
	check(base_faults(APIC_BASE_ENABLE), "no way back to xAPIC mode");
	enable_apic();
	all_registers();
	x2apic_faults();
	enable_apic();
	count_interrupts(LOW);
	apic_write(APIC_SELF_IPI, LOW);
	let_interrupts_in();
	check(interrupts[LOW] == 1, "the SELF IPI register");
	set_apic_base(0);
	check(!cpu_has(HAS_APIC), "a disabled APIC is not in CPUID");
	check(base_faults(APIC_BASE_ENABLE | APIC_BASE_X2APIC), "disabled to x2APIC is #GP");
	set_apic_base(APIC_BASE_ENABLE);
	check(cpu_has(HAS_APIC) && !in_x2apic_mode(), "disabled to xAPIC");
	enable_apic();
	check(arrives(apic_read(APIC_ID) >> ID_SHIFT, ICR_FIXED), "which works");
}

const struct subject subjects[] = {{.name = "xapic", .run = xapic}, {.name = "x2apic", .run = x2apic}, {}};
