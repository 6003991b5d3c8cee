"""Who may use which port: RFLAGS.IOPL and the I/O permission bitmap in the TSS.

One plain function of the compiled subset, called from direct execution's port hooks and by the emulator.
Source: Intel SDM volume 1, 19.5 (I/O privilege levels, permission bitmap).
"""

from lasskvm.emulator.mmu import load_linear, next_linear
from lasskvm.lass import IMPLICIT
from lasskvm.state import ATTRIBUTES, BASE, CR0, LIMIT, SEGMENT_WORDS, SEGMENTS, Words
from lasskvm.x86.exceptions import GP
from lasskvm.x86.paging import PhysicalMemory
from lasskvm.x86.registers import AR_P, AR_TYPE, AR_UNUSABLE, CR0_PE, RFLAGS_IOPL_SHIFT, RFLAGS_VM, TR

__all__ = ["check_port_access"]

_TR = SEGMENTS + SEGMENT_WORDS * TR
_TSS_AVAILABLE, _TSS_BUSY = 9, 11
#: Offset of the 16-bit I/O map base in 32-bit and 64-bit TSSs.
_IO_MAP_BASE = 0x66


def check_port_access(
    state: Words, memory: PhysicalMemory, port: int, size: int, cpl: int, rflags: int
) -> tuple[int, int, int]:
    """``(vector, error_code, fault_address)`` of what *size* bytes of I/O at *port* raise; vector 0: allowed."""
    if state[CR0] & CR0_PE == 0:
        return 0, 0, 0
    virtual_8086 = rflags & RFLAGS_VM != 0
    if not virtual_8086 and cpl <= (rflags >> RFLAGS_IOPL_SHIFT) & 3:
        return 0, 0, 0
    attributes = state[_TR + ATTRIBUTES]
    kind = attributes & AR_TYPE
    if (
        attributes & AR_UNUSABLE != 0
        or attributes & AR_P == 0
        or (kind != _TSS_AVAILABLE and kind != _TSS_BUSY)
    ):
        return GP, 0, 0
    limit = state[_TR + LIMIT]
    if limit < _IO_MAP_BASE + 1:
        return GP, 0, 0
    base = state[_TR + BASE]
    bitmap, vector, error_code, address = load_linear(
        state, memory, next_linear(state, base, _IO_MAP_BASE), 2, IMPLICIT, cpl, rflags
    )
    if vector != 0:
        return vector, error_code, address
    # The processor always reads two bytes of the bitmap, and both must lie within the limit.
    offset = bitmap + (port >> 3)
    if offset + 1 > limit:
        return GP, 0, 0
    bits, vector, error_code, address = load_linear(
        state, memory, next_linear(state, base, offset), 2, IMPLICIT, cpl, rflags
    )
    if vector != 0:
        return vector, error_code, address
    if (bits >> (port & 7)) & ((1 << size) - 1) != 0:
        return GP, 0, 0
    return 0, 0, 0
