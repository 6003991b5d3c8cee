"""The TLB fill: where direct execution checks every access once.

Unicorn keeps separate TLBs for user mode, supervisor mode, and supervisor mode with SMAP suspended, so what the fill
decides (canonical, LASS, paging) holds for each later hit. :func:`tlb_fill` replaces the ``tlb_fill`` of Unicorn's CPU
class: it knows the size of the access and the MMU index, and raises faults from within the instruction.

Where a translation ends in no memory slot, nothing is installed: the instruction ends undone, and the VMM emulates it
with its accesses to devices (MMIO).

With LAM, entries are known by the addresses that programs form, metadata included. What an address with metadata means
depends on the access, so its entry serves explicit data accesses, or fetches, but never both. The entries that a page
has under other tags cannot be found again; so INVLPG, which is intercepted, forgets everything.

The fill also keeps W^X per physical page: a page is never writable through a fast TLB entry while translated code of
it exists, through whatever alias. Unicorn alone would miss writes behind the first.
"""

from typing import Any

from lasskvm.emulator.mmu import translate, untagged
from lasskvm.emulator.watch import watch_hit, watched_page
from lasskvm.engine.context import (
    COUNT_CODE_INVALIDATIONS,
    COUNT_FAULTS,
    COUNT_FILLS,
    EPOCH,
    EVENT_FETCH_FROM_HOLE,
    EVENT_MMIO,
    FAULT_ADDRESS,
    FAULT_FLAGS,
    FN_INVALIDATE_RANGE,
    FN_LOOP_EXIT_NOEXC,
    FN_RESTORE_STATE,
    FN_TLB_FLUSH,
    FN_TLB_FLUSH_INDEXES,
    FN_TLB_FLUSH_PAGE,
    FN_TLB_SET_DIRTY,
    FN_TLB_SET_PAGE,
    IDENTITY_FILL,
    LOCAL_COUNT,
    LOCAL_PAGES,
    LOCAL_PAGES_KEPT,
    MEMORY,
    ONES_GPA,
    SINK_GPA,
    SLOT_RAM_ADDRESS,
    STATE,
    UC,
    USER_PAGES,
    WATCH_BORROWED_TF,
    WATCH_HIT,
)
from lasskvm.engine.implicit import is_implicit, may_be_implicit, touches_system_table
from lasskvm.engine.leaving import leave_instruction, raise_fault
from lasskvm.engine.native import callback, foreign_function, load8, load32, load64, store8, store32, store64
from lasskvm.engine.native import words_at as words
from lasskvm.engine.physical import find_slot
from lasskvm.engine.private import (
    CPU_ENV,
    MMU_KERNEL,
    MMU_KERNEL_NO_SMAP,
    MMU_USER,
    context_of,
    guest_cpl,
    guest_rflags,
    set_single_step,
)
from lasskvm.lass import FETCH, IMPLICIT, WRITE
from lasskvm.memory import (
    CODE_STORES_KEPT,
    PAGE_CODE,
    PAGE_DIRTY,
    SLOT_FLAGS,
    SLOT_LOG_DIRTY_PAGES,
    SLOT_PAGE_FLAGS,
    SLOT_READONLY,
    SLOT_SIZE,
    SLOT_WORDS,
    SLOT_WRITE_EPOCHS,
    TABLE_CODE_STORES,
    TABLE_COUNT,
    TABLE_FIRST,
)
from lasskvm.state import STATE_WORDS
from lasskvm.x86.paging import PERM_GLOBAL, PERM_R, PERM_W, PERM_X
from lasskvm.x86.registers import MASK64, RFLAGS_TF

__all__ = ["fill", "flush_local", "flush_tlb", "invalidate_page", "tlb_fill"]

_PAGE_MASK = MASK64 ^ 0xFFF
_PAGE_SIZE = 0x1000
_PAGE_SHIFT = 12
#: A TLB entry of this size makes every access come back to the fill.
_EVERY_ACCESS = 1

_PERM_RWX = PERM_R | PERM_W | PERM_X
_PERM_WX = PERM_W | PERM_X
#: Masks of MMU indexes.
_USER_INDEXES = 1 << MMU_USER
_SUPERVISOR_INDEXES = 1 << MMU_KERNEL | 1 << MMU_KERNEL_NO_SMAP

#: Unicorn's access types.
_ACCESS_STORE, _ACCESS_FETCH = 1, 2

