"""The loop of every training run, from its set-up to its last checkpoint; what is trained is a ``Task``.

Accelerate chooses devices, wraps the model for several of them, and casts; ``torchrun`` or ``accelerate launch`` start
the processes. Every random choice is keyed by the seed and the position in the run, so a resumed run repeats no and
leaves out no step: on a CPU in float32 it has the losses and weights of one that was never stopped, to the last bit.
"""

from __future__ import annotations

import abc
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from m2d_embed.config import ModelConfig
from m2d_embed.errors import AudioError, ConfigError, M2DEmbedError, TrainingError
from m2d_embed.files import write_text
from m2d_embed.model.encoder import Encoder
from m2d_embed.training import run_state
from m2d_embed.training.average import Average, scaled_decay
from m2d_embed.training.bad_files import BadFiles, MicroBatch
from m2d_embed.training.monitor import RunLog
from m2d_embed.training.processes import Setup, agreed, set_up, shared_means, stop_agreed
from m2d_embed.training.run_state import RunState
from m2d_embed.training.sampling import Purpose, rng_at
from m2d_embed.training.schedule import learning_rate
from m2d_embed.training.settings import RunRecipe
from m2d_embed.training.stop import Stop

RECIPE_FILE = "recipe.yaml"
_AVERAGED = ("loss", "grad_norm", "seconds", "waited")  # beginnings of what a line of the log has the means of

Losses = dict[str, Tensor]


class MicroBatches(Protocol):
    """The micro-batches of one process, from some step to the end of the run."""

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


class Validation(NamedTuple):
    """The score that weights are compared by, a share of 1, its name, and what is logged."""

    name: str
    score: float
    values: dict[str, float]


class Task(abc.ABC):
    """What a run trains: network, data, losses, validation. Every process builds it before the first step.

    Attributes:
        config: of the model; kept in checkpoints.
        network: what is trained; it has an ``encoder``.
        model: the network as ``step`` calls it, compiled and wrapped for several devices by the trainer.
        optimizers: of the network. Groups may have ``lr_scale``, their share of the learning rate.
        peak_lr: the highest learning rate.
        total: optimiser steps of the run.
        steps_per_epoch: None if that is not known.
        num_files: that are trained on; None if that is not known.
        data: the training data, in words.
        extra: of the package, which this kind of training needs.
    """

    config: ModelConfig
    network: nn.Module
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    peak_lr: float
    total: int
    steps_per_epoch: int | None
    num_files: int | None
    data: str
    extra: str

    @abc.abstractmethod
    def __init__(self, recipe: Any, setup: Setup, previous: RunState | None):
        """Build it; ``previous`` is the checkpoint to go on from, whose weights the trainer loads."""

    @abc.abstractmethod
    def batches(self, first_step: int) -> MicroBatches:
        """This process's micro-batches from a step on, ``Setup.accumulation`` of them a step."""

    @abc.abstractmethod
    def step(self, batch: Any) -> Losses:
        """The losses of a micro-batch.

        Returns:
            ``"loss"``, a scalar whose mean over the micro-batches of a step, of all processes, is minimised; its parts
            ``"loss/..."``, which are logged; if known, ``"per_clip"`` (B, ...), the losses of single clips, by which
            one that is not finite is traced to its file; and whatever else ``watch`` needs.
        """

    def after_step(self, step: int) -> dict[str, float]:
        """Called after the update of step number ``step``, from 0; returns what to log."""
        return {}

    def watch(self, outputs: Losses) -> dict[str, float]:
        """What to log of the last output of ``step``, in the main process, once a line of the log."""
        return {}

    def validates_after(self, step: int) -> bool:
        """Whether there is a validation after so many steps; 0 is before the first."""
        return False

    def validate(self, weights: dict[str, Tensor]) -> Validation:
        """Score a state dict of the network, on the CPU. Only the main process does it."""
        raise NotImplementedError  # by a task that never validates, of which nobody asks it

    @abc.abstractmethod
    def describe(self) -> str:
        """What is trained on what, for people: some lines."""

    def kept(self) -> dict[str, Any]:
        """What checkpoints keep besides, as ``RunState.extra``: tensors and plain values."""
        return {}


