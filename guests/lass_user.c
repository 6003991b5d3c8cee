// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What user mode meets at supervisor addresses, with LASS and without.
 *
 * With LASS on, every access to the upper half is refused before paging: trap 13 with error 0, or trap 12
 * with error 0 for stack accesses, whatever the page tables say. With LASS off the same access reaches
 * paging: trap 14. Which of the two to expect comes from the `lass` word of /proc/cpuinfo.
 * Non-canonical addresses give trap 13 or 12 and unmapped lower-half addresses trap 14, either way.
 */
#include "guest.h"

#include <asm/prctl.h>
#include <cpuid.h>
#include <errno.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/*
 * The lowest upper-half address, and the places Linux uses with four-level paging and no KASLR
 * (Documentation/arch/x86/x86_64/mm.rst of the kernel).
 */
#define UPPER 0xffff800000000000UL
#define DIRECT_MAP 0xffff888000000000UL
#define KERNEL_TEXT 0xffffffff81000000UL
#define KERNEL_DATA 0xffffffff82000000UL
#define VSYSCALL 0xffffffffff600000UL
#define TOP_BYTE 0xffffffffffffffffUL

/* Non-canonical with 48 and with 57 address bits, one in each half. */
#define HOLE_LOW 0x4000000000001000UL
#define HOLE_HIGH 0x8000000000001000UL
/* Four bytes below the end of the canonical lower half, and below the canonical upper half. */
#define LOWER_END 0x00007ffffffffffcUL
#define HOLE_END 0xffff7ffffffffffcUL
/* Canonical lower-half addresses where no program has anything mapped. */
#define NULL_PAGE 0x10UL
#define UNMAPPED 0x123456789000UL

/* What an instruction does at its address decides which exception a refusal becomes. */
enum kind { DATA, STACK, FETCH, NOTHING };

struct access {
	const char *name;
	void (*run)(unsigned long address);
	unsigned long address;
	unsigned int size;
	enum kind kind;
};

static bool lass;
static int address_bits;
static unsigned long fs_base;

