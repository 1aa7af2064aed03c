"""The data of a run, as its recipe describes it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from m2d_embed.config import ModelConfig
from m2d_embed.errors import ConfigError
from m2d_embed.pretrain.datasets import Batches, BatchSpec, CropDataset, find_labels, loader, open_dataset
from m2d_embed.pretrain.recipe import WITH_FEATURES, Recipe
from m2d_embed.pretrain.shards import ShardDataset


@dataclass(frozen=True)
class TrainingData:
    """A data set with what an objective has to know about it."""

    dataset: CropDataset | ShardDataset
    label_names: tuple[str, ...]

    @property
    def num_files(self) -> int | None:
        """Files in all; None for tar shards, whose members are not counted beforehand."""
        return self.dataset.num_files if isinstance(self.dataset, CropDataset) else None

    @property
    def clips_per_epoch(self) -> int | None:
        """Files to train on, noise not counted; None for tar shards."""
        return self.dataset.num_items if isinstance(self.dataset, CropDataset) else None

    @property
    def description(self) -> str:
        """One line for people."""
        source, count = self.dataset.spec.data.source, self.clips_per_epoch
        if isinstance(self.dataset, ShardDataset):
            return f"{source}: {_counted(len(self.dataset.shards), 'tar shard')}"
        return f"{source}: {_counted(count or 0, 'file')}"

    def feature_dim(self) -> int:
        """Size of the precomputed frame features; 0 if there are none."""
        if not self.dataset.spec.features:
            return 0
        features = next(loader(self.dataset, batch_size=1, workers=0)).features
        return 0 if features is None else features.shape[2]

    def batches(self, micro_batch: int, rank: int, processes: int, accumulation: int, first_step: int) -> Batches:
        """The endless batches of one process; see ``datasets.loader``."""
        return loader(self.dataset, micro_batch, rank, processes, accumulation, first_step)


def open_data(recipe: Recipe, config: ModelConfig, names: tuple[str, ...], show_progress: bool) -> TrainingData:
    """Open what a recipe trains on; build its cache of log-mels if it wants one.

    Args:
        recipe: the run's.
        config: the front end and window of the model.
        names: the labels, from ``label_names``.
        show_progress: show how far the cache is.

    Raises:
        ConfigError, AudioError: if the source is not what the recipe needs.
    """
    spec = BatchSpec(
        recipe.data,
        config,
        recipe.masking,
        recipe.training.seed,
        labels=names,
        captions=recipe.objective == "m2d_clap",
        features=recipe.objective in WITH_FEATURES,
    )
    with tqdm(unit="file", desc="log-mels", disable=None if show_progress else True, delay=1) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return TrainingData(open_dataset(spec, on_progress), names)


def label_names(recipe: Recipe) -> tuple[str, ...]:
    """The labels that m2d_as learns: those of a file, or those that the data has. None for other objectives.

    Raises:
        ConfigError: if there are none.
        AudioError: if they are to be collected from a shard that cannot be read.
    """
    if recipe.objective != "m2d_as":
        return ()
    if recipe.offline.labels is None:
        print(f"{recipe.data.source}: collecting the labels", file=sys.stderr)
        return find_labels(recipe.data.source)
    file = Path(recipe.offline.labels)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"offline.labels: {file} cannot be read ({error}).") from error
    names = tuple(line for line in lines if line)
    if not names:
        raise ConfigError(f"offline.labels: {file} is empty; it should hold one label a line.")
    return names


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
