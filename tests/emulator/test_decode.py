"""Instruction fetch, and what decoding tells about an instruction's memory accesses."""

from __future__ import annotations

import pytest
from emulator_guest import CODE, KERNEL_STACK, USER_CODE, USER_STACK, Guest
from iced_x86 import Mnemonic

from lasskvm.emulator.decode import (
    Decoded,
    decode,
    effective_address,
    fetch_instruction,
    is_read_modify_write,
    is_stack_access,
)
from lasskvm.emulator.faults import GuestFault
from lasskvm.state import (
    ATTRIBUTES,
    BASE,
    CR0,
    EFER,
    LIMIT,
    RAX,
    RBP,
    RBX,
    RFLAGS,
    RIP,
    RSI,
    RSP,
    segment_word,
)
from lasskvm.x86.exceptions import GP, PF, PF_I, PF_U, UD
from lasskvm.x86.registers import AR_CODE32, CR0_PG, CS, EFER_LMA, FS, RFLAGS_AC, SS

TARGET = 0x7000


def decoded(code: str, bits: int = 64) -> Decoded:
    result = decode(bits, bytes.fromhex(code))
    assert isinstance(result, Decoded)
    return result


def fetch_fault(guest: Guest) -> GuestFault:
    before = guest.snapshot()
    with pytest.raises(GuestFault) as caught:
        fetch_instruction(guest.ctx)
    assert guest.snapshot() == before
    return caught.value


# ---------------------------------------------------------------------------------------------------- fetch


def test_fetch_decodes_what_lies_at_rip(guest: Guest) -> None:
    guest.write_code(bytes.fromhex("0f01f8"))
    result = fetch_instruction(guest.ctx)
    assert result.instruction.mnemonic == Mnemonic.SWAPGS
    assert result.length == 3


def test_equal_bytes_are_decoded_once() -> None:
    assert decoded("0fa2") is decoded("0fa2")


def test_fetch_from_user_half_at_cpl_0_violates_lass_even_with_ac(guest: Guest) -> None:
    guest.words[RIP] = USER_CODE
    guest.words[RFLAGS] |= RFLAGS_AC
    fault = fetch_fault(guest)
    assert (fault.vector, fault.error_code) == (GP, 0)


def test_fetch_from_kernel_half_at_cpl_3_violates_lass(user: Guest) -> None:
    user.words[RIP] = CODE
    assert fetch_fault(user).vector == GP


def test_fetch_from_an_unmapped_page_is_a_page_fault(user: Guest) -> None:
    user.unmap(USER_CODE)
    fault = fetch_fault(user)
    assert (fault.vector, fault.error_code, fault.cr2) == (PF, PF_U | PF_I, USER_CODE)


def test_second_page_is_not_touched_by_an_instruction_that_ends_before_it(user: Guest) -> None:
    user.words[RIP] = USER_CODE + 0xFFE
    user.write_code(bytes.fromhex("0fa2"))
    user.unmap(USER_CODE + 0x1000)
    assert fetch_instruction(user.ctx).instruction.mnemonic == Mnemonic.CPUID


def test_fault_on_the_second_page_reports_its_address(user: Guest) -> None:
    user.words[RIP] = USER_CODE + 0xFFF
    user.write_code(bytes.fromhex("0f"))
    user.unmap(USER_CODE + 0x1000)
    fault = fetch_fault(user)
    assert (fault.vector, fault.cr2) == (PF, USER_CODE + 0x1000)


def test_instruction_across_two_mapped_pages_is_fetched_whole(user: Guest) -> None:
    user.words[RIP] = USER_CODE + 0xFFF
    user.write_code(bytes.fromhex("0fa2"))
    assert fetch_instruction(user.ctx).instruction.mnemonic == Mnemonic.CPUID


def test_what_is_no_instruction_is_an_invalid_opcode(guest: Guest) -> None:
    guest.write_code(bytes.fromhex("0f04") + bytes(13))
    assert fetch_fault(guest).vector == UD


def test_lock_where_it_is_illegal_is_an_invalid_opcode(guest: Guest) -> None:
    guest.write_code(bytes.fromhex("f08b00") + bytes(12))
    assert fetch_fault(guest).vector == UD


