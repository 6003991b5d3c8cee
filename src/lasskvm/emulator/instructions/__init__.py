"""The instructions: tables from ``iced_x86.Mnemonic`` to what executes them, one module per family.

A mnemonic is in one of the three tables; where the forms of one mnemonic differ in kind (MOV of a control register and
MOV of a general-purpose one), :data:`BY_CODE` has the special ones by ``iced_x86.Code``.
"""

from __future__ import annotations

from lasskvm.emulator.instructions import (
    arithmetic,
    bits,
    bmi,
    control,
    decimal,
    exchange,
    far_transfers,
    features,
    fpu_state,
    hypercalls,
    interrupt_return,
    moves,
    multiply,
    near_branches,
    ports,
    registers,
    segment_loads,
    selectors,
    sgx,
    shifts,
    sse_crypto,
    sse_float,
    sse_integer,
    sse_moves,
    sse_shuffles,
    sse_strings,
    stack,
    status_flags,
    strings,
    tables,
    vmx,
    x87,
    x87_arithmetic,
    xsave,
)
from lasskvm.emulator.operation import Builder, Handler

__all__ = ["BY_CODE", "HANDLERS", "PLAIN", "TRANSFERS"]

#: Instructions that somebody else steps over.
PLAIN: dict[int, Builder] = {
    **arithmetic.PLAIN,
    **bits.PLAIN,
    **bmi.PLAIN,
    **control.PLAIN,
    **decimal.PLAIN,
    **exchange.PLAIN,
    **features.PLAIN,
    **fpu_state.PLAIN,
    **moves.PLAIN,
    **multiply.PLAIN,
    **shifts.PLAIN,
    **sse_crypto.PLAIN,
    **sse_float.PLAIN,
    **sse_integer.PLAIN,
    **sse_moves.PLAIN,
    **sse_shuffles.PLAIN,
    **sse_strings.PLAIN,
    **stack.PLAIN,
    **status_flags.PLAIN,
    **x87.PLAIN,
    **x87_arithmetic.PLAIN,
    **xsave.PLAIN,
}
#: Instructions that set RIP, compiled.
TRANSFERS: dict[int, Builder] = {**near_branches.TRANSFERS, **strings.TRANSFERS}
#: Instructions that complete themselves.
HANDLERS: dict[int, Handler] = {
    **control.HANDLERS,
    **far_transfers.HANDLERS,
    **features.HANDLERS,
    **hypercalls.HANDLERS,
    **interrupt_return.HANDLERS,
    **ports.HANDLERS,
    **registers.HANDLERS,
    **segment_loads.HANDLERS,
    **selectors.HANDLERS,
    **sgx.HANDLERS,
    **stack.HANDLERS,
    **tables.HANDLERS,
    **vmx.HANDLERS,
    **xsave.HANDLERS,
}
#: Handlers of single forms, which come before the tables by mnemonic.
BY_CODE: dict[int, Handler] = {
    **far_transfers.BY_CODE,
    **registers.BY_CODE,
    **segment_loads.BY_CODE,
    **strings.BY_CODE,
}
