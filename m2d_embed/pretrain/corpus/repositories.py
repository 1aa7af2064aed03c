"""Public git repositories with sounds of a clear licence: the list, and what to take of each at the commit it names."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from m2d_embed.pretrain.corpus import git
from m2d_embed.pretrain.corpus.containers import Entries
from m2d_embed.pretrain.corpus.errors import CorpusError
from m2d_embed.pretrain.corpus.kinds import KINDS, Kind
from m2d_embed.pretrain.corpus.lists import read_lines
from m2d_embed.pretrain.corpus.manifest import file_stem

_BUILT_IN = "repositories.tsv"
_HOST = "https://github.com"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FIELDS = 6


@dataclass(frozen=True)
class Part:
    """Sounds of a repository: those whose paths ``under`` is found in, all of one kind and one statement of licence."""

    under: re.Pattern[str]
    kind: Kind
    licence: str


@dataclass(frozen=True)
class Repository:
    """A repository, ``owner/name``, at a commit; its first part that a path fits counts.

    ``licence_files`` are the paths in it that state the licences.
    """

    package: str
    commit: str
    parts: tuple[Part, ...]
    licence_files: tuple[str, ...]

    @property
    def version(self) -> str:
        """The commit."""
        return self.commit

    @property
    def sha256(self) -> str:
        """Of all that is to be taken, so that a list that has changed is followed."""
        said = [(part.under.pattern, part.kind, part.licence) for part in self.parts]
        return hashlib.sha256(repr((self.commit, said, self.licence_files)).encode()).hexdigest()

    def part_of(self, path: str) -> Part | None:
        """The part that a path in the repository is of; None if it is not to be taken."""
        return next((part for part in self.parts if part.under.search(path)), None)

    def entries(self, downloads: Path) -> Entries:
        """Fetch the repository, unless ``downloads`` has it, and read the files of its parts.

        Raises:
            CorpusError: if it cannot be fetched, or has no file of one of its parts.
        """
        folder = self._fetched(downloads)
        paths = [path for path in git.list_paths(folder, self.commit) if self.part_of(path)]
        for part in self.parts:
            if not any(part.under.search(path) for path in paths):
                raise CorpusError(f"{self.package}: no file's path has {part.under.pattern!r} in it.")
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

    def kind_and_licence(self, member: str) -> tuple[Kind, str] | None:
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
    """Repositories of a tab-separated file; ``#`` begins a comment line.

    The columns are owner/name, commit (40 hexadecimal digits), a regular expression to be found in the paths of the
    sounds, their kind, their licence, and the files that state it, separated by commas. Lines on one repository must
    have one commit.

    Args:
        file: the list; None is the one that comes with this package.

    Raises:
        CorpusError: if the file cannot be read, names no repository, or has a line that says something else.
    """
    name, lines = read_lines(file, _BUILT_IN)
    found: dict[str, Repository] = {}
    for number, line in lines:
        where = f"{name}, line {number}"
        read = _parse(line, where)
        found[read.package] = _merged(found.get(read.package, read), read, where)
    if not found:
        raise CorpusError(f"{name}: no repository is named.")
    return list(found.values())


def check_git_tools() -> None:
    """Raise CorpusError if this machine lacks a program or a library that building the corpus needs."""
    if shutil.which("git") is None:
        raise CorpusError("git was not found: this corpus is made of git repositories; install it.")
    if importlib.util.find_spec("av") is None:
        raise CorpusError("PyAV is needed for this corpus: pip install 'm2d-embed[pretrain]'.")


def _parse(line: str, where: str) -> Repository:
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) != _FIELDS or not all(fields):
        raise CorpusError(f"{where}: {_FIELDS} columns separated by tabs are expected, none empty: {line!r}.")
    name, commit, under, kind, licence, licence_files = fields
    if not _NAME.fullmatch(name) or name.endswith((".git", "/..")):
        raise CorpusError(f"{where}: {name!r} is not a repository's OWNER/NAME.")
    if not _COMMIT.fullmatch(commit):
        raise CorpusError(f"{where}: {commit!r} is not a commit's 40 hexadecimal digits.")
    kinds = [known for known in KINDS if known == kind]
    if not kinds:
        raise CorpusError(f"{where}: {kind!r} is none of the kinds {', '.join(KINDS)}.")
    try:
        pattern = re.compile(under)
    except re.error as error:
        raise CorpusError(f"{where}: {under!r} is not a regular expression ({error}).") from error
    files = tuple(path.strip() for path in licence_files.split(","))
    return Repository(name, commit, (Part(pattern, kinds[0], licence),), files)


def _merged(first: Repository, second: Repository, where: str) -> Repository:
    if first is second:
        return first
    if first.commit != second.commit:
        raise CorpusError(f"{where}: {second.package} has another commit here than before, {first.commit}.")
    files = tuple(dict.fromkeys([*first.licence_files, *second.licence_files]))
    return Repository(first.package, first.commit, first.parts + second.parts, files)
