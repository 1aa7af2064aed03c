"""The predictor: a narrow transformer that fills in masked patches from the latents of the visible ones.

Niizumi et al., "Masked Modeling Duo" (arXiv 2210.14648, section 3); the decoder of He et al., "Masked Autoencoders Are
Scalable Vision Learners" (arXiv 2111.06377, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m2d_embed.errors import ConfigError
from m2d_embed.model.encoder import Block, init_linears, sincos_positions


@dataclass(frozen=True)
class PredictorConfig:
    """Shape of the predictor; the defaults are the published ones."""

    dim: int = 512
    depth: int = 8
    num_heads: int = 16
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for field in ("dim", "depth", "num_heads", "mlp_ratio"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"predictor.{field} must be positive, not {getattr(self, field)}.")
        if self.dim * self.mlp_ratio < 1:
            raise ConfigError(f"predictor.mlp_ratio {self.mlp_ratio} leaves the MLP without a unit.")
        if self.dim % self.num_heads or self.dim % 4:
            raise ConfigError(f"predictor.dim {self.dim} must be a multiple of 4 and of num_heads {self.num_heads}.")


class Predictor(nn.Module):
    """Latents of visible patches in, predictions for masked patches out."""

    pos_embed: Tensor

    def __init__(
        self, config: PredictorConfig, input_dim: int, output_dim: int, grid_size: tuple[int, int], norm_eps: float
    ):
        super().__init__()
        self.embed = nn.Linear(input_dim, config.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.register_buffer("pos_embed", sincos_positions(config.dim, grid_size))
        mlp_dim = int(config.dim * config.mlp_ratio)
        self.blocks = nn.ModuleList(Block(config.dim, config.num_heads, mlp_dim, norm_eps) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=norm_eps)
        self.out = nn.Linear(config.dim, output_dim)

    def init_weights(self) -> None:
        """Draw fresh weights: Xavier-uniform matrices, zero biases, an N(0, 0.02) mask token."""
        init_linears(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict the masked patches.

        Args:
            latent: (B, 1 + V, input_dim) of the encoder, the class token first.
            visible: (B, V) patch index of each latent.
            masked: (B, M) patch indices to predict.

        Returns:
            (B, M, output_dim), in the order of ``masked``.
        """
        positions = self.pos_embed[0]  # (1 + N, dim), the class token's first
        x = self.embed(latent)  # (B, 1 + V, dim)
        x = torch.cat(
            [
                x[:, :1] + positions[0],
                x[:, 1:] + positions[visible + 1],
                self.mask_token + positions[masked + 1],
            ],
            dim=1,
        )  # (B, 1 + N, dim): attention does not ask for an order
        for block in self.blocks:
            x = block(x)
        predicted: Tensor = self.out(self.norm(x[:, -masked.shape[1] :]))
        return predicted
