"""A list of sound files -> embeddings on disk: in batches, skipping bad files, resuming where a run was killed.

Results are kept as they come, in parts beside the output (``<output>.partial/``), and put together in the files' order
at the end. Nothing appears under its final name before it is whole. With one ``.npy`` a clip the finished clips are the
parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import IO, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2d_embed.audio import Clip
from m2d_embed.batching import DEFAULT_PIPELINE, Pipeline, Timestamps, encode_scenes, encode_timestamps
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.model import M2D
from m2d_embed.profiling import OPENING, WRITING

Kind = Literal["scene", "timestamps"]
Array = npt.NDArray[np.float32]

_CLIPS_AT_A_TIME = 2048  # looked at and sorted together
_SECONDS_A_PART = 5.0  # at most this much work is lost when a run is killed
_BYTES_A_PART = 64 << 20
_ROWS_AT_A_TIME = 4096  # copied together into the output


@dataclass(frozen=True)
class Rows:
    """The embeddings of one clip, (rows, D), and their times in ms; a scene is one row without a time."""

    embeddings: Array
    times: Array | None


@dataclass(frozen=True)
class Summary:
    """What a run did: files embedded now, files found done from an earlier run, and the bad ones with their errors."""

    embedded: int
    resumed: int
    failed: dict[Path, AudioError]


class RowSource(Protocol):
    """Embeddings of many clips, to be written as one file."""

    settings: dict[str, Any]
    timed: bool

    def rows_of(self, files: Sequence[Path]) -> list[int]:
        """Rows of each file."""

    def chunks(self, files: Sequence[Path]) -> Iterator[tuple[list[str], Array, Array]]:
        """Yield file name, embedding and time of every row, in the files' order, some rows at a time."""


class Sink(Protocol):
    """Where results go."""

    def has(self, file: Path) -> bool: ...

    def add(self, file: Path, rows: Rows) -> None: ...

    def finish(self, files: Sequence[Path]) -> None: ...


def embed_files(
    model: M2D,
    files: Sequence[Path],
    output: Path,
    kind: Kind = "scene",
    batch_size: int = 32,
    overwrite: bool = False,
    on_progress: Callable[[Path, AudioError | None], None] = lambda file, error: None,
    pipeline: Pipeline = DEFAULT_PIPELINE,
    root: Path | None = None,
) -> Summary:
    """Embed files into ``output``.

    Args:
        model: its ``features`` say what an embedding is.
        files: what to embed; the output keeps their order.
        output: ``*.npz``, ``*.parquet``, or a folder that gets one ``.npy`` a clip.
        kind: scene embeddings, or timestamp embeddings with their times.
        batch_size: windows encoded at a time, at most.
        overwrite: replace an existing output, and drop what an unfinished run left.
        on_progress: called for each file as it is done, with its error if it is a bad one.
        pipeline: how many threads read files ahead, and who is told where the time goes.
        root: the folder that the places of ``.npy`` files are relative to; by default the deepest that holds all files.

    Raises:
        ConfigError: if the output exists, its ending is unknown, or an unfinished run had other settings.
        OSError: if the disk is full or not writable; what is done by then is kept.
    """
    sink = open_sink(output, job_settings(model, kind), kind, files, overwrite, root)
    remaining = [file for file in files if not sink.has(file)]
    failed: dict[Path, AudioError] = {}
    with closing(_results(model, remaining, kind, batch_size, pipeline)) as results:
        for file, result in results:
            if isinstance(result, AudioError):
                failed[file] = result
                on_progress(file, result)
                continue
            with pipeline.stopwatch.stage(WRITING):
                sink.add(file, result)
            on_progress(file, None)
            del result  # an hour of timestamps is not held until the next clip is done
    with pipeline.stopwatch.stage(WRITING):
        sink.finish([file for file in files if file not in failed])
    return Summary(len(remaining) - len(failed), len(files) - len(remaining), failed)


def job_settings(model: M2D, kind: Kind) -> dict[str, Any]:
    """What must agree for two runs to give the same embeddings."""
    features = model.features
    return {
        "model": model.config.name,
        "weights": _fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kind": kind,
        "layers": list(features.blocks(model.config)),
        "layer_pooling": features.layer_pooling,
        "flat": features.flat,
        "hop_ms": features.hop_ms,
        "scene_pooling": features.pooling(model.config),
        "dim": model.scene_embedding_size if kind == "scene" else model.timestamp_embedding_size,
    }


