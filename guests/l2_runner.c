// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Runs a guest of its own under /dev/kvm: inside a virtual machine that is L2, and the kernel below is L1.
 *
 * L2 starts in real mode, enters long mode, moves to the upper half, and prints what it finds. Each way to talk to
 * its VMM is used: OUT, a string OUT, a store to where there is no memory, CPUID and HLT. Faults come to its own
 * handlers, and interrupts of L1's timer to L1. Where its CPUID has LASS it switches that on and looks into the lower
 * half; elsewhere CR4.LASS is reserved. With the argument "long" it starts in long mode at once.
 *
 * The VMM, this program, prints what L2 prints behind "L2: ", and ends with L2's status.
 */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <sys/ioctl.h>

/* Guest-physical addresses. One large page is L2's memory, and the next one is where there is none. */
enum {
	CODE = 0x1000,
	PAGE_TABLES = 0x8000,
	IDT = 0xc000,
	STACK_TOP = 0x80000,
	MEMORY_SIZE = 0x200000,
	TSS_FOR_KVM = 0x400000,
	PAGE_MAP_FOR_KVM = 0x404000,
};

enum { CONSOLE_PORT = 0xe9, LONG_MODE_CS = 0x08, DOORBELL = 0x21, SUCCESS = 42 };

/* Paging: one page-directory-pointer table is used by the first entries of both halves. */
enum { PTE_PRESENT = 1 << 0, PTE_WRITE = 1 << 1, PTE_PAGE_SIZE = 1 << 7, FIRST_OF_UPPER_HALF = 256 };
/* An interrupt gate, present, in the two words in the middle of a descriptor. */
enum { INTERRUPT_GATE = 0x8e00 };

#define MAX_CPUID_ENTRIES 256
#define RFLAGS_FIXED 2

/* Control register bits of long mode, and what its code segment has for its descriptor. */
#define CR0_PE_NE_PG 0x80000021UL
#define CR4_PAE 0x20
#define EFER_LME_LMA 0x500
#define LONG_MODE_CODE ((struct kvm_segment){ .limit = ~0U, .selector = LONG_MODE_CS, .type = 11, .present = 1, \
					      .s = 1, .l = 1, .g = 1 })

extern const unsigned char l2_start[], l2_end[], l2_long[], l2_gp[], l2_pf[];

