"""IN, OUT, INS and OUTS: permission, I/O breakpoints, and the way to the VM's devices.

What no device claims ends in :class:`~lasskvm.emulator.port_io.PortAccessNeeded` with nothing changed; whoever has the
VMM's answer goes on with :func:`finish_access`. Each execution of a repeated INS or OUTS does
one element.

Source: Intel SDM volume 2, the four instructions; volume 1, 19.5 (permission); KVM's ``kvm_fast_pio()`` and
``emulator_pio_in_out()``.
"""

from __future__ import annotations

from iced_x86 import Mnemonic

from lasskvm.emulator.completion import Handler, complete
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import raise_linear_fault
from lasskvm.emulator.io_permission import check_port_access
from lasskvm.emulator.port_io import (
    PortAccess,
    PortAccessNeeded,
    breakpoint_hits,
    finish_element,
    locate_port,
    next_access,
)
from lasskvm.emulator.string_registers import address_mask, is_repeated, pause, skip_repetition
from lasskvm.state import CPL, RCX, RFLAGS

__all__ = ["HANDLERS", "finish_access"]


def _in_or_out(ctx: Emulation, decoded: Decoded) -> None:
    _check_permission(ctx, decoded)
    access = next_access(ctx, decoded)
    finish_access(ctx, access, _answer(ctx, access))


def _ins_or_outs(ctx: Emulation, decoded: Decoded) -> None:
    _check_permission(ctx, decoded)
    mask = address_mask(decoded)
    if is_repeated(decoded) and not ctx.words[RCX] & mask:
        skip_repetition(ctx.words, mask)
        complete(ctx, decoded)
        return
    access = next_access(ctx, decoded)
    finish_access(ctx, access, _answer(ctx, access))


def finish_access(ctx: Emulation, access: PortAccess, value: int) -> None:
    """Complete the instruction with *value*, the answer to an input; a repeated one goes on with its next element.

    Raises :class:`GuestFault`, for the single-step trap too.
    """
    is_complete = finish_element(ctx, access, value)
    ctx.mmio.commit()
    if is_complete:
        complete(ctx, access.decoded)
    else:
        pause(ctx)


def _check_permission(ctx: Emulation, decoded: Decoded) -> None:
    """#GP(0), or the fault of reading the I/O bitmap; also when a count of 0 leaves nothing to do."""
    words = ctx.words
    port, size = locate_port(words, decoded)
    raise_linear_fault(*check_port_access(words, ctx.memory, port, size, words[CPL], words[RFLAGS]))


def _answer(ctx: Emulation, access: PortAccess) -> int:
    """What the device at the port answers; 0 for outputs. Raises :class:`PortAccessNeeded`."""
    ctx.watch_hits |= breakpoint_hits(ctx.words, access.port, access.size)
    if access.write:
        if not ctx.write_port(access.port, access.size, access.value):
            raise PortAccessNeeded(access)
        return 0
    value = ctx.read_port(access.port, access.size)
    if value is None:
        raise PortAccessNeeded(access)
    return value


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {
    Mnemonic.IN: _in_or_out,
    Mnemonic.OUT: _in_or_out,
    Mnemonic.INSB: _ins_or_outs,
    Mnemonic.INSW: _ins_or_outs,
    Mnemonic.INSD: _ins_or_outs,
    Mnemonic.OUTSB: _ins_or_outs,
    Mnemonic.OUTSW: _ins_or_outs,
    Mnemonic.OUTSD: _ins_or_outs,
}
