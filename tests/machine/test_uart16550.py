"""The serial port: register rules of the 16550A, interrupts, and the probes of Linux's 8250 driver."""

import pytest

from lasskvm.machine.devices.uart16550 import BACKLOG_LIMIT, Uart16550

RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
THR, FCR, DLL, DLM = RBR, IIR, RBR, IER
RDI, THRI, RLSI, MSI = 1, 2, 4, 8
NONE, MODEM, THR_EMPTY, RECEIVED, LINE_STATUS, TIMEOUT = 1, 0, 2, 4, 6, 0xC
FIFO_ON = 0xC0
OUT2, LOOP = 0x08, 0x10


class Bench:
    """A UART, what it sent, and the history of its interrupt line."""

    def __init__(self, base: int = 0x3F8) -> None:
        self.base = base
        self.sent = bytearray()
        self.edges: list[bool] = []
        self.uart = Uart16550(self.edges.append, self.sent.extend, base)

    @property
    def line(self) -> bool:
        return bool(self.edges) and self.edges[-1]

    def out(self, register: int, value: int) -> None:
        self.uart.write_port(self.base + register, 1, value)

    def inp(self, register: int) -> int:
        return self.uart.read_port(self.base + register, 1)

    def enable(self, ier: int, fcr: int = 0x01) -> None:
        """What a driver does at start-up: FIFOs, OUT2, interrupt enables."""
        self.out(FCR, fcr)
        self.out(MCR, 0x03 | OUT2)
        self.out(IER, ier)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_written_bytes_come_out_and_the_transmitter_is_always_empty(bench):
    for byte in b"Hello\x00\xff":
        assert bench.inp(LSR) == 0x60
        bench.out(THR, byte)
    assert bytes(bench.sent) == b"Hello\x00\xff"


def test_the_registers_follow_the_base():
    bench = Bench(0x2F8)
    assert bench.uart.ports == (range(0x2F8, 0x300),)
    bench.out(SCR, 0x5A)
    assert bench.inp(SCR) == 0x5A


def test_dlab_shows_the_divisor_and_hides_the_data_registers(bench):
    bench.out(LCR, 0x83)
    bench.out(DLL, 0x34)
    bench.out(DLM, 0x12)
    assert (bench.inp(DLL), bench.inp(DLM), bench.inp(LCR)) == (0x34, 0x12, 0x83)
    bench.out(LCR, 0x03)
    assert (bench.inp(RBR), bench.inp(IER)) == (0, 0)
    assert bench.sent == b""


def test_linux_autoconfig_finds_a_16550a(bench):
    """The steps of autoconfig() and autoconfig_16550a() in Linux's 8250_port.c."""
    bench.out(IER, 0x00)
    assert bench.inp(IER) & 0x0F == 0
    bench.out(IER, 0x0F)
    assert bench.inp(IER) & 0x0F == 0x0F
    bench.out(IER, 0x00)
    bench.out(MCR, LOOP | 0x0A)
    assert bench.inp(MSR) & 0xF0 == 0x90, "RTS and OUT2 loop back as CTS and DCD"
    bench.out(MCR, 0x00)
    bench.out(LCR, 0xBF)
    bench.out(FCR, 0x00)
    bench.out(LCR, 0x00)
    bench.out(FCR, 0x01)
    assert bench.inp(IIR) >> 6 == 3, "both FIFO bits: a 16550A"
    bench.out(LCR, 0xBF)
    assert bench.inp(IIR) != 0, "an EFR of 0 would make it a 16650"
    bench.out(LCR, 0x00)
    bench.out(FCR, 0x21)
    assert not bench.inp(IIR) & 0x20, "the 64-byte FIFO bit would make it a 16750"
    bench.out(IER, 0x40)
    assert bench.inp(IER) & 0x40 == 0, "the UUE bit would make it an XScale"


def test_linux_finds_neither_the_thre_nor_the_txen_bug(bench):
    """serial8250_do_startup() and its THRE test: enabling THRI interrupts each time while THR is empty."""
    bench.out(MCR, OUT2)
    bench.out(IER, THRI)
    first = bench.inp(IIR)
    bench.out(IER, 0)
    bench.out(IER, THRI)
    assert (first & NONE, bench.inp(IIR) & NONE) == (0, 0)


