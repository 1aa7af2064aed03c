"""Soundscapes with known events, made of labelled clips: data for timestamp tasks where there is none with timings.

The sound of a clip is placed in a background at a random time, so when it begins and ends is known. Train, valid and
test soundscapes are made of different clips, those of the data's own parts.

Where the sound lies in its clip is told by energy (``find_sound``): from the loudest 10 ms on to both sides, as long as
the level is within 30 dB of it, over gaps of up to 0.2 s. What follows a longer gap, e.g. a second bark, is left out.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm.auto import tqdm

from benchmarks.hear.convert import lay_out
from m2d_embed.audio.clips import Samples, load_audio
from m2d_embed.errors import ConfigError
from m2d_embed.labelled.clips import Integers, LabelledClips, named, read_labelled

EVENTS_FILE = "events.csv"
SPLITS = ("train", "valid", "test")

_FRAME = 0.010  # seconds, of the level
_FLOOR_DB = -30.0  # below the loudest frame: not of the sound any more
_BRIDGED = 0.2  # seconds of a gap within a sound
_FADE = 0.005  # seconds at both ends of a sound, against clicks
_APART = 0.25  # seconds between sounds of one label, which could not be told from one
_MOST_AT_ONCE = 2
_BACKGROUND_DB = -45.0  # RMS below full scale
_TRIES = 50  # to find a place for an event


@dataclass(frozen=True)
class SoundscapeOptions:
    """What soundscapes are made.

    Attributes:
        labels: of the events; none means all but the background's.
        background: labels of the clips that make the background; none means pink noise.
        counts: soundscapes for training, validation and test.
        seconds: length of each.
        events: fewest and most events in one.
        snr_db: least and greatest level (RMS) of an event above the background.
        longest: seconds after which a sound is cut.
        rate: sample rate in Hz.
        seed: of everything drawn.

    Raises:
        ConfigError: if the values contradict one another; it names the field.
    """

    labels: tuple[str, ...] = ()
    background: tuple[str, ...] = ()
    counts: tuple[int, int, int] = (24, 12, 36)
    seconds: float = 10.0
    events: tuple[int, int] = (4, 8)
    snr_db: tuple[float, float] = (6.0, 30.0)
    longest: float = 2.0
    rate: int = 16_000
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.counts) < 1:
            raise ConfigError(f"counts={self.counts}: at least one soundscape for each part is needed.")
        if not 0 < self.longest <= self.seconds:
            raise ConfigError(f"longest={self.longest:g} s: a sound has to fit a soundscape of {self.seconds:g} s.")
        if not 1 <= self.events[0] <= self.events[1]:
            raise ConfigError(f"events={self.events}: a least number from 1 and a greatest are needed.")
        if not self.snr_db[0] <= self.snr_db[1]:
            raise ConfigError(f"snr_db={self.snr_db}: the least comes first.")
        both = sorted(set(self.labels) & set(self.background))
        if both:
            raise ConfigError(f"{named(both)} cannot be both events and background.")


@dataclass(frozen=True)
class Placed:
    """A clip's sound in a soundscape: its label, from when to when in seconds, and the file it came from."""

    label: str
    onset: float
    offset: float
    source: Path


