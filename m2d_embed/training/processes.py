"""One run on one device or many: what the processes that torchrun or accelerate started agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor

from m2d_embed.errors import ConfigError, M2DEmbedError
from m2d_embed.training.stop import Stop

_LONGEST_WAIT = timedelta(hours=12)  # of the other processes while the main one measures, builds a cache or tests
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
T = TypeVar("T")


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
