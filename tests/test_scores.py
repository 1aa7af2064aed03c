"""Scores of probes: against scikit-learn and by hand, and their intervals."""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from m2d_embed.errors import ConfigError, UnsupportedError
from m2d_embed.evaluate import scores as scores_module
from m2d_embed.evaluate.scores import (
    confusion,
    label_scores,
    mean_average_precision,
    predicted_labels,
    score_predictions,
)
from m2d_embed.labelled.clips import LabelledClips


def made_up(labels, folds):
    labels = np.array(labels)
    count = labels.shape[1] if labels.ndim == 2 else labels.max() + 1
    names = tuple(f"l{i}" for i in range(count))
    return LabelledClips(tuple(Path(f"{i}.wav") for i in range(len(labels))), labels, names, np.array(folds))


def guesses(clips, right, seed=0):
    """Scores of a probe that is right in about that share of the clips."""
    rng = np.random.default_rng(1000 + seed)
    scores = rng.random(clips.targets.shape)
    return np.where(rng.random((len(clips), 1)) < right, 0.5 * scores + 0.5 * clips.targets, scores)


def one_label(count=300, num_labels=4, num_folds=3, seed=0):
    rng = np.random.default_rng(seed)
    return made_up(rng.integers(num_labels, size=count), np.arange(count) % num_folds)


def several_labels(count=300, num_folds=3, seed=0):
    rng = np.random.default_rng(seed)
    return made_up(rng.random((count, 4)) < [0.5, 0.3, 0.2, 0.1], np.arange(count) % num_folds)


def test_scores_of_one_label_each_by_hand():
    clips = made_up([0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, -1])
    clips = LabelledClips(clips.files, clips.labels, clips.label_names, clips.folds)
    scores = np.array([[9, 1, 0], [2, 8, 0], [1, 9, 0], [0, 3, 7], [0, 1, 9], [np.nan] * 3]) / 10
    result = score_predictions(clips, scores)
    assert list(result) == ["accuracy", "macro-F1", "mAP"]
    assert result["accuracy"].by_fold == {0: 0.5, 1: 1.0}
    assert result["accuracy"].value == pytest.approx((4 * 0.5 + 1) / 5)
    # l0: precision 1, recall 1/2; l1: 1/2, 1/2; l2, which no clip of fold 0 is, is left out though one was named so.
    assert result["macro-F1"].by_fold == {0: pytest.approx((2 / 3 + 1 / 2) / 2), 1: 1.0}
    # l0 comes first and second; l1 comes first, behind l0's second, third.
    assert result["mAP"].by_fold[0] == pytest.approx((1 + (1 + 2 / 3) / 2) / 2)


@pytest.mark.parametrize("several", [False, True])
def test_a_fold_of_one_label(several):
    clips = made_up([0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1])
    if several:
        clips = dataclasses.replace(clips, labels=clips.targets)
    scores = np.array([[9, 1], [8, 2], [3, 7], [1, 9], [1, 9], [9, 1]]) / 10
    by_fold = score_predictions(clips, scores)["macro-F1"].by_fold
    assert by_fold == {0: pytest.approx(2 * 2 / (2 + 3)), 1: 1.0}
    assert label_scores(clips, scores)["l0"].f1 == pytest.approx((0.8 + 1) / 2)


@pytest.mark.parametrize("make", [one_label, several_labels])
def test_scores_are_those_of_scikit_learn(make):
    clips = make()
    scores = guesses(clips, 0.5)
    result = score_predictions(clips, scores)
    decided = predicted_labels(clips, scores)
    f1, precision, sizes = [], [], []
    for fold in range(3):
        part = clips.folds == fold
        f1.append(f1_score(clips.targets[part], decided[part], average="macro"))
        precision.append(average_precision_score(clips.targets[part], scores[part], average="macro"))
        sizes.append(part.sum())
    assert result["macro-F1"].value == pytest.approx(np.average(f1, weights=sizes))
    assert result["mAP"].value == pytest.approx(np.average(precision, weights=sizes))
    assert ("accuracy" in result) == (not clips.multi_label)
    by_label = label_scores(clips, scores)
    assert np.mean([score.f1 for score in by_label.values()]) == pytest.approx(result["macro-F1"].value)
    assert np.mean([score.average_precision for score in by_label.values()]) == pytest.approx(result["mAP"].value)
    assert [score.clips for score in by_label.values()] == clips.targets.sum(axis=0).tolist()


