"""IN, OUT, INS and OUTS: data, permission, breakpoints, devices and the VMM."""

from __future__ import annotations

import pytest
from emulator_guest import CODE, TSS, UPPER, USER_CODE, Guest
from legacy_modes import (
    DATA_BASE,
    EXTRA_BASE,
    START,
    enter_protected_mode,
    enter_real_mode,
    enter_virtual_8086_mode,
    run,
)

from lasskvm.emulator.execution import emulate_instruction
from lasskvm.emulator.faults import GuestFault
from lasskvm.emulator.mmio import MmioReadNeeded
from lasskvm.emulator.port_io import PortAccessNeeded, breakpoint_hits, finish_element
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import (
    ATTRIBUTES,
    CR4,
    DR0,
    DR6,
    DR7,
    LIMIT,
    RAX,
    RCX,
    RDI,
    RDX,
    RFLAGS,
    RIP,
    RSI,
    segment_word,
)
from lasskvm.x86.descriptors import TSS64_BYTES, TSS64_IO_MAP_BASE
from lasskvm.x86.exceptions import DB, GP, PF, PF_W
from lasskvm.x86.paging import PTE_P, PTE_W
from lasskvm.x86.registers import (
    AR_UNUSABLE,
    CR4_DE,
    DR6_BS,
    DR6_FIXED,
    RFLAGS_DF,
    RFLAGS_IOPL,
    RFLAGS_RF,
    RFLAGS_TF,
    TR,
)

DATA = UPPER + 0x70000
DEVICE_GPA, DEVICE = 0xFE00_0000, UPPER + 0xB0000
PORT = 0x3F8
ONES = (1 << 64) - 1
IN_AL_DX, IN_AX_DX, IN_EAX_DX, IN_AL_71 = "ec", "66ed", "ed", "e471"
OUT_DX_AL, OUT_DX_AX, OUT_DX_EAX, OUT_80_AL = "ee", "66ef", "ef", "e680"
INSB, INSW, INSD, OUTSB, OUTSW, OUTSD = "6c", "666d", "6d", "6e", "666f", "6f"
REP = "f3"


class Device:
    """A device at one port that answers 11H, 22H, 33H ... in every byte, and keeps what is written."""

    def __init__(self, guest: Guest, port: int = PORT) -> None:
        self.port = port
        self.reads: list[int] = []
        self.writes: list[tuple[int, int]] = []
        guest.ctx.read_port, guest.ctx.write_port = self.read, self.write
        guest.words[RDX] = 0xFFFF_0000_0000_0000 | port

    def read(self, port: int, size: int) -> int | None:
        if port != self.port:
            return None
        self.reads.append(size)
        return len(self.reads) * 0x11111111 & (1 << 8 * size) - 1

    def write(self, port: int, size: int, value: int) -> bool:
        if port == self.port:
            self.writes.append((size, value))
        return port == self.port


# ------------------------------------------------------------------------------------------------ IN and OUT


@pytest.mark.parametrize(
    "code, size, rax",
    [(IN_AL_DX, 1, ONES ^ 0xEE), (IN_AX_DX, 2, ONES ^ 0xEEEE), (IN_EAX_DX, 4, 0x11111111)],
)
def test_in_writes_as_much_of_rax_as_it_reads(guest: Guest, code: str, size: int, rax: int) -> None:
    device = Device(guest)
    guest.words[RAX] = ONES
    guest.run(code)
    assert device.reads == [size]
    assert guest.words[RAX] == rax
    assert guest.words[RIP] == CODE + len(code) // 2


@pytest.mark.parametrize("code, size", [(OUT_DX_AL, 1), (OUT_DX_AX, 2), (OUT_DX_EAX, 4)])
def test_out_writes_the_low_part_of_rax(guest: Guest, code: str, size: int) -> None:
    device = Device(guest)
    guest.words[RAX] = 0x8877665544332211
    guest.run(code)
    assert device.writes == [(size, 0x44332211 & (1 << 8 * size) - 1)]


