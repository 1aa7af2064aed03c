"""One job of ``embed`` for several processes, on one machine or many, that share a file system and nothing else.

Each takes a fixed share of the files and writes it as a shard beside the output, ``out.shard-3-of-8.parquet``. Whoever
finds every shard done puts them together in the files' order. What the processes have to agree on is in
``out.parquet.shards-of-8/``: the plan (all files and their sizes, from which the shares follow) and one record for each
finished shard. No process waits for another but while the shards are put together, so a lost one hangs nobody: give its
command again.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from shutil import rmtree
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from m2d_embed.embed_files import Summary, check_output, common_folder, open_sink, write_rows
from m2d_embed.errors import AudioError, ConfigError

Array = npt.NDArray[np.float32]

_SHARD = re.compile(r"(\d+)/(\d+)")
_ROWS_AT_A_TIME = 4096  # copied together into the output


@dataclass(frozen=True)
class Shard:
    """Which share of a job: ``number`` runs from 1 to ``count``.

    Raises:
        ConfigError: if there is no such share.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ConfigError(f"shard {self.number}/{self.count} does not exist; the first of 8 is 1/8, the last 8/8.")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"3/8"``, the third of eight; ConfigError on anything else."""
        match = _SHARD.fullmatch(text)
        if match is None:
            raise ConfigError(f"a shard is written as 3/8, the third of eight, not as {text!r}.")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Shard | None:
        """The share of a process that torchrun started (RANK, WORLD_SIZE), or None for the only process.

        Raises:
            ConfigError: if the two variables contradict each other.
        """
        if "RANK" not in environ or "WORLD_SIZE" not in environ:
            return None
        rank, world = environ["RANK"], environ["WORLD_SIZE"]
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise ConfigError(f"RANK={rank} and WORLD_SIZE={world} in the environment are not what torchrun sets.")
        return cls(int(rank) + 1, int(world)) if int(world) > 1 else None


@dataclass(frozen=True)
class ShardSummary:
    """What one process did, and where the whole job stands.

    Attributes:
        share: what was done of this process's share.
        missing: numbers of the shards that are not done yet; if there are none, the output is whole.
        whole: of the whole job, from the process that finished it, and from one that finds it finished; else None.
    """

    share: Summary
    missing: list[int]
    whole: Summary | None


class Embed(Protocol):
    """``embed_files`` with its model and options bound."""

    def __call__(self, files: Sequence[Path], output: Path, root: Path) -> Summary: ...


def embed_shard(
    files: Sequence[Path], output: Path, shard: Shard, settings: dict[str, Any], embed: Embed
) -> ShardSummary:
    """Embed one share of the files; put the shards together if this was the last.

    Args:
        files: all files of the job, the same in every process.
        output: of the whole job: ``*.npz``, ``*.parquet``, or a folder that gets one ``.npy`` a clip.
        shard: which share this process takes.
        settings: ``embed_files.job_settings`` of the model; they must be the same in every process.
        embed: does the work; it is given the files of the share, the shard's name, and the folder that the places of
            ``.npy`` files are relative to.

    Raises:
        ConfigError: if the output is there already but of another job, another process works on this shard, or the
            shards that are there are of other files or settings.
        OSError: if the disk is full or not writable; what is done by then is kept.
    """
    check_output(output)
    job = _Job(list(files), output, shard.count, settings)
    with job.lock:
        finished = job.take_up_finished()
        if finished is not None:
            return ShardSummary(Summary(0, 0, {}), [], finished)
        share = job.agree_on_shares()[shard.number - 1]
        claim = job.claim(shard.number, share)
    if claim is None:
        summary = job.summary_of([shard.number])
    else:
        with claim:
            stamps = _stamps(share)  # before it is read: a file that changes meanwhile is noticed next time
            target = job.shard_file(shard.number)
            summary = embed(share, target, root=job.root) if share else Summary(0, 0, {})
            job.write_record(shard.number, stamps, summary)
    missing = job.missing()
    return ShardSummary(summary, missing, None) if missing else job.put_together(summary)


def shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Deal out files so that the shares are about equally large: the largest file first, each to the smallest share.

    Returns:
        ``count`` ascending lists of indices; every index is in exactly one.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    smallest = [(0, 0, number) for number in range(count)]  # bytes, files: empty files are dealt out evenly, too
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size, files, number = heapq.heappop(smallest)
        dealt[number].append(index)
        heapq.heappush(smallest, (size + sizes[index], files + 1, number))
    return [sorted(indices) for indices in dealt]


def local_device(device: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The GPU of this process, ``cuda:LOCAL_RANK``, if torchrun started it; else, or if another was named, ``device``.

    With fewer GPUs to be seen than processes, as where each process sees only its own, they are taken in turn.
    """
    import torch

    rank = environ.get("LOCAL_RANK", "")
    if device not in (None, "cuda") or not rank.isdecimal() or not torch.cuda.is_available():
        return device
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


