"""Any audio file -> 16 kHz mono, in segments of at most 30 s, as 16-bit FLAC."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from m2d_embed.audio.clips import Samples, checked_blocks, open_clip
from m2d_embed.audio.ffmpeg import FFmpegSound
from m2d_embed.audio.sounds import resampled
from m2d_embed.errors import AudioError

SAMPLE_RATE = 16_000  # Hz
LONGEST = 30 * SAMPLE_RATE
SHORTEST = SAMPLE_RATE // 10

#: Formats that libsndfile does not know; its guesses by other means than a mark must not be relied on.
_FFMPEG_ONLY = frozenset(["g722", "gsm", "mov", "aac", "wv", "amr"])

#: Seconds; some encoders of Ogg Vorbis state a few samples more than they wrote.
_TAIL_THAT_MAY_LACK = 0.1

Pcm = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Sound:
    """One sound: its segments in order, its length in seconds and a hash of its samples before some were left out.

    ``silent`` counts segments of digital silence, ``too_short`` those (of sounds) shorter than 0.1 s: left out, both.
    """

    segments: list[Pcm]
    seconds: float
    sha256: str
    silent: int
    too_short: int


def read_sound(file: Path, audio_format: str) -> Sound:
    """Decode a file, average its channels, resample it and cut it into equal segments.

    What libsndfile cannot read, or calls truncated, is taken as far as FFmpeg's libraries read it.

    Args:
        file: with any name; it is not looked at.
        audio_format: FFmpeg's name of the format.

    Raises:
        AudioError: if the file cannot be decoded, or its samples are not finite.
    """
    samples = _to_pcm(_decode(file, audio_format))
    # Pieces of equal length, not 30 s and a tiny rest.
    pieces = np.array_split(samples, math.ceil(len(samples) / LONGEST))
    long_enough = [piece for piece in pieces if len(piece) >= SHORTEST]
    loud_enough = [piece for piece in long_enough if piece.any()]
    return Sound(
        segments=loud_enough,
        seconds=len(samples) / SAMPLE_RATE,
        sha256=hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest(),
        silent=len(long_enough) - len(loud_enough),
        too_short=len(pieces) - len(long_enough),
    )


def write_segment(file: Path, segment: Pcm) -> None:
    """Write a segment as FLAC, 16 bit."""
    content = io.BytesIO()
    soundfile.write(content, segment, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    file.write_bytes(content.getvalue())  # libsndfile has no word for a full disk


def _decode(file: Path, audio_format: str) -> Samples:
    if audio_format in _FFMPEG_ONLY:
        return _decode_with_ffmpeg(file, audio_format)
    try:
        return _decode_with_libsndfile(file)
    except AudioError as problem:
        try:
            return _decode_with_ffmpeg(file, audio_format)
        except AudioError as error:
            raise AudioError(f"{problem} {error}") from error


def _decode_with_libsndfile(file: Path) -> Samples:
    clip = open_clip(file, None, SAMPLE_RATE, "")
    blocks: list[Samples] = []
    try:
        blocks.extend(clip.blocks(SAMPLE_RATE))  # keeps what came before an error
    except AudioError:
        lacks = clip.seconds - sum(map(len, blocks)) / SAMPLE_RATE
        if not blocks or lacks > _TAIL_THAT_MAY_LACK:
            raise
    return np.concatenate(blocks)


def _decode_with_ffmpeg(file: Path, audio_format: str) -> Samples:
    with closing(FFmpegSound(file.open("rb"), audio_format, file.name)) as sound:
        blocks = checked_blocks(sound.blocks(), file.name)
        return np.concatenate(list(resampled(blocks, sound.rate, SAMPLE_RATE)))


def _to_pcm(samples: Samples) -> Pcm:
    """[-1, 1] -> 16 bit; what is louder is scaled down as a whole, so that it neither wraps nor clips."""
    peak = float(np.abs(samples).max())
    return np.round(samples * (32_767.0 / max(peak, 1.0))).astype(np.int16)


def segment_names(path: str, count: int, taken: set[str]) -> Iterator[str]:
    """File names for the segments of a member: its path made safe, and ``-000``, ``-001`` ...

    Args:
        path: of the member, of any characters.
        count: number of segments.
        taken: names without numbers that others have, in lower case; this one's is added.
    """
    characters = (c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in path)
    safe = "".join(characters).strip("._-")
    stem = safe[-120:].strip("._-") or "sound"  # the end tells more
    if stem != safe or stem.lower() in taken:
        stem = f"{stem}-{hashlib.sha256(path.encode()).hexdigest()[:10]}"
    taken.add(stem.lower())
    return (f"{stem}-{number:03d}.flac" for number in range(count))
