"""The files that a command line names: sound files, folders, patterns, tables and lists."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from m2d_embed.audio.find import find_audio
from m2d_embed.errors import ConfigError
from m2d_embed.labelled.clips import locate, read_table, require_cells, require_columns

_COLUMN = "file"  # of a table of clips


def find_inputs(inputs: Sequence[Path], listing: Path | None = None) -> list[Path]:
    """The files that are named on a command line: sound files, folders, patterns, CSV files, and those of a list.

    Raises:
        AudioError: as ``find_audio``.
        ConfigError: as ``find_listed``; or if nothing is named at all.
    """
    if not inputs and listing is None:
        raise ConfigError("Name sound files, folders, patterns or a CSV file, or give --list FILE.")
    found: dict[str, Path] = {}
    others: list[Path] = []
    lists = [listing] if listing is not None else []
    for path in inputs:
        if str(path) == "-":
            raise ConfigError("To read names from standard input, give --list -.")
        # A file that cannot be looked at is left to find_audio, which says so.
        (lists if is_table(path) and os.path.isfile(path) else others).append(path)  # noqa: PTH113
    for file in [*(find_audio(others) if others else []), *(file for one in lists for file in find_listed(one))]:
        found.setdefault(os.path.abspath(file), file)  # noqa: PTH100  (Path.absolute keeps "..")
    return list(found.values())


def find_listed(listing: Path) -> list[Path]:
    """The files that a list names; whether they can be read is found out when they are.

    Args:
        listing: a CSV file with a column ``file``, relative to the CSV or to a folder ``audio`` beside it; or a text
            file with one path a line (or separated by zero bytes, as ``find -print0`` does), relative to the current
            folder, or else to that of the list. ``-`` is such a text on standard input.

    Raises:
        ConfigError: if it cannot be read, is not a CSV file with that column, or names nothing.
    """
    if is_table(listing):
        columns, rows = read_table(listing)
        require_columns(columns, (_COLUMN,), listing)
        for line, row in rows:
            require_cells(row, (_COLUMN,), listing, line)
        files = [locate(listing.parent, row[_COLUMN]) for _, row in rows]
    else:
        files = [_beside(listing.parent, name) for name in _lines(listing)]
    if not files:
        raise ConfigError(f"{listing}: the list names no files.")
    return files


def is_table(path: Path) -> bool:
    """Whether a path is taken for a CSV file of clips, by its ending."""
    return path.suffix.lower() == ".csv"


def _lines(listing: Path) -> list[str]:
    try:
        content = sys.stdin.buffer.read() if str(listing) == "-" else listing.read_bytes()
    except OSError as error:
        raise ConfigError(f"{listing}: this list cannot be read ({error.strerror}).") from error
    text = os.fsdecode(content.removeprefix(codecs.BOM_UTF8))
    lines = text.split("\0") if "\0" in text else (line.removesuffix("\r") for line in text.split("\n"))
    return [line for line in lines if line.strip()]


def _beside(folder: Path, name: str) -> Path:
    """A file as a list in ``folder`` names it: seen from the current folder, or if it is only there from the list."""
    file, beside = Path(name), folder / name
    return beside if os.path.isfile(beside) and not os.path.isfile(file) else file  # noqa: PTH113
