"""A PC with firmware at the reset vector, and with an image that is entered in 32-bit mode."""

from __future__ import annotations

from pathlib import Path

import pytest
from boot_builders import Load, make_elf32, make_multiboot_header
from pc_guests import ENGINES, PATIENCE, Output

from lasskvm.conformance.assembler import assemble
from lasskvm.kvm import ExecutionEngine
from lasskvm.machine.boot import Module, load_image
from lasskvm.machine.ending import End, Ending
from lasskvm.machine.optional_devices import DeviceRequest
from lasskvm.machine.pc import OnEvent, Pc
from lasskvm.x86.cpu_models import parse_cpu

MIB = 1 << 20
KIB = 1 << 10
FOUR_GIB = 1 << 32
#: Where a ROM's program begins, in the segment that CS is behind power-on; and the jump to it.
ENTRY = 0xE000
JUMP_TO_ENTRY = b"\xe9" + ((ENTRY - 0xFFF3) & 0xFFFF).to_bytes(2, "little")
SHADOW_CONSOLE = DeviceRequest("isa-debugcon", 0x402)
#: Where a ROM keeps what is to survive a reset.
COUNTER = 0x600
#: The copy of the ROM's byte at F000:8000.
SHADOW_BYTE = 0xF8000
RESET = "mov al, 0xfe; out 0x64, al; hang: jmp hang"


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> ExecutionEngine:
    """Each engine in turn."""
    return request.param


def rom(source: str, size: int = 64 * KIB) -> bytes:
    """A ROM that starts with *source*, in real mode; the rest of it is FFH."""
    image = bytearray(b"\xff" * size)
    last = memoryview(image)[-64 * KIB :]
    code = assemble(source, ENTRY, bits=16).code
    last[ENTRY : ENTRY + len(code)] = code
    last[0xFFF0 : 0xFFF0 + len(JUMP_TO_ENTRY)] = JUMP_TO_ENTRY
    return bytes(image)


def firmware_pc(
    source: str,
    output: Output,
    engine: ExecutionEngine = "jit",
    *,
    size: int = 64 * KIB,
    on_reset: OnEvent = "reset",
    on_shutdown: OnEvent = "exit",
    cpu: str = "max",
) -> Pc:
    return Pc(
        8 * MIB,
        parse_cpu(cpu),
        output=output,
        engine=engine,
        firmware=rom(source, size),
        devices=[SHADOW_CONSOLE],
        on_reset=on_reset,
        on_shutdown=on_shutdown,
    )


# ------------------------------------------------------------------------------------------------------ firmware


def test_a_rom_starts_in_real_mode_and_prints(engine: ExecutionEngine) -> None:
    output = Output()
    pc = firmware_pc(
        """
        mov dx, 0x3fd; ready: in al, dx; test al, 0x20; je ready
        mov dx, 0x3f8; mov al, 83; out dx, al
        mov al, 69; out 0xe9, al
        mov dx, 0x402; mov al, 66; out dx, al
        smsw ax; and al, 1; jne wrong
        mov al, 0x10; out 0xf4, al
        wrong: mov al, 0x7f; out 0xf4, al
        """,
        output,
        engine,
    )
    assert pc.run(PATIENCE) == Ending(End.DEBUG_EXIT, 33)
    assert sorted(output.data) == sorted(b"SEB")


def test_a_rom_goes_on_in_its_copy_below_1_mib(engine: ExecutionEngine) -> None:
    output = Output()
    pc = firmware_pc(
        """
        xor ax, ax; mov ss, ax; mov sp, 0x7000
        jmp far 0xf000:low
        low: call where; where: pop bx
        mov ax, cs; mov al, ah; out 0xe9, al
        mov al, 0; out 0xf4, al
        """,
        output,
        engine,
    )
    assert pc.run(PATIENCE) == Ending(End.DEBUG_EXIT, 1)
    assert output.data == b"\xf0"
    assert pc.vcpu.get_sregs().cs.base == 0xF0000


def test_the_copy_is_memory_and_the_rom_is_not(engine: ExecutionEngine) -> None:
    pc = firmware_pc(
        """
        mov ax, 0xf000; mov ds, ax
        mov byte [0x8000], 0x12
        mov al, [0x8000]; out 0xf8, al
        """,
        Output(),
        engine,
    )
    assert pc.run(PATIENCE) == Ending(End.PROGRAM, 0x12)
    assert pc.vm.memory.load(FOUR_GIB - 64 * KIB + 0x8000, 1) == 0xFF
    pc.vm.memory.store(FOUR_GIB - 64 * KIB + 0x8000, 1, 0x34)
    assert pc.vm.memory.load(FOUR_GIB - 64 * KIB + 0x8000, 1) == 0xFF


@pytest.mark.parametrize(("size", "copied"), [(64, 64), (128, 128), (256, 256), (512, 128)])
def test_the_end_of_a_rom_is_copied(size: int, copied: int) -> None:
    pc = firmware_pc("hlt", Output(), size=size * KIB)
    end = pc.vm.memory.read(FOUR_GIB - copied * KIB, copied * KIB)
    assert pc.vm.memory.read(MIB - copied * KIB, copied * KIB) == end
    assert pc.vm.memory.load(MIB - copied * KIB - 1, 1) == 0


