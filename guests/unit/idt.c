/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Faults while an interrupt or exception is delivered: which exception, and which error code. Source: SDM volume 3,
 * "Error Code", and volume 2, INT n.
 */
#include "lib.h"

#define TEST_VECTOR 0x50
/* Error codes: the vector in the IDT, and a selector in the GDT. */
#define IDT_ENTRY(vector) ((vector) << 3 | ERROR_IDT)
#define ABSENT_CODE SPARE_SELECTOR
#define CONFORMING_CODE (SPARE_SELECTOR + 8)
#define USER_CONFORMING_CODE (SPARE_SELECTOR + 16)
#define BEHIND_GDT 0x100

/* 64-bit code segments of several kinds. */
#define CODE64 0x00af9b000000ffffull
#define CODE64_CONFORMING 0x00af9f000000ffffull
#define SEGMENT_PRESENT BIT(47)
#define SEGMENT_USER (3ull << 45)
/* Far enough from both ends for a whole frame. */
#define NON_CANONICAL 0x0000800000001000ull

static struct gate kept;

static void restore(void) { idt[TEST_VECTOR] = kept; }
static void int_n(void) { TRY("int $0x50", ::: "memory"); }

USER_CODE(user_int_n, "int $0x50");
USER_CODE(user_int3, "int3");
USER_CODE(user_int_4, "int $4");
USER_CODE(user_ud2, "ud2");
USER_CODE(user_int1, ".byte 0xf1");

static void gates(void)
{
	int_n();
	check(last_fault.vector == TEST_VECTOR, "a good gate");
	idt[TEST_VECTOR].type &= ~GATE_PRESENT;
	int_n();
	check_fault(VECTOR_NP, IDT_ENTRY(TEST_VECTOR), "a gate that is not present");
	int bad_types = 0;
	for (int type = 0; type < 32; type++) {
		idt[TEST_VECTOR].type = GATE_PRESENT | type;
		int_n();
		bad_types += last_fault.vector == VECTOR_GP && last_fault.regs.error == IDT_ENTRY(TEST_VECTOR);
	}
	check(bad_types == 30, "of 32 gate types, two are good, and the others raise #GP");
	idt[TEST_VECTOR].type = 0;
	int_n();
	check_fault(VECTOR_GP, IDT_ENTRY(TEST_VECTOR), "the type comes before the present bit");
	restore();
}

static void gate_selector(u16 selector, int vector, u64 error, const char *what)
{
	idt[TEST_VECTOR].selector = selector;
	int_n();
	check_fault(vector, error, "a gate for %s", what);
	restore();
}

static void selectors(void)
{
	gdt[ABSENT_CODE / 8] = CODE64 & ~SEGMENT_PRESENT;
	gdt[CONFORMING_CODE / 8] = CODE64_CONFORMING;
	gdt[USER_CONFORMING_CODE / 8] = CODE64_CONFORMING | SEGMENT_USER;
	gate_selector(0, VECTOR_GP, 0, "the null selector");
	gate_selector(3, VECTOR_GP, 0, "the null selector with RPL 3");
	gate_selector(KERNEL_DS, VECTOR_GP, KERNEL_DS, "a data segment");
	gate_selector(KERNEL_CS32, VECTOR_GP, KERNEL_CS32, "a 32-bit code segment");
	gate_selector(TSS_SELECTOR, VECTOR_GP, TSS_SELECTOR, "a TSS");
	gate_selector(USER_CS, VECTOR_GP, USER_CS & ~3, "a code segment of DPL 3");
	gate_selector(USER_CONFORMING_CODE, VECTOR_GP, USER_CONFORMING_CODE, "a conforming segment of DPL 3");
	gate_selector(ABSENT_CODE, VECTOR_NP, ABSENT_CODE, "a code segment that is not present");
	gate_selector(BEHIND_GDT, VECTOR_GP, BEHIND_GDT, "a selector behind the GDT");
	gate_selector(BEHIND_GDT | 3, VECTOR_GP, BEHIND_GDT, "a selector behind the GDT with RPL 3");
	gate_selector(KERNEL_CS | ERROR_TI, VECTOR_GP, KERNEL_CS | ERROR_TI, "the LDT when there is none");
	idt[TEST_VECTOR].selector = CONFORMING_CODE;
	int_n();
	check(last_fault.vector == TEST_VECTOR, "a gate for a conforming segment");
	restore();
	idt[TEST_VECTOR].offset_high = NON_CANONICAL >> 32;
	int_n();
	check_fault(VECTOR_GP, 0, "a gate with a non-canonical address");
	restore();
}

static void limit(void)
{
	struct table_register normal = {sizeof(idt) - 1, (u64)idt}, test = normal;

	test.limit = TEST_VECTOR * sizeof(struct gate) + sizeof(struct gate) - 2;
	asm volatile("lidt %0" ::"m"(test));
	int_n();
	asm volatile("lidt %0" ::"m"(normal));
	check_fault(VECTOR_GP, IDT_ENTRY(TEST_VECTOR), "a limit one byte too small");
	test.limit++;
	asm volatile("lidt %0" ::"m"(test));
	int_n();
	asm volatile("lidt %0" ::"m"(normal));
	check(last_fault.vector == TEST_VECTOR, "a limit that is just enough");
}

