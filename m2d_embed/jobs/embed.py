"""A list of sound files -> embeddings on disk: in batches, skipping bad files, resuming where a run was killed.

Results are kept in a ``PartStore`` as they come. One for all clips, ``.npz`` or ``.parquet``, is put together at the
end, from a store beside it (``<output>.partial/``), which is then removed. In a folder of one ``.npy`` a clip these are
the results; the store in it says which are whole, and stays. Nothing appears under its final name before it is whole.

Names in an output are those that the files were given by, and its settings say in which folder (``root``). A run that
is resumed from another folder, or with other names for the same files, goes on.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from m2d_embed.audio.clips import Clip
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.files import atomic_write, atomic_writes
from m2d_embed.jobs.arrays import write_array
from m2d_embed.jobs.outputs import EMBEDDINGS, ENDINGS, TIMES, write_output
from m2d_embed.jobs.settings import Kind, job_settings
from m2d_embed.jobs.store import Entry, PartStore, Stamp, key_of, stamp_of, stamps_number
from m2d_embed.m2d import M2D
from m2d_embed.runtime.batching import DEFAULT_PIPELINE, Pipeline, Timestamps, encode_scenes, encode_timestamps
from m2d_embed.runtime.profiling import OPENING, WRITING

Array = npt.NDArray[Any]

OnProgress = Callable[[Path, AudioError | None], None]

STORE_IN_FOLDER = "_m2d_embed"  # readers of folders of Parquet files pass over such a name
_CLIPS_AT_A_TIME = 2048  # looked at and sorted together
_SECONDS_A_PART = 5.0  # at most this much work is lost when a run is killed
_BYTES_A_PART = 64 << 20
_LONGEST_NAME = 255  # bytes, on most file systems
_MOST_READS = 2  # of a file that changes while it is read


class Result(NamedTuple):
    """The embeddings of one clip, (rows, D) float32, and their times in ms, (rows,) float64; a scene has one row."""

    embeddings: Array
    times: Array | None


@dataclass(frozen=True)
class Summary:
    """What a run did: files embedded now, files found done from an earlier run, and the bad ones with their errors."""

    embedded: int
    resumed: int
    failed: dict[Path, AudioError]


class Options(NamedTuple):
    """How files are embedded, as in ``embed_files``; results do not depend on it."""

    batch_size: int
    on_progress: OnProgress
    pipeline: Pipeline


def embed_files(
    model: M2D,
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    kind: Kind = "scene",
    batch_size: int = 32,
    overwrite: bool = False,
    on_progress: OnProgress = lambda file, error: None,
    pipeline: Pipeline = DEFAULT_PIPELINE,
) -> Summary:
    """Embed files into ``output``. Give the same call again after it was killed, and it goes on.

    Args:
        model: its ``features`` say what an embedding is.
        files: what to embed; the output keeps their order and their names.
        output: ``*.npz``, ``*.parquet``, or a folder that gets one ``.npy`` a clip.
        kind: "scene" or "timestamps", with their times in ms.
        batch_size: windows encoded at a time, at most.
        overwrite: replace an existing output, and drop what an unfinished run left.
        on_progress: called for each file as it is done, with its error if it is a bad one.
        pipeline: how many threads read files ahead, and who is told where the time goes.

    Returns:
        What was done. Bad files are left out of the output, and have their errors here.

    Raises:
        BusyError: if another run is at work on this output.
        ConfigError: if the output exists, its ending is unknown, an unfinished run had other settings, or two files
            would have one output.
        OSError: if the disk is full or not writable; what is done by then is kept.
    """
    paths = [Path(file) for file in files]
    made = open_output(Path(output), kind, paths)
    with made.store.claim():
        made.begin(job_settings(model, kind), overwrite)
        summary = embed_missing(made, model, paths, Options(batch_size, on_progress, pipeline))
        with pipeline.stopwatch.stage(WRITING):
            made.finish([file for file in paths if file not in summary.failed])
    return summary


def embed_missing(output: Output, model: M2D, files: Sequence[Path], options: Options) -> Summary:
    """Embed the files that are not done yet. What is done is kept, whatever ends this."""
    missing = [file for file in files if not output.done(file)]
    failed: dict[Path, AudioError] = {}
    writing = options.pipeline.stopwatch.stage

    def take(file: Path, stamp: Stamp, result: Result | AudioError) -> None:
        if isinstance(result, AudioError):
            failed[file] = result
        with writing(WRITING):
            output.add(file, stamp, result)
        options.on_progress(file, result if isinstance(result, AudioError) else None)

    changed = missing
    try:
        for _ in range(_MOST_READS):
            changed = list(_embed_unchanged(model, changed, output.kind, options, take))
        for file in changed:
            take(file, stamp_of(file), AudioError(f"{file}: changes while it is read; embed it when it is complete."))
    except BaseException:
        with suppress(OSError):  # what ended it is the better news
            output.flush()
        raise
    with writing(WRITING):
        output.flush()
    return Summary(len(missing) - len(failed), len(files) - len(missing), failed)


def _embed_unchanged(
    model: M2D,
    files: Sequence[Path],
    kind: Kind,
    options: Options,
    take: Callable[[Path, Stamp, Result | AudioError], None],
) -> Iterator[Path]:
    """Embed files; yield those that changed meanwhile, whose embeddings may be of a mixture."""
    with closing(_results(model, files, kind, options)) as results:
        for file, stamp, result in results:
            if stamp_of(file) == stamp:
                take(file, stamp, result)
            else:
                yield file
            del result  # an hour of timestamps is not held until the next clip is done


def _opened(
    model: M2D, files: Sequence[Path], pipeline: Pipeline
) -> Generator[list[tuple[Path, Stamp, Clip | AudioError]], None, None]:
    """Look at the files, some thousands at a time; the next ones in threads, while these are embedded."""

    def look(file: Path) -> tuple[Path, Stamp, Clip | AudioError]:
        return file, stamp_of(file), next(model.open_clips([file]))  # the stamp first

    chunks = [files[start : start + _CLIPS_AT_A_TIME] for start in range(0, len(files), _CLIPS_AT_A_TIME)]
    pool = ThreadPoolExecutor(max(1, pipeline.threads_for(model.device)))
    looking: deque[Iterator[tuple[Path, Stamp, Clip | AudioError]]] = deque()
    try:
        for number in range(len(chunks)):
            looking += [pool.map(look, ahead) for ahead in chunks[number + len(looking) : number + 2]]
            with pipeline.stopwatch.stage(OPENING):
                clips = list(looking.popleft())
            yield clips
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@torch.no_grad()
def _results(
    model: M2D, files: Sequence[Path], kind: Kind, options: Options
) -> Generator[tuple[Path, Stamp, Result | AudioError], None, None]:
    size, pipeline = options.batch_size, options.pipeline
    with closing(_opened(model, files, pipeline)) as chunks:
        for chunk in chunks:
            clips = [clip for _, _, clip in chunk]
            if kind == "scene":
                for index, scene in encode_scenes(model, clips, model.features, size, pipeline):
                    yield (
                        *chunk[index][:2],
                        scene if isinstance(scene, AudioError) else Result(scene.numpy()[None], None),
                    )
                continue
            for index, result in encode_timestamps(model, clips, model.features, size, pipeline):
                yield (
                    *chunk[index][:2],
                    Result(*map(Tensor.numpy, result)) if isinstance(result, Timestamps) else result,
                )
                del result


# --- outputs ------------------------------------------------------------------------------------------------------


def open_output(output: Path, kind: Kind, files: Sequence[Path]) -> Output:
    """Choose by the output's name how results are kept.

    Raises:
        ConfigError: if the name means nothing, or something of another kind has it.
    """
    if output.suffix not in (*ENDINGS, ""):
        raise ConfigError(f"{output}: unknown kind of output; use .npz, .parquet, or a folder for one .npy a clip.")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: the folder {output.parent} does not exist.")
    if output.exists() and output.is_dir() != (not output.suffix):
        raise ConfigError(f"{output} is {'a folder' if output.is_dir() else 'a file'}; choose another name.")
    return FileOutput(output, kind) if output.suffix else FolderOutput(output, kind, files)


class Output(ABC):
    """Where results go: kept for some seconds, then written as a part."""

    def __init__(self, output: Path, kind: Kind, store: PartStore):
        self.output = output
        self.kind: Kind = kind
        self.store = store
        self.settings: dict[str, Any] = {}
        self._pending: list[tuple[Path, Stamp, Result | AudioError]] = []
        self._pending_bytes = 0
        self._last_written = time.monotonic()
        self._writing: Future[None] | None = None

    @abstractmethod
    def begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Take up what is there; with everything claimed."""

    @abstractmethod
    def join(self, settings: dict[str, Any]) -> None:
        """Take up what is there beside others at work; with a share claimed."""

    def done(self, file: Path) -> bool:
        """Whether a file is done, and has not changed since."""
        return self.store.done(key_of(file), stamp_of(file))

    def add(self, file: Path, stamp: Stamp, result: Result | AudioError) -> None:
        """Keep one clip; every few seconds, or when there is much, write what has come as a part, in a thread.

        Raises:
            OSError: if a part could not be written, maybe the one before.
        """
        self._pending.append((file, stamp, result))
        self._pending_bytes += result.embeddings.nbytes if isinstance(result, Result) else 0
        if self._pending_bytes > _BYTES_A_PART or time.monotonic() - self._last_written > _SECONDS_A_PART:
            self._write_pending()

    def flush(self) -> None:
        """Write what has come as a part, and wait until it is written."""
        self._write_pending()
        self._wait()

    def _write_pending(self) -> None:
        self._wait()  # one at a time: no more than two parts are in memory
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if pending:
            pool = ThreadPoolExecutor(1)
            self._writing = pool.submit(self._write, pending)
            pool.shutdown(wait=False)
        self._last_written = time.monotonic()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @abstractmethod
    def _write(self, pending: Sequence[tuple[Path, Stamp, Result | AudioError]]) -> None:
        """Write results and record them."""

    @abstractmethod
    def finish(self, files: Sequence[Path]) -> None:
        """Make the output of these files, all of which are done."""


