// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Exceptions to the byte: which instruction is blamed, which error code, which address, what has been done
 * by then and what has not. And arithmetic to the bit, each result checked by a second way to compute it.
 */
#include "guest.h"

typedef int (*function)(void);

/* Two pages at an address nothing else in a static program uses. */
#define CODE ((unsigned char *)0x70000000UL)
#define SECOND_PAGE (CODE + PAGE)

static void map_pages(int second_page_protection)
{
	unsigned char *pages = mmap(CODE, 2 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	if (pages != CODE) {
		perror("mmap");
		_exit(1);
	}
	mprotect(SECOND_PAGE, PAGE, second_page_protection);
}

static int run(const unsigned char *code)
{
	return ((function)(uintptr_t)code)();
}

/* A fetch that leaves its page: what came before has been done, and the right address is blamed. */
static void fetch_across_pages(void)
{
	/* xor ebx, ebx; inc ebx; inc ebx; inc ebx; and, for the split case, a REX prefix of what never comes */
	static const unsigned char code[] = { 0x31, 0xdb, 0xff, 0xc3, 0xff, 0xc3, 0xff, 0xc3, 0x48 };
	static const struct {
		const char *name;
		size_t length;
		int protection;
		unsigned long error;
	} cases[] = {
		{ "fetch runs into an unmapped page", sizeof(code) - 1, PROT_NONE, PF_USER | PF_FETCH },
		{ "instruction split by unmapped page", sizeof(code), PROT_NONE, PF_USER | PF_FETCH },
		{ "fetch runs into an NX page", sizeof(code) - 1, PROT_READ, PF_PRESENT | PF_USER | PF_FETCH },
		{ "instruction split by an NX page", sizeof(code), PROT_READ, PF_PRESENT | PF_USER | PF_FETCH },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		unsigned char *start = SECOND_PAGE - cases[i].length;
		unsigned long blamed = (unsigned long)start + sizeof(code) - 1;

		map_pages(PROT_READ | PROT_WRITE);
		/* A present entry in the page tables: NX is then the only reason to fault. */
		*(volatile unsigned char *)SECOND_PAGE = 0;
		mprotect(SECOND_PAGE, PAGE, cases[i].protection);
		memcpy(start, code, cases[i].length);
		CATCH(run(start));
		expect(cases[i].name,
		       fault.trap == TRAP_PF && fault.error == cases[i].error && fault.rip == blamed &&
			       fault.rbx == 3 && fault.cr2 == (unsigned long)SECOND_PAGE,
		       "trap %ld error %#lx rip %#lx rbx %lu cr2 %#lx", fault.trap, fault.error, fault.rip,
		       fault.rbx, fault.cr2);
	}
}

#define ON_RAX(name, instruction)                                                        \
	static void name(void *address)                                                  \
	{                                                                                \
		asm volatile("mov %%rsp, %%r8\n\tlea -256(%%rsp), %%rsp\n\t" instruction \
			     "\n\tmov %%r8, %%rsp"                                       \
			     : "+a"(address)                                             \
			     :                                                           \
			     : "rcx", "rdx", "rsi", "r8", "memory", "cc");               \
	}

ON_RAX(compare, "cmpl $1, (%%rax)")
ON_RAX(add, "addl $1, (%%rax)")
ON_RAX(lock_inc, "lock incl (%%rax)")
ON_RAX(exchange, "xchgl %%ecx, (%%rax)")
ON_RAX(exchange_add, "lock xaddq %%rcx, (%%rax)")
ON_RAX(failing_compare_exchange, "mov %%rax, %%rsi\n\tmov $-1, %%eax\n\tlock cmpxchgl %%ecx, (%%rsi)")
ON_RAX(bit_test_set, "btsl $1, (%%rax)")
ON_RAX(shift, "shll $1, (%%rax)")
ON_RAX(negate, "negb (%%rax)")
ON_RAX(pop_to_memory, "popq (%%rax)")
ON_RAX(push_from_memory, "pushq (%%rax)")

/* A read-modify-write faults as a write, even where the read would have faulted first. */
static void read_modify_write(void)
{
	static const struct {
		const char *name;
		void (*run)(void *address);
		bool writes;
	} cases[] = {
		{ "cmp", compare, false },
		{ "push [mem]", push_from_memory, false },
		{ "add", add, true },
		{ "lock inc", lock_inc, true },
		{ "xchg", exchange, true },
		{ "lock xadd", exchange_add, true },
		{ "cmpxchg that will not match", failing_compare_exchange, true },
		{ "bts", bit_test_set, true },
		{ "shl", shift, true },
		{ "neg", negate, true },
		{ "pop [mem]", pop_to_memory, true },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		unsigned long write = cases[i].writes ? PF_WRITE : 0;
		unsigned long unmapped;

		map_pages(PROT_NONE);
		CATCH(cases[i].run(SECOND_PAGE));
		unmapped = fault.error;
		map_pages(PROT_READ);
		/* Brings the page in, so that only the missing write permission is left to complain about. */
		(void)*(volatile unsigned char *)SECOND_PAGE;
		CATCH(cases[i].run(SECOND_PAGE));
		expect(cases[i].name,
		       unmapped == (PF_USER | write) &&
			       (!write || fault.error == (PF_PRESENT | PF_USER | PF_WRITE)),
		       "error code unmapped %#lx, read-only %#lx", unmapped, fault.error);
	}
}

static void write_across_pages(void)
{
	unsigned char *start = SECOND_PAGE - 4;

	map_pages(PROT_NONE);
	memset(CODE, 0x55, PAGE);
	CATCH(*(volatile uint64_t *)start = 0);
	expect("a split write writes nothing",
	       fault.trap == TRAP_PF && fault.cr2 == (unsigned long)SECOND_PAGE &&
		       *(volatile uint32_t *)start == 0x55555555,
	       "cr2 %#lx, the first half holds %#x", fault.cr2, *(volatile uint32_t *)start);
}

#define STRING_LENGTH 64
#define BEFORE_FAULT 16

static void fill(unsigned char *start)
{
	asm volatile("mov %0, %%rdi\n\tmov %1, %%ecx\n\tmov $0xaa, %%eax\n\trep stosb"
		     :
		     : "r"(start), "i"(STRING_LENGTH)
		     : "rax", "rcx", "rdi", "memory");
}

static void map_and_return(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)info, (void)context;
	mprotect(SECOND_PAGE, PAGE, PROT_READ | PROT_WRITE);
}

