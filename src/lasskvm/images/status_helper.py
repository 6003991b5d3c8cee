"""The program that hands an exit status from the guest's user space to the VMM.

Distribution kernels come without /dev/port, so a shell cannot write an I/O port. This static program of a
few hundred bytes can: ``lasskvm-status N`` waits until its standard output has been transmitted, asks the
kernel for the port (ioperm) and writes the byte N to
:data:`~lasskvm.machine.boot.linux.PROGRAM_STATUS_PORT`. It exits with 1 when the kernel refuses, and
returns at all only where no VMM listens on the port.
"""

from __future__ import annotations

import struct

from iced_x86 import BlockEncoder, Code, Instruction, MemoryOperand, Register

from lasskvm.machine.boot import PROGRAM_STATUS_PORT

__all__ = ["status_helper"]

_LOAD_ADDRESS = 0x400000
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_CODE_OFFSET = _ELF_HEADER.size + _PROGRAM_HEADER.size
_ELF64_LSB_IDENT = b"\x7fELF\x02\x01\x01"
_ET_EXEC, _EM_X86_64, _EV_CURRENT, _PT_LOAD, _PF_R_X = 2, 62, 1, 1, 5

# System calls of Linux on x86-64, and the ioctl behind tcdrain(3)
_SYS_IOCTL, _SYS_EXIT, _SYS_IOPERM = 16, 60, 173
_TCSBRK, _STDOUT = 0x5409, 1

#: At the entry of a process RSP holds argc, then the argument pointers.
_ARGV1_OFFSET = 16

# Labels; the encoder takes any distinct numbers below the code
_DIGIT, _PARSED, _EXIT = 1, 2, 3


def status_helper() -> bytes:
    """The helper as a static ELF executable."""
    encoder = BlockEncoder(64)
    encoder.add_many(_instructions())
    code = encoder.encode(_LOAD_ADDRESS + _CODE_OFFSET)
    size = _CODE_OFFSET + len(code)
    header = _ELF_HEADER.pack(
        _ELF64_LSB_IDENT,
        _ET_EXEC,
        _EM_X86_64,
        _EV_CURRENT,
        _LOAD_ADDRESS + _CODE_OFFSET,
        _ELF_HEADER.size,
        0,
        0,
        _ELF_HEADER.size,
        _PROGRAM_HEADER.size,
        1,
        0,
        0,
        0,
    )
    segment = _PROGRAM_HEADER.pack(_PT_LOAD, _PF_R_X, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, 1 << 12)
    return header + segment + code


def _instructions() -> list[Instruction]:
    argument, status, digit = Register.RSI, Register.EBX, Register.EAX
    parse = [
        Instruction.create_reg_mem(
            Code.MOV_R64_RM64, argument, MemoryOperand(Register.RSP, displ=_ARGV1_OFFSET)
        ),
        Instruction.create_reg_reg(Code.XOR_R32_RM32, status, status),
        _labelled(_DIGIT, Instruction.create_reg_mem(Code.MOVZX_R32_RM8, digit, MemoryOperand(argument))),
        Instruction.create_reg_reg(Code.TEST_RM32_R32, digit, digit),
        Instruction.create_branch(Code.JE_REL8_64, _PARSED),
        Instruction.create_reg_reg_i32(Code.IMUL_R32_RM32_IMM8, status, status, 10),
        Instruction.create_reg_mem(
            Code.LEA_R32_M, status, MemoryOperand(Register.RBX, Register.RAX, displ=-ord("0"), displ_size=1)
        ),
        Instruction.create_reg(Code.INC_RM64, argument),
        Instruction.create_branch(Code.JMP_REL8_64, _DIGIT),
    ]
    drain, request = (
        _system_call(_SYS_IOCTL, _STDOUT, _TCSBRK, 1),
        _system_call(_SYS_IOPERM, PROGRAM_STATUS_PORT, 1, 1),
    )
    write = [
        Instruction.create_reg_i32(Code.MOV_R32_IMM32, Register.EDI, 1),
        Instruction.create_reg_reg(Code.TEST_RM32_R32, Register.EAX, Register.EAX),
        Instruction.create_branch(Code.JNE_REL8_64, _EXIT),
        Instruction.create_reg_i32(Code.MOV_R32_IMM32, Register.EDX, PROGRAM_STATUS_PORT),
        Instruction.create_reg_reg(Code.MOV_R32_RM32, Register.EAX, status),
        Instruction.create_reg_reg(Code.OUT_DX_AL, Register.DX, Register.AL),
        Instruction.create_reg_reg(Code.XOR_R32_RM32, Register.EDI, Register.EDI),
    ]
    leave = [
        _labelled(_EXIT, Instruction.create_reg_i32(Code.MOV_R32_IMM32, Register.EAX, _SYS_EXIT)),
        Instruction.create(Code.SYSCALL),
    ]
    return [*parse, _labelled(_PARSED, drain[0]), *drain[1:], *request, *write, *leave]


def _labelled(label: int, instruction: Instruction) -> Instruction:
    instruction.ip = label
    return instruction


def _system_call(number: int, *arguments: int) -> list[Instruction]:
    registers = (Register.EDI, Register.ESI, Register.EDX)
    values = [*zip(registers, arguments, strict=True), (Register.EAX, number)]
    loads = [Instruction.create_reg_i32(Code.MOV_R32_IMM32, register, value) for register, value in values]
    return [*loads, Instruction.create(Code.SYSCALL)]