def test_port_in_the_instruction_is_one_byte(guest: Guest) -> None:
    device = Device(guest, port=0x80)
    guest.words[RAX] = 0x5A
    guest.run(OUT_80_AL)
    assert device.writes == [(1, 0x5A)]
    device.port = 0x71
    guest.run(IN_AL_71)
    assert guest.words[RAX] == 0x11


def test_repeat_prefix_of_in_is_ignored(guest: Guest) -> None:
    device = Device(guest)
    guest.words[RCX] = 5
    guest.run(REP + IN_AL_DX)
    assert device.reads == [1]
    assert (guest.words[RCX], guest.words[RIP]) == (5, CODE + 2)


@pytest.mark.parametrize("code, write, value", [(IN_AX_DX, False, 0), (OUT_DX_AX, True, 0x2211)])
def test_port_without_a_device_waits_for_the_vmm(guest: Guest, code: str, write: bool, value: int) -> None:
    words = guest.words
    words[RDX], words[RAX] = 0x1234, 0x44332211
    guest.write_code(bytes.fromhex(code))
    before = guest.snapshot()
    with pytest.raises(PortAccessNeeded) as needed:
        guest.run(code)
    assert guest.snapshot() == before
    access = needed.value.access
    assert (access.port, access.size, access.write, access.value) == (0x1234, 2, write, value)
    assert finish_element(guest.ctx, access, 0xABCD)
    assert words[RAX] == (0x44332211 if write else 0x4433ABCD)


# ---------------------------------------------------------------------------------------------- INS and OUTS


@pytest.mark.parametrize("code, size", [(INSB, 1), (INSW, 2), (INSD, 4)])
@pytest.mark.parametrize("direction", [0, RFLAGS_DF])
def test_ins_stores_at_rdi(guest: Guest, code: str, size: int, direction: int) -> None:
    device = Device(guest)
    guest.words[RFLAGS] |= direction
    guest.words[RDI] = DATA
    guest.run(code)
    assert device.reads == [size]
    assert guest.load(DATA) == 0x11111111 & (1 << 8 * size) - 1
    assert guest.words[RDI] == DATA + (-size if direction else size)


@pytest.mark.parametrize("code, size", [(OUTSB, 1), (OUTSW, 2), (OUTSD, 4)])
def test_outs_loads_at_rsi(guest: Guest, code: str, size: int) -> None:
    device = Device(guest)
    guest.store(DATA, 4, 0x44332211)
    guest.words[RSI] = DATA
    guest.run(code)
    assert device.writes == [(size, 0x44332211 & (1 << 8 * size) - 1)]
    assert guest.words[RSI] == DATA + size


def test_repeated_outs_does_one_element_at_a_time(guest: Guest) -> None:
    device = Device(guest)
    guest.memory.write(DATA & 0xFFFFF, b"abc")
    guest.words[RSI], guest.words[RCX] = DATA, 3
    for left in (2, 1, 0):
        guest.run(REP + OUTSB)
        assert len(device.writes) == 3 - left
        assert guest.words[RCX] == left
        assert guest.words[RIP] == (CODE if left else CODE + 2)
        assert bool(guest.words[RFLAGS] & RFLAGS_RF) == bool(left)
    assert bytes(value for _, value in device.writes) == b"abc"


def test_repeated_ins_waits_for_the_vmm_at_each_element(guest: Guest) -> None:
    words = guest.words
    words[RDI], words[RCX], words[RDX] = DATA, 2, PORT
    for number, complete in ((1, False), (2, True)):
        with pytest.raises(PortAccessNeeded) as needed:
            guest.run(REP + INSW)
        assert words[RCX] == 3 - number
        assert finish_element(guest.ctx, needed.value.access, 0x1111 * number) == complete
    assert guest.load(DATA, 4) == 0x22221111
    assert (words[RCX], words[RDI]) == (0, DATA + 4)


@pytest.mark.parametrize("code", [INSB, OUTSB])
def test_count_of_0_accesses_neither_port_nor_memory(guest: Guest, code: str) -> None:
    device = Device(guest)
    guest.words[RSI] = guest.words[RDI] = 1 << 47
    guest.run(REP + code)
    assert (device.reads, device.writes) == ([], [])
    assert guest.words[RIP] == CODE + 2


