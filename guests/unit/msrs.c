/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * MSRs: which values they keep and which they refuse. Sources: SDM volume 4; volume 3, "Extended Feature Enable
 * Register", "Memory Type Range Registers", "PAT".
 */
#include "lib.h"

#define CANONICAL 0xffff800000000000ull
#define NON_CANONICAL 0x0000800000000000ull
/* Number of no MSR: the range that software may use for its own ends is 40000000H. */
#define UNKNOWN_MSR 0x12345
#define MTRR_FIXED BIT(10)
#define MTRR_ENABLE BIT(11)
#define MTRR_VALID BIT(11)
#define FIXED_SUPPORTED BIT(8)
#define WRITE_BACK 6
#define RESERVED_TYPE 2

static bool read_faults(u32 index)
{
	TRY("rdmsr", ::"c"(index) : "rax", "rdx", "memory");
	return last_fault.vector == VECTOR_GP && !last_fault.regs.error;
}

static bool write_faults(u32 index, u64 value)
{
	TRY("wrmsr", ::"c"(index), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
	return last_fault.vector == VECTOR_GP && !last_fault.regs.error;
}

static void keeps(const char *name, u32 index, u64 value)
{
	u64 kept = rdmsr(index);

	TRY("wrmsr", ::"c"(index), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
	u64 now = last_fault.vector == NO_FAULT ? rdmsr(index) : ~value;
	if (last_fault.vector == NO_FAULT)
		wrmsr(index, kept);
	if (!check(now == value, "%s keeps %lx", name, value))
		print("      it has %lx\n", now);
}

static void refuses(const char *name, u32 index, u64 value)
{
	u64 kept = rdmsr(index);
	bool faults = write_faults(index, value);

	if (!faults)
		wrmsr(index, kept);
	check(faults, "%s refuses %lx", name, value);
}

static void addresses(void)
{
	static const struct {
		u32 index;
		const char *name;
	} rows[] = {
		{MSR_FS_BASE, "FS.base"},	    {MSR_GS_BASE, "GS.base"},
		{MSR_KERNEL_GS_BASE, "KERNEL_GS_BASE"}, {MSR_LSTAR, "LSTAR"},
		{MSR_CSTAR, "CSTAR"},		    {MSR_SYSENTER_ESP, "SYSENTER_ESP"},
		{MSR_SYSENTER_EIP, "SYSENTER_EIP"},
	};

	for (unsigned int i = 0; i < ARRAY_SIZE(rows); i++) {
		keeps(rows[i].name, rows[i].index, CANONICAL | 0x123456789);
		keeps(rows[i].name, rows[i].index, NON_CANONICAL - 1);
		refuses(rows[i].name, rows[i].index, NON_CANONICAL);
		refuses(rows[i].name, rows[i].index, CANONICAL - 1);
	}
	keeps("STAR", MSR_STAR, 0x123456789abcdef0);
	keeps("FMASK", MSR_SYSCALL_MASK, 0x47700);
	keeps("SYSENTER_CS", MSR_SYSENTER_CS, 0x1234);
	if (require(HAS_RDTSCP, "TSC_AUX")) {
		keeps("TSC_AUX", MSR_TSC_AUX, 0x87654321);
		refuses("TSC_AUX", MSR_TSC_AUX, BIT(32));
	}
}

static void efer(void)
{
	u64 now = rdmsr(MSR_EFER);

	check(now & EFER_LMA && now & EFER_LME && now & EFER_NXE, "EFER: LME, LMA, NXE");
	keeps("EFER", MSR_EFER, now | EFER_SCE);
	refuses("EFER", MSR_EFER, now | BIT(1));
	refuses("EFER", MSR_EFER, now | BIT(9));
	refuses("EFER", MSR_EFER, now | BIT(63));
	check(write_faults(MSR_EFER, now & ~EFER_LME), "EFER.LME cannot change while paging is on");
	TRY("wrmsr", ::"c"(MSR_EFER), "a"((u32)(now & ~EFER_LMA)), "d"(0) : "memory");
	check(last_fault.vector == NO_FAULT && rdmsr(MSR_EFER) == now, "a write to EFER.LMA is ignored");
	if (!cpu_has(FEATURE(0x80000001, 0, ECX, 2)))
		refuses("EFER without SVM", MSR_EFER, now | BIT(12));
}

static void unknown(void)
{
	check(read_faults(UNKNOWN_MSR), "RDMSR of an unknown MSR");
	check(write_faults(UNKNOWN_MSR, 0), "WRMSR to an unknown MSR");
	check(read_faults(0xffffffff), "RDMSR of MSR FFFFFFFFH");
	check(write_faults(MSR_MTRR_CAP, 0), "WRMSR to IA32_MTRRCAP, which is read-only");
}

USER_CODE(user_rdmsr, "mov $0x10, %ecx; rdmsr");
USER_CODE(user_wrmsr, "mov $0x10, %ecx; xor %eax, %eax; xor %edx, %edx; wrmsr");
static void privilege(void)
{
	RUN_USER(user_rdmsr);
	check_fault(VECTOR_GP, 0, "RDMSR at CPL 3");
	RUN_USER(user_wrmsr);
	check_fault(VECTOR_GP, 0, "WRMSR at CPL 3");
}

static void pat(void)
{
	static const u8 no_types[] = {2, 3, 8, 0x10, 0x80};

	if (!require(HAS_PAT, "PAT"))
		return;
	check(rdmsr(MSR_PAT) == 0x0007040600070406, "PAT after a reset");
	keeps("PAT", MSR_PAT, 0x0706050401000600);
	for (unsigned int i = 0; i < ARRAY_SIZE(no_types); i++)
		refuses("PAT", MSR_PAT, 0x0007040600070006 | (u64)no_types[i] << 8);
	refuses("PAT", MSR_PAT, 0x0307040600070406);
}

static void mtrrs(void)
{
	if (!require(HAS_MTRR, "MTRRs"))
		return;
	u64 capabilities = rdmsr(MSR_MTRR_CAP);
	int width = cpuid(0x80000008, 0).output[EAX] & 0xff;
	u64 mask = (BIT(width) - 1) & ~(BIT(20) - 1);

	check(capabilities & 0xff, "%d variable ranges", (int)(capabilities & 0xff));
	keeps("MTRRphysBase0", MSR_MTRR_PHYS_BASE0, 0xc0000000 | WRITE_BACK);
	keeps("MTRRphysMask0", MSR_MTRR_PHYS_MASK0, mask | MTRR_VALID);
	refuses("MTRRphysBase0", MSR_MTRR_PHYS_BASE0, 0xc0000000 | RESERVED_TYPE);
	refuses("MTRRphysBase0", MSR_MTRR_PHYS_BASE0, BIT(8));
	if (width < 52)
		refuses("MTRRphysMask0", MSR_MTRR_PHYS_MASK0, mask | BIT(width));
	check(read_faults(MSR_MTRR_PHYS_BASE0 + 2 * (capabilities & 0xff)), "no more variable ranges than it says");
	keeps("MTRRdefType", MSR_MTRR_DEF_TYPE, WRITE_BACK | MTRR_ENABLE);
	refuses("MTRRdefType", MSR_MTRR_DEF_TYPE, RESERVED_TYPE | MTRR_ENABLE);
	refuses("MTRRdefType", MSR_MTRR_DEF_TYPE, BIT(8));
	if (capabilities & FIXED_SUPPORTED) {
		keeps("MTRRfix64K", MSR_MTRR_FIX64K, 0x0606060606060606);
		refuses("MTRRfix64K", MSR_MTRR_FIX64K, 0x0606060602060606);
	}
}

static void segment_bases(void)
{
	static const u64 value = 0x1122334455667788;
	u64 seen;

	wrmsr(MSR_GS_BASE, (u64)&value - 16);
	asm volatile("mov %%gs:16, %0" : "=r"(seen));
	check(seen == value, "GS.base counts in addresses");
	wrmsr(MSR_KERNEL_GS_BASE, 0x5678);
	asm volatile("swapgs");
	check(rdmsr(MSR_GS_BASE) == 0x5678 && rdmsr(MSR_KERNEL_GS_BASE) == (u64)&value - 16, "SWAPGS");
	if (!require(HAS_FSGSBASE, "FSGSBASE"))
		return;
	TRY("rdgsbase %%rax", ::: "rax");
	check_fault(VECTOR_UD, 0, "RDGSBASE without CR4.FSGSBASE");
	write_cr4(read_cr4() | CR4_FSGSBASE);
	asm volatile("rdgsbase %0" : "=r"(seen));
	check(seen == 0x5678, "RDGSBASE");
	asm volatile("wrfsbase %0" ::"r"((u64)&value));
	check(rdmsr(MSR_FS_BASE) == (u64)&value, "WRFSBASE");
	TRY("wrfsbase %0", ::"r"(NON_CANONICAL));
	check_fault(VECTOR_GP, 0, "WRFSBASE of a non-canonical address");
	asm volatile("mov $-1, %%rax\n\twrgsbase %%eax" ::: "rax");
	check(rdmsr(MSR_GS_BASE) == 0xffffffff, "WRGSBASE of 32 bits");
	write_cr4(read_cr4() & ~CR4_FSGSBASE);
	wrmsr(MSR_FS_BASE, 0);
	wrmsr(MSR_GS_BASE, 0);
}

static void run(void)
{
	addresses();
	efer();
	unknown();
	privilege();
	pat();
	mtrrs();
	segment_bases();
}

const struct subject subjects[] = {{.name = "msrs", .run = run}, {}};
