"""MPEG audio: where its frames lie, how many there are, and how far a decoder looks back.

A Layer III frame may take part of its data from up to 511 bytes before it, the bit reservoir: a decoder that begins in
the middle gives silence or noise until it has these. And a file states its length only in a Xing (or Info) header, a
frame without sound at its start, which writing to a pipe leaves out; libsndfile then guesses the length from the first
frames, and stops there. So the frames are counted here, and such a file is read behind a Xing header of our own.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from m2d_embed.audio.stitched import Content, Piece

_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # by version bits
_KBITS = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_TAGS = (b"Xing", b"Info")
_SYNC = re.compile(rb"\xff[\xe2-\xff]")
_WINDOW = 1 << 20  # bytes looked at together
_LONGEST_TAG = 64  # bytes from the start of a frame to the last that is read of a Xing header
_CHAIN = 4  # frames in a row that make a stream of bytes MPEG audio
_FARTHEST_START = 1 << 16  # bytes before the first frame, of a recording that begins within one
_SLACK = 4_096  # bytes that encoders count differently in a Xing header, and that may follow the last frame
_SILENCE = 4 * 1_152  # samples
_DECODER_DELAY = 529  # samples
_SETTLING = 3  # frames until overlapping transforms of an earlier place have died away


class Header(NamedTuple):
    """What the four bytes before each frame say: ``size`` in bytes, ``samples`` in the frame."""

    mpeg1: bool
    layer: int
    rate: int
    mono: bool
    has_crc: bool
    size: int
    samples: int

    @property
    def side_info(self) -> int:
        """Bytes of a Layer III frame that say how its data is to be read."""
        return (17 if self.mono else 32) if self.mpeg1 else (9 if self.mono else 17)

    def continues(self, other: Header) -> bool:
        """Whether a decoder can go on from one frame to the other."""
        return self[:4] == other[:4]


class Xing(NamedTuple):
    """A header frame: how many frames and bytes follow, 0 where it does not say; None of its kind that we rely on."""

    frames: int
    size: int
    trusted: bool


@dataclass
class Run:
    """Frames that one decoder can read, one after the other: ``count`` of them, in these stretches of the file."""

    first: Header
    xing: Xing | None
    head: bytes
    stretches: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0

    def pieces(self) -> tuple[Piece, ...]:
        """The run behind a header that states its length: its own, put right, or one of ours."""
        (start, stop), *rest = self.stretches
        if self.xing is not None and self.xing.trusted:
            # A header that promises more stays: frames were lost.
            if self.count <= self.xing.frames:
                return ((start, stop), *rest)
            at = 4 + self.first.side_info + 8
            stated = struct.pack(">I", self.count)
            if self.head[at - 1] & 2:  # the size follows
                stated += struct.pack(">I", min(0xFFFF_FFFF, sum(end - begin for begin, end in self.stretches)))
            return (self.head[:at] + stated, (start + at + len(stated), stop), *rest)
        if self.xing is not None:  # of a kind that libsndfile takes for sound
            start += self.first.size
        return (_xing_frames(self.head, self.count), (start, stop), *rest)


@lru_cache(4096)
def parse_header(four: bytes) -> Header | None:
    """The header of a frame; None if it is none, or one of free bit rate, which hardly anybody writes."""
    if len(four) < 4 or four[0] != 0xFF or four[1] & 0xE0 != 0xE0:
        return None
    version, layer = four[1] >> 3 & 3, 4 - (four[1] >> 1 & 3)
    rate_code, kbit_code = four[2] >> 2 & 3, four[2] >> 4
    if version == 1 or layer == 4 or rate_code == 3 or kbit_code in (0, 15) or four[3] & 3 == 2:
        return None
    mpeg1, padding = version == 3, four[2] >> 1 & 1
    rate = _RATES[version][rate_code]
    bits = 1000 * _KBITS[mpeg1, layer][kbit_code]
    samples = 384 if layer == 1 else 1152 if mpeg1 or layer == 2 else 576
    size = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    return Header(mpeg1, layer, rate, four[3] >> 6 == 3, not four[1] & 1, size, samples)


def find_start(content: Content, start: int) -> int | None:
    """Where the first frame is, at or after a place that tags end at; None if this is no MPEG audio."""
    data = content.at(start, _FARTHEST_START + 8 * _SLACK)
    if _in_a_row(data, 0, 2):
        return start
    for match in _SYNC.finditer(data, 1, _FARTHEST_START):
        if _in_a_row(data, match.start(), _CHAIN):
            return start + match.start()
    return None


def states_its_length(content: Content, start: int) -> bool:
    """Whether the file has a Xing header, in its first frame at ``start``, that speaks of just the rest of the file."""
    head = content.at(start, _LONGEST_TAG)
    header = parse_header(head[:4])
    xing = _xing(head, header) if header else None
    if xing is None or not xing.trusted or not xing.size:
        return False
    # Fewer bytes than promised are a file that was cut, and found to be so when it is read.
    return xing.frames > 0 and _end_of_audio(content) - start <= xing.size + _SLACK


def runs(content: Content, start: int, stop: int) -> list[Run]:
    """All frames between two places of a file; what is none of them is passed over.

    A new run begins at each Xing header and wherever the rate, the number of channels or the layer changes: files were
    joined there.
    """
    found: list[Run] = []
    while start < stop:
        start = _follow(content, start, stop, found)
        start = _next_frame(content, start, stop, found)
    return [run for run in found if run.count]


def preroll(content: Content, start: int) -> int:
    """Samples before a place from which it is decoded as it is from the start of the file.

    The reservoir reaches back 511 bytes, in MPEG-2 255, of the data of frames; the smallest frames tell how many frames
    this is at most: 10 for 44.1 kHz, 88 for stereo of 24 kHz.
    """
    header = parse_header(content.at(start, 4))
    if header is None:
        return 0
    frames = _SETTLING
    if header.layer == 3:
        kbits = 1000 * _KBITS[header.mpeg1, 3][1]
        data = header.samples // 8 * kbits // header.rate - 4 - 2 * header.has_crc - header.side_info
        frames += math.ceil((511 if header.mpeg1 else 255) / max(1, data))
    return frames * header.samples


def end_of_id3(content: Content, start: int = 0) -> int:
    """Where the ID3v2 tags end that begin at a place."""
    while (head := content.at(start, 10))[:3] == b"ID3" and len(head) == 10:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        start += 10 + size + (10 if head[5] & 0x10 else 0)
    return start


def _follow(content: Content, start: int, stop: int, found: list[Run]) -> int:
    """Take in the frames that lie one after the other from a place on; return where they end."""
    begin, run = start, None
    while start < stop:
        data = content.at(start, min(_WINDOW, stop - start))
        last = len(data) - (_LONGEST_TAG if start + len(data) < stop else 0)
        at = 0
        while at < last:
            header = parse_header(data[at : at + 4])
            if header is None or start + at + header.size > stop:
                return _close(run, begin, start + at)
            tag = at + 4 + header.side_info
            if run is None or data[tag : tag + 4] in _TAGS or not header.continues(run.first):
                if run is not None and not _in_a_row(data[at : at + _SLACK], 0, 2):
                    return _close(run, begin, start + at)
                _close(run, begin, start + at)
                begin = start + at
                run = _run_at(data[at : at + _LONGEST_TAG], header, found)
            run.count += 1
            at += header.size
        start += at
        if at == 0:
            break
    return _close(run, begin, start)


def _run_at(head: bytes, header: Header, found: list[Run]) -> Run:
    """The run that a frame belongs to: a new one, or the last one, if only a tag or damage lies between."""
    xing = _xing(head, header)
    if xing is None and found and header.continues(found[-1].first):
        return found[-1]
    found.append(Run(header, xing, head, count=-1 if xing else 0))  # the frame of the header is not counted
    return found[-1]


def _close(run: Run | None, begin: int, end: int) -> int:
    if run is not None and end > begin:
        run.stretches.append((begin, end))
    return end


def _next_frame(content: Content, start: int, stop: int, found: list[Run]) -> int:
    """The next place, from one that is no frame, where frames begin; ``stop`` if there is none."""
    while start < stop:
        data = content.at(start, min(_WINDOW, stop - start))
        if data[:3] == b"ID3" and (end := end_of_id3(content, start)) > start:
            start = end
            continue
        for match in _SYNC.finditer(data):
            wanted = _CHAIN if start + len(data) < stop else 2
            header = parse_header(data[match.start() : match.start() + 4])
            is_whole = header is not None and start + match.start() + header.size <= stop
            if is_whole and _in_a_row(data, match.start(), wanted):
                return start + match.start()
        if start + len(data) >= stop:
            return stop
        start += max(1, len(data) - _CHAIN * _SLACK)
    return stop


def _in_a_row(data: bytes, at: int, wanted: int) -> bool:
    """Whether so many frames that continue one another lie at a place, the last perhaps cut off."""
    first = parse_header(data[at : at + 4])
    if first is None:
        return False
    for _ in range(wanted):
        header = parse_header(data[at : at + 4])
        if header is None or not header.continues(first):
            return at >= len(data)
        at += header.size
    return True


def _xing(head: bytes, header: Header) -> Xing | None:
    """The Xing header in the first bytes of a frame."""
    if header.layer != 3:
        return None
    if head[36:40] == b"VBRI":
        return Xing(0, 0, False)
    tag = head[4 + header.side_info :]
    if tag[:4] not in _TAGS or len(tag) < 16:
        return None
    flags, frames, size = struct.unpack(">III", tag[4:16])
    return Xing(frames, size if flags & 3 == 3 else 0, bool(flags & 1) and frames > 0)


def _xing_frames(head: bytes, frames: int) -> bytes:
    """A Xing header that states how many frames follow, for the frame that begins with ``head``, and frames of silence.

    Decoders of such a file leave out 529 samples at its start, what their filters delay, besides those that the encoder
    states to have put there. All frames are wanted here, as from a file without header: the silence is left out. It is
    a multiple of what the windowing in decoders takes to come round, so that sums are rounded as without it.
    """
    four = bytes([head[0], head[1] | 1, head[2] & 0x0C | 0x90, head[3]])  # no checksum, no padding; 80 or 128 kbit/s
    header = parse_header(four)
    assert header is not None
    silent = _SILENCE // header.samples
    delay, padding = _SILENCE - _DECODER_DELAY, _DECODER_DELAY
    stated = b"Info" + struct.pack(">II", 1, silent + frames)
    encoder = b"LAME".ljust(21, b"\0") + (delay << 12 | padding).to_bytes(3, "big")
    silence = (four + bytes(header.side_info)).ljust(header.size, b"\0")
    return (four + bytes(header.side_info) + stated + encoder).ljust(header.size, b"\0") + silent * silence


def _end_of_audio(content: Content) -> int:
    """Where the tags at the end of a file begin."""
    end = content.size
    if content.at(end - 128, 3) == b"TAG":
        end -= 128
    footer = content.at(max(0, end - 32), 32)
    if footer[:8] == b"APETAGEX":
        size, _, flags = struct.unpack("<III", footer[12:24])
        end -= size + (32 if flags >> 31 else 0)
    return end
