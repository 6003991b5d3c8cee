"""x87 and SSE control and status: register layouts, by the manual's names.

Sources: Intel SDM volume 1, 8.1.3 (status word), 8.1.5 (control word), 8.1.7 (tag word), 10.2.3 (MXCSR).
"""

# Exceptions: the same six bits in the x87 status word and MXCSR, and as masks in the control word
EXCEPTION_IE = 1 << 0
EXCEPTION_DE = 1 << 1
EXCEPTION_ZE = 1 << 2
EXCEPTION_OE = 1 << 3
EXCEPTION_UE = 1 << 4
EXCEPTION_PE = 1 << 5
EXCEPTIONS = 0x3F

# x87 status word
FSW_SF = 1 << 6
FSW_ES = 1 << 7
FSW_C0 = 1 << 8
FSW_C1 = 1 << 9
FSW_C2 = 1 << 10
FSW_TOP_SHIFT = 11
FSW_TOP = 7 << FSW_TOP_SHIFT
FSW_C3 = 1 << 14
FSW_B = 1 << 15
FSW_CONDITIONS = FSW_C0 | FSW_C1 | FSW_C2 | FSW_C3

# x87 control word
FCW_PC_SHIFT = 8
FCW_RC_SHIFT = 10
#: Bits that are there; bit 6 always reads as one.
FCW_WRITABLE = 0x1F3F
FCW_FIXED = 1 << 6
#: What FNINIT leaves: everything masked, 64-bit precision, round to nearest.
FCW_INITIAL = 0x037F

#: The opcode register holds eleven bits.
FOP_MASK = 0x7FF

# Tags of the full x87 tag word
TAG_VALID, TAG_ZERO, TAG_SPECIAL, TAG_EMPTY = range(4)

# MXCSR
MXCSR_DAZ = 1 << 6
MXCSR_MASK_SHIFT = 7
MXCSR_RC_SHIFT = 13
MXCSR_FZ = 1 << 15
#: What reset leaves: everything masked, round to nearest.
MXCSR_INITIAL = 0x1F80
#: Bits that can be set (``MXCSR_MASK`` of an FXSAVE image).
MXCSR_WRITABLE = 0xFFFF

# Rounding control, in the control word as in MXCSR
ROUND_NEAREST, ROUND_DOWN, ROUND_UP, ROUND_TRUNCATE = range(4)
ROUNDING_MASK = 3
