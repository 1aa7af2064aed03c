"""Results of long jobs, kept piece by piece: what a killed run has done is there for the next one, and nothing else is.

A store is a folder::

    settings.json      what every result depends on; a store of other settings is refused
    part-3f2a.json     the record of a part: its results, and size and CRC-32 of each of its files
    part-3f2a.*.npy    files of a part; where the results are a folder of files themselves, these lie there instead
    *.lock             who is at work

A part is written in one go, its record last, and counts from then on. Every file of it is on the disk before. So
whatever is killed, and whenever, the next run finds parts that are whole, and removes the rest. ``check`` compares the
files with their records: results whose files are lost or damaged are forgotten, with a warning, and so made anew.

A result has a key, the absolute path of a file or a hash of its content, and the stamp that the file had *before* it
was read. ``done`` is asked with the stamp of now: another size, time or inode means that it is to be done again.

``claim`` keeps two runs from the same work; shares of one job may be at work side by side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from shutil import rmtree
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from m2d_embed.errors import ConfigError
from m2d_embed.files import TEMPORARY, atomic_write, write_json
from m2d_embed.jobs.arrays import Array, ArrayReader, write_array
from m2d_embed.jobs.index import ABSENT, Hashes, Index, hashes_of

log = logging.getLogger("m2d_embed")

Numbers = npt.NDArray[np.int64]
Stamp = tuple[int, ...]

_SETTINGS = "settings.json"
_CLAIMS = "claims"  # the lock under which claims are made
_EVERYTHING = "all"  # the share of a run that does the whole job
_NO_STAMP = (-1, -1, -1)
_READ_BYTES = 1 << 20
_OURS = re.compile(r"(claims|all|\d+-of-\d+)\.lock|part-.*|\..*\.partial")
_DAMAGE = (ValueError, KeyError, TypeError, IndexError)  # what reading a record that is damaged can raise


class BusyError(ConfigError):
    """Another run is at work on the same output."""


class Entry(NamedTuple):
    """One result of a part.

    ``stamp`` is that of the file before it was read, () where the key is a hash of the content. ``rows`` of the part's
    arrays are its own, in the order of entries. A bad file has an ``error`` and no rows. ``files`` are those of the
    part's files that hold this result alone; without any it depends on all that no other entry has.
    """

    key: str
    rows: int
    stamp: Stamp = ()
    error: str = ""
    files: tuple[str, ...] = ()


class Located(NamedTuple):
    """Where some results are, one value each: number of the part, first row in it, and rows."""

    parts: Numbers
    firsts: Numbers
    rows: Numbers


class Record(NamedTuple):
    """What is written down about a part; ``files`` are name -> (bytes, CRC-32)."""

    run: str
    made_ns: int
    entries: list[Entry]
    files: dict[str, tuple[int, int]]


class _Part(NamedTuple):
    """What is kept of a record in memory: a million results have to fit."""

    name: str
    run: str
    starts: Numbers  # (entries + 1,): first row of each, and the number of all
    stamps: Numbers  # (entries, 3)
    errors: dict[int, str]


class PartStore:
    """Parts, their index, settings and locks.

    Args:
        folder: of the store; made if it is not there.
        output: what the results are for; named in messages.
        data: where the files of parts are, by default in the folder, too.
        run: what to call this run in its records.
    """

    def __init__(self, folder: Path, output: Path, data: Path | None = None, run: str = ""):
        self.folder = folder
        self.output = output
        self.data = data or folder
        self.run = run or uuid.uuid4().hex
        self._parts: list[_Part] = []
        self._index = Index()  # key -> number of its part << 32 | its place there
        self._names: set[str] = set()  # of parts
        self._latest_ns = 0  # when the last of them was made

    # --- who is at work ---------------------------------------------------------------------------------------------

    @contextmanager
    def claim(self, share: str = _EVERYTHING) -> Iterator[None]:
        """The right to do a share of the work, or all of it, until the block is left.

        Raises:
            BusyError: if another run has it, or has everything while this one wants a share, or a share while this
                one wants everything.
        """
        with ExitStack() as held:
            with self.exclusively():
                try:
                    held.enter_context(self._lock(share, wait=False))
                    # A share goes with other shares, everything with nothing.
                    if self.any_at_work(share) if share == _EVERYTHING else self._is_held(self._lock_file(_EVERYTHING)):
                        raise Timeout(str(self.folder))
                except Timeout:
                    raise BusyError(
                        f"{self.output}: another run is at work on this"
                        f"{'' if share == _EVERYTHING else f' (share {share})'}; wait until it has ended, or stop it."
                    ) from None
            yield

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keep claims from being made or given up by others meanwhile; waits for them."""
        with self._lock(_CLAIMS, wait=True):
            yield

    def any_at_work(self, besides: str = _CLAIMS) -> bool:
        """Whether somebody has a claim, on everything or a share, besides the one that is named."""
        mine = {self._lock_file(_CLAIMS), self._lock_file(besides)}
        return any(self._is_held(file) for file in self.folder.glob("*.lock") if file not in mine)

    def _is_held(self, lock_file: Path) -> bool:
        try:
            with FileLock(lock_file).acquire(timeout=0):
                return False
        except Timeout:
            return True
        except FileNotFoundError:  # a run that has just ended removed the folder
            return False

    @contextmanager
    def _lock(self, name: str, wait: bool) -> Iterator[None]:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = FileLock(self._lock_file(name)).acquire(timeout=-1 if wait else 0)
                break
            except FileNotFoundError:  # a run that has just ended removed the folder
                continue
        with lock:
            yield

    def _lock_file(self, name: str) -> Path:
        return self.folder / f"{name}.lock"

    # --- opening ----------------------------------------------------------------------------------------------------

    def open(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Take up what is there, of a run with the same settings; claim the work before.

        Args:
            settings: what results depend on. Keys that begin with "_" are recorded by the first run and not compared.

        Returns:
            The settings that the first run recorded.

        Raises:
            ConfigError: if the store is of other settings, or the folder holds something else.
        """
        recorded = self.settings()
        if recorded:
            compare_settings(self.output, recorded, settings)
        else:
            foreign = [path.name for path in self.folder.iterdir() if not _is_ours(path.name)]
            if foreign:
                for name in (_CLAIMS, _EVERYTHING):  # made by us
                    self._lock_file(name).unlink(missing_ok=True)
                raise ConfigError(f"{self.folder}: holds other things, e.g. {min(foreign)}; choose another name.")
            for name in self.names():  # of which settings nobody knows
                self.drop(name)
            recorded = dict(settings)
            write_json(self.folder / _SETTINGS, recorded)
        self.refresh()
        return recorded

    def settings(self) -> dict[str, Any]:
        """What the first run recorded; nothing if there was none."""
        return _read_settings(self.folder / _SETTINGS) if self.is_begun else {}

    @property
    def is_begun(self) -> bool:
        """Whether a run has recorded its settings, and so there is something to go on with."""
        return (self.folder / _SETTINGS).exists()

    def refresh(self) -> int:
        """Take up the parts that others have made since; return the number of those that were known before."""
        known = len(self._parts)
        found: list[tuple[int, str, _Part, Hashes]] = []
        for file in self.folder.glob("part-*.json"):
            if file.stem in self._names:
                continue
            try:
                record = _read_record(file)
            except FileNotFoundError:  # removed by another process meanwhile
                continue
            except _DAMAGE as error:
                log.warning("%s: damaged, so what it stands for is made anew (%s).", file, error)
                file.unlink(missing_ok=True)
                continue
            hashes = hashes_of(entry.key for entry in record.entries)
            found.append((record.made_ns, file.stem, _as_part(file.stem, record), hashes))
        found.sort(key=lambda one: one[:2])
        if found:
            self._latest_ns = max(self._latest_ns, found[-1][0])
            values = np.concatenate([self._register(part) for _, _, part, _ in found])
            hashes = np.concatenate([hashes for *_, hashes in found])
            found.clear()  # of a million results these are 16 MB
            self._index.set_many(hashes, values)
        return known

    def remove_unfinished(self) -> None:
        """Remove what killed runs left half done in the folder; only with everything claimed."""
        for file in self.folder.glob(TEMPORARY):
            file.unlink(missing_ok=True)
        recorded = {*self.names()}
        for file in self.folder.glob("part-*"):
            if file.name.partition(".")[0] not in recorded:
                file.unlink(missing_ok=True)

    def check(self, keys: Iterable[str] | None = None, known: int = 0) -> None:
        """Forget results, of all keys or of some, whose files are not as recorded; said in a warning.

        Args:
            keys: whose results to look at; by default all.
            known: as ``refresh`` returned it, to look only at what is new.
        """
        wanted = None if keys is None else {*(self._index.find(keys) >> 32).tolist()}
        for number, part in enumerate(self._parts[known:], known):
            if wanted is not None and number not in wanted:
                continue
            record_file = self.folder / f"{part.name}.json"
            record = self.record(part.name)
            if record is None:  # removed by another process meanwhile
                continue
            owned = {name for entry in record.entries for name in entry.files}
            found = self._index.find(entry.key for entry in record.entries)
            current = [record.entries[place] for place in np.flatnonzero(found == _values_of(number, len(found)))]
            needed = {name for e in current for name in e.files} | ({*record.files} - owned if current else set())
            bad = {name for name in needed if not _is_intact(self.data / name, record.files[name])}
            lost = [e for e in current if bad & set(e.files or record.files)]
            if lost:
                what = ", ".join(sorted(bad)[:3]) + (" ..." if len(bad) > 3 else "")
                log.warning(
                    "%s: files of an earlier run are lost or damaged, so %d results are made anew (%s).",
                    self.output,
                    len(lost),
                    what,
                )
            for entry in lost:
                self._index.set(entry.key, ABSENT)
            if len(lost) == len(current):
                record_file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the store; with everything claimed, or exclusively. Whoever waits for a lock of it begins anew."""
        for file in self.folder.glob("part-*.json"):  # first: a run of other settings must not find them
            file.unlink(missing_ok=True)
        (self.folder / _SETTINGS).unlink(missing_ok=True)
        rmtree(self.folder, ignore_errors=True)

    def forget_everything(self) -> None:
        """Remove all parts with their files, and the settings."""
        for file in self.folder.glob("part-*.json"):
            self.drop(file.stem)
        (self.folder / _SETTINGS).unlink(missing_ok=True)
        self._parts, self._index, self._names = [], Index(), set()

    def drop(self, name: str) -> None:
        """Remove a part with its files."""
        record = self.record(name)
        (self.folder / f"{name}.json").unlink(missing_ok=True)  # first: without it the rest does not count
        for file in record.files if record else ():
            (self.data / file).unlink(missing_ok=True)

    def record(self, name: str) -> Record | None:
        """What is recorded of a part; None if there is no such part, or its record is damaged."""
        try:
            return _read_record(self.folder / f"{name}.json")
        except (FileNotFoundError, *_DAMAGE):
            return None

    def names(self) -> list[str]:
        """The names of all parts that have records, of whatever run."""
        return sorted(file.stem for file in self.folder.glob("part-*.json"))

    def owners(self) -> dict[str, str]:
        """The files of parts that hold one result alone, and whose results these are."""
        records = sorted(filter(None, map(self.record, self.names())), key=lambda record: record.made_ns)
        return {name: entry.key for record in records for entry in record.entries for name in entry.files}

    # --- looking up -------------------------------------------------------------------------------------------------

    def has(self, key: str) -> bool:
        """Whether there is a result, or an error, of whatever stamp."""
        return self._index.get(key) != ABSENT

    def done(self, key: str, stamp: Stamp = ()) -> bool:
        """Whether there is a result for a file that has this stamp now."""
        return self.attempted(key, stamp) and self.error_of(key) is None

    def error_of(self, key: str) -> str | None:
        """The error of a key that is there."""
        part, place = self._find(key)
        return part.errors.get(place)

    def attempted(self, key: str, stamp: Stamp = ()) -> bool:
        """Whether there is a result or an error for a file that has this stamp now."""
        if not self.has(key):
            return False
        part, place = self._find(key)
        return tuple(part.stamps[place].tolist()) == (stamp or _NO_STAMP)

    def stamp(self, key: str) -> Stamp:
        """What the file of a result that is there had before it was read."""
        part, place = self._find(key)
        return tuple(part.stamps[place].tolist())

    def _find(self, key: str) -> tuple[_Part, int]:
        where = self._index.get(key)
        if where == ABSENT:
            raise KeyError(key)
        return self._parts[where >> 32], where & 0xFFFF_FFFF

    # --- adding -----------------------------------------------------------------------------------------------------

    def add(self, entries: Sequence[Entry], arrays: Mapping[str, Sequence[Array]]) -> None:
        """Keep results as a part: each array, (all rows, ...), is written from its pieces, one after the other."""
        name, files = self.new_name(), []
        for array, pieces in arrays.items():
            files.append(self.array_file(name, array))
            with atomic_write(files[-1]) as partial, partial.open("wb") as stream:
                write_array(stream, pieces)
        self.commit(name, entries, files)

    @staticmethod
    def new_name() -> str:
        """A name for a part that no other process gives to one."""
        return f"part-{uuid.uuid4().hex[:16]}"

    def commit(self, name: str, entries: Sequence[Entry], files: Iterable[Path]) -> None:
        """Record a part, ``part-*``, whose files are on the disk and below ``data``; from now on it counts."""
        sums = {file.relative_to(self.data).as_posix(): _size_and_crc(file) for file in files}
        # After those that are known, whatever the clocks of other machines say.
        made_ns = self._latest_ns = max(time.time_ns(), self._latest_ns + 1)
        record = Record(self.run, made_ns, list(entries), sums)
        with atomic_write(self.folder / f"{name}.json") as partial:
            partial.write_bytes(_encode_record(record))
        for entry, value in zip(entries, self._register(_as_part(name, record)).tolist(), strict=True):
            self._index.set(entry.key, value)

    def _register(self, part: _Part) -> Numbers:
        """Take up a part; return what the index is to say of its results."""
        self._parts.append(part)
        self._names.add(part.name)
        return _values_of(len(self._parts) - 1, len(part.stamps))

    # --- reading arrays ---------------------------------------------------------------------------------------------

    def locate(self, keys: Iterable[str]) -> Located:
        """Where results are; KeyError if one is not there."""
        where = self._index.find(keys)
        if (where == ABSENT).any():
            raise KeyError(f"{self.output}: result {int(np.argmax(where == ABSENT))} of {len(where)} is not there")
        parts, firsts = where >> 32, where & 0xFFFF_FFFF
        del where
        rows = np.empty_like(parts)
        for of_part in _runs(np.argsort(parts, kind="stable"), parts):
            starts, place = self._parts[parts[of_part[0]]].starts, firsts[of_part]
            firsts[of_part] = starts[place]
            rows[of_part] = starts[place + 1] - starts[place]
        return Located(parts, firsts, rows)

    def read(self, array: str, located: Located, reader: ArrayReader) -> Array:
        """The rows of results, at least one, in their order; each file is read once, from front to back."""
        parts = np.repeat(located.parts, located.rows)
        ends = np.cumsum(located.rows)
        rows = np.arange(len(parts)) + np.repeat(located.firsts - ends + located.rows, located.rows)
        order = np.lexsort((rows, parts))
        found: Array | None = None
        for places in _runs(order, parts):
            opened = reader.open(self.file_of(array, parts[places[0]]))
            if found is None:
                found = np.empty((len(order), *opened.shape[1:]), opened.dtype)
            opened.read_rows(rows[places], found, places)
        assert found is not None
        return found

    def file_of(self, array: str, part: int) -> Path:
        """The file of an array of a part that is named by its number."""
        return self.array_file(self._parts[part].name, array)

    def array_file(self, name: str, array: str) -> Path:
        """The file of an array of a part."""
        return self.data / f"{name}.{array}.npy"


# --- stamps, records, settings ------------------------------------------------------------------------------------


def _as_part(name: str, record: Record) -> _Part:
    entries = record.entries
    starts = np.zeros(len(entries) + 1, np.int64)
    np.cumsum([entry.rows for entry in entries], out=starts[1:])
    stamps = np.array([entry.stamp or _NO_STAMP for entry in entries], np.int64).reshape(len(entries), 3)
    errors = {place: entry.error for place, entry in enumerate(entries) if entry.error}
    return _Part(name, record.run, starts, stamps, errors)


def _values_of(number: int, entries: int) -> Numbers:
    """What the index says of the results of a part."""
    return np.arange(entries, dtype=np.int64) + (number << 32)


def _runs(order: Numbers, parts: Numbers) -> Iterator[Numbers]:
    """``order``, which sorts ``parts``, cut where another part begins."""
    yield from np.split(order, np.flatnonzero(np.diff(parts[order])) + 1) if len(order) else ()


def stamp_of(path: str | os.PathLike[str]) -> Stamp:
    """Size, time of change in ns and inode of a file; ``(-2, 0, 0)`` if it cannot be looked at."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return -2, 0, 0
    # Inodes of some file systems have 64 bits without a sign.
    return status.st_size, status.st_mtime_ns, status.st_ino & 0x7FFF_FFFF_FFFF_FFFF


def stamps_number(stamps: Iterable[tuple[str, Stamp]]) -> str:
    """A hash of files' keys and stamps, in whatever order, and however often one is given."""
    each = (hashlib.blake2b(os.fsencode(f"{key}\0{stamp}"), digest_size=8).digest() for key, stamp in stamps)
    numbers = np.unique(np.fromiter((int.from_bytes(digest, "little") for digest in each), dtype="<u8"))
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).hexdigest()


