"""How good a fine-tuned model is: what it says of whole clips, scores of that, and tables of it."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from m2d_embed.evaluate import scores
from m2d_embed.files import atomic_write
from m2d_embed.finetune.crops import EvaluationClips
from m2d_embed.finetune.frame_scores import ClipFrames, EventDecision, events_from_frames, score_frames
from m2d_embed.finetune.task import Task
from m2d_embed.labelled.clips import LABEL_SEPARATOR, Integers
from m2d_embed.labelled.events import LabelledEvents
from m2d_embed.m2d import M2D

Floats = npt.NDArray[np.float32]
#: Row of the data -> probabilities, (L,) of the clip, or (T, L) of its columns.
Predictions = Mapping[int, Floats]

_DECISION = EventDecision()
_DIGITS = 6


@torch.no_grad()
def predict(model: M2D, clips: EvaluationClips, per_column: bool) -> dict[int, Floats]:
    """Probabilities that a model gives to clips, or to each of their columns; in float32.

    Args:
        model: with a head, in evaluation mode.
        clips: what to go through.
        per_column: of each time column, else of the clip.
    """
    head = model.tagging_head()
    predicted: dict[int, Floats] = {}
    for rows, log_mel in clips:
        moved = log_mel.to(model.device)
        logits = model.frame_logits(moved) if per_column else model.logits(moved)
        predicted |= dict(zip(rows.tolist(), head.probabilities(logits).cpu().numpy(), strict=True))
    return predicted


def main_score(task: Task, clips: EvaluationClips, predicted: Predictions) -> tuple[str, float]:
    """The score that epochs are compared by, and its name: accuracy, mAP, or mAP of columns."""
    if task.per_column:
        return "frame mAP", score_frames(_clip_frames(task, clips, predicted), _DECISION).frame_map
    rows = sorted(predicted)
    matrix = np.stack([predicted[row] for row in rows]).astype(np.float64)
    chosen = task.clips.select(np.array(rows, dtype=np.int64))
    if task.multi_label:
        return "mAP", scores.mean_average_precision(chosen.targets, matrix)
    return "accuracy", float((matrix.argmax(axis=1) == chosen.labels).mean())


def all_scores(task: Task, clips: EvaluationClips, predicted: Predictions) -> dict[str, dict[str, Any]]:
    """Every score of a test part: ``{"mAP": {"value": ..., "low": ..., "high": ...}}``; of events without interval."""
    if task.per_column:
        found = dataclasses.asdict(score_frames(_clip_frames(task, clips, predicted), _DECISION))
        return {name.replace("_", " "): {"value": value} for name, value in found.items()}
    rows = np.array(sorted(predicted), dtype=np.int64)
    matrix = np.stack([predicted[row] for row in rows.tolist()]).astype(np.float64)
    return _plain(scores.score_predictions(task.clips.select(rows), matrix))


def scores_of_folds(
    task: Task, by_fold: Mapping[int, Predictions], fold_scores: Mapping[int, Mapping[str, Mapping[str, float]]]
) -> dict[str, dict[str, Any]]:
    """Scores over all folds, each tested by a model of its own: means over the folds in proportion of their clips.

    Args:
        task: the data.
        by_fold: what was said of the clips of each fold.
        fold_scores: what ``all_scores`` gave for each fold.
    """
    if task.per_column:
        sizes = np.array([len(predicted) for predicted in by_fold.values()])
        names = next(iter(fold_scores.values()))
        values = {name: np.array([found[name]["value"] for found in fold_scores.values()]) for name in names}
        return {name: {"value": float((v * sizes).sum() / sizes.sum())} for name, v in values.items()}
    matrix = np.zeros((len(task.clips), len(task.clips.label_names)))
    for predicted in by_fold.values():
        for row, probabilities in predicted.items():
            matrix[row] = probabilities
    return _plain(scores.score_predictions(task.clips, matrix))


def per_label(task: Task, predicted: Predictions) -> dict[str, dict[str, Any]]:
    """What each label scores; empty for events."""
    if task.per_column:
        return {}
    rows = np.array(sorted(predicted), dtype=np.int64)
    matrix = np.stack([predicted[row] for row in rows.tolist()]).astype(np.float64)
    found = scores.label_scores(task.clips.select(rows), matrix)
    return {name: dataclasses.asdict(score) for name, score in found.items()}


def describe(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores in one line, in percent."""
    shown = []
    for name, score in found.items():
        interval = f" ({100 * score['low']:.1f} to {100 * score['high']:.1f})" if "low" in score else ""
        shown.append(f"{name} {100 * score['value']:.1f} %{interval}")
    return ", ".join(shown)


def write_predictions(task: Task, clips: EvaluationClips, predicted: Predictions, output: Path) -> None:
    """Write a CSV: of clips a row each, with the probability of each label; of events a row each event found."""
    header, rows = _event_rows(task, clips, predicted) if task.per_column else _clip_rows(task, predicted)
    with atomic_write(output) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def _clip_rows(task: Task, predicted: Predictions) -> tuple[list[str], list[list[Any]]]:
    clips, names = task.clips, task.clips.label_names
    order = sorted(predicted)
    matrix = np.stack([predicted[row] for row in order]).astype(np.float64)
    chosen: Integers = np.array(order, dtype=np.int64)
    decided = scores.predicted_labels(clips.select(chosen), matrix)
    rows = []
    for row, named, probabilities in zip(order, decided, matrix, strict=True):
        is_label = clips.targets[row]
        truth = LABEL_SEPARATOR.join(name for name, there in zip(names, is_label, strict=True) if there)
        guess = LABEL_SEPARATOR.join(name for name, there in zip(names, named, strict=True) if there)
        rows.append([str(clips.files[row]), truth, guess, *(round(float(p), _DIGITS) for p in probabilities)])
    return ["file", "label", "predicted", *names], rows


def _event_rows(task: Task, clips: EvaluationClips, predicted: Predictions) -> tuple[list[str], list[list[Any]]]:
    rows: list[list[Any]] = []
    for row in sorted(predicted):
        times = clips.frame_times_ms(row).numpy()
        events = events_from_frames(predicted[row], times, _DECISION)
        file = str(task.clips.files[row])
        rows += [[file, task.clips.label_names[e.label], round(e.onset, 3), round(e.offset, 3)] for e in events]
        if not events:
            rows.append([file, "", "", ""])  # as tables of events name clips without any
    return ["file", "label", "onset", "offset"], rows


def _clip_frames(task: Task, clips: EvaluationClips, predicted: Predictions) -> Sequence[ClipFrames]:
    assert isinstance(task.data, LabelledEvents)
    return [
        ClipFrames(
            probabilities,
            clips.frame_targets(row).numpy(),
            clips.frame_times_ms(row).numpy(),
            task.data.events[row],
        )
        for row, probabilities in predicted.items()
    ]


def _plain(found: Mapping[str, scores.Score]) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(score) for name, score in found.items()}
