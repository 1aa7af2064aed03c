"""Finding sound files: in folders, by patterns, and in lists of them."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from m2d_embed.audio.formats import AUDIO_SUFFIXES, AV_SUFFIXES, audio_suffixes
from m2d_embed.errors import AudioError

log = logging.getLogger("m2d_embed")

#: Folders that systems keep for themselves on a disk or in an archive; their files are not sounds, or deleted ones.
_NOT_SEARCHED = ("__MACOSX", "$RECYCLE.BIN")


def find_audio(paths: list[Path]) -> list[Path]:
    """Expand folders (recursively, by ending) and glob patterns into a sorted list of files; no file twice.

    Hidden files and folders are passed over, unless named. Sounds that would need PyAV, the extra ``av``, are counted
    in a warning where it is not installed.

    Raises:
        AudioError: if a path does not exist, a folder cannot be read, or nothing is found in one.
    """
    found: dict[str, Path] = {}
    left_out: Counter[str] = Counter()
    for path in paths:
        mode = _mode(path)
        if mode is None:
            files = _matching(path)
        elif stat.S_ISDIR(mode):
            files = sorted(_audio_below(path, left_out))
            if not files:
                raise AudioError(f"{path}: no audio files in this folder ({_endings()}).{_left_out(left_out)}")
        else:
            files = [path]
        for file in files:
            found.setdefault(os.path.abspath(file), file)  # noqa: PTH100  (Path.absolute keeps "..")
    if left_out:
        log.warning("%s", _left_out(left_out).strip())
    return list(found.values())


def _mode(path: Path) -> int | None:
    """What ``stat`` says that a path is; None if there is none."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise AudioError(f"{path}: cannot be looked at ({error.strerror}).") from error


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not meant to be seen: ``._a.wav`` of macOS, ``.Trashes``, ``__MACOSX``."""
    return name.startswith(".") or name in _NOT_SEARCHED


def hint_at_backslashes(name: str) -> str:
    """For a missing file: what to do if its name was written on Windows; else ""."""
    return " Its name has backslashes; here folders are separated by /." if "\\" in name and os.sep == "/" else ""


def _audio_below(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The sounds below a folder; those that nothing here can read are counted in ``left_out``, by their ending."""

    def refuse(error: OSError) -> None:
        raise AudioError(f"{error.filename}: cannot read this folder ({error.strerror}).") from error

    endings, seen = audio_suffixes(), set()
    for directory, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(directory))
        # A link may lead to a folder above it.
        subfolders[:] = [s for s in subfolders if not is_hidden(s) and os.path.realpath(Path(directory, s)) not in seen]
        for name in names:
            ending = Path(name).suffix.lower()
            if is_hidden(name):
                continue
            if ending in endings:
                yield Path(directory) / name
            elif ending in AV_SUFFIXES:
                left_out[ending] += 1


def _matching(pattern: Path) -> list[Path]:
    # An absolute pattern is split at its root, as Path.glob only takes relative ones.
    root = Path(pattern.anchor)
    try:
        files = sorted(f for f in root.glob(str(pattern.relative_to(root))) if os.path.isfile(f))  # noqa: PTH113
    except ValueError as error:
        raise AudioError(f"{pattern}: no such file, and not a glob pattern ({error}).") from error
    named = any(part.startswith(".") for part in pattern.parts if "*" in part or "?" in part or "[" in part)
    files = [f for f in files if named or not any(is_hidden(part) for part in f.parts if part not in pattern.parts)]
    if not files:
        raise AudioError(f"{pattern}: no such file or folder.{hint_at_backslashes(str(pattern))}")
    return files


def _endings() -> str:
    return ", ".join(sorted(AUDIO_SUFFIXES))


def _left_out(counts: Counter[str]) -> str:
    if not counts:
        return ""
    each = ", ".join(f"{ending} {count}" for ending, count in sorted(counts.items()))
    one = counts.total() == 1
    return (
        f" {counts.total()} file{'' if one else 's'} with other endings left out ({each}); "
        f"pip install 'm2d-embed[av]' reads {'it' if one else 'them'}."
    )
