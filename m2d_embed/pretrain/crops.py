"""A random stretch of a sound file, read without the rest of it.

A crop has the samples that the same stretch of the whole file has after resampling: it is read with a margin on both
sides for the resampler, and from a place where samples of both rates coincide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soxr

from m2d_embed.audio.clips import Samples, checked_blocks
from m2d_embed.audio.sounds import Sound, open_sound

#: Samples at the lower of the two rates that the resampler is given on both sides: twice what its filter reaches.
_MARGIN = 256


@dataclass(frozen=True)
class Crop:
    """``samples`` (n,) float32 mono, from ``start_seconds`` on, of a clip of ``clip_seconds``."""

    samples: Samples
    start_seconds: float
    clip_seconds: float


def read_crop(file: Path | BinaryIO, sample_rate: int, num_samples: int, rng: np.random.Generator, name: str) -> Crop:
    """Read a stretch of a file from a random place, each equally likely; of a shorter file, the whole.

    Args:
        file: its path, or its bytes as a stream. One that only FFmpeg reads, or of several streams, is decoded whole.
        sample_rate: what to resample to, in Hz.
        num_samples: length of the crop at that rate.
        rng: draws the place.
        name: what to call the file in messages.

    Returns:
        The crop: mono float32 of ``num_samples`` samples, fewer if the file is shorter.

    Raises:
        AudioError: if the file is missing, unreadable, truncated or empty, or the stretch has a sample that is not
            finite.
    """
    with open_sound(file if isinstance(file, Path) else file.read(), name) as sound:
        whole = None if sound.frames is not None else np.concatenate([np.empty(0, np.float32), *sound.blocks()])
        opened = _Opened(sound, whole, name)
        clip_seconds = opened.frames / sound.rate
        spare = opened.frames * sample_rate // sound.rate - num_samples
        if spare <= 0:
            samples = _resample(opened.read(0, opened.frames), sound.rate, sample_rate)
            return Crop(samples[:num_samples], 0.0, clip_seconds)
        start = int(rng.integers(spare + 1))
        samples = _read_resampled(opened, start, num_samples, sample_rate)
    return Crop(samples, start / sample_rate, clip_seconds)


def fit(samples: Samples, num_samples: int, how: Literal["repeat", "pad"]) -> tuple[Samples, int]:
    """Bring a crop that may be short to its length.

    Args:
        samples: (n,), at least one.
        num_samples: the length wanted, ``n`` or more.
        how: "repeat" begins again at the start; "pad" adds zeros.

    Returns:
        (num_samples,) float32, and how many of these are audio.
    """
    if how == "repeat":
        return np.resize(samples, num_samples), num_samples
    fitted = np.zeros(num_samples, np.float32)
    fitted[: len(samples)] = samples
    return fitted, len(samples)


@dataclass(frozen=True)
class _Opened:
    """A sound of which stretches are read: from the file, or from ``whole`` where that cannot be sought in."""

    sound: Sound
    whole: Samples | None
    name: str

    @property
    def frames(self) -> int:
        return len(self.whole) if self.whole is not None else self.sound.frames or 0

    def read(self, start: int, stop: int) -> Samples:
        """Samples of the file itself, averaged over its channels and checked."""
        block = self.whole[start:stop] if self.whole is not None else self.sound.read(start, stop)
        where = f"{self.name}, from sample {start} on" if start else self.name
        return np.concatenate(list(checked_blocks(iter([block] if len(block) else []), where)))


def _read_resampled(opened: _Opened, start: int, count: int, sample_rate: int) -> Samples:
    """Samples ``start`` to ``start + count`` of the file as it is at ``sample_rate``."""
    rate = opened.sound.rate
    if rate == sample_rate:
        return opened.read(start, start + count)
    # Every `step` samples of the file, and every `new_step` of the result, the two coincide in time. The resampler
    # begins at such a place, or the result would be shifted by a part of a sample.
    common = math.gcd(rate, sample_rate)
    step, new_step = rate // common, sample_rate // common
    margin = math.ceil(_MARGIN * max(1.0, rate / sample_rate))
    blocks = max(0, start * rate // sample_rate - margin) // step
    last = math.ceil((start + count) * rate / sample_rate) + margin
    resampled = _resample(opened.read(blocks * step, min(last, opened.frames)), rate, sample_rate)
    offset = start - blocks * new_step
    return resampled[offset : offset + count]


def _resample(samples: Samples, rate: int, sample_rate: int) -> Samples:
    if rate == sample_rate:
        return samples
    resampled: Samples = soxr.resample(samples, rate, sample_rate, quality="HQ")
    return resampled if len(resampled) else samples[:1]  # shorter than one sample of the new rate
