"""What a job leaves behind: one ``.npz`` or ``.parquet`` of all rows, never whole in memory; and reading it back."""

from __future__ import annotations

import io
import json
import logging
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from m2d_embed.errors import ConfigError
from m2d_embed.jobs.arrays import ArrayReader, write_array, write_array_header
from m2d_embed.jobs.store import Located, PartStore, key_of

log = logging.getLogger("m2d_embed")

Array = npt.NDArray[Any]

EMBEDDINGS, TIMES = "embeddings", "times"  # arrays of a part
ENDINGS = (".npz", ".parquet")
_BLOCK_BYTES = 4 << 20  # of embeddings written at a time
_MOST_BEHIND = 8  # pages of Parquet, 1 MiB each, that are waiting to be written
_NAMES_AT_A_TIME = 1 << 14
_NAMES_COLUMN, _TIMES_COLUMN, _EMBEDDINGS_COLUMN = "file", "timestamp_ms", "embedding"


def write_output(path: Path, suffix: str, store: PartStore, files: Sequence[Path], settings: dict[str, Any]) -> None:
    """Write all rows of some results.

    Args:
        path: of the output.
        suffix: what it becomes, ``.npz`` or ``.parquet``.
        store: holds the results, each with ``EMBEDDINGS``, (rows, ``dim``) float32, and timed ones with ``TIMES``,
            (rows,) float64 in ms.
        files: those whose results these are, in this order.
        settings: of the job; they go into the output.
    """
    (_write_npz if suffix == ".npz" else _write_parquet)(path, store, files, settings)


