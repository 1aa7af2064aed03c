"""What probes found, for people and programs: a table, ``results.json``, predictions and scores, pictures."""

from __future__ import annotations

import csv
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2d_embed.evaluate.features import Vectors
from m2d_embed.evaluate.probes import ProbeResult
from m2d_embed.evaluate.scores import RESAMPLES, Score, confusion, label_scores, predicted_labels
from m2d_embed.files import write_json
from m2d_embed.labelled.clips import LABEL_SEPARATOR, LabelledClips

RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.csv"
SCORES_FILE = "scores.npz"
CONFUSION_FILE = "confusion.png"
MAP_FILE = "map.html"

_GAP = 3  # spaces between columns


@dataclass(frozen=True, eq=False)
class ProbeReport:
    """What probes found on a data set.

    Attributes:
        name: of the data.
        data: the folder or CSV.
        clips: what was read from it.
        embeddings: (n, D) float32.
        results: what each probe says of each clip.
        scores: probe -> name of the score -> score.
        notes: what one should know when reading the scores.
        model: name, origin, hash and settings of the model.
        settings: how the probes were run.
        seconds: of reading and embedding, and of all.
    """

    name: str
    data: Path
    clips: LabelledClips
    embeddings: Vectors
    results: list[ProbeResult]
    scores: dict[str, dict[str, Score]]
    notes: list[str]
    model: dict[str, Any]
    settings: dict[str, Any]
    seconds: dict[str, float]


def format_report(report: ProbeReport) -> str:
    """The text shown on a terminal: what was probed, a row for each probe, the notes."""
    clips, folds = report.clips, report.clips.test_folds()
    kind = "any number of labels" if clips.multi_label else "one label"
    tested = int((clips.folds >= 0).sum())
    lines = [
        f"{report.name}: {len(clips)} clips with {kind} each, {len(clips.label_names)} labels; "
        f"{tested} clips tested in {len(folds)} fold{'s' if len(folds) > 1 else ''}",
        f"{report.model['name']}: {report.model['embedding_size']} values a clip",
        "",
        *_table(report.scores),
        "",
        f"in %, with 95 % bootstrap intervals ({RESAMPLES} resamples of the test clips)",
        *(f"note: {note}" for note in report.notes),
    ]
    return "\n".join(lines)


def write_report(report: ProbeReport, folder: Path) -> list[Path]:
    """Write ``confusion.png`` (of clips with one label each), predictions, all scores and, at last, ``results.json``.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        CONFUSION_FILE,
        PREDICTIONS_FILE,
        SCORES_FILE,
        MAP_FILE,
        RESULTS_FILE,
    ):  # none may be left of an earlier run
        (folder / name).unlink(missing_ok=True)
    files = []
    if not report.clips.multi_label:
        files.append(_draw_confusion(report, folder / CONFUSION_FILE))
    _write_predictions(report, folder / PREDICTIONS_FILE)
    _write_scores(report, folder / SCORES_FILE)
    write_json(folder / RESULTS_FILE, report_as_dict(report))
    return [*files, *(folder / name for name in (PREDICTIONS_FILE, SCORES_FILE, RESULTS_FILE))]


def write_sound_map(report: ProbeReport, folder: Path, sample_rate: int) -> Path:
    """Write ``map.html``, a page with all clips by their embeddings.

    Raises:
        AudioError: if a file cannot be read.
        UnsupportedError: if umap-learn is not installed.
    """
    from m2d_embed.evaluate.sound_map import write_map

    clips, output = report.clips, folder / MAP_FILE
    labels = [_joined(clips, targets, "; ") for targets in clips.targets]
    title = f"{report.name}, as {report.model['name']} hears it"
    write_map(report.embeddings, clips.files, labels, output, title, sample_rate)
    return output


def report_as_dict(report: ProbeReport) -> dict[str, Any]:
    """All there is to know as plain JSON values; scores are from 0 to 1."""
    clips = report.clips
    return {
        "data": {
            "name": report.name,
            "path": str(report.data),
            "clips": len(clips),
            "multi_label": clips.multi_label,
            "labels": {name: int(n) for name, n in zip(clips.label_names, clips.targets.sum(axis=0), strict=True)},
            "folds": _folds(clips),
        },
        "model": report.model,
        "settings": report.settings,
        "probes": {
            result.probe: {
                "scores": {name: asdict(score) for name, score in report.scores[result.probe].items()},
                "labels": {name: asdict(score) for name, score in label_scores(clips, result.scores).items()},
                "settings": result.settings,
                "seconds": round(result.seconds, 2),
            }
            for result in report.results
        },
        "notes": report.notes,
        "seconds": {name: round(seconds, 2) for name, seconds in report.seconds.items()},
    }


# --- parts ------------------------------------------------------------------------------------------------------------


def _table(scores: dict[str, dict[str, Score]]) -> list[str]:
    columns = list(next(iter(scores.values())))
    rows = [["probe", *columns]]
    rows += [[probe, *(_percent(by_name[name]) for name in columns)] for probe, by_name in scores.items()]
    widths = [max(len(row[i]) for row in rows) + _GAP for i in range(len(rows[0]))]
    return ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _percent(score: Score) -> str:
    return f"{100 * score.value:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def _folds(clips: LabelledClips) -> dict[int, dict[str, int]]:
    """Test fold -> how many clips it is trained on, how many of those are held out to choose settings, and tested."""
    counts = {}
    for fold in clips.test_folds():
        train, test = clips.split(fold)
        counts[fold] = {"train": len(train), "held_out": len(clips.hold_out(fold)[1]), "test": len(test)}
    return counts


def _draw_confusion(report: ProbeReport, output: Path) -> Path:
    """Of the linear probe, or of the first one if it was not asked for."""
    from m2d_embed.evaluate.confusion import plot_confusion

    shown = next((result for result in report.results if result.probe == "linear"), report.results[0])
    title = f"{report.name}, {shown.probe} probe of {report.model['name']}"
    plot_confusion(confusion(report.clips, shown.scores), report.clips.label_names, output, title)
    return output


def _write_predictions(report: ProbeReport, output: Path) -> None:
    """A row a tested clip: what it is, and what each probe calls it with which score."""
    clips = report.clips
    root = report.data if report.data.is_dir() else report.data.parent
    decided = {result.probe: predicted_labels(clips, result.scores) for result in report.results}
    with output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "label", "fold", *(c for r in report.results for c in (r.probe, f"{r.probe}_score"))])
        for i in np.flatnonzero(clips.folds >= 0):
            row = [os.path.relpath(clips.files[i], root), _joined(clips, clips.targets[i]), str(clips.folds[i])]
            for result in report.results:
                chosen = decided[result.probe][i]
                scores = LABEL_SEPARATOR.join(f"{score:.6f}" for score in result.scores[i][chosen])
                row += [_joined(clips, chosen), scores]
            writer.writerow(row)


def _write_scores(report: ProbeReport, output: Path) -> None:
    """Of each tested clip the scores of all labels: an array (n, L) a probe, in the order of ``predictions.csv``."""
    tested = report.clips.folds >= 0
    arrays: dict[str, Any] = {result.probe: result.scores[tested].astype(np.float32) for result in report.results}
    np.savez_compressed(output, labels=np.array(report.clips.label_names), **arrays)


def _joined(clips: LabelledClips, targets: np.typing.NDArray[np.bool_], separator: str = LABEL_SEPARATOR) -> str:
    return separator.join(clips.label_names[label] for label in np.flatnonzero(targets))