class FileOutput(Output):
    """One ``.npz`` or ``.parquet`` for all clips, put together from parts at the end."""

    def __init__(self, output: Path, kind: Kind):
        super().__init__(output, kind, PartStore(output.with_name(f"{output.name}.partial"), output))
        self._finished = self.store.folder / "part-finished"  # the output is whole, but for its name

    def begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        if self.output.exists() and not overwrite:
            self.tidy_finished()
            raise ConfigError(f"{self.output} exists; choose another name, or replace it with --overwrite.")
        if overwrite:
            self.store.forget_everything()
        self.join(settings)
        self.store.remove_unfinished()

    def tidy_finished(self) -> None:
        """Remove the store beside an output that is there, unless a run that is to replace it has begun."""
        if self._finished.exists() or not self.store.is_begun:  # killed while it removed it, or made by a lock of ours
            self.store.remove()

    def join(self, settings: dict[str, Any]) -> None:
        self.settings = settings | {"root": os.getcwd()}  # noqa: PTH109
        self.store.open(settings)
        self.store.check()

    def _write(self, pending: Sequence[tuple[Path, Stamp, Result | AudioError]]) -> None:
        entries = [_entry(*one) for one in pending]
        good = [result for _, _, result in pending if isinstance(result, Result)]
        arrays = {EMBEDDINGS: [result.embeddings for result in good]} if good else {}
        if good and self.kind == "timestamps":
            arrays[TIMES] = [result.times for result in good if result.times is not None]
        self.store.add(entries, arrays)

    def finish(self, files: Sequence[Path]) -> None:
        """Put the parts together in the files' order, and remove them. Of no files at all nothing is left."""
        if files:
            stamps = stamps_number((key, self.store.stamp(key)) for key in map(key_of, files))
            with atomic_write(self.output, within=self.store.folder) as partial:
                write_output(partial, self.output.suffix, self.store, files, self.settings | {"stamps": stamps})
                self._finished.touch()
        else:
            self.output.unlink(missing_ok=True)
        self.store.remove()


