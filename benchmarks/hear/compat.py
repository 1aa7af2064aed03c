"""hear-eval-kit 2021.1.3 on today's libraries: everything that is adapted, and all of it from outside.

Its last release asks for numpy 1.19, pytorch-lightning 1.6 and tensorflow. No file of it is changed, and its own
classes train, choose and score. What they find under these names is adapted, and nothing else:

=====================================  ==============================================================================
what changed                           what is done
=====================================  ==============================================================================
tensorflow is imported, but used only  where it is not installed, an empty stand-in is there while hear-eval-kit is
to recognise tensorflow's models       imported
``Trainer(gpus=...)`` was removed      a subclass translates it to ``accelerator`` and ``devices``
setting ``fit_loop.current_epoch``     the subclass passes the value on before a test: it decides which epoch's
has no effect any more                 postprocessing is taken
``validation_epoch_end`` and           the outputs of a part's steps are collected, and the same methods are called
``test_epoch_end`` were removed        with them at its end
``torch.load`` refuses classes         those that its grids put into a checkpoint, and no others, are allowed
``nvmlDeviceGetName(...).decode``      the name of the GPU is asked of torch
=====================================  ==============================================================================

``keep_predictions`` adds one thing: the test predictions as plain arrays, beside its own pickles.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from m2d_embed.errors import UnsupportedError

PREDICTIONS_SUFFIX = ".predictions.npz"
EVENTS_SUFFIX = ".events.json"


class HearEval(NamedTuple):
    """hear-eval-kit, ready to run: the modules of its two steps, and of its scores."""

    embeddings: Any
    predictions: Any
    score: Any


@cache
def load_heareval() -> HearEval:
    """Import hear-eval-kit and adapt it, once a process.

    Raises:
        UnsupportedError: if it is not installed.
    """
    if importlib.util.find_spec("heareval") is None:
        raise UnsupportedError(
            "hear-eval-kit is not installed: pip install -r benchmarks/hear/requirements.txt, "
            "then pip install --no-deps heareval==2021.1.3"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # dcase_util's; the version is pinned
        tasks = importlib.import_module("heareval.predictions.task_predictions")
    _adapt_training(tasks)
    keep_predictions(tasks)
    with _tensorflow():
        embeddings = importlib.import_module("heareval.embeddings.runner")
    predictions = importlib.import_module("heareval.predictions.runner")
    # nvidia-ml-py gives a str today, of which hear-eval-kit asks .decode().
    gpu_max_mem: Any = importlib.import_module("heareval.gpu_max_mem")
    gpu_max_mem.device_name = _device_name
    return HearEval(embeddings, predictions, importlib.import_module("heareval.score"))


@contextmanager
def checkpoints_readable() -> Iterator[None]:
    """Within this, ``torch.load`` reads the checkpoints that hear-eval-kit writes, still without running what they say.

    They hold the settings of a grid point, and among these the classes and functions it names.
    """
    tasks = importlib.import_module("heareval.predictions.task_predictions")
    grids = (tasks.PARAM_GRID, tasks.FAST_PARAM_GRID, tasks.FASTER_PARAM_GRID)
    named = {value for grid in grids for values in grid.values() for value in values if callable(value)}
    with torch.serialization.safe_globals(list(named)):
        yield


def keep_predictions(tasks: Any) -> None:
    """Have the predictions for each test part written as ``<part>.predictions.npz``, too, and events as JSON.

    hear-eval-kit pickles them; what is not a pickle can be read without trust.
    """
    test = tasks.task_predictions_test

    @wraps(test)
    def task_predictions_test(**arguments: Any) -> Any:
        result = test(**arguments)
        kept = arguments["grid_point"].predictor.test_predictions
        part = arguments["embedding_path"] / "|".join(arguments["data_splits"]["test"])
        arrays = {name: kept[name].numpy() for name in ("prediction", "target")}
        np.savez(Path(f"{part}{PREDICTIONS_SUFFIX}"), **arrays)
        if "predicted_events" in kept:
            events = {name: kept[name] for name in ("predicted_events", "target_events")}
            Path(f"{part}{EVENTS_SUFFIX}").write_text(json.dumps(events, default=float), encoding="utf-8")
        return result

    tasks.task_predictions_test = task_predictions_test


def _adapt_training(tasks: Any) -> None:
    import pytorch_lightning as lightning

    class Trainer(lightning.Trainer):
        """Today's trainer with the arguments, and the settable epoch, of pytorch-lightning 1.6."""

        _best_epoch: int | None = None

        def __init__(self, *args: Any, gpus: Any = None, **kwargs: Any):
            # No GPUs has to mean the CPU: the default of today, "auto", takes a GPU that is there.
            kwargs |= {"accelerator": "cpu", "devices": 1} if not gpus else {"accelerator": "gpu", "devices": gpus}
            super().__init__(*args, **kwargs)

        @property
        def current_epoch(self) -> int:
            epoch: int = super().current_epoch if self._best_epoch is None else self._best_epoch
            return epoch

        def test(self, *args: Any, **kwargs: Any) -> Any:
            # hear-eval-kit has set it to the best epoch, whose postprocessing is wanted; today nobody else reads it.
            self._best_epoch = vars(self.fit_loop).get("current_epoch")
            return super().test(*args, **kwargs)

    # Only hear-eval-kit's own name for Lightning is exchanged, and only the trainer is asked of it from here on.
    tasks.pl = types.SimpleNamespace(Trainer=Trainer)
    for part in ("validation", "test"):
        _collect_outputs(tasks.AbstractPredictionModel, part)


def _collect_outputs(model: Any, part: str) -> None:
    """Have ``<part>_epoch_end(outputs)`` called as pytorch-lightning 1.6 did; 2 refuses models that define it."""
    step, epoch_end = getattr(model, f"{part}_step"), getattr(model, f"{part}_epoch_end")
    delattr(model, f"{part}_epoch_end")
    collected = f"_{part}_outputs"

    @wraps(step)
    def collecting_step(self: Any, batch: Any, batch_idx: int) -> Any:
        output = step(self, batch, batch_idx)
        getattr(self, collected).append(output)
        return output

    def on_epoch_start(self: Any) -> None:
        setattr(self, collected, [])

    def on_epoch_end(self: Any) -> None:
        epoch_end(self, getattr(self, collected))
        setattr(self, collected, [])

    setattr(model, f"{part}_step", collecting_step)
    setattr(model, f"on_{part}_epoch_start", on_epoch_start)
    setattr(model, f"on_{part}_epoch_end", on_epoch_end)


@contextmanager
def _tensorflow() -> Iterator[None]:
    """Within this, ``import tensorflow`` works; where it is not installed, it gives what hear-eval-kit names of it."""
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    tensorflow: Any = types.ModuleType("tensorflow")
    tensorflow.Module = type("Module", (), {})  # no model is one
    tensorflow.test = types.SimpleNamespace(is_gpu_available=lambda **_: torch.cuda.is_available())
    sys.modules["tensorflow"] = tensorflow
    try:
        yield
    finally:  # others who ask whether tensorflow is there must not find this
        del sys.modules["tensorflow"]


def _device_name(device_index: int = 0) -> str:
    return torch.cuda.get_device_name(device_index) if torch.cuda.is_available() else "cpu"
