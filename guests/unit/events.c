/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Events that are delivered well: what is saved, what changes, and what holds them off. Source: SDM volume 3,
 * chapter "Interrupt and Exception Handling".
 */
#include "apic.h"

#define VECTOR 0x50
#define UD2_SIZE 2
#define UNMAPPED (USER_BASE + 0x50000000)
#define NON_CANONICAL 0x0000800000000000ull
#define BEHIND_GDT 0x100

static struct trap seen;
static volatile int count;
extern const char at_fault[], behind_trap[], behind_sti[], behind_nop[];

static void note(struct trap *regs)
{
	seen = *regs;
	count++;
}

static void note_interrupt(struct trap *regs)
{
	note(regs);
	eoi();
}

static void software_interrupts(void)
{
	TRY("int $0x50\n.globl behind_trap\nbehind_trap:", ::: "memory");
	check(last_fault.vector == VECTOR && last_fault.regs.rip == (u64)behind_trap, "INT n saves the next RIP");
	check(last_fault.regs.cs == KERNEL_CS && last_fault.regs.ss == KERNEL_DS, "and CS and SS");
	check(!(last_fault.regs.rflags & FLAG_RF), "RF is clear in what it saves");
	TRY("int3\n.globl behind_nop\nbehind_nop:", ::: "memory");
	check(last_fault.vector == VECTOR_BP && last_fault.regs.rip == (u64)behind_nop, "INT3 saves the next RIP");
	TRY("int $3", ::: "memory");
	check(last_fault.vector == VECTOR_BP, "INT 3 in two bytes");
	TRY("int $14", ::: "memory");
	check(last_fault.vector == VECTOR_PF, "INT 14 has the vector of a page fault, and no error code");
}

static void faults(void)
{
	TRY(".globl at_fault\nat_fault: ud2", ::: "memory");
	check(last_fault.vector == VECTOR_UD && last_fault.regs.rip == (u64)at_fault, "#UD saves its own RIP");
	check(last_fault.regs.rflags & FLAG_RF, "RF is set in what a fault saves");
	TRY("xor %%edx, %%edx\n\txor %%ecx, %%ecx\n\tdiv %%ecx", ::: "rax", "rdx", "rcx", "cc");
	check_fault(VECTOR_DE, 0, "DIV by zero");
	TRY("mov $2, %%edx\n\tmov $1, %%ecx\n\tdiv %%ecx", ::: "rax", "rdx", "rcx", "cc");
	check_fault(VECTOR_DE, 0, "DIV overflows");
	TRY("mov $0x80000000, %%eax\n\tcltd\n\tmov $-1, %%ecx\n\tidiv %%ecx", ::: "rax", "rdx", "rcx", "cc");
	check_fault(VECTOR_DE, 0, "IDIV of the least number by -1");
	TRY("mov (%0), %%eax", ::"r"(NON_CANONICAL) : "rax", "memory");
	check_fault(VECTOR_GP, 0, "a non-canonical address");
	TRY("mov %0, %%rsp\n\tpush %%rax", ::"r"(NON_CANONICAL + 64) : "memory");
	check_fault(VECTOR_SS, 0, "a non-canonical stack");
	TRY("call *%0", ::"r"(NON_CANONICAL) : "memory");
	check_fault(VECTOR_GP, 0, "a call to a non-canonical address");
	write_cr0(read_cr0() | CR0_TS);
	TRY("fnop", ::: "memory");
	write_cr0(read_cr0() & ~CR0_TS);
	check_fault(VECTOR_NM, 0, "x87 with CR0.TS");
}

/* INTO and BOUND are no instructions in 64-bit mode; compatibility mode has them. */
#define TRY_32(text, ...)                                                                               \
	TRY("push %[cs32]\n\tpush $1f\n\tlretq\n\t.code32\n1:\t" text "\n\tint $0x20\n\t.code64",               \
	    ::[cs32] "i"(KERNEL_CS32), ##__VA_ARGS__                                                    \
	    : "rax", "rcx", "rdx", "memory", "cc")

static void legacy_instructions(void)
{
	static const int bounds[2] = {-5, 5};

	TRY(".byte 0xce", ::: "memory");
	check_fault(VECTOR_UD, 0, "INTO in 64-bit mode is #UD");
	TRY_32("mov $0x7fffffff, %%eax\n\tadd $1, %%eax\n\tinto");
	check_fault(VECTOR_OF, 0, "INTO in compatibility mode with OF");
	TRY_32("xor %%eax, %%eax\n\tinto");
	check(last_fault.vector == USER_EXIT_VECTOR, "INTO in compatibility mode without OF");
	TRY_32("mov $6, %%eax\n\tbound %%eax, (%%esi)", "S"(bounds));
	check_fault(VECTOR_BR, 0, "BOUND: above");
	TRY_32("mov $-6, %%eax\n\tbound %%eax, (%%esi)", "S"(bounds));
	check_fault(VECTOR_BR, 0, "BOUND: below");
	TRY_32("mov $5, %%eax\n\tbound %%eax, (%%esi)", "S"(bounds));
	check(last_fault.vector == USER_EXIT_VECTOR, "BOUND: within");
	check(last_fault.regs.cs == KERNEL_CS32, "an interrupt saves the selector of compatibility mode");
	TRY_32("ud2");
	check_fault(VECTOR_UD, 0, "#UD from compatibility mode");
}

