"""The initramfs builder writes newc archives; a parser of the test's own reads them."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st
from newc import parse_newc

from lasskvm.images import Initramfs


def test_files_directories_links_and_devices_come_out_as_they_went_in() -> None:
    initramfs = Initramfs()
    initramfs.add_directory("tmp", 0o1777)
    initramfs.add_file("init", b"#!/bin/sh\n")
    initramfs.add_symlink("sh", "busybox")
    initramfs.add_device("console", stat.S_IFCHR, 5, 1)
    tmp, init, link, console = parse_newc(initramfs.build())
    assert (tmp.name, tmp.fields["mode"], tmp.fields["nlink"]) == ("tmp", 0o041777, 2)
    assert (init.name, init.fields["mode"], init.data) == ("init", 0o100755, b"#!/bin/sh\n")
    assert (link.name, link.fields["mode"], link.data) == ("sh", 0o120777, b"busybox")
    assert (console.fields["mode"], console.fields["rdevmajor"], console.fields["rdevminor"]) == (
        0o020600,
        5,
        1,
    )


def test_missing_parents_are_added_before_their_children_and_once() -> None:
    initramfs = Initramfs()
    initramfs.add_file("a/b/c", b"")
    initramfs.add_file("/a/./b//d", b"")
    assert [entry.name for entry in parse_newc(initramfs.build())] == ["a", "a/b", "a/b/c", "a/b/d"]


def test_the_archive_is_deterministic_and_belongs_to_root_at_time_0() -> None:
    def build() -> bytes:
        initramfs = Initramfs()
        initramfs.add_file("x", b"1")
        initramfs.add_file("y", b"22")
        return initramfs.build()

    assert build() == build()
    entries = parse_newc(build())
    assert [(entry.fields["mtime"], entry.fields["uid"], entry.fields["gid"]) for entry in entries] == [
        (0, 0, 0)
    ] * 2
    assert len({entry.fields["ino"] for entry in entries}) == 2


def test_building_twice_and_adding_between_works() -> None:
    initramfs = Initramfs()
    initramfs.add_file("x", b"")
    initramfs.build()
    initramfs.add_file("y", b"")
    assert [entry.name for entry in parse_newc(initramfs.build())] == ["x", "y"]


@pytest.mark.parametrize("path", ["", "/", ".", "../x", "a/../b", "a\0b"])
def test_a_path_that_names_nothing_in_the_archive_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="does not name anything"):
        Initramfs().add_file(path, b"")


def test_a_path_is_added_once() -> None:
    initramfs = Initramfs()
    initramfs.add_file("init", b"")
    with pytest.raises(ValueError, match="already"):
        initramfs.add_file("/init", b"")


@given(st.dictionaries(st.text("abcé ", min_size=1, max_size=9), st.binary(max_size=70)))
def test_any_contents_survive(files: dict[str, bytes]) -> None:
    initramfs = Initramfs()
    for name, data in files.items():
        initramfs.add_file(name, data)
    archive = initramfs.build()
    assert len(archive) % 512 == 0
    assert {entry.name: entry.data for entry in parse_newc(archive)} == files
