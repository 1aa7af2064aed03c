"""Pre-training: from a recipe to an exported encoder, on one core or many GPUs, and on again after any stop.

``Pretraining`` is what is trained; ``training.trainer`` has the loop.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from m2d_embed import m2d as inference
from m2d_embed.audio.clips import open_sound
from m2d_embed.config import ModelConfig
from m2d_embed.errors import ConfigError
from m2d_embed.evaluate.probes import embed_clips, knn_accuracy, linear_probe_accuracy
from m2d_embed.labelled.clips import LabelledClips, read_labelled
from m2d_embed.pretrain.batches import Batch
from m2d_embed.pretrain.build import build_optimizers, build_task
from m2d_embed.pretrain.data import TrainingData, label_names, open_data
from m2d_embed.pretrain.datasets import Batches, measure_stats
from m2d_embed.pretrain.export import EXPORT_FOLDER, describe_model, export
from m2d_embed.pretrain.inputs import Inputs
from m2d_embed.pretrain.masking import num_visible
from m2d_embed.pretrain.objectives import Objective
from m2d_embed.pretrain.recipe import Recipe
from m2d_embed.pretrain.sources import is_shards
from m2d_embed.pretrain.warm_start import apply_start, read_start
from m2d_embed.training import run_state
from m2d_embed.training.monitor import mean_variance, rank_me
from m2d_embed.training.processes import Setup, agreed
from m2d_embed.training.run_state import RunState
from m2d_embed.training.schedule import ema_decay
from m2d_embed.training.stop import Stop
from m2d_embed.training.trainer import Losses, Task, Trainer, Validation, export_weights


def pretrain(recipe: Recipe) -> Path | None:
    """Run a recipe to its end and export the encoder; go on where an earlier call stopped.

    Returns:
        The folder of the exported model, or None if the run was stopped by SIGTERM or SIGINT; it is saved then.

    Raises:
        ConfigError: if the recipe makes no sense, or ``output`` holds a run of another recipe.
        AudioError: if more than 1 % of the files are unreadable, or the source holds none.
        TrainingError: if a loss or a gradient is not finite; it names the batch's files.
    """
    with Stop() as stop:
        trainer = Trainer(recipe, Pretraining, stop)
        if not trainer.train():
            return None
        state = trainer.state()
        if trainer.main:
            _export(state, recipe)
        trainer.accelerator.wait_for_everyone()
        return recipe.folder / EXPORT_FOLDER


def export_latest(recipe: Recipe) -> Path:
    """Export the newest checkpoint of a run without training any further.

    Raises:
        ConfigError: if the run has no checkpoint, or is of another recipe.
    """
    state = run_state.previous(recipe)
    if state is None:
        raise ConfigError(f"{recipe.folder}: no checkpoint to export; train first.")
    return _export(state, recipe)


def _export(state: RunState, recipe: Recipe) -> Path:
    return export(recipe.folder, dataclasses.replace(state, model=export_weights(state, recipe)), recipe)


class Pretraining(Task):
    """An objective on crops of files or shards; validation by a kNN and a linear probe of the encoder."""

    network: Objective
    extra = "pretrain"

    def __init__(self, recipe: Recipe, setup: Setup, previous: RunState | None):
        self.recipe, self.setup = recipe, setup
        self.accelerator = setup.accelerator
        self._check_processes(previous)
        self.probe_clips = agreed(self.accelerator, self._read_probe)
        start = read_start(recipe.start) if previous is None else None
        start_config = start.config if start is not None else None
        shape = previous.config if previous else recipe.model_config(start_config, (0.0, 1.0))
        self.source = self._open_data(shape)
        self.config = previous.config if previous else self._with_stats(start_config)
        names, dim, device = self.source.label_names, self.source.feature_dim(), self.accelerator.device
        self.network, offline = build_task(recipe, self.config, device, names, dim)
        if start is not None:
            apply_start(self.network, start, recipe.start.parts)
        self.config = _with_clap(self.config, self.network)
        if recipe.license:
            self.config = dataclasses.replace(self.config, license=recipe.license)
        visible = num_visible(self.config.grid_size[0] * self.config.grid_size[1], recipe.masking.mask_ratio)
        self.inputs = Inputs(self.config, visible, recipe.data.noise_ratio, offline).to(device)
        self.optimizers = build_optimizers(self.network, recipe)
        self.peak_lr = recipe.training.peak_lr
        self.num_files, self.data = self.source.num_files, self.source.description
        clips, batch_size = self.source.clips_per_epoch, recipe.training.batch_size
        self.steps_per_epoch = None if clips is None else max(1, round(clips / batch_size))
        self.total = self._total_steps()

    def batches(self, first_step: int) -> Batches:
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        return self.source.batches(self.setup.micro_batch, rank, processes, self.setup.accumulation, first_step)

    def step(self, batch: Batch) -> Losses:
        outputs: Losses = self.model(self.inputs(batch.to(self.accelerator.device, non_blocking=True)))
        return outputs

    def after_step(self, step: int) -> dict[str, float]:
        """Move the target network."""
        decay = ema_decay(step, self.total, *self.recipe.training.ema_decay)
        self.network.update_target(decay)
        return {"ema_decay": decay}

    def watch(self, outputs: Losses) -> dict[str, float]:
        """Signs of collapse."""
        target = outputs["target"].detach().flatten(0, 1).float()
        return {"target_variance": mean_variance(target), "target_rank": rank_me(target)}

    def validates_after(self, step: int) -> bool:
        due = step > 0 and (step % self.recipe.probe.every == 0 or step == self.total)
        return due and self.probe_clips is not None

    def validate(self, weights: dict[str, Tensor]) -> Validation:
        assert self.probe_clips is not None
        model = inference.M2D(self.config).to(self.accelerator.device)
        encoder = {name.removeprefix("encoder."): t for name, t in weights.items() if name.startswith("encoder.")}
        model.encoder.load_state_dict(encoder)
        embeddings = embed_clips(model.eval(), self.probe_clips)
        knn, linear = knn_accuracy(embeddings, self.probe_clips), linear_probe_accuracy(embeddings, self.probe_clips)
        return Validation("linear probe", linear, {"probe/knn": knn, "probe/linear": linear})

    def describe(self) -> str:
        count = sum(p.numel() for p in self.network.encoder.parameters()) / 1e6
        mean, std = self.config.norm_stats
        return (
            f"{self.recipe.name}: {self.recipe.objective}, encoder of {count:.1f} M parameters "
            f"({describe_model(self.config)})\n{self.data}; mean {mean:.3f}, std {std:.3f}"
        )

    # --- setting up -----------------------------------------------------------------------------------------------

    def _check_processes(self, previous: RunState | None) -> None:
        now = self.accelerator.num_processes
        if previous is not None and is_shards(self.recipe.data.source) and previous.processes != now:
            raise ConfigError(
                f"{self.recipe.folder}: begun with {previous.processes} processes, which each read shards of their "
                f"own, so it cannot go on with {now}."
            )

    def _read_probe(self) -> LabelledClips | None:
        """The labelled clips to probe with, each looked at once: better now than after hours."""
        probe = self.recipe.probe
        if probe.data is None:
            return None
        clips = read_labelled(Path(probe.data), probe.clips, self.recipe.training.seed)
        for file in clips.files:
            open_sound(file).close()
        return clips

    def _open_data(self, shape: ModelConfig) -> TrainingData:
        """The main process first: it may have labels to collect and a cache to build."""
        names = agreed(self.accelerator, lambda: label_names(self.recipe))
        opened: list[TrainingData] = []

        def by_main() -> None:
            opened.append(open_data(self.recipe, shape, names, show_progress=True))

        agreed(self.accelerator, by_main)
        return opened[0] if opened else open_data(self.recipe, shape, names, show_progress=False)

    def _with_stats(self, start: ModelConfig | None) -> ModelConfig:
        """The configuration with mean and standard deviation, given or measured by the main process."""
        stats = self.recipe.data.norm_stats
        if stats is None:
            stats = agreed(self.accelerator, lambda: measure_stats(self.source.dataset))
        return self.recipe.model_config(start, stats)

    def _total_steps(self) -> int:
        training, clips = self.recipe.training, self.source.clips_per_epoch
        if training.steps is not None:
            return training.steps
        assert training.epochs is not None and clips is not None  # the recipe sees to that
        return max(1, round(training.epochs * clips / training.batch_size))


def _with_clap(config: ModelConfig, objective: Objective) -> ModelConfig:
    clap = getattr(objective, "clap", None)
    return config if clap is None else dataclasses.replace(config, clap=clap.config)
