"""A machine on each provider, or on the host's alone; skipped where that has no usable KVM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from provided import Machine, unusable

from lasskvm.kvm.providers import Provider


def machine_on(provider: Provider, *, irqchip: bool = False) -> Iterator[Machine]:
    if reason := unusable(provider):
        pytest.skip(reason)
    with Machine(provider, irqchip=irqchip) as machine:
        yield machine


@pytest.fixture
def host_machine() -> Iterator[Machine]:
    """A machine of /dev/kvm."""
    yield from machine_on("host")


@pytest.fixture
def irqchip_machine() -> Iterator[Machine]:
    """A machine of /dev/kvm with interrupt controllers in the kernel."""
    yield from machine_on("host", irqchip=True)


@pytest.fixture(params=["soft", "host"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine of each provider in turn."""
    yield from machine_on(request.param)
