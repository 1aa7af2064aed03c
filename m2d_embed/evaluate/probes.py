"""Quick probes of an encoder on labelled clips: nearest neighbours, and a linear classifier.

Both see every feature standardised with the mean and standard deviation of the training rows, and give the share of
clips named rightly, over all test folds together. They are for comparing checkpoints within a run: pre-training calls
them every so many steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from m2d_embed.errors import ConfigError
from m2d_embed.evaluate.extra import require_sklearn
from m2d_embed.evaluate.labelled import Integers, LabelledClips, named

if TYPE_CHECKING:
    from m2d_embed.model import M2D

Vectors = npt.NDArray[np.float32]

_HOLD_OUT_EVERY = 5  # training rows: one in so many chooses the regularisation
_TOLERANCE = 1e-3  # of the fit: a tenth of it takes three times as long and moves the accuracy by less than its error
_MAX_ITERATIONS = 200
_ROWS_AT_A_TIME = 1024  # test rows compared with all training rows together
_LEAST_VOTE = 1e-6  # of a neighbour that is not similar at all: without any, such neighbours could not outvote label 0


def knn_accuracy(embeddings: Vectors, clips: LabelledClips, k: int = 10) -> float:
    """Share of the tested clips whose nearest training clips name them rightly.

    Neighbours are the ``k`` of highest cosine similarity; each votes with its similarity.

    Args:
        embeddings: (n, D) float32, one row a clip.
        clips: what they are.
        k: neighbours asked; fewer if there are not so many training clips.

    Raises:
        ConfigError: if ``embeddings`` do not fit ``clips`` or are not finite, or ``k`` is not positive.
    """
    if k < 1:
        raise ConfigError(f"k must be 1 or more neighbours, not {k}.")
    _check_embeddings(embeddings, clips)
    right = 0
    for train, test in clips.splits():
        trained, tested = map(_unit, _standardise(embeddings[train], embeddings[test]))
        for start in range(0, len(test), _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            votes = _votes(tested[rows] @ trained.T, clips.labels[train], len(clips.label_names), k)
            right += int((votes.argmax(axis=1) == clips.labels[test[rows]]).sum())
    return right / _num_tested(clips)


def linear_probe_accuracy(
    embeddings: Vectors, clips: LabelledClips, strengths: Sequence[float] = (0.01, 0.1, 1.0)
) -> float:
    """Share of the tested clips that a multinomial logistic regression names rightly.

    Args:
        embeddings: (n, D) float32, one row a clip.
        clips: what they are.
        strengths: scikit-learn's ``C`` to choose from, in ascending order: the larger, the weaker the L2
            regularisation. Each fold takes the one of least log-loss on a fifth of its training clips when fitted to
            the others; the first, if there are too few clips to hold any out.

    Raises:
        ConfigError: if ``embeddings`` do not fit ``clips`` or are not finite, or a strength is not positive.
        UnsupportedError: if scikit-learn is not installed.
    """
    if not strengths or min(strengths) <= 0:
        raise ConfigError(f"strengths must be one or more positive numbers, not {tuple(strengths)}.")
    require_sklearn("the linear probe")
    _check_embeddings(embeddings, clips)
    right = 0
    for train, test in clips.splits():
        x, x_test = _standardise(embeddings[train], embeddings[test])
        x, x_test = _rotate(x, x_test)
        y = clips.labels[train]
        (classifier,) = _classifiers(x, y, [_choose_strength(x, y, strengths)])
        right += int((classifier.predict(x_test) == clips.labels[test]).sum())
    return right / _num_tested(clips)


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


# --- features and classifiers -----------------------------------------------------------------------------------------


def _check_embeddings(embeddings: Vectors, clips: LabelledClips) -> None:
    if embeddings.ndim != 2 or len(embeddings) != len(clips):
        raise ConfigError(f"embeddings of {len(clips)} clips have shape ({len(clips)}, D), not {embeddings.shape}.")
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise ConfigError(
            f"{len(bad)} of {len(clips)} embeddings are not finite: {named([str(clips.files[i]) for i in bad])}."
        )


def _num_tested(clips: LabelledClips) -> int:
    return int((clips.folds >= 0).sum())


def _standardise(train: Vectors, test: Vectors) -> tuple[Vectors, Vectors]:
    """Zero mean and unit variance over the training rows; a feature that is constant there becomes 0."""
    mean = train.mean(axis=0, dtype=np.float64)
    std = train.std(axis=0, dtype=np.float64)
    constant = std <= 1e-6 * np.abs(mean)
    scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))
    return ((train - mean) * scale).astype(np.float32), ((test - mean) * scale).astype(np.float32)


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit


def _votes(similarity: Vectors, labels: Integers, num_labels: int, k: int) -> npt.NDArray[np.float64]:
    """(tests, trainings) similarities -> (tests, num_labels) sums over the ``k`` nearest."""
    k = min(k, len(labels))
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    weights = np.maximum(np.take_along_axis(similarity, nearest, axis=1), _LEAST_VOTE)
    votes = np.zeros((len(similarity), num_labels))
    np.add.at(votes, (np.arange(len(similarity))[:, None], labels[nearest]), weights)
    return votes


def _rotate(train: Vectors, test: Vectors) -> tuple[Vectors, Vectors]:
    """Both in an orthonormal basis of the training rows, if those are fewer than the features.

    An L2-regularised linear model is the same in either basis, as its weights lie in the span of the training rows; but
    there are fewer of them to fit.
    """
    if len(train) >= train.shape[1]:
        return train, test
    basis, _ = np.linalg.qr(train.T)  # (D, n)
    return train @ basis, test @ basis


def _choose_strength(x: Vectors, y: Integers, strengths: Sequence[float]) -> float:
    """The strength of least log-loss on a held-out fifth of the training rows; accuracy there would be too coarse."""
    held_out = _held_out(y)
    if len(strengths) == 1 or not held_out.any():
        return strengths[0]
    from sklearn.metrics import log_loss

    fitted = _classifiers(x[~held_out], y[~held_out], strengths)
    losses = [log_loss(y[held_out], c.predict_proba(x[held_out]), labels=c.classes_) for c in fitted]
    return strengths[losses.index(min(losses))]


def _held_out(labels: Integers) -> npt.NDArray[np.bool_]:
    """A mask of every fifth row, label after label, leaving at least one of each label to train on."""
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    is_first = np.diff(labels[order], prepend=-1) != 0
    mask = np.zeros(len(labels), dtype=bool)
    mask[order] = (np.arange(len(labels)) % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1) & ~is_first
    return mask


def _classifiers(x: Vectors, y: Integers, strengths: Iterable[float]) -> Iterator[Any]:
    """Yield one classifier, fitted with each strength in turn from where it was with the last."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(tol=_TOLERANCE, max_iter=_MAX_ITERATIONS, warm_start=True)
    for strength in strengths:
        classifier.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of the weights change no label
            classifier.fit(x, y)
        yield classifier
