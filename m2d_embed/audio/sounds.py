"""Open sound files: the one place where the package decodes any.

libsndfile reads them; FFmpeg's libraries, through PyAV, what it does not. A file is read as ``containers.layout`` finds
it to be made: several streams one after the other, behind headers that state how long they are.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from m2d_embed.audio.containers import Layout, Part, layout
from m2d_embed.audio.ffmpeg import FFmpegSound
from m2d_embed.audio.find import hint_at_backslashes
from m2d_embed.audio.formats import AV_HINT, LIBSNDFILES, has_av
from m2d_embed.audio.stitched import Content, Stitched
from m2d_embed.errors import AudioError

Samples = npt.NDArray[np.float32]

#: What a sound is read from: a file, or its bytes.
Encoded = Path | bytes

_BLOCK_SAMPLES = 1 << 18  # samples a channel read at a time: 16 s at 16 kHz
_NO_LENGTH = 1 << 62  # libsndfile states more samples for streams that do not know how many they have

log = logging.getLogger("m2d_embed")

_REMEMBERED = 8_192  # layouts
_layouts: dict[tuple[str, int, int, int], Layout] = {}


class _Decoder(Protocol):
    rate: int
    seconds: float

    def blocks(self) -> Iterator[Samples]: ...
    def close(self) -> None: ...


class Sound:
    """An open sound file.

    Attributes:
        rate: in Hz.
        seconds: its length, as far as it is known without decoding.
        warning: what is wrong with the file although it can be read, "" if nothing is.
    """

    def __init__(self, source: Encoded, name: str, found: Layout):
        self._parts: list[_Decoder] = []
        self._name = name
        self.warning = found.warning
        try:
            for part in found.parts:
                self._parts.append(_open_part(source, part, found, name))
        except AudioError:
            self.close()
            raise
        self.rate = self._parts[0].rate
        self.seconds = sum(part.seconds for part in self._parts)

    def blocks(self) -> Iterator[Samples]:
        """Yield its samples at its own rate, averaged over the channels, from the start on; only once.

        Raises:
            AudioError: if it is damaged or truncated.
        """
        if self.warning:
            _warn_once(self.warning)
        for part in self._parts:
            yield from part.blocks() if part.rate == self.rate else resampled(part.blocks(), part.rate, self.rate)

    @property
    def frames(self) -> int | None:
        """Samples a channel that ``read`` can read; None if the file has to be read from its start on."""
        first = self._parts[0]
        return first.frames if len(self._parts) == 1 and isinstance(first, _Sndfile) else None

    def read(self, start: int, stop: int) -> Samples:
        """Samples ``start`` to ``stop``, the same as ``blocks`` gives; ``frames`` must not be None.

        Raises:
            AudioError: if the file is damaged or truncated there.
        """
        if self.warning:
            _warn_once(self.warning)
        return cast(_Sndfile, self._parts[0]).read(start, stop)

    def close(self) -> None:
        """Close the file."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> Sound:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_sound(source: Encoded, name: str = "") -> Sound:
    """Open a sound file, or say what is wrong with it.

    Args:
        source: its path, or its bytes.
        name: what to call it in messages about its content; by default its path.

    Raises:
        AudioError: if it is missing, not a regular file, forbidden, empty, truncated, or not audio that can be read.
    """
    path = str(source) if isinstance(source, Path) else name
    if isinstance(source, Path) and source.exists() and not (source.is_file() or source.is_dir()):
        raise AudioError(f"{path}: not a regular file; a pipe or a device would be waited for without end.")
    try:
        with Content(source) as content:
            if content.size == 0:
                raise AudioError(f"{path}: the file is empty.")
            found = _layout(content, name or path)
    except FileNotFoundError as error:
        raise AudioError(f"{path}: no such file.{hint_at_backslashes(path)}") from error
    except IsADirectoryError as error:
        raise AudioError(f"{path}: this is a folder, not an audio file.") from error
    except OSError as error:
        raise AudioError(f"{path}: cannot be opened ({error.strerror}).") from error
    return Sound(source, name or path, found)


def downmix(block: Samples) -> Samples:
    """(n, channels) -> (n,), the mean; in a sixth of the time that numpy takes for the mean of so short an axis."""
    mono = block[:, 0]
    for channel in range(1, block.shape[1]):
        mono = mono + block[:, channel]
    return mono if block.shape[1] == 1 else mono / np.float32(block.shape[1])


def resampled(blocks: Iterator[Samples], source_rate: int, sample_rate: int) -> Iterator[Samples]:
    """Resample a stream of blocks; the same samples as of one block. A clip with samples keeps at least one."""
    resampler = soxr.ResampleStream(source_rate, sample_rate, 1, dtype="float32", quality="HQ")
    first, total = None, 0
    for block in blocks:
        first = block[:1] if first is None else first
        chunk = resampler.resample_chunk(np.ascontiguousarray(block))
        total += len(chunk)
        yield chunk
    rest = resampler.resample_chunk(np.empty(0, np.float32), last=True)
    if total + len(rest) == 0 and first is not None:
        rest = first  # the clip is shorter than one sample of the new rate
    yield rest


