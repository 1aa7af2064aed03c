"""How a clip's log-mel is cut into windows, and which patch columns come out of them at which times.

A clip that fits one window is encoded as it is. A longer one is cut into consecutive windows of whole patches, each
encoded on its own. The last window may be shorter; it is padded with zeros to a whole patch, and a trailing column with
less than half a patch of real frames is dropped unless it is the clip's only one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m2d_embed.config import ModelConfig


class Window(NamedTuple):
    """Frames ``start .. stop`` of a clip, and how many of their columns are kept."""

    start: int
    stop: int
    columns: int


def cut(num_frames: int, config: ModelConfig, shift: int = 0) -> list[Window]:
    """Cut ``num_frames`` frames into windows, leaving out the first ``shift``.

    Without a shift there is always at least one column, however short the clip.
    """
    window_frames, patch_frames = config.input_size[1], config.patch_size[1]
    grid_columns = config.grid_size[1]
    remaining = num_frames - shift
    if remaining <= window_frames:
        columns = min(_kept_columns(remaining, patch_frames), grid_columns)
        columns = columns or (1 if shift == 0 else 0)
        return [Window(shift, num_frames, columns)] if columns else []
    step = grid_columns * patch_frames
    starts = range(shift, num_frames - step + 1, step)
    windows = [Window(start, start + step, grid_columns) for start in starts]
    rest = windows[-1].stop
    columns = _kept_columns(num_frames - rest, patch_frames)
    return [*windows, Window(rest, num_frames, columns)] if columns else windows


class WindowCutter:
    """``cut`` for a log-mel that arrives piece by piece: the same windows, holding no more than one at a time."""

    def __init__(self, config: ModelConfig, shift: int = 0):
        self.config = config
        self.shift = shift
        self.step = config.grid_size[1] * config.patch_size[1]
        self.pending: Tensor | None = None
        self.dropped = 0  # frames before `pending`, the shift included

    def push(self, piece: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Take the next (mels, n) frames; yield every window that is now certain, with its columns to keep."""
        skipped = min(self.shift - self.dropped, piece.shape[1]) if self.dropped < self.shift else 0
        self.dropped += skipped
        piece = piece[:, skipped:]
        self.pending = piece if self.pending is None else torch.cat([self.pending, piece], dim=1)
        # Until a first window has been cut, the clip may still turn out to fit one window.
        while self.pending.shape[1] >= (self.step if self._has_cut else self.config.input_size[1] + 1):
            yield self.pending[:, : self.step], self.config.grid_size[1]
            self.pending = self.pending[:, self.step :]
            self.dropped += self.step

    def finish(self) -> Iterator[tuple[Tensor, int]]:
        """Yield the last window, if there is one."""
        if self.pending is None:
            return
        num_frames = self.pending.shape[1]
        if self._has_cut:
            columns = _kept_columns(num_frames, self.config.patch_size[1])
        else:
            windows = cut(num_frames + self.shift, self.config, self.shift) if num_frames else []
            columns = windows[0].columns if windows else 0
        if columns:
            yield self.pending, columns

    @property
    def _has_cut(self) -> bool:
        return self.dropped > self.shift


def pad_to_patch(log_mel: Tensor, config: ModelConfig) -> Tensor:
    """Zero-pad the last frames of a window, (..., frames), to whole patches, or cut it to the position grid.

    A window such as 1001 frames of 16-frame patches ends in frames that no column of its grid can hold.
    """
    grid_columns, patch_frames = config.grid_size[1], config.patch_size[1]
    columns = min(-(-log_mel.shape[-1] // patch_frames), grid_columns)
    return F.pad(log_mel, (0, columns * patch_frames - log_mel.shape[-1]))


def interleave(shifted: Sequence[Tensor]) -> Tensor:
    """Interleave the columns of evenly shifted copies, each (..., T_i, D), as far as they are without a gap."""
    step = len(shifted)
    count = min(frames.shape[-2] * step + i for i, frames in enumerate(shifted))
    woven = shifted[0].new_empty(*shifted[0].shape[:-2], count, shifted[0].shape[-1])
    for i, frames in enumerate(shifted):
        woven[..., i::step, :] = frames[..., : len(range(i, count, step)), :]
    return woven


def column_times(columns: int, hop_frames: int, config: ModelConfig, duration_ms: float) -> Tensor:
    """Centres of the first ``columns`` columns in milliseconds, as many as lie within the clip; (n,) float64.

    Column ``i`` covers frames ``i * hop .. i * hop + p - 1``, and frame ``k`` is centred at ``k`` times the log-mel's
    hop. A clip that ends before its first centre has one column, at the middle of the clip.
    """
    first = (config.patch_size[1] - 1) / 2
    times = (torch.arange(columns, dtype=torch.float64) * hop_frames + first) * config.frame_ms
    times = times[times <= duration_ms]
    if len(times) == 0:
        times = torch.tensor([duration_ms / 2], dtype=torch.float64)
    return times


def _kept_columns(num_frames: int, patch_frames: int) -> int:
    full, rest = divmod(max(num_frames, 0), patch_frames)
    return full + (2 * rest >= patch_frames)
