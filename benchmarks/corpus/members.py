"""The files of a package or repository -> its audio members, those inside archives inside it as well.

What a member is tells its first bytes, and its name only where a format has no such mark. Members are copied to files
of our own naming in a scratch folder: no path of an archive is ever written to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from benchmarks.corpus import containers
from benchmarks.corpus.containers import Entries, Readable, Reader

COPYRIGHT = "copyright"

_HEAD_BYTES = 512
_DEEPEST = 4  # a zip in a tar in a package is 2

_CONTAINERS: dict[str, Reader] = {
    "zip": containers.zip_entries,
    "tar": containers.tar_entries,
    "pak": containers.pak_entries,
    "rcc": containers.rcc_entries,
    "soundfont": containers.soundfont_entries,
}

#: offset and bytes of a mark -> container, or audio format by its name in FFmpeg
_MARKS: list[tuple[tuple[tuple[int, bytes], ...], str]] = [
    (((0, b"RIFF"), (8, b"WAVE")), "wav"),
    (((0, b"RF64"), (8, b"WAVE")), "wav"),
    (((0, b"OggS"),), "ogg"),
    (((0, b"fLaC"),), "flac"),
    (((0, b"FORM"), (8, b"AIF")), "aiff"),
    (((0, b".snd"),), "au"),
    (((0, b"ID3"),), "mp3"),
    (((0, b"wvpk"),), "wv"),
    (((0, b"Creative Voice File"),), "voc"),
    (((0, b"caff"),), "caf"),
    (((0, b"#!AMR"),), "amr"),
    (((0, b"PK\3\4"),), "zip"),
    (((0, b"qres"),), "rcc"),
    (((0, b"RIFF"), (8, b"sfbk")), "soundfont"),
    (((257, b"ustar"),), "tar"),
]

#: Audio without a mark at its beginning, and audio whose beginning is damaged: named, then, and not passed over.
_SUFFIXES = {
    ".g722": "g722",
    ".gsm": "gsm",
    ".mp3": "mp3",
    ".m4a": "mov",
    ".aac": "aac",
    ".wav": "wav",
    ".ogg": "ogg",
    ".oga": "ogg",
    ".opus": "ogg",
    ".spx": "ogg",
    ".flac": "flac",
    ".aif": "aiff",
    ".aiff": "aiff",
    ".wv": "wv",
    ".voc": "voc",
    ".pk3": "zip",
    ".pk4": "zip",
    ".sf2": "soundfont",
    ".sf3": "soundfont",
}
_COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".oct", ".h2drumkit")


@dataclass(frozen=True)
class Member:
    """A member of a package, copied to ``file``, which the next one overwrites.

    ``path`` is its place in the package, through archives; ``format`` FFmpeg's name of its audio format, or
    ``"copyright"``.
    """

    path: str
    file: Path
    format: str


@dataclass(frozen=True)
class Unreadable:
    """A member that should have been audio, or an archive of it, and cannot be read."""

    path: str
    reason: str


def audio_members(entries: Entries, scratch: Path) -> Iterator[Member | Unreadable]:
    """Audio members of a package or repository, and a package's copyright file.

    Args:
        entries: its files.
        scratch: an empty folder for copies.

    Raises:
        CorpusError: if the package itself cannot be read.
    """
    yield from _walk(entries, "", scratch, 1)


def what_is(path: str, head: bytes) -> str | None:
    """Audio format, kind of archive or ``"copyright"``; None is of no interest.

    Args:
        path: in the package.
        head: the first 512 bytes, or all.
    """
    place = PurePosixPath(path)
    if place.parts[:3] == ("usr", "share", "doc") and place.name == "copyright" and len(place.parts) == 5:
        return COPYRIGHT
    for marks, kind in _MARKS:
        if all(head.startswith(mark, at) for at, mark in marks):
            return kind
    if path.lower().endswith(_COMPRESSED_TAR):
        return "tar"
    if place.suffix.lower() == ".pak" and head.startswith(b"PACK"):
        return "pak"
    return _SUFFIXES.get(place.suffix.lower())


def _walk(entries: Entries, parent: str, scratch: Path, depth: int) -> Iterator[Member | Unreadable]:
    for name, stream in entries:
        path = parent + _printable(name)
        file = scratch / f"level-{depth}"
        try:
            kind = _copy_if_wanted(path, stream, file)
        except Exception as error:
            yield Unreadable(path, _damage(error))
            continue
        if kind in _CONTAINERS:
            yield from _inside(_CONTAINERS[kind], path, file, depth)
        elif kind is not None:
            yield Member(path, file, kind)


def _inside(reader: Reader, path: str, file: Path, depth: int) -> Iterator[Member | Unreadable]:
    if depth == _DEEPEST:
        yield Unreadable(path, f"archives inside one another are opened {_DEEPEST - 1} deep, no further")
        return
    try:
        yield from _walk(reader(file), path + "/", file.parent, depth + 1)
    except Exception as error:
        yield Unreadable(path, f"the archive is damaged from some member on: {_damage(error)}")


def _copy_if_wanted(path: str, stream: Readable, file: Path) -> str | None:
    with contextlib.closing(stream):
        head = stream.read(_HEAD_BYTES)
        kind = what_is(path, head) if head else None
        if kind is not None:
            with file.open("wb") as copy:
                copy.write(head)
                while block := stream.read(1 << 20):
                    copy.write(block)
    return kind


def _damage(error: Exception) -> str:
    """What a damaged archive raised; everything else is not ours to explain."""
    is_of_file = isinstance(error, OSError) and error.errno is None  # gzip's and lzma's; others are of this machine
    if not (is_of_file or isinstance(error, containers.DAMAGE)):
        raise error
    return str(error) or type(error).__name__


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
