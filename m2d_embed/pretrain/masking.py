"""Which patches of a clip the online encoder sees: masking strategies, chosen by name.

Each strategy puts the patches of a grid in a random order, to be cut anywhere: the first are visible, the rest masked.
So all of them hide exactly the same number. The order among the visible patches, and among the masked ones, means
nothing. Grids wrap around at their edges, in time and in mel: a block or a span that leaves the grid on one
side comes in on the other. Without that, patches at the edges would be hidden more or less often than the others.

* ``random``: Niizumi et al., "Masked Modeling Duo", arXiv 2210.14648, section 3.
* ``structured``: whole rows and columns, as "time+frequency" in Huang et al., "Masked Autoencoders that Listen",
  arXiv 2207.06405, section 3.
* ``spans``: runs of whole columns, after Baevski et al., "wav2vec 2.0", arXiv 2006.11477, section 3.1.
* ``inverse_block``: square blocks stay visible; Baevski et al., "data2vec 2.0", arXiv 2212.07525, section 3.
* ``red_noise``, ``green_noise``, ``blue_noise``, ``purple_noise``: the largest values of filtered noise are masked;
  Hinojosa et al., "ColorMAE", arXiv 2407.13036.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from m2d_embed.errors import ConfigError

Strategy = Literal[
    "random", "structured", "spans", "inverse_block", "red_noise", "green_noise", "blue_noise", "purple_noise"
]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

Order = npt.NDArray[np.int64]
Grid = tuple[int, int]

#: Gain of plain white noise added to every filter: it decides, at random, between patches that a filter makes equal.
_TIE_BREAK = 1e-6


@dataclass(frozen=True)
class MaskingConfig:
    """How patches are masked.

    ``mask_ratio`` is the share hidden from the online encoder. The others matter to some strategies only: ``span``,
    columns masked in one piece, to ``spans``; ``block``, the side in patches of a visible square, to
    ``inverse_block``; ``sigmas``, the standard deviations in patches of a narrow and a wide Gaussian filter, to the
    noises. The two filters split the noise into coarse (what the wide one keeps), middle, and fine (what the
    narrow one removes): red is the coarse part, green the middle, blue the fine, purple all but the middle.
    On five rows of patches, a much wider ``sigmas[1]`` makes red noise mask whole columns.

    Raises:
        ConfigError: if a value makes no sense; it names the field.
    """

    strategy: Strategy = "random"
    mask_ratio: float = 0.7
    span: int = 4
    block: int = 3
    sigmas: tuple[float, float] = (0.75, 1.25)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"strategy is {self.strategy!r}, not one of {', '.join(STRATEGIES)}.")
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio must lie between 0 and 1, both excluded, not {self.mask_ratio}.")
        for field in ("span", "block"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{field} must be a whole number of patches, 1 or more, not {value!r}.")
        if len(self.sigmas) != 2 or not 0 < self.sigmas[0] < self.sigmas[1] < math.inf:
            raise ConfigError(f"sigmas must be two finite numbers, 0 < narrow < wide, not {self.sigmas}.")


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """How many of ``num_patches`` the online encoder sees: ``int(num_patches * (1 - mask_ratio))``, as published.

    Raises:
        ConfigError: if that leaves no patch visible or none masked.
    """
    visible = int(num_patches * (1 - mask_ratio))
    if not 0 < visible < num_patches:
        raise ConfigError(
            f"mask_ratio {mask_ratio} leaves {visible} of {num_patches} patches visible, but at least one must be "
            "visible and one masked; change mask_ratio or take a larger input."
        )
    return visible


def draw_order(config: MaskingConfig, grid: Grid, rng: np.random.Generator) -> Order:
    """Draw a mask for one clip.

    Args:
        config: the strategy and its settings.
        grid: (F, T), patches in mel and in time.
        rng: all randomness comes from here.

    Returns:
        (F * T,) int64, a permutation of the patches ``f * T + t``. The first ``num_visible(F * T,
        config.mask_ratio)`` are visible, the rest masked.

    Raises:
        ConfigError: if ``mask_ratio`` leaves no patch visible or none masked, or the filter of a noise is so
            wide that it leaves nothing on this grid.
    """
    num_visible(grid[0] * grid[1], config.mask_ratio)
    return _STRATEGIES[config.strategy](grid, config, rng)


def _random(grid: Grid, config: MaskingConfig, rng: np.random.Generator) -> Order:
    """Every patch on its own."""
    return rng.permutation(grid[0] * grid[1]).astype(np.int64, copy=False)


def _structured(grid: Grid, config: MaskingConfig, rng: np.random.Generator) -> Order:
    """Rows and columns, mixed in random order, are masked whole; of the last one, patches at random."""
    turns = rng.permutation(sum(grid))  # when a line is masked: first the rows', then the columns'
    return _sorted(-turns[_lines(grid)].min(axis=1), rng)


def _spans(grid: Grid, config: MaskingConfig, rng: np.random.Generator) -> Order:
    """Runs of ``span`` columns are masked whole, the last run up to where it must end, amid a column at random."""
    rows, columns = grid
    span = min(config.span, columns)
    turns = rng.permutation(columns)  # when the run that starts at a column is masked
    # A run is masked column by column, so that only one column is ever masked in part.
    turns_of_columns = (turns[_starts(columns, span)] * span + np.arange(span)).min(axis=1)
    return _sorted(-np.tile(turns_of_columns, rows), rng)


def _inverse_block(grid: Grid, config: MaskingConfig, rng: np.random.Generator) -> Order:
    """Squares of side ``block`` at random places are visible; of the last one, patches at random."""
    turns = rng.permutation(grid[0] * grid[1])  # when the block whose corner is at a patch becomes visible
    return _sorted(turns[_corners(grid, config.block)].min(axis=1), rng)


def _noise(grid: Grid, config: MaskingConfig, rng: np.random.Generator) -> Order:
    """The largest values of white noise filtered to a colour are masked."""
    spectrum = np.fft.rfft2(rng.standard_normal(grid)) * _filter(config.strategy, grid, config.sigmas)
    return np.fft.irfft2(spectrum, s=grid).argsort(axis=None).astype(np.int64, copy=False)


_STRATEGIES: dict[Strategy, Callable[[Grid, MaskingConfig, np.random.Generator], Order]] = {
    "random": _random,
    "structured": _structured,
    "spans": _spans,
    "inverse_block": _inverse_block,
    "red_noise": _noise,
    "green_noise": _noise,
    "blue_noise": _noise,
    "purple_noise": _noise,
}


def _sorted(turns: npt.NDArray[np.int64], rng: np.random.Generator) -> Order:
    """Patches in ascending order of turn, those of one turn at random."""
    return (turns + rng.random(turns.size)).argsort().astype(np.int64, copy=False)


@lru_cache(maxsize=64)
def _lines(grid: Grid) -> npt.NDArray[np.int64]:
    """For each patch the two lines through it: (N, 2), row ``f`` and column ``F + t``."""
    f, t = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.stack([f, grid[0] + t], axis=1)


@lru_cache(maxsize=64)
def _starts(columns: int, span: int) -> npt.NDArray[np.int64]:
    """For each column the starts of the runs that cover it, the nearest first: (T, span)."""
    return (np.arange(columns)[:, None] - np.arange(span)) % columns


@lru_cache(maxsize=64)
def _corners(grid: Grid, block: int) -> npt.NDArray[np.int64]:
    """For each patch the corners of the blocks that cover it, as patch numbers: (N, block rows * block columns)."""
    rows, columns = grid
    f = _starts(rows, min(block, rows))
    t = _starts(columns, min(block, columns))
    corners = f[:, None, :, None] * columns + t[None, :, None, :]  # (F, T, block rows, block columns)
    return corners.reshape(rows * columns, -1)


@lru_cache(maxsize=64)
def _filter(strategy: Strategy, grid: Grid, sigmas: tuple[float, float]) -> npt.NDArray[np.float64]:
    """Gain of a noise's filter at each frequency of ``rfft2``: (F, T // 2 + 1), largest 1.

    Raises:
        ConfigError: if nothing passes on a grid this small.
    """
    mel, time = np.fft.fftfreq(grid[0]), np.fft.rfftfreq(grid[1])  # cycles per patch
    squared = mel[:, None] ** 2 + time**2
    narrow, wide = (np.exp(-2 * (math.pi * sigma) ** 2 * squared) for sigma in sigmas)  # transforms of the Gaussians
    tiny = np.finfo(np.float32).tiny
    middle = (narrow - wide) / max((narrow - wide).max(), tiny)  # peak 1, so that purple has a gap and not a dent
    gains = {"red_noise": wide, "green_noise": middle, "blue_noise": 1 - narrow, "purple_noise": 1 - middle}
    gain = gains[strategy]
    gain[0, 0] = 0  # the mean has no part in which values are largest
    if gain.max() < tiny:
        raise ConfigError(
            f"sigmas {sigmas} leave nothing of {strategy} on a grid of {grid} patches; change them or the strategy."
        )
    normalised: npt.NDArray[np.float64] = gain / gain.max() + _TIE_BREAK
    return normalised
