"""The ``--engine`` option."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

import typer

__all__ = ["EngineChoice", "EngineOption"]


class EngineChoice(Enum):
    """What executes guest code; the values are those of :data:`lasskvm.kvm.ExecutionEngine`."""

    value: Literal["jit", "emulator"]
    JIT = "jit"
    EMULATOR = "emulator"


EngineOption = Annotated[
    EngineChoice,
    typer.Option(
        help="What executes the guest: translated machine code, or the instruction emulator alone (slow)."
    ),
]
