"""Many clips of any length through one encoder: exact, in batches, in bounded memory.

Clips are never padded to one another. Each is streamed and cut into windows, and windows of equal width are encoded
together, whichever clips they come from; so the result for a clip does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from m2d_embed.audio import Clip
from m2d_embed.config import FeatureConfig, ModelConfig
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.frontend import LogMel
from m2d_embed.windows import WindowCutter, column_times, interleave, pad_to_patch

#: Windows that may wait for others of their width, in batches; beyond it the fullest group goes ahead.
_MAX_WAITING_BATCHES = 8

R = TypeVar("R")
Result = TypeVar("Result", covariant=True)


class Timestamps(NamedTuple):
    """Embeddings over time, (T, D), and the centre of each in milliseconds, (T,)."""

    embeddings: Tensor
    timestamps: Tensor


class FrameEncoder(Protocol):
    """What batching needs of a model."""

    config: ModelConfig
    frontend: LogMel

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    def window_frames(self, log_mel: Tensor, features: FeatureConfig) -> Tensor:
        """(N, 1, mels, frames) of whole patches -> (N, T, D) float32."""


def encode_scenes(
    model: FrameEncoder, clips: Sequence[Clip | AudioError], features: FeatureConfig, batch_size: int
) -> Iterator[tuple[int, Tensor | AudioError]]:
    """Yield ``(index, scene embedding)`` for each clip as it is done, in no fixed order.

    Scene embeddings are (D,) float32 on the CPU. A clip that cannot be read yields its error instead.
    """
    return _encode(model, clips, replace(features, hop_ms=None), batch_size, _SceneMean)


def encode_timestamps(
    model: FrameEncoder, clips: Sequence[Clip | AudioError], features: FeatureConfig, batch_size: int
) -> Iterator[tuple[int, Timestamps | AudioError]]:
    """Yield ``(index, Timestamps)`` for each clip as it is done, in no fixed order, on the CPU.

    A clip that cannot be read yields its error instead.
    """
    hop_frames = features.hop_frames(model.config)
    return _encode(model, clips, features, batch_size, lambda: _Columns(model.config, hop_frames))


class _Collector(Protocol[Result]):
    """Gathers the columns of one clip, window by window."""

    def add(self, shift: int, order: int, frames: Tensor) -> None: ...

    def result(self, duration_ms: float) -> Result: ...


class _SceneMean:
    """The mean over all columns, kept as a running sum: a long clip takes no more memory than a short one."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, shift: int, order: int, frames: Tensor) -> None:
        self.total = self.total + frames.sum(0, dtype=torch.float64)
        self.count += len(frames)

    def result(self, duration_ms: float) -> Tensor:
        return torch.as_tensor(self.total / self.count).float()


class _Columns:
    """Every column, put back in order: by window, and interleaved if there are shifted copies."""

    def __init__(self, config: ModelConfig, hop_frames: int):
        self.config = config
        self.hop_frames = hop_frames
        self.parts: dict[int, dict[int, Tensor]] = defaultdict(dict)

    def add(self, shift: int, order: int, frames: Tensor) -> None:
        self.parts[shift][order] = frames.clone()

    def result(self, duration_ms: float) -> Timestamps:
        shifted: list[Tensor] = []
        for shift in range(0, self.config.patch_size[1], self.hop_frames):
            parts = self.parts.pop(shift, {})
            shifted.append(torch.cat([parts[i] for i in sorted(parts)]) if parts else shifted[0][:0])
        woven = interleave(shifted) if len(shifted) > 1 else shifted[0]
        times = column_times(len(woven), self.hop_frames, self.config, duration_ms)
        return Timestamps(woven[: len(times)], times)


@dataclass
class _ClipState(Generic[R]):
    """Where one clip is: how many of its windows wait, and what has been collected of the others."""

    index: int
    collector: _Collector[R]
    waiting: int = 0
    read: bool = False
    num_samples: int = 0

    @property
    def done(self) -> bool:
        return self.read and self.waiting == 0

    def result(self, sample_rate: int) -> tuple[int, R]:
        return self.index, self.collector.result(1000.0 * self.num_samples / sample_rate)


@dataclass
class _Window(Generic[R]):
    state: _ClipState[R]
    shift: int
    order: int
    log_mel: Tensor  # (mels, frames), whole patches
    columns: int


