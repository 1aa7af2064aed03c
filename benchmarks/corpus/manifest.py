"""What is done, package by package, and the manifest of it all.

Duplicates are found here, over all packages in the order of their names, then all repositories: so the result does not
depend on the order in which they were made, nor on the number of processes that made them.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.corpus.errors import CorpusError
from benchmarks.corpus.kinds import KINDS, SoundKind, kind_of
from benchmarks.corpus.licences import SEE_COPYRIGHT, Licences
from m2d_embed.files import atomic_write, write_text

COLUMNS = ("file", "seconds", "kind", "package", "version", "member", "licence")

_VERSION = 1  # of the records; one of another is made again
_FORMAT_WORD = re.compile(r"(?<![a-z0-9])(ogg|oga|opus|wav|flac|mp3|g722|gsm|[au]law|sln16)(?![a-z0-9])", re.IGNORECASE)
_SAME_LENGTH = 0.25  # seconds; codecs add some silence


@dataclass(frozen=True)
class SoundRecord:
    """One sound of a package: its member, length in seconds, hash of its samples, and its segments' (file, seconds).

    Files are relative to the corpus. ``kind`` and ``licence`` are those that its source states; where it is None, they
    are told from names, and from the package's statement of licences.
    """

    member: str
    seconds: float
    sha256: str
    segments: list[tuple[str, float]]
    kind: SoundKind | None = None
    licence: str | None = None


@dataclass(frozen=True)
class PackageRecord:
    """What became of one package, or of one repository, ``owner/name``.

    ``silent`` and ``too_short`` count segments left out; ``undecodable`` are members and what was wrong with each.
    """

    package: str
    version: str
    sha256: str
    sounds: list[SoundRecord]
    silent: int
    too_short: int
    undecodable: dict[str, str]

    def write(self, out: Path) -> None:
        """Leave the record in the corpus: the package is finished."""
        content = {"record_version": _VERSION, **dataclasses.asdict(self)}
        write_whole(_record_file(out, self.package), json.dumps(content, indent=1, ensure_ascii=False))

    @classmethod
    def read(cls, file: Path) -> PackageRecord | None:
        """Read a record; None if there is none, or one of another version.

        Raises:
            CorpusError: if it is damaged.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("record_version") != _VERSION:
                return None
            sounds = [SoundRecord(**sound) for sound in content.pop("sounds")]
            return cls(sounds=sounds, **content)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(
                f"{file}: not a record of a package ({error!r}); delete it to have that redone."
            ) from error


@dataclass(frozen=True)
class CorpusSummary:
    """A corpus in numbers.

    ``hours`` by kind; ``done`` packages; ``missing``, those that the archive lacks, and ``failed`` ones, each with the
    reason; ``duplicates`` counts sounds, ``silent`` (digital silence) and ``too_short`` (less than 0.1 s) segments that
    were left out; ``undecodable`` are members that should have been audio, as ``package: member``, with the reason.
    """

    hours: dict[SoundKind, float]
    done: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0
    silent: int = 0
    too_short: int = 0
    undecodable: dict[str, str] = field(default_factory=dict)


def is_done(out: Path, package: str, sha256: str) -> bool:
    """Whether a package with this checksum is finished in the corpus."""
    record = PackageRecord.read(_record_file(out, package))
    return record is not None and record.sha256 == sha256 and audio_folder(out, package).is_dir()


def forget(out: Path, package: str) -> None:
    """Have a package made again by the next run."""
    _record_file(out, package).unlink(missing_ok=True)


def audio_folder(out: Path, package: str) -> Path:
    """Where a package's segments lie."""
    return out / "audio" / file_stem(package)


def copyright_file(out: Path, package: str) -> Path:
    """Where a package's copyright file lies."""
    return out / "copyright" / f"{file_stem(package)}.txt"


def file_stem(package: str) -> str:
    """What files and folders of a package are called."""
    return package.replace("/", "+")


