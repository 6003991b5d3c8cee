/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Paging: every kind of access to every kind of page, under CR0.WP, CR4.SMEP, CR4.SMAP with AC, and the accessed and
 * dirty bits. Sources: SDM volume 3, "Determination of Access Rights", "Page-Fault Exceptions", "Accessed and Dirty
 * Flags".
 */
#include "lib.h"

/* With tables of its own below the PML4. */
#define PAGE (USER_BASE + 0x40000000)
#define WRITTEN (PAGE + 0x800)
#define LARGE_PAGE (USER_BASE + 0x80000000)
/* INT 20h: user and supervisor both come back by it. */
#define INT_20 0x20cd
#define MARKER 0x12345678

enum access { READ, WRITE, FETCH, ACCESSES };
static const char *const access_names[] = {"read", "write", "fetch"};

/* One setting of everything that access rights depend on. */
struct setting {
	bool wp, smep, smap, ac;
	bool user_page, writable, no_execute;
	int level; /* whose entry has the restriction */
};

USER_CODE(user_read, "mov (%rdi), %rax");
USER_CODE(user_write, "movb $1, 0x800(%rdi)");
USER_CODE(user_fetch, "jmp *%rdi");

static u8 *page;
static u64 *entries[5];
static u64 physical;

static bool allowed(const struct setting *s, enum access access, bool user)
{
	if (access == FETCH && s->no_execute)
		return false;
	if (user)
		return s->user_page && (access != WRITE || s->writable);
	if (s->user_page && access == FETCH && s->smep)
		return false;
	if (s->user_page && access != FETCH && s->smap && !s->ac)
		return false;
	return access != WRITE || s->writable || !s->wp;
}

static void do_access(enum access access, bool user, bool ac)
{
	if (user) {
		const char *code[] = {user_read, user_write, user_fetch};
		const char *end[] = {user_read_end, user_write_end, user_fetch_end};

		run_user(code[access], end[access], (struct user_registers){.rdi = PAGE});
		return;
	}
	if (ac)
		asm volatile("stac" ::: "memory");
	if (access == READ)
		TRY("mov (%0), %%rax", ::"r"(PAGE) : "rax", "memory");
	else if (access == WRITE)
		TRY("movb $1, (%0)", ::"r"(WRITTEN) : "memory");
	else
		TRY("jmp *%0", ::"r"(PAGE) : "memory");
	if (ac)
		asm volatile("clac" ::: "memory");
}

static bool as_expected(const struct setting *s, enum access access, bool user)
{
	bool ok = allowed(s, access, user);
	u64 leaf = *entries[1];
	u64 error = PF_PRESENT | (access == WRITE ? PF_WRITE : 0) | (user ? PF_USER : 0) |
		    (access == FETCH ? PF_FETCH : 0);
	int ending = user || access == FETCH ? USER_EXIT_VECTOR : NO_FAULT;

	if (!(leaf & PTE_A) != !ok || !(leaf & PTE_D) != !(ok && access == WRITE))
		return false;
	if (ok)
		return last_fault.vector == ending;
	return last_fault.vector == VECTOR_PF && last_fault.regs.error == error &&
	       last_fault.cr2 == (access == WRITE ? WRITTEN : PAGE);
}

static void prepare(const struct setting *s)
{
	u64 wanted = PTE_P | (s->user_page ? PTE_U : 0) | (s->writable ? PTE_W : 0) | (s->no_execute ? PTE_NX : 0);

	for (int level = 1; level <= 2; level++) {
		u64 address = level == 1 ? physical : *entries[2] & PTE_ADDRESS;

		*entries[level] = address | (level == s->level ? wanted : PTE_P | PTE_U | PTE_W);
	}
	flush_tlb();
}

