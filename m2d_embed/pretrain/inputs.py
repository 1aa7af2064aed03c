"""A batch of crops -> what an objective sees: log-mel on the training device, noise mixed in, offline targets.

Background noise is mixed in the linear mel domain (M2D-X, arXiv 2404.06095, section 3): M2D sees the mixture, the
teacher the clean crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2d_embed.config import ClapConfig, ModelConfig
from m2d_embed.errors import ConfigError
from m2d_embed.m2d import M2D
from m2d_embed.model.frontend import LogMel
from m2d_embed.model.heads.clap import TextEncoder
from m2d_embed.pretrain.batches import Batch
from m2d_embed.pretrain.objectives import Example

#: Captions whose embeddings are remembered; more are computed again.
_MAX_KNOWN = 100_000


class OfflineTarget(Protocol):
    """Makes ``Example.offline`` of a batch; ``log_mel`` is its clean one, not normalised."""

    def __call__(self, batch: Batch, log_mel: Tensor) -> Tensor: ...


class Inputs(nn.Module):
    """Batches on the training device -> examples."""

    def __init__(self, config: ModelConfig, visible: int, noise_ratio: float, offline: OfflineTarget | None):
        super().__init__()
        self.log_mel = LogMel.unnormalized(config)
        self.mean, self.std = config.norm_stats
        self.visible = visible
        self.noise_ratio = noise_ratio
        self.offline = offline

    @torch.no_grad()
    def forward(self, batch: Batch) -> Example:
        """Everything of an example; the padding of short clips is zero after normalisation, as in inference."""
        clean = self._raw(batch.audio, batch.log_mel)
        offline = self.offline(batch, clean) if self.offline is not None else None
        online = clean
        if batch.noise_audio is not None or batch.noise_log_mel is not None:
            online = mix(clean, self._raw(batch.noise_audio, batch.noise_log_mel), self.noise_ratio)
        normalized = blank_padding((online - self.mean) / self.std, batch.valid_frames)
        return Example(normalized, batch.order, self.visible, offline)

    def _raw(self, audio: Tensor | None, log_mel: Tensor | None) -> Tensor:
        if log_mel is not None:
            return log_mel.float()
        assert audio is not None
        raw: Tensor = self.log_mel(audio)
        return raw


def mix(clean: Tensor, noise: Tensor, ratio: float) -> Tensor:
    """``log(ratio * exp(noise) + (1 - ratio) * exp(clean))`` of log-mels that are not normalised."""
    weights = torch.tensor([ratio, 1 - ratio], device=clean.device).log()
    return torch.logaddexp(noise + weights[0], clean + weights[1])


def blank_padding(log_mel: Tensor, valid_frames: Tensor) -> Tensor:
    """Zero the frames of (B, 1, mels, frames) from ``valid_frames`` (B,) on."""
    frames = torch.arange(log_mel.shape[-1], device=log_mel.device)
    return log_mel.masked_fill(frames >= valid_frames.view(-1, 1, 1, 1), 0.0)


def precomputed_features(batch: Batch, log_mel: Tensor) -> Tensor:
    """M2D-S: the frame features that the manifest names."""
    assert batch.features is not None
    return batch.features


def labels(batch: Batch, log_mel: Tensor) -> Tensor:
    """M2D-AS: the multi-hot labels."""
    assert batch.labels is not None
    return batch.labels


class Teacher(nn.Module):
    """M2D-X: frame features of a frozen model, brought to the number of time columns of the one in training."""

    def __init__(self, model: M2D, config: ModelConfig):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.columns = config.grid_size[1]
        self.same_front_end = config.front_end == model.config.front_end
        if config.sample_rate != model.sample_rate:
            raise ConfigError(
                f"offline.teacher: {model.config.name} takes {model.sample_rate} Hz, but the model in training "
                f"{config.sample_rate} Hz; choose a teacher of the same rate."
            )

    @property
    def dim(self) -> int:
        """Size of its frame features."""
        return self.model.timestamp_embedding_size

    @torch.no_grad()
    def forward(self, batch: Batch, log_mel: Tensor) -> Tensor:
        """Targets from the clean audio or its log-mel: of this class frame features, (B, T, dim) float32."""
        if self.same_front_end:
            x = blank_padding(self.model.frontend.normalize(log_mel), batch.valid_frames)
        elif batch.audio is not None:
            x = batch.audio
        else:
            raise ConfigError("offline.teacher has another front end, so it needs the audio: leave out data.cache.")
        return self.targets(x)

    def targets(self, x: Tensor) -> Tensor:
        """What the teacher makes of audio or a log-mel."""
        return resample_columns(self.model.encode_frames(x), self.columns)


class PatchTeacher(Teacher):
    """SALT: latents of all patches by a frozen model that cuts the log-mel as the one in training does."""

    def __init__(self, model: M2D, config: ModelConfig):
        super().__init__(model, config)
        if not self.same_front_end or model.config.patch_size != config.patch_size:
            raise ConfigError(
                f"offline.teacher: {model.config.name} has another front end or other patches "
                f"({model.config.patch_size}) than the model in training ({config.patch_size}), and salt learns patch "
                "by patch; choose a teacher that has the same."
            )

    @property
    def dim(self) -> int:
        """Size of a patch's latent."""
        return self.model.config.embed_dim

    def targets(self, x: Tensor) -> Tensor:
        """(B, N, dim), frequency-major."""
        return self.model.patches(x)[:, :, : self.columns].flatten(1, 2)


def resample_columns(frames: Tensor, columns: int) -> Tensor:
    """(B, T, D) -> (B, columns, D): the mean over each column where T is larger, else linear interpolation."""
    if frames.shape[1] == columns:
        return frames
    by_channel = frames.transpose(1, 2)
    if frames.shape[1] > columns:
        return F.adaptive_avg_pool1d(by_channel, columns).transpose(1, 2)
    return F.interpolate(by_channel, size=columns, mode="linear").transpose(1, 2)


class Captions:
    """M2D-CLAP: embeddings of the captions by a frozen text encoder, each computed once."""

    def __init__(self, config: ClapConfig, device: torch.device):
        self.encoder = TextEncoder(config, None, device)
        self.device = device
        self.known: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, log_mel: Tensor) -> Tensor:
        """(B, text_dim) float32."""
        assert batch.captions is not None
        if len(self.known) > _MAX_KNOWN:
            self.known.clear()
        self._embed([text for text in dict.fromkeys(batch.captions) if text not in self.known])
        return torch.stack([self.known[text] for text in batch.captions]).to(self.device)

    def _embed(self, texts: Sequence[str]) -> None:
        if texts:
            self.known |= dict(zip(texts, self.encoder(texts).cpu(), strict=True))