/* One instruction on (%rax); the result registers are scratch. */
#define AT_RAX(name, instructions)                                                                     \
	static void name(unsigned long address)                                                        \
	{                                                                                              \
		asm volatile("mov %%rsp, %%r8\n\tlea -256(%%rsp), %%rsp\n\t" instructions              \
			     "\n\tcld\n\tmov %%r8, %%rsp"                                              \
			     : "+a"(address)                                                           \
			     :                                                                         \
			     : "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "xmm0", "memory", "cc"); \
	}

/* One instruction with RSP moved to `address` plus an offset: 0 for pops, 8 for pushes. */
#define AT_RSP(name, offset, instructions)                                                             \
	static void name(unsigned long address)                                                        \
	{                                                                                              \
		asm volatile("mov %%rsp, %%r8\n\tmov %%rbp, %%r9\n\tlea " #offset "(%%rax), %%rsp\n\t" \
			     instructions "\n\tmov %%r8, %%rsp\n\tmov %%r9, %%rbp"                     \
			     : "+a"(address)                                                           \
			     :                                                                         \
			     : "rbx", "rcx", "rdx", "r8", "r9", "memory", "cc");                       \
	}

/* One instruction with RBP = `address` plus an offset, and a good stack. */
#define AT_RBP(name, offset, instructions)                                                      \
	static void name(unsigned long address)                                                 \
	{                                                                                       \
		asm volatile("mov %%rsp, %%r8\n\tmov %%rbp, %%r9\n\tlea -256(%%rsp), %%rsp\n\t" \
			     "lea " #offset "(%%rax), %%rbp\n\t" instructions                   \
			     "\n\tmov %%r8, %%rsp\n\tmov %%r9, %%rbp"                           \
			     : "+a"(address)                                                    \
			     : "d"(fs_base)                                                     \
			     : "rbx", "rcx", "r8", "r9", "memory", "cc");                       \
	}

AT_RAX(read1, "movb (%%rax), %%cl")
AT_RAX(read2, "movw (%%rax), %%cx")
AT_RAX(read4, "movl (%%rax), %%ecx")
AT_RAX(read8, "movq (%%rax), %%rcx")
AT_RAX(write1, "movb %%cl, (%%rax)")
AT_RAX(write2, "movw %%cx, (%%rax)")
AT_RAX(write4, "movl %%ecx, (%%rax)")
AT_RAX(write8, "movq %%rcx, (%%rax)")
AT_RAX(add_memory, "addl $1, (%%rax)")
AT_RAX(lock_inc, "lock incl (%%rax)")
AT_RAX(exchange, "xchgq %%rcx, (%%rax)")
AT_RAX(compare_exchange_16, "mov %%rax, %%rsi\n\tlock cmpxchg16b (%%rsi)")
AT_RAX(movaps_load, "movaps (%%rax), %%xmm0")
AT_RAX(movaps_store, "movaps %%xmm0, (%%rax)")
AT_RAX(fxsave, "fxsave64 (%%rax)")
AT_RAX(fxrstor, "fxrstor64 (%%rax)")
AT_RAX(ldmxcsr, "ldmxcsr (%%rax)")
AT_RAX(x87_load, "fldl (%%rax)\n\tfstp %%st(0)")
AT_RAX(x87_environment, "fnstenv (%%rax)")
AT_RAX(lods, "mov %%rax, %%rsi\n\tlodsq")
AT_RAX(lods_backwards, "mov %%rax, %%rsi\n\tstd\n\tlodsq")
AT_RAX(stos, "mov %%rax, %%rdi\n\tstosq")
AT_RAX(scas, "mov %%rax, %%rdi\n\tscasq")
AT_RAX(cmps, "mov %%rax, %%rdi\n\tmov %%rsp, %%rsi\n\tcmpsb")
AT_RAX(movs_source, "mov %%rax, %%rsi\n\tmov %%rsp, %%rdi\n\tmovsb")
AT_RAX(movs_destination, "mov %%rax, %%rdi\n\tmov %%rsp, %%rsi\n\tmovsb")
AT_RAX(rep_movs_source, "mov %%rax, %%rsi\n\tmov %%rsp, %%rdi\n\tmov $16, %%ecx\n\trep movsb")
AT_RAX(rep_stos, "mov %%rax, %%rdi\n\tmov $16, %%ecx\n\trep stosb")
AT_RAX(xlat, "mov %%rax, %%rbx\n\txor %%eax, %%eax\n\txlatb")
AT_RAX(push_from_memory, "pushq (%%rax)")
AT_RAX(pop_to_memory, "popq (%%rax)")
AT_RAX(call_through_memory, "call *(%%rax)")
AT_RAX(jump_through_memory, "jmp *(%%rax)")
AT_RAX(far_jump_through_memory, "ljmpl *(%%rax)")
AT_RAX(index_rbp, "mov %%rbp, %%r9\n\tmov %%rax, %%rbp\n\txor %%ecx, %%ecx\n\t"
		  "movq (%%rcx,%%rbp), %%rcx\n\tmov %%r9, %%rbp")
AT_RAX(ss_override, ".byte 0x36\n\tmovq (%%rax), %%rcx")
AT_RAX(clflush, "clflush (%%rax)")
AT_RAX(clflushopt, "clflushopt (%%rax)")
AT_RAX(clwb, "clwb (%%rax)")
AT_RAX(prefetcht0, "prefetcht0 (%%rax)")
AT_RAX(prefetchnta, "prefetchnta (%%rax)")
AT_RAX(long_nop, "nopl (%%rax)")
AT_RAX(load_address, "lea (%%rax), %%rcx")
AT_RAX(lsl, "lsl %%rax, %%rcx")
AT_RAX(lar, "lar %%rax, %%rcx")
AT_RAX(empty_movs_source, "mov %%rax, %%rsi\n\tmov %%rsp, %%rdi\n\txor %%ecx, %%ecx\n\trep movsb")
AT_RAX(empty_movs_destination, "mov %%rax, %%rdi\n\tmov %%rsp, %%rsi\n\txor %%ecx, %%ecx\n\trep movsb")
AT_RAX(empty_movs_backwards, "mov %%rax, %%rdi\n\tmov %%rax, %%rsi\n\txor %%ecx, %%ecx\n\tstd\n\trep movsb")
AT_RAX(jump, "jmp *%%rax")
AT_RAX(call, "call *%%rax")
AT_RAX(return_to, "pushq %%rax\n\tret")

AT_RSP(push, 8, "pushq %%rcx")
AT_RSP(push_flags, 8, "pushfq")
AT_RSP(push_fs, 8, "pushq %%fs")
AT_RSP(call_pushes, 8, "call 1f\n1:")
AT_RSP(enter, 8, "enter $16, $0")
AT_RSP(pop, 0, "popq %%rcx")
AT_RSP(pop_flags, 0, "popfq")
AT_RSP(ret, 0, "ret")
AT_RSP(iret, 0, "iretq")
AT_RSP(read_at_rsp, 0, "movq (%%rsp), %%rcx")
AT_RBP(leave, 0, "leave")
AT_RBP(enter_nested, 8, "enter $0, $2")
AT_RBP(read_at_rbp, 0, "movq (%%rbp), %%rcx")
AT_RBP(write_at_rbp, -8, "movq %%rcx, 8(%%rbp)")
AT_RBP(ds_override_rbp, 0, ".byte 0x3e\n\tmovq (%%rbp), %%rcx")
AT_RBP(fs_override_rbp, 0, "sub %%rdx, %%rbp\n\tmovq %%fs:(%%rbp), %%rcx")
AT_RBP(fs_override_rax, 0, "sub %%rdx, %%rax\n\tmovq %%fs:(%%rax), %%rcx")

static const struct access accesses[] = {
	{ "read 1 byte", read1, UPPER, 1, DATA },
	{ "read 2 bytes", read2, UPPER, 2, DATA },
	{ "read 4 bytes", read4, UPPER, 4, DATA },
	{ "read 8 bytes", read8, UPPER, 8, DATA },
	{ "write 1 byte", write1, UPPER, 1, DATA },
	{ "write 2 bytes", write2, UPPER, 2, DATA },
	{ "write 4 bytes", write4, UPPER, 4, DATA },
	{ "write 8 bytes", write8, UPPER, 8, DATA },
	{ "read the direct map", read8, DIRECT_MAP, 8, DATA },
	{ "write the direct map", write8, DIRECT_MAP, 8, DATA },
	{ "read kernel text", read8, KERNEL_TEXT, 8, DATA },
	{ "write kernel text", write8, KERNEL_TEXT, 8, DATA },
	{ "write kernel data", write8, KERNEL_DATA, 8, DATA },
	{ "read the vsyscall page", read8, VSYSCALL, 8, DATA },
	{ "read the last byte", read1, TOP_BYTE, 1, DATA },
	{ "add to memory", add_memory, UPPER, 4, DATA },
	{ "lock inc", lock_inc, UPPER, 4, DATA },
	{ "xchg", exchange, UPPER, 8, DATA },
	{ "lock cmpxchg16b", compare_exchange_16, UPPER, 16, DATA },
	{ "movaps load", movaps_load, UPPER, 16, DATA },
	{ "movaps store", movaps_store, UPPER, 16, DATA },
	{ "fxsave", fxsave, UPPER, 512, DATA },
	{ "fxrstor", fxrstor, UPPER, 512, DATA },
	{ "ldmxcsr", ldmxcsr, UPPER, 4, DATA },
	{ "fld", x87_load, UPPER, 8, DATA },
	{ "fnstenv", x87_environment, UPPER, 28, DATA },
	{ "lods", lods, UPPER, 8, DATA },
	{ "lods with DF=1", lods_backwards, UPPER, 8, DATA },
	{ "stos", stos, UPPER, 8, DATA },
	{ "scas", scas, UPPER, 8, DATA },
	{ "cmps", cmps, UPPER, 1, DATA },
	{ "movs from", movs_source, UPPER, 1, DATA },
	{ "movs to", movs_destination, UPPER, 1, DATA },
	{ "rep movs from", rep_movs_source, UPPER, 16, DATA },
	{ "rep stos", rep_stos, UPPER, 16, DATA },
	{ "xlat", xlat, UPPER, 1, DATA },
	{ "push [mem]", push_from_memory, UPPER, 8, DATA },
	{ "pop [mem]", pop_to_memory, UPPER, 8, DATA },
	{ "call [mem]", call_through_memory, UPPER, 8, DATA },
	{ "jmp [mem]", jump_through_memory, UPPER, 8, DATA },
	{ "far jmp [mem]", far_jump_through_memory, UPPER, 6, DATA },
	{ "rbp as the index only", index_rbp, UPPER, 8, DATA },
	{ "ss: override is ignored", ss_override, UPPER, 8, DATA },
	{ "fs:[rax]", fs_override_rax, UPPER, 8, DATA },
	{ "fs:[rbp] is no stack access", fs_override_rbp, UPPER, 8, DATA },
	{ "clflush", clflush, UPPER, 1, DATA },
	{ "clflushopt", clflushopt, UPPER, 1, DATA },
	{ "clwb", clwb, UPPER, 1, DATA },

	{ "push", push, UPPER, 8, STACK },
	{ "pushf", push_flags, UPPER, 8, STACK },
	{ "push fs", push_fs, UPPER, 8, STACK },
	{ "call, rsp there", call_pushes, UPPER, 8, STACK },
	{ "enter, rsp there", enter, UPPER, 8, STACK },
	{ "enter nested, rbp there", enter_nested, UPPER, 8, STACK },
	{ "pop", pop, UPPER, 8, STACK },
	{ "popf", pop_flags, UPPER, 8, STACK },
	{ "ret, rsp there", ret, UPPER, 8, STACK },
	{ "leave, rbp there", leave, UPPER, 8, STACK },
	{ "read [rsp]", read_at_rsp, UPPER, 8, STACK },
	{ "read [rbp]", read_at_rbp, UPPER, 8, STACK },
	{ "write [rbp+8]", write_at_rbp, UPPER, 8, STACK },
	{ "ds: override is ignored", ds_override_rbp, UPPER, 8, STACK },

	{ "jmp", jump, UPPER, 1, FETCH },
	{ "call", call, UPPER, 1, FETCH },
	{ "ret", return_to, UPPER, 1, FETCH },
	{ "jmp to kernel text", jump, KERNEL_TEXT, 1, FETCH },
	{ "call kernel text", call, KERNEL_TEXT, 1, FETCH },
	{ "ret to kernel text", return_to, KERNEL_TEXT, 1, FETCH },
	{ "jmp into the vsyscall page", jump, VSYSCALL + 1, 1, FETCH },

	{ "prefetcht0", prefetcht0, UPPER, 1, NOTHING },
	{ "prefetchnta", prefetchnta, KERNEL_TEXT, 1, NOTHING },
	{ "nop [mem]", long_nop, UPPER, 4, NOTHING },
	{ "lea", load_address, UPPER, 8, NOTHING },
	{ "lsl reads the GDT as the system", lsl, 0x2b, 8, NOTHING },
	{ "lar reads the GDT as the system", lar, 0x33, 8, NOTHING },
	{ "rep movs from, rcx=0", empty_movs_source, UPPER, 1, NOTHING },
	{ "rep movs to, rcx=0", empty_movs_destination, UPPER, 1, NOTHING },
	{ "rep movs, DF=1, rcx=0", empty_movs_backwards, UPPER, 1, NOTHING },

	{ "read non-canonical", read8, HOLE_LOW, 8, DATA },
	{ "read non-canonical", read8, HOLE_HIGH, 8, DATA },
	{ "write non-canonical", write8, HOLE_HIGH, 8, DATA },
	{ "push non-canonical", push, HOLE_HIGH, 8, STACK },
	{ "pop non-canonical", pop, HOLE_LOW, 8, STACK },
	{ "read [rbp] non-canonical", read_at_rbp, HOLE_LOW, 8, STACK },
	{ "push [mem] non-canonical", push_from_memory, HOLE_LOW, 8, DATA },
	{ "pop [mem] non-canonical", pop_to_memory, HOLE_LOW, 8, DATA },
	{ "call [mem] non-canonical", call_through_memory, HOLE_HIGH, 8, DATA },
	{ "ss: override, non-canonical", ss_override, HOLE_HIGH, 8, DATA },
	{ "ds: override, non-canonical", ds_override_rbp, HOLE_HIGH, 8, STACK },
	{ "fs:[rbp] non-canonical", fs_override_rbp, HOLE_HIGH, 8, DATA },
	{ "read out of the lower half", read8, LOWER_END, 8, DATA },
	{ "read [rbp] out of the lower half", read_at_rbp, LOWER_END, 8, STACK },
	{ "read into the upper half", read8, HOLE_END, 8, DATA },

	{ "read the null page", read8, NULL_PAGE, 8, DATA },
	{ "read unmapped", read8, UNMAPPED, 8, DATA },
	{ "write unmapped", write8, UNMAPPED, 8, DATA },
	{ "push unmapped", push, UNMAPPED, 8, STACK },
	{ "read [rbp] unmapped", read_at_rbp, UNMAPPED, 8, STACK },
	{ "jmp unmapped", jump, UNMAPPED, 1, FETCH },
};

/*
 * An emulator may read IRET's frame with the rights of the system. Linux then takes the fault for its own
 * and kills the process: this access runs in a child, so that the others can be judged all the same.
 */
static const struct access iret_access = { "iret, rsp there", iret, UPPER, 40, STACK };

static bool canonical(unsigned long address)
{
	int unused = 64 - address_bits;

	return (unsigned long)((long)(address << unused) >> unused) == address;
}

/* The one rule of this program: canonical check, then LASS, then paging. */
static enum trap expected_trap(const struct access *access)
{
	unsigned long last = access->address + access->size - 1;
	bool refused;

	if (access->kind == NOTHING)
		return TRAP_NONE;
	refused = !canonical(access->address) || !canonical(last);
	refused |= lass && (long)access->address < 0;
	if (!refused)
		return TRAP_PF;
	return access->kind == STACK ? TRAP_SS : TRAP_GP;
}

static bool as_expected(const struct access *access, enum trap trap)
{
	if (fault.trap != trap)
		return false;
	if (access->kind == FETCH && fault.rip != access->address)
		return false;
	if (trap == TRAP_GP || trap == TRAP_SS)
		return fault.error == 0;
	if (trap == TRAP_NONE)
		return true;
	if (!(fault.error & PF_USER) || !(fault.error & PF_FETCH) != (access->kind != FETCH))
		return false;
	/* Linux emulates calls into the vsyscall page and reports no CR2 for a jump it refuses there. */
	if (access->kind == FETCH && access->address / PAGE == VSYSCALL / PAGE)
		return true;
	return fault.cr2 - access->address < access->size;
}

static const char *describe(char *text, size_t size, long trap, unsigned long error)
{
	if (trap == TRAP_NONE)
		snprintf(text, size, "no fault");
	else if (trap == TRAP_PF)
		snprintf(text, size, "trap %ld", trap);
	else
		snprintf(text, size, "trap %ld error %lu", trap, error);
	return text;
}

static void check(const struct access *access)
{
	enum trap trap = expected_trap(access);
	char expected[32], got[32];

	CATCH(access->run(access->address));
	expect(access->name, as_expected(access, trap), "%016lx  expected %-15s  got %-15s  rip %lx cr2 %lx",
	       access->address, describe(expected, sizeof(expected), trap, 0),
	       describe(got, sizeof(got), fault.trap, fault.error), fault.rip, fault.cr2);
}

static bool supported(const struct access *access)
{
	unsigned int eax, ebx = 0, ecx, edx;

	if (access->run != clflushopt && access->run != clwb)
		return true;
	__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
	return ebx & (access->run == clwb ? bit_CLWB : bit_CLFLUSHOPT);
}

static void check_in_child(const struct access *access)
{
	pid_t child = fork();
	int status = 0;

	if (child == 0) {
		failures = 0;
		check(access);
		_exit(failures);
	}
	waitpid(child, &status, 0);
	if (WIFEXITED(status)) {
		expectations++;
		failures += WEXITSTATUS(status);
	} else {
		expect(access->name, false, "%016lx  killed by signal %d", access->address, WTERMSIG(status));
	}
}

int main(void)
{
	long written;

	lass = has_cpu_flag("lass");
	address_bits = has_cpu_flag("la57") ? 57 : 48;
	syscall(SYS_arch_prctl, ARCH_GET_FS, &fs_base);
	catch_faults(on_fault);
	printf("LASS is %s, linear addresses have %d bits\n", lass ? "on" : "off", address_bits);

	for (size_t i = 0; i < sizeof(accesses) / sizeof(accesses[0]); i++)
		if (supported(&accesses[i]))
			check(&accesses[i]);
	check_in_child(&iret_access);

	written = write(STDOUT_FILENO, (void *)KERNEL_TEXT, 1);
	expect("write(2) from kernel text", written == -1 && errno == EFAULT, "%016lx  returned %ld, %s",
	       KERNEL_TEXT, written, strerror(errno));
	return summary("lass_user");
}
