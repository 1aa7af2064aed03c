"""FLAC streams that do not know their length, or state too little, and files of several of them.

An encoder that writes to a pipe leaves a length of 0, with which libsndfile cannot seek; the last frame tells it. Of
files joined by ``cat`` libsndfile reads the first, or fails; the numbers in the frames tell that there are several.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from m2d_embed.audio.stitched import Content, Piece
from m2d_embed.errors import AudioError

_STREAM = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_FRAME = re.compile(rb"\xff[\xf8\xf9]")
_STREAMINFO_END = 42  # bytes from the start
_WINDOW = 1 << 20  # bytes looked at together
_FRAMES = 1 << 16  # bytes in which a frame begins, at least; more if the stream's frames are longer
_FRAME_HEADER = 16  # bytes of a frame before its content
_TAGS = 128  # bytes of an ID3v1 tag
_TRIED = 3  # what looks like a frame, from the end
_PROBES = (0.23, 0.5, 0.81)  # places at which a file is looked at; copies of one stream do not grow at all of these


class Frame(NamedTuple):
    """Where a frame begins in the file, and which samples of its stream it holds."""

    at: int
    first: int
    end: int


class _Stream(NamedTuple):
    """The header of a stream: where it begins and ends, the length of its blocks and frames, its samples (0: unknown).

    ``total`` counts samples a channel, ``longest`` bytes of a frame.
    """

    start: int
    audio: int
    block: int
    longest: int
    total: int


def flac_parts(content: Content, start: int, name: str) -> list[tuple[Piece, ...] | None]:
    """What to read of a file, part after part; None is the file as it is.

    Raises:
        AudioError: if a stream that does not state its length is cut off.
    """
    stream = _header(content, start)
    if stream is None or (stream.total and _is_single(content, stream)):
        return [None]
    starts = _streams(content, start)
    if len(starts) < 2 and stream.total:
        counted = _counted(content, stream)
        # Shorter than promised, or with something behind it, is found out when it is read.
        return [_with_total(content, start, content.size, counted) if counted > stream.total else None]
    parts: list[tuple[Piece, ...] | None] = []
    for begin, end in zip(starts, [*starts[1:], content.size], strict=True):
        part = _header(content, begin)
        total = part and (part.total or _last_sample(content, part, end))
        if not total:
            raise AudioError(f"{name}: truncated, it ends in the middle of a FLAC frame.")
        parts.append(_with_total(content, begin, end, total))
    return parts


def _header(content: Content, start: int) -> _Stream | None:
    info = content.at(start, _STREAMINFO_END)
    if not _STREAM.match(info) or len(info) < _STREAMINFO_END:
        return None
    at, is_last = start + 4, False
    while not is_last:
        block = content.at(at, 4)
        if len(block) < 4:
            return None
        is_last = bool(block[0] & 0x80)
        at += 4 + int.from_bytes(block[1:], "big")
    block_size, longest = struct.unpack(">2xH3x", info[8:15])[0], int.from_bytes(info[15:18], "big")
    return _Stream(start, at, block_size, longest, int.from_bytes(info[21:26], "big") & (1 << 36) - 1)


def _is_single(content: Content, stream: _Stream) -> bool:
    """Whether the frames seem to be those of one stream: their numbers grow, and lead to its end."""
    window = (stream.longest or _FRAMES) + _TAGS
    if not any(f.end == stream.total for f in _frames(content, stream, content.size - window, content.size)):
        return False
    before = 0
    for probe in _PROBES:
        at = stream.audio + round((content.size - stream.audio) * probe)
        frame = next(_frames(content, stream, at, at + window), None)
        if frame is not None and frame.first < before:
            return False
        before = frame.first if frame is not None else before
    return True


def _streams(content: Content, start: int) -> list[int]:
    """Where streams begin in a file, the first at ``start``."""
    found = []
    for at in range(start, content.size, _WINDOW):
        data = content.at(at, _WINDOW + _STREAMINFO_END)
        found += [at + match.start() for match in _STREAM.finditer(data, 0, _WINDOW + 8)]
    return sorted(set(found))


def _last_sample(content: Content, stream: _Stream, end: int) -> int:
    """Samples of a stream up to the end of its last frame; 0 if it is cut off, or there is none."""
    window = 2 * stream.longest or _WINDOW
    for frame in list(_frames(content, stream, end - window, end))[: -_TRIED - 1 : -1]:
        data = content.at(frame.at, end - frame.at)
        if any(_crc16(data[: len(data) - tag]) == 0 for tag in (0, _TAGS)):
            return frame.end
    return 0


def _counted(content: Content, stream: _Stream) -> int:
    """Samples of a stream up to the end of the last frame that another one leads to, or that ends the file."""
    window = 2 * (stream.longest or _FRAMES) + _TAGS
    found, total = list(_frames(content, stream, content.size - window, content.size)), 0
    ends = {frame.end for frame in found}
    for frame in found:
        if frame.first in ends:
            total = max(total, frame.end)
    return total or _last_sample(content, stream, content.size)


def _with_total(content: Content, begin: int, end: int, total: int) -> tuple[Piece, ...]:
    """A stream with its length in its header."""
    info = content.at(begin, _STREAMINFO_END)
    numbers = int.from_bytes(info[18:26], "big") >> 36 << 36 | total  # rate, channels and bits lie above
    return (info[:18] + numbers.to_bytes(8, "big") + info[26:], (begin + _STREAMINFO_END, end))


def _frames(content: Content, stream: _Stream, start: int, stop: int) -> Iterator[Frame]:
    """The frames that begin between two places, of the rate and the bits of the stream's first one."""
    first = content.at(stream.audio, _FRAME_HEADER)
    start = max(start, stream.audio)
    data = content.at(start, stop - start)
    for match in _FRAME.finditer(data):
        header = data[match.start() : match.start() + _FRAME_HEADER]
        if len(header) < 6 or header[2] & 15 != first[2] & 15 or header[3] & 15 != first[3] & 15:
            continue
        frame = _parse(header, start + match.start(), stream.block)
        if frame is not None:
            yield frame


