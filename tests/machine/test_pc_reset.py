"""A PC that is reset starts again as behind power-on, with its memory as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from pc_guests import CODE, DATA, ENGINES, PATIENCE, Output, build, read_msr, run, write_msr

from lasskvm.errors import ImageError
from lasskvm.kvm import ExecutionEngine, Vm
from lasskvm.machine.boot.entry import prepare_long_mode
from lasskvm.machine.ending import End, Ending
from lasskvm.machine.optional_devices import DeviceRequest
from lasskvm.machine.pc import Pc
from lasskvm.x86.cpu_models import parse_cpu

#: Ways to a reset. What LIDT loads in the last one is a table without entries.
EMPTY_TABLE = DATA + 0x20
WAYS = {
    "the reset control register": "mov dx, 0xcf9; mov al, 6; out dx, al",
    "the keyboard controller": "mov al, 0xfe; out 0x64, al",
    "port 92H": "mov al, 1; out 0x92, al",
    "a triple fault": f"lidt [{EMPTY_TABLE:#x}]; ud2",
}
HANG = "hang: jmp hang;"


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each way in turn."""
    return WAYS[request.param]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> ExecutionEngine:
    """Each engine in turn."""
    return request.param


# ------------------------------------------------------------------------------------------------------------ memory


def test_memory_survives_a_reset(way: str, engine: ExecutionEngine) -> None:
    ending, output, _ = run(
        f"""
        inc dword [{DATA:#x}]
        mov eax, [{DATA:#x}]; add al, 48; out 0xe9, al
        cmp al, 51; je done
        {way}; {HANG}
        done: mov al, 5; out 0xf8, al
        """,
        engine=engine,
        on_shutdown="reset",
    )
    assert ending == Ending(End.PROGRAM, 5)
    assert output == b"123"


def test_the_image_is_loaded_again_with_its_code_and_data(way: str, engine: ExecutionEngine) -> None:
    ending, output, _ = run(
        f"""
        call show
        mov byte [rip + letter], 66
        mov byte [rip + patched + 1], 98
        call show
        inc dword [{DATA:#x}]; cmp dword [{DATA:#x}], 2; je done
        {way}; {HANG}
        show:
        mov al, [rip + letter]; out 0xe9, al
        patched: mov al, 97; out 0xe9, al; ret
        letter: db 65
        done: out 0xf8, al
        """,
        engine=engine,
        on_shutdown="reset",
    )
    assert ending.end is End.PROGRAM
    assert output == b"AaBbAaBb"


# ------------------------------------------------------------------------------------- everything else is as at first


def lapic(offset: int, value: int) -> tuple[str, str]:
    return f"mov edx, {0xFEE00000 + offset:#x}; mov eax, [rdx];", (
        f"mov edx, {0xFEE00000 + offset:#x}; mov dword [rdx], {value:#x};"
    )


def ioapic(register: int, value: int) -> tuple[str, str]:
    select = f"mov edx, 0xfec00000; mov dword [rdx], {register:#x};"
    return f"{select} mov eax, [rdx + 16];", f"{select} mov dword [rdx + 16], {value:#x};"


def msr(index: int, value: int) -> tuple[str, str]:
    return read_msr(index), write_msr(index, value)


def port(number: int, value: int, mask: int = 0xFF) -> tuple[str, str]:
    return (
        f"mov edx, {number:#x}; in al, dx; and eax, {mask:#x};",
        f"mov edx, {number:#x}; mov al, {value:#x}; out dx, al;",
    )


def control_register(name: str, bits: int) -> tuple[str, str]:
    return f"mov rax, {name};", f"mov rax, {name}; xor rax, {bits:#x}; mov {name}, rax;"


