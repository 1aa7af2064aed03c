"""What the headers of sound files say of their length, and whether the files hold that; headers put right.

Programs that write to a pipe cannot go back to the header and leave a placeholder there, a recorder that died leaves a
zero, sizes beyond 4 GiB lose their upper bits, and files are joined by ``cat``. libsndfile then reads a part, nothing,
or fails. Here each of these becomes a layout: the parts to read one after the other, behind headers that are right.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from m2d_embed.audio import mp3
from m2d_embed.audio.ends import W64_DATA, files_in, is_placeholder, refuse_if_truncated
from m2d_embed.audio.flac import flac_parts
from m2d_embed.audio.formats import ffmpeg_format
from m2d_embed.audio.stitched import Content, Piece
from m2d_embed.errors import AudioError

Pieces = tuple[Piece, ...]

_HEAD = 64  # bytes that tell the format
_WAV_MP3 = 0x55
_MOST_CHUNKS = 1_000  # looked at before the samples; more are no chunks
_BEGINNINGS = frozenset({b"RIFF", b"RIFX", b"RF64", b"BW64", b"data"})  # what does not follow samples in a whole file
_CHUNK_NAME = re.compile(rb"[A-Za-z0-9][A-Za-z0-9 _.\-\xa9]{3}")
_WAVES = (b"RIFF", b"RIFX", b"RF64", b"BW64")
_LIBSNDFILE_TOO = ("wav", "nistsphere", "voc", "aiff", "au", "caf", "w64")


@dataclass(frozen=True)
class Part:
    """One stream of a file.

    Attributes:
        pieces: what it is read from; None is the file as it is.
        decoder: FFmpeg's name of the format, if FFmpeg has to read it; "" means libsndfile.
        frames: samples a channel, counted where libsndfile could only guess; else None.
    """

    pieces: Pieces | None = None
    decoder: str = ""
    frames: int | None = None


@dataclass(frozen=True)
class Layout:
    """What a file is made of.

    Attributes:
        parts: to be read one after the other.
        title: name of the format, for people; "" if it is unknown.
        fallback: FFmpeg's name of the format, for what libsndfile does not read; "" if FFmpeg has none.
        preroll: samples before a place from which it is decoded as it is from the start.
        warning: what the user should know, "" if there is nothing.
    """

    parts: tuple[Part, ...] = (Part(),)
    title: str = ""
    fallback: str = ""
    preroll: int = 0
    warning: str = ""


def layout(content: Content, name: str) -> Layout:
    """Look at the headers of a file.

    Args:
        content: of the file.
        name: of the file, for messages.

    Raises:
        AudioError: if it holds less than its header states, or what it holds cannot be known.
    """
    start = mp3.end_of_id3(content)
    head = content.at(start, _HEAD)
    fallback, title = ffmpeg_format(head) or ("", "")
    if fallback == "wav" and head[:4] in _WAVES:
        return _wav(content, name)
    decoder = fallback if fallback not in _LIBSNDFILE_TOO else ""
    found = files_in(content, start, fallback, name)
    if found is not None and (len(found.files) > 1 or found.files[0][1] < content.size):
        parts = tuple(Part((file,), decoder) for file in found.files)
        return Layout(parts, title, fallback, warning=found.behind)
    if fallback == "w64":
        return _w64(content)
    if fallback == "caf":
        return _caf(content)
    if fallback == "au" and head[8:12] == bytes(4):
        return Layout((Part((head[:8] + b"\xff" * 4, (12, content.size))),), title, fallback)
    if fallback == "flac":
        return Layout(tuple(map(Part, flac_parts(content, start, name))), title, fallback)
    if fallback == "ogg":
        return _ogg(content, name)
    if not fallback and (first := mp3.find_start(content, start)) is not None:
        return _mpeg(content, first, content.size)
    return Layout((Part(decoder=decoder),), title, fallback)


# --- MPEG audio -------------------------------------------------------------------------------------------------------


def _mpeg(content: Content, start: int, stop: int) -> Layout:
    preroll = mp3.preroll(content, start)
    if mp3.states_its_length(content, start):
        return Layout((Part(),), "MP3", "mp3", preroll)
    parts = []
    for run in mp3.runs(content, start, stop):
        if run.first.layer == 3:
            parts.append(Part(run.pieces()))
        else:  # these have no header of their own for it
            parts.append(Part(tuple(run.stretches), frames=run.count * run.first.samples))
    return Layout(tuple(parts) or (Part(),), "MP3", "mp3", preroll)


# --- RIFF, RF64 -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """The chunk of samples: where they begin, and their stated size in bytes."""

    start: int
    size: int


def _wav(content: Content, name: str) -> Layout:
    kind = content.at(0, 4)
    order = ">" if kind == b"RIFX" else "<"
    data, codec, per_second, long_size = None, 0, 0, 0
    for chunk, start, size in _chunks(content, 12, order):
        if chunk == b"ds64" and len(sizes := content.at(start, 16)) == 16:
            long_size = struct.unpack("<8xQ", sizes)[0]
        elif chunk == b"fmt " and len(fmt := content.at(start, 12)) == 12:
            codec, _, _, per_second = struct.unpack(order + "HHII", fmt)
        elif chunk == b"data":
            is_long = kind in (b"RF64", b"BW64") and size == 0xFFFF_FFFF
            data = _Data(start, long_size if is_long else size)
            break
    if data is None:
        return Layout((Part(),), "WAV", "wav")
    available = content.size - data.start
    size, warning = _real_size(content, data, order, per_second, name)
    if codec == _WAV_MP3:
        return _mpeg(content, data.start, data.start + min(size, available))
    if size == data.size:
        return Layout((Part(),), "WAV", "wav", warning=warning)
    if order == ">":
        raise AudioError(f"{name}: its header was never closed; {available} bytes follow it. Convert it with sox.")
    return Layout((Part(_with_size(content, data, size)),), "WAV", "wav", warning=warning)


def _real_size(content: Content, data: _Data, order: str, per_second: int, name: str) -> tuple[int, str]:
    """How many bytes of samples a WAV file has, and a warning or ""."""
    available = content.size - data.start
    behind = available - data.size
    if behind <= 1:
        refuse_if_truncated(data.size, available, name)
        return data.size, ""
    follows = content.at(data.start + data.size + data.size % 2, 4)
    if follows in _BEGINNINGS:
        raise AudioError(
            f"{name}: another file or more samples follow those that its header states, as where files were joined "
            "byte by byte; take them apart, or join them with an audio program."
        )
    if _chunk_follows(content, data.start + data.size, order):
        return data.size, ""
    if data.size == 0:
        return available, f"{name}: its header was never closed (0 bytes of samples); the {available} behind are read."
    if behind >> 32:
        size = data.size + (behind >> 32 << 32)
        return size, f"{name}: sizes of 4 GiB and more wrap in its header ({data.size} bytes); {size} bytes are read."
    if is_placeholder(data.size):
        return available, ""
    if behind >= per_second > 0 and any(content.at(data.start + data.size, 4096)):
        return data.size, f"{name}: {behind} bytes after the samples that its header states are left out."
    return data.size, ""


def _chunk_follows(content: Content, start: int, order: str) -> bool:
    """Whether a chunk begins at a place, or one byte later, that ends within the file."""
    for at in (start, start + 1):
        head = content.at(at, 8)
        if len(head) == 8 and _CHUNK_NAME.fullmatch(head[:4]):
            return at + 8 + int(struct.unpack(order + "I", head[4:])[0]) <= content.size + 1
    return False


def _with_size(content: Content, data: _Data, size: int) -> Pieces:
    """The file with another size of its samples, as RF64, in which any size can be stated."""
    sizes = struct.pack("<4sIQQQI", b"ds64", 28, size + data.start, size, 0, 0)
    head = b"RF64" + b"\xff" * 4 + b"WAVE" + sizes
    before = []
    for chunk, start, length in _chunks(content, 12, "<"):
        if chunk == b"data":
            break
        if chunk != b"ds64":
            before.append(content.at(start - 8, 8 + length + length % 2))
    return (head + b"".join(before) + b"data" + b"\xff" * 4, (data.start, data.start + size))


def _chunks(content: Content, start: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, start of the content and size of the chunks of a RIFF file or its like."""
    for _ in range(_MOST_CHUNKS):
        head = content.at(start, 8)
        if len(head) < 8:
            break
        size = struct.unpack(order + "I", head[4:])[0]
        yield head[:4], start + 8, size
        start += 8 + size + size % 2


