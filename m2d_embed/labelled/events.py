"""Clips with events in time: what sounds from when to when, from a CSV file with a row an event."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m2d_embed.errors import ConfigError
from m2d_embed.labelled.clips import (
    Integers,
    LabelledClips,
    assign_folds,
    locate,
    named,
    read_table,
    require_cells,
    require_columns,
    require_files,
    stated_parts,
)

_EVENT_CELLS = ("label", "onset", "offset")


class Event(NamedTuple):
    """A label, an index into the label names, from ``onset`` to ``offset`` in seconds from the start of the clip."""

    label: int
    onset: float
    offset: float


@dataclass(frozen=True, eq=False)
class LabelledEvents:
    """Sound files, the events in each, and the fold each is tested in.

    Attributes:
        clips: the files with their folds; their labels, (n, L) bool, say which events occur at all.
        events: (n,) the events of each file, by onset.
    """

    clips: LabelledClips
    events: tuple[tuple[Event, ...], ...]

    def __len__(self) -> int:
        return len(self.clips)


def is_event_table(path: Path) -> bool:
    """Whether a path is a CSV file with the columns ``onset`` and ``offset``.

    Raises:
        ConfigError: if it is a file, but not a CSV file that can be read.
    """
    if path.is_dir():
        return False
    columns, _ = read_table(path)
    return "onset" in columns and "offset" in columns


def read_events(path: Path, seed: int = 0) -> LabelledEvents:
    """Read clips with events from a CSV file.

    Its columns are ``file`` (relative to the CSV, or to a folder ``audio`` beside it), ``label``, and ``onset`` and
    ``offset`` in seconds, a row an event. A clip without events has one row with these three empty. ``fold`` or
    ``split``, and ``group``, are as in ``labelled.read_labelled``, and the same in all rows of a clip.

    Args:
        path: the CSV.
        seed: of the folds, if there are none in the table.

    Raises:
        ConfigError: if the CSV is not well-formed or lacks a column, an event ends before it begins, a clip lies in two
            folds, there is no event, or a label would be tested without ever being trained on.
        AudioError: if a file is missing.
    """
    columns, rows = read_table(path)
    require_columns(columns, ("file", *_EVENT_CELLS), path)
    part_column = stated_parts(columns)
    group_column = "group" if "group" in columns else ""
    found: dict[Path, list[tuple[str, float, float]]] = {}
    parts: dict[Path, str] = {}
    groups: dict[Path, str] = {}
    for line, row in rows:
        require_cells(row, ["file", *filter(None, (part_column, group_column))], path, line)
        file = locate(path.parent, row["file"])
        part, group = row.get(part_column, ""), row.get(group_column, "")
        if (parts.setdefault(file, part), groups.setdefault(file, group)) != (part, group):
            raise ConfigError(f"{path}, line {line}: {row['file']} was in another fold, split or group before.")
        events = found.setdefault(file, [])
        if any(row[name] for name in _EVENT_CELLS):
            require_cells(row, _EVENT_CELLS, path, line)
            events.append((row["label"], *_parse_times(row["onset"], row["offset"], path, line)))
    names = tuple(sorted({label for events in found.values() for label, _, _ in events}))
    if not names:
        raise ConfigError(f"{path}: no row has an event.")
    files = tuple(found)
    require_files(files, path)
    index = {name: i for i, name in enumerate(names)}
    indexed = [tuple(Event(index[label], *times) for label, *times in _by_onset(found[file])) for file in files]
    labels = np.array([[any(event.label == i for event in clip) for i in index.values()] for clip in indexed])
    blank: Integers = np.zeros(len(files), dtype=np.int64)
    clips = LabelledClips(files, labels, names, blank, tuple(groups.values()) if group_column else None)
    return LabelledEvents(assign_folds(clips, list(parts.values()), path, seed), tuple(indexed))


def _by_onset(events: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    return sorted(events, key=lambda event: event[1:])


def _parse_times(onset: str, offset: str, path: Path, line: int) -> tuple[float, float]:
    try:
        times = float(onset), float(offset)
    except ValueError:
        raise ConfigError(f"{path}, line {line}: {named([onset, offset])} are not times in seconds.") from None
    if not (0 <= times[0] < times[1] < math.inf):
        raise ConfigError(f"{path}, line {line}: an event from {onset} to {offset} s does not exist.")
    return times
