"""What fine-tuning trains on and is tested on: random crops of labelled clips, and whole clips.

Crops are cut out of the log-mel of the whole clip, so a crop has the frames that inference sees there. The order of the
clips and the place of each crop are keyed by the seed and by a *position* in the endless stream of a run
(``training.sampling.rng_at``): a run is the same whoever asks for its batches, and going on with one repeats nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from m2d_embed.audio.clips import Clip, open_clip
from m2d_embed.config import ModelConfig
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.labelled.clips import Bools, Integers, LabelledClips, named
from m2d_embed.labelled.events import Event, LabelledEvents
from m2d_embed.model.frontend import LogMel
from m2d_embed.model.windows import Window, cut
from m2d_embed.training.bad_files import BAD_SHARE
from m2d_embed.training.sampling import ItemOrder, Purpose, rng_at

#: Log-mels that take more memory are computed from the files whenever they are needed.
MAX_CACHED_BYTES = 2_000_000_000
_TRIES = 10  # files tried in place of one that cannot be read
_NAMED_FILES = 100  # unreadable files a message lists at most
_TOLERANCE = 1e-6  # frames: times that are written in decimals are not exact in binary

Rows = Integers | Sequence[int]


@dataclass(frozen=True)
class Batch:
    """Crops with what they are.

    Attributes:
        log_mel: (B, 1, mels, frames) float32, normalised; zeros after the end of a clip that is shorter.
        targets: float32 in [0, 1]: (B, L) for clips, (B, T, L) for events, T time columns and L labels.
        mask: (B, T) bool: the columns that hold audio. Inference gives no others, so train on the mean over these.
        valid_frames: (B,) int64: the frames that hold audio.
        names: of the files.
        bad: files that could not be read, and why; others took their place.
    """

    log_mel: Tensor
    targets: Tensor
    mask: Tensor
    valid_frames: Tensor
    names: list[str]
    bad: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.log_mel)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on a device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def rows(self, start: int, stop: int) -> Self:
        """Some of the crops."""
        return dataclasses.replace(self._mapped(lambda tensor: tensor[start:stop]), names=self.names[start:stop])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **cast(dict[str, Any], tensors))


class TrainingClips:
    """Random crops of labelled clips, by their positions 0, 1, 2, ... in the endless stream of a run.

    A clip shorter than a crop is padded at the end with zeros, as inference pads the last patch of a clip. It is not
    repeated: that would teach sounds, and boundaries between them, which no clip has.

    Log-mels are computed in float32 and kept in memory in float16, 10 million frames of 80 mels in 1.6 GB. That rounds
    them by less than 0.1 dB, before augmentation changes them by far more. Crops are the same where there is no room.

    In place of a clip that cannot be read another is drawn, by the position.

    Args:
        config: of the model: front end, patches, windows.
        clips: the data.
        indices: the clips of it that are trained on.
        crop_frames: length of a crop in log-mel frames.
        seed: of the order and the crops.
        balanced: draw clips so that labels come equally often, not every clip once an epoch: each is drawn in
            proportion to the inverse frequency of the rarest of its labels (without any, of such clips).
        max_cached_bytes: log-mels that need more are computed from the files for every crop.
        progress: show a progress bar while the files are read.

    Raises:
        AudioError: if more than 1 % of the files cannot be read; it names them.
        ConfigError: if there are no clips, or an event begins after the end of its clip.
    """

    def __init__(
        self,
        config: ModelConfig,
        clips: LabelledClips | LabelledEvents,
        indices: Rows,
        crop_frames: int,
        seed: int,
        balanced: bool,
        max_cached_bytes: int = MAX_CACHED_BYTES,
        progress: bool = True,
    ):
        if crop_frames < 1:
            raise ConfigError(f"crop_frames must be 1 or more, not {crop_frames}.")
        self.crop_frames = crop_frames
        self.seed = seed
        self._data = _Data(config, clips, indices, torch.float16, max_cached_bytes, progress, BAD_SHARE)
        bad = self._data.log_mels.bad
        self.readable: Integers = np.array([row for item, row in enumerate(indices) if item not in bad], dtype=np.int64)
        weights = balanced_weights(self._data.targets) if balanced else np.ones(len(self._data))
        self._order = ItemOrder(weights, seed)

    def __len__(self) -> int:
        """Clips, and so positions, in an epoch."""
        return len(self._data)

    @property
    def cached(self) -> bool:
        """Whether the log-mels are in memory."""
        return self._data.log_mels.cached

    @property
    def overlong(self) -> list[str]:
        """The files with events that end after the end of the file, where they are cut."""
        return self._data.overlong

    def batch(self, position: int, batch_size: int) -> Batch:
        """The crops of the ``batch_size`` positions from ``position`` on; the same whenever they are asked for.

        Raises:
            AudioError: if many files in a row, which are not in memory, cannot be read any more.
        """
        bad: dict[str, str] = {}
        items = [self._crop(p, bad) for p in range(position, position + batch_size)]
        valid = torch.tensor([log_mel.shape[-1] for _, log_mel, _ in items])
        columns = torch.arange(num_columns(self.crop_frames, self._data.config))
        kept = torch.tensor([num_columns(int(frames), self._data.config) for frames in valid])
        return Batch(
            log_mel=torch.stack([F.pad(log_mel, (0, self.crop_frames - log_mel.shape[-1])) for _, log_mel, _ in items]),
            targets=torch.stack([target for *_, target in items]),
            mask=columns < kept[:, None],
            valid_frames=valid,
            names=[self._data.names[item] for item, *_ in items],
            bad=bad,
        )

    def _crop(self, position: int, bad: dict[str, str]) -> tuple[int, Tensor, Tensor]:
        """The clip at a position, or another in its place; those that cannot be read are noted in ``bad``."""
        reason = ""
        for item in itertools.islice(self._candidates(position), 1 + _TRIES):
            try:
                return self._crop_of(item, position)
            except AudioError as error:
                reason = str(error)
                bad[self._data.names[item]] = reason
        raise AudioError(f"{1 + _TRIES} files drawn one after the other could not be read; the last: {reason}")

    def _candidates(self, position: int) -> Iterator[int]:
        yield self._order.item_at(position)
        rng = rng_at(self.seed, position, Purpose.REPLACE)
        while True:
            yield self._order.draw(rng)

    def _crop_of(self, item: int, position: int) -> tuple[int, Tensor, Tensor]:
        """A clip, (1, mels, n) of it, and its target."""
        data = self._data
        frames = int(data.log_mels.num_frames[item])
        spare = max(0, frames - self.crop_frames)
        start = int(rng_at(self.seed, position, Purpose.CROP).integers(spare + 1))
        count = min(frames, self.crop_frames)
        log_mel = data.log_mels.read(item, start, count)[None]
        if data.events is None:
            return item, log_mel, torch.from_numpy(data.targets[item]).float()
        target = event_targets(data.events[item], data.config, data.num_labels, start, count)
        missing = num_columns(self.crop_frames, data.config) - len(target)
        return item, log_mel, F.pad(target, (0, 0, 0, missing))


class EvaluationClips:
    """Whole clips, in batches that change no number: iterate for ``(rows, log_mel)``.

    ``rows`` are indices into the data, (B,) int64; ``log_mel`` is (B, 1, mels, frames) float32, as ``M2D.logits`` and
    ``M2D.frame_logits`` take it. Clips come together only if they are cut into the same windows and columns; their ends
    are then padded as the model itself pads the last patch, so each has the logits that it has on its own.

    Args:
        config: of the model.
        clips: the data.
        indices: the clips of it to go through, each once.
        batch_size: windows in a batch at most, but at least one clip.
        max_cached_bytes: log-mels that need more are computed from the files each time.
        progress: show a progress bar while the files are read.

    Raises:
        AudioError: if files cannot be read; it names them.
        ConfigError: if an event begins after the end of its clip, or ``batch_size`` is not positive.
    """

    def __init__(
        self,
        config: ModelConfig,
        clips: LabelledClips | LabelledEvents,
        indices: Rows,
        batch_size: int = 32,
        max_cached_bytes: int = MAX_CACHED_BYTES,
        progress: bool = True,
    ):
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, not {batch_size}.")
        self._data = _Data(config, clips, indices, torch.float32, max_cached_bytes, progress)
        self._rows = np.asarray(indices, dtype=np.int64)
        self._item_of = {int(row): item for item, row in enumerate(self._rows)}
        self._batches = _equal_windows(self._data.log_mels.num_frames, config, batch_size)

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._data)

    def __iter__(self) -> Iterator[tuple[Integers, Tensor]]:
        frames = self._data.log_mels.num_frames
        for items in self._batches:
            longest = max(int(frames[item]) for item in items)
            log_mels = [self._data.log_mels.read(item, 0, int(frames[item])) for item in items]
            padded = [F.pad(log_mel, (0, longest - log_mel.shape[-1])) for log_mel in log_mels]
            yield self._rows[items], torch.stack(padded).unsqueeze(1)

    @property
    def overlong(self) -> list[str]:
        """The files with events that end after the end of the file, where they are cut."""
        return self._data.overlong

    def frame_targets(self, row: int) -> Tensor:
        """(T, L) float32: which labels each column of one clip has, T as ``M2D.frame_logits`` gives; only for events.

        Raises:
            ConfigError: if the data has no events.
        """
        data, item = self._data, self._item_of[row]
        if data.events is None:
            raise ConfigError("Only data with events (columns onset and offset) has targets for frames.")
        frames = int(data.log_mels.num_frames[item])
        return event_targets(data.events[item], data.config, data.num_labels, 0, frames)

    def frame_times_ms(self, row: int) -> Tensor:
        """(T,) float32: the centres of the columns of one clip in milliseconds, as many as ``frame_targets`` has."""
        config = self._data.config
        columns = num_columns(int(self._data.log_mels.num_frames[self._item_of[row]]), config)
        return torch.from_numpy(_centres(0, columns, config) * config.frame_ms).float()


def longest_frames(config: ModelConfig, clips: LabelledClips | LabelledEvents, indices: Rows) -> int:
    """Frames of the longest of some clips, as the headers of the files state their lengths.

    Raises:
        AudioError: if more than 1 % of the files cannot be opened; it names these.
        ConfigError: if there are no clips.
    """
    files = _clips_of(clips).files
    opened = [_open(files[row], config.sample_rate) for row in indices]
    errors = [str(clip) for clip in opened if isinstance(clip, AudioError)]
    if len(errors) > BAD_SHARE * len(opened):
        raise AudioError(_unreadable(errors, len(opened)))
    if not opened:
        raise ConfigError("There are no clips to train on.")
    seconds = max(clip.seconds for clip in opened if isinstance(clip, Clip))
    return 1 + round(seconds * config.sample_rate) // config.hop_length


def num_columns(num_frames: int, config: ModelConfig) -> int:
    """Time columns that the model gives for so many frames: ``M2D.frame_logits(log_mel).shape[1]``."""
    return sum(window.columns for window in cut(num_frames, config))


def balanced_weights(targets: Bools) -> npt.NDArray[np.float64]:
    """How often to draw each clip, relative to others, so that labels come about equally often.

    Args:
        targets: (n, L) which labels each clip has; clips without any count as having a further one.

    Returns:
        (n,): 1 over the number of clips that have the rarest of its labels.
    """
    labels = np.column_stack([targets, ~targets.any(axis=1)])
    rarest = np.where(labels, labels.sum(axis=0), len(labels) + 1).min(axis=1)
    weights: npt.NDArray[np.float64] = 1.0 / rarest
    return weights


def event_targets(events: Sequence[Event], config: ModelConfig, num_labels: int, start: int, frames: int) -> Tensor:
    """Which labels the columns of a stretch of a clip have.

    A column has the labels of the events that go on at its centre. An event so short that it lies between two centres
    has the column nearest to its middle, in the stretch that holds this middle.

    Args:
        events: of the clip, in seconds from its start.
        config: says how wide columns are.
        num_labels: L.
        start: first frame of the stretch.
        frames: its length.

    Returns:
        (T, L) float32, zeros and ones, with ``T = num_columns(frames, config)``.
    """
    columns, width = num_columns(frames, config), config.patch_size[1]
    centres = _centres(start, columns, config)
    targets = torch.zeros(columns, num_labels)
    for event in events:
        onset, offset = (1000.0 * time / config.frame_ms for time in (event.onset, event.offset))  # in frames
        next_centre = centres[0] + width * math.ceil((onset - _TOLERANCE - centres[0]) / width)
        if next_centre <= offset + _TOLERANCE:
            active = (centres >= onset - _TOLERANCE) & (centres <= offset + _TOLERANCE)
            targets[torch.from_numpy(active), event.label] = 1.0
            continue
        middle = (onset + offset) / 2
        if start <= middle < start + frames:
            nearest = int(np.abs(centres - middle).argmin())
            targets[nearest, event.label] = 1.0
    return targets


def _centres(start: int, columns: int, config: ModelConfig) -> npt.NDArray[np.float64]:
    """Where the columns of a stretch from frame ``start`` on have their centres, in frames from the clip's start."""
    width = config.patch_size[1]
    return np.arange(columns, dtype=np.float64) * width + (start + (width - 1) / 2)