class _Job:
    """The whole job, as seen by one process."""

    def __init__(self, files: list[Path], output: Path, count: int, settings: dict[str, Any]):
        self.files = files
        self.output = output
        self.count = count
        self.settings = settings
        self.one_file = output.suffix != ""
        self.folder = output.with_name(f"{output.name}.shards-of-{count}")
        self.root = common_folder(files)
        # Beside the folder, which the process that puts the shards together removes.
        self.lock_file = output.with_name(f".{output.name}.shards-of-{count}.lock")
        self.lock = FileLock(self.lock_file)

    # --- before the work ------------------------------------------------------------------------------------------

    def take_up_finished(self) -> Summary | None:
        """The summary of this very job if its output is there; ConfigError if the output is of another job."""
        if not self.one_file or not self.output.exists():
            return None
        held = _open_rows(self.output)
        _compare(self.output, held.settings, self.settings)
        names, wanted = set(held.names), {str(file): file for file in self.files}
        if names - wanted.keys():
            raise ConfigError(
                f"{self.output} exists and holds other files, e.g. {min(names - wanted.keys())}; choose another name, "
                "or remove it."
            )
        self._remove_shards()  # left by a process that was killed while it removed them
        lacking = {
            file: AudioError(f"{file}: not in {self.output}, which is finished; to embed anew, remove that.")
            for file in self.files
            if str(file) not in names
        }
        return Summary(0, len(names), lacking)

    def agree_on_shares(self) -> list[list[Path]]:
        """The files of every shard, by the plan of the process that came first; ConfigError if that planned otherwise.

        Sizes are those of the plan: a file that has changed since does not move to another shard.
        """
        plan_file = self.folder / "plan.json"
        if not plan_file.exists():
            self.folder.mkdir(exist_ok=True)
            sizes = [stamp[0] if stamp else 0 for stamp in map(_stamp, self.files)]
            names = [str(file) for file in self.files]
            _write_json(plan_file, {"settings": self.settings, "files": names, "sizes": sizes})
        plan = json.loads(plan_file.read_text(encoding="utf-8"))
        _compare(self.folder, plan["settings"], self.settings)
        if plan["files"] != [str(file) for file in self.files]:
            other = set(plan["files"]).symmetric_difference(str(file) for file in self.files)
            what = f"other files ({len(other)}, e.g. {min(other)})" if other else "the same files in another order"
            raise ConfigError(
                f"{self.folder} is of a job with {what}; give the same ones again, or remove that folder and the "
                "shards to begin anew."
            )
        if not self.one_file:
            open_sink(self.output, self.settings, self.settings["kind"], self.files, overwrite=False)
        return [[self.files[i] for i in share] for share in shares(plan["sizes"], self.count)]

    def claim(self, number: int, share: Sequence[Path]) -> AbstractContextManager[Any] | None:
        """The right to work on a shard, or None if it is done and its files have not changed since.

        Raises:
            ConfigError: if another process has it.
        """
        record = self._record_file(number)
        if record.exists():
            same = self._record(number)["stamps"] == _stamps(share)
            if same and self._shard_is_there(number):
                return None
        try:
            claim = FileLock(self.folder / f"shard-{number}.lock").acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"another process is working on shard {number}/{self.count} of {self.output}.") from None
        record.unlink(missing_ok=True)
        if self.one_file:
            self.shard_file(number).unlink(missing_ok=True)  # without a record nobody knows of its bad files
        return claim

    # --- after it -------------------------------------------------------------------------------------------------

    def shard_file(self, number: int) -> Path:
        """Where a shard goes; ``.npy`` files go where they belong at once."""
        if not self.one_file:
            return self.output
        return self.output.with_name(f"{self.output.stem}.shard-{number}-of-{self.count}{self.output.suffix}")

    def write_record(self, number: int, stamps: str, summary: Summary) -> None:
        """Note that a shard is done."""
        failed = {str(file): str(error) for file, error in summary.failed.items()}
        clips = summary.embedded + summary.resumed
        _write_json(self._record_file(number), {"stamps": stamps, "clips": clips, "failed": failed})

    def summary_of(self, numbers: Sequence[int]) -> Summary:
        """What finished shards hold."""
        records = [self._record(number) for number in numbers]
        failed = {Path(file): AudioError(error) for record in records for file, error in record["failed"].items()}
        return Summary(0, sum(record["clips"] for record in records), failed)

    def missing(self) -> list[int]:
        """The shards that are not done."""
        return [number for number in self._numbers() if not self._record_file(number).exists()]

    def put_together(self, share: Summary) -> ShardSummary:
        """Make the output of the shards and remove them, unless another process has done so meanwhile."""
        with self.lock:
            if not self.folder.exists():
                return ShardSummary(share, [], None)
            missing = self.missing()
            if missing:
                return ShardSummary(share, missing, None)
            whole = self.summary_of(self._numbers())
            if self.one_file and whole.resumed:
                self._merge([file for file in self.files if file not in whole.failed])
            self._remove_shards()
        return ShardSummary(share, [], whole)

    def _merge(self, files: list[Path]) -> None:
        whole = self.folder / f"whole{self.output.suffix}"
        present = [self.shard_file(number) for number in self._numbers() if self._record(number)["clips"]]
        write_rows(whole, _Shards(present, self.settings), files)
        whole.replace(self.output)

    def _remove_shards(self) -> None:
        if self.one_file:
            for number in self._numbers():
                self.shard_file(number).unlink(missing_ok=True)
        rmtree(self.folder, ignore_errors=not self.folder.exists())
        self.lock_file.unlink(missing_ok=True)  # whoever waits for it finds the output there, and the folder gone

    def _shard_is_there(self, number: int) -> bool:
        """Whether a finished shard's file is there; one of bad files alone has none."""
        return not self._record(number)["clips"] or self.shard_file(number).exists()

    def _record(self, number: int) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self._record_file(number).read_text(encoding="utf-8"))
        return record

    def _record_file(self, number: int) -> Path:
        return self.folder / f"shard-{number}.json"

    def _numbers(self) -> range:
        return range(1, self.count + 1)


