"""Scene embeddings kept on disk, by what was embedded and with what: the second look at a data set costs no time.

A folder for each model and its settings, named by their hash, holds shards of a few hundred embeddings (safetensors),
with the hash of the bytes of each file. So a file that is renamed or copied is found again, and a file or model that
changed is not. A shard is there wholly or not at all; several processes may write at once, at worst the same thing
twice. The folder may be deleted at any time.

It is ``embeddings`` in ``M2D_EMBED_CACHE`` (default ``~/.cache/m2d-embed``, or in ``XDG_CACHE_HOME``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from m2d_embed import __version__, hub
from m2d_embed.batching import encode_scenes
from m2d_embed.errors import AudioError
from m2d_embed.evaluate.features import Vectors
from m2d_embed.model import M2D

log = logging.getLogger("m2d_embed")

_FORMAT = "1"
_CLIPS_A_SHARD = 256
_TENSOR = "embeddings"


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


def model_key(model: M2D) -> str:
    """A hash of all that a scene embedding depends on besides the file: configuration, weights, features, dtype."""
    features = replace(model.features, hop_ms=None)  # of timestamps only
    digest = hashlib.sha256()
    for text in (_FORMAT, __version__, model.config.to_json(), json.dumps(asdict(features)), str(model.dtype)):
        digest.update(text.encode() + b"\0")
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    folder = (cache or default_cache()) / model_key(model)
    known = _read_shards(folder, set(hashes), model.scene_embedding_size)
    missing: dict[str, list[Path]] = {}
    for content, file in zip(hashes, files, strict=True):
        if content not in known:
            missing.setdefault(content, []).append(file)
    if missing:
        done, failed = _embed(model, missing, batch_size, folder, show_progress)
        refuse_failed(failed, len(files))
        known |= done
    return np.stack([known[content] for content in hashes])


def _embed(
    model: M2D, files: dict[str, list[Path]], batch_size: int, folder: Path, show_progress: bool
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
                if isinstance(result, AudioError):
                    first, *others = files[content]
                    failed += [str(result), *(f"{other}: a copy of {first}." for other in others)]
                    continue
                done[content] = pending[content] = result.numpy()
                if len(pending) == _CLIPS_A_SHARD:
                    _write_shard(folder, pending)
                    pending = {}
        finally:
            _write_shard(folder, pending)
    return done, failed


def refuse_failed(failed: Sequence[str], total: int) -> None:
    """Raise AudioError that lists all of ``failed``, unless it is empty."""
    if failed:
        raise AudioError("\n  ".join([f"{len(failed)} of {total} files cannot be embedded:", *failed]))


# --- shards -----------------------------------------------------------------------------------------------------------


def _write_shard(folder: Path, embeddings: dict[str, Vectors]) -> None:
    """Write a shard, if there is anything. A cache that cannot be written is reported, but no reason to stop."""
    if not embeddings:
        return
    name = uuid.uuid4().hex
    partial = folder / f".{name}.partial"
    matrix = np.stack(list(embeddings.values())).astype(np.float32)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({_TENSOR: matrix}, partial, {"contents": json.dumps([*embeddings]), "sha256": _digest(matrix)})
        partial.replace(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        log.warning("%s: embeddings cannot be kept there for another time (%s).", folder, error)
    finally:
        _remove(partial)


def _read_shards(folder: Path, wanted: set[str], dim: int) -> dict[str, Vectors]:
    """Content -> embedding of what is wanted and there. A damaged shard is reported and removed."""
    found: dict[str, Vectors] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            contents, matrix = _read_shard(file, wanted - found.keys(), dim)
        except OSError as error:
            log.warning("%s: cannot be read, so its clips are embedded again (%s).", file, error)
            continue
        except (SafetensorError, ValueError, KeyError) as error:
            log.warning("%s: damaged, so its clips are embedded again (%s).", file, error)
            _remove(file)
            continue
        found |= {content: row for content, row in zip(contents, matrix, strict=True) if content in wanted}
    return found


def _read_shard(file: Path, wanted: Iterable[str], dim: int) -> tuple[list[str], Vectors]:
    """The contents of a shard and their embeddings; nothing if none of them is wanted."""
    with safe_open(file, "numpy") as shard:
        metadata = shard.metadata() or {}
        contents = [str(content) for content in json.loads(metadata["contents"])]
        if not set(contents) & set(wanted):
            return [], np.empty((0, dim), np.float32)
        matrix: Vectors = shard.get_tensor(_TENSOR)
    if matrix.shape != (len(contents), dim) or matrix.dtype != np.float32:
        raise ValueError(f"its embeddings have shape {matrix.shape} and type {matrix.dtype}")
    if metadata["sha256"] != _digest(matrix):
        raise ValueError("its embeddings are not those that were written")
    return contents, matrix


def _digest(matrix: Vectors) -> str:
    return hashlib.sha256(matrix.tobytes()).hexdigest()


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: cannot be removed (%s).", file, error)
