"""The devices of a PC, put together: which there are, on which bus, on which interrupt line.

Devices that a guest talks to all the time (UART, RTC, PM timer) sit on the VM's own bus beside the interrupt
controllers, as KVM's in-kernel devices do, where the provider has such a bus. The others are answered from the exits of
``KVM_RUN``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from lasskvm.errors import DeviceError, LassKvmError
from lasskvm.kvm import PortBus, PortDevice, StatefulDevice
from lasskvm.kvm.interface import VmInterface
from lasskvm.machine.devices.acpi_pm import SCI_IRQ, AcpiPm
from lasskvm.machine.devices.debug_console import DEBUG_CONSOLE_PORT, DebugConsole
from lasskvm.machine.devices.debug_exit import DebugExit
from lasskvm.machine.devices.fw_cfg import FwCfg
from lasskvm.machine.devices.i8042 import I8042
from lasskvm.machine.devices.pc_testdev import DeviceMemory, PcTestDevice
from lasskvm.machine.devices.port92 import Port92
from lasskvm.machine.devices.post_port import PostPort
from lasskvm.machine.devices.program_status import ProgramStatus
from lasskvm.machine.devices.reset_control import ResetControl
from lasskvm.machine.devices.rtc import RTC_IRQ, Rtc
from lasskvm.machine.devices.shutdown_port import ShutdownPort
from lasskvm.machine.devices.uart16550 import COM1_IRQ, Uart16550
from lasskvm.machine.optional_devices import DEBUG_CONSOLE, PC_TESTDEV, DeviceRequest
from lasskvm.machine.output_lines import OutputLines
from lasskvm.machine.provider import Board

__all__ = ["Hardware", "MachineSignals"]


class MachineSignals(Protocol):
    """What devices tell the machine."""

    def debug_exit(self, status: int) -> None:
        """The guest has written to a debug-exit port."""

    def program_ended(self, status: int) -> None:
        """The guest's program has ended."""

    def power_off(self) -> None:
        """The guest has switched the machine off."""

    def reset_machine(self) -> None:
        """The guest has pulled the RESET line."""


class Hardware:
    """The devices of one machine around the VM of *board*.

    *exit_ports* and *exit_mmio* are answered by the machine from exits. *output* gets what the guest writes to its
    serial port and debug consoles. *requests* are devices beyond the usual ones. Raises :class:`DeviceError` when two
    want the same ports.
    """

    def __init__(
        self,
        board: Board,
        exit_ports: PortBus,
        signals: MachineSignals,
        output: Callable[[bytes], None],
        requests: Iterable[DeviceRequest] = (),
    ) -> None:
        vm, clock = board.vm, board.clock
        self.output_lines = OutputLines(output)
        self._vm = vm
        self.uart = Uart16550(_line(vm, COM1_IRQ), self.output_lines.add_console())
        self.rtc = Rtc(clock, _line(vm, RTC_IRQ))
        self.fw_cfg = FwCfg(vm.memory)
        self.test_memory: DeviceMemory | None = None
        at_hand: dict[str, PortDevice] = {
            "uart": self.uart,
            "rtc": self.rtc,
            "post_port": PostPort(),
            "fw_cfg": self.fw_cfg,
            "acpi_pm": AcpiPm(clock, _line(vm, SCI_IRQ), signals.power_off),
            "reset_control": ResetControl(signals.reset_machine),
        }
        from_exits: dict[str, PortDevice] = {
            "debug_console": DebugConsole(self.output_lines.add_console()),
            "debug_exit": DebugExit(signals.debug_exit),
            "program_status": ProgramStatus(signals.program_ended),
            "i8042": I8042(signals.reset_machine),
            "port92": Port92(signals.reset_machine),
            "shutdown_port": ShutdownPort(signals.power_off),
        }
        for device in at_hand.values():
            board.ports.register(device)
        for device in from_exits.values():
            exit_ports.register(device)
        self.devices = at_hand | from_exits
        for request in requests:
            self._add(request, board, exit_ports, signals)
        board.connect_console(self.uart)

    @property
    def saved(self) -> dict[str, StatefulDevice]:
        """The devices that have state for a snapshot, by name."""
        everything = {**self.devices, "test_memory": self.test_memory}
        return {name: device for name, device in everything.items() if isinstance(device, StatefulDevice)}

    def reset(self) -> None:
        """The RESET line: every device goes back to its state behind it."""
        for device in self.devices.values():
            device.reset()

    def _add(
        self, request: DeviceRequest, board: Board, exit_ports: PortBus, signals: MachineSignals
    ) -> None:
        device: PortDevice
        if request.name == PC_TESTDEV:
            if self.test_memory is not None:
                return
            device = PcTestDevice(self._vm.irq_line)
            self.test_memory = DeviceMemory()
            board.mmio.register(self.test_memory)
        elif request.name == DEBUG_CONSOLE:
            console = self.output_lines.add_console()
            device = DebugConsole(console, request.iobase or DEBUG_CONSOLE_PORT)
        else:
            device = DebugExit(signals.debug_exit, request.iobase, request.iosize)
        if any(
            type(other) is type(device) and other.ports == device.ports for other in self.devices.values()
        ):
            return
        try:
            # A device on the other bus would answer first.
            board.ports.check(device)
            exit_ports.register(device)
        except LassKvmError as error:
            raise DeviceError(f"the device {request.name} cannot be added: {error}") from error
        self.devices[f"{request.name} {device.ports[0].start:#x}"] = device


def _line(vm: VmInterface, gsi: int) -> Callable[[bool], None]:
    return partial(vm.irq_line, gsi)