def _write_parquet(path: Path, store: PartStore, files: Sequence[Path], settings: dict[str, Any]) -> None:
    """One row an embedding; settings in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    dim, timed = settings["dim"], settings["kind"] == "timestamps"
    schema = output_schema(settings)
    located = store.locate(map(key_of, files))
    # Embeddings do not compress. By default levels are encoded for 1,024 of their values at a time, at half the speed.
    options: dict[str, Any] = {
        "compression": {_NAMES_COLUMN: "zstd", _TIMES_COLUMN: "zstd", f"{_EMBEDDINGS_COLUMN}.list.element": "none"},
        "use_dictionary": [_NAMES_COLUMN],
        "write_statistics": [_NAMES_COLUMN, _TIMES_COLUMN],
        "write_batch_size": 1 << 14,
    }
    with (
        closing(_WrittenBehind(path)) as sink,
        pq.ParquetWriter(sink, schema, **options) as writer,
        closing(ArrayReader()) as reader,
    ):
        for first, block, vectors, *times in _gathered([EMBEDDINGS, TIMES][: 1 + timed], store, located, dim, reader):
            names = pa.array(map(str, files[first : first + len(block.rows)]), pa.string())
            places = pa.array(np.repeat(np.arange(len(names), dtype=np.int32), block.rows))
            columns = [pa.DictionaryArray.from_arrays(places, names).dictionary_decode()]
            columns += map(pa.array, times)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=schema.types[-1]))
            writer.write_table(pa.table(columns, schema=schema))


class _WrittenBehind(io.RawIOBase):
    """A file that is written in a thread, and goes to the disk at once, while what comes next is encoded."""

    def __init__(self, path: Path):
        self._stream = path.open("wb")
        self._pool = ThreadPoolExecutor(1)
        self._writing: deque[Future[None]] = deque()
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        while len(self._writing) >= _MOST_BEHIND:
            self._writing.popleft().result()
        size = memoryview(data).nbytes
        self._writing.append(self._pool.submit(self._write, data, self._position, size))
        self._position += size
        return size

    def _write(self, data: Any, start: int, size: int) -> None:
        self._stream.write(data)
        if hasattr(os, "posix_fadvise"):  # else the system keeps gigabytes for the end, when nothing else is to be done
            os.posix_fadvise(self._stream.fileno(), start, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        try:
            while self._writing:
                self._writing.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._stream.close()
            super().close()


def output_schema(settings: dict[str, Any]) -> Any:
    """The Arrow schema of embeddings with their settings: ``file``, ``timestamp_ms`` (if timed), ``embedding``."""
    import pyarrow as pa

    timed = [pa.field(_TIMES_COLUMN, pa.float64())] if settings["kind"] == "timestamps" else []
    vectors = pa.field(_EMBEDDINGS_COLUMN, pa.list_(pa.float32(), settings["dim"]))
    return pa.schema([pa.field(_NAMES_COLUMN, pa.string()), *timed, vectors], metadata=metadata_of(settings))


def metadata_of(settings: dict[str, Any]) -> dict[str, str]:
    """How settings are kept in the metadata of Parquet files."""
    return {"m2d_embed": json.dumps(settings)}


def _write_npz(path: Path, store: PartStore, files: Sequence[Path], settings: dict[str, Any]) -> None:
    """Names, settings and embeddings; of timed ones also the times, and where each clip begins."""
    located = store.locate(map(key_of, files))
    total = int(located.rows.sum())
    with zipfile.ZipFile(path, "w") as archive, closing(ArrayReader()) as reader:
        with _member(archive, "files") as member:
            _write_names(member, files)
        with _member(archive, "settings") as member:
            np.lib.format.write_array(member, np.array(json.dumps(settings)), allow_pickle=False)
        with _member(archive, EMBEDDINGS) as member:
            write_array_header(member, np.dtype("<f4"), (total, settings["dim"]))
            for _, _, vectors in _gathered([EMBEDDINGS], store, located, settings["dim"], reader):
                member.write(vectors.data)
        if settings["kind"] == "timestamps":
            with _member(archive, "offsets") as member:
                write_array(member, [np.cumsum([0, *located.rows])])
            with _member(archive, "timestamps") as member:
                write_array_header(member, np.dtype("<f8"), (total,))
                for _, _, times in _gathered([TIMES], store, located, settings["dim"], reader):
                    member.write(times.data)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    return archive.open(f"{name}.npy", "w", force_zip64=True)  # also names may be more than 2 GiB


def _write_names(stream: IO[bytes], files: Sequence[Path]) -> None:
    dtype = np.dtype(f"<U{max(len(str(file)) for file in files)}")
    write_array_header(stream, dtype, (len(files),))
    for start in range(0, len(files), _NAMES_AT_A_TIME):
        stream.write(np.array([str(file) for file in files[start : start + _NAMES_AT_A_TIME]], dtype).tobytes())


def _gathered(
    arrays: Sequence[str], store: PartStore, located: Located, dim: int, reader: ArrayReader
) -> Iterator[tuple[Any, ...]]:
    """Some rows of all results at a time; the next ones are read while these are written.

    Yields:
        Index of the first result, where these rows are, and the arrays of them. A long result is spread over several.
    """

    def read(first: int, block: Located) -> tuple[Any, ...]:
        return first, block, *(store.read(array, block, reader) for array in arrays)

    with ThreadPoolExecutor(1) as pool:
        ahead: Future[tuple[Any, ...]] | None = None
        for first, block in _blocks(located, max(1, _BLOCK_BYTES // (4 * dim))):
            following = pool.submit(read, first, block)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


def _blocks(located: Located, most_rows: int) -> Iterator[tuple[int, Located]]:
    """Cut results into blocks of ``most_rows``: the index of the first, and which rows of it and those after it."""
    ends = np.cumsum(located.rows)
    for start in range(0, int(ends[-1]), most_rows):
        stop = min(start + most_rows, int(ends[-1]))
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        parts, firsts, rows = (column[first : last + 1].copy() for column in located)
        skipped = start - int(ends[first] - located.rows[first])
        firsts[0] += skipped
        rows[0] -= skipped
        rows[-1] -= int(ends[last]) - stop
        yield first, Located(parts, firsts, rows)


# --- reading back -------------------------------------------------------------------------------------------------


class Scenes(NamedTuple):
    """Scene embeddings, (files, D) float32, of some files, and the settings they were made with."""

    names: list[str]
    embeddings: npt.NDArray[np.float32]
    settings: dict[str, Any]


def find_outputs(paths: Sequence[Path]) -> list[Path]:
    """The ``.npz`` and ``.parquet`` files that paths, folders of Parquet files and glob patterns name; [] if none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(path.glob("*.parquet"))
        elif path.exists():
            found += [path] if path.suffix in ENDINGS else []
        else:
            root = Path(path.anchor)
            matches = root.glob(str(path.relative_to(root))) if path.suffix in ENDINGS else ()
            found += sorted(match for match in matches if match.is_file()) or ([path] if path.suffix in ENDINGS else [])
    return found


