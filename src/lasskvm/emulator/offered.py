"""CPUID honesty: which instructions a guest's processor has.

An instruction whose feature is not in the guest's CPUID raises #UD. Some encodings are older than their feature: the
hints among them do nothing on any processor, and three instructions are another one with a prefix that older processors
ignore. This is the one place that knows; whoever executes an instruction need not ask again.

Source: Intel SDM volume 2, the "CPUID Feature Flag" column and the #UD conditions of the instructions by name;
iced-x86's ``cpuid_features()`` says which feature an encoding belongs to.
"""

from __future__ import annotations

from dataclasses import replace

from iced_x86 import Code, CpuidFeature, Mnemonic

from lasskvm.emulator.decode import Decoded
from lasskvm.x86.cpuid import CpuidTable

__all__ = ["as_offered", "is_offered"]

#: What every processor with CPUID has.
_ALWAYS = frozenset(
    (
        CpuidFeature.INTEL8086,
        CpuidFeature.INTEL186,
        CpuidFeature.INTEL286,
        CpuidFeature.INTEL386,
        CpuidFeature.INTEL486,
        CpuidFeature.X64,
        CpuidFeature.CPUID,
        CpuidFeature.RDPMC,
        CpuidFeature.MULTIBYTENOP,
    )
)

#: iced-x86's names of features to those of :data:`lasskvm.x86.cpuid.FEATURES`. What is missing here (AVX and all that
#: builds on it, other vendors' extensions) is never offered.
_FEATURES: dict[int, str] = {
    CpuidFeature.FPU: "fpu",
    CpuidFeature.FPU287: "fpu",
    CpuidFeature.FPU387: "fpu",
    CpuidFeature.TSC: "tsc",
    CpuidFeature.MSR: "msr",
    CpuidFeature.CX8: "cx8",
    CpuidFeature.SEP: "sep",
    CpuidFeature.CMOV: "cmov",
    CpuidFeature.CLFSH: "clflush",
    CpuidFeature.MMX: "mmx",
    CpuidFeature.FXSR: "fxsr",
    CpuidFeature.SSE: "sse",
    CpuidFeature.SSE2: "sse2",
    CpuidFeature.SSE3: "pni",
    CpuidFeature.PCLMULQDQ: "pclmulqdq",
    CpuidFeature.MONITOR: "monitor",
    CpuidFeature.VMX: "vmx",
    CpuidFeature.INVEPT: "vmx",
    CpuidFeature.INVVPID: "vmx",
    CpuidFeature.SMX: "smx",
    CpuidFeature.SSSE3: "ssse3",
    CpuidFeature.CMPXCHG16B: "cx16",
    CpuidFeature.SSE4_1: "sse4_1",
    CpuidFeature.SSE4_2: "sse4_2",
    CpuidFeature.MOVBE: "movbe",
    CpuidFeature.POPCNT: "popcnt",
    CpuidFeature.AES: "aes",
    CpuidFeature.XSAVE: "xsave",
    CpuidFeature.RDRAND: "rdrand",
    CpuidFeature.FSGSBASE: "fsgsbase",
    CpuidFeature.SGX1: "sgx",
    CpuidFeature.BMI1: "bmi1",
    CpuidFeature.BMI2: "bmi2",
    CpuidFeature.INVPCID: "invpcid",
    CpuidFeature.RTM: "rtm",
    CpuidFeature.HLE_OR_RTM: "rtm",
    CpuidFeature.RDSEED: "rdseed",
    CpuidFeature.ADX: "adx",
    CpuidFeature.SMAP: "smap",
    CpuidFeature.CLFLUSHOPT: "clflushopt",
    CpuidFeature.CLWB: "clwb",
    CpuidFeature.SHA: "sha_ni",
    CpuidFeature.PKU: "pku",
    CpuidFeature.WAITPKG: "waitpkg",
    CpuidFeature.CET_SS: "shstk",
    CpuidFeature.GFNI: "gfni",
    CpuidFeature.RDPID: "rdpid",
    CpuidFeature.MOVDIRI: "movdiri",
    CpuidFeature.MOVDIR64B: "movdir64b",
    CpuidFeature.ENQCMD: "enqcmd",
    CpuidFeature.SERIALIZE: "serialize",
    CpuidFeature.PCONFIG: "pconfig",
    CpuidFeature.XSAVEOPT: "xsaveopt",
    CpuidFeature.XSAVEC: "xsavec",
    CpuidFeature.XSAVES: "xsaves",
    CpuidFeature.LZCNT: "abm",
    CpuidFeature.SSE4A: "sse4a",
    CpuidFeature.SYSCALL: "syscall",
    CpuidFeature.RDTSCP: "rdtscp",
    CpuidFeature.WBNOINVD: "wbnoinvd",
    CpuidFeature.SVM: "svm",
}