_tlb_set_page = foreign_function(0, 64, 64, 64, 32, 32, 64)
_tlb_flush = foreign_function(0, 64)
_tlb_flush_page = foreign_function(0, 64, 64, 32)
_tlb_flush_indexes = foreign_function(0, 64, 32)
_tlb_set_dirty = foreign_function(0, 64, 64)
_invalidate_range = foreign_function(0, 64, 64, 64)
_restore_state = foreign_function(8, 64, 64, 8)
_loop_exit_noexc = foreign_function(0, 64)


@callback(8, 64, 64, 32, 32, 32, 8, 64)
def tlb_fill(cpu, address, size, access, mmu_index, probe, return_address):  # type: ignore[no-untyped-def]
    """``CPUClass.tlb_fill``: install a TLB entry and return 1, or raise the guest's fault.

    *return_address* is 0 while code is translated; *probe* asks to return 0 instead of raising.
    """
    return fill(cpu, address, size & 0xFFFF, access & 3, mmu_index & 3, probe & 1, return_address)


def fill(
    cpu: int, address: int, size: int, access: int, mmu_index: int, probe: int, return_address: int
) -> int:
    """The body of :func:`tlb_fill`, over unsigned words."""
    context = context_of(cpu)
    env = cpu + CPU_ENV
    if load64(context + 8 * IDENTITY_FILL) != 0:
        _install(cpu, context, address, address & (_PAGE_MASK >> 12), PERM_R | PERM_X, mmu_index, _PAGE_SIZE)
        return 1
    store64(context + 8 * COUNT_FILLS, load64(context + 8 * COUNT_FILLS) + 1)
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    memory: Any = load64(context + 8 * MEMORY)
    cpl = guest_cpl(env)
    rflags = guest_rflags(env)
    flags = 0
    every_access = False
    linear = untagged(state, address, 0)
    tagged = linear != address
    if access == _ACCESS_FETCH:
        flags = FETCH
    else:
        if access == _ACCESS_STORE:
            flags = WRITE
        if cpl == 3:
            if mmu_index != MMU_USER:
                flags |= IMPLICIT
        elif may_be_implicit(state, address, rflags) or (tagged and touches_system_table(state, address)):
            every_access = True
            if return_address != 0:
                _restore_state(load64(context + 8 * FN_RESTORE_STATE), cpu, return_address, 0)
            if is_implicit(env, state, memory):
                flags |= IMPLICIT
    if flags & (FETCH | IMPLICIT) != 0:
        linear = address
    gpa, permissions, vector, error_code = translate(state, memory, address, size, flags, cpl, rflags)
    if vector != 0:
        if probe != 0:
            return 0
        store64(context + 8 * COUNT_FAULTS, load64(context + 8 * COUNT_FAULTS) + 1)
        raise_fault(context, vector, error_code, linear, flags, return_address)
    if load64(memory + 8 * TABLE_CODE_STORES) != 0:
        forget_stored_code(cpu, context, memory)
    slot = find_slot(memory, gpa)
    readonly = slot != 0 and load64(slot + 8 * SLOT_FLAGS) & SLOT_READONLY != 0
    if slot == 0 or (readonly and flags & WRITE != 0):
        if probe != 0:
            return 0
        _reach_no_memory(cpu, context, address, gpa, permissions, flags, mmu_index, return_address)
        return 1
    page = (gpa - load64(slot)) >> _PAGE_SHIFT
    if readonly:
        permissions &= PERM_R | PERM_X
    is_global = permissions & PERM_GLOBAL
    permissions = _keep_write_xor_execute(cpu, context, memory, slot, page, permissions & _PERM_RWX, flags)
    if permissions & PERM_W != 0:
        permissions = _log_dirty_page(slot, page, permissions, flags)
    if flags & FETCH == 0 and watched_page(state, linear):
        every_access = True
        hit = watch_hit(state, linear, size, flags)
        if hit != 0 and load64(context + 8 * WATCH_HIT) == 0:
            # Data breakpoints are traps: run the instruction again under TF and report both when it has ended.
            store64(context + 8 * WATCH_HIT, hit)
            _restore_state(load64(context + 8 * FN_RESTORE_STATE), cpu, return_address, 0)
            store64(context + 8 * WATCH_BORROWED_TF, (rflags & RFLAGS_TF) ^ RFLAGS_TF)
            set_single_step(env, RFLAGS_TF)
            _loop_exit_noexc(load64(context + 8 * FN_LOOP_EXIT_NOEXC), cpu)
    if is_global == 0:
        _note_local_page(context, address & _PAGE_MASK, mmu_index)
    granted = permissions
    if tagged:
        granted = _for_one_meaning(permissions, flags)
        # Unicorn checks stores for code that they overwrite only where the entry is for code, too.
        every_access = every_access or flags & IMPLICIT != 0 or permissions & _PERM_WX == _PERM_WX
    extent = _PAGE_SIZE
    if every_access:
        extent = _EVERY_ACCESS
    _install(cpu, context, address, gpa, granted, mmu_index, extent)
    if flags & WRITE != 0 and permissions & PERM_X == 0 and not every_access:
        # Unicorn would look for translated code at the first store; there is none.
        _tlb_set_dirty(load64(context + 8 * FN_TLB_SET_DIRTY), cpu, address & _PAGE_MASK)
    return 1