def read_scenes(files: Path | Sequence[Path]) -> Scenes:
    """Read back scene embeddings. Rows of bad clips are left out, with a warning.

    Args:
        files: an output, a folder of Parquet files, a pattern of these, or several that are of one model.

    Raises:
        ConfigError: if a file holds something else, has lost its settings, or several are of different settings.
    """
    given = [files] if isinstance(files, Path) else files
    parts = [_read_part(file) for file in find_outputs(given)]
    if not parts:
        raise ConfigError(f"{', '.join(map(str, given))}: no .npz or .parquet there.")
    first = parts[0].settings
    for part in parts[1:]:
        if part.settings.get("fingerprint") != first.get("fingerprint"):
            raise ConfigError("these files hold embeddings of different models or settings; give those of one.")
    names = [name for part in parts for name in part.names]
    return Scenes(names, np.concatenate([part.embeddings for part in parts]), first)


def _read_part(file: Path) -> Scenes:
    read: Callable[[Path], Scenes] = _read_npz if file.suffix == ".npz" else _read_parquet
    try:
        scenes = read(file)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file.") from None
    except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: not embeddings written by m2d-embed ({error}).") from error
    return scenes


def _check_kind(file: Path, settings: dict[str, Any]) -> None:
    if settings.get("kind") != "scene":
        raise ConfigError(f"{file}: holds {settings.get('kind')} embeddings; scene embeddings are needed.")


def _read_npz(file: Path) -> Scenes:
    with np.load(file, allow_pickle=False) as held:
        settings = json.loads(str(held["settings"].item()))
        _check_kind(file, settings)
        return Scenes([str(name) for name in held["files"]], held[EMBEDDINGS], settings)


def _read_parquet(file: Path) -> Scenes:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        metadata = opened.schema_arrow.metadata or {}
        if b"m2d_embed" not in metadata:
            if {_NAMES_COLUMN, _EMBEDDINGS_COLUMN} <= {*opened.schema_arrow.names}:
                raise ConfigError(
                    f"{file}: does not say which model made it. Programs that save a table anew (pandas, polars, "
                    "DuckDB) drop the metadata that m2d-embed writes; give the file as it was written, or embed the "
                    "sounds again."
                )
            raise KeyError("no columns file and embedding")
        settings = json.loads(metadata[b"m2d_embed"])
        _check_kind(file, settings)
        names: list[str] = []
        vectors = [np.empty((0, settings["dim"]), np.float32)]
        skipped = 0
        for batch in opened.iter_batches(columns=[_NAMES_COLUMN, _EMBEDDINGS_COLUMN]):
            good = batch.filter(batch[_EMBEDDINGS_COLUMN].is_valid())
            skipped += len(batch) - len(good)
            names += good[_NAMES_COLUMN].to_pylist()
            vectors.append(good[_EMBEDDINGS_COLUMN].flatten().to_numpy().reshape(len(good), -1))
    if skipped:
        log.warning("%s: %d rows of clips that could not be embedded are left out.", file, skipped)
    return Scenes(names, np.concatenate(vectors), settings)


def names_in(file: Path) -> tuple[set[str], dict[str, Any]]:
    """The names in an output, and its settings.

    Raises:
        ConfigError: if it was not written by m2d-embed.
    """
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as held:
                return {str(name) for name in held["files"]}, json.loads(str(held["settings"].item()))
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as opened:
            settings = json.loads((opened.schema_arrow.metadata or {})[b"m2d_embed"])
            batches: Iterable[Any] = opened.iter_batches(columns=[_NAMES_COLUMN])
            return {name for batch in batches for name in batch[_NAMES_COLUMN].unique().to_pylist()}, settings
    except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{file} exists and is not of this job ({error}); choose another name.") from error
