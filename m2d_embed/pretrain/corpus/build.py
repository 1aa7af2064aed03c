"""Debian packages -> a folder of 16 kHz FLAC files and a manifest. A run that was killed goes on where it was."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import filelock

from m2d_embed.errors import AudioError
from m2d_embed.pretrain.corpus.convert import SAMPLE_RATE, read_sound, segment_names, write_segment
from m2d_embed.pretrain.corpus.errors import CorpusError
from m2d_embed.pretrain.corpus.manifest import (
    CorpusSummary,
    PackageRecord,
    SoundRecord,
    audio_folder,
    copyright_file,
    forget,
    is_done,
    write_manifest,
    write_whole,
)
from m2d_embed.pretrain.corpus.members import COPYRIGHT, Member, Unreadable, audio_members
from m2d_embed.pretrain.corpus.packages import (
    Deb,
    check_names,
    check_tools,
    download,
    find_debs,
    read_package_list,
)

#: Called with a line on what just ended, the number of packages dealt with, and the number of all.
Progress = Callable[[str, int, int], None]


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
    if workers < 1:
        raise CorpusError(f"workers={workers}: at least one is needed.")
    report = on_progress or (lambda message, done, total: None)
    names = read_package_list() if packages is None else check_names(packages, "packages")
    check_tools()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".lock", timeout=0):
            return _build(out, names, workers, report)
    except filelock.Timeout as error:
        raise CorpusError(f"{out}: another process is building a corpus here; wait for it to end.") from error


def _build(out: Path, names: Sequence[str], workers: int, report: Progress) -> CorpusSummary:
    debs, missing = find_debs(names)
    waiting = [deb for deb in debs if not is_done(out, deb.package, deb.sha256)]
    settled = len(names) - len(waiting)
    if settled:
        report(f"{len(debs) - len(waiting)} packages were done before, {len(missing)} are missing", settled, len(names))
    failed = {}
    try:
        for number, (deb, result) in enumerate(_make_all(out, waiting, workers), start=settled + 1):
            if isinstance(result, str):
                failed[deb.package] = result
                report(f"{deb.package} failed: {result}", number, len(names))
            else:
                report(f"{deb.package}: {result:.2f} h", number, len(names))
    finally:  # the manifest of an interrupted run tells of what it has done
        summary = write_manifest(out)
    return dataclasses.replace(summary, missing=missing, failed={**failed, **summary.failed})


def _make_all(out: Path, debs: Sequence[Deb], workers: int) -> Iterator[tuple[Deb, float | str]]:
    """Make packages, as many at a time as there are workers; yield each with its hours, or what went wrong."""
    if workers == 1:
        yield from ((deb, _make(out, deb)) for deb in debs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(_make, out, deb): deb for deb in debs}
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


def _make(out: Path, deb: Deb) -> float | str:
    try:
        record = make_package(out, deb, download(deb, out / "packages"))
    except CorpusError as error:
        return str(error)
    return sum(seconds for sound in record.sounds for _, seconds in sound.segments) / 3600


def make_package(out: Path, deb: Deb, file: Path) -> PackageRecord:
    """Convert one downloaded package and record it as finished.

    Raises:
        CorpusError: if the package cannot be read.
    """
    work = out / "work" / deb.package
    _remove(work)  # of a run that was killed
    forget(out, deb.package)
    conversion = _Conversion(out, deb.package, work / "audio")
    (scratch := work / "scratch").mkdir(parents=True)
    for member in audio_members(file, scratch):
        conversion.add(member)
    final = audio_folder(out, deb.package)
    _remove(final)
    final.parent.mkdir(exist_ok=True)
    conversion.folder.rename(final)
    record = PackageRecord(deb.package, deb.version, deb.sha256, **conversion.results())
    record.write(out)
    _remove(work)
    return record


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


class _Conversion:
    """The members of one package, one after the other, into a folder of its own."""

    def __init__(self, out: Path, package: str, folder: Path):
        self.folder = folder
        self._out, self._package = out, package
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
            write_whole(copyright_file(self._out, self._package), text)
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
            segments.append((f"audio/{self._package}/{name}", len(segment) / SAMPLE_RATE))
        self._sounds.append(SoundRecord(member.path, sound.seconds, sound.sha256, segments))
        self._left_out["silent"] += sound.silent
        self._left_out["too_short"] += sound.too_short

    def results(self) -> dict[str, Any]:
        return {"sounds": self._sounds, "undecodable": self._undecodable, **self._left_out}
