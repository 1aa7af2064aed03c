"""What runs found: hear-eval-kit's own scores, with 95 % intervals from its predictions, as JSON and as tables.

Every score stated is the one hear-eval-kit computed (``test.predicted-scores.json``). Beside accuracy, mAP and the
scores of events stands an interval, from the 2.5th to the 97.5th percentile over 1000 resamples of the test clips: of
clips with labels as in ``m2d_embed.evaluate.scores``, of clips with events from what sed_eval counts in each.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.hear.compat import EVENTS_SUFFIX, PREDICTIONS_SUFFIX, load_heareval
from benchmarks.hear.convert import METADATA_FILE, VOCABULARY_FILE
from benchmarks.hear.run import DONE_FILE, SETTINGS_FILE
from benchmarks.timing import machine
from m2d_embed.errors import ConfigError
from m2d_embed.evaluate.scores import RESAMPLES, score_predictions
from m2d_embed.files import write_text
from m2d_embed.labelled.clips import LabelledClips

RESULT = Path(__file__).parents[1] / "hear.json"
SCORES_FILE = "test.predicted-scores.json"
NAMES = {
    "m2d_embed": "m2d-embed, bundled",
    "benchmarks.hear.logmel_stats": "log-mel mean and std",
    "benchmarks.hear.random_weights": "random weights",
}
#: hear-eval-kit's name of a score -> the one it has in ``m2d_embed.evaluate.scores``.
OUR_NAMES = {"top1_acc": "accuracy", "mAP": "mAP"}
_PERCENTILES = (2.5, 97.5)
_CHOSEN = ("hidden_layers", "lr", "initialization")

Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Finished:
    """A task that a run has finished: the folder of its results, and what the run was asked."""

    folder: Path
    settings: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the task says of itself."""
        metadata: dict[str, Any] = _read_json(self.folder / METADATA_FILE)
        return metadata

    @property
    def model(self) -> str:
        """A name for a table: the module, and what was loaded into it beyond its own weights."""
        module = self.settings["module"]
        weights = [Path(self.settings["model"]).name] if self.settings["model"] else []
        options = [f"{key}={value}" for key, value in self.settings["model_options"].items()]
        name = module if weights else NAMES.get(module, module)
        return " ".join([name, *weights, *options])

    def test_parts(self) -> list[str]:
        """The splits that were tested."""
        return ["test"] if self.metadata["split_mode"] == "trainvaltest" else sorted(self.metadata["splits"])


def collect(output: Path) -> dict[str, Any]:
    """All finished results below an output folder of ``run``.

    Returns:
        What is written as JSON: the machine, and of each task of each run its settings, its scores (value, and over
        folds the standard deviation, as hear-eval-kit states them) with their intervals, and the seconds taken.

    Raises:
        ConfigError: if nothing is finished.
    """
    results = [describe(finished) for finished in find_finished(output)]
    if not results:
        raise ConfigError(f"{output}: no finished results of `python -m benchmarks.hear run` here.")
    results.sort(key=lambda result: (result["task"], -_first(result)["value"]))
    return {
        "command": "python -m benchmarks.hear run --module MODULE --tasks-dir TASKS --output OUTPUT",
        "hear-eval-kit": "2021.1.3",
        "machine": machine(),
        "results": results,
    }


def find_finished(output: Path) -> Iterator[Finished]:
    """Every task that a run below ``output`` has finished."""
    for settings in sorted(output.glob(f"*/{SETTINGS_FILE}")):
        for done in sorted(settings.parent.glob(f"*/*/{DONE_FILE}")):
            yield Finished(done.parent, _read_json(settings))


def describe(finished: Finished) -> dict[str, Any]:
    """One result as it is written down."""
    metadata, found = finished.metadata, _read_json(finished.folder / SCORES_FILE)
    scores = {name: stated_score(found, name) for name in metadata["evaluation"]}
    for name, ends in intervals(finished).items():
        scores[name]["95 % interval"] = [round(end, 4) for end in ends]
    return {
        "task": metadata["task_name"],
        "task version": metadata["version"],
        "model": finished.model,
        "run": finished.settings,
        "test clips": sum(len(_read_json(finished.folder / f"{part}.json")) for part in finished.test_parts()),
        "embedding size": _read_json(finished.folder / DONE_FILE)["embedding_size"],
        "scores": scores,
        "chosen": {name: _plain(found["hparams"][name]) for name in _CHOSEN},
        "seconds": {
            "embeddings": round(_read_json(finished.folder / "profile.embeddings.json")["time_elapsed"]),
            "predictions": round(_read_json(finished.folder / DONE_FILE)["time"]),
        },
    }


def stated_score(found: dict[str, Any], name: str) -> dict[str, Any]:
    """A score as hear-eval-kit states it: of folds the mean and standard deviation; null where it is not finite."""
    key = f"test_{name}"
    if "aggregated_scores" not in found:
        return {"value": _finite(found["test"][key])}
    folds = {part: _finite(scores[key]) for part, scores in found.items() if part.startswith("fold")}
    stated = found["aggregated_scores"]
    return {"value": _finite(stated[f"{key}_mean"]), "std": _finite(stated[f"{key}_std"]), "folds": folds}


def intervals(finished: Finished, resamples: int = RESAMPLES) -> dict[str, tuple[float, float]]:
    """The 95 % intervals of those scores of a task that can be had by resampling what was tested."""
    names = finished.metadata["evaluation"]
    if finished.metadata["embedding_type"] == "event":
        return {name: event_interval(finished, name, resamples) for name in names}
    clips, predictions = tested_clips(finished)
    resampled = score_predictions(clips, predictions, resamples)
    return {name: (resampled[ours].low, resampled[ours].high) for name, ours in OUR_NAMES.items() if name in names}


