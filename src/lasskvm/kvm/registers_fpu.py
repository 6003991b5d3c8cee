"""``struct kvm_fpu`` and ``kvm_xsave``: x87 and SSE registers out of the vCPU and back.

The XSAVE region has the standard format: the legacy area, which is an FXSAVE64 image, the header, and the PKRU register
where the guest's CPUID has protection keys.

Source: Intel SDM volume 1, 13.4 (the XSAVE area); KVM's ``kvm_vcpu_ioctl_x86_set_xsave()``.
"""

from __future__ import annotations

import errno

from lasskvm.emulator.fpu import (
    X87_REGISTERS,
    XMM_REGISTERS,
    Fpu,
    set_control_word,
    set_status_word,
    status_word,
)
from lasskvm.emulator.fpu_images import (
    fxsave_image,
    image_mxcsr,
    initialize_components,
    load_fxsave_image,
)
from lasskvm.kvm import structures as api
from lasskvm.x86.fpu import FOP_MASK, MXCSR_WRITABLE
from lasskvm.x86.xsave import (
    COMPONENT_PKRU,
    COMPONENT_SSE,
    COMPONENT_X87,
    PKRU_OFFSET,
    XSAVE_HEADER,
    XSAVE_HEADER_BYTES,
)

__all__ = ["XSAVE_BYTES", "get_fpu", "get_xsave", "set_fpu", "set_xsave"]

#: The size of ``struct kvm_xsave``.
XSAVE_BYTES = 4096
#: Bytes of the register itself; it has more room.
_PKRU_BYTES = 4
_WORD_BYTES = 8


def get_fpu(fpu: Fpu) -> api.Fpu:
    """``KVM_GET_FPU``, MXCSR included."""
    return api.Fpu(
        fpr=[fpu.registers[(fpu.top + place) % X87_REGISTERS] for place in range(X87_REGISTERS)],
        fcw=fpu.fcw,
        fsw=status_word(fpu),
        ftwx=fpu.ftw,
        last_opcode=fpu.fop,
        last_ip=fpu.fip,
        last_dp=fpu.fdp,
        xmm=[fpu.xmm[number] for number in range(XMM_REGISTERS)],
        mxcsr=fpu.mxcsr,
    )


def set_fpu(fpu: Fpu, values: api.Fpu) -> None:
    """``KVM_SET_FPU``, MXCSR included; OSError with EINVAL for reserved bits there, with nothing changed."""
    _check_mxcsr(values.mxcsr, "KVM_SET_FPU")
    set_control_word(fpu, values.fcw)
    set_status_word(fpu, values.fsw)
    fpu.ftw, fpu.fop = values.ftwx, values.last_opcode & FOP_MASK
    fpu.fip, fpu.fdp, fpu.mxcsr = values.last_ip, values.last_dp, values.mxcsr
    for place, value in enumerate(values.fpr):
        fpu.registers[(fpu.top + place) % X87_REGISTERS] = value
    for number, value in enumerate(values.xmm):
        fpu.xmm[number] = value


def get_xsave(fpu: Fpu, pkru: int | None) -> bytes:
    """``KVM_GET_XSAVE``; *pkru* is None where the guest has no protection keys."""
    region = bytearray(XSAVE_BYTES)
    image = fxsave_image(fpu, wide_pointers=True)
    region[: len(image)] = image
    components = COMPONENT_X87 | COMPONENT_SSE
    if pkru is not None:
        components |= COMPONENT_PKRU
        region[PKRU_OFFSET : PKRU_OFFSET + _PKRU_BYTES] = pkru.to_bytes(_PKRU_BYTES, "little")
    region[XSAVE_HEADER : XSAVE_HEADER + _WORD_BYTES] = components.to_bytes(_WORD_BYTES, "little")
    return bytes(region)


def set_xsave(fpu: Fpu, region: bytes, has_pkru: bool) -> int:
    """``KVM_SET_XSAVE``: what is missing at the end of *region* is zero. Returns the new PKRU.

    A component whose bit in XSTATE_BV is clear gets its initial state. Raises OSError with EINVAL, with nothing
    changed, for components that the guest cannot have, the compacted format, and reserved bits.
    """
    region = region[:XSAVE_BYTES].ljust(XSAVE_BYTES, b"\0")
    header = region[XSAVE_HEADER : XSAVE_HEADER + XSAVE_HEADER_BYTES]
    components = int.from_bytes(header[:_WORD_BYTES], "little")
    if components & ~(COMPONENT_X87 | COMPONENT_SSE | COMPONENT_PKRU * has_pkru):
        raise _refusal(f"XSTATE_BV {components:#x} names what the guest's processor does not have")
    if any(header[_WORD_BYTES:]):
        raise _refusal("the region is not in the standard format; XCOMP_BV and reserved bytes must be 0")
    if components & COMPONENT_SSE:
        _check_mxcsr(image_mxcsr(region), "KVM_SET_XSAVE")
    _load_legacy_area(fpu, region[:XSAVE_HEADER], components)
    if not components & COMPONENT_PKRU:
        return 0
    return int.from_bytes(region[PKRU_OFFSET : PKRU_OFFSET + _PKRU_BYTES], "little")


def _load_legacy_area(fpu: Fpu, image: bytes, components: int) -> None:
    # MXCSR, which processors load in any case, comes with the XMM registers here.
    has_sse = components & COMPONENT_SSE != 0
    load_fxsave_image(
        fpu,
        image,
        wide_pointers=True,
        xmm_registers=XMM_REGISTERS if has_sse else 0,
        with_mxcsr=has_sse,
        with_x87=components & COMPONENT_X87 != 0,
    )
    initialize_components(fpu, ~components)


def _check_mxcsr(value: int, ioctl: str) -> None:
    if value & ~MXCSR_WRITABLE:
        raise OSError(errno.EINVAL, f"{ioctl}: MXCSR {value:#x} has reserved bits")


def _refusal(reason: str) -> OSError:
    return OSError(errno.EINVAL, f"KVM_SET_XSAVE: {reason}")
