"""CR8 of L2 in the virtual-APIC page, and the TPR threshold."""

from __future__ import annotations

import pytest
from l2_guest import L2, VIRTUAL_APIC

from lasskvm.emulator.faults import GuestFault
from lasskvm.vmx.exit_record import NestedExit
from lasskvm.vmx.tpr_shadow import read_cr8, tpr_threshold_exit, uses_tpr_shadow, write_cr8
from lasskvm.x86 import vmx
from lasskvm.x86.exceptions import GP
from lasskvm.x86.vmx_exits import ExitReason
from lasskvm.x86.vmx_fields import VmcsField as F

VTPR = VIRTUAL_APIC + 0x80
BELOW_THRESHOLD = NestedExit(ExitReason.TPR_BELOW_THRESHOLD)


@pytest.fixture
def l2() -> L2:
    l2 = L2()
    l2.primary(vmx.CPU_BASED_TPR_SHADOW)
    return l2


def test_the_shadow_is_there_when_its_control_is_set(l2: L2) -> None:
    assert uses_tpr_shadow(l2.vmcs)
    l2.vmcs[F.CPU_BASED_VM_EXEC_CONTROL] = 0xFFFF_FFFF & ~vmx.CPU_BASED_TPR_SHADOW
    assert not uses_tpr_shadow(l2.vmcs)


def test_cr8_is_the_priority_class_of_the_virtual_tpr(l2: L2) -> None:
    l2.memory.store(VTPR, 4, 0xFFFF_FF5A)
    assert read_cr8(l2.vmcs, l2.memory) == 5


def test_a_move_to_cr8_clears_the_rest_of_the_register_and_leaves_its_neighbours(l2: L2) -> None:
    l2.memory.write(VIRTUAL_APIC, b"\xff" * 0x100)
    assert write_cr8(l2.vmcs, l2.memory, 0xB) is None
    assert l2.memory.read(VTPR - 4, 12).hex() == "ffffffff" + "b0000000" + "ffffffff"


@pytest.mark.parametrize("value", [0x10, 1 << 63])
def test_reserved_bits_of_cr8_fault_with_nothing_written(l2: L2, value: int) -> None:
    l2.memory.store(VTPR, 4, 0x50)
    with pytest.raises(GuestFault) as caught:
        write_cr8(l2.vmcs, l2.memory, value)
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)
    assert l2.memory.load(VTPR, 4) == 0x50


@pytest.mark.parametrize("threshold, value, exits", [
    (0, 0, False), (5, 6, False), (5, 5, False), (5, 4, True), (15, 14, True), (15, 15, False),
])  # fmt: skip
def test_a_priority_below_the_threshold_exits_behind_the_move(
    l2: L2, threshold: int, value: int, exits: bool
) -> None:
    l2.vmcs[F.TPR_THRESHOLD] = threshold
    expected = BELOW_THRESHOLD if exits else None
    assert write_cr8(l2.vmcs, l2.memory, value) == expected
    assert l2.memory.load(VTPR, 4) == value << 4
    assert tpr_threshold_exit(l2.vmcs, l2.memory) == expected
