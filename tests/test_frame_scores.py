"""Events from columns, and their scores, on cases that can be counted by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from m2d_embed.errors import ConfigError
from m2d_embed.finetune.frame_scores import ClipFrames, EventDecision, events_from_frames, score_frames
from m2d_embed.labelled.events import Event

STEP = 160.0  # ms
DECISION = EventDecision()


def times(columns: int) -> np.ndarray:
    """Centres of 16-frame patches."""
    return 75 + STEP * np.arange(columns)


def one_label(*probabilities: float) -> np.ndarray:
    return np.array(probabilities, dtype=np.float32)[:, None]


def spans(probabilities: np.ndarray, decision: EventDecision = DECISION) -> list[tuple[int, float, float]]:
    found = events_from_frames(probabilities, times(len(probabilities)), decision)
    return [(event.label, round(event.onset, 6), round(event.offset, 6)) for event in found]


# --- events from columns ----------------------------------------------------------------------------------------------


def test_events_reach_from_edge_to_edge_of_their_columns():
    assert spans(one_label(0.1, 0.9, 0.5, 0.49, 0.7)) == [(0, 0.155, 0.475), (0, 0.635, 0.795)]
    assert spans(one_label(1, 1)) == [(0, 0.0, 0.315)]  # not before the clip
    assert spans(one_label(0, 0.2)) == []


def test_labels_have_events_of_their_own_in_the_order_of_their_onsets():
    probabilities = np.array([[0.0, 0.9, 0.0], [0.9, 0.9, 0.0], [0.9, 0.0, 0.9]])
    assert spans(probabilities) == [(1, 0.0, 0.315), (0, 0.155, 0.475), (2, 0.315, 0.475)]


def test_the_threshold_decides():
    probabilities = one_label(0.3, 0.6, 0.3)
    assert spans(probabilities, EventDecision(threshold=0.3)) == [(0, 0.0, 0.475)]
    assert spans(probabilities, EventDecision(threshold=0.61)) == []


def test_the_median_filter_fills_gaps_and_drops_spikes():
    probabilities = one_label(0, 0, 0.9, 0, 0, 0.9, 0.9, 0, 0.9, 0.9, 0, 0)
    assert len(spans(probabilities)) == 3
    assert spans(probabilities, EventDecision(median_columns=3)) == [(0, 0.795, 1.595)]
    at_the_ends = one_label(0.9, 0.9, 0, 0, 0, 0.9)
    assert spans(at_the_ends, EventDecision(median_columns=3)) == [(0, 0.0, 0.315), (0, 0.795, 0.955)]


def test_the_median_filter_keeps_labels_apart():
    probabilities = np.zeros((5, 3))
    probabilities[1:4, 1] = 1
    assert spans(probabilities, EventDecision(median_columns=3)) == [(1, 0.155, 0.635)]


def test_short_events_are_dropped():
    probabilities = one_label(0, 0.9, 0, 0.9, 0.9, 0)
    assert spans(probabilities, EventDecision(min_duration=0.16)) == [(0, 0.155, 0.315), (0, 0.475, 0.795)]
    assert spans(probabilities, EventDecision(min_duration=0.17)) == [(0, 0.475, 0.795)]


def test_a_clip_of_one_column_is_one_event():
    assert events_from_frames(one_label(0.9), np.array([40.0]), DECISION) == [Event(0, 0.0, 0.08)]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.0}, "threshold"),
        ({"median_columns": 2}, "odd"),
        ({"median_columns": 0}, "odd"),
        ({"min_duration": -1.0}, "min_duration"),
        ({"min_duration": float("nan")}, "min_duration"),
    ],
)
def test_impossible_decisions(settings, word):
    with pytest.raises(ConfigError, match=word):
        EventDecision(**settings)


# --- scores -----------------------------------------------------------------------------------------------------------


def clip(probabilities: np.ndarray, *events: Event) -> ClipFrames:
    centres = times(len(probabilities)) / 1000
    targets = np.zeros_like(probabilities)
    for event in events:
        targets[(centres >= event.onset) & (centres <= event.offset), event.label] = 1
    return ClipFrames(probabilities, targets, times(len(probabilities)), events)


def test_scores_of_columns_are_scikit_learns_over_all_clips_and_the_labels_that_occur():
    rng = np.random.default_rng(0)
    clips = []
    for length in (4, 9, 6):
        truth = clip(np.zeros((length, 3)), Event(0, 0.2, 0.5), Event(1, 0.0, 0.4))  # label 2 occurs nowhere
        noisy = (0.5 * truth.targets + 0.6 * rng.random((length, 3))).clip(0, 1)
        clips.append(clip(noisy, *truth.events))
    scores = score_frames(clips, DECISION)
    targets = np.concatenate([c.targets for c in clips])
    probabilities = np.concatenate([c.probabilities for c in clips])
    precision = [average_precision_score(targets[:, i], probabilities[:, i]) for i in (0, 1)]
    assert scores.frame_map == pytest.approx(np.mean(precision))
    assert 0 < scores.frame_map < 1
    active = probabilities >= 0.5
    both, sizes = (active * targets).sum(axis=0), active.sum(axis=0) + targets.sum(axis=0)
    assert active[:, 2].any()
    assert scores.frame_f1_micro == pytest.approx(2 * both.sum() / sizes.sum())
    assert scores.frame_f1_macro == pytest.approx(np.mean((2 * both / sizes)[:2]))


def test_scores_of_columns_of_a_single_label():
    """Two columns of three found, one too many; where nothing sounds and nothing is said does not count."""
    probabilities = one_label(0, 0.9, 0.9, 0.1, 0.9, 0, 0, 0)
    scores = score_frames([clip(probabilities, Event(0, 0.2, 0.6))], DECISION)
    assert scores.frame_f1_macro == scores.frame_f1_micro == pytest.approx(2 * 2 / (3 + 3))


def test_perfect_predictions_score_1():
    events = (Event(0, 0.155, 0.475), Event(1, 0.635, 0.955), Event(0, 0.795, 0.955))
    scores = score_frames([clip(clip(np.zeros((6, 2)), *events).targets, *events)] * 2, DECISION)
    assert set(vars(scores).values()) == {1.0}


def test_onsets_count_within_200_ms_once_and_for_their_own_label_and_clip():
    found = one_label(0, 1, 0, 0, 0, 0, 1, 1, 0)  # onsets at 0.155 and 0.875 s
    assert onset_f1(found, Event(0, 0.355, 0.4)) == pytest.approx(2 / 3)  # 200 ms late: 1 of 1, of 2 found
    assert onset_f1(found, Event(0, 0.356, 0.4)) == 0
    assert onset_f1(found, Event(0, 0.1, 0.3), Event(0, 0.2, 0.3)) == pytest.approx(2 / 4)  # one onset serves once
    assert onset_f1(found, Event(0, 0.1, 9.0), Event(0, 0.9, 9.1)) == 1  # offsets do not count
    both = np.concatenate([found, np.zeros_like(found)], axis=1)
    assert onset_f1(both, Event(1, 0.155, 0.4)) == 0
    swapped = [clip(found, Event(0, 3.0, 3.1)), clip(one_label(*[0] * 9), Event(0, 0.155, 0.3))]
    assert score_frames(swapped, DECISION).onset_f1_micro == 0
    more = [clip(found, Event(0, 0.2, 0.3)), clip(one_label(*[0] * 9), Event(0, 0.2, 0.3), Event(0, 1.0, 1.1))]
    assert score_frames(more, DECISION).onset_f1_micro == pytest.approx(2 / (3 + 2))


def test_200_ms_are_within_200_ms_in_decimals_too():
    for column in range(1, 50):
        found = np.zeros((60, 1))
        found[column] = 1
        onset = round(0.16 * column - 0.005, 3)
        for shift, right in ((0.2, 1), (-0.2, 1), (0.201, 0), (-0.201, 0)):
            start = round(onset + shift, 3)
            if start >= 0:
                assert onset_f1(found, Event(0, start, start + 1)) == right


def test_micro_counts_events_and_macro_labels():
    """Label 0: two of two found; label 1: none of one, and one too many; label 2 is found and does not occur."""
    probabilities = np.zeros((9, 3))
    probabilities[1, 0] = probabilities[4, 0] = probabilities[8, 1] = probabilities[3, 2] = 1
    events = (Event(0, 0.155, 0.3), Event(0, 0.64, 0.8), Event(1, 0.155, 0.3))
    scores = score_frames([clip(probabilities, *events)], DECISION)
    assert scores.onset_f1_macro == pytest.approx((1 + 0) / 2)
    assert scores.onset_f1_micro == pytest.approx(2 * 2 / (3 + 4))


def test_the_median_filter_is_of_events_alone():
    probabilities = one_label(0, 1, 0, 0, 0)
    plain, filtered = (
        score_frames([clip(probabilities, Event(0, 0.155, 0.3))], EventDecision(median_columns=k)) for k in (1, 3)
    )
    assert plain.onset_f1_micro == 1
    assert filtered.onset_f1_micro == 0
    assert plain.frame_f1_micro == filtered.frame_f1_micro == 1


def onset_f1(probabilities: np.ndarray, *events: Event) -> float:
    return score_frames([clip(probabilities, *events)], DECISION).onset_f1_micro


def test_what_does_not_fit_is_refused():
    good = np.full((4, 2), 0.5)
    with pytest.raises(ConfigError, match=r"shape \(columns, labels\)"):
        ClipFrames(good[:, 0], good[:, 0], times(4), [])
    with pytest.raises(ConfigError, match=r"targets of shape \(3, 2\)"):
        ClipFrames(good, good[:3], times(4), [])
    with pytest.raises(ConfigError, match="4 columns need as many times"):
        ClipFrames(good, good, times(5), [])
    with pytest.raises(ConfigError, match="ascend"):
        ClipFrames(good, good, times(4)[::-1], [])
    with pytest.raises(ConfigError, match="finite"):
        ClipFrames(good * np.nan, good, times(4), [])
    with pytest.raises(ConfigError, match=r"labels \[2\]"):
        ClipFrames(good, good, times(4), [Event(2, 0.0, 1.0)])
    with pytest.raises(ConfigError, match="same number of labels"):
        score_frames([clip(good), clip(good[:, :1])], DECISION)
    with pytest.raises(ConfigError, match="same number of labels"):
        score_frames([], DECISION)
    with pytest.raises(ConfigError, match="nothing to score"):
        score_frames([clip(good)], DECISION)
