"""``--cpu list``: the CPU models and the names of features."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from lasskvm.x86.cpu_models import SUPPORTED, list_models
from lasskvm.x86.cpuid import FEATURES

__all__ = ["LIST", "print_models"]

#: What stands in place of a CPU to get the list.
LIST = "list"


def print_models() -> None:
    """Print each model with its features, then the features it can get or be asked to pretend not to have."""
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, features in _rows():
        table.add_row(name, " ".join(sorted(features)))
    console.print(table)


def _rows() -> Iterator[tuple[str, frozenset[str]]]:
    for model in list_models():
        yield model.name, model.features
        yield "  on request, +NAME", model.available - model.features
    places = {FEATURES[name] for name in SUPPORTED}
    yield "not virtualized", frozenset(name for name, place in FEATURES.items() if place not in places)
