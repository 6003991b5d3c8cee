"""Which KVM: the software one of this package, or that of the host's kernel."""

from __future__ import annotations

from typing import Literal

from lasskvm.kvm.interface import SystemInterface

__all__ = ["Provider", "open_system"]

#: ``"soft"`` needs nothing; ``"host"`` is /dev/kvm.
Provider = Literal["soft", "host"]


def open_system(provider: Provider) -> SystemInterface:
    """The system of *provider*; both have the same interface.

    Raises :class:`~lasskvm.errors.HostError` when this host has no KVM that can be used.

    >>> system = open_system("soft")
    >>> system.provider
    'soft'
    """
    # Each brings along what the other has no use for: the engine, or the kernel's structures.
    if provider == "host":
        from lasskvm.kvm.host import System as HostSystem

        return HostSystem()
    from lasskvm.kvm.system import System as SoftSystem

    return SoftSystem()
