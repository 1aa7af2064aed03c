"""Labelled clips: from a folder or a CSV file, with the parts they are trained, validated and tested in.

Probes and fine-tuning see a data set through ``LabelledClips`` alone. What would make a score mean something else than
it says (a label that is tested and never trained on, a clip in training and in test) is an error that names it.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m2d_embed.audio.find import find_audio, hint_at_backslashes, is_hidden
from m2d_embed.audio.formats import audio_suffixes
from m2d_embed.errors import AudioError, ConfigError

Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

TRAIN_ONLY = -1
VALIDATION = -2
LABEL_SEPARATOR = ";"
_PARTS = {
    "train": TRAIN_ONLY,
    "training": TRAIN_ONLY,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "val": VALIDATION,
    "test": 0,
    "testing": 0,
}
_PART_COLUMNS = ("fold", "split")
_FOLD = re.compile(r"(?:fold[ _-]?)?(-?\d+)(?:\.0*)?")  # 3, fold3, and 3.0 as pandas writes it
_OTHER_DELIMITERS = re.compile(r"[;\t|]")
_NUM_FOLDS = 5  # of clips that come without folds
_HOLD_OUT_EVERY = 5  # training clips: one in so many is held out for validation
_MIN_FOLDS_TO_ROTATE = 3  # with fewer, holding out the next fold would leave none to train on
_MIN_A_LABEL = 2  # clips a thinned label keeps: one to train on, one to test
_NAMED = 5  # things a message lists at most


@dataclass(frozen=True, eq=False)
class LabelledClips:
    """Sound files, what each is, and the fold each is tested in.

    Attributes:
        files: (n,) paths.
        labels: (n,) int64 indices into ``label_names``; or, if clips have any number of labels, (n, L) bool.
        label_names: sorted, L of them.
        folds: (n,) int64; a clip is tested by what all other folds teach. -1 is only ever trained on, -2 is the
            validation part: settings are chosen on it, and it is trained on where nothing is left to choose.
        groups: (n,) names of what must not be in training and in test, e.g. speakers; None if unknown.
    """

    files: tuple[Path, ...]
    labels: Integers | Bools
    label_names: tuple[str, ...]
    folds: Integers
    groups: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def multi_label(self) -> bool:
        """Whether a clip has any number of labels, not exactly one."""
        return self.labels.ndim == 2

    @property
    def targets(self) -> Bools:
        """(n, L) bool: which labels each clip has."""
        if self.labels.ndim == 2:
            return self.labels.astype(bool)
        one_hot: Bools = np.arange(len(self.label_names)) == self.labels[:, None]
        return one_hot

    def test_folds(self) -> list[int]:
        """The folds that are tested, in ascending order."""
        return [int(fold) for fold in np.unique(self.folds[self.folds >= 0])]

    def splits(self) -> Iterator[tuple[Integers, Integers]]:
        """Yield the indices of the training clips (validation included) and of the test clips of each fold."""
        for fold in self.test_folds():
            yield self.split(fold)

    def split(self, fold: int) -> tuple[Integers, Integers]:
        """Indices of the clips that one fold is trained on (validation included), and of those tested.

        Raises:
            ConfigError: if there is no such fold.
        """
        if fold not in self.test_folds():
            raise ConfigError(f"fold {fold} does not exist; there are {named([str(f) for f in self.test_folds()])}.")
        return np.flatnonzero(self.folds != fold), np.flatnonzero(self.folds == fold)

    def hold_out(self, fold: int) -> tuple[Integers, Integers]:
        """Indices of the training clips of a fold in two parts: to train on, and to choose settings on.

        The second is the validation part if the data has one; else, of three or more folds, the next one, as in HEAR
        (Turian et al., arXiv 2203.03022); else a fifth of the training clips, label after label, and whole groups where
        the test part consists of whole groups. It is empty if there are too few clips to hold any out.

        Raises:
            ConfigError: if there is no such fold.
            UnsupportedError: if whole groups are to be drawn and scikit-learn is not installed.
        """
        train, test = self.split(fold)
        folds = self.test_folds()
        if (self.folds == VALIDATION).any():
            held_out = self.folds[train] == VALIDATION
        elif len(folds) >= _MIN_FOLDS_TO_ROTATE:
            held_out = self.folds[train] == folds[(folds.index(fold) + 1) % len(folds)]
        else:
            held_out = self._draw_validation(train, test)
        return train[~held_out], train[held_out]

    def select(self, indices: Integers) -> LabelledClips:
        """Only these clips, in this order, with all label names."""
        return LabelledClips(
            tuple(self.files[i] for i in indices),
            self.labels[indices],
            self.label_names,
            self.folds[indices],
            tuple(self.groups[i] for i in indices) if self.groups is not None else None,
        )

    def shared_groups(self, fold: int) -> list[str]:
        """Groups that a fold has both in training and in test; none if groups are unknown."""
        if self.groups is None:
            return []
        tested = self.folds == fold
        return sorted(set(compress(self.groups, tested)) & set(compress(self.groups, ~tested)))

    def _draw_validation(self, train: Integers, test: Integers) -> Bools:
        strata = _strata(self)[train]
        if self.groups is None or self.shared_groups(int(self.folds[test[0]])):
            return _every_fifth(strata)
        parts = _grouped_parts(strata, [self.groups[i] for i in train])
        held_out = parts == 0
        return held_out if not held_out.all() else np.zeros(len(train), dtype=bool)


@dataclass(frozen=True)
class Row:
    """A clip as a table states it: ``label`` is as written, ``part`` its fold or split; "" if the table has none."""

    file: Path
    label: str
    part: str = ""
    group: str = ""


def read_labelled(path: Path, limit: int | None = None, seed: int = 0, label_column: str = "") -> LabelledClips:
    """Read what is to be classified: a folder with one sub-folder a label, or a CSV file.

    The CSV has a column ``file`` (relative to the CSV, or to a folder ``audio`` beside it), and a column ``label``, or
    ``labels`` where a clip has any number of them, separated by ``;``; a ``;`` in a cell of ``label`` means so, too.
    Official parts are in a column ``fold`` or ``split``: whole numbers, or ``train``, ``valid`` and ``test``. Without
    them there are five folds, drawn by ``seed``, each with its share of every label, and with whole groups if there
    is a column ``group``.

    Args:
        path: the folder or CSV.
        limit: at most so many clips, drawn by ``seed`` in proportion from every label and its folds; each label keeps
            at least two.
        seed: of the folds and the draw.
        label_column: the column of the labels, if it has another name.

    Raises:
        ConfigError: if the CSV is not well-formed or lacks a column, there are fewer than two labels, a label would be
            tested without ever being trained on, or ``limit`` is less than two clips a label.
        AudioError: if a file is missing, or a sub-folder holds no audio.
        UnsupportedError: if groups are to be drawn and scikit-learn is not installed.
    """
    if path.is_dir():
        if label_column:
            raise ConfigError(f"{path}: a folder has no column {label_column!r}; its labels are its sub-folders.")
        rows, several = _folder_rows(path), False
    else:
        rows, several = _csv_rows(path, label_column)
    names, labels = _labels(rows, several)
    if len(names) < 2:
        hint = f" Did you mean {path / 'metadata.csv'}?" if (path / "metadata.csv").is_file() else ""
        found = f"all clips are {names[0]!r}" if names else "no clip has any"
        raise ConfigError(f"{path}: at least two labels are needed, but {found}.{hint}")
    groups = tuple(row.group for row in rows) if any(row.group for row in rows) else None
    blank = np.zeros(len(rows), dtype=np.int64)
    clips = LabelledClips(tuple(row.file for row in rows), labels, names, blank, groups)
    clips = assign_folds(clips, [row.part for row in rows], path, seed)
    if limit is None or limit >= len(clips):
        return clips
    thinned = _thin(clips, limit, seed)
    if not thinned.test_folds():  # possible only if there are three parts, of which a label keeps two
        raise ConfigError(f"{path}: of {limit} clips none would be left to test; take more.")
    if untrained := _untrained(thinned):  # possible only if a clip has several labels
        raise ConfigError(
            f"{path}: of {limit} clips none of {named(untrained)} would be left to train on, but some to test; "
            "take more."
        )
    return thinned


def check_contents(clips: LabelledClips, contents: Sequence[str], path: Path) -> None:
    """Refuse clips of the same content in different parts of the data, or with different labels.

    Copies with the same labels inside a part are no more than superfluous.

    Args:
        clips: what the files are.
        contents: (n,) a hash of what each file holds.
        path: of the data, for the message.

    Raises:
        ConfigError: if the same content lies in more than one part of the data, or has different labels; it names
            the clips.
    """
    check_duplicates(clips.files, clips.folds, contents, path)
    targets = clips.targets
    differing = [found for found in _copies(contents) if (targets[found] != targets[found[0]]).any()]
    if differing:
        pairs = _equal_files(clips.files, differing, path)
        raise ConfigError(f"{path}: clips of the same content have different labels: {named(pairs)}. Which are right?")


def check_duplicates(files: Sequence[Path], folds: Integers, contents: Sequence[str], path: Path) -> None:
    """Raise ConfigError if the same content lies in more than one part of the data, which it names.

    Args:
        files: (n,) paths.
        folds: (n,) the part of each.
        contents: (n,) a hash of what each file holds.
        path: of the data, for the message.
    """
    crossing = [found for found in _copies(contents) if len({int(folds[i]) for i in found}) > 1]
    if crossing:
        raise ConfigError(
            f"{path}: {len(crossing)} clips lie in more than one part (fold or split), so the test part would be known "
            f"from training: {named(_equal_files(files, crossing, path))}. Remove the copies, or keep each in one part."
        )


def _equal_files(files: Sequence[Path], copies: Sequence[Sequence[int]], path: Path) -> list[str]:
    """``a.wav = b.wav`` for each content, as the data at ``path`` names them: other folders have clips of that name."""
    folder = path if path.is_dir() else path.parent
    shown = [str(file.relative_to(folder) if file.is_relative_to(folder) else file) for file in files]
    return [" = ".join(shown[i] for i in found) for found in copies]


def _copies(contents: Sequence[str]) -> list[list[int]]:
    """The indices of each content that is there more than once."""
    by_content: dict[str, list[int]] = defaultdict(list)
    for index, content in enumerate(contents):
        by_content[content].append(index)
    return [found for found in by_content.values() if len(found) > 1]


def assign_folds(clips: LabelledClips, parts: Sequence[str], path: Path, seed: int) -> LabelledClips:
    """The clips with the folds that a table states for each, or, if all of ``parts`` are empty, with drawn ones.

    Raises:
        ConfigError: if the parts make no sense, or a label would be tested without ever being trained on.
    """
    folds = parse_parts(parts, path) if any(parts) else _draw_folds(clips, seed)
    assigned = dataclasses.replace(clips, folds=folds)
    _check_folds(assigned, path)
    return assigned


def parse_parts(parts: Sequence[str], path: Path) -> Integers:
    """(n,) folds from what a table states: whole numbers from 0, perhaps after the word fold, or train, valid and test.

    Raises:
        ConfigError: if they are neither, or leave nothing to train on or to test.
    """
    words = [part.lower() for part in parts]
    found = named(sorted(set(parts)))
    if any(word in _PARTS for word in words):
        unknown = sorted({part for part, word in zip(parts, words, strict=True) if word not in _PARTS})
        if unknown:
            raise ConfigError(f"{path}: parts are train, valid and test, not {named(unknown)}.")
        folds = np.array([_PARTS[word] for word in words], dtype=np.int64)
        if not (folds == TRAIN_ONLY).any() or not (folds == 0).any():
            raise ConfigError(f"{path}: a train and a test part are needed, not {found} alone.")
        return folds
    numbers = [_FOLD.fullmatch(word) for word in words]
    if None in numbers:
        raise ConfigError(f"{path}: folds are whole numbers, or train, valid and test, not {found}.")
    folds = np.array([int(number[1]) for number in numbers if number], dtype=np.int64)
    if folds.min() < TRAIN_ONLY or len(np.unique(folds)) < 2:
        raise ConfigError(f"{path}: two or more folds numbered from 0 are needed, not {found}.")
    return folds


# --- reading ----------------------------------------------------------------------------------------------------------


def _folder_rows(folder: Path) -> list[Row]:
    """One sub-folder a label; hidden ones are not labels."""
    entries = sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))
    endings = audio_suffixes()
    loose = [entry.name for entry in entries if entry.suffix.lower() in endings and entry.is_file()]
    if loose:
        raise ConfigError(f"{folder}: {named(loose)} lie outside the sub-folders, so their label is unknown.")
    labels = [entry for entry in entries if entry.is_dir()]
    if not labels:
        raise ConfigError(f"{folder}: no sub-folders; one for each label is needed, or give a CSV file.")
    return [Row(file, file.relative_to(folder).parts[0]) for file in find_audio(labels)]


def _csv_rows(path: Path, label_column: str) -> tuple[list[Row], bool]:
    """The rows, and whether a clip may have any number of labels."""
    columns, cells = read_table(path)
    name = label_column or ("labels" if "labels" in columns and "label" not in columns else "label")
    require_columns(columns, ("file", name), path)
    part = stated_parts(columns)
    group = "group" if "group" in columns else ""
    several = name == "labels" or any(LABEL_SEPARATOR in row[name] for _, row in cells)
    needed = ["file", *([] if several else [name]), *filter(None, (part, group))]
    rows = []
    for line, row in cells:
        require_cells(row, needed, path, line)
        rows.append(Row(locate(path.parent, row["file"]), row[name], row.get(part, ""), row.get(group, "")))
    doubled = [str(file) for file, times in Counter(row.file for row in rows).items() if times > 1]
    if doubled:
        hint = (
            "" if several else f" Several labels of one clip are written in one cell, separated by {LABEL_SEPARATOR!r}."
        )
        raise ConfigError(f"{path}: a clip has one row, but {named(doubled)} have several.{hint}")
    require_files([row.file for row in rows], path)
    return rows, several


def read_table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a CSV file, and of each row its line number and its cells, stripped.

    Raises:
        ConfigError: if it cannot be read, is not a CSV file in UTF-8 with commas, a column is there twice, a row has
            too many cells, or there are no rows.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            rows = list(_cells(reader, path))
            columns = list(reader.fieldnames or [])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a CSV file in UTF-8 ({error}).") from error
    if doubled := [name for name, times in Counter(columns).items() if times > 1]:
        raise ConfigError(f"{path}: the column {doubled[0]!r} is there {columns.count(doubled[0])} times.")
    if not rows:
        raise ConfigError(f"{path}: no rows under the column names.")
    if len(columns) == 1 and (other := _OTHER_DELIMITERS.search(columns[0])):
        raise ConfigError(f"{path}: its cells are separated by {other[0]!r}; save it with commas.")
    return columns, rows


def _cells(reader: csv.DictReader[str], path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for row in reader:
        if row.get(None) is not None:  # where DictReader puts surplus cells
            count = len(reader.fieldnames or [])
            raise ConfigError(f"{path}, line {reader.line_num}: more than {count} cells; quote commas in a cell.")
        yield reader.line_num, {name: (cell or "").strip() for name, cell in row.items()}


def stated_parts(columns: Sequence[str]) -> str:
    """The column of a table that states the part each clip is in; "" if there is none."""
    return next((column for column in _PART_COLUMNS if column in columns), "")


def require_columns(columns: Sequence[str], needed: Sequence[str], path: Path) -> None:
    """Raise ConfigError if a table lacks a column."""
    for name in needed:
        if name not in columns:
            raise ConfigError(f"{path}: the column {name!r} is missing; there are {named(columns)}.")


def require_cells(row: dict[str, str], needed: Sequence[str], path: Path, line: int) -> None:
    """Raise ConfigError if one of these cells of a row is empty."""
    for name in needed:
        if not row[name]:
            raise ConfigError(f"{path}, line {line}: the column {name!r} is empty.")


def require_files(files: Sequence[Path], path: Path) -> None:
    """Raise AudioError if files that a table names are missing."""
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        hint = hint_at_backslashes(missing[0])
        raise AudioError(f"{path}: {len(missing)} of {len(files)} files are missing: {named(missing)}.{hint}")


def locate(folder: Path, name: str) -> Path:
    """A file that a table in ``folder`` names: beside the table, or in the folder ``audio`` there."""
    file, below = folder / name, folder / "audio" / name
    return below if below.is_file() and not file.is_file() else file


def _labels(rows: Sequence[Row], several: bool) -> tuple[tuple[str, ...], Integers | Bools]:
    """The label names, and each row's label or labels."""
    if not several:
        names = tuple(sorted({row.label for row in rows}))
        index = {name: i for i, name in enumerate(names)}
        return names, np.array([index[row.label] for row in rows], dtype=np.int64)
    split = [{part.strip() for part in row.label.split(LABEL_SEPARATOR)} - {""} for row in rows]
    names = tuple(sorted(set().union(*split)))
    return names, np.array([[name in labels for name in names] for labels in split], dtype=bool)


