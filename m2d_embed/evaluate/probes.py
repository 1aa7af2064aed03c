"""Quick probes of an encoder on labelled clips: nearest neighbours, and a linear classifier.

Both see every feature standardised with the mean and standard deviation of the training rows, and give the share of
clips named rightly, over all test folds together. They are for comparing checkpoints within a run: pre-training calls
them every so many steps.
"""

from __future__ import annotations

import csv
import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from m2d_embed.audio import AUDIO_SUFFIXES, find_audio
from m2d_embed.errors import AudioError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from m2d_embed.model import M2D

Vectors = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

TRAIN_ONLY = -1
_NUM_FOLDS = 5  # of clips that come without folds
_HOLD_OUT_EVERY = 5  # training rows: one in so many chooses the regularisation
_TOLERANCE = 1e-3  # of the fit: a tenth of it takes three times as long and moves the accuracy by less than its error
_MAX_ITERATIONS = 200
_MIN_A_LABEL = 2  # clips a thinned label keeps: one to train on, one to test
_ROWS_AT_A_TIME = 1024  # test rows compared with all training rows together
_LEAST_VOTE = 1e-6  # of a neighbour that is not similar at all: without any, such neighbours could not outvote label 0
_NAMED = 5  # things a message lists at most


@dataclass(frozen=True, eq=False)
class LabelledClips:
    """Sound files, what each is, and the fold each is tested in.

    Attributes:
        files: (n,) paths.
        labels: (n,) int64 indices into ``label_names``.
        label_names: sorted.
        folds: (n,) int64; a clip is tested by what all other folds teach. -1 is only ever trained on.
    """

    files: tuple[Path, ...]
    labels: Integers
    label_names: tuple[str, ...]
    folds: Integers

    def __len__(self) -> int:
        return len(self.files)

    def splits(self) -> Iterator[tuple[Integers, Integers]]:
        """Yield the indices of the training clips and of the test clips of each fold."""
        for fold in np.unique(self.folds[self.folds != TRAIN_ONLY]):
            yield np.flatnonzero(self.folds != fold), np.flatnonzero(self.folds == fold)


@dataclass(frozen=True)
class _Row:
    """A labelled clip as written down; ``part`` is its fold or split in the CSV, "" if that has none."""

    file: Path
    label: str
    part: str = ""


def read_labelled(path: Path, limit: int | None = None, seed: int = 0) -> LabelledClips:
    """Read what is to be classified: a folder with one sub-folder a label, or a CSV file.

    The CSV has a column ``file`` (relative to the CSV, or to a folder ``audio`` beside it), a column ``label`` and,
    if it has official folds, ``fold`` or ``split``: whole numbers, or words of which ``test`` is the test part and
    everything else is trained on. Without folds there are five, drawn by ``seed``, each with its share of every label.

    Args:
        path: the folder or CSV.
        limit: at most so many clips, drawn by ``seed`` in proportion from every label and its folds; each label keeps
            at least two.
        seed: of the folds and the draw.

    Raises:
        ConfigError: if the CSV is not well-formed or lacks a column, there are fewer than two labels, a label would be
            tested without ever being trained on, or ``limit`` is less than two clips a label.
        AudioError: if a file is missing, or a sub-folder holds no audio.
    """
    rows = _folder_rows(path) if path.is_dir() else _csv_rows(path)
    label_names = tuple(sorted({row.label for row in rows}))
    if len(label_names) < 2:
        hint = f" Did you mean {path / 'metadata.csv'}?" if (path / "metadata.csv").is_file() else ""
        raise ConfigError(f"{path}: at least two labels are needed, but all clips are {label_names[0]!r}.{hint}")
    index = {name: i for i, name in enumerate(label_names)}
    labels = np.array([index[row.label] for row in rows], dtype=np.int64)
    parts = [row.part for row in rows]
    folds = _parse_folds(parts, path) if any(parts) else _draw_folds(labels, seed)
    clips = LabelledClips(tuple(row.file for row in rows), labels, label_names, folds)
    _check_folds(clips, path)
    return clips if limit is None or limit >= len(clips) else _thin(clips, limit, seed)


