"""How a run goes: signs of collapse, the log of its steps, and a picture of it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2d_embed.errors import ConfigError, UnsupportedError
from m2d_embed.files import atomic_write

LOG_FILE = "log.jsonl"
_EVENTS_FOLDER = "tensorboard"
_MAX_ROWS = 2048  # that a rank is computed from
_RANK_EPS = 1e-7  # the paper's, for float32
_MAX_POINTS = 1000  # of a curve in the picture; beyond it a band shows between which values it runs
_SMOOTHED_PART = 50  # a smoothed value is the mean over one such part of the run
_FEW = 60  # points that are few enough to be marked each

Row = dict[str, float]
Values = npt.NDArray[np.float64]


def rank_me(vectors: Tensor) -> float:
    """Effective rank of a set of embeddings: RankMe (Garrido et al., arXiv 2210.02885, equation 1).

    The exponential of the entropy of the singular values, divided by their sum: near 1 if all vectors point the same
    way, ``min(n, d)`` if they spread evenly. A fall towards 1 is a collapse.

    Args:
        vectors: (n, d) of any floating dtype; of more than 2048 rows, 2048 evenly spaced ones count.

    Returns:
        The rank, computed in float32; NaN if a vector is not finite.

    Raises:
        ConfigError: if ``vectors`` are not a matrix, or empty.
    """
    _check_matrix(vectors)
    rows = torch.linspace(0, len(vectors) - 1, min(len(vectors), _MAX_ROWS), dtype=torch.float64).round().long()
    matrix = vectors.detach()[rows.to(vectors.device)].float()
    if not torch.isfinite(matrix).all():
        return math.nan
    singular = torch.linalg.svdvals(matrix)
    shares = singular / singular.sum().clamp_min(torch.finfo(torch.float32).tiny) + _RANK_EPS
    return float(torch.exp(-(shares * shares.log()).sum()))


def mean_variance(vectors: Tensor) -> float:
    """Variance over the rows of (n, d) embeddings (of any floating dtype, in float32), mean over dimensions.

    Raises:
        ConfigError: if ``vectors`` are not a matrix, or empty.
    """
    _check_matrix(vectors)
    return float(vectors.detach().float().var(dim=0, unbiased=False).mean())


class RunLog:
    """The values of a run over its steps: a JSON object a line in ``log.jsonl``, and TensorBoard events.

    Args:
        folder: the run's; made if it is missing. Events go to ``<folder>/tensorboard``.
        first_step: the first step that will be written. What an earlier process logged from there on, after the
            checkpoint that this one goes on from, is dropped, as is a line it was killed in.
        extra: of the package, for the message that tensorboard is missing.

    Raises:
        UnsupportedError: if tensorboard is not installed.
        ConfigError: if ``log.jsonl`` is damaged.
    """

    def __init__(self, folder: Path, first_step: int, extra: str = "pretrain"):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UnsupportedError(f"logging a run needs tensorboard: pip install 'm2d-embed[{extra}]'") from error
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / LOG_FILE
        if file.exists():
            kept = [line for line, row in _lines(file) if row["step"] < first_step]
            with atomic_write(file) as partial:
                partial.write_bytes(b"".join(line + b"\n" for line in kept))
        self._stream = file.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / _EVENTS_FOLDER), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step, at once; one that is not finite is ``null`` in the JSON."""
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        self._stream.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._stream.flush()
        for key, value in numbers.items():
            self._events.add_scalar(key, value, step)
        self._events.flush()

    def close(self) -> None:
        """Close the files; to be called once no more is written."""
        self._stream.close()
        self._events.close()

    @staticmethod
    def read(folder: Path) -> list[Row]:
        """The rows of a run's ``log.jsonl``, each with its ``step``; ``null`` is read as NaN. No file, no rows.

        Raises:
            ConfigError: if the file is damaged; the last line may be one that a kill cut short, and is left out then.
        """
        file = folder / LOG_FILE
        return [row for _, row in _lines(file)] if file.exists() else []


