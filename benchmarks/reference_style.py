"""The peer of the speed benchmarks: the same architecture, written and fed the usual way.

nnAudio's spectrogram in front of a timm-style ViT in float32, window after window. Random weights: only speed counts.
"""

import torch
import torch.nn.functional as F
from nnAudio.features import MelSpectrogram
from torch import Tensor, nn

from m2d_embed.config import ModelConfig


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


class Block(nn.Module):
    """Pre-norm transformer block as in timm."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
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
