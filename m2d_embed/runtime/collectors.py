"""Collectors: they reduce the encoder's output window by window, and make the result of a clip from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from m2d_embed.config import ModelConfig, ScenePooling
from m2d_embed.model.pooling import Timestamps, standard_deviation
from m2d_embed.model.windows import column_times

R = TypeVar("R")
Result = TypeVar("Result", covariant=True)

#: Columns allocated at first by the length that a header states, at most: a wrong one must not take all memory.
_MOST_ROWS_AT_FIRST = 1 << 15


class Place(NamedTuple):
    """Where a window is in its clip: in which shifted copy, its number there, and how many of its columns count."""

    shift: int
    order: int
    columns: int


class Collector(Protocol[Result]):
    """Collects the encoder's outputs for one clip, window by window."""

    def add(self, place: Place, values: Tensor) -> None: ...

    def result(self, duration_ms: float) -> Result: ...


@dataclass(frozen=True)
class Reduction(Generic[R]):
    """How frame features are reduced: ``reduce`` runs on the device, on a batch (N, T, D) with its columns."""

    reduce: Callable[[Tensor, Sequence[int]], Tensor]
    new_collector: Callable[[float], Collector[R]]  # of a clip's expected length in seconds


def _sum_columns(frames: Tensor, columns: Sequence[int]) -> Tensor:
    """(N, T, D) -> (N, D), the sum of the first ``columns`` of each window."""
    return _reduce_columns(frames, columns, lambda part, precise: part.sum(1, dtype=precise))


def _sum_columns_and_squares(frames: Tensor, columns: Sequence[int]) -> Tensor:
    """(N, T, D) -> (N, 2 * D), the sum of the first ``columns`` of each window, and that of their squares."""

    def sums(part: Tensor, precise: torch.dtype) -> Tensor:
        part = part.to(precise)
        return torch.cat([part.sum(1), part.square().sum(1)], dim=-1)

    return _reduce_columns(frames, columns, sums)


def _reduce_columns(frames: Tensor, columns: Sequence[int], reduce: Callable[[Tensor, torch.dtype], Tensor]) -> Tensor:
    precise = torch.float32 if frames.device.type == "mps" else torch.float64
    reduced, start = [], 0
    for kept, run in groupby(columns):  # rather than a mask, which would have to be sent to the device
        stop = start + len(list(run))
        reduced.append(reduce(frames[start:stop, :kept], precise))
        start = stop
    return torch.cat(reduced)


class _Scene:
    """Running sums over all columns: a long clip takes no more memory than a short one."""

    def __init__(self, of_means: Callable[[Tensor], Tensor]) -> None:
        self.of_means = of_means
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, place: Place, values: Tensor) -> None:
        self.total = self.total + values.double()
        self.count += place.columns

    def result(self, duration_ms: float) -> Tensor:
        return self.of_means(torch.as_tensor(self.total / self.count)).float()


def _mean_and_std(means: Tensor) -> Tensor:
    """Means of values and of their squares, (2 * D,), in float64 -> mean and standard deviation, (2 * D,)."""
    mean, square = means.chunk(2)
    return torch.cat([mean, standard_deviation((square - mean.square()).clamp_min(0))])


class _Columns:
    """Every column, in one tensor from the start: an hour of them is long, and not to be held twice."""

    def __init__(self, config: ModelConfig, hop_frames: int, seconds: float):
        self.config = config
        self.hop_frames = hop_frames
        self.lengths = [0] * (config.patch_size[1] // hop_frames)  # columns of each shifted copy
        expected = 1000 * seconds / (hop_frames * config.frame_ms) + 1
        self.capacity = int(min(expected, _MOST_ROWS_AT_FIRST))
        self.woven = torch.empty(0, 0)

    def add(self, place: Place, values: Tensor) -> None:
        columns, copies, copy = values[: place.columns], len(self.lengths), place.shift // self.hop_frames
        first = copy + copies * place.order * self.config.grid_size[1]  # all windows before this one are full
        stop = first + copies * (len(columns) - 1) + 1
        if stop > len(self.woven):
            self._grow(stop, columns)
        self.woven[first:stop:copies] = columns
        self.lengths[copy] += len(columns)

    def result(self, duration_ms: float) -> Timestamps:
        copies = len(self.lengths)
        count = min(copies * length + copy for copy, length in enumerate(self.lengths))  # as far as there is no gap
        times = column_times(count, self.hop_frames, self.config, duration_ms)
        return Timestamps(self.woven[: len(times)], times)

    def _grow(self, rows: int, like: Tensor) -> None:
        length = max(rows, self.capacity, 2 * len(self.woven))
        longer = torch.empty(length, like.shape[1], dtype=like.dtype, device="cpu")
        if len(self.woven):
            longer[: len(self.woven)] = self.woven
        self.woven = longer


def scene_reduction(pooling: ScenePooling) -> Reduction[Tensor]:
    """Scene embeddings."""
    if pooling == "mean":
        return Reduction(_sum_columns, lambda seconds: _Scene(lambda mean: mean))
    return Reduction(_sum_columns_and_squares, lambda seconds: _Scene(_mean_and_std))


def timestamp_reduction(config: ModelConfig, hop_frames: int) -> Reduction[Timestamps]:
    """Timestamp embeddings every ``hop_frames`` frames."""
    return Reduction(lambda frames, columns: frames, lambda seconds: _Columns(config, hop_frames, seconds))
