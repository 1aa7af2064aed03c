"""A picture of what the masking strategies hide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m2d_embed.errors import ConfigError
from m2d_embed.pretrain.masking import STRATEGIES, MaskingConfig, Strategy, draw_order, num_visible

_MASKED, _VISIBLE = "#20304f", "#ffc53d"
_MIN_WIDTH, _MAX_WIDTH, _PANEL_HEIGHT = 6.0, 20.0, 1.0  # inches


def draw_sheet(
    output: Path,
    grid: tuple[int, int],
    mask_ratio: float,
    seed: int = 0,
    examples: int = 6,
    strategies: Sequence[Strategy] = STRATEGIES,
) -> None:
    """Draw example masks as a PNG, a row of ``examples`` a strategy.

    Args:
        output: the PNG to write.
        grid: (F, T), patches in mel and in time.
        mask_ratio: share of patches that is masked.
        seed: of the masks; the same seed gives the same picture.
        examples: masks a strategy.
        strategies: which to draw, with their default settings, from top to bottom.

    Raises:
        ConfigError: if ``output`` does not end in ``.png`` or its folder does not exist, there is nothing to
            draw, a strategy is unknown, or ``mask_ratio`` leaves no patch visible or none masked.
    """
    if output.suffix.lower() != ".png":
        raise ConfigError(f"{output}: mask sheets are PNG files; give a name that ends in .png.")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: the folder {output.parent} does not exist.")
    if examples < 1 or not strategies:
        raise ConfigError(f"nothing to draw: {examples} examples of {len(strategies)} strategies.")
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    configs = [MaskingConfig(strategy, mask_ratio) for strategy in strategies]
    total = grid[0] * grid[1]
    visible = num_visible(total, mask_ratio)

    width = min(_MAX_WIDTH, max(_MIN_WIDTH, examples * _PANEL_HEIGHT * grid[1] / grid[0]))
    figure = Figure(figsize=(width, len(configs) * (_PANEL_HEIGHT + 0.3) + 1), layout="constrained")
    panels = figure.subplots(len(configs), examples, squeeze=False, sharex=True, sharey=True)
    colours = ListedColormap([_MASKED, _VISIBLE])
    for row, config in zip(panels, configs, strict=True):
        title = f"{config.strategy}: {visible} of {total} patches visible, {total - visible} masked"
        row[0].set_title(title, loc="left", fontsize=10)
        rng = np.random.default_rng(seed)
        for axes in row:
            axes.pcolormesh(_visible_map(config, grid, rng), cmap=colours, vmin=0, vmax=1)
            axes.locator_params(integer=True)
    title = f"Masks of {grid[0]} x {grid[1]} patches, mask ratio {mask_ratio:g}, seed {seed}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.supxlabel("time (patches)", fontsize=10)
    figure.supylabel("mel (patches)", fontsize=10)
    handles = [Patch(color=_VISIBLE, label="visible"), Patch(color=_MASKED, label="masked")]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(output, dpi=120)


def _visible_map(config: MaskingConfig, grid: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """One mask as an (F, T) picture, True where visible."""
    image = np.zeros(grid, dtype=bool)
    order = draw_order(config, grid, rng)
    image.flat[order[: num_visible(image.size, config.mask_ratio)]] = True
    return image
