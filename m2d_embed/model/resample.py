"""Another sample rate for tensors: on their device, differentiable, with nothing but torch.

A windowed sinc as a polyphase filter bank (Crochiere and Rabiner, Multirate Digital Signal Processing, 1983; Smith,
Digital Audio Resampling, https://ccrma.stanford.edu/~jos/resample/): one convolution whose output channels are the
phases. The window is Kaiser's, with the pass band and rejection of soxr's "HQ", by which everything else in this
package is resampled; ``tests/test_resample.py`` holds the two together.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from m2d_embed.config import is_whole
from m2d_embed.errors import AudioError

_PASS_BAND = 0.913  # of half the lower rate; from there to all of it the response falls
_REJECTION = 125.0  # dB
_BETA = 0.1102 * (_REJECTION - 8.7)
_HALF_WIDTH = (_REJECTION - 7.95) / (14.36 * (1 - _PASS_BAND))  # in samples of the lower rate; Kaiser's formula
_MOST_WEIGHTS = 1 << 26  # 256 MB; rates with a common divisor of 25 need a thousandth of it


def resample(audio: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample along the last dimension.

    Args:
        audio: (..., samples), floating; computed in float32.
        from_rate, to_rate: in Hz.

    Returns:
        (..., n) float32 on the device of ``audio``; ``n`` is ``samples * to_rate / from_rate``, rounded half up, but
        at least 1.

    Raises:
        AudioError: if ``from_rate`` is no whole number, or the rates have so small a common divisor that the filter
            does not fit into memory.
    """
    if not (is_whole(from_rate) and from_rate > 0):
        raise AudioError(f"sample_rate={from_rate!r} is not a rate in Hz.")
    if from_rate == to_rate:
        return audio.float()
    divisor = math.gcd(from_rate, to_rate)
    step, phases = from_rate // divisor, to_rate // divisor
    margin = math.ceil(_HALF_WIDTH * max(1.0, step / phases))
    if phases * (2 * margin + step) > _MOST_WEIGHTS:
        raise AudioError(
            f"{from_rate} Hz cannot be resampled to {to_rate} Hz on a tensor's device, as their common divisor is "
            f"{divisor}; resample it before, e.g. with soxr."
        )
    samples = audio.shape[-1]
    wanted = max(1, (2 * samples * phases + step) // (2 * step))
    blocks = -(-wanted // phases)  # each of ``step`` samples in and ``phases`` out
    padded = F.pad(audio.float().reshape(-1, 1, samples), (margin, margin + max(0, blocks * step - samples)))
    filters = _filters(step, phases, margin).to(audio.device)
    out = F.conv1d(padded, filters, stride=step)  # (N, phases, blocks or more)
    return out.transpose(1, 2).flatten(1)[:, :wanted].reshape(*audio.shape[:-1], wanted)


@lru_cache(maxsize=8)
def _filters(step: int, phases: int, margin: int) -> Tensor:
    """(phases, 1, 2 * margin + step) float32: output ``i`` of a block lies ``i * step / phases`` samples into it."""
    scale = min(1.0, phases / step)  # of the lower rate to that of the input
    cutoff = scale * (1 + _PASS_BAND) / 2
    taps = torch.arange(2 * margin + step, dtype=torch.float64) - margin
    distance = taps - torch.arange(phases, dtype=torch.float64)[:, None] * step / phases
    inside = (1 - (distance * scale / _HALF_WIDTH).square()).clamp(min=0)
    window = torch.special.i0(_BETA * inside.sqrt()) / torch.special.i0(torch.tensor(_BETA, dtype=torch.float64))
    filters: Tensor = cutoff * torch.sinc(cutoff * distance) * window * (inside > 0)
    return filters.float().unsqueeze(1)
