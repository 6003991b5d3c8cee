"""The checks of a VM entry that need not be made again, and those that must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transition_guest import Nested

from lasskvm.state import EFER
from lasskvm.vmx.capabilities import VmxCapabilities
from lasskvm.vmx.repeated_checks import RepeatedChecks
from lasskvm.vmx.vmcs import VmFailValid
from lasskvm.x86.registers import EFER_LMA
from lasskvm.x86.vmx import VmInstructionError
from lasskvm.x86.vmx_fields import VmcsField as F


def enter(checks: RepeatedChecks, guest: Nested) -> None:
    checks.controls_and_host_state(guest.vmcs, guest.capabilities, guest.memory, guest.words)


def spoil_a_control(guest: Nested) -> None:
    guest.vmcs[F.PIN_BASED_VM_EXEC_CONTROL] = 0


def spoil_the_host(guest: Nested) -> None:
    guest.vmcs[F.HOST_TR_SELECTOR] = 0


def leave_ia32e_mode(guest: Nested) -> None:
    guest.words[EFER] &= ~EFER_LMA


def offer_less(guest: Nested) -> None:
    guest.capabilities = VmxCapabilities.of(guest.cpuid, 0)


@pytest.mark.parametrize("spoil", [spoil_a_control, spoil_the_host, leave_ia32e_mode, offer_less])
def test_what_has_been_right_once_is_found_wrong_when_it_is(spoil: Callable[[Nested], None]) -> None:
    checks, guest = RepeatedChecks(), Nested()
    for _ in range(2):
        enter(checks, guest)
    spoil(guest)
    for _ in range(2):
        with pytest.raises(VmFailValid) as caught:
            enter(checks, guest)
        assert caught.value.error in (
            VmInstructionError.ENTRY_INVALID_CONTROL_FIELD,
            VmInstructionError.ENTRY_INVALID_HOST_STATE_FIELD,
        )
