"""apt with a state of its own: asks the mirror this host is configured for without touching the host's
package lists.

Signatures are checked as always; settings of the host that would switch that off are overruled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lasskvm.errors import HostError
from lasskvm.images.apt_sources import DebianArchive

__all__ = ["PrivateApt", "require_tools", "run_tool"]

_TOOLS = ("apt-get", "apt-cache", "apt-config", "dpkg-deb")

#: Read after the host's configuration. Hooks of the host belong to its own package lists, not to these.
_CONFIGURATION = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Default-Release;
#clear APT::Architectures;
#clear Acquire::Languages;
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Get::AllowUnauthenticated "false";
APT::Update::Error-Mode "any";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::Check-Valid-Until "true";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::Languages { "none"; };
Acquire::PDiffs "false";
Acquire::Retries "2";
"""

#: What apt says in these cases, in any of its versions since 1.8, in lower case.
_SIGNATURE_WORDS = (
    "no_pubkey",
    "badsig",
    "expkeysig",
    "is not signed",
    "invalid signature",
    "signatures couldn't be verified",
    "signatures were invalid",
    "openpgp signature verification failed",
    "gpg error",
    "unauthenticated packages",
)
_DATE_WORDS = ("is not valid yet", "is expired")
_SPACE_WORDS = ("no space left", "don't have enough free space", "disk quota exceeded", "file too large")
_NOT_FOUND_WORDS = ("does not have a release file", "404 ")
_ERROR_MARKS = ("E: ", "W: ", "Err:")


class PrivateApt:
    """apt-get and apt-cache on one suite of *archive*, with all state in *folder*, which must exist."""

    def __init__(self, folder: Path, archive: DebianArchive, suite: str) -> None:
        self._folder = folder
        for part in ("lists/partial", "archives/partial", "packages"):
            (folder / part).mkdir(parents=True)
        configuration = folder / "apt.conf"
        configuration.write_text(_CONFIGURATION)
        sources = folder / "sources.list"
        sources.write_text(archive.source_line(suite) + "\n")
        places = {
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": os.devnull,
            "Dir::State::extended_states": folder / "extended_states",
            "Dir::Cache": folder,
            "Dir::Cache::archives": folder / "archives",
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": os.devnull,
            "Dir::Etc::preferencesparts": "-",
        }
        self._options = ["-c", str(configuration), *(f"-o{key}={value}" for key, value in places.items())]
        self._place = f"suite {suite} of {archive.uri}"

    def update(self) -> None:
        """Get the package lists; raises :class:`HostError` when that fails or their signature is not good."""
        self._run("apt-get", "update")

    def package_names(self, prefix: str) -> list[str]:
        """The packages of the suite whose name starts with *prefix*."""
        return self._run("apt-cache", "pkgnames", prefix).split()

    def download(self, names: Sequence[str]) -> list[Path]:
        """Get the newest version of each package; their files, in no particular order."""
        target = self._folder / "packages"
        self._run("apt-get", "download", *names, folder=target)
        return list(target.glob("*.deb"))

    def _run(self, tool: str, *arguments: str, folder: Path | None = None) -> str:
        result = run_tool(tool, *self._options, *arguments, folder=folder or self._folder)
        if result.returncode:
            raise HostError(self._explain(" ".join((tool, arguments[0])), result))
        return result.stdout

    def _explain(self, command: str, result: subprocess.CompletedProcess[str]) -> str:
        said = result.stderr + result.stdout
        lowered = said.lower()
        detail = _first_complaint(said) or f"status {result.returncode}"
        if any(words in lowered for words in _SPACE_WORDS):
            return f"there is no space left for {self._place} ({detail}); make room or set XDG_CACHE_HOME"
        if any(words in lowered for words in _SIGNATURE_WORDS):
            advice = "update the package debian-archive-keyring or use another mirror"
            return f"the signature of {self._place} is not good ({detail}); {advice}"
        if any(words in lowered for words in _DATE_WORDS):
            return f"{self._place} is out of date ({detail}); check this host's clock or use another mirror"
        if any(words in lowered for words in _NOT_FOUND_WORDS):
            return f"{self._place} was not found ({detail}); check the suite's name and the mirror"
        return f"`{command}` failed for {self._place} ({detail}); check the network and apt's configuration"


def require_tools() -> None:
    """Raise :class:`HostError` when apt or dpkg is not installed."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise HostError(
            f"{missing[0]} was not found, and images are pulled with apt and dpkg; "
            "install them or give `lasskvm run` a kernel file"
        )


def run_tool(tool: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run *tool* without input and with messages in English; raises :class:`HostError` when it cannot be
    started."""
    try:
        return subprocess.run(
            [tool, *arguments],
            cwd=folder,
            env={**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise HostError(f"{tool} cannot be run ({error.strerror}); reinstall it") from error


def _first_complaint(said: str) -> str:
    """The first line in which apt says what is wrong: its errors before its warnings."""
    lines = [line.strip() for line in said.splitlines()]
    for mark in _ERROR_MARKS:
        for line in lines:
            if line.startswith(mark):
                return line.removeprefix(mark).rstrip(".;")
    return ""