#: What can be read, and what changes it.
REGISTERS = {
    "STAR": msr(0xC0000081, 0x0008_0010_0000_0000),
    "LSTAR": msr(0xC0000082, 0xFFFF_8000_0000_1000),
    "EFER": msr(0xC0000080, 0xD01),
    "KERNEL_GS_BASE": msr(0xC0000102, 0x7000),
    "FS base": msr(0xC0000100, 0x6000),
    "TSC_AUX": msr(0xC0000103, 7),
    "SYSENTER_EIP": msr(0x176, 0x8000),
    "PAT": msr(0x277, 0x0606_0606_0606_0606),
    "MTRR_DEF_TYPE": msr(0x2FF, 0xC06),
    "MTRR_FIX64K": msr(0x250, 0x0606_0606_0606_0606),
    "MTRR_PHYSBASE0": msr(0x200, 0x8000_0006),
    "TSC_ADJUST": msr(0x3B, 0x1000),
    "MISC_FEATURE_ENABLES": msr(0x140, 1),
    "kvmclock's system time": msr(0x4B564D01, DATA + 0x8001),
    "kvmclock's wall clock": msr(0x4B564D00, DATA + 0x8100),
    "CR0": control_register("cr0", 0x1_0002),
    "CR2": control_register("cr2", 0x1234),
    "CR4": control_register("cr4", 0x280),
    "CR8": control_register("cr8", 5),
    "DR0": control_register("dr0", 0x9999),
    "DR7": control_register("dr7", 1),
    "FCW": (
        f"fnstcw [{DATA + 0x40:#x}]; movzx eax, word [{DATA + 0x40:#x}];",
        f"mov word [{DATA + 0x40:#x}], 0x27f; fldcw [{DATA + 0x40:#x}];",
    ),
    "SPIV": lapic(0xF0, 0x1FF),
    "LVT timer": lapic(0x320, 0x2_00EF),
    "LVT LINT0": lapic(0x350, 0x1_0000),
    "LVT LINT1": lapic(0x360, 0x400),
    "divide configuration": lapic(0x3E0, 0xB),
    "initial count": lapic(0x380, 0x7FFF_FFFF),
    "LDR": lapic(0xD0, 0x0100_0000),
    "IOAPIC ID": ioapic(0, 0x0F00_0000),
    "IOAPIC pin 5": ioapic(0x1A, 0x8031),
    "first 8259A's mask": port(0x21, 0x5A),
    "second 8259A's mask": port(0xA1, 0x5A),
    "counter 0's mode": (
        "mov al, 0xe2; out 0x43, al; in al, 0x40; and eax, 0x3f;",
        "mov al, 0x36; out 0x43, al; mov al, 0x10; out 0x40, al; out 0x40, al;",
    ),
    "counter 2's gate": port(0x61, 3, mask=3),
    "UART IER": port(0x3F9, 5),
    "UART LCR": port(0x3FB, 0x1B),
    "UART MCR": port(0x3FC, 8),
    "RTC register B": (
        "mov al, 0xb; out 0x70, al; in al, 0x71;",
        "mov al, 0xb; out 0x70, al; mov al, 0x42; out 0x71, al;",
    ),
    "PM1 enable": port(0x603, 1),
    "PM1 control": port(0x604, 1),
    "A20 gate": port(0x92, 0),
    "pc-testdev's register": port(0xE0, 0x77),
    # The last one: the local APIC's page is gone then.
    "APIC_BASE": msr(0x1B, 0xFEE0_0D00),
}  # fmt: skip


def dump(number: int) -> str:
    """Store all of them in table *number*."""
    place = DATA + 0x1000 * (number + 1)
    return "".join(
        f"xor eax, eax; {read} mov [{place + 8 * index:#x}], rax\n"
        for index, (read, _) in enumerate(REGISTERS.values())
    )


def dumped(vm: Vm, number: int) -> dict[str, int]:
    place = DATA + 0x1000 * (number + 1)
    return {name: vm.memory.load(place + 8 * index, 8) for index, name in enumerate(REGISTERS)}


