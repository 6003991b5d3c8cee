// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Self-modifying code as real programs commit it: JIT compilers that switch a page between writable and
 * executable, that write through one mapping and run through another, or that patch the very block they
 * are running. The architecture promises that a later jump runs the new bytes (SDM volume 3, section
 * 10.1.3); a machine that keeps translations has to notice every one of these ways.
 */
#include "guest.h"

#include <sys/syscall.h>

#define FUNCTIONS_PER_PAGE 64
#define FUNCTION_SIZE (PAGE / FUNCTIONS_PER_PAGE)
#define ROUNDS 20
/* An address nothing else in a static program uses. */
#define FIXED ((void *)0x70000000UL)

typedef int (*function)(void);

/* Write `mov eax, value; ret`. */
static void emit(unsigned char *code, int value)
{
	code[0] = 0xb8;
	memcpy(code + 1, &value, sizeof(value));
	code[5] = 0xc3;
}

static int run(const unsigned char *code)
{
	return ((function)(uintptr_t)code)();
}

static int value_for(int round, int index)
{
	return round * 1000 + index;
}

static void emit_page(unsigned char *page, int round)
{
	for (int i = 0; i < FUNCTIONS_PER_PAGE; i++)
		emit(page + i * FUNCTION_SIZE, value_for(round, i));
}

/* How many of a page's functions return something else than was written last. */
static int stale(const unsigned char *page, int round)
{
	int wrong = 0;

	for (int i = 0; i < FUNCTIONS_PER_PAGE; i++)
		wrong += run(page + i * FUNCTION_SIZE) != value_for(round, i);
	return wrong;
}

static void report(const char *name, int wrong, int calls)
{
	expect(name, wrong == 0, "%d of %d calls ran stale code", wrong, calls);
}

static unsigned char *map(void *where, int protection, int flags, int fd)
{
	unsigned char *page = mmap(where, PAGE, protection, flags, fd, 0);

	if (page == MAP_FAILED) {
		perror("mmap");
		_exit(1);
	}
	return page;
}

