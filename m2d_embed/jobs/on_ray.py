"""Embed a large collection with Ray Data, on one machine or a cluster: ``embed_dataset``. Needs the extra ``ray``.

The clips are cut into parts. An actor, which has loaded the model once, embeds one part after the other, each into a
parquet file of its own, ``part-<hash of its rows>.parquet``. In ``_m2d_embed/`` beside them is the ``PartStore`` that
records them. A part that is lost with its worker is made again under the same name, so nothing is missing and nothing
is there twice; a second call goes on with what has no record, or has changed since.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from m2d_embed.audio.clips import Clip, find_audio, open_clip
from m2d_embed.backends.devices import parse_dtype
from m2d_embed.config import FeatureConfig
from m2d_embed.errors import AudioError, ConfigError, M2DEmbedError, UnsupportedError
from m2d_embed.files import atomic_write
from m2d_embed.jobs.embed import STORE_IN_FOLDER, Summary
from m2d_embed.jobs.outputs import metadata_of
from m2d_embed.jobs.settings import Kind, job_settings
from m2d_embed.jobs.store import Entry, PartStore, Record, key_of, stamp_of
from m2d_embed.m2d import M2D
from m2d_embed.runtime.batching import Pipeline, Timestamps, encode_scenes, encode_timestamps

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

Result = tuple[Any, ...] | AudioError  # embeddings (rows, D) and times (rows,) or None, of one clip

_MADE_HERE = ("timestamp_ms", "embedding", "error")
_BYTES_A_WRITE = 64 << 20
_MOST_TRIES = 4  # of one part
_PARTS_AN_ACTOR = 4  # at least, so that actors end at about the same time


@dataclass(frozen=True)
class Actors:
    """The processes that share the work.

    ``number`` of them, or None: as many as Ray finds room and work for. Each has ``cpus`` cores, which it uses for
    decoding and, without a GPU, for the model, and ``gpus`` GPUs, which may be a fraction.
    """

    number: int | None = None
    cpus: int = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if self.number is not None and self.number < 1:
            raise ConfigError(f"actors: number must be at least 1, not {self.number}.")
        if self.cpus < 1 or self.gpus < 0:
            raise ConfigError(f"actors: needs cpus >= 1 and gpus >= 0, not cpus={self.cpus} and gpus={self.gpus}.")


def embed_dataset(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | ray.data.Dataset,
    output: str | os.PathLike[str],
    model: str = "",
    *,
    kind: Kind = "scene",
    features: FeatureConfig | None = None,
    dtype: str | None = None,
    batch_size: int = 32,
    clips_per_part: int = 512,
    on_error: Literal["record", "raise"] = "record",
    actors: Actors | None = None,
    overwrite: bool = False,
) -> Summary:
    """Embed files or the rows of a dataset into a folder of parquet files.

    The columns are ``file``, ``timestamp_ms`` (with timestamps), ``embedding``, ``error``, and what others the dataset
    has; the settings are in the metadata, as in the files of ``embed_files``. A bad clip has one row with its error and
    without an embedding. Rows are in no fixed order.

    Call it again with the same arguments after it was stopped. Files that are done and have not changed in size or time
    since are not embedded again. A dataset is taken up part by part: it must give the same rows in the same order.

    Args:
        source: a folder, glob pattern or file, or several; or a ``ray.data.Dataset`` with a column ``file`` of paths,
            or ``audio`` of samples, (n,) or (channels, n), with their rate in ``sample_rate`` (else the model's).
            ``audio`` itself is not kept. Paths must lead to the same files on every machine.
        output: a folder that every machine of the cluster sees.
        model: which one, as in ``M2D.from_pretrained``; each actor loads it by that name.
        kind: scene embeddings, or timestamp embeddings with their times.
        features: which features; by default those of ``FeatureConfig()``.
        dtype: of the matrices, as in ``M2D.from_pretrained``.
        batch_size: windows encoded at a time, at most.
        clips_per_part: clips in one parquet file, at most; so much work is lost with a worker.
        on_error: "record" bad clips, or "raise" the first one's error; what is done by then is kept.
        actors: how many processes, with how many cores and GPUs each.
        overwrite: drop what is in the output, and start anew.

    Returns:
        How many clips were embedded now, how many earlier, and the bad ones with their errors.

    Raises:
        UnsupportedError: if Ray is not installed, or a path is a URL.
        AudioError: if a path does not exist, or with ``on_error="raise"`` for a bad clip.
        ConfigError: if the output is of another job, or no machine has what an actor needs.
        M2DEmbedError: if an actor cannot write, if several are lost over the same clips, or load different models.
    """
    _require_ray()
    import ray.data

    if kind not in ("scene", "timestamps"):
        raise ConfigError(f'kind is "scene" or "timestamps", not {kind!r}.')
    if on_error not in ("record", "raise"):
        raise ConfigError(f'on_error is "record" or "raise", not {on_error!r}.')
    if dtype is not None:
        parse_dtype(dtype)
    if clips_per_part < 1:
        raise ConfigError(f"clips_per_part must be at least 1, not {clips_per_part}.")
    files = [] if isinstance(source, ray.data.Dataset) else _find_files(source)
    run = uuid.uuid4().hex
    folder = _OutputFolder(_local_path(output), run)
    job = _Job(
        output=folder.path,
        model=str(_local_path(model)) if model and Path(model).expanduser().exists() else model,
        kind=kind,
        features=features or FeatureConfig(),
        dtype=dtype,
        batch_size=batch_size,
        actors=actors or Actors(),
        run=run,
    )
    names = {key_of(file): str(file) for file in files}
    tally = _Tally(on_error, run, names)
    with folder.store.claim():
        settings = _settings_of_a_worker(job)
        if isinstance(source, ray.data.Dataset):
            root = folder.begin(settings | {"source": "dataset", "clips_per_part": clips_per_part}, overwrite)
            _run(replace(job, settings=settings, root=root), source, clips_per_part, tally)
            folder.refuse_parts_besides(tally.parts)
        else:
            root = folder.begin(settings | {"source": "files"}, overwrite)
            remaining = folder.take_up(names, tally)
            if remaining:
                clips = _clips_a_part(len(remaining), clips_per_part, job.actors)
                # From another folder than before, names would lead elsewhere than those of the parts that are there.
                shown = [names[key] if root == str(Path.cwd()) else key for key in remaining]
                _run(replace(job, settings=settings, root=root), _dataset_of(shown, clips), clips, tally)
            folder.remove_parts_besides(tally.parts)  # by an actor of a killed run that lived on for a while
    return tally.summary()


def _require_ray() -> None:
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"embed_dataset needs Ray Data ({error}): pip install 'm2d-embed[ray]'") from error


@dataclass(frozen=True)
class _Job:
    """What an actor is told; the model itself it loads by its name."""

    output: Path
    model: str
    kind: Kind
    features: FeatureConfig
    dtype: str | None
    batch_size: int
    actors: Actors
    run: str
    settings: dict[str, Any] = field(default_factory=dict)
    root: str = ""  # the folder from which relative paths lead to files

    def load_model(self) -> M2D:
        device, threads = "cuda" if self.actors.gpus else "cpu", self.actors.cpus
        return M2D.from_pretrained(self.model, device=device, dtype=self.dtype, features=self.features, threads=threads)


@dataclass
class _Tally:
    """Adds up what the records of parts say. ``names`` are those by which files were given, of their keys."""

    on_error: str
    run: str
    names: Mapping[str, str] = field(default_factory=dict)
    embedded: int = 0
    resumed: int = 0
    failed: dict[Path, AudioError] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)

    def add(self, part: str, record: Record) -> None:
        """Count a part; raise the error of its first bad clip if that was asked for."""
        good = 0
        for entry in record.entries:
            good += not entry.error
            if entry.error and self.on_error == "raise":
                raise AudioError(entry.error)
            if entry.error:
                self.failed[Path(self.names.get(entry.key, entry.key))] = AudioError(entry.error)
        self.parts.add(part)
        if record.run == self.run:  # also if its actor was lost before it could say so, and the part found done
            self.embedded += good
        else:
            self.resumed += good

    def summary(self) -> Summary:
        return Summary(self.embedded, self.resumed, self.failed)


class _OutputFolder:
    """The folder of the parts, as the calling process sees it; with everything claimed."""

    def __init__(self, path: Path, run: str):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; name a folder, new or of an earlier call.")
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.parent} does not exist.")
        self.path = path
        self.store = _store_in(path, run)
        if path.exists() and not self.store.folder.exists() and any(path.iterdir()):
            raise ConfigError(f"{path} holds other things; name a folder that is new, empty, or of an earlier call.")

    def begin(self, settings: dict[str, Any], overwrite: bool) -> str:
        """Record or compare settings; remove what a killed run left half done, or, to overwrite, everything.

        Returns:
            The folder from which the names in the parts lead to the files, that of the first run.
        """
        if overwrite:
            self.store.forget_everything()
        recorded = self.store.open(settings | {"_root": str(Path.cwd())})
        self.store.check()
        self.store.remove_unfinished()
        whole = {*self.store.names()}
        for part in self.path.glob("part-*.parquet"):
            if part.stem not in whole:
                part.unlink()
        root: str = recorded["_root"]
        return root

    def take_up(self, files: Mapping[str, str], tally: _Tally) -> list[str]:
        """Count the parts whose files have not changed, and remove the others.

        Args:
            files: key -> name of each.
            tally: counts.

        Returns:
            The keys of what is still to be embedded.

        Raises:
            ConfigError: if a part holds a file that is not wanted: what is to become of it, the caller must say.
        """
        remaining = dict(files)  # in order
        for part, record in self._records():
            foreign = [entry.key for entry in record.entries if entry.key not in files]
            if foreign:
                raise ConfigError(
                    f"{self.path} also holds {foreign[0]}, which is not among the files; choose another folder, or "
                    "drop it with overwrite=True."
                )
            if any(stamp_of(entry.key) != entry.stamp for entry in record.entries):
                self.store.drop(part)
                continue
            tally.add(part, record)
            for entry in record.entries:
                remaining.pop(entry.key, None)
        return list(remaining)

    def _records(self) -> Iterator[tuple[str, Record]]:
        for part in self.store.names():
            record = self.store.record(part)
            if record is not None:
                yield part, record

    def remove_parts_besides(self, parts: set[str]) -> None:
        """Remove every part but these."""
        for part in self.store.names():
            if part not in parts:
                self.store.drop(part)

    def refuse_parts_besides(self, parts: set[str]) -> None:
        """Raise ConfigError if there are other parts than these."""
        others = [part for part in self.store.names() if part not in parts]
        if others:
            raise ConfigError(
                f"{self.path}: {len(others)} parts are of rows that the dataset did not give this time, e.g. "
                f"{others[0]}.parquet, so the folder holds more than the dataset; begin anew with overwrite=True."
            )


def _store_in(output: Path, run: str) -> PartStore:
    return PartStore(output / STORE_IN_FOLDER, output, data=output, run=run)


def _find_files(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that paths, folders and patterns name."""
    given = [source] if isinstance(source, str | os.PathLike) else source
    files = find_audio([Path(_no_url(path)).expanduser() for path in given])
    for file in files:
        try:
            str(file).encode()
        except UnicodeEncodeError as error:
            raise AudioError(f"{str(file)!a}: this name is not valid UTF-8; rename it.") from error
    return files


def _local_path(path: str | os.PathLike[str]) -> Path:
    return Path(key_of(Path(_no_url(path)).expanduser()))


def _no_url(path: str | os.PathLike[str]) -> str:
    if "://" in os.fspath(path):
        raise UnsupportedError(f"{path}: URLs are not supported; name a path that every machine of the cluster sees.")
    return os.fspath(path)


def _settings_of_a_worker(job: _Job) -> dict[str, Any]:
    """Load the model once where the actors will: it may not be found there, or be of another precision on a GPU."""
    import ray

    needed: dict[str, float] = {"CPU": job.actors.cpus, "GPU": job.actors.gpus}
    if not ray.is_initialized():
        ray.init()
    nodes = ray.nodes()
    if not any(all(node["Resources"].get(what, 0) >= n for what, n in needed.items()) for node in nodes):
        raise ConfigError(f"actors: no machine has cpus={needed['CPU']} and gpus={needed['GPU']:g} as each one needs.")
    load = ray.remote(num_cpus=needed["CPU"], num_gpus=needed["GPU"])(_load_and_describe)
    settings = ray.get(load.remote(job))
    if isinstance(settings, M2DEmbedError):
        raise settings
    described: dict[str, Any] = settings
    return described


def _load_and_describe(job: _Job) -> dict[str, Any] | M2DEmbedError:
    try:
        return job_settings(job.load_model(), job.kind)
    except M2DEmbedError as error:  # returned: Ray would raise an error of its own around it
        return error


def _clips_a_part(clips: int, most: int, actors: Actors) -> int:
    """Fewer than ``most`` where the actors would not have a few parts each."""
    import ray

    room = ray.cluster_resources()
    by_room = room.get("GPU", 0) / actors.gpus if actors.gpus else room.get("CPU", 1) / actors.cpus
    number = actors.number or max(1, int(by_room))
    return min(most, math.ceil(clips / (_PARTS_AN_ACTOR * number)))


def _dataset_of(files: Sequence[str], clips_per_part: int) -> ray.data.Dataset:
    """One block a part."""
    import pyarrow as pa
    import ray.data

    starts = range(0, len(files), clips_per_part)
    return ray.data.from_arrow([pa.table({"file": files[start : start + clips_per_part]}) for start in starts])


def _run(job: _Job, dataset: ray.data.Dataset, clips_per_part: int, tally: _Tally) -> None:
    """Embed a dataset, and count its parts as they are done."""
    import ray.data

    columns = dataset.columns() or []
    if "file" not in columns and "audio" not in columns:
        raise ConfigError(f"the dataset needs a column 'file' or 'audio'; it has {', '.join(columns) or 'none'}.")
    taken = [name for name in columns if name in _MADE_HERE]
    if taken:
        raise ConfigError(f"the dataset has a column {taken[0]!r} already; rename or drop it.")
    number = job.actors.number
    pool = ray.data.ActorPoolStrategy(min_size=1) if number is None else ray.data.ActorPoolStrategy(size=number)
    records = dataset.map_batches(
        _Embedder,
        fn_constructor_args=(job,),
        batch_size=clips_per_part,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=job.actors.cpus,
        num_gpus=job.actors.gpus or None,
    )
    options = records.context.execution_options
    in_order, options.preserve_order = options.preserve_order, True  # else blocks are put into batches as they arrive
    store = _store_in(job.output, job.run)
    done = cast("Generator[pa.Table]", iter(records.iter_batches(batch_size=None, batch_format="pyarrow")))
    try:
        with closing(done):  # stops the actors, too, if there is an error
            for shown in (json.loads(text) for table in done for text in table["done"].to_pylist()):
                if "error" in shown:
                    raise M2DEmbedError(shown["error"])
                if shown["part"] in tally.parts:
                    raise ConfigError(
                        f"the dataset gives the same rows twice, those of {shown['part']}.parquet; add a column that "
                        "tells them apart, or drop them."
                    )
                record = store.record(shown["part"])
                if record is None:
                    raise M2DEmbedError(f"{job.output}: the record of {shown['part']} is lost; try again to go on.")
                tally.add(shown["part"], record)
    finally:
        options.preserve_order = in_order


class _Embedder:
    """One actor: embeds parts and writes them. What it returns is one row a part, its name."""

    def __init__(self, job: _Job):
        self.job = job
        self.model = job.load_model()
        found = job_settings(self.model, job.kind)
        differing = sorted(key for key in found if found[key] != job.settings[key])
        # Raised here, Ray would start one actor after the other.
        self.error = f"{job.model}: not the same model on every machine ({', '.join(differing)})." if differing else ""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Embed a part, unless it is there already."""
        import pyarrow as pa

        try:
            shown = (
                {"error": self.error}
                if self.error
                else self._embed(_Batch(batch, self.model.sample_rate, self.job.root))
            )
        except OSError as error:  # the disk is full, or the folder is not there
            shown = {"error": f"{self.job.output}: {error}; what is done is kept, try again to go on."}
        return pa.table({"done": [json.dumps(shown)]})

    def _embed(self, batch: _Batch) -> dict[str, Any]:
        """Say which part is done, or what went wrong."""
        part = f"part-{batch.digest}"
        store = _store_in(self.job.output, self.job.run)
        if store.record(part) is not None:
            return {"part": part}
        tries = store.folder / f"{part}.tries"
        if tries.exists() and tries.stat().st_size >= _MOST_TRIES:  # Ray itself would try without end
            return {
                "error": f"{_MOST_TRIES} workers were lost over one part, for want of memory or by a file that crashes "
                f"its reader; it has {len(batch.names)} clips, from {batch.names[0]} to {batch.names[-1]}."
            }
        with tries.open("ab") as stream:
            stream.write(b".")
        file = self.job.output / f"{part}.parquet"
        with atomic_write(file, within=store.folder) as partial:
            entries = self._write(batch, partial)
        store.commit(part, entries, [file])
        tries.unlink(missing_ok=True)
        return {"part": part}

    def _write(self, batch: _Batch, path: Path) -> list[Entry]:
        """Write a part as parquet; return what is in it."""
        import pyarrow.parquet as pq

        schema = _schema(batch.kept, self.job.settings | {"root": self.job.root})
        entries = list(batch.entries)
        waiting: dict[int, Result] = {}
        size = 0
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for index, result in self._encode(batch.clips):
                waiting[index] = result = batch.unchanged(index, result)
                if isinstance(result, AudioError):
                    entries[index] = entries[index]._replace(error=str(result))
                else:
                    entries[index] = entries[index]._replace(rows=len(result[0]))
                    size += result[0].nbytes
                if size > _BYTES_A_WRITE:  # timestamps of long clips
                    writer.write_table(_table(waiting, batch.kept, schema))
                    waiting, size = {}, 0
            if waiting:
                writer.write_table(_table(waiting, batch.kept, schema))
        return entries

    def _encode(self, clips: Sequence[Clip | AudioError]) -> Iterator[tuple[int, Result]]:
        """Yield the index of each clip with its embeddings, (rows, D), and their times in ms or None."""
        job, cpus = self.job, self.job.actors.cpus
        # Without a GPU the model needs the cores itself.
        pipeline = Pipeline(cpus if job.actors.gpus else cpus // 4)
        with torch.no_grad():
            if job.kind == "scene":
                for index, scene in encode_scenes(self.model, clips, job.features, job.batch_size, pipeline):
                    yield index, scene if isinstance(scene, AudioError) else (scene.numpy()[None], None)
                return
            for index, result in encode_timestamps(self.model, clips, job.features, job.batch_size, pipeline):
                yield index, (*map(torch.Tensor.numpy, result),) if isinstance(result, Timestamps) else result


class _Batch:
    """The rows of one part: their clips, what is kept of them, and a digest that tells them from all others.

    Args:
        table: the rows.
        model_rate: in Hz.
        root: the folder from which relative paths lead to files.
    """

    def __init__(self, table: pa.Table, model_rate: int, root: str):
        self.kept = table.drop_columns(["audio"]) if "audio" in table.column_names else table
        others = self.kept.to_pylist()
        self.paths: list[str] = []
        if "audio" in table.column_names:
            audio = _arrays(table["audio"])
            rates = [row.get("sample_rate") for row in others]
            prints = [_plain(np.asarray(samples)) for samples in audio]
            self.names = [str(row.get("file") or f"row {i} ({prints[i][-1][:8]})") for i, row in enumerate(others)]
            self.entries = [Entry(name, 0) for name in self.names]
            given = zip(audio, rates, self.names, strict=True)
            identity: list[Any] = [[name, *found] for name, found in zip(self.names, prints, strict=True)]
        else:
            self.names = [str(row["file"]) for row in others]
            self.paths = [key_of(Path(root, name)) for name in self.names]
            self.entries = [Entry(path, 0, stamp_of(path)) for path in self.paths]
            given = zip(self.paths, [None] * len(others), self.names, strict=True)
            identity = [[entry.key, *entry.stamp] for entry in self.entries]
        self.clips = [_open(clip, rate, model_rate, name) for clip, rate, name in given]
        text = json.dumps([identity, others], default=_plain)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:24]

    def unchanged(self, index: int, result: Result) -> Result:
        """The result of a clip, or the error that its file has changed since the stamp of its entry was taken."""
        if not self.paths or stamp_of(self.paths[index]) == self.entries[index].stamp:
            return result
        return AudioError(f"{self.names[index]}: changes while it is read; embed it when it is complete.")


def _open(clip: Any, rate: int | None, model_rate: int, name: str) -> Clip | AudioError:
    try:
        return open_clip(clip, rate, model_rate, name)
    except AudioError as error:
        return error


def _arrays(column: pa.ChunkedArray) -> list[Any]:
    """The rows of a column of lists or tensors as arrays; Ray's tensors know how only chunk by chunk."""
    return [row for chunk in column.chunks for row in chunk.to_numpy(zero_copy_only=False)]


def _plain(value: Any) -> Any:
    """What stands for a value that JSON has no form for."""
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
    return value.hex() if isinstance(value, bytes) else repr(value)


def _schema(kept: pa.Table, settings: Mapping[str, Any]) -> pa.Schema:
    import pyarrow as pa

    timed = [pa.field("timestamp_ms", pa.float64())] if settings["kind"] == "timestamps" else []
    made = [*timed, pa.field("embedding", pa.list_(pa.float32(), settings["dim"])), pa.field("error", pa.string())]
    return pa.schema([*kept.schema, *made], metadata=metadata_of(dict(settings)))


def _table(results: Mapping[int, Result], kept: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows of some clips in their order; one row without an embedding for a bad clip."""
    import pyarrow as pa

    width = schema.field("embedding").type.list_size
    indices: list[int] = []
    errors: list[str | None] = []
    blocks, times = [], []
    for index in sorted(results):
        result = results[index]
        bad = isinstance(result, AudioError)
        embeddings, clock = (np.zeros((1, width), np.float32), None) if isinstance(result, AudioError) else result
        indices += [index] * len(embeddings)
        errors += [str(result) if bad else None] * len(embeddings)
        blocks.append(embeddings)
        times.append(np.full(len(embeddings), np.nan) if clock is None else clock)
    is_bad = np.array([error is not None for error in errors])
    values = pa.array(np.concatenate(blocks).ravel(), pa.float32())
    columns = list(kept.take(indices).columns)
    if "timestamp_ms" in schema.names:
        columns.append(pa.array(np.concatenate(times), mask=is_bad))
    columns.append(pa.FixedSizeListArray.from_arrays(values, width, mask=pa.array(is_bad)))
    columns.append(pa.array(errors, pa.string()))
    return pa.table(columns, schema=schema)
