/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The processor: control registers, MSRs, CPUID, ports, flags, vectors. Names as in the Intel SDM.
 */
#ifndef LIB_CPU_H
#define LIB_CPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define BIT(n) (1ull << (n))

enum rflags {
	FLAG_CF = 1 << 0,
	FLAG_FIXED = 1 << 1,
	FLAG_ZF = 1 << 6,
	FLAG_TF = 1 << 8,
	FLAG_IF = 1 << 9,
	FLAG_DF = 1 << 10,
	FLAG_OF = 1 << 11,
	FLAG_IOPL = 3 << 12,
	FLAG_NT = 1 << 14,
	FLAG_RF = 1 << 16,
	FLAG_AC = 1 << 18,
};

#define CR0_PE BIT(0)
#define CR0_MP BIT(1)
#define CR0_EM BIT(2)
#define CR0_TS BIT(3)
#define CR0_NE BIT(5)
#define CR0_WP BIT(16)
#define CR0_AM BIT(18)
#define CR0_PG BIT(31)

#define CR4_TSD BIT(2)
#define CR4_DE BIT(3)
#define CR4_PAE BIT(5)
#define CR4_PGE BIT(7)
#define CR4_OSFXSR BIT(9)
#define CR4_OSXMMEXCPT BIT(10)
#define CR4_UMIP BIT(11)
#define CR4_FSGSBASE BIT(16)
#define CR4_PCIDE BIT(17)
#define CR4_OSXSAVE BIT(18)
#define CR4_SMEP BIT(20)
#define CR4_SMAP BIT(21)
#define CR4_PKE BIT(22)
#define CR4_LASS BIT(27)
#define CR4_LAM_SUP BIT(28)

#define CR3_PCID_MASK 0xfffull
#define CR3_LAM_U57 BIT(61)
#define CR3_LAM_U48 BIT(62)
#define CR3_NO_FLUSH BIT(63)

enum vector {
	VECTOR_DE = 0,
	VECTOR_DB = 1,
	VECTOR_NMI = 2,
	VECTOR_BP = 3,
	VECTOR_OF = 4,
	VECTOR_BR = 5,
	VECTOR_UD = 6,
	VECTOR_NM = 7,
	VECTOR_DF = 8,
	VECTOR_TS = 10,
	VECTOR_NP = 11,
	VECTOR_SS = 12,
	VECTOR_GP = 13,
	VECTOR_PF = 14,
	VECTOR_MF = 16,
	VECTOR_AC = 17,
	VECTOR_XM = 19,
	VECTORS = 256,
};

/* Page-fault error code (SDM volume 3, "Page-Fault Exceptions"). */
enum pf_error {
	PF_PRESENT = 1 << 0,
	PF_WRITE = 1 << 1,
	PF_USER = 1 << 2,
	PF_RESERVED = 1 << 3,
	PF_FETCH = 1 << 4,
	PF_KEY = 1 << 5,
};

/* Error code that names a selector (SDM volume 3, "Error Code"). */
enum selector_error {
	ERROR_EXT = 1 << 0,
	ERROR_IDT = 1 << 1,
	ERROR_TI = 1 << 2,
};

/* A feature bit: where CPUID reports it. */
enum cpuid_register { EAX, EBX, ECX, EDX };
struct feature {
	u32 leaf, subleaf;
	enum cpuid_register output;
	int bit;
};
#define FEATURE(...) ((struct feature){__VA_ARGS__})
#define HAS_TSC_DEADLINE FEATURE(1, 0, ECX, 24)
#define HAS_X2APIC FEATURE(1, 0, ECX, 21)
#define HAS_PCID FEATURE(1, 0, ECX, 17)
#define HAS_XSAVE FEATURE(1, 0, ECX, 26)
#define HAS_HYPERVISOR FEATURE(1, 0, ECX, 31)
#define HAS_SEP FEATURE(1, 0, EDX, 11)
#define HAS_MTRR FEATURE(1, 0, EDX, 12)
#define HAS_PAT FEATURE(1, 0, EDX, 16)
#define HAS_FSGSBASE FEATURE(7, 0, EBX, 0)
#define HAS_TSC_ADJUST FEATURE(7, 0, EBX, 1)
#define HAS_SMEP FEATURE(7, 0, EBX, 7)
#define HAS_INVPCID FEATURE(7, 0, EBX, 10)
#define HAS_SMAP FEATURE(7, 0, EBX, 20)
#define HAS_UMIP FEATURE(7, 0, ECX, 2)
#define HAS_PKU FEATURE(7, 0, ECX, 3)
#define HAS_OSPKE FEATURE(7, 0, ECX, 4)
#define HAS_RDPID FEATURE(7, 0, ECX, 22)
#define HAS_LASS FEATURE(7, 1, EAX, 6)
#define HAS_LAM FEATURE(7, 1, EAX, 26)
#define HAS_XSAVEOPT FEATURE(0xd, 1, EAX, 0)
#define HAS_XSAVEC FEATURE(0xd, 1, EAX, 1)
#define HAS_XGETBV1 FEATURE(0xd, 1, EAX, 2)
#define HAS_XSAVES FEATURE(0xd, 1, EAX, 3)
#define HAS_NX FEATURE(0x80000001, 0, EDX, 20)
#define HAS_PDPE1GB FEATURE(0x80000001, 0, EDX, 26)
#define HAS_RDTSCP FEATURE(0x80000001, 0, EDX, 27)

