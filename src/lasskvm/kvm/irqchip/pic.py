"""The PC's two cascaded 8259A interrupt controllers, as KVM's ``arch/x86/kvm/i8259.c`` presents them.

Sources: Intel 8259A data sheet (231468), Intel 82371 data sheet for the edge/level control registers (ELCR).
Where the two disagree with KVM's model the difference is named next to the line. Not modelled, as in KVM:
buffered mode and the level-triggered bit of ICW1, which chipsets with an ELCR ignore.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lasskvm.kvm.iobus import DeviceState, IrqLine

__all__ = ["Pic"]

MASTER_PORTS = range(0x20, 0x22)
SLAVE_PORTS = range(0xA0, 0xA2)
ELCR_PORTS = range(0x4D0, 0x4D2)

#: The master's input that the slave's INT output is wired to.
CASCADE_LINE = 2
CASCADE_BIT = 1 << CASCADE_LINE
#: The input whose vector a spurious interrupt gets.
SPURIOUS_LINE = 7
#: Lines whose trigger mode can be set: not the timer, keyboard, cascade, RTC and FPU lines.
MASTER_ELCR_MASK = 0xF8
SLAVE_ELCR_MASK = 0xDE

ICW1_INIT = 1 << 4
ICW1_SINGLE = 1 << 1
ICW1_ICW4 = 1 << 0
ICW2_BASE = 0xF8
ICW4_SPECIAL_FULLY_NESTED = 1 << 4
ICW4_AUTO_EOI = 1 << 1
OCW3_SELECT = 1 << 3
OCW3_SET_SPECIAL_MASK = 1 << 6
OCW3_SPECIAL_MASK = 1 << 5
OCW3_POLL = 1 << 2
OCW3_SET_READ = 1 << 1
OCW3_READ_ISR = 1 << 0
POLL_PENDING = 1 << 7

# OCW2 commands, bits 7:5
OCW2_SHIFT = 5
(
    ROTATE_IN_AUTO_EOI_CLEAR,
    NON_SPECIFIC_EOI,
    NO_OPERATION,
    SPECIFIC_EOI,
    ROTATE_IN_AUTO_EOI_SET,
    ROTATE_ON_NON_SPECIFIC_EOI,
    SET_PRIORITY,
    ROTATE_ON_SPECIFIC_EOI,
) = range(8)

#: What the next write to the odd port is.
EXPECT_OCW1, EXPECT_ICW2, EXPECT_ICW3, EXPECT_ICW4 = range(4)

#: What a controller's state consists of: bytes, and yes or no.
_REGISTERS = ("elcr", "expect", "highest", "imr", "irr", "isr", "levels", "vector_base")
_SWITCHES = (
    "auto_eoi", "poll", "read_isr", "rotate_in_auto_eoi", "special_fully_nested", "special_mask", "with_icw3",
    "with_icw4",
)  # fmt: skip

LINES = 8
LINE_MASK = LINES - 1
BYTE_MASK = 0xFF
NO_LINE = -1


class Pic:
    """Both controllers and their 16 lines.

    ``on_output_change`` is called with the new level whenever INTR, the wire to the processor, changes. INTR
    stays up across :meth:`acknowledge` if a further interrupt may be delivered, so ask :meth:`pending`
    afterwards.
    """

    ports = (MASTER_PORTS, SLAVE_PORTS, ELCR_PORTS)
    register_size = 1
    __slots__ = ("_output", "master", "on_output_change", "slave")

    def __init__(self, on_output_change: Callable[[bool], None] | None = None) -> None:
        self.on_output_change = on_output_change
        self.master = Chip(MASTER_ELCR_MASK, CASCADE_BIT)
        self.slave = Chip(SLAVE_ELCR_MASK, 0)
        self._output = False

    def reset(self) -> None:
        """Power-on state: nothing requested, nothing masked, edge triggered. The levels of the lines stay."""
        for chip in (self.master, self.slave):
            chip.reset()
        self._update()

    def set_irq(self, line: int, level: bool) -> None:
        """Drive IRQ ``line`` (0 to 15). See KVM's ``kvm_pic_set_irq``."""
        chip = self.master if line < LINES else self.slave
        chip.set_line(line & LINE_MASK, level)
        self._update()

    def line(self, line: int) -> IrqLine:
        """Return IRQ ``line`` as a wire to hand to a device."""
        return partial(self.set_irq, line)

    def pending(self) -> bool:
        """Whether INTR is up."""
        return self._output

    def acknowledge(self) -> int:
        """Do the INTA cycles and return the vector. See KVM's ``kvm_pic_read_irq``.

        When the request went away meanwhile, that is the vector of line 7 (or 15) and no in-service bit is
        set on the controller that found nothing to acknowledge: a spurious interrupt.
        """
        line = self.master.request()
        if line == NO_LINE:
            vector = self.master.vector_base + SPURIOUS_LINE
        else:
            self.master.acknowledge(line)
            vector = self.master.vector_base + line
            if line == CASCADE_LINE:
                line = self.slave.request()
                if line == NO_LINE:
                    line = SPURIOUS_LINE
                else:
                    self.slave.acknowledge(line)
                vector = self.slave.vector_base + line
        self._update()
        return vector

    def read_port(self, port: int, size: int) -> int:
        """Read ISR, IRR, IMR, a poll result or the ELCR. See KVM's ``picdev_read``."""
        chip = self._chip(port)
        if port in ELCR_PORTS:
            return chip.elcr
        value = chip.read(port & 1)
        self._update()
        return value

    def write_port(self, port: int, size: int, value: int) -> None:
        """Write an initialization or operation command word or the ELCR. See KVM's ``picdev_write``."""
        chip = self._chip(port)
        if port in ELCR_PORTS:
            chip.elcr = value & chip.elcr_mask
        elif port & 1:
            chip.write_data(value)
        else:
            chip.write_command(value)
        self._update()

    def get_state(self) -> DeviceState:
        """Both controllers; fields of ``struct kvm_pic_state`` and a few more, under the names used here."""
        return {"master": self.master.get_state(), "slave": self.slave.get_state()}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`; INTR follows."""
        self.master.set_state(state["master"])
        self.slave.set_state(state["slave"])
        self._update()

    def _chip(self, port: int) -> Chip:
        return self.slave if port in SLAVE_PORTS or port == ELCR_PORTS[1] else self.master

    def _update(self) -> None:
        # The cascade input latches like any edge-triggered line: when the slave's request goes away before
        # INTA, the master still asks for the cascade line and the guest sees a spurious line 15, as in KVM's
        # pic_update_irq.
        if self.slave.request() != NO_LINE:
            self.master.irr |= CASCADE_BIT
        output = self.master.request() != NO_LINE
        if output != self._output:
            self._output = output
            if self.on_output_change is not None:
                self.on_output_change(output)


class Chip:
    """One 8259A. Masks have bit n for line n; ``cascade`` is the mask of the line a slave hangs on."""

    __slots__ = (
        "auto_eoi",
        "cascade",
        "elcr",
        "elcr_mask",
        "expect",
        "highest",
        "imr",
        "irr",
        "isr",
        "levels",
        "poll",
        "read_isr",
        "rotate_in_auto_eoi",
        "special_fully_nested",
        "special_mask",
        "vector_base",
        "with_icw3",
        "with_icw4",
    )
    poll: bool
    read_isr: bool
    special_mask: bool

    def __init__(self, elcr_mask: int, cascade: int) -> None:
        self.elcr_mask = elcr_mask
        self.cascade = cascade
        self.levels = 0
        self.reset()

    def reset(self) -> None:
        """Power-on state."""
        self.elcr = 0
        self.irr = 0
        self.vector_base = 0
        self.auto_eoi = False
        self.special_fully_nested = False
        self.with_icw3 = True
        self.with_icw4 = False
        self._initialize()
        self.expect = EXPECT_OCW1

    def get_state(self) -> DeviceState:
        """Every register and the levels of the inputs."""
        return {name: int(getattr(self, name)) for name in (*_REGISTERS, *_SWITCHES)}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        for name in _REGISTERS:
            setattr(self, name, state[name] & BYTE_MASK)
        for name in _SWITCHES:
            setattr(self, name, bool(state[name]))

    def set_line(self, line: int, level: bool) -> None:
        """Follow an input. An edge is latched until INTA; a level-triggered request follows the level."""
        bit = 1 << line
        if level:
            if self.elcr & bit or not self.levels & bit:
                self.irr |= bit
            self.levels |= bit
        else:
            if self.elcr & bit:
                self.irr &= ~bit
            self.levels &= ~bit

    def request(self) -> int:
        """Return the unmasked request that beats what is in service, or ``NO_LINE``. KVM: ``pic_get_irq``."""
        wanted = self.irr & ~self.imr
        if not wanted:
            return NO_LINE
        in_service = self.isr
        if self.special_mask:
            in_service &= ~self.imr
        if self.special_fully_nested:
            in_service &= ~self.cascade
        rank = self._rank(wanted)
        return (rank + self.highest) & LINE_MASK if rank < self._rank(in_service) else NO_LINE

    def acknowledge(self, line: int) -> None:
        """INTA: move a request into service. A level-triggered one stays until its line drops."""
        bit = 1 << line
        if not self.elcr & bit:
            self.irr &= ~bit
        if not self.auto_eoi:
            self.isr |= bit
        elif self.rotate_in_auto_eoi:
            self._make_lowest(line)

    def read(self, odd: int) -> int:
        """Read the even or odd port. After a poll command reading either one is an INTA cycle."""
        if self.poll:
            self.poll = False
            line = self.request()
            if line == NO_LINE:
                return 0
            self.acknowledge(line)
            return POLL_PENDING | line
        if odd:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def write_command(self, value: int) -> None:
        """Write to the even port: ICW1, OCW2 or OCW3."""
        if value & ICW1_INIT:
            self._initialize()
            self.with_icw3 = not value & ICW1_SINGLE
            self.with_icw4 = bool(value & ICW1_ICW4)
            if not self.with_icw4:
                self.auto_eoi = self.special_fully_nested = False
        elif value & OCW3_SELECT:
            self.poll = bool(value & OCW3_POLL)
            if value & OCW3_SET_READ:
                self.read_isr = bool(value & OCW3_READ_ISR)
            if value & OCW3_SET_SPECIAL_MASK:
                self.special_mask = bool(value & OCW3_SPECIAL_MASK)
        else:
            self._operate(value >> OCW2_SHIFT, value & LINE_MASK)

    def write_data(self, value: int) -> None:
        """Write to the odd port: ICW2 to ICW4 while the chip is being initialized, then OCW1 (the mask)."""
        if self.expect == EXPECT_OCW1:
            self.imr = value
        elif self.expect == EXPECT_ICW2:
            self.vector_base = value & ICW2_BASE
            self.expect = EXPECT_ICW3 if self.with_icw3 else self._behind_icw3()
        elif self.expect == EXPECT_ICW3:
            # The wiring of a PC is fixed, so what ICW3 says about it does not matter.
            self.expect = self._behind_icw3()
        else:
            self.special_fully_nested = bool(value & ICW4_SPECIAL_FULLY_NESTED)
            self.auto_eoi = bool(value & ICW4_AUTO_EOI)
            self.expect = EXPECT_OCW1

    def _behind_icw3(self) -> int:
        return EXPECT_ICW4 if self.with_icw4 else EXPECT_OCW1

    def _initialize(self) -> None:
        """Do what ICW1 does. A line that is up needs a new edge (KVM counts its next assertion as one)."""
        self.irr &= self.elcr
        self.isr = 0
        self.imr = 0
        self.highest = 0
        self.special_mask = False
        self.read_isr = False
        self.poll = False
        self.rotate_in_auto_eoi = False
        self.expect = EXPECT_ICW2

    def _operate(self, command: int, line: int) -> None:
        """OCW2: end of interrupt and rotation."""
        if command in (NON_SPECIFIC_EOI, ROTATE_ON_NON_SPECIFIC_EOI):
            # In special mask mode a masked line's in-service bit is left alone (data sheet, "Special Mask
            # Mode").
            in_service = self.isr & ~self.imr if self.special_mask else self.isr
            if not in_service:
                return
            line = (self._rank(in_service) + self.highest) & LINE_MASK
        if command in (
            NON_SPECIFIC_EOI,
            SPECIFIC_EOI,
            ROTATE_ON_NON_SPECIFIC_EOI,
            ROTATE_ON_SPECIFIC_EOI,
        ):
            self.isr &= ~(1 << line)
        if command in (ROTATE_ON_NON_SPECIFIC_EOI, ROTATE_ON_SPECIFIC_EOI, SET_PRIORITY):
            self._make_lowest(line)
        elif command in (ROTATE_IN_AUTO_EOI_CLEAR, ROTATE_IN_AUTO_EOI_SET):
            self.rotate_in_auto_eoi = command == ROTATE_IN_AUTO_EOI_SET

    def _make_lowest(self, line: int) -> None:
        self.highest = (line + 1) & LINE_MASK

    def _rank(self, mask: int) -> int:
        """Return the priority of the best line in ``mask``: 0 is the highest, 8 means there is none."""
        rotated = (mask >> self.highest | mask << (LINES - self.highest)) & BYTE_MASK
        return (rotated & -rotated).bit_length() - 1 if rotated else LINES
