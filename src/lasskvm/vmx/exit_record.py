"""What a VM exit from L2 to L1 tells: a record that whoever finds the exit makes and the transition writes down.

Source: Intel SDM volume 3C, 25.9 (VM-exit information fields), 28.2 (what goes into them).
"""

from __future__ import annotations

from typing import NamedTuple

from lasskvm.x86.vmx_exits import ExitReason

__all__ = ["NestedExit", "VmExit"]


class NestedExit(NamedTuple):
    """One VM exit, with the values of the VM-exit information fields that L1 will read.

    What is left out is 0, which is also what the field holds where the manual calls it undefined. The formats are those
    of :mod:`lasskvm.x86.vmx_exits` (qualification, instruction information) and of ``INTR_INFO_*`` in
    :mod:`lasskvm.x86.vmx` (interruption and IDT-vectoring information). ``instruction_length`` is in bytes. The
    IDT-vectoring fields are added by who knows that an event was being delivered.
    """

    reason: ExitReason
    qualification: int = 0
    instruction_information: int = 0
    instruction_length: int = 0
    interruption_information: int = 0
    interruption_error_code: int = 0
    guest_linear_address: int = 0
    guest_physical_address: int = 0
    idt_vectoring_information: int = 0
    idt_vectoring_error_code: int = 0


class VmExit(Exception):
    """L2 exits to L1 with *record*. The state words are as the exit is to show them."""

    def __init__(self, record: NestedExit) -> None:
        self.record = record
        super().__init__(record.reason.name)
