"""SGX: leaf functions, error codes, and the layouts of what software and processor exchange.

Offsets and sizes are bytes, all integers little-endian. What the features that this VMM does not have (SGX2,
key separation and sharing, CET in enclaves) would give a meaning is reserved here and has to be zero. The MSRs
IA32_SGXLEPUBKEYHASH0..3 and the bits of IA32_FEATURE_CONTROL are in :mod:`lasskvm.x86.msr`, the names of the feature
bits in :mod:`lasskvm.x86.cpuid`.

Source: Intel SDM volume 3D, 34.7 (enumeration), chapter 35 (data structures), 36.1 (what is measured), 38.1 (leaf
functions, table 38-4: error codes).
"""

from enum import IntEnum

# ----------------------------------------------------------------------------------------- leaf functions, error codes


class EnclsLeaf(IntEnum):
    """What EAX selects at ENCLS (table 38-1), as far as SGX1 and SGX2 go."""

    ECREATE = 0x00
    EADD = 0x01
    EINIT = 0x02
    EREMOVE = 0x03
    EDBGRD = 0x04
    EDBGWR = 0x05
    EEXTEND = 0x06
    ELDB = 0x07
    ELDU = 0x08
    EBLOCK = 0x09
    EPA = 0x0A
    EWB = 0x0B
    ETRACK = 0x0C
    EAUG = 0x0D
    EMODPR = 0x0E
    EMODT = 0x0F


#: The leaf functions of ENCLS that SGX1 has.
SGX1_ENCLS_LEAVES = frozenset(leaf for leaf in EnclsLeaf if leaf < EnclsLeaf.EAUG)


class SgxError(IntEnum):
    """What a leaf function leaves in RAX (table 38-4). Names are the manual's, without ``SGX_``."""

    SUCCESS = 0
    INVALID_SIG_STRUCT = 1
    INVALID_ATTRIBUTE = 2
    BLKSTATE = 3
    INVALID_MEASUREMENT = 4
    NOTBLOCKABLE = 5
    PG_INVLD = 6
    EPC_PAGE_CONFLICT = 7
    INVALID_SIGNATURE = 8
    MAC_COMPARE_FAIL = 9
    PAGE_NOT_BLOCKED = 10
    NOT_TRACKED = 11
    VA_SLOT_OCCUPIED = 12
    CHILD_PRESENT = 13
    ENCLAVE_ACT = 14
    ENTRYEPOCH_LOCKED = 15
    INVALID_EINITTOKEN = 16
    PREV_TRK_INCMPL = 17
    PG_IS_SECS = 18
    PAGE_ATTRIBUTES_MISMATCH = 19
    PAGE_NOT_MODIFIABLE = 20
    PAGE_NOT_DEBUGGABLE = 21
    INVALID_CPUSVN = 32
    INVALID_ISVSVN = 64
    UNMASKED_EVENT = 128
    INVALID_KEYNAME = 256


#: The bit of a #PF's error code that says: the access was fine for paging and violates the access control of enclaves.
PF_SGX = 1 << 15

# ------------------------------------------------------------------------------------------------------ EPC, alignment

#: An EPC page; also the alignment of the page and of what is copied into it.
EPC_PAGE_SIZE = 4096
EPC_PAGE_MASK = EPC_PAGE_SIZE - 1
#: EEXTEND measures this much at a time, aligned to it.
EEXTEND_CHUNK = 256
#: A slot of a version array, and how many of them a page has.
VA_SLOT_SIZE = 8
VA_SLOTS = EPC_PAGE_SIZE // VA_SLOT_SIZE


class PageType(IntEnum):
    """Types of EPC pages (35.11.2), those of SGX1 and PT_TRIM, which some checks name."""

    SECS = 0
    TCS = 1
    REG = 2
    VA = 3
    TRIM = 4


# ----------------------------------------------------------------------------------- PAGEINFO (35.10), SECINFO (35.11)

PAGEINFO_SIZE = 32
PAGEINFO_ALIGNMENT = 32
PAGEINFO_LINADDR = 0
PAGEINFO_SRCPGE = 8
#: The address of a SECINFO, or for EWB and ELDB/ELDU that of a PCMD.
PAGEINFO_SECINFO = 16
PAGEINFO_PCMD = PAGEINFO_SECINFO
PAGEINFO_SECS = 24

SECINFO_SIZE = 64
SECINFO_ALIGNMENT = 64
SECINFO_FLAGS = 0
#: (offset, size) of what has to be zero beside undefined flags.
SECINFO_RESERVED = ((8, 56),)
#: Flags (35.11.1); the page type is in a byte of its own.
SECINFO_R = 1 << 0
SECINFO_W = 1 << 1
SECINFO_X = 1 << 2
SECINFO_PENDING = 1 << 3
SECINFO_MODIFIED = 1 << 4
SECINFO_PR = 1 << 5
SECINFO_RWX = SECINFO_R | SECINFO_W | SECINFO_X
SECINFO_PAGE_TYPE_SHIFT = 8
SECINFO_PAGE_TYPE_MASK = 0xFF << SECINFO_PAGE_TYPE_SHIFT
#: Bits of the flags that have a meaning; the others, and the bytes behind the flags, are reserved.
SECINFO_DEFINED = SECINFO_RWX | SECINFO_PENDING | SECINFO_MODIFIED | SECINFO_PR | SECINFO_PAGE_TYPE_MASK

