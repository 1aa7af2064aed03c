"""The loop of fine-tuning: from a recipe to a tested and exported classifier, and on again after any stop.

Accelerate chooses devices, wraps the model for several of them, and casts. Every random choice is keyed by the seed and
the step. Each process makes the whole batch and trains on its share, so mixup has the same pairs, and the head
normalises with the whole batch: a run has the same losses on one process or several, but for rounding.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from m2d_embed import __version__
from m2d_embed.config import HeadConfig, ModelConfig, ScenePooling
from m2d_embed.errors import CheckpointError, ConfigError, TrainingError
from m2d_embed.files import atomic_write, write_json, write_text
from m2d_embed.finetune import evaluate, network
from m2d_embed.finetune.augment import KeptPatches, frequency_warp, kept_patches, mixup, random_gain, spec_augment
from m2d_embed.finetune.crops import Batch, EvaluationClips, TrainingClips, longest_frames
from m2d_embed.finetune.export import ADAPTER_FOLDER, EXPORT_FOLDER, RESULTS_FILE, export
from m2d_embed.finetune.head_statistics import take_statistics
from m2d_embed.finetune.network import Classifier, build_classifier, merged_tensors
from m2d_embed.finetune.optim import Average, layer_groups, loss_per_row, scaled_decay
from m2d_embed.finetune.probe_start import probe_head
from m2d_embed.finetune.recipe import ALL_FOLDS, FinetuneRecipe, whole_columns
from m2d_embed.finetune.task import Parts, check_contents, choose_fold, choose_parts, notes_on, read_task
from m2d_embed.labelled.clips import named
from m2d_embed.m2d import M2D
from m2d_embed.training import run_state
from m2d_embed.training.monitor import RunLog
from m2d_embed.training.processes import agreed, check_processes, shared_means, start_accelerator, stop_agreed
from m2d_embed.training.run_state import RunState
from m2d_embed.training.sampling import Purpose, rng_at
from m2d_embed.training.schedule import learning_rate
from m2d_embed.training.stop import Stop

RECIPE_FILE = "recipe.yaml"
PREDICTIONS_FILE = "predictions.csv"
_EXTRA = "eval"
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
        AudioError: if files are missing or unreadable; it names them.
        TrainingError: if a loss or a gradient is not finite; it names the batch's files.
    """
    with Stop() as stop:
        if recipe.fold != ALL_FOLDS:
            outcome = _train_one(recipe, stop)
            return outcome.scores if outcome is not None else None
        return _train_folds(recipe, stop)


def _train_one(recipe: FinetuneRecipe, stop: Stop) -> Outcome | None:
    stop.wait_for_step = False
    run = _Run(recipe, stop)
    stop.wait_for_step = True
    if not run.train():
        return None
    stop.wait_for_step = False
    try:
        return run.finish()
    except KeyboardInterrupt:  # what was trained is saved
        return None


def _train_folds(recipe: FinetuneRecipe, stop: Stop) -> dict[str, dict[str, Any]] | None:
    """Each fold in turn into a folder of its own, then the scores of all together."""
    task = read_task(recipe)
    outcomes: dict[int, Outcome] = {}
    for fold in task.clips.test_folds():
        part = dataclasses.replace(recipe, fold=str(fold), output=str(recipe.folder / f"fold-{fold}"))
        outcome = _train_one(part, stop)
        if outcome is None:
            return None
        outcomes[fold] = outcome
    if not next(iter(outcomes.values())).predicted:  # not the main process, which alone tests
        return {}
    by_fold = {fold: outcome.scores for fold, outcome in outcomes.items()}
    together = evaluate.scores_of_folds(task, {f: o.predicted for f, o in outcomes.items()}, by_fold)
    write_json(recipe.folder / RESULTS_FILE, {"scores": together, "folds": by_fold})
    return together


class _Share(NamedTuple):
    """This process's share of a step's batch, and what the losses of the whole batch are divided by."""

    batch: Batch
    kept: KeptPatches | None
    rows: float


