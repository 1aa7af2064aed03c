"""Files that are there wholly or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Pattern of the names that ``atomic_write`` gives to files that are being written.
TEMPORARY = ".*.partial"
_MANY = 32
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@contextmanager
def atomic_write(path: Path, within: Path | None = None) -> Iterator[Path]:
    """Write a file that appears under its name only when the block has ended well, in place of one that was there.

    The block is given the path of a new, empty file, whose name nobody else has, so that two writers at once do not
    disturb each other: the last to finish wins. It is on the disk before it gets its name, and the name is on the disk
    when the block is left, so that a power cut leaves the old file or the new one.

    Args:
        path: of the file.
        within: the folder, on the same file system, where it is written; by default the file's own. A process that is
            killed leaves it there, as ``TEMPORARY``.

    Raises:
        OSError: if the disk is full or not writable. Nothing is left behind then.
    """
    with atomic_writes(within or path.parent) as new_file:
        yield new_file(path)


@contextmanager
def atomic_writes(within: Path) -> Iterator[Callable[[Path], Path]]:
    """Write many files, each as ``atomic_write`` does; the disk is waited for once.

    The block is given a function: the path of a file -> the path of a new, empty one in the folder ``within``. All get
    their names when the block has ended well; a process that is killed meanwhile leaves names for some.
    """
    paths: dict[Path, Path] = {}  # where they are written -> what they become
    modes: dict[Path, int] = {}

    def new_file(path: Path) -> Path:
        partial = within / f".{uuid.uuid4().hex}.partial"  # of any length that a name may have
        partial.touch(exist_ok=False)
        paths[partial], modes[partial] = path, partial.stat().st_mode
        return partial

    try:
        yield new_file
        for partial, mode in modes.items():
            partial.chmod(mode)  # libraries that make a file of their own give it only to its owner
        _sync_all([*paths])
        for partial, path in paths.items():
            partial.replace(path)
        for folder in {path.parent for path in paths.values()}:
            sync(folder)
    finally:
        for partial in paths:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """``text`` in UTF-8, by ``atomic_write``."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: Any) -> None:
    """``content`` as JSON, by ``atomic_write``."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # names of files need not be UTF-8
        text = json.dumps(content, indent=1) + "\n"
    write_text(path, text)


def cache_folder() -> Path:
    """Where this package keeps what it can make again: ``M2D_EMBED_CACHE``, or a folder in ``XDG_CACHE_HOME``.

    Raises:
        RuntimeError: if neither is set and this user has no home.
    """
    if "M2D_EMBED_CACHE" in os.environ:
        return Path(os.environ["M2D_EMBED_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "m2d-embed"


def _sync_all(files: Sequence[Path]) -> None:
    """Wait until files of one file system are on the disk."""
    if len(files) < _MANY or _LIBC is None:
        for file in files:
            sync(file)
        return
    # The whole file system at once: a hundredth of the processor time of as many files one by one.
    descriptor = os.open(files[0], os.O_RDONLY)
    try:
        if _LIBC.syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(files[0].parent))
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():  # not all file systems sync them
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
