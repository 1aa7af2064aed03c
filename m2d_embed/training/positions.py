"""Positions of a checkpoint for a window of another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m2d_embed.errors import ConfigError
from m2d_embed.model.encoder import sincos_positions


def resize_positions(positions: Tensor, old_grid: tuple[int, int], fixed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (1, 1 + F * T, dim) of one grid for another.

    Fixed sin-cos positions are those of the new grid, ``fixed``; others are interpolated (bicubic) over the grid.

    Raises:
        ConfigError: if the positions are not those of ``old_grid``.
    """
    rows, columns = old_grid
    if positions.shape[1] != 1 + rows * columns:
        raise ConfigError(f"{positions.shape[1]} positions do not belong to a grid of {rows} x {columns} patches")
    is_fixed = torch.allclose(positions.float(), sincos_positions(positions.shape[2], old_grid), atol=1e-2)
    if is_fixed and positions.shape[2] == fixed.shape[2]:
        return fixed
    if old_grid == grid:
        return positions
    image = positions[:, 1:].reshape(1, rows, columns, -1).permute(0, 3, 1, 2)  # (1, dim, F, T)
    resized = F.interpolate(image.float(), size=grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
