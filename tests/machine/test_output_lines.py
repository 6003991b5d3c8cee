"""Several consoles on one output: whose line it is, what waits, and for how long."""

from __future__ import annotations

from collections.abc import Callable

from lasskvm.machine.output_lines import OutputLines

Console = Callable[[bytes], None]


def make() -> tuple[OutputLines, bytearray, Console, Console]:
    output = bytearray()
    lines = OutputLines(output.extend)
    return lines, output, lines.add_console(), lines.add_console()


def test_two_consoles_that_write_the_same_byte_by_byte_give_two_lines() -> None:
    lines, output, serial, debug = make()
    for byte in b"boot\n":
        debug(bytes([byte]))
        serial(bytes([byte]))
    lines.flush()
    assert output == b"boot\nboot\n"


def test_the_first_console_is_heard_at_once() -> None:
    _, output, serial, _ = make()
    serial(b"lo")
    assert output == b"lo"
    serial(b"gin: ")
    assert output == b"login: "


def test_what_waited_comes_at_the_end_of_the_line() -> None:
    _, output, serial, debug = make()
    serial(b"a")
    debug(b"1\n2")
    assert output == b"a"
    serial(b"b\n")
    assert output == b"ab\n1\n2"
    # Now the line is the other one's.
    serial(b"c\n")
    debug(b"3\n")
    assert output == b"ab\n1\n23\nc\n"


def test_a_prompt_does_not_hold_up_the_others_for_long() -> None:
    lines, output, serial, debug = make()
    serial(b"> ")
    debug(b"note\n")
    lines.settle()
    assert output == b"> "
    lines.settle()
    assert output == b"> note\n"


def test_a_console_that_goes_on_keeps_its_line() -> None:
    lines, output, serial, debug = make()
    serial(b"a")
    debug(b"note\n")
    for _ in range(3):
        serial(b".")
        lines.settle()
    assert output == b"a..."


def test_nobody_waits_with_any_amount() -> None:
    _, output, serial, debug = make()
    serial(b"> ")
    for _ in range(10_000):
        debug(b"x")
    assert len(output) > 5_000


def test_at_the_end_nothing_is_left() -> None:
    lines, output, serial, debug = make()
    serial(b"a")
    debug(b"b")
    lines.flush()
    lines.flush()
    assert output == b"ab"
