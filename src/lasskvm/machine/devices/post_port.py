"""Port 0x80: firmware shows its self-test progress there, and Linux writes it to pass a microsecond."""

from __future__ import annotations

from lasskvm.kvm.iobus import DeviceState

__all__ = ["PostPort"]

PORT = 0x80


class PostPort:
    """The port. ``code`` is what was written last."""

    ports = (range(PORT, PORT + 1),)
    register_size = 1
    __slots__ = ("code",)

    def __init__(self) -> None:
        self.code = 0

    def reset(self) -> None:
        """Forget the code."""
        self.code = 0

    def get_state(self) -> DeviceState:
        """What was written last."""
        return {"code": self.code}

    def set_state(self, state: DeviceState) -> None:
        """The inverse of :meth:`get_state`."""
        self.code = int(state["code"])

    def read_port(self, port: int, size: int) -> int:
        """Return what was written last."""
        return self.code

    def write_port(self, port: int, size: int, value: int) -> None:
        """Remember the code."""
        self.code = value
