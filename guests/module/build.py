#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds lass_kernel.ko for a kernel image, without that kernel's headers, compiler or build tools.

    python guests/module/build.py VMLINUZ DIRECTORY

A distribution's headers want the compiler that built the kernel and host tools for its C library, and vanish
from the mirror with the next upload. All this module needs of them is the layout of two structures and the
version string that a module must carry, and the kernel image has both: its BTF type information and its
read-only data. So a small linux/module.h is written from those, and the host's gcc compiles the module
against it. Works for x86-64 kernels with CONFIG_DEBUG_INFO_BTF that neither check symbol versions
(CONFIG_MODVERSIONS) nor enforce signatures, as Debian builds them. Beside lass_kernel.ko the directory gets
lass_supervisor, the static program that carries it.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from btf import Btf, Struct
from elftools.elf.elffile import ELFFile

from lasskvm.errors import ImageError, LassKvmError
from lasskvm.machine.boot.bzimage import read_bzimage

SOURCES = Path(__file__).parent
MODULE_NAME = "lass_kernel"
PROGRAM_NAME = "lass_supervisor"

#: Code for the kernel's address space and ABI: no red zone, no vector registers, no position independence.
MODULE_FLAGS = (
    *(
        "-O1",
        "-std=gnu11",
        "-Wall",
        "-ffreestanding",
        "-mcmodel=kernel",
        "-mno-red-zone",
        "-mgeneral-regs-only",
    ),
    *("-fno-pic", "-fno-common", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    *("-fno-delete-null-pointer-checks", "-fcf-protection=branch"),
)

#: `UTS_RELEASE SMP preempt mod_unload `, as include/linux/vermagic.h puts it together.
VERMAGIC = re.compile(rb"\0(\d+\.\d+[^\0 ]* [^\0]*mod_unload[^\0]*)\0")

POINTER = 8


class Member(NamedTuple):
    """A member the module fills in: its declaration in C and its size in bytes."""

    declaration: str
    size: int


MODULE_MEMBERS = {"name": Member("char name[16]", 16), "init": Member("int (*init)(void)", POINTER)}
PARAMETER_MEMBERS = {
    "name": Member("const char *name", POINTER),
    "mod": Member("struct module *mod", POINTER),
    "ops": Member("const void *ops", POINTER),
    "perm": Member("unsigned short perm", 2),
    "level": Member("signed char level", 1),
    # The union of pointers to the variable
    "": Member("void *arg", POINTER),
}

HEADER = """\
/* Written from the type information of {release} by guests/module/build.py. */
#define __init
#define ECANCELED 125
#define EINVAL 22

int _printk(const char *format, ...);
int strcmp(const char *left, const char *right);
extern const char param_ops_charp[], param_ops_ulong[];

#define pr_err(...) _printk("\\0013" __VA_ARGS__)
#define pr_info(...) _printk("\\0016" __VA_ARGS__)

{module}
extern struct module __this_module;
{parameter}

#define SECTION(where, size) __attribute__((used, section(where), aligned(size)))
#define UNIQUE(line) UNIQUE_(line)
#define UNIQUE_(line) modinfo_##line
#define MODULE_INFO(text) static const char UNIQUE(__COUNTER__)[] SECTION(".modinfo", 1) = text
#define MODULE_LICENSE(text) MODULE_INFO("license=" text)
#define MODULE_DESCRIPTION(text) MODULE_INFO("description=" text)
#define MODULE_PARM_DESC(parameter, text) MODULE_INFO("parm=" #parameter ":" text)
MODULE_INFO("name={name}");
MODULE_INFO("vermagic={vermagic}");

#define module_param(variable, type, mode) \\
    static const struct kernel_param parameter_##variable SECTION("__param", 8) = {{ \\
        .name = #variable, .mod = &__this_module, .ops = param_ops_##type, \\
        .perm = mode, .level = -1, .arg = &variable }}
#define module_init(function) \\
    struct module __this_module SECTION(".gnu.linkonce.this_module", 64) = {{ \\
        .name = "{name}", .init = function }}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 when the kernel image or the host's tools do not allow it, with a sentence on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("image", type=Path, help="the kernel: a bzImage, or a vmlinux with its sections")
    parser.add_argument("directory", type=Path, help=f"where {MODULE_NAME}.ko and {PROGRAM_NAME} go")
    options = parser.parse_args(arguments)
    try:
        build(options.image, options.directory)
    except LassKvmError as error:
        print(f"{options.image} {error}", file=sys.stderr)
        return 2
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the module cannot be built: {error}", file=sys.stderr)
        return 2
    return 0


def build(image: Path, directory: Path) -> tuple[Path, Path]:
    """Build the module for the kernel *image* and the program that carries it; their paths in *directory*.

    Raises :class:`ImageError`, whose sentence goes on after the image's name, when the image lacks what is
    needed, and ``OSError`` or ``CalledProcessError`` when there is no gcc or it fails.
    """
    header = module_header(read_vmlinux(image))
    directory.mkdir(parents=True, exist_ok=True)
    module, program = directory / f"{MODULE_NAME}.ko", directory / PROGRAM_NAME
    with tempfile.TemporaryDirectory() as include:
        (Path(include) / "linux").mkdir()
        (Path(include) / "linux" / "module.h").write_text(header)
        compile_c(f"{MODULE_NAME}.c", module, *MODULE_FLAGS, "-nostdinc", "-I", include, "-c")
    image_name = f'-DMODULE_IMAGE="{module.resolve()}"'
    compile_c(f"{PROGRAM_NAME}.c", program, "-O1", "-Wall", "-Wextra", "-static", image_name)
    return module, program


def compile_c(source: str, output: Path, *flags: str) -> None:
    """Run gcc; what it complains about goes to stderr."""
    subprocess.run(["gcc", *flags, "-o", str(output), str(SOURCES / source)], check=True)


def read_vmlinux(image: Path) -> bytes:
    """The vmlinux in *image*, which may be one itself."""
    with image.open("rb") as stream:
        if stream.read(4) == b"\x7fELF":
            return image.read_bytes()
        return read_bzimage(stream).unpack()


def module_header(vmlinux: bytes) -> str:
    """The linux/module.h for the kernel *vmlinux*; raises :class:`ImageError` as :func:`build` does."""
    section = ELFFile(io.BytesIO(vmlinux)).get_section_by_name(".BTF")
    if section is None:
        raise ImageError("has no BTF type information; use a kernel built with CONFIG_DEBUG_INFO_BTF=y")
    found = VERMAGIC.search(vmlinux)
    if found is None:
        raise ImageError("has no module version string; use a kernel built with CONFIG_MODULES=y")
    vermagic = found[1].decode("ascii")
    if "modversions" in vermagic:
        raise ImageError("checks symbol versions of modules; use a kernel built with CONFIG_MODVERSIONS=n")
    btf = Btf(section.data())
    return HEADER.format(
        release=vermagic.partition(" ")[0],
        vermagic=vermagic,
        name=MODULE_NAME,
        module=c_declaration(btf.struct("module"), MODULE_MEMBERS),
        parameter=c_declaration(btf.struct("kernel_param"), PARAMETER_MEMBERS),
    )


def c_declaration(struct: Struct, members: Mapping[str, Member]) -> str:
    """*struct* in C with only the given *members*, each at its offset, and padding up to its size."""
    missing = members.keys() - struct.offsets.keys()
    if missing:
        raise ImageError(
            f"has a struct {struct.name} without {', '.join(sorted(missing))}; adapt build.py to it"
        )
    lines, end = [], 0
    for name, member in sorted(members.items(), key=lambda item: struct.offsets[item[0]]):
        lines += [padding(end, struct.offsets[name]), member.declaration]
        end = struct.offsets[name] + member.size
    lines.append(padding(end, struct.size))
    body = " ".join(f"{line};" for line in lines if line)
    return (
        f"struct {struct.name} {{ {body} }} __attribute__((packed, aligned({POINTER})));\n"
        f'_Static_assert(sizeof(struct {struct.name}) == {struct.size}, "layout of the running kernel");'
    )


def padding(start: int, end: int) -> str:
    """A declaration that fills the bytes from *start* to *end*; nothing when there are none."""
    return f"char padding{start}[{end - start}]" if end > start else ""


if __name__ == "__main__":
    sys.exit(main())