def plot_curve(rows: list[Row], output: Path, title: str) -> None:
    """Draw a run as a PNG: its loss over the steps, and below it whatever else was logged.

    Args:
        rows: as ``RunLog.read`` gives them. ``loss``, its parts ``loss/...``, ``probe/...``, ``valid/...``,
            ``target_rank`` and ``lr`` are drawn; a row need not have all of them.
        output: the PNG to write.
        title: over the picture.

    Raises:
        ConfigError: if no row has a loss, ``output`` does not end in ``.png``, or its folder does not exist.
    """
    if output.suffix.lower() != ".png":
        raise ConfigError(f"{output}: plots are PNG files; give a name that ends in .png.")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: the folder {output.parent} does not exist.")
    if not len(_series(rows, "loss")[0]):
        raise ConfigError(
            f"{output}: none of the {len(rows)} rows of the log has a loss, so there is no curve to draw."
        )
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panels: list[tuple[Callable[[Any, Sequence[Row]], None], float]] = [(_draw_loss, 3.0)]
    panels += [(functools.partial(_draw_shares, "probe/", "probes (%)"), 1.5)] if _keys(rows, "probe/") else []
    panels += [(functools.partial(_draw_shares, "valid/", "validation (%)"), 1.5)] if _keys(rows, "valid/") else []
    panels += [(_draw_rank, 1.0)] if _keys(rows, "target_rank") else []
    panels += [(_draw_rate, 1.0)] if _keys(rows, "lr") else []
    heights = [height for _, height in panels]
    figure = Figure(figsize=(9, 1.1 + 1.35 * sum(heights)), layout="constrained")
    figure.suptitle(title)
    all_axes = figure.subplots(len(panels), 1, height_ratios=heights, sharex=True, squeeze=False)[:, 0]
    for (draw, _), axes in zip(panels, all_axes, strict=True):
        draw(axes, rows)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    all_axes[-1].set_xlabel("step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10], integer=True))
    all_axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    all_axes[-1].set_xlim(0, 1.01 * max(1, rows[-1]["step"]))
    figure.savefig(output, dpi=120)


# --- signs of collapse ------------------------------------------------------------------------------------------------


def _check_matrix(vectors: Tensor) -> None:
    if vectors.ndim != 2 or vectors.numel() == 0:
        raise ConfigError(f"expected embeddings of shape (n, d), not empty, but got {tuple(vectors.shape)}.")


# --- log --------------------------------------------------------------------------------------------------------------


def _lines(file: Path) -> list[tuple[bytes, Row]]:
    """Each line as it stands, and its content."""
    lines = file.read_bytes().split(b"\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # empty after the last newline, or cut short by a kill
                break
            raise ConfigError(f"{file}, line {number}: damaged ({error!r}); remove the line and try again.") from error
        values = {key: math.nan if value is None else value for key, value in row.items()}
        parsed.append((line, values | {"step": step}))
    return parsed


# --- curve ------------------------------------------------------------------------------------------------------------


def _keys(rows: Sequence[Row], prefix: str) -> list[str]:
    """Keys that begin so and have a finite value somewhere, sorted."""
    return sorted(
        {key for row in rows for key, value in row.items() if key.startswith(prefix) and math.isfinite(value)}
    )


def _series(rows: Sequence[Row], key: str) -> tuple[Values, Values]:
    """Steps and values of one key, where it is finite."""
    pairs = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _smooth(values: Values) -> Values:
    """Moving average over neighbours on both sides, of fewer near the ends."""
    half = len(values) // (2 * _SMOOTHED_PART)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    # As far to one side as to the other, or a steep start would come out flat; at the very ends a few of one side.
    reach = np.clip(np.minimum(places, places[::-1]), half // 4, half)
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    smooth: Values = (sums[last] - sums[first]) / (last - first)
    return smooth


def _draw_loss(axes: Any, rows: Sequence[Row]) -> None:
    steps, values = _series(rows, "loss")
    _draw_raw(axes, steps, values, "C0")
    smooth = _smooth(values)
    axes.plot(*_fewer(steps, smooth), color="C0", linewidth=1.8, marker=_marker(steps), label=f"loss: {smooth[-1]:.3f}")
    parts = _keys(rows, "loss/")
    for i, key in enumerate(parts if len(parts) > 1 else []):  # a single part is the loss itself
        steps, values = _series(rows, key)
        smooth = _smooth(values)
        label = f"{key.removeprefix('loss/')}: {smooth[-1]:.3f}"
        axes.plot(*_fewer(steps, smooth), color=f"C{i + 1}", linewidth=1.1, marker=_marker(steps), label=label)
    axes.set_ylabel("loss")
    _legend(axes)


def _draw_raw(axes: Any, steps: Values, values: Values, color: str) -> None:
    """Every value as logged, faintly; of very many the range between neighbours."""
    if len(steps) <= _MAX_POINTS:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        return
    starts = np.linspace(0, len(steps), _MAX_POINTS, endpoint=False).astype(int)
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    axes.fill_between(steps[starts], low, high, color=color, alpha=0.25, linewidth=0)


def _draw_shares(prefix: str, title: str, axes: Any, rows: Sequence[Row]) -> None:
    for i, key in enumerate(_keys(rows, prefix)):
        steps, values = _series(rows, key)
        label = f"{key.removeprefix(prefix)}: {values[-1]:.1%}"
        axes.plot(*_fewer(steps, 100 * values), color=f"C{i + 1}", linewidth=1.4, marker=_marker(steps), label=label)
    axes.set_ylabel(title)
    _legend(axes)


def _draw_rank(axes: Any, rows: Sequence[Row]) -> None:
    steps, values = _series(rows, "target_rank")
    _draw_raw(axes, steps, values, "C4")
    axes.plot(*_fewer(steps, _smooth(values)), color="C4", linewidth=1.4, marker=_marker(steps))
    axes.set_ylabel("target rank")
    axes.set_ylim(bottom=0)


def _draw_rate(axes: Any, rows: Sequence[Row]) -> None:
    steps, values = _series(rows, "lr")
    axes.plot(*_fewer(steps, values), color="C7", linewidth=1.4, marker=_marker(steps))
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(0, 0))


def _fewer(steps: Values, values: Values) -> tuple[Values, Values]:
    """Evenly spaced points of a smooth curve, the last one included."""
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MAX_POINTS)).round().astype(int))
    return steps[kept], values[kept]


def _marker(steps: Values) -> str | None:
    return "." if len(steps) < _FEW else None


def _legend(axes: Any) -> None:
    """Above the panel, where no curve can run into it."""
    count = len(axes.get_legend_handles_labels()[1])
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=count, frameon=False, borderpad=0)