def knn_accuracy(embeddings: Vectors, clips: LabelledClips, k: int = 10) -> float:
    """Share of the tested clips whose nearest training clips name them rightly.

    Neighbours are the ``k`` of highest cosine similarity; each votes with its similarity.

    Args:
        embeddings: (n, D) float32, one row a clip.
        clips: what they are.
        k: neighbours asked; fewer if there are not so many training clips.

    Raises:
        ConfigError: if ``embeddings`` do not fit ``clips`` or are not finite, or ``k`` is not positive.
    """
    if k < 1:
        raise ConfigError(f"k must be 1 or more neighbours, not {k}.")
    _check_embeddings(embeddings, clips)
    right = 0
    for train, test in clips.splits():
        trained, tested = map(_unit, _standardise(embeddings[train], embeddings[test]))
        for start in range(0, len(test), _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            votes = _votes(tested[rows] @ trained.T, clips.labels[train], len(clips.label_names), k)
            right += int((votes.argmax(axis=1) == clips.labels[test[rows]]).sum())
    return right / _num_tested(clips)


def linear_probe_accuracy(
    embeddings: Vectors, clips: LabelledClips, strengths: Sequence[float] = (0.01, 0.1, 1.0)
) -> float:
    """Share of the tested clips that a multinomial logistic regression names rightly.

    Args:
        embeddings: (n, D) float32, one row a clip.
        clips: what they are.
        strengths: scikit-learn's ``C`` to choose from, in ascending order: the larger, the weaker the L2
            regularisation. Each fold takes the one of least log-loss on a fifth of its training clips when fitted to
            the others; the first, if there are too few clips to hold any out.

    Raises:
        ConfigError: if ``embeddings`` do not fit ``clips`` or are not finite, or a strength is not positive.
        UnsupportedError: if scikit-learn is not installed.
    """
    if not strengths or min(strengths) <= 0:
        raise ConfigError(f"strengths must be one or more positive numbers, not {tuple(strengths)}.")
    if importlib.util.find_spec("sklearn") is None:
        raise UnsupportedError("the linear probe needs scikit-learn: pip install 'm2d-embed[pretrain]'")
    _check_embeddings(embeddings, clips)
    right = 0
    for train, test in clips.splits():
        x, x_test = _standardise(embeddings[train], embeddings[test])
        x, x_test = _rotate(x, x_test)
        y = clips.labels[train]
        (classifier,) = _classifiers(x, y, [_choose_strength(x, y, strengths)])
        right += int((classifier.predict(x_test) == clips.labels[test]).sum())
    return right / _num_tested(clips)


def embed_clips(model: M2D, clips: LabelledClips, batch_size: int = 32) -> Vectors:
    """Scene embeddings of all clips, (n, D) float32, in evaluation mode; the model's own mode is put back.

    Raises:
        AudioError: if a file cannot be read; it names it.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return np.asarray(model.encode(clips.files, batch_size), dtype=np.float32)
    finally:
        for module, training in modes:
            module.training = training


# --- reading ----------------------------------------------------------------------------------------------------------


def _folder_rows(folder: Path) -> list[_Row]:
    """One sub-folder a label; hidden ones are not labels."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    loose = [entry.name for entry in entries if entry.suffix.lower() in AUDIO_SUFFIXES and entry.is_file()]
    if loose:
        raise ConfigError(f"{folder}: {_list(loose)} lie outside the sub-folders, so their label is unknown.")
    labels = [entry for entry in entries if entry.is_dir()]
    if not labels:
        raise ConfigError(f"{folder}: no sub-folders; one for each label is needed, or give a CSV file.")
    return [_Row(file, label.name) for label in labels for file in find_audio([label])]


def _csv_rows(path: Path) -> list[_Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(_parse_rows(csv.DictReader(stream, strict=True), path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a CSV file in UTF-8 ({error}).") from error
    if not rows:
        raise ConfigError(f"{path}: no rows under the column names.")
    doubled = [str(file) for file, times in Counter(row.file for row in rows).items() if times > 1]
    if doubled:
        raise ConfigError(f"{path}: a clip has one row and one label, but {_list(doubled)} have several.")
    missing = [str(row.file) for row in rows if not row.file.is_file()]
    if missing:
        raise AudioError(f"{path}: {len(missing)} of {len(rows)} files are missing: {_list(missing)}.")
    return rows


def _parse_rows(reader: csv.DictReader[str], path: Path) -> Iterator[_Row]:
    columns = list(reader.fieldnames or [])
    for needed in ("file", "label"):
        if needed not in columns:
            raise ConfigError(f"{path}: the column {needed!r} is missing; there are {_list(columns)}.")
    part = next((name for name in ("fold", "split") if name in columns), None)
    used = ["file", "label", *([part] if part else [])]
    for row in reader:
        cells = [(row[name] or "").strip() for name in used]
        if not all(cells):
            empty = used[cells.index("")]
            raise ConfigError(f"{path}, line {reader.line_num}: the column {empty!r} is empty.")
        if row.get(None) is not None:  # where DictReader puts surplus cells
            raise ConfigError(
                f"{path}, line {reader.line_num}: more than {len(columns)} cells; quote commas in a cell."
            )
        yield _Row(_locate(path.parent, cells[0]), *cells[1:])


def _locate(folder: Path, name: str) -> Path:
    """Beside the CSV, or in the folder ``audio`` there."""
    file, below = folder / name, folder / "audio" / name
    return below if below.is_file() and not file.is_file() else file


# --- folds ------------------------------------------------------------------------------------------------------------


def _parse_folds(parts: list[str], path: Path) -> Integers:
    words = [part.lower() for part in parts]
    if "test" in words:
        return np.array([0 if word == "test" else TRAIN_ONLY for word in words], dtype=np.int64)
    try:
        folds = np.array([int(word) for word in words], dtype=np.int64)
    except ValueError:
        raise ConfigError(
            f"{path}: folds are whole numbers, or words one of which is 'test', not {_list(sorted(set(parts)))}."
        ) from None
    if folds.min() < TRAIN_ONLY or len(np.unique(folds)) < 2:
        raise ConfigError(f"{path}: two or more folds numbered from 0 are needed, not {_list(sorted(set(parts)))}.")
    return folds


def _draw_folds(labels: Integers, seed: int) -> Integers:
    """Deal the clips out to the folds, label after label."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty_like(labels)
    folds[order] = np.arange(len(labels)) % _NUM_FOLDS
    return folds


def _check_folds(clips: LabelledClips, path: Path) -> None:
    for train, test in clips.splits():
        untrained = np.setdiff1d(clips.labels[test], clips.labels[train])
        if len(untrained):
            names = _list([clips.label_names[label] for label in untrained])
            raise ConfigError(
                f"{path}: all clips of {names} are in the same test part, so there are none to train on; "
                "move one to another part, or leave the label out."
            )


def _thin(clips: LabelledClips, limit: int, seed: int) -> LabelledClips:
    """Draw ``limit`` clips; the first two of a label are of two folds, so it is trained on where it is tested."""
    needed = _MIN_A_LABEL * len(clips.label_names)
    if limit < needed:
        raise ConfigError(f"{limit} clips of {len(clips.label_names)} labels are too few; take {needed} or more.")
    shuffled = np.random.default_rng(seed).permutation(len(clips))
    by_fold = _rank_in_group(clips.labels[shuffled] * (clips.folds.max() + 2) + clips.folds[shuffled], first=1)
    shuffled = shuffled[np.argsort(by_fold, kind="stable")]
    by_label = _rank_in_group(clips.labels[shuffled], first=_MIN_A_LABEL)
    chosen = np.sort(shuffled[np.argsort(by_label, kind="stable")[:limit]])
    files = tuple(clips.files[i] for i in chosen)
    return LabelledClips(files, clips.labels[chosen], clips.label_names, clips.folds[chosen])


def _rank_in_group(groups: Integers, first: int) -> npt.NDArray[np.float64]:
    """How far each element comes in its group, from 0 to 1; 0 for the ``first`` ones.

    Sorted by it, every beginning of the list holds the groups in proportion, and small groups, too.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    place = np.empty(len(groups))
    place[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.where(place < first, 0.0, (place + 0.5) / sizes[group])


# --- features and classifiers -----------------------------------------------------------------------------------------


def _check_embeddings(embeddings: Vectors, clips: LabelledClips) -> None:
    if embeddings.ndim != 2 or len(embeddings) != len(clips):
        raise ConfigError(f"embeddings of {len(clips)} clips have shape ({len(clips)}, D), not {embeddings.shape}.")
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise ConfigError(
            f"{len(bad)} of {len(clips)} embeddings are not finite: {_list([str(clips.files[i]) for i in bad])}."
        )


def _num_tested(clips: LabelledClips) -> int:
    return int((clips.folds != TRAIN_ONLY).sum())


def _standardise(train: Vectors, test: Vectors) -> tuple[Vectors, Vectors]:
    """Zero mean and unit variance over the training rows; a feature that is constant there becomes 0."""
    mean = train.mean(axis=0, dtype=np.float64)
    std = train.std(axis=0, dtype=np.float64)
    constant = std <= 1e-6 * np.abs(mean)
    scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))
    return ((train - mean) * scale).astype(np.float32), ((test - mean) * scale).astype(np.float32)


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit


def _votes(similarity: Vectors, labels: Integers, num_labels: int, k: int) -> npt.NDArray[np.float64]:
    """(tests, trainings) similarities -> (tests, num_labels) sums over the ``k`` nearest."""
    k = min(k, len(labels))
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    weights = np.maximum(np.take_along_axis(similarity, nearest, axis=1), _LEAST_VOTE)
    votes = np.zeros((len(similarity), num_labels))
    np.add.at(votes, (np.arange(len(similarity))[:, None], labels[nearest]), weights)
    return votes


def _rotate(train: Vectors, test: Vectors) -> tuple[Vectors, Vectors]:
    """Both in an orthonormal basis of the training rows, if those are fewer than the features.

    An L2-regularised linear model is the same in either basis, as its weights lie in the span of the training rows; but
    there are fewer of them to fit.
    """
    if len(train) >= train.shape[1]:
        return train, test
    basis, _ = np.linalg.qr(train.T)  # (D, n)
    return train @ basis, test @ basis


def _choose_strength(x: Vectors, y: Integers, strengths: Sequence[float]) -> float:
    """The strength of least log-loss on a held-out fifth of the training rows; accuracy there would be too coarse."""
    held_out = _held_out(y)
    if len(strengths) == 1 or not held_out.any():
        return strengths[0]
    from sklearn.metrics import log_loss

    fitted = _classifiers(x[~held_out], y[~held_out], strengths)
    losses = [log_loss(y[held_out], c.predict_proba(x[held_out]), labels=c.classes_) for c in fitted]
    return strengths[losses.index(min(losses))]


def _held_out(labels: Integers) -> npt.NDArray[np.bool_]:
    """A mask of every fifth row, label after label, leaving at least one of each label to train on."""
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    is_first = np.diff(labels[order], prepend=-1) != 0
    mask = np.zeros(len(labels), dtype=bool)
    mask[order] = (np.arange(len(labels)) % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1) & ~is_first
    return mask


def _classifiers(x: Vectors, y: Integers, strengths: Iterable[float]) -> Iterator[Any]:
    """Yield one classifier, fitted with each strength in turn from where it was with the last."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(tol=_TOLERANCE, max_iter=_MAX_ITERATIONS, warm_start=True)
    for strength in strengths:
        classifier.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of the weights change no label
            classifier.fit(x, y)
        yield classifier


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(repr(name) for name in names[:_NAMED]) + more
