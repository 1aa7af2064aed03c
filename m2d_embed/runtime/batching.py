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
from itertools import accumulate
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from m2d_embed.audio.clips import Clip, Samples
from m2d_embed.backends.threads import usable_cores
from m2d_embed.config import FeatureConfig, ModelConfig, is_whole
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.model.frontend import LogMel
from m2d_embed.model.pooling import Timestamps
from m2d_embed.model.windows import WindowCutter, pad_to_patch
from m2d_embed.runtime.collectors import Collector, Place, Reduction, scene_reduction, timestamp_reduction
from m2d_embed.runtime.prefetch import Item, read_ahead
from m2d_embed.runtime.profiling import DEVICE, ENCODER, LOG_MEL, Stopwatch
from m2d_embed.runtime.transfer import Link, link_to

#: Windows that are buffered until there is a batch of their width, in batches; beyond it the fullest group goes ahead.
_MAX_BUFFERED_BATCHES = 8
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
    reduction = scene_reduction(features.pooling(model.config))
    one_a_patch = replace(features, hop_ms=model.config.column_ms)
    return _encode(model, clips, one_a_patch, batch_size, reduction, pipeline)


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
    reduction = timestamp_reduction(model.config, features.hop_frames(model.config))
    return _encode(model, clips, features, batch_size, reduction, pipeline)


class _ClipState(Generic[R]):
    """Per-clip state: buffered frames, windows in flight, collected outputs."""

    def __init__(self, index: int, collector: Collector[R], config: ModelConfig, hop_frames: int):
        self.index = index
        self.collector = collector
        self.config = config
        self.cutters = [WindowCutter(config, shift) for shift in range(0, config.patch_size[1], hop_frames)]
        self.orders = [0] * len(self.cutters)
        self.duration_ms = 0.0
        self.in_flight = 0  # windows that were cut and not collected yet
        self.read = False  # to its end

    def cut(self, log_mel: Tensor | None) -> list[_Window[R]]:
        """The windows that are certain with the next (mels, n) frames; None is the end of the clip."""
        windows = []
        for which, cutter in enumerate(self.cutters):
            for frames, columns in cutter.finish() if log_mel is None else cutter.push(log_mel):
                place = Place(cutter.shift, self.orders[which], columns)
                self.orders[which] += 1
                windows.append(_Window(self, place, pad_to_patch(frames, self.config)))
        self.in_flight += len(windows)
        return windows


@dataclass
class _Window(Generic[R]):
    state: _ClipState[R]
    place: Place
    log_mel: Tensor  # (mels, frames), whole patches


class _BatchInFlight(NamedTuple, Generic[R]):
    """Windows that are being encoded, and a function that waits for their outputs."""

    windows: list[_Window[R]]
    fetch: Callable[[], Tensor]


