"""The two 8259As: initialization, priorities, end of interrupt, rotation, polling, spurious interrupts."""

import pytest

from lasskvm.kvm.irqchip.pic import Pic

MASTER, SLAVE = 0x20, 0xA0
MASTER_BASE, SLAVE_BASE = 0x30, 0x38
EOI, SPECIFIC_EOI, READ_IRR, READ_ISR, POLL = 0x20, 0x60, 0x0A, 0x0B, 0x0C
ROTATE_EOI, ROTATE_SPECIFIC, SET_PRIORITY, ROTATE_AUTO_ON, ROTATE_AUTO_OFF = 0xA0, 0xE0, 0xC0, 0x80, 0x00
SPECIAL_MASK_ON, SPECIAL_MASK_OFF = 0x68, 0x48


def program(pic: Pic, icw4: int = 0x01) -> None:
    for command, base, wiring in ((MASTER, MASTER_BASE, 0x04), (SLAVE, SLAVE_BASE, 0x02)):
        pic.write_port(command, 1, 0x11)
        for word in (base, wiring, icw4, 0x00):
            pic.write_port(command + 1, 1, word)


@pytest.fixture
def pic() -> Pic:
    chips = Pic()
    program(chips)
    return chips


def pulse(pic: Pic, *lines: int) -> None:
    for line in lines:
        pic.set_irq(line, True)
        pic.set_irq(line, False)


def in_service(pic: Pic, port: int) -> int:
    pic.write_port(port, 1, READ_ISR)
    return pic.read_port(port, 1)


def requested(pic: Pic, port: int) -> int:
    pic.write_port(port, 1, READ_IRR)
    return pic.read_port(port, 1)


@pytest.mark.parametrize("line", [line for line in range(16) if line != 2])
def test_each_line_has_the_vector_its_controller_was_given(pic, line):
    pulse(pic, line)
    assert pic.pending()
    assert pic.acknowledge() == MASTER_BASE + line
    assert not pic.pending()


def test_the_lower_line_wins_and_the_slave_ranks_as_line_2(pic):
    pulse(pic, 12, 3, 8, 1)
    vectors = []
    while pic.pending():
        vectors.append(pic.acknowledge())
        if vectors[-1] >= SLAVE_BASE:
            pic.write_port(SLAVE, 1, EOI)
        pic.write_port(MASTER, 1, EOI)
    assert vectors == [MASTER_BASE + 1, SLAVE_BASE, SLAVE_BASE + 4, MASTER_BASE + 3]


def test_an_interrupt_in_service_holds_back_its_own_level_and_lower_ones_only(pic):
    pulse(pic, 4)
    pic.acknowledge()
    pulse(pic, 4, 5)
    assert not pic.pending()
    pulse(pic, 3)
    assert pic.acknowledge() == MASTER_BASE + 3


def test_a_masked_line_waits_until_it_is_unmasked(pic):
    pic.write_port(MASTER + 1, 1, 0x10)
    pulse(pic, 4)
    assert not pic.pending()
    assert requested(pic, MASTER) == 0x10
    pic.write_port(MASTER + 1, 1, 0x00)
    assert pic.acknowledge() == MASTER_BASE + 4


def test_the_mask_reads_back(pic):
    pic.write_port(SLAVE + 1, 1, 0x5A)
    assert pic.read_port(SLAVE + 1, 1) == 0x5A
    assert pic.read_port(MASTER + 1, 1) == 0x00


def test_an_edge_triggered_line_that_stays_up_interrupts_once(pic):
    pic.set_irq(4, True)
    pic.acknowledge()
    pic.write_port(MASTER, 1, EOI)
    pic.set_irq(4, True)
    assert not pic.pending()
    pic.set_irq(4, False)
    pic.set_irq(4, True)
    assert pic.pending()


def test_a_level_triggered_line_interrupts_until_it_drops(pic):
    pic.write_port(0x4D1, 1, 1 << (11 - 8))
    pic.set_irq(11, True)
    for _ in range(2):
        assert pic.acknowledge() == SLAVE_BASE + 3
        pic.write_port(SLAVE, 1, EOI)
        pic.write_port(MASTER, 1, EOI)
        assert pic.pending()
    pic.set_irq(11, False)
    assert requested(pic, SLAVE) == 0


