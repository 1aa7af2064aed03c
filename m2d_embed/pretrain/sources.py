"""What a run is trained on: a folder or a CSV manifest -> items, and the order they come in.

Everything random in a run is keyed by its seed and by a *position*, the number of a sample in the endless stream of the
run, never by a worker, a process or the order of calls. So a run is the same for any number of workers and processes,
and going on with one means starting at another position: no state of a random generator is ever saved.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from m2d_embed.audio import find_audio
from m2d_embed.errors import ConfigError

_WORD = (1 << 64) - 1
_REQUIRED_COLUMN = "file"
_LABEL_SEPARATOR = ";"
_ARCHIVES = (".tar", ".tar.gz", ".tgz")


class Purpose(IntEnum):
    """What random numbers are for; each purpose has a stream of its own."""

    ORDER = 0
    CROP = 1
    MASK = 2
    NOISE = 3
    REPLACE = 4
    SHARDS = 5
    SHUFFLE = 6


def rng_at(seed: int, position: int, purpose: Purpose) -> np.random.Generator:
    """The random generator of one sample of a run; independent of those of other positions and purposes.

    Args:
        seed: of the run; its low 64 bits count.
        position: number of the sample, or of the epoch, from 0.
        purpose: what the numbers are for.
    """
    # Word 0 of the counter counts the numbers drawn: 2 ** 64 blocks before the next position's begin.
    bits = np.random.Philox(key=[seed & _WORD, int(purpose)], counter=[0, position & _WORD, 0, 0])
    return np.random.Generator(bits)


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


def order_of_epoch(weights: npt.NDArray[np.float64], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Indices of the items in the order in which one epoch takes them.

    Items of equal weight come once each. Otherwise an item of weight ``w`` comes ``n * w / sum(weights)`` times, that
    number rounded up or down at random.

    Args:
        weights: (n,), none negative.
        seed: of the run.
        epoch: its number, from 0.

    Returns:
        (n,) int64.

    Raises:
        ConfigError: if there are no items, or all weights are zero.
    """
    rng = rng_at(seed, epoch, Purpose.ORDER)
    n = len(weights)
    if n == 0:
        raise ConfigError("There are no items to train on.")
    if weights.min() == weights.max() > 0:
        return rng.permutation(n)
    ends = np.cumsum(weights)
    if not 0 < ends[-1] < math.inf:
        raise ConfigError("The weights of the items add up to nothing (or to infinity), so none could be drawn.")
    # Systematic draws: evenly spaced points from a random start, so luck moves no item's count by more than one.
    drawn = np.searchsorted(ends, (rng.random() + np.arange(n)) * (ends[-1] / n), side="right")
    # Rounding may put the last point at the very end.
    order: npt.NDArray[np.int64] = np.minimum(drawn, np.flatnonzero(weights)[-1])
    rng.shuffle(order)
    return order


class ItemOrder:
    """Which item is at which position of the endless stream."""

    def __init__(self, weights: npt.NDArray[np.float64], seed: int):
        self.weights = weights
        self.seed = seed
        self._ends = np.cumsum(weights)
        self._orders: dict[int, npt.NDArray[np.int64]] = {0: order_of_epoch(weights, seed, 0)}  # raises on bad weights

    def item_at(self, position: int) -> int:
        """Index of the item at ``position``."""
        epoch, place = divmod(position, len(self.weights))
        if epoch not in self._orders:
            for old in sorted(self._orders)[:-1]:  # a batch may reach over the end of an epoch: two are kept
                del self._orders[old]
            self._orders[epoch] = order_of_epoch(self.weights, self.seed, epoch)
        return int(self._orders[epoch][place])

    def draw(self, rng: np.random.Generator) -> int:
        """Index of one item drawn by weight."""
        drawn = int(np.searchsorted(self._ends, rng.random() * self._ends[-1], side="right"))
        return min(drawn, int(np.flatnonzero(self.weights)[-1]))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_orders": {}}


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
