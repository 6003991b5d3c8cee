"""The instructions: tables from ``iced_x86.Mnemonic`` to what executes them, one module per family.

A mnemonic is in one of the three tables; where the forms of one mnemonic differ in kind (MOV of a control register and
MOV of a general-purpose one), :data:`BY_CODE` has the special ones by ``iced_x86.Code``.
"""

from __future__ import annotations

from lasskvm.emulator.instructions import control, registers, tables
from lasskvm.emulator.operation import Builder, Handler

__all__ = ["BY_CODE", "HANDLERS", "PLAIN", "TRANSFERS"]

#: Instructions that somebody else steps over.
PLAIN: dict[int, Builder] = {}
#: Instructions that set RIP, compiled.
TRANSFERS: dict[int, Builder] = {}
#: Instructions that complete themselves.
HANDLERS: dict[int, Handler] = {**registers.HANDLERS, **tables.HANDLERS, **control.HANDLERS}
#: Handlers of single forms, which come before the tables by mnemonic.
BY_CODE: dict[int, Handler] = {**registers.BY_CODE}
