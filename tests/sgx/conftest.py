"""Fixtures: a guest with SGX."""

from __future__ import annotations

import pytest
from sgx_guest import SgxGuest


@pytest.fixture
def guest() -> SgxGuest:
    """A 64-bit kernel with LASS, SMAP and SMEP on, at CPL 0, and an empty EPC."""
    return SgxGuest()
