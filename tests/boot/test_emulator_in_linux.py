"""The Debian kernel on the emulator: the same console as under direct execution."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lasskvm.kvm import IntrExit, IoExit
from lasskvm.machine.boot import load_image
from lasskvm.machine.pc import Pc
from lasskvm.x86.cpu_models import parse_cpu

COMMAND_LINE = "console=ttyS0 acpi=off tsc=reliable earlyprintk=serial,ttyS0,115200"
MIB = 1 << 20
MEMORY = 256 * MIB
INSTRUCTIONS = 2_000_000
#: The kernel's first line and what it says when it knows its CPU: lines to be seen before the emulator takes over.
FIRST_LINE = "Linux version"


class Boot:
    """A boot of the Debian kernel that can be stopped between any two runs."""

    def __init__(self, kernel: Path, engine: str) -> None:
        self.output = bytearray()
        self.pc = Pc(MEMORY, parse_cpu("max"), output=self.output.extend, engine=engine)  # type: ignore[arg-type]
        self.pc.enter(load_image(kernel, self.pc.vm.memory, command_line=COMMAND_LINE).entry)  # type: ignore[arg-type]

    def step(self) -> None:
        # Ports that nobody answers, of PCI say, read as all ones.
        reason = self.pc.vcpu.run()
        assert isinstance(reason, IntrExit | IoExit), reason

    def text(self) -> str:
        """The console, without the times at which lines were printed: the engines count them differently."""
        return re.sub(r"^\[ *\d+\.\d+\] ", "", self.output.decode(errors="replace"), flags=re.MULTILINE)


@pytest.fixture
def kernel(debian) -> Path:  # type: ignore[no-untyped-def]
    return Path(debian.kernel)


def interpret(boot: Boot, instructions: int) -> None:
    interpreter = boot.pc.vcpu.interpreter  # type: ignore[union-attr]
    end = interpreter.instructions + instructions
    while interpreter.instructions < end:
        boot.step()


def run_until_as_long(boot: Boot, characters: int) -> None:
    while len(boot.text()) < characters:
        boot.step()


@pytest.mark.slow
def test_the_first_two_million_instructions_print_what_they_print_under_direct_execution(
    kernel: Path,
) -> None:
    emulated = Boot(kernel, "emulator")
    interpret(emulated, INSTRUCTIONS)
    direct = Boot(kernel, "jit")
    run_until_as_long(direct, len(emulated.text()))
    assert direct.text().startswith(emulated.text())


@pytest.mark.slow
def test_two_million_instructions_in_mid_boot_print_what_they_print_under_direct_execution(
    kernel: Path,
) -> None:
    """Nothing is printed that early; so the emulator also takes over where the kernel prints most."""
    emulated = Boot(kernel, "jit")
    while FIRST_LINE not in emulated.text():
        emulated.step()
    before = emulated.text()
    emulated.pc.vm.engine = "emulator"
    interpret(emulated, INSTRUCTIONS)
    printed = emulated.text()[len(before) :]
    assert printed.count("\n") >= 1
    direct = Boot(kernel, "jit")
    run_until_as_long(direct, len(emulated.text()) + 1)
    assert direct.text().startswith(emulated.text())