def _install(
    cpu: int, context: int, address: int, gpa: int, permissions: int, mmu_index: int, extent: int
) -> None:
    _tlb_set_page(
        load64(context + 8 * FN_TLB_SET_PAGE),
        cpu,
        address & _PAGE_MASK,
        gpa & _PAGE_MASK,
        permissions,
        mmu_index,
        extent,
    )


def _for_one_meaning(permissions: int, flags: int) -> int:
    """Of *permissions*, those of an address that code and data take for different places, for the access at hand."""
    if flags & FETCH != 0:
        return permissions & PERM_X
    return permissions & (PERM_R | PERM_W)


def _note_local_page(context: int, page: int, mmu_index: int) -> None:
    """Remember a page that is not global for :func:`flush_local`."""
    if mmu_index == MMU_USER:
        store64(context + 8 * USER_PAGES, 1)
        return
    count = load64(context + 8 * LOCAL_COUNT)
    if count < LOCAL_PAGES_KEPT:
        store64(context + 8 * (LOCAL_PAGES + count), page)
    store64(context + 8 * LOCAL_COUNT, count + 1)


def _reach_no_memory(
    cpu: int,
    context: int,
    address: int,
    gpa: int,
    permissions: int,
    flags: int,
    mmu_index: int,
    return_address: int,
) -> None:
    """No memory at *gpa* takes the access: leave the instruction undone. Returns only for implicit accesses.

    Nothing answers those: reads give all ones, writes are dropped; reading and writing must not share an entry.
    """
    state = words(load64(context + 8 * STATE), STATE_WORDS)
    store64(context + 8 * FAULT_ADDRESS, gpa)
    store64(context + 8 * FAULT_FLAGS, flags)
    if flags & FETCH != 0:
        leave_instruction(context, EVENT_FETCH_FROM_HOLE, return_address)
    implicit = flags & IMPLICIT != 0
    if not implicit and mmu_index != MMU_USER and touches_system_table(state, address):
        if return_address != 0:
            _restore_state(load64(context + 8 * FN_RESTORE_STATE), cpu, return_address, 0)
        implicit = is_implicit(cpu + CPU_ENV, state, load64(context + 8 * MEMORY))
    if not implicit:
        leave_instruction(context, EVENT_MMIO, return_address)
    page = load64(context + 8 * ONES_GPA)
    allowed = permissions & PERM_R
    if flags & WRITE != 0:
        page = load64(context + 8 * SINK_GPA)
        allowed = permissions & PERM_W
    _install(cpu, context, address, page, allowed, mmu_index, _EVERY_ACCESS)


def _keep_write_xor_execute(
    cpu: int, context: int, memory: int, slot: int, page: int, permissions: int, flags: int
) -> int:
    """What of *permissions* the entry may have so that no store can miss translated code of the page."""
    page_flags = load64(slot + 8 * SLOT_PAGE_FLAGS) + page
    write_epoch = load64(slot + 8 * SLOT_WRITE_EPOCHS) + page * 4
    has_code = load8(page_flags) & PAGE_CODE != 0
    if flags & FETCH != 0:
        if not has_code:
            store8(page_flags, load8(page_flags) | PAGE_CODE)
            if load32(write_epoch) == load64(context + 8 * EPOCH):
                flush_tlb(cpu, context)
        # Writable and executable at once: Unicorn then checks each store, which is exact.
        return permissions
    if not has_code:
        if permissions & PERM_W != 0:
            store32(write_epoch, load64(context + 8 * EPOCH))
        return permissions & (PERM_R | PERM_W)
    if permissions & PERM_X != 0:
        return permissions
    if flags & WRITE != 0:
        invalidate_page(cpu, context, memory, slot, page)
        store32(write_epoch, load64(context + 8 * EPOCH))
        return permissions
    return permissions & PERM_R