/* A repeated string instruction stops at the iteration that faults, and goes on from there. */
static void string_stops(void)
{
	map_pages(PROT_NONE);
	CATCH(fill(SECOND_PAGE - BEFORE_FAULT));
	expect("rep stos stops at the fault",
	       fault.trap == TRAP_PF && fault.rdi == (unsigned long)SECOND_PAGE &&
		       fault.rcx == STRING_LENGTH - BEFORE_FAULT && SECOND_PAGE[-1] == 0xaa,
	       "rcx %lu rdi %#lx", fault.rcx, fault.rdi);
}

static void string_goes_on(void)
{
	const unsigned char *start = SECOND_PAGE - BEFORE_FAULT;
	int filled = 0;

	map_pages(PROT_NONE);
	catch_faults(map_and_return);
	fill(SECOND_PAGE - BEFORE_FAULT);
	catch_faults(on_fault);
	for (int i = 0; i < STRING_LENGTH; i++)
		filled += start[i] == 0xaa;
	expect("rep stos goes on after it", filled == STRING_LENGTH, "%d of %d bytes", filled, STRING_LENGTH);
}

#define STACK_CASE(name, before, instruction)                                            \
	static void name(void *address)                                                  \
	{                                                                                \
		asm volatile("mov %%rsp, %%r8\n\tmov %%rbp, %%r9\n\t" before             \
			     "\n\t" instruction "\n\tmov %%r8, %%rsp\n\tmov %%r9, %%rbp" \
			     : "+a"(address)                                             \
			     :                                                           \
			     : "rbx", "r8", "r9", "memory", "cc");                       \
	}

STACK_CASE(push, "mov %%rax, %%rsp\n\tmov %%rsp, %%rbx", "push %%rcx")
STACK_CASE(call, "mov %%rax, %%rsp\n\tmov %%rsp, %%rbx", "call 1f\n1:")
STACK_CASE(pop, "mov %%rax, %%rsp\n\tmov %%rsp, %%rbx", "pop %%rcx")
STACK_CASE(enter, "mov %%rax, %%rsp\n\tmov %%rsp, %%rbx", "enter $32, $0")
STACK_CASE(leave, "lea -256(%%rsp), %%rsp\n\tmov %%rsp, %%rbx\n\tmov %%rax, %%rbp", "leave")
STACK_CASE(pop_unmapped, "lea -256(%%rsp), %%rsp\n\tmov %%rsp, %%rbx", "popq (%%rax)")

/* An instruction that faults on the stack has not moved it. The cases keep the old RSP in RBX. */
static void stack_pointer_kept(void)
{
	static const struct {
		const char *name;
		void (*run)(void *address);
	} cases[] = {
		{ "push", push }, { "call", call },   { "pop", pop },
		{ "enter", enter }, { "leave", leave }, { "pop to unmapped memory", pop_unmapped },
	};

	map_pages(PROT_NONE);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		char name[64];

		snprintf(name, sizeof(name), "rsp after a fault in %s", cases[i].name);
		CATCH(cases[i].run(SECOND_PAGE + PAGE / 2));
		expect(name, fault.trap == TRAP_PF && fault.rsp == fault.rbx, "rsp %#lx, before %#lx", fault.rsp,
		       fault.rbx);
	}
}

#define CODE_BYTES 32

/* Machine code, what it raises and where RIP points then, as an offset into the code. */
struct exception {
	const char *name;
	char code[CODE_BYTES];
	enum trap trap;
	unsigned long error;
	unsigned long rip;
};

/* mov rax, 0x8000000000000000 */
#define RAX_NON_CANONICAL "\x48\xb8\0\0\0\0\0\0\0\x80"
/* pushf; or dword [rsp], flag; popf */
#define SET_TF "\x9c\x81\x0c\x24\x00\x01\x00\x00\x9d"
#define SET_AC "\x9c\x81\x0c\x24\x00\x00\x04\x00\x9d"
#define CLEAR_AC "\x9c\x81\x24\x24\xff\xff\xfb\xff\x9d"

