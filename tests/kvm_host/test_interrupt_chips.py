"""The kernel's interrupt chips and timer through /dev/kvm: their state, the lines to them, and messages."""

from __future__ import annotations

import ctypes
import errno
import json
from collections.abc import Callable

import pytest
from provided import Machine

from lasskvm.kvm.host import KvmIoctlError, irqchip_abi
from lasskvm.kvm.host.ioctls import Ioctl
from lasskvm.kvm.irqchip.routing import ChipRoute, IrqChip, MsiRoute, default_routes, pc_routes

MSI_ADDRESS = 0xFEE0_0000
#: An APIC ID that no processor has.
STRANGER = 0x42 << 12
VECTOR = 0x51
LINE = 5
ID, SPIV, IRR = 0x20, 0xF0, 0x200
SPIV_ENABLED = 0x1FF


def ioapic_lines(machine: Machine) -> int:
    return int(irqchip_abi.IoapicState.from_buffer_copy(machine.host_vm.get_chip(IrqChip.IOAPIC)).irr)


def pic_requests(machine: Machine) -> int:
    master, slave = (
        irqchip_abi.PicState.from_buffer_copy(machine.host_vm.get_chip(chip)).irr
        for chip in (IrqChip.PIC_MASTER, IrqChip.PIC_SLAVE)
    )
    return int(master) | int(slave) << 8


def enable_apic(machine: Machine) -> None:
    registers = bytearray(machine.host_vcpu.get_lapic())
    registers[SPIV : SPIV + 4] = SPIV_ENABLED.to_bytes(4, "little")
    machine.host_vcpu.set_lapic(bytes(registers))