@pytest.mark.parametrize("offset, vector, error_code", [(0, PF, PF_W), (1 << 47, GP, 0)])
def test_ins_whose_store_would_fault_leaves_the_device_alone(
    guest: Guest, offset: int, vector: int, error_code: int
) -> None:
    device = Device(guest)
    guest.unmap(DATA)
    guest.words[RDI] = DATA ^ offset
    assert guest.fault_of(INSB) == (vector, error_code)
    assert device.reads == []


def test_outs_whose_load_faults_leaves_the_device_alone(guest: Guest) -> None:
    device = Device(guest)
    guest.unmap(DATA + PAGE_SIZE)
    guest.words[RSI] = DATA + PAGE_SIZE - 2
    assert guest.fault_of(OUTSD) == (PF, 0)
    assert device.writes == []


def test_outs_from_a_device_in_memory_asks_it_first(guest: Guest) -> None:
    device = Device(guest)
    guest.memory.store(guest.page_entry(DEVICE), 8, DEVICE_GPA | PTE_P | PTE_W)
    guest.words[RSI] = DEVICE
    with pytest.raises(MmioReadNeeded):
        guest.run(OUTSW)
    assert device.writes == []
    guest.ctx.mmio.answer(0x1234)
    guest.run(OUTSW)
    assert device.writes == [(2, 0x1234)]


def test_single_step_trap_comes_behind_each_element(guest: Guest) -> None:
    Device(guest)
    guest.words[RFLAGS] |= RFLAGS_TF
    guest.words[RDI], guest.words[RCX] = DATA, 2
    for rip in (CODE, CODE + 2):
        with pytest.raises(GuestFault) as caught:
            guest.run(REP + INSB)
        assert (caught.value.vector, caught.value.dr6) == (DB, DR6_BS)
        assert guest.words[RIP] == rip


def test_real_mode_strings_use_16_bit_indices_and_their_segments(guest: Guest) -> None:
    enter_real_mode(guest)
    device = Device(guest)
    words = guest.words
    words[RSI], words[RDI] = 0x5_FFFF, 0x6_FFFF
    guest.memory.store(DATA_BASE + 0xFFFF, 1, 0x5A)
    run(guest, "6e")
    assert device.writes == [(1, 0x5A)]
    assert words[RSI] == 0x5_0000
    run(guest, "6c")
    assert guest.memory.load(EXTRA_BASE + 0xFFFF, 1) == 0x11
    assert words[RDI] == 0x6_0000


def test_outs_takes_a_segment_override(guest: Guest) -> None:
    enter_protected_mode(guest, 32)
    device = Device(guest)
    guest.words[RSI] = 0x40
    guest.memory.store(EXTRA_BASE + 0x40, 1, 0x77)
    run(guest, "26 6e")
    assert device.writes == [(1, 0x77)]
    assert guest.words[RIP] == START + 2


# ------------------------------------------------------------------------------------------------ permission

EVERY_FORM = [IN_AL_DX, OUT_DX_EAX, INSB, OUTSD, REP + INSB, REP + OUTSB]


