"""Public git repositories with sounds of a clear licence: the list, and what to take of each at the commit it names."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from benchmarks.corpus import git
from benchmarks.corpus.containers import Entries
from benchmarks.corpus.errors import CorpusError
from benchmarks.corpus.kinds import SoundKind
from benchmarks.corpus.lists import read_list
from benchmarks.corpus.manifest import file_stem
from m2d_embed.config import from_dict
from m2d_embed.errors import ConfigError
from m2d_embed.training.settings import parse_yaml, require

_BUILT_IN = "repositories.yaml"
_HOST = "https://github.com"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Part:
    """Files in a folder of a repository, all of one kind and one statement of licence.

    ``only`` and ``without`` are shell patterns of paths in the folder, as ``fnmatch.fnmatchcase`` understands them:
    ``*`` stands for slashes, too. The folder ``""`` is the whole repository.
    """

    folder: str
    kind: SoundKind
    licence: str
    only: tuple[str, ...] = ("*",)
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.licence.strip()), "licence is empty")
        place = PurePosixPath(self.folder)
        require(not place.is_absolute() and ".." not in place.parts, f"folder {self.folder!r} is not in the repository")

    def has(self, path: str) -> bool:
        """Whether a file of the repository is one of these."""
        place = PurePosixPath(path)
        if not place.is_relative_to(self.folder):
            return False
        name = str(place.relative_to(self.folder))
        return _fits(name, self.only) and not _fits(name, self.without)


@dataclass(frozen=True)
class Repository:
    """A repository, ``owner/name``, at a commit; its first part that has a path counts.

    ``licence_files`` are the paths in it that state the licences.
    """

    repository: str
    commit: str
    licence_files: tuple[str, ...]
    sounds: tuple[Part, ...]

    def __post_init__(self) -> None:
        name = self.repository
        is_name = _NAME.fullmatch(name) and not name.endswith((".git", "/.."))
        require(bool(is_name), f"{name!r} is not a repository's OWNER/NAME")
        require(bool(_COMMIT.fullmatch(self.commit)), f"{name}: {self.commit!r} is not 40 hexadecimal digits")
        require(bool(self.licence_files), f"{name}: no file is named that states the licences")
        require(bool(self.sounds), f"{name}: no sounds are named")

    @property
    def package(self) -> str:
        """What the manifest calls it."""
        return self.repository

    @property
    def version(self) -> str:
        """The commit."""
        return self.commit

    @property
    def sha256(self) -> str:
        """Of all that is to be taken, so that a list that has changed is followed."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def part_of(self, path: str) -> Part | None:
        """The part that a path in the repository is of; None if it is not to be taken."""
        return next((part for part in self.sounds if part.has(path)), None)

    def entries(self, downloads: Path) -> Entries:
        """Fetch the repository, unless ``downloads`` has it, and read the files of its parts.

        Raises:
            CorpusError: if it cannot be fetched, or has no file of one of its parts.
        """
        folder = self._fetched(downloads)
        paths = [path for path in git.list_paths(folder, self.commit) if self.part_of(path)]
        for part in self.sounds:
            if not any(map(part.has, paths)):
                raise CorpusError(f"{self.package}: folder {part.folder!r} has no file {' or '.join(part.only)}.")
        yield from git.read_files(folder, self.commit, paths)

    def statement(self, downloads: Path) -> str:
        """The text of the files that state the licences.

        Raises:
            CorpusError: if one is not there.
        """
        folder = self._fetched(downloads)
        texts = []
        for path, stream in git.read_files(folder, self.commit, self.licence_files):
            texts.append(f"{path}:\n\n{stream.read().decode('utf-8', 'replace').strip()}\n")
        return "\n".join(texts)

    def kind_and_licence(self, member: str) -> tuple[SoundKind, str] | None:
        """What the list says of a member; of one in an archive, what it says of that archive."""
        parts = (self.part_of(str(path)) for path in (member, *PurePosixPath(member).parents))
        return next(((part.kind, part.licence) for part in parts if part), None)

    def _fetched(self, downloads: Path) -> Path:
        folder = downloads / f"{file_stem(self.package)}.git"
        try:
            git.fetch_commit(f"{_HOST}/{self.package}.git", self.commit, folder)
        except CorpusError as error:
            raise CorpusError(f"{self.package}: {error}") from error
        return folder


def read_repository_list(file: Path | None = None) -> list[Repository]:
    """Repositories of a YAML list of mappings, the fields of ``Repository`` and of ``Part``.

    Args:
        file: the list; None is the one that comes with this package.

    Raises:
        CorpusError: if the file cannot be read, names no repository or one twice, or says something else.
    """
    name, text = read_list(file, _BUILT_IN)
    try:
        rows = parse_yaml(text, name)
        if not isinstance(rows, list) or not rows:
            raise CorpusError(f"{name}: a list of repositories is expected.")
        found = [_repository(row, f"{name}, repository {number}") for number, row in enumerate(rows, start=1)]
    except ConfigError as error:
        raise CorpusError(str(error)) from error
    names = [repository.package for repository in found]
    twice = [package for package in dict.fromkeys(names) if names.count(package) > 1]
    if twice:
        raise CorpusError(f"{name}: {', '.join(twice)} is named twice; give one repository all its sounds.")
    return found


def check_git_tools() -> None:
    """Raise CorpusError if this machine lacks a program or a library that building the corpus needs."""
    if shutil.which("git") is None:
        raise CorpusError("git was not found: this corpus is made of git repositories; install it.")
    if importlib.util.find_spec("av") is None:
        raise CorpusError("PyAV is needed for this corpus: pip install 'm2d-embed[pretrain]'.")


def _repository(row: object, where: str) -> Repository:
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: a mapping of {', '.join(Repository.__dataclass_fields__)} is expected.")
    try:
        repository: Repository = from_dict(Repository, row)
    except ConfigError as error:
        raise CorpusError(f"{where}: {str(error).rstrip('.')}.") from error
    return repository


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
