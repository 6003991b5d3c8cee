/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Multiboot entry in 32-bit protected mode without paging, to C in 64-bit mode.
 *
 * The first 4 GiB are mapped three times, by 2 MiB pages that user mode cannot access: as they are, from
 * 0xffff800000000000, and (2 GiB of it) from 0xffffffff80000000, where an image with that KERNEL_BASE is linked.
 */
#define MULTIBOOT_HEADER_MAGIC 0x1badb002
/* Aligned modules, and a memory map. */
#define MULTIBOOT_HEADER_FLAGS 3
#define CR0_WANTED 0x80010033 /* PG, WP, NE, ET, MP, PE */
#define CR4_WANTED 0x620      /* OSXMMEXCPT, OSFXSR, PAE */
#define EFER 0xc0000080
#define EFER_WANTED 0x900     /* NXE, LME */
#define STACK_SIZE 16384
#define TABLE 7               /* present, writable, user */
#define LARGE_PAGE 0x83       /* present, writable, 2 MiB */
#define PHYS(symbol) (symbol - KERNEL_BASE)

	.section .multiboot, "a"
	.balign 4
	.long	MULTIBOOT_HEADER_MAGIC, MULTIBOOT_HEADER_FLAGS, -(MULTIBOOT_HEADER_MAGIC + MULTIBOOT_HEADER_FLAGS)

	.section .text
	.code32
	.globl start
start:
	cld
	cli
	movl	%eax, %edi
	movl	%ebx, %esi
	movl	$CR4_WANTED, %eax
	movl	%eax, %cr4
	movl	$PHYS(top_table), %eax
	movl	%eax, %cr3
	movl	$EFER, %ecx
	rdmsr
	orl	$EFER_WANTED, %eax
	wrmsr
	movl	$CR0_WANTED, %eax
	movl	%eax, %cr0
	lgdt	PHYS(gdt_pointer_32)
	ljmp	$8, $PHYS(in_long_mode)

	.code64
in_long_mode:
	movabsq	$in_place, %rax
	jmp	*%rax
in_place:
	lgdt	gdt_pointer
	movl	$0x10, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	xorl	%eax, %eax
	movl	%eax, %fs
	movl	%eax, %gs
	movq	$boot_stack_top, %rsp
	fninit
	call	start_c
	ud2

	.section .data
	.balign 4096
	.globl top_table
top_table:
	.quad	PHYS(pointers_low) + TABLE
	.zero	255 * 8
	.quad	PHYS(pointers_low) + TABLE
	.zero	254 * 8
	.quad	PHYS(pointers_high) + TABLE
pointers_low:
	.set	i, 0
	.rept	4
	.quad	PHYS(directories) + i * 4096 + TABLE
	.set	i, i + 1
	.endr
	.zero	508 * 8
pointers_high:
	.zero	510 * 8
	.quad	PHYS(directories) + TABLE
	.quad	PHYS(directories) + 4096 + TABLE
directories:
	.set	i, 0
	.rept	4 * 512
	.quad	(i << 21) + LARGE_PAGE
	.set	i, i + 1
	.endr

	/* In the order of enum selector in lib.h; SYSRET wants user segments as they are here. */
	.globl	gdt
	.balign	16
gdt:	.quad	0
	.quad	0x00af9b000000ffff /* kernel code, 64-bit */
	.quad	0x00cf93000000ffff /* kernel data */
	.quad	0x00cf9b000000ffff /* kernel code, 32-bit */
	.quad	0x00009b000000ffff /* kernel code, 16-bit */
	.quad	0x000093000000ffff /* kernel data, 16-bit */
	.quad	0x00cffb000000ffff /* user code, 32-bit */
	.quad	0x00cff3000000ffff /* user data */
	.quad	0x00affb000000ffff /* user code, 64-bit */
	.quad	0
	.zero	22 * 8
gdt_end:
gdt_pointer:
	.word	gdt_end - gdt - 1
	.quad	gdt
gdt_pointer_32:
	.word	gdt_end - gdt - 1
	.long	PHYS(gdt)

	.section .bss
	.balign 16
	.skip	STACK_SIZE
boot_stack_top:

	.section .note.GNU-stack, "", @progbits