class _Rows(Protocol):
    """A ``.npz`` or ``.parquet`` that is read from its beginning to its end."""

    settings: dict[str, Any]
    names: list[str]
    counts: list[int]  # rows of each name

    def read(self, rows: int) -> tuple[Array, Array]:
        """The next embeddings, (rows, D), and their times in ms, (rows,), zeros for scenes."""


class _ParquetRows:
    def __init__(self, path: Path):
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        self.settings = json.loads(file.schema_arrow.metadata[b"m2d_embed"])
        runs = [(name, len(list(run))) for name, run in groupby(file.read(columns=["file"])["file"].to_pylist())]
        self.names, self.counts = [name for name, _ in runs], [count for _, count in runs]
        self.batches = file.iter_batches(_ROWS_AT_A_TIME)
        self.embeddings = np.empty((0, self.settings["dim"]), np.float32)
        self.times = np.empty(0, np.float32)

    def read(self, rows: int) -> tuple[Array, Array]:
        while len(self.embeddings) < rows:
            batch = next(self.batches)
            embeddings = batch["embedding"].flatten().to_numpy().reshape(len(batch), -1)
            timed = "timestamp_ms" in batch.schema.names
            times = batch["timestamp_ms"].to_numpy() if timed else np.zeros(len(batch), np.float32)
            self.embeddings = np.concatenate([self.embeddings, embeddings])
            self.times = np.concatenate([self.times, times])
        taken = self.embeddings[:rows], self.times[:rows]
        self.embeddings, self.times = self.embeddings[rows:], self.times[rows:]
        return taken


