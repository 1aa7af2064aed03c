"""Pooling: patches of a time column to a frame feature, frame features to a scene embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m2d_embed.config import FeatureConfig, ScenePooling

_LEAST_VARIANCE = 1e-12  # so that the standard deviation of equal columns has a gradient


class Timestamps(NamedTuple):
    """Embeddings over time, (T, D) float32, and the centre of each in milliseconds, (T,).

    Of clips they are float64, in which also those of a recording of days are exact; of tensors float32, as HEAR asks.
    """

    embeddings: Tensor
    timestamps: Tensor


def stack_rows(patches: Tensor) -> Tensor:
    """(B, F, T, d) -> (B, T, F * d)."""
    return patches.transpose(1, 2).flatten(2)


def frame_features(per_layer: Sequence[Tensor], features: FeatureConfig) -> Tensor:
    """Patches of each layer, (B, F, T, d), -> frame features (B, T, D)."""
    if features.layer_pooling == "mean" and len(per_layer) > 1:
        per_layer = [sum(per_layer[1:], per_layer[0]) / len(per_layer)]
    frames = [patches.mean(dim=1) if features.flat else stack_rows(patches) for patches in per_layer]
    return frames[0] if len(frames) == 1 else torch.cat(frames, dim=-1)


def pool_scene(frames: Tensor, pooling: ScenePooling, mask: Tensor | None = None) -> Tensor:
    """Frame features to scene embeddings.

    Args:
        frames: (B, T, D) of whole clips.
        pooling: ``"mean"`` over time, or ``"mean_std"``: the standard deviation (of the population) stands after it.
        mask: (B, T) bool, True for the columns that count; by default all. A clip without any gets zeros.

    Returns:
        (B, D), or (B, 2 * D) with ``"mean_std"``.
    """
    if mask is not None:
        weights = mask.to(frames.dtype) / mask.sum(dim=1, keepdim=True).clamp_min(1)  # (B, T)

    def average(x: Tensor) -> Tensor:
        return x.mean(dim=1) if mask is None else torch.einsum("bt,btd->bd", weights, x)

    mean = average(frames)
    if pooling == "mean":
        return mean
    return torch.cat([mean, standard_deviation(average((frames - mean.unsqueeze(1)).square()))], dim=-1)


def standard_deviation(variance: Tensor) -> Tensor:
    """The square root of a variance, with a gradient at 0."""
    return (variance + _LEAST_VARIANCE).sqrt()