def test_registers_msrs_and_devices_are_as_behind_power_on(way: str, engine: ExecutionEngine) -> None:
    changes = "\n".join(change for _, change in REGISTERS.values())
    ending, _, vm = run(
        f"""
        inc dword [{DATA:#x}]; cmp dword [{DATA:#x}], 1; jne_rel32_64 again
        {dump(0)}
        {changes}
        {dump(1)}
        {way}; {HANG}
        again:
        {dump(2)}
        out 0xf8, al
        """,
        engine=engine,
        cpu="max",
        on_shutdown="reset",
        devices=[DeviceRequest("pc-testdev")],
    )
    assert ending.end is End.PROGRAM
    at_first, changed = dumped(vm, 0), dumped(vm, 1)
    assert [name for name in REGISTERS if changed[name] == at_first[name]] == []
    assert dumped(vm, 2) == at_first


def test_the_time_stamp_counter_restarts(way: str, engine: ExecutionEngine) -> None:
    ending, _, vm = run(
        f"""
        {read_msr(0x10)}
        inc dword [{DATA:#x}]; mov ecx, [{DATA:#x}]
        mov [{DATA:#x} + rcx * 8], rax
        cmp ecx, 2; je_rel32_64 done
        {write_msr(0x10, 1 << 40)}
        {way}; {HANG}
        done: out 0xf8, al
        """,
        engine=engine,
        on_shutdown="reset",
    )
    assert ending.end is End.PROGRAM
    first, second = vm.memory.load(DATA + 8, 8), vm.memory.load(DATA + 16, 8)
    assert second == pytest.approx(first, abs=1_000_000)


def test_cr4_lass_is_clear_again(engine: ExecutionEngine) -> None:
    # The very next fetch violates LASS, and there is no handler.
    ending, _, vm = run(
        f"""
        inc dword [{DATA:#x}]; mov ecx, [{DATA:#x}]
        mov rax, cr4; mov [{DATA:#x} + rcx * 8], rax
        cmp ecx, 2; je done
        lidt [{EMPTY_TABLE:#x}]
        bts rax, 27; mov cr4, rax; {HANG}
        done: out 0xf8, al
        """,
        engine=engine,
        on_shutdown="reset",
    )
    assert ending.end is End.PROGRAM
    assert vm.memory.load(DATA + 8, 8) == vm.memory.load(DATA + 16, 8)


def test_a_timer_that_was_armed_does_not_fire_behind_the_reset(way: str, engine: ExecutionEngine) -> None:
    ending, _, _ = run(
        f"""
        mov ebx, 0xfee00000; mov dword [rbx + 0xf0], 0x1ff
        inc dword [{DATA:#x}]; cmp dword [{DATA:#x}], 2; je again
        mov dword [rbx + 0x320], 0x30; mov dword [rbx + 0x380], 100000
        {way}; {HANG}
        again:
        sti
        mov ecx, 30000; wait: dec ecx; jne wait
        out 0xf8, al
        timer: mov al, 99; out 0xf8, al
        """,
        handlers={0x30: "timer"},
        engine=engine,
        on_shutdown="reset",
    )
    assert ending == Ending(End.PROGRAM, 0)


def test_a_line_that_was_up_is_down_behind_the_reset(way: str) -> None:
    # A level-triggered pin would interrupt as soon as it is unmasked.
    ending, _, _ = run(
        f"""
        mov ebx, 0xfee00000; mov edi, 0xfec00000; mov dword [rbx + 0xf0], 0x1ff
        inc dword [{DATA:#x}]; cmp dword [{DATA:#x}], 2; je again
        mov dx, 0x2005; mov al, 1; out dx, al
        {way}; {HANG}
        again:
        mov dword [rdi], 0x1a; mov dword [rdi + 16], 0x8031
        sti; nop; nop
        xor eax, eax; out 0xf8, al
        line: mov al, 99; out 0xf8, al
        """,
        handlers={0x31: "line"},
        on_shutdown="reset",
        devices=[DeviceRequest("pc-testdev")],
    )
    assert ending == Ending(End.PROGRAM, 0)


# -------------------------------------------------------------------------------------------- what follows a reset


