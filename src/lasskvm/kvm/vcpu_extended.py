"""The extended registers of a virtual processor, ioctl by ioctl: FPU, XSAVE area, XCR0, debug registers."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lasskvm.kvm import registers_fpu
from lasskvm.kvm.structures import DebugRegs, Fpu
from lasskvm.state import DR0, DR6, DR7, PKRU, TLB_FLUSH, XCR0, VcpuState
from lasskvm.x86.cpuid import CpuidTable
from lasskvm.x86.registers import DR6_FIXED, DR7_FIXED, MASK32
from lasskvm.x86.xsave import is_valid_xcr0

if TYPE_CHECKING:
    from lasskvm.emulator.context import Emulation

__all__ = ["ExtendedRegisters"]

_BREAKPOINTS = 4


class ExtendedRegisters:
    """The part of :class:`~lasskvm.kvm.vcpu.Vcpu` that gets and sets them."""

    state: VcpuState
    cpuid: CpuidTable
    emulation: Emulation

    def get_fpu(self) -> Fpu:
        """``KVM_GET_FPU``. MXCSR is among it, which the kernel leaves out."""
        return registers_fpu.get_fpu(self.emulation.fpu)

    def set_fpu(self, fpu: Fpu) -> None:
        """``KVM_SET_FPU``, MXCSR included; OSError with EINVAL for reserved bits in that."""
        registers_fpu.set_fpu(self.emulation.fpu, fpu)

    def get_xsave(self) -> bytes:
        """``KVM_GET_XSAVE``: 4096 bytes in XSAVE's standard format: x87, SSE, and PKRU where the guest has it."""
        return registers_fpu.get_xsave(
            self.emulation.fpu, self.state.words[PKRU] if self.cpuid.has("pku") else None
        )

    def set_xsave(self, region: bytes) -> None:
        """``KVM_SET_XSAVE``: *region* as :meth:`get_xsave` gives it; what is missing at its end is zero.

        OSError with EINVAL for components that the guest cannot have, the compacted format, and reserved bits.
        """
        words = self.state.words
        words[PKRU] = registers_fpu.set_xsave(self.emulation.fpu, region, self.cpuid.has("pku"))
        words[TLB_FLUSH] = 1

    def get_xcrs(self) -> dict[int, int]:
        """``KVM_GET_XCRS``."""
        return {0: self.state.words[XCR0]}

    def set_xcrs(self, values: Mapping[int, int]) -> None:
        """``KVM_SET_XCRS``; OSError with EINVAL for other registers than XCR0, and for what CPUID does not offer."""
        for index, value in values.items():
            if index or not is_valid_xcr0(value, self.cpuid):
                raise OSError(
                    errno.EINVAL, f"KVM_SET_XCRS: the guest's CPUID does not allow XCR{index} {value:#x}"
                )
        if values:
            self.state.words[XCR0] = values[0]

    def get_debugregs(self) -> DebugRegs:
        """``KVM_GET_DEBUGREGS``: the guest's own, whatever breakpoints the VMM has."""
        words = self.state.words
        first, second, third, fourth = words[DR0 : DR0 + _BREAKPOINTS]
        return DebugRegs((first, second, third, fourth), words[DR6], words[DR7])

    def set_debugregs(self, registers: DebugRegs) -> None:
        """``KVM_SET_DEBUGREGS``; OSError with EINVAL when DR6 or DR7 has more than 32 bits."""
        if registers.dr6 > MASK32 or registers.dr7 > MASK32:
            raise OSError(errno.EINVAL, "KVM_SET_DEBUGREGS: the upper halves of DR6 and DR7 must be 0")
        words = self.state.words
        for number, address in enumerate(registers.db):
            words[DR0 + number] = address
        words[DR6], words[DR7] = registers.dr6 | DR6_FIXED, registers.dr7 | DR7_FIXED