# --- sizes that are put right ----------------------------------------------------------------------------------------


def _w64(content: Content) -> Layout:
    at = 40
    for _ in range(_MOST_CHUNKS):
        head = content.at(at, 24)
        if len(head) < 24:
            break
        size, available = struct.unpack("<Q", head[16:])[0], content.size - at - 24
        if head[:16] == W64_DATA:
            if size - 24 > available:  # a placeholder
                known = content.at(0, 16) + struct.pack("<Q", content.size) + content.at(24, at - 24)
                header = known + head[:16] + struct.pack("<Q", available + 24)
                return Layout((Part((header, (at + 24, content.size))),), "W64")
            break
        at += max(24, size + 7 & ~7)
    return Layout((Part(),), "W64")


def _caf(content: Content) -> Layout:
    at = 8
    for _ in range(_MOST_CHUNKS):
        head = content.at(at, 12)
        if len(head) < 12:
            break
        chunk, size = struct.unpack(">4sq", head)
        if chunk == b"data":
            available = content.size - at - 12
            if size == -1:  # up to the end of the file
                header = content.at(0, at) + struct.pack(">4sq", b"data", available)
                return Layout((Part((header, (at + 12, content.size))),), "Core Audio", "caf")
            break
        at += 12 + max(0, size)
    return Layout((Part(),), "Core Audio", "caf")


