"""Files that are there wholly or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Pattern of the names that ``atomic_write`` gives to files that are being written.
TEMPORARY = ".*.partial"


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
    partial = (within or path.parent) / f".{path.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # libraries that make a file of their own give it only to its owner
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """``text`` in UTF-8, by ``atomic_write``."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: Any) -> None:
    """``content`` as JSON, by ``atomic_write``."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


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
