"""What a run is trained on: a folder or a CSV manifest -> items."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from m2d_embed.audio.clips import find_audio
from m2d_embed.errors import ConfigError

_REQUIRED_COLUMN = "file"
_LABEL_SEPARATOR = ";"
_ARCHIVES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Item:
    """One file to train on.

    ``weight`` is how often it is drawn, relative to others; ``features`` a ``.npy`` of (T', D) frame features.
    """

    file: Path
    weight: float = 1.0
    labels: tuple[str, ...] = ()
    caption: str = ""
    features: Path | None = None


class ItemTable(Sequence[Item]):
    """Items in two arrays: millions of them fit in memory, and reach the data workers at the price of one copy."""

    def __init__(self, items: Iterable[Item]):
        rows = []
        weights = []
        for item in items:
            features = None if item.features is None else str(item.features)
            rows.append(json.dumps([str(item.file), item.labels, item.caption, features]).encode())
            weights.append(item.weight)
        self.weights: npt.NDArray[np.float64] = np.array(weights, dtype=np.float64)
        self._ends: npt.NDArray[np.int64] = np.cumsum([len(row) for row in rows], dtype=np.int64)
        self._text: npt.NDArray[np.uint8] = np.frombuffer(b"".join(rows), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        file, labels, caption, features = json.loads(self._text[start : self._ends[index]].tobytes())
        return Item(
            Path(file), float(self.weights[index]), tuple(labels), caption, None if features is None else Path(features)
        )


def read_source(source: str) -> list[Item]:
    """Items of a folder, searched recursively, or of a ``.csv`` manifest.

    A manifest has a column ``file`` with paths relative to the manifest, and may have ``weight`` (0 or more),
    ``labels`` (separated by ``;``), ``caption`` and ``features`` (a ``.npy`` of frame features, relative as well).
    Other columns are its owner's business. Whether the files can be read is found out when they are.

    Raises:
        ConfigError: if the manifest is missing, empty or not well-formed; it names the row and the column.
        AudioError: if the folder does not exist or holds no audio.
    """
    path = Path(source)
    if path.suffix.lower() != ".csv":
        return [Item(file) for file in find_audio([path])]
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            items = list(_manifest_rows(csv.DictReader(stream, strict=True), path))
    except OSError as error:
        raise ConfigError(f"{source}: this manifest cannot be read ({error.strerror}).") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: not a CSV file in UTF-8 ({error}).") from error
    if not items:
        raise ConfigError(f"{source}: the manifest has no rows.")
    return items


def _manifest_rows(reader: csv.DictReader[str], path: Path) -> Iterator[Item]:
    columns = list(reader.fieldnames or [])
    if _REQUIRED_COLUMN not in columns:
        raise ConfigError(f"{path}: the manifest lacks the column {_REQUIRED_COLUMN!r}; it has {columns}.")
    doubled = {name for name in columns if columns.count(name) > 1}
    if doubled:
        raise ConfigError(f"{path}: columns with the same name: {', '.join(sorted(doubled))}.")
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        # DictReader puts surplus cells under the key None, and None in missing cells.
        if row.get(None) is not None or None in row.values():
            raise ConfigError(
                f"{where}: {len(columns)} columns expected, as in the first line; quote commas in a cell."
            )
        if not row[_REQUIRED_COLUMN].strip():
            raise ConfigError(f"{where}: the column 'file' is empty.")
        features = row.get("features", "").strip()
        yield Item(
            file=path.parent / row[_REQUIRED_COLUMN].strip(),
            weight=_weight(row.get("weight", "1"), where),
            labels=tuple(filter(None, map(str.strip, row.get("labels", "").split(_LABEL_SEPARATOR)))),
            caption=row.get("caption", "").strip(),
            features=path.parent / features if features else None,
        )


def _weight(cell: str, where: str) -> float:
    try:
        weight = float(cell)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ConfigError(f"{where}: the column 'weight' is {cell!r}; it must be a number, 0 or more.")
    return weight


def is_shards(source: str) -> bool:
    """Whether a source is tar shards, judged by its name.

    Raises:
        ConfigError: if it is an address of a kind that is not read.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", source.strip())  # two letters or more: C: is a drive
    if scheme is None:
        return source.strip().lower().endswith(_ARCHIVES)
    if scheme[1].lower() not in ("http", "https"):
        raise ConfigError(
            f"{source!r}: {scheme[1]}: is not read; name local files, or shards by their http(s) addresses."
        )
    return True
