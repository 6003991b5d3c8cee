"""A PC with an enclave page cache: where it is, who is told, and what a reset and a snapshot make of it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from pc_guests import ENGINES, PATIENCE, Output, load

from lasskvm.errors import MemoryLayoutError
from lasskvm.kvm import ExecutionEngine, Vm
from lasskvm.machine.boot.e820 import E820Entry, E820Map, E820Type
from lasskvm.machine.devices.fw_cfg import FwCfg, FwCfgKey
from lasskvm.machine.devices.fw_cfg_items import E820_FILE
from lasskvm.machine.ending import End, Ending
from lasskvm.machine.pc import Pc
from lasskvm.machine.provider import HostBoard
from lasskvm.machine.ram import epc_base
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.sgx import EnclsLeaf, PageType, SgxError

MIB, GIB = 1 << 20, 1 << 30
EPC_SIZE = 64 << 10
SELECTOR = 0x510
EPC_BASE = 4 * GIB
RESERVED = E820Entry(EPC_BASE, EPC_BASE + EPC_SIZE, E820Type.RESERVED)
#: The identity map that a guest starts with ends at 4 GiB: this page of it is made to lie in the EPC.
WINDOW = 0x40_0000
#: Maps the EPC at WINDOW with a page of 2 MiB, in the page directory behind CR3.
MAP = f"""
    mov rax, cr3; mov rax, [rax]; and rax, -4096; mov rax, [rax]; and rax, -4096
    mov rbx, {EPC_BASE:#x}; or rbx, 0x83; mov [rax + {WINDOW >> 21 << 3}], rbx; mov rax, cr3; mov cr3, rax
"""
ADD_PAGE = f"mov eax, {EnclsLeaf.EPA}; mov ebx, {PageType.VA}; mov ecx, {WINDOW}; encls"


def make(
    source: str = "hlt", *, engine: ExecutionEngine = "emulator", cpu: str = "max,+sgx", memory: int = 8 * MIB
) -> tuple[Pc, Output]:
    """A PC with an EPC, about to execute *source*."""
    output = Output()
    pc = Pc(memory, parse_cpu(cpu), output=output, engine=engine, epc_size=EPC_SIZE)
    pc.boot(lambda rsdp: load(pc.vm.memory, source, {}))
    return pc, output


def read_item(fw_cfg: FwCfg, key: int, size: int) -> bytes:
    fw_cfg.write_port(SELECTOR, 2, key)
    return bytes(fw_cfg.read_port(SELECTOR + 1, 1) for _ in range(size))


def read_file(fw_cfg: FwCfg, wanted: str) -> bytes:
    """A file, as firmware finds it in the directory."""
    (count,) = struct.unpack(">I", read_item(fw_cfg, FwCfgKey.FILE_DIR, 4))
    directory = read_item(fw_cfg, FwCfgKey.FILE_DIR, 4 + 64 * count)[4:]
    for size, key, name in struct.iter_unpack(">IHxx56s", directory):
        if name.rstrip(b"\0").decode() == wanted:
            return read_item(fw_cfg, key, size)
    raise AssertionError(f"no file {wanted}")


def test_the_memory_map_reserves_the_epc_behind_all_memory() -> None:
    pc, _ = make()
    assert pc.memory_map.entries[-1] == RESERVED
    assert RESERVED not in Pc(8 * MIB, parse_cpu("max"), output=Output()).memory_map.entries


def test_firmware_reads_of_the_epc_in_its_memory_map() -> None:
    pc, _ = make()
    found = read_file(pc.hardware.fw_cfg, E820_FILE)
    assert found == E820Map([E820Entry(0, 8 * MIB, E820Type.RAM), RESERVED]).to_bytes()


@pytest.mark.parametrize("high, base", [(0, 4 * GIB), (GIB, 5 * GIB)])
def test_the_epc_follows_the_memory_above_4_gib(high: int, base: int) -> None:
    assert epc_base(high, EPC_SIZE, 46) == base


@pytest.mark.parametrize(
    "size, bits, said",
    [
        (0, 46, "multiple of 4 KiB"),
        (4095, 46, "multiple of 4 KiB"),
        (-4096, 46, "multiple of 4 KiB"),
        (1 << 50, 52, "this host has"),
        (1 * MIB, 32, "beyond 32 physical address bits"),
    ],
)
def test_an_epc_that_has_no_place_is_refused_with_a_sentence(size: int, bits: int, said: str) -> None:
    with pytest.raises(MemoryLayoutError, match=said):
        epc_base(0, size, bits)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_guest_uses_its_epc_and_finds_it_empty_behind_a_reset(engine: ExecutionEngine) -> None:
    """EPA of the same page would be a page fault, and so a triple fault, if the page were still in use."""
    source = f"""
        {MAP} {ADD_PAGE}
        inc dword [0x200000]; cmp dword [0x200000], 2; je done
        mov dx, 0xcf9; mov al, 6; out dx, al
        hang: jmp hang
        done: mov al, 5; out 0xf8, al
    """
    pc, _ = make(source, engine=engine)
    assert pc.run(PATIENCE) == Ending(End.PROGRAM, 5)


def test_a_second_epa_without_a_reset_is_a_fault() -> None:
    pc, _ = make(f"{MAP} {ADD_PAGE}; {ADD_PAGE}; hlt")
    assert pc.run(PATIENCE).end is End.TRIPLE_FAULT


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pc_goes_on_behind_a_snapshot_with_what_its_epc_held(
    tmp_path: Path, engine: ExecutionEngine
) -> None:
    """EBLOCK says of the page, by the number of its error, that it is a version array."""
    source = f"""
        {MAP} {ADD_PAGE}
        wait: cmp byte [0x200000], 0; je wait
        mov eax, {EnclsLeaf.EBLOCK}; mov ecx, {WINDOW}; encls
        out 0xf8, al
    """
    pc, _ = make(source, engine=engine)
    assert pc.run(0.3).end is End.TIMEOUT
    pc.save(tmp_path / "pc")
    loaded = Pc.load(tmp_path / "pc", output=Output())
    loaded.vm.memory.write(0x200000, b"\1")
    assert loaded.run(PATIENCE) == Ending(End.PROGRAM, SgxError.NOTBLOCKABLE)
    assert loaded.memory_map.entries[-1] == RESERVED
    assert isinstance(loaded.vm, Vm)
    assert loaded.vm.epc is not None
    assert loaded.vm.epc.entry(EPC_BASE) is not None


def test_a_machine_on_the_hosts_kvm_refuses_an_epc() -> None:
    board = HostBoard.__new__(HostBoard)
    with pytest.raises(MemoryLayoutError, match="use --backend soft, or leave --epc out"):
        board.create_epc(EPC_BASE, EPC_SIZE)