def key_of(path: str | os.PathLike[str]) -> str:
    """The absolute path without ``..``: a run that is resumed from another folder finds its results."""
    return os.path.abspath(path)  # noqa: PTH100  (Path.absolute keeps "..")


def compare_settings(where: Path, recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ConfigError that shows the settings that differ, if any do."""
    keys = [key for key in {**settings, **recorded} if not key.startswith("_")]
    differing = [key for key in keys if recorded.get(key) != settings.get(key)]
    if differing:
        shown = ", ".join(f"{key}={recorded.get(key)!r}, now {settings.get(key)!r}" for key in differing)
        raise ConfigError(
            f"{where} is of a run with other settings ({shown}); choose another name, or overwrite it to begin anew."
        )


def _is_ours(name: str) -> bool:
    return _OURS.fullmatch(name) is not None


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: damaged ({error}); remove the folder, or overwrite it, to begin anew.") from error
    if not isinstance(settings, dict) or not settings:
        raise ConfigError(f"{file}: damaged (it holds no settings); remove the folder, or overwrite it, to begin anew.")
    return settings


def _encode_record(record: Record) -> bytes:
    """One line of JSON, and one with its CRC-32."""
    body = json.dumps(record._asdict(), ensure_ascii=True).encode()
    return b"%s\n%08x\n" % (body, zlib.crc32(body))


def _read_record(file: Path) -> Record:
    """Raises one of ``_DAMAGE`` if there is something wrong with it."""
    body, crc, *_ = file.read_bytes().split(b"\n")
    if int(crc, 16) != zlib.crc32(body):
        raise ValueError("its checksum is wrong")
    held = json.loads(body)
    entries = [
        Entry(key, rows, tuple(stamp), error, tuple(names)) for key, rows, stamp, error, names in held["entries"]
    ]
    files = {name: (size, crc) for name, (size, crc) in held["files"].items()}
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files):
        raise ValueError("it names files elsewhere")  # which would be removed with the part
    return Record(held["run"], held["made_ns"], entries, files)


def _is_intact(file: Path, recorded: tuple[int, int]) -> bool:
    try:
        return file.stat().st_size == recorded[0] and _size_and_crc(file) == recorded
    except OSError:
        return False


def _size_and_crc(file: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(_READ_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
