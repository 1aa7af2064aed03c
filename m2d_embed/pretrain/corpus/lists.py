"""Lists of sources that come with this package or are a user's own: text, a source a line, ``#`` begins a comment."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from m2d_embed.pretrain.corpus.errors import CorpusError


def read_lines(file: Path | None, built_in: str) -> tuple[str, list[tuple[int, str]]]:
    """What to call a list, and its lines that say something, with their numbers from 1.

    Args:
        file: the list; None is the one of this package.
        built_in: the name of that one.

    Raises:
        CorpusError: if the file cannot be read.
    """
    name = built_in if file is None else str(file)
    try:
        text = (resources.files(__package__) / built_in if file is None else file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{name}: this list cannot be read ({error}).") from error
    lines = enumerate(text.splitlines(), start=1)
    return name, [(number, line) for number, line in lines if line.strip() and not line.startswith("#")]
