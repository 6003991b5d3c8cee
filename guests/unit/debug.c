/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Debug exceptions: breakpoints on instructions, data and ports, single steps, INT1, general detect, and what they
 * leave in DR6. Source: SDM volume 3, chapter "Debug".
 */
#include "lib.h"

#define DR6_B(n) BIT(n)
#define DR6_BD BIT(13)
#define DR6_BS BIT(14)
#define DR6_BITS (DR6_B(0) | DR6_B(1) | DR6_B(2) | DR6_B(3) | DR6_BD | DR6_BS)
#define DR6_FIXED 0xffff0ff0ull
#define DR7_FIXED BIT(10)
#define DR7_GD BIT(13)
#define DR7_ENABLE(n) BIT(2 * (n) + 1)
#define DR7_KIND(n, kind, length) ((u64)((length) << 2 | (kind)) << (16 + 4 * (n)))
enum breakpoint { ON_EXECUTION = 0, ON_WRITE = 1, ON_PORT = 2, ON_ACCESS = 3 };
enum length { BYTE = 0, WORD = 1, QUAD = 2, DOUBLE = 3 };
#define TEST_PORT 0x80
#define NON_CANONICAL 0x0000800000000000ull

static struct trap log[16];
static u64 dr6_log[16];
static int hits;

static void note(struct trap *regs)
{
	if (hits < (int)ARRAY_SIZE(log)) {
		dr6_log[hits] = read_dr6() & DR6_BITS;
		log[hits++] = *regs;
	}
	write_dr6(DR6_FIXED);
	if (read_dr7() & DR7_GD)
		write_dr7(DR7_FIXED);
	/* Over an instruction breakpoint, and no more steps behind ten. */
	regs->rflags |= FLAG_RF;
	if (hits > 10)
		regs->rflags &= ~(u64)FLAG_TF;
}

static void begin(u64 dr7)
{
	hits = 0;
	write_dr6(DR6_FIXED);
	write_dr7(DR7_FIXED | dr7);
}

static void end(void) { write_dr7(DR7_FIXED); }

static bool one_hit(const void *rip, u64 dr6)
{
	if (hits == 1 && log[0].rip == (u64)rip && dr6_log[0] == dr6)
		return true;
	print("      %d hits, the first at %lx (want %lx) with DR6 %lx (want %lx)\n", hits, log[0].rip, (u64)rip,
	      dr6_log[0], dr6);
	return false;
}

extern const char code_point[], int1_end[], write_end[], read_end[], out_end[], step_1[], step_2[], step_3[], gd_at[],
	movs_end[], behind_ss[], in_end[];

static void instruction_breakpoints(void)
{
	int executed = 0;

	write_dr0((u64)code_point);
	begin(DR7_ENABLE(0) | DR7_KIND(0, ON_EXECUTION, BYTE));
	asm volatile(".globl code_point\ncode_point: incl %0" : "+m"(executed)::"cc");
	end();
	check(one_hit(code_point, DR6_B(0)), "an instruction breakpoint is a fault, before the instruction");
	check(executed == 1, "RF lets it pass");
	check(!(log[0].rflags & FLAG_RF), "the saved RF is clear: of all faults, only here");
	begin(DR7_ENABLE(0) | DR7_KIND(0, ON_WRITE, BYTE));
	check(!hits, "it is of the kind that DR7 says");
	end();
}

static volatile u64 data[2] __attribute__((aligned(16)));

static void data_breakpoints(void)
{
	write_dr1((u64)data);
	begin(DR7_ENABLE(1) | DR7_KIND(1, ON_WRITE, DOUBLE));
	asm volatile("movl $1, (%0)\n.globl write_end\nwrite_end: nop" ::"r"(data) : "memory");
	check(one_hit(write_end, DR6_B(1)), "a write breakpoint is a trap, behind the instruction");
	begin(DR7_ENABLE(1) | DR7_KIND(1, ON_WRITE, DOUBLE));
	asm volatile("movl (%0), %%eax" ::"r"(data) : "memory", "rax");
	asm volatile("movl $1, 4(%0)" ::"r"(data) : "memory");
	check(!hits, "not by a read, not by a write behind it");
	begin(DR7_ENABLE(1) | DR7_KIND(1, ON_WRITE, DOUBLE));
	asm volatile("movb $1, 3(%0)" ::"r"(data) : "memory");
	asm volatile("movw $1, 3(%0)" ::"r"(data) : "memory");
	check(hits == 2, "by a write to its last byte, and by one across its end");
	begin(DR7_ENABLE(1) | DR7_KIND(1, ON_ACCESS, QUAD));
	asm volatile("movb 7(%0), %%al\n.globl read_end\nread_end: nop" ::"r"(data) : "memory", "rax");
	check(one_hit(read_end, DR6_B(1)), "a breakpoint on 8 bytes, by a read");
	begin(DR7_ENABLE(1) | DR7_KIND(1, ON_WRITE, BYTE));
	asm volatile("lea 8(%0), %%rsi\n\tmov %0, %%rdi\n\tmovsb\n.globl movs_end\nmovs_end: nop" ::"r"(data)
		     : "memory", "rsi", "rdi");
	check(one_hit(movs_end, DR6_B(1)), "by MOVS");
	begin(0);
	asm volatile("movl $1, (%0)" ::"r"(data) : "memory");
	check(!hits, "not when it is disabled");
	write_dr2((u64)data);
	begin(DR7_ENABLE(1) | DR7_KIND(1, ON_WRITE, BYTE) | DR7_ENABLE(2) | DR7_KIND(2, ON_ACCESS, BYTE));
	asm volatile("movb $1, (%0)" ::"r"(data) : "memory");
	check(hits == 1 && dr6_log[0] == (DR6_B(1) | DR6_B(2)), "two at once are one exception with both bits");
	end();
}

