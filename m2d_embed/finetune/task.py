"""What a run learns: labelled data, and which of its clips are trained on, validated on and tested."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.extras import require
from m2d_embed.finetune.recipe import NO_FOLD, FinetuneRecipe
from m2d_embed.labelled.clips import VALIDATION, Integers, LabelledClips, check_duplicates, named, read_labelled
from m2d_embed.labelled.events import LabelledEvents, is_event_table, read_events

_TRAIN, _VALID, _TEST = -1, -2, 0


@dataclass(frozen=True, eq=False)
class Task:
    """Labelled data: clips of one label each, clips of any number of labels, or clips with events in time."""

    data: LabelledClips | LabelledEvents

    @property
    def clips(self) -> LabelledClips:
        """The clips; of events, with the labels that occur in them at all."""
        return self.data.clips if isinstance(self.data, LabelledEvents) else self.data

    @property
    def per_column(self) -> bool:
        """Whether every time column has labels of its own, not the clip as a whole."""
        return isinstance(self.data, LabelledEvents)

    @property
    def multi_label(self) -> bool:
        """Whether there may be any number of labels at once."""
        return self.clips.multi_label

    @property
    def kind(self) -> str:
        """In words."""
        if self.per_column:
            return "events"
        return "multi-label" if self.multi_label else "single-label"


@dataclass(frozen=True, eq=False)
class Parts:
    """Indices of the clips of a run; ``valid`` and ``test`` may be empty."""

    train: Integers
    valid: Integers
    test: Integers

    def describe(self) -> str:
        """How many there are of each."""
        counts = {"trained on": self.train, "validated on": self.valid, "tested": self.test}
        return ", ".join(f"{len(rows)} {what}" for what, rows in counts.items() if len(rows))


def read_task(recipe: FinetuneRecipe) -> Task:
    """Read the data of a recipe.

    Raises:
        ConfigError: if a table is not well-formed, there are fewer than two labels, or some are never trained on.
        AudioError: if files are missing.
        UnsupportedError: if the data are events and mir_eval is not installed.
    """
    path = Path(recipe.data.source)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; fine-tuning needs a folder of labels or a CSV file.")
    if not is_event_table(path):
        return Task(read_labelled(path, label_column=recipe.data.label_column))
    if recipe.data.label_column:
        raise ConfigError(f"{path}: the labels of events are in the column label; leave label_column out.")
    require("mir_eval", "scores of events")  # now, not after the training
    return Task(read_events(path))


def choose_fold(task: Task, recipe: FinetuneRecipe) -> int | None:
    """The fold to test: as the recipe says, else the lowest; None if everything is trained on.

    Raises:
        ConfigError: if there is no such fold.
    """
    if recipe.data.fold == NO_FOLD:
        return None
    folds = task.clips.test_folds()
    fold = folds[0] if recipe.data.fold is None else int(recipe.data.fold)
    if fold not in folds:
        raise ConfigError(
            f"{recipe.data.source}: there is no fold {fold} to test, but {named([str(f) for f in folds])}."
        )
    return fold


def choose_parts(task: Task, fold: int | None, recipe: FinetuneRecipe) -> Parts:
    """What is trained on, validated on and tested.

    Validated on is the validation part of the data, if it has one; else, if the recipe has ``patience``, what
    ``LabelledClips.hold_out`` draws; else nothing.

    Raises:
        ConfigError: if a label is never trained on, or there is nothing to validate on though there is ``patience``.
    """
    clips, nothing = task.clips, np.array([], dtype=np.int64)
    if fold is None:
        return Parts(np.arange(len(clips)), nothing, nothing)
    train, test = clips.split(fold)
    targets = clips.targets
    if not targets[test].any():
        raise ConfigError(f"{recipe.data.source}: no clip of the test part has a label, so there is nothing to score.")
    if not (clips.folds == VALIDATION).any() and recipe.training.patience is None:
        return Parts(train, nothing, test)
    train, valid = clips.hold_out(fold)
    if not len(valid):
        raise ConfigError(f"{recipe.data.source}: too few clips to hold any out for validation; leave patience out.")
    if not targets[valid].any():
        raise ConfigError(
            f"{recipe.data.source}: no clip of the validation part has a label, so there is nothing to score."
        )
    untrained = np.flatnonzero(targets[np.concatenate([valid, test])].any(axis=0) & ~targets[train].any(axis=0))
    if len(untrained):
        names = named([clips.label_names[label] for label in untrained])
        raise ConfigError(
            f"{recipe.data.source}: without the validation part there are no clips of {names} to train on."
        )
    return Parts(train, valid, test)


def check_contents(task: Task, parts: Parts, path: Path) -> str:
    """Compare the files' contents; return a hash of all that a run depends on: contents, labels and parts.

    Raises:
        ConfigError: if the same content is in two parts, or in one with different labels; it names the clips.
        AudioError: if files cannot be read; it names them.
    """
    clips = task.clips
    rows = np.concatenate([parts.train, parts.valid, parts.test])
    numbers = np.repeat([_TRAIN, _VALID, _TEST], [len(parts.train), len(parts.valid), len(parts.test)])
    files = [clips.files[row] for row in rows]
    contents = _hash_files(files)
    check_duplicates(files, numbers, contents, path)
    labels = [_labels_of(task, int(row)) for row in rows]
    first: dict[str, int] = {}
    for index, content in enumerate(contents):
        other = first.setdefault(content, index)
        if labels[other] != labels[index]:
            raise ConfigError(f"{path}: {files[other]} and {files[index]} are the same sound with different labels.")
    everything = json.dumps([contents, labels, numbers.tolist(), clips.label_names])
    return hashlib.sha256(everything.encode()).hexdigest()


def notes_on(task: Task, fold: int | None) -> list[str]:
    """What a reader of the test scores should know."""
    if fold is None:
        return []
    clips, notes = task.clips, []
    if shared := clips.shared_groups(fold):
        notes.append(
            f"{len(shared)} groups are in training and in test: {named(shared)}; scores on new ones may be lower."
        )
    absent = np.flatnonzero(~clips.targets[clips.folds == fold].any(axis=0))
    if len(absent):
        names = named([clips.label_names[label] for label in absent])
        notes.append(f"the test part has no clip of {names}, left out of macro-F1 and mAP.")
    return notes


def _labels_of(task: Task, row: int) -> list[object]:
    """What a clip is, as plain values."""
    if isinstance(task.data, LabelledEvents):
        return [list(event) for event in task.data.events[row]]
    return [task.clips.targets[row].nonzero()[0].tolist()]


def _hash_files(files: Sequence[Path]) -> list[str]:
    hashes, problems = [], []
    for file in files:
        try:
            with file.open("rb") as stream:
                hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            problems.append(f"{file} ({error.strerror})")
    if problems:
        raise AudioError(f"{len(problems)} files cannot be read: {named(problems)}.")
    return hashes
