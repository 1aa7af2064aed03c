"""Kinds of sound files: by their endings, and by their first bytes; who reads which."""

from __future__ import annotations

import importlib.util
from functools import cache

#: File name endings of what libsndfile reads; a folder is searched for these.
AUDIO_SUFFIXES = frozenset(
    [
        *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp1", ".mp2", ".mp3"),
        *(".mpga", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".sph", ".voc"),
    ]
)

#: libsndfile's names of the formats that it may read: those whose stated lengths are checked, and the last four, which
#: state none, or which it checks itself. Of others (AVR, MAT5, SDS, ...) it reads what is there.
LIBSNDFILES = frozenset(
    [
        *("WAV", "WAVEX", "RF64", "AIFF", "AU", "CAF", "W64", "NIST", "VOC", "FLAC", "OGG", "MP3"),
        *("IRCAM", "PAF", "PVF", "HTK"),
    ]
)

#: Endings of what FFmpeg's libraries read through PyAV, the extra ``av``; of videos their sound.
AV_SUFFIXES = frozenset(
    [
        *(".m4a", ".m4b", ".m4r", ".mp4", ".m4v", ".mov", ".3gp", ".aac", ".webm", ".weba", ".mka", ".mkv"),
        *(".wma", ".asf", ".avi", ".flv", ".ac3", ".eac3", ".dts", ".amr", ".ape", ".tta", ".tak", ".wv"),
        *(".mpc", ".spx", ".dsf"),
    ]
)

AV_HINT = "pip install 'm2d-embed[av]' reads it"

#: First bytes -> FFmpeg's name of the format, and ours. FFmpeg is never left to guess: it knows formats, such as
#: playlists, that make it open other files and addresses.
_MARKS: tuple[tuple[int, bytes, str, str], ...] = (
    (4, b"ftyp", "mov", "MPEG-4"),
    (4, b"moov", "mov", "QuickTime"),
    (4, b"mdat", "mov", "QuickTime"),
    (4, b"wide", "mov", "QuickTime"),
    (0, b"\x1aE\xdf\xa3", "matroska", "Matroska or WebM"),
    (0, bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "asf", "Windows Media"),
    (0, b"wvpk", "wv", "WavPack"),
    (0, b"MAC ", "ape", "Monkey's Audio"),
    (0, b"TTA1", "tta", "True Audio"),
    (0, b"tBaK", "tak", "TAK"),
    (0, b"MPCK", "mpc8", "Musepack"),
    (0, b"MP+", "mpc", "Musepack"),
    (0, b"#!AMR", "amr", "AMR"),
    (0, b"DSD ", "dsf", "DSD"),
    (0, b"FLV\x01", "flv", "Flash video"),
    (0, b"\x7f\xfe\x80\x01", "dts", "DTS"),
    (8, b"AVI ", "avi", "AVI"),
    (0, b"caff", "caf", "Core Audio"),
    (8, b"WAVE", "wav", "WAV"),
    (8, b"AIFF", "aiff", "AIFF"),
    (8, b"AIFC", "aiff", "AIFF-C"),
    (0, b".snd", "au", "AU"),
    (0, b"fLaC", "flac", "FLAC"),
    (0, b"OggS", "ogg", "Ogg"),
    (0, b"NIST_1A", "nistsphere", "NIST SPHERE"),
    (0, b"Creative Voice File", "voc", "VOC"),
    (0, b"riff", "w64", "W64"),
)


@cache
def has_av() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def audio_suffixes() -> frozenset[str]:
    """Endings of the files that can be read here: without PyAV those of libsndfile."""
    return AUDIO_SUFFIXES | AV_SUFFIXES if has_av() else AUDIO_SUFFIXES


def ffmpeg_format(head: bytes) -> tuple[str, str] | None:
    """FFmpeg's name of a format and a name for people, by the first 16 bytes of a file; None if it is none of these."""
    for offset, mark, name, title in _MARKS:
        if head.startswith(mark, offset):
            return name, title
    if head[:2] == b"\x0b\x77" and len(head) > 5:
        return ("eac3", "E-AC-3") if head[5] >> 3 > 10 else ("ac3", "AC-3")
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # the layer 0, which MPEG audio does not use
        return "aac", "raw AAC"
    return None
