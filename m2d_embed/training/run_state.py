"""What a run needs to go on where it stopped: one file a checkpoint, written whole or not at all, the last few kept.

All randomness is keyed by the seed and the position in the stream of crops, so the step number stands for every random
state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from m2d_embed.config import ModelConfig
from m2d_embed.errors import CheckpointError, ConfigError
from m2d_embed.files import atomic_write
from m2d_embed.training.settings import RunRecipe

FORMAT_VERSION = 1
_FOLDER = "checkpoints"
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class RunState:
    """A run after ``step`` steps.

    ``model`` and ``optimizer`` are state dicts with full names, the same whatever the number of processes; ``recipe``
    is the run's as plain values, ``config`` the encoder's; ``bad_files`` and ``pending`` are what the loop has counted.
    ``kind`` is the recipe's; ``data`` describes the training data in words; ``processes`` took part; ``scaler`` is that
    of float16's losses. ``average`` are averaged weights, empty if there are none; ``best`` is of validation: step,
    score and its name; ``stale`` counts validations since; ``seconds`` were spent on steps. ``extra`` is what a task
    keeps besides: tensors and plain values.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    recipe: dict[str, Any]
    config: ModelConfig
    kind: str = ""
    bad_files: dict[str, Any] = field(default_factory=dict)
    pending: dict[str, float] = field(default_factory=dict)
    data: str = ""
    processes: int = 1
    scaler: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    stale: int = 0
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, keep: int) -> Path:
        """Write ``<folder>/checkpoints/step-<step>.ckpt`` and delete all but the last ``keep``.

        Raises:
            CheckpointError: if it cannot be written; those there are stay.
        """
        file = folder / _FOLDER / f"step-{self.step:09d}.ckpt"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "config"},
            "config": self.config.to_json(),
        }
        for stale in file.parent.glob(".*.partial"):  # of a run that was killed
            stale.unlink()
        try:
            with atomic_write(file) as partial:
                torch.save(content, partial)
        except (OSError, RuntimeError) as error:  # torch.save has errors of its own for a full disk
            raise CheckpointError(
                f"{file}: cannot be written ({error}). Earlier checkpoints are kept: make room, and give the same "
                "command again to go on from the last."
            ) from error
        for old in (*_files(folder)[:-keep], *_files(folder, "best-*.safetensors")[:-keep]):
            old.unlink()
        return file

    @classmethod
    def read(cls, file: Path) -> RunState:
        """Read a checkpoint of ours; it holds tensors and plain values, nothing else is unpickled.

        Raises:
            CheckpointError: if it is missing, damaged, or of another format.
        """
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{file}: no such checkpoint.") from error
        except Exception as error:  # what a damaged file raises can be anything
            raise CheckpointError(
                f"{file}: damaged, or not a checkpoint of m2d-embed; delete it to go on from the one before."
            ) from error
        version = content.pop("format_version", None) if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{file}: format_version {version!r}, but this release reads {FORMAT_VERSION}.")
        return cls(**{**content, "config": ModelConfig.parse_json(content["config"], str(file))})


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(_files(folder)), None)


def previous(recipe: RunRecipe) -> RunState | None:
    """The newest checkpoint of the run of a recipe, or None.

    Raises:
        ConfigError: if the run in its folder is of another recipe.
        CheckpointError: if the checkpoint is damaged, or of another format.
    """
    file = latest(recipe.folder)
    if file is None:
        return None
    state = RunState.read(file)
    if state.kind != recipe.kind:
        raise ConfigError(f"{recipe.folder} holds a run of {state.kind or 'an earlier release'}; give another output=.")
    if differing := recipe.differences(state.recipe):
        raise ConfigError(
            f"{recipe.folder} holds a run of another recipe ({'; '.join(differing[:4])}). Give another folder "
            "(output= or --output), or the settings it was begun with."
        )
    return state


def capture(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Full state dicts of a model and its optimisers, on the CPU; every process has to call it."""
    model_state, optimizer_state = get_state_dict(model, optimizers, options=_FULL)
    return cast(dict[str, Tensor], model_state), cast(dict[str, Any], optimizer_state)


def capture_model(model: nn.Module) -> dict[str, Tensor]:
    """The full state dict of a model alone, on the CPU; every process has to call it."""
    return cast(dict[str, Tensor], get_model_state_dict(model, options=_FULL))


def restore(state: RunState, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put captured state dicts back; every process has to call it."""
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=cast(dict[str, Any], state.model),
        optim_state_dict=state.optimizer,
        options=options,
    )


def write_best(folder: Path, step: int, weights: dict[str, Tensor]) -> None:
    """Keep the weights after ``step`` steps, which have the best validation so far, besides the checkpoints."""
    file = _best_file(folder, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)


def read_best(folder: Path, step: int) -> dict[str, Tensor]:
    """The weights that ``write_best`` kept.

    Raises:
        CheckpointError: if they are missing.
    """
    file = _best_file(folder, step)
    if not file.exists():
        raise CheckpointError(f"{file} is missing: it holds the best weights of the run. Train again.")
    return load_file(file)


def _best_file(folder: Path, step: int) -> Path:
    return folder / _FOLDER / f"best-{step:09d}.safetensors"


def _files(folder: Path, pattern: str = "step-*.ckpt") -> list[Path]:
    return sorted((folder / _FOLDER).glob(pattern))