# --- Ogg --------------------------------------------------------------------------------------------------------------

_PAGE_HEAD = 27 + 255 + 8  # bytes: header, table of segments, name of the codec
_BEGINS, _ENDS = 2, 4  # flags of a page that begins a logical stream, and of one that ends it
_FFMPEGS_CODECS = {b"\x7fFLAC": "Ogg FLAC", b"Speex ": "Ogg Speex"}


def _ogg(content: Content, name: str) -> Layout:
    """The links of a chain, each an Ogg file of its own, as radio streams are recorded."""
    links: list[tuple[int, str]] = []  # where each begins, and its codec if FFmpeg has to read it
    at, beginning, ended = 0, False, True
    while (page := content.at(at, _PAGE_HEAD))[:4] == b"OggS" and len(page) > 27:
        begins = bool(page[5] & _BEGINS)
        segments = page[26]
        if begins and not beginning:  # streams side by side begin together
            codec = page[27 + segments :]
            links.append((at, next((name for mark, name in _FFMPEGS_CODECS.items() if codec.startswith(mark)), "")))
        beginning, ended = begins, bool(page[5] & _ENDS)
        at += 27 + segments + sum(page[27 : 27 + segments])
    if at > content.size or content.at(at, 4)[:4] == b"OggS":
        raise AudioError(f"{name}: truncated, it ends in the middle of an Ogg page.")
    warning = "" if ended else f"{name}: nothing marks its end; it may have been cut."
    title = next((name for _, name in links if name), "Ogg")
    decoders = ["ogg" if name else "" for _, name in links] or [""]
    if len(links) < 2:
        return Layout((Part(decoder=decoders[0]),), title, "ogg", warning=warning)
    ends = [start for start, _ in links[1:]] + [content.size]
    parts = [Part(((start, end),), decoder) for (start, _), end, decoder in zip(links, ends, decoders, strict=True)]
    return Layout(tuple(parts), title, "ogg", warning=warning)
