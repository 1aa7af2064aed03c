"""Decoding through FFmpeg's libraries, as PyAV brings them, the extra ``av``: what libsndfile does not read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from m2d_embed.errors import AudioError

Samples = npt.NDArray[np.float32]

_BLOCK_SAMPLES = 1 << 16  # samples a block, at least
_MAY_LACK = 0.25  # seconds: containers round lengths
#: Formats whose containers state how long a stream is; others let FFmpeg guess it from bytes.
_STATING = ("mov", "matroska", "avi", "flv", "wv", "tta", "ape")


class FFmpegSound:
    """The first sound track of a file.

    Attributes:
        rate: in Hz.
        seconds: as the file states or FFmpeg guesses; 0 if nobody knows.
    """

    def __init__(self, stream: BinaryIO, audio_format: str, name: str):
        """Open a file.

        Args:
            stream: its bytes; closed with this.
            audio_format: FFmpeg's name of the format. It is stated, not guessed: FFmpeg knows formats that make it
                open other files.
            name: of the file, for messages.

        Raises:
            AudioError: if the file is damaged, or holds no sound.
        """
        self._stream, self._name, self._format = stream, name, audio_format
        import av

        try:
            self._container = av.open(stream, "r", format=audio_format)
        except (av.FFmpegError, ValueError) as error:
            stream.close()
            raise AudioError(f"{name}: FFmpeg cannot decode it ({_reason(error)}).") from error
        if not self._container.streams.audio:
            self.close()
            raise AudioError(f"{name}: FFmpeg finds no audio in it ({audio_format}).")
        self._track = self._container.streams.audio[0]
        if self._track.codec_context is None:
            self.close()
            raise AudioError(f"{name}: FFmpeg cannot decode it (no decoder for its sound).")
        self.rate = int(self._track.rate or 0)
        self.seconds = self._stated_seconds()
        self._reached = 0.0  # seconds, by packets of all streams

    def blocks(self) -> Iterator[Samples]:
        """Yield all samples, averaged over the channels, without those that the encoder put before and after.

        Raises:
            AudioError: if the file is damaged, shorter than it states, or has no samples.
        """
        limit = round(self.seconds * self.rate) if self._format == "mov" and self.seconds else None
        waiting: list[Samples] = []
        total = given = 0
        for part in self._decoded():
            waiting.append(part)
            total += len(part)
            if total - given >= _BLOCK_SAMPLES:
                yield np.concatenate(waiting)[: None if limit is None else max(0, limit - given)]
                waiting, given = [], total
        if waiting:
            yield np.concatenate(waiting)[: None if limit is None else max(0, limit - given)]
        # Of several streams sound may end first, and Matroska states only when the last one does.
        states_sound = len(self._container.streams) == 1 or bool(self._track.duration)
        lacks = self.seconds - (total / self.rate if states_sound else self._reached)
        if lacks > _MAY_LACK and self._format in _STATING:
            raise AudioError(f"{self._name}: truncated, {lacks:.2f} of {self.seconds:.2f} s are missing.")

    def close(self) -> None:
        """Close the file."""
        self._container.close()
        self._stream.close()

    def _stated_seconds(self) -> float:
        if self._track.duration and self._track.time_base:
            return float(self._track.duration * self._track.time_base)
        return self._container.duration / 1e6 if self._container.duration else 0.0

    def _frames(self) -> Iterator[Any]:
        for packet in self._container.demux():
            if packet.pts is not None and packet.time_base:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                self._reached = max(self._reached, end)
            if packet.stream.index == self._track.index:
                yield from packet.decode()

    def _decoded(self) -> Iterator[Samples]:
        import av

        to_float = av.AudioResampler(format="fltp")
        try:
            for frame in self._frames():
                for part in to_float.resample(frame):
                    samples = part.to_ndarray().astype(np.float32, copy=False)
                    yield samples[0] if len(samples) == 1 else samples.mean(axis=0, dtype=np.float32)
        except (av.FFmpegError, ValueError) as error:
            raise AudioError(f"{self._name}: FFmpeg cannot decode it ({_reason(error)}).") from error


def _reason(error: Any) -> str:
    return str(getattr(error, "strerror", None) or error)