def _parse(header: bytes, at: int, block: int) -> Frame | None:
    """A frame by its first bytes, if their checksum is right."""
    code = header[2] >> 4
    following = 7 - (header[4] ^ 0xFF).bit_length() if header[4] & 0x80 else 0  # bytes, as in UTF-8
    if following < 0 or header[4] & 0xC0 == 0x80 or code == 0:
        return None
    number = header[4] & (0x7F >> (following + 1 if following else 0))
    for byte in header[5 : 5 + following]:
        number = number << 6 | byte & 0x3F
    at_size = 5 + following
    size_bytes = {6: 1, 7: 2}.get(code, 0)
    size = int.from_bytes(header[at_size : at_size + size_bytes], "big") + 1
    if code == 1:
        size = 192
    elif code < 6:
        size = 576 << code - 2
    elif code > 7:
        size = 256 << code - 8
    checksum = at_size + size_bytes + {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    if len(header) <= checksum or _crc8(header[: checksum + 1]) != 0:
        return None
    start = number if header[1] & 1 else number * block  # frames are counted if all are of one size, else samples
    return Frame(at, start, start + size)


def _crc(data: bytes, table: list[int], bits: int) -> int:
    value, mask = 0, (1 << bits) - 1
    for byte in data:
        value = (value << 8 ^ table[value >> (bits - 8) ^ byte]) & mask
    return value


def _table(polynomial: int, bits: int) -> list[int]:
    table = []
    for value in range(256):
        value <<= bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> (bits - 1) & 1 else 0)
        table.append(value & (1 << bits) - 1)
    return table


_CRC8, _CRC16 = _table(0x07, 8), _table(0x8005, 16)


def _crc8(data: bytes) -> int:
    return _crc(data, _CRC8, 8)


def _crc16(data: bytes) -> int:
    return _crc(data, _CRC16, 16)
