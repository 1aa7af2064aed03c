"""A labelled data set as a task of the HEAR benchmark, in the folder layout that hear-eval-kit reads.

A task is a folder with ``task_metadata.json``, ``labelvocabulary.csv``, and for each of its splits ``<split>.json``
and ``<rate>/<split>/*.wav``. Splits are ``train``, ``valid`` and ``test``, or ``fold00``, ``fold01``, ... of which
hear-eval-kit tests each in turn and validates on the next. ``sources.csv``, which it does not read, says where each
file came from.

Audio is written as 32-bit float: what a model hears is then to the bit what it hears from the files themselves through
this package, and a peak above full scale, as resampling makes them, is not clipped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm.auto import tqdm

from m2d_embed.audio.clips import Samples, load_audio
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.labelled.clips import (
    TRAIN_ONLY,
    VALIDATION,
    Integers,
    LabelledClips,
    check_duplicates,
    named,
    read_labelled,
)
from m2d_embed.labelled.events import Event, is_event_table, read_events

METADATA_FILE = "task_metadata.json"
VOCABULARY_FILE = "labelvocabulary.csv"
SOURCES_FILE = "sources.csv"

MULTICLASS_SCORES = ("top1_acc", "d_prime", "aucroc", "mAP")
MULTILABEL_SCORES = ("mAP", "d_prime", "aucroc")
EVENT_SCORES = ("event_onset_200ms_fms", "segment_1s_er")

#: hear-eval-kit validates every 3 epochs, but its own event task (DCASE 2016 task 2) every 10: scoring events is slow,
#: and an early network that predicts none has no F-measure, which ends its training.
EVENT_GRID: dict[str, Any] = {"check_val_every_n_epoch": [10]}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST_STEM = 100
_MIN_FOLDS = 3  # one to train on, one to validate on, one to test
#: What pandas, with which hear-eval-kit reads the vocabulary, takes for a missing value.
_MISSING = frozenset((
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
))  # fmt: skip


@dataclass(frozen=True)
class TaskOptions:
    """How a task is made: its name, the sample rates in Hz its audio is written at, and the length of its clips.

    With a ``duration`` (seconds) clips are trimmed at their end or padded with zeros, and embedded in batches; None
    leaves them as they are, and they are embedded one by one. ``grid`` replaces values of hear-eval-kit's grid for
    this task, e.g. ``{"max_epochs": [100]}``.

    Raises:
        ConfigError: if the name cannot name a folder, or a rate or the duration is not positive.
    """

    name: str
    rates: tuple[int, ...] = (16_000,)
    duration: float | None = None
    grid: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"name={self.name!r}: a task is named in letters, digits, '.', '_' and '-'.")
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError(f"rates={self.rates}: sample rates in Hz are needed, e.g. 16000.")
        if self.duration is not None and not self.duration > 0:
            raise ConfigError(f"duration={self.duration:g}: a length in seconds is needed, or none.")
        odd = [name for name, values in self.grid.items() if not (isinstance(values, list) and values)]
        if odd:
            raise ConfigError(f'grid: {named(odd)} needs a list of values to try, e.g. {{"max_epochs": [100]}}.')


@dataclass(frozen=True, eq=False)
class TaskData:
    """What a task is made of: clips, the clips of each split, and the events in each clip if it has a timeline."""

    clips: LabelledClips
    splits: dict[str, Integers]
    events: tuple[tuple[Event, ...], ...] | None

    @property
    def is_folded(self) -> bool:
        """Whether the splits are folds."""
        return "train" not in self.splits


@dataclass
class ConvertedTask:
    """A task that was written: its folder, the clips of each split, and what was done to clips beyond copying."""

    folder: Path
    splits: dict[str, int]
    trimmed: int = 0
    padded: int = 0
    events_dropped: int = 0
    events_cut: int = 0
    notes: list[str] = field(default_factory=list)

    def describe(self, options: TaskOptions) -> list[str]:
        """What to tell whoever asked for it, line by line."""
        parts = ", ".join(f"{split} {count}" for split, count in self.splits.items())
        lines = [f"{self.folder}: {sum(self.splits.values())} clips ({parts})"]
        if options.duration is not None:
            lines.append(f"{self.trimmed} clips trimmed and {self.padded} padded to {options.duration:g} s")
        if self.events_dropped or self.events_cut:
            lines.append(
                f"events after the end of their clip: {self.events_dropped} left out, {self.events_cut} cut short"
            )
        return lines + self.notes


def convert(data: TaskData, tasks_dir: Path, options: TaskOptions) -> ConvertedTask:
    """Write a task, whole or not at all.

    Args:
        data: from ``read_task``.
        tasks_dir: where the folder ``options.name`` is made.
        options: its name, rates and duration.

    Raises:
        ConfigError: if the folder exists, a label would not survive hear-eval-kit's reading, or an event begins after
            its clip ends.
        AudioError: if clips cannot be read; it names them.
    """
    folder = tasks_dir / options.name
    if folder.exists():
        raise ConfigError(f"{folder} exists already; remove it, or choose another --name.")
    check_vocabulary(data.clips.label_names)
    partial = tasks_dir / f".{options.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        task = _Writer(data, options, partial).write()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    task.folder = folder
    return task


def read_task(path: Path, seed: int = 0, limit: int | None = None, label_column: str = "") -> TaskData:
    """Read labelled clips or events, and lay out their splits.

    Args:
        path: a CSV file or folder as ``read_labelled`` takes it, or a CSV file of events as ``read_events`` does.
        seed: of folds, where the data has none, and of the draw.
        limit: at most so many clips; of clips with labels only.
        label_column: as in ``read_labelled``.

    Raises:
        ConfigError: if the data is not well-formed, its folds cannot be those of a HEAR task, or the same content lies
            in two of them.
        AudioError: if a file is missing.
    """
    if is_event_table(path):
        if limit is not None or label_column:
            raise ConfigError(f"{path}: a table of events is converted whole, and its labels are in the column label.")
        found = read_events(path, seed)
        clips, events = found.clips, found.events
    else:
        clips, events = read_labelled(path, limit, seed, label_column), None
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in clips.files]
    check_duplicates(clips.files, clips.folds, contents, path)
    return TaskData(clips, lay_out(clips, path), events)


def lay_out(clips: LabelledClips, path: Path) -> dict[str, Integers]:
    """The clips of each split: ``train``, ``valid`` and ``test``, or a fold after another.

    Raises:
        ConfigError: if the folds of the data cannot be those of a HEAR task.
    """
    folds = clips.test_folds()
    if len(folds) == 1:
        train, valid = clips.hold_out(folds[0])
        if not len(valid):
            raise ConfigError(f"{path}: too few clips to hold any out for validation, which HEAR needs.")
        return {"train": train, "valid": valid, "test": clips.split(folds[0])[1]}
    if len(folds) < _MIN_FOLDS:
        raise ConfigError(f"{path}: HEAR trains, validates and tests on folds of their own, so it needs three or more.")
    if np.isin(clips.folds, (TRAIN_ONLY, VALIDATION)).any():
        raise ConfigError(f"{path}: HEAR tests all folds; clips that are only trained or validated on have no place.")
    digits = max(2, len(str(len(folds) - 1)))  # hear-eval-kit sorts them by name
    return {f"fold{i:0{digits}}": np.flatnonzero(clips.folds == fold) for i, fold in enumerate(folds)}


def check_vocabulary(names: Sequence[str]) -> None:
    """Raise ConfigError if pandas, with which hear-eval-kit reads the labels, would turn one into something else."""
    missing = [name for name in names if name in _MISSING]
    if missing:
        raise ConfigError(f"hear-eval-kit reads the label {named(missing)} as a missing value; rename it.")
    for what, read in (("truth values", _as_truth_values(names)), ("numbers", _as_numbers(names))):
        changed = [name for name, value in zip(names, read, strict=True) if str(value) != name] if read else []
        if changed:
            raise ConfigError(
                f"hear-eval-kit reads the labels as {what}, so {named(changed)} would change; rename them."
            )


def safe_names(files: Sequence[Path]) -> list[str]:
    """A different file name for each, in letters, digits, '_' and '-', that ends in ``.wav``.

    They differ even where upper and lower case do not.
    """
    taken: set[str] = set()
    names = []
    for file in files:
        stem = _UNSAFE.sub("_", file.stem)[:_LONGEST_STEM] or "_"
        name, count = stem, 1
        while name.lower() in taken:
            count += 1
            name = f"{stem}-{count}"
        taken.add(name.lower())
        names.append(f"{name}.wav")
    return names


def _as_truth_values(names: Sequence[str]) -> list[bool]:
    """What pandas takes the names for; nothing if one of them is no truth value."""
    known = {word: word.lower() == "true" for word in ("True", "TRUE", "true", "False", "FALSE", "false")}
    return [known[name] for name in names] if known.keys() >= set(names) else []


def _as_numbers(names: Sequence[str]) -> list[int] | list[float]:
    """What pandas takes the names for: integers, or else floats; nothing if one of them is no number."""
    if any("_" in name or not name.isascii() for name in names):  # which Python takes for numbers, but pandas does not
        return []
    try:
        return [int(name) for name in names]
    except ValueError:
        pass
    try:
        return [float(name) for name in names]
    except ValueError:
        return []


class _Writer:
    """Writes one task into an empty folder."""

    def __init__(self, data: TaskData, options: TaskOptions, folder: Path):
        self.data, self.options, self.folder = data, options, folder
        self.names = safe_names(data.clips.files)
        self.digest = hashlib.sha256()
        self.task = ConvertedTask(folder, {split: len(clips) for split, clips in data.splits.items()})

    def write(self) -> ConvertedTask:
        self._write_audio_and_labels()
        self._write_vocabulary()
        self._write_sources()
        self._write_json(METADATA_FILE, self._metadata())
        self.task.notes += self._untrained()
        return self.task

    def _write_audio_and_labels(self) -> None:
        bad = []
        progress = tqdm(total=len(self.data.clips), desc=self.options.name, unit="clip", disable=None)
        for split, indices in self.data.splits.items():
            labels = {}
            for index in indices:
                try:
                    labels[self.names[index]] = self._write_clip(split, int(index))
                except AudioError as error:
                    bad.append(str(error))
                progress.update()
            self._write_json(f"{split}.json", labels)
        progress.close()
        if bad:
            raise AudioError(f"{len(bad)} clips cannot be read, so there is no task: {named(bad)}")

    def _write_clip(self, split: str, index: int) -> list[Any]:
        """Write a clip at every rate; what ``<split>.json`` says of it."""
        seconds = 0.0
        for rate in self.options.rates:
            samples = load_audio(self.data.clips.files[index], rate)
            seconds = len(samples) / rate
            samples = self._fit(samples, rate)
            path = self.folder / str(rate) / split / self.names[index]
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, samples, rate, subtype="FLOAT")
            self.digest.update(samples.tobytes())
        self._count_fitted(seconds)
        return self._labels(index, seconds)

    def _fit(self, samples: Samples, rate: int) -> Samples:
        if self.options.duration is None:
            return samples
        wanted = round(self.options.duration * rate)
        return np.pad(samples[:wanted], (0, max(0, wanted - len(samples))))

    def _count_fitted(self, seconds: float) -> None:
        if self.options.duration is None:
            return
        surplus = round((seconds - self.options.duration) * self.options.rates[-1])
        self.task.trimmed += surplus > 0
        self.task.padded += surplus < 0

    def _labels(self, index: int, seconds: float) -> list[Any]:
        names = self.data.clips.label_names
        if self.data.events is None:
            return [names[label] for label in np.flatnonzero(self.data.clips.targets[index])]
        return [
            {"label": names[event.label], "start": 1000 * event.onset, "end": 1000 * event.offset}
            for event in self._fit_events(index, seconds)
        ]

    def _fit_events(self, index: int, seconds: float) -> Iterator[Event]:
        assert self.data.events is not None
        end = seconds if self.options.duration is None else min(seconds, self.options.duration)
        for event in self.data.events[index]:
            if event.onset >= seconds:
                raise ConfigError(
                    f"{self.data.clips.files[index]}: an event begins at {event.onset:g} s, "
                    f"but the clip ends at {seconds:g} s."
                )
            self.task.events_dropped += event.onset >= end
            self.task.events_cut += event.onset < end < event.offset
            if event.onset < end:
                yield event._replace(offset=min(event.offset, end))

    def _write_vocabulary(self) -> None:
        with (self.folder / VOCABULARY_FILE).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["idx", "label"])
            writer.writerows(enumerate(self.data.clips.label_names))

    def _write_sources(self) -> None:
        files = self.data.clips.files
        with (self.folder / SOURCES_FILE).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["split", "file", "source"])
            for split, indices in self.data.splits.items():
                writer.writerows((split, self.names[i], files[i]) for i in indices)

    def _write_json(self, name: str, content: Any) -> None:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        self.digest.update(text.encode())
        (self.folder / name).write_text(text, encoding="utf-8")

    def _metadata(self) -> dict[str, Any]:
        has_events = self.data.events is not None
        several = self.data.clips.multi_label
        grid = (EVENT_GRID if has_events else {}) | self.options.grid
        return {
            "task_name": self.options.name,
            # of all that was written, so that results of an earlier task of this name are told from those of this one
            "version": self.digest.hexdigest()[:16],
            "embedding_type": "event" if has_events else "scene",
            "prediction_type": "multilabel" if several else "multiclass",
            "split_mode": "presplit_kfold" if self.data.is_folded else "trainvaltest",
            "splits": list(self.data.splits),
            "sample_duration": self.options.duration,
            "evaluation": EVENT_SCORES if has_events else MULTILABEL_SCORES if several else MULTICLASS_SCORES,
            "evaluation_params": {"task_specific_param_grid": grid} if grid else {},
        }

    def _untrained(self) -> list[str]:
        """Labels that hear-eval-kit tests on a split and trains on nowhere, as they are in the validation part only."""
        targets, splits = self.data.clips.targets, self.data.splits
        if not self.data.is_folded:
            rounds = [("test", ["train"])]
        else:
            folds = list(splits)
            skip = {fold: folds[(i + 1) % len(folds)] for i, fold in enumerate(folds)}
            rounds = [(fold, [other for other in folds if other not in (fold, skip[fold])]) for fold in folds]
        notes = []
        for tested, trained in rounds:
            known = np.any([targets[splits[split]].any(axis=0) for split in trained], axis=0)
            unknown = np.flatnonzero(targets[splits[tested]].any(axis=0) & ~known)
            if len(unknown):
                labels = named([self.data.clips.label_names[i] for i in unknown])
                notes.append(f"{tested} tests {labels}, which nothing but its validation part holds")
        return notes
