"""What struct kvm_run says, as exits; written here as the kernel would, where no guest can be made to cause them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest

from lasskvm.kvm.exits import (
    FailEntryExit,
    InternalErrorExit,
    IntrExit,
    IoExit,
    MmioExit,
    MsrExit,
    SystemEventExit,
    UnknownExit,
)
from lasskvm.kvm.host.run_abi import Run
from lasskvm.kvm.host.run_page import RunPage

EXIT_IO, EXIT_MMIO, EXIT_FAIL_ENTRY, EXIT_INTR, EXIT_INTERNAL_ERROR = 2, 6, 9, 10, 17
EXIT_SYSTEM_EVENT, EXIT_RDMSR, EXIT_BUS_LOCK = 24, 29, 33
DATA_OFFSET = 4096


class Pages:
    """The kernel's side and the VMM's side of one ``struct kvm_run``."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 3 * 4096)
        self.kernel = Run.from_buffer(self.memory)
        self.page = RunPage(self.memory)


@pytest.fixture
def pages() -> Iterator[Pages]:
    pages = Pages()
    yield pages
    pages.page.release()
    del pages.kernel
    pages.memory.close()


def test_a_run_that_was_interrupted_leaves_no_exit(pages: Pages) -> None:
    pages.kernel.exit_reason = EXIT_MMIO
    pages.page.expect_interruption()
    assert pages.page.exit() == IntrExit()
    assert pages.page.answer() is None


def test_input_elements_are_answered_one_by_one(pages: Pages) -> None:
    io = pages.kernel.io
    pages.kernel.exit_reason = EXIT_IO
    io.direction, io.size, io.port, io.count, io.data_offset = 0, 2, 0x5C0, 3, DATA_OFFSET
    element = pages.page.exit()
    for value in (0x1111, 0x2222, 0x3333):
        assert element == IoExit(0x5C0, 2, write=False, data=0xFFFF)
        assert isinstance(element, IoExit)
        element.data = value
        element = pages.page.answer()
    assert element is None
    assert pages.memory[DATA_OFFSET : DATA_OFFSET + 8] == bytes.fromhex("1111 2222 3333 0000")


def test_an_answer_wider_than_the_access_is_cut(pages: Pages) -> None:
    pages.kernel.exit_reason = EXIT_MMIO
    pages.kernel.mmio.phys_addr, pages.kernel.mmio.len = 0xD0000000, 8
    vm_exit = pages.page.exit()
    assert isinstance(vm_exit, MmioExit)
    vm_exit.data = 1 << 64 | 5
    pages.page.answer()
    assert bytes(pages.kernel.mmio.data) == (5).to_bytes(8, "little")


def test_an_msr_answer_says_whether_it_is_an_error(pages: Pages) -> None:
    pages.kernel.exit_reason = EXIT_RDMSR
    pages.kernel.msr.index = 0x174
    vm_exit = pages.page.exit()
    assert vm_exit == MsrExit(0x174, write=False, data=0)
    pages.page.answer()
    assert pages.kernel.msr.error == 1


def test_an_emulation_failure_brings_the_instruction_when_the_kernel_has_it(pages: Pages) -> None:
    failure = pages.kernel.emulation_failure
    pages.kernel.exit_reason = EXIT_INTERNAL_ERROR
    failure.suberror, failure.ndata, failure.flags, failure.insn_size = 1, 3, 1, 2
    failure.insn_bytes[:2] = b"\x0f\x0b"
    vm_exit = pages.page.exit()
    assert isinstance(vm_exit, InternalErrorExit)
    assert (vm_exit.suberror, vm_exit.instruction) == (1, b"\x0f\x0b")
    failure.flags = 0
    vm_exit = pages.page.exit()
    assert isinstance(vm_exit, InternalErrorExit)
    assert vm_exit.instruction == b""


def test_other_internal_errors_show_their_data(pages: Pages) -> None:
    pages.kernel.exit_reason = EXIT_INTERNAL_ERROR
    pages.kernel.internal.suberror, pages.kernel.internal.ndata = 3, 2
    pages.kernel.internal.data[:2] = (0x80000B0E, 0x31)
    vm_exit = pages.page.exit()
    assert isinstance(vm_exit, InternalErrorExit)
    assert vm_exit.suberror == 3
    assert "0x80000b0e, 0x31" in vm_exit.detail


def test_a_refused_entry_a_system_event_and_the_unknown_are_told_apart(pages: Pages) -> None:
    kernel = pages.kernel
    kernel.exit_reason, kernel.fail_entry.hardware_entry_failure_reason = EXIT_FAIL_ENTRY, 0x80000021
    assert pages.page.exit() == FailEntryExit(0x80000021)
    kernel.exit_reason = EXIT_SYSTEM_EVENT
    kernel.system_event.type, kernel.system_event.ndata, kernel.system_event.data[0] = 2, 1, 9
    assert pages.page.exit() == SystemEventExit(2, (9,))
    kernel.exit_reason = EXIT_BUS_LOCK
    assert pages.page.exit() == UnknownExit(EXIT_BUS_LOCK)
