"""The dirty log: every page that is written shows up once, whoever writes it, and no page that is only read."""

from __future__ import annotations

import errno
from functools import cache

import pytest

from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, MEMORY_BYTES, UPPER
from lasskvm.kvm import ExecutionEngine, IoExit, Vm
from lasskvm.memory import PAGE_SIZE, SLOT_LOG_DIRTY_PAGES

#: Stores to the page at RBX, then tells the VMM, for ever.
STORES = "again: inc qword [rbx]; out 0x99, al; jmp again"
LOADS = "again: mov rax, [rbx]; out 0x99, al; jmp again"


@cache
def logging_guest(engine: ExecutionEngine) -> Guest:
    """A guest whose only slot logs dirty pages."""
    guest = Guest(engine=engine)
    slot = next(iter(guest.memory))
    guest.vm.set_user_memory_region(0, 0, slot.buffer, SLOT_LOG_DIRTY_PAGES)
    return guest


@pytest.fixture(params=["jit", "emulator"])
def logged(request: pytest.FixtureRequest) -> Guest:
    guest = logging_guest(request.param)
    guest.reset()
    return guest


def dirty_pages(guest: Guest) -> set[int]:
    log = int.from_bytes(guest.vm.get_dirty_log(0), "little")
    return {page for page in range(MEMORY_BYTES // PAGE_SIZE) if log >> page & 1}


def run_to_port(guest: Guest) -> None:
    assert isinstance(guest.vcpu.run(), IoExit)


def test_stores_are_logged_once_and_again_after_each_look(logged: Guest) -> None:
    page = logged.gpa(HIGH_SUPERVISOR) // PAGE_SIZE
    logged.start(STORES, rbx=HIGH_SUPERVISOR)
    run_to_port(logged)
    assert page in dirty_pages(logged)
    assert dirty_pages(logged) == set()
    for _ in range(3):
        run_to_port(logged)
        assert dirty_pages(logged) == {page}


def test_a_page_that_is_only_read_is_not_logged_until_it_is_written(logged: Guest) -> None:
    page = logged.gpa(HIGH_SUPERVISOR) // PAGE_SIZE
    logged.start(STORES, rbx=HIGH_SUPERVISOR)  # the page-table entry is dirty from here on
    run_to_port(logged)
    logged.start(LOADS, rbx=HIGH_SUPERVISOR)
    run_to_port(logged)
    dirty_pages(logged)
    run_to_port(logged)
    run_to_port(logged)
    assert page not in dirty_pages(logged)
    logged.start("mov rax, [rbx]; mov [rbx], rax; out 0x99, al", rbx=HIGH_SUPERVISOR)
    run_to_port(logged)
    assert page in dirty_pages(logged)


def test_accessed_and_dirty_bits_that_the_processor_sets_are_writes(logged: Guest) -> None:
    logged.start(STORES, rbx=HIGH_SUPERVISOR)
    dirty_pages(logged)
    run_to_port(logged)
    assert any(0x100 <= page < 0x140 for page in dirty_pages(logged))  # the page tables


def test_what_event_delivery_pushes_is_logged(logged: Guest) -> None:
    stack = UPPER + 0x38000
    logged.start("again: ud2; handler: out 0x99, al", handlers={6: "handler"})
    dirty_pages(logged)
    run_to_port(logged)
    assert (logged.gpa(stack) // PAGE_SIZE) + 1 in dirty_pages(logged)


def test_what_the_vmm_writes_is_logged(logged: Guest) -> None:
    dirty_pages(logged)
    logged.memory.write(0x50FFE, b"four")
    assert dirty_pages(logged) == {0x50, 0x51}


def test_the_log_comes_in_whole_words() -> None:
    vm = Vm()
    vm.set_user_memory_region(3, 0, vm.allocate(65 * PAGE_SIZE), SLOT_LOG_DIRTY_PAGES)
    vm.memory.store(64 * PAGE_SIZE, 8, 1)
    assert vm.get_dirty_log(3) == bytes(8) + b"\1" + bytes(7)


def test_a_slot_that_logs_nothing_has_no_log() -> None:
    vm = Vm()
    vm.set_user_memory_region(0, 0, vm.allocate(PAGE_SIZE))
    for slot in (0, 1):
        with pytest.raises(OSError, match="KVM_GET_DIRTY_LOG") as refusal:
            vm.get_dirty_log(slot)
        assert refusal.value.errno == errno.ENOENT
