"""SECS: the control structure of an enclave, as fields.

The page is all there is: an SECS that goes through a snapshot, or out of the EPC by EWB and back by ELDU, is again what
it was. So what the processor keeps for itself, the state of the measurement and the tracking epoch among it, is in the
part of the page that the manual leaves to it.

Source: Intel SDM volume 3D, 35.7.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from lasskvm.sgx.fields import field, is_zero, u16, u32, u64
from lasskvm.x86 import sgx

__all__ = ["Secs", "secs_reserved_is_zero"]

_Q, _D, _W = struct.Struct("<Q"), struct.Struct("<I"), struct.Struct("<H")
#: The processor's own fields: enclave identifier, blocks measured, tracking epoch.
_INTERNAL = struct.Struct("<QQQ")
_INTERNAL_OFFSET = 264


@dataclass(slots=True)
class Secs:
    """The fields of one SECS. Change them and give the object to :meth:`lasskvm.sgx.epc.Epc.store_secs`.

    While the enclave is being built ``mrenclave`` is the chaining value of SHA-256 over ``measured_blocks`` blocks of
    64 bytes, as :mod:`lasskvm.sgx.measurement` makes it; EINIT puts the digest there.
    """

    size: int
    base: int
    ssa_frame_size: int
    miscselect: int
    attributes: int
    xfrm: int
    mrenclave: bytes
    mrsigner: bytes = bytes(sgx.DIGEST_SIZE)
    isvprodid: int = 0
    isvsvn: int = 0
    #: Enclave identifier: never given twice by an EPC.
    eid: int = 0
    measured_blocks: int = 0
    #: How many times ETRACK has been executed.
    tracking_epoch: int = 0

    @property
    def is_initialized(self) -> bool:
        """Whether EINIT has been executed."""
        return self.attributes & sgx.ATTRIBUTE_INIT != 0

    @property
    def is_debug(self) -> bool:
        """Whether EDBGRD and EDBGWR may look into the enclave."""
        return self.attributes & sgx.ATTRIBUTE_DEBUG != 0

    @property
    def is_64bit(self) -> bool:
        """Whether the enclave runs in 64-bit mode."""
        return self.attributes & sgx.ATTRIBUTE_MODE64BIT != 0

    def covers(self, linear_address: int) -> bool:
        """Whether *linear_address* is in the range of the enclave's addresses (ELRANGE)."""
        return self.base <= linear_address < self.base + self.size

    @classmethod
    def parse(cls, page: bytes) -> Secs:
        """The fields of the 4096 bytes *page*. Any bytes have a meaning; checking it is ECREATE's matter."""
        eid, measured_blocks, tracking_epoch = _INTERNAL.unpack_from(page, _INTERNAL_OFFSET)
        return cls(
            size=u64(page, sgx.SECS_ENCLAVE_SIZE),
            base=u64(page, sgx.SECS_BASEADDR),
            ssa_frame_size=u32(page, sgx.SECS_SSAFRAMESIZE),
            miscselect=u32(page, sgx.SECS_MISCSELECT),
            attributes=u64(page, sgx.SECS_ATTRIBUTES),
            xfrm=u64(page, sgx.SECS_XFRM),
            mrenclave=field(page, sgx.SECS_MRENCLAVE, sgx.DIGEST_SIZE),
            mrsigner=field(page, sgx.SECS_MRSIGNER, sgx.DIGEST_SIZE),
            isvprodid=u16(page, sgx.SECS_ISVPRODID),
            isvsvn=u16(page, sgx.SECS_ISVSVN),
            eid=eid,
            measured_blocks=measured_blocks,
            tracking_epoch=tracking_epoch,
        )

    @classmethod
    def created(cls, source: bytes, eid: int) -> Secs:
        """What ECREATE makes of software's page *source*, before the measurement begins: an enclave of no identity.

        Checking *source* is the leaf function's matter.
        """
        secs = cls.parse(source)
        secs.mrenclave = secs.mrsigner = bytes(sgx.DIGEST_SIZE)
        secs.isvprodid = secs.isvsvn = secs.measured_blocks = secs.tracking_epoch = 0
        secs.eid = eid
        return secs

    def pack(self) -> bytes:
        """The page: 4096 bytes, zero where there is no field. The inverse of :meth:`parse`."""
        page = bytearray(sgx.SECS_SIZE)
        _Q.pack_into(page, sgx.SECS_ENCLAVE_SIZE, self.size)
        _Q.pack_into(page, sgx.SECS_BASEADDR, self.base)
        _D.pack_into(page, sgx.SECS_SSAFRAMESIZE, self.ssa_frame_size)
        _D.pack_into(page, sgx.SECS_MISCSELECT, self.miscselect)
        _Q.pack_into(page, sgx.SECS_ATTRIBUTES, self.attributes)
        _Q.pack_into(page, sgx.SECS_XFRM, self.xfrm)
        page[sgx.SECS_MRENCLAVE : sgx.SECS_MRENCLAVE + sgx.DIGEST_SIZE] = self.mrenclave
        page[sgx.SECS_MRSIGNER : sgx.SECS_MRSIGNER + sgx.DIGEST_SIZE] = self.mrsigner
        _W.pack_into(page, sgx.SECS_ISVPRODID, self.isvprodid)
        _W.pack_into(page, sgx.SECS_ISVSVN, self.isvsvn)
        _INTERNAL.pack_into(page, _INTERNAL_OFFSET, self.eid, self.measured_blocks, self.tracking_epoch)
        return bytes(page)


def secs_reserved_is_zero(page: bytes) -> bool:
    """Whether the reserved bytes of an SECS that software hands to ECREATE are zero."""
    return is_zero(page, sgx.SECS_RESERVED)