def tested_clips(finished: Finished) -> tuple[LabelledClips, Counts]:
    """The tested clips, nameless, and what was predicted of them, (n, L)."""
    arrays = [np.load(finished.folder / f"{part}{PREDICTIONS_SUFFIX}") for part in finished.test_parts()]
    targets = np.concatenate([array["target"] for array in arrays]).astype(bool)
    predictions = np.concatenate([array["prediction"] for array in arrays]).astype(np.float64)
    folds = np.repeat(np.arange(len(arrays)), [len(array["target"]) for array in arrays])
    is_single = finished.metadata["prediction_type"] == "multiclass"
    labels = targets.argmax(axis=1) if is_single else targets
    names = tuple(f"{i:04}" for i in range(targets.shape[1]))
    return LabelledClips((Path(),) * len(folds), labels, names, folds), predictions


def event_interval(finished: Finished, score: str, resamples: int) -> tuple[float, float]:
    """The interval of an event score: F-measure or error rate of resampled soundscapes."""
    parts = [_read_json(finished.folder / f"{part}{EVENTS_SUFFIX}") for part in finished.test_parts()]
    vocabulary = _labels_of(finished.folder)
    drawn = []
    for part in parts:
        hits, size = event_counts(part, score, vocabulary)
        weights = np.random.default_rng(0).multinomial(len(hits), np.full(len(hits), 1 / len(hits)), resamples)
        drawn.append((weights @ hits) / np.maximum(weights @ size, 1e-9))
    low, high = np.percentile(np.mean(drawn, axis=0), _PERCENTILES)
    return float(low), float(high)


def event_counts(part: dict[str, Any], score: str, labels: Sequence[str]) -> tuple[Counts, Counts]:
    """Numerator and denominator of an event score for each soundscape, (n,) each, as sed_eval counts.

    F-measure is ``2 tp / (predicted + true)``, error rate ``(substituted + deleted + inserted) / true``.
    """
    function = load_heareval().score.available_scores[score](label_to_idx={name: i for i, name in enumerate(labels)})
    rows = []
    for file, predicted in part["predicted_events"].items():
        metric = function.score_class(event_label_list=list(labels), **function.params)
        container = function.sed_eval_event_container
        metric.evaluate(container({file: part["target_events"][file]}), container({file: predicted}))
        found = metric.overall
        if function.scores[0] == "f_measure":
            rows.append((2 * found["Ntp"], found["Nsys"] + found["Nref"]))
        else:
            rows.append((found["S"] + found["D"] + found["I"], found["Nref"]))
    counts = np.array(rows, dtype=np.float64)
    return counts[:, 0], counts[:, 1]


def tables(collected: dict[str, Any]) -> list[str]:
    """One Markdown table a task, scores in %."""
    lines: list[str] = []
    for task in dict.fromkeys(result["task"] for result in collected["results"]):
        rows = [result for result in collected["results"] if result["task"] == task]
        scores = list(rows[0]["scores"])
        lines += ["", f"{task}, {rows[0]['test clips']} test clips", ""]
        lines += [f"| model | values | {' | '.join(scores)} |", f"| --- | ---: |{' ---: |' * len(scores)}"]
        for row in rows:
            cells = [_cell(name, row["scores"][name]) for name in scores]
            lines.append(f"| {row['model']} | {row['embedding size']} | {' | '.join(cells)} |")
    return lines[1:]


def comparison(collected: dict[str, Any], quality: dict[str, Any]) -> list[str]:
    """A Markdown table of accuracy in % by hear-eval-kit and by ``m2d-embed probe --probe mlp``.

    Args:
        collected: from ``collect``.
        quality: the content of ``benchmarks/quality.json``; its sets are matched with tasks, and its models, by name.
    """
    scores = quality["scores in % with 95 % intervals"]
    lines = ["| data | model | hear-eval-kit | `m2d-embed probe --probe mlp` |", "| --- | --- | ---: | ---: |"]
    for result in collected["results"]:
        accuracy = result["scores"].get("top1_acc")
        ours = scores.get(result["model"], {}).get(result["task"], {}).get("mlp", {}).get("accuracy")
        if accuracy and ours:
            cell = f"{ours[0]:.1f} ({ours[1]:.1f} to {ours[2]:.1f})"
            lines.append(f"| {result['task']} | {result['model']} | {_cell('top1_acc', accuracy)} | {cell} |")
    return lines


def write_report(collected: dict[str, Any], path: Path) -> None:
    """Write the JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(collected, indent=1, allow_nan=False) + "\n")


def _cell(name: str, score: dict[str, Any]) -> str:
    value = score["value"]
    if value is None:
        return "not finite"
    factor, digits = (1, 2) if name in ("d_prime", "segment_1s_er") else (100, 1)
    text = f"{factor * value:.{digits}f}"
    if score.get("std") is not None:
        text += f" ± {factor * score['std']:.{digits}f}"
    if "95 % interval" in score:
        low, high = (f"{factor * end:.{digits}f}" for end in score["95 % interval"])
        text += f" ({low} to {high})"
    return text


def _labels_of(folder: Path) -> list[str]:
    with (folder / VOCABULARY_FILE).open(newline="", encoding="utf-8") as stream:
        return [row["label"] for row in csv.DictReader(stream)]


def _first(result: dict[str, Any]) -> dict[str, Any]:
    """The score that a task is judged by."""
    score: dict[str, Any] = next(iter(result["scores"].values()))
    return score if score["value"] is not None else {"value": -math.inf}


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """``<function xavier_uniform_ at 0x7f...>`` -> ``xavier_uniform_``."""
    return value.split()[1] if isinstance(value, str) and value.startswith("<function ") else value


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
