"""How well events are detected: scores of time columns, and of the onsets of the events that they are joined to.

Scores are over all clips together. Those called macro are means over the labels that occur in these clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from m2d_embed.errors import ConfigError
from m2d_embed.extras import require, require_sklearn
from m2d_embed.labelled.events import Event

ONSET_TOLERANCE = 0.2  # seconds, as in HEAR (Turian et al., arXiv 2203.03022, appendix B)
_ROUNDING = 1e-6  # seconds: times that are written in decimals are not exact in binary

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EventDecision:
    """How probabilities of columns become events.

    Attributes:
        threshold: from this probability on a label is active.
        median_columns: an odd number of columns, whose median replaces the one in their middle; 1 changes nothing.
        min_duration: shorter events are dropped, in seconds.

    Raises:
        ConfigError: if a value is impossible.
    """

    threshold: float = 0.5
    median_columns: int = 1
    min_duration: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(f"threshold must lie between 0 and 1, not be {self.threshold}.")
        if self.median_columns < 1 or self.median_columns % 2 == 0:
            raise ConfigError(f"median_columns must be an odd number, 1 or more, not {self.median_columns}.")
        if not self.min_duration >= 0:
            raise ConfigError(f"min_duration must be 0 s or more, not {self.min_duration}.")


@dataclass(frozen=True, eq=False)
class ClipFrames:
    """One clip: what was said of its columns, and what is true.

    Attributes:
        probabilities: (T, L) of each label in each column, 0 to 1.
        targets: (T, L) zeros and ones, or bool.
        times_ms: (T,) centres of the columns in milliseconds, evenly spaced.
        events: the events of the clip.

    Raises:
        ConfigError: if shapes do not fit together, numbers are not finite, or an event has no such label.
    """

    probabilities: Floats
    targets: Floats | Bools
    times_ms: Floats
    events: Sequence[Event]

    def __post_init__(self) -> None:
        _check_columns(self.probabilities, self.times_ms)
        shape = self.probabilities.shape
        if self.targets.shape != shape:
            raise ConfigError(f"targets of shape {self.targets.shape} do not fit probabilities of shape {shape}.")
        unknown = sorted({event.label for event in self.events if not 0 <= event.label < shape[1]})
        if unknown:
            raise ConfigError(f"events have the labels {unknown}, but there are only {shape[1]}, from 0 on.")


@dataclass(frozen=True)
class FrameScores:
    """Scores from 0 to 1.

    Attributes:
        frame_map: macro mean average precision of the columns.
        frame_f1_macro, frame_f1_micro: F1 of the columns, which have a label from the threshold on.
        onset_f1_macro, onset_f1_micro: F1 of events, right if their onset is within 200 ms of that of a true event of
            the same label, each true event counted once.
    """

    frame_map: float
    frame_f1_macro: float
    frame_f1_micro: float
    onset_f1_macro: float
    onset_f1_micro: float


def score_frames(clips: Sequence[ClipFrames], decision: EventDecision) -> FrameScores:
    """Score the detection of events in all clips of a test part.

    Args:
        clips: what was said and what is true; all of the same number of labels.
        decision: threshold of columns and events; the median filter and the shortest duration are of events alone.

    Raises:
        ConfigError: if there are no clips, their numbers of labels differ, or no column of any has a label.
        UnsupportedError: if scikit-learn or mir_eval is not installed.
    """
    require_sklearn("scores of frames")
    require("mir_eval", "scores of events")
    from sklearn.metrics import average_precision_score

    widths = {clip.probabilities.shape[1] for clip in clips}
    if len(widths) != 1:
        raise ConfigError(f"clips to score need the same number of labels, not {sorted(widths)}.")
    probabilities = np.concatenate([clip.probabilities for clip in clips])
    targets = np.concatenate([np.asarray(clip.targets, dtype=bool) for clip in clips])
    present = targets.any(axis=0)
    if not present.any():
        raise ConfigError("no column of the clips has a label, so there is nothing to score.")
    active = probabilities >= decision.threshold
    # Not scikit-learn's F1: it takes a single column for two classes, yes and no, and scores both.
    columns = np.stack([(targets & active).sum(axis=0), targets.sum(axis=0), active.sum(axis=0)], axis=1)
    onsets = _onset_counts(clips, decision)
    return FrameScores(
        frame_map=float(average_precision_score(targets[:, present], probabilities[:, present], average="macro")),
        frame_f1_macro=_macro_f1(columns),
        frame_f1_micro=_f1(columns.sum(axis=0)),
        onset_f1_macro=_macro_f1(onsets),
        onset_f1_micro=_f1(onsets.sum(axis=0)),
    )


def events_from_frames(probabilities: Floats, times_ms: Floats, decision: EventDecision) -> list[Event]:
    """Join columns in which a label is active to events.

    An event lasts from the edge of its first column to that of its last one, half a step from their centres.

    Args:
        probabilities: (T, L).
        times_ms: (T,) centres of the columns in milliseconds, evenly spaced.
        decision: threshold, median filter and shortest duration.

    Returns:
        The events, by onset.

    Raises:
        ConfigError: if shapes do not fit, or numbers are not finite.
        UnsupportedError: if scipy, which comes with scikit-learn, is not installed.
    """
    _check_columns(probabilities, times_ms)
    require("scipy", "the median filter of events")
    from scipy.ndimage import median_filter

    active = probabilities >= decision.threshold
    if decision.median_columns > 1:
        active = median_filter(active.astype(np.uint8), size=(decision.median_columns, 1), mode="nearest") > 0
    # A single column has no neighbour to tell its width; it begins with the clip.
    half_step = float(np.median(np.diff(times_ms))) / 2 if len(times_ms) > 1 else float(times_ms[0])
    events = []
    for label in range(probabilities.shape[1]):
        edges = np.diff(active[:, label].astype(np.int8), prepend=0, append=0)
        for first, end in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
            onset = max(0.0, float(times_ms[first]) - half_step) / 1000
            offset = (float(times_ms[end - 1]) + half_step) / 1000
            if offset - onset >= decision.min_duration - _ROUNDING:
                events.append(Event(label, onset, offset))
    return sorted(events, key=lambda event: (event.onset, event.label))


def _onset_counts(clips: Sequence[ClipFrames], decision: EventDecision) -> npt.NDArray[np.int64]:
    """(L, 3) of each label: events found rightly, true events, events found."""
    from mir_eval.util import match_events

    counts = np.zeros((clips[0].probabilities.shape[1], 3), dtype=np.int64)
    for clip in clips:
        found = events_from_frames(clip.probabilities, clip.times_ms, decision)
        for label in range(len(counts)):
            true_onsets, found_onsets = (_onsets(events, label) for events in (clip.events, found))
            matched = match_events(true_onsets, found_onsets, ONSET_TOLERANCE + _ROUNDING)
            counts[label] += len(matched), len(true_onsets), len(found_onsets)
    return counts


def _onsets(events: Sequence[Event], label: int) -> npt.NDArray[np.float64]:
    return np.array([event.onset for event in events if event.label == label], dtype=np.float64)


def _macro_f1(counts: npt.NDArray[np.int64]) -> float:
    """Mean over the labels that occur; ``counts`` (L, 3) as for ``_f1``."""
    return float(np.mean([_f1(counts[label]) for label in np.flatnonzero(counts[:, 1])]))


def _f1(counts: npt.NDArray[np.int64]) -> float:
    """Of the numbers of matches, of true ones and of found ones."""
    matched, true, found = counts.tolist()
    return 2 * matched / (true + found) if true + found else 0.0


def _check_columns(probabilities: Floats, times_ms: Floats) -> None:
    if probabilities.ndim != 2 or probabilities.size == 0:
        raise ConfigError(f"probabilities have shape (columns, labels), not {probabilities.shape}.")
    if times_ms.shape != probabilities.shape[:1]:
        raise ConfigError(f"{len(probabilities)} columns need as many times, not shape {times_ms.shape}.")
    if not (np.isfinite(probabilities).all() and np.isfinite(times_ms).all()):
        raise ConfigError("probabilities and times must be finite numbers.")
    if (np.diff(times_ms) <= 0).any():
        raise ConfigError("times must ascend from column to column.")
