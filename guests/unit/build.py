#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds the unit-test images: multiboot kernels, each about one subject.

    python guests/unit/build.py DIRECTORY [IMAGE ...]

An image is NAME.c, with NAME_*.S if there are any, and lib/. It is linked as ELF64, because that is what 64-bit code
links as, and converted to ELF32, because that is what multiboot loaders take. Takes gcc and binutils of an x86-64
host; no headers, no C library.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["IMAGES", "BuildError", "build"]

SOURCES = Path(__file__).parent
#: Every image there is.
IMAGES: tuple[str, ...] = tuple(sorted(path.stem for path in SOURCES.glob("*.c")))

#: Where the first byte of memory is in an image's own addresses: the identity map, or the top 2 GiB.
LOWER_HALF, UPPER_HALF = 0, 0xFFFFFFFF80000000
#: Images that have to do without the lower half.
_UPPER_HALF_IMAGES = frozenset({"lass"})

_COMMON_FLAGS = ("-m64", "-mno-red-zone", "-mgeneral-regs-only", "-ffreestanding", "-fno-pic", "-fno-common")
_FLAGS = (
    *_COMMON_FLAGS,
    *("-std=gnu11", "-O1", "-g0", "-Wall", "-Wextra", "-Werror", "-nostdinc", "-nostdlib"),
    *("-fcf-protection=none", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    # RBP stays out of the operands of inline assembly: faults of operands based on it are #SS.
    "-fno-omit-frame-pointer",
    # Address 0 is memory like any other here.
    *("-fno-delete-null-pointer-checks", "-fno-strict-aliasing"),
)
_MODELS = {LOWER_HALF: "-mcmodel=small", UPPER_HALF: "-mcmodel=kernel"}


class BuildError(Exception):
    """A compiler or linker is missing, or does not take a source."""


def build(names: Iterable[str], directory: Path) -> list[Path]:
    """The images *names*, built in *directory*, in that order.

    :raises BuildError: with what the compiler said.
    """
    names = list(names)
    if unknown := sorted(set(names) - set(IMAGES)):
        raise BuildError(f"there is no image {', '.join(unknown)}; there are {', '.join(IMAGES)}")
    directory.mkdir(parents=True, exist_ok=True)
    objects: dict[tuple[Path, int], Path] = {}
    for name in names:
        for source in _sources(name):
            base = _base(name)
            objects[source, base] = directory / f"{source.parent.name}-{source.name}-{base:x}.o"
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        compilations = [workers.submit(_compile, *place, target) for place, target in objects.items()]
        for compilation in compilations:
            compilation.result()
        return list(
            workers.map(
                lambda name: _link(name, [objects[s, _base(name)] for s in _sources(name)], directory), names
            )
        )


def _base(name: str) -> int:
    return UPPER_HALF if name in _UPPER_HALF_IMAGES else LOWER_HALF


def _sources(name: str) -> list[Path]:
    library = [path for path in sorted((SOURCES / "lib").iterdir()) if path.suffix in {".c", ".S"}]
    return [SOURCES / f"{name}.c", *sorted(SOURCES.glob(f"{name}_*.S")), *library]


def _compile(source: Path, base: int, target: Path) -> None:
    include = _run("gcc", "-print-file-name=include").strip()
    _run(
        *("gcc", "-c", *_FLAGS, _MODELS[base], f"-DKERNEL_BASE={base:#x}"),
        *("-isystem", include, "-I", str(SOURCES / "lib"), "-o", str(target), str(source)),
    )


def _link(name: str, objects: Sequence[Path], directory: Path) -> Path:
    long, image = directory / f"{name}.elf64", directory / name
    _run(
        *("ld", "-m", "elf_x86_64", "-n", "--no-warn-rwx-segments", "--build-id=none"),
        *("--defsym", f"KERNEL_BASE={_base(name):#x}", "-T", str(SOURCES / "link.ld"), "-o", str(long)),
        *map(str, objects),
    )
    _run("objcopy", "-O", "elf32-i386", str(long), str(image))
    return image


def _run(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}; install gcc and binutils") from error
    if result.returncode:
        raise BuildError(result.stderr.strip() or f"{command[0]} failed with status {result.returncode}")
    return result.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds unit-test images.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("images", nargs="*", default=IMAGES, metavar="IMAGE")
    arguments = parser.parse_args()
    try:
        for image in build(arguments.images, arguments.directory):
            print(image)
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