#: They lie where all processors since the Pentium Pro have no-operations, and do nothing.
_HINTS = frozenset(
    (
        Mnemonic.PAUSE,
        Mnemonic.ENDBR32,
        Mnemonic.ENDBR64,
        Mnemonic.RDSSPD,
        Mnemonic.RDSSPQ,
        Mnemonic.CLDEMOTE,
        Mnemonic.PREFETCH,
        Mnemonic.PREFETCHW,
        Mnemonic.PREFETCHWT1,
        Mnemonic.PREFETCHNTA,
        Mnemonic.PREFETCHT0,
        Mnemonic.PREFETCHT1,
        Mnemonic.PREFETCHT2,
        Mnemonic.PREFETCHIT0,
        Mnemonic.PREFETCHIT1,
    )
)

#: Who answers hypercalls decides, whatever CPUID says (:mod:`lasskvm.emulator.instructions.hypercalls`).
_HYPERCALLS = frozenset((Mnemonic.VMCALL, Mnemonic.VMMCALL))

#: In 64-bit mode they have a feature bit of their own.
_FLAG_TRANSFERS = frozenset((Mnemonic.LAHF, Mnemonic.SAHF))

#: Without their feature the F3 prefix is ignored.
_WITHOUT_PREFIX: dict[int, tuple[str, int]] = {
    Code.LZCNT_R16_RM16: ("abm", Code.BSR_R16_RM16),
    Code.LZCNT_R32_RM32: ("abm", Code.BSR_R32_RM32),
    Code.LZCNT_R64_RM64: ("abm", Code.BSR_R64_RM64),
    Code.TZCNT_R16_RM16: ("bmi1", Code.BSF_R16_RM16),
    Code.TZCNT_R32_RM32: ("bmi1", Code.BSF_R32_RM32),
    Code.TZCNT_R64_RM64: ("bmi1", Code.BSF_R64_RM64),
    Code.WBNOINVD: ("wbnoinvd", Code.WBINVD),
}


def is_offered(decoded: Decoded, cpuid: CpuidTable) -> bool:
    """Whether a processor with *cpuid* executes *decoded* at all; if not, it raises #UD."""
    instruction = decoded.instruction
    if instruction.mnemonic in _HINTS or instruction.mnemonic in _HYPERCALLS:
        return True
    if decoded.bits == 64 and instruction.mnemonic in _FLAG_TRANSFERS and not cpuid.has("lahf_lm"):
        return False
    return all(_has(feature, cpuid) for feature in instruction.cpuid_features())


def as_offered(decoded: Decoded, cpuid: CpuidTable) -> Decoded:
    """What a processor with *cpuid* takes the encoding of *decoded* for: LZCNT may be BSR, TZCNT BSF, WBNOINVD WBINVD.

    Everything else is returned as it is.
    """
    feature, code = _WITHOUT_PREFIX.get(decoded.instruction.code, ("", 0))
    if not feature or cpuid.has(feature):
        return decoded
    instruction = decoded.instruction.copy()
    instruction.code = code  # type: ignore[assignment]
    return replace(decoded, instruction=instruction)


def _has(feature: int, cpuid: CpuidTable) -> bool:
    return feature in _ALWAYS or (feature in _FEATURES and cpuid.has(_FEATURES[feature]))