# -------------------------------------------------------------------------------------------------------- PCMD (35.12)

PCMD_SIZE = 128
PCMD_ALIGNMENT = 128
PCMD_SECINFO = 0
PCMD_ENCLAVEID = 64
PCMD_MAC = 112
PCMD_MAC_SIZE = 16
#: (offset, size) of what has to be zero beside undefined flags: the rest of the SECINFO, the gap before the MAC.
PCMD_RESERVED = ((8, 56), (72, 40))

# --------------------------------------------------------------------------------------------------------- SECS (35.7)

SECS_SIZE = EPC_PAGE_SIZE
SECS_ENCLAVE_SIZE = 0
SECS_BASEADDR = 8
SECS_SSAFRAMESIZE = 16
SECS_MISCSELECT = 20
SECS_ATTRIBUTES = 48
SECS_XFRM = 56
SECS_MRENCLAVE = 64
SECS_MRSIGNER = 128
SECS_ISVPRODID = 256
SECS_ISVSVN = 258
#: The processor keeps fields of its own from here on: where in a SECS they are is its own matter.
SECS_INTERNAL = 260
#: (offset, size) of what software has to leave zero, without key separation and CET.
SECS_RESERVED = ((24, 24), (96, 32), (160, 96), (SECS_INTERNAL, SECS_SIZE - SECS_INTERNAL))

#: An enclave is at least two pages.
MIN_ENCLAVE_SIZE = 2 * EPC_PAGE_SIZE

# ATTRIBUTES, the low 64 bits (35.7.1); the high 64 bits are XFRM: the XCR0 of the enclave.
ATTRIBUTE_INIT = 1 << 0
ATTRIBUTE_DEBUG = 1 << 1
ATTRIBUTE_MODE64BIT = 1 << 2
ATTRIBUTE_PROVISIONKEY = 1 << 4
ATTRIBUTE_EINITTOKENKEY = 1 << 5
ATTRIBUTES_SIZE = 16
#: The attributes a SECS can be created with, without key separation and CET. INIT is EINIT's to set.
ATTRIBUTES_OFFERED = ATTRIBUTE_DEBUG | ATTRIBUTE_MODE64BIT | ATTRIBUTE_PROVISIONKEY | ATTRIBUTE_EINITTOKENKEY
#: Attributes for which the enclave has to be signed with the key of IA32_SGXLEPUBKEYHASH (38.3, EINIT).
CONTROLLED_ATTRIBUTES = ATTRIBUTE_EINITTOKENKEY
#: x87 and SSE state: bits of XFRM that are always one.
XFRM_REQUIRED = 0b11

#: MISCSELECT (35.7.2): save what a #PF or #GP was about.
MISC_EXINFO = 1 << 0
#: Parts of a state save area frame (35.9): the registers at its end, and before them the EXINFO of MISC.
GPRSGX_SIZE = 184
EXINFO_SIZE = 16

# ---------------------------------------------------------------------------------------------------------- TCS (35.8)

TCS_STAGE = 0
TCS_FLAGS = 8
TCS_OSSA = 16
TCS_CSSA = 24
TCS_NSSA = 28
TCS_OENTRY = 32
TCS_AEP = 40
TCS_OFSBASE = 48
TCS_OGSBASE = 56
TCS_FSLIMIT = 64
TCS_GSLIMIT = 68
#: (offset, size) of what has to be zero.
TCS_RESERVED = ((72, EPC_PAGE_SIZE - 72),)
#: TCS.FLAGS: the debugger may single-step and set breakpoints (EADD clears it); all other bits are reserved.
TCS_FLAGS_DBGOPTIN = 1 << 0
#: Low bits of FSLIMIT and GSLIMIT of an enclave outside 64-bit mode, which have to be ones.
TCS_LIMIT_LOW_BITS = 0xFFF

# --------------------------------------------------------------------------------------------------- SIGSTRUCT (35.13)

