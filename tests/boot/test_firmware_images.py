"""Other people's images, from Debian: firmware that starts at the reset vector, and a memory test.

Each is pulled once, whatever the number of test processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run, give_up, locked, run_lasskvm

from lasskvm.errors import LassKvmError
from lasskvm.images import ImageCache, pull
from lasskvm.images.catalog import MEMTEST, SEABIOS

Starts = Callable[..., Run]

#: Seconds of the host's time in which an image gets as far as is asked here, also on a busy host.
ENOUGH = 60
#: What a terminal is told of colours and places.
_CONTROL_SEQUENCE = re.compile(r"\x1b(\[[?0-9;]*[A-Za-z]|c)")


@pytest.fixture(scope="module")
def starts(shared_folder: Path) -> Starts:
    """A function that pulls the image of a name if need be, and runs it with more words of the command line."""

    def start(name: str, *words: str) -> Run:
        with locked(shared_folder):
            if not any(image.is_intact() for image in ImageCache().images(name)):
                try:
                    pull(name, progress=print)
                except LassKvmError as error:
                    give_up(f"no {name} to start: {error}")
        run = run_lasskvm(name, *words)
        return Run(run.status, _CONTROL_SEQUENCE.sub("\n", run.console), run.errors)

    return start