def make_soundscapes(data: Path, out: Path, options: SoundscapeOptions) -> dict[str, int]:
    """Write soundscapes and their events, whole or not at all.

    Args:
        data: labelled clips, as ``read_labelled`` takes them.
        out: the folder to make, of ``events.csv`` (file, label, onset, offset, split, source) and ``audio``.
        options: what to make.

    Returns:
        Events in each part.

    Raises:
        ConfigError: if ``out`` exists, a label does not, or has no clip in a part.
        AudioError: if a clip cannot be read.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; remove it, or choose another folder.")
    clips = read_labelled(data)
    parts = split_clips(clips, data)
    labels = options.labels or tuple(name for name in clips.label_names if name not in options.background)
    files = {
        split: {name: files_of(clips, parts[split], name, split) for name in (*labels, *options.background)}
        for split in SPLITS
    }
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "audio").mkdir(parents=True)
    try:
        with (partial / EVENTS_FILE).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["file", "label", "onset", "offset", "split", "source"])
            counts = {}
            for number, split in enumerate(SPLITS):
                studio = _Studio(files[split], labels, options, np.random.default_rng([options.seed, number]))
                rows = list(_write_part(studio, split, options.counts[number], partial))
                writer.writerows(rows)
                counts[split] = len(rows)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def _write_part(studio: _Studio, split: str, count: int, folder: Path) -> Iterator[tuple[str, ...]]:
    """Write the soundscapes of a part; yield a row of the table for each event."""
    for index in tqdm(range(count), desc=split, unit="soundscape", disable=None):
        file = f"audio/{split}-{index:03}.wav"
        samples, events = studio.soundscape()
        soundfile.write(folder / file, samples, studio.options.rate, subtype="FLOAT")
        for event in events:
            yield file, event.label, f"{event.onset:.3f}", f"{event.offset:.3f}", split, event.source.name


def split_clips(clips: LabelledClips, data: Path) -> dict[str, Integers]:
    """Clips to train, validate and test on: as the data says, or of its folds the first to test, the next to validate.

    Raises:
        ConfigError: if the data has too few folds or clips.
    """
    splits = lay_out(clips, data)
    if "train" in splits:
        return splits
    test, valid, *train = splits.values()
    return {"train": np.concatenate(train), "valid": valid, "test": test}


def files_of(clips: LabelledClips, indices: Integers, label: str, split: str) -> list[Path]:
    """The clips of a part with this label and no other.

    Raises:
        ConfigError: if there is no such label, or no such clip in this part.
    """
    if label not in clips.label_names:
        raise ConfigError(f"no label {label!r}; there are {named(clips.label_names)}.")
    wanted = np.array([name == label for name in clips.label_names])
    files = [clips.files[i] for i in indices if (clips.targets[i] == wanted).all()]
    if not files:
        raise ConfigError(f"no clip of {label!r} alone in the part {split}.")
    return files


def find_sound(samples: Samples, rate: int) -> tuple[int, int]:
    """From which sample to which the loudest sound of a clip lasts.

    Args:
        samples: (n,), n > 0.
        rate: Hz.

    Returns:
        Its first sample, and the one after its last; the whole clip if it is silent.
    """
    step = max(1, round(_FRAME * rate))
    padded = np.pad(samples, (0, -len(samples) % step)).astype(np.float64)
    power = np.square(padded).reshape(-1, step).mean(axis=1)
    loudest = int(power.argmax())
    if power[loudest] == 0:
        return 0, len(samples)
    active = np.flatnonzero(power >= power[loudest] * 10 ** (_FLOOR_DB / 10))
    breaks = np.flatnonzero(np.diff(active) > 1 + _BRIDGED / _FRAME) + 1
    run = next(run for run in np.split(active, breaks) if loudest in run)
    return int(run[0]) * step, min(len(samples), (int(run[-1]) + 1) * step)


class _Studio:
    """Makes soundscapes of one part; every clip of a label is used before one is used again."""

    def __init__(
        self,
        files: dict[str, list[Path]],
        labels: Sequence[str],
        options: SoundscapeOptions,
        rng: np.random.Generator,
    ):
        self.files, self.labels, self.options, self.rng = files, list(labels), options, rng
        self.queues: dict[str, list[Path]] = {}
        self.next_labels: list[str] = []

    def soundscape(self) -> tuple[Samples, list[Placed]]:
        options = self.options
        length = round(options.seconds * options.rate)
        mix = self._background(length)
        placed: list[Placed] = []
        for _ in range(int(self.rng.integers(options.events[0], options.events[1] + 1))):
            label = self._next_label()
            source, sound = self._sound(label)
            start = self._place(placed, label, len(sound), length)
            if start is None:
                continue
            gain = _gain(sound, _BACKGROUND_DB + self.rng.uniform(*options.snr_db))
            mix[start : start + len(sound)] += gain * _faded(sound, options.rate)
            placed.append(Placed(label, start / options.rate, (start + len(sound)) / options.rate, source))
        peak = float(np.abs(mix).max())
        return mix / max(peak, 1.0), sorted(placed, key=lambda event: event.onset)

    def _next_label(self) -> str:
        if not self.next_labels:
            self.next_labels = list(self.rng.permutation(self.labels))
        return self.next_labels.pop()

    def _clip(self, label: str) -> tuple[Path, Samples]:
        queue = self.queues.setdefault(label, [])
        if not queue:
            queue += [self.files[label][i] for i in self.rng.permutation(len(self.files[label]))]
        file = queue.pop()
        return file, load_audio(file, self.options.rate)

    def _sound(self, label: str) -> tuple[Path, Samples]:
        file, samples = self._clip(label)
        start, stop = find_sound(samples, self.options.rate)
        return file, samples[start : min(stop, start + round(self.options.longest * self.options.rate))]

    def _place(self, placed: Sequence[Placed], label: str, sound: int, length: int) -> int | None:
        """Where a sound may begin, in samples; None if no place was found."""
        rate = self.options.rate
        for _ in range(_TRIES):
            start = int(self.rng.integers(0, length - sound + 1))
            onset, offset = start / rate, (start + sound) / rate
            beside = [event for event in placed if event.onset < offset and onset < event.offset]
            merged = any(
                event.label == label and event.onset - _APART < offset and onset < event.offset + _APART
                for event in placed
            )
            if len(beside) < _MOST_AT_ONCE and not merged:
                return start
        return None

    def _background(self, length: int) -> Samples:
        if not self.options.background:
            samples = _pink_noise(length, self.rng)
        else:
            samples = np.zeros(0, np.float32)
            while len(samples) < length:
                label = str(self.rng.choice(self.options.background))
                samples = np.concatenate([samples, self._clip(label)[1]])
            samples = samples[:length]
        background: Samples = (_gain(samples, _BACKGROUND_DB) * samples).astype(np.float32)
        return background


def _gain(samples: Samples, level_db: float) -> np.float32:
    """What brings samples to a level (RMS); nothing does of silence."""
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
    return np.float32(10 ** (level_db / 20) / rms if rms > 0 else 0.0)


def _faded(samples: Samples, rate: int) -> Samples:
    ramp = np.minimum(np.arange(1, len(samples) + 1) / (_FADE * rate), 1).astype(np.float32)
    return samples * ramp * ramp[::-1]


def _pink_noise(length: int, rng: np.random.Generator) -> Samples:
    """White noise whose power falls with frequency, from 20 parts of the length on."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 20))
    noise: Samples = np.fft.irfft(spectrum, length).astype(np.float32)
    return noise
