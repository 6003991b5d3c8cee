"""A fuzz case: a few bytes of code and everything about the machine that executes them, as data.

A case says all that an execution depends on, so it can be kept in a file (:meth:`Case.to_json`) and run again anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lasskvm.state import Segment
from lasskvm.x86.registers import (
    CR0_PG,
    CR4_LA57,
    CR4_PAE,
    EFER_LMA,
    RFLAGS_TF,
)

__all__ = ["SEGMENT_NAMES", "Case", "CaseFormatError", "Mode", "Paging"]

#: The segment registers of a case, in the order of their encodings.
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")
_GENERAL_REGISTERS = 16


class CaseFormatError(ValueError):
    """A text that is no case."""


class Mode(StrEnum):
    """What the processor executes: the mode, and the default size of operands and addresses."""

    LONG64 = "64"
    COMPATIBILITY32 = "compat32"
    COMPATIBILITY16 = "compat16"
    PROTECTED32 = "prot32"
    PROTECTED16 = "prot16"
    REAL = "real"
    VIRTUAL8086 = "v86"

    @property
    def bits(self) -> int:
        """How instructions are decoded: 64, 32 or 16."""
        if self is Mode.LONG64:
            return 64
        return 32 if self in (Mode.COMPATIBILITY32, Mode.PROTECTED32) else 16

    @property
    def is_ia32e(self) -> bool:
        """Whether it is a sub-mode of IA-32e mode."""
        return self in (Mode.LONG64, Mode.COMPATIBILITY32, Mode.COMPATIBILITY16)


class Paging(StrEnum):
    """How linear addresses are translated."""

    NONE = "none"
    BITS32 = "32-bit"
    PAE = "PAE"
    LEVEL4 = "4-level"
    LEVEL5 = "5-level"


@dataclass(frozen=True)
class Case:
    """One case. Addresses of code, data and tables are those of :mod:`lasskvm.fuzz.layout`.

    ``code`` lies at CS:``rip``, with bytes of value ``filler`` behind it. ``registers`` are RAX to R15 in the order of
    their encodings, ``segments`` ES, CS, SS, DS, FS and GS. ``pages`` are the attributes (``layout.PAGE_*``) of the
    data pages, and ``data_seed`` says what is in them (0: HLT everywhere). ``own_stacks`` lets every handler of IA-32e
    mode run on a stack of its own; without, it pushes to where RSP (or the TSS) points. ``cpu`` is a CPU model as
    ``--cpu`` takes it.
    """

    mode: Mode
    code: bytes
    registers: tuple[int, ...]
    rip: int
    rflags: int
    cpl: int
    cr0: int
    cr4: int
    efer: int
    segments: tuple[Segment, ...]
    pages: tuple[int, ...]
    data_seed: int = 0
    own_stacks: bool = True
    filler: int = 0xF4
    kernel_gs_base: int = 0
    cpu: str = "max"

    @property
    def paging(self) -> Paging:
        """How linear addresses are translated."""
        if not self.cr0 & CR0_PG:
            return Paging.NONE
        if self.efer & EFER_LMA:
            return Paging.LEVEL5 if self.cr4 & CR4_LA57 else Paging.LEVEL4
        return Paging.PAE if self.cr4 & CR4_PAE else Paging.BITS32

    @property
    def is_stepped(self) -> bool:
        """Whether the single-step trap ends the case behind its first instruction."""
        return bool(self.rflags & RFLAGS_TF)

    def to_json(self) -> str:
        """The case as a JSON object; numbers are hexadecimal texts."""
        return json.dumps(self._as_mapping(), indent=2) + "\n"

    def _as_mapping(self) -> dict[str, object]:
        return {
            "mode": self.mode.value,
            "cpu": self.cpu,
            "code": self.code.hex(),
            "rip": hex(self.rip),
            "registers": [hex(value) for value in self.registers],
            "rflags": hex(self.rflags),
            "cpl": self.cpl,
            "cr0": hex(self.cr0),
            "cr4": hex(self.cr4),
            "efer": hex(self.efer),
            "segments": {
                name: [hex(field) for field in (part.selector, part.base, part.limit, part.attributes)]
                for name, part in zip(SEGMENT_NAMES, self.segments, strict=True)
            },
            "pages": [hex(attributes) for attributes in self.pages],
            "data_seed": self.data_seed,
            "own_stacks": self.own_stacks,
            "filler": hex(self.filler),
            "kernel_gs_base": hex(self.kernel_gs_base),
        }

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The inverse of :meth:`to_json`; raises :class:`CaseFormatError` for anything else."""
        try:
            case = cls._from_mapping(json.loads(text))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CaseFormatError(f"this is not a fuzz case: {error}") from error
        if len(case.registers) != _GENERAL_REGISTERS:
            raise CaseFormatError(
                f"a fuzz case has {_GENERAL_REGISTERS} registers, not {len(case.registers)}"
            )
        return case

    @classmethod
    def _from_mapping(cls, fields: Mapping[str, Any]) -> Case:
        return cls(
            mode=Mode(fields["mode"]),
            cpu=str(fields["cpu"]),
            code=bytes.fromhex(fields["code"]),
            rip=int(fields["rip"], 0),
            registers=tuple(int(value, 0) for value in fields["registers"]),
            rflags=int(fields["rflags"], 0),
            cpl=int(fields["cpl"]),
            cr0=int(fields["cr0"], 0),
            cr4=int(fields["cr4"], 0),
            efer=int(fields["efer"], 0),
            segments=tuple(
                Segment(*(int(field, 0) for field in fields["segments"][name])) for name in SEGMENT_NAMES
            ),
            pages=tuple(int(attributes, 0) for attributes in fields["pages"]),
            data_seed=int(fields["data_seed"]),
            own_stacks=bool(fields["own_stacks"]),
            filler=int(fields["filler"], 0),
            kernel_gs_base=int(fields["kernel_gs_base"], 0),
        )