def test_reading_iir_clears_the_thr_empty_interrupt_it_reports(bench):
    bench.enable(THRI)
    assert bench.line
    assert bench.inp(IIR) == FIFO_ON | THR_EMPTY
    assert not bench.line
    assert bench.inp(IIR) == FIFO_ON | NONE


def test_each_transmitted_byte_makes_a_new_edge(bench):
    bench.enable(THRI)
    bench.edges.clear()
    bench.out(THR, 0x41)
    assert bench.edges == [False, True]


def test_reading_iir_leaves_thr_empty_pending_while_it_reports_something_better(bench):
    bench.enable(RDI | THRI, fcr=0x41)
    bench.uart.receive(b"x")
    assert bench.inp(IIR) == FIFO_ON | TIMEOUT
    bench.inp(RBR)
    assert bench.inp(IIR) == FIFO_ON | THR_EMPTY


def test_a_received_byte_interrupts_until_it_is_read(bench):
    bench.enable(RDI, fcr=0x00)
    bench.uart.receive(b"A")
    assert bench.line
    assert bench.inp(IIR) == RECEIVED
    assert bench.inp(LSR) & 1
    assert bench.inp(RBR) == 0x41
    assert not bench.line
    assert not bench.inp(LSR) & 1


@pytest.mark.parametrize(("bits", "level"), [(0, 1), (1, 4), (2, 8), (3, 14)])
def test_the_trigger_level_separates_data_from_the_character_timeout(bench, bits, level):
    bench.enable(RDI, fcr=bits << 6 | 1)
    bench.uart.receive(bytes(level))
    assert bench.inp(IIR) == FIFO_ON | RECEIVED
    bench.inp(RBR)
    assert bench.inp(IIR) == FIFO_ON | (TIMEOUT if level > 1 else NONE)


def test_typed_input_arrives_by_interrupt_however_long_it_is(bench):
    """A driver's handler: after each rising edge, loop until IIR says that nothing is left."""
    bench.enable(RDI | RLSI, fcr=0x81)
    text = bytes(range(256)) * 3
    assert bench.uart.receive(text) == len(text)
    received = bytearray()
    while bench.inp(IIR) & NONE == 0:
        while bench.inp(LSR) & 1:
            received.append(bench.inp(RBR))
    assert bytes(received) == text
    assert not bench.line
    bench.uart.receive(b"\r")
    assert bench.edges == [True, False, True]


def test_the_host_queue_is_bounded_and_says_how_much_it_took(bench):
    assert bench.uart.room == BACKLOG_LIMIT
    taken = bench.uart.receive(bytes(BACKLOG_LIMIT + 100))
    assert taken == BACKLOG_LIMIT
    assert bench.uart.room == 1, "one byte has moved on into the receiver"
    assert not bench.inp(LSR) & 2, "the host waits, it does not overrun"


def test_ier_gates_each_interrupt(bench):
    bench.enable(0)
    bench.uart.receive(b"A")
    assert bench.inp(IIR) == FIFO_ON | NONE
    bench.out(IER, RDI)
    assert bench.line
    bench.out(IER, 0)
    assert not bench.line


def test_out2_connects_the_interrupt_line(bench):
    bench.out(IER, RDI)
    bench.uart.receive(b"A")
    assert bench.inp(IIR) == RECEIVED
    assert not bench.line
    bench.out(MCR, OUT2)
    assert bench.line
    bench.out(MCR, OUT2 | LOOP)
    assert not bench.line


def test_loopback_returns_bytes_and_sends_none(bench):
    bench.out(FCR, 0x01)
    bench.out(MCR, LOOP)
    for byte in b"loop":
        bench.out(THR, byte)
    assert bytes(bench.inp(RBR) for _ in range(4)) == b"loop"
    assert bench.sent == b""


def test_loopback_keeps_the_host_out(bench):
    bench.out(MCR, LOOP)
    bench.uart.receive(b"h")
    assert not bench.inp(LSR) & 1
    bench.out(MCR, 0)
    assert bench.inp(RBR) == ord("h")


def test_a_full_fifo_loses_the_newest_byte_and_reports_an_overrun(bench):
    bench.enable(RLSI)
    bench.out(MCR, LOOP)
    for byte in range(17):
        bench.out(THR, byte)
    assert bench.inp(IIR) == FIFO_ON | LINE_STATUS
    assert bench.inp(LSR) & 0x02
    assert not bench.inp(LSR) & 0x02, "reading LSR clears it"
    assert [bench.inp(RBR) for _ in range(16)] == list(range(16))


