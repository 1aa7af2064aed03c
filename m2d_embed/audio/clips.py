"""Files and arrays -> mono float32 at the model's rate, checked; whole or streamed in blocks.

Everything that soundfile reads is read (WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF, ...), and with the extra ``av`` what
FFmpeg does (``sounds``). Channels are averaged, then the result is resampled by soxr at high quality, as
``librosa.load`` does, with which the published models' training data was prepared. A streamed clip gives the same
samples as one read in one piece.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2d_embed.audio.find import find_audio
from m2d_embed.audio.formats import AUDIO_SUFFIXES
from m2d_embed.audio.sounds import Encoded, Samples, open_sound, resampled
from m2d_embed.errors import AudioError

__all__ = [
    "AUDIO_SUFFIXES",
    "Clip",
    "ClipLike",
    "Samples",
    "check_batch",
    "checked_blocks",
    "find_audio",
    "load_audio",
    "open_clip",
    "open_sound",
]

#: A clip: the path of a file; the content of one, as bytes or as a binary file to read; samples, (n,) or (channels, n),
#: as an array or tensor; or what ``datasets`` gives: a dict of ``array`` and ``sampling_rate``, or of ``bytes`` and
#: ``path``, or a torchcodec ``AudioDecoder``.
ClipLike = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | npt.NDArray[np.generic]
    | Tensor
    | Mapping[str, Any]
)

_POSSIBLE_RATES = range(1_000, 1_000_001)  # Hz
_LOUDEST = 1e10  # far above any unscaled integer; the square of 1e19 overflows float32
_BLOCK_SAMPLES = 1 << 18  # samples handed on at a time


@dataclass(frozen=True)
class Clip:
    """One clip, not read yet: a name for messages, its length as far as it is known, and where its samples are."""

    name: str
    source: Encoded | Samples
    source_rate: int
    seconds: float

    def blocks(self, sample_rate: int) -> Iterator[Samples]:
        """Yield the clip as mono float32 at ``sample_rate``, in consecutive blocks.

        Raises:
            AudioError: if it is unreadable, truncated, empty, or has a sample that is NaN or infinite.
        """
        raw = _array_blocks(self.source) if isinstance(self.source, np.ndarray) else self._decoded(self.source)
        checked = checked_blocks(raw, self.name)
        return checked if self.source_rate == sample_rate else resampled(checked, self.source_rate, sample_rate)

    def _decoded(self, source: Encoded) -> Iterator[Samples]:
        with open_sound(source, self.name) as sound:
            if sound.rate != self.source_rate:
                raise AudioError(f"{self.name}: has become another file since it was looked at; begin again.")
            yield from sound.blocks()


def open_clip(clip: ClipLike, sample_rate: int | None, model_rate: int, name: str) -> Clip:
    """Look at a clip without reading its samples.

    Args:
        clip: a path, samples, or what else ``ClipLike`` names; integer samples are scaled to [-1, 1] by their dtype. A
            file that is open is read into memory from where it is to its end, and left where it was.
        sample_rate: the rate of arrays and tensors, in Hz; None means the model's. For what states its own rate it must
            be None or agree.
        model_rate: the model's rate in Hz.
        name: what to call an array in messages.

    Raises:
        AudioError: if a file is missing, unreadable or of another rate than stated, an array is of a wrong rank or
            type, or the rate is impossible.
    """
    is_whole = isinstance(sample_rate, int | np.integer) and not isinstance(sample_rate, bool)
    if sample_rate is not None and not (is_whole and sample_rate in _POSSIBLE_RATES):
        raise AudioError(f"{name}: sample_rate={sample_rate!r} is not a rate in Hz.")
    given = _unpacked(clip, name)
    if given.rate is not None and sample_rate not in (None, given.rate):
        raise AudioError(
            f"{given.name}: sampled at {given.rate} Hz, but sample_rate={sample_rate} was given; "
            "leave sample_rate out, it is known."
        )
    if not isinstance(given.content, np.ndarray):
        return _open_encoded(given.content, sample_rate, given.name)
    samples, rate = _check_array(given.content, given.name), given.rate or sample_rate or model_rate
    return Clip(given.name, samples, rate, samples.shape[-1] / rate)


@dataclass(frozen=True)
class _Given:
    """What a clip comes down to; ``rate`` in Hz, if it came with samples."""

    name: str
    content: Encoded | npt.NDArray[np.generic]
    rate: int | None = None


def _unpacked(clip: Any, name: str) -> _Given:
    if isinstance(clip, Tensor):
        clip = (clip.detach().float() if clip.is_floating_point() else clip.detach()).cpu().numpy()
    if isinstance(clip, np.ndarray):
        return _Given(name, clip)
    if isinstance(clip, str | os.PathLike):
        return _Given(str(clip), Path(clip))
    if isinstance(clip, bytes | bytearray | memoryview):
        return _Given(name, bytes(clip))
    if isinstance(clip, Mapping):
        return _from_mapping(clip, name)
    if hasattr(clip, "get_all_samples"):  # torchcodec's AudioDecoder
        samples = clip.get_all_samples()
        return _Given(name, _unpacked(samples.data, name).content, _rate(samples.sample_rate, name))
    if hasattr(clip, "read") and hasattr(clip, "seek"):
        return _Given(name, _rest_of(clip, name))
    raise AudioError(
        f"{name}: a clip is a path, an array or a tensor, not {type(clip).__name__}; or the bytes of a file, a file "
        "opened to read them, or a dict of 'array' and 'sampling_rate'."
    )


def _from_mapping(clip: Mapping[str, Any], name: str) -> _Given:
    """A row of the column ``audio`` of a data set."""
    path = clip.get("path")
    if clip.get("array") is not None:
        if clip.get("sampling_rate") is None:
            raise AudioError(f"{name}: a dict with an 'array' needs its 'sampling_rate'.")
        array = clip["array"]
        if not isinstance(array, np.ndarray | Tensor):
            array = np.asarray(array)
            if array.dtype.kind in "biu":
                raise AudioError(
                    f"{name}: whole numbers in a list do not say what 1 is; give an array, maybe of int16."
                )
            array = array.astype(np.float32)
        return _Given(name, _unpacked(array, name).content, _rate(clip["sampling_rate"], name))
    if clip.get("bytes") is not None:
        return _Given(f"{name} ({path})" if path else name, bytes(clip["bytes"]))
    if path:
        return _Given(str(path), Path(path))
    raise AudioError(
        f"{name}: a dict has an 'array' and its 'sampling_rate', or 'bytes', or a 'path'; "
        f"this one has {', '.join(map(repr, clip)) or 'nothing'}."
    )


def _rate(rate: Any, name: str) -> int:
    try:
        whole = int(rate)
    except (TypeError, ValueError, OverflowError):
        whole = -1
    if whole != rate or whole not in _POSSIBLE_RATES:
        raise AudioError(f"{name}: sampling_rate={rate!r} is not a rate in Hz.")
    return whole


def _rest_of(file: BinaryIO, name: str) -> bytes:
    """What an open file holds from where it is; it is left there."""
    position = file.tell()
    content = file.read()
    file.seek(position)
    if not isinstance(content, bytes):
        raise AudioError(f'{name}: open the file as binary, "rb".')
    return content


def _open_encoded(source: Encoded, sample_rate: int | None, name: str) -> Clip:
    if isinstance(source, Path) and not _is_unicode(source):
        raise AudioError(f"{name!a}: this name is not valid UTF-8 and could not be written down; rename it.")
    with open_sound(source, name) as sound:
        rate, seconds = sound.rate, sound.seconds
    if sample_rate is not None and rate != sample_rate:
        raise AudioError(
            f"{name}: sampled at {rate} Hz, but sample_rate={sample_rate} was given; "
            "leave sample_rate out, files state their own."
        )
    return Clip(name, source, rate, seconds)


def load_audio(path: str | os.PathLike[str], sample_rate: int) -> Samples:
    """Read a whole file as mono float32 at ``sample_rate`` (Hz).

    Returns:
        (samples,) float32.

    Raises:
        AudioError: if the file is missing, unreadable, truncated, empty or not finite.
    """
    return np.concatenate(list(open_clip(path, None, sample_rate, "").blocks(sample_rate)))


def check_batch(audio: Tensor) -> Tensor:
    """Check a HEAR batch and return it as float32.

    Args:
        audio: (sounds, samples) in [-1, 1]; integers are scaled by their dtype.

    Raises:
        AudioError: on another rank, no samples, or a sample that is NaN, infinite or beyond all audio; it names the
            sound.
    """
    if not isinstance(audio, Tensor):
        raise AudioError(f"audio must be a torch.Tensor of shape (sounds, samples), not {type(audio).__name__}.")
    if audio.ndim != 2:
        raise AudioError(
            f"audio must have shape (sounds, samples), not {tuple(audio.shape)}; "
            "for one mono sound pass audio.unsqueeze(0)."
        )
    if audio.numel() == 0:
        raise AudioError(f"audio is empty: its shape is {tuple(audio.shape)}.")
    audio = audio.float() if audio.is_floating_point() else _scale_integers(audio, "audio")
    good = (audio.abs() <= _LOUDEST).all(dim=1)  # false for NaN, too
    if not good.all():
        at = int((~good).nonzero()[0])
        raise AudioError(f"audio[{at}] has samples that are NaN or infinite, or far outside [-1, 1].")
    return audio


def _is_unicode(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _array_blocks(samples: Samples) -> Iterator[Samples]:
    mono = samples if samples.ndim == 1 else samples.mean(axis=0)
    for start in range(0, len(mono), _BLOCK_SAMPLES):
        yield mono[start : start + _BLOCK_SAMPLES]


def checked_blocks(blocks: Iterator[Samples], name: str) -> Iterator[Samples]:
    """Pass blocks on; refuse a clip without samples, and samples that are not finite."""
    seen = 0
    for block in blocks:
        good = np.abs(block) <= _LOUDEST  # false for NaN, too
        if not good.all():
            at = int(np.argmin(good))
            what = f"{block[at]:.3g}; audio lies in [-1, 1]" if np.isfinite(block[at]) else "NaN or infinite"
            raise AudioError(f"{name}: sample {seen + at} is {what}.")
        seen += len(block)
        yield block
    if seen == 0:
        raise AudioError(f"{name}: the clip is empty, it has no samples.")


def _check_array(array: npt.NDArray[np.generic], name: str) -> Samples:
    """(n,) or (channels, n) as float32 in [-1, 1]."""
    if array.ndim not in (1, 2):
        raise AudioError(f"{name}: a clip has shape (samples,) or (channels, samples), not {array.shape}.")
    if array.size == 0:
        raise AudioError(f"{name}: the clip is empty, its shape is {array.shape}.")
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        raise AudioError(
            f"{name}: shape {array.shape} means {array.shape[0]} channels of {array.shape[1]} samples; "
            "if it is (samples, channels), pass its transpose."
        )
    if np.issubdtype(array.dtype, np.floating):
        return np.ascontiguousarray(array, dtype=np.float32)
    if array.dtype.kind not in "iu":
        raise AudioError(f"{name}: samples of type {array.dtype} are not audio.")
    native = np.array(array, dtype=array.dtype.newbyteorder("="))
    return _scale_integers(torch.from_numpy(native), name).numpy()


def _scale_integers(audio: Tensor, name: str) -> Tensor:
    """Integer PCM -> float32 in [-1, 1]: by the range of its dtype, uint8 around its middle as in WAV files."""
    if audio.dtype == torch.uint8:
        return (audio.float() - 128) / 128
    if audio.dtype in (torch.int8, torch.int16, torch.int32):
        return (audio.double() / -torch.iinfo(audio.dtype).min).float()
    raise AudioError(f"{name}: samples of type {audio.dtype} are not audio; use float, int32, int16, int8 or uint8.")
