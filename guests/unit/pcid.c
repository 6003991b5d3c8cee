/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Process-context identifiers and INVPCID. Source: SDM volume 3, "PCIDs"; volume 2, INVPCID. */
#include "lib.h"

#define PAGE (USER_BASE + 0x40000000)
#define NON_CANONICAL 0x0000800000000000ull
#define FIRST 1
#define SECOND 2

struct descriptor {
	u64 pcid, address;
};
enum invpcid_type { ONE_ADDRESS, ONE_CONTEXT, ALL_WITH_GLOBALS, ALL_CONTEXTS, NO_TYPE };

static u8 *pages[2];
static u64 *entry;

static void invpcid(u64 type, u64 pcid, u64 address)
{
	struct descriptor descriptor = {pcid, address};

	TRY("invpcid %1, %0", ::"r"(type), "m"(descriptor) : "memory");
}

static void set_pcid(u64 pcid, u64 flags) { write_cr3((read_cr3() & PTE_ADDRESS) | pcid | flags); }
static u8 seen(void) { return *(volatile u8 *)PAGE; }
static void map_to(int which) { *entry = physical_of(pages[which]) | PTE_P; }

static void control_registers(void)
{
	u64 cr3 = read_cr3() & PTE_ADDRESS, cr4 = read_cr4();

	write_cr3(cr3 | BIT(3));
	TRY("mov %0, %%cr4", ::"r"(cr4 | CR4_PCIDE) : "memory");
	check_fault(VECTOR_GP, 0, "CR4.PCIDE cannot be set while CR3[11:0] is not 0");
	write_cr3(cr3);
	TRY("mov %0, %%cr3", ::"r"(cr3 | CR3_NO_FLUSH) : "memory");
	check_fault(VECTOR_GP, 0, "bit 63 of CR3 is reserved without CR4.PCIDE");
	TRY("mov %0, %%cr4", ::"r"(cr4 | CR4_PCIDE) : "memory");
	check_no_fault("CR4.PCIDE");
	write_cr3(cr3 | 0xfff);
	check(read_cr3() == (cr3 | 0xfff), "a PCID has 12 bits");
	write_cr3(cr3 | FIRST | CR3_NO_FLUSH);
	check(read_cr3() == (cr3 | FIRST), "bit 63 of CR3 is not kept");
	TRY("mov %0, %%cr0", ::"r"(read_cr0() & ~CR0_PG) : "memory");
	check_fault(VECTOR_GP, 0, "CR0.PG cannot be cleared in 64-bit mode");
	write_cr3(cr3);
}

static void contexts(void)
{
	set_pcid(FIRST, 0);
	map_to(0);
	invlpg(PAGE);
	check(seen() == 1, "PCID 1 reads a page");
	set_pcid(SECOND, 0);
	map_to(1);
	invlpg(PAGE);
	check(seen() == 2, "PCID 2 reads another at that address");
	set_pcid(FIRST, 0);
	check(seen() == 2, "MOV to CR3 flushes the PCID that it sets");
	map_to(0);
	invlpg(PAGE);
	set_pcid(SECOND, 0);
	set_pcid(FIRST, CR3_NO_FLUSH);
	check(seen() == 1, "without a flush");
	write_cr4(read_cr4() & ~CR4_PCIDE);
	check(!(read_cr4() & CR4_PCIDE), "CR4.PCIDE can be cleared");
	set_pcid(0, 0);
	write_cr4(read_cr4() | CR4_PCIDE);
}

/* Has the page read before the tables change, and after INVPCID. */
static bool sees_change(u64 type, u64 pcid)
{
	set_pcid(pcid, 0);
	map_to(0);
	invpcid(ALL_WITH_GLOBALS, 0, 0);
	bool before = seen() == 1;
	map_to(1);
	invpcid(type, pcid, PAGE);
	bool after = seen() == 2;
	set_pcid(0, 0);
	return before && after && last_fault.vector == NO_FAULT;
}

USER_CODE(user_invpcid, "invpcid (%rsp), %rax");
static void invalidation(void)
{
	static const char *const names[] = {"one address", "one context", "everything", "everything but globals"};
	u64 context = read_cr4() & CR4_PCIDE ? FIRST : 0;

	if (!require(HAS_INVPCID, "INVPCID")) {
		invpcid(ALL_CONTEXTS, 0, 0);
		check_fault(VECTOR_UD, 0, "INVPCID without INVPCID");
		return;
	}
	for (u64 type = 0; type < NO_TYPE; type++)
		check(sees_change(type, context), "INVPCID of %s", names[type]);
	invpcid(NO_TYPE, 0, 0);
	check_fault(VECTOR_GP, 0, "type 4");
	invpcid(BIT(32), 0, 0);
	check_fault(VECTOR_GP, 0, "type 100000000H");
	invpcid(ONE_CONTEXT, BIT(12), 0);
	check_fault(VECTOR_GP, 0, "a reserved bit of the descriptor");
	invpcid(ALL_CONTEXTS, BIT(12), 0);
	check_fault(VECTOR_GP, 0, "a reserved bit, for a type without PCID");
	invpcid(ONE_ADDRESS, context, NON_CANONICAL);
	check_fault(VECTOR_GP, 0, "a non-canonical address");
	invpcid(ONE_CONTEXT, context, NON_CANONICAL);
	check_no_fault("a non-canonical address, for a type without");
	write_cr4(read_cr4() & ~CR4_PCIDE);
	invpcid(ONE_ADDRESS, FIRST, PAGE);
	check_fault(VECTOR_GP, 0, "a PCID without CR4.PCIDE");
	invpcid(ONE_CONTEXT, FIRST, 0);
	check_fault(VECTOR_GP, 0, "a PCID without CR4.PCIDE, type 1");
	invpcid(ONE_CONTEXT, 0, 0);
	check_no_fault("PCID 0 without CR4.PCIDE");
	RUN_USER(user_invpcid);
	check_fault(VECTOR_GP, 0, "INVPCID at CPL 3");
	TRY("invpcid (%0), %1", ::"r"(PAGE + PAGE_SIZE), "r"(0ull) : "memory");
	check_page_fault(0, PAGE + PAGE_SIZE, "a descriptor that is not mapped");
}

static void run(void)
{
	map_page(PAGE, physical_of(alloc_page()), PTE_P);
	entry = entry_of(PAGE, 1);
	for (int i = 0; i < 2; i++)
		*(pages[i] = alloc_page()) = i + 1;
	if (!require(HAS_PCID, "PCID")) {
		TRY("mov %0, %%cr4", ::"r"(read_cr4() | CR4_PCIDE) : "memory");
		check_fault(VECTOR_GP, 0, "then CR4.PCIDE is a reserved bit");
	} else {
		control_registers();
		contexts();
	}
	invalidation();
}

const struct subject subjects[] = {{.name = "pcid", .run = run}, {}};