static void *frame;
static void note_frame(struct trap *regs)
{
	note(regs);
	frame = &regs->ss + 1;
}

static u64 flags_inside;
static void note_flags(struct trap *regs)
{
	note(regs);
	flags_inside = read_flags();
}

static void gates_and_stacks(void)
{
	set_handler(VECTOR, note_frame);
	for (int off = 0; off < 16; off += 5) {
		asm volatile("mov %%rsp, %%rbx\n\tsub %0, %%rsp\n\tint $0x50\n\tmov %%rbx, %%rsp" ::"r"((u64)off + 64)
			     : "rbx", "memory");
		if ((u64)frame & 15)
			break;
	}
	check(!((u64)frame & 15), "the stack is aligned to 16 bytes before the frame is pushed");
	idt[VECTOR].ist = EXCEPTION_IST;
	asm volatile("int $0x50" ::: "memory");
	idt[VECTOR].ist = 0;
	check((u64)frame == tss.ist[EXCEPTION_IST - 1], "a gate with IST uses that stack");
	set_handler(VECTOR, NULL);

	u64 inside = 0;
	idt[VECTOR].type = GATE_PRESENT | GATE_TRAP;
	for (int i = 0; i < 2; i++) {
		set_handler(VECTOR, note_flags);
		sti();
		asm volatile("int $0x50" ::: "memory");
		cli();
		inside = inside << 1 | !!(flags_inside & FLAG_IF);
		idt[VECTOR].type = GATE_PRESENT | GATE_INTERRUPT;
	}
	check(inside == 2, "a trap gate keeps IF, an interrupt gate clears it");
	check(seen.rflags & FLAG_IF, "and both save it");
	set_handler(VECTOR, NULL);
}

USER_CODE(user_nothing, "nop");
static void stack_of_a_user(void)
{
	RUN_USER(user_nothing);
	check_user_ended("user mode comes back");
	check(last_fault.regs.rsp == USER_STACK_TOP && last_fault.regs.ss == USER_DS, "with its own stack saved");
	check(last_fault.regs.cs == USER_CS && (last_fault.regs.cs & 3) == 3, "and CPL 3 in CS");
}

static void handle_ud(struct trap *regs)
{
	note(regs);
	TRY("mov (%0), %%eax", ::"r"(UNMAPPED) : "rax", "memory");
	check_page_fault(0, UNMAPPED, "a page fault in the handler of #UD");
	regs->rip += UD2_SIZE;
}

static void nesting(void)
{
	count = 0;
	idt[VECTOR_UD].ist = 0;
	idt[VECTOR_PF].ist = 0;
	set_handler(VECTOR_UD, handle_ud);
	asm volatile("ud2" ::: "memory");
	check(count == 1, "both handlers return");
	set_handler(VECTOR_UD, NULL);
	idt[VECTOR_UD].ist = idt[VECTOR_PF].ist = EXCEPTION_IST;
}

static void interrupt_shadows(void)
{
	set_handler(VECTOR, note_interrupt);
	count = 0;
	self_ipi(VECTOR);
	asm volatile("nop; nop" ::: "memory");
	check(!count, "IF=0 holds an interrupt off");
	asm volatile("sti\n.globl behind_sti\n\tnop\nbehind_sti: nop\n\tcli" ::: "memory");
	check(count == 1 && seen.rip == (u64)behind_sti, "STI holds it off for one more instruction");
	self_ipi(VECTOR);
	asm volatile("sti; cli; nop" ::: "memory");
	check(count == 1, "STI with CLI behind it lets nothing in");
	asm volatile("sti; sti; cli; nop; cli" ::: "memory");
	check(count == 2, "a second STI does not hold it off any longer");
	self_ipi(VECTOR);
	asm volatile("pushfq\n\torl %0, (%%rsp)\n\tpopfq\n\tcli" ::"i"(FLAG_IF) : "memory", "cc");
	check(count == 3, "POPF does not hold it off");
	self_ipi(VECTOR);
	asm volatile("sti; hlt; cli" ::: "memory");
	check(count == 4, "it wakes HLT behind STI");
	set_handler(VECTOR, NULL);
}

