"""The linear probe: logistic regression on standardised embeddings, its regularisation chosen on held-out clips."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from m2d_embed.errors import ConfigError
from m2d_embed.evaluate.features import FoldPrediction, Scores, Vectors, check_embeddings, standardise
from m2d_embed.extras import require_sklearn
from m2d_embed.labelled.clips import Bools, Integers, LabelledClips

#: scikit-learn's ``C``: the larger, the weaker the L2 regularisation.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)

_TOLERANCE = 1e-3  # of the fit: a tenth of it takes three times as long and moves the accuracy by less than its error
_MAX_ITERATIONS = 200
_SURE = 10.0  # the logit of a label that was never otherwise


def linear_predictions(
    embeddings: Vectors, clips: LabelledClips, strengths: Sequence[float] = STRENGTHS
) -> Iterator[FoldPrediction]:
    """Yield what logistic regression says of each test fold: multinomial, or one regression a label if there may be
    several.

    Each fold takes the strength of least log-loss on its held-out training clips (``LabelledClips.hold_out``) when
    fitted to the others, and is then fitted to all of its training clips; the first, if none can be held out.

    Args:
        embeddings: (n, D) float32, one row a clip.
        clips: what they are.
        strengths: scikit-learn's ``C`` to choose from, in ascending order; weaker regularisation is tried for as long
            as the log-loss falls.

    Raises:
        ConfigError: if ``embeddings`` do not fit ``clips`` or are not finite, or ``strengths`` are not positive and
            ascending.
        UnsupportedError: if scikit-learn is not installed.
    """
    if not strengths or min(strengths) <= 0 or list(strengths) != sorted(strengths):
        raise ConfigError(f"strengths must be one or more positive numbers in ascending order, not {tuple(strengths)}.")
    require_sklearn("the linear probe")
    check_embeddings(embeddings, clips)
    return _predict(embeddings, clips, strengths)


def _predict(embeddings: Vectors, clips: LabelledClips, strengths: Sequence[float]) -> Iterator[FoldPrediction]:
    for fold in clips.test_folds():
        train, test = clips.split(fold)
        x, x_test = rotate(*standardise(embeddings[train], embeddings[test]))
        labels = clips.labels[train]
        held_out = np.isin(train, clips.hold_out(fold)[1])
        strength = choose_strength(x, labels, held_out, strengths, len(clips.label_names))
        (scores,) = _fitted_scores(x, labels, x_test, [strength], len(clips.label_names))
        yield FoldPrediction(fold, test, scores, {"C": strength})


def rotate(train: Vectors, test: Vectors) -> tuple[Vectors, Vectors]:
    """Both in an orthonormal basis of the training rows, if those are fewer than the features.

    An L2-regularised linear model is the same in either basis, as its weights lie in the span of the training rows; but
    there are fewer of them to fit.
    """
    rows, basis = _in_span(train)
    return rows, test if basis is None else test @ basis


def _in_span(x: Vectors) -> tuple[Vectors, Vectors | None]:
    """Rows (n, D) in an orthonormal basis of theirs, and the basis (D, n); as they are and None if n >= D."""
    if len(x) >= x.shape[1]:
        return x, None
    basis, _ = np.linalg.qr(x.T)
    return x @ basis, basis


def choose_strength(
    x: Vectors, labels: Integers | Bools, held_out: Bools, strengths: Sequence[float], num_labels: int
) -> float:
    """The strength of least log-loss on the rows held out; accuracy there would be too coarse.

    Args:
        x: (n, D) training rows.
        labels: (n,) int64, or (n, L) bool.
        held_out: (n,) bool.
        strengths: in ascending order.
        num_labels: L.
    """
    if len(strengths) == 1 or not held_out.any() or held_out.all():
        return strengths[0]
    best, least = strengths[0], np.inf
    fitted = _fitted_scores(x[~held_out], labels[~held_out], x[held_out], strengths, num_labels)
    for strength, scores in zip(strengths, fitted, strict=True):
        loss = _log_loss(labels[held_out], labels[~held_out], scores)
        if not loss < least:  # it has one minimum, and the weakly regularised fits beyond it take the longest
            break
        best, least = strength, loss
    return best


def fit_layer(x: Vectors, labels: Integers | Bools, strength: float, num_labels: int) -> tuple[Vectors, Vectors]:
    """The regressions as a linear layer, whose outputs go through a softmax or, of several labels a clip, sigmoids.

    Args:
        x: (n, D) rows to fit to.
        labels: (n,) int64, or (n, L) bool.
        strength: scikit-learn's ``C``.
        num_labels: L.

    Returns:
        Weights (L, D) and biases (L,). A label that all rows or none have is told by its bias alone.
    """
    rows, basis = _in_span(x)
    weight, bias = np.zeros((num_labels, rows.shape[1])), np.full(num_labels, -_SURE)
    if labels.ndim == 2:
        bias[labels.all(axis=0)] = _SURE
        for label in np.flatnonzero(labels.any(axis=0) & ~labels.all(axis=0)):
            fitted = _fit(_regression(), rows, labels[:, label], strength)
            weight[label], bias[label] = fitted.coef_[0], fitted.intercept_[0]
    elif len(classes := np.unique(labels)) > 1:
        fitted = _fit(_regression(), rows, labels, strength)
        # Of two classes there is one regression, for the second; a softmax of its halves is its sigmoid.
        of_two = np.array([[-0.5], [0.5]])
        weight[classes] = fitted.coef_ if len(classes) > 2 else of_two * fitted.coef_
        bias[classes] = fitted.intercept_ if len(classes) > 2 else of_two[:, 0] * fitted.intercept_
    else:
        bias[classes] = _SURE
    return (weight if basis is None else weight @ basis.T).astype(np.float32), bias.astype(np.float32)


def _log_loss(labels: Integers | Bools, trained: Integers | Bools, scores: Scores) -> float:
    """Mean log-loss, without labels of which nothing was learnt: they would say nothing about a strength."""
    if labels.ndim == 2:
        learnt = trained.any(axis=0) & ~trained.all(axis=0)
        right = np.where(labels, scores, 1 - scores)[:, learnt]
    else:
        known = np.isin(labels, trained)
        right = scores[known, labels[known]]
    if not right.size:
        return 0.0
    return float(-np.log(np.maximum(right, np.finfo(np.float32).tiny)).mean())


def _fitted_scores(
    x: Vectors, labels: Integers | Bools, x_test: Vectors, strengths: Sequence[float], num_labels: int
) -> Iterator[Scores]:
    """Yield (tests, L) probabilities for each strength in turn, fitted from where the last one was."""
    scores = np.zeros((len(x_test), num_labels))
    if labels.ndim == 1:
        classes = np.unique(labels)
        if len(classes) == 1:
            scores[:, classes[0]] = 1.0
            yield from [scores] * len(strengths)
            return
        classifier = _regression()
        for strength in strengths:
            scores[:, classes] = _fit(classifier, x, labels, strength).predict_proba(x_test)
            yield scores.copy()
        return
    scores[:, labels.all(axis=0)] = 1.0
    open_labels = np.flatnonzero(labels.any(axis=0) & ~labels.all(axis=0))
    classifiers = {label: _regression() for label in open_labels}
    for strength in strengths:
        for label, classifier in classifiers.items():
            scores[:, label] = _fit(classifier, x, labels[:, label], strength).predict_proba(x_test)[:, 1]
        yield scores.copy()


def _regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(tol=_TOLERANCE, max_iter=_MAX_ITERATIONS, warm_start=True)


def _fit(classifier: Any, x: Vectors, labels: Integers | Bools, strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of the weights change no label
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)  # of many labels with few clips
        return classifier.set_params(C=strength).fit(x, labels)
