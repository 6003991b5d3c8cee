"""Small 64-bit guests for the tests of a PC: assembled, with an interrupt table, started as an image is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from lasskvm.conformance.assembler import assemble
from lasskvm.kvm import ExecutionEngine, HostClock, Vm
from lasskvm.machine.boot.entry import BOOT_CS, Entry, prepare_long_mode
from lasskvm.machine.ending import Ending
from lasskvm.machine.optional_devices import DeviceRequest
from lasskvm.machine.pc import OnEvent, Pc
from lasskvm.memory import GuestMemory
from lasskvm.x86.cpu_models import parse_cpu

__all__ = [
    "CODE",
    "DATA",
    "ENGINES",
    "PATIENCE",
    "PIC_OFF",
    "USE_APICS",
    "USE_X2APIC",
    "Output",
    "build",
    "ioapic_entry",
    "read_msr",
    "run",
    "write_msr",
]

MIB = 1 << 20
CODE = 0x100000
#: Where no image is: what a guest writes there survives a reset.
DATA = 0x200000
#: The interrupt table, and what LIDT loads.
IDT, IDTR, GATES, GATE_SIZE = 0x180000, 0x17FFF0, 256, 16
INTERRUPT_GATE = 0x8E
#: More than any of these guests takes, so that a hang is a failed test and not a hung one.
PATIENCE = 60.0
ENGINES: tuple[ExecutionEngine, ...] = ("jit", "emulator")

#: Ways to the APICs, for guests that keep RBX at the local APIC and RDI at the I/O APIC.
PIC_OFF = "mov al, 0xff; out 0x21, al; out 0xa1, al;"
#: Spurious vector FFH; the 8259As are masked.
USE_APICS = f"{PIC_OFF} mov ebx, 0xfee00000; mov edi, 0xfec00000; mov dword [rbx + 0xf0], 0x1ff;"
#: The same in x2APIC mode, where the local APIC has MSRs.
USE_X2APIC = f"""
    {PIC_OFF} mov edi, 0xfec00000
    mov ecx, 0x1b; rdmsr; or eax, 0x400; wrmsr
    mov ecx, 0x80f; xor edx, edx; mov eax, 0x1ff; wrmsr
"""


class Output:
    """What the guest wrote."""

    def __init__(self) -> None:
        self.data = b""

    def __call__(self, data: bytes) -> None:
        self.data += data


def build(
    source: str,
    output: Callable[[bytes], None],
    *,
    handlers: Mapping[int, str] | None = None,
    engine: ExecutionEngine = "jit",
    cpu: str = "max",
    memory: int = 8 * MIB,
    host_clock: bool = False,
    idle: Callable[[int | None], None] | None = None,
    devices: Iterable[DeviceRequest] = (),
    on_reset: OnEvent = "reset",
    on_shutdown: OnEvent = "exit",
) -> Pc:
    """A PC about to execute *source* in 64-bit mode, with interrupts off, now and after each reset.

    *handlers* are labels by vector; other vectors have no gate.
    """
    pc = Pc(
        memory,
        parse_cpu(cpu),
        output=output,
        idle=idle,
        clock=HostClock() if host_clock else None,
        engine=engine,
        devices=devices,
        on_reset=on_reset,
        on_shutdown=on_shutdown,
    )
    pc.boot(lambda rsdp: load(pc.vm.memory, source, handlers or {}))
    return pc


def load(memory: GuestMemory, source: str, handlers: Mapping[int, str]) -> Entry:
    """Put *source* and its interrupt table into *memory*; how to enter it."""
    program = assemble(f"lidt [{IDTR:#x}]\n{source}", CODE)
    table = bytearray(GATES * GATE_SIZE)
    for vector, label in handlers.items():
        offset = program.labels[label]
        gate = offset & 0xFFFF | BOOT_CS << 16 | INTERRUPT_GATE << 40 | offset >> 16 << 48
        table[vector * GATE_SIZE : (vector + 1) * GATE_SIZE] = gate.to_bytes(GATE_SIZE, "little")
    memory.write(IDT, table)
    memory.write(IDTR, (len(table) - 1).to_bytes(2, "little") + IDT.to_bytes(8, "little"))
    memory.write(CODE, program.code)
    return prepare_long_mode(memory, CODE)


def run(
    source: str,
    *,
    handlers: Mapping[int, str] | None = None,
    engine: ExecutionEngine = "jit",
    cpu: str = "max",
    host_clock: bool = False,
    devices: Iterable[DeviceRequest] = (),
    on_reset: OnEvent = "reset",
    on_shutdown: OnEvent = "exit",
) -> tuple[Ending, bytes, Vm]:
    """How *source* ends, what it wrote, and its VM."""
    output = Output()
    pc = build(
        source,
        output,
        handlers=handlers,
        engine=engine,
        cpu=cpu,
        host_clock=host_clock,
        devices=devices,
        on_reset=on_reset,
        on_shutdown=on_shutdown,
    )
    ending = pc.run(PATIENCE)
    assert isinstance(pc.vm, Vm)
    return ending, output.data, pc.vm


def ioapic_entry(pin: int, low: int) -> str:
    """Set the redirection entry of *pin*, for APIC ID 0; RDI is at the I/O APIC."""
    register = 0x10 + 2 * pin
    return (
        f"mov dword [rdi], {register + 1:#x}; mov dword [rdi + 16], 0;"
        f"mov dword [rdi], {register:#x}; mov dword [rdi + 16], {low:#x};"
    )


def read_msr(index: int) -> str:
    """RDMSR to RAX; changes RCX and RDX."""
    return f"mov ecx, {index:#x}; rdmsr; shl rdx, 32; or rax, rdx;"


def write_msr(index: int, value: int) -> str:
    """WRMSR; changes RAX, RCX and RDX."""
    return f"mov ecx, {index:#x}; mov edx, {value >> 32:#x}; mov eax, {value & 0xFFFFFFFF:#x}; wrmsr;"
