"""``.npy`` files written in pieces, and read in rows with few of them open."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_MOST_OPEN = 8  # a job of a million clips has thousands of files, and a process may open a thousand


class ArrayReader:
    """``.npy`` files, a few of which are kept open. Memory maps would count as memory, and each as an open file."""

    def __init__(self) -> None:
        self._opened: OrderedDict[Path, _ArrayFile] = OrderedDict()

    def open(self, path: Path) -> _ArrayFile:
        """The file, opened now or before; the one that was not asked for longest is closed."""
        if path not in self._opened:
            if len(self._opened) >= _MOST_OPEN:
                self._opened.popitem(last=False)[1].close()
            self._opened[path] = _ArrayFile(path)
        self._opened.move_to_end(path)
        return self._opened[path]

    def close(self) -> None:
        """Close all files."""
        while self._opened:
            self._opened.popitem()[1].close()


class _ArrayFile:
    def __init__(self, path: Path):
        self.stream = path.open("rb", buffering=0)
        version = np.lib.format.read_magic(self.stream)
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        self.shape, _, self.dtype = read_header(self.stream)
        self.begin = self.stream.tell()
        self.row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def read_rows(self, rows: npt.NDArray[np.int64], into: Array, places: npt.NDArray[np.int64]) -> None:
        """Put ``rows`` into these places; those that are neighbours here and there are read together."""
        starts = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(places, prepend=-2) != 1))
        counts = np.diff(starts, append=len(rows))
        for place, row, count in zip(places[starts].tolist(), rows[starts].tolist(), counts.tolist(), strict=True):
            self.read_into(into[place : place + count], row)

    def read_into(self, rows: Array, first: int) -> None:
        """Fill ``rows``, contiguous, from the ``first`` row of the file on."""
        at = self.begin + first * self.row_bytes
        left = rows.data.cast("B") if rows.nbytes else memoryview(b"")
        while left:
            read = self._read(left, at)
            if not read:
                raise OSError(f"{self.stream.name}: shorter than recorded; give the same command again.")
            left, at = left[read:], at + read

    def _read(self, into: memoryview, at: int) -> int:
        if hasattr(os, "preadv"):  # a forked process shares the position of an open file
            return os.preadv(self.stream.fileno(), [into], at)
        self.stream.seek(at)
        return self.stream.readinto(into)

    def close(self) -> None:
        self.stream.close()


def write_array(stream: IO[bytes], pieces: Sequence[Array]) -> None:
    """An ``.npy`` of consecutive pieces. Unlike ``np.save``, says so in the usual way when the disk is full."""
    dtype, shape = pieces[0].dtype, (sum(map(len, pieces)), *pieces[0].shape[1:])
    write_array_header(stream, dtype, shape)
    for piece in pieces:
        stream.write(np.ascontiguousarray(piece, dtype=dtype).data)


def write_array_header(stream: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """The header of an ``.npy``."""
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_2_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
