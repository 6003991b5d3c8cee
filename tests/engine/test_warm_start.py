"""A start with machine code in the cache: no compiler, and nothing of commands that were not given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cli_support import LOAD_ADDRESS, elf

from lasskvm import kvm
from lasskvm.conformance.assembler import assemble

#: What only other commands need, or only the first start on a machine.
NOT_NEEDED = {"numba", "lasskvm.engine.compiler", "lasskvm.fuzz", "lasskvm.conformance", "lasskvm.audit"}

RUN = """
import sys
from lasskvm.cli import main
try:
    main(["run", sys.argv[1], "--on-reset", "exit"], prog_name="lasskvm")
finally:
    print(*sys.modules)
"""


def test_run_loads_the_engine_without_numba_and_other_commands(tmp_path: Path) -> None:
    kvm.prepare(lambda line: None)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(elf(assemble("mov al, 0xfe; out 0x64, al; hlt", LOAD_ADDRESS).code))
    ended = subprocess.run(
        [sys.executable, "-c", RUN, kernel], capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    modules = set(ended.stdout.split())
    assert "lasskvm.engine.engine" in modules
    assert not NOT_NEEDED & modules