@pytest.mark.parametrize("name", [name for name in WAYS if name != "a triple fault"])
def test_the_run_ends_when_it_is_to_end_at_a_reset(name: str) -> None:
    ending, _, _ = run(f"{WAYS[name]}; {HANG}", on_reset="exit")
    assert ending == Ending(End.RESET, 0)


def test_a_triple_fault_is_no_reset_unless_it_is_to_be_one() -> None:
    ending, _, _ = run(f"{WAYS['a triple fault']}; {HANG}", on_reset="reset", on_shutdown="exit")
    assert (ending.end, ending.status) == (End.TRIPLE_FAULT, 1)


def test_a_triple_fault_can_be_a_reset_where_others_end_the_run() -> None:
    source = f"inc dword [{DATA:#x}]; cmp dword [{DATA:#x}], 2; je done; ud2; done: mov al, 0xfe; out 0x64, al; {HANG}"
    ending, _, vm = run(source, on_reset="exit", on_shutdown="reset")
    assert ending == Ending(End.RESET, 0)
    assert vm.memory.load(DATA, 4) == 2


def test_a_guest_that_only_starts_again_is_ended_at_the_time_limit(way: str) -> None:
    pc = build(f"{way}; {HANG}", Output(), on_shutdown="reset")
    assert pc.run(0.3).end is End.TIMEOUT


def test_a_guest_that_only_starts_again_leaves_the_console_its_turn(way: str) -> None:
    turns: list[int | None] = []

    def idle(nanoseconds: int | None) -> None:
        turns.append(nanoseconds)
        if len(turns) == 3:
            pc.stop()

    pc = build(f"{way}; {HANG}", Output(), on_shutdown="reset", idle=idle)
    assert pc.run(PATIENCE).end is End.STOPPED


def test_someone_from_without_can_pull_the_reset_line() -> None:
    turns: list[int | None] = []

    def idle(nanoseconds: int | None) -> None:
        if pc.vm.memory.load(DATA, 4) == 1 and not turns:
            turns.append(nanoseconds)
            pc.reset_machine()

    pc = build(
        f"inc dword [{DATA:#x}]; cmp dword [{DATA:#x}], 2; je done; {HANG} done: mov al, 3; out 0xf8, al",
        Output(),
        idle=idle,
    )
    assert pc.run(PATIENCE) == Ending(End.PROGRAM, 3)


def test_a_reset_that_was_asked_for_when_the_machine_is_saved_comes_first(tmp_path: Path, way: str) -> None:
    source = f"""
        inc dword [{DATA:#x}]; cmp dword [{DATA:#x}], 2; je done
        mov ecx, 999; count: out 0xe9, al; dec ecx; jne count
        {way}; {HANG}
        done: mov al, 3; out 0xf8, al
    """
    pc = build(source, Output(), on_shutdown="reset")
    assert pc.run(0).end is End.TIMEOUT
    pc.save(tmp_path / "pc")
    assert Pc.load(tmp_path / "pc", output=Output()).run(PATIENCE) == Ending(End.PROGRAM, 3)


def test_an_image_that_is_gone_at_the_reset_is_said(way: str) -> None:
    pc = build(f"{way}; {HANG}", Output(), on_shutdown="reset")

    def gone(rsdp: int) -> object:
        raise ImageError("there is no file kernel any more")

    pc._load_image = gone  # type: ignore[assignment]
    with pytest.raises(ImageError, match="no file"):
        pc.run(PATIENCE)


def test_a_machine_that_was_entered_by_hand_has_nothing_to_start_again() -> None:
    pc = Pc(8 << 20, parse_cpu("max"), output=Output(), on_reset="reset", on_shutdown="reset")
    pc.vm.memory.write(CODE, b"\xb0\xfe\xe6\x64\xeb\xfe")
    pc.enter(prepare_long_mode(pc.vm.memory, CODE))
    assert pc.run(PATIENCE) == Ending(End.RESET, 0)