static unsigned char *map_private(int protection)
{
	return map(NULL, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

static void jit_switches_protection(void)
{
	unsigned char *page = map_private(PROT_READ | PROT_WRITE);
	int wrong = 0;

	for (int round = 0; round < ROUNDS; round++) {
		mprotect(page, PAGE, PROT_READ | PROT_WRITE);
		emit_page(page, round);
		mprotect(page, PAGE, PROT_READ | PROT_EXEC);
		wrong += stale(page, round);
	}
	report("JIT: RW, RX, RW", wrong, ROUNDS * FUNCTIONS_PER_PAGE);

	mprotect(page, PAGE, PROT_READ | PROT_WRITE);
	CATCH(run(page));
	expect("no execution after RX became RW",
	       fault.trap == TRAP_PF && fault.error == (PF_PRESENT | PF_USER | PF_FETCH) &&
		       fault.rip == (unsigned long)page,
	       "trap %ld error %#lx rip %#lx", fault.trap, fault.error, fault.rip);

	mprotect(page, PAGE, PROT_READ | PROT_EXEC);
	run(page);
	CATCH(*(volatile unsigned char *)page = 0);
	expect("no write after RW became RX",
	       fault.trap == TRAP_PF && fault.error == (PF_PRESENT | PF_WRITE | PF_USER) &&
		       fault.cr2 == (unsigned long)page,
	       "trap %ld error %#lx cr2 %#lx", fault.trap, fault.error, fault.cr2);
	munmap(page, PAGE);
}

static void write_through_alias(void)
{
	static unsigned char buffer[PAGE];
	int fd = syscall(SYS_memfd_create, "code", 0);
	int wrong = 0;

	if (fd < 0 || ftruncate(fd, PAGE)) {
		perror("memfd_create");
		_exit(1);
	}
	unsigned char *writable = map(NULL, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	unsigned char *executable = map(NULL, PROT_READ | PROT_EXEC, MAP_SHARED, fd);

	for (int round = 0; round < ROUNDS; round++) {
		emit_page(writable, round);
		wrong += stale(executable, round);
	}
	report("two mappings of one page", wrong, ROUNDS * FUNCTIONS_PER_PAGE);

	wrong = 0;
	for (int round = 0; round < ROUNDS; round++)
		for (int i = 0; i < FUNCTIONS_PER_PAGE; i++) {
			emit(writable + i * FUNCTION_SIZE, value_for(round, i));
			wrong += run(executable + i * FUNCTION_SIZE) != value_for(round, i);
		}
	report("two mappings, write and run in turn", wrong, ROUNDS * FUNCTIONS_PER_PAGE);

	/* Here the kernel writes, through its own mapping. */
	wrong = 0;
	for (int round = 0; round < ROUNDS; round++) {
		emit_page(buffer, round);
		if (pwrite(fd, buffer, PAGE, 0) != (ssize_t)PAGE) {
			perror("pwrite");
			_exit(1);
		}
		wrong += stale(executable, round);
	}
	report("pwrite into an executable mapping", wrong, ROUNDS * FUNCTIONS_PER_PAGE);
	munmap(writable, PAGE);
	munmap(executable, PAGE);
	close(fd);
}

static void write_and_execute_page(unsigned char *page)
{
	int wrong = 0;

	for (int round = 0; round < ROUNDS; round++) {
		emit_page(page, round);
		wrong += stale(page, round);
	}
	report("RWX page", wrong, ROUNDS * FUNCTIONS_PER_PAGE);

	/* Data and code on one page, as trampolines have it: the counter's writes must not lose code. */
	volatile int *counter = (volatile int *)(page + PAGE - sizeof(int));
	*counter = 0;
	emit(page, 1);
	for (int i = 0; i < ROUNDS * FUNCTIONS_PER_PAGE; i++)
		*counter += run(page);
	expect("data next to code", *counter == ROUNDS * FUNCTIONS_PER_PAGE, "counted %d of %d", *counter,
	       ROUNDS * FUNCTIONS_PER_PAGE);
}

static void patch_own_block(unsigned char *page)
{
	/* mov byte [rip+1], 42; mov eax, 1; ret: the first instruction patches the second one's operand. */
	static const unsigned char forward[] = { 0xc6, 0x05, 0x01, 0, 0, 0, 42, 0xb8, 1, 0, 0, 0, 0xc3 };
	/*
	 * xor eax, eax; mov ecx, 5; loop: add eax, 1; inc byte [rip-7]; dec ecx; jnz loop; ret: each turn
	 * raises the operand of the addition, so the sum is 1 + 2 + 3 + 4 + 5.
	 */
	static const unsigned char growing[] = { 0x31, 0xc0, 0xb9, 5, 0, 0, 0, 0x83, 0xc0, 1, 0xfe, 0x05,
						 0xf9, 0xff, 0xff, 0xff, 0xff, 0xc9, 0x75, 0xf3, 0xc3 };
	/*
	 * mov al, 0xc3; lea rdi, [rip+10]; mov ecx, 1; movzx eax, al; rep stosb; mov eax, 7; ret: the store puts
	 * a RET over the second last instruction.
	 */
	static const unsigned char string[] = { 0xb0, 0xc3, 0x48, 0x8d, 0x3d, 10, 0, 0, 0,   0xb9, 1,    0, 0,
						0,    0x0f, 0xb6, 0xc0, 0xf3, 0xaa, 0xb8, 7, 0, 0, 0, 0xc3 };
	int got;

	memcpy(page, forward, sizeof(forward));
	got = run(page);
	expect("patch the next instruction", got == 42, "returned %d, expected 42", got);

	memcpy(page, growing, sizeof(growing));
	got = run(page);
	expect("patch a loop from inside", got == 15, "returned %d, expected 15", got);

	memcpy(page, string, sizeof(string));
	got = run(page);
	expect("stos over the next instruction", got == 0xc3, "returned %#x, expected 0xc3", got);
}

static void patch_across_pages(void)
{
	unsigned char *pages = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	/* The operand of `mov eax` lies on the second page, its opcode on the first. */
	unsigned char *code = pages + PAGE - 1;
	int wrong = 0;

	for (int round = 0; round < ROUNDS; round++) {
		emit(code, round);
		wrong += run(code) != round;
		code[1] = (unsigned char)(round + 1);
		wrong += run(code) != round + 1;
	}
	report("an instruction on two pages", wrong, 2 * ROUNDS);
	munmap(pages, 2 * PAGE);
}

static void remap(void)
{
	int wrong = 0;

	for (int round = 0; round < ROUNDS; round++) {
		unsigned char *page = map(FIXED, PROT_READ | PROT_WRITE,
					  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1);
		emit_page(page, round);
		mprotect(page, PAGE, PROT_READ | PROT_EXEC);
		wrong += stale(page, round);
		munmap(page, PAGE);
	}
	report("new page at the same address", wrong, ROUNDS * FUNCTIONS_PER_PAGE);

	/* Two pages that trade places: same addresses, same bytes in memory, other translations. */
	unsigned char *first = map_private(PROT_READ | PROT_WRITE | PROT_EXEC);
	unsigned char *second = map_private(PROT_READ | PROT_WRITE | PROT_EXEC);
	emit(first, 1);
	emit(second, 2);
	wrong = run(first) != 1 || run(second) != 2;
	mremap(first, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, FIXED);
	mremap(second, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, first);
	mremap(FIXED, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, second);
	wrong += run(first) != 2;
	wrong += run(second) != 1;
	report("two code pages trade places", wrong, 2);
	munmap(first, PAGE);
	munmap(second, PAGE);
}

int main(void)
{
	catch_faults(on_fault);
	jit_switches_protection();
	write_through_alias();
	unsigned char *page = map_private(PROT_READ | PROT_WRITE | PROT_EXEC);
	write_and_execute_page(page);
	patch_own_block(page);
	patch_across_pages();
	remap();
	return summary("selfmod");
}
