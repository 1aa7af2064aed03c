"""The data of a run: batches of crops by their positions, their statistics, and what takes the place of bad files.

``open_dataset`` makes the data of a run from its description; ``loader`` yields the batches of one process of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from m2d_embed.errors import AudioError, ConfigError, M2DEmbedError, TrainingError
from m2d_embed.model.frontend import LogMel
from m2d_embed.pretrain.batches import Batch, BatchBuilder, BatchSpec, DataConfig, Sample, read_features
from m2d_embed.pretrain.crops import Crop, read_crop
from m2d_embed.pretrain.mel_cache import MelCache, MelCrop, build_cache
from m2d_embed.pretrain.sources import Item, ItemTable, is_shards, read_source
from m2d_embed.pretrain.workers import start_worker
from m2d_embed.training.sampling import ItemOrder, Purpose, rng_at

if TYPE_CHECKING:
    from m2d_embed.pretrain.shards import ShardDataset

__all__ = [
    "Batch",
    "BatchSpec",
    "Batches",
    "ClipSource",
    "CropDataset",
    "DataConfig",
    "find_labels",
    "loader",
    "measure_stats",
    "open_dataset",
]

#: Files tried in place of one that cannot be read.
_TRIES = 10

Progress = Callable[[int, int], None]


class ClipSource:
    """The clips of a list of items, as files or in a cache, drawn by position."""

    def __init__(self, items: Sequence[Item], spec: BatchSpec, cache: MelCache | None):
        if cache is not None and len(cache) != len(items):
            raise ConfigError(f"{cache.folder}: a cache of {len(cache)} files, but there are {len(items)} items.")
        self.items = items if isinstance(items, ItemTable) else ItemTable(items)
        self.cache = cache
        self.spec = spec
        self.order = ItemOrder(self.items.weights, spec.seed)

    def read(self, index: int, rng: np.random.Generator, features: bool = False) -> Sample:
        """Read a crop of one item, and its features if asked to.

        Raises:
            AudioError: if its file, or that of its features, cannot be read.
        """
        item, spec = self.items[index], self.spec
        crop: Crop | MelCrop
        if self.cache is not None:
            crop = self.cache.crop(index, spec.num_frames, rng)
        else:
            crop = read_crop(item.file, spec.model.sample_rate, spec.num_samples, rng, str(item.file))
        loaded = None
        if features:
            assert item.features is not None
            loaded = read_features(item.features, str(item.features), crop, spec)
        return Sample(str(item.file), crop, item.labels, item.caption, loaded)

    def read_first(self, indices: Iterable[int], read: Callable[[int], Sample], bad: dict[str, str]) -> Sample:
        """Read the first of some items that can be read; note the others in ``bad``.

        Raises:
            AudioError: if none of the first few can.
        """
        reason = ""
        for index in itertools.islice(indices, 1 + _TRIES):
            try:
                return read(index)
            except AudioError as error:
                reason = str(error)
                bad[str(self.items[index].file)] = reason
        raise AudioError(f"{1 + _TRIES} files drawn one after the other could not be read; the last: {reason}")

    def noise_at(self, position: int, bad: dict[str, str]) -> Crop | MelCrop:
        """A crop for the clip at ``position``, of an item drawn by weight."""
        rng = rng_at(self.spec.seed, position, Purpose.NOISE)
        drawn = (self.order.draw(rng) for _ in itertools.count())
        return self.read_first(drawn, lambda index: self.read(index, rng), bad).crop


class CropDataset(Dataset[Batch]):
    """Batches of crops of files, by the positions of these in the endless stream of a run.

    Args:
        items: what to train on.
        spec: what is in a batch.
        cache: log-mels of the items, or None to read their audio.
        noise: what background noise is taken from, or None.

    Raises:
        ConfigError: if an item lacks what the spec asks for, or has a label that is not in it.
    """

    def __init__(
        self, items: Sequence[Item], spec: BatchSpec, cache: MelCache | None = None, noise: ClipSource | None = None
    ):
        _check_items(items, spec)
        self.spec = spec
        self.noise = noise
        self._clips = ClipSource(items, spec, cache)
        self._builder = BatchBuilder(spec)

    @property
    def num_items(self) -> int:
        """Positions in an epoch."""
        return len(self._clips.items)

    @property
    def num_files(self) -> int:
        """Files in all, of clips and of noise."""
        return self.num_items + (len(self.noise.items) if self.noise else 0)

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The batch of some positions; the same whenever and wherever it is asked for.

        Raises:
            AudioError: if many files in a row cannot be read.
        """
        bad: dict[str, str] = {}
        samples = [self._sample_at(position, bad) for position in positions]
        noise = None if self.noise is None else [self.noise.noise_at(position, bad) for position in positions]
        return self._builder.build(positions, samples, noise, bad)

    def plain(self) -> CropDataset:
        """The same crops without noise, labels, captions and features."""
        return CropDataset(self._clips.items, self.spec.plain(), self._clips.cache)

    def _sample_at(self, position: int, bad: dict[str, str]) -> Sample:
        seed, clips = self.spec.seed, self._clips

        def candidates() -> Iterator[int]:
            yield clips.order.item_at(position)
            rng = rng_at(seed, position, Purpose.REPLACE)
            while True:
                yield clips.order.draw(rng)

        def read(index: int) -> Sample:
            return clips.read(index, rng_at(seed, position, Purpose.CROP), self.spec.features)

        return clips.read_first(candidates(), read, bad)