#: Says what the byte in the copy is, changes it, counts, and resets twice.
CHANGE_THE_COPY = f"""
    mov ax, 0xf000; mov ds, ax
    mov al, [0x8000]; out 0xe9, al
    mov byte [0x8000], 65
    mov al, [0x8000]; out 0xe9, al
    xor ax, ax; mov ds, ax
    inc byte [{COUNTER:#x}]; mov al, [{COUNTER:#x}]; cmp al, 3; jae done
"""


def test_a_reset_starts_the_rom_again_with_a_fresh_copy(engine: ExecutionEngine) -> None:
    output = Output()
    pc = firmware_pc(f"{CHANGE_THE_COPY} {RESET}; done: out 0xf8, al", output, engine)
    assert pc.run(PATIENCE) == Ending(End.PROGRAM, 3)
    assert output.data == b"\xffA" * 3


def test_a_triple_fault_starts_the_rom_again(engine: ExecutionEngine) -> None:
    # An interrupt table without entries, in real mode.
    output = Output()
    pc = firmware_pc(
        f"{CHANGE_THE_COPY} lidt [0x700]; ud2; done: out 0xf8, al", output, engine, on_shutdown="reset"
    )
    assert pc.run(PATIENCE) == Ending(End.PROGRAM, 3)
    assert output.data == b"\xffA" * 3


def test_a_reset_from_protected_mode_ends_in_real_mode(engine: ExecutionEngine) -> None:
    pc = firmware_pc(
        f"""
        smsw ax; test al, 1; jne wrong
        xor ax, ax; mov ds, ax
        inc byte [{COUNTER:#x}]; mov al, [{COUNTER:#x}]; cmp al, 2; je done
        mov eax, cr0; or al, 1; mov cr0, eax
        {RESET}
        wrong: mov al, 99
        done: out 0xf8, al
        """,
        Output(),
        engine,
    )
    assert pc.run(PATIENCE) == Ending(End.PROGRAM, 2)


def test_init_to_oneself_starts_at_the_reset_vector_and_is_no_reset(engine: ExecutionEngine) -> None:
    # The copy of the ROM stays changed, and so do MSRs: x2APIC mode, LSTAR.
    output = Output()
    pc = firmware_pc(
        f"""
        xor ax, ax; mov ds, ax
        mov ax, 0xf000; mov es, ax
        mov al, es:[0x8000]; out 0xe9, al
        mov byte es:[0x8000], 65
        inc byte [{COUNTER:#x}]; mov al, [{COUNTER:#x}]; cmp al, 2; je again
        mov ecx, 0x1b; rdmsr; or eax, 0x400; wrmsr
        mov ecx, 0xc0000082; xor edx, edx; mov eax, 0x1234; wrmsr
        mov eax, cr0; or al, 1; mov cr0, eax
        mov ecx, 0x830; xor edx, edx; mov eax, 0x4500; wrmsr
        hang: jmp hang
        again:
        mov ecx, 0xc0000082; rdmsr; cmp ax, 0x1234; jne wrong
        mov ecx, 0x1b; rdmsr; test ax, 0x400; je wrong
        smsw ax; test al, 1; jne wrong
        mov al, 7; out 0xf8, al
        wrong: mov al, 99; out 0xf8, al
        """,
        output,
        engine,
    )
    assert pc.run(PATIENCE) == Ending(End.PROGRAM, 7)
    assert output.data == b"\xffA"


def test_a_machine_without_firmware_has_nothing_at_the_reset_vector() -> None:
    pc = Pc(8 * MIB, parse_cpu("max"), output=Output())
    ending = pc.run(PATIENCE)
    assert (ending.end, ending.status) == (End.INTERNAL_ERROR, 1)
    assert "0xfffffff0" in ending.detail


def test_a_saved_machine_with_firmware_goes_on_and_starts_again(
    tmp_path: Path, engine: ExecutionEngine
) -> None:
    output = Output()
    pc = firmware_pc(
        f"{CHANGE_THE_COPY} cmp al, 1; jne more; mov dx, 0x300; spin: in al, dx; cmp al, 0x55; jne spin; more: {RESET};"
        "done: out 0xf8, al",
        output,
        engine,
        cpu="max,-x2apic,-apic",
    )
    assert pc.run(0.05).end is End.TIMEOUT
    assert output.data == b"\xffA"
    pc.save(tmp_path / "pc")
    again = Output()
    loaded = Pc.load(tmp_path / "pc", output=again)
    assert loaded.vm.memory.read(FOUR_GIB - 64 * KIB, 64 * KIB) == pc.vm.memory.read(
        FOUR_GIB - 64 * KIB, 64 * KIB
    )
    loaded.reset_machine()
    assert loaded.run(PATIENCE) == Ending(End.PROGRAM, 3)
    assert again.data == b"\xffA" * 2
    # The processor is still the one that was saved.
    assert loaded.vcpu.get_sregs().apic_base & 0x800 == 0