def _equal_windows(num_frames: Integers, config: ModelConfig, batch_size: int) -> list[list[int]]:
    """Batches of clips that are cut into the same windows, the longest first."""
    groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for item, frames in enumerate(num_frames.tolist()):
        windows = cut(frames, config)
        groups[(len(windows), _padded_columns(windows[-1], config), windows[-1].columns)].append(item)
    batches = []
    for key in sorted(groups, reverse=True):
        size = max(1, batch_size // key[0])
        batches += [groups[key][i : i + size] for i in range(0, len(groups[key]), size)]
    return batches


def _padded_columns(window: Window, config: ModelConfig) -> int:
    """Columns of a window after ``windows.pad_to_patch``."""
    return min(-(-(window.stop - window.start) // config.patch_size[1]), config.grid_size[1])


class _Data:
    """The chosen clips: names, targets, events that end with their clip, and log-mels."""

    def __init__(
        self,
        config: ModelConfig,
        data: LabelledClips | LabelledEvents,
        indices: Rows,
        dtype: torch.dtype,
        max_cached_bytes: int,
        progress: bool,
        bad_share: float = 0.0,
    ):
        clips = _clips_of(data)
        rows = np.asarray(indices, dtype=np.int64)
        files = [clips.files[row] for row in rows]
        self.config = config
        self.names = [str(file) for file in files]
        self.targets = clips.targets[rows]
        self.num_labels = len(clips.label_names)
        self.log_mels = _LogMels(config, files, dtype, max_cached_bytes, progress, bad_share)
        self.events: list[list[Event]] | None = None
        self.overlong: list[str] = []
        if isinstance(data, LabelledEvents):
            seconds, stated = self.log_mels.seconds, [data.events[row] for row in rows]
            _check_onsets(stated, seconds, self.names)
            self.overlong = [
                name
                for events, end, name in zip(stated, seconds, self.names, strict=True)
                if any(event.offset > end + config.frame_ms / 1000 for event in events)
            ]
            self.events = [
                [event._replace(offset=min(event.offset, end)) for event in events]
                for events, end in zip(stated, seconds, strict=True)
            ]

    def __len__(self) -> int:
        return len(self.names)


def _clips_of(data: LabelledClips | LabelledEvents) -> LabelledClips:
    return data.clips if isinstance(data, LabelledEvents) else data


def _check_onsets(events: Sequence[Sequence[Event]], seconds: Sequence[float], names: Sequence[str]) -> None:
    late = [
        f"{name}, {event.onset:g} s of {end:g} s"
        for clip, end, name in zip(events, seconds, names, strict=True)
        for event in clip
        if event.onset >= end
    ]
    if late:
        raise ConfigError(f"{len(late)} events begin after the end of their clip: {named(late)}. Correct the table.")


class _LogMels:
    """Normalised log-mels of files: in memory, rounded to ``dtype``, if there is room; else read again each time.

    Attributes:
        num_frames: (n,) int64.
        seconds: of each file; infinite for one that cannot be read.
        cached: whether they are in memory.
        bad: the files that cannot be read, up to ``bad_share`` of all, by their numbers.
    """

    def __init__(
        self,
        config: ModelConfig,
        files: Sequence[Path],
        dtype: torch.dtype,
        max_cached_bytes: int,
        progress: bool,
        bad_share: float,
    ):
        self._frontend = LogMel(config)
        self._rate = config.sample_rate
        self._dtype = dtype
        opened = [_open(file, self._rate) for file in files]
        frames = sum(self._frontend.num_frames(round(c.seconds * self._rate)) for c in opened if isinstance(c, Clip))
        self.cached = frames * config.input_size[0] * dtype.itemsize <= max_cached_bytes
        self._kept: list[Tensor] = []
        self.bad: dict[int, AudioError] = {}
        samples: list[int] = []
        # Files are read to their end even where nothing is kept: a damaged one must not stop a run in its third hour.
        what = "log-mel" if self.cached else "checking"
        for item, clip in enumerate(tqdm(opened, desc=what, unit="clip", disable=None if progress else True)):
            try:
                samples.append(self._take_in(clip))
            except AudioError as error:
                self.bad[item] = error
                samples.append(0)
                self._kept.append(torch.empty(0))
        if len(self.bad) > bad_share * len(files):
            raise AudioError(_unreadable([str(error) for error in self.bad.values()], len(files)))
        self._clips = opened
        self.num_frames: Integers = np.array([self._frontend.num_frames(count) for count in samples], dtype=np.int64)
        self.seconds = [math.inf if i in self.bad else count / self._rate for i, count in enumerate(samples)]

    def read(self, item: int, start: int, count: int) -> Tensor:
        """Frames ``start`` to ``start + count`` of a file: (mels, count) float32.

        Raises:
            AudioError: if it cannot be read, or is not in memory, and not what it was.
        """
        clip = self._clips[item]
        if item in self.bad or isinstance(clip, AudioError):
            raise self.bad[item]
        if self.cached:
            return self._kept[item][:, start : start + count].float()
        pieces: list[Tensor] = []
        end = 0
        for piece in self._frontend.stream(map(_as_tensor, clip.blocks(self._rate))):
            begin, end = end, end + piece.shape[1]
            pieces.append(piece[:, max(0, start - begin) : start + count - begin])
            if end >= start + count:
                return torch.cat(pieces, dim=1).to(self._dtype).float()
        raise AudioError(f"{clip.name}: has become shorter since the run began; put the old file back.")

    def _take_in(self, clip: Clip | AudioError) -> int:
        """Read a file to its end, and keep its log-mel if there is room; return its number of samples."""
        if isinstance(clip, AudioError):
            raise clip
        samples = 0

        def blocks() -> Iterator[Tensor]:
            nonlocal samples
            for block in clip.blocks(self._rate):
                samples += len(block)
                yield _as_tensor(block)

        if self.cached:
            pieces = [piece.to(self._dtype) for piece in self._frontend.stream(blocks())]
            self._kept.append(torch.cat(pieces, dim=1))
        else:
            for _ in blocks():
                pass
        return samples


def _open(file: Path, rate: int) -> Clip | AudioError:
    try:
        return open_clip(file, None, rate, str(file))
    except AudioError as error:
        return error


def _as_tensor(block: npt.NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(block))


def _unreadable(errors: Sequence[str], total: int) -> str:
    shown = "\n".join(f"  {error}" for error in errors[:_NAMED_FILES])
    more = f"\n  and {len(errors) - _NAMED_FILES} more" if len(errors) > _NAMED_FILES else ""
    advice = "Repair these files or take them out of the data."
    return f"{len(errors)} of {total} files cannot be read:\n{shown}{more}\n{advice}"
