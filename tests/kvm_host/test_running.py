"""Ways out of KVM_RUN that the guest has no part in: time limits, signals, immediate_exit; and debugging."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest
from provided import CODE, PATIENCE, REAL_MODE_CODE, Machine

from lasskvm.conformance.assembler import assemble
from lasskvm.kvm.exits import DebugExit, HltExit, InternalErrorExit, IntrExit, IoExit, MmioExit
from lasskvm.kvm.host import ioctls
from lasskvm.kvm.host.alarm import KICK
from lasskvm.kvm.host.ioctls import Ioctl
from lasskvm.kvm.structures import GuestDebug, MpState
from lasskvm.x86.exceptions import BP, DB
from lasskvm.x86.registers import DR6_BS

JUMP_TO_ITSELF = b"\xeb\xfe"
HLT, INT3 = b"\xf4", b"\xcc"
PORT = 0x5C0


@pytest.fixture
def spinning(host_machine: Machine) -> Machine:
    """A guest that never leaves by itself."""
    host_machine.real_mode(JUMP_TO_ITSELF)
    return host_machine


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """The SIGUSR1s that have been handled."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    former = signal.signal(signal.SIGUSR1, note)
    yield seen
    signal.signal(signal.SIGUSR1, former)


def test_a_time_limit_ends_a_run_and_the_next_run_goes_on(spinning: Machine) -> None:
    for _ in range(3):
        assert spinning.run(0.02) == IntrExit()
        assert spinning.vcpu.get_regs().rip == REAL_MODE_CODE


def test_a_time_limit_that_is_not_reached_has_no_effect_later(host_machine: Machine) -> None:
    host_machine.real_mode(HLT + HLT + JUMP_TO_ITSELF)
    assert isinstance(host_machine.run(0.05), HltExit)
    time.sleep(0.1)
    assert isinstance(host_machine.run(PATIENCE), HltExit)
    assert host_machine.run(0.02) == IntrExit()


def test_a_sooner_limit_after_a_later_one_counts(spinning: Machine) -> None:
    spinning.vcpu.immediate_exit = True
    assert spinning.run(3600) == IntrExit()
    spinning.vcpu.immediate_exit = False
    assert spinning.run(0.02) == IntrExit()


def test_a_limit_of_nothing_still_returns(spinning: Machine) -> None:
    assert spinning.run(0) == IntrExit()


def test_a_vcpu_runs_in_any_thread(spinning: Machine) -> None:
    exits = []
    thread = threading.Thread(target=lambda: exits.append(spinning.run(0.02)))
    thread.start()
    thread.join(PATIENCE)
    assert exits == [IntrExit()]


def test_immediate_exit_holds_until_it_is_cleared(spinning: Machine) -> None:
    vcpu = spinning.vcpu
    vcpu.immediate_exit = True
    assert [spinning.run(), spinning.run()] == [IntrExit(), IntrExit()]
    assert vcpu.immediate_exit
    vcpu.immediate_exit = False
    assert not vcpu.immediate_exit


def test_immediate_exit_completes_the_instruction_that_an_exit_left_open(host_machine: Machine) -> None:
    host_machine.long_mode(assemble("mov eax, [rbx]; hlt", CODE).code, rbx=0xD000_0000)
    vm_exit = host_machine.run()
    assert isinstance(vm_exit, MmioExit)
    vm_exit.data = 0x1234
    host_machine.vcpu.immediate_exit = True
    assert host_machine.run() == IntrExit()
    regs = host_machine.vcpu.get_regs()
    assert (regs.rax, regs.rip) == (0x1234, CODE + 2)


def test_a_signal_ends_a_run_after_its_handler_has_run(spinning: Machine, alarms: list[int]) -> None:
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    assert spinning.run() == IntrExit()
    assert alarms == [signal.SIGUSR1]


