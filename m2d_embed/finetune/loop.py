"""Fine-tuning: from a recipe to a tested and exported classifier, and on again after any stop.

``Finetuning`` is what is trained; ``training.trainer`` has the loop. Every random choice is keyed by the seed and the
step. Each process makes the whole batch and trains on its share, so mixup has the same pairs, and the head normalises
with the whole micro-batch: a run has the same losses on one process or several, but for rounding.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2d_embed import __version__
from m2d_embed.config import HeadConfig, ModelConfig, ScenePooling
from m2d_embed.errors import ConfigError
from m2d_embed.files import write_json
from m2d_embed.finetune import evaluate, network
from m2d_embed.finetune.augment import KeptPatches, frequency_warp, kept_patches, mixup, random_gain, spec_augment
from m2d_embed.finetune.crops import Batch, EvaluationClips, TrainingClips, longest_frames
from m2d_embed.finetune.export import ADAPTER_FOLDER, EXPORT_FOLDER, RESULTS_FILE, export
from m2d_embed.finetune.head_statistics import take_statistics
from m2d_embed.finetune.network import Classifier, build_classifier, merged_tensors
from m2d_embed.finetune.optim import layer_groups, loss_per_row
from m2d_embed.finetune.probe_start import probe_head
from m2d_embed.finetune.recipe import ALL_FOLDS, FinetuneRecipe, whole_columns
from m2d_embed.finetune.task import Parts, check_contents, choose_fold, choose_parts, notes_on, read_task
from m2d_embed.labelled.clips import Integers, named
from m2d_embed.m2d import M2D
from m2d_embed.training.processes import Setup
from m2d_embed.training.run_state import RunState
from m2d_embed.training.sampling import Purpose, rng_at
from m2d_embed.training.stop import Stop
from m2d_embed.training.trainer import Losses, Task, Trainer, Validation, export_weights

PREDICTIONS_FILE = "predictions.csv"
_STATISTICS_OF = 2000  # clips at most, drawn by the seed: enough for a mean and a variance
_RATES = {"probe": 3e-4, "random": 1e-3}  # of learning, by what the head begins as


class Outcome(NamedTuple):
    """A finished run: its folder, the folder of its model, and its scores; none if nothing was tested."""

    folder: Path
    model: Path
    scores: dict[str, dict[str, Any]]
    predicted: evaluate.Predictions


def finetune(recipe: FinetuneRecipe) -> dict[str, dict[str, Any]] | None:
    """Run a recipe to its end, test and export the model; go on where an earlier call stopped.

    Returns:
        The test scores by name, each with its ``value``; empty if nothing is tested. None if the run was stopped by
        SIGTERM or SIGINT; it is saved then.

    Raises:
        ConfigError: if recipe and data make no sense, or ``output`` holds another run.
        AudioError: if files are missing, or more than 1 % of those that are trained on are unreadable; it names them.
        TrainingError: if a loss or a gradient is not finite; it names the batch's files.
    """
    with Stop() as stop:
        if recipe.data.fold != ALL_FOLDS:
            outcome = _train_one(recipe, stop)
            return outcome.scores if outcome is not None else None
        return _train_folds(recipe, stop)


def _train_one(recipe: FinetuneRecipe, stop: Stop) -> Outcome | None:
    stop.wait_for_step = False
    trainer = Trainer(recipe, Finetuning, stop)
    if not trainer.train():
        return None
    stop.wait_for_step = False
    try:
        return _finish(trainer, recipe)
    except KeyboardInterrupt:  # what was trained is saved
        return None


def _train_folds(recipe: FinetuneRecipe, stop: Stop) -> dict[str, dict[str, Any]] | None:
    """Each fold in turn into a folder of its own, then the scores of all together."""
    task = read_task(recipe)
    outcomes: dict[int, Outcome] = {}
    for fold in task.clips.test_folds():
        outcome = _train_one(recipe.for_fold(fold), stop)
        if outcome is None:
            return None
        outcomes[fold] = outcome
    if not next(iter(outcomes.values())).predicted:  # not the main process, which alone tests
        return {}
    by_fold = {fold: outcome.scores for fold, outcome in outcomes.items()}
    together = evaluate.scores_of_folds(task, {f: o.predicted for f, o in outcomes.items()}, by_fold)
    write_json(recipe.folder / RESULTS_FILE, {"scores": together, "folds": by_fold})
    return together


def _finish(trainer: Trainer, recipe: FinetuneRecipe) -> Outcome:
    """Test and export; every process has to call it, but only the main one does it."""
    outcome = Outcome(recipe.folder, recipe.folder / EXPORT_FOLDER, {}, {})
    state = trainer.state()
    if trainer.main:
        assert isinstance(trainer.task, Finetuning)
        outcome = trainer.task.finish(export_weights(state, recipe), state)
    trainer.accelerator.wait_for_everyone()
    return outcome


@dataclasses.dataclass(frozen=True)
class MicroBatch(Batch):
    """This process's part of a step, as it is trained on: augmented.

    ``kept`` are the patches that are encoded, None means all; ``counted`` is what the sum of the losses of the whole
    step is divided by, the clips or columns in it.
    """

    kept: KeptPatches | None = None
    counted: float = 1.0


class Finetuning(Task):
    """A classifier on crops of labelled clips, validated on whole ones."""

    network: Classifier
    steps_per_epoch: int
    extra = "finetune"

    def __init__(self, recipe: FinetuneRecipe, setup: Setup, previous: RunState | None):
        self.recipe, self.setup = recipe, setup
        self.accelerator = setup.accelerator
        self.labelled = read_task(recipe)
        self.fold = choose_fold(self.labelled, recipe)
        self.parts = choose_parts(self.labelled, self.fold, recipe)
        self.contents = check_contents(self.labelled, self.parts, Path(recipe.data.source))
        if previous is not None and previous.extra["contents"] != self.contents:
            raise ConfigError(
                f"{recipe.folder}: {recipe.data.source} has changed since the run was begun; give another --output."
            )
        self.notes = notes_on(self.labelled, self.fold)
        self.base = previous.extra["base"] if previous is not None else ""
        self.config = previous.config if previous is not None else ModelConfig()
        self.head_start = self._head_start()
        self.peak_lr = recipe.training.lr or _RATES[self.head_start]
        self.network = self._build(previous)
        self._read_clips()
        if previous is None and self.head_start == "probe":
            self._begin_as_probe()
        self.num_files, self.data = len(self.parts.train), self.parts.describe()
        training = recipe.training
        self.steps_per_epoch = max(1, round(len(self.train_clips) / training.batch_size))
        self.total = training.steps or max(1, round((training.epochs or 0) * self.steps_per_epoch))
        groups = layer_groups(self.network, self.peak_lr, training.layer_decay, training.weight_decay)
        self.optimizers = [torch.optim.AdamW(groups, lr=self.peak_lr, fused=True)]

    # --- training -------------------------------------------------------------------------------------------------

    def batches(self, first_step: int) -> Generator[MicroBatch, None, None]:
        """The next step's are made while the last one's are trained on."""
        with ThreadPoolExecutor(max_workers=1) as worker:
            following = worker.submit(self._micro_batches, first_step)
            for step in range(first_step + 1, self.total + 1):
                made = following.result()
                if step < self.total:
                    following = worker.submit(self._micro_batches, step)
                yield from made

    def step(self, batch: MicroBatch) -> Losses:
        crops, kept = batch.to(self.accelerator.device), batch.kept
        logits = self.model(crops.log_mel, crops.valid_frames, crops.mask, kept)
        mask, targets, per_column = crops.mask, crops.targets, self.labelled.per_column
        if kept is not None:
            columns = kept.columns.to(mask.device)
            mask = mask[:, columns]
            targets = targets[:, columns] if per_column else targets
        smoothing = self.recipe.training.label_smoothing
        losses = loss_per_row(logits.float(), targets, self.labelled.multi_label, smoothing)
        counted = (mask if per_column else mask.any(dim=1)).float()
        # The trainer takes means over micro-batches and processes, of which each has the sum of its share.
        shares = self.setup.accumulation * self.accelerator.num_processes
        return {"loss": (losses * counted).sum() / batch.counted * shares, "per_clip": losses}

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of this process in one step."""
        augment, stripes = self.recipe.augment, self.recipe.spec_augment
        seed, size, std = self.recipe.training.seed, self.recipe.training.batch_size, self.config.norm_stats[1]
        generator = rng_at(seed, step, Purpose.NOISE)
        batch = self.train_clips.batch(step * size, size)
        batch = frequency_warp(batch, augment.freq_warp, self.config, generator)
        batch = mixup(random_gain(batch, augment.gain_db, std, generator), augment.mixup, std, generator)
        mels, frames = batch.log_mel.shape[2:]
        widest = round(stripes.max_freq * mels), round(stripes.max_time * frames)
        log_mel = spec_augment(batch.log_mel, stripes.freq_masks, widest[0], stripes.time_masks, widest[1], generator)
        kept, counted = None, batch.mask
        if any(augment.patch_dropout):
            grid = self.config.grid_size[0], batch.mask.shape[1]
            kept = kept_patches(grid, *augment.patch_dropout, rng_at(seed, step, Purpose.MASK))
            counted = counted[:, kept.columns]
        rows = counted.sum() if self.labelled.per_column else counted.any(dim=1).sum()
        whole = MicroBatch(**vars(batch) | {"log_mel": log_mel}, kept=kept, counted=float(rows.clamp_min(1)))
        starts = map(self.setup.first_row, range(self.setup.accumulation))
        return [whole.rows(start, start + self.setup.micro_batch) for start in starts]

    # --- validation, test and export ------------------------------------------------------------------------------

    def validates_after(self, step: int) -> bool:
        """After each epoch, and before the first: fine-tuning may add nothing to a probe, which then is kept."""
        due = step % self.steps_per_epoch == 0 if step else self.head_start == "probe"
        return bool(len(self.parts.valid)) and (due or step == self.total)

    def validate(self, weights: dict[str, Tensor]) -> Validation:
        assert self.valid_clips is not None
        model = self._as_model(self._with_statistics(weights))
        predicted = evaluate.predict(model, self.valid_clips, self.labelled.per_column)
        name, score = evaluate.main_score(self.labelled, self.valid_clips, predicted)
        return Validation(name, score, {f"valid/{name}": score})

    def finish(self, weights: dict[str, Tensor], state: RunState) -> Outcome:
        """Test and export weights of the network, in the main process."""
        recipe, folder = self.recipe, self.recipe.folder
        tensors = self._with_statistics(weights)
        predicted: evaluate.Predictions = {}
        scores: dict[str, dict[str, Any]] = {}
        if self.test_clips is not None:
            predicted = evaluate.predict(self._as_model(tensors), self.test_clips, self.labelled.per_column)
            scores = evaluate.all_scores(self.labelled, self.test_clips, predicted)
            evaluate.write_predictions(self.labelled, self.test_clips, predicted, folder / PREDICTIONS_FILE)
        exported = export(recipe, self.config, tensors, self._results(state, scores, predicted))
        if recipe.lora.rank:
            with_head = weights | {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
            network.save_adapter(self.network, with_head, recipe.lora, folder / ADAPTER_FOLDER)
        return Outcome(folder, exported, scores, predicted)

    def _with_statistics(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the names of ``M2D.state_dict()``, whose head normalises as whole training clips ask for."""
        model = self._as_model(merged_tensors(self.network, weights))
        take_statistics(model, self._clips_for_statistics, self.labelled.per_column)
        return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}

    @cached_property
    def _clips_for_statistics(self) -> EvaluationClips:
        rows = self.train_clips.readable
        if len(rows) > _STATISTICS_OF:
            generator = np.random.default_rng(self.recipe.training.seed)
            rows = np.sort(generator.choice(rows, _STATISTICS_OF, replace=False))
        return self._whole(rows)

    def _whole(self, rows: Integers) -> EvaluationClips:
        return EvaluationClips(self.config, self.labelled.data, rows, self.recipe.training.eval_batch_size)

    def _as_model(self, tensors: dict[str, Tensor]) -> M2D:
        model = M2D(self.config)
        model.load_state_dict(tensors)
        return model.to(self.accelerator.device).eval()

    def _results(
        self, state: RunState, scores: dict[str, dict[str, Any]], predicted: evaluate.Predictions
    ) -> dict[str, Any]:
        return {
            "task": self.labelled.kind,
            "data": self.recipe.data.source,
            "parts": self.data,
            "notes": self.notes,
            "fold": self.fold,
            "labels": len(self.labelled.clips.label_names),
            "base": self.base,
            "scores": scores,
            "per_label": evaluate.per_label(self.labelled, predicted) if predicted else {},
            "best": state.best if self.recipe.training.export == "best" else {},
            "head_start": self.head_start,
            "lr": self.peak_lr,
            "steps": state.step,
            "epochs": state.step / self.steps_per_epoch,
            "training_seconds": round(state.seconds, 1),
            "recipe": self.recipe.to_dict(),
            "versions": {"m2d-embed": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def describe(self) -> str:
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad) / 1e6
        every = sum(p.numel() for p in self.network.parameters()) / 1e6
        seconds = self.train_clips.crop_frames * self.config.frame_ms / 1000
        labels, folds = len(self.labelled.clips.label_names), self.labelled.clips.test_folds()
        others = f" of {', '.join(map(str, folds))} (--fold takes another)" if len(folds) > 1 else ""
        tested = "no fold is tested" if self.fold is None else f"fold {self.fold}{others} is tested"
        notes = "".join(f"\nnote: {note}" for note in self.notes)
        return (
            f"{self.recipe.data.source}: {self.labelled.kind}, {labels} label{'s' if labels > 1 else ''}; {tested}; "
            f"{self.data}\n"
            f"{self.base}: {trained:.2f} of {every:.2f} M parameters are trained, on crops of {seconds:.2f} s{notes}"
        )

    def kept(self) -> dict[str, Any]:
        return {"contents": self.contents, "base": self.base}

    # --- setting up -----------------------------------------------------------------------------------------------

    def _build(self, previous: RunState | None) -> Classifier:
        """The classifier with the weights to start from; a run that goes on loads its own afterwards."""
        recipe, per_column, seed = self.recipe, self.labelled.per_column, self.recipe.training.seed
        if previous is not None:
            classifier = Classifier(self.config, per_column)
        else:
            base = M2D.from_pretrained(recipe.start.model, device="cpu")
            self.config = self._model_config(base.config)
            self.base = base.config.name or base.origin
            if self.accelerator.is_main_process:
                _say_what_goes(self.base, base.config)
            classifier = build_classifier(base, self.config, per_column, seed)
        network.freeze(classifier, recipe.model.freeze_encoder, recipe.model.freeze_patch_embed)
        if recipe.lora.rank:
            network.add_lora(classifier, recipe.lora, seed)
        return classifier

    def _model_config(self, base: ModelConfig) -> ModelConfig:
        recipe = self.recipe
        shaped = recipe.model_config(base)
        begun_from = base.name or recipe.model_name
        named = dataclasses.replace(
            shaped,
            name=f"{recipe.data_name}-{begun_from}",
            source=f"m2d_embed.finetune on {recipe.data_name}, begun from {begun_from}",
        )
        labels, multi_label = self.labelled.clips.label_names, self.labelled.multi_label
        head = HeadConfig(labels, recipe.model.features, multi_label, self._pooling(base))
        return dataclasses.replace(named, head=head)

    def _pooling(self, base: ModelConfig) -> ScenePooling:
        chosen = self.recipe.model.scene_pooling
        if not self.labelled.per_column:
            return chosen or base.scene_pooling
        if chosen == "mean_std":
            raise _not_for_events("model.scene_pooling=mean_std")
        return "mean"

    def _head_start(self) -> str:
        chosen = self.recipe.start.head
        if not self.labelled.per_column:
            return chosen or "probe"
        if chosen == "probe":
            raise _not_for_events("start.head=probe")
        return "random"

    def _begin_as_probe(self) -> None:
        """In the main process alone: when the model is wrapped for several, it sends them its weights."""
        if not self.accelerator.is_main_process:
            return
        parts = dataclasses.replace(self.parts, train=self.train_clips.readable)
        clips = self._whole(np.concatenate([parts.train, parts.valid]))
        model = self._as_model(merged_tensors(self.network, dict(self.network.state_dict())))
        strength = probe_head(model, clips, self.labelled.clips, parts, self.fold)
        self.network.head.load_state_dict(model.cpu().tagging_head().state_dict())
        print(f"the head begins as the linear probe (C = {strength:g})", file=sys.stderr)

    def _read_clips(self) -> None:
        """Look at every file before the first step."""
        recipe, data, parts = self.recipe, self.labelled.data, self.parts
        main = self.accelerator.is_main_process
        self.train_clips = TrainingClips(
            self.config,
            data,
            parts.train,
            self._crop_frames(parts),
            recipe.training.seed,
            recipe.data.balanced,
            progress=main,
        )
        # The main process alone tests.
        self.valid_clips, self.test_clips = (
            self._whole(rows) if len(rows) and main else None for rows in (parts.valid, parts.test)
        )
        tested = [clips for clips in (self.valid_clips, self.test_clips) if clips is not None]
        if overlong := self.train_clips.overlong + [name for clips in tested for name in clips.overlong]:
            self.notes.append(
                f"events of {len(overlong)} files end after the end of the file, and are cut there: {named(overlong)}."
            )

    def _crop_frames(self, parts: Parts) -> int:
        """Length of a crop, whole patches: as asked for, but no longer than the longest clip."""
        config, asked = self.config, self.recipe.data.crop_seconds
        window, patch_frames = config.grid_size[1], config.patch_size[1]
        columns = window if asked is None else whole_columns(asked, config)
        if columns > window:
            raise ConfigError(
                f"data.crop_seconds {asked:g} is longer than the model's window of "
                f"{window * config.column_ms / 1000:g} s; set model.window_seconds={asked:g}, too."
            )
        longest = -(-longest_frames(config, self.labelled.data, parts.train) // patch_frames)
        columns = min(columns, longest)
        kept_patches((config.grid_size[0], columns), *self.recipe.augment.patch_dropout, rng_at(0, 0, Purpose.MASK))
        return columns * patch_frames


def _say_what_goes(name: str, config: ModelConfig) -> None:
    """Name the heads of a model that are not trained further."""
    if config.head is not None:
        print(f"{name}: its head of {len(config.head.labels)} labels is replaced", file=sys.stderr)
    if config.clap is not None:
        print(f"{name}: its audio-text projectors are left out", file=sys.stderr)


def _not_for_events(setting: str) -> ConfigError:
    return ConfigError(
        f"{setting} is of whole clips, and the labels are events, which single time columns are judged for; leave it "
        "out."
    )
