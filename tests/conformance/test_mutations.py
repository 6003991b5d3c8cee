"""A fault in the rule, or in how the emulator asks it, is found by the suite: every mutant of theirs fails a case.

A mutant is a plain function with one condition, constant or flag changed, made from its source. It takes the place of
its original by its code object, so whoever has imported the function calls the mutant.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import pytest
from faulty_fill import FAULTS

from lasskvm.conformance.backends import SoftBackend
from lasskvm.conformance.cases import all_cases
from lasskvm.conformance.runner import Runner
from lasskvm.conformance.variants import Variant, VariantRun, plan
from lasskvm.emulator.linearize import linear_address, linearize
from lasskvm.emulator.mmu import check_linear, translate
from lasskvm.emulator.tlb import Tlb
from lasskvm.lass import is_lass_violation
from lasskvm.x86.address import untag

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------------------------------------- making mutants

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Add: ast.Sub, ast.Sub: ast.Add,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One changed function, and the statement that is not what it was."""

    function: Callable[..., object]
    statement: str
    code: CodeType

    @property
    def name(self) -> str:
        return f"{self.function.__name__}: {self.statement}"

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The original's callers call the mutant."""
        function = self.function
        assert isinstance(function, FunctionType)
        original = function.__code__
        function.__code__ = self.code
        try:
            yield
        finally:
            function.__code__ = original


def mutants(function: Callable[..., object], *, dropped: tuple[str, ...] = ()) -> Iterator[Mutant]:
    """Every mutant of *function*.

    Comparisons are negated, ``and`` and ``or``, ``&`` and ``|``, ``+`` and ``-`` are exchanged, ``not`` is left out,
    numbers are off by one, and each of the names *dropped* (flags, arguments) becomes 0 where it is used.
    """
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.returns = [], None
    for argument in definition.args.args:
        argument.annotation = None
    # The docstring is not to be mutated.
    del definition.body[0]
    for number, node in enumerate(ast.walk(definition)):
        for change in _changes(node, dropped):
            changed = copy.deepcopy(definition)
            target = list(ast.walk(changed))[number]
            statement = _statement(changed, target)
            replacement = change(copy.deepcopy(target))
            _Replace(target, replacement).visit(changed)
            yield Mutant(function, _first_line(statement), _compiled(function, changed))


def _statement(definition: ast.FunctionDef, part: ast.AST) -> ast.stmt:
    """The innermost statement around *part*."""
    found: ast.stmt = definition
    for node in ast.walk(definition):
        if isinstance(node, ast.stmt) and any(inner is part for inner in ast.walk(node)):
            found = node
    return found


def _first_line(statement: ast.stmt) -> str:
    return ast.unparse(statement).partition("\n")[0]


_Change = Callable[[ast.AST], ast.AST]


def _changes(node: ast.AST, dropped: tuple[str, ...]) -> Iterator[_Change]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield _negated
    elif isinstance(node, ast.BoolOp):
        yield _exchanged_bool
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield _exchanged
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _affirmed
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield _off_by_one
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in dropped:
        yield lambda name: ast.Constant(0)


def _negated(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.Compare)
    node.ops = [COMPARISONS[type(node.ops[0])]()]
    return node


def _exchanged_bool(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.BoolOp)
    node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    return node


def _exchanged(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.BinOp)
    node.op = OPERATORS[type(node.op)]()
    return node


def _affirmed(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.UnaryOp)
    return node.operand


def _off_by_one(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.Constant)
    value = node.value
    assert isinstance(value, int)
    return ast.Constant(value - 1 if value else 1)


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, replacement: ast.AST) -> None:
        self._target = target
        self._replacement = replacement

    def visit(self, node: ast.AST) -> ast.AST:
        return self._replacement if node is self._target else super().visit(node)


def _compiled(function: Callable[..., object], definition: ast.FunctionDef) -> CodeType:
    assert isinstance(function, FunctionType)
    namespace = dict(function.__globals__)
    tree = ast.fix_missing_locations(ast.Module([definition], []))
    exec(compile(tree, "<mutant>", "exec", dont_inherit=True), namespace)
    mutant = namespace[definition.name]
    assert isinstance(mutant, FunctionType)
    return mutant.__code__


# ----------------------------------------------------------------------------------------------------- hunting them