def _check_items(items: Iterable[Item], spec: BatchSpec) -> None:
    if not (spec.labels or spec.captions or spec.features):
        return
    known = set(spec.labels)
    for item in items:
        if spec.features and item.features is None:
            raise ConfigError(f"{item.file}: has no features; the manifest's column 'features' must name a .npy.")
        if spec.captions and not item.caption:
            raise ConfigError(f"{item.file}: has no caption; fill the manifest's column 'caption'.")
        unknown = known and set(item.labels) - known
        if unknown:
            raise ConfigError(f"{item.file}: its label {min(unknown)!r} is not one of the {len(known)} given.")


def open_dataset(spec: BatchSpec, on_progress: Progress = lambda done, total: None) -> CropDataset | ShardDataset:
    """The data of a run; builds its cache first if there is to be one.

    Args:
        spec: what is in a batch; ``spec.data`` says where from.
        on_progress: called while a cache is built, with the numbers of files done and of all files.

    Raises:
        ConfigError: if the source, the noise or the cache are not what ``spec`` makes of them.
        AudioError: if a folder holds no audio.
    """
    data = spec.data

    def cached(items: Sequence[Item], folder: str) -> MelCache | None:
        if data.cache is None:
            return None
        return build_cache(Path(data.cache, folder), items, spec.model, data.workers, on_progress)

    noise = None
    if data.noise is not None:
        items = read_source(data.noise)
        noise = ClipSource(items, spec, cached(items, "noise"))
    if is_shards(data.source):
        from m2d_embed.pretrain.shards import ShardDataset, find_shards

        return ShardDataset(find_shards(data.source), spec, noise)
    items = read_source(data.source)
    return CropDataset(items, spec, cached(items, "clips"), noise)


def find_labels(source: str) -> tuple[str, ...]:
    """All labels that the items of a source have, sorted; of shards, by reading every one from beginning to end.

    Raises:
        ConfigError: if there are none.
    """
    if is_shards(source):
        from m2d_embed.pretrain.shards import find_shards, labels_of_shards

        labels = labels_of_shards(find_shards(source))
    else:
        labels = {label for item in read_source(source) for label in item.labels}
    if not labels:
        raise ConfigError(f"{source}: no labels; give a manifest a column 'labels', or the samples of shards a .json.")
    return tuple(sorted(labels))