static void port_breakpoints(void)
{
	u64 dr7 = DR7_ENABLE(3) | DR7_KIND(3, ON_PORT, BYTE);

	write_dr3(TEST_PORT);
	write_cr4(read_cr4() | CR4_DE);
	begin(dr7);
	asm volatile("outb %%al, $0x80\n.globl out_end\nout_end: nop" ::"a"(0));
	check(one_hit(out_end, DR6_B(3)), "a port breakpoint, by OUT");
	begin(dr7);
	asm volatile("inb $0x80, %%al\n.globl in_end\nin_end: nop" ::: "rax");
	check(one_hit(in_end, DR6_B(3)), "by IN, behind the instruction");
	begin(dr7);
	inb(TEST_PORT + 1);
	check(!hits, "not by the next port");
	end();
	TRY("mov %%dr4, %%rax", ::: "rax");
	check_fault(VECTOR_UD, 0, "DR4 with CR4.DE");
	write_cr4(read_cr4() & ~CR4_DE);
	TRY("mov %%dr4, %%rax", ::: "rax");
	check_no_fault("DR4 is DR6 without CR4.DE");
}

#define SET_TF "pushfq\n\torl $0x100, (%%rsp)\n\tpopfq\n"
#define CLEAR_TF "pushfq\n\tandl $~0x100, (%%rsp)\n\tpopfq\n"

static void single_steps(void)
{
	begin(0);
	asm volatile(SET_TF "step_1: nop\n"
			    ".globl step_1, step_2, step_3\n"
			    "step_2: nop\n"
			    "step_3: " CLEAR_TF ::
			     : "cc", "memory");
	check(hits >= 2 && log[0].rip == (u64)step_2 && log[1].rip == (u64)step_3,
	      "TF: a trap behind each instruction, the first one behind that which follows POPF");
	check(dr6_log[0] == DR6_BS, "with DR6.BS");
	check(log[0].rflags & FLAG_TF, "TF is saved");
	begin(0);
	asm volatile("mov %%ss, %%eax\n\t" SET_TF "mov %%eax, %%ss\n"
		     "behind_ss_load: nop\n"
		     ".globl behind_ss\nbehind_ss: " CLEAR_TF ::
			     : "cc", "memory", "rax");
	check(hits && log[0].rip == (u64)behind_ss, "MOV SS holds the trap off for one instruction");
	begin(0);
	asm volatile("mov $3, %%ecx\n\tmov %0, %%rdi\n\txor %%eax, %%eax\n\t" SET_TF "rep stosb\n\t" CLEAR_TF ::"r"(data)
		     : "cc", "memory", "rcx", "rdi", "rax");
	check(hits >= 4 && log[0].rip == log[1].rip && log[1].rip != log[2].rip && log[0].rcx == 2,
	      "a step of REP STOS is one iteration");
	begin(0);
	asm volatile(SET_TF "int $0x20\n\t" CLEAR_TF ::: "cc", "memory");
	check(hits && !(log[0].rflags & FLAG_IF), "INT n clears TF for its handler");
}

static void others(void)
{
	begin(0);
	TRY(".byte 0xf1\n.globl int1_end\nint1_end:", ::: "memory");
	check(one_hit(int1_end, 0), "INT1 is a trap and sets nothing in DR6");
	begin(DR7_GD);
	asm volatile(".globl gd_at\ngd_at: mov %%dr0, %%rax" ::: "rax");
	check(one_hit(gd_at, DR6_BD), "DR7.GD: access to a debug register is a fault");
	check(!(read_dr7() & DR7_GD), "the handler finds GD clear");
	end();
	write_dr6(0);
	check(read_dr6() == DR6_FIXED || read_dr6() == (DR6_FIXED & ~BIT(11)), "fixed bits of DR6");
	write_dr6(DR6_FIXED);
	check(read_dr7() == DR7_FIXED, "DR7 after a reset");
	TRY("mov %0, %%dr6", ::"r"(BIT(32)));
	check_fault(VECTOR_GP, 0, "bit 32 of DR6");
	TRY("mov %0, %%dr7", ::"r"(BIT(32)));
	check_fault(VECTOR_GP, 0, "bit 32 of DR7");
	write_dr0(NON_CANONICAL);
	check(read_dr0() == NON_CANONICAL, "DR0 takes any address");
}

USER_CODE(user_dr, "mov %dr6, %rax");
USER_CODE(user_step, "pushfq; orl $0x100, (%rsp); popfq; nop; nop");
static void users(void)
{
	RUN_USER(user_dr);
	check_fault(VECTOR_GP, 0, "debug registers at CPL 3");
	set_handler(VECTOR_DB, NULL);
	write_dr6(DR6_FIXED);
	RUN_USER(user_step);
	check(last_fault.vector == VECTOR_DB && last_fault.dr6 & DR6_BS, "a single step at CPL 3");
	write_dr6(DR6_FIXED);
	RUN_USER(user_dr, .flags = FLAG_TF);
	check(last_fault.vector == VECTOR_GP, "a fault comes before the trap");
	set_handler(VECTOR_DB, note);
}

static void ignore(struct trap *regs) { (void)regs; }

static void run(void)
{
	set_handler(VECTOR_DB, note);
	set_handler(USER_EXIT_VECTOR, ignore);
	instruction_breakpoints();
	data_breakpoints();
	port_breakpoints();
	single_steps();
	others();
	set_handler(USER_EXIT_VECTOR, NULL);
	users();
}

const struct subject subjects[] = {{.name = "debug", .run = run}, {}};