def test_a_signal_that_interrupts_nothing_is_handled_all_the_same(spinning: Machine) -> None:
    # Noted by Python while the ioctl goes on, as one is that arrives between Python's last look and the ioctl.
    threading.Timer(0.05, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        spinning.run()


def test_ctrl_c_gets_out_of_a_guest_that_spins(spinning: Machine) -> None:
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        spinning.run()
    assert spinning.run(0.02) == IntrExit()


def test_an_exit_that_ctrl_c_has_hidden_comes_with_the_next_run(
    host_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_machine.long_mode(assemble("out dx, al; hlt", CODE).code, rdx=PORT, rax=7)

    class Interrupted(Ioctl):
        def __call__(self, descriptor: int, argument: object = 0) -> int:
            super().__call__(descriptor)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ioctls, "KVM_RUN", Interrupted("KVM_RUN", ioctls.KVM_RUN.number))
        with pytest.raises(KeyboardInterrupt):
            host_machine.run()
    assert host_machine.run() == IoExit(PORT, 1, write=True, data=7)
    host_machine.run_to_halt()


def test_a_run_leaves_no_signal_behind(spinning: Machine) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    spinning.run(0.02)
    assert not signal.sigpending()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) - before <= {KICK}


def test_a_time_limit_may_be_longer_than_a_turn(spinning: Machine) -> None:
    started = time.monotonic()
    assert spinning.run(0.25) == IntrExit()
    assert time.monotonic() - started >= 0.25


def test_a_halted_guest_with_an_irqchip_waits_in_the_kernel_until_the_limit(irqchip_machine: Machine) -> None:
    irqchip_machine.real_mode(HLT)
    assert irqchip_machine.run(0.05) == IntrExit()
    assert irqchip_machine.vcpu.get_mp_state() is MpState.HALTED


# ------------------------------------------------------------------------------------------------------ debugging


def test_single_stepping_stops_behind_each_instruction(host_machine: Machine) -> None:
    host_machine.long_mode(assemble("nop; mov eax, 5; hlt", CODE).code)
    host_machine.vcpu.set_guest_debug(GuestDebug(enable=True, singlestep=True))
    places = []
    for _ in range(2):
        vm_exit = host_machine.run()
        assert isinstance(vm_exit, DebugExit)
        assert (vm_exit.exception, bool(vm_exit.dr6 & DR6_BS)) == (DB, True)
        places.append(vm_exit.pc)
    assert places == [CODE + 1, CODE + 6]
    host_machine.vcpu.set_guest_debug(GuestDebug())
    assert host_machine.run_to_halt().rax == 5


def test_a_software_breakpoint_is_reported_instead_of_delivered(host_machine: Machine) -> None:
    host_machine.long_mode(assemble("nop; int3; hlt", CODE).code)
    host_machine.vcpu.set_guest_debug(GuestDebug(enable=True, use_sw_bp=True))
    vm_exit = host_machine.run()
    if isinstance(vm_exit, InternalErrorExit):
        # A KVM that emulates the guest's kernel need not know INT3 there, and says so.
        assert vm_exit.instruction.startswith(INT3)
        pytest.skip(f"INT3 at CPL 0: {vm_exit.detail}")
    assert isinstance(vm_exit, DebugExit)
    assert (vm_exit.exception, vm_exit.pc) == (BP, CODE + 1)


def test_a_hardware_breakpoint_stops_before_its_instruction(host_machine: Machine) -> None:
    host_machine.long_mode(assemble("nop; nop; nop; hlt", CODE).code)
    enable_breakpoint_0 = 0x402
    host_machine.vcpu.set_guest_debug(
        GuestDebug(enable=True, breakpoints=(CODE + 2, 0, 0, 0), dr7=enable_breakpoint_0)
    )
    vm_exit = host_machine.run()
    assert isinstance(vm_exit, DebugExit)
    assert (vm_exit.exception, vm_exit.pc, vm_exit.dr6 & 0xF) == (DB, CODE + 2, 1)
