"""Linux finds the enclave page cache, takes it, and offers enclaves to programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

LassKvm = Callable[..., Any]

LOOK = "grep -m 1 ^flags /proc/cpuinfo; ls /dev; dmesg"


def test_linux_with_lass_on_takes_the_epc_and_has_a_device_for_enclaves(
    lasskvm: LassKvm, busybox: Path
) -> None:
    run = lasskvm("-q", "--cpu", "max,+sgx", "--epc", "8M", "--", busybox, "sh", "-c", LOOK)
    assert run.status == 0
    words = set(run.console.split())
    assert {"sgx", "sgx_lc", "lass"} <= words
    # The kernel has enumerated the section, has removed all its pages, and may choose who launches enclaves.
    assert "sgx: EPC section 0x100000000-0x1007fffff" in run.console
    assert "sgx_enclave" in words