enum msr {
	MSR_TSC = 0x10,
	MSR_APIC_BASE = 0x1b,
	MSR_TSC_ADJUST = 0x3b,
	MSR_MTRR_CAP = 0xfe,
	MSR_SYSENTER_CS = 0x174,
	MSR_SYSENTER_ESP = 0x175,
	MSR_SYSENTER_EIP = 0x176,
	MSR_MISC_ENABLE = 0x1a0,
	MSR_DEBUGCTL = 0x1d9,
	MSR_MTRR_PHYS_BASE0 = 0x200,
	MSR_MTRR_PHYS_MASK0 = 0x201,
	MSR_MTRR_FIX64K = 0x250,
	MSR_PAT = 0x277,
	MSR_MTRR_DEF_TYPE = 0x2ff,
	MSR_TSC_DEADLINE = 0x6e0,
	MSR_X2APIC_FIRST = 0x800,
	MSR_EFER = 0xc0000080,
	MSR_STAR = 0xc0000081,
	MSR_LSTAR = 0xc0000082,
	MSR_CSTAR = 0xc0000083,
	MSR_SYSCALL_MASK = 0xc0000084,
	MSR_FS_BASE = 0xc0000100,
	MSR_GS_BASE = 0xc0000101,
	MSR_KERNEL_GS_BASE = 0xc0000102,
	MSR_TSC_AUX = 0xc0000103,
};

#define EFER_SCE BIT(0)
#define EFER_LME BIT(8)
#define EFER_LMA BIT(10)
#define EFER_NXE BIT(11)

struct table_register {
	u16 limit;
	u64 base;
} __attribute__((packed));

static inline void outb(u8 value, u16 port) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
static inline void outw(u16 value, u16 port) { asm volatile("outw %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
static inline void outl(u32 value, u16 port) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory"); }

static inline u8 inb(u16 port)
{
	u8 value;
	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline u16 inw(u16 port)
{
	u16 value;
	asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline u32 inl(u16 port)
{
	u32 value;
	asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline u64 rdmsr(u32 index)
{
	u32 low, high;
	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index) : "memory");
	return (u64)high << 32 | low;
}

static inline void wrmsr(u32 index, u64 value)
{
	asm volatile("wrmsr" ::"c"(index), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

#define CONTROL_REGISTER(name)                                                                          \
	static inline u64 read_##name(void)                                                             \
	{                                                                                               \
		u64 value;                                                                              \
		asm volatile("mov %%" #name ", %0" : "=r"(value)::"memory");                            \
		return value;                                                                           \
	}                                                                                               \
	static inline void write_##name(u64 value) { asm volatile("mov %0, %%" #name ::"r"(value) : "memory"); }
CONTROL_REGISTER(cr0)
CONTROL_REGISTER(cr2)
CONTROL_REGISTER(cr3)
CONTROL_REGISTER(cr4)
CONTROL_REGISTER(cr8)
CONTROL_REGISTER(dr0)
CONTROL_REGISTER(dr1)
CONTROL_REGISTER(dr2)
CONTROL_REGISTER(dr3)
CONTROL_REGISTER(dr6)
CONTROL_REGISTER(dr7)
#undef CONTROL_REGISTER

struct cpuid {
	u32 output[4];
};

static inline struct cpuid cpuid(u32 leaf, u32 subleaf)
{
	struct cpuid r;
	asm volatile("cpuid"
		     : "=a"(r.output[EAX]), "=b"(r.output[EBX]), "=c"(r.output[ECX]), "=d"(r.output[EDX])
		     : "a"(leaf), "c"(subleaf));
	return r;
}

static inline bool cpu_has(struct feature feature)
{
	if (cpuid(feature.leaf & 0xf0000000, 0).output[EAX] < feature.leaf)
		return false;
	return cpuid(feature.leaf, feature.subleaf).output[feature.output] >> feature.bit & 1;
}

static inline u64 rdtsc(void)
{
	u32 low, high;
	asm volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
	return (u64)high << 32 | low;
}

static inline u64 read_flags(void)
{
	u64 flags;
	asm volatile("pushfq; pop %0" : "=r"(flags)::"memory");
	return flags;
}

static inline void invlpg(u64 address) { asm volatile("invlpg (%0)" ::"r"(address) : "memory"); }
static inline void cli(void) { asm volatile("cli" ::: "memory"); }
static inline void sti(void) { asm volatile("sti" ::: "memory"); }
static inline void pause(void) { asm volatile("pause" ::: "memory"); }

/* An interrupt that is pending comes in between: STI holds it off for one instruction. */
static inline void let_interrupts_in(void) { asm volatile("sti; nop; nop; cli" ::: "memory"); }

#endif
