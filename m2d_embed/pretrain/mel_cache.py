"""Log-mels of a whole small corpus on disk: a crop of one costs next to nothing.

A cache is a ``PartStore``. The frames of some files lie one after the other in each part, (frames, mels) float16, not
normalised, natural logarithm. It is of one front end, and of whatever files were asked for: a build that was stopped
goes on where it was, files that are new or have changed are added, and others may be asked for the next time.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import spawn
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from m2d_embed.audio.clips import Samples, open_clip
from m2d_embed.config import ModelConfig
from m2d_embed.errors import AudioError, ConfigError, TrainingError
from m2d_embed.files import atomic_write
from m2d_embed.jobs.arrays import ArrayReader, write_array_header
from m2d_embed.jobs.settings import NUMERICS
from m2d_embed.jobs.store import Entry, PartStore, key_of, stamp_of
from m2d_embed.model.frontend import LogMel
from m2d_embed.pretrain.sources import Item
from m2d_embed.pretrain.workers import start_worker

log = logging.getLogger("m2d_embed")

_PART_FILES = 64
_DTYPE = np.dtype("<f2")
_FRAMES = "frames"  # the array of a part

Mels = npt.NDArray[np.float16]


@dataclass(frozen=True)
class MelCrop:
    """``log_mel`` (mels, n) float16, not normalised, from ``start_seconds`` on, of a clip of ``clip_seconds``."""

    log_mel: Mels
    start_seconds: float
    clip_seconds: float


class MelCache:
    """The log-mels of some files, in their order; made by ``build_cache``."""

    def __init__(self, store: PartStore, keys: Sequence[str], frame_seconds: float):
        self.folder = store.folder
        self.frame_seconds = frame_seconds
        errors = {index: store.error_of(key) for index, key in enumerate(keys)}
        self._errors = {index: error for index, error in errors.items() if error is not None}
        self.unreadable = {keys[index]: error for index, error in self._errors.items()}
        located = store.locate(keys)
        numbers, self._file_of = np.unique(located.parts, return_inverse=True)
        self._files = [store.file_of(_FRAMES, number) for number in numbers]
        self._starts, self._frames = located.firsts, located.rows
        self._reader = ArrayReader()

    def __len__(self) -> int:
        return len(self._frames)

    def crop(self, index: int, num_frames: int, rng: np.random.Generator) -> MelCrop:
        """A stretch from a random place of a file, each equally likely; of a shorter file, the whole.

        Args:
            index: of the file among the items that the cache was built of.
            num_frames: length of the crop.
            rng: draws the place.

        Raises:
            AudioError: if the file could not be read when the cache was built; it says why.
        """
        if index in self._errors:
            raise AudioError(self._errors[index])
        frames = int(self._frames[index])
        first = int(rng.integers(max(0, frames - num_frames) + 1))
        opened = self._reader.open(self._files[self._file_of[index]])
        mels = np.empty((min(frames - first, num_frames), *opened.shape[1:]), opened.dtype)
        opened.read_into(mels, int(self._starts[index]) + first)
        return MelCrop(np.array(mels.T, order="C"), first * self.frame_seconds, frames * self.frame_seconds)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": ArrayReader()}  # open files do not go to another process


def build_cache(
    folder: Path,
    items: Sequence[Item],
    config: ModelConfig,
    workers: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MelCache:
    """Compute the log-mels of the items that are not there yet, or have changed since, and open the cache.

    Of several processes that ask for the same cache at a time, one builds it and the others wait.

    Args:
        folder: of the cache; made if it does not exist.
        items: what to cache, in the order by which ``MelCache.crop`` finds them.
        config: the front end.
        workers: processes to compute in; 0 computes in this one.
        on_progress: called with the numbers of files done and of all files.

    Returns:
        The cache. Files that could not be read are in its ``unreadable``, and have no frames.

    Raises:
        ConfigError: if the folder holds a cache of another front end, or something else.
        TrainingError: if a process was killed.
        RuntimeError: in a worker process that is importing the main script.
    """
    if workers:
        # A worker that imports a script without `if __name__ == "__main__"` comes here too, and would wait for the lock
        # of the process that waits for it. This raises there, as starting a process would.
        spawn.get_preparation_data("")
    keys = [key_of(item.file) for item in items]
    store = PartStore(folder, folder)
    try:
        with store.exclusively():
            store.open({**config.front_end, "numerics": NUMERICS})
            store.remove_unfinished()
            store.check()
            _complete(store, keys, config, workers, on_progress)
    except OSError as error:
        raise ConfigError(f"{folder}: the cache cannot be written here ({error.strerror or error}).") from error
    return MelCache(store, keys, config.hop_length / config.sample_rate)


def _complete(
    store: PartStore, keys: list[str], config: ModelConfig, workers: int, on_progress: Callable[[int, int], None]
) -> None:
    """Build what is not there yet."""
    missing = [key for key in dict.fromkeys(keys) if not store.attempted(key, stamp_of(key))]
    changed = sum(map(store.has, missing))
    if changed:
        log.warning(
            "%s: %d files have changed since their log-mels were computed; they are made anew.", store.output, changed
        )
    done = len(keys) - len(missing)
    on_progress(done, len(keys))
    for task in _run([_Task(store.folder, tuple(files), config) for files in _split(missing)], workers):
        done += len(task.files)
        on_progress(done, len(keys))
    store.refresh()


@dataclass(frozen=True)
class _Task:
    folder: Path
    files: tuple[str, ...]
    config: ModelConfig


def _run(tasks: list[_Task], workers: int) -> Iterator[_Task]:
    """Do the tasks; yield each when it is done."""
    if workers == 0 or len(tasks) <= 1:
        for task in tasks:
            _build_part(task)
            yield task
        return
    # Spawned: a fork of a process that runs threads may wait for ever for a lock that one of them held.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=start_worker)
    try:
        futures = {pool.submit(_build_part, task): task for task in tasks}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool as error:
        raise TrainingError(
            f"{tasks[0].folder}: a process that built this cache ended early. If it was for want of memory, run "
            "it again with fewer workers to go on from there; a script of your own starts training under "
            'if __name__ == "__main__".'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _build_part(task: _Task) -> None:
    log_mel = LogMel.unnormalized(task.config)
    store = PartStore(task.folder, task.folder)
    name, mels = store.new_name(), task.config.input_size[0]
    file = store.array_file(name, _FRAMES)
    with atomic_write(file) as partial, partial.open("wb") as stream:
        write_array_header(stream, _DTYPE, (0, mels))
        entries = [_append(stream, path, log_mel, task.config) for path in task.files]
        # The header has room for any number of rows, so its length stays the same.
        stream.seek(0)
        write_array_header(stream, _DTYPE, (sum(entry.rows for entry in entries), mels))
    store.commit(name, entries, [file])


def _append(stream: BinaryIO, path: str, log_mel: LogMel, config: ModelConfig) -> Entry:
    """Write the frames of one file; none if it turns out to be unreadable."""
    stamp, begin, frames = stamp_of(path), stream.tell(), 0
    try:
        blocks = open_clip(path, None, config.sample_rate, path).blocks(config.sample_rate)
        for mels in log_mel.stream(map(_as_tensor, blocks)):
            frames += mels.shape[1]
            stream.write(mels.T.contiguous().numpy().astype(_DTYPE).tobytes())
        if stamp_of(path) != stamp:
            raise AudioError(f"{path}: changes while it is read; wait until it is complete.")
    except AudioError as error:
        stream.seek(begin)
        stream.truncate()
        return Entry(path, 0, stamp, str(error))
    return Entry(path, frames, stamp)


def _as_tensor(block: Samples) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(block))


def _split(files: list[str]) -> list[list[str]]:
    return [files[i : i + _PART_FILES] for i in range(0, len(files), _PART_FILES)]