class _NpzRows:
    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as held:
            self.settings = json.loads(str(held["settings"]))
            self.names = [str(name) for name in held["files"]]
            self.counts = np.diff(held["offsets"]).tolist() if "offsets" in held else [1] * len(self.names)
        archive = zipfile.ZipFile(path)
        self.embeddings = _array_stream(archive, "embeddings.npy")
        self.times = _array_stream(archive, "timestamps.npy") if "timestamps.npy" in archive.namelist() else None

    def read(self, rows: int) -> tuple[Array, Array]:
        width = self.settings["dim"]
        embeddings = np.frombuffer(self.embeddings.read(4 * rows * width), "<f4").reshape(rows, width)
        if self.times is None:
            return embeddings, np.zeros(rows, np.float32)
        return embeddings, np.frombuffer(self.times.read(4 * rows), "<f4")


def _array_stream(archive: zipfile.ZipFile, member: str) -> IO[bytes]:
    """The data of an ``.npy`` inside an archive; an ``.npz`` itself can only be read array by whole array."""
    stream = archive.open(member)
    version = np.lib.format.read_magic(stream)
    read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
    read_header(stream)
    return stream


def _open_rows(path: Path) -> _Rows:
    """ConfigError if the file was not written by ``embed_files``."""
    try:
        return _NpzRows(path) if path.suffix == ".npz" else _ParquetRows(path)
    except (KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} exists and is not of this job ({error}); choose another name.") from error


class _Shards:
    """The rows of all shards in the order of the whole job; each shard keeps that order, so it is read once through."""

    def __init__(self, shard_files: Sequence[Path], settings: dict[str, Any]):
        self.shard_files = shard_files
        self.settings = settings
        self.timed = settings["kind"] == "timestamps"
        self.places: dict[str, tuple[int, int]] = {}  # file -> shard, rows
        for number, rows in enumerate(map(_open_rows, shard_files)):
            _compare(shard_files[number], rows.settings, settings)
            self.places |= {name: (number, count) for name, count in zip(rows.names, rows.counts, strict=True)}

    def rows_of(self, files: Sequence[Path]) -> list[int]:
        """Rows of each file."""
        return [self.places[str(file)][1] for file in files]

    def chunks(self, files: Sequence[Path]) -> Iterator[tuple[list[str], Array, Array]]:
        """Yield file name, embedding and time of every row, in the files' order, some rows at a time."""
        shards = [_open_rows(file) for file in self.shard_files]
        names: list[str] = []
        blocks: list[tuple[Array, Array]] = []
        for file in files:
            number, left = self.places[str(file)]
            while left:
                rows = min(left, _ROWS_AT_A_TIME - len(names))
                names += [str(file)] * rows
                blocks.append(shards[number].read(rows))
                left -= rows
                if len(names) == _ROWS_AT_A_TIME:
                    yield names, *_joined(blocks)
                    names, blocks = [], []
        if names:
            yield names, *_joined(blocks)


def _joined(blocks: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.concatenate([rows for rows, _ in blocks]), np.concatenate([times for _, times in blocks])


def _compare(where: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [key for key in now if earlier.get(key) != now[key]]
    if differing:
        shown = ", ".join(f"{key}={earlier.get(key)!r}, now {now[key]!r}" for key in differing)
        raise ConfigError(f"{where} is of a job with other settings ({shown}); choose another output, or remove it.")


def _stamp(file: Path) -> tuple[int, int] | None:
    """Size and time of change; None if the file cannot be looked at, which its reader will report."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _stamps(files: Sequence[Path]) -> str:
    """A hash of the sizes and times of change of files."""
    return hashlib.sha256(json.dumps([_stamp(file) for file in files]).encode()).hexdigest()


def _write_json(path: Path, content: Any) -> None:
    """Under its name only when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)
