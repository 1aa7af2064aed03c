"""Probes: how well simple classifiers on fixed embeddings name clips that they were not fitted to.

* ``linear``: logistic regression (``linear_probe``).
* ``knn``: nearest neighbours; the only one that learns nothing.
* ``mlp``: the shallow network of the HEAR benchmark (``mlp_probe``).

Each test fold is judged by a classifier that saw only the other folds. The linear and the nearest-neighbour probe see
every feature standardised with the mean and standard deviation of the training clips.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from m2d_embed.errors import ConfigError
from m2d_embed.evaluate.features import FoldPrediction, Scores, Vectors, check_embeddings, standardise
from m2d_embed.evaluate.linear_probe import STRENGTHS, linear_predictions
from m2d_embed.extras import require_sklearn
from m2d_embed.labelled.clips import Bools, LabelledClips, named

if TYPE_CHECKING:
    from m2d_embed.m2d import M2D

PROBES = ("linear", "knn", "mlp")
NEIGHBOURS = 10

_ROWS_AT_A_TIME = 1024  # test rows compared with all training rows together
_LEAST_VOTE = 1e-6  # of a neighbour that is not similar at all: without any, such neighbours could not outvote label 0


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a probe says of every clip.

    Attributes:
        probe: one of ``PROBES``.
        scores: (n, L) float64 from 0 to 1; a row of NaN for a clip that is in no test fold.
        settings: test fold -> what was chosen for it on its training clips.
        seconds: how long it took.
    """

    probe: str
    scores: Scores
    settings: dict[int, dict[str, Any]]
    seconds: float


def probe_embeddings(
    embeddings: Vectors,
    clips: LabelledClips,
    probes: Sequence[str] = PROBES,
    seed: int = 0,
    device: torch.device | str = "cpu",
    show_progress: bool = False,
) -> list[ProbeResult]:
    """What each probe says of the clips of every test fold.

    Args:
        embeddings: (n, D) float32, one row a clip.
        clips: what they are, each with one label or with any number.
        probes: which, of ``PROBES``.
        seed: of the MLP.
        device: where the MLP is trained.
        show_progress: show a bar for each probe on stderr.

    Raises:
        ConfigError: if ``embeddings`` do not fit ``clips`` or are not finite, a probe is unknown, or a fold is too
            small for the MLP.
        UnsupportedError: if scikit-learn is not installed.
    """
    check_probes(probes)
    require_sklearn("probes")
    results = []
    for probe in probes:
        started = time.perf_counter()
        scores = np.full((len(clips), len(clips.label_names)), np.nan)
        settings = {}
        for predicted in _predictions(probe, embeddings, clips, seed, device, show_progress):
            scores[predicted.test] = predicted.scores
            settings[predicted.fold] = predicted.settings
        results.append(ProbeResult(probe, scores, settings, time.perf_counter() - started))
    return results


def check_probes(probes: Sequence[str]) -> None:
    """Raise ConfigError if there are no probes, one is unknown, or one is there twice."""
    unknown = [probe for probe in probes if probe not in PROBES]
    if unknown or not probes or len(set(probes)) < len(probes):
        raise ConfigError(f"probes are one or more of {', '.join(PROBES)}, each once, not {named(probes) or 'none'}.")


def knn_predictions(embeddings: Vectors, clips: LabelledClips, k: int = NEIGHBOURS) -> Iterator[FoldPrediction]:
    """Yield what the nearest training clips say of each test fold.

    Neighbours are the ``k`` of highest cosine similarity; each votes with its similarity for its label or labels. A
    score is a label's share of the votes.

    Args:
        embeddings: (n, D) float32, one row a clip.
        clips: what they are.
        k: neighbours asked; fewer if there are not so many training clips.

    Raises:
        ConfigError: if ``embeddings`` do not fit ``clips`` or are not finite, or ``k`` is not positive.
    """
    if k < 1:
        raise ConfigError(f"k must be 1 or more neighbours, not {k}.")
    check_embeddings(embeddings, clips)
    return _ask_neighbours(embeddings, clips, k)


