"""ENCLS, ENCLU and ENCLV: what every leaf function has in common. Whoever virtualizes SGX for the guest executes the
leaf functions of ENCLS (``Emulation.sgx``).

ENCLU has no leaf functions here: enclaves cannot be entered, and outside an enclave EGETKEY and its like are #GP(0) on
every processor. ENCLV is #UD, because CPUID does not give the feature. With a prefix that the manual forbids, the
decoder takes none of them for what it is.

Source: Intel SDM volume 3D, 38.1 (leaf functions), 38.2 (ENCLS, ENCLU: the order of the checks); KVM's
``handle_encls()``.
"""

from __future__ import annotations

from iced_x86 import Mnemonic

from lasskvm.emulator.context import Emulation
from lasskvm.emulator.decode import Decoded
from lasskvm.emulator.faults import GuestFault, general_protection, invalid_opcode
from lasskvm.emulator.modes import in_64bit_mode, in_protected_mode
from lasskvm.emulator.msrs import read_msr
from lasskvm.emulator.operation import Handler
from lasskvm.state import ATTRIBUTES, CPL, CR0, RAX, segment_word
from lasskvm.x86.exceptions import NM
from lasskvm.x86.msr import FEATURE_CONTROL_LOCK, FEATURE_CONTROL_SGX_ENABLE, MSR_IA32_FEATURE_CONTROL
from lasskvm.x86.registers import AR_CODE, AR_EXPAND_DOWN, CR0_PG, CR0_TS, DS, MASK32
from lasskvm.x86.sgx import SGX1_ENCLS_LEAVES

__all__ = ["HANDLERS"]

_DS_ATTRIBUTES = segment_word(DS, ATTRIBUTES)
#: Firmware has to lock the register with SGX enabled.
_SGX_ENABLED = FEATURE_CONTROL_LOCK | FEATURE_CONTROL_SGX_ENABLE
_USER_CPL = 3


def _encls(ctx: Emulation, decoded: Decoded) -> None:
    words = ctx.words
    _check_recognized(ctx)
    if words[CPL] or ctx.sgx is None:
        raise invalid_opcode()
    if not _is_enabled(ctx) or words[RAX] & MASK32 not in SGX1_ENCLS_LEAVES or not words[CR0] & CR0_PG:
        raise general_protection()
    kind = words[_DS_ATTRIBUTES] & (AR_CODE | AR_EXPAND_DOWN)
    if not in_64bit_mode(words) and kind == AR_EXPAND_DOWN:
        raise general_protection()
    ctx.sgx.execute(ctx, decoded)


def _enclu(ctx: Emulation, decoded: Decoded) -> None:
    """Whatever EAX says: no leaf function is there, or none outside an enclave."""
    _check_recognized(ctx)
    if ctx.words[CR0] & CR0_TS:
        raise GuestFault(NM)
    if ctx.words[CPL] < _USER_CPL:
        raise invalid_opcode()
    raise general_protection()


def _enclv(ctx: Emulation, decoded: Decoded) -> None:
    raise invalid_opcode()


def _check_recognized(ctx: Emulation) -> None:
    """#UD in real and virtual-8086 mode, and where CPUID leaf 12H does not have SGX1."""
    if not in_protected_mode(ctx.words) or not ctx.cpuid.has("sgx1"):
        raise invalid_opcode()


def _is_enabled(ctx: Emulation) -> bool:
    return read_msr(ctx, MSR_IA32_FEATURE_CONTROL, host_initiated=True) & _SGX_ENABLED == _SGX_ENABLED


#: The handlers of this module, by ``iced_x86.Mnemonic``.
HANDLERS: dict[int, Handler] = {Mnemonic.ENCLS: _encls, Mnemonic.ENCLU: _enclu, Mnemonic.ENCLV: _enclv}
