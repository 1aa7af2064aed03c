"""A HEAR module without any learning: mean and standard deviation over time of the log-mel spectrogram.

The least that an embedding has to beat: ``python -m benchmarks.hear run --module benchmarks.hear.logmel_stats ...``
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2d_embed.audio.clips import check_batch
from m2d_embed.config import ModelConfig
from m2d_embed.errors import ConfigError
from m2d_embed.model.frontend import LogMel

_BESIDE = 8  # frames of a window on each side of its centre: 170 ms in all
_HOP_FRAMES = 5  # 50 ms, HEAR's coarsest


class LogMelStats(nn.Module):
    """Log-mels of the published models' front end, not normalised, at 16 kHz and 10 ms a frame."""

    def __init__(self) -> None:
        super().__init__()
        config = ModelConfig()
        self.frontend = LogMel.unnormalized(config)
        self.frame_ms = config.frame_ms
        self.sample_rate = config.sample_rate
        self.scene_embedding_size = self.timestamp_embedding_size = 2 * config.input_size[0]

    def forward(self, audio: Tensor) -> Tensor:
        """(sounds, samples) -> (sounds, mels, frames)."""
        log_mel: Tensor = self.frontend(audio)
        return log_mel[:, 0]


def load_model(model_file_path: str = "") -> LogMelStats:
    """The statistics; there are no weights to load.

    Raises:
        ConfigError: if a file is given.
    """
    if model_file_path:
        raise ConfigError(f"{model_file_path}: log-mel statistics have no weights to load.")
    return LogMelStats()


@torch.no_grad()
def get_scene_embeddings(audio: Tensor, model: LogMelStats) -> Tensor:
    """(sounds, samples) in [-1, 1] -> (sounds, 160) float32."""
    return _statistics(model(check_batch(audio)))


@torch.no_grad()
def get_timestamp_embeddings(audio: Tensor, model: LogMelStats) -> tuple[Tensor, Tensor]:
    """Embed windows of 170 ms, every 50 ms; beyond its ends a sound is taken to go on as its first or last frame.

    Args:
        audio: (sounds, samples) in [-1, 1].
        model: from ``load_model``.

    Returns:
        Embeddings (sounds, T, 160), and the centre of each window in ms, (sounds, T), both float32.
    """
    log_mel = F.pad(model(check_batch(audio)), (_BESIDE, _BESIDE), mode="replicate")
    windows = log_mel.unfold(-1, 2 * _BESIDE + 1, _HOP_FRAMES)  # (sounds, mels, T, frames)
    embeddings = _statistics(windows).transpose(1, 2)
    timestamps = _HOP_FRAMES * model.frame_ms * torch.arange(embeddings.shape[1], device=audio.device)
    return embeddings, timestamps.float().expand(len(audio), -1)


def _statistics(log_mel: Tensor) -> Tensor:
    """Mean and standard deviation over the last dimension, side by side."""
    deviation, mean = torch.std_mean(log_mel, dim=-1, correction=0)
    return torch.cat([mean, deviation], dim=1)
