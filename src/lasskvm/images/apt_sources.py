"""Which Debian archive this host is configured for, and with which keys apt checks it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lasskvm.errors import HostError

__all__ = ["DEFAULT_KEYRING", "DebianArchive", "choose_archive", "parse_sources"]

#: Where the package debian-archive-keyring puts the keys of the archive.
DEFAULT_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_ARCHIVE_NAME = "debian"
_LIST_SUFFIX, _DEB822_SUFFIX = ".list", ".sources"


@dataclass(frozen=True)
class DebianArchive:
    """An archive: its URI without a slash at the end, and the keyring that signs it (None: apt's trusted
    keys)."""

    uri: str
    keyring: Path | None = None

    @classmethod
    def at(cls, uri: str) -> DebianArchive:
        """The archive at *uri*, checked with the keys of debian-archive-keyring when this host has them."""
        return cls(_normalized(uri), _default_keyring())

    def source_line(self, suite: str) -> str:
        """The line for sources.list that stands for the main component of *suite*."""
        options = f"[arch=amd64 signed-by={self.keyring}]" if self.keyring else "[arch=amd64]"
        return f"deb {options} {self.uri} {suite} main"


def parse_sources(path: Path) -> list[DebianArchive]:
    """The archives of one apt source file, one-line or deb822 style (sources.list(5)); unreadable files
    have none."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    if path.suffix == _DEB822_SUFFIX:
        return list(_parse_deb822(text))
    return list(_parse_one_line(text))


def choose_archive(configured: list[DebianArchive], known: list[str]) -> DebianArchive:
    """The Debian archive among the *configured* ones.

    *known* are the URIs of which apt's lists say that they are Debian's; a host that has never run ``apt-get
    update`` has none, then the last part of the URI tells. Raises :class:`HostError` when there is none.
    """
    by_uri = {archive.uri: archive for archive in configured}
    for uri in (_normalized(uri) for uri in known):
        return by_uri.get(uri) or DebianArchive.at(uri)
    for archive in configured:
        if Path(urlsplit(archive.uri).path).stem == _ARCHIVE_NAME:
            return archive
    raise HostError(
        "apt on this host has no Debian archive configured; add one to its sources or name a mirror"
    )


def _normalized(uri: str) -> str:
    return uri.rstrip("/")


def _default_keyring() -> Path | None:
    return DEFAULT_KEYRING if DEFAULT_KEYRING.is_file() else None


def _archive(uri: str, signed_by: str) -> DebianArchive:
    # Fingerprints and keys written out in the source cannot be handed on as a path; Debian's own keyring can
    keyring = Path(signed_by.split(",")[0].strip())
    usable = keyring.is_absolute() and keyring.is_file()
    return DebianArchive(_normalized(uri), keyring if usable else _default_keyring())


def _parse_one_line(text: str) -> Iterator[DebianArchive]:
    for line in text.splitlines():
        kind, _, rest = line.partition("#")[0].strip().partition(" ")
        options, rest = _split_options(rest.strip())
        words = rest.split()
        if kind == "deb" and words:
            yield _archive(words[0], options.get("signed-by", ""))


def _split_options(rest: str) -> tuple[dict[str, str], str]:
    if not rest.startswith("["):
        return {}, rest
    inside, _, behind = rest[1:].partition("]")
    pairs = (word.partition("=") for word in inside.split())
    return {key.lower(): value for key, _, value in pairs}, behind


def _parse_deb822(text: str) -> Iterator[DebianArchive]:
    fields: dict[str, str] = {}
    name = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            yield from _stanza_archives(fields)
            fields = {}
        elif line[0].isspace():
            fields[name] = f"{fields.get(name, '')} {line.strip()}"
        else:
            name, _, value = line.partition(":")
            name = name.lower()
            fields[name] = value.strip()


def _stanza_archives(fields: dict[str, str]) -> Iterator[DebianArchive]:
    if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in (
        "no",
        "false",
        "0",
    ):
        for uri in fields.get("uris", "").split():
            yield _archive(uri, fields.get("signed-by", ""))
