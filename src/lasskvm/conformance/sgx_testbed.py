"""The testbed of cases in which SGX is used: a guest with an EPC, which is emptied and filled before each case.

The guest itself does that, leaf function by leaf function, with LASS off and all operands in the upper half. A provider
whose ENCLS cannot do even that is in error, and not in want of a feature.
"""

from __future__ import annotations

from dataclasses import dataclass

from lasskvm.conformance import enclaves, layout, signing
from lasskvm.conformance.assembler import assemble
from lasskvm.conformance.case import Case, Mode
from lasskvm.conformance.enclaves import Built, Side
from lasskvm.conformance.nested_testbed import NestedTestbed
from lasskvm.conformance.testbed import Device, ProviderError, Testbed
from lasskvm.kvm.exits import HltExit
from lasskvm.kvm.structures import Regs, Sregs
from lasskvm.memory import PAGE_SIZE
from lasskvm.x86.cpuid import CpuidEntry
from lasskvm.x86.msr import FEATURE_CONTROL_LOCK, FEATURE_CONTROL_SGX_ENABLE, MSR_IA32_FEATURE_CONTROL
from lasskvm.x86.registers import CR3_PWT, CR4_LASS, MASK64, RFLAGS_ZF
from lasskvm.x86.sgx import EnclsLeaf, PageType

__all__ = ["NestedSgxTestbed", "SgxTestbed"]

#: Code and structures for the preparation, behind everything that other testbeds use; mapped at ``UPPER``.
_AREA_GPA = 0x1D_0000
_CODE_GPA, _INFO_GPA, _SOURCE_GPA, _STACK_GPA = (_AREA_GPA + PAGE_SIZE * number for number in range(4))
_AREA_PAGES = 4
_INFO, _SOURCE, _STACK = (layout.UPPER + gpa for gpa in (_INFO_GPA, _SOURCE_GPA, _STACK_GPA))
#: The SECINFO in the page of the PAGEINFO.
_SECINFO = 0x40
_CODE = assemble(
    f"""
leaf: encls; hlt
leaf_end:
empty: mov eax, {EnclsLeaf.EREMOVE}; encls; sub rcx, {PAGE_SIZE}; dec rdx; jne empty; hlt
empty_end:
""",
    layout.UPPER + _CODE_GPA,
)
_SECS_FLAGS = 0
_SSA_FRAME_SIZE = 1


@dataclass(frozen=True)
class _Call:
    """A leaf function with its registers, and what is at its structures."""

    leaf: EnclsLeaf
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    info: bytes = b""
    source: bytes = b""


