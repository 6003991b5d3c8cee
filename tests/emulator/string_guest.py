"""String instructions for the tests: their bytes, a pattern to move, and where from and to."""

from __future__ import annotations

from emulator_guest import UPPER, Guest

from lasskvm.state import RCX, RDI, RIP, RSI

SOURCE, DESTINATION = UPPER + 0x70000, UPPER + 0x90000
PATTERN = bytes(range(1, 256)) * 40
MOVSB, MOVSW, MOVSD, MOVSQ = "a4", "66a5", "a5", "48a5"
STOSB, STOSQ, LODSB, LODSD, LODSQ = "aa", "48ab", "ac", "ad", "48ad"
CMPSB, CMPSD, SCASB, SCASQ = "a6", "a7", "ae", "48af"
REP, REPNE = "f3", "f2"


def string_kernel(guest: Guest, cached: bool) -> Guest:
    """*guest* with the pattern at the source; its accesses walk the page tables, or use the software TLB."""
    if cached:
        guest.ctx.tlb.select(guest.words)
    prepare(guest)
    return guest


def prepare(guest: Guest, count: int = 0) -> None:
    """The pattern at the source; registers for *count* elements."""
    guest.memory.write(SOURCE & 0xFFFFF, PATTERN)
    guest.words[RSI], guest.words[RDI], guest.words[RCX] = SOURCE, DESTINATION, count


def content(guest: Guest, address: int, size: int) -> bytes:
    """The *size* bytes at *address*."""
    return guest.memory.read(address & 0xFFFFF, size)


def finish(guest: Guest, code: str) -> int:
    """Execute *code* until it is complete; returns how many executions it took."""
    rip = guest.words[RIP]
    for executions in range(1, 10000):
        guest.run(code)
        if guest.words[RIP] != rip:
            return executions
    raise AssertionError("the instruction does not end")
