/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What KVM offers its guests: CPUID leaves, hypercalls, kvmclock. Source: Documentation/virt/kvm/x86 of Linux. */
#include "lib.h"

#define LEAF_SIGNATURE 0x40000000
#define LEAF_FEATURES 0x40000001
enum kvm_feature { OLD_CLOCK = 0, NEW_CLOCK = 3 };
enum kvm_msr {
	OLD_WALL_CLOCK = 0x11,
	OLD_SYSTEM_TIME = 0x12,
	WALL_CLOCK = 0x4b564d00,
	SYSTEM_TIME = 0x4b564d01,
};
enum hypercall { POLL_IRQ = 1, NO_HYPERCALL = 999 };
#define KVM_ENOSYS (-1000l)
#define KVM_EPERM (-1l)
#define TIME_ENABLE 1
#define SECONDS_2024 1704067200u
#define NANOSECONDS 1000000000ull

struct time_info {
	u32 version, pad;
	u64 tsc_timestamp, system_time;
	u32 tsc_to_system_mul;
	signed char tsc_shift;
	u8 flags, pad2[2];
} __attribute__((packed, aligned(64)));
struct wall_clock {
	u32 version, seconds, nanoseconds;
} __attribute__((packed, aligned(64)));

static volatile struct time_info info;
static volatile struct wall_clock wall;

static bool is_kvm(void)
{
	char name[12];
	struct cpuid leaf = cpuid(LEAF_SIGNATURE, 0);

	memcpy(name, &leaf.output[EBX], 4);
	memcpy(name + 4, &leaf.output[ECX], 4);
	memcpy(name + 8, &leaf.output[EDX], 4);
	return cpu_has(HAS_HYPERVISOR) && !memcmp(name, "KVMKVMKVM\0\0\0", 12);
}

static bool has(enum kvm_feature feature) { return cpuid(LEAF_FEATURES, 0).output[EAX] >> feature & 1; }

static long hypercall(u64 number)
{
	long result;

	TRY("vmcall", : "=a"(result) : "a"(number), "b"(0), "c"(0), "d"(0), "S"(0) : "memory");
	return result;
}

USER_CODE(user_vmcall, "mov $1, %eax; vmcall");
static void hypercalls(void)
{
	check(hypercall(POLL_IRQ) == 0 && last_fault.vector == NO_FAULT, "VMCALL: KVM_HC_VAPIC_POLL_IRQ");
	check(hypercall(NO_HYPERCALL) == KVM_ENOSYS, "a number that is none: -KVM_ENOSYS");
	RUN_USER(user_vmcall);
	check_user_ended("VMCALL at CPL 3 comes back");
	check((long)last_fault.regs.rax == KVM_EPERM, "with -KVM_EPERM");
}

static u64 clock_now(void)
{
	u64 delta, time;
	u32 version;

	do {
		version = info.version;
		delta = rdtsc() - info.tsc_timestamp;
		delta = info.tsc_shift < 0 ? delta >> -info.tsc_shift : delta << info.tsc_shift;
		time = info.system_time + (u64)((unsigned __int128)delta * info.tsc_to_system_mul >> 32);
	} while (version & 1 || version != info.version);
	return time;
}

static void system_time(u32 msr, const char *name)
{
	memset((void *)&info, 0, sizeof(info));
	wrmsr(msr, physical_of((void *)&info) | TIME_ENABLE);
	check(rdmsr(msr) == (physical_of((void *)&info) | TIME_ENABLE), "%s: the MSR keeps the address", name);
	check(!(info.version & 1) && info.tsc_to_system_mul, "%s: the page is filled in", name);
	u64 first = clock_now(), last = first;
	bool grows = true;
	for (int i = 0; i < 1000; i++) {
		u64 now = clock_now();

		grows &= now >= last;
		last = now;
	}
	check(grows && last > first, "%s: time goes forward", name);
	check(last - first < NANOSECONDS * 10, "%s: and is measured in nanoseconds", name);
	wrmsr(msr, 0);
}

static void wall_clock(u32 msr, const char *name)
{
	memset((void *)&wall, 0xff, sizeof(wall));
	wrmsr(msr, physical_of((void *)&wall));
	check(!(wall.version & 1) && wall.nanoseconds < NANOSECONDS, "%s: the wall clock is filled in", name);
	check(wall.seconds != 0xffffffff && (wall.seconds < 2 * SECONDS_2024), "%s: %u seconds since 1970", name,
	      wall.seconds);
}

static void clocks(void)
{
	if (has(NEW_CLOCK)) {
		system_time(SYSTEM_TIME, "kvmclock");
		wall_clock(WALL_CLOCK, "kvmclock");
	} else {
		skip("no kvmclock");
	}
	if (has(OLD_CLOCK)) {
		system_time(OLD_SYSTEM_TIME, "old kvmclock");
		wall_clock(OLD_WALL_CLOCK, "old kvmclock");
	} else {
		skip("no kvmclock by the old MSRs");
	}
}

static void run(void)
{
	if (!is_kvm()) {
		skip("CPUID does not say KVM");
		return;
	}
	check(cpuid(LEAF_SIGNATURE, 0).output[EAX] >= LEAF_FEATURES, "CPUID has KVM's signature and features");
	hypercalls();
	clocks();
}

const struct subject subjects[] = {{.name = "kvm", .run = run}, {}};
