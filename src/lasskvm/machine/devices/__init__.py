"""The devices of the PC, one per file. None knows another: they meet on the buses and raise interrupt lines.

The interrupt controllers and the interval timer, which KVM keeps in the kernel, are in
:mod:`lasskvm.kvm.irqchip`.
"""

from lasskvm.machine.devices.acpi_pm import SCI_IRQ, AcpiPm
from lasskvm.machine.devices.debug_console import DebugConsole
from lasskvm.machine.devices.debug_exit import DebugExit
from lasskvm.machine.devices.fw_cfg import FwCfg
from lasskvm.machine.devices.i8042 import I8042
from lasskvm.machine.devices.port92 import Port92
from lasskvm.machine.devices.post_port import PostPort
from lasskvm.machine.devices.reset_control import ResetControl
from lasskvm.machine.devices.rtc import RTC_IRQ, Rtc
from lasskvm.machine.devices.shutdown_port import ShutdownPort
from lasskvm.machine.devices.uart16550 import COM1_IRQ, Uart16550

__all__ = [
    "COM1_IRQ",
    "RTC_IRQ",
    "SCI_IRQ",
    "AcpiPm",
    "DebugConsole",
    "DebugExit",
    "FwCfg",
    "I8042",
    "Port92",
    "PostPort",
    "ResetControl",
    "Rtc",
    "ShutdownPort",
    "Uart16550",
]
