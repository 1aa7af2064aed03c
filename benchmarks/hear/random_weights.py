"""A HEAR module of the bundled model's architecture, front end and normalisation, with random weights.

What training is worth is what the bundled model scores above this one.
"""

from __future__ import annotations

import torch

import m2d_embed
from m2d_embed.errors import ConfigError
from m2d_embed.hear import get_scene_embeddings, get_timestamp_embeddings
from m2d_embed.m2d import M2D

__all__ = ["get_scene_embeddings", "get_timestamp_embeddings", "load_model"]


def load_model(model_file_path: str = "", *, seed: int = 0, hop_ms: float | None = None) -> M2D:
    """Draw the weights.

    Args:
        model_file_path: must be "".
        seed: of the weights.
        hop_ms: as in ``m2d_embed.load_model``.

    Raises:
        ConfigError: if a file is given, or ``hop_ms`` is impossible.
    """
    if model_file_path:
        raise ConfigError(f"{model_file_path}: random weights are drawn, not loaded.")
    bundled = m2d_embed.load_model(device="cpu", hop_ms=hop_ms)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return M2D(bundled.config, bundled.features).eval()
