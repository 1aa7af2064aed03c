"""How good scores of clips are: accuracy, macro-F1 and mAP, each with a 95 % bootstrap interval.

Every score is computed fold by fold, on what one classifier said, and averaged over the folds in proportion of their
test clips. For macro-F1 and mAP a fold's score is the mean over those labels that a test clip of that fold has.

The interval comes from 1000 resamples of the test clips, drawn with replacement within each fold: it reaches as far
from the score as the 2.5th and the 97.5th percentile of the resamples lie from their mean. (Not the percentiles
themselves: of a label with few clips a resample lacks some and repeats others, which alone raises mAP and lowers F1.)
It tells how far the score may be off because the test clips are few. The classifiers are not fitted again, so it leaves
out what other training clips would change; nor does it mend that mAP is a little too high where a fold has few clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from m2d_embed.errors import ConfigError
from m2d_embed.evaluate.features import Scores
from m2d_embed.extras import require_sklearn
from m2d_embed.labelled.clips import Bools, Integers, LabelledClips, named

RESAMPLES = 1000
THRESHOLD = 0.5  # from which on a clip of a multi-label set has a label

_PERCENTILES = (2.5, 97.5)
_FEW_THRESHOLDS = 256  # up to which a product of matrices is quicker than sorting all resamples
_NUMBERS_AT_A_TIME = 1 << 22  # resamples x clips: bounds the memory

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """A score from 0 to 1, the ends of its 95 % interval, and its value in each test fold.

    A fold in which no clip has any label has no score.
    """

    value: float
    low: float
    high: float
    by_fold: dict[int, float]


@dataclass(frozen=True)
class LabelScore:
    """What one label scores, averaged like the whole; None if no test clip has it.

    Attributes:
        clips: test clips that have it.
        f1: harmonic mean of precision and recall.
        average_precision: area under precision over recall.
    """

    clips: int
    f1: float | None
    average_precision: float | None


def score_predictions(
    clips: LabelledClips, scores: Scores, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Score]:
    """Accuracy (if each clip has one label), macro-F1 and mAP of what a probe says.

    F1 takes the label of the highest score; of clips with several labels all those from 0.5 on.

    Args:
        clips: what the clips are.
        scores: (n, L) from 0 to 1; rows of clips that are in no test fold are not looked at.
        resamples: drawn for the intervals.
        seed: of the resamples; with the same one two probes are judged on the same resamples.

    Returns:
        By name: ``accuracy``, ``macro-F1``, ``mAP``.

    Raises:
        ConfigError: if ``scores`` do not fit or are not finite, or no test clip has a label.
        UnsupportedError: if scikit-learn is not installed.
    """
    require_sklearn("scores")
    _check_scores(clips, scores)
    rng = np.random.default_rng(seed)
    folds = clips.test_folds()
    sizes = np.array([(clips.folds == fold).sum() for fold in folds])
    values: dict[str, list[float]] = {}
    drawn: dict[str, list[Scores]] = {}
    for fold in folds:
        test = np.flatnonzero(clips.folds == fold)
        for name, value in _fold_values(clips, scores, test).items():
            values.setdefault(name, []).append(value)
        for name, resampled in _fold_resamples(clips, scores, test, resamples, rng).items():
            drawn.setdefault(name, []).append(resampled)
    result = {}
    for name in values:
        (value,) = _average(np.array(values[name])[:, None], sizes)
        low, high = _interval(value, _average(np.array(drawn[name]), sizes))
        by_fold = {fold: value for fold, value in zip(folds, values[name], strict=True) if not np.isnan(value)}
        result[name] = Score(float(value), low, high, by_fold)
    return result


def label_scores(clips: LabelledClips, scores: Scores) -> dict[str, LabelScore]:
    """What each label scores; arguments and errors as in ``score_predictions``."""
    require_sklearn("scores")
    _check_scores(clips, scores)
    folds = clips.test_folds()
    parts = [np.flatnonzero(clips.folds == fold) for fold in folds]
    sizes = np.array([len(part) for part in parts])
    targets, decided = clips.targets, predicted_labels(clips, scores)
    f1 = _average(np.array([_f1_by_label(targets[part], decided[part]) for part in parts]), sizes)
    precision = _average(np.array([_precision_by_label(targets[part], scores[part]) for part in parts]), sizes)
    counts = targets[clips.folds >= 0].sum(axis=0)
    return {
        name: LabelScore(int(counts[i]), _or_none(f1[i]), _or_none(precision[i]))
        for i, name in enumerate(clips.label_names)
    }


def predicted_labels(clips: LabelledClips, scores: Scores) -> Bools:
    """(n, L) which labels the scores name: the highest one, or, of clips with several labels, all from 0.5 on."""
    if clips.multi_label:
        return np.asarray(scores >= THRESHOLD)
    chosen: Bools = np.arange(scores.shape[1]) == scores.argmax(axis=1)[:, None]
    return chosen


def confusion(clips: LabelledClips, scores: Scores) -> Integers:
    """(L, L) how many test clips of each label (row) were named what (column).

    Raises:
        ConfigError: if a clip has any number of labels.
    """
    if clips.multi_label:
        raise ConfigError("a confusion matrix is of clips with one label each; these have any number.")
    tested = clips.folds >= 0
    matrix = np.zeros((len(clips.label_names),) * 2, dtype=np.int64)
    np.add.at(matrix, (clips.labels[tested], scores[tested].argmax(axis=1)), 1)
    return matrix


def mean_average_precision(targets: Bools, scores: Scores) -> float:
    """MAP over the labels that a clip has, NaN if there are none; the same numbers as scikit-learn's, sooner.

    Args:
        targets: (n, L) which labels each clip has.
        scores: (n, L).
    """
    (value,) = _resampled_map(targets, scores, np.ones((1, len(targets)), np.float32))
    return float(value)


# --- one fold ---------------------------------------------------------------------------------------------------------


def _fold_values(clips: LabelledClips, scores: Scores, test: Integers) -> dict[str, float]:
    """The scores of one fold; NaN if no clip has a label."""
    targets, decided = clips.targets[test], predicted_labels(clips, scores[test])
    values = {} if clips.multi_label else {"accuracy": float((targets & decided).any(axis=1).mean())}
    values["macro-F1"] = float(_mean_over_labels(_f1_by_label(targets, decided)))
    values["mAP"] = float(_mean_over_labels(_precision_by_label(targets, scores[test])))
    return values


def _f1_by_label(targets: Bools, decided: Bools) -> Scores:
    """(L,), NaN where no clip has the label."""
    # Not scikit-learn's: it takes a single column for two classes, yes and no, and scores both.
    there, named_so = targets.sum(axis=0), decided.sum(axis=0)
    values: Scores = 2 * (targets & decided).sum(axis=0) / np.maximum(there + named_so, 1)
    return np.where(there > 0, values, np.nan)


def _precision_by_label(targets: Bools, scores: Scores) -> Scores:
    """(L,) average precision, NaN where no clip has the label."""
    from sklearn.metrics import average_precision_score

    present = np.flatnonzero(targets.any(axis=0))
    values = np.full(targets.shape[1], np.nan)
    for label in present:
        values[label] = average_precision_score(targets[:, label], scores[:, label])
    return values


def _fold_resamples(
    clips: LabelledClips, scores: Scores, test: Integers, resamples: int, rng: np.random.Generator
) -> dict[str, Scores]:
    """The scores of one fold in every resample, (resamples,) each."""
    targets, decided = clips.targets[test], predicted_labels(clips, scores[test])
    parts: dict[str, list[Scores]] = {}
    for weights in _draw(len(test), resamples, rng):
        if not clips.multi_label:
            right = (targets & decided).any(axis=1)
            parts.setdefault("accuracy", []).append(np.asarray(weights @ right / len(test), dtype=np.float64))
        parts.setdefault("macro-F1", []).append(_resampled_f1(targets, decided, weights))
        parts.setdefault("mAP", []).append(_resampled_map(targets, scores[test], weights))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _draw(num_clips: int, resamples: int, rng: np.random.Generator) -> Iterator[Weights]:
    """Yield (b, n): how often each clip was drawn in each of b resamples, until there are enough."""
    at_a_time = max(1, _NUMBERS_AT_A_TIME // num_clips)
    evenly = np.full(num_clips, 1 / num_clips)
    for start in range(0, resamples, at_a_time):
        count = min(at_a_time, resamples - start)
        yield rng.multinomial(num_clips, evenly, size=count).astype(np.float32)


def _resampled_f1(targets: Bools, decided: Bools, weights: Weights) -> Scores:
    """(b,) macro-F1 under each row of weights."""
    both = weights @ (targets & decided)
    there = weights @ targets
    named_so = weights @ decided
    values = np.where(there > 0, 2 * both / np.maximum(there + named_so, 1), np.nan)
    return _mean_over_labels(values.astype(np.float64))


def _resampled_map(targets: Bools, scores: Scores, weights: Weights) -> Scores:
    """(b,) mAP under each row of weights."""
    labels = np.flatnonzero(targets.any(axis=0))
    if not len(labels):
        return np.full(len(weights), np.nan)
    values = [_average_precision(targets[:, label], scores[:, label], weights) for label in labels]
    return _mean_over_labels(np.stack(values, axis=1))


def _average_precision(positive: Bools, scores: Scores, weights: Weights) -> Scores:
    """(b,) average precision of one label under each row of weights (b, n); NaN where no positive was drawn.

    As scikit-learn defines it: the sum over thresholds of precision times the recall gained there, equal scores
    passing one threshold together. Only thresholds at which a positive passes gain any.
    """
    order = np.argsort(-scores, kind="stable")
    hit = positive[order]
    group = np.cumsum(np.diff(scores[order], prepend=np.inf) != 0) - 1  # of equal scores
    lasts = np.append(np.flatnonzero(np.diff(group)), len(group) - 1)
    gaining, gained_at = np.unique(group[hit], return_inverse=True)
    gained = weights[:, order[hit]] @ (gained_at[:, None] == np.arange(len(gaining))).astype(np.float32)
    if len(gaining) <= _FEW_THRESHOLDS:
        group_of = np.empty_like(group)
        group_of[order] = group
        passed = weights @ (group_of[:, None] <= gaining).astype(np.float32)
    else:
        passed = np.cumsum(weights[:, order], axis=1)[:, lasts[gaining]]
    hits = np.cumsum(gained, axis=1)
    total = hits[:, -1]
    area = (gained * hits / np.maximum(passed, 1)).sum(axis=1, dtype=np.float64)
    return np.where(total > 0, area / np.maximum(total, 1), np.nan)


# --- averages ---------------------------------------------------------------------------------------------------------


def _average(by_fold: Scores, sizes: Integers) -> Scores:
    """(folds, m) -> (m,) mean in proportion of the folds' sizes, leaving out NaN; NaN if there is nothing else."""
    known = ~np.isnan(by_fold)
    weights = known * sizes[:, None]
    total = weights.sum(axis=0)
    mean: Scores = np.where(known, by_fold * weights, 0.0).sum(axis=0) / np.maximum(total, 1)
    return np.where(total > 0, mean, np.nan)


def _mean_over_labels(values: Scores) -> Scores:
    """(..., L) -> (...) mean, leaving out NaN; NaN if there is nothing else."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def _interval(value: float, resampled: Scores) -> tuple[float, float]:
    low, high = value + np.nanpercentile(resampled, _PERCENTILES) - np.nanmean(resampled)
    return max(0.0, float(low)), min(1.0, float(high))


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _check_scores(clips: LabelledClips, scores: Scores) -> None:
    expected = (len(clips), len(clips.label_names))
    if scores.shape != expected:
        raise ConfigError(f"scores of {expected[0]} clips and {expected[1]} labels do not have shape {scores.shape}.")
    tested = np.flatnonzero(clips.folds >= 0)
    bad = tested[~np.isfinite(scores[tested]).all(axis=1)]
    if len(bad):
        raise ConfigError(f"scores of {len(bad)} clips are not finite: {named([str(clips.files[i]) for i in bad])}.")
    if not clips.targets[tested].any():
        raise ConfigError("no test clip has a label, so there is nothing to score.")
