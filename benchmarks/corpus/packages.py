"""Debian packages: the list of those with audio, and verified downloads by ``apt-get``, which needs no root."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from benchmarks.corpus import containers
from benchmarks.corpus.containers import Entries
from benchmarks.corpus.errors import CorpusError
from benchmarks.corpus.lists import read_list

_BUILT_IN = "debian-packages.tsv"
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")  # Debian policy 5.6.7
_SHA256 = "SHA256:"


@dataclass(frozen=True)
class Deb:
    """One package as the archive has it now: ``file_name`` is what ``apt-get`` calls it, ``sha256`` in hexadecimal."""

    package: str
    version: str
    url: str
    file_name: str
    sha256: str

    def entries(self, downloads: Path) -> Entries:
        """Download the package, unless ``downloads`` has it, and read its files; one is its statement of licences.

        Raises:
            CorpusError: if it cannot be downloaded, or is damaged.
        """
        yield from containers.deb_entries(download(self, downloads))

    def statement(self, downloads: Path) -> None:
        """Nothing apart from what is among the files."""

    def kind_and_licence(self, member: str) -> None:
        """Nothing: kinds are told from names, licences from the statement."""


def read_package_list(file: Path | None = None) -> list[str]:
    """Package names, the first column of a tab-separated file; ``#`` begins a comment line, a name counts once.

    Args:
        file: the list; None is the one that comes with this package.

    Raises:
        CorpusError: if the file cannot be read, names no package, or has a line that does not begin with one.
    """
    name, text = read_list(file, _BUILT_IN)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return check_names([line.split("\t")[0].strip() for line in lines], name)


def check_names(packages: Sequence[str], where: str) -> list[str]:
    """Package names, each once and in their order.

    Raises:
        CorpusError: if there is none, or one cannot be a package's name.
    """
    for package in packages:
        if not _NAME.fullmatch(package):
            raise CorpusError(f"{where}: {package!r} is not the name of a Debian package.")
    if not packages:
        raise CorpusError(f"{where}: no package is named.")
    return list(dict.fromkeys(packages))


def check_debian_tools() -> None:
    """Raise CorpusError if this machine lacks a program or a library that building the corpus needs."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise CorpusError(f"{program} was not found: this corpus is built on Debian or one of its derivatives.")
    if importlib.util.find_spec("av") is None:
        raise CorpusError("PyAV is needed for this corpus: pip install 'm2d-embed[pretrain]'.")


def find_debs(packages: Sequence[str]) -> tuple[list[Deb], dict[str, str]]:
    """Ask the archive for packages.

    Returns:
        The packages found, in the order asked for, and for each of the others what ``apt-get`` said.

    Raises:
        CorpusError: if ``apt-get`` knows none of the packages.
    """
    found, _ = _print_uris(packages)
    missing = {}
    for package in packages:
        if package not in found:  # apt-get may give up on all because of one
            alone, complaint = _print_uris([package])
            found.update(alone)
            if package not in alone:
                missing[package] = complaint
    if not found:
        raise CorpusError(
            f"apt-get knows none of the {len(packages)} packages ({complaint}). "
            "Run `apt-get update` as root, and see that the sources name Debian's section main."
        )
    return [found[package] for package in packages if package in found], missing


def download(deb: Deb, folder: Path) -> Path:
    """Download a package, unless ``folder`` has it already, and verify it.

    Raises:
        CorpusError: if the download fails, or its SHA256 is not the archive's.
    """
    file = folder / deb.file_name
    if file.is_file() and _sha256(file) == deb.sha256:
        return file
    file.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    result = _apt_get("download", f"{deb.package}={deb.version}", folder=folder)
    if result.returncode or not file.is_file():
        raise CorpusError(f"{deb.package}: the download of {deb.url} failed: {_complaint(result)}.")
    actual = _sha256(file)
    if actual != deb.sha256:
        file.unlink()
        raise CorpusError(
            f"{deb.package}: {deb.url} came with SHA256 {actual}, the archive's index says {deb.sha256}; "
            "it was thrown away. Run `apt-get update` as root and start again."
        )
    return file


def _print_uris(packages: Sequence[str]) -> tuple[dict[str, Deb], str]:
    result = _apt_get("download", "--print-uris", *packages)
    debs = [_parse_uri(line) for line in result.stdout.splitlines() if line.startswith("'")]
    return {deb.package: deb for deb in debs}, _complaint(result)


def _parse_uri(line: str) -> Deb:
    """``'URL' name_version_arch.deb size SHA256:hex``; a colon in the version is written ``%3a``."""
    fields = shlex.split(line)
    if len(fields) != 4 or not fields[3].startswith(_SHA256) or "/" in fields[1] or fields[1].count("_") != 2:
        raise CorpusError(f"apt-get printed {line!r}, where the URL, name, size and SHA256 of a package were expected.")
    url, file_name, _, checksum = fields
    package, version, _ = file_name.split("_")
    return Deb(package, unquote(version), url, file_name, checksum.removeprefix(_SHA256).lower())


def _apt_get(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}  # messages and names that can be read back
    return subprocess.run(
        ["apt-get", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def _complaint(result: subprocess.CompletedProcess[str]) -> str:
    errors = [line.removeprefix("E: ") for line in result.stderr.splitlines() if line.startswith("E:")]
    return "; ".join(errors).rstrip(".") or f"apt-get ended with status {result.returncode} and no message"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