#: Names that become 0 in a mutant: flags of accesses, and what the rule is asked with.
DROPPED = (
    "WRITE", "FETCH", "IMPLICIT", "STACK", "_NAMED_ONLY", "_NOT_MASKED", "address", "size", "flags", "cpl", "rflags",
    "cr3", "cr4", "efer", "user", "fetch", "implicit",
)  # fmt: skip
#: Mutants that nobody can tell from the original, by the reason.
EQUIVALENT_FOR = {
    "bits 62 and 63 of a canonical address are alike, and the canonical rule has been asked before": (
        "is_lass_violation: any_upper = (address | last) >> 62",
        "is_lass_violation: all_upper = (address & last) >> 62",
    ),
    "a user access that reaches across the end begins above the split, and its first page is asked about by itself": (
        "is_lass_violation: any_upper = (address & last) >> 63",
        "is_lass_violation: any_upper = (0 | last) >> 63",
    ),
    "the emulator does not ask about addresses that are only named; tests/test_lass_rule.py does": (
        "is_lass_violation: active = cr4 >> _CR4_LASS_BIT & efer >> _EFER_LMA_BIT & (0 & _NAMED_ONLY == 0) & 1",
        "is_lass_violation: active = cr4 >> _CR4_LASS_BIT & efer >> _EFER_LMA_BIT & (flags & 0 == 0) & 1",
    ),
    "outside IA-32e mode addresses are canonical, having 32 bits, and the rule asks for EFER.LMA itself": (
        "check_linear: if state[EFER] | EFER_LMA == 0:",
        "check_linear: if state[EFER] & EFER_LMA == 1:",
    ),
    "an access that begins in the hole has its first page asked about by itself, too": (
        "check_linear: if is_canonical(untagged(state, 0, flags), bits) and is_canonical(untagged(state, last, flags), "
        "bits) and (not is_lass_violation(address, size, flags, cpl, state[CR4], state[EFER], rflags)):",
    ),
    "a tagged address that is not to be masked is not canonical at either end": (
        "check_linear: if is_canonical(untagged(state, address, 0), bits) and is_canonical(untagged(state, last, flags)"
        ", bits) and (not is_lass_violation(address, size, flags, cpl, state[CR4], state[EFER], rflags)):",
        "check_linear: if is_canonical(untagged(state, address, flags), bits) and is_canonical(untagged(state, last, 0)"
        ", bits) and (not is_lass_violation(address, size, flags, cpl, state[CR4], state[EFER], rflags)):",
    ),
    "that LAM is off altogether is asked first for the sake of speed": (
        "untag: if cr3 & _CR3_LAM | cr4 & CR4_LAM_SUP == 1 or flags & _NOT_MASKED != 0:",
        "untag: if cr3 | _CR3_LAM | cr4 & CR4_LAM_SUP == 0 or flags & _NOT_MASKED != 0:",
        "untag: if cr3 & _CR3_LAM | (cr4 | CR4_LAM_SUP) == 0 or flags & _NOT_MASKED != 0:",
    ),
    "the whole of an access has been asked about before; what lies within a page lies on one side": (
        "translate: vector = check_linear(state, address, 0, flags, cpl, rflags)",
    ),
    "PDPTE registers belong to PAE paging, where there is no LASS": (
        "translate: pdpte = state[PDPTR0 - (address >> 30 & 3)]",
        "translate: pdpte = state[PDPTR0 + (0 >> 30 & 3)]",
        "translate: pdpte = state[PDPTR0 + (address >> 29 & 3)]",
        "translate: pdpte = state[PDPTR0 + (address >> 30 & 2)]",
    ),
    "with a fault nobody looks at the address and the permissions, without one nobody at the error code": (
        "translate: return (gpa, permissions, 0, 1)",
        "translate: return (1, 0, vector, 0)",
        "translate: return (0, 1, vector, 0)",
        "translate: return (1, 0, PF, error_code)",
        "translate: return (0, 1, PF, error_code)",
    ),
    "a VM exit for EPT is told by state words, and nobody looks at the rest of the result": (
        "translate: return (1, 0, EPT_EXIT, 0)",
        "translate: return (0, 1, EPT_EXIT, 0)",
        "translate: return (0, 0, EPT_EXIT, 1)",
    ),
    "in 64-bit mode no operand has SS for its segment, and elsewhere nothing behind the segment checks can fail": (
        "linearize: if segment == SS or not in_64bit_mode(words):",
        "linearize: if segment != SS and (not in_64bit_mode(words)):",
        "linearize: if segment == SS and in_64bit_mode(words):",
        "linearize: flags |= 0",
    ),
    "loads and stores have asked for the checks of the segment before they come here": (
        "linearize: address = segment_address(ctx, segment, offset, 0, flags)",
        "linearize: address = segment_address(ctx, segment, offset, size, 0)",
    ),
    "which table is which does not matter as long as they are apart": (
        "select: way = (words[CPL] == _USER_CPL) << 1 | (words[RFLAGS] & RFLAGS_AC == 0)",
        "select: way = (words[CPL] != _USER_CPL) << 1 | (words[RFLAGS] & RFLAGS_AC != 0)",
    ),
}
EQUIVALENT = {name for names in EQUIVALENT_FOR.values() for name in names}
FUNCTIONS = (is_lass_violation, untag, check_linear, translate, linearize, linear_address, Tlb.select)

