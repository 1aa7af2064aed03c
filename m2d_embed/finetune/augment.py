"""Augmentation of training batches, on any device: mixup, SpecAugment, gain, frequency warp, structured patch dropout.

Every function draws from the numpy generator that it is given and from nothing else: a generator keyed by the seed and
the position (``training.sampling.rng_at``) gives the same batch again, on every device.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch
from nnAudio.librosa_functions import mel_frequencies
from torch import Tensor

from m2d_embed.config import ModelConfig
from m2d_embed.errors import ConfigError
from m2d_embed.finetune.crops import Batch

_NEPER_PER_DB = math.log(10) / 10  # of power


class KeptPatches(NamedTuple):
    """What patch dropout leaves, int64 on the CPU, each ascending.

    ``rows`` in mel (F',) and ``columns`` in time (T',) of the patch grid, and the ``tokens`` (F' * T',) where they
    cross, frequency-major as ``Encoder.embed`` orders them: what is left is a grid again.
    """

    tokens: Tensor
    rows: Tensor
    columns: Tensor


def mixup(batch: Batch, alpha: float, std: float, generator: np.random.Generator) -> Batch:
    """Mix every clip with one of the batch, sound and target alike (Zhang et al., arXiv 1710.09412, section 2).

    Sounds are mixed in the linear domain of mel power, as if they were heard together (as BYOL-A does; Niizumi et al.,
    arXiv 2103.06695). With ``x = (log-mel - mean) / std`` the mean cancels out of
    ``log(lam * exp(log-mel 1) + (1 - lam) * exp(log-mel 2))``, which leaves
    ``x = logaddexp(std * x1 + log(lam), std * x2 + log(1 - lam)) / std``.
    Padding is silence there, not sound of mean level. Targets become ``lam * target 1 + (1 - lam) * target 2``.

    Args:
        batch: crops.
        alpha: shares ``lam`` are drawn from Beta(alpha, alpha), one a clip; 0 changes nothing.
        std: of the log-mel, ``config.norm_stats[1]``.
        generator: draws partners, by a random permutation, and shares.

    Returns:
        The mixed batch. A clip is as long as the longer of the two it is of.

    Raises:
        ConfigError: if ``alpha`` is negative or not finite.
    """
    if not 0 <= alpha < math.inf:
        raise ConfigError(f"mixup's alpha must be 0 or more, not {alpha}.")
    if alpha == 0:
        return batch
    device = batch.log_mel.device
    partner = torch.from_numpy(generator.permutation(len(batch))).to(device)
    # A share of exactly 0 or 1 has an infinite logarithm.
    drawn = torch.from_numpy(np.clip(generator.beta(alpha, alpha, size=len(batch)), 1e-12, 1 - 1e-12))
    share, log_share, log_rest = (x.float().to(device) for x in (drawn, drawn.log(), torch.log1p(-drawn)))
    valid_frames = torch.maximum(batch.valid_frames, batch.valid_frames[partner])
    levels = _levels(batch.log_mel, batch.valid_frames, std)
    mixed = torch.logaddexp(levels + _of_clips(log_share, 4), levels[partner] + _of_clips(log_rest, 4)) / std
    share = _of_clips(share, batch.targets.ndim)
    return dataclasses.replace(
        batch,
        log_mel=mixed.masked_fill(~_is_audio(mixed, valid_frames), 0.0),
        targets=share * batch.targets + (1 - share) * batch.targets[partner],
        mask=batch.mask | batch.mask[partner],
        valid_frames=valid_frames,
    )


def random_gain(batch: Batch, max_db: float, std: float, generator: np.random.Generator) -> Batch:
    """Make each clip louder or softer by up to ``max_db`` decibels, drawn uniformly; padding stays as it is.

    Args:
        batch: crops.
        max_db: the largest change in dB, in either direction.
        std: of the log-mel, ``config.norm_stats[1]``.
        generator: draws one gain a clip.

    Raises:
        ConfigError: if ``max_db`` is negative or not finite.
    """
    if not 0 <= max_db < math.inf:
        raise ConfigError(f"The gain's max_db must be 0 or more, not {max_db}.")
    decibels = torch.from_numpy(generator.uniform(-max_db, max_db, size=len(batch))).float()
    shift = _of_clips((decibels * _NEPER_PER_DB / std).to(batch.log_mel.device), 4)
    return dataclasses.replace(
        batch, log_mel=batch.log_mel + shift * _is_audio(batch.log_mel, batch.valid_frames).float()
    )


def frequency_warp(batch: Batch, most: float, config: ModelConfig, generator: np.random.Generator) -> Batch:
    """Scale the frequencies of each clip, as those of speakers or animals of another size are.

    Vocal tract length perturbation (Jaitly and Hinton, 2013), of all frequencies alike: what was at ``f`` Hz comes to
    ``f / a``, and each clip's ``a`` is drawn from ``1 / (1 + most)`` to ``1 + most``, evenly on a logarithmic scale.
    Between the centres of mel bands the log-mel is interpolated; beyond the first and the last band it goes on level.

    Args:
        batch: crops.
        most: the largest change, as a share: 0.1 is about one and a half semitones.
        config: says where the mel bands are.
        generator: draws one factor a clip.

    Raises:
        ConfigError: if ``most`` is negative or not finite.
    """
    if not 0 <= most < math.inf:
        raise ConfigError(f"The frequency warp's largest change must be 0 or more, not {most}.")
    if most == 0:
        return batch
    mels = config.input_size[0]
    centres = mel_frequencies(mels + 2, config.f_min, config.f_max)[1:-1]
    factors = np.exp(generator.uniform(-1, 1, size=(len(batch), 1)) * np.log1p(most))
    places = np.interp(factors * centres, centres, np.arange(mels))  # (B, mels)
    below = np.minimum(places.astype(np.int64), mels - 2)
    lower, upper = (_bands(batch.log_mel, torch.from_numpy(which)) for which in (below, below + 1))
    share = torch.from_numpy(places - below).float().to(batch.log_mel.device)[:, None, :, None]
    return dataclasses.replace(batch, log_mel=lower.lerp(upper, share))


def spec_augment(
    log_mel: Tensor,
    num_freq_masks: int,
    max_freq: int,
    num_time_masks: int,
    max_time: int,
    generator: np.random.Generator,
) -> Tensor:
    """Blank bands and stretches of each clip (SpecAugment without warping; Park et al., arXiv 1904.08779, section 2).

    What is blanked becomes 0, the mean of a normalised log-mel. The width of each mask is drawn uniformly from 0 to its
    maximum, then its place, each possible one equally likely. Masks may overlap.

    Args:
        log_mel: (B, 1, mels, frames), normalised.
        num_freq_masks: bands a clip.
        max_freq: widest band in mels.
        num_time_masks: stretches a clip.
        max_time: longest stretch in frames.
        generator: draws widths and places, others for each clip.

    Returns:
        A new tensor of the same shape.

    Raises:
        ConfigError: if a number is negative, or a maximum larger than the log-mel.
    """
    batch, _, mels, frames = log_mel.shape
    freq = _random_masks(batch, mels, num_freq_masks, max_freq, generator, "mels").to(log_mel.device)
    time = _random_masks(batch, frames, num_time_masks, max_time, generator, "frames").to(log_mel.device)
    return log_mel.masked_fill(freq[:, None, :, None] | time[:, None, None, :], 0.0)


def kept_patches(
    grid: tuple[int, int], freq_rows_dropped: int, time_columns_dropped: int, generator: np.random.Generator
) -> KeptPatches:
    """Structured patch dropout: drop whole rows and columns (PaSST; Koutini et al., arXiv 2110.05069, section 2.2).

    One draw serves a whole batch, which so keeps one shape.

    Args:
        grid: (F, T) patches, rows in mel and columns in time.
        freq_rows_dropped: rows to drop.
        time_columns_dropped: columns to drop.
        generator: draws which.

    Raises:
        ConfigError: if a number is negative, or nothing would be left.
    """
    rows = _kept(grid[0], freq_rows_dropped, "rows in frequency", generator)
    columns = _kept(grid[1], time_columns_dropped, "columns in time", generator)
    return KeptPatches((rows[:, None] * grid[1] + columns).flatten(), rows, columns)


def _kept(size: int, dropped: int, what: str, generator: np.random.Generator) -> Tensor:
    if not 0 <= dropped < size:
        raise ConfigError(f"Patch dropout of {dropped} {what} is not possible: there are {size}, and one must be left.")
    return torch.from_numpy(np.sort(generator.permutation(size)[dropped:]))


def _random_masks(batch: int, size: int, count: int, widest: int, generator: np.random.Generator, what: str) -> Tensor:
    """(batch, size) bool: what ``count`` masks of random width and place cover."""
    if count < 0 or not 0 <= widest <= size:
        raise ConfigError(
            f"SpecAugment with {count} masks of up to {widest} {what} is not possible: there are {size} {what}."
        )
    widths = generator.integers(widest + 1, size=(batch, count))
    starts = generator.integers(size - widths + 1)
    places = np.arange(size)
    covered = (places >= starts[..., None]) & (places < (starts + widths)[..., None])  # (batch, count, size)
    return torch.from_numpy(covered.any(axis=1))


def _bands(log_mel: Tensor, which: Tensor) -> Tensor:
    """The bands of each clip in another order: (B, 1, mels, frames), (B, mels) -> (B, 1, mels, frames)."""
    return log_mel.gather(2, which.to(log_mel.device)[:, None, :, None].expand_as(log_mel))


def _levels(log_mel: Tensor, valid_frames: Tensor, std: float) -> Tensor:
    """The log-mel before it was divided by ``std``, less its mean; minus infinity where there is no sound."""
    return (log_mel * std).masked_fill(~_is_audio(log_mel, valid_frames), -math.inf)


def _is_audio(log_mel: Tensor, valid_frames: Tensor) -> Tensor:
    """(B, 1, 1, frames) bool; false in the padding."""
    frames = torch.arange(log_mel.shape[-1], device=log_mel.device)
    return frames < _of_clips(valid_frames, 4)


def _of_clips(values: Tensor, ndim: int) -> Tensor:
    """(B,) -> (B, 1, ...) of so many dimensions."""
    return values.view(-1, *[1] * (ndim - 1))
