"""A picture of which labels are taken for which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m2d_embed.errors import ConfigError

Matrix = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]

_SMALLEST, _LARGEST = 3.6, 26.0  # inches, of the square
_CELL = 0.36  # inches, while the square is not at its largest
_LONGEST_NAME = 3.0  # inches; longer names are shortened
_MAX_FONT, _MIN_FONT = 10.0, 5.0  # points
_POINTS_PER_INCH = 72
_LETTER, _LINE = 0.55, 1.25  # mean width of a letter, and height of a line, in font sizes
_GAMMA = 0.6  # of the colour scale
_TICKS = (0, 0.05, 0.2, 0.4, 0.6, 0.8, 1)  # of the colour scale
_DARK = 0.45  # share; counts on cells from here on are white
_DPI = 120
_FONT = "DejaVu Sans"  # comes with matplotlib
_NO_LETTERS = "Last Resort"  # a font of boxes


def plot_confusion(matrix: npt.NDArray[np.integer[Any]], label_names: Sequence[str], output: Path, title: str) -> None:
    """Draw a confusion matrix as a PNG; a cell's colour is its share of the clips of its row.

    The picture grows with the number of labels. Counts are written where they fit into the cells; of too many labels
    for the name of each, every second (third, ...) has its name. A label without clips has an empty row. Letters that
    no installed font has are boxes.

    Args:
        matrix: (L, L) counts; rows are true labels, columns predicted ones.
        label_names: L names, in the order of the rows.
        output: the PNG to write.
        title: over the picture; the accuracy is added to it.

    Raises:
        ConfigError: if ``matrix`` is not a square of counts with at least one clip, there is not a name for every row,
            ``output`` does not end in ``.png``, or its folder does not exist.
    """
    _check(matrix, label_names, output)
    from matplotlib import rc_context

    with rc_context({"font.family": font_families("".join((title, *label_names)))}):
        _draw(matrix, label_names, output, title)


def font_families(text: str) -> list[str]:
    """Matplotlib's own font, and installed ones that have the letters of a text which it lacks, e.g. Japanese."""
    from matplotlib import font_manager

    families = [_FONT]
    missing = set(text) - _letters(font_manager.findfont(_FONT))
    for font in font_manager.fontManager.ttflist if missing else []:
        if font.style != "normal" or font.name.startswith(_NO_LETTERS):
            continue
        if found := missing & _letters(font.fname):
            families.append(font.name)
            missing -= found
    return families


def _letters(font_file: str) -> set[str]:
    from matplotlib.font_manager import get_font

    return set(map(chr, get_font(font_file).get_charmap()))


def _draw(matrix: npt.NDArray[np.integer[Any]], label_names: Sequence[str], output: Path, title: str) -> None:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts = matrix.astype(np.int64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(_LARGEST, max(_SMALLEST, len(counts) * _CELL))
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))
    # An even scale would leave rare confusions white.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(_GAMMA, 0, 1), interpolation="nearest")
    _draw_names(axes, label_names, side)
    _draw_counts(axes, counts, shares, side / len(counts))
    right, total = int(np.trace(counts)), int(counts.sum())
    heading = f"{title}\naccuracy {right / total:.1%} ({right} of {total} clips)"
    axes.set_title(heading, fontsize=_heading_font(side), pad=12, parse_math=False)
    bar = axes.inset_axes((1 + 0.15 / side, 0, 0.14 / side, min(1.0, 3.0 / side)))
    figure.colorbar(image, cax=bar, ticks=_TICKS, format=lambda share, _: f"{share:.0%}").outline.set_visible(False)
    bar.tick_params(labelsize=8, length=2)
    figure.savefig(output, dpi=_DPI, bbox_inches="tight", pad_inches=0.2)


def _check(matrix: npt.NDArray[np.integer[Any]], label_names: Sequence[str], output: Path) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ConfigError(f"a confusion matrix is a square, with a row and a column a label, not {matrix.shape}.")
    if not np.issubdtype(matrix.dtype, np.integer) or (matrix < 0).any():
        raise ConfigError(f"a confusion matrix holds counts, but this one holds {matrix.dtype} down to {matrix.min()}.")
    if not matrix.any():
        raise ConfigError("the confusion matrix is empty: not one clip was counted.")
    if len(label_names) != len(matrix):
        raise ConfigError(f"a confusion matrix of {len(matrix)} labels needs as many names, not {len(label_names)}.")
    if output.suffix.lower() != ".png":
        raise ConfigError(f"{output}: plots are PNG files; give a name that ends in .png.")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: the folder {output.parent} does not exist.")


def _heading_font(side: float) -> float:
    """Points, over a square of so many inches: a large picture is looked at from further away."""
    return 10 + 0.4 * side


def _draw_names(axes: Any, label_names: Sequence[str], side: float) -> None:
    cell = side / len(label_names) * _POINTS_PER_INCH
    font = float(np.clip(0.7 * cell, _MIN_FONT, _MAX_FONT))
    named = range(0, len(label_names), math.ceil(_LINE * _MIN_FONT / cell))
    names = [_shortened(label_names[i], font) for i in named]
    lying = max(map(len, names)) * _LETTER * font < cell
    # Names may hold dollar signs, between two of which matplotlib would read a formula.
    axes.set_xticks(named, names, rotation=0 if lying else 90, fontsize=font, parse_math=False)
    axes.set_yticks(named, names, fontsize=font, parse_math=False)
    axes.set_xlabel("predicted", fontsize=_heading_font(side))
    axes.set_ylabel("true", fontsize=_heading_font(side))
    if cell > _MIN_FONT:  # in smaller ones lines would be most of what is seen
        end = len(label_names) - 0.5
        borders = np.arange(0.5, end)
        axes.hlines(borders, -0.5, end, color="0.9", linewidth=0.5)
        axes.vlines(borders, -0.5, end, color="0.9", linewidth=0.5)
    axes.tick_params(length=2)
    axes.spines[:].set_color("0.8")


def _shortened(name: str, font: float) -> str:
    """The name, or its beginning and an ellipsis where all of it would not fit."""
    fitting = int(_LONGEST_NAME * _POINTS_PER_INCH / (_LETTER * font))
    return name if len(name) <= fitting else name[: fitting - 1].rstrip() + "…"


def _draw_counts(axes: Any, counts: Matrix, shares: Shares, cell: float) -> None:
    digits = len(str(counts.max()))
    font = min(0.8 * _MAX_FONT, 0.75 * cell * _POINTS_PER_INCH / (digits * _LETTER))
    if font < _MIN_FONT:
        return
    for row, column in np.argwhere(counts > 0):
        colour = "white" if shares[row, column] >= _DARK else "0.2"
        axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=font)