static volatile int seen_inside;

static void nmi_to_self(void) { apic_send(apic_read(APIC_ID) >> 24, ICR_NMI | ICR_ASSERT); }

static void wait_a_little(void)
{
	for (int i = 0; i < 1000; i++)
		pause();
}

static void nmi_sends_another(struct trap *regs)
{
	note(regs);
	if (count > 1)
		return;
	nmi_to_self();
	wait_a_little();
	seen_inside = count;
}

static void do_nothing(struct trap *regs) { (void)regs; }

static void nmi_with_iret_inside(struct trap *regs)
{
	note(regs);
	if (count > 1)
		return;
	nmi_to_self();
	asm volatile("int $0x50" ::: "memory");
	wait_a_little();
	seen_inside = count;
}

static void nmis(void)
{
	count = 0;
	set_handler(VECTOR_NMI, nmi_sends_another);
	nmi_to_self();
	wait_a_little();
	check(count >= 1, "an NMI comes with IF=0");
	check(seen_inside == 1, "an NMI in the handler is held off");
	check(count == 2, "until IRET");
	count = 0;
	/* The second one must not get the stack of the first. */
	idt[VECTOR_NMI].ist = 0;
	set_handler(VECTOR, do_nothing);
	set_handler(VECTOR_NMI, nmi_with_iret_inside);
	nmi_to_self();
	wait_a_little();
	check(seen_inside == 2, "any IRET in the handler lets the next NMI in");
	idt[VECTOR_NMI].ist = NMI_IST;
	set_handler(VECTOR_NMI, NULL);
	set_handler(VECTOR, NULL);
}

struct iret_frame {
	u64 rip, cs, rflags, rsp, ss;
};

static void iret(struct iret_frame *frame)
{
	TRY("mov %0, %%rsp\n\tiretq", ::"r"(frame) : "memory", "cc");
}

/* IRET with one thing wrong. The good frame comes to an INT 20h. */
static void irets(void)
{
	static const u8 int_20[] = {0xcd, 0x20};
	static u64 stack[512];
	struct iret_frame good = {(u64)int_20, KERNEL_CS, FLAG_FIXED, (u64)(stack + ARRAY_SIZE(stack)), KERNEL_DS}, frame;

	iret(&good);
	check(last_fault.vector == USER_EXIT_VECTOR && last_fault.regs.rsp == good.rsp,
	      "IRET loads RSP without a change of CPL");
	frame = good;
	frame.rip = NON_CANONICAL;
	iret(&frame);
	check_fault(VECTOR_GP, 0, "IRET to a non-canonical address");
	frame = good;
	frame.cs = 0;
	iret(&frame);
	check_fault(VECTOR_GP, 0, "IRET to a null CS");
	frame = good;
	frame.cs = KERNEL_DS;
	iret(&frame);
	check_fault(VECTOR_GP, KERNEL_DS, "IRET to a data segment");
	frame = good;
	frame.cs = KERNEL_CS | 3;
	iret(&frame);
	check_fault(VECTOR_GP, KERNEL_CS, "IRET to CPL 3 with a code segment of DPL 0");
	frame = good;
	frame.cs = BEHIND_GDT;
	iret(&frame);
	check_fault(VECTOR_GP, BEHIND_GDT, "IRET to a selector behind the GDT");
	frame = good;
	frame.cs = USER_CS;
	frame.ss = 3;
	iret(&frame);
	check_fault(VECTOR_GP, 0, "IRET to CPL 3 with a null SS");
	frame.ss = KERNEL_DS;
	iret(&frame);
	check_fault(VECTOR_GP, KERNEL_DS, "IRET to CPL 3 with SS of the kernel");
	frame = good;
	frame.ss = 0;
	iret(&frame);
	check(last_fault.vector == USER_EXIT_VECTOR && !last_fault.regs.ss, "IRET to CPL 0 may have a null SS");
	asm volatile("pushfq\n\torl %0, (%%rsp)\n\tpopfq" ::"i"(FLAG_NT) : "memory", "cc");
	iret(&good);
	asm volatile("pushfq\n\tandl %0, (%%rsp)\n\tpopfq" ::"i"(~FLAG_NT) : "memory", "cc");
	check_fault(VECTOR_GP, 0, "IRET with NT in 64-bit mode");
}

static void run(void)
{
	enable_apic();
	software_interrupts();
	faults();
	legacy_instructions();
	gates_and_stacks();
	stack_of_a_user();
	nesting();
	irets();
}

static void held_off(void)
{
	enable_apic();
	interrupt_shadows();
	nmis();
}

const struct subject subjects[] = {
	{.name = "delivery", .run = run},
	{.name = "blocking", .run = held_off},
	{},
};