def knn_accuracy(embeddings: Vectors, clips: LabelledClips, k: int = NEIGHBOURS) -> float:
    """Share of the tested clips whose nearest training clips name them rightly; see ``knn_predictions``.

    Raises:
        ConfigError: as ``knn_predictions``; and if a clip has any number of labels, of which accuracy is not defined.
    """
    _refuse_multi_label(clips)
    return _accuracy(clips, knn_predictions(embeddings, clips, k))


def linear_probe_accuracy(embeddings: Vectors, clips: LabelledClips, strengths: Sequence[float] = STRENGTHS) -> float:
    """Share of the tested clips that a logistic regression names rightly; see ``linear_probe.linear_predictions``.

    Raises:
        ConfigError: as there; and if a clip has any number of labels, of which accuracy is not defined.
        UnsupportedError: if scikit-learn is not installed.
    """
    _refuse_multi_label(clips)
    return _accuracy(clips, linear_predictions(embeddings, clips, strengths))


def embed_clips(model: M2D, clips: LabelledClips, batch_size: int = 32) -> Vectors:
    """Scene embeddings of all clips, (n, D) float32, in evaluation mode; the model's own mode is put back.

    Raises:
        AudioError: if a file cannot be read; it names it.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return np.asarray(model.encode(clips.files, batch_size), dtype=np.float32)
    finally:
        for module, training in modes:
            module.training = training


# --- inside -----------------------------------------------------------------------------------------------------------


def _predictions(
    probe: str,
    embeddings: Vectors,
    clips: LabelledClips,
    seed: int,
    device: torch.device | str,
    show_progress: bool,
) -> Iterator[FoldPrediction]:
    from m2d_embed.evaluate.mlp_probe import mlp_predictions, num_trainings

    off = None if show_progress else True
    if probe == "mlp":
        with tqdm(total=num_trainings(clips), desc=probe, unit="training", disable=off) as bar:

            def on_trained() -> None:
                bar.update()

            yield from mlp_predictions(embeddings, clips, seed, device, on_trained)
        return
    work = linear_predictions(embeddings, clips) if probe == "linear" else knn_predictions(embeddings, clips)
    yield from tqdm(work, total=len(clips.test_folds()), desc=probe, unit="fold", disable=off)


def _accuracy(clips: LabelledClips, predictions: Iterator[FoldPrediction]) -> float:
    right = sum(int((p.scores.argmax(axis=1) == clips.labels[p.test]).sum()) for p in predictions)
    return right / int((clips.folds >= 0).sum())


def _refuse_multi_label(clips: LabelledClips) -> None:
    if clips.multi_label:
        raise ConfigError(
            "accuracy is defined where each clip has one label, but these have any number; "
            "use m2d-embed probe, or probe_embeddings and score_predictions, which give mAP."
        )


def _ask_neighbours(embeddings: Vectors, clips: LabelledClips, k: int) -> Iterator[FoldPrediction]:
    for fold in clips.test_folds():
        train, test = clips.split(fold)
        trained, tested = map(_unit, standardise(embeddings[train], embeddings[test]))
        targets = clips.targets[train]
        pieces = [tested[start : start + _ROWS_AT_A_TIME] for start in range(0, len(test), _ROWS_AT_A_TIME)]
        scores = np.concatenate([_votes(piece @ trained.T, targets, k) for piece in pieces])
        yield FoldPrediction(fold, test, scores, {"k": min(k, len(train))})


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit


def _votes(similarity: Vectors, targets: Bools, k: int) -> Scores:
    """(tests, trainings) similarities -> (tests, L) shares of the votes of the ``k`` nearest."""
    k = min(k, len(targets))
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    weights = np.maximum(np.take_along_axis(similarity, nearest, axis=1), _LEAST_VOTE).astype(np.float64)
    votes: Scores = np.einsum("tk,tkl->tl", weights, targets[nearest].astype(np.float64))
    shares: Scores = votes / weights.sum(axis=1, keepdims=True)
    return shares