def test_fifteen_bytes_are_an_instruction_and_sixteen_are_a_general_protection(guest: Guest) -> None:
    guest.write_code(b"\x66" * 14 + b"\x90")
    assert fetch_instruction(guest.ctx).length == 15
    guest.write_code(b"\x66" * 15 + b"\x90")
    assert fetch_fault(guest).vector == GP


def test_fetch_beyond_the_code_limit_is_a_general_protection(guest: Guest) -> None:
    guest.words[EFER] &= ~EFER_LMA
    guest.words[CR0] &= ~CR0_PG
    guest.words[segment_word(CS, ATTRIBUTES)] = AR_CODE32
    guest.words[RIP] = USER_CODE
    guest.write_code(bytes.fromhex("0fa2"))
    guest.words[segment_word(CS, LIMIT)] = USER_CODE + 1
    assert fetch_instruction(guest.ctx).length == 2
    guest.words[segment_word(CS, LIMIT)] = USER_CODE
    assert fetch_fault(guest).vector == GP


# -------------------------------------------------------------------------------------------- stack accesses


@pytest.mark.parametrize(
    ("code", "is_stack"),
    [
        ("8b00", False),  # mov eax, [rax]
        ("8b4500", True),  # mov eax, [rbp]
        ("8b0424", True),  # mov eax, [rsp]
        ("678b4500", True),  # mov eax, [ebp]
        ("3e8b4500", True),  # mov eax, ds:[rbp]: the override is ignored
        ("368b00", False),  # mov eax, ss:[rax]: so is this one
        ("648b4500", False),  # mov eax, fs:[rbp]: this one counts
        ("658b4500", False),  # mov eax, gs:[rbp]
        ("8b0428", False),  # mov eax, [rax+rbp]: RBP as index
        ("418b4500", False),  # mov eax, [r13]
        ("50", True),  # push rax
        ("58", True),  # pop rax
        ("c3", True),  # ret
        ("e800000000", True),  # call
        ("c9", True),  # leave
        ("c8100000", True),  # enter 16, 0
        ("c8100003", True),  # enter 16, 3
        ("a4", False),  # movsb
        ("48cf", True),  # iretq
    ],
)
def test_stack_accesses_in_64_bit_mode(guest: Guest, code: str, is_stack: bool) -> None:
    instruction = decoded(code)
    words = guest.words
    words[RAX], words[RBP], words[RSP] = TARGET, 0x9000, 0xA000
    operand = instruction.accesses[0]
    address = effective_address(words, operand)
    assert is_stack_access(words, instruction, address) is is_stack


def test_push_from_memory_makes_both_kinds_of_access(guest: Guest) -> None:
    push = decoded("ff30")  # push qword [rax]
    guest.words[RAX] = TARGET
    assert not is_stack_access(guest.words, push, TARGET)
    assert not is_stack_access(guest.words, push, TARGET + 7)
    assert is_stack_access(guest.words, push, KERNEL_STACK - 8)
    assert is_stack_access(guest.words, push, KERNEL_STACK - 1)


def test_pop_to_memory_computes_its_address_after_the_pop(guest: Guest) -> None:
    pop = decoded("8f442408")  # pop qword [rsp+8]
    addresses = [effective_address(guest.words, operand) for operand in pop.accesses]
    assert addresses == [KERNEL_STACK + 16, KERNEL_STACK]


def test_call_through_memory_makes_both_kinds_of_access(user: Guest) -> None:
    call = decoded("ff10")  # call [rax]
    user.words[RAX] = TARGET
    assert not is_stack_access(user.words, call, TARGET)
    assert is_stack_access(user.words, call, USER_STACK - 8)


def test_access_whose_size_depends_on_the_state_is_judged_by_its_base(guest: Guest) -> None:
    xsave = decoded("0fae6500")  # xsave [rbp]
    guest.words[RBP] = 0x9000
    assert is_stack_access(guest.words, xsave, 0x9000 + 0x240)


