"""Files and arrays -> mono float32 at the model's rate, checked; whole or streamed in blocks.

Everything that soundfile reads is read (WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF, ...). Channels are averaged, then
the result is resampled by soxr at high quality, as ``librosa.load`` does, with which the published models' training
data was prepared. A streamed clip gives the same samples as one read in one piece.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from torch import Tensor

from m2d_embed.errors import AudioError

#: A clip: the path of a file, or samples, (n,) or (channels, n), as an array or tensor.
ClipLike = str | os.PathLike[str] | npt.NDArray[np.generic] | Tensor
Samples = npt.NDArray[np.float32]

#: File name endings taken for audio when a folder is searched.
AUDIO_SUFFIXES = frozenset(
    [".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf"]
)

_POSSIBLE_RATES = range(1_000, 1_000_001)  # Hz
_LOUDEST = 1e10  # far above any unscaled integer; the square of 1e19 overflows float32
_BLOCK_SAMPLES = 1 << 18  # samples a channel read at a time: 16 s at 16 kHz
_WAV_DATA_SIZE = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
_WAV_SIZE_UNKNOWN = 0xFFFF_FF00  # written from here on by programs that stream to a pipe


@dataclass(frozen=True)
class Clip:
    """One clip, not read yet: a name for messages, its length as far as it is known, and where its samples are."""

    name: str
    source: Path | Samples
    source_rate: int
    seconds: float

    def blocks(self, sample_rate: int) -> Iterator[Samples]:
        """Yield the clip as mono float32 at ``sample_rate``, in consecutive blocks.

        Raises:
            AudioError: if it is unreadable, truncated, empty, or has a sample that is NaN or infinite.
        """
        raw = _file_blocks(self.source) if isinstance(self.source, Path) else _array_blocks(self.source)
        checked = checked_blocks(raw, self.name)
        return checked if self.source_rate == sample_rate else _resampled(checked, self.source_rate, sample_rate)


def open_clip(clip: ClipLike, sample_rate: int | None, model_rate: int, name: str) -> Clip:
    """Look at a clip without reading its samples.

    Args:
        clip: a path, or samples; integer samples are scaled to [-1, 1] by their dtype.
        sample_rate: the rate of arrays and tensors, in Hz; None means the model's. For a file it must be None or agree.
        model_rate: the model's rate in Hz.
        name: what to call an array in messages.

    Raises:
        AudioError: if a file is missing, unreadable or of another rate than stated, an array is of a wrong rank or
            type, or the rate is impossible.
    """
    is_whole = isinstance(sample_rate, int | np.integer) and not isinstance(sample_rate, bool)
    if sample_rate is not None and not (is_whole and sample_rate in _POSSIBLE_RATES):
        raise AudioError(f"{name}: sample_rate={sample_rate!r} is not a rate in Hz.")
    if isinstance(clip, str | os.PathLike):
        path = Path(clip)
        if not _is_unicode(path):
            raise AudioError(f"{str(path)!a}: this name is not valid UTF-8 and could not be written down; rename it.")
        with open_sound(path) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
        if sample_rate is not None and rate != sample_rate:
            raise AudioError(
                f"{path}: sampled at {rate} Hz, but sample_rate={sample_rate} was given; "
                "leave sample_rate out, files state their own."
            )
        return Clip(str(path), path, rate, seconds)
    if isinstance(clip, Tensor):
        clip = (clip.detach().float() if clip.is_floating_point() else clip.detach()).cpu().numpy()
    if not isinstance(clip, np.ndarray):
        raise AudioError(f"{name}: a clip is a path, an array or a tensor, not {type(clip).__name__}.")
    samples, rate = _check_array(clip, name), sample_rate or model_rate
    return Clip(name, samples, rate, samples.shape[-1] / rate)


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


def find_audio(paths: list[Path]) -> list[Path]:
    """Expand folders (recursively, by ending) and glob patterns into a sorted list of files; no file twice.

    Raises:
        AudioError: if a path does not exist, a folder cannot be read, or nothing is found in one.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            files = sorted(_audio_below(path))
            if not files:
                raise AudioError(f"{path}: no audio files in this folder ({', '.join(sorted(AUDIO_SUFFIXES))}).")
        elif path.exists():
            files = [path]
        else:
            # An absolute pattern is split at its root, as Path.glob only takes relative ones.
            root = Path(path.anchor)
            try:
                files = sorted(f for f in root.glob(str(path.relative_to(root))) if f.is_file())
            except ValueError as error:
                raise AudioError(f"{path}: no such file, and not a glob pattern ({error}).") from error
            if not files:
                raise AudioError(f"{path}: no such file or folder.")
        for file in files:
            found.setdefault(os.path.abspath(file), file)  # noqa: PTH100  (Path.absolute keeps "..")
    return list(found.values())


