"""One run on one device or many: what the processes that torchrun or accelerate started agree on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor

from m2d_embed.errors import ConfigError, M2DEmbedError
from m2d_embed.training.settings import RunRecipe
from m2d_embed.training.stop import Stop

_LONGEST_WAIT = timedelta(hours=12)  # of the other processes while the main one measures, builds a cache or tests
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """How the processes of a run share a step: ``accumulation`` times ``micro_batch`` clips in each of them."""

    accelerator: Accelerator
    micro_batch: int
    accumulation: int

    def first_row(self, number: int) -> int:
        """Where in the batch of a step micro-batch ``number`` of this process begins."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        return int((number * processes + rank) * self.micro_batch)


def set_up(recipe: RunRecipe) -> Setup:
    """Start accelerate, and see how a recipe fits devices and processes.

    Raises:
        ConfigError: if it does not, or the run's folder is a file.
    """
    training, accelerator = recipe.training, start_accelerator(recipe.training.precision)
    check_processes(accelerator, recipe.folder)
    on_cpu, compilers = accelerator.device.type == "cpu", (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")
    if on_cpu and training.precision == "fp16":
        raise ConfigError("training.precision fp16 needs a GPU; on a CPU take bf16 or fp32.")
    if on_cpu and training.compile and not any(shutil.which(name) for name in compilers):
        raise ConfigError("training.compile needs a C++ compiler, e.g. g++; install one or set it to false.")
    processes = accelerator.num_processes
    micro_batch = training.micro_batch or max(1, training.batch_size // processes)
    if training.batch_size % (micro_batch * processes):
        raise ConfigError(
            f"training.batch_size {training.batch_size} is not a multiple of training.micro_batch {micro_batch} x "
            f"{processes} process{'es' if processes > 1 else ''}."
        )
    return Setup(accelerator, micro_batch, training.batch_size // (micro_batch * processes))


def start_accelerator(precision: str) -> Accelerator:
    """Accelerate in this process; ``precision`` is fp32, bf16 or fp16."""
    AcceleratorState._reset_state()  # else a second run in one process keeps the precision of the first
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else it takes several processes on CPUs for as many single ones
        mixed_precision=_PRECISION[precision],
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_LONGEST_WAIT),
        ],
    )


def is_main_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate started, or the only one."""
    return bool(PartialState().is_main_process)


def check_processes(accelerator: Accelerator, folder: Path) -> None:
    """Raise ConfigError if accelerate sees other processes than were launched, or a run's folder is a file."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file; name a folder, new or of an earlier run.")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}; "
            "check its environment variables (ACCELERATE_...) and the devices."
        )


def agreed(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What the main process makes, or its error, in every process."""
    made: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            made = [work()]
        except M2DEmbedError as error:
            made = [error]
    (result,) = broadcast_object_list(made)
    if isinstance(result, M2DEmbedError):
        raise result
    made_by_main: T = result
    return made_by_main


def stop_agreed(accelerator: Accelerator, stop: Stop) -> bool:
    """Whether any process was told to stop; all have to leave at the same step."""
    if accelerator.num_processes == 1:
        return stop.wanted
    flag = torch.tensor(float(stop.wanted), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)


def shared_means(accelerator: Accelerator, values: dict[str, Tensor]) -> dict[str, float]:
    """Means over all processes, in one exchange."""
    stacked = torch.stack([value.float().to(accelerator.device) for value in values.values()])
    shared: Tensor = accelerator.reduce(stacked, reduction="mean")
    return dict(zip(values, shared.tolist(), strict=True))
