"""What is in a batch: the configuration of the data, the batch itself, and how clips that were read become one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2d_embed.config import ModelConfig
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.pretrain.crops import Crop, fit
from m2d_embed.pretrain.masking import MaskingConfig, draw_order
from m2d_embed.pretrain.mel_cache import MelCrop
from m2d_embed.pretrain.sources import is_shards
from m2d_embed.training.sampling import Purpose, rng_at

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DataConfig:
    """What a run is trained on.

    Attributes:
        source: a folder, a ``.csv`` manifest, or WebDataset shards: a ``.tar``, a glob or brace pattern of them, or
            http(s) addresses separated by spaces.
        short_clips: a clip shorter than the window is repeated, or padded.
        norm_stats: mean and standard deviation of the log-mel; null measures them on ``norm_crops`` crops.
        norm_crops: crops that they are measured on.
        cache: a folder for the log-mels of the whole source; null computes them as they are needed.
        noise: background noise to mix in, a folder or a manifest.
        noise_ratio: share of the noise in the mixture.
        feature_hop_ms: step of precomputed ``features``; row ``j`` of these stands for the time ``(j + 0.5) * hop``.
        workers: processes that read the data; 0 reads in the main process.
    """

    source: str
    short_clips: Literal["repeat", "pad"] = "repeat"
    norm_stats: tuple[float, float] | None = None
    norm_crops: int = 1000
    cache: str | None = None
    noise: str | None = None
    noise_ratio: float = 0.2
    feature_hop_ms: float = 20.0
    workers: int = 2

    def __post_init__(self) -> None:
        _require(bool(self.source.strip()), "data.source is empty; name a folder, a .csv manifest or .tar shards")
        sharded = is_shards(self.source)  # raises on an address that cannot be read
        _require(
            self.short_clips in ("repeat", "pad"), f'data.short_clips is "repeat" or "pad", not {self.short_clips!r}'
        )
        stats = self.norm_stats
        _require(
            stats is None or (len(stats) == 2 and all(map(math.isfinite, stats)) and stats[1] > 0),
            f"data.norm_stats must be a mean and a positive standard deviation, not {stats}",
        )
        _require(self.norm_crops > 0, f"data.norm_crops must be positive, not {self.norm_crops}")
        _require(
            not (sharded and self.cache is not None),
            "data.cache: shards are streamed and cannot be cached; leave it out, or unpack the shards",
        )
        _require(
            self.noise is None or (bool(self.noise.strip()) and not is_shards(self.noise)),
            f"data.noise must be a folder or a .csv manifest, not {self.noise!r}",
        )
        _require(0 <= self.noise_ratio < 1, f"data.noise_ratio must be 0 or more and below 1, not {self.noise_ratio}")
        _require(0 < self.feature_hop_ms < math.inf, f"data.feature_hop_ms must be positive, not {self.feature_hop_ms}")
        _require(self.workers >= 0, f"data.workers must not be negative, not {self.workers}")


@dataclass(frozen=True)
class BatchSpec:
    """All that decides what is in a batch, apart from the files.

    ``labels`` are the names of the columns of ``Batch.labels``; without any there are no labels. ``captions`` and
    ``features`` ask for these parts of a batch.

    Raises:
        ConfigError: if the model's window is too short to be trained on.
    """

    data: DataConfig
    model: ModelConfig
    masking: MaskingConfig
    seed: int = 0
    labels: tuple[str, ...] = ()
    captions: bool = False
    features: bool = False

    def __post_init__(self) -> None:
        _require(self.num_frames > 1, f"input_size has {self.num_frames} frames, too few to train on")
        _require(len(set(self.labels)) == len(self.labels), "a label is named twice")

    @property
    def num_frames(self) -> int:
        """Frames of a crop: the model's window."""
        return self.model.input_size[1]

    @property
    def num_samples(self) -> int:
        """Samples of a crop: as many as have exactly that many frames."""
        return (self.num_frames - 1) * self.model.hop_length

    def column_seconds(self) -> npt.NDArray[np.float64]:
        """(T,) times of the centres of the patch columns, from the start of the crop."""
        patch = self.model.patch_size[1]
        return (np.arange(self.model.grid_size[1]) * patch + (patch - 1) / 2) * self.model.frame_ms / 1000

    def plain(self) -> BatchSpec:
        """The same crops without noise, labels, captions and features."""
        data = dataclasses.replace(self.data, noise=None)
        return dataclasses.replace(self, data=data, labels=(), captions=False, features=False)


@dataclass
class Batch:
    """Crops and what goes with them.

    Attributes:
        audio: (B, samples) float32 in [-1, 1]; None with a cache.
        log_mel: (B, 1, mels, frames) float16 from a cache, not normalised; None without one.
        valid_frames: (B,) int64, frames that hold audio; the rest is padding, to be zeroed *after* normalisation.
        order: (B, N) int64, for each clip a permutation of its patches as ``masking.draw_order`` makes it.
        noise_audio: (B, samples) float32, background noise for each clip.
        noise_log_mel: (B, 1, mels, frames) float16, the same from a cache.
        labels: (B, C) float32, multi-hot.
        captions: one for each clip.
        features: (B, T, D) float32, precomputed frame features at the times of the patch columns.
        names: which file each clip is of.
        bad: files that could not be read while this batch was built, and why; others took their place.
    """

    audio: Tensor | None
    log_mel: Tensor | None
    valid_frames: Tensor
    order: Tensor
    noise_audio: Tensor | None = None
    noise_log_mel: Tensor | None = None
    labels: Tensor | None = None
    captions: list[str] | None = None
    features: Tensor | None = None
    names: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.valid_frames)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A copy with all tensors on a device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A copy in pinned memory; the data loader calls this."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        changed: dict[str, Any] = {name: change(value) for name, value in values if isinstance(value, Tensor)}
        return dataclasses.replace(self, **changed)