def _audio_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise AudioError(f"{error.filename}: cannot read this folder ({error.strerror}).") from error

    seen = set()
    for directory, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(directory))
        # A link may lead to a folder above it.
        subfolders[:] = [s for s in subfolders if os.path.realpath(Path(directory, s)) not in seen]
        yield from (Path(directory) / n for n in names if Path(n).suffix.lower() in AUDIO_SUFFIXES)


def _is_unicode(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def open_sound(path: Path) -> soundfile.SoundFile:
    """Open a sound file, or say what is wrong with it.

    Raises:
        AudioError: if it is missing, not a regular file, forbidden, empty or not audio.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise AudioError(f"{path}: not a regular file; a pipe or a device would be waited for without end.")
    try:
        with path.open("rb"):  # libsndfile says only "System error" to a missing or forbidden file
            pass
        return soundfile.SoundFile(path)
    except FileNotFoundError as error:
        raise AudioError(f"{path}: no such file.") from error
    except IsADirectoryError as error:
        raise AudioError(f"{path}: this is a folder, not an audio file.") from error
    except OSError as error:
        raise AudioError(f"{path}: cannot be opened ({error.strerror}).") from error
    except soundfile.LibsndfileError as error:
        what = "the file is empty" if path.stat().st_size == 0 else f"not audio that can be read ({error.error_string})"
        raise AudioError(f"{path}: {what}.") from error


def check_size(file: soundfile.SoundFile, name: str) -> None:
    """Raise AudioError if an open WAV file is shorter than its header says; libsndfile itself takes it as it is."""
    size = _WAV_DATA_SIZE.search(file.extra_info)
    if size and int(size[2]) < int(size[1]) < _WAV_SIZE_UNKNOWN:
        raise AudioError(f"{name}: truncated, it holds {size[2]} of the {size[1]} bytes its header promises.")


def _file_blocks(path: Path) -> Iterator[Samples]:
    with open_sound(path) as file:
        check_size(file, str(path))
        remaining = file.frames
        try:
            while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                remaining -= len(block)
                yield downmix(block)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{path}: damaged or truncated ({error.error_string}).") from error
    if remaining > 0:
        raise AudioError(f"{path}: truncated, {remaining} samples fewer than its header promises.")


def downmix(block: Samples) -> Samples:
    """(n, channels) -> (n,), the mean; in a sixth of the time that numpy takes for the mean of so short an axis."""
    mono = block[:, 0]
    for channel in range(1, block.shape[1]):
        mono = mono + block[:, channel]
    return mono if block.shape[1] == 1 else mono / np.float32(block.shape[1])


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


def _resampled(blocks: Iterator[Samples], source_rate: int, sample_rate: int) -> Iterator[Samples]:
    resampler = soxr.ResampleStream(source_rate, sample_rate, 1, dtype="float32", quality="HQ")
    first, total = None, 0
    for block in blocks:
        first = block[:1] if first is None else first
        resampled = resampler.resample_chunk(np.ascontiguousarray(block))
        total += len(resampled)
        yield resampled
    rest = resampler.resample_chunk(np.empty(0, np.float32), last=True)
    if total + len(rest) == 0 and first is not None:
        rest = first  # the clip is shorter than one sample of the new rate
    yield rest


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