class _Run:
    """A run in one process: what it trains, and how far it is."""

    def __init__(self, recipe: FinetuneRecipe, stop: Stop):
        self.recipe = recipe
        self.stop = stop
        self.accelerator = start_accelerator(recipe.precision)
        self._check_device()
        previous = _previous(recipe)
        self.task = read_task(recipe)
        self.fold = choose_fold(self.task, recipe)
        self.parts = choose_parts(self.task, self.fold, recipe)
        self.contents = check_contents(self.task, self.parts, Path(recipe.data))
        if previous is not None and previous.extra["contents"] != self.contents:
            raise ConfigError(
                f"{recipe.folder}: {recipe.data} has changed since the run was begun; give another --output."
            )
        self.notes = notes_on(self.task, self.fold)
        self.base = previous.extra["base"] if previous is not None else ""
        self.config = previous.config if previous is not None else ModelConfig()
        self.head_start = self._head_start()
        self.lr = recipe.lr or _RATES[self.head_start]
        self.network = self._build(previous)
        self._read_clips()
        if previous is None and self.head_start == "probe":
            self._begin_as_probe()
        self.per_epoch = max(1, round(len(self.train_clips) / recipe.batch_size))
        self.total = recipe.steps if recipe.steps is not None else max(1, round(recipe.epochs * self.per_epoch))
        self.average = Average(self.network, scaled_decay(recipe.ema_decay, self.total))
        groups = layer_groups(self.network, self.lr, recipe.layer_decay, recipe.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.average.to(self.accelerator.device)
        self.step, self.saved, self.seconds = 0, -1, 0.0
        self.best: dict[str, Any] = {}  # of validation: step, score and name of the score
        self.stale = 0  # epochs since
        self.pending: dict[str, float] = {}
        if previous is not None:
            self._restore(previous)
        if self.accelerator.is_main_process:
            recipe.folder.mkdir(parents=True, exist_ok=True)
            write_text(recipe.folder / RECIPE_FILE, recipe.to_yaml())

    # --- training -------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        patience = self.recipe.patience
        return self.step >= self.total or (patience is not None and self.stale >= patience)

    def train(self) -> bool:
        """Take the steps that are left; False if a signal stopped it before the last."""
        if self.done:
            return True
        main = self.accelerator.is_main_process
        log = RunLog(self.recipe.folder, self.step + 1 if self.step else 0, _EXTRA) if main else None
        if main:
            self._announce()
        bar = tqdm(total=self.total, initial=self.step, unit="step", disable=None if main else True)
        shares = self._shares()
        try:
            if self.step == 0 and self.head_start == "probe":
                self._validate(log)  # fine-tuning may add nothing to the probe, which then is what is kept
            with bar:
                while not self.done and not stop_agreed(self.accelerator, self.stop):
                    values = self._step(next(shares))
                    self.step += 1
                    bar.update()
                    bar.set_postfix_str(f"loss {values['loss']:.4f}")
                    self._log(log, values)
                    if self.step % self.per_epoch == 0 or self.step == self.total:
                        self._validate(log)
                        self.save()
        finally:
            shares.close()
            if log is not None:
                log.close()
        self.save()
        return self.done

    def save(self) -> None:
        """Write a checkpoint, unless there is one of this step; every process has to call it."""
        if self.saved == self.step:
            return
        model, optimizer = run_state.capture(self.model, [self.optimizer.optimizer])
        if self.accelerator.is_main_process:
            self._state(model, optimizer).write(self.recipe.folder, self.recipe.keep)
            for old in sorted(self._best_file(0).parent.glob("best-*.safetensors"))[: -self.recipe.keep]:
                old.unlink()
        self.saved = self.step
        self.accelerator.wait_for_everyone()

    def _step(self, share: _Share) -> dict[str, float]:
        """One optimiser step. Returns what to log."""
        recipe = self.recipe
        rate = learning_rate(self.step, self.total, recipe.warmup, self.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        began = time.perf_counter()
        self.model.train()
        batch = share.batch.to(self.accelerator.device)
        losses, counted = self._losses(batch, share.kept)
        loss = (losses * counted).sum() / share.rows
        # Gradients are averaged over processes, of which each has the sum of its share.
        self.accelerator.backward(loss * self.accelerator.num_processes)
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        norm = self.accelerator.clip_grad_norm_(trained, recipe.clip_norm)
        values = shared_means(
            self.accelerator,
            {"loss": loss.detach() * self.accelerator.num_processes, "grad_norm": torch.as_tensor(norm)},
        )
        self._check_finite(values, losses.detach(), batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.network, self.step)
        return {**values, "lr": rate, "seconds": time.perf_counter() - began}

    def _losses(self, batch: Batch, kept: KeptPatches | None) -> tuple[Tensor, Tensor]:
        """The loss of each clip, or of each of its columns, and which of them count, as zeros and ones."""
        logits = self.model(batch.log_mel, batch.valid_frames, batch.mask, kept)
        mask, targets = batch.mask, batch.targets
        if kept is not None:
            columns = kept.columns.to(mask.device)
            mask = mask[:, columns]
            targets = targets[:, columns] if self.task.per_column else targets
        losses = loss_per_row(logits.float(), targets, self.task.multi_label, self.recipe.label_smoothing)
        return losses, (mask if self.task.per_column else mask.any(dim=1)).float()

    def _shares(self) -> Generator[_Share, None, None]:
        """This process's shares of the batches that are left; the next one is made while the last is trained on."""
        with ThreadPoolExecutor(max_workers=1) as worker:
            following = worker.submit(self._share, self.step)
            for step in range(self.step + 1, self.total + 1):
                share = following.result()
                if step < self.total:
                    following = worker.submit(self._share, step)
                yield share

    def _share(self, step: int) -> _Share:
        recipe, std = self.recipe, self.config.norm_stats[1]
        generator = rng_at(recipe.seed, step, Purpose.NOISE)
        batch = self.train_clips.batch(step * recipe.batch_size, recipe.batch_size)
        batch = frequency_warp(batch, recipe.freq_warp, self.config, generator)
        batch = mixup(random_gain(batch, recipe.gain_db, std, generator), recipe.mixup, std, generator)
        masks, (mels, frames) = recipe.spec_augment, batch.log_mel.shape[2:]
        widest = round(masks.max_freq * mels), round(masks.max_time * frames)
        log_mel = spec_augment(batch.log_mel, masks.freq_masks, widest[0], masks.time_masks, widest[1], generator)
        kept, counted = None, batch.mask
        if any(recipe.patch_dropout):
            grid = self.config.grid_size[0], batch.mask.shape[1]
            kept = kept_patches(grid, *recipe.patch_dropout, rng_at(recipe.seed, step, Purpose.MASK))
            counted = counted[:, kept.columns]
        rows = counted.sum() if self.task.per_column else counted.any(dim=1).sum()
        count = recipe.batch_size // self.accelerator.num_processes
        start = count * self.accelerator.process_index
        mine = _rows(dataclasses.replace(batch, log_mel=log_mel), start, start + count)
        return _Share(mine, kept, float(rows.clamp_min(1)))

    def _check_finite(self, values: dict[str, float], losses: Tensor, batch: Batch) -> None:
        """Stop before the update if the loss or the gradient is not finite; the state before this step is saved."""
        scaler = self.accelerator.scaler
        # The scaler of float16 meets infinite gradients on its way, and skips those steps; not when it is below 1.
        searching = scaler is not None and scaler.get_scale() >= 1
        wrong = [k for k, v in values.items() if not math.isfinite(v) and not (searching and k == "grad_norm")]
        if not wrong:
            return
        self.optimizer.zero_grad()
        self.save()
        finite = torch.isfinite(losses.flatten(1) if losses.ndim > 1 else losses[:, None]).all(dim=1).tolist()
        guilty = [name for name, good in zip(batch.names, finite, strict=True) if not good] or batch.names
        raise TrainingError(
            f"step {self.step}: {wrong[0]} is {values[wrong[0]]}. The run is saved as it was before that step. "
            f"The batch's files: {', '.join(dict.fromkeys(guilty))}. A smaller lr may help."
        )

    # --- validation, test and export ------------------------------------------------------------------------------

    def _validate(self, log: RunLog | None) -> None:
        """Score the averaged weights on the validation part, and keep them if they are the best so far."""
        if not len(self.parts.valid):
            return
        name, score = agreed(self.accelerator, self._validation_score)
        if log is not None:
            log.write(self.step, {f"valid/{name}": score})
            tqdm.write(f"step {self.step} of {self.total}: validation {name} {100 * score:.2f} %", file=sys.stderr)
        if self.best and not score > self.best["score"]:
            self.stale += 1
            return
        self.best, self.stale = {"step": self.step, "score": score, "name": name}, 0
        if self.accelerator.is_main_process:
            _save_tensors(_on_cpu(self.average.tensors), self._best_file(self.step))

    def _validation_score(self) -> tuple[str, float]:
        assert self.valid_clips is not None
        model = self._as_model(self._with_statistics(self._merged(self.average.tensors)))
        predicted = evaluate.predict(model, self.valid_clips, self.task.per_column)
        return evaluate.main_score(self.task, self.valid_clips, predicted)

    def finish(self) -> Outcome:
        """Test and export; every process has to call it, but only the main one does it."""
        outcome = Outcome(self.recipe.folder, self.recipe.folder / EXPORT_FOLDER, {}, {})
        if self.accelerator.is_main_process:
            averages = self._final_averages()
            tensors = self._with_statistics(self._merged(averages))
            averages = averages | {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
            predicted: evaluate.Predictions = {}
            scores: dict[str, dict[str, Any]] = {}
            if self.test_clips is not None:
                predicted = evaluate.predict(self._as_model(tensors), self.test_clips, self.task.per_column)
                scores = evaluate.all_scores(self.task, self.test_clips, predicted)
                file = self.recipe.folder / PREDICTIONS_FILE
                evaluate.write_predictions(self.task, self.test_clips, predicted, file)
            exported = export(self.recipe, self.config, tensors, self._results(scores, predicted))
            if self.recipe.lora.rank:
                folder = self.recipe.folder / ADAPTER_FOLDER
                network.save_adapter(self.network, averages, self.recipe.lora, folder)
            outcome = Outcome(self.recipe.folder, exported, scores, predicted)
        self.accelerator.wait_for_everyone()
        return outcome

    def _merged(self, averages: dict[str, Tensor]) -> dict[str, Tensor]:
        """Averaged weights by the names of ``M2D.state_dict()``, on the CPU."""
        return _on_cpu(merged_tensors(self.network, averages))

    def _with_statistics(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the names of ``M2D.state_dict()``, whose head normalises as whole training clips ask for."""
        model = self._as_model(tensors)
        take_statistics(model, self._clips_for_statistics, self.task.per_column)
        return _on_cpu(model.state_dict())

    @cached_property
    def _clips_for_statistics(self) -> EvaluationClips:
        rows = self.parts.train
        if len(rows) > _STATISTICS_OF:
            rows = np.sort(np.random.default_rng(self.recipe.seed).choice(rows, _STATISTICS_OF, replace=False))
        return EvaluationClips(self.config, self.task.data, rows, self.recipe.eval_batch_size)

    def _final_averages(self) -> dict[str, Tensor]:
        """The averaged weights to export: those of the best epoch, or the last ones."""
        if not self.best:
            return self.average.tensors
        file = self._best_file(self.best["step"])
        if not file.exists():
            raise CheckpointError(f"{file} is missing: it holds the best weights of the run. Train again.")
        return load_file(file)

    def _as_model(self, tensors: dict[str, Tensor]) -> M2D:
        model = M2D(self.config)
        model.load_state_dict(tensors)
        return model.to(self.accelerator.device).eval()

    def _best_file(self, step: int) -> Path:
        return self.recipe.folder / "checkpoints" / f"best-{step:09d}.safetensors"

    def _results(self, scores: dict[str, dict[str, Any]], predicted: evaluate.Predictions) -> dict[str, Any]:
        return {
            "task": self.task.kind,
            "data": self.recipe.data,
            "parts": self.parts.describe(),
            "notes": self.notes,
            "fold": self.fold,
            "labels": len(self.task.clips.label_names),
            "base": self.base,
            "scores": scores,
            "per_label": evaluate.per_label(self.task, predicted) if predicted else {},
            "best": self.best,
            "head_start": self.head_start,
            "lr": self.lr,
            "steps": self.step,
            "epochs": self.step / self.per_epoch,
            "training_seconds": round(self.seconds, 1),
            "recipe": self.recipe.to_dict(),
            "versions": {"m2d-embed": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    # --- log ------------------------------------------------------------------------------------------------------

    def _log(self, log: RunLog | None, values: dict[str, float]) -> None:
        """Add up what is averaged, and write a line every ``log_every`` steps."""
        self.seconds += values["seconds"]
        for key in ("loss", "grad_norm", "seconds"):
            self.pending[key] = self.pending.get(key, 0.0) + values[key]
        self.pending["steps"] = self.pending.get("steps", 0.0) + 1
        if self.step % self.recipe.log_every and self.step != self.total:
            return
        steps = self.pending.pop("steps")
        means = {key: total / steps for key, total in self.pending.items()}
        self.pending = {}
        seconds = means.pop("seconds")
        line = {**means, "lr": values["lr"], "clips_per_second": self.recipe.batch_size / seconds}
        if log is not None:
            log.write(self.step, line)
            if not sys.stderr.isatty():  # no progress bar there
                print(f"step {self.step} of {self.total}: loss {line['loss']:.4f}", file=sys.stderr)

    def _announce(self) -> None:
        recipe = self.recipe
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad) / 1e6
        every = sum(p.numel() for p in self.network.parameters()) / 1e6
        seconds = self.train_clips.crop_frames * self.config.frame_ms / 1000
        labels, folds = len(self.task.clips.label_names), self.task.clips.test_folds()
        others = f" of {', '.join(map(str, folds))} (--fold takes another)" if len(folds) > 1 else ""
        tested = "no fold is tested" if self.fold is None else f"fold {self.fold}{others} is tested"
        print(
            f"{recipe.data}: {self.task.kind}, {labels} label{'s' if labels > 1 else ''}; {tested}; "
            f"{self.parts.describe()}\n"
            f"{self.base}: {trained:.2f} of {every:.2f} M parameters are trained, on crops of {seconds:.2f} s\n"
            f"{self.total} steps of {recipe.batch_size} clips on {self.accelerator.num_processes} x "
            f"{self.accelerator.device.type}, {recipe.precision} -> {recipe.folder}",
            file=sys.stderr,
        )
        for note in self.notes:
            print(f"note: {note}", file=sys.stderr)

    # --- setting up -----------------------------------------------------------------------------------------------

    def _check_device(self) -> None:
        check_processes(self.accelerator, self.recipe.folder)
        if self.accelerator.device.type == "cpu" and self.recipe.precision == "fp16":
            raise ConfigError("precision fp16 needs a GPU; on a CPU take bf16 or fp32.")
        processes = self.accelerator.num_processes
        if self.recipe.batch_size % processes:
            raise ConfigError(f"batch_size {self.recipe.batch_size} is not a multiple of {processes} processes.")

    def _build(self, previous: RunState | None) -> Classifier:
        """The classifier with the weights to start from; a run that goes on loads its own afterwards."""
        recipe = self.recipe
        if previous is not None:
            classifier = Classifier(self.config, self.task.per_column)
        else:
            base = M2D.from_pretrained(recipe.model, device="cpu")
            self.config = self._model_config(base.config)
            self.base = base.config.name or base.origin
            if self.accelerator.is_main_process:
                _say_what_goes(self.base, base.config)
            classifier = build_classifier(base, self.config, self.task.per_column, recipe.seed)
        network.freeze(classifier, recipe.freeze_encoder, recipe.freeze_patch_embed)
        if recipe.lora.rank:
            network.add_lora(classifier, recipe.lora, recipe.seed)
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
        head = HeadConfig(self.task.clips.label_names, recipe.features, self.task.multi_label, self._pooling(base))
        return dataclasses.replace(named, head=head)

    def _pooling(self, base: ModelConfig) -> ScenePooling:
        chosen = self.recipe.scene_pooling
        if not self.task.per_column:
            return chosen or base.scene_pooling
        if chosen == "mean_std":
            raise ConfigError(
                "scene_pooling=mean_std is of whole clips, and the labels are events, which single time columns are "
                "judged for; leave it out."
            )
        return "mean"

    def _head_start(self) -> str:
        chosen = self.recipe.head_start
        if not self.task.per_column:
            return chosen or "probe"
        if chosen == "probe":
            raise ConfigError(
                "head_start=probe is of whole clips, and the labels are events, which single time columns are judged "
                "for; leave it out."
            )
        return "random"

    def _begin_as_probe(self) -> None:
        """In the main process alone: when the model is wrapped for several, it sends them its weights."""
        if not self.accelerator.is_main_process:
            return
        recipe, parts = self.recipe, self.parts
        rows = np.concatenate([parts.train, parts.valid])
        clips = EvaluationClips(self.config, self.task.data, rows, recipe.eval_batch_size)
        model = self._as_model(self._merged(dict(self.network.state_dict())))
        strength = probe_head(model, clips, self.task.clips, parts, self.fold)
        self.network.head.load_state_dict(model.cpu().tagging_head().state_dict())
        print(f"the head begins as the linear probe (C = {strength:g})", file=sys.stderr)

    def _read_clips(self) -> None:
        """Look at every file before the first step."""
        recipe, data, parts = self.recipe, self.task.data, self.parts
        main = self.accelerator.is_main_process

        def whole(rows: Any) -> EvaluationClips | None:
            if not len(rows) or not main:  # the main process alone tests
                return None
            return EvaluationClips(self.config, data, rows, recipe.eval_batch_size)

        frames = self._crop_frames(parts)
        self.train_clips = TrainingClips(
            self.config, data, parts.train, frames, recipe.seed, recipe.balanced, progress=main
        )
        self.valid_clips, self.test_clips = whole(parts.valid), whole(parts.test)
        tested = [clips for clips in (self.valid_clips, self.test_clips) if clips is not None]
        if overlong := self.train_clips.overlong + [name for clips in tested for name in clips.overlong]:
            self.notes.append(
                f"events of {len(overlong)} files end after the end of the file, and are cut there: {named(overlong)}."
            )

    def _crop_frames(self, parts: Parts) -> int:
        """Length of a crop, whole patches: as asked for, but no longer than the longest clip."""
        config, asked = self.config, self.recipe.crop_seconds
        window, patch_frames = config.grid_size[1], config.patch_size[1]
        columns = window if asked is None else whole_columns(asked, config)
        if columns > window:
            raise ConfigError(
                f"crop_seconds {asked:g} is longer than the model's window of {window * config.column_ms / 1000:g} s; "
                f"set window_seconds={asked:g}, too."
            )
        longest = -(-longest_frames(config, self.task.data, parts.train) // patch_frames)
        columns = min(columns, longest)
        kept_patches((config.grid_size[0], columns), *self.recipe.patch_dropout, rng_at(0, 0, Purpose.MASK))
        return columns * patch_frames

    def _restore(self, previous: RunState) -> None:
        run_state.restore(previous, self.model, [self.optimizer.optimizer])
        self.step, self.saved, self.pending = previous.step, previous.step, previous.pending
        extra = previous.extra
        self.best, self.stale, self.seconds = extra["best"], extra["stale"], extra["seconds"]
        self.average.load(extra["average"])
        if self.accelerator.scaler is not None and previous.scaler:
            self.accelerator.scaler.load_state_dict(previous.scaler)

    def _state(self, model: dict[str, Tensor], optimizer: dict[str, Any]) -> RunState:
        scaler = self.accelerator.scaler
        return RunState(
            step=self.step,
            model=model,
            optimizer=optimizer,
            recipe=self.recipe.to_dict(),
            config=self.config,
            pending=self.pending,
            data=self.parts.describe(),
            processes=self.accelerator.num_processes,
            scaler=dict(scaler.state_dict()) if scaler is not None else {},
            extra={
                "average": _on_cpu(self.average.tensors),
                "best": self.best,
                "stale": self.stale,
                "seconds": self.seconds,
                "contents": self.contents,
                "base": self.base,
            },
        )


def _previous(recipe: FinetuneRecipe) -> RunState | None:
    """The newest checkpoint of the run, if it has one, and is of fine-tuning by the same recipe."""
    file = run_state.latest(recipe.folder)
    if file is not None and "average" not in RunState.read(file).extra:
        raise ConfigError(f"{recipe.folder} holds a run of pre-training; give another --output.")
    return run_state.previous(recipe)


def _say_what_goes(name: str, config: ModelConfig) -> None:
    """Name the heads of a model that are not trained further."""
    if config.head is not None:
        print(f"{name}: its head of {len(config.head.labels)} labels is replaced", file=sys.stderr)
    if config.clap is not None:
        print(f"{name}: its audio-text projectors are left out", file=sys.stderr)


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    """Some rows of a batch."""
    return Batch(
        batch.log_mel[start:stop],
        batch.targets[start:stop],
        batch.mask[start:stop],
        batch.valid_frames[start:stop],
        batch.names[start:stop],
    )


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
