"""What every probe needs of embeddings: checks, standardising, and the form of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from m2d_embed.errors import ConfigError
from m2d_embed.labelled.clips import Integers, LabelledClips, named

Vectors = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FoldPrediction:
    """What a probe says of the test clips of one fold.

    Attributes:
        fold: which.
        test: (m,) indices of its test clips.
        scores: (m, L) from 0 to 1, how sure the probe is of each label.
        settings: what was chosen for it on the training clips.
    """

    fold: int
    test: Integers
    scores: Scores
    settings: dict[str, Any]


def check_embeddings(embeddings: Vectors, clips: LabelledClips) -> None:
    """Raise ConfigError if ``embeddings`` are not (n, D), one finite row a clip."""
    if embeddings.ndim != 2 or len(embeddings) != len(clips):
        raise ConfigError(f"embeddings of {len(clips)} clips have shape ({len(clips)}, D), not {embeddings.shape}.")
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise ConfigError(
            f"{len(bad)} of {len(clips)} embeddings are not finite: {named([str(clips.files[i]) for i in bad])}."
        )


def standardise(train: Vectors, test: Vectors) -> tuple[Vectors, Vectors]:
    """Zero mean and unit variance over the training rows; a feature that is constant there becomes 0."""
    mean = train.mean(axis=0, dtype=np.float64)
    std = train.std(axis=0, dtype=np.float64)
    constant = std <= 1e-6 * np.abs(mean)
    scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))
    return ((train - mean) * scale).astype(np.float32), ((test - mean) * scale).astype(np.float32)