class SgxTestbed(Testbed):
    """A VM with an EPC. *backend*, *entries*, *levels* and *timeout* are those of :class:`Testbed`."""

    __test__ = False

    def _processor(self, entries: list[CpuidEntry]) -> list[CpuidEntry]:
        size = enclaves.EPC_PAGES * PAGE_SIZE
        return self._backend.give_epc(self._vm, super()._processor(entries), enclaves.EPC_GPA, size)

    def _build_memory(self) -> None:
        tables = self._tables
        tables.map(layout.UPPER + _AREA_GPA, _AREA_GPA, pages=_AREA_PAGES)
        for side in Side:
            flags = layout.USER_PAGE if side is Side.LOW_USER else 0
            tables.map(side.value, enclaves.STRUCTURES_GPA, flags, enclaves.STRUCTURE_PAGES)
            tables.map(side.at(enclaves.EPC), enclaves.EPC_GPA, flags, enclaves.EPC_PAGES)
            tables.unmap(side.at(enclaves.ABSENT))
        self._memory.write(_CODE_GPA, _CODE.code)
        super()._build_memory()

    def _prepare(self, case: Case) -> None:
        super()._prepare(case)
        assert case.sgx is not None
        enabled = FEATURE_CONTROL_LOCK | FEATURE_CONTROL_SGX_ENABLE
        self._vcpu.set_msrs({MSR_IA32_FEATURE_CONTROL: enabled})
        self._cr3 ^= CR3_PWT
        self._vcpu.set_sregs(self._preparation_sregs())
        last = Side.PREPARATION.at(enclaves.EPC) + (enclaves.EPC_PAGES - 1) * PAGE_SIZE
        # Backwards, because the SECS is in front.
        self._execute_at("empty", rcx=last, rdx=enclaves.EPC_PAGES)
        for call in _calls(case.sgx.built):
            self._memory.write(_INFO_GPA, call.info)
            self._memory.write(_SOURCE_GPA, call.source)
            regs = self._execute_at("leaf", rax=call.leaf, rbx=call.rbx, rcx=call.rcx, rdx=call.rdx)
            if regs.rflags & RFLAGS_ZF:
                raise ProviderError(f"{call.leaf.name} failed with error {regs.rax}, before the case")

    def _preparation_sregs(self) -> Sregs:
        sregs = layout.initial_sregs(self._power_on, 0, Mode.LONG.bits, self._cr3)
        sregs.cr4 &= ~CR4_LASS
        return sregs

    def _execute_at(self, label: str, **registers: int) -> Regs:
        """Run the preparation's code at *label* to its HLT."""
        start = _CODE.labels[label]
        self._vcpu.set_regs(Regs(rip=start, rsp=_STACK + PAGE_SIZE, **registers))
        reason, regs = self._run(Device()), self._vcpu.get_regs()
        if not isinstance(reason, HltExit) or regs.rip != _CODE.labels[f"{label}_end"]:
            raise ProviderError(
                f"ENCLS cannot prepare the case: {reason} at {regs.rip:#x}, RAX {regs.rax & MASK64:#x}"
            )
        return regs


class NestedSgxTestbed(SgxTestbed, NestedTestbed):
    """The same with VMX: the preparation is L1's."""

    __test__ = False

    def _preparation_sregs(self) -> Sregs:
        return self._l1_sregs(lass=False)


def _calls(built: Built) -> list[_Call]:
    """How the guest gets there, from an empty EPC."""
    secs, page, versions, slot = (
        Side.PREPARATION.at(place)
        for place in (enclaves.SECS, enclaves.REGULAR, enclaves.VERSIONS, enclaves.SLOT)
    )
    member = enclaves.MEMBER
    added = [
            _Call(
                EnclsLeaf.ECREATE, _INFO, secs, info=_pageinfo(_SECS_FLAGS),
                source=signing.secs_page(enclaves.SIZE, enclaves.BASE, _SSA_FRAME_SIZE, enclaves.ATTRIBUTES),
            ),
            _Call(
                EnclsLeaf.EADD, _INFO, page, source=member.content,
                info=_pageinfo(member.flags, enclaves.BASE + member.offset, secs),
            ),
            _Call(EnclsLeaf.EPA, PageType.VA, versions),
    ]  # fmt: skip
    measured = [_Call(EnclsLeaf.EEXTEND, secs, page + start) for start in range(0, PAGE_SIZE, signing.CHUNK)]
    blocked = [_Call(EnclsLeaf.EBLOCK, rcx=page), _Call(EnclsLeaf.ETRACK, rcx=secs)]
    sealed = signing.pageinfo(0, Side.PREPARATION.at(enclaves.SOURCE), Side.PREPARATION.at(enclaves.PCMD), 0)
    evicted = [_Call(EnclsLeaf.EWB, _INFO, page, slot, info=sealed)]
    return {
        Built.NOTHING: [],
        Built.ADDED: added,
        Built.MEASURED: added + measured,
        Built.BLOCKED: added + blocked,
        Built.EVICTED: added + blocked + evicted,
    }[built]


def _pageinfo(flags: int, linear_address: int = 0, secs: int = 0) -> bytes:
    """A PAGEINFO and, behind it, the SECINFO it points to."""
    info = signing.pageinfo(linear_address, _SOURCE, _INFO + _SECINFO, secs)
    return info.ljust(_SECINFO, b"\0") + signing.secinfo(flags)