/* L2. ADDRESS(label) is where a label is in its memory; UPPER is where that is mapped once more. */
asm("	.macro ADDRESS name, label\n"
    "	.set \\name, \\label - l2_start + 0x1000\n"
    "	.endm\n"
    "	.macro PRINT text\n"
    "	lea \\text(%rip), %rsi\n"
    "	call l2_print\n"
    "	.endm\n"
    "	.set UPPER, 0xffff800000000000\n"

    "	.pushsection .rodata\n"
    "l2_start:\n"
    "	.code16\n"
    "	mov $l2_real_text_address, %si\n"
    "1:	lodsb\n"
    "	test %al, %al\n"
    "	jz 2f\n"
    "	out %al, $0xe9\n"
    "	jmp 1b\n"
    /* PAE, the tables, EFER.LME; then protection and paging at once. */
    "2:	mov $0x20, %eax\n"
    "	mov %eax, %cr4\n"
    "	mov $0x8000, %eax\n"
    "	mov %eax, %cr3\n"
    "	mov $0xc0000080, %ecx\n"
    "	rdmsr\n"
    "	or $0x100, %eax\n"
    "	wrmsr\n"
    "	lgdtl l2_gdt_pointer_address\n"
    "	mov %cr0, %eax\n"
    "	or $0x80000001, %eax\n"
    "	mov %eax, %cr0\n"
    "	ljmpl $8, $l2_long_address\n"

    "	.code64\n"
    "l2_long:\n"
    "	xor %eax, %eax\n"
    "	mov %eax, %ds\n"
    "	mov %eax, %es\n"
    "	mov %eax, %ss\n"
    "	movabs $UPPER, %rbp\n"
    "	lea l2_upper_address(%rbp), %rax\n"
    "	jmp *%rax\n"
    "l2_upper:\n"
    "	lea 0x80000(%rbp), %rsp\n"
    /* Descriptor tables in the upper half too. */
    "	lea l2_gdt(%rip), %rax\n"
    "	mov %rax, l2_gdt_pointer + 2(%rip)\n"
    "	lgdt l2_gdt_pointer(%rip)\n"
    "	lidt l2_idt_pointer(%rip)\n"
    "	PRINT l2_long_text\n"

    "	lea l2_string_text(%rip), %rsi\n"
    "	mov $l2_string_size, %ecx\n"
    "	mov $0xe9, %edx\n"
    "	rep outsb\n"

    /* The hypervisor's name, in three words. */
    "	mov $0x40000000, %eax\n"
    "	cpuid\n"
    "	mov %ebx, l2_name(%rip)\n"
    "	mov %ecx, l2_name + 4(%rip)\n"
    "	mov %edx, l2_name + 8(%rip)\n"
    "	PRINT l2_name_text\n"
    "	PRINT l2_end_of_line\n"

    /* Nothing is mapped behind the doorbell. R12 says where to go on after a fault. */
    "	xor %r15d, %r15d\n"
    "	lea 3f(%rip), %r12\n"
    "	mov 0x400000(%rbp), %al\n"
    "3:	cmp $14, %r15d\n"
    "	jne l2_bad\n"
    "	mov %cr2, %rax\n"
    "	sub %rbp, %rax\n"
    "	cmp $0x400000, %rax\n"
    "	jne l2_bad\n"
    "	PRINT l2_page_fault_text\n"

    "	movb $0x21, 0x200000(%rbp)\n"

    /* Long enough for interrupts of L1's timer. */
    "	mov $10000000, %ecx\n"
    "9:	dec %ecx\n"
    "	jnz 9b\n"

    /* CR4.LASS, CPUID.(7,1):EAX[6]. */
    "	mov $7, %eax\n"
    "	mov $1, %ecx\n"
    "	cpuid\n"
    "	mov %eax, %r13d\n"
    "	mov %cr4, %rax\n"
    "	bts $27, %rax\n"
    "	xor %r15d, %r15d\n"
    "	lea 4f(%rip), %r12\n"
    "	mov %rax, %cr4\n"
    "	bt $6, %r13d\n"
    "	jnc l2_bad\n"
    "	lea 5f(%rip), %r12\n"
    "	mov 0x1000, %eax\n"
    "	jmp l2_bad\n"
    "5:	cmp $13, %r15d\n"
    "	jne l2_bad\n"
    "	test %r14, %r14\n"
    "	jne l2_bad\n"
    "	mov 0x1000(%rbp), %eax\n"
    "	PRINT l2_lass_text\n"
    "	jmp 6f\n"
    "4:	bt $6, %r13d\n"
    "	jc l2_bad\n"
    "	cmp $13, %r15d\n"
    "	jne l2_bad\n"
    "	PRINT l2_no_lass_text\n"

    "6:	mov $42, %eax\n"
    "	hlt\n"
    "l2_bad:\n"
    "	PRINT l2_bad_text\n"
    "	mov $1, %eax\n"
    "	hlt\n"

    /* Vector and error code go to R15 and R14. */
    "l2_gp:	mov $13, %r15d\n"
    "	jmp 7f\n"
    "l2_pf:	mov $14, %r15d\n"
    "7:	pop %r14\n"
    "	mov %r12, (%rsp)\n"
    "	iretq\n"

    "l2_print:\n"
    "	lodsb\n"
    "	test %al, %al\n"
    "	jz 8f\n"
    "	out %al, $0xe9\n"
    "	jmp l2_print\n"
    "8:	ret\n"

    "	.balign 8\n"
    "l2_gdt:	.quad 0, 0x00209a0000000000\n"
    "l2_gdt_pointer:	.word 15\n"
    "	.quad l2_gdt_address\n"
    "l2_idt_pointer:	.word 255\n"
    "	.quad UPPER + 0xc000\n"
    "l2_real_text:	.asciz \"real mode\\n\"\n"
    "l2_long_text:	.asciz \"long mode, upper half\\n\"\n"
    "l2_string_text:	.ascii \"a string by one OUTS\\n\"\n"
    "	.set l2_string_size, . - l2_string_text\n"
    "l2_name_text:	.ascii \"CPUID names \"\n"
    "l2_name:	.zero 13\n"
    "l2_end_of_line:	.asciz \"\\n\"\n"
    "l2_page_fault_text:	.asciz \"#PF arrives at its handler\\n\"\n"
    "l2_lass_text:	.asciz \"LASS refuses a supervisor read of the lower half\\n\"\n"
    "l2_no_lass_text:	.asciz \"LASS is not offered, CR4.LASS is reserved\\n\"\n"
    "l2_bad_text:	.asciz \"not as expected\\n\"\n"
    "l2_end:\n"
    "	ADDRESS l2_real_text_address, l2_real_text\n"
    "	ADDRESS l2_gdt_address, l2_gdt\n"
    "	ADDRESS l2_gdt_pointer_address, l2_gdt_pointer\n"
    "	ADDRESS l2_long_address, l2_long\n"
    "	ADDRESS l2_upper_address, l2_upper\n"
    "	.popsection\n");