def test_what_is_predicted():
    one = made_up([0, 1, 2], [0, 1, 2])
    scores = np.array([[0.1, 0.2, 0.15], [0.6, 0.7, 0.0], [0.4, 0.3, 0.3]])
    assert predicted_labels(one, scores).tolist() == [[False, True, False], [False, True, False], [True, False, False]]
    assert confusion(one, scores).tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]
    several = made_up(one.targets, [0, 1, 2])
    assert predicted_labels(several, scores).tolist() == [[False] * 3, [True, True, False], [False] * 3]
    assert predicted_labels(several, np.full((3, 3), 0.5)).all()
    with pytest.raises(ConfigError, match="one label each"):
        confusion(several, scores)


def test_confusion_counts_tested_clips():
    clips = made_up([0, 1, 1, 1], [-1, 0, 0, 1])
    scores = np.array([[np.nan, np.nan], [0, 1], [1, 0], [0, 1]])
    assert confusion(clips, scores).tolist() == [[0, 0], [1, 2]]


@pytest.mark.parametrize("decimals", [1, 9])  # with one, most scores are equal to others
def test_mean_average_precision_is_that_of_scikit_learn(decimals):
    clips = several_labels()
    scores = np.round(guesses(clips, 0.3), decimals)
    expected = average_precision_score(clips.targets, scores, average="macro")
    assert mean_average_precision(clips.targets, scores) == pytest.approx(expected, abs=1e-6)
    without = np.concatenate([clips.targets, np.zeros((300, 1), bool)], axis=1)
    assert mean_average_precision(without, np.c_[scores, scores[:, 0]]) == pytest.approx(expected, abs=1e-6)
    assert np.isnan(mean_average_precision(np.zeros((5, 2), bool), np.ones((5, 2))))


@pytest.mark.parametrize("few", [0, 1000])  # each way to count what passes a threshold
@pytest.mark.parametrize("decimals", [1, 9])
def test_resamples_are_scored_as_scikit_learn_scores_weights(decimals, few, monkeypatch):
    monkeypatch.setattr(scores_module, "_FEW_THRESHOLDS", few)
    clips = several_labels(120)
    scores = np.round(guesses(clips, 0.3), decimals)
    decided = predicted_labels(clips, scores)
    weights = np.random.default_rng(1).multinomial(120, np.full(120, 1 / 120), size=5).astype(np.float32)
    ours = scores_module._resampled_map(clips.targets, scores, weights)
    f1 = scores_module._resampled_f1(clips.targets, decided, weights)
    for i, weight in enumerate(weights):
        there = (clips.targets * weight[:, None]).any(axis=0)
        precision = average_precision_score(clips.targets[:, there], scores[:, there], sample_weight=weight)
        assert ours[i] == pytest.approx(precision, abs=1e-5)
        expected = f1_score(clips.targets[:, there], decided[:, there], average="macro", sample_weight=weight)
        assert f1[i] == pytest.approx(expected, abs=1e-5)


def test_resamples_in_pieces_are_the_same(monkeypatch):
    clips = one_label()
    scores = guesses(clips, 0.5)
    whole = score_predictions(clips, scores, resamples=50)
    monkeypatch.setattr(scores_module, "_NUMBERS_AT_A_TIME", 700)
    assert score_predictions(clips, scores, resamples=50) == whole


