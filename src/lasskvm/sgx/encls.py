"""ENCLS of one VM: the leaf function that EAX selects, on the VM's enclave page cache.

What all leaf functions have in common is checked before (:mod:`lasskvm.emulator.instructions.sgx`).

Source: Intel SDM volume 3D, 38.1.3 (error codes in RAX, and the flags) and 38.3.
"""

from __future__ import annotations

from typing import Any

from lasskvm.emulator.completion import complete
from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.sgx import leaves_build, leaves_debug, leaves_paging
from lasskvm.sgx.epc import Epc
from lasskvm.sgx.launch import LaunchControl
from lasskvm.sgx.leaves_common import Leaf, SgxUnit
from lasskvm.sgx.paging_crypto import PagingCrypto
from lasskvm.state import RAX, RFLAGS
from lasskvm.x86.registers import MASK32, RFLAGS_ARITHMETIC

__all__ = ["Encls"]

_LEAVES: dict[int, Leaf] = {**leaves_build.LEAVES, **leaves_debug.LEAVES, **leaves_paging.LEAVES}


class Encls:
    """What executes ENCLS on *epc*: a :class:`~lasskvm.emulator.context.SgxHandler`.

    The keys that only this processor has come from *secret*: launch keys, and the one that pages are sealed with when
    they leave the EPC. A VM that goes on from a snapshot needs the same secret as before.
    """

    def __init__(self, epc: Epc, secret: bytes) -> None:
        self._use(epc, secret)

    def _use(self, epc: Epc, secret: bytes) -> None:
        self._secret = secret
        self._unit = SgxUnit(epc, LaunchControl(secret), PagingCrypto(secret))

    @property
    def epc(self) -> Epc:
        """The enclave page cache."""
        return self._unit.epc

    @property
    def launch(self) -> LaunchControl:
        """Launch control, for those who make EINITTOKENs."""
        return self._unit.launch

    def is_epc(self, gpa: int) -> bool:
        """Whether guest-physical *gpa* is in the enclave page cache."""
        return self.epc.contains(gpa)

    def get_state(self) -> dict[str, Any]:
        """The secret and the EPC's state without what its pages hold, as names and values for JSON."""
        return {"secret": self._secret.hex(), "epc": self.epc.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on as the one that *state* comes from, on an EPC whose pages hold again what they held.

        Raises KeyError, TypeError or ValueError for what is no such state.
        """
        self.epc.set_state(state["epc"])
        self._use(self.epc, bytes.fromhex(state["secret"]))

    def execute(self, ctx: Emulation, decoded: Decoded) -> None:
        """Execute the leaf function that EAX selects, one of SGX1, and complete the instruction.

        Raises :class:`GuestFault` with nothing changed. An operand that is a device's may raise
        :class:`~lasskvm.emulator.mmio.MmioReadNeeded`.
        """
        words = ctx.words
        outcome = _LEAVES[words[RAX] & MASK32](ctx, self._unit)
        if outcome is not None:
            words[RAX] = outcome.error
            words[RFLAGS] = words[RFLAGS] & ~RFLAGS_ARITHMETIC | outcome.flag
        complete(ctx, decoded)