class FolderOutput(Output):
    """One ``.npy`` a clip, ``<clip>.npy``, and with timestamps ``<clip>.times.npy`` beside it.

    Their places are relative to the deepest folder that held all files of the first run, and stay when files are
    added: those of other folders go to where they are from the nearest folder above both.
    """

    def __init__(self, output: Path, kind: Kind, files: Sequence[Path]):
        super().__init__(output, kind, PartStore(output / STORE_IN_FOLDER, output, data=output))
        self._files = files
        self._root = ""

    def begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        if overwrite:
            self.store.forget_everything()
        self.join(settings)
        self.store.remove_unfinished()

    def join(self, settings: dict[str, Any]) -> None:
        self._root = self.store.settings().get("_root") or _common_folder(self._files)
        self._refuse_impossible_names()  # before anything is recorded
        self.store.open(settings | {"_root": self._root})
        self.store.check()

    def _refuse_impossible_names(self) -> None:
        taken = {self.output / name: Path(key) for name, key in self.store.owners().items()}
        for key, file in {key_of(file): file for file in self._files}.items():
            for target in self._targets(file):
                other = taken.setdefault(target, file)
                if key_of(other) != key:
                    raise ConfigError(
                        f"{other} and {file} would both be {target}; rename one of them, or take a .parquet or .npz."
                    )
                if len(os.fsencode(target.name)) > _LONGEST_NAME:
                    raise ConfigError(f"{file}: {target.name} is too long for a name; take a .parquet or .npz.")

    def _targets(self, file: Path) -> list[Path]:
        folder = os.path.relpath(os.path.dirname(key_of(file)), self._root)  # noqa: PTH120
        inside = [name for name in Path(folder).parts if name != os.pardir]
        target = self.output.joinpath(*inside, f"{file.name}.npy")
        return [target] if self.kind == "scene" else [target, target.with_name(f"{file.name}.times.npy")]

    def _write(self, pending: Sequence[tuple[Path, Stamp, Result | AudioError]]) -> None:
        entries, written = [], []
        with atomic_writes(self.store.folder) as new_file:
            for file, stamp, result in pending:
                arrays = _arrays_of(result)
                targets = self._targets(file)[: len(arrays)]
                for target, array in zip(targets, arrays, strict=True):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with new_file(target).open("wb") as stream:
                        write_array(stream, [array])
                names = tuple(target.relative_to(self.output).as_posix() for target in targets)
                entries.append(_entry(file, stamp, result)._replace(files=names))
                written += targets
                if isinstance(result, AudioError) and self.store.has(key_of(file)):
                    for target in self._targets(file):  # of what the file was before
                        target.unlink(missing_ok=True)
        self.store.commit(self.store.new_name(), entries, written)

    def finish(self, files: Sequence[Path]) -> None:
        """Nothing is left to do."""


def _arrays_of(result: Result | AudioError) -> list[Array]:
    """A folder's arrays of a clip: (D,) of a scene, (rows, D) and (rows,) of timestamps, none of a bad file."""
    if isinstance(result, AudioError):
        return []
    return [result.embeddings[0]] if result.times is None else [result.embeddings, result.times]


def _entry(file: Path, stamp: Stamp, result: Result | AudioError) -> Entry:
    if isinstance(result, AudioError):
        return Entry(key_of(file), 0, stamp, str(result))
    return Entry(key_of(file), len(result.embeddings), stamp)


def _common_folder(files: Sequence[Path]) -> str:
    """The deepest folder that holds all files, without ``..``."""
    folders = {os.path.dirname(key_of(file)) for file in files} or {os.getcwd()}  # noqa: PTH109, PTH120
    try:
        return os.path.commonpath(folders)
    except ValueError:  # on several drives of Windows
        return min(folders)
