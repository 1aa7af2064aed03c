"""Where the files in a file begin and end, by the sizes that they state themselves.

What is joined byte by byte has a second beginning behind the end of the first; libsndfile and FFmpeg read the first, or
take the second header for samples. What was cut ends before the chunk, block or tag with the sound does. So a file is
walked here from chunk to chunk, without a look at what is in them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

from m2d_embed.audio.mp3 import end_of_id3
from m2d_embed.audio.stitched import Content
from m2d_embed.errors import AudioError

_NAME = re.compile(rb"[A-Za-z0-9(\xa9][A-Za-z0-9 _.\-\xa9)]{3}")
_PADDING = 1 << 16  # bytes of zeros looked through for another beginning, at a time
_ZEROS_BEFORE = 3  # of a beginning, at most
_SHORTEST = 64  # bytes in which there is anything worth a word
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
_W64_OTHERS = bytes.fromhex("d3118cd100c04f8edb8a")  # what the names of its chunks end with
W64_DATA = b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a")

_UNKNOWN = 0


class Chunk(NamedTuple):
    """A stretch of a file that states its length.

    Attributes:
        length: in bytes, with its header; ``_UNKNOWN`` if it goes up to the end of the file, or nobody knows.
        begins: whether it is the beginning of a file, of which the second belongs to another file.
        sound: whether sound is in it.
        ends: whether it is the last of a file.
    """

    length: int
    begins: bool = False
    sound: bool = False
    ends: bool = False


class Found(NamedTuple):
    """The files in a file, from and up to which place each; what is behind the last of them, "" if it is nothing."""

    files: list[tuple[int, int]]
    behind: str = ""


def files_in(content: Content, start: int, kind: str, name: str) -> Found | None:
    """The files of a kind that a file was joined of, mostly one.

    Args:
        content: of the file.
        start: where the first of them begins.
        kind: FFmpeg's name of the format.
        name: of the file, for messages.

    Returns:
        None if the format, or this file, does not state where it ends.

    Raises:
        AudioError: if it ends within the sound.
    """
    if kind not in _KINDS:
        return None
    parse, at, has_sound = _KINDS[kind], start, False
    files: list[tuple[int, int]] = []
    while True:
        chunk = parse(content, at) if at < content.size else None
        if chunk is not None and chunk.length <= _UNKNOWN:  # or a header of zeros
            return Found([*files, (start, content.size)]) if files else None
        if chunk is not None and at + chunk.length > content.size:
            if chunk.sound:
                held, stated = content.size - start, at + chunk.length - start
                raise AudioError(f"{name}: truncated, it holds {held} of the {stated} bytes its header promises.")
            chunk = None
        if chunk is not None and not (chunk.begins and has_sound):
            has_sound = has_sound or chunk.sound
            at += chunk.length
            if not chunk.ends:
                continue
        if not has_sound and files:
            raise AudioError(f"{name}: truncated, of the {len(files) + 1} files joined in it the last has no sound.")
        if not has_sound:
            return None
        files.append((start, at))
        behind = _after_padding(content, at)
        for place in range(max(at, behind - _ZEROS_BEFORE), behind + 1):
            if (following := parse(content, place)) is not None and following.begins:
                break
        else:
            return Found(files, _left_out(content, behind, name))
        start, at, has_sound = place, place, False


def _after_padding(content: Content, at: int) -> int:
    """The first place from one on that is neither a zero nor in a tag."""
    while True:
        zeros = content.at(at, _PADDING)
        begin = at + len(zeros) - len(zeros.lstrip(b"\0"))
        head = content.at(begin, 16)
        if head[:8] == b"APETAGEX" and len(head) == 16:
            begin += 32 + int(struct.unpack("<I", head[12:])[0])
        elif head[:3] == b"TAG":
            begin += 128
        else:
            begin = end_of_id3(content, begin)
        if begin == at:
            return at
        at = begin


def _left_out(content: Content, at: int, name: str) -> str:
    """What is to be said of the bytes behind a file: nothing of what is shorter than a header."""
    count = content.size - at
    return f"{name}: {count} bytes after the sound that its header states are left out." if count >= _SHORTEST else ""


# --- one function a format: the chunk at a place, None if none is there -----------------------------------------------


def _aiff(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 12)
    if len(head) < 8 or not _NAME.fullmatch(head[:4]):
        return None
    if head[:4] == b"FORM":
        return Chunk(12, begins=head[8:12] in (b"AIFF", b"AIFC"))
    (size,) = struct.unpack(">I", head[4:8])
    if head[:4] == b"SSND":
        return Chunk(_up_to(content, at, 8, size, pad=True), sound=True)
    return Chunk(min(8 + size + size % 2, max(8 + size, content.size - at)))


def _au(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 24)
    if len(head) < 24 or head[:4] != b".snd":
        return None
    start, size = struct.unpack(">II", head[4:12])
    return Chunk(_up_to(content, at, start, size), begins=True, sound=True)


def _caf(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 12)
    if len(head) < 12 or not _NAME.fullmatch(head[:4]):
        return None
    if head[:4] == b"caff":
        return Chunk(8, begins=True)
    (size,) = struct.unpack(">q", head[4:])
    return Chunk(12 + size if size >= 0 else _UNKNOWN, sound=head[:4] == b"data")


def _w64(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 24)
    if head[:16] == _W64_RIFF:
        return Chunk(40, begins=True)
    if len(head) < 24 or not head[:16].endswith((_W64_OTHERS, _W64_RIFF[6:])):  # lists are of the other kind
        return None
    (size,) = struct.unpack("<Q", head[16:])
    if size < 24 or is_placeholder(size - 24):
        return Chunk(_UNKNOWN)
    is_sound, padded = head[:16] == W64_DATA, size + 7 & ~7
    return Chunk(min(padded, max(size, content.size - at)) if is_sound else padded, sound=is_sound)


def _avi(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 12)
    if head[:4] != b"RIFF" or head[8:] not in (b"AVI ", b"AVIX"):
        return None
    (size,) = struct.unpack("<I", head[4:8])
    return Chunk(_up_to(content, at, 8, size, pad=True), begins=head[8:] == b"AVI ", sound=True)


def _mov(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 16)
    if len(head) < 8 or not _NAME.fullmatch(head[4:8]):
        return None
    size, kind = struct.unpack(">I4s", head[:8])
    if size == 1 and len(head) == 16:
        (size,) = struct.unpack(">Q", head[8:])
    if size < 8:
        return Chunk(_UNKNOWN)
    # Fragments that were recorded begin with "styp"; "ftyp" is written once.
    return Chunk(size, begins=kind == b"ftyp", sound=kind in (b"mdat", b"moov", b"moof"))


def _matroska(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 12)
    length = 4 if head[:4] in (b"\x1aE\xdf\xa3", b"\x18S\x80g") else 0
    if not length or len(head) < 12:
        return None
    octets = 9 - head[4].bit_length()  # of the size, in which as many zeros lie before the first one
    size = int.from_bytes(head[4 : 4 + octets], "big") & (1 << 7 * octets) - 1
    if octets > 8 or size == (1 << 7 * octets) - 1:
        return Chunk(_UNKNOWN)
    return Chunk(4 + octets + size, begins=head[0] == 0x1A, sound=head[0] == 0x18)


def _asf(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 24)
    if len(head) < 24 or not any(head[10:16]):
        return None
    (size,) = struct.unpack("<Q", head[16:])
    if head[:16] == _ASF_DATA:
        return Chunk(size if size > 50 else _UNKNOWN, sound=True)  # an empty one: written to a pipe
    begins = head[:16] == _ASF_HEADER
    return Chunk(size, begins) if size >= 24 and (begins or size <= content.size - at) else None


def _flv(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 11)
    if head[:4] == b"FLV\x01":
        return Chunk(13, begins=True)
    if not head or head[0] & 0x1F not in (8, 9, 18) or any(head[8:11]):  # a few bytes of it: cut there
        return None
    size = 11 + int.from_bytes(head[1:4], "big")
    return Chunk(min(size + 4, max(size, content.size - at)), sound=True)  # some leave out the last four bytes


def _tta(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 22)
    if len(head) < 22 or head[:4] != b"TTA1":
        return None
    rate, samples = struct.unpack("<II", head[10:18])
    frames = -(-samples // max(1, 256 * rate // 245))
    sizes = content.at(at + 22, 4 * frames)
    if len(sizes) < 4 * frames:
        return Chunk(22 + 4 * frames + 4, begins=True, sound=True)
    return Chunk(22 + 4 * frames + 4 + sum(struct.unpack(f"<{frames}I", sizes)), begins=True, sound=True)


def _wavpack(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 32)
    if len(head) < 32 or head[:4] != b"wvpk":
        return None
    size, index, samples, flags = struct.unpack("<I8xIII", head[4:28])
    begins = index == 0 and samples > 0 and bool(flags & 0x800) and not head[10]  # 0x800: of several channels the first
    return Chunk(8 + size, begins, sound=True)


def _ape(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 36)
    if len(head) < 36 or head[:4] != b"MAC ":
        return None
    (version,) = struct.unpack("<H", head[4:6])
    if version < 3_980:  # an older header, without sizes
        return Chunk(_UNKNOWN)
    descriptor, header, table, wav, data, high, tail = struct.unpack("<7I", head[8:36])
    return Chunk(descriptor + header + table + wav + data + (high << 32) + tail, begins=True, sound=True)


def _dsf(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 28)
    if len(head) < 28 or head[:4] != b"DSD ":
        return None
    return Chunk(struct.unpack("<Q", head[12:20])[0], begins=True, sound=True)


def _voc(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 26)
    if head.startswith(b"Creative Voice File\x1a") and len(head) == 26:
        return Chunk(struct.unpack("<H", head[20:22])[0], begins=True)
    if not head or head[0] > 9:
        return None
    if head[0] == 0:
        return Chunk(1, ends=True)
    size = int.from_bytes(head[1:4], "little")
    return Chunk(4 + size if size else _UNKNOWN, sound=head[0] in (1, 2, 9))


def _nist(content: Content, at: int) -> Chunk | None:
    head = content.at(at, 1_024)
    if head[:7] != b"NIST_1A" or not (start := re.match(rb"NIST_1A\s+(\d+)\s", head)):
        return None
    head = content.at(at, min(int(start[1]), _PADDING))
    if len(head) < int(start[1]):
        return Chunk(int(start[1]), begins=True, sound=True)
    size = 1
    for field in (rb"sample_count", rb"channel_count", rb"sample_n_bytes"):
        number = re.search(rb"\n" + field + rb" -i (\d+)", head)
        size *= int(number[1]) if number else 0
    if size == 0 or b"embedded-" in head:  # compressed
        return Chunk(_UNKNOWN)
    return Chunk(int(start[1]) + size, begins=True, sound=True)


_KINDS: dict[str, Callable[[Content, int], Chunk | None]] = {
    "aiff": _aiff,
    "au": _au,
    "caf": _caf,
    "w64": _w64,
    "avi": _avi,
    "mov": _mov,
    "matroska": _matroska,
    "asf": _asf,
    "flv": _flv,
    "tta": _tta,
    "wv": _wavpack,
    "ape": _ape,
    "dsf": _dsf,
    "voc": _voc,
    "nistsphere": _nist,
}

# --- sizes that are none ----------------------------------------------------------------------------------------------

#: Sizes that programs write who do not know any: sox and espeak-ng, lame and opusdec, GStreamer, sox for AIFF; some
#: take off what the header is long.
_PLACEHOLDERS = (0x7FFF_F000, 0x7FFF_FFFF, 0x8000_0000, 0x7FFF_0000, 0x7F00_0000)
_HEADER_LENGTH = 256  # bytes, at most
_LARGEST = range(0xFFFF_FF00, 1 << 32)  # 32-bit sizes that are placeholders, too
_NO_LENGTH = 1 << 62  # and 64-bit ones from here on
_SURELY_LARGER = 0.9  # a placeholder is believed to be one if the file is no longer than so much of it


def is_placeholder(size: int) -> bool:
    """Whether a size is one that programs write who do not know any."""
    return size in _LARGEST or size >= _NO_LENGTH or any(abs(value - size) <= _HEADER_LENGTH for value in _PLACEHOLDERS)


def refuse_if_truncated(size: int, available: int, name: str) -> None:
    """Raise AudioError if a file holds less than its header states, which is not a placeholder."""
    if size > available and not (is_placeholder(size) and available <= _SURELY_LARGER * size):
        raise AudioError(f"{name}: truncated, it holds {available} of the {size} bytes its header promises.")


def _up_to(content: Content, at: int, header: int, size: int, pad: bool = False) -> int:
    """The length of a chunk of sound with its header, of the size that a 32-bit field states."""
    available = content.size - at - header
    if size == 0 or (is_placeholder(size) and available <= _SURELY_LARGER * size):
        return _UNKNOWN
    return header + size + (1 if pad and size % 2 and available > size else 0)