def test_without_fifos_an_overrun_replaces_the_byte(bench):
    bench.out(MCR, LOOP)
    bench.out(THR, 1)
    bench.out(THR, 2)
    assert bench.inp(LSR) & 0x03 == 0x03
    assert bench.inp(RBR) == 2


def test_a_break_is_a_line_status_interrupt_with_a_zero_byte(bench):
    bench.enable(RDI | RLSI, fcr=0x41)
    bench.uart.receive_break()
    bench.uart.receive(b"s")
    assert bench.inp(IIR) == FIFO_ON | LINE_STATUS
    assert bench.inp(LSR) & 0x91 == 0x91, "break, error in FIFO, data ready"
    assert bench.inp(IIR) == FIFO_ON | TIMEOUT
    assert [bench.inp(RBR), bench.inp(RBR)] == [0, ord("s")]


def test_a_break_behind_other_bytes_is_reported_when_it_reaches_the_top(bench):
    bench.enable(RLSI)
    bench.uart.receive(b"a")
    bench.uart.receive_break()
    assert bench.inp(LSR) & 0x90 == 0x80
    bench.inp(RBR)
    assert bench.inp(LSR) & 0x90 == 0x90


def test_the_terminal_is_connected(bench):
    assert bench.inp(MSR) == 0xB0


def test_modem_inputs_report_changes_once_and_the_end_of_a_ring(bench):
    bench.out(MCR, LOOP)
    assert bench.inp(MSR) == 0x0B, "CTS, DSR and DCD went away"
    assert bench.inp(MSR) == 0x00
    bench.out(MCR, LOOP | 0x04)
    assert bench.inp(MSR) == 0x40, "the start of a ring is no event"
    bench.out(MCR, LOOP)
    assert bench.inp(MSR) == 0x04


def test_modem_status_is_the_interrupt_of_the_lowest_priority(bench):
    bench.out(MCR, LOOP)
    bench.out(MCR, OUT2)
    bench.out(IER, THRI | MSI)
    assert bench.line
    assert bench.inp(IIR) == THR_EMPTY
    assert bench.inp(IIR) == MODEM
    bench.inp(MSR)
    assert bench.inp(IIR) == NONE
    assert not bench.line


def test_clearing_the_receiver_fifo_drops_its_bytes(bench):
    bench.out(FCR, 0x01)
    bench.uart.receive(b"stale")
    bench.out(FCR, 0x03)
    assert not bench.inp(LSR) & 1


def test_switching_the_fifos_clears_them_and_other_fcr_bits_need_bit_0(bench):
    bench.uart.receive(b"s")
    bench.out(FCR, 0x02)
    assert bench.inp(LSR) & 1, "FCR bit 1 does nothing unless bit 0 is written as 1"
    bench.out(FCR, 0x01)
    assert not bench.inp(LSR) & 1


def test_lsr_and_msr_ignore_writes(bench):
    bench.out(LSR, 0xFF)
    bench.out(MSR, 0xFF)
    assert (bench.inp(LSR), bench.inp(MSR)) == (0x60, 0xB0)


def test_reset_lowers_the_line_and_keeps_what_the_host_sent(bench):
    bench.enable(RDI)
    bench.uart.receive(b"0123456789abcdefXY")
    bench.uart.reset()
    assert not bench.line
    assert (bench.inp(IER), bench.inp(MCR), bench.inp(IIR)) == (0, 0, NONE)
    assert bench.inp(RBR) == ord("X")


def test_output_may_be_coalesced_while_a_written_byte_is_only_transmitted(bench):
    data_port, status_port, status = bench.uart.coalescible()
    assert (data_port, status_port) == (0x3F8, 0x3FD)
    assert status == bench.uart.read_port(status_port, 1)
    bench.uart.transmit(b"hello")
    assert bytes(bench.sent) == b"hello"


@pytest.mark.parametrize(
    ("register", "value"), [(3, 0x80), (4, 0x10), (1, 0x02)], ids=["DLAB", "loopback", "THR interrupt"]
)
def test_output_is_not_coalesced_while_writing_thr_means_something_else(bench, register, value):
    bench.uart.write_port(0x3F8 + register, 1, value)
    assert bench.uart.coalescible() is None


def test_coalesced_bytes_leave_the_thr_interrupt_pending_as_single_ones_do(bench):
    bench.uart.transmit(b"x")
    assert bench.uart.thr_empty_pending