static int try_all(struct setting s)
{
	int failures = 0;

	for (int bits = 0; bits < 16; bits++) {
		s.user_page = bits & 1;
		s.writable = bits & 2;
		s.no_execute = bits & 4;
		s.level = bits & 8 ? 2 : 1;
		for (int n = 0; n < 2 * ACCESSES; n++) {
			enum access access = n >> 1;
			bool user = n & 1;

			prepare(&s);
			do_access(access, user, s.ac);
			if (as_expected(&s, access, user) || failures++ > 4)
				continue;
			print("      %s %s, U=%d W=%d NX=%d at level %d: vector %d, error %lx, entry %lx\n",
			      user ? "user" : "supervisor", access_names[access], s.user_page, s.writable,
			      s.no_execute, s.level, last_fault.vector, last_fault.regs.error, *entries[1]);
		}
	}
	return failures;
}

static void set_cr4(u64 bit, bool on) { write_cr4(on ? read_cr4() | bit : read_cr4() & ~bit); }

static void matrix(void)
{
	bool has_smep = cpu_has(HAS_SMEP), has_smap = cpu_has(HAS_SMAP);

	for (int bits = 0; bits < 16; bits++) {
		struct setting s = {.wp = bits & 1, .smep = bits & 2, .smap = bits & 4, .ac = bits & 8};

		/* AC tells nothing without SMAP. */
		if ((s.smep && !has_smep) || (s.smap && !has_smap) || (s.ac && !s.smap))
			continue;
		write_cr0(s.wp ? read_cr0() | CR0_WP : read_cr0() & ~CR0_WP);
		set_cr4(CR4_SMEP, s.smep);
		set_cr4(CR4_SMAP, s.smap);
		int failures = try_all(s);
		set_cr4(CR4_SMEP | CR4_SMAP, false);
		write_cr0(read_cr0() | CR0_WP);
		check(!failures, "96 accesses with WP=%d SMEP=%d SMAP=%d AC=%d", s.wp, s.smep, s.smap, s.ac);
	}
}

static void not_present(void)
{
	/* Level 4 is shared with the user's own pages. */
	for (int level = 3; level; level--) {
		u64 kept = *entries[level];

		*entries[level] = kept & ~(u64)PTE_P;
		flush_tlb();
		do_access(READ, false, false);
		check_page_fault(0, PAGE, "read, not present at level %d", level);
		do_access(WRITE, true, false);
		check_page_fault(PF_WRITE | PF_USER, WRITTEN, "user write, not present at level %d", level);
		*entries[level] = kept;
	}
	flush_tlb();
}

static void reserved_bits(void)
{
	int width = cpuid(0x80000008, 0).output[EAX] & 0xff;
	u64 kept = *entries[1];

	if (width < 52) {
		*entries[1] = kept | BIT(51);
		flush_tlb();
		do_access(READ, false, false);
		check_page_fault(PF_PRESENT | PF_RESERVED, PAGE, "bit 51 of a PTE, with %d address bits", width);
		*entries[1] = (kept | BIT(51)) & ~(u64)PTE_P;
		flush_tlb();
		do_access(READ, false, false);
		check_page_fault(0, PAGE, "nothing is reserved in an entry that is not present");
	} else {
		skip("bit 51 is an address bit");
	}
	*entries[1] = kept;
	kept = *entries[3];
	if (!cpu_has(HAS_PDPE1GB)) {
		*entries[3] = kept | PTE_PS;
		flush_tlb();
		do_access(READ, false, false);
		check_page_fault(PF_PRESENT | PF_RESERVED, PAGE, "PS of a PDPTE without 1 GiB pages");
		*entries[3] = kept;
	}
	u64 *large = entry_of(LARGE_PAGE, 2);
	*large = PTE_P | PTE_W | PTE_PS | BIT(13);
	flush_tlb();
	TRY("mov (%0), %%rax", ::"r"(LARGE_PAGE) : "rax", "memory");
	check_page_fault(PF_PRESENT | PF_RESERVED, LARGE_PAGE, "bit 13 of a 2 MiB page's entry");
	*large = 0;
	flush_tlb();
}

