"""INVLPG and INVPCID: the address that is named is not accessed; INVPCID's descriptor is."""

from __future__ import annotations

from typing import Any

from lasskvm.conformance.case import Case, Effect, Expected, completes, gp, pf, ss
from lasskvm.conformance.cases.common import (
    HIGH_SUPERVISOR,
    HIGH_USER,
    LOW_ABSENT,
    LOW_SUPERVISOR,
    LOW_USER,
)
from lasskvm.conformance.setup import Words
from lasskvm.x86.exceptions import PF_P
from lasskvm.x86.registers import RFLAGS_AC

__all__ = ["CASES"]

_GROUP = "invalidation"
_NOT_CANONICAL = 1 << 47
_READ = Effect.READ
#: INVPCID types.
_ADDRESS, _CONTEXT, _ALL, _ALL_BUT_GLOBAL = range(4)


def _invlpg(name: str, words: str, address: int, **more: Any) -> Case:
    return Case(
        id=f"{_GROUP}/invlpg-{name}", group=_GROUP, words=words, program="access: invlpg [rbx]",
        registers={"rbx": address}, operand=None if address == _NOT_CANONICAL else address,
        lass=completes(Effect.NONE), off=completes(Effect.NONE), **more,
    )  # fmt: skip


_INVLPG = (
    _invlpg("low-supervisor", "INVLPG of an address below the split", LOW_SUPERVISOR),
    _invlpg("low-user", "INVLPG of a user page", LOW_USER),
    _invlpg("low-absent", "INVLPG of a page that is not there", LOW_ABSENT),
    _invlpg("high-supervisor", "INVLPG of an address above the split", HIGH_SUPERVISOR),
    _invlpg("not-canonical", "INVLPG of an address that is not canonical", _NOT_CANONICAL),
    _invlpg("ac1", "INVLPG with AC=1", LOW_SUPERVISOR, rflags=RFLAGS_AC),
    _invlpg("no-smap", "INVLPG without SMAP", LOW_SUPERVISOR, smap=False),
    Case(
        id=f"{_GROUP}/invlpg-rbp", group=_GROUP, words="INVLPG based on RBP is no stack access: it is none at all",
        program="access: invlpg [rbp]", registers={"rbp": LOW_SUPERVISOR}, operand=LOW_SUPERVISOR,
        lass=completes(Effect.NONE), off=completes(Effect.NONE),
    ),
    Case(
        id=f"{_GROUP}/invlpg-user", group=_GROUP, words="INVLPG at CPL 3 is #GP(0) for its privilege", cpl=3,
        program="access: invlpg [rbx]", registers={"rbx": LOW_USER}, lass=gp(), off=gp(),
    ),
    Case(
        id=f"{_GROUP}/invlpg-then-access", group=_GROUP,
        words="INVLPG opens nothing: the access behind it is a violation",
        program="invlpg [rbx]; access: mov rax, [rbx]", registers={"rbx": LOW_SUPERVISOR},
        operand=LOW_SUPERVISOR, lass=gp(), off=completes(_READ),
    ),
)  # fmt: skip


def _invpcid(
    name: str, words: str, descriptor: int, target: int, lass: Expected, off: Expected, **more: Any
) -> Case:
    kind = more.pop("kind", _ADDRESS)
    at = more.pop("at", "rbx")
    return Case(
        id=f"{_GROUP}/invpcid-{name}", group=_GROUP, words=words, program=f"access: invpcid rax, [{at}]",
        registers={"rax": kind, at: descriptor}, setup=(Words(descriptor, (0, target)),), operand=descriptor,
        lass=lass, off=off, needs=frozenset({"invpcid"}), **more,
    )  # fmt: skip


_INVPCID = (
    _invpcid(
        "target-low", "INVPCID's target address may be anywhere", HIGH_SUPERVISOR, LOW_SUPERVISOR,
        completes(_READ), completes(_READ),
    ),
    _invpcid(
        "target-high-user", "INVPCID's target may be a user page above the split", HIGH_SUPERVISOR, HIGH_USER,
        completes(_READ), completes(_READ),
    ),
    _invpcid(
        "target-not-canonical", "INVPCID's target must be canonical", HIGH_SUPERVISOR, _NOT_CANONICAL,
        gp().but(effect=_READ), gp().but(effect=_READ),
    ),
    _invpcid(
        "descriptor-low", "INVPCID's descriptor is data: below the split a violation", LOW_SUPERVISOR, LOW_SUPERVISOR,
        gp(), completes(_READ),
    ),
    _invpcid(
        "descriptor-low-target-high", "INVPCID's descriptor below the split is a violation whatever its target",
        LOW_SUPERVISOR, HIGH_SUPERVISOR, gp(),
        completes(_READ),
    ),
    _invpcid(
        "descriptor-low-ac1", "INVPCID's descriptor may be below the split with AC=1",
        LOW_SUPERVISOR, LOW_SUPERVISOR, completes(_READ),
        completes(_READ), rflags=RFLAGS_AC,
    ),
    _invpcid(
        "descriptor-low-no-smap", "INVPCID's descriptor may be below the split without SMAP",
        LOW_SUPERVISOR, LOW_SUPERVISOR, completes(_READ),
        completes(_READ), smap=False,
    ),
    _invpcid(
        "descriptor-low-user", "INVPCID's descriptor on a low user page: violation, or SMAP's page fault",
        LOW_USER, LOW_SUPERVISOR,
        gp(), pf(PF_P, LOW_USER),
    ),
    _invpcid(
        "descriptor-rbp", "INVPCID's descriptor at [RBP]: #SS(0)",
        LOW_SUPERVISOR, LOW_SUPERVISOR, ss(), completes(_READ), at="rbp",
    ),
    _invpcid(
        "single-context", "the descriptor is read for every type: single context", LOW_SUPERVISOR, 0, gp(),
        completes(_READ), kind=_CONTEXT,
    ),
    _invpcid(
        "all-contexts", "the descriptor is read for every type: all contexts",
        LOW_SUPERVISOR, 0, gp(), completes(_READ), kind=_ALL,
    ),
    _invpcid(
        "all-but-global", "the descriptor is read for every type: all but global translations",
        LOW_SUPERVISOR, 0, gp(), completes(_READ),
        kind=_ALL_BUT_GLOBAL,
    ),
    _invpcid(
        "user", "INVPCID at CPL 3 is #GP(0) for its privilege", LOW_USER, LOW_USER, gp(), gp(), cpl=3,
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_INVLPG, *_INVPCID)