def test_interval_of_an_accuracy_is_that_of_a_share():
    clips = one_label(400, num_folds=1)
    scores = guesses(clips, 0.4)
    score = score_predictions(clips, scores)["accuracy"]
    half = 1.96 * np.sqrt(score.value * (1 - score.value) / 400)
    assert score.high - score.value == pytest.approx(half, rel=0.15)
    assert score.value - score.low == pytest.approx(half, rel=0.15)
    assert score_predictions(clips, scores, seed=1)["accuracy"].low != score.low
    assert score_predictions(clips, scores)["accuracy"] == score


@pytest.mark.parametrize("make", [one_label, several_labels])
def test_intervals_hold_the_score_and_what_other_test_clips_give(make):
    """Test sets of one population: in most of them the interval holds the mean over all of them."""
    found = []
    for seed in range(30):
        clips = make(200, num_folds=2, seed=seed)
        found.append(score_predictions(clips, guesses(clips, 0.4, seed), resamples=100))
    for name in found[0]:
        scores = [result[name] for result in found]
        assert all(0 <= score.low < score.value < score.high <= 1 for score in scores)
        mean = np.mean([score.value for score in scores])
        assert sum(score.low <= mean <= score.high for score in scores) >= 25
        width = np.mean([score.high - score.low for score in scores])
        assert width == pytest.approx(2 * 1.96 * np.std([score.value for score in scores]), rel=0.4)


def test_intervals_hold_the_score_where_labels_have_few_clips():
    clips = one_label(400, 50, 5)
    for score in score_predictions(clips, guesses(clips, 0.4)).values():
        assert score.value - score.low == pytest.approx(score.high - score.value, rel=0.3)


def test_perfect_scores_have_no_interval():
    clips = one_label()
    for score in score_predictions(clips, clips.targets.astype(float)).values():
        assert (score.value, score.low, score.high) == pytest.approx((1, 1, 1))


def test_labels_without_a_clip_in_a_fold_are_left_out():
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]], bool)
    clips = made_up(targets, [0, 0, 1, 1, 2])
    scores = np.where(targets, 0.9, 0.1)
    scores[0] = [0.9, 0.8, 0.9]  # l2 is wrongly named in fold 0, which has none
    result = score_predictions(clips, scores)
    assert result["mAP"].by_fold == {0: 1.0, 1: 1.0}  # fold 2 has no label at all
    assert result["macro-F1"].by_fold == {0: pytest.approx((1 + 2 / 3) / 2), 1: 1.0}
    never = made_up(np.c_[targets, np.zeros(5, bool)], [0, 0, 1, 1, 2])
    assert label_scores(never, np.c_[scores, np.zeros(5)])["l3"] == scores_module.LabelScore(0, None, None)


def test_what_is_wrong_is_said():
    clips = one_label()
    scores = guesses(clips, 0.5)
    with pytest.raises(ConfigError, match=r"300 clips and 4 labels do not have shape \(299, 4\)"):
        score_predictions(clips, scores[1:])
    scores[5, 2] = np.nan
    for work in (score_predictions, label_scores):
        with pytest.raises(ConfigError, match=r"scores of 1 clips are not finite: '5.wav'"):
            work(clips, scores)
    nothing = made_up(np.zeros((4, 2), bool), [0, 0, 1, 1])
    with pytest.raises(ConfigError, match="no test clip has a label"):
        score_predictions(nothing, np.zeros((4, 2)))


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    clips = one_label()
    with pytest.raises(UnsupportedError, match=r"scores: sklearn is not installed: .*m2d-embed\[eval\]"):
        score_predictions(clips, guesses(clips, 0.5))


def test_many_clips_and_labels_are_scored_soon():
    clips = one_label(2000, 50, 5)
    started = time.process_time()
    score_predictions(clips, guesses(clips, 0.5))
    assert time.process_time() - started < 20  # in fact 1 to 2 s
