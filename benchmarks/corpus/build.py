"""Packages and repositories -> a folder of 16 kHz FLAC files and a manifest. A killed run goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import filelock

from benchmarks.corpus.containers import Entries
from benchmarks.corpus.convert import SAMPLE_RATE, read_sound, segment_names, write_segment
from benchmarks.corpus.errors import CorpusError
from benchmarks.corpus.kinds import SoundKind
from benchmarks.corpus.manifest import (
    CorpusSummary,
    PackageRecord,
    SoundRecord,
    audio_folder,
    copyright_file,
    file_stem,
    forget,
    is_done,
    write_manifest,
    write_whole,
)
from benchmarks.corpus.members import COPYRIGHT, Member, Unreadable, audio_members
from benchmarks.corpus.packages import check_debian_tools, check_names, find_debs, read_package_list
from benchmarks.corpus.repositories import Repository, check_git_tools, read_repository_list
from m2d_embed.errors import AudioError

#: Called with a line on what just ended, the number of packages dealt with, and the number of all.
Progress = Callable[[str, int, int], None]


class Source(Protocol):
    """A package or repository: its name, version, and what tells whether it was made as it is now."""

    @property
    def package(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def sha256(self) -> str: ...

    def entries(self, downloads: Path) -> Entries:
        """Its files, downloaded if need be."""

    def statement(self, downloads: Path) -> str | None:
        """Its statement of licences, if that is not among its files."""

    def kind_and_licence(self, member: str) -> tuple[SoundKind, str] | None:
        """SoundKind and licence of a member, where the list of sources tells."""


def build_debian(
    out: Path, packages: Sequence[str] | None = None, workers: int = 1, on_progress: Progress | None = None
) -> CorpusSummary:
    """Build, or go on building, a training corpus from the audio in Debian packages.

    ``out`` gets ``packages/`` (the downloads), ``audio/<package>/*.flac`` (16 kHz mono, 16 bit, 0.1 to 30 s),
    ``copyright/<package>.txt``, ``done/<package>.json`` (a package with one is not made again), and ``manifest.csv``
    of everything in ``out``: file, seconds, kind, package, version, member, licence.

    Args:
        out: folder of the corpus.
        packages: their names; None means the list that comes with this package.
        workers: processes that download and convert packages; 1 is this one.
        on_progress: told of each package.

    Returns:
        The whole corpus in numbers, earlier runs included, and the packages of this run that are missing or failed.

    Raises:
        CorpusError: if a program or library is missing, ``apt-get`` knows none of the packages, a name is not one, or
            another process is at work in ``out``.
    """
    names = read_package_list() if packages is None else check_names(packages, "packages")
    check_debian_tools()
    with _alone(out, workers):
        debs, missing = find_debs(names)
        return _build(out, debs, missing, workers, on_progress)


def build_repositories(
    out: Path,
    repositories: Sequence[Repository] | None = None,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> CorpusSummary:
    """Build, or go on building, a training corpus from the sounds in public git repositories.

    ``out`` may be the folder of ``build_debian``: the manifest then tells of both, packages first, and what both have
    stays with the package. Files are as there, with ``owner+name`` where a package's name is.

    Args:
        out: folder of the corpus.
        repositories: what to take; None means the list that comes with this package.
        workers: processes that fetch and convert repositories; 1 is this one.
        on_progress: told of each repository.

    Returns:
        The whole corpus in numbers, earlier runs included, and the repositories of this run that failed.

    Raises:
        CorpusError: if git or a library is missing, or another process is at work in ``out``.
    """
    wanted = read_repository_list() if repositories is None else list(repositories)
    check_git_tools()
    with _alone(out, workers):
        return _build(out, wanted, {}, workers, on_progress)


@contextlib.contextmanager
def _alone(out: Path, workers: int) -> Iterator[None]:
    """Make sure that no other process works in a corpus."""
    if workers < 1:
        raise CorpusError(f"workers={workers}: at least one is needed.")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise CorpusError(f"{out}: another process is building a corpus here; wait for it to end.") from error


def _build(
    out: Path, sources: Sequence[Source], missing: dict[str, str], workers: int, on_progress: Progress | None
) -> CorpusSummary:
    report = on_progress or (lambda message, done, total: None)
    waiting = [source for source in sources if not is_done(out, source.package, source.sha256)]
    total = len(sources) + len(missing)
    settled = total - len(waiting)
    if settled:
        report(f"{len(sources) - len(waiting)} were done before, {len(missing)} are missing", settled, total)
    failed = {}
    try:
        for number, (source, result) in enumerate(_make_all(out, waiting, workers), start=settled + 1):
            if isinstance(result, str):
                failed[source.package] = result
                report(f"{source.package} failed: {result}", number, total)
            else:
                report(f"{source.package}: {result:.2f} h", number, total)
    finally:  # the manifest of an interrupted run tells of what it has done
        summary = write_manifest(out)
    return dataclasses.replace(summary, missing=missing, failed={**failed, **summary.failed})


def _make_all(out: Path, sources: Sequence[Source], workers: int) -> Iterator[tuple[Source, float | str]]:
    """Make sources, as many at a time as there are workers; yield each with its hours, or what went wrong."""
    if workers == 1:
        yield from ((source, _make(out, source)) for source in sources)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(_make, out, source): source for source in sources}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BrokenProcessPool as error:
            raise CorpusError(
                "A worker process was ended from outside, perhaps for want of memory; "
                "run again with fewer workers: what is done is not done again."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _make(out: Path, source: Source) -> float | str:
    try:
        record = make_package(out, source)
    except CorpusError as error:
        return str(error)
    return sum(seconds for sound in record.sounds for _, seconds in sound.segments) / 3600


def make_package(out: Path, source: Source) -> PackageRecord:
    """Download and convert one package or repository, and record it as finished.

    Raises:
        CorpusError: if it cannot be had or read.
    """
    work, downloads = out / "work" / file_stem(source.package), out / "packages"
    _remove(work)  # of a run that was killed
    forget(out, source.package)
    conversion = _Conversion(out, source, work / "audio")
    (scratch := work / "scratch").mkdir(parents=True)
    for member in audio_members(source.entries(downloads), scratch):
        conversion.add(member)
    if statement := source.statement(downloads):
        write_whole(copyright_file(out, source.package), statement)
    final = audio_folder(out, source.package)
    _remove(final)
    final.parent.mkdir(exist_ok=True)
    conversion.folder.rename(final)
    record = PackageRecord(source.package, source.version, source.sha256, **conversion.results())
    record.write(out)
    _remove(work)
    return record


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


class _Conversion:
    """The members of one package or repository, one after the other, into a folder of its own."""

    def __init__(self, out: Path, source: Source, folder: Path):
        self.folder = folder
        self._out, self._source = out, source
        self._sounds: list[SoundRecord] = []
        self._left_out = {"silent": 0, "too_short": 0}
        self._undecodable: dict[str, str] = {}
        self._taken: set[str] = set()
        folder.mkdir(parents=True)

    def add(self, member: Member | Unreadable) -> None:
        if isinstance(member, Unreadable):
            self._undecodable[member.path] = member.reason
        elif member.format == COPYRIGHT:
            text = member.file.read_text(encoding="utf-8", errors="replace")
            write_whole(copyright_file(self._out, self._source.package), text)
        else:
            self._add_sound(member)

    def _add_sound(self, member: Member) -> None:
        try:
            sound = read_sound(member.file, member.format)
        except AudioError as error:
            self._undecodable[member.path] = str(error).replace(f"{member.file}: ", "")
            return
        segments = []
        names = segment_names(member.path, len(sound.segments), self._taken)
        for name, segment in zip(names, sound.segments, strict=True):
            write_segment(self.folder / name, segment)
            segments.append((f"audio/{file_stem(self._source.package)}/{name}", len(segment) / SAMPLE_RATE))
        kind, licence = self._source.kind_and_licence(member.path) or (None, None)
        self._sounds.append(SoundRecord(member.path, sound.seconds, sound.sha256, segments, kind, licence))
        self._left_out["silent"] += sound.silent
        self._left_out["too_short"] += sound.too_short

    def results(self) -> dict[str, Any]:
        return {"sounds": self._sounds, "undecodable": self._undecodable, **self._left_out}