static void no_execute_disabled(void)
{
	u64 kept = *entries[1];

	*entries[1] = kept | PTE_NX;
	wrmsr(MSR_EFER, rdmsr(MSR_EFER) & ~EFER_NXE);
	flush_tlb();
	do_access(READ, false, false);
	check_page_fault(PF_PRESENT | PF_RESERVED, PAGE, "NX is reserved without EFER.NXE");
	*entries[1] = kept & ~(u64)PTE_P & ~PTE_NX;
	flush_tlb();
	do_access(FETCH, false, false);
	check_page_fault(0, PAGE, "no fetch bit in the error code without NXE and SMEP");
	if (cpu_has(HAS_SMEP)) {
		set_cr4(CR4_SMEP, true);
		do_access(FETCH, false, false);
		check_page_fault(PF_FETCH, PAGE, "a fetch bit with SMEP");
		set_cr4(CR4_SMEP, false);
	}
	wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_NXE);
	*entries[1] = kept;
	flush_tlb();
}

static void large_page_at(int level, u64 size)
{
	u64 *entry = entry_of(LARGE_PAGE, level), kept = *entry;
	u64 mib = size >> 20, offset = (physical & (size - 1)) + 0x100;
	volatile u32 *seen = (void *)(LARGE_PAGE + offset);

	*entry = (physical & ~(size - 1)) | PTE_P | PTE_PS;
	flush_tlb();
	*(u32 *)(page + 0x100) = MARKER;
	check(*seen == MARKER, "a page of %lu MiB maps what it should", mib);
	check((*entry & (PTE_A | PTE_D)) == PTE_A, "reading from it sets A only");
	TRY("movl $1, (%0)", ::"r"(seen) : "memory");
	check_page_fault(PF_PRESENT | PF_WRITE, (u64)seen, "a write to it, W=0");
	*entry |= PTE_W;
	invlpg(LARGE_PAGE + (offset ^ size / 2));
	TRY("movl $1, (%0)", ::"r"(seen) : "memory");
	check_no_fault("INVLPG anywhere in a page of %lu MiB is enough", mib);
	check(*entry & PTE_D && *(u32 *)(page + 0x100) == 1, "the write to it sets D");
	*entry = kept;
	flush_tlb();
}

static void large_pages(void)
{
	large_page_at(2, 2 << 20);
	if (require(HAS_PDPE1GB, "1 GiB pages"))
		large_page_at(3, 1 << 30);
}

static void global_pages(void)
{
	u64 kept = *entries[1];
	u8 *other = alloc_page();

	*page = 1;
	*other = 2;
	write_cr4(read_cr4() | CR4_PGE);
	*entries[1] = physical | PTE_P | PTE_G;
	invlpg(PAGE);
	check(*(volatile u8 *)PAGE == 1, "a global page is read");
	*entries[1] = physical_of(other) | PTE_P;
	write_cr4(read_cr4() & ~CR4_PGE);
	check(*(volatile u8 *)PAGE == 2, "a change of CR4.PGE flushes global pages");
	*entries[1] = physical | PTE_P;
	invlpg(PAGE);
	check(*(volatile u8 *)PAGE == 1, "INVLPG of a page");
	*entries[1] = physical_of(other) | PTE_P;
	flush_tlb();
	check(*(volatile u8 *)PAGE == 2, "MOV to CR3 flushes");
	*(u16 *)page = INT_20;
	*entries[1] = kept;
	flush_tlb();
}

static void run(void)
{
	page = alloc_page();
	physical = physical_of(page);
	*(u16 *)page = INT_20;
	map_page(PAGE, physical, PTE_P | PTE_W | PTE_U);
	for (int level = 1; level <= 4; level++)
		entries[level] = entry_of(PAGE, level);
	matrix();
	prepare(&(struct setting){.user_page = true, .writable = true, .level = 1});
	not_present();
	reserved_bits();
	no_execute_disabled();
	large_pages();
	global_pages();
}

const struct subject subjects[] = {{.name = "paging", .run = run}, {}};