static const struct exception exceptions[] = {
	{ "int3", "\xcc\xc3", TRAP_BP, 0, 1 },
	{ "int 3, the long form", "\xcd\x03\xc3", TRAP_BP, 0, 2 },
	{ "int1", "\xf1\xc3", TRAP_DB, 0, 1 },
	{ "int 0x21", "\xcd\x21\xc3", TRAP_GP, 0x10a, 0 },
	{ "ud2", "\x0f\x0b\xc3", TRAP_UD, 0, 0 },
	{ "lock on a register form", "\xf0\x01\xc0\xc3", TRAP_UD, 0, 0 },
	{ "lock on a plain load", "\xf0\x48\x8b\x04\x24\xc3", TRAP_UD, 0, 0 },
	{ "div by zero", "\x31\xc9\xf7\xf1\xc3", TRAP_DE, 0, 2 },
	{ "idiv overflow", "\xb8\0\0\0\x80\x99\x6a\xff\x59\xf7\xf9\xc3", TRAP_DE, 0, 9 },
	{ "hlt", "\xf4\xc3", TRAP_GP, 0, 0 },
	{ "cli", "\xfa\xc3", TRAP_GP, 0, 0 },
	{ "in", "\xec\xc3", TRAP_GP, 0, 0 },
	{ "out", "\xe6\x80\xc3", TRAP_GP, 0, 0 },
	{ "mov from cr0", "\x0f\x20\xc0\xc3", TRAP_GP, 0, 0 },
	{ "mov to dr7", "\x0f\x23\xf8\xc3", TRAP_GP, 0, 0 },
	{ "rdmsr", "\x0f\x32\xc3", TRAP_GP, 0, 0 },
	{ "invlpg", "\x0f\x01\x3c\x24\xc3", TRAP_GP, 0, 0 },
	{ "wbinvd", "\x0f\x09\xc3", TRAP_GP, 0, 0 },
	{ "null selector into ss", "\x31\xc0\x8e\xd0\xc3", TRAP_GP, 0, 2 },
	{ "bad selector into ds", "\xb8\xfb\xff\0\0\x8e\xd8\xc3", TRAP_GP, 0xfff8, 5 },
	{ "movaps, misaligned", "\x0f\x28\x44\x24\x01\xc3", TRAP_GP, 0, 0 },
	{ "jmp to a non-canonical address", RAX_NON_CANONICAL "\xff\xe0", TRAP_GP, 0, 10 },
	{ "call of a non-canonical address", RAX_NON_CANONICAL "\xff\xd0", TRAP_GP, 0, 10 },
	{ "ret to a non-canonical address", RAX_NON_CANONICAL "\x50\xc3", TRAP_GP, 0, 11 },
	{ "trap flag set by popf", SET_TF "\x90\x90\xc3", TRAP_DB, 0, 10 },
	{ "trap flag, then cpuid", "\x53" SET_TF "\x0f\xa2\x5b\xc3", TRAP_DB, 0, 12 },
	{ "alignment check", SET_AC "\x8b\x44\x24\x81" CLEAR_AC "\xc3", TRAP_AC, 0, 9 },
};

static void exceptions_to_the_byte(void)
{
	map_pages(PROT_NONE);
	for (size_t i = 0; i < sizeof(exceptions) / sizeof(exceptions[0]); i++) {
		const struct exception *exception = &exceptions[i];

		memcpy(CODE, exception->code, sizeof(exception->code));
		CATCH(run(CODE));
		expect(exception->name,
		       fault.trap == exception->trap && fault.error == exception->error &&
			       fault.rip == (unsigned long)CODE + exception->rip,
		       "trap %ld error %#lx rip +%ld, expected trap %d error %#lx rip +%lu", fault.trap,
		       fault.error, (long)(fault.rip - (unsigned long)CODE), exception->trap,
		       exception->error, exception->rip);
	}
}

/* Linux answers int 0x80 where it runs 32-bit programs; where it does not, the gate is closed to users. */
static void legacy_system_call(void)
{
	/* mov eax, 20 (getpid of the 32-bit table); int 0x80; ret */
	static const unsigned char code[] = { 0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3 };
	volatile int answer = 0;

	map_pages(PROT_NONE);
	memcpy(CODE, code, sizeof(code));
	if (CATCH(answer = run(CODE)))
		expect("int 0x80 is closed",
		       fault.trap == TRAP_GP && fault.error == 0x402 && fault.rip == (unsigned long)CODE + 5,
		       "trap %ld error %#lx", fault.trap, fault.error);
	else
		expect("int 0x80 is getpid", answer == getpid(), "returned %d", answer);
}

int main(void)
{
	catch_faults(on_fault);
	fetch_across_pages();
	read_modify_write();
	write_across_pages();
	string_stops();
	string_goes_on();
	stack_pointer_kept();
	exceptions_to_the_byte();
	legacy_system_call();
	return summary("exact");
}