#: Runs that mutants fail which pass most of the others: asked first, one of them kills nearly any mutant.
ASKED_FIRST = (
    "enumeration/sregs-with-protected [lass]", "enumeration/set-while-low [lass]", "modes/kept-in-user-mode [lass]",
    "enumeration/no-smap-supervisor-data [lass]", "enumeration/no-smap-user-data [lass]",
    "data/supervisor-read-low-user-smap1-ac0 [off]", "data/supervisor-read-low-user-smap1-ac1 [lass]",
    "data/clac-closes-again [lass]", "data/user-behind-kernel [lass]",
    "fetch/supervisor-code-at-the-bottom-of-the-upper-half [lass]", "fetch/running-off-the-end [lass]",
    "rings/cpl1-push-low-supervisor [lass]", "segments/fs-base-low [off]", "modes/set-in-real-mode [lass]",
    "strings/rep-stosq-element-wraps [off]", "strings/rep-movsb-source-runs-off-the-end [off]",
    "implicit/tss-io-map [lass]", "implicit/tss-io-map [off]", "implicit/tss-io-map-ac1 [lass]",
    "wrap/read-8-upper-part [lass]", "wrap/push-upper-part [lass]", "canonical/crossing-up-user [lass]",
    "canonical/last-low-user [lass]", "canonical/last-low-supervisor [off]", "lam/u57 [lass]",
    "lam/u48-all-ones [lass]", "lam/u48-supervisor-pointer [lass]", "lam/sup-user-pointer [lass]",
    "lam/read-supervisor [lass]",
    "lam/la57-u48-fetch [lass]", "lam/la57-sup-bit-50 [lass]",
)  # fmt: skip
TIMEOUT = 1.0
#: Seconds of this process's own time after which a mutant has hung inside the provider; a run takes some milliseconds.
HANGS = 2.0


def runs_of_the_suite() -> list[VariantRun]:
    """The runs of the two variants that the provider has, those of :data:`ASKED_FIRST` in front."""
    runs = [run for run in plan(all_cases()) if run.variant in (Variant.LASS, Variant.OFF)]
    by_name = {run.name: run for run in runs}
    return list(({name: by_name[name] for name in ASKED_FIRST} | by_name).values())


def failing(runs: Iterable[VariantRun]) -> VariantRun | None:
    """The first of *runs* that does not pass on the emulator; one in which the provider hangs does not."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the provider hangs")

    former = signal.signal(signal.SIGVTALRM, interrupt)
    try:
        with Runner(SoftBackend("emulator"), TIMEOUT) as runner:
            for run in runs:
                signal.setitimer(signal.ITIMER_VIRTUAL, HANGS)
                try:
                    if runner.run(run).status.is_bad:
                        return run
                except TimeoutError:
                    return run
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)
    return None


class Hunter:
    """Looks for a run that kills a mutant, those first that have killed one before."""

    def __init__(self) -> None:
        self._runs = runs_of_the_suite()
        #: The runs that have killed a mutant: they have to pass without one.
        self.killers: dict[str, VariantRun] = {}

    def kills(self, mutant: Mutant) -> bool:
        with mutant.in_place():
            killer = failing(self._runs)
        if killer is None:
            return False
        self._runs.remove(killer)
        self._runs.insert(0, killer)
        self.killers[killer.name] = killer
        return True


def test_the_mutations_are_many() -> None:
    assert len(list(mutants(is_lass_violation, dropped=DROPPED))) > 60


def test_what_is_called_equivalent_exists() -> None:
    names = {mutant.name for function in FUNCTIONS for mutant in mutants(function, dropped=DROPPED)}
    assert names >= EQUIVALENT


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_every_mutant_fails_a_case(function: Callable[..., object]) -> None:
    hunter = Hunter()
    found = [mutant for mutant in mutants(function, dropped=DROPPED) if mutant.name not in EQUIVALENT]
    assert [mutant.name for mutant in found if not hunter.kills(mutant)] == []
    assert failing(hunter.killers.values()) is None, "fails without a mutant"


@pytest.mark.timeout(900)
def test_each_fault_in_compiled_code_fails_a_case(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("faulty_fill.py")), str(tmp_path)],
        # What is compiled there is used for a few runs.
        env=os.environ | {"NUMBA_OPT": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    statuses = json.loads(finished.stdout)
    assert statuses.keys() == FAULTS.keys()
    for fault, (without, with_fault) in statuses.items():
        assert set(without) <= {"pass", "skip"}, fault
        assert "pass" in without, fault
        assert "fail" in with_fault, fault
