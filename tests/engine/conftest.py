"""One guest for all tests: making a vCPU costs more than most of the tests."""

from __future__ import annotations

import pytest

from lasskvm.conformance.guest import Guest


@pytest.fixture(scope="session")
def shared_guest() -> Guest:
    return Guest()


@pytest.fixture
def guest(shared_guest: Guest) -> Guest:
    """A 64-bit guest with an upper-half kernel; LASS, SMAP and SMEP on."""
    shared_guest.reset()
    return shared_guest