class _Sequential(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """A file that is read on from where it is.

    soundfile seeks to where it is after each read. MP3 decoders lose their bit reservoir there, and FLAC streams that
    do not know their length cannot be sought in.
    """

    def seekable(self) -> bool:
        return False


class _Sndfile:
    """A stream that libsndfile decodes; ``frames`` is None if nobody knows how many samples a channel it has."""

    def __init__(self, file: soundfile.SoundFile, stream: BinaryIO | None, part: Part, preroll: int, name: str):
        self._file, self._stream, self._preroll, self._name = file, stream, preroll, name
        self.rate = int(file.samplerate)
        frames = int(file.frames) if part.frames is None else min(file.frames, part.frames)
        self.frames = frames if frames < _NO_LENGTH else None
        self.seconds = (self.frames or 0) / self.rate

    def blocks(self) -> Iterator[Samples]:
        if self._preroll:
            # Sums of an MPEG decoder are rounded by where it began; begin as all who read a stretch do.
            self._seek(0)
        missing = self.frames if self.frames is not None else _NO_LENGTH
        while missing > 0 and len(block := self._next(min(missing, _BLOCK_SAMPLES))):
            missing -= len(block)
            yield downmix(block)  # and keep the block: memory given back between reads would be mapped anew each time
        self._refuse_if_missing(missing)

    def read(self, start: int, stop: int) -> Samples:
        begin = max(0, start - self._preroll)
        self._seek(begin)
        block = self._next(stop - begin)
        self._refuse_if_missing(stop - begin - len(block))
        return downmix(block[start - begin :])

    def close(self) -> None:
        self._file.close()
        if self._stream is not None:
            self._stream.close()

    def _seek(self, frame: int) -> None:
        try:
            self._file.seek(frame)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{self._name}: damaged or truncated ({error.error_string}).") from error

    def _next(self, count: int) -> Samples:
        try:
            block: Samples = self._file.read(count, dtype="float32", always_2d=True)
            return block
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{self._name}: damaged or truncated ({error.error_string}).") from error

    def _refuse_if_missing(self, missing: int) -> None:
        if missing > 0 and self.frames is not None:
            raise AudioError(f"{self._name}: truncated, {missing} samples fewer than its header promises.")


def _open_part(source: Encoded, part: Part, found: Layout, name: str) -> _Decoder:
    where = str(source) if isinstance(source, Path) else name
    if part.decoder:
        reason = ""
    else:
        # soundfile goes by the name of a ".raw" and would be told its rate; whatever it holds states that itself.
        named = part.pieces is None and isinstance(source, Path) and source.suffix.lower() != ".raw"
        stream = None if named else _stream(source, part)
        try:
            file = _Sequential(source if stream is None else stream)
            if file.format not in LIBSNDFILES:
                file.close()
                if stream is not None:
                    stream.close()
                raise AudioError(
                    f"{where}: whether a file of this format ({file.format_info}) is whole is not checked; convert it "
                    "to WAV or FLAC."
                )
            if part.frames is None or file.frames >= part.frames:
                return _Sndfile(file, stream, part, found.preroll, name)
            reason = "it takes it for shorter than it is"
            file.close()
        except soundfile.LibsndfileError as error:
            reason = error.error_string
        if stream is not None:
            stream.close()
    decoder = part.decoder or found.fallback
    if not decoder:
        raise AudioError(f"{where}: not audio that can be read ({reason}).")
    if not has_av():
        why = f" ({reason})" if reason else ""
        raise AudioError(f"{where}: libsndfile does not read this {found.title}{why}; {AV_HINT}.")
    try:
        return FFmpegSound(_stream(source, part), decoder, name)
    except AudioError as error:
        if not reason:
            raise
        raise AudioError(f"{where}: not audio that can be read ({reason}). {error}") from error


def _stream(source: Encoded, part: Part) -> BinaryIO:
    """What a part is read from, where that is not the file itself."""
    if part.pieces is None and isinstance(source, bytes):
        return io.BytesIO(source)
    content = Content(source)
    return cast(BinaryIO, Stitched(content, part.pieces or ((0, content.size),)))


def _layout(content: Content, name: str) -> Layout:
    """The layout of a file; remembered, as files are first looked at and then read."""
    if content.stamp is None:
        return layout(content, name)
    key = (name, *content.stamp)
    found = _layouts.get(key)
    if found is None:
        found = layout(content, name)
        if len(_layouts) >= _REMEMBERED:
            _layouts.clear()
        _layouts[key] = found
    return found


@cache
def _warn_once(warning: str) -> None:
    log.warning("%s", warning)
