"""What two runs must have in common for their embeddings to be the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from typing import Any, Literal

import torch

from m2d_embed.config import FeatureConfig, ModelConfig, resolve_layers
from m2d_embed.m2d import M2D

Kind = Literal["scene", "timestamps"]

#: Raised whenever the same model and sound give other numbers than before, beyond the rounding of sums.
NUMERICS = 2

_NOT_COMPUTED = ("name", "source", "license", "head", "clap", *(field.name for field in fields(FeatureConfig)))


def fingerprint(model: M2D, kind: Kind) -> str:
    """A hash of all that an embedding depends on besides the sound: weights, configuration, features, numerics.

    Two models of equal weights that normalise the log-mel in another way are two models; their names do not count.
    """
    parts = {
        "numerics": NUMERICS,
        "kind": kind,
        "config": _computation(model.config),
        "dtype": str(model.dtype),
        "features": _features(model, kind),
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in sorted(model.encoder.state_dict().items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def job_settings(model: M2D, kind: Kind) -> dict[str, Any]:
    """What a job records: the fingerprint, and in words what a person would want to know."""
    return {
        "model": model.config.name,
        "fingerprint": fingerprint(model, kind),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kind": kind,
        **_features(model, kind),
        "dim": model.scene_embedding_size if kind == "scene" else model.timestamp_embedding_size,
    }


def _computation(config: ModelConfig) -> dict[str, Any]:
    """The front end and the encoder; names and heads do not change an embedding, features are looked at as chosen."""
    return {key: value for key, value in asdict(config).items() if key not in _NOT_COMPUTED}


def _features(model: M2D, kind: Kind) -> dict[str, Any]:
    features = model.features.resolved(model.config)
    shared = {
        "layers": resolve_layers(features.blocks(model.config), model.config.depth),
        "layer_pooling": features.layer_pooling,
        "flat": features.flat,
    }
    if kind == "scene":
        return {**shared, "scene_pooling": features.pooling(model.config)}
    return {**shared, "hop_ms": features.hop_frames(model.config) * model.config.frame_ms}
