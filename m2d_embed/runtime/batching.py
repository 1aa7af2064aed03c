"""Many clips of any length through one encoder: exact, in batches, in bounded memory, read ahead by threads.

Clips are never padded to one another. Each is streamed and cut into windows, and windows of equal width are encoded
together, whichever clips they come from; so the result for a clip does not depend on what else is in the batch.

Threads decode, downmix and resample (``prefetch``). The caller's thread takes what they have read, in a fixed order,
and does all that needs torch: log-mel, windows, encoder. On a GPU it never waits for the batch it has just begun.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from m2d_embed.audio.clips import Clip, Samples
from m2d_embed.backends.threads import usable_cores
from m2d_embed.config import FeatureConfig, ModelConfig, is_whole
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.model.frontend import LogMel
from m2d_embed.model.windows import WindowCutter, pad_to_patch
from m2d_embed.runtime.collectors import Collector, Kind, Place, Timestamps, scenes_kind, timestamps_kind
from m2d_embed.runtime.prefetch import read_ahead
from m2d_embed.runtime.profiling import DEVICE, ENCODER, LOG_MEL, Stopwatch
from m2d_embed.runtime.transfer import Link, link_to

#: Windows that may wait for others of their width, in batches; beyond it the fullest group goes ahead.
_MAX_WAITING_BATCHES = 8
_FRAMES_A_CALL = 1 << 15  # of log-mel computed together on a GPU: about 100 MB there
_SECONDS_AHEAD = 120.0  # of audio, for each thread that reads ahead: 8 MB at 16 kHz
_MOST_THREADS = 8
_SHORT = 10.0  # seconds

R = TypeVar("R")

__all__ = ["DEFAULT_PIPELINE", "FrameEncoder", "Pipeline", "Timestamps", "encode_scenes", "encode_timestamps"]


@dataclass(frozen=True)
class Pipeline:
    """How a run is fed, and who watches it. Results do not depend on it.

    ``decode_threads`` read clips ahead of the model; 0 reads each when it is its turn, None chooses by the machine.
    ``stopwatch`` is told where the time goes.

    Raises:
        ConfigError: if ``decode_threads`` is negative.
    """

    decode_threads: int | None = None
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        threads = self.decode_threads
        if threads is not None and (not is_whole(threads) or threads < 0):
            raise ConfigError(f"decode_threads must be a whole number from 0 on, or None, not {threads!r}.")

    def threads_for(self, device: torch.device) -> int:
        """How many threads decode for a model on ``device``: on the CPU few, as the model needs its cores itself."""
        if self.decode_threads is not None:
            return self.decode_threads
        cores = usable_cores()
        return max(1, min(_MOST_THREADS, cores // 4 if device.type == "cpu" else cores - 1))


DEFAULT_PIPELINE = Pipeline()


class FrameEncoder(Protocol):
    """What batching needs of a model."""

    config: ModelConfig
    frontend: LogMel

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    def window_frames(self, log_mel: Tensor, features: FeatureConfig) -> Tensor:
        """(N, 1, mels, frames) of whole patches -> (N, T, D) float32."""

    def most_windows(self, frames: int) -> int:
        """How many windows of so many frames it takes in one call at most."""


def encode_scenes(
    model: FrameEncoder,
    clips: Sequence[Clip | AudioError],
    features: FeatureConfig,
    batch_size: int,
    pipeline: Pipeline = DEFAULT_PIPELINE,
) -> Generator[tuple[int, Tensor | AudioError], None, None]:
    """Yield ``(index, scene embedding)`` for each clip as it is done, in no fixed order.

    Scene embeddings are (D,) float32 on the CPU. A clip that cannot be read yields its error instead.
    """
    kind = scenes_kind(features.pooling(model.config))
    one_a_patch = replace(features, hop_ms=model.config.column_ms)
    return _encode(model, clips, one_a_patch, batch_size, kind, pipeline)


def encode_timestamps(
    model: FrameEncoder,
    clips: Sequence[Clip | AudioError],
    features: FeatureConfig,
    batch_size: int,
    pipeline: Pipeline = DEFAULT_PIPELINE,
) -> Generator[tuple[int, Timestamps | AudioError], None, None]:
    """Yield ``(index, Timestamps)`` for each clip as it is done, in no fixed order, on the CPU.

    A clip that cannot be read yields its error instead.
    """
    kind = timestamps_kind(model.config, features.hop_frames(model.config))
    return _encode(model, clips, features, batch_size, kind, pipeline)


class _ClipState(Generic[R]):
    """Where one clip is: its frames not yet in a window, how many windows wait, and what came of the others."""

    def __init__(self, index: int, collector: Collector[R], config: ModelConfig, hop_frames: int):
        self.index = index
        self.collector = collector
        self.config = config
        self.cutters = [WindowCutter(config, shift) for shift in range(0, config.patch_size[1], hop_frames)]
        self.orders = [0] * len(self.cutters)
        self.duration_ms = 0.0
        self.waiting = 0
        self.read = False

    @property
    def done(self) -> bool:
        return self.read and self.waiting == 0

    def cut(self, log_mel: Tensor | None) -> Iterator[_Window[R]]:
        """The windows that are certain with the next (mels, n) frames; None is the end of the clip."""
        for which, cutter in enumerate(self.cutters):
            for frames, columns in cutter.finish() if log_mel is None else cutter.push(log_mel):
                place = Place(cutter.shift, self.orders[which], columns)
                self.orders[which] += 1
                self.waiting += 1
                yield _Window(self, place, pad_to_patch(frames, self.config))
        self.read = log_mel is None

    def result(self) -> tuple[int, R]:
        return self.index, self.collector.result(self.duration_ms)


@dataclass
class _Window(Generic[R]):
    state: _ClipState[R]
    place: Place
    log_mel: Tensor  # (mels, frames), whole patches


class _FrontEnd(Generic[R]):
    """Samples -> log-mel, of many clips in one call where calls are what costs, on a GPU."""

    def __init__(self, front_end: LogMel, link: Link, frames_a_call: int, stopwatch: Stopwatch):
        self.front_end = front_end
        self.link = link
        self.frames_a_call = frames_a_call
        self.stopwatch = stopwatch
        self.pieces: list[tuple[_ClipState[R], Samples | None]] = []
        self.frames = 0

    def push(self, state: _ClipState[R], piece: Samples | None) -> Iterator[tuple[_ClipState[R], Tensor | None]]:
        """Take the next piece of a clip, None at its end; yield log-mels once there is enough for a call."""
        self.pieces.append((state, piece))
        if piece is not None:
            self.frames += self._slot(piece)
        if self.frames >= self.frames_a_call or not self.frames:
            yield from self.flush()

    def flush(self) -> Iterator[tuple[_ClipState[R], Tensor | None]]:
        """Yield the log-mel, (mels, n), of each piece that waits, and None for the ends, in their order."""
        pieces, self.pieces, self.frames = self.pieces, [], 0
        with self.stopwatch.stage(LOG_MEL):
            log_mels = iter(list(self._log_mels([piece for _, piece in pieces if piece is not None])))
        for state, piece in pieces:
            yield state, None if piece is None else next(log_mels)

    def _log_mels(self, pieces: Sequence[Samples]) -> Iterator[Tensor]:
        """Lay the pieces end to end, each from a whole frame on; what straddles two of them is computed in vain."""
        if not pieces:
            return
        hop, n_fft = self.front_end.hop_length, self.front_end.n_fft
        slots = [self._slot(piece) for piece in pieces]
        host = self.link.host_buffer(((sum(slots[:-1])) * hop + len(pieces[-1]),), torch.float32)
        samples = host.numpy()
        start = 0
        for slot, piece in zip(slots, pieces, strict=True):
            samples[start : start + slot * hop] = 0  # pads the piece
            samples[start : start + len(piece)] = piece
            start += slot * hop
        log_mel = self.front_end.of_frames(self.link.upload(host))
        start = 0
        for slot, piece in zip(slots, pieces, strict=True):
            yield log_mel[:, start : start + (len(piece) - n_fft) // hop + 1]
            start += slot

    def _slot(self, piece: Samples) -> int:
        """Hops that a piece takes up."""
        return -(-len(piece) // self.front_end.hop_length)


@dataclass
class _Batch(Generic[R]):
    """Windows that are being encoded, and how to wait for what comes of them."""

    windows: list[_Window[R]]
    fetch: Callable[[], Tensor]


class _WaitingRoom(Generic[R]):
    """Windows wait here for others of their width, to be encoded together.

    Args:
        encode: begins to encode a group.
        room: how many windows of so many frames make a group complete.
        most_waiting: windows of all groups together.
    """

    def __init__(self, encode: Callable[[list[_Window[R]]], _Batch[R]], room: Callable[[int], int], most_waiting: int):
        self.encode = encode
        self.room = room
        self.most_waiting = most_waiting
        self.groups: dict[int, list[_Window[R]]] = defaultdict(list)  # width in frames -> windows

    def push(self, window: _Window[R]) -> Iterator[_Batch[R]]:
        """Take a window; encode its group when that is complete, or the fullest one when there is no more room."""
        width = window.log_mel.shape[1]
        self.groups[width].append(window)
        if len(self.groups[width]) == self.room(width):
            yield self.encode(self.groups.pop(width))
        elif sum(map(len, self.groups.values())) >= self.most_waiting:
            yield self.encode(self.groups.pop(max(self.groups, key=lambda w: len(self.groups[w]))))

    def flush(self) -> Iterator[_Batch[R]]:
        """Encode whatever waits."""
        for width in list(self.groups):
            yield self.encode(self.groups.pop(width))


class _Run(Generic[R]):
    """Takes the pieces of all clips, and gives back a clip's result when its last window has come back."""

    def __init__(
        self, model: FrameEncoder, features: FeatureConfig, batch_size: int, kind: Kind[R], stopwatch: Stopwatch
    ):
        self.model = model
        self.features = features
        self.kind = kind
        self.stopwatch = stopwatch
        self.link = link_to(model.device)
        self.front_end: _FrontEnd[R] = _FrontEnd(model.frontend, self.link, _frames_a_call(model.device), stopwatch)
        self.batch_size = batch_size
        self.waiting: _WaitingRoom[R] = _WaitingRoom(self._encode, self._room, _MAX_WAITING_BATCHES * batch_size)
        self.under_way: deque[_Batch[R]] = deque()
        self.states: dict[int, _ClipState[R]] = {}

    def take(self, index: int, clip: Clip, piece: Samples) -> Iterator[tuple[int, R]]:
        """Take the next piece of a clip."""
        if index not in self.states:
            config, collector = self.model.config, self.kind.new_collector(clip.seconds)
            self.states[index] = _ClipState(index, collector, config, self.features.hop_frames(config))
        yield from self._advance(self.front_end.push(self.states[index], piece))

    def end(self, index: int, seconds: float) -> Iterator[tuple[int, R]]:
        """A clip has been read to its end."""
        state = self.states.pop(index)
        state.duration_ms = 1000.0 * seconds
        self.stopwatch.count_audio(seconds)
        yield from self._advance(self.front_end.push(state, None))

    def fail(self, index: int) -> None:
        """Forget a clip that turned out to be bad. What waits of it is still encoded, and comes to nothing."""
        self.states.pop(index, None)

    def finish(self) -> Iterator[tuple[int, R]]:
        """Encode whatever waits."""
        yield from self._advance(self.front_end.flush())
        for batch in self.waiting.flush():
            yield from self._start(batch)
        yield from self._land(0)

    def _advance(self, log_mels: Iterator[tuple[_ClipState[R], Tensor | None]]) -> Iterator[tuple[int, R]]:
        for state, log_mel in log_mels:
            for window in state.cut(log_mel):
                for batch in self.waiting.push(window):
                    yield from self._start(batch)
            if state.done:
                yield state.result()

    def _encode(self, windows: list[_Window[R]]) -> _Batch[R]:
        self.stopwatch.count_batch(len(windows), self._room(windows[0].log_mel.shape[1]))
        windows.sort(key=lambda window: window.place.columns)  # so that they are reduced in one or two calls
        with self.stopwatch.stage(ENCODER):
            log_mel = torch.stack([window.log_mel for window in windows]).unsqueeze(1)
            frames = self.model.window_frames(log_mel, self.features)  # (N, T, D)
            kept = self.kind.reduce(frames, [window.place.columns for window in windows])
            return _Batch(windows, self.link.download(kept))

    def _room(self, frames: int) -> int:
        """Windows of so many frames in a batch: on a CPU no more than the model takes in a call, for memory's sake."""
        if self.model.device.type != "cpu":
            return self.batch_size
        return min(self.batch_size, self.model.most_windows(frames))

    def _start(self, batch: _Batch[R]) -> Iterator[tuple[int, R]]:
        self.under_way.append(batch)
        yield from self._land(self.link.batches_behind)

    def _land(self, behind: int) -> Iterator[tuple[int, R]]:
        """Wait for the oldest batches until ``behind`` are left; yield the clips that are done with them."""
        while len(self.under_way) > behind:
            batch = self.under_way.popleft()
            with self.stopwatch.stage(DEVICE):
                results = batch.fetch()
            for window, values in zip(batch.windows, results, strict=True):
                window.state.collector.add(window.place, values)
                window.state.waiting -= 1
                if window.state.done:
                    yield window.state.result()


