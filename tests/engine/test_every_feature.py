"""Every CPU feature that is offered works, and what a guest loses without it is gone: a probe for each.

The features stand in :data:`PROBES`, by name; one without a probe cannot be offered. Corners of each feature are tested
where the feature lives; here it is asked, on both engines and for every CPU model, whether it is there at all.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
from features import (
    access_rights,
    enclaves,
    instruction_sets,
    paging,
    saved_state,
    system_registers,
    timers,
    virtualization,
)
from features.probe import Probe, cpu_with, make_guest, prepared, shows

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.kvm import ExecutionEngine
from lasskvm.x86.cpu_models import SUPPORTED, list_models

TABLES = (
    instruction_sets.PROBES, saved_state.PROBES, system_registers.PROBES, paging.PROBES, access_rights.PROBES,
    timers.PROBES, enclaves.PROBES, virtualization.PROBES,
)  # fmt: skip
PROBES: dict[str, Probe] = {name: probe for table in TABLES for name, probe in table.items()}
#: What lacks a probe fails a test of its own.
NAMES = sorted(SUPPORTED & PROBES.keys())
ENGINES: tuple[ExecutionEngine, ...] = ("jit", "emulator")
#: Guests with the usual features, which many probes share.
_KEPT_GUESTS = 8


@lru_cache(_KEPT_GUESTS)
def kept_guest(engine: ExecutionEngine, cpu: str, levels: int, irqchip: bool) -> Guest:
    return make_guest(engine, cpu, levels=levels, irqchip=irqchip)


def guest_with(engine: ExecutionEngine, model: str, name: str) -> Guest:
    probe = PROBES[name]
    return prepared(kept_guest(engine, cpu_with(model, name), probe.levels, probe.irqchip))


def guest_without(engine: ExecutionEngine, name: str) -> Guest:
    return make_guest(engine, f"max,-{name}", levels=layout.DEFAULT_LEVELS, irqchip=PROBES[name].irqchip)


def models_and_features() -> list[tuple[str, str]]:
    return [(model.name, name) for name in NAMES for model in list_models() if name in model.available]


def what_is_lost() -> list[object]:
    """Engine and feature; what direct execution runs all the same is known (``docs/differences.md``)."""
    return [
        pytest.param(engine, name, marks=_known_difference(engine, PROBES[name]))
        for engine in ENGINES
        for name in NAMES
        if PROBES[name].gone is not None
    ]


def _known_difference(engine: ExecutionEngine, probe: Probe) -> list[pytest.MarkDecorator]:
    if engine == "jit" and probe.runs_anyway:
        return [pytest.mark.xfail(strict=True, raises=AssertionError, reason=probe.runs_anyway)]
    return []


def test_every_feature_that_is_offered_has_a_probe() -> None:
    assert set(PROBES) == SUPPORTED


def test_no_feature_has_two_probes() -> None:
    assert sum(map(len, TABLES)) == len(PROBES)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("model", "name"), models_and_features())
def test_a_feature_that_is_offered_works(engine: ExecutionEngine, model: str, name: str) -> None:
    guest = guest_with(engine, model, name)
    assert shows(guest, name)
    PROBES[name].works(prepared(guest))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_a_feature_that_is_taken_away_is_not_shown(engine: ExecutionEngine, name: str) -> None:
    assert not shows(guest_without(engine, name), name)


@pytest.mark.parametrize(("engine", "name"), what_is_lost())
def test_a_feature_that_is_taken_away_is_gone(engine: ExecutionEngine, name: str) -> None:
    gone = PROBES[name].gone
    assert gone is not None
    gone(guest_without(engine, name))


@pytest.mark.parametrize("name", [name for name in NAMES if PROBES[name].only_cpuid])
def test_a_feature_that_is_only_a_cpuid_bit_does_no_less_without_it(name: str) -> None:
    PROBES[name].works(guest_without("emulator", name))