class _Encoding(Generic[R]):
    """Encodes clips: samples -> log-mel -> windows -> batches of windows -> results, each step buffered in memory."""

    def __init__(
        self,
        model: FrameEncoder,
        clips: Sequence[Clip | AudioError],
        features: FeatureConfig,
        batch_size: int,
        reduction: Reduction[R],
        pipeline: Pipeline,
    ):
        self.model = model
        self.errors = {index: clip for index, clip in enumerate(clips) if isinstance(clip, AudioError)}
        self.clips = {index: clip for index, clip in enumerate(clips) if isinstance(clip, Clip)}
        self.features = features
        self.batch_size = batch_size
        self.reduction = reduction
        self.pipeline = pipeline
        self.stopwatch = pipeline.stopwatch
        self.link = link_to(model.device)
        self.num_samples = [0] * len(clips)  # read so far of each
        self.states: dict[int, _ClipState[R]] = {}  # of clips that are being read
        self.pieces: list[tuple[_ClipState[R], Samples | None]] = []  # for the front end; None is the end of a clip
        self.frames_buffered = 0  # in these pieces
        self.groups: dict[int, list[_Window[R]]] = defaultdict(list)  # width in frames -> windows
        self.in_flight: deque[_BatchInFlight[R]] = deque()
        self.finished: list[tuple[int, R | AudioError]] = []

    def results(self) -> Generator[tuple[int, R | AudioError], None, None]:
        """Read all clips, and yield the result or the error of each as it is there."""
        yield from self.errors.items()
        # Longest first: clips of one length, and so windows of one width, come together.
        order = sorted(self.clips, key=lambda index: self.clips[index].seconds, reverse=True)
        with closing(self._read(order)) as items:
            for position, item in items:
                self._take(order[position], item)
                yield from self._pop_finished()
        self._compute_log_mels()
        for width in list(self.groups):
            self._encode(width)
        self._collect(max_in_flight=0)
        yield from self._pop_finished()

    def _pop_finished(self) -> list[tuple[int, R | AudioError]]:
        finished, self.finished = self.finished, []
        return finished

    def _read(self, order: Sequence[int]) -> Generator[tuple[int, Item], None, None]:
        """Pieces of the clips, each of whole frames, decoded ahead by threads."""
        rate, clips = self.model.config.sample_rate, [self.clips[index] for index in order]

        def blocks(position: int) -> Iterator[Samples]:
            for block in clips[position].blocks(rate):
                self.num_samples[order[position]] += len(block)
                yield block

        # Before a single short clip there is nothing to do ahead.
        alone = len(clips) == 1 and clips[0].seconds < _SHORT
        threads = 0 if alone else self.pipeline.threads_for(self.model.device)
        samples_ahead = round(max(1, threads) * _SECONDS_AHEAD * rate)
        framed = self.model.frontend.framed
        return read_ahead(len(clips), lambda position: framed(blocks(position)), threads, samples_ahead, self.stopwatch)

    def _take(self, index: int, item: Item) -> None:
        """Take the next piece of a clip, its end or its error."""
        if isinstance(item, AudioError):
            self.states.pop(index, None)  # its windows in flight are still encoded, and discarded
            self.finished.append((index, item))
            return
        if item is None:
            seconds = self.num_samples[index] / self.model.config.sample_rate
            state = self.states.pop(index)
            state.duration_ms = 1000.0 * seconds
            self.stopwatch.count_audio(seconds)
        else:
            state = self.states.get(index) or self._begin(index)
            self.frames_buffered += _hops(item, self.model.frontend)
        self.pieces.append((state, item))
        if self.frames_buffered >= _frames_a_call(self.model.device) or not self.frames_buffered:
            self._compute_log_mels()

    def _begin(self, index: int) -> _ClipState[R]:
        config, collector = self.model.config, self.reduction.new_collector(self.clips[index].seconds)
        self.states[index] = _ClipState(index, collector, config, self.features.hop_frames(config))
        return self.states[index]

    def _compute_log_mels(self) -> None:
        """Log-mels of all buffered pieces, and the windows that are certain with them."""
        pieces, self.pieces, self.frames_buffered = self.pieces, [], 0
        with self.stopwatch.stage(LOG_MEL):
            log_mels = iter(
                _log_mels([piece for _, piece in pieces if piece is not None], self.model.frontend, self.link)
            )
        for state, piece in pieces:
            for window in state.cut(None if piece is None else next(log_mels)):
                self._add_window(window)
            state.read = piece is None
            self._finish_if_done(state)

    def _add_window(self, window: _Window[R]) -> None:
        """Encode a window's group when it is a batch, or the fullest one when too many windows are buffered."""
        width = window.log_mel.shape[1]
        self.groups[width].append(window)
        if len(self.groups[width]) == self._max_batch(width):
            self._encode(width)
        elif sum(map(len, self.groups.values())) >= _MAX_BUFFERED_BATCHES * self.batch_size:
            self._encode(max(self.groups, key=lambda w: len(self.groups[w])))

    def _max_batch(self, frames: int) -> int:
        """Windows of so many frames in a batch: on a CPU no more than the model takes in a call, for memory's sake."""
        if self.model.device.type != "cpu":
            return self.batch_size
        return min(self.batch_size, self.model.most_windows(frames))

    def _encode(self, width: int) -> None:
        windows = self.groups.pop(width)
        self.stopwatch.count_batch(len(windows), self._max_batch(width))
        windows.sort(key=lambda window: window.place.columns)  # so that they are reduced in one or two calls
        with self.stopwatch.stage(ENCODER):
            log_mel = torch.stack([window.log_mel for window in windows]).unsqueeze(1)
            frames = self.model.window_frames(log_mel, self.features)  # (N, T, D)
            reduced = self.reduction.reduce(frames, [window.place.columns for window in windows])
            self.in_flight.append(_BatchInFlight(windows, self.link.download(reduced)))
        self._collect(self.link.max_in_flight)

    def _collect(self, max_in_flight: int) -> None:
        """Wait for the oldest batches until ``max_in_flight`` are left, and hand their outputs to their clips."""
        while len(self.in_flight) > max_in_flight:
            batch = self.in_flight.popleft()
            with self.stopwatch.stage(DEVICE):
                outputs = batch.fetch()
            for window, values in zip(batch.windows, outputs, strict=True):
                window.state.collector.add(window.place, values)
                window.state.in_flight -= 1
                self._finish_if_done(window.state)

    def _finish_if_done(self, state: _ClipState[R]) -> None:
        if state.read and state.in_flight == 0:
            self.finished.append((state.index, state.collector.result(state.duration_ms)))


def _log_mels(pieces: Sequence[Samples], front_end: LogMel, link: Link) -> list[Tensor]:
    """The log-mel, (mels, n), of each piece, of all in one call, which is what costs on a GPU.

    The pieces are laid end to end, each from a whole hop on; frames that straddle two of them are discarded.
    """
    if not pieces:
        return []
    hop, n_fft = front_end.hop_length, front_end.n_fft
    starts = [0, *accumulate(_hops(piece, front_end) for piece in pieces)]
    host = link.host_buffer((starts[-2] * hop + len(pieces[-1]),), torch.float32)
    samples = host.numpy()
    for piece, start, stop in zip(pieces, starts, starts[1:], strict=False):
        samples[start * hop : stop * hop] = 0  # pads the piece
        samples[start * hop : start * hop + len(piece)] = piece
    log_mel = front_end.of_frames(link.upload(host))
    return [log_mel[:, start : start + (len(p) - n_fft) // hop + 1] for p, start in zip(pieces, starts, strict=False)]


def _frames_a_call(device: torch.device) -> int:
    """Frames of log-mel to compute together, at least: on the CPU a piece at a time, while it is in the cache."""
    return 1 if device.type == "cpu" else _FRAMES_A_CALL


def _hops(piece: Samples, front_end: LogMel) -> int:
    """Hops that a piece takes up."""
    return -(-len(piece) // front_end.hop_length)


def _encode(
    model: FrameEncoder,
    clips: Sequence[Clip | AudioError],
    features: FeatureConfig,
    batch_size: int,
    reduction: Reduction[R],
    pipeline: Pipeline,
) -> Generator[tuple[int, R | AudioError], None, None]:
    if not is_whole(batch_size) or batch_size < 1:
        raise ConfigError(f"batch_size must be a whole number from 1 on, not {batch_size!r}.")
    yield from _Encoding(model, clips, features, batch_size, reduction, pipeline).results()