def _encode(
    model: FrameEncoder,
    clips: Sequence[Clip | AudioError],
    features: FeatureConfig,
    batch_size: int,
    kind: Kind[R],
    pipeline: Pipeline,
) -> Generator[tuple[int, R | AudioError], None, None]:
    if not is_whole(batch_size) or batch_size < 1:
        raise ConfigError(f"batch_size must be a whole number from 1 on, not {batch_size!r}.")
    yield from ((index, clip) for index, clip in enumerate(clips) if isinstance(clip, AudioError))
    order = _longest_first(clips)
    run = _Run(model, features, batch_size, kind, pipeline.stopwatch)
    with closing(_read(model, [clip for _, clip in order], pipeline)) as items:
        for position, item in items:
            index, clip = order[position]
            if isinstance(item, AudioError):
                run.fail(index)
                yield index, item
            elif isinstance(item, float):
                yield from run.end(index, item)
            else:
                yield from run.take(index, clip, item)
    yield from run.finish()


def _read(
    model: FrameEncoder, clips: Sequence[Clip], pipeline: Pipeline
) -> Generator[tuple[int, Samples | float | AudioError], None, None]:
    """Yield of each clip its pieces, of whole frames, and then its length in seconds, or its error."""
    rate = model.config.sample_rate
    num_samples = [0] * len(clips)

    def blocks(position: int) -> Iterator[Samples]:
        for block in clips[position].blocks(rate):
            num_samples[position] += len(block)
            yield block

    def read(position: int) -> Iterator[Samples]:
        return model.frontend.framed(blocks(position))

    # Before a single short clip there is nothing to do ahead.
    alone = len(clips) == 1 and clips[0].seconds < _SHORT
    threads = 0 if alone else pipeline.threads_for(model.device)
    samples_ahead = round(max(1, threads) * _SECONDS_AHEAD * rate)
    with closing(read_ahead(len(clips), read, threads, samples_ahead, pipeline.stopwatch)) as items:
        for position, item in items:
            yield position, num_samples[position] / rate if item is None else item


def _frames_a_call(device: torch.device) -> int:
    """Frames of log-mel to compute together, at least: on the CPU each piece as it comes, while it is in the cache."""
    return 1 if device.type == "cpu" else _FRAMES_A_CALL


def _longest_first(clips: Sequence[Clip | AudioError]) -> list[tuple[int, Clip]]:
    """The good clips by length: clips of one length, and so windows of one width, come together."""
    good = [(index, clip) for index, clip in enumerate(clips) if isinstance(clip, Clip)]
    return sorted(good, key=lambda one: one[1].seconds, reverse=True)