class Trainer:
    """A run in one process: what it trains, and how far it is.

    Args:
        recipe: of the run. Its folder may hold a checkpoint, from which the run goes on.
        task_type: what is trained.
        stop: notes signals.

    Raises:
        ConfigError: if recipe, devices and data make no sense together, or the folder holds a run of another recipe.
    """

    def __init__(self, recipe: RunRecipe, task_type: type[Task], stop: Stop):
        self.recipe, self.training, self.stop = recipe, recipe.training, stop
        self.setup = set_up(recipe)
        self.accelerator = self.setup.accelerator
        self.main = self.accelerator.is_main_process
        previous = run_state.previous(recipe)
        self.task = task_type(recipe, self.setup, previous)
        if self.main:
            recipe.folder.mkdir(parents=True, exist_ok=True)
            write_text(recipe.folder / RECIPE_FILE, recipe.to_yaml())
        self._prepare()
        self.step = self.saved = self.stale = 0  # `stale`: validations since the best
        self.seconds = 0.0
        self.best: dict[str, Any] = {}  # of validation: step, score and name of the score
        self.pending: dict[str, float] = {}  # sums of what the next line of the log has the means of
        self.bad = BadFiles(self.task.num_files)
        if previous is not None:
            self._restore(previous)

    def _prepare(self) -> None:
        """Hand network and optimisers to accelerate, and begin the average of the weights."""
        task, training = self.task, self.training
        encoder = cast(Encoder, task.network.get_submodule("encoder"))
        encoder.set_drop_path(training.drop_path)
        encoder.set_grad_checkpointing(training.grad_checkpointing)
        network = cast(nn.Module, torch.compile(task.network)) if training.compile else task.network
        task.model, *self.optimizers = self.accelerator.prepare(network, *task.optimizers)
        self.average: Average | None = None
        decay = scaled_decay(training.average_decay, task.total)
        if decay > 0 and self.accelerator.distributed_type == DistributedType.FSDP:
            raise ConfigError("training.average_decay does not go with sharded weights (FSDP); set it to 0.")
        if decay > 0:
            self.average = Average(task.network, decay)

    # --- training -------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        patience = self.training.patience
        return self.step >= self.task.total or (patience is not None and self.stale >= patience)

    def train(self) -> bool:
        """Take the steps that are left; False if a signal stopped it before the last."""
        if self.done:
            return True
        self.stop.wait_for_step = True
        task, save_every = self.task, self.training.save_every or self.task.steps_per_epoch or self.task.total
        log = RunLog(self.recipe.folder, self.step + 1 if self.step else 0, task.extra) if self.main else None
        if self.main:
            self._announce()
        batches = task.batches(self.step)
        bar = tqdm(total=task.total, initial=self.step, unit="step", disable=None if self.main else True)
        try:
            with bar:
                if self.step == 0 and task.validates_after(0):
                    self._validate(log)
                while not self.done and not stop_agreed(self.accelerator, self.stop):
                    values = self.take_step(batches)
                    bar.update()
                    bar.set_postfix_str(f"loss {values['loss']:.4f}")
                    self._log(log, values)
                    validates = task.validates_after(self.step)
                    if validates:
                        self._validate(log)
                    if validates or self.step % save_every == 0:
                        self.save()
        except M2DEmbedError:
            if self.accelerator.num_processes == 1:  # the others would not come to save
                self.save()
            raise
        finally:
            batches.close()
            if log is not None:
                log.close()
        self.save()
        return self.done

    def take_step(self, batches: MicroBatches) -> dict[str, float]:
        """One optimiser step: forward and backward of every micro-batch, then the update. Returns what to log."""
        training, task, accumulation = self.training, self.task, self.setup.accumulation
        lr = learning_rate(self.step, task.total, training.warmup, task.peak_lr)
        for group in [group for optimizer in self.optimizers for group in optimizer.param_groups]:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        began, waited = time.perf_counter(), 0.0
        losses: Losses = {}
        outputs: Losses = {}
        taken: list[tuple[list[str], Tensor]] = []  # names of clips, and the losses they are judged by
        task.model.train()
        for number in range(accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self._count_bad(batch)
            last = number == accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(task.model), self._seeded(number):
                outputs = task.step(batch)
                self.accelerator.backward(outputs["loss"] / accumulation)
            taken.append((batch.names, outputs.get("per_clip", outputs["loss"]).detach()))
            for key in [key for key in outputs if key.startswith("loss")]:
                losses[key] = losses.get(key, 0) + outputs[key].detach().float() / accumulation
        norm = self.accelerator.clip_grad_norm_(task.network.parameters(), training.clip_norm)
        values = shared_means(self.accelerator, {**losses, "grad_norm": torch.as_tensor(norm)})
        self._check_finite(values, taken)
        for optimizer in self.optimizers:
            optimizer.step()
        self._zero_grad()
        values |= task.after_step(self.step)
        if self.average is not None:
            self.average.update(task.network, self.step)
        self.step += 1
        if self.main and self._logs_now():
            values |= task.watch(outputs)
        return {**values, "lr": lr, "seconds": time.perf_counter() - began, "waited": waited}

    @contextmanager
    def _seeded(self, number: int) -> Iterator[None]:
        """Key the random numbers of PyTorch, which drop path takes, by the seed and the position of a micro-batch."""
        position = self.step * self.training.batch_size + self.setup.first_row(number)
        seed = int(rng_at(self.training.seed, position, Purpose.DROP).integers(2**63))
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _check_finite(self, values: dict[str, float], taken: list[tuple[list[str], Tensor]]) -> None:
        """Stop before the update if the loss or the gradient is not finite; the state before this step is saved."""
        scaler = self.accelerator.scaler
        # The scaler of float16 meets infinite gradients on its way, and skips those steps; not when it is below 1.
        searching = scaler is not None and scaler.get_scale() >= 1
        wrong = [k for k, v in values.items() if not math.isfinite(v) and not (searching and k == "grad_norm")]
        if not wrong:
            return
        self._zero_grad()
        self.save()
        guilty = [name for names, losses in taken for name in _not_finite(names, losses)]
        if not guilty and wrong[0] != "grad_norm":
            where = "It arose in another process, which names its files."
        else:
            names = guilty or [name for names, _ in taken for name in names]
            where = f"The batch's files: {', '.join(dict.fromkeys(names))}. A smaller training.lr may help."
        saved = "The run is saved as it was before that step. " if self.step else ""
        raise TrainingError(f"step {self.step}: {wrong[0]} is {values[wrong[0]]}. {saved}{where}")

    # --- files that cannot be read --------------------------------------------------------------------------------

    def _count_bad(self, batch: MicroBatch) -> None:
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
            self.bad.check(self.step * self.training.batch_size)
        except AudioError:
            self.save()
            raise

    # --- log and validation ---------------------------------------------------------------------------------------

    def _announce(self) -> None:
        print(
            f"{self.task.describe()}\n{self.task.total} steps of {self.training.batch_size} crops on "
            f"{self.accelerator.num_processes} x {self.accelerator.device.type}, {self.training.precision} -> "
            f"{self.recipe.folder}",
            file=sys.stderr,
        )

    def _logs_now(self) -> bool:
        return self.step % self.training.log_every == 0 or self.step == self.task.total

    def _log(self, log: RunLog | None, values: dict[str, float]) -> None:
        """Add up what is averaged, and write a line every ``log_every`` steps."""
        self.seconds += values["seconds"]
        for key in [key for key in values if key.startswith(_AVERAGED)]:
            self.pending[key] = self.pending.get(key, 0.0) + values[key]
        self.pending["steps"] = self.pending.get("steps", 0.0) + 1
        if not self._logs_now():
            return
        self._share_bad()
        steps = self.pending.pop("steps")
        line = values | {key: total / steps for key, total in self.pending.items()}
        self.pending = {}
        seconds, waited = line.pop("seconds"), line.pop("waited")
        line |= {"clips_per_second": self.training.batch_size / seconds, "data_share": waited / seconds}
        if log is not None:
            log.write(self.step, line)
            if not sys.stderr.isatty():  # no progress bar there
                print(f"step {self.step} of {self.task.total}: loss {line['loss']:.4f}", file=sys.stderr)

    def _validate(self, log: RunLog | None) -> None:
        """Score the weights as they would be exported, and keep them if they are the best so far."""
        weights = self._weights()
        found = agreed(self.accelerator, lambda: self.task.validate(weights))
        if log is not None:
            log.write(self.step, found.values)
            shown = ", ".join(f"{key} {value:.2%}" for key, value in found.values.items())
            tqdm.write(f"step {self.step} of {self.task.total}: {shown}", file=sys.stderr)
        if self.best and not found.score > self.best["score"]:
            self.stale += 1
            return
        self.best, self.stale = {"step": self.step, "score": found.score, "name": found.name}, 0
        if self.main and self.training.export == "best":
            run_state.write_best(self.recipe.folder, self.step, weights)

    def _weights(self) -> dict[str, Tensor]:
        """The weights to validate and export, averaged if they are, on the CPU; every process has to call it."""
        if self.average is not None:
            return self.average.on_cpu()
        return run_state.capture_model(self.task.model)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, unless there is one of this step; every process has to call it."""
        if self.saved == self.step:
            return
        state = self.state()
        if self.main:
            state.write(self.recipe.folder, self.training.keep)
        self.saved = self.step
        self.accelerator.wait_for_everyone()

    def state(self) -> RunState:
        """The run as it is now; every process has to call it."""
        model, optimizer = run_state.capture(self.task.model, [wrapped.optimizer for wrapped in self.optimizers])
        scaler = self.accelerator.scaler
        return RunState(
            step=self.step,
            model=model,
            optimizer=optimizer,
            recipe=self.recipe.to_dict(),
            config=self.task.config,
            kind=self.recipe.kind,
            bad_files=self.bad.reasons,
            pending=self.pending,
            data=self.task.data,
            processes=self.accelerator.num_processes,
            scaler=dict(scaler.state_dict()) if scaler is not None else {},
            average=self.average.on_cpu() if self.average is not None else {},
            best=self.best,
            stale=self.stale,
            seconds=self.seconds,
            extra=self.task.kept(),
        )

    def _restore(self, previous: RunState) -> None:
        run_state.restore(previous, self.task.model, [wrapped.optimizer for wrapped in self.optimizers])
        self.step = self.saved = previous.step
        self.pending, self.seconds = previous.pending, previous.seconds
        self.best, self.stale = previous.best, previous.stale
        if self.average is not None:
            self.average.load(previous.average)
        if self.accelerator.scaler is not None and previous.scaler:
            self.accelerator.scaler.load_state_dict(previous.scaler)


def export_weights(state: RunState, recipe: RunRecipe) -> dict[str, Tensor]:
    """The weights of a run that are exported: of the best validation, else averaged, else as they are.

    Raises:
        CheckpointError: if the best ones are missing.
    """
    if state.best and recipe.training.export == "best":
        return run_state.read_best(recipe.folder, state.best["step"])
    return state.average or state.model


def _not_finite(names: list[str], losses: Tensor) -> list[str]:
    """The clips whose losses, (B, ...), are not finite; of a scalar all or none."""
    if losses.ndim == 0:
        return [] if bool(torch.isfinite(losses)) else names
    finite = torch.isfinite(losses.reshape(len(losses), -1)).all(dim=1).tolist()
    return [name for name, good in zip(names, finite, strict=True) if not good]