@dataclass(frozen=True)
class Sample:
    """One clip as it was read: a crop of audio or of log-mel, and what the source says of it.

    ``features`` are (T, D) float32, at the times of the patch columns.
    """

    name: str
    crop: Crop | MelCrop
    labels: tuple[str, ...] = ()
    caption: str = ""
    features: Features | None = None


class BatchBuilder:
    """Samples -> a batch."""

    def __init__(self, spec: BatchSpec):
        self.spec = spec
        self._column = {label: i for i, label in enumerate(spec.labels)}

    def build(
        self,
        positions: Sequence[int],
        samples: Sequence[Sample],
        noise: Sequence[Crop | MelCrop] | None,
        bad: dict[str, str],
    ) -> Batch:
        """A batch of samples, masks drawn by their positions.

        Raises:
            AudioError: if frame features are of different sizes.
            ConfigError: if a label is not one of the names given.
        """
        spec = self.spec
        clips, valid = self._fitted([sample.crop for sample in samples], spec.data.short_clips)
        batch = Batch(None, None, torch.tensor(valid), self._orders(positions), bad=bad)
        batch.names = [sample.name for sample in samples]
        batch.audio, batch.log_mel = _by_kind(clips)
        if noise is not None:
            # Noise goes on for as long as the window does, whatever becomes of a short clip.
            batch.noise_audio, batch.noise_log_mel = _by_kind(self._fitted(noise, "repeat")[0])
        if spec.labels:
            batch.labels = torch.stack([self._multi_hot(sample) for sample in samples])
        if spec.captions:
            batch.captions = [sample.caption for sample in samples]
        if spec.features:
            batch.features = self._features(samples)
        return batch

    def _orders(self, positions: Sequence[int]) -> Tensor:
        spec = self.spec
        rngs = (rng_at(spec.seed, position, Purpose.MASK) for position in positions)
        orders = [draw_order(spec.masking, spec.model.grid_size, rng) for rng in rngs]
        return torch.from_numpy(np.stack(orders))

    def _fitted(self, crops: Sequence[Crop | MelCrop], how: Literal["repeat", "pad"]) -> tuple[Tensor, list[int]]:
        spec = self.spec
        arrays: list[npt.NDArray[np.generic]] = []
        valid = []
        for crop in crops:
            if isinstance(crop, Crop):
                samples, count = fit(crop.samples, spec.num_samples, how)
                arrays.append(samples)
                valid.append(min(spec.num_frames, 1 + count // spec.model.hop_length))
            else:
                mels, count = _fit_frames(crop.log_mel, spec.num_frames, how)
                arrays.append(mels[None])
                valid.append(count)
        return torch.from_numpy(np.stack(arrays)), valid

    def _multi_hot(self, sample: Sample) -> Tensor:
        row = torch.zeros(len(self._column))
        for label in sample.labels:
            if label not in self._column:
                raise ConfigError(f"{sample.name}: its label {label!r} is not one of the {len(self._column)} given.")
            row[self._column[label]] = 1
        return row

    @staticmethod
    def _features(samples: Sequence[Sample]) -> Tensor:
        rows = [sample.features for sample in samples if sample.features is not None]
        for sample, row in zip(samples, rows, strict=True):
            if row.shape[1] != rows[0].shape[1]:
                raise AudioError(
                    f"{sample.name}: its features have {row.shape[1]} values a frame, "
                    f"but those of {samples[0].name} {rows[0].shape[1]}."
                )
        return torch.from_numpy(np.stack(rows))


def _by_kind(clips: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(audio, log-mel), one of them None."""
    return (clips, None) if clips.ndim == 2 else (None, clips)


def _fit_frames(
    mels: npt.NDArray[np.float16], num_frames: int, how: Literal["repeat", "pad"]
) -> tuple[npt.NDArray[np.float16], int]:
    frames = mels.shape[1]
    if how == "repeat":
        return mels[:, np.arange(num_frames) % frames], num_frames
    fitted = np.zeros((len(mels), num_frames), np.float16)
    fitted[:, :frames] = mels
    return fitted, frames


def read_features(file: Path | BinaryIO, name: str, crop: Crop | MelCrop, spec: BatchSpec) -> Features:
    """Read precomputed frame features for a crop, linearly interpolated at the times of its patch columns.

    Args:
        file: a ``.npy`` of (T', D) floats, its path or a stream.
        name: what to call it in messages.
        crop: of the clip that the features are of.
        spec: says where the columns are, and what becomes of short clips.

    Returns:
        (T, D) float32. Before the first and behind the last frame the features stay what they are there.

    Raises:
        AudioError: if they cannot be read, are not such an array, or not finite.
    """
    try:
        features = np.load(file, mmap_mode="r" if isinstance(file, Path) else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise AudioError(f"{name}: these features cannot be read ({error}).") from error
    if not (isinstance(features, np.ndarray) and features.ndim == 2 and features.size and features.dtype.kind == "f"):
        raise AudioError(f"{name}: features are a floating-point array of shape (frames, values), which this is not.")
    times = crop.start_seconds + spec.column_seconds()
    if spec.data.short_clips == "repeat":
        times = times % crop.clip_seconds
    last = len(features) - 1
    places = np.clip(times * 1000 / spec.data.feature_hop_ms - 0.5, 0, last)
    before = np.floor(places).astype(np.int64)
    share = (places - before)[:, None].astype(np.float32)
    left, right = (features[rows].astype(np.float32) for rows in (before, np.minimum(before + 1, last)))
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise AudioError(f"{name}: these features are not finite.")
    interpolated: Features = left + share * (right - left)
    return interpolated


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"{message}.")
