"""Which Debian archive a host is configured for, from its apt sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from lasskvm.errors import HostError
from lasskvm.images import apt_sources
from lasskvm.images.apt_sources import DebianArchive, choose_archive, parse_sources


@pytest.fixture(autouse=True)
def no_default_keyring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt_sources, "DEFAULT_KEYRING", tmp_path / "absent.gpg")


@pytest.fixture
def keyring(tmp_path: Path) -> Path:
    path = tmp_path / "debian.gpg"
    path.write_bytes(b"keys")
    return path


def save(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_one_line_sources_are_read_with_their_keyring(tmp_path: Path, keyring: Path) -> None:
    text = (
        "# deb http://commented.example/debian sid main\n"
        f"deb [arch=amd64 signed-by={keyring}] http://a.example/debian/ stable main contrib # note\n"
        "deb-src http://source.example/debian stable main\n"
        "\n"
        "deb http://b.example/other stable main\n"
    )
    assert parse_sources(save(tmp_path, "x.list", text)) == [
        DebianArchive("http://a.example/debian", keyring),
        DebianArchive("http://b.example/other"),
    ]


def test_deb822_sources_are_read_with_their_keyring(tmp_path: Path, keyring: Path) -> None:
    text = (
        "Types: deb deb-src\n# a comment\nURIs: http://a.example/debian\n http://b.example/debian/\n"
        f"Suites: stable\nComponents: main\nSigned-By: {keyring}\n\n"
        "Types: deb\nURIs: http://off.example/debian\nEnabled: no\n\n"
        "Types: deb-src\nURIs: http://source.example/debian\n"
    )
    assert parse_sources(save(tmp_path, "x.sources", text)) == [
        DebianArchive("http://a.example/debian", keyring),
        DebianArchive("http://b.example/debian", keyring),
    ]


@pytest.mark.parametrize(
    "signed_by", ["\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQ", "0123ABCD", "/absent.gpg"]
)
def test_a_key_that_is_no_keyring_file_gives_way_to_the_default_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keyring: Path, signed_by: str
) -> None:
    monkeypatch.setattr(apt_sources, "DEFAULT_KEYRING", keyring)
    text = f"Types: deb\nURIs: http://a.example/debian\nSigned-By: {signed_by}\n"
    assert parse_sources(save(tmp_path, "x.sources", text)) == [
        DebianArchive("http://a.example/debian", keyring)
    ]


def test_an_unreadable_source_file_has_no_archives(tmp_path: Path) -> None:
    assert parse_sources(tmp_path / "absent.list") == []


def test_the_archive_that_apt_knows_to_be_debian_is_chosen_with_its_own_keyring(keyring: Path) -> None:
    configured = [
        DebianArchive("http://a.example/debian"),
        DebianArchive("http://cache.example/deb", keyring),
    ]
    assert choose_archive(configured, ["http://cache.example/deb/"]) == configured[1]


@pytest.mark.parametrize(
    "uri",
    [
        "http://a.example/debian",
        "https://a.example/mirrors/debian",
        "mirror+file:/etc/apt/mirrors/debian.list",
    ],
)
def test_a_host_that_never_updated_its_lists_is_judged_by_the_uri(uri: str) -> None:
    others = [DebianArchive("http://a.example/debian-security"), DebianArchive("http://a.example/ubuntu")]
    assert choose_archive([*others, DebianArchive(uri)], []) == DebianArchive(uri)


def test_a_host_without_a_debian_archive_is_told_so() -> None:
    with pytest.raises(HostError, match="no Debian archive configured; add one"):
        choose_archive([DebianArchive("http://a.example/ubuntu")], [])


def test_the_source_line_keeps_signatures_on(keyring: Path) -> None:
    assert DebianArchive("http://a.example/debian", keyring).source_line("sid") == (
        f"deb [arch=amd64 signed-by={keyring}] http://a.example/debian sid main"
    )
    assert DebianArchive("http://a.example/debian").source_line("sid") == (
        "deb [arch=amd64] http://a.example/debian sid main"
    )
