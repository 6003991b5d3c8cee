"""Exception vectors, their error codes, and how two of them combine.

Source: Intel SDM volume 3A, chapter 7 (interrupt and exception handling), tables 7-1, 7-4 and 7-5.
"""

DE, DB, NMI, BP, OF, BR, UD, NM, DF = range(9)
TS, NP, SS, GP, PF = range(10, 15)
MF, AC, MC, XM, VE, CP = range(16, 22)

#: Bit *v* is set when exception *v* pushes an error code.
ERROR_CODE_VECTORS = 1 << DF | 1 << TS | 1 << NP | 1 << SS | 1 << GP | 1 << PF | 1 << AC | 1 << CP
#: Exceptions of the contributory class (table 7-4).
CONTRIBUTORY_VECTORS = 1 << DE | 1 << TS | 1 << NP | 1 << SS | 1 << GP | 1 << CP

# Page-fault error code
PF_P = 1 << 0
PF_W = 1 << 1
PF_U = 1 << 2
PF_RSVD = 1 << 3
PF_I = 1 << 4
PF_PK = 1 << 5

# Selector error code
ERROR_EXT = 1 << 0
ERROR_IDT = 1 << 1

_NAMES = {
    DE: "#DE", DB: "#DB", NMI: "NMI", BP: "#BP", OF: "#OF", BR: "#BR", UD: "#UD", NM: "#NM", DF: "#DF",
    TS: "#TS", NP: "#NP", SS: "#SS", GP: "#GP", PF: "#PF", MF: "#MF", AC: "#AC", MC: "#MC", XM: "#XM",
    VE: "#VE", CP: "#CP",
}  # fmt: skip


def vector_name(vector: int) -> str:
    """The manual's name of an exception vector, ``"#GP"`` for 13; ``"vector 33"`` for the others."""
    return _NAMES.get(vector, f"vector {vector}")


def has_error_code(vector: int) -> bool:
    """Whether exception *vector* pushes an error code (never true of software interrupts)."""
    return vector < 32 and bool(ERROR_CODE_VECTORS >> vector & 1)


def makes_double_fault(first: int, second: int) -> bool:
    """Whether exception *second*, raised while delivering exception *first*, becomes #DF (table 7-5)."""
    contributory = bool(CONTRIBUTORY_VECTORS >> second & 1)
    if first == PF:
        return contributory or second == PF
    return bool(CONTRIBUTORY_VECTORS >> first & 1) and contributory
