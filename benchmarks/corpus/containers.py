"""Archives of every kind found in the packages -> their members, read as streams and never unpacked to a path.

A reader takes a file and yields (name, stream) for each of its members; a stream is read before the next is asked for.
"""

from __future__ import annotations

import functools
import io
import mmap
import struct
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import soundfile

from benchmarks.corpus.errors import CorpusError


class Readable(Protocol):
    """The part of a binary stream that is needed here."""

    def read(self, size: int = -1, /) -> bytes: ...
    def close(self) -> None: ...


Entries = Iterator[tuple[str, Readable]]
Reader = Callable[[Path], Entries]

#: What reading a damaged archive raises, besides an OSError without a number
DAMAGE = (
    CorpusError,
    EOFError,
    NotImplementedError,  # a zip's method of compression
    RuntimeError,  # an encrypted zip
    UnicodeDecodeError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)

_RCC_DIRECTORY, _RCC_ZLIB, _RCC_ZSTD = 2, 1, 4
_SF_RIGHT, _SF_LEFT, _SF_VORBIS, _SF_ROM = 2, 4, 0x10, 0x8000


def deb_entries(file: Path) -> Entries:
    """Regular files of a Debian package.

    Raises:
        CorpusError: if it is damaged.
    """
    with tempfile.TemporaryFile() as errors:
        command = ["dpkg-deb", "--fsys-tarfile", str(file.absolute())]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        try:
            yield from _tar_stream(process.stdout)
            while process.stdout.read(1 << 20):  # tar's padding; dpkg-deb would die of a closed pipe
                pass
            broken: Exception | None = None
        except tarfile.TarError as error:
            broken = error
        finally:
            process.stdout.close()
            status = process.wait()
        if status or broken:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip() or broken
            raise CorpusError(f"{file}: not a Debian package that can be read ({said}).") from broken


def tar_entries(file: Path) -> Entries:
    """Regular files of a tar archive, compressed or not."""
    with file.open("rb") as stream:
        yield from _tar_stream(stream)


def zip_entries(file: Path) -> Entries:
    """Files of a zip archive."""
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, _Lazy(functools.partial(archive.open, info))


def pak_entries(file: Path) -> Entries:
    """Files of a Quake ``.pak``: a directory of 56 bytes of name, offset and size."""
    content = file.read_bytes()
    start, size = struct.unpack_from("<4xII", content)
    for at in range(start, start + size, 64):
        name, offset, length = struct.unpack_from("<56sII", content, at)
        yield _text(name), io.BytesIO(_part(content, offset, length))


def rcc_entries(file: Path) -> Entries:
    """Files of a binary Qt resource (``rcc --binary``): a tree of nodes, names in UTF-16, data with its length."""
    content = file.read_bytes()
    version, tree, data, names = struct.unpack_from(">4x4I", content)
    node_size = 14 if version < 2 else 22  # from version 2 on with a date

    def name_of(offset: int) -> str:
        (length,) = struct.unpack_from(">H", content, names + offset)
        return _part(content, names + offset + 6, 2 * length).decode("utf-16-be")

    def below(node: int, folder: str, depth: int) -> Entries:
        name, flags, first, second = struct.unpack_from(">IHII", content, tree + node * node_size)
        path = folder + name_of(name) if node else ""
        if not flags & _RCC_DIRECTORY:
            yield path, _Lazy(lambda: io.BytesIO(_rcc_data(content, data + second, flags)))
        elif depth > 100:
            raise CorpusError("folders in a Qt resource are nested without end")
        else:
            for child in range(second, second + first):
                yield from below(child, path + "/" if path else "", depth + 1)

    yield from below(0, "", 0)


def soundfont_entries(file: Path) -> Entries:
    """Samples of a soundfont: WAV at the sample's own rate from ``.sf2``, Ogg Vorbis as it is from ``.sf3``.

    Of a stereo sample the left half stands for both: the right one sounds almost alike.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        chunks = dict(_riff_chunks(content, 12, len(content)))
        if b"smpl" not in chunks or b"shdr" not in chunks:
            raise CorpusError("a soundfont without samples")
        (waves, waves_end), (at, headers_end) = chunks[b"smpl"], chunks[b"shdr"]
        headers = [struct.unpack_from("<20s5I2x2xH", content, i) for i in range(at, headers_end - 2 * 46 + 1, 46)]
        lefts = {(end - start, rate) for _, start, end, _, _, rate, kind in headers if kind & _SF_LEFT}
        for number, (name, start, end, _, _, rate, kind) in enumerate(headers):
            if kind & _SF_ROM or (kind & _SF_RIGHT and (end - start, rate) in lefts):
                continue
            width = 1 if kind & _SF_VORBIS else 2
            sample = _part(content, waves + width * start, width * (end - start), waves_end)
            ending = "ogg" if kind & _SF_VORBIS else "wav"
            data = io.BytesIO(sample if kind & _SF_VORBIS else _wav(sample, rate))
            yield f"{number:04d}-{_text(name)}.{ending}", data


def _tar_stream(stream: IO[bytes]) -> Entries:
    # A stream, not a seekable archive: the members are read once, in their order.
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for info in archive:
            if info.isfile():
                content = archive.extractfile(info)
                assert content is not None
                yield info.name.removeprefix("./"), content


def _rcc_data(content: bytes, at: int, flags: int) -> bytes:
    (length,) = struct.unpack_from(">I", content, at)
    data = _part(content, at + 4, length)
    if flags & _RCC_ZSTD:
        raise CorpusError("compressed by zstd in a Qt resource, which is not read here")
    return zlib.decompress(data[4:]) if flags & _RCC_ZLIB else data  # the first four bytes are the length


def _riff_chunks(content: mmap.mmap, at: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Chunks between two places, inside lists as well: name, (start, end)."""
    while at + 8 <= end:
        name, size = struct.unpack_from("<4sI", content, at)
        if at + 8 + size > end:
            raise CorpusError(f"a soundfont that is truncated in its chunk {name!r}")
        if name == b"LIST":
            yield from _riff_chunks(content, at + 12, at + 8 + size)
        else:
            yield name, (at + 8, at + 8 + size)
        at += 8 + size + size % 2


def _wav(sample: bytes, rate: int) -> bytes:
    if rate == 0:
        raise CorpusError("a soundfont's sample without a rate")
    file = io.BytesIO()
    soundfile.write(file, np.frombuffer(sample, "<i2"), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _part(content: bytes | mmap.mmap, start: int, length: int, end: int | None = None) -> bytes:
    if length < 0 or start + length > (len(content) if end is None else end):
        raise CorpusError("an entry that reaches beyond the end of its archive")
    return content[start : start + length]


def _text(name: bytes) -> str:
    return name.split(b"\0")[0].decode("latin-1").strip()


class _Lazy:
    """A stream that is opened when it is read: an entry that cannot be opened does not end its archive."""

    def __init__(self, open_it: Callable[[], Readable]):
        self._open_it = open_it
        self._stream: Readable | None = None

    def read(self, size: int = -1, /) -> bytes:
        self._stream = self._stream or self._open_it()
        return self._stream.read(size)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
