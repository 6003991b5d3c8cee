"""64-bit guests on either engine: :class:`lasskvm.conformance.guest.Guest`, with nothing left of former tests."""

from __future__ import annotations

from functools import cache

import pytest

from lasskvm.conformance.guest import Guest
from lasskvm.kvm import ExecutionEngine
from lasskvm.kvm.structures import GuestDebug


@cache
def shared_guest(engine: ExecutionEngine) -> Guest:
    return Guest(engine=engine)


@pytest.fixture(params=["jit", "emulator"])
def guest(request: pytest.FixtureRequest) -> Guest:
    """A guest with an upper-half kernel, LASS, SMAP and SMEP on, without interrupt controllers."""
    guest = shared_guest(request.param)
    guest.reset()
    guest.vcpu.reset()
    guest.vcpu.immediate_exit = False
    guest.vcpu.set_guest_debug(GuestDebug())
    guest.vm.set_msr_filter([])
    return guest
