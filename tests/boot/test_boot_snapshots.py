"""Debian's kernel, saved amid its boot: what comes after a load is what would have come without."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LassKvm = Callable[..., Any]


def guest_time(errors: str) -> str:
    found = re.search(r"guest nanoseconds: (\d+)", errors)
    assert found is not None, errors
    return found[1]


@pytest.mark.parametrize("seconds", ["0.4", "1.1"])
def test_a_boot_that_was_saved_ends_as_one_that_was_not(
    lasskvm: LassKvm,
    lasskvm_load: LassKvm,
    whole_boot: tuple[tuple[str, ...], Any],
    tmp_path: Path,
    seconds: str,
) -> None:
    program, whole = whole_boot
    first = lasskvm("--save", tmp_path / "saved", "--save-after", seconds, *program)
    assert first.status == 0
    assert 0 < len(first.console) < len(whole.console)
    second = lasskvm_load(tmp_path / "saved", "--stats")
    assert (second.status, first.console + second.console) == (5, whole.console)
    assert guest_time(second.errors) == guest_time(whole.errors)
