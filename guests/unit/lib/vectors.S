/* SPDX-License-Identifier: GPL-2.0-or-later */
/* 256 entries of 16 bytes, one for each vector: they make the frames alike and save the registers. */
	.code64
	.section .text
	.globl trap_stubs
	.balign 16
/* #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP have an error code. */
	.equ with_error_code, 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21
trap_stubs:
	.set vector, 0
	.rept 256
	.balign 16
	.if vector >= 32 || !(with_error_code >> vector & 1)
	pushq	$0
	.endif
	pushq	$vector
	jmp	save_registers
	.set vector, vector + 1
	.endr

save_registers:
	pushq	%rax
	pushq	%rbx
	pushq	%rcx
	pushq	%rdx
	pushq	%rsi
	pushq	%rdi
	pushq	%rbp
	pushq	%r8
	pushq	%r9
	pushq	%r10
	pushq	%r11
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	movq	%rsp, %rdi
	movq	%rsp, %rbx
	andq	$-16, %rsp
	cld
	call	trap_entry
	movq	%rbx, %rsp
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%r11
	popq	%r10
	popq	%r9
	popq	%r8
	popq	%rbp
	popq	%rdi
	popq	%rsi
	popq	%rdx
	popq	%rcx
	popq	%rbx
	popq	%rax
	addq	$16, %rsp
	iretq

	.section .note.GNU-stack, "", @progbits