/* Exceptions that an instruction did not ask for have EXT in what goes wrong with their delivery. */
static void exceptions(void)
{
	struct gate kept_ud = idt[VECTOR_UD], kept_bp = idt[VECTOR_BP], kept_db = idt[VECTOR_DB];

	idt[VECTOR_UD].type &= ~GATE_PRESENT;
	TRY("ud2", ::: "memory");
	check_fault(VECTOR_NP, IDT_ENTRY(VECTOR_UD) | ERROR_EXT, "#UD through a gate that is not present");
	idt[VECTOR_UD] = kept_ud;
	idt[VECTOR_UD].selector = KERNEL_DS;
	TRY("ud2", ::: "memory");
	check_fault(VECTOR_GP, KERNEL_DS | ERROR_EXT, "#UD through a gate for a data segment");
	idt[VECTOR_UD] = kept_ud;
	idt[VECTOR_UD].selector = 0;
	TRY("ud2", ::: "memory");
	check_fault(VECTOR_GP, ERROR_EXT, "#UD through a gate for the null selector");
	idt[VECTOR_UD] = kept_ud;
	idt[VECTOR_BP].type &= ~GATE_PRESENT;
	TRY("int3", ::: "memory");
	check_fault(VECTOR_NP, IDT_ENTRY(VECTOR_BP), "INT3 through a gate that is not present");
	idt[VECTOR_BP] = kept_bp;
	idt[VECTOR_DB].type &= ~GATE_PRESENT;
	TRY(".byte 0xf1", ::: "memory");
	check_fault(VECTOR_NP, IDT_ENTRY(VECTOR_DB) | ERROR_EXT, "INT1 through a gate that is not present");
	idt[VECTOR_DB] = kept_db;
}

/* Exceptions that happen while another one is delivered: SDM volume 3, "Double Fault Exception". */
static void nested(void)
{
	struct gate kept_gp = idt[VECTOR_GP], kept_np = idt[VECTOR_NP];

	idt[VECTOR_GP].type &= ~GATE_PRESENT;
	TRY("mov %w0, %%fs", ::"r"(BEHIND_GDT) : "memory");
	check_fault(VECTOR_DF, 0, "#GP through a gate that is not present: #NP makes it #DF");
	idt[VECTOR_NP].type &= ~GATE_PRESENT;
	int_n();
	check(last_fault.vector == TEST_VECTOR, "INT n does not care for other gates");
	idt[TEST_VECTOR].type &= ~GATE_PRESENT;
	int_n();
	check_fault(VECTOR_DF, 0, "INT n without a gate, and no gate for #NP");
	restore();
	idt[VECTOR_NP] = kept_np;
	idt[VECTOR_GP] = kept_gp;
	u64 kept_ist = tss.ist[EXCEPTION_IST - 1];
	tss.ist[EXCEPTION_IST - 1] = NON_CANONICAL;
	TRY("ud2", ::: "memory");
	tss.ist[EXCEPTION_IST - 1] = kept_ist;
	check_fault(VECTOR_DF, 0, "#UD onto a bad stack: #SS onto the same stack is #DF");
	idt[VECTOR_SS].ist = 0;
	tss.ist[EXCEPTION_IST - 1] = NON_CANONICAL;
	TRY("ud2", ::: "memory");
	tss.ist[EXCEPTION_IST - 1] = kept_ist;
	idt[VECTOR_SS].ist = EXCEPTION_IST;
	check_fault(VECTOR_SS, ERROR_EXT, "#UD onto a non-canonical stack");
	idt[TEST_VECTOR].ist = 7;
	tss.ist[6] = NON_CANONICAL;
	int_n();
	check_fault(VECTOR_SS, 0, "INT n onto a non-canonical stack");
	tss.ist[6] = USER_BASE - PAGE_SIZE;
	int_n();
	restore();
	check_page_fault(PF_WRITE, USER_BASE - PAGE_SIZE - 8, "INT n onto a stack that is not mapped");
}

static void users(void)
{
	RUN_USER(user_int_n);
	check_fault(VECTOR_GP, IDT_ENTRY(TEST_VECTOR), "INT n at CPL 3 through a gate of DPL 0");
	idt[TEST_VECTOR].type = GATE_PRESENT | GATE_INTERRUPT | GATE_USER;
	RUN_USER(user_int_n);
	check(last_fault.vector == TEST_VECTOR, "INT n at CPL 3 through a gate of DPL 3");
	idt[TEST_VECTOR].type &= ~GATE_PRESENT;
	RUN_USER(user_int_n);
	check_fault(VECTOR_NP, IDT_ENTRY(TEST_VECTOR), "INT n at CPL 3, not present");
	idt[TEST_VECTOR].type &= ~GATE_USER;
	RUN_USER(user_int_n);
	check_fault(VECTOR_GP, IDT_ENTRY(TEST_VECTOR), "the DPL comes before the present bit");
	restore();
	RUN_USER(user_int3);
	check_fault(VECTOR_GP, IDT_ENTRY(VECTOR_BP), "INT3 at CPL 3 looks at the gate's DPL");
	RUN_USER(user_int_4);
	check_fault(VECTOR_GP, IDT_ENTRY(VECTOR_OF), "INT 4 at CPL 3 does");
	RUN_USER(user_ud2);
	check(last_fault.vector == VECTOR_UD, "UD2 at CPL 3 does not");
	RUN_USER(user_int1);
	check(last_fault.vector == VECTOR_DB, "INT1 at CPL 3 does not");
}

static void run(void)
{
	kept = idt[TEST_VECTOR];
	gates();
	selectors();
	limit();
	exceptions();
	nested();
	users();
}

const struct subject subjects[] = {{.name = "idt", .run = run}, {}};
