"""A random stretch of a sound file, read without the rest of it.

A crop has the samples that the same stretch of the whole file has after resampling: it is read with a margin on both
sides for the resampler, and from a place where samples of both rates coincide.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import soxr

from m2d_embed.audio import Samples, check_size, checked_blocks, downmix, open_sound
from m2d_embed.errors import AudioError

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
        file: its path, or its bytes as a stream that can be seeked.
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
    with _open(file, name) as sound:
        check_size(sound, name)
        clip_seconds = sound.frames / sound.samplerate
        spare = sound.frames * sample_rate // sound.samplerate - num_samples
        if spare <= 0:
            whole = _resample(_read(sound, 0, sound.frames, name), sound.samplerate, sample_rate)
            return Crop(whole[:num_samples], 0.0, clip_seconds)
        start = int(rng.integers(spare + 1))
        samples = _read_resampled(sound, start, num_samples, sample_rate, name)
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


def _open(file: Path | BinaryIO, name: str) -> soundfile.SoundFile:
    if isinstance(file, Path):
        return open_sound(file)
    try:
        return soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        empty = file.seek(0, io.SEEK_END) == 0
        what = "the file is empty" if empty else f"not audio that can be read ({error.error_string})"
        raise AudioError(f"{name}: {what}.") from error


def _read_resampled(sound: soundfile.SoundFile, start: int, count: int, sample_rate: int, name: str) -> Samples:
    """Samples ``start`` to ``start + count`` of the file as it is at ``sample_rate``."""
    rate = sound.samplerate
    if rate == sample_rate:
        return _read(sound, start, start + count, name)
    # Every `step` samples of the file, and every `new_step` of the result, the two coincide in time. The resampler
    # begins at such a place, or the result would be shifted by a part of a sample.
    common = math.gcd(rate, sample_rate)
    step, new_step = rate // common, sample_rate // common
    margin = math.ceil(_MARGIN * max(1.0, rate / sample_rate))
    blocks = max(0, start * rate // sample_rate - margin) // step
    last = math.ceil((start + count) * rate / sample_rate) + margin
    resampled = _resample(_read(sound, blocks * step, min(last, sound.frames), name), rate, sample_rate)
    offset = start - blocks * new_step
    return resampled[offset : offset + count]


def _read(sound: soundfile.SoundFile, start: int, stop: int, name: str) -> Samples:
    """Samples of the file itself, averaged over its channels and checked."""
    try:
        sound.seek(start)
        block = sound.read(stop - start, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: damaged or truncated ({error.error_string}).") from error
    if len(block) < stop - start:
        missing = stop - start - len(block)
        raise AudioError(f"{name}: truncated, {missing} samples fewer than its header promises.")
    (checked,) = checked_blocks(iter([downmix(block)]), f"{name}, from sample {start} on" if start else name)
    return checked


def _resample(samples: Samples, rate: int, sample_rate: int) -> Samples:
    if rate == sample_rate:
        return samples
    resampled: Samples = soxr.resample(samples, rate, sample_rate, quality="HQ")
    return resampled if len(resampled) else samples[:1]  # shorter than one sample of the new rate
