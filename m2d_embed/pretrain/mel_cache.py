"""Log-mels of a whole small corpus on disk, memory-mapped: a crop of one costs next to nothing.

A cache is a folder. ``cache.json`` says which front end and which files it is of; the files' frames lie one after the
other in ``part-00000.npy``, ``part-00001.npy``, ..., (frames, mels) float16, not normalised, natural logarithm, with an
index beside each. A part is there wholly or not at all, so a build that was stopped goes on where it was. Files that
come after those of a cache are added to it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
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
from filelock import FileLock

from m2d_embed.audio import Samples, open_clip
from m2d_embed.config import ModelConfig
from m2d_embed.errors import AudioError, ConfigError, TrainingError
from m2d_embed.frontend import LogMel
from m2d_embed.pretrain.sources import Item
from m2d_embed.pretrain.workers import start_worker

_FORMAT = 1
_INDEX = "cache.json"
_LOCK = "cache.lock"
_PART_FILES = 64
_DTYPE = np.dtype("<f2")
_ADVICE = "choose another folder for the cache, or delete this one"

Mels = npt.NDArray[np.float16]


@dataclass(frozen=True)
class MelCrop:
    """``log_mel`` (mels, n) float16, not normalised, from ``start_seconds`` on, of a clip of ``clip_seconds``."""

    log_mel: Mels
    start_seconds: float
    clip_seconds: float


class MelCache:
    """A complete cache, opened for reading; made by ``build_cache``."""

    def __init__(self, folder: Path):
        index = _read_json(folder / _INDEX)
        self.folder = folder
        self.frame_seconds = index["front_end"]["hop_length"] / index["front_end"]["sample_rate"]
        self.unreadable: dict[str, str] = {}
        starts: list[int] = []
        frames: list[int] = []
        for number, files in enumerate(_split(index["files"])):
            rows = _read_json(_index_of(_part(folder, number)))["files"]
            starts += np.cumsum([0] + [row["frames"] for row in rows[:-1]]).tolist()
            frames += [row["frames"] for row in rows]
            errors = zip(files, rows, strict=True)
            self.unreadable |= {path: row["error"] for (path, *_), row in errors if row["error"]}
        self._starts = np.array(starts, dtype=np.int64)
        self._frames = np.array(frames, dtype=np.int64)
        self._parts: dict[int, Mels] = {}

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
        frames, start = int(self._frames[index]), int(self._starts[index])
        if frames == 0:
            raise AudioError(self._error_of(index))
        first = int(rng.integers(max(0, frames - num_frames) + 1))
        mels = self._mapped(index // _PART_FILES)[start + first : start + min(frames, first + num_frames)]
        return MelCrop(np.array(mels.T, order="C"), first * self.frame_seconds, frames * self.frame_seconds)

    def _error_of(self, index: int) -> str:
        number, place = divmod(index, _PART_FILES)
        return str(_read_json(_index_of(_part(self.folder, number)))["files"][place]["error"])

    def _mapped(self, number: int) -> Mels:
        if number not in self._parts:
            self._parts[number] = np.load(_part(self.folder, number), mmap_mode="r", allow_pickle=False)
        return self._parts[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parts": {}}  # a pickled memory map would be its content


def build_cache(
    folder: Path,
    items: Sequence[Item],
    config: ModelConfig,
    workers: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MelCache:
    """Compute the log-mels of all items, or what is missing of them, and open the cache.

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
        ConfigError: if the folder holds a cache of another front end or of other files than these or the first of
            these, or something else.
        TrainingError: if a process was killed.
        RuntimeError: in a worker process that is importing the main script.
    """
    if workers:
        # A worker that imports a script without `if __name__ == "__main__"` comes here too, and would wait for the lock
        # of the process that waits for it. This raises there, as starting a process would.
        spawn.get_preparation_data("")
    files = [_identity(item.file) for item in items]
    index = {"format": _FORMAT, "front_end": config.front_end, "files": files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / _LOCK):
            _claim(folder, index)
            _complete(folder, files, config, workers, on_progress)
    except OSError as error:
        raise ConfigError(f"{folder}: the cache cannot be written here ({error.strerror or error}).") from error
    return MelCache(folder)


def _complete(
    folder: Path, files: list[Any], config: ModelConfig, workers: int, on_progress: Callable[[int, int], None]
) -> None:
    """Build the parts that are not there yet."""
    parts = list(enumerate(_split(files)))
    missing = [(number, part) for number, part in parts if not _index_of(_part(folder, number)).exists()]
    done = len(files) - sum(len(part) for _, part in missing)
    on_progress(done, len(files))
    tasks = [_Task(_part(folder, number), tuple(path for path, *_ in part), config) for number, part in missing]
    for task in _run(tasks, workers):
        done += len(task.files)
        on_progress(done, len(files))


@dataclass(frozen=True)
class _Task:
    part: Path
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
            f"{tasks[0].part.parent}: a process that built this cache ended early. If it was for want of memory, run "
            "it again with fewer workers to go on from there; a script of your own starts training under "
            'if __name__ == "__main__".'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _build_part(task: _Task) -> None:
    log_mel = LogMel.unnormalized(task.config)
    temporary = task.part.with_name(f"{task.part.name}.partial")
    with temporary.open("wb") as stream:
        mels = task.config.input_size[0]
        _write_header(stream, (0, mels))
        rows = [_append(stream, path, log_mel, task.config) for path in task.files]
        # The header has room for any number of rows, so its length stays the same.
        stream.seek(0)
        _write_header(stream, (sum(row["frames"] for row in rows), mels))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(task.part)
    _write_json(_index_of(task.part), {"files": rows})  # the part is complete once this is there


def _write_header(stream: BinaryIO, shape: tuple[int, int]) -> None:
    header = {"descr": _DTYPE.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def _append(stream: BinaryIO, path: str, log_mel: LogMel, config: ModelConfig) -> dict[str, Any]:
    """Write the frames of one file; none if it turns out to be unreadable."""
    begin, frames = stream.tell(), 0
    try:
        blocks = open_clip(path, None, config.sample_rate, path).blocks(config.sample_rate)
        for mels in log_mel.stream(map(_as_tensor, blocks)):
            frames += mels.shape[1]
            stream.write(mels.T.contiguous().numpy().astype(_DTYPE).tobytes())
    except AudioError as error:
        stream.seek(begin)
        stream.truncate()
        return {"frames": 0, "error": str(error)}
    return {"frames": frames, "error": ""}


def _as_tensor(block: Samples) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(block))


def _identity(file: Path) -> list[Any]:
    """Path, size and time of change of a file; what a cache of it depends on."""
    path = os.path.abspath(file)  # noqa: PTH100  (Path.absolute keeps "..")
    try:
        status = file.stat()
    except OSError:
        return [path, -1, -1]  # unreadable: named in the index when its turn comes
    return [path, status.st_size, status.st_mtime_ns]


def _claim(folder: Path, index: dict[str, Any]) -> None:
    """Make the folder a cache of this front end and these files, or of the first of them into one of all of them."""
    path = folder / _INDEX
    if path.exists():
        theirs = _read_json(path)
        difference = _difference(theirs, index)
        if difference:
            raise ConfigError(f"{folder}: this cache is of {difference}; {_ADVICE}.")
        cached = len(theirs["files"])
        if cached < len(index["files"]):
            if cached % _PART_FILES:  # its last part has room for the first of the new files
                _index_of(_part(folder, cached // _PART_FILES)).unlink(missing_ok=True)
            _write_json(path, index)
        return
    if any(file.name not in (_LOCK, f"{_INDEX}.partial") for file in folder.iterdir()):
        raise ConfigError(
            f"{folder}: holds files, but no {_INDEX}, so it is not a cache; choose another folder for it."
        )
    _write_json(path, index)


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What the cache in the folder has that we do not; empty if it is of our files, or of the first of them."""
    if theirs.get("format") != _FORMAT:
        return f"format {theirs.get('format')}, not {_FORMAT}"
    for key, value in ours["front_end"].items():
        if theirs["front_end"].get(key) != value:
            return f"another front end: {key} is {theirs['front_end'].get(key)} there, and {value} here"
    if len(theirs["files"]) > len(ours["files"]):
        return f"other files: {len(theirs['files'])} there, and {len(ours['files'])} here"
    for there, here in zip(theirs["files"], ours["files"], strict=False):
        if there[0] != here[0]:
            return f"other files, or in another order: {there[0]} there where {here[0]} is here"
        if there != here:
            return f"another version of {here[0]}: it was changed, added or removed since"
    return ""


def _split(files: list[Any]) -> list[list[Any]]:
    return [files[i : i + _PART_FILES] for i in range(0, len(files), _PART_FILES)]


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.npy"


def _index_of(part: Path) -> Path:
    return part.with_suffix(".json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: this file of the cache cannot be read ({error}); {_ADVICE}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not the index of a cache; {_ADVICE}.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