def requested(machine: Machine, vector: int) -> bool:
    """Whether *vector* waits in the local APIC."""
    registers = machine.host_vcpu.get_lapic()
    return bool(registers[IRR + vector // 32 * 16 + vector % 32 // 8] >> vector % 8 & 1)


# ----------------------------------------------------------------------------------------------------------- state


def test_the_chips_begin_as_behind_power_on(irqchip_machine: Machine) -> None:
    ioapic = irqchip_abi.IoapicState.from_buffer_copy(irqchip_machine.host_vm.get_chip(IrqChip.IOAPIC))
    assert (ioapic.base_address, ioapic.irr, set(ioapic.redirtbl)) == (0xFEC0_0000, 0, {1 << 16})
    for chip, mask in ((IrqChip.PIC_MASTER, 0xF8), (IrqChip.PIC_SLAVE, 0xDE)):
        pic = irqchip_abi.PicState.from_buffer_copy(irqchip_machine.host_vm.get_chip(chip))
        assert (pic.irr, pic.isr, pic.elcr_mask) == (0, 0, mask)


def test_a_chips_registers_can_be_set(irqchip_machine: Machine) -> None:
    vm = irqchip_machine.host_vm
    ioapic = irqchip_abi.IoapicState.from_buffer_copy(vm.get_chip(IrqChip.IOAPIC))
    ioapic.id, ioapic.redirtbl[7] = 3, 0x1_0042
    vm.set_chip(IrqChip.IOAPIC, bytes(ioapic))
    slave = irqchip_abi.PicState.from_buffer_copy(vm.get_chip(IrqChip.PIC_SLAVE))
    slave.irq_base, slave.imr = 0x70, 0xEF
    vm.set_chip(IrqChip.PIC_SLAVE, bytes(slave))
    read = irqchip_abi.IoapicState.from_buffer_copy(vm.get_chip(IrqChip.IOAPIC))
    assert (read.id, read.redirtbl[7], read.redirtbl[6]) == (3, 0x1_0042, 1 << 16)
    slave = irqchip_abi.PicState.from_buffer_copy(vm.get_chip(IrqChip.PIC_SLAVE))
    assert (slave.irq_base, slave.imr) == (0x70, 0xEF)


def test_the_state_of_all_chips_goes_through_json_and_back(irqchip_machine: Machine) -> None:
    vm = irqchip_machine.host_vm
    state = json.loads(json.dumps(vm.get_irqchip()))
    vm.irq_line(LINE, True)
    assert vm.get_irqchip() != state
    vm.set_irqchip(state)
    assert vm.get_irqchip() == state


def test_a_chips_state_of_another_size_is_refused(irqchip_machine: Machine) -> None:
    vm = irqchip_machine.host_vm
    with pytest.raises(ValueError, match="PIC_MASTER has 16 bytes, not 216"):
        vm.set_chip(IrqChip.PIC_MASTER, vm.get_chip(IrqChip.IOAPIC))


def test_the_timers_state_goes_through_json_and_back(irqchip_machine: Machine) -> None:
    vm = irqchip_machine.host_vm
    vm.create_pit2()
    state = json.loads(json.dumps(vm.get_pit2()))
    raw = irqchip_abi.PitState2.from_buffer_copy(bytes.fromhex(state["pit_state2"]))
    assert [channel.gate for channel in raw.channels] == [1, 1, 0]
    raw.channels[2].count, raw.channels[2].mode = 0x1234, 3
    vm.set_pit2({"pit_state2": bytes(raw).hex()})
    channel = irqchip_abi.PitState2.from_buffer_copy(bytes.fromhex(vm.get_pit2()["pit_state2"])).channels[2]
    assert (channel.count, channel.mode) == (0x1234, 3)
    vm.set_pit2(state)
    channel = irqchip_abi.PitState2.from_buffer_copy(bytes.fromhex(vm.get_pit2()["pit_state2"])).channels[2]
    assert channel.mode == raw.channels[1].mode


def test_the_local_apics_registers_can_be_set(irqchip_machine: Machine) -> None:
    vcpu = irqchip_machine.host_vcpu
    before = vcpu.get_lapic()
    assert len(before) == 1024
    assert before[SPIV : SPIV + 4] == b"\xff\0\0\0"
    enable_apic(irqchip_machine)
    assert vcpu.get_lapic()[SPIV : SPIV + 4] == b"\xff\1\0\0"
    vcpu.set_lapic(before)
    assert vcpu.get_lapic() == before


def test_registers_of_another_size_are_einval(irqchip_machine: Machine) -> None:
    with pytest.raises(KvmIoctlError, match=r"KVM_SET_LAPIC: .*1024 bytes") as refusal:
        irqchip_machine.host_vcpu.set_lapic(bytes(4096))
    assert refusal.value.errno == errno.EINVAL


# ------------------------------------------------------------------------------------------------ lines and messages


def test_a_line_leads_where_the_table_says(irqchip_machine: Machine) -> None:
    vm = irqchip_machine.host_vm
    vm.set_gsi_routing([ChipRoute(LINE, IrqChip.IOAPIC, 20), ChipRoute(LINE, IrqChip.PIC_SLAVE, 3)])
    vm.irq_line(LINE, True)
    assert (ioapic_lines(irqchip_machine), pic_requests(irqchip_machine)) == (1 << 20, 1 << 11 | 1 << 2)


@pytest.mark.parametrize(("routes", "pin"), [(default_routes(), 0), (pc_routes(), 2)])
def test_the_timers_line_is_pin_2_on_a_pc_only(
    irqchip_machine: Machine, routes: tuple[ChipRoute, ...], pin: int
) -> None:
    vm = irqchip_machine.host_vm
    vm.set_gsi_routing(routes)
    vm.irq_line(0, True)
    assert (ioapic_lines(irqchip_machine), pic_requests(irqchip_machine)) == (1 << pin, 1)


def test_a_table_that_contradicts_itself_is_einval(irqchip_machine: Machine) -> None:
    vm = irqchip_machine.host_vm
    with pytest.raises(OSError, match="IOAPIC has no pin 24") as refusal:
        vm.set_gsi_routing([ChipRoute(LINE, IrqChip.IOAPIC, 24)])
    assert refusal.value.errno == errno.EINVAL
    vm.irq_line(LINE, True)
    assert ioapic_lines(irqchip_machine) == 1 << LINE


def test_a_message_waits_in_the_local_apic_that_it_is_for(irqchip_machine: Machine) -> None:
    vm = irqchip_machine.host_vm
    assert not vm.signal_msi(MSI_ADDRESS, VECTOR), "the local APIC is off behind power-on"
    enable_apic(irqchip_machine)
    assert not vm.signal_msi(MSI_ADDRESS | STRANGER, VECTOR)
    assert not requested(irqchip_machine, VECTOR)
    assert vm.signal_msi(MSI_ADDRESS, VECTOR)
    assert requested(irqchip_machine, VECTOR)


def test_a_kernel_that_says_eperm_means_nobody(
    irqchip_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: Ioctl, descriptor: int, argument: object = 0) -> int:
        raise KvmIoctlError(request.name, errno.EPERM)

    monkeypatch.setattr(Ioctl, "__call__", refuse)
    taken = irqchip_machine.host_vm.signal_msi(MSI_ADDRESS, VECTOR)
    monkeypatch.undo()
    assert taken is False


def test_a_line_can_be_a_message(irqchip_machine: Machine) -> None:
    vm = irqchip_machine.host_vm
    enable_apic(irqchip_machine)
    vm.set_gsi_routing([MsiRoute(30, MSI_ADDRESS, VECTOR)])
    vm.irq_line(30, False)
    assert not requested(irqchip_machine, VECTOR)
    vm.irq_line(30, True)
    assert requested(irqchip_machine, VECTOR)


# ---------------------------------------------------------------------------------------------------- what is missing

Call = Callable[[Machine], object]


@pytest.mark.parametrize(
    ("call", "number", "advice"),
    [
        (lambda machine: machine.host_vm.get_irqchip(), errno.ENXIO, r"create_irqchip\(\)"),
        (
            lambda machine: machine.host_vm.set_chip(IrqChip.PIC_MASTER, bytes(16)),
            errno.ENXIO,
            "create_irqchip",
        ),
        (lambda machine: machine.host_vm.get_pit2(), errno.ENXIO, r"create_pit2\(\)"),
        (
            lambda machine: machine.host_vm.set_pit2(
                {"pit_state2": bytes(ctypes.sizeof(irqchip_abi.PitState2)).hex()}
            ),
            errno.ENXIO,
            r"create_pit2\(\)",
        ),
        (lambda machine: machine.host_vcpu.get_lapic(), errno.EINVAL, "irqchip before the vCPU"),
        (lambda machine: machine.host_vcpu.set_lapic(bytes(1024)), errno.EINVAL, "no local APIC"),
        (lambda machine: machine.host_vm.set_gsi_routing([]), errno.EINVAL, r"create_irqchip\(\)"),
        (
            lambda machine: machine.host_vm.signal_msi(MSI_ADDRESS, VECTOR),
            errno.EINVAL,
            r"create_irqchip\(\)",
        ),
    ],
    ids=["get_irqchip", "set_irqchip", "get_pit2", "set_pit2", "get_lapic", "set_lapic", "routing", "msi"],
)
def test_what_is_not_there_is_an_error_that_says_what_to_do(
    host_machine: Machine, call: Call, number: int, advice: str
) -> None:
    with pytest.raises(KvmIoctlError, match=advice) as refusal:
        call(host_machine)
    assert refusal.value.errno == number
