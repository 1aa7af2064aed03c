"""A map of sounds: one HTML page on which clips of similar embeddings lie near each other, and a click plays one.

The page needs nothing besides itself: no network, no server. The clips are in it as Ogg Opus, each in an element of
its own, which a browser leaves alone until the clip is played.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import soundfile

from m2d_embed.audio.clips import Clip, open_clip
from m2d_embed.errors import ConfigError
from m2d_embed.extras import require
from m2d_embed.files import atomic_write

Array = npt.NDArray[np.float32]

_TEMPLATE = "sound_map.html"
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_SUFFIXES = (".html", ".htm")
_MIN_UMAP = 5  # clips; with fewer, its spectral start has no solution
_NEIGHBOURS = 15
_SEED = 0
_MAX_SECONDS = 10.0  # of a clip that can be heard
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)  # Hz, that libsndfile encodes
_OPUS_COMPRESSION = 0.96  # from 256 kbit/s at 0 to 6 at 1: some 16
_ENCODED_AT_A_TIME = 64  # clips, held in memory


def write_map(
    embeddings: Array, files: Sequence[Path], labels: Sequence[str], output: Path, title: str, sample_rate: int
) -> None:
    """Write a page with a map of clips, coloured by label, to be searched and listened to.

    It appears under its name once it is complete. Colours and markers repeat after 180 labels.

    Args:
        embeddings: (n, D), one row a clip.
        files: (n,) the clips; the page names them as from the folder that they have in common.
        labels: (n,) the label of each; several of a clip in one string, e.g. ``"dog; rain"``.
        output: the HTML file to write.
        title: over the map.
        sample_rate: at which the clips are kept, in Hz; the next higher one that Opus has, up to 48 kHz. Of longer
            clips the first 10 s are kept, and the page says so.

    Raises:
        AudioError: if a clip cannot be read.
        ConfigError: if there are no clips, the arguments are of different lengths, embeddings are not finite,
            ``output`` does not end in ``.html``, or its folder does not exist.
        UnsupportedError: if umap-learn is not installed.
    """
    _check(embeddings, files, labels, output, sample_rate)
    clips = [open_clip(file, None, sample_rate, "") for file in files]
    points, method = place(embeddings)
    names = sorted(set(labels))
    index = {name: i for i, name in enumerate(names)}
    data = {
        "notes": _notes(clips, names, method),
        "labels": names,
        "label": [index[label] for label in labels],
        "file": _short_names(files),
        "seconds": [round(clip.seconds, 2) for clip in clips],
        "heard": _MAX_SECONDS,
        "x": [round(float(x), 4) for x in points[:, 0]],
        "y": [round(float(y), 4) for y in points[:, 1]],
    }
    with atomic_write(output) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace") as page:
        _fill(page, title, data, _encoded(clips, _opus_rate(sample_rate)))


def place(embeddings: Array) -> tuple[Array, str]:
    """Places of (n, D) embeddings on a plane, the same in every run, and how they were found.

    Each dimension is standardised first. UMAP (McInnes et al., arXiv 1802.03426) then keeps neighbours by cosine
    distance together; fewer than five clips are placed by their principal components.

    Returns:
        (n, 2) float32, and a sentence for people.

    Raises:
        UnsupportedError: if umap-learn is not installed.
    """
    require("umap", "a map of sounds")
    spread = embeddings.std(axis=0)
    standardised = (embeddings - embeddings.mean(axis=0)) / np.where(spread > 0, spread, 1)
    points = np.zeros((len(embeddings), 2), dtype=np.float32)
    if len(embeddings) < _MIN_UMAP:
        from sklearn.decomposition import PCA

        components = min(2, len(embeddings) - 1, embeddings.shape[1])
        if components:
            points[:, :components] = PCA(components, random_state=_SEED).fit_transform(standardised)
        return points, "Placed by principal components (PCA): too few clips for UMAP."
    from umap import UMAP

    neighbours = min(_NEIGHBOURS, len(embeddings) - 1)
    reducer = UMAP(n_neighbors=neighbours, metric="cosine", random_state=_SEED, n_jobs=1)
    points[:] = reducer.fit_transform(standardised)
    return points, f"Placed by UMAP: cosine distance of standardised embeddings, {neighbours} neighbours."


# --- the page ---------------------------------------------------------------------------------------------------------


def _check(embeddings: Array, files: Sequence[Path], labels: Sequence[str], output: Path, sample_rate: int) -> None:
    if embeddings.ndim != 2 or not embeddings.size:
        raise ConfigError(f"a map needs embeddings of shape (clips, D), not empty, but got {embeddings.shape}.")
    if not len(embeddings) == len(files) == len(labels):
        raise ConfigError(
            f"a map needs a file and a label for each of {len(embeddings)} embeddings, "
            f"but got {len(files)} files and {len(labels)} labels."
        )
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise ConfigError(f"{files[bad[0]]}: its embedding is not finite, so it has no place on a map.")
    if output.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{output}: maps are HTML files; give a name that ends in .html.")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: the folder {output.parent} does not exist.")
    if sample_rate <= 0:
        raise ConfigError(f"sample_rate={sample_rate} is not a rate in Hz.")


def _fill(page: IO[str], title: str, data: dict[str, Any], sounds: Iterator[str]) -> None:
    """Write the template with its placeholders filled; the sounds as they come."""
    template = importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    fixed = {
        "title": html.escape(title),
        # Inside a script element only "<" could begin an end tag or a comment.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    for position, piece in enumerate(_PLACEHOLDER.split(template)):
        if position % 2 == 0:
            page.write(piece)
        elif piece == "sounds":
            page.writelines(f'<script type="text/plain" id="sound-{i}">{s}</script>\n' for i, s in enumerate(sounds))
        else:
            page.write(fixed[piece])


def _notes(clips: Sequence[Clip], names: Sequence[str], method: str) -> list[str]:
    count = f"{len(clips)} clip{'s' if len(clips) != 1 else ''}, {len(names)} label{'s' if len(names) != 1 else ''}."
    cut = sum(clip.seconds > _MAX_SECONDS for clip in clips)
    heard = [f"Of clips over {_MAX_SECONDS:g} s ({cut} of {len(clips)}) the first {_MAX_SECONDS:g} s are heard."]
    return [count, method, *(heard if cut else [])]


def _short_names(files: Sequence[Path]) -> list[str]:
    """Each file as from the folder that all have in common, which is not told: it says things about its owner."""
    whole = [os.path.abspath(file) for file in files]  # noqa: PTH100  (Path.absolute keeps "..")
    try:
        common = os.path.commonpath([str(Path(path).parent) for path in whole])
    except ValueError:  # they lie on several drives
        return [file.name for file in files]
    return [Path(path).relative_to(common).as_posix() for path in whole]


# --- sounds -----------------------------------------------------------------------------------------------------------


def _opus_rate(sample_rate: int) -> int:
    return next((rate for rate in _OPUS_RATES if rate >= sample_rate), _OPUS_RATES[-1])


def _encoded(clips: Sequence[Clip], rate: int) -> Iterator[str]:
    """Yield each clip as Ogg Opus in base64; some are encoded at a time, which is most of the work of a page."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(clips), _ENCODED_AT_A_TIME):
            yield from pool.map(lambda clip: _encode(clip, rate), clips[start : start + _ENCODED_AT_A_TIME])


def _encode(clip: Clip, rate: int) -> str:
    stream = io.BytesIO()
    remaining = round(_MAX_SECONDS * rate)
    with soundfile.SoundFile(
        stream, "w", rate, channels=1, format="OGG", subtype="OPUS", compression_level=_OPUS_COMPRESSION
    ) as file:
        for block in clip.blocks(rate):
            file.write(block[:remaining])
            remaining -= len(block)
            if remaining <= 0:
                break
    return base64.b64encode(stream.getvalue()).decode("ascii")
