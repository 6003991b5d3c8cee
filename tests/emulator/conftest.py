"""Fixtures: a guest at CPL 0 and one at CPL 3."""

from __future__ import annotations

import pytest
from emulator_guest import Guest


@pytest.fixture
def guest() -> Guest:
    """A 64-bit kernel with LASS, SMAP and SMEP on, at CPL 0."""
    return Guest()


@pytest.fixture
def user(guest: Guest) -> Guest:
    """The same, running user code at CPL 3."""
    guest.enter_user()
    return guest