# --- folds ------------------------------------------------------------------------------------------------------------


def _strata(clips: LabelledClips) -> Integers:
    """What clips are drawn in proportion of: their label; of several the rarest; of none a stratum of its own."""
    if clips.labels.ndim == 1:
        return clips.labels.astype(np.int64)
    counts = np.where(clips.labels, clips.labels.sum(axis=0), len(clips) + 1)
    return np.where(clips.labels.any(axis=1), counts.argmin(axis=1), len(clips.label_names)).astype(np.int64)


def _draw_folds(clips: LabelledClips, seed: int) -> Integers:
    """Deal the clips out to the folds, label after label; whole groups if they are known."""
    strata = _strata(clips)
    if clips.groups is not None:
        return _grouped_parts(strata, clips.groups, seed)
    order = np.random.default_rng(seed).permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    folds = np.empty_like(strata)
    folds[order] = np.arange(len(strata)) % _NUM_FOLDS
    return folds


def _grouped_parts(strata: Integers, groups: Sequence[str], seed: int = 0) -> Integers:
    """(n,) numbers of up to five parts that consist of whole groups, each with about its share of every stratum."""
    import warnings

    from m2d_embed.extras import require_sklearn

    require_sklearn("folds of whole groups")
    from sklearn.model_selection import StratifiedGroupKFold

    names = np.unique(groups)
    parts = np.zeros(len(strata), dtype=np.int64)
    if len(names) < 2:
        return parts
    folds = StratifiedGroupKFold(min(_NUM_FOLDS, len(names)), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of labels with fewer clips than folds, which are checked after
        for part, (_, chosen) in enumerate(folds.split(np.zeros(len(strata)), strata, groups)):
            parts[chosen] = part
    return parts


def _every_fifth(strata: Integers) -> Bools:
    """A mask of every fifth clip, label after label, leaving at least one of each label to train on."""
    order = np.random.default_rng(0).permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    is_first = np.diff(strata[order], prepend=-1) != 0
    mask = np.zeros(len(strata), dtype=bool)
    mask[order] = (np.arange(len(strata)) % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1) & ~is_first
    return mask


def _check_folds(clips: LabelledClips, path: Path) -> None:
    if not len(clips.split(clips.test_folds()[0])[0]):
        raise ConfigError(
            f"{path}: all clips are of one group, and groups are kept whole, so there are none to train on; give them "
            "several groups, or a column fold."
        )
    if untrained := _untrained(clips):
        raise ConfigError(
            f"{path}: all clips of {named(untrained)} are in the same test part, so there are none to train on; "
            "add some, move one to another part, or leave the label out."
        )


def _untrained(clips: LabelledClips) -> list[str]:
    """Labels that a fold tests without training on them."""
    targets = clips.targets
    missing = np.zeros(len(clips.label_names), dtype=bool)
    for train, test in clips.splits():
        missing |= targets[test].any(axis=0) & ~targets[train].any(axis=0)
    return [clips.label_names[label] for label in np.flatnonzero(missing)]


def _thin(clips: LabelledClips, limit: int, seed: int) -> LabelledClips:
    """Draw ``limit`` clips; the first two of a label are of two folds, so it is trained on where it is tested."""
    needed = _MIN_A_LABEL * len(clips.label_names)
    if limit < needed:
        raise ConfigError(f"{limit} clips of {len(clips.label_names)} labels are too few; take {needed} or more.")
    strata = _strata(clips)
    shuffled = np.random.default_rng(seed).permutation(len(clips))
    parts = clips.folds - min(TRAIN_ONLY, VALIDATION)
    by_fold = _rank_in_group(strata[shuffled] * (parts.max() + 1) + parts[shuffled], first=1)
    shuffled = shuffled[np.argsort(by_fold, kind="stable")]
    by_label = _rank_in_group(strata[shuffled], first=_MIN_A_LABEL)
    return clips.select(np.sort(shuffled[np.argsort(by_label, kind="stable")[:limit]]))


def _rank_in_group(groups: Integers, first: int) -> npt.NDArray[np.float64]:
    """How far each element comes in its group, from 0 to 1; 0 for the ``first`` ones.

    Sorted by it, every beginning of the list holds the groups in proportion, and small groups, too.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    place = np.empty(len(groups))
    place[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.where(place < first, 0.0, (place + 0.5) / sizes[group])


def named(names: Sequence[str]) -> str:
    """The first few of some names, for a message."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(repr(name) for name in names[:_NAMED]) + more