SIGSTRUCT_SIZE = 1808
SIGSTRUCT_ALIGNMENT = 4096
SIGSTRUCT_HEADER = 0
SIGSTRUCT_VENDOR = 16
SIGSTRUCT_DATE = 20
SIGSTRUCT_HEADER2 = 24
SIGSTRUCT_SWDEFINED = 40
SIGSTRUCT_MODULUS = 128
SIGSTRUCT_EXPONENT = 512
SIGSTRUCT_SIGNATURE = 516
SIGSTRUCT_MISCSELECT = 900
SIGSTRUCT_MISCMASK = 904
SIGSTRUCT_ATTRIBUTES = 928
SIGSTRUCT_XFRM = 936
SIGSTRUCT_ATTRIBUTEMASK = 944
SIGSTRUCT_XFRMMASK = 952
SIGSTRUCT_ENCLAVEHASH = 960
SIGSTRUCT_ISVPRODID = 1024
SIGSTRUCT_ISVSVN = 1026
SIGSTRUCT_Q1 = 1040
SIGSTRUCT_Q2 = 1424
#: (offset, size) of what has to be zero, without key separation and CET.
SIGSTRUCT_RESERVED = ((44, 84), (908, 20), (992, 32), (1028, 12))
#: (offset, size) of the header and the body: what is signed, one behind the other.
SIGSTRUCT_SIGNED = ((SIGSTRUCT_HEADER, 128), (SIGSTRUCT_MISCSELECT, 128))

SIGSTRUCT_HEADER_VALUE = bytes.fromhex("06000000E10000000000010000000000")
SIGSTRUCT_HEADER2_VALUE = bytes.fromhex("01010000600000006000000001000000")
SIGSTRUCT_VENDOR_INTEL = 0x8086
SIGSTRUCT_VENDOR_OTHER = 0
#: The signer's key: RSA with this exponent and size of modulus.
RSA_EXPONENT = 3
RSA_BITS = 3072
RSA_BYTES = RSA_BITS // 8

# -------------------------------------------------------------------------------------------------- EINITTOKEN (35.14)

EINITTOKEN_SIZE = 304
EINITTOKEN_ALIGNMENT = 512
EINITTOKEN_VALID = 0
EINITTOKEN_ATTRIBUTES = 48
EINITTOKEN_MRENCLAVE = 64
EINITTOKEN_MRSIGNER = 128
EINITTOKEN_CPUSVNLE = 192
EINITTOKEN_ISVPRODIDLE = 208
EINITTOKEN_ISVSVNLE = 210
EINITTOKEN_MASKEDMISCSELECTLE = 236
EINITTOKEN_MASKEDATTRIBUTESLE = 240
EINITTOKEN_KEYID = 256
EINITTOKEN_KEYID_SIZE = 32
EINITTOKEN_MAC = 288
EINITTOKEN_MAC_SIZE = 16
#: Bit 0 of VALID; its other bits are reserved.
EINITTOKEN_VALID_BIT = 1 << 0
#: (offset, size) of what has to be zero.
EINITTOKEN_RESERVED = ((4, 44), (96, 32), (160, 32), (212, 24))
#: What the MAC covers: this many bytes from the start.
EINITTOKEN_MACED = 192
CPUSVN_SIZE = 16

#: A SHA-256 digest (MRENCLAVE, MRSIGNER) and the block that SHA-256 takes at a time.
DIGEST_SIZE = 32
SHA256_BLOCK = 64

#: What begins the 64-byte block that each leaf adds to MRENCLAVE (36.1, and each leaf in 38.3).
MEASURED_ECREATE = b"ECREATE\0"
MEASURED_EADD = b"EADD\0\0\0\0"
MEASURED_EEXTEND = b"EEXTEND\0"
#: Of the SECINFO, EADD measures this much.
MEASURED_SECINFO = 48

# --------------------------------------------------------------------------------------------- CPUID leaf 12H (34.7.2)

#: Subleaf 0: EAX names what there is, EBX the bits of MISCSELECT; of EDX these are powers of two.
CPUID_SGX1 = 1 << 0
CPUID_SGX2 = 1 << 1
CPUID_MAX_SIZE_NOT64_SHIFT = 0
CPUID_MAX_SIZE_64_SHIFT = 8
CPUID_MAX_SIZE_MASK = 0xFF
#: Subleaf 1 gives the bits that ATTRIBUTES can have: EBX:EAX the low 64 bits, EDX:ECX XFRM. EPC sections begin here:
CPUID_EPC_SUBLEAF = 2
#: EAX bits 3:0, the kind of the subleaf: nothing (and nothing behind it), or an EPC section.
CPUID_EPC_INVALID = 0
CPUID_EPC_SECTION = 1
#: ECX bits 3:0: confidentiality and integrity are protected.
CPUID_EPC_PROTECTED = 1
_LOW_ADDRESS_BITS = 0xFFFF_F000
_HIGH_ADDRESS_BITS = 0xF_FFFF
_HIGH_ADDRESS_SHIFT = 32


def cpuid_epc_section(base: int, size: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX of a subleaf that enumerates the EPC section at guest-physical *base* (34.7.2)."""
    return (
        base & _LOW_ADDRESS_BITS | CPUID_EPC_SECTION,
        base >> _HIGH_ADDRESS_SHIFT & _HIGH_ADDRESS_BITS,
        size & _LOW_ADDRESS_BITS | CPUID_EPC_PROTECTED,
        size >> _HIGH_ADDRESS_SHIFT & _HIGH_ADDRESS_BITS,
    )
