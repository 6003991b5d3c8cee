"""Whatever L1 does with VMX instructions ends in a way that the manual knows."""

from __future__ import annotations

from random import Random

import pytest
from emulator_guest import MAPPED, UPPER
from hypervisor_guest import (
    DATA,
    FAIL_INVALID,
    NO_POINTER,
    SUCCEED,
    USER_DATA,
    VMCS_A,
    VMCS_B,
    VMXON_REGION,
    Hypervisor,
)

from lasskvm.emulator.faults import GuestFault
from lasskvm.memory import PAGE_SIZE
from lasskvm.state import RAX, RBX, RCX, RIP
from lasskvm.vmx.vmcs import VMCS12_REVISION
from lasskvm.x86.exceptions import GP, PF, UD
from lasskvm.x86.vmx import VmInstructionError as Error
from lasskvm.x86.vmx_fields import VmcsField

ROUNDS = 2000
ENTRIES = ["vmlaunch", "vmresume"]
INSTRUCTIONS = [
    "vmxon [rbx]", "vmxoff", "vmclear [rbx]", "vmptrld [rbx]", "vmptrld [rbx]", "vmptrst [rbx]", *ENTRIES,
    "vmread rax, rcx", "vmread [rbx], rcx", "vmwrite rcx, rax", "vmwrite rcx, [rbx]",
    "invept rcx, [rbx]", "invvpid rcx, [rbx]", "vmfunc",
]  # fmt: skip
REGIONS = [VMXON_REGION, VMCS_A, VMCS_B]
#: No memory is there.
HOLE = MAPPED + PAGE_SIZE


def some_pointer(random: Random) -> int:
    return random.choice([*REGIONS, *REGIONS, DATA & MAPPED - 1, HOLE, 1 << 46, random.getrandbits(64)])


def arrange(l1: Hypervisor, random: Random) -> None:
    """Registers, the operand and sometimes a region become something else."""
    words = l1.words
    words[RAX] = random.getrandbits(64)
    words[RBX] = random.choice([DATA, DATA, DATA, USER_DATA, UPPER + MAPPED, 1 << 63, random.getrandbits(64)])
    words[RCX] = random.choice(
        [random.choice(list(VmcsField)) ^ random.getrandbits(1), random.getrandbits(3)]
    )
    l1.store(DATA, 8, some_pointer(random))
    l1.store(DATA + 8, 8, random.getrandbits(64))
    if random.random() < 0.1:
        region = random.choice(REGIONS)
        l1.memory.write(region, random.randbytes(PAGE_SIZE))
        l1.memory.store(region, 4, VMCS12_REVISION)


def ending_of(l1: Hypervisor, source: str) -> object:
    """How *source* ends: an outcome, the vector of a fault, or "entry" where the guest may have been entered."""
    try:
        if source not in ENTRIES:
            return l1.vmx(source)
        l1.step(source)
    except GuestFault as fault:
        return fault.vector
    return "entry"


@pytest.mark.parametrize("seed", range(4))
def test_random_vmx_instructions_succeed_fail_or_fault(seed: int) -> None:
    random, l1 = Random(seed), Hypervisor()
    rip, seen = l1.words[RIP], set()
    for _ in range(ROUNDS):
        arrange(l1, random)
        l1.words[RIP] = rip
        seen.add(ending_of(l1, random.choice(INSTRUCTIONS)))
        nested = l1.nested
        assert (nested.current is None) == (nested.current_gpa == NO_POINTER)
        assert nested.in_vmx_operation or nested.current is None
        assert nested.current is None or nested.current_gpa != nested.vmxon_gpa
    assert {vector for vector in seen if type(vector) is int} == {UD, GP, PF}
    assert {SUCCEED, FAIL_INVALID, Error.UNSUPPORTED_VMCS_COMPONENT, Error.VMPTRLD_VMXON_POINTER} <= seen
