/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From 64-bit mode to real mode, into a few instructions of the test, and back. The code between real_start and
 * real_end is copied to REAL_BASE; the test's instructions are at REAL_CODE and end by a near RET.
 */
#define REAL_BASE 0x8000
#define REAL_CODE 0x9000
#define REAL_STACK 0x7000
/* The registers to load and those that were found: struct real_registers in realmode.c. */
#define REGISTERS 0x6000
#define FOUND (REGISTERS + 32)
#define FOUND_ESP (REGISTERS + 64)
#define FOUND_VECTOR (REGISTERS + 72)
#define FOUND_IP (REGISTERS + 76)
#define NO_VECTOR 0xffffffff
#define VECTORS 64
#define EFER 0xc0000080
#define EFER_LME 0x100
#define CR0_PE 1
#define CR0_PG 0x80000000
#define KERNEL_CS 0x08
#define KERNEL_DS 0x10
#define KERNEL_CS16 0x20
#define KERNEL_DS16 0x28
#define LOW(label) (label - real_start + REAL_BASE)

	.section .text
	.code64
	.globl	enter_real_mode
enter_real_mode:
	pushq	%rbx
	pushq	%rbp
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	movq	%rsp, stack_of_long_mode
	pushq	$KERNEL_CS16
	pushq	$LOW(to_real)
	lretq

back_in_long_mode:
	movl	$KERNEL_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	xorl	%eax, %eax
	movl	%eax, %fs
	movl	%eax, %gs
	movq	stack_of_long_mode, %rsp
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%rbp
	popq	%rbx
	ret

	.section .bss
	.balign 8
stack_of_long_mode:
	.skip	8

	.section .rodata
	.globl	real_start, real_end
	.code16
real_start:
to_real:
	movw	$KERNEL_DS16, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movw	%ax, %fs
	movw	%ax, %gs
	movl	%cr0, %eax
	andl	$~CR0_PG, %eax
	movl	%eax, %cr0
	movl	$EFER, %ecx
	rdmsr
	andl	$~EFER_LME, %eax
	wrmsr
	movl	%cr0, %eax
	andl	$~CR0_PE, %eax
	movl	%eax, %cr0
	ljmp	$0, $LOW(in_real)
in_real:
	xorw	%ax, %ax
	movw	%ax, %ss
	movl	$REAL_STACK, %esp
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %fs
	movw	%ax, %gs
	lidtw	LOW(vectors_pointer)
	/* The test's registers, flags first. */
	pushl	REGISTERS + 28
	popfl
	movl	REGISTERS + 4, %ebx
	movl	REGISTERS + 8, %ecx
	movl	REGISTERS + 12, %edx
	movl	REGISTERS + 16, %esi
	movl	REGISTERS + 20, %edi
	movl	REGISTERS + 24, %ebp
	movl	REGISTERS, %eax
	call	*LOW(code)
	pushfl
	popl	%cs:FOUND + 28
	movl	%eax, %cs:FOUND
	movl	$NO_VECTOR, %cs:FOUND_VECTOR
	jmp	leave_real_mode

	/* 32 entries of 16 bytes; real mode pushes no error codes. */
	.balign 16
stubs:
	.set	vector, 0
	.rept	VECTORS
	.balign 16
	pushw	$vector
	jmp	interrupted
	.set	vector, vector + 1
	.endr

interrupted:
	movl	%eax, %cs:FOUND
	popw	%cs:FOUND_VECTOR
	movw	$0, %cs:FOUND_VECTOR + 2
	popw	%cs:FOUND_IP
	popw	%cs:FOUND_IP + 2
	popw	%cs:FOUND + 28
	movw	$0, %cs:FOUND + 30

leave_real_mode:
	movl	%ebx, %cs:FOUND + 4
	movl	%ecx, %cs:FOUND + 8
	movl	%edx, %cs:FOUND + 12
	movl	%esi, %cs:FOUND + 16
	movl	%edi, %cs:FOUND + 20
	movl	%ebp, %cs:FOUND + 24
	movl	%esp, %cs:FOUND_ESP
	movw	%ds, %cs:FOUND_ESP + 4
	movw	%es, %cs:FOUND_ESP + 6
	cli
	cld
	movl	$EFER, %ecx
	rdmsr
	orl	$EFER_LME, %eax
	wrmsr
	movl	%cr0, %eax
	orl	$CR0_PG | CR0_PE, %eax
	movl	%eax, %cr0
	ljmpl	$KERNEL_CS, $back_in_long_mode

	.balign 4
code:
	.word	REAL_CODE
vectors_pointer:
	.word	VECTORS * 4 - 1
	.long	0
real_end:
	.globl	real_stubs
	.set	real_stubs, LOW(stubs)

	.code64
	.section .note.GNU-stack, "", @progbits
