"""The peers of the speed benchmarks: the same architecture, written and fed the usual way.

``ReferenceStyle``: nnAudio's spectrogram in front of a timm-style ViT in float32, window after window.
``ReferenceTraining``: the M2D objective around the same blocks, fed from one ``.npy`` a clip, in a plain float32 loop.

Random weights: only speed counts. Written from the papers' descriptions (arXiv 2210.14648, section 3).
"""

import copy
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nnAudio.features import MelSpectrogram
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from m2d_embed.config import ModelConfig
from m2d_embed.pretrain.predictor import PredictorConfig

_MASK_RATIO = 0.7
_EMA_DECAY = 0.99995
_CLIP_NORM = 3.0


class Attention(nn.Module):
    """Self-attention as in timm: one qkv projection, fused scaled dot product."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(b, n, c))
        return out


class ExplicitAttention(Attention):
    """The same as two matrix products and a softmax, as it was written before PyTorch had a fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q @ k.transpose(-2, -1)) * (c // self.num_heads) ** -0.5
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(b, n, c)
        out: Tensor = self.proj(x)
        return out


class Block(nn.Module):
    """Pre-norm transformer block as in timm."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, attention: type[Attention] = Attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class ReferenceStyle(nn.Module):
    """Waveform (B, samples) -> scene embeddings (B, F * d)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.to_mel = MelSpectrogram(
            sr=config.sample_rate,
            n_fft=config.n_fft,
            win_length=config.n_fft,
            hop_length=config.hop_length,
            n_mels=config.input_size[0],
            fmin=config.f_min,
            fmax=config.f_max,
            center=True,
            power=2,
            verbose=False,
        )
        self.patch_embed = nn.Conv2d(1, dim, config.patch_size, config.patch_size)
        rows, columns = config.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, dim, rows, columns) * 0.02, requires_grad=False)
        mlp_dim = int(dim * config.mlp_ratio)
        self.blocks = nn.Sequential(*(Block(dim, config.num_heads, mlp_dim) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, audio: Tensor) -> Tensor:
        mean, std = self.config.norm_stats
        log_mel = (self.to_mel(audio) + torch.finfo(torch.float32).eps).log().unsqueeze(1)
        log_mel = (log_mel - mean) / std
        window, patch = self.config.input_size[1], self.config.patch_size[1]
        log_mel = F.pad(log_mel, (0, -log_mel.shape[-1] % patch))
        frames = [self._window(log_mel[..., i : i + window]) for i in range(0, log_mel.shape[-1], window)]
        return torch.cat(frames, dim=1).mean(1)

    def _window(self, log_mel: Tensor) -> Tensor:
        x = self.patch_embed(log_mel)
        batch, dim, rows, columns = x.shape
        x = (x + self.pos_embed[..., :columns]).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1)
        x = self.norm(self.blocks(x))[:, 1:]
        frames: Tensor = x.reshape(batch, rows, columns, dim).transpose(1, 2).flatten(2)
        return frames


