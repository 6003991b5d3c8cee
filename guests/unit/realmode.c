/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Real mode: down from 64-bit mode, a few 16-bit instructions, and back. Source: SDM volume 3, "8086 Emulation",
 * "Switching Back to Real-Address Mode".
 */
#include "lib.h"

/* As realmode_switch.S has them. */
#define REAL_BASE 0x8000
#define REAL_CODE 0x9000
#define REAL_STACK 0x7000
#define REAL_DATA 0xa000
#define REGISTERS 0x6000
#define REAL_VECTORS 64
#define REAL_SEGMENT 0x2000
#define NO_VECTOR 0xffffffff

struct registers {
	u32 eax, ebx, ecx, edx, esi, edi, ebp, eflags;
};
struct exchange {
	struct registers in, out;
	u32 esp;
	u16 ds, es;
	u32 vector;
	u16 ip, cs;
};
extern void enter_real_mode(void);
extern const char real_start[], real_end[], real_stubs[];

static volatile struct exchange *const exchange = (void *)REGISTERS;
static struct registers out;
static u8 *const data = (void *)REAL_DATA;

#define REAL(name, text)                                                                                \
	asm(".pushsection .rodata\n.code16\n" #name ": " text "\nret\n" #name "_end:\n.code64\n.popsection");   \
	extern const char name[], name##_end[]
#define RUN(name, ...) run_real(name, name##_end, (struct registers){__VA_ARGS__})

static void run_real(const char *code, const char *end, struct registers in)
{
	struct table_register idtr;

	memcpy((void *)REAL_BASE, real_start, real_end - real_start);
	memcpy((void *)REAL_CODE, code, end - code);
	for (u32 vector = 0; vector < REAL_VECTORS; vector++)
		((volatile u32 *)0)[vector] = (u32)(u64)real_stubs + 16 * vector;
	in.eflags |= FLAG_FIXED;
	exchange->in = in;
	asm volatile("sidt %0" : "=m"(idtr));
	enter_real_mode();
	asm volatile("lidt %0" ::"m"(idtr));
	out = exchange->out;
}

static bool ended(const char *what)
{
	if (exchange->vector != NO_VECTOR)
		print("      vector %d at %x:%x\n", exchange->vector, exchange->cs, exchange->ip);
	return check(exchange->vector == NO_VECTOR, "%s", what);
}

static void check_vector(u32 vector, u16 offset, const char *what)
{
	bool holds = exchange->vector == vector && exchange->ip == REAL_CODE + offset && !exchange->cs;

	if (!holds)
		print("      vector %d at %x:%x\n", (int)exchange->vector, exchange->cs, exchange->ip);
	check(holds, "%s", what);
}

REAL(nothing, "nop");
REAL(read_cr0_16, "mov %cr0, %eax; smsw %bx");
REAL(add_16, "add %bx, %ax");
REAL(add_32, "addl %ebx, %eax");
REAL(mul_16, "mul %bx");
REAL(bcd, "add %bl, %al; daa; mov %al, %cl; mov $0x0f, %al; aaa; mov %ax, %dx; mov $53, %al; aam; mov %ax, %si; aad; "
	  "mov %ax, %di; mov $0x06, %al; sub $0x09, %al; das; mov %al, %bl");
REAL(salc_xlat, "stc; .byte 0xd6; mov %al, %cl; mov $3, %al; xlat");
static void arithmetic(void)
{
	RUN(nothing, .eax = 0x12345678, .ebp = 0x87654321);
	if (!ended("down to real mode and back"))
		summary_and_leave();
	check(out.eax == 0x12345678 && out.ebp == 0x87654321, "32-bit registers are kept");
	check(exchange->esp == REAL_STACK, "RET takes 16 bits from the stack");
	RUN(read_cr0_16);
	check(!(out.eax & (CR0_PE | CR0_PG)) && !(out.ebx & CR0_PE), "CR0.PE and CR0.PG are clear");
	RUN(add_16, .eax = 0x1111ffff, .ebx = 0x22220001);
	check(out.eax == 0x11110000 && out.eflags & FLAG_CF && out.eflags & FLAG_ZF, "operands have 16 bits");
	RUN(add_32, .eax = 0x1111ffff, .ebx = 1);
	check(out.eax == 0x11120000, "and 32 with a prefix");
	RUN(mul_16, .eax = 0x1234, .ebx = 0x5678, .edx = 0xaaaaaaaa);
	check((out.eax & 0xffff) == 0x0060 && out.edx == 0xaaaa0626, "MUL of 16 bits");
	RUN(bcd, .eax = 0x38, .ebx = 0x45);
	ended("DAA, AAA, AAM, AAD, DAS");
	check((out.ecx & 0xff) == 0x83 && (out.edx & 0xff0f) == 0x0105, "DAA: 38 + 45 = 83; AAA: 0FH is 1 05");
	check((out.esi & 0xffff) == 0x0503 && (out.edi & 0xffff) == 53, "AAM: 53 is 5, 3; AAD takes it back");
	check((out.ebx & 0xff) == 0x97, "DAS: 6 - 9 = 97");
	memcpy(data, "\1\2\3\4", 4);
	RUN(salc_xlat, .ebx = REAL_DATA);
	check((out.ecx & 0xff) == 0xff && (out.eax & 0xff) == 4, "SALC, XLAT");
}

REAL(store_segment, "mov %ax, %ds; movw %bx, (%si); mov %ds, %dx");
REAL(store_override, "mov %ax, %es; movw %bx, %es:(%di); xor %ax, %ax");
REAL(load_pointers, "lds (%si), %bx; les %cs:4(%si), %cx; mov %ds, %ax; mov %es, %dx");
REAL(high_memory, "mov $0xffff, %ax; mov %ax, %ds; movb %bl, (0x10)");
REAL(across_end, "mov %ax, %ds; mov $0xffff, %bx; mov %ax, %dx; movw (%bx), %cx");
REAL(behind_end, "addr32 movb (%ebx), %al");
REAL(pusha_popa, "pushaw; popw %si; add $14, %sp; mov %sp, %bp; pushal; popal");
REAL(enter_leave, "mov %sp, %cx; enter $8, $0; sub %sp, %cx; leave; mov %sp, %dx");
REAL(stack_wrap, "mov %sp, %bx; xor %sp, %sp; push $0x4321; mov %sp, %cx; pop %dx; mov %bx, %sp");
static void memory(void)
{
	u16 *word = (void *)(REAL_SEGMENT * 16ull + 0x30);

	RUN(store_segment, .eax = REAL_SEGMENT, .ebx = 0x1234, .esi = 0x30);
	check(*word == 0x1234 && (out.edx & 0xffff) == REAL_SEGMENT, "a segment's base is 16 times its number");
	RUN(store_override, .eax = REAL_SEGMENT, .ebx = 0x4321, .edi = 0x30);
	check(*word == 0x4321, "a segment prefix");
	memcpy(data, "\x11\x22\x00\x20\x33\x44\x55\x66", 8);
	RUN(load_pointers, .esi = REAL_DATA);
	check((out.ebx & 0xffff) == 0x2211 && (out.eax & 0xffff) == 0x2000 && (out.ecx & 0xffff) == 0x4433 &&
		      (out.edx & 0xffff) == 0x6655,
	      "LDS and LES");
	*(volatile u8 *)0x100000 = 0;
	RUN(high_memory, .ebx = 0x5a);
	check(*(volatile u8 *)0x100000 == 0x5a, "FFFF:0010 is 1 MiB, with A20");
	RUN(across_end, .eax = REAL_SEGMENT);
	check_vector(VECTOR_GP, 7, "a word across the end of a segment is interrupt 13");
	RUN(behind_end, .ebx = 0x10000);
	check_vector(VECTOR_GP, 0, "an offset above 64 KiB is interrupt 13");
	RUN(pusha_popa, .eax = 0x1111, .edi = 0x7777);
	ended("PUSHA and POPA in both sizes");
	check((out.esi & 0xffff) == 0x7777, "PUSHA ends with DI");
	RUN(enter_leave, .ebp = 0x1234);
	check((out.ecx & 0xffff) == 10 && (out.edx & 0xffff) == REAL_STACK - 2 && (out.ebp & 0xffff) == 0x1234,
	      "ENTER and LEAVE");
	memcpy((void *)0xfffe, "\0\0", 2);
	RUN(stack_wrap);
	check((out.ecx & 0xffff) == 0xfffe && (out.edx & 0xffff) == 0x4321 && *(u16 *)0xfffe == 0x4321,
	      "a PUSH at SP=0 goes to the end of the segment");
}

REAL(far_call, "push %cs; call 1f; jmp 2f; 1: incw %ax; lret; 2:");
REAL(far_pointer, "lcall *(%bx); jmp 1f; 1:");
REAL(other_segment, "mov %cs, %ax; lret");
REAL(far_jump, "mov $0x0900, %ax; push %ax; push $(1f - far_jump); lret; 1: mov %cs, %bx; ljmp $0, $(0x9000 + 2f - "
	       "far_jump); 2: mov %cs, %cx");
REAL(loops, "xor %ax, %ax; mov $5, %cx; 1: inc %ax; loop 1b; jcxz 2f; mov $0, %ax; 2:");
REAL(near_32, "calll 1f; jmp 2f; 1: incw %ax; retl; 2:");
static void control_flow(void)
{
	static const u8 target[] = {0x8c, 0xc8, 0xcb}; /* mov %cs, %ax; lret */

	RUN(far_call);
	ended("far RET");
	check((out.eax & 0xffff) == 1 && exchange->esp == REAL_STACK, "and the stack is as it was");
	memcpy((void *)(REAL_SEGMENT * 16ull + 0x40), target, sizeof(target));
	memcpy(data, "\x40\x00\x00\x20", 4);
	RUN(far_pointer, .ebx = REAL_DATA);
	ended("a far call by a pointer in memory");
	check((out.eax & 0xffff) == REAL_SEGMENT, "runs in the other segment");
	RUN(far_jump);
	ended("far jumps");
	check((out.ebx & 0xffff) == 0x0900 && !(out.ecx & 0xffff), "load CS");
	RUN(loops);
	check((out.eax & 0xffff) == 5, "LOOP and JCXZ count in CX");
	RUN(near_32);
	ended("a near call with a 32-bit return address");
}

REAL(string_up, "rep movsb");
REAL(string_down, "std; rep movsw; cld");
REAL(string_compare, "repe cmpsb");
REAL(string_scan, "mov $'c', %al; repne scasb");
REAL(string_override, "mov %ax, %ds; rep movsb %cs:(%si), %es:(%di)");
static void strings(void)
{
	memset(data, 0, 64);
	memcpy(data, "abcdef", 6);
	RUN(string_up, .ecx = 0xffff0006, .esi = REAL_DATA, .edi = REAL_DATA + 16);
	check(!memcmp(data + 16, "abcdef", 7) && out.ecx == 0xffff0000, "REP MOVSB counts in CX");
	RUN(string_down, .ecx = 2, .esi = REAL_DATA + 2, .edi = REAL_DATA + 34);
	check(!memcmp(data + 32, "abcd", 5) && (out.esi & 0xffff) == REAL_DATA - 2, "DF=1: downwards");
	RUN(string_compare, .ecx = 6, .esi = REAL_DATA, .edi = REAL_DATA + 32);
	check((out.ecx & 0xffff) == 1 && !(out.eflags & FLAG_ZF), "REPE CMPSB ends at a difference");
	RUN(string_scan, .ecx = 6, .edi = REAL_DATA);
	check((out.ecx & 0xffff) == 3 && (out.edi & 0xffff) == REAL_DATA + 3, "REPNE SCASB finds");
	RUN(string_override, .eax = REAL_SEGMENT, .ecx = 3, .esi = REAL_DATA, .edi = REAL_DATA + 48);
	check(!memcmp(data + 48, "abc", 4), "a segment prefix is for the source");
}

REAL(int_handler, "movw $(0x9000 + 1f - int_handler), %cs:0x21 * 4; movw $0, %cs:0x21 * 4 + 2; sti; int $0x21; jmp 2f; "
		  "1: pushf; pop %bx; inc %ax; iret; 2: pushf; pop %cx; cli");
REAL(int_20, "int $0x20");
REAL(int3_real, "int3");
REAL(into_real, "mov $0x7fff, %ax; inc %ax; into");
REAL(divide, "xor %dx, %dx; xor %bx, %bx; div %bx");
REAL(undefined, "nop; ud2");
REAL(bound_real, "bound %ax, (%si)");
REAL(vector_limit, "int $0x50");
REAL(privileged, "lldt %ax");
static void interrupts(void)
{
	RUN(int_handler);
	ended("INT and IRET");
	check((out.eax & 0xffff) == 1, "the handler has run");
	check(!(out.ebx & FLAG_IF) && out.ecx & FLAG_IF, "with IF=0, and IRET sets it again");
	RUN(int_20);
	check_vector(0x20, 2, "INT saves the next IP");
	RUN(int3_real);
	check_vector(VECTOR_BP, 1, "INT3");
	RUN(into_real);
	check_vector(VECTOR_OF, 5, "INTO");
	RUN(divide);
	check_vector(VECTOR_DE, 4, "a division by zero saves its own IP");
	RUN(undefined);
	check_vector(VECTOR_UD, 1, "UD2");
	memcpy(data, "\5\0\6\0", 4);
	RUN(bound_real, .eax = 7, .esi = REAL_DATA);
	check_vector(VECTOR_BR, 0, "BOUND");
	RUN(vector_limit);
	check_vector(VECTOR_GP, 0, "INT behind the limit of the vector table is interrupt 13");
	RUN(privileged);
	check_vector(VECTOR_UD, 0, "LLDT is not recognized");
}

REAL(cpuid_real, "cpuid");
REAL(hidden, "mov %ss, %ax; mov %ax, %ss; pushf; popf");
static void others(void)
{
	RUN(cpuid_real, .eax = 1);
	check(out.eax == cpuid(1, 0).output[EAX], "CPUID");
	RUN(hidden);
	ended("MOV SS");
	check(read_cr0() & CR0_PG && rdmsr(MSR_EFER) & EFER_LMA, "64-bit mode is as it was");
}

static void run(void)
{
	arithmetic();
	memory();
	control_flow();
	strings();
	interrupts();
	others();
}

const struct subject subjects[] = {{.name = "realmode", .run = run}, {}};
