"""The HEAR 2021 API (https://hearbenchmark.com/hear-api.html): three functions over one model."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor

from m2d_embed.audio.clips import check_batch
from m2d_embed.config import FeatureConfig, LayerPooling, ScenePooling
from m2d_embed.errors import ConfigError

if TYPE_CHECKING:
    from m2d_embed.m2d import M2D


def load_model(
    model_file_path: str | os.PathLike[str] | None = "",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    hop_ms: float | None = None,
    layers: int | Sequence[int] | None = None,
    layer_pooling: LayerPooling | None = None,
    flat: bool | None = None,
    scene_pooling: ScenePooling | None = None,
    threads: int | None = None,
    compile: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> M2D:
    """Load a model for HEAR.

    Args:
        model_file_path: "" or None for the bundled model; a folder, a published ``.pth`` or ``.zip``; ``org/name`` or
            ``org/name@revision`` on the Hugging Face Hub; or the name of an official M2D release.
        device: where to put it; None is a CUDA GPU if there is one, else the CPU. Others, e.g. "mps", are taken when
            they are named.
        dtype: of the matrices: "fp32", "bf16", "fp16", or on a CPU "int8"; None is float32. Embeddings are float32
            whatever it is.
        hop_ms: step between timestamp embeddings in ms; None is the model's own, mostly one patch. A finer one, e.g.
            40 for a model of 160 ms, costs as many times the work.
        layers: the transformer block to read, or several; 0 is the first, -1 the last. None is the model's own choice:
            the last, or of the bundled model the last four.
        layer_pooling: how several layers are combined, "mean" or "concat". None is the model's own choice, mostly
            "mean".
        flat: average the patches of a time column (``d`` values) instead of stacking them (``F * d``). None is the
            model's own choice, mostly False.
        scene_pooling: how a scene embedding is made of those of its time columns: "mean" over time, or "mean_std",
            followed by the standard deviation, twice as many values. None is the model's own choice.
        threads: how many threads compute on the CPU, for the whole process, as with ``torch.set_num_threads``. None
            leaves what ``OMP_NUM_THREADS`` or an earlier ``torch.set_num_threads`` chose; else it is torch's own
            number, mostly one a core, but no more than the cores that this process may use by its affinity and its
            container's CPU quota.
        compile: run the encoder through ``torch.compile``; for GPUs. The first clips of a new length take long.
        revision, token, cache_dir: as in huggingface_hub, for a Hub repository.
        force_download, local_files_only: as in huggingface_hub, for a Hub repository or an official release.

    Returns:
        An ``nn.Module`` in evaluation mode with the integers ``sample_rate``, ``scene_embedding_size`` and
        ``timestamp_embedding_size``.

    Raises:
        ModelNotFoundError: if the name leads nowhere or access is refused.
        CheckpointError: if files are damaged, unsafe, or contradict their configuration.
        ConfigError: on an impossible option.
        UnsupportedError: if this machine cannot multiply in the dtype.
    """
    from m2d_embed.m2d import M2D  # here, as it costs a fifth of a second that `import m2d_embed` need not take

    features = FeatureConfig(
        layers=None if layers is None else _as_layers(layers),
        layer_pooling=layer_pooling,
        flat=flat,
        hop_ms=hop_ms,
        scene_pooling=scene_pooling,
    )
    return M2D.from_pretrained(
        model_file_path,
        device=device,
        dtype=dtype,
        features=features,
        threads=threads,
        compile=compile,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )


def _as_layers(layers: int | Sequence[int]) -> tuple[int, ...]:
    """One block or several, as plain integers; numpy's count as such, floats and booleans do not."""
    several = layers if isinstance(layers, Iterable) else [layers]
    if any(isinstance(layer, bool) or not isinstance(layer, SupportsIndex) for layer in several):
        raise ConfigError(f"layers is a whole number or several, not {layers!r}.")
    return tuple(operator.index(layer) for layer in several)


@torch.no_grad()
def get_scene_embeddings(audio: Tensor, model: M2D) -> Tensor:
    """Embed whole sounds.

    Args:
        audio: (sounds, samples) in [-1, 1] at ``model.sample_rate``, on any device; there may be no sounds at all.
        model: from ``load_model``.

    Returns:
        (sounds, scene_embedding_size) float32 on the device of ``audio``.

    Raises:
        AudioError: if ``audio`` is not of rank 2, has sounds without samples, or holds NaN or infinity.
    """
    sounds = check_batch(_at_least_one(audio)).to(model.device)
    return model.scene(sounds)[: len(audio)].to(audio.device)


@torch.no_grad()
def get_timestamp_embeddings(audio: Tensor, model: M2D) -> tuple[Tensor, Tensor]:
    """Embed sounds over time.

    Args:
        audio: (sounds, samples) in [-1, 1] at ``model.sample_rate``, on any device; there may be no sounds at all.
        model: from ``load_model``.

    Returns:
        Embeddings (sounds, T, timestamp_embedding_size) and the centre of each in milliseconds, (sounds, T), both
        float32 on the device of ``audio``. Centres are evenly spaced and never lie after the end of the sounds.

    Raises:
        AudioError: if ``audio`` is not of rank 2, has sounds without samples, or holds NaN or infinity.
    """
    sounds = check_batch(_at_least_one(audio)).to(model.device)
    embeddings, timestamps = model.timestamps(sounds)
    return embeddings[: len(audio)].to(audio.device), timestamps[: len(audio)].to(audio.device)


def _at_least_one(audio: Tensor) -> Tensor:
    """A silent sound in place of a batch of none, whose embeddings have the right number of columns."""
    is_empty = isinstance(audio, Tensor) and audio.ndim == 2 and len(audio) == 0
    return audio.new_zeros(1, max(1, audio.shape[1])) if is_empty else audio
