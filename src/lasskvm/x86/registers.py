"""Control, flag and segment register layouts, by the manual's names.

Sources: Intel SDM volume 3A, chapter 2 (system registers) and 3.4.5 (segment descriptors), volume 3B 18.2 (debug
registers). Segment attributes ("access rights") use the layout of VMX and of KVM's VMCS fields: bits 15:8 and 23:20
of the descriptor's upper half, shifted right by 8, plus the "unusable" bit 16 (SDM 25.4.1).
"""

MASK64 = (1 << 64) - 1
MASK32 = (1 << 32) - 1

# RFLAGS
RFLAGS_CF = 1 << 0
RFLAGS_FIXED = 1 << 1
RFLAGS_PF = 1 << 2
RFLAGS_AF = 1 << 4
RFLAGS_ZF = 1 << 6
RFLAGS_SF = 1 << 7
RFLAGS_TF = 1 << 8
RFLAGS_IF = 1 << 9
RFLAGS_DF = 1 << 10
RFLAGS_OF = 1 << 11
RFLAGS_IOPL = 3 << 12
RFLAGS_IOPL_SHIFT = 12
RFLAGS_NT = 1 << 14
RFLAGS_RF = 1 << 16
RFLAGS_VM = 1 << 17
RFLAGS_AC = 1 << 18
RFLAGS_VIF = 1 << 19
RFLAGS_VIP = 1 << 20
RFLAGS_ID = 1 << 21
RFLAGS_ARITHMETIC = RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF

# CR0
CR0_PE = 1 << 0
CR0_MP = 1 << 1
CR0_EM = 1 << 2
CR0_TS = 1 << 3
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_WP = 1 << 16
CR0_AM = 1 << 18
CR0_NW = 1 << 29
CR0_CD = 1 << 30
CR0_PG = 1 << 31

# CR3
CR3_PWT = 1 << 3
CR3_PCD = 1 << 4
CR3_LAM_U57 = 1 << 61
CR3_LAM_U48 = 1 << 62

# CR4
CR4_VME = 1 << 0
CR4_PVI = 1 << 1
CR4_TSD = 1 << 2
CR4_DE = 1 << 3
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_MCE = 1 << 6
CR4_PGE = 1 << 7
CR4_PCE = 1 << 8
CR4_OSFXSR = 1 << 9
CR4_OSXMMEXCPT = 1 << 10
CR4_UMIP = 1 << 11
CR4_LA57 = 1 << 12
CR4_VMXE = 1 << 13
CR4_SMXE = 1 << 14
CR4_FSGSBASE = 1 << 16
CR4_PCIDE = 1 << 17
CR4_OSXSAVE = 1 << 18
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21
CR4_PKE = 1 << 22
CR4_CET = 1 << 23
CR4_PKS = 1 << 24
CR4_LASS = 1 << 27
CR4_LAM_SUP = 1 << 28

# IA32_EFER
EFER_SCE = 1 << 0
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11

# DR6, DR7
DR6_FIXED = 0xFFFF0FF0
DR6_B0 = 1 << 0
DR6_BD = 1 << 13
DR6_BS = 1 << 14
DR6_BT = 1 << 15
DR7_FIXED = 0x400
DR7_GD = 1 << 13

# Segment registers, in the order of their encodings; LDTR and TR follow
ES, CS, SS, DS, FS, GS, LDTR, TR = range(8)

# Segment attributes ("access rights")
AR_TYPE = 0xF
AR_ACCESSED = 1 << 0
AR_WRITABLE = 1 << 1
AR_READABLE = 1 << 1
AR_EXPAND_DOWN = 1 << 2
AR_CONFORMING = 1 << 2
AR_CODE = 1 << 3
AR_S = 1 << 4
AR_DPL_SHIFT = 5
AR_DPL = 3 << 5
AR_P = 1 << 7
AR_AVL = 1 << 12
AR_L = 1 << 13
AR_DB = 1 << 14
AR_G = 1 << 15
AR_UNUSABLE = 1 << 16

AR_CODE64 = AR_P | AR_S | AR_CODE | AR_READABLE | AR_ACCESSED | AR_L | AR_G
AR_CODE32 = AR_P | AR_S | AR_CODE | AR_READABLE | AR_ACCESSED | AR_DB | AR_G
AR_DATA = AR_P | AR_S | AR_WRITABLE | AR_ACCESSED | AR_DB | AR_G
AR_REAL_MODE = AR_P | AR_S | AR_WRITABLE | AR_ACCESSED
AR_LDT = AR_P | 2
AR_TSS64_BUSY = AR_P | 11
AR_TSS16_BUSY = AR_P | 3
