"""``--device``: QEMU's names and properties, and one sentence for what is none."""

from __future__ import annotations

import pytest

from lasskvm.errors import DeviceError
from lasskvm.machine.optional_devices import DeviceRequest, parse_device


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("pc-testdev", DeviceRequest("pc-testdev")),
        ("isa-debug-exit", DeviceRequest("isa-debug-exit")),
        ("isa-debug-exit,iobase=0xf4,iosize=0x04", DeviceRequest("isa-debug-exit", 0xF4, 4)),
        ("isa-debugcon,iobase=1026", DeviceRequest("isa-debugcon", 0x402)),
    ],
)
def test_devices_are_written_as_for_qemu(text: str, request_: DeviceRequest) -> None:
    assert parse_device(text) == request_


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pc-testdevice", 'did you mean "pc-testdev"?'),
        ("floppy", "choose from: pc-testdev"),
        ("pc-testdev,iobase=1", "it has none"),
        ("isa-debug-exit,port=1", "it has: iobase, iosize"),
        ("isa-debug-exit,iobase=high", "write it like iobase=0xffff"),
        ("isa-debug-exit,iobase", '"" is no number'),
        ("isa-debug-exit,iobase=0x10000", "can be 1 to 0xffff"),
        ("isa-debug-exit,iosize=0", "can be 1 to 0x4"),
    ],
)
def test_anything_else_gets_a_sentence_that_says_what_to_write(text: str, sentence: str) -> None:
    with pytest.raises(DeviceError) as refusal:
        parse_device(text)
    assert sentence in str(refusal.value)
