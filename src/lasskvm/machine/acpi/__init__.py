"""ACPI tables of the PC, and the ways to get them to a guest.

:class:`AcpiTables` puts them into guest memory for kernels that are started directly, or hands them as fw_cfg files to
firmware, which places them itself.
"""

from lasskvm.machine.acpi.tables import BIOS_AREA_END, BIOS_AREA_START, AcpiTables

__all__ = ["BIOS_AREA_END", "BIOS_AREA_START", "AcpiTables"]