/* ioctl() on what `what` names; the program ends when it fails. */
static int request(int descriptor, unsigned long number, unsigned long argument, const char *what)
{
	int result = ioctl(descriptor, number, argument);

	if (result < 0) {
		printf("%s: %s\n", what, strerror(errno));
		exit(1);
	}
	return result;
}

#define REQUEST(descriptor, number, argument) request(descriptor, number, (unsigned long)(argument), #number)

static void write_gate(unsigned char *memory, int vector, const unsigned char *handler)
{
	uint64_t address = 0xffff800000000000UL + CODE + (handler - l2_start);
	uint64_t *gate = (uint64_t *)(memory + IDT) + 2 * vector;

	gate[0] = (address & 0xffff) | (uint64_t)LONG_MODE_CS << 16 | (uint64_t)INTERRUPT_GATE << 32 |
		  (address >> 16 & 0xffff) << 48;
	gate[1] = address >> 32;
}

static void fill_memory(unsigned char *memory)
{
	uint64_t *top = (uint64_t *)(memory + PAGE_TABLES);
	uint64_t *pointers = top + PAGE / sizeof(*top), *directory = pointers + PAGE / sizeof(*top);

	memcpy(memory + CODE, l2_start, l2_end - l2_start);
	top[0] = top[FIRST_OF_UPPER_HALF] = (PAGE_TABLES + PAGE) | PTE_PRESENT | PTE_WRITE;
	pointers[0] = (PAGE_TABLES + 2 * PAGE) | PTE_PRESENT | PTE_WRITE;
	directory[0] = PTE_PRESENT | PTE_WRITE | PTE_PAGE_SIZE;
	directory[1] = MEMORY_SIZE | PTE_PRESENT | PTE_WRITE | PTE_PAGE_SIZE;
	write_gate(memory, TRAP_GP, l2_gp);
	write_gate(memory, TRAP_PF, l2_pf);
}

/* The features that L1 can give: whether LASS is among them goes to standard output. */
static void set_cpuid(int system, int vcpu)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[MAX_CPUID_ENTRIES];
	} cpuid = { .head.nent = MAX_CPUID_ENTRIES };
	bool lass = false;

	REQUEST(system, KVM_GET_SUPPORTED_CPUID, &cpuid);
	REQUEST(vcpu, KVM_SET_CPUID2, &cpuid);
	for (unsigned int i = 0; i < cpuid.head.nent; i++)
		if (cpuid.entries[i].function == 7 && cpuid.entries[i].index == 1)
			lass = cpuid.entries[i].eax >> 6 & 1;
	printf("L1: KVM offers %s to L2\n", lass ? "LASS" : "no LASS");
}