@pytest.fixture
def permitted(user: Guest) -> Guest:
    """User code at CPL 3 and IOPL 0 that the I/O bitmap gives ports 3F8H to 3FBH."""
    user.words[segment_word(TR, LIMIT)] = TSS64_BYTES + 0x2000
    user.store(TSS + TSS64_IO_MAP_BASE, 2, TSS64_BYTES)
    for offset in range(0x2001):
        user.store(TSS + TSS64_BYTES + offset, 1, 0xFF)
    user.store(TSS + TSS64_BYTES + PORT // 8, 1, 0xF0)
    return user


@pytest.mark.parametrize("code", EVERY_FORM)
def test_user_without_an_io_bitmap_may_not_touch_ports(user: Guest, code: str) -> None:
    device = Device(user)
    user.store(TSS + TSS64_IO_MAP_BASE, 2, TSS64_BYTES)
    user.words[RSI] = user.words[RDI] = 0x70000
    user.words[RCX] = 1
    assert user.fault_of(code) == (GP, 0)
    assert (device.reads, device.writes) == ([], [])


def test_permission_is_asked_even_if_the_count_is_0(user: Guest) -> None:
    user.words[segment_word(TR, ATTRIBUTES)] = AR_UNUSABLE
    assert user.fault_of(REP + OUTSB) == (GP, 0)


def test_user_with_iopl_3_may_touch_all_ports(user: Guest) -> None:
    device = Device(user)
    user.words[RFLAGS] |= RFLAGS_IOPL
    user.run(OUT_DX_AL)
    assert len(device.writes) == 1
    assert user.words[RIP] == USER_CODE + 1


def test_io_bitmap_must_allow_every_byte_of_an_access(permitted: Guest) -> None:
    device = Device(permitted)
    permitted.run(OUT_DX_EAX)
    permitted.words[RDX] += 1
    device.port += 1
    assert permitted.fault_of(OUT_DX_EAX) == (GP, 0)
    permitted.run(OUT_DX_AX)
    assert [size for size, _ in device.writes] == [4, 2]


def test_missing_page_of_the_io_bitmap_is_a_supervisor_page_fault(permitted: Guest) -> None:
    Device(permitted, port=0x8000)
    permitted.unmap(TSS + TSS64_BYTES + 0x1000)
    assert permitted.fault_of(IN_AL_DX) == (PF, 0)


def test_memory_of_the_user_is_checked_behind_the_permission(permitted: Guest) -> None:
    device = Device(permitted)
    permitted.words[RDI] = DATA
    assert permitted.fault_of(INSB) == (GP, 0)
    permitted.words[RDI] = 0x70000
    permitted.run(INSB)
    assert device.reads == [1]


def test_virtual_8086_mode_goes_by_the_bitmap_even_with_iopl_3(guest: Guest) -> None:
    enter_virtual_8086_mode(guest, iopl=3)
    Device(guest)
    guest.words[segment_word(TR, ATTRIBUTES)] = AR_UNUSABLE
    with pytest.raises(GuestFault) as caught:
        run(guest, IN_AL_DX)
    assert caught.value.vector == GP


def test_real_mode_asks_nobody(guest: Guest) -> None:
    enter_real_mode(guest)
    device = Device(guest)
    guest.words[segment_word(TR, ATTRIBUTES)] = AR_UNUSABLE
    run(guest, IN_AL_DX)
    assert device.reads == [1]


# ----------------------------------------------------------------------------------------------- breakpoints


@pytest.mark.parametrize(
    "dr0, length_field, port, size, hit",
    [
        (PORT, 0, PORT, 1, True),
        (PORT, 0, PORT + 1, 1, False),
        (PORT, 0, PORT - 1, 1, False),
        (PORT + 3, 0, PORT, 4, True),
        (PORT, 3, PORT + 3, 1, True),
        (PORT + 2, 3, PORT, 1, True),
        (PORT, 1, PORT + 2, 1, False),
    ],
)
def test_io_breakpoint_covers_an_aligned_range_of_ports(
    guest: Guest, dr0: int, length_field: int, port: int, size: int, hit: bool
) -> None:
    guest.words[CR4] |= CR4_DE
    guest.words[DR0], guest.words[DR7] = dr0, 0x402 | 2 << 16 | length_field << 18
    assert breakpoint_hits(guest.words, port, size) == int(hit)


def test_io_breakpoints_need_cr4_de(guest: Guest) -> None:
    guest.words[DR0], guest.words[DR7] = PORT, 0x402 | 2 << 16
    assert breakpoint_hits(guest.words, PORT, 1) == 0


def test_io_breakpoint_traps_behind_the_instruction(guest: Guest) -> None:
    device = Device(guest)
    guest.words[CR4] |= CR4_DE
    guest.words[DR0 + 1], guest.words[DR7] = PORT, 0x408 | 2 << 20
    guest.write_code(bytes.fromhex(OUT_DX_AL))
    emulate_instruction(guest.ctx)
    assert len(device.writes) == 1
    assert guest.words[DR6] == DR6_FIXED | 2
    assert guest.words[RIP] == CODE + 16 * DB
    assert guest.frame(1) == [CODE + 1]
