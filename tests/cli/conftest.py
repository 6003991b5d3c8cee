from __future__ import annotations

from pathlib import Path

import pytest
from cli_support import Cli, make_cli


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return make_cli(capfd)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a pulled image; the engine's compiled code keeps its place."""
    from lasskvm.images import cache

    root = tmp_path / "images"
    monkeypatch.setattr(cache, "_default_root", lambda: root)
    return root
