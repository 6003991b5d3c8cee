"""What the intercepts of all instructions have in common: their type, and the record of an exit.

Source: Intel SDM volume 3C, 28.2.5 (instruction length).
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Register

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded, register_info
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.vmcs import Vmcs12
from lasskvm.x86.vmx_exits import ExitReason

__all__ = ["Intercept", "instruction_exit", "register_number"]

#: The VM exit that an instruction of L2 causes by the controls of a VMCS, if it does; it changes nothing.
Intercept = Callable[[Emulation, Decoded, Vmcs12], NestedExit | None]


def instruction_exit(
    reason: ExitReason,
    decoded: Decoded,
    *,
    qualification: int = 0,
    information: int = 0,
    linear_address: int = 0,
) -> NestedExit:
    """The record of an exit that *decoded* causes; *information* is the instruction information."""
    return NestedExit(
        reason,
        qualification=qualification,
        instruction_information=information,
        instruction_length=decoded.length,
        guest_linear_address=linear_address,
    )


def register_number(register: int) -> int:
    """The number that general-purpose *register* (``iced_x86.Register``), of any width, has in encodings."""
    return int(register_info(register).full_register - Register.RAX)