static void set_registers(int vcpu, bool in_long_mode)
{
	struct kvm_regs regs = { .rip = CODE, .rflags = RFLAGS_FIXED };
	struct kvm_sregs sregs;

	REQUEST(vcpu, KVM_GET_SREGS, &sregs);
	sregs.cs.base = sregs.cs.selector = 0;
	if (in_long_mode) {
		sregs.cr0 = CR0_PE_NE_PG;
		sregs.cr3 = PAGE_TABLES;
		sregs.cr4 = CR4_PAE;
		sregs.efer = EFER_LME_LMA;
		sregs.cs = LONG_MODE_CODE;
		regs.rip += l2_long - l2_start;
	}
	REQUEST(vcpu, KVM_SET_SREGS, &sregs);
	REQUEST(vcpu, KVM_SET_REGS, &regs);
}

/* Print a character of L2's; its lines start with its name. */
static void print(char character)
{
	static bool inside;

	if (!inside)
		fputs("L2: ", stdout);
	inside = character != '\n';
	putchar(character);
}

static bool is_console(const struct kvm_run *run)
{
	return run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT && run->io.size == 1 &&
	       run->io.port == CONSOLE_PORT;
}

static bool is_doorbell(const struct kvm_run *run)
{
	return run->exit_reason == KVM_EXIT_MMIO && run->mmio.is_write && run->mmio.len == 1 &&
	       run->mmio.phys_addr == MEMORY_SIZE && run->mmio.data[0] == DOORBELL;
}

/* How many interrupts of its local timer L1 has taken. */
static unsigned long timer_interrupts(void)
{
	char line[512];
	FILE *interrupts = fopen("/proc/interrupts", "r");
	unsigned long count = 0;

	if (!interrupts) {
		perror("/proc/interrupts");
		exit(1);
	}
	while (fgets(line, sizeof(line), interrupts))
		if (sscanf(line, " LOC: %lu", &count) == 1)
			break;
	fclose(interrupts);
	return count;
}

/* Run L2 until it halts; whether it does so with another status than SUCCESS. */
static int run_guest(int vcpu, struct kvm_run *run)
{
	struct kvm_regs regs;

	while (REQUEST(vcpu, KVM_RUN, 0) == 0 && run->exit_reason != KVM_EXIT_HLT) {
		if (is_console(run)) {
			const char *text = (const char *)run + run->io.data_offset;

			for (unsigned int i = 0; i < run->io.count; i++)
				print(text[i]);
		} else if (is_doorbell(run)) {
			puts("L1: L2 rings the doorbell");
		} else {
			REQUEST(vcpu, KVM_GET_REGS, &regs);
			printf("L1: exit %u at %llx, details %llx %llx\n", run->exit_reason, regs.rip,
			       run->hw.hardware_exit_reason, run->internal.data[0]);
			return 1;
		}
	}
	REQUEST(vcpu, KVM_GET_REGS, &regs);
	printf("L1: L2 halts with status %llu\n", regs.rax);
	return regs.rax != SUCCESS;
}

int main(int argc, char **argv)
{
	int system, vm, vcpu, failed;
	unsigned long ticks;
	uint64_t page_map = PAGE_MAP_FOR_KVM;
	unsigned char *memory;
	struct kvm_run *run;

	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("L1: LASS is %s\n", has_cpu_flag("lass") ? "on" : "off");
	system = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (system < 0) {
		perror("/dev/kvm");
		return 1;
	}
	vm = REQUEST(system, KVM_CREATE_VM, 0);
	REQUEST(vm, KVM_SET_TSS_ADDR, TSS_FOR_KVM);
	REQUEST(vm, KVM_SET_IDENTITY_MAP_ADDR, &page_map);
	memory = mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	fill_memory(memory);
	REQUEST(vm, KVM_SET_USER_MEMORY_REGION,
		&((struct kvm_userspace_memory_region){ .memory_size = MEMORY_SIZE,
							.userspace_addr = (uintptr_t)memory }));
	vcpu = REQUEST(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, REQUEST(system, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	set_cpuid(system, vcpu);
	ticks = timer_interrupts();
	set_registers(vcpu, argc > 1 && !strcmp(argv[1], "long"));
	failed = run_guest(vcpu, run);
	printf("L1: its timer has %s meanwhile\n", timer_interrupts() > ticks ? "interrupted" : "not interrupted");
	return failed;
}
