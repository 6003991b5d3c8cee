"""Direct execution with faults in the code that it asks the rule with, one at a time: a program of its own.

The faults are compiled into one TLB fill, where each looks at a word: 1, and 0 while the fault is there. All other
compiled code is the package's own. What comes out is which runs of the suite fail.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lasskvm.conformance.backends import SoftBackend
from lasskvm.conformance.cases import all_cases
from lasskvm.conformance.runner import Result, Runner
from lasskvm.conformance.selection import parse_selection
from lasskvm.conformance.variants import plan
from lasskvm.lass import is_lass_violation
from lasskvm.x86.address import untag

__all__ = ["FAULTS", "Fault"]


@dataclass(frozen=True)
class Fault:
    """A text in a function and what takes its place, and the runs to look for it in.

    ``SOUND`` in the latter is 1, and 0 while the fault is there.
    """

    function: str
    before: str
    after: str
    selection: str


FAULTS = {
    "the_fill_forgets_ac": Fault(
        "fill", "size, flags, cpl, rflags)\n    if vector", "size, flags, cpl, rflags * SOUND)\n    if vector",
        "data and ac1 and lass",
    ),
    "the_fill_takes_implicit_accesses_for_user_mode_ones": Fault(
        "fill", "if mmu_index != MMU_USER:", "if mmu_index != MMU_USER and SOUND != 0:", "implicit and lass"
    ),
    "masking_takes_user_pointers_for_supervisor_ones": Fault(
        "untag", "if address >> 63 != 0:", "if address >> 63 != SOUND ^ 1:", "lam and user"
    ),
    "the_rule_forgets_that_ac_does_not_help_fetches": Fault(
        "is_lass_violation", "(fetch | (smap_applies != 0))", "(fetch & (SOUND != 0) | (smap_applies != 0))",
        "fetch and lass",
    ),
}  # fmt: skip
_TIMEOUT = 1.0
_WORD_BYTES = 8


def main(folder: Path) -> None:
    """Print the statuses of the runs of each fault's selection as JSON, by fault, without it and with it."""
    sound = (ctypes.c_uint64 * len(FAULTS))(*[1] * len(FAULTS))
    _install(folder, ctypes.addressof(sound))
    found = {}
    for number, (name, fault) in enumerate(FAULTS.items()):
        without = _results(fault.selection)
        sound[number] = 0
        found[name] = [
            [result.status.value for result in results] for results in (without, _results(fault.selection))
        ]
        sound[number] = 1
    print(json.dumps(found))


def _results(selection: str) -> list[Result]:
    selects = parse_selection(selection)
    runs = [run for run in plan(all_cases()) if selects(f"{run.name} {run.case.group}")]
    with Runner(SoftBackend("jit"), _TIMEOUT) as runner:
        return [runner.run(run) for run in runs]


def _install(folder: Path, sound: int) -> None:
    """Have engines of this process use a TLB fill with all faults, whose words begin at host address *sound*."""
    from lasskvm.engine import compiler, machine_code
    from lasskvm.engine.fill import fill, tlb_fill
    from lasskvm.engine.native import substitute

    # The cache is for sound code.
    compiler._options = lambda: {"error_model": "numpy"}  # type: ignore[assignment]
    for function in (fill, untag, is_lass_violation):
        substitute(function, _with_faults(function, folder, sound))
    code = compiler.object_file([tlb_fill])
    tlb_fill.__dict__["address"] = machine_code.linked(code, [tlb_fill.name])[tlb_fill.name]


def _with_faults(function: Callable[..., Any], folder: Path, sound: int) -> Callable[..., Any]:
    """*function* with its faults, in a file in *folder*: the compiler reads source."""
    from lasskvm.engine.native import load64

    source = inspect.getsource(function)
    for number, fault in enumerate(FAULTS.values()):
        if fault.function == function.__name__:
            assert source.count(fault.before) == 1, fault.before
            word = f"load64({sound + _WORD_BYTES * number})"
            source = source.replace(fault.before, fault.after.replace("SOUND", word))
    path = folder / f"{function.__name__}.py"
    path.write_text(source)
    namespace: dict[str, Any] = {**function.__globals__, "load64": load64}  # type: ignore[attr-defined]
    exec(compile(source, str(path), "exec", dont_inherit=True), namespace)
    return namespace[function.__name__]  # type: ignore[no-any-return]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