def loader(
    dataset: CropDataset | ShardDataset,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    first_step: int = 0,
    workers: int | None = None,
) -> Batches:
    """The endless batches of one process of a run, ``accumulation`` of them a step.

    With ``E = batch_size * world_size * accumulation``, the batch ``m`` of process ``rank`` in step ``s`` takes the
    ``batch_size`` positions from ``s * E + (m * world_size + rank) * batch_size`` on. Batches of files are the same for
    any number of workers; those of shards depend on it, as each worker has shards of its own.

    Args:
        dataset: from ``open_dataset``.
        batch_size: clips in a batch.
        rank: number of this process.
        world_size: number of processes.
        accumulation: batches of one process in a step.
        first_step: where to begin; steps before are not read.
        workers: processes that read the data, 0 for this one; None is what the data's configuration says.

    Raises:
        ConfigError: if there are fewer shards than processes.
    """
    workers = dataset.spec.data.workers if workers is None else workers
    settings: dict[str, Any] = {
        "collate_fn": _as_is,
        "worker_init_fn": start_worker,
        "pin_memory": torch.cuda.is_available(),
        # A generator of its own: the loader draws a number, which must not change those of the process.
        "generator": torch.Generator(),
    }
    if not isinstance(dataset, CropDataset):
        workers = dataset.check_workers(workers, world_size)
        stream = dataset.stream(batch_size, rank, world_size, max(1, workers), skip=first_step * accumulation)
        return Batches(DataLoader(stream, batch_size=None, num_workers=workers, **settings))
    steps = _Positions(batch_size, rank, world_size, accumulation, first_step)
    return Batches(DataLoader(_Reporting(dataset), batch_sampler=steps, num_workers=workers, **settings))


class Batches(Iterator[Batch]):
    """Batches from a data loader; an error in a worker arrives as the same error here, and ends them."""

    def __init__(self, data_loader: DataLoader[Any]):
        self._batches: Iterator[Any] = iter(data_loader)

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except (RuntimeError, ConnectionError) as error:  # what the loader raises when a worker is gone
            raise TrainingError(
                f"a process that reads the data was killed ({error}), perhaps for want of memory; "
                "give the same command again to go on, with fewer data.workers if need be."
            ) from error
        if isinstance(batch, M2DEmbedError):
            self.close()
            raise batch
        assert isinstance(batch, Batch)
        return batch

    def close(self) -> None:
        """End the workers; there are no batches after that."""
        self._batches = iter(())


class _Reporting(Dataset[Any]):
    """Hands errors on as results: as exceptions, the loader would wrap the worker's traceback into their message."""

    def __init__(self, dataset: CropDataset):
        self.dataset = dataset

    def __getitems__(self, positions: list[int]) -> Batch | M2DEmbedError:
        try:
            return self.dataset.__getitems__(positions)
        except M2DEmbedError as error:
            return error


@dataclass(frozen=True)
class _Positions:
    """The positions of every batch of one process."""

    batch_size: int
    rank: int
    world_size: int
    accumulation: int
    first_step: int

    def __iter__(self) -> Iterator[list[int]]:
        for number in itertools.count(self.first_step * self.accumulation):
            first = (number * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


def _as_is(batch: Any) -> Any:
    return batch


def measure_stats(dataset: CropDataset | ShardDataset) -> tuple[float, float]:
    """Mean and standard deviation of the log-mel of ``data.norm_crops`` crops, padding excluded.

    They are those of the first positions of the run, so the same for the same data and seed.

    Raises:
        AudioError: if many files in a row cannot be read, or all crops are digital silence.
    """
    plain = dataset.plain()
    spec, wanted = plain.spec, plain.spec.data.norm_crops
    log_mel = LogMel.unnormalized(spec.model)
    # The crops of shards depend on the number of workers.
    batches = loader(plain, batch_size=32, workers=None if isinstance(plain, CropDataset) else 0)
    count, total, squares = 0, 0.0, 0.0
    seen = 0
    for batch in batches:
        mels = batch.log_mel.double() if batch.log_mel is not None else log_mel(batch.audio).double()
        for clip, valid in list(zip(mels[:, 0], batch.valid_frames.tolist(), strict=True))[: wanted - seen]:
            count += clip[:, :valid].numel()
            total += float(clip[:, :valid].sum())
            squares += float(clip[:, :valid].square().sum())
        seen += len(batch)
        if seen >= wanted:
            break
    mean = total / count
    std = math.sqrt(max(0.0, squares / count - mean**2))
    if std < 1e-6:
        raise AudioError(f"{spec.data.source}: the log-mel of {wanted} crops is the same everywhere: digital silence?")
    return mean, std
