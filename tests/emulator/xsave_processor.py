"""Processors with XSAVE, for the tests: their CPUID with leaf 0DH made by hand."""

from __future__ import annotations

from dataclasses import replace

from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import FEATURES, LEAF_XSAVE, SIGNIFICANT_INDEX, CpuidEntry
from lasskvm.x86.xsave import COMPONENT_PKRU, COMPONENT_SSE, COMPONENT_X87, PKRU_BYTES, PKRU_OFFSET

ALL = COMPONENT_X87 | COMPONENT_SSE | COMPONENT_PKRU


def xsave_entries(*more: str, components: int = ALL) -> list[CpuidEntry]:
    """The model ``max`` with PKU and XSAVE, its features *more*, and *components* to be had in XCR0."""
    model = parse_cpu("max")
    model = replace(model, features=model.features - {"xsaveopt", "xgetbv1"} | {"pku", "xsave"})
    entries = [entry for entry in model.entries() if entry.function != LEAF_XSAVE]
    features = sum(1 << FEATURES[name].bit for name in more)
    size = PKRU_OFFSET + PKRU_BYTES
    low, high = components & 0xFFFF_FFFF, components >> 32
    return [
        *entries,
        CpuidEntry(LEAF_XSAVE, 0, SIGNIFICANT_INDEX, low, size, size, high),
        CpuidEntry(LEAF_XSAVE, 1, SIGNIFICANT_INDEX, features, 0, 0, 0),
        CpuidEntry(LEAF_XSAVE, 9, SIGNIFICANT_INDEX, PKRU_BYTES, PKRU_OFFSET, 0, 0),
    ]
