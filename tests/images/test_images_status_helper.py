"""The helper that hands an exit status to the VMM, run on Unicorn as a process would be."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field

import pytest
import unicorn
from unicorn import x86_const as uc

from lasskvm.images.status_helper import status_helper
from lasskvm.machine.boot import PROGRAM_STATUS_PORT
from lasskvm.machine.boot.elf import read_elf64

STACK = 0x10000
SYS_IOCTL, SYS_EXIT, SYS_IOPERM = 16, 60, 173
EPERM = 1


@dataclass
class Run:
    """What the helper did: system calls with their first three arguments, and writes to ports."""

    calls: list[tuple[int, int, int, int]] = field(default_factory=list)
    outputs: list[tuple[int, int, int]] = field(default_factory=list)


def run_helper(argument: str, *, ioperm_result: int = 0) -> Run:
    program = status_helper()
    elf = read_elf64(io.BytesIO(program))
    (segment,) = elf.loadable
    cpu = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    cpu.mem_map(segment.virtual_address, 0x1000)
    cpu.mem_write(segment.virtual_address, program)
    cpu.mem_map(STACK, 0x1000)
    text = STACK + 0x800
    cpu.mem_write(text, argument.encode() + b"\0")
    cpu.mem_write(STACK, struct.pack("<QQQQ", 2, text, text, 0))
    cpu.reg_write(uc.UC_X86_REG_RSP, STACK)
    run = Run()

    def on_syscall(cpu: unicorn.Uc, _: object) -> None:
        registers = (uc.UC_X86_REG_RAX, uc.UC_X86_REG_RDI, uc.UC_X86_REG_RSI, uc.UC_X86_REG_RDX)
        number, *arguments = (cpu.reg_read(register) for register in registers)
        run.calls.append((number, *arguments))
        cpu.reg_write(uc.UC_X86_REG_RAX, ioperm_result % (1 << 64) if number == SYS_IOPERM else 0)
        if number == SYS_EXIT:
            cpu.emu_stop()

    def on_out(cpu: unicorn.Uc, port: int, size: int, value: int, _: object) -> None:
        run.outputs.append((port, size, value))

    cpu.hook_add(unicorn.UC_HOOK_INSN, on_syscall, None, 1, 0, uc.UC_X86_INS_SYSCALL)
    cpu.hook_add(unicorn.UC_HOOK_INSN, on_out, None, 1, 0, uc.UC_X86_INS_OUT)
    cpu.emu_start(elf.entry, segment.virtual_address + 0x1000, count=1000)
    return run


@pytest.mark.parametrize("status", [0, 1, 9, 10, 42, 127, 128, 139, 255])
def test_the_exact_status_is_written_as_one_byte(status: int) -> None:
    run = run_helper(str(status))
    assert run.outputs == [(PROGRAM_STATUS_PORT, 1, status)]
    assert run.calls[-1][:2] == (SYS_EXIT, 0)


def test_output_is_drained_and_the_port_asked_for_before_the_write() -> None:
    drain, request, _ = run_helper("0").calls
    assert drain == (SYS_IOCTL, 1, 0x5409, 1)
    assert request == (SYS_IOPERM, PROGRAM_STATUS_PORT, 1, 1)


def test_a_kernel_that_refuses_the_port_makes_it_fail_without_touching_it() -> None:
    run = run_helper("0", ioperm_result=-EPERM)
    assert run.outputs == []
    assert run.calls[-1][:2] == (SYS_EXIT, 1)


def test_it_is_a_static_executable() -> None:
    elf = read_elf64(io.BytesIO(status_helper()))
    assert elf.type == "ET_EXEC"
    assert not elf.needs_interpreter
