"""Bytes of a file at any place, and a file put together of stretches of another one and of bytes of our own.

So a header that does not say what the file holds is mended without a copy of the file: libsndfile reads a new header
and the old content.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

#: A stretch of a file, from a place up to another, or bytes of our own.
Piece = tuple[int, int] | bytes


class Content:
    """Random access to the bytes of a file, or to bytes in memory."""

    def __init__(self, source: Path | bytes):
        self._stream: BinaryIO = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
        self.size = self._stream.seek(0, io.SEEK_END)

    @property
    def stamp(self) -> tuple[int, int, int] | None:
        """Inode, size and time of change of a file, None of what is in memory: another stamp means other bytes."""
        if isinstance(self._stream, io.BytesIO):
            return None
        status = os.fstat(self._stream.fileno())
        return status.st_ino, status.st_size, status.st_mtime_ns

    def at(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` on; fewer at the end, none where there is no such place."""
        if not 0 <= offset < self.size:
            return b""
        self._stream.seek(offset)
        return self._stream.read(count)

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Content:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stitched(io.RawIOBase):
    """Pieces, one after the other, as a file to read; it owns the content that stretches are of."""

    def __init__(self, content: Content, pieces: Sequence[Piece]):
        self._content = content
        self._pieces = pieces
        lengths = [len(p) if isinstance(p, bytes) else p[1] - p[0] for p in pieces]
        self._starts = [0, *accumulate(lengths)]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._position < self._starts[-1]:
            found = self._next(len(view) - done)
            if not found:  # the file has become shorter
                break
            view[done : done + len(found)] = found
            done += len(found)
            self._position += len(found)
        return done

    def close(self) -> None:
        self._content.close()
        super().close()

    def _next(self, count: int) -> bytes:
        """Up to ``count`` bytes of the piece at the position."""
        index = bisect_right(self._starts, self._position) - 1
        piece, offset = self._pieces[index], self._position - self._starts[index]
        if isinstance(piece, bytes):
            return piece[offset : offset + count]
        return self._content.at(piece[0] + offset, min(count, piece[1] - piece[0] - offset))
