"""The training loop: from a recipe to an exported encoder, on one core or many GPUs, and on again after any stop.

Accelerate chooses devices, wraps the model for several of them, and casts; ``torchrun`` or ``accelerate launch`` start
the processes. Every random choice is keyed by the seed and the position in the stream of crops, so the number of data
workers or processes changes nothing, and a resumed run repeats no and leaves out no step.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from m2d_embed import m2d as inference
from m2d_embed.audio.clips import open_sound
from m2d_embed.config import ModelConfig
from m2d_embed.errors import AudioError, ConfigError, M2DEmbedError, TrainingError
from m2d_embed.evaluate.probes import embed_clips, knn_accuracy, linear_probe_accuracy
from m2d_embed.files import write_text
from m2d_embed.labelled.clips import LabelledClips, read_labelled
from m2d_embed.pretrain.build import build_optimizers, build_task, peak_rate
from m2d_embed.pretrain.data import TrainingData, label_names, open_data
from m2d_embed.pretrain.datasets import BadFiles, Batch, measure_stats
from m2d_embed.pretrain.export import EXPORT_FOLDER, describe_model, export
from m2d_embed.pretrain.inputs import Inputs
from m2d_embed.pretrain.masking import num_visible
from m2d_embed.pretrain.objectives import Objective
from m2d_embed.pretrain.recipe import Recipe
from m2d_embed.pretrain.sources import is_shards
from m2d_embed.pretrain.warm_start import apply_start, read_start
from m2d_embed.training import run_state
from m2d_embed.training.monitor import RunLog, mean_variance, rank_me
from m2d_embed.training.processes import agreed, check_processes, shared_means, start_accelerator, stop_agreed
from m2d_embed.training.run_state import RunState
from m2d_embed.training.schedule import ema_decay, learning_rate
from m2d_embed.training.stop import Stop

RECIPE_FILE = "recipe.yaml"


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
        run = _Run(recipe, stop)
        stop.wait_for_step = True
        finished = run.train()
        return run.export() if finished else None


def export_latest(recipe: Recipe) -> Path:
    """Export the newest checkpoint of a run without training any further.

    Raises:
        ConfigError: if the run has no checkpoint, or is of another recipe.
    """
    state = run_state.previous(recipe)
    if state is None:
        raise ConfigError(f"{recipe.folder}: no checkpoint to export; train first.")
    return export(recipe.folder, state, recipe)


class _Run:
    """A run in one process: what it trains, and how far it is."""

    def __init__(self, recipe: Recipe, stop: Stop):
        self.recipe = recipe
        self.stop = stop
        self.accelerator = start_accelerator(recipe.training.precision)
        self._check_device()
        self.accumulation = self._accumulation()
        previous = run_state.previous(recipe)
        self._check_processes(previous)
        self.probe_clips = agreed(self.accelerator, self._read_probe)
        start = read_start(recipe.start) if previous is None else None
        start_config = start.config if start is not None else None
        shape = previous.config if previous else recipe.model_config(start_config, (0.0, 1.0))
        self.data = self._open_data(shape)
        if self.accelerator.is_main_process:
            recipe.folder.mkdir(parents=True, exist_ok=True)
            write_text(recipe.folder / RECIPE_FILE, recipe.to_yaml())
        self.config = previous.config if previous else self._with_stats(start_config)
        visible = num_visible(self.config.grid_size[0] * self.config.grid_size[1], recipe.masking.mask_ratio)
        names, dim = self.data.label_names, self.data.feature_dim()
        task = build_task(recipe, self.config, self.accelerator.device, names, dim)
        if start is not None:
            apply_start(task.objective, start, recipe.start.parts)
        self.config = _with_clap(self.config, task.objective)
        if recipe.license:
            self.config = dataclasses.replace(self.config, license=recipe.license)
        self.inputs = Inputs(self.config, visible, recipe.data.noise_ratio, task.offline).to(self.accelerator.device)
        network: nn.Module = task.objective
        if recipe.training.compile:
            network = cast(nn.Module, torch.compile(network))
        optimizers = build_optimizers(task.objective, recipe)
        self.model, *self.optimizers = self.accelerator.prepare(network, *optimizers)
        self.objective: Objective = task.objective
        self.total = self._total_steps()
        self.step, self.saved = 0, 0
        self.bad = BadFiles(self.data.num_files)
        self.pending: dict[str, float] = {}
        if previous is not None:
            self._restore(previous)

    # --- training -------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Take the steps that are left; False if a signal stopped it before the last."""
        recipe, main = self.recipe, self.accelerator.is_main_process
        if self.step >= self.total:
            return True
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        batches = self.data.batches(recipe.training.micro_batch, rank, processes, self.accumulation, self.step)
        log = RunLog(recipe.folder, self.step + 1) if main else None
        if main:
            self._announce()
        bar = tqdm(total=self.total, initial=self.step, unit="step", disable=None if main else True)
        try:
            with bar:
                while self.step < self.total and not stop_agreed(self.accelerator, self.stop):
                    values = self._step(batches)
                    self.step += 1
                    bar.update()
                    bar.set_postfix_str(f"loss {values['loss']:.4f}")
                    self._log(log, values)
                    if self.step % recipe.training.save_every == 0 or self._probe_due():
                        self.save()
                    if self._probe_due():
                        self._probe(log)
        except M2DEmbedError:
            if self.accelerator.num_processes == 1:  # the others would not come to save
                self.save()
            raise
        finally:
            if log is not None:
                log.close()
        self.save()
        return self.step >= self.total

    def save(self) -> None:
        """Write a checkpoint, unless there is one of this step; every process has to call it."""
        if self.saved == self.step:
            return
        model, optimizer = self._captured()
        if self.accelerator.is_main_process:
            self._state(model, optimizer).write(self.recipe.folder, self.recipe.training.keep)
        self.saved = self.step
        self.accelerator.wait_for_everyone()

    def export(self) -> Path:
        """Export the encoder as it is now; every process has to call it."""
        model, optimizer = self._captured()
        if self.accelerator.is_main_process:
            export(self.recipe.folder, self._state(model, optimizer), self.recipe)
        self.accelerator.wait_for_everyone()
        return self.recipe.folder / EXPORT_FOLDER

    def _step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimiser step: forward and backward of every micro-batch, then the update. Returns what to log."""
        training = self.recipe.training
        rate = learning_rate(self.step, self.total, training.warmup, peak_rate(self.recipe))
        decay = ema_decay(self.step, self.total, *training.ema_decay)
        for group in [group for optimizer in self.optimizers for group in optimizer.param_groups]:
            group["lr"] = rate
        began, waited = time.perf_counter(), 0.0
        names: list[list[str]] = []
        micro_losses: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        self.model.train()
        for micro in range(self.accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self._count_bad(batch)
            names.append(batch.names)
            last = micro == self.accumulation - 1
            example = self.inputs(batch.to(self.accelerator.device, non_blocking=True))
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                outputs = self.model(example)
                self.accelerator.backward(outputs["loss"] / self.accumulation)
            micro_losses.append(outputs["loss"].detach())
            for key in [key for key in outputs if key.startswith("loss")]:
                losses[key] = losses.get(key, 0) + outputs[key].detach().float() / self.accumulation
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), training.clip_norm)
        values = shared_means(self.accelerator, {**losses, "grad_norm": torch.as_tensor(norm)})
        self._check_finite(values, micro_losses, names)
        for optimizer in self.optimizers:
            optimizer.step()
        self._zero_grad()
        self.objective.update_target(decay)
        if (self.step + 1) % training.log_every == 0 or self.step + 1 == self.total:
            values |= self._collapse_signs(outputs)
        seconds = time.perf_counter() - began
        return {**values, "lr": rate, "ema_decay": decay, "seconds": seconds, "waited": waited}

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _captured(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return run_state.capture(self.model, [optimizer.optimizer for optimizer in self.optimizers])

    def _check_finite(self, values: dict[str, float], losses: list[Tensor], names: list[list[str]]) -> None:
        """Stop before the update if the loss or the gradient is not finite; the state before this step is saved."""
        scaler = self.accelerator.scaler
        # The scaler of float16 meets infinite gradients on its way, and skips those steps; not when it is below 1.
        searching = scaler is not None and scaler.get_scale() >= 1
        wrong = [k for k, v in values.items() if not math.isfinite(v) and not (searching and k == "grad_norm")]
        if not wrong:
            return
        self._zero_grad()
        self.save()
        finite = [bool(torch.isfinite(loss)) for loss in losses]
        if wrong[0] != "grad_norm" and all(finite):
            where = "It arose in another process, which names its files."
        else:
            guilty = [batch for batch, good in zip(names, finite, strict=True) if not good] or names
            where = f"The batch's files: {', '.join(dict.fromkeys(name for batch in guilty for name in batch))}"
        raise TrainingError(
            f"step {self.step}: {wrong[0]} is {values[wrong[0]]}. The run is saved as it was before that step. {where}"
        )

    def _collapse_signs(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        if not self.accelerator.is_main_process:
            return {}
        target = outputs["target"].detach().flatten(0, 1).float()
        return {"target_variance": mean_variance(target), "target_rank": rank_me(target)}

    def _count_bad(self, batch: Batch) -> None:
        for name, reason in self.bad.add(batch).items():
            tqdm.write(f"skipped: {reason if name in reason else f'{name}: {reason}'}", file=sys.stderr)
        if self.accelerator.num_processes == 1:
            self.bad.check()

    def _share_bad(self) -> None:
        """Count what any process could not read; every process has to call it."""
        if self.accelerator.num_processes == 1:
            return
        for reasons in gather_object([self.bad.reasons]):
            self.bad.reasons |= reasons
        try:
            self.bad.check(self.step * self.recipe.training.effective_batch)
        except AudioError:
            self.save()
            raise

    # --- log and probes -------------------------------------------------------------------------------------------

    def _log(self, log: RunLog | None, values: dict[str, float]) -> None:
        """Add up what is averaged, and write a line every ``log_every`` steps."""
        training = self.recipe.training
        averaged = ("loss", "grad_norm", "seconds", "waited")
        for key in [k for k in values if k.startswith(averaged)]:
            self.pending[key] = self.pending.get(key, 0.0) + values[key]
        self.pending["steps"] = self.pending.get("steps", 0.0) + 1
        if self.step % training.log_every and self.step != self.total:
            return
        self._share_bad()
        steps = self.pending.pop("steps")
        means = {key: total / steps for key, total in self.pending.items()}
        self.pending = {}
        seconds, waited = means.pop("seconds"), means.pop("waited")
        line = {
            **means,
            **{key: value for key, value in values.items() if key not in (*means, "seconds", "waited")},
            "clips_per_second": training.effective_batch / seconds,
            "data_share": waited / seconds,
        }
        if log is not None:
            log.write(self.step, line)
            if not sys.stderr.isatty():  # no progress bar there
                print(f"step {self.step} of {self.total}: loss {line['loss']:.4f}", file=sys.stderr)

    def _probe_due(self) -> bool:
        return self.probe_clips is not None and (self.step % self.recipe.probe.every == 0 or self.step == self.total)

    def _probe(self, log: RunLog | None) -> None:
        """Log kNN and linear probe of the encoder as it is; only the main process, which has a log, computes them."""
        tensors = run_state.capture_model(self.model)
        if log is not None and self.probe_clips is not None:
            model = inference.M2D(self.config).to(self.accelerator.device)
            encoder = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
            model.encoder.load_state_dict(encoder)
            embeddings = embed_clips(model.eval(), self.probe_clips)
            values = {
                "probe/knn": knn_accuracy(embeddings, self.probe_clips),
                "probe/linear": linear_probe_accuracy(embeddings, self.probe_clips),
            }
            log.write(self.step, values)
            tqdm.write(
                f"step {self.step}: kNN {values['probe/knn']:.1%}, linear probe {values['probe/linear']:.1%}",
                file=sys.stderr,
            )
        self.accelerator.wait_for_everyone()

    # --- setting up -----------------------------------------------------------------------------------------------

    def _accumulation(self) -> int:
        training, processes = self.recipe.training, self.accelerator.num_processes
        at_once = training.micro_batch * processes
        if training.effective_batch % at_once:
            raise ConfigError(
                f"training.effective_batch {training.effective_batch} is not a multiple of training.micro_batch "
                f"{training.micro_batch} x {processes} process{'es' if processes > 1 else ''}."
            )
        return int(training.effective_batch // at_once)

    def _read_probe(self) -> LabelledClips | None:
        """The labelled clips to probe with, each looked at once: better now than after hours."""
        probe = self.recipe.probe
        if probe.data is None:
            return None
        clips = read_labelled(Path(probe.data), probe.clips, self.recipe.training.seed)
        for file in clips.files:
            open_sound(file).close()
        return clips

    def _restore(self, previous: RunState) -> None:
        run_state.restore(previous, self.model, [optimizer.optimizer for optimizer in self.optimizers])
        self.step, self.pending = previous.step, previous.pending
        self.saved = self.step
        if self.accelerator.scaler is not None and previous.scaler:
            self.accelerator.scaler.load_state_dict(previous.scaler)

    def _open_data(self, shape: ModelConfig) -> TrainingData:
        """The main process first: it may have labels to collect and a cache to build."""
        names = agreed(self.accelerator, lambda: label_names(self.recipe))
        opened: list[TrainingData] = []

        def by_main() -> None:
            opened.append(open_data(self.recipe, shape, names, show_progress=True))

        agreed(self.accelerator, by_main)
        return opened[0] if opened else open_data(self.recipe, shape, names, show_progress=False)

    def _check_device(self) -> None:
        training = self.recipe.training
        check_processes(self.accelerator, self.recipe.folder)
        if self.accelerator.device.type != "cpu":
            return
        if training.precision == "fp16":
            raise ConfigError("training.precision fp16 needs a GPU; on a CPU take bf16 or fp32.")
        compilers = (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")
        if training.compile and not any(shutil.which(name) for name in compilers):
            raise ConfigError("training.compile needs a C++ compiler, e.g. g++; install one or set it to false.")

    def _check_processes(self, previous: RunState | None) -> None:
        now = self.accelerator.num_processes
        if previous is not None and is_shards(self.recipe.data.source) and previous.processes != now:
            raise ConfigError(
                f"{self.recipe.folder}: begun with {previous.processes} processes, which each read shards of their "
                f"own, so it cannot go on with {now}."
            )

    def _with_stats(self, start: ModelConfig | None) -> ModelConfig:
        """The configuration with mean and standard deviation, given or measured by the main process."""
        stats = self.recipe.data.norm_stats
        if stats is None:
            stats = agreed(self.accelerator, lambda: measure_stats(self.data.dataset))
        return self.recipe.model_config(start, stats)

    def _total_steps(self) -> int:
        training, files = self.recipe.training, self.data.clips_per_epoch
        if training.steps is not None:
            return training.steps
        assert training.epochs is not None and files is not None  # the recipe sees to that
        return max(1, round(training.epochs * files / training.effective_batch))

    def _announce(self) -> None:
        objective = self.objective
        count = sum(p.numel() for p in objective.encoder.parameters()) / 1e6
        print(
            f"{self.recipe.name}: {self.recipe.objective}, encoder of {count:.1f} M parameters "
            f"({describe_model(self.config)})\n"
            f"{self.data.description}; mean {self.config.norm_stats[0]:.3f}, std {self.config.norm_stats[1]:.3f}\n"
            f"{self.total} steps of {self.recipe.training.effective_batch} crops on {self.accelerator.num_processes} x "
            f"{self.accelerator.device.type}, {self.recipe.training.precision} -> {self.recipe.folder}",
            file=sys.stderr,
        )

    def _state(self, model: dict[str, Tensor], optimizer: dict[str, Any]) -> RunState:
        scaler = self.accelerator.scaler
        return RunState(
            step=self.step,
            model=model,
            optimizer=optimizer,
            recipe=self.recipe.to_dict(),
            config=self.config,
            bad_files=self.bad.reasons,
            pending=self.pending,
            data=self.data.description,
            processes=self.accelerator.num_processes,
            scaler=dict(scaler.state_dict()) if scaler is not None else {},
        )


def _with_clap(config: ModelConfig, objective: Objective) -> ModelConfig:
    clap = getattr(objective, "clap", None)
    if clap is None:
        return config
    return dataclasses.replace(config, clap=clap.config)