def check_output(output: Path) -> None:
    """Raise ConfigError if the output's name means nothing, or something of another kind has it."""
    if output.suffix not in (".npz", ".parquet", ""):
        raise ConfigError(f"{output}: unknown kind of output; use .npz, .parquet, or a folder for one .npy a clip.")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: the folder {output.parent} does not exist.")
    if output.exists() and output.is_dir() != (not output.suffix):
        raise ConfigError(f"{output} is {'a folder' if output.is_dir() else 'a file'}; choose another name.")


def common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all files, without ``..``."""
    return Path(os.path.commonpath([_parent(file) for file in files]))


def open_sink(
    output: Path,
    settings: dict[str, Any],
    kind: Kind,
    files: Sequence[Path],
    overwrite: bool,
    root: Path | None = None,
) -> Sink:
    """Choose by the output's name how results are kept, and take up what an unfinished run left."""
    check_output(output)
    if not output.suffix:
        return NpyFolder(output, settings, files, overwrite, root)
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; choose another name, or replace it with --overwrite.")
    return PartsFile(output, settings, kind, overwrite)


def read_scenes(file: Path) -> tuple[list[str], Array, dict[str, Any]]:
    """Read back what ``embed_files`` wrote as ``.npz`` or ``.parquet`` with scene embeddings.

    Returns:
        File names, embeddings (files, D), and the settings they were made with.

    Raises:
        ConfigError: if the file holds something else.
    """
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as held:
                names, embeddings = [str(name) for name in held["files"]], held["embeddings"]
                settings = json.loads(str(held["settings"]))
        else:
            import pyarrow.parquet as pq

            table = pq.read_table(file)
            settings = json.loads(table.schema.metadata[b"m2d_embed"])
            names = table["file"].to_pylist()
            embeddings = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(names), -1)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file.") from None
    except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{file}: not embeddings written by m2d-embed ({error}).") from error
    if settings.get("kind") != "scene":
        raise ConfigError(f"{file}: holds {settings.get('kind')} embeddings; scene embeddings are needed.")
    return names, embeddings, settings


