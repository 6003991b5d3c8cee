"""A 16550A UART: the serial console.

Transmission takes no time: a byte written to THR is handed to ``output`` at once, so the transmitter is
always empty. Bytes from the host go through :meth:`Uart16550.receive` into the 16-byte FIFO; what does not
fit waits outside, as on a line whose sender obeys flow control, so the host never causes an overrun.

The host sends without gaps, so the character time-out of the FIFO's receiver interrupt comes as soon as the
host has no more to send, not four character times later.

Sources: National Semiconductor PC16550D data sheet; the checks of Linux's ``autoconfig()`` in 8250_port.c.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lasskvm.kvm.iobus import DeviceState, IrqLine

__all__ = ["BACKLOG_LIMIT", "COM1_IRQ", "COM1_PORT", "Uart16550"]

COM1_PORT = 0x3F8
COM1_IRQ = 4
PORT_COUNT = 8

#: Bytes from the host that wait for room in the FIFO; :meth:`Uart16550.receive` takes no more.
BACKLOG_LIMIT = 0x10000
FIFO_SIZE = 16
#: Receiver trigger levels by FCR bits 7:6.
TRIGGER_LEVELS = (1, 4, 8, 14)

# Registers by offset; THR and FCR are the write sides of RBR and IIR, DLL and DLM replace RBR and IER while
# DLAB is 1
RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(PORT_COUNT)
THR, FCR = RBR, IIR

IER_RECEIVED = 1 << 0
IER_THR_EMPTY = 1 << 1
IER_LINE_STATUS = 1 << 2
IER_MODEM_STATUS = 1 << 3
IER_WRITABLE = 0x0F

# IIR, highest priority first
IIR_LINE_STATUS = 0x06
IIR_RECEIVED = 0x04
IIR_TIMEOUT = 0x0C
IIR_THR_EMPTY = 0x02
IIR_MODEM_STATUS = 0x00
IIR_NONE = 0x01
IIR_FIFOS_ENABLED = 0xC0

FCR_ENABLE = 1 << 0
FCR_CLEAR_RECEIVER = 1 << 1
FCR_TRIGGER_SHIFT = 6

LCR_DLAB = 1 << 7

MCR_DTR = 1 << 0
MCR_RTS = 1 << 1
MCR_OUT1 = 1 << 2
MCR_OUT2 = 1 << 3
MCR_LOOP = 1 << 4
MCR_WRITABLE = 0x1F

LSR_DATA_READY = 1 << 0
LSR_OVERRUN = 1 << 1
LSR_BREAK = 1 << 4
LSR_THR_EMPTY = 1 << 5
LSR_TRANSMITTER_EMPTY = 1 << 6
LSR_FIFO_ERROR = 1 << 7
LSR_ERRORS = 0x1E
LSR_IDLE = LSR_THR_EMPTY | LSR_TRANSMITTER_EMPTY

MSR_DELTA_CTS = 1 << 0
MSR_DELTA_DSR = 1 << 1
MSR_RI_ENDED = 1 << 2
MSR_DELTA_DCD = 1 << 3
MSR_DELTAS = 0x0F
MSR_CTS = 1 << 4
MSR_DSR = 1 << 5
MSR_RI = 1 << 6
MSR_DCD = 1 << 7
#: What a connected terminal drives.
MSR_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD
MSR_DELTA_SHIFT = 4

#: The divisor for 9600 baud from the usual 1.8432 MHz crystal.
DEFAULT_DIVISOR = 12

BYTE_MASK = 0xFF
#: Bits of a FIFO entry: the byte, and above it the LSR error bits that belong to that byte.
ERROR_SHIFT = 8
BREAK_ENTRY = LSR_BREAK << ERROR_SHIFT

#: Registers and what else is kept as a number.
_STATE = ("divisor", "fcr", "ier", "irq_level", "lcr", "lsr", "mcr", "msr", "scr", "thr_empty_pending")

_BYTES = tuple(bytes((value,)) for value in range(BYTE_MASK + 1))


class Uart16550:
    """One UART at ``base``, driving ``irq``. ``output`` is called with each byte the guest transmits."""

    register_size = 1
    __slots__ = (
        "_irq",
        "_output",
        "backlog",
        "base",
        "divisor",
        "fcr",
        "fifo",
        "ier",
        "irq_level",
        "lcr",
        "lsr",
        "mcr",
        "msr",
        "ports",
        "scr",
        "thr_empty_pending",
    )

    def __init__(self, irq: IrqLine, output: Callable[[bytes], None], base: int = COM1_PORT) -> None:
        self._irq = irq
        self._output = output
        self.base = base
        self.ports = (range(base, base + PORT_COUNT),)
        self.backlog: deque[int] = deque()
        self.irq_level = False
        self.reset()

    def reset(self) -> None:
        """Master reset. What the host has sent and the guest has not seen is kept."""
        self.fifo: deque[int] = deque()
        self.ier = 0
        self.fcr = 0
        self.lcr = 0
        self.mcr = 0
        self.scr = 0
        self.msr = MSR_CONNECTED
        self.lsr = LSR_IDLE
        self.divisor = DEFAULT_DIVISOR
        #: The THR-empty interrupt was caused and not yet cleared by reading IIR.
        self.thr_empty_pending = False
        self._fill()

    def get_state(self) -> DeviceState:
        """Registers, the FIFO, and what the host has sent so far."""
        queues = {"fifo": list(self.fifo), "backlog": list(self.backlog)}
        return queues | {name: getattr(self, name) for name in _STATE}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.fifo, self.backlog = deque(state["fifo"]), deque(state["backlog"])

    @property
    def room(self) -> int:
        """How many bytes :meth:`receive` takes now."""
        return BACKLOG_LIMIT - len(self.backlog)

    def receive(self, data: bytes) -> int:
        """Let the host send ``data``. Returns how many bytes were taken: all, or as many as there is room."""
        taken = data[: self.room]
        self.backlog.extend(taken)
        self._fill()
        return len(taken)

    def receive_break(self) -> None:
        """Let the host send a break, which Linux takes as the SysRq key on a console."""
        if self.room:
            self.backlog.append(BREAK_ENTRY)
            self._fill()

    def coalescible(self) -> tuple[int, int, int] | None:
        """``(THR port, LSR port, LSR)`` while writing THR does nothing but transmit and LSR does not change."""
        if self.lcr & LCR_DLAB or self.mcr & MCR_LOOP or self.ier & IER_THR_EMPTY or self.lsr & LSR_ERRORS:
            return None
        return self.base + THR, self.base + LSR, self.lsr

    def transmit(self, data: bytes) -> None:
        """Take bytes that were written to THR while :meth:`coalescible` held."""
        self.thr_empty_pending = True
        self._output(data)

    def read_port(self, port: int, size: int) -> int:
        """Read a register."""
        offset = port - self.base
        if offset == LSR:
            value = self.lsr
            if value & LSR_ERRORS:
                self._clear_line_status()
            return value
        if offset == RBR:
            return self.divisor & BYTE_MASK if self.lcr & LCR_DLAB else self._read_rbr()
        if offset == IER:
            return self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier
        if offset == IIR:
            return self._read_iir()
        if offset == MSR:
            value = self.msr
            self.msr &= ~MSR_DELTAS
            self._update_irq()
            return value
        return (self.lcr, self.mcr, self.scr)[(LCR, MCR, SCR).index(offset)]

    def write_port(self, port: int, size: int, value: int) -> None:
        """Write a register. LSR and MSR ignore it."""
        offset = port - self.base
        if offset == THR:
            if self.lcr & LCR_DLAB:
                self.divisor = self.divisor & ~BYTE_MASK | value
            else:
                self._write_thr(value)
        elif offset == IER:
            if self.lcr & LCR_DLAB:
                self.divisor = self.divisor & BYTE_MASK | value << 8
            else:
                self._write_ier(value & IER_WRITABLE)
        elif offset == FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self.lcr = value
        elif offset == MCR:
            self._write_mcr(value & MCR_WRITABLE)
        elif offset == SCR:
            self.scr = value

    def _write_thr(self, value: int) -> None:
        if self.ier & IER_THR_EMPTY:
            # The write takes the interrupt back before the empty register causes the next: the PIC needs the
            # edge.
            self.thr_empty_pending = False
            self._update_irq()
        self.thr_empty_pending = True
        if self.mcr & MCR_LOOP:
            self._loop_back(value)
        else:
            self._output(_BYTES[value])
        if self.ier & IER_THR_EMPTY:
            self._update_irq()

    def _write_ier(self, value: int) -> None:
        if value & ~self.ier & IER_THR_EMPTY:
            # Enabling the interrupt while THR is empty causes it; Linux tests for UARTs that do not
            # (UART_BUG_THRE).
            self.thr_empty_pending = True
        self.ier = value
        self._update_irq()

    def _write_fcr(self, value: int) -> None:
        if (value ^ self.fcr) & FCR_ENABLE or (value & FCR_ENABLE and value & FCR_CLEAR_RECEIVER):
            self.fifo.clear()
        # The other bits are programmed only when FCR0 is written as 1.
        self.fcr = value if value & FCR_ENABLE else 0
        self._fill()

    def _write_mcr(self, value: int) -> None:
        self.mcr = value
        if value & MCR_LOOP:
            inputs = (
                (MSR_CTS if value & MCR_RTS else 0)
                | (MSR_DSR if value & MCR_DTR else 0)
                | (MSR_RI if value & MCR_OUT1 else 0)
                | (MSR_DCD if value & MCR_OUT2 else 0)
            )
        else:
            inputs = MSR_CONNECTED
        changed = self.msr & ~MSR_DELTAS ^ inputs
        if inputs & MSR_RI:
            # Only the end of a ring is reported.
            changed &= ~MSR_RI
        self.msr = inputs | self.msr & MSR_DELTAS | changed >> MSR_DELTA_SHIFT
        self._fill()

    def _read_rbr(self) -> int:
        if not self.fifo:
            return 0
        value = self.fifo.popleft() & BYTE_MASK
        self._fill()
        return value

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THR_EMPTY:
            self.thr_empty_pending = False
            self._update_irq()
        return cause | IIR_FIFOS_ENABLED if self.fcr & FCR_ENABLE else cause

    def _clear_line_status(self) -> None:
        self.lsr &= ~LSR_OVERRUN
        if self.fifo:
            self.fifo[0] &= BYTE_MASK
        self._fill()

    def _loop_back(self, value: int) -> None:
        if len(self.fifo) < self._capacity():
            self.fifo.append(value)
        else:
            # A full FIFO loses the new byte, a full RBR the old one.
            if not self.fcr & FCR_ENABLE:
                self.fifo[0] = value
            self.lsr |= LSR_OVERRUN
        self._fill()

    def _capacity(self) -> int:
        return FIFO_SIZE if self.fcr & FCR_ENABLE else 1

    def _fill(self) -> None:
        """Let bytes move up from the host, then bring LSR and the interrupt line up to date."""
        fifo, backlog = self.fifo, self.backlog
        if not self.mcr & MCR_LOOP:
            capacity = self._capacity()
            while backlog and len(fifo) < capacity:
                fifo.append(backlog.popleft())
        lsr = LSR_IDLE | self.lsr & LSR_OVERRUN
        if fifo:
            lsr |= LSR_DATA_READY | fifo[0] >> ERROR_SHIFT
            if self.fcr & FCR_ENABLE and any(entry > BYTE_MASK for entry in fifo):
                lsr |= LSR_FIFO_ERROR
        self.lsr = lsr
        self._update_irq()

    def _cause(self) -> int:
        """Return the IIR value of the pending interrupt with the highest priority."""
        ier = self.ier
        if ier & IER_LINE_STATUS and self.lsr & LSR_ERRORS:
            return IIR_LINE_STATUS
        if ier & IER_RECEIVED and self.fifo:
            if not self.fcr & FCR_ENABLE:
                return IIR_RECEIVED
            reached = len(self.fifo) >= TRIGGER_LEVELS[self.fcr >> FCR_TRIGGER_SHIFT]
            return IIR_RECEIVED if reached else IIR_TIMEOUT
        if ier & IER_THR_EMPTY and self.thr_empty_pending:
            return IIR_THR_EMPTY
        if ier & IER_MODEM_STATUS and self.msr & MSR_DELTAS:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update_irq(self) -> None:
        # On a PC, OUT2 opens the gate between the UART and the interrupt line. Loopback closes it: the
        # outputs of the chip are inactive then.
        wired = self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
        level = wired and self._cause() != IIR_NONE
        if level != self.irq_level:
            self.irq_level = level
            self._irq(level)