class _WaitingRoom(Generic[R]):
    """Windows wait here for others of their width, to be encoded together."""

    def __init__(self, model: FrameEncoder, features: FeatureConfig, batch_size: int):
        self.model = model
        self.features = features
        self.batch_size = batch_size
        self.groups: dict[int, list[_Window[R]]] = defaultdict(list)  # width in frames -> windows

    def push(self, window: _Window[R]) -> Iterator[_ClipState[R]]:
        """Take a window; encode its group when that is complete, or the fullest one when there is no more room."""
        width = window.log_mel.shape[1]
        self.groups[width].append(window)
        window.state.waiting += 1
        if len(self.groups[width]) == self.batch_size:
            yield from self._encode(width)
        elif sum(map(len, self.groups.values())) >= _MAX_WAITING_BATCHES * self.batch_size:
            yield from self._encode(max(self.groups, key=lambda w: len(self.groups[w])))

    def flush(self) -> Iterator[_ClipState[R]]:
        """Encode whatever waits."""
        for width in list(self.groups):
            yield from self._encode(width)

    def drop(self, state: _ClipState[R]) -> None:
        """Forget the windows of a clip that turned out to be bad."""
        kept = {width: [w for w in group if w.state is not state] for width, group in self.groups.items()}
        self.groups = defaultdict(list, {width: group for width, group in kept.items() if group})

    def _encode(self, width: int) -> Iterator[_ClipState[R]]:
        """Encode one group; yield the clips that are done with it."""
        group = self.groups.pop(width)
        log_mel = torch.stack([window.log_mel for window in group]).unsqueeze(1)
        frames = self.model.window_frames(log_mel, self.features).cpu()  # (N, T, D)
        for window, columns in zip(group, frames, strict=True):
            window.state.collector.add(window.shift, window.order, columns[: window.columns])
            window.state.waiting -= 1
            if window.state.done:
                yield window.state


def _encode(
    model: FrameEncoder,
    clips: Sequence[Clip | AudioError],
    features: FeatureConfig,
    batch_size: int,
    new_collector: Callable[[], _Collector[R]],
) -> Iterator[tuple[int, R | AudioError]]:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be a whole number from 1 on, not {batch_size!r}.")
    rate = model.config.sample_rate
    room: _WaitingRoom[R] = _WaitingRoom(model, features, batch_size)
    for index in _longest_first(clips):
        clip = clips[index]
        if isinstance(clip, AudioError):
            yield index, clip
            continue
        state = _ClipState(index, new_collector())
        try:
            for window in _windows_of(clip, state, model, features):
                for other in room.push(window):
                    yield other.result(rate)
        except AudioError as error:
            room.drop(state)
            yield index, error
            continue
        state.read = True
        if state.done:
            yield state.result(rate)
    for state in room.flush():
        yield state.result(rate)


def _longest_first(clips: Sequence[Clip | AudioError]) -> list[int]:
    """Indices by length: clips of one length, and so windows of one width, come together."""
    seconds = [clip.seconds if isinstance(clip, Clip) else 0.0 for clip in clips]
    return sorted(range(len(clips)), key=seconds.__getitem__, reverse=True)


def _windows_of(clip: Clip, state: _ClipState[R], model: FrameEncoder, features: FeatureConfig) -> Iterator[_Window[R]]:
    """Stream a clip: samples -> log-mel -> windows, for each of the shifted copies that the hop asks for."""
    config, rate = model.config, model.config.sample_rate
    shifts = range(0, config.patch_size[1], features.hop_frames(config))
    cutters = [WindowCutter(config, shift) for shift in shifts]
    orders = [0] * len(cutters)

    def samples() -> Iterator[Tensor]:
        for block in clip.blocks(rate):
            state.num_samples += len(block)
            yield torch.tensor(block, device=model.device)

    def emit(which: int, windows: Iterator[tuple[Tensor, int]]) -> Iterator[_Window[R]]:
        for log_mel, columns in windows:
            yield _Window(state, cutters[which].shift, orders[which], pad_to_patch(log_mel, config), columns)
            orders[which] += 1

    for piece in model.frontend.stream(samples()):
        for which, cutter in enumerate(cutters):
            yield from emit(which, cutter.push(piece))
    for which, cutter in enumerate(cutters):
        yield from emit(which, cutter.finish())
