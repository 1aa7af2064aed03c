"""Lists of sources, which come with this package or are a user's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from benchmarks.corpus.errors import CorpusError


def read_list(file: Path | None, built_in: str) -> tuple[str, str]:
    """What to call a list in messages, and its text.

    Args:
        file: the list; None is the one of this package.
        built_in: the name of that one.

    Raises:
        CorpusError: if the file cannot be read.
    """
    name = built_in if file is None else str(file)
    try:
        return name, (resources.files(__package__) / built_in if file is None else file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{name}: this list cannot be read ({error}).") from error