def _log_dirty_page(slot: int, page: int, permissions: int, flags: int) -> int:
    """Note that the page will be written to; what of *permissions* the entry may have.

    Where dirty pages are logged, a page that is only read gets no writable entry, so that its first store comes here.
    """
    page_flags = load64(slot + 8 * SLOT_PAGE_FLAGS) + page
    value = load8(page_flags)
    if (
        flags & WRITE == 0
        and value & PAGE_DIRTY == 0
        and load64(slot + 8 * SLOT_FLAGS) & SLOT_LOG_DIRTY_PAGES != 0
    ):
        return permissions & (PERM_R | PERM_X)
    store8(page_flags, value | PAGE_DIRTY)
    return permissions


def flush_local(cpu: int, context: int) -> None:
    """Forget all translations of linear addresses but the global ones: what a write to CR3 asks for.

    Kernels change CR3 for a handful of accesses (text patching); their own pages are global and stay.
    """
    count = load64(context + 8 * LOCAL_COUNT)
    if count > LOCAL_PAGES_KEPT:
        flush_tlb(cpu, context)
        return
    for index in range(count):
        page = load64(context + 8 * (LOCAL_PAGES + index))
        _tlb_flush_page(load64(context + 8 * FN_TLB_FLUSH_PAGE), cpu, page, _SUPERVISOR_INDEXES)
    if load64(context + 8 * USER_PAGES) != 0:
        _tlb_flush_indexes(load64(context + 8 * FN_TLB_FLUSH_INDEXES), cpu, _USER_INDEXES)
    store64(context + 8 * LOCAL_COUNT, 0)
    store64(context + 8 * USER_PAGES, 0)


def flush_tlb(cpu: int, context: int) -> None:
    """Forget all translations of linear addresses."""
    store64(context + 8 * LOCAL_COUNT, 0)
    store64(context + 8 * USER_PAGES, 0)
    _tlb_flush(load64(context + 8 * FN_TLB_FLUSH), cpu)
    store64(context + 8 * EPOCH, (load64(context + 8 * EPOCH) + 1) & 0xFFFFFFFF)


def forget_stored_code(cpu: int, context: int, memory: int) -> None:
    """Forget the code of pages that event delivery or a page walk has stored to (:mod:`lasskvm.engine.physical`)."""
    count = load64(memory + 8 * TABLE_CODE_STORES)
    store64(memory + 8 * TABLE_CODE_STORES, 0)
    if count > CODE_STORES_KEPT:
        _forget_all_code(cpu, context, memory)
        return
    for index in range(count):
        gpa = load64(memory + 8 * (TABLE_CODE_STORES + 1 + index))
        slot = find_slot(memory, gpa)
        invalidate_page(cpu, context, memory, slot, (gpa - load64(slot)) >> _PAGE_SHIFT)


def _forget_all_code(cpu: int, context: int, memory: int) -> None:
    """Forget all translated code, because nobody knows which of it was stored to.

    A walk under EPT marks dozens of entries, and the emulator walks without a fill in between.
    """
    slot = memory + 8 * TABLE_FIRST
    for _ in range(load64(memory + 8 * TABLE_COUNT)):
        page_flags = load64(slot + 8 * SLOT_PAGE_FLAGS)
        for page in range(load64(slot + 8 * SLOT_SIZE) >> _PAGE_SHIFT):
            if load8(page_flags + page) & PAGE_CODE != 0:
                invalidate_page(cpu, context, memory, slot, page)
        slot += 8 * SLOT_WORDS


def invalidate_page(cpu: int, context: int, memory: int, slot: int, page: int) -> None:
    """Forget all translated code of page *page* of the slot at table address *slot*."""
    store64(context + 8 * COUNT_CODE_INVALIDATIONS, load64(context + 8 * COUNT_CODE_INVALIDATIONS) + 1)
    index = (slot - memory) // (8 * SLOT_WORDS)
    start = load64(context + 8 * (SLOT_RAM_ADDRESS + index)) + (page << _PAGE_SHIFT)
    _invalidate_range(
        load64(context + 8 * FN_INVALIDATE_RANGE), load64(context + 8 * UC), start, start + _PAGE_SIZE
    )
    page_flags = load64(slot + 8 * SLOT_PAGE_FLAGS) + page
    store8(page_flags, load8(page_flags) & (0xFF ^ PAGE_CODE))
    flush_tlb(cpu, context)