def test_the_elcr_keeps_the_fixed_lines_edge_triggered(pic):
    pic.write_port(0x4D0, 1, 0xFF)
    pic.write_port(0x4D1, 1, 0xFF)
    assert (pic.read_port(0x4D0, 1), pic.read_port(0x4D1, 1)) == (0xF8, 0xDE)


def test_a_level_that_drops_before_inta_gives_a_spurious_line_7(pic):
    pic.write_port(0x4D0, 1, 1 << 5)
    pic.set_irq(5, True)
    assert pic.pending()
    pic.set_irq(5, False)
    assert pic.acknowledge() == MASTER_BASE + 7
    assert in_service(pic, MASTER) == 0


def test_a_slave_level_that_drops_before_inta_gives_a_spurious_line_15(pic):
    pic.write_port(0x4D1, 1, 1 << 1)
    pic.set_irq(9, True)
    pic.set_irq(9, False)
    assert pic.acknowledge() == SLAVE_BASE + 7
    assert in_service(pic, SLAVE) == 0
    assert in_service(pic, MASTER) == 0x04, "the master saw a real request and needs an EOI"


def test_a_specific_eoi_ends_the_named_level(pic):
    pulse(pic, 5)
    pic.acknowledge()
    pulse(pic, 1)
    pic.acknowledge()
    pic.write_port(MASTER, 1, SPECIFIC_EOI | 5)
    assert in_service(pic, MASTER) == 1 << 1


def test_a_non_specific_eoi_ends_the_highest_level_in_service(pic):
    pulse(pic, 5)
    pic.acknowledge()
    pulse(pic, 1)
    pic.acknowledge()
    pic.write_port(MASTER, 1, EOI)
    assert in_service(pic, MASTER) == 1 << 5


def test_rotation_on_eoi_makes_the_served_line_the_lowest(pic):
    pulse(pic, 3)
    pic.acknowledge()
    pic.write_port(MASTER, 1, ROTATE_EOI)
    pulse(pic, 3, 6)
    assert pic.acknowledge() == MASTER_BASE + 6


def test_rotation_on_a_specific_eoi_names_the_line(pic):
    pulse(pic, 5)
    pic.acknowledge()
    pic.write_port(MASTER, 1, ROTATE_SPECIFIC | 5)
    assert in_service(pic, MASTER) == 0
    pulse(pic, 5, 6)
    assert pic.acknowledge() == MASTER_BASE + 6


def test_set_priority_makes_the_named_line_the_lowest(pic):
    pic.write_port(MASTER, 1, SET_PRIORITY | 4)
    pulse(pic, 0, 4, 5)
    assert pic.acknowledge() == MASTER_BASE + 5


def test_automatic_eoi_leaves_nothing_in_service():
    pic = Pic()
    program(pic, icw4=0x03)
    pulse(pic, 4, 6)
    assert [pic.acknowledge(), pic.acknowledge()] == [MASTER_BASE + 4, MASTER_BASE + 6]
    assert in_service(pic, MASTER) == 0


def test_rotation_in_automatic_eoi_mode_can_be_switched():
    pic = Pic()
    program(pic, icw4=0x03)
    pic.write_port(MASTER, 1, ROTATE_AUTO_ON)
    pulse(pic, 0)
    pic.acknowledge()
    pulse(pic, 0, 1)
    assert pic.acknowledge() == MASTER_BASE + 1
    pic.write_port(MASTER, 1, ROTATE_AUTO_OFF)
    assert pic.acknowledge() == MASTER_BASE + 0
    pulse(pic, 0, 3)
    assert pic.acknowledge() == MASTER_BASE + 3, "line 1 is still the lowest, so line 3 beats line 0"


