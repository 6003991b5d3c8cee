"""One guest for nearly all tests: making a vCPU costs more than most of the tests."""

from __future__ import annotations

import random

import pytest

from lasskvm.conformance.guest import Guest


class ScratchPorts:
    """A device that takes everything and reads as zero."""

    ports = (range(0x5C0, 0x5C4),)
    register_size = 4

    def read_port(self, port: int, size: int) -> int:
        return 0

    def write_port(self, port: int, size: int, value: int) -> None:
        pass

    def reset(self) -> None:
        pass


@pytest.fixture(scope="session")
def shared_guest() -> Guest:
    guest = Guest()
    guest.vm.ports.register(ScratchPorts())
    return guest


@pytest.fixture
def guest(shared_guest: Guest) -> Guest:
    """A 64-bit guest with an upper-half kernel; LASS, SMAP and SMEP on; a device claims ports 5C0H to 5C3H."""
    shared_guest.reset()
    return shared_guest


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that are the same in every run of a test."""
    return random.Random(request.node.name)
