"""A VMCS of L1's: the cached copy that VMPTRLD makes, its format in guest memory, and VMREAD and VMWRITE.

Between VMPTRLD and VMCLEAR the fields are in a :class:`Vmcs12`, and what guest memory says does not matter. L1 owns the
page, so :meth:`Vmcs12.load` takes any contents: values are made sense of at VM entry, not here.

The format is ours, with :data:`VMCS12_REVISION` as its name; software reads it through VMREAD only. All numbers are
little-endian; what is not named is kept as zeros.

=======  ==================================================================================
offset
=======  ==================================================================================
0        revision identifier, 4 bytes
4        VMX-abort indicator, 4 bytes
8        launch state, 4 bytes: 0 clear, 1 launched
0x40     16-bit fields, 2 bytes each
0x140    32-bit fields, 4 bytes each
0x340    64-bit fields, 8 bytes each
0x740    natural-width fields, 8 bytes each
0xB40    end
=======  ==================================================================================

Each of the four tables has room for 32 fields of each type, in the order control, read-only, guest state, host state; a
field stands at its index. So a field that is added moves no other.

All fields of :class:`~lasskvm.x86.vmx_fields.VmcsField` exist, whatever the guest's CPUID says, as with KVM.

Source: Intel SDM volume 3C, 25.2 (format of the region), 25.11 (access to fields); the instructions VMREAD and VMWRITE
in chapter 31; KVM's ``handle_vmread()`` and ``handle_vmwrite()``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from lasskvm.memory import GuestMemory
from lasskvm.x86.vmx import (
    SEGMENT_AR_WRITABLE,
    VMCS_ABORT_INDICATOR,
    VMCS_REVISION_ID,
    VmInstructionError,
)
from lasskvm.x86.vmx_fields import (
    ENCODING_HIGH_ACCESS,
    FIELD_BYTES,
    FieldType,
    FieldWidth,
    VmcsField,
    field_index,
    field_type,
    field_width,
    is_high_access,
)

__all__ = [
    "VMCS12_REVISION",
    "VmFailValid",
    "Vmcs12",
    "field_offset",
    "revision_id",
    "set_abort_indicator",
    "set_clear",
]

#: The revision identifier of this format; bit 31 is clear. To change whenever the format does.
VMCS12_REVISION = int.from_bytes(b"LKV1", "little")

_LAUNCH_STATE = 8
_CLEAR, _LAUNCHED = 0, 1
_WORD_BYTES = 4

_ROOM = 32
_TABLES = {
    FieldWidth.BITS_16: 0x040,
    FieldWidth.BITS_32: 0x140,
    FieldWidth.BITS_64: 0x340,
    FieldWidth.NATURAL: 0x740,
}
_VMCS12_BYTES = 0xB40

_MASK32 = (1 << 32) - 1
_HIGH_SHIFT = 32


def field_offset(encoding: int) -> int:
    """Where the field with this *encoding* of its full access is in the region: byte offset."""
    width = field_width(encoding)
    return _TABLES[width] + (field_type(encoding) * _ROOM + field_index(encoding)) * FIELD_BYTES[width]


#: The fields in the order of their places, and a format string with padding between.
_FIELDS = tuple(sorted(VmcsField, key=field_offset))
_FORMAT_CODES = {2: "H", 4: "I", 8: "Q"}


def _format() -> struct.Struct:
    codes, end = ["<3I"], 3 * _WORD_BYTES
    for key in _FIELDS:
        size = FIELD_BYTES[field_width(key)]
        codes.append(f"{field_offset(key) - end}x{_FORMAT_CODES[size]}")
        end = field_offset(key) + size
    return struct.Struct("".join(codes) + f"{_VMCS12_BYTES - end}x")


_VMCS12 = _format()
_KEYS = tuple(map(int, _FIELDS))
_MASKS = {key: (1 << 8 * FIELD_BYTES[field_width(key)]) - 1 for key in _KEYS}
_READ_ONLY = frozenset(key for key in _KEYS if field_type(key) == FieldType.READ_ONLY)
_ACCESS_RIGHTS = frozenset(range(VmcsField.GUEST_ES_AR_BYTES, VmcsField.GUEST_TR_AR_BYTES + 1, 2))


class VmFailValid(Exception):
    """A VMX instruction ends in VMfailValid: RFLAGS.ZF is set, and *error* goes into the current VMCS (SDM 31.2).

    *reason* is for people: what in particular was wrong.
    """

    def __init__(self, error: VmInstructionError, reason: str = "") -> None:
        self.error = error
        super().__init__(f"{error.name}: {reason}" if reason else error.name)


class Vmcs12(dict[int, int]):
    """One VMCS of L1's while it is active.

    It is a dictionary, because a VM exit reads dozens of its fields: with a value for each :class:`VmcsField` and no
    other key. Who uses another way than indexing to store keeps to the field's width; indexing drops what has no room.
    That is the processor's own access; :meth:`read` and :meth:`write` are VMREAD and VMWRITE.

    ``launched`` says whether VMLAUNCH has succeeded since the last VMCLEAR; ``abort`` is the VMX-abort indicator, a
    :class:`~lasskvm.x86.vmx.VmxAbort` or 0.

    >>> vmcs = Vmcs12()
    >>> vmcs.write(0x2001, 5, any_field=False)
    >>> hex(vmcs[VmcsField.IO_BITMAP_A]), vmcs.read(0x2001)
    ('0x500000000', 5)
    """

    def __init__(
        self, launched: bool = False, abort: int = 0, fields: Mapping[int, int] | None = None
    ) -> None:
        super().__init__(dict.fromkeys(_KEYS, 0) if fields is None else fields)
        self.launched = launched
        self.abort = abort

    def __setitem__(self, key: int, value: int) -> None:
        super().__setitem__(key, value & _MASKS[key])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vmcs12):
            return NotImplemented
        return (self.launched, self.abort) == (other.launched, other.abort) and super().__eq__(other)

    __hash__ = None

    def copy(self) -> Vmcs12:
        """Another VMCS with the same contents."""
        return Vmcs12(self.launched, self.abort, self)

    @classmethod
    def load(cls, memory: GuestMemory, gpa: int) -> Vmcs12:
        """The VMCS at guest-physical *gpa*, page-aligned, whatever is there.

        The revision identifier is the caller's to compare: VMPTRLD fails for another one with error 11.
        """
        return cls.unpack(memory.read(gpa, _VMCS12_BYTES))

    def store(self, memory: GuestMemory, gpa: int) -> None:
        """Write everything to guest-physical *gpa*, page-aligned; lost where L1 has no memory that it may write."""
        memory.store_bytes(gpa, self.pack())

    @classmethod
    def unpack(cls, region: bytes) -> Vmcs12:
        """The VMCS in *region*, which has the bytes of a region's beginning or the whole of it."""
        _, abort, launch_state, *values = _VMCS12.unpack_from(region)
        return cls(launch_state == _LAUNCHED, abort, dict(zip(_KEYS, values, strict=True)))

    def pack(self) -> bytes:
        """The region's beginning, up to where all that follows is kept as it is."""
        launch_state = _LAUNCHED if self.launched else _CLEAR
        return _VMCS12.pack(VMCS12_REVISION, self.abort, launch_state, *map(self.__getitem__, _KEYS))

    def read(self, encoding: int) -> int:
        """VMREAD: the field that *encoding*, 64 bits, names, or its upper half; zero-extended.

        Raises :class:`VmFailValid` with error 12 when there is no such field. Outside 64-bit mode the operands are 32
        bits wide; the caller cuts the value.
        """
        value = self[_supported(encoding)]
        return value >> _HIGH_SHIFT if is_high_access(encoding) else value

    def write(self, encoding: int, value: int, *, any_field: bool) -> None:
        """VMWRITE of *value*, 64 bits (outside 64-bit mode a zero-extended 32-bit operand).

        Bits that the field has no room for are ignored; the upper half of a 64-bit field takes the lower 32 bits.
        *any_field* is bit 29 of IA32_VMX_MISC: read-only fields are written like others. Raises :class:`VmFailValid`
        with error 12 when there is no such field, and 13 when it is read-only, with nothing changed.
        """
        key = _supported(encoding)
        if key in _READ_ONLY and not any_field:
            raise VmFailValid(VmInstructionError.VMWRITE_READ_ONLY_VMCS_COMPONENT)
        if key in _ACCESS_RIGHTS:
            value &= SEGMENT_AR_WRITABLE
        if is_high_access(encoding):
            value = (value & _MASK32) << _HIGH_SHIFT | self[key] & _MASK32
        self[key] = value


def _supported(encoding: int) -> int:
    """The field that *encoding* names, as an encoding of its full access. Only 64-bit fields have an upper half."""
    key = encoding & ~ENCODING_HIGH_ACCESS
    if key not in _MASKS or (is_high_access(encoding) and field_width(key) != FieldWidth.BITS_64):
        raise VmFailValid(VmInstructionError.UNSUPPORTED_VMCS_COMPONENT)
    return key


def set_clear(memory: GuestMemory, gpa: int) -> None:
    """VMCLEAR of a VMCS that is not current: its launch state in guest memory becomes "clear", nothing else changes."""
    memory.store(gpa + _LAUNCH_STATE, _WORD_BYTES, _CLEAR)


def set_abort_indicator(memory: GuestMemory, gpa: int, indicator: int) -> None:
    """Write the VMX-abort indicator of the VMCS at *gpa*, where software finds it behind the shutdown."""
    memory.store(gpa + VMCS_ABORT_INDICATOR, _WORD_BYTES, indicator)


def revision_id(memory: GuestMemory, gpa: int) -> int:
    """The first word of the region at *gpa*: revision identifier, and the shadow-VMCS indicator in bit 31."""
    return memory.load(gpa + VMCS_REVISION_ID, _WORD_BYTES)