def write_manifest(out: Path) -> CorpusSummary:
    """Write ``manifest.csv`` of all finished packages; delete duplicates.

    A package that lacks sounds of which no other has a copy is forgotten, and is ``failed`` in the summary.

    Raises:
        CorpusError: if a record is damaged.
    """
    found = (PackageRecord.read(file) for file in sorted((out / "done").glob("*.json")))
    # Repositories after packages: what both have stays with the package.
    records = sorted((r for r in found if r is not None), key=lambda r: "/" in r.package)
    kept, duplicates, lost = _without_duplicates(out, records)
    rows = [row for record in records if record.package not in lost for row in _rows(out, record, kept)]
    manifest = out / "manifest.csv"
    with atomic_write(manifest) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    for package in lost:
        forget(out, package)
    seconds: defaultdict[SoundKind, float] = defaultdict(float)
    for _, length, kind, *_ in rows:
        seconds[kind] += float(length)
    return CorpusSummary(
        hours={kind: seconds[kind] / 3600 for kind in KINDS},
        done=tuple(record.package for record in records if record.package not in lost),
        failed=dict.fromkeys(lost, "some of its sounds have vanished; run again to have it redone"),
        duplicates=duplicates,
        silent=sum(record.silent for record in records),
        too_short=sum(record.too_short for record in records),
        undecodable={f"{r.package}: {member}": why for r in records for member, why in r.undecodable.items()},
    )


def write_whole(file: Path, content: str) -> None:
    """Write a text file into a folder that need not be there yet, wholly or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, content)


class _Seen:
    """Sounds that the corpus has: by samples, and by name, where one comes in several formats (``-ogg``, ``-wav``)."""

    def __init__(self) -> None:
        self._hashes: set[str] = set()
        self._lengths: dict[tuple[str, str], float] = {}

    def check_and_add(self, package: str, sound: SoundRecord) -> bool:
        name = _FORMAT_WORD.sub("", package), _FORMAT_WORD.sub("", sound.member)
        is_twin = abs(self._lengths.get(name, -1.0) - sound.seconds) < _SAME_LENGTH
        was_seen = is_twin or sound.sha256 in self._hashes
        self._hashes.add(sound.sha256)
        self._lengths.setdefault(name, sound.seconds)
        return was_seen


def _without_duplicates(
    out: Path, records: Iterable[PackageRecord]
) -> tuple[set[tuple[str, str]], int, dict[str, None]]:
    """(package, member) of the sounds to keep, number of the others, and packages some of whose sounds vanished."""
    seen, kept, absent, duplicates = _Seen(), set(), [], 0
    lost: dict[str, None] = {}
    for record, sound in _sounds(records):
        files = [out / file for file, _ in sound.segments]
        if not all(map(os.path.exists, files)):
            absent.append((record, sound))
        elif seen.check_and_add(record.package, sound):
            duplicates += 1
            for file in files:
                file.unlink()
        else:
            kept.add((record.package, sound.member))
    # An earlier run deleted these as duplicates of some that are still there.
    for record, sound in absent:
        duplicates += 1
        if not seen.check_and_add(record.package, sound):
            lost[record.package] = None
    return kept, duplicates, lost


def _sounds(records: Iterable[PackageRecord]) -> Iterator[tuple[PackageRecord, SoundRecord]]:
    return ((record, sound) for record in records for sound in record.sounds if sound.segments)


def _rows(
    out: Path, record: PackageRecord, kept: set[tuple[str, str]]
) -> Iterator[tuple[str, str, SoundKind, str, str, str, str]]:
    file = copyright_file(out, record.package)
    licences = Licences(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    for sound in record.sounds:
        if (record.package, sound.member) not in kept:
            continue
        kind = sound.kind or kind_of(record.package, sound.member)
        licence = sound.licence or (licences.of(sound.member) if licences else SEE_COPYRIGHT)
        for name, seconds in sound.segments:
            yield name, f"{seconds:.3f}", kind, record.package, record.version, sound.member, licence


def _record_file(out: Path, package: str) -> Path:
    return out / "done" / f"{file_stem(package)}.json"
