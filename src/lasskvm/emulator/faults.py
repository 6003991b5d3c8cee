"""What an emulated instruction or an event delivery can end in, other than success.

Handlers raise these; none of them ever leaves the vCPU's ``run()``: a :class:`GuestFault` is delivered to the
guest, a :class:`TripleFault` becomes a shutdown exit, and :class:`Unhandleable` an internal-error exit, as in
KVM. In a nested guest the first two may be VM exits, and :class:`EptFault` always is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lasskvm.x86.ept import EPT_EXIT
from lasskvm.x86.exceptions import DB, GP, PF, SS, UD, vector_name

if TYPE_CHECKING:
    from lasskvm.emulator.events import Event

__all__ = [
    "DebugReport",
    "EptFault",
    "GuestFault",
    "Interruption",
    "TripleFault",
    "Unhandleable",
    "debug_trap",
    "general_protection",
    "invalid_opcode",
    "raise_linear_fault",
]


class Interruption(Exception):
    """What ends an instruction before it is done, so that whoever has begun to change something puts it back.

    It is one of :class:`GuestFault` and :class:`EptFault`.
    """


class GuestFault(Interruption):
    """Exception *vector* for the guest.

    ``error_code`` is None for vectors that push none. ``cr2`` is the faulting linear address of a #PF, and
    ``dr6`` the bits that a #DB reports in DR6; both are None for the other vectors.
    """

    def __init__(
        self, vector: int, error_code: int | None = None, cr2: int | None = None, dr6: int | None = None
    ) -> None:
        self.vector = vector
        self.error_code = error_code
        self.cr2 = cr2
        self.dr6 = dr6
        details = "" if error_code is None else f"({error_code:#x})"
        super().__init__(f"{vector_name(vector)}{details}")


class TripleFault(Exception):
    """A fault while #DF is delivered: the processor enters shutdown (SDM volume 3A, 7.15)."""


class DebugReport(Exception):
    """A debug exception (#DB or #BP) that the VMM has asked for, instead of the guest (``KVM_EXIT_DEBUG``).

    ``dr6`` has the bits that say what it was.
    """

    def __init__(self, vector: int, dr6: int = 0) -> None:
        self.vector = vector
        self.dr6 = dr6
        super().__init__(vector_name(vector))


class EptFault(Interruption):
    """An access of a nested guest ends in an EPT violation or misconfiguration, which is its hypervisor's business.

    ``address`` is the linear address of the access, where it has one. The state words ``EPT_FAULT_GPA`` and
    ``EPT_OUTCOME`` say the rest. ``vectoring`` is the event during whose delivery it happened, if any.
    """

    def __init__(self, address: int) -> None:
        self.address = address
        self.vectoring: Event | None = None
        super().__init__(f"EPT does not allow the access at linear {address:#x}")


class Unhandleable(Exception):
    """What the emulator does not implement; KVM's ``X86EMUL_UNHANDLEABLE``. ``str()`` says what it was."""


def general_protection(error_code: int = 0) -> GuestFault:
    """#GP with *error_code*."""
    return GuestFault(GP, error_code)


def invalid_opcode() -> GuestFault:
    """#UD."""
    return GuestFault(UD)


def debug_trap(dr6: int) -> GuestFault:
    """#DB that sets the bits *dr6* in DR6."""
    return GuestFault(DB, dr6=dr6)


def raise_linear_fault(vector: int, error_code: int, fault_address: int, external: int = 0) -> None:
    """Raise what :mod:`lasskvm.emulator.mmu` returned as a fault; nothing when *vector* is 0.

    *external* is ``ERROR_EXT`` for accesses that deliver an event: #GP and #SS then report it in their error
    code.
    """
    if vector == 0:
        return
    if vector == EPT_EXIT:
        raise EptFault(fault_address)
    if vector == PF:
        raise GuestFault(PF, error_code, cr2=fault_address)
    if vector in (GP, SS):
        raise GuestFault(vector, error_code | external)
    raise GuestFault(vector, error_code)