def test_outside_64_bit_mode_the_segment_decides(guest: Guest) -> None:
    words = guest.words
    words[EFER] &= ~EFER_LMA
    words[RAX] = TARGET
    words[segment_word(SS, BASE)] = 0x1000
    assert is_stack_access(words, decoded("368b00", 32), TARGET + 0x1000)
    assert not is_stack_access(words, decoded("8b00", 32), TARGET)


# ------------------------------------------------------------------------------------ effective addresses


def test_rip_relative_operands_follow_the_instruction(guest: Guest) -> None:
    lgdt = decoded("0f011510000000")  # lgdt [rip+16], 7 bytes
    assert lgdt.operand is not None
    assert effective_address(guest.words, lgdt.operand) == CODE + 7 + 16
    assert effective_address(guest.words, lgdt.accesses[0]) == CODE + 7 + 16


def test_rip_relative_with_a_32_bit_address_size_truncates(guest: Guest) -> None:
    push = decoded("67ff3510000000")  # push qword [eip+16]
    assert push.operand is not None
    assert effective_address(guest.words, push.operand) == CODE + 7 + 16 & 0xFFFFFFFF
    assert effective_address(guest.words, push.accesses[0]) == CODE + 7 + 16 & 0xFFFFFFFF


def test_base_index_scale_and_displacement_add_up_and_wrap(guest: Guest) -> None:
    load = decoded("488b84f3f0ffffff")  # mov rax, [rbx+rsi*8-16]
    guest.words[RBX], guest.words[RSI] = 0x10, (1 << 64) - 1
    assert load.operand is not None
    assert effective_address(guest.words, load.operand) == (0x10 - 8 - 16) % (1 << 64)


def test_32_bit_address_size_uses_the_low_halves(guest: Guest) -> None:
    load = decoded("678b00")  # mov eax, [eax]
    guest.words[RAX] = 0xFFFF_FFFF_0000_7000
    assert load.operand is not None
    assert effective_address(guest.words, load.operand) == 0x7000


def test_xlat_adds_al(guest: Guest) -> None:
    xlat = decoded("d7")
    guest.words[RBX], guest.words[RAX] = 0x1000, 0xFFF0
    assert effective_address(guest.words, xlat.accesses[0]) == 0x10F0


def test_16_bit_addresses_wrap_at_64_kib(guest: Guest) -> None:
    load = decoded("8b4002", 16)  # mov ax, [bx+si+2]
    guest.words[RBX], guest.words[RSI] = 0xFFFF, 0xFFFF
    assert load.operand is not None
    assert effective_address(guest.words, load.operand) == 0


def test_invlpg_names_an_operand_and_accesses_nothing() -> None:
    invlpg = decoded("0f0138")
    assert invlpg.operand is not None
    assert invlpg.accesses == ()


def test_fs_override_moves_the_access_by_the_base(guest: Guest) -> None:
    load = decoded("648b4500")  # mov eax, fs:[rbp]
    guest.words[RBP], guest.words[segment_word(FS, BASE)] = 0x10, 0x5000
    assert load.accesses[0].segment == FS
    assert not is_stack_access(guest.words, load, 0x5010)


# --------------------------------------------------------------------------------------- read-modify-write


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("0100", True),  # add [rax], eax
        ("f0480fb108", True),  # lock cmpxchg [rax], rcx
        ("0fc708", True),  # cmpxchg8b [rax]
        ("8700", True),  # xchg [rax], eax
        ("480fba2805", True),  # bts qword [rax], 5
        ("8b00", False),  # mov eax, [rax]
        ("8900", False),  # mov [rax], eax
        ("803800", False),  # cmp byte [rax], 0
        ("480fba2005", False),  # bt qword [rax], 5
    ],
)
def test_read_modify_write_instructions(guest: Guest, code: str, expected: bool) -> None:
    guest.words[RAX] = TARGET
    assert is_read_modify_write(guest.words, decoded(code), TARGET) is expected


def test_movs_reads_one_place_and_writes_another(guest: Guest) -> None:
    movs = decoded("a4")
    assert not any(operand.reads and operand.writes for operand in movs.accesses)
    assert not is_read_modify_write(guest.words, movs, guest.words[RSI])