def test_special_mask_mode_lets_lower_lines_through_when_the_served_one_is_masked(pic):
    pulse(pic, 3)
    pic.acknowledge()
    pulse(pic, 6)
    pic.write_port(MASTER + 1, 1, 1 << 3)
    assert not pic.pending()
    pic.write_port(MASTER, 1, SPECIAL_MASK_ON)
    assert pic.acknowledge() == MASTER_BASE + 6
    pic.write_port(MASTER, 1, EOI)
    assert in_service(pic, MASTER) == 1 << 3, "a non-specific EOI skips the masked level"
    pic.write_port(MASTER, 1, SPECIAL_MASK_OFF)
    pulse(pic, 6)
    assert not pic.pending()


def test_special_fully_nested_mode_lets_a_higher_slave_line_interrupt_a_lower_one():
    pic = Pic()
    program(pic, icw4=0x11)
    pulse(pic, 12)
    assert pic.acknowledge() == SLAVE_BASE + 4
    pulse(pic, 9)
    assert pic.pending()
    assert pic.acknowledge() == SLAVE_BASE + 1


def test_without_special_fully_nested_mode_the_cascade_line_in_service_blocks_the_slave(pic):
    pulse(pic, 12)
    pic.acknowledge()
    pulse(pic, 9)
    assert not pic.pending()


def test_a_poll_is_an_acknowledge_cycle(pic):
    pulse(pic, 6)
    pic.write_port(MASTER, 1, POLL)
    assert pic.read_port(MASTER, 1) == 0x86
    assert in_service(pic, MASTER) == 1 << 6
    assert not pic.pending()


def test_a_poll_with_nothing_pending_reads_0_and_counts_for_one_read(pic):
    pic.write_port(MASTER, 1, POLL)
    assert pic.read_port(MASTER + 1, 1) == 0
    pic.write_port(MASTER + 1, 1, 0xAB)
    assert pic.read_port(MASTER + 1, 1) == 0xAB


def test_a_slave_is_polled_after_the_master_says_cascade(pic):
    pulse(pic, 10)
    pic.write_port(MASTER, 1, POLL)
    assert pic.read_port(MASTER, 1) == 0x82
    pic.write_port(SLAVE, 1, POLL)
    assert pic.read_port(SLAVE, 1) == 0x82


def test_icw1_clears_the_mask_and_latched_edges_and_asks_for_a_new_edge(pic):
    pic.write_port(MASTER + 1, 1, 0xFF)
    pic.set_irq(5, True)
    program(pic)
    assert pic.read_port(MASTER + 1, 1) == 0
    assert requested(pic, MASTER) == 0
    pic.set_irq(5, True)
    assert not pic.pending()
    pic.set_irq(5, False)
    pic.set_irq(5, True)
    assert pic.acknowledge() == MASTER_BASE + 5


def test_icw1_without_icw4_goes_back_to_normal_eoi():
    pic = Pic()
    program(pic, icw4=0x03)
    pic.write_port(MASTER, 1, 0x10)
    pic.write_port(MASTER + 1, 1, 0x47)
    pic.write_port(MASTER + 1, 1, 0x04)
    pic.write_port(MASTER + 1, 1, 0x00)
    pulse(pic, 1)
    assert pic.acknowledge() == 0x41, "the low three bits of ICW2 are not part of the base"
    assert in_service(pic, MASTER) == 1 << 1


def test_a_single_controller_skips_icw3():
    pic = Pic()
    pic.write_port(MASTER, 1, 0x13)
    for word in (0x50, 0x01, 0xFE):
        pic.write_port(MASTER + 1, 1, word)
    assert pic.read_port(MASTER + 1, 1) == 0xFE


def test_the_output_callback_sees_each_change_once():
    changes: list[bool] = []
    pic = Pic(changes.append)
    program(pic)
    pulse(pic, 4, 6)
    pic.acknowledge()
    pic.write_port(MASTER, 1, EOI)
    pic.acknowledge()
    assert changes == [True, False, True, False]


def test_reset_forgets_requests_but_not_the_levels_of_the_wires(pic):
    pic.set_irq(4, True)
    pic.reset()
    assert not pic.pending()
    pic.set_irq(4, True)
    assert not pic.pending()


def test_a_line_can_be_handed_out_as_a_wire(pic):
    wire = pic.line(9)
    wire(True)
    assert pic.acknowledge() == SLAVE_BASE + 1
