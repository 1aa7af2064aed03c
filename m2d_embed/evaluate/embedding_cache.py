"""Scene embeddings kept on disk, by what was embedded and with what: the second look at a data set costs no time.

A folder for each model and its settings, named by their fingerprint, is a ``PartStore`` whose keys are hashes of the
bytes of files. So a file that is renamed or copied is found again, and a file or model that changed is not. Several
processes may write at once, at worst the same thing twice. The folder may be deleted at any time.

It is ``embeddings`` in ``M2D_EMBED_CACHE`` (default ``~/.cache/m2d-embed``, or in ``XDG_CACHE_HOME``).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from m2d_embed.checkpoints import hub
from m2d_embed.errors import AudioError
from m2d_embed.evaluate.features import Vectors
from m2d_embed.jobs.arrays import ArrayReader
from m2d_embed.jobs.outputs import EMBEDDINGS
from m2d_embed.jobs.settings import fingerprint
from m2d_embed.jobs.store import Entry, PartStore
from m2d_embed.m2d import M2D
from m2d_embed.runtime.batching import encode_scenes

log = logging.getLogger("m2d_embed")

_CLIPS_A_PART = 256


def default_cache() -> Path:
    """The folder that keeps embeddings if no other is named."""
    return hub.release_cache().with_name("embeddings")


def hash_files(files: Sequence[Path], show_progress: bool = False) -> list[str]:
    """SHA-256 of the bytes of each file.

    Raises:
        AudioError: if files cannot be opened; it names all of them.
    """
    hashes, failed = [], []
    for file in tqdm(files, desc="reading", unit="file", disable=None if show_progress else True):
        try:
            with file.open("rb") as stream:
                hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            failed.append(f"{file}: cannot be opened ({error.strerror}).")
    refuse_failed(failed, len(files))
    return hashes


def embed_cached(
    model: M2D,
    files: Sequence[Path],
    hashes: Sequence[str],
    batch_size: int = 32,
    cache: Path | None = None,
    show_progress: bool = False,
) -> Vectors:
    """Scene embeddings of files, (n, D) float32, those of earlier runs from the cache.

    What is embedded is kept every few hundred clips, and when the run is interrupted.

    Args:
        model: in evaluation mode; its ``features`` say what an embedding is.
        files: what to embed.
        hashes: of each file, by ``hash_files``.
        batch_size: windows encoded at a time, at most.
        cache: the folder; by default ``default_cache()``.
        show_progress: show a bar on stderr.

    Raises:
        AudioError: if files cannot be embedded; it names all of them. The others are in the cache then.
    """
    kept = _Cache((cache or default_cache()) / fingerprint(model, "scene"))
    known = kept.read(dict.fromkeys(hashes))
    missing: dict[str, list[Path]] = {}
    for content, file in zip(hashes, files, strict=True):
        if content not in known:
            missing.setdefault(content, []).append(file)
    if missing:
        done, failed = _embed(model, missing, batch_size, kept, show_progress)
        refuse_failed(failed, len(files))
        known |= done
    return np.stack([known[content] for content in hashes])


def _embed(
    model: M2D, files: dict[str, list[Path]], batch_size: int, kept: _Cache, show_progress: bool
) -> tuple[dict[str, Vectors], list[str]]:
    """Embed the first file of each content; write to the cache as they come. Returns also what failed, and why."""
    contents = list(files)
    done: dict[str, Vectors] = {}
    pending: dict[str, Vectors] = {}
    failed: list[str] = []
    bar = tqdm(total=len(files), desc="embedding", unit="clip", disable=None if show_progress else True)
    with bar, torch.no_grad():
        try:
            clips = list(model.open_clips(copies[0] for copies in files.values()))
            for index, result in encode_scenes(model, clips, model.features, batch_size):
                bar.update()
                content = contents[index]
                first, *others = files[content]
                if isinstance(result, AudioError) or hash_files([first]) != [content]:
                    changed = f"{first}: changes while it is read; embed it when it is complete."
                    failed.append(str(result) if isinstance(result, AudioError) else changed)
                    failed += [f"{other}: a copy of {first}." for other in others]
                    continue
                done[content] = pending[content] = result.numpy()
                if len(pending) == _CLIPS_A_PART:
                    kept.write(pending)
                    pending = {}
        finally:
            kept.write(pending)
    return done, failed


class _Cache:
    """Embeddings of one model. What cannot be read or written is reported, but no reason to stop."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.store = PartStore(folder, folder)

    def read(self, contents: dict[str, None]) -> dict[str, Vectors]:
        """Content -> embedding of what is wanted and there."""
        try:
            self.store.refresh()
            self.store.check(contents)
            found = [content for content in contents if self.store.has(content)]
            if not found:
                return {}
            with closing(ArrayReader()) as reader:
                matrix = self.store.read(EMBEDDINGS, self.store.locate(found), reader)
        except OSError as error:
            log.warning("%s: cannot be read, so its clips are embedded again (%s).", self.folder, error)
            return {}
        return dict(zip(found, matrix, strict=True))

    def write(self, embeddings: dict[str, Vectors]) -> None:
        """Keep embeddings, if there are any."""
        if not embeddings:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            entries = [Entry(content, 1) for content in embeddings]
            self.store.add(entries, {EMBEDDINGS: [vector[None] for vector in embeddings.values()]})
        except OSError as error:
            log.warning("%s: embeddings cannot be kept there for another time (%s).", self.folder, error)


def refuse_failed(failed: Sequence[str], total: int) -> None:
    """Raise AudioError that lists all of ``failed``, unless it is empty."""
    if failed:
        raise AudioError("\n  ".join([f"{len(failed)} of {total} files cannot be embedded:", *failed]))