class ReferenceStyleM2D(nn.Module):
    """Log-mels (B, 1, mels, frames) -> the loss of M2D, masked and put back in place as MAE does it."""

    def __init__(self, config: ModelConfig, predictor: PredictorConfig):
        super().__init__()
        dim, (rows, columns) = config.embed_dim, config.grid_size
        self.visible = int(rows * columns * (1 - _MASK_RATIO))
        self.patch_embed = nn.Conv2d(1, dim, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, rows * columns, dim) * 0.02, requires_grad=False)
        self.blocks = _blocks(dim, config.num_heads, config.mlp_ratio, config.depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, predictor.dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, predictor.dim) * 0.02)
        positions = torch.randn(1, 1 + rows * columns, predictor.dim) * 0.02
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = _blocks(predictor.dim, predictor.num_heads, predictor.mlp_ratio, predictor.depth)
        self.decoder_norm = nn.LayerNorm(predictor.dim, eps=1e-6)
        self.decoder_pred = nn.Linear(predictor.dim, dim)
        self.target_blocks = copy.deepcopy(self.blocks).requires_grad_(False)
        self.target_norm = copy.deepcopy(self.norm).requires_grad_(False)

    def forward(self, log_mel: Tensor) -> Tensor:
        x = self.patch_embed(log_mel).flatten(2).transpose(1, 2) + self.pos_embed
        noise = torch.rand(x.shape[:2], device=x.device)
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        ids_keep, ids_mask = ids_shuffle[:, : self.visible], ids_shuffle[:, self.visible :]
        latent = self.norm(self.blocks(self._with_cls(_gather(x, ids_keep))))
        predicted = _gather(self._predict(latent, ids_restore), ids_mask)
        with torch.no_grad():
            target = self.target_norm(self.target_blocks(self._with_cls(_gather(x, ids_mask))))[:, 1:]
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        predicted, target = F.normalize(predicted, dim=-1), F.normalize(target, dim=-1)
        loss: Tensor = (2 - 2 * (predicted * target).sum(dim=-1)).mean()
        return loss

    @torch.no_grad()
    def update_target(self, decay: float) -> None:
        online = [*self.blocks.parameters(), *self.norm.parameters()]
        target = [*self.target_blocks.parameters(), *self.target_norm.parameters()]
        for new, average in zip(online, target, strict=True):
            average.mul_(decay).add_(new, alpha=1 - decay)

    def _with_cls(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)

    def _predict(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """(B, 1 + V, dim) -> (B, N, dim), every patch at its place."""
        x = self.decoder_embed(latent)
        hidden = ids_restore.shape[1] - self.visible
        shuffled = torch.cat([x[:, 1:], self.mask_token.repeat(len(x), hidden, 1)], dim=1)
        x = torch.cat([x[:, :1], _gather(shuffled, ids_restore)], dim=1) + self.decoder_pos_embed
        predicted: Tensor = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))
        return predicted[:, 1:]


class MelFolder(Dataset[Tensor]):
    """Random crops (1, mels, frames) of log-mels that lie in one ``.npy`` each, many times over in an epoch."""

    _PASSES = 100_000  # an epoch that ended would start its worker anew

    def __init__(self, files: Sequence[Path], config: ModelConfig):
        self.files = list(files)
        self.frames = config.input_size[1]
        self.mean, self.std = config.norm_stats

    def __len__(self) -> int:
        return len(self.files) * self._PASSES

    def __getitem__(self, index: int) -> Tensor:
        log_mel = np.load(self.files[index % len(self.files)], allow_pickle=False)
        start = np.random.randint(0, log_mel.shape[1] - self.frames + 1)
        crop = log_mel[:, start : start + self.frames]
        return torch.tensor((crop - self.mean) / self.std, dtype=torch.float32).unsqueeze(0)


def mel_loader(files: Sequence[Path], config: ModelConfig, batch: int, workers: int) -> DataLoader[Tensor]:
    return DataLoader(
        MelFolder(files, config), batch_size=batch, num_workers=workers, pin_memory=torch.cuda.is_available()
    )


class ReferenceTraining:
    """A plain float32 training loop."""

    def __init__(self, model: ReferenceStyleM2D, loader: DataLoader[Tensor], device: torch.device):
        self.model = model.to(device)
        self.batches: Iterator[Tensor] = iter(loader)
        self.device = device
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.trained if p.ndim > 1], "weight_decay": 0.05},
                {"params": [p for p in self.trained if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=1e-6,
            betas=(0.9, 0.95),
            foreach=False,
            fused=False,
        )

    def step(self) -> float:
        """One training step; returns the seconds it waited for data."""
        asked = time.perf_counter()
        batch = next(self.batches)
        waited = time.perf_counter() - asked
        loss = self.model(batch.to(self.device, non_blocking=True))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, _CLIP_NORM)
        self.optimizer.step()
        self.model.update_target(_EMA_DECAY)
        loss.item()
        return waited

    def close(self) -> None:
        """End the workers."""
        self.batches = iter(())


def _blocks(dim: int, num_heads: int, mlp_ratio: float, depth: int) -> nn.Sequential:
    return nn.Sequential(*(Block(dim, num_heads, int(dim * mlp_ratio), ExplicitAttention) for _ in range(depth)))


def _gather(x: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(x, 1, ids.unsqueeze(-1).repeat(1, 1, x.shape[-1]))
