"""An encoder for X-ARES, the benchmark of audio encoders on speech, sounds and music (Zhang et al., Interspeech 2025).

X-ARES takes the encoder by its module and puts its results below ``./env``::

    python -m xares.run --max-jobs 0 m2d_embed.adapters.xares tasks/esc50_task.py

That evaluates the bundled model, in one process; ``--max-jobs`` above 0 needs a GPU. The environment variable
``M2D_EMBED_MODEL`` names another model, as for ``load_model``; it is read when this module is imported. X-ARES files
results under the class name of the encoder and reuses what it finds there, so the name of the model becomes part of the
class name.

For other features, or a finer grid of frames, write a file of your own. X-ARES wants exactly one name in it that ends
with "Encoder", so import the module, not the class::

    from m2d_embed import FeatureConfig
    from m2d_embed.adapters import xares

    class FineM2DEncoder(xares.M2DEncoder):
        def __init__(self):
            super().__init__("m2d_vit_base-80x608p16x16-221006-mr7", features=FeatureConfig(hop_ms=40))

X-ARES itself is not needed to import this module.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from m2d_embed.audio.clips import check_batch
from m2d_embed.config import FeatureConfig
from m2d_embed.m2d import M2D

MODEL_VARIABLE = "M2D_EMBED_MODEL"
_MODEL = os.environ.get(MODEL_VARIABLE, "")
_LONGEST_NAME = 200  # characters; it becomes the name of a folder


class M2DEncoder(nn.Module):
    """Waveform in, frame features out, with the attributes that X-ARES reads.

    Attributes:
        model: the M2D model.
        sampling_rate: of the audio it takes, in Hz.
        output_dim: size of a frame feature.
        hop_size_in_ms: step between frames in milliseconds.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        features: FeatureConfig | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
    ):
        """Load the model.

        Args:
            model: which, as for ``load_model``; None is what ``M2D_EMBED_MODEL`` names, else the bundled one.
            features: which features it returns; ``hop_ms`` makes the frames finer.
            device: where to put it; X-ARES moves it to a GPU if there is one.
            dtype: of the matrices: "fp32", "bf16" or "fp16".

        Raises:
            ModelNotFoundError: if the name leads nowhere or access is refused.
            CheckpointError: if files are damaged, unsafe, or contradict their configuration.
            ConfigError: on an impossible option.
        """
        super().__init__()
        name = _MODEL if model is None else model
        self.model = M2D.from_pretrained(name, device=device, dtype=dtype, features=features)
        self.sampling_rate = self.model.sample_rate
        self.output_dim = self.model.timestamp_embedding_size
        self.hop_size_in_ms = self.model.features.hop_frames(self.model.config) * self.model.config.frame_ms

    def forward(self, audio: Tensor) -> Tensor:
        """Frame features; frame ``i`` stands for the time from ``i`` to ``i + 1`` hops.

        Args:
            audio: (B, samples) in [-1, 1] at ``sampling_rate``.

        Returns:
            (B, T, output_dim) float32 on the device of the model; T is the duration divided by the hop, to within 1,
            and at least 1. At the model's own hop the mean over T is the scene embedding.

        Raises:
            AudioError: if ``audio`` is not of rank 2, is empty, or holds NaN or infinity.
        """
        audio = check_batch(audio).to(self.model.device)
        if self.model.features.hop_frames(self.model.config) == self.model.config.patch_size[1]:
            return self.model.encode_frames(audio)
        frames, times = self.model.timestamps(audio)
        duration_ms = 1000 * audio.shape[-1] / self.sampling_rate
        return frames[:, self._nearest(times[0], duration_ms)]

    def _nearest(self, times: Tensor, duration_ms: float) -> Tensor:
        """For each hop of a clip the index of the frame whose centre, of ``times`` (T,) in ms, is nearest its middle.

        The first centre is half a patch after the start, many fine hops, while X-ARES counts frames from 0.
        """
        count = max(1, int(duration_ms / self.hop_size_in_ms + 0.5))
        middles = (torch.arange(count, device=times.device) + 0.5) * self.hop_size_in_ms
        return ((middles - times[0]) / self.hop_size_in_ms).round().long().clamp(0, len(times) - 1)


if _MODEL:
    # X-ARES would take the results of one model for those of another with the same class name.
    M2DEncoder.__name__ = re.sub(r"\W+", "_", _MODEL)[-_LONGEST_NAME:] + "_M2DEncoder"