class NpyFolder:
    """One ``.npy`` a clip, ``<clip>.npy``, and with timestamps ``<clip>.times.npy`` beside it."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], files: Sequence[Path], overwrite: bool, root: Path | None = None
    ):
        self.folder = folder
        self.root = root or common_folder(files)
        if overwrite and folder.exists():
            for file in files:
                self._target(file).unlink(missing_ok=True)
            (folder / _SETTINGS_FILE).unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        _check_settings(folder / _SETTINGS_FILE, settings)

    def has(self, file: Path) -> bool:
        """Whether the clip is done and has not changed since."""
        target = self._target(file)
        return target.exists() and file.exists() and target.stat().st_mtime_ns >= file.stat().st_mtime_ns

    def add(self, file: Path, rows: Rows) -> None:
        """Write one clip."""
        target = self._target(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if rows.times is not None:
            _save_arrays(target.with_name(f"{file.name}.times.npy"), [rows.times])
        _save_arrays(target, [rows.embeddings[0] if rows.times is None else rows.embeddings])

    def finish(self, files: Sequence[Path]) -> None:
        """Nothing is left to do."""

    def _target(self, file: Path) -> Path:
        return self.folder / _parent(file).relative_to(self.root) / f"{file.name}.npy"


def _parent(file: Path) -> Path:
    """The folder of a file without ``..``, which must not lead out of the output."""
    return Path(os.path.abspath(file)).parent  # noqa: PTH100  (Path.absolute keeps "..")


class PartsFile:
    """One ``.npz`` or ``.parquet`` for all clips, put together from parts at the end."""

    def __init__(self, output: Path, settings: dict[str, Any], kind: Kind, overwrite: bool):
        self.output = output
        self.settings = settings
        self.timed = kind == "timestamps"
        self.folder = output.with_name(f"{output.name}.partial")
        if overwrite:
            rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        _check_settings(self.folder / _SETTINGS_FILE, settings)
        self.index: dict[str, tuple[int, int, int]] = {}  # file -> part, first row, rows
        self.stamps: dict[str, list[int]] = {}
        self.parts = 0
        for listing in sorted(self.folder.glob("part-*.json")):
            self._register(json.loads(listing.read_text(encoding="utf-8")))
        self.pending: list[tuple[Path, Rows]] = []
        self.pending_bytes = 0
        self.last_written = time.monotonic()

    def has(self, file: Path) -> bool:
        """Whether the clip is done and has not changed since."""
        return str(file) in self.index and file.exists() and self.stamps[str(file)] == _stamp(file)

    def add(self, file: Path, rows: Rows) -> None:
        """Keep one clip; every few seconds, or when there is much, write what has come as a part."""
        self.pending.append((file, rows))
        self.pending_bytes += rows.embeddings.nbytes
        if self.pending_bytes > _BYTES_A_PART or time.monotonic() - self.last_written > _SECONDS_A_PART:
            self._write_part()

    def finish(self, files: Sequence[Path]) -> None:
        """Put the parts together in the files' order, and remove them."""
        self._write_part()
        if files:
            partial = self.folder / f"whole{self.output.suffix}"
            write_rows(partial, self, files)
            partial.replace(self.output)
        rmtree(self.folder)

    def rows_of(self, files: Sequence[Path]) -> list[int]:
        """Rows of each file."""
        return [self.index[str(file)][2] for file in files]

    def chunks(self, files: Sequence[Path]) -> Iterator[tuple[list[str], Array, Array]]:
        """Yield file name, embedding and time of every row, in the files' order, some rows at a time."""
        arrays = [np.load(self._path(part, "npy"), mmap_mode="r") for part in range(self.parts)]
        times = [np.load(self._path(part, "times.npy")) if self.timed else None for part in range(self.parts)]
        names: list[str] = []
        blocks: list[Array] = []
        clocks: list[Array] = []
        for file in files:
            part, start, count = self.index[str(file)]
            clock = times[part]
            for first in range(start, start + count, _ROWS_AT_A_TIME):
                last = min(first + _ROWS_AT_A_TIME, start + count)
                names += [str(file)] * (last - first)
                blocks.append(arrays[part][first:last])
                clocks.append(np.zeros(last - first, np.float32) if clock is None else clock[first:last])
                if len(names) >= _ROWS_AT_A_TIME:
                    yield names, np.concatenate(blocks), np.concatenate(clocks)
                    names, blocks, clocks = [], [], []
        if names:
            yield names, np.concatenate(blocks), np.concatenate(clocks)

    def _write_part(self) -> None:
        if not self.pending:
            return
        _save_arrays(self._path(self.parts, "npy"), [rows.embeddings for _, rows in self.pending])
        if self.timed:
            times = [rows.times for _, rows in self.pending if rows.times is not None]
            _save_arrays(self._path(self.parts, "times.npy"), times)
        listing = [[str(file), len(rows.embeddings), *_stamp(file)] for file, rows in self.pending]
        text = json.dumps(listing)
        _write_whole(self._path(self.parts, "json"), lambda stream: stream.write(text.encode()))  # last: it counts
        self._register(listing)
        self.pending = []
        self.pending_bytes = 0
        self.last_written = time.monotonic()

    def _register(self, listing: list[list[Any]]) -> None:
        start = 0
        for name, rows, *stamp in listing:
            self.index[name] = (self.parts, start, rows)
            self.stamps[name] = stamp
            start += rows
        self.parts += 1

    def _path(self, part: int, suffix: str) -> Path:
        return self.folder / f"part-{part:06d}.{suffix}"


