"""What programs in the guest feel: the numbers of guests/bench.c on both machines, by the host's clock."""

from __future__ import annotations

import re
from collections import defaultdict

from benchmarks import machines
from benchmarks.console import watch
from benchmarks.context import Context
from benchmarks.rows import BenchmarkError, Row, compared, median

__all__ = ["run"]

_LINE = re.compile(r"^BENCH (?P<name>\S+) (?P<value>[\d.]+) (?P<unit>\S+)$", re.MULTILINE)


def run(context: Context) -> list[Row]:
    """One row for each line of bench.c; the order is the program's."""
    program = context.guest_program("bench")
    initrd = context.initramfs("bench", command=f"/{program.name}", program=program)
    kernel = context.image.path
    commands = {
        "lasskvm": machines.lasskvm(kernel, initrd, clock="host"),
        "QEMU": machines.qemu(context.qemu, kernel, initrd),
    }
    values: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in commands}
    units: dict[str, str] = {}
    for number in range(context.runs):
        for machine, command in commands.items():
            if command is None:
                continue
            context.progress(f"guest: {machine}, run {number + 1} of {context.runs}")
            session = watch(machine, command, context.timeout)
            lines = list(_LINE.finditer(session.text()))
            if not lines:
                raise BenchmarkError(f"bench.c printed no result under {machine}: {session.last_words()}")
            for line in lines:
                values[machine][line["name"]].append(float(line["value"]))
                units[line["name"]] = line["unit"]
    note = machines.QEMU_MISSING if commands["QEMU"] is None else ""
    return [
        compared(
            f"guest {name}", median(values["lasskvm"][name]), median(values["QEMU"][name]), unit, note=note
        )
        for name, unit in units.items()
    ]
