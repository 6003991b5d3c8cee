"""Fixtures: a guest with SGX."""

from __future__ import annotations

import pytest
from sgx_guest import SgxGuest
from two_pages import build_two_pages


@pytest.fixture
def guest() -> SgxGuest:
    """A 64-bit kernel with LASS, SMAP and SMEP on, at CPL 0, and an empty EPC."""
    return SgxGuest()


@pytest.fixture
def enclave(guest: SgxGuest) -> SgxGuest:
    """An enclave of two pages, and a version array."""
    return build_two_pages(guest)