_SETTINGS_FILE = "m2d-embed.json"


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a run, or compare them with those of the unfinished one."""
    if not file.exists():
        _write_whole(file, lambda stream: stream.write(json.dumps(settings, indent=1).encode()))
        return
    earlier = json.loads(file.read_text(encoding="utf-8"))
    differing = [key for key in settings if earlier.get(key) != settings[key]]
    if differing:
        shown = ", ".join(f"{key}={earlier.get(key)!r}, now {settings[key]!r}" for key in differing)
        raise ConfigError(f"{file.parent} is of a run with other settings ({shown}); drop it with --overwrite.")


def _opened(
    model: M2D, files: Sequence[Path], pipeline: Pipeline
) -> Generator[tuple[Sequence[Path], list[Clip | AudioError]], None, None]:
    """Look at the files, some thousands at a time; the next ones in threads, while these are embedded."""

    def look(file: Path) -> Clip | AudioError:
        return next(model.open_clips([file]))

    chunks = [files[start : start + _CLIPS_AT_A_TIME] for start in range(0, len(files), _CLIPS_AT_A_TIME)]
    pool = ThreadPoolExecutor(max(1, pipeline.threads_for(model.device)))
    looking: deque[Iterator[Clip | AudioError]] = deque()
    try:
        for number, chunk in enumerate(chunks):
            looking += [pool.map(look, ahead) for ahead in chunks[number + len(looking) : number + 2]]
            with pipeline.stopwatch.stage(OPENING):
                clips = list(looking.popleft())
            yield chunk, clips
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@torch.no_grad()
def _results(
    model: M2D, files: Sequence[Path], kind: Kind, batch_size: int, pipeline: Pipeline
) -> Generator[tuple[Path, Rows | AudioError], None, None]:
    with closing(_opened(model, files, pipeline)) as chunks:
        for chunk, clips in chunks:
            if kind == "scene":
                for index, scene in encode_scenes(model, clips, model.features, batch_size, pipeline):
                    yield chunk[index], scene if isinstance(scene, AudioError) else Rows(scene.numpy()[None], None)
                continue
            for index, result in encode_timestamps(model, clips, model.features, batch_size, pipeline):
                yield chunk[index], Rows(*map(Tensor.numpy, result)) if isinstance(result, Timestamps) else result
                del result


def write_rows(path: Path, rows: RowSource, files: Sequence[Path]) -> None:
    """Write one ``.npz`` or ``.parquet`` of all rows of some files, in their order, never whole in memory."""
    write = _write_npz if path.suffix == ".npz" else _write_parquet
    write(path, rows, files)


def _write_npz(path: Path, parts: RowSource, files: Sequence[Path]) -> None:
    """An ``.npz`` written array by array, never whole in memory."""
    counts = parts.rows_of(files)
    total = sum(counts)

    def write(stream: IO[bytes]) -> None:
        with zipfile.ZipFile(stream, "w") as archive:
            _write_member(archive, "files", np.array([str(file) for file in files]))
            _write_member(archive, "settings", np.array(json.dumps(parts.settings)))
            shape = (total, parts.settings["dim"])
            _stream_member(archive, "embeddings", shape, (block for _, block, _ in parts.chunks(files)))
            if parts.timed:
                _write_member(archive, "offsets", np.cumsum([0, *counts]))
                _stream_member(archive, "timestamps", (total,), (times for _, _, times in parts.chunks(files)))

    _write_whole(path, write)


def _write_member(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _stream_member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], blocks: Iterable[Array]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        _write_array(member, shape, blocks)


def _write_parquet(path: Path, parts: RowSource, files: Sequence[Path]) -> None:
    """One row an embedding: ``file``, ``timestamp_ms`` (if timed), ``embedding``; settings in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    dim = parts.settings["dim"]
    fields = [pa.field("file", pa.string()), pa.field("embedding", pa.list_(pa.float32(), dim))]
    if parts.timed:
        fields.insert(1, pa.field("timestamp_ms", pa.float32()))
    schema = pa.schema(fields, metadata={"m2d_embed": json.dumps(parts.settings)})
    # Float embeddings hardly compress; zstd is for the names.
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for names, block, times in parts.chunks(files):
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), dim)
            columns = [pa.array(names), pa.array(times), vectors] if parts.timed else [pa.array(names), vectors]
            writer.write_table(pa.table(columns, schema=schema))


def _save_arrays(path: Path, arrays: Sequence[Array]) -> None:
    """Write arrays one after the other as one."""
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    _write_whole(path, lambda stream: _write_array(stream, shape, arrays))


def _write_array(stream: IO[bytes], shape: tuple[int, ...], blocks: Iterable[Array]) -> None:
    """An ``.npy`` of consecutive blocks. Unlike ``np.save``, says so in the usual way when the disk is full."""
    np.lib.format.write_array_header_2_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    for block in blocks:
        stream.write(np.ascontiguousarray(block, dtype="<f4").data)


def _write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file that appears under its name only when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            write(stream)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _fingerprint(model: M2D) -> str:
    """A hash of all weights: two models of one name need not be the same."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]
