"""Pictures of a clip: its log-mel, the self-similarity of its timestamps, their principal components over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from m2d_embed.audio.clips import load_audio
from m2d_embed.errors import ConfigError
from m2d_embed.m2d import M2D

Array = npt.NDArray[np.float32]
_COMPONENTS = 3


def plot_clip(model: M2D, file: Path, output: Path) -> None:
    """Draw a clip as a PNG of three panels over one time axis.

    Args:
        model: gives the timestamp embeddings; its ``features.hop_ms`` sets how fine they are.
        file: a sound file of any rate; the picture takes memory with the square of its length.
        output: the PNG to write.

    Raises:
        AudioError: if the file cannot be read.
        ConfigError: if ``output`` does not end in ``.png``, or its folder does not exist.
    """
    if output.suffix.lower() != ".png":
        raise ConfigError(f"{output}: plots are PNG files; give a name that ends in .png.")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: the folder {output.parent} does not exist.")
    from matplotlib.figure import Figure

    audio = torch.from_numpy(load_audio(file, model.sample_rate)).unsqueeze(0).to(model.device)
    with torch.no_grad():
        log_mel = model.log_mel(audio)
        embeddings, times = model.timestamps(audio)
    vectors, seconds = embeddings[0].cpu().numpy(), (times[0] / 1000).cpu().numpy()
    edges = _edges(seconds)
    duration = audio.shape[1] / model.sample_rate

    figure = Figure(figsize=(9, 11), layout="constrained")
    mel_axes, similarity_axes, component_axes = figure.subplots(3, 1, height_ratios=[1, 2.4, 1], sharex=True)
    figure.suptitle(
        f"{file.name}  ·  {model.config.name or 'M2D'}  ·  {len(vectors)} embeddings of {vectors.shape[1]} d"
    )
    _draw_log_mel(mel_axes, log_mel[0, 0].cpu().numpy(), model, duration)
    _draw_similarity(similarity_axes, vectors, edges)
    _draw_components(component_axes, vectors, seconds)
    figure.savefig(output, dpi=120)


def self_similarity(vectors: Array) -> Array:
    """Cosine similarity of every pair of (T, D) embeddings, centred on their mean so that structure shows: (T, T)."""
    centred = vectors - vectors.mean(axis=0) if len(vectors) > 1 else vectors
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.maximum(lengths, np.finfo(np.float32).tiny)
    similarity: Array = unit @ unit.T
    return similarity


def principal_components(vectors: Array, count: int = _COMPONENTS) -> tuple[Array, Array]:
    """The first principal components of (T, D) embeddings.

    Returns:
        Scores (T, n) and the share of variance of each, (n,); n is ``count`` or what there are.
    """
    u, s, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    variance = s**2
    share = variance / max(variance.sum(), np.finfo(np.float32).tiny)
    return (u * s)[:, :count], share[:count]


def _draw_log_mel(axes: Any, log_mel: Array, model: M2D, duration: float) -> None:
    half_frame = model.config.frame_ms / 2000
    extent = (-half_frame, log_mel.shape[1] * model.config.frame_ms / 1000 - half_frame, 0, len(log_mel))
    image = axes.imshow(log_mel, origin="lower", aspect="auto", extent=extent, cmap="magma")
    axes.set(title="log-mel, normalised", ylabel="mel band", xlim=(0, duration))
    axes.figure.colorbar(image, ax=axes)


def _draw_similarity(axes: Any, vectors: Array, edges: Array) -> None:
    image = axes.pcolormesh(edges, edges, self_similarity(vectors), cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set(title="self-similarity of the timestamps (centred cosine)", ylabel="time (s)")
    axes.invert_yaxis()
    axes.figure.colorbar(image, ax=axes)


def _draw_components(axes: Any, vectors: Array, seconds: Array) -> None:
    scores, share = principal_components(vectors)
    for i in range(scores.shape[1]):
        axes.plot(
            seconds, scores[:, i], marker="." if len(seconds) < 100 else None, label=f"PC {i + 1} ({share[i]:.0%})"
        )
    axes.set(title="principal components over time", xlabel="time (s)", ylabel="score")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=_COMPONENTS, frameon=False)
    axes.grid(alpha=0.3)


def _edges(centres: Array) -> Array:
    """Borders of cells around evenly spaced centres."""
    step = centres[1] - centres[0] if len(centres) > 1 else 2 * max(float(centres[0]), 1e-3)
    return np.append(centres - step / 2, centres[-1] + step / 2).astype(np.float32)