@pytest.mark.parametrize("on_reset", ["reset", "exit"])
def test_what_is_to_follow_a_reset_is_saved(tmp_path: Path, on_reset: OnEvent) -> None:
    output = Output()
    pc = firmware_pc(f"{CHANGE_THE_COPY} {RESET}; done: out 0xf8, al", output, on_reset=on_reset)
    pc.save(tmp_path / "pc")
    ending = Pc.load(tmp_path / "pc", output=Output()).run(PATIENCE)
    assert ending == (Ending(End.RESET, 0) if on_reset == "exit" else Ending(End.PROGRAM, 3))


# ----------------------------------------------------------------------------------------------------- multiboot

LOAD_ADDRESS = 0x40_0000
BOOTLOADER_MAGIC = 0x2BADB002
SERIAL = """
    putc: mov ah, al; mov dx, 0x3fd; ready: in al, dx; test al, 0x20; je ready
    mov al, ah; mov dx, 0x3f8; out dx, al; ret
"""
#: Prints what EAX has, then its command line, which begins with its path; ends with the number of modules.
KERNEL = f"""
    mov esp, 0x500000
    mov esi, ebx
    cmp eax, {BOOTLOADER_MAGIC:#x}; jne wrong
    mov al, 75; call putc
    mov al, 75; out 0xe9, al
    mov ebx, [esi + 16]
    next: mov al, [ebx]; test al, al; je told; call putc; inc ebx; jmp next
    told: mov eax, [esi + 20]; out 0xf4, eax
    wrong: mov al, 0x7f; out 0xf4, al
    {SERIAL}
"""


def multiboot(source: str) -> bytes:
    """A 32-bit ELF file at 4 MiB, where the unit-test kernels of the KVM community are, too."""
    header = make_multiboot_header(1 << 0 | 1 << 1)
    code = assemble(source, LOAD_ADDRESS + len(header), bits=32).code
    return make_elf32(Load(LOAD_ADDRESS, header + code), entry=LOAD_ADDRESS + len(header))


def multiboot_pc(
    path: Path,
    source: str,
    output: Output,
    engine: ExecutionEngine,
    *,
    command_line: str = "",
    modules: tuple[Module, ...] = (),
    on_shutdown: OnEvent = "exit",
) -> Pc:
    path.write_bytes(multiboot(source))
    pc = Pc(
        16 * MIB,
        parse_cpu("max"),
        output=output,
        engine=engine,
        devices=[DeviceRequest("pc-testdev")],
        on_shutdown=on_shutdown,
    )
    pc.boot(
        lambda rsdp: (
            load_image(path, pc.vm.memory, command_line=command_line, modules=modules, rsdp=rsdp).entry
        )
    )
    return pc


def test_a_multiboot_image_prints_and_ends_by_the_exit_port(tmp_path: Path, engine: ExecutionEngine) -> None:
    output = Output()
    (tmp_path / "module").write_bytes(b"data")
    pc = multiboot_pc(
        tmp_path / "kernel",
        KERNEL,
        output,
        engine,
        command_line="one two",
        modules=(Module(tmp_path / "module"), Module(tmp_path / "module", "with words")),
    )
    assert pc.run(PATIENCE) == Ending(End.DEBUG_EXIT, 2 << 1 | 1)
    assert output.data.count(b"K") == 2
    assert f"K{tmp_path / 'kernel'} one two".encode() in output.data


def test_a_multiboot_image_starts_again_behind_a_triple_fault(
    tmp_path: Path, engine: ExecutionEngine
) -> None:
    output = Output()
    pc = multiboot_pc(
        tmp_path / "kernel",
        f"""
        cmp eax, {BOOTLOADER_MAGIC:#x}; jne wrong
        inc dword [0x500000]; mov eax, [0x500000]
        add eax, 48; out 0xe9, al
        mov byte [letter], 90; cmp al, 51; je done
        sub esp, 8; mov dword [esp], 0; mov dword [esp + 4], 0; lidt [esp]; ud2
        done: mov al, [letter]; out 0xe9, al; xor eax, eax; out 0xf4, eax
        wrong: mov al, 0x7f; out 0xf4, al
        letter: db 65
        """,
        output,
        engine,
        on_shutdown="reset",
    )
    assert pc.run(PATIENCE) == Ending(End.DEBUG_EXIT, 1)
    assert output.data == b"123Z"


def test_a_multiboot_image_finds_its_msrs_as_behind_power_on(tmp_path: Path, engine: ExecutionEngine) -> None:
    output = Output()
    pc = multiboot_pc(
        tmp_path / "kernel",
        """
        mov ecx, 0xc0000080; rdmsr; or eax, edx; jne wrong
        mov eax, cr4; test eax, eax; jne wrong
        mov eax, cr0; test eax, 0x80000000; jne wrong
        pushfd_free: mov al, 5; out 0xf8, al
        wrong: mov al, 99; out 0xf8, al
        """,
        output,
        engine,
    )
    assert pc.run(PATIENCE) == Ending(End.PROGRAM, 5)
