"""The encoder of M2D: a vision transformer over patches of a log-mel spectrogram.

* Masked Modeling Duo: Niizumi et al., "Learning Representations by Encouraging Both Networks to Model the Input",
  arXiv 2210.14648, section 3; "Towards a Universal Audio Pre-training Framework", arXiv 2404.06095.
* Vision transformer: Dosovitskiy et al., arXiv 2010.11929; fixed 2-D sin-cos positions: He et al., arXiv 2111.06377.

Tokens are ordered frequency-major, ``token = f * T + t``, and the class token comes first. ``embed`` (patches and
positions) and ``encode`` (class token, blocks, norm) are apart so that pre-training can drop tokens in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m2d_embed.backends import native, selection, threads
from m2d_embed.backends.native import BlockLike, Shape
from m2d_embed.backends.packed import PackedBlocks, RunBlocks, is_unhooked, run_each
from m2d_embed.config import ModelConfig, resolve_layers
from m2d_embed.errors import ConfigError


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        """(B, tokens, dim) -> the same; ``attended`` as in ``attend``."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, tokens, head_dim)
        x = attend(q, k, v, attended)
        x = self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))
        return x


def attend(q: Tensor, k: Tensor, v: Tensor, attended: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim)) v`` of (B, heads, tokens, head_dim) each.

    ``attended`` (B, 1, 1, tokens) bool says which tokens are attended to; None means all.

    PyTorch's fused kernel, but for training in bfloat16 on a CPU, where it takes three to four times as long, forward
    and backward, as matrix products do.
    """
    if not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attended)
    scores = (q * float(q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)  # (B, heads, tokens, tokens)
    if attended is not None:
        scores = scores.masked_fill(~attended, -torch.inf)
    return scores.softmax(dim=-1) @ v


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return x


class Block(nn.Module):
    """A pre-norm transformer block.

    The matrices may be of a lower precision than the residual stream ``x``: their input is cast to their own dtype,
    and their output added to ``x`` in the dtype of ``x``.

    Attributes:
        drop_path: rate of stochastic depth (Huang et al., arXiv 1603.09382): in training, attention and MLP are each
            left out for this share of the clips, and scaled up for the others.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, norm_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, mlp_dim)
        self.drop_path = 0.0

    def forward(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        """Return the same shape and dtype as ``x``, (B, tokens, dim); ``attended`` as in ``attend``."""
        dtype = self.attn.qkv.weight.dtype
        x = x + self._drop(self.attn(self.norm1(x).to(dtype), attended))
        x = x + self._drop(self.mlp(self.norm2(x).to(dtype)))
        return x

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = 1.0 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep).div_(keep)


#: What packed copies can stand for.
_BLOCK_PARTS = (nn.ModuleList, Block, Attention, Mlp, nn.Linear, nn.LayerNorm)


class PatchEmbed(nn.Module):
    """Cut a log-mel into patches and embed each linearly; a convolution whose stride is its kernel.

    In inference on a CPU it is a matrix product, which is what it comes to, and faster.
    """

    def __init__(self, dim: int, patch_size: tuple[int, int]):
        super().__init__()
        self.proj = nn.Conv2d(1, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, log_mel: Tensor) -> Tensor:
        """(B, 1, mels, frames) -> (B, dim, F, T)."""
        log_mel = log_mel.to(self.proj.weight.dtype)
        if selection.obstacle(log_mel) is None and self.is_plain():
            return self._multiply(log_mel)
        patches: Tensor = self.proj(log_mel)
        return patches

    def is_plain(self) -> bool:
        """Whether calling it does what its class says, and nothing else."""
        return type(self.proj) is nn.Conv2d and is_unhooked(self.proj) and is_unhooked(self)

    def _multiply(self, log_mel: Tensor) -> Tensor:
        batch, _, mels, frames = log_mel.shape
        height, width = self.proj.kernel_size
        cut = log_mel.reshape(batch, mels // height, height, frames // width, width).transpose(2, 3)
        patches = F.linear(cut.flatten(3), self.proj.weight.flatten(1), self.proj.bias)  # (B, F, T, dim)
        return patches.permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Vision transformer over one window of log-mel.

    State dict names are those of the published checkpoints. Inference on a CPU goes through kernels or copies of the
    weights (``packed.py``); who computes it is up to ``selection.choose_backend``.

    Attributes:
        quantize: multiply in int8 where kernels or copies are used.
        grad_checkpointing: as ``set_grad_checkpointing`` has set it.
    """

    pos_embed: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.embed_dim
        self.grid_size = config.grid_size
        self.patch_embed = PatchEmbed(dim, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(dim, config.grid_size))
        mlp_dim = int(dim * config.mlp_ratio)
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, mlp_dim, config.norm_eps) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.quantize = False
        self.grad_checkpointing = False
        self._packed: PackedBlocks | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # neither copied nor pickled, but made anew

    def train(self, mode: bool = True) -> Encoder:
        """As of any module; and ``repack``."""
        self.repack()
        return super().train(mode)

    def repack(self) -> None:
        """Forget copies of the weights; the next inference makes them anew."""
        self._packed = None

    def traits(self) -> selection.Traits:
        """What of the blocks decides who computes them."""
        modules = list(self.blocks.modules())
        if not all(type(module) in _BLOCK_PARTS for module in modules):
            return selection.Traits(None, changed="a layer of the blocks was replaced")
        if not all(map(is_unhooked, modules)):
            return selection.Traits(None, changed="something hooks into the blocks")
        matrices = {module.weight.dtype for module in modules if isinstance(module, nn.Linear)}
        norms = {p.dtype for module in modules if isinstance(module, nn.LayerNorm) for p in module.parameters()}
        usual = len(matrices) == 1 and norms <= {torch.float32}
        shapes = {Shape.of(cast(BlockLike, block)) for block in self.blocks}
        return selection.Traits(
            stored=selection.STORED.get(matrices.pop()) if usual else None,
            quantize=self.quantize,
            shape=shapes.pop() if len(shapes) == 1 else None,
        )

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth in training: ``rate`` for the last block, rising linearly from 0 for the first.

        Raises:
            ConfigError: unless 0 <= rate < 1.
        """
        if not 0 <= rate < 1:
            raise ConfigError(f"drop_path is a rate, 0 or more, below 1, not {rate}.")
        last = max(1, len(self.blocks) - 1)
        for index, block in enumerate(self.blocks):
            cast(Block, block).drop_path = rate * index / last

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside the blocks for the backward pass, which computes them again.

        Memory of activations falls to about one tensor a block, for a third more computation. Gradients are the same.
        """
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters and buffers with more than one dimension that optimisers should not decay."""
        return {"cls_token", "pos_embed"}

    def init_weights(self) -> None:
        """Draw fresh weights as in arXiv 2111.06377: Xavier-uniform matrices, N(0, 0.02) tokens, zero biases."""
        init_linears(self)
        projection = self.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, log_mel: Tensor) -> Tensor:
        """Patch tokens with their positions.

        Args:
            log_mel: (B, 1, mels, frames) normalised, ``frames`` a multiple of the patch and at most the window.

        Returns:
            (B, F * T, dim), frequency-major.
        """
        patches: Tensor = self.patch_embed(log_mel)  # (B, dim, F, T)
        positions = self.pos_embed[:, 1:].view(1, *self.grid_size, -1)  # (1, F, T, dim)
        positions = positions[:, :, : patches.shape[3]].flatten(1, 2)  # a shorter input takes the first columns
        return patches.flatten(2).transpose(1, 2) + positions  # (B, F * T, dim)

    def with_class_token(self, tokens: Tensor) -> Tensor:
        """Prepend the class token, with its position: (B, N, dim) -> (B, 1 + N, dim)."""
        cls_token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def encode(self, tokens: Tensor, layers: Sequence[int] = (-1,), is_audio: Tensor | None = None) -> list[Tensor]:
        """Prepend the class token, run the blocks, and read the named layers through the final norm.

        Args:
            tokens: (B, N, dim), any subset of what ``embed`` returns.
            layers: block indices; -1 is the last.
            is_audio: (B, N) bool, False for tokens of padding, to which no token attends; None if there are none.

        Returns:
            One (B, 1 + N, dim) tensor a layer, in the order asked for, the class token first.
        """
        attended = None if is_audio is None else F.pad(is_audio, (1, 0), value=True)[:, None, None]
        x = self.with_class_token(tokens)
        run = self._packed_blocks(x) or self._run_blocks
        return self._read(run, x, resolve_layers(layers, len(self.blocks)), attended)

    def _run_blocks(self, x: Tensor, which: range, attended: Tensor | None) -> Tensor:
        """(B, tokens, dim) -> the same, through some of the blocks themselves."""
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return run_each(self.blocks, x, which, attended)
        for index in which:
            x = checkpoint(self.blocks[index], x, attended, use_reentrant=False)
        return x

    def _read(self, run: RunBlocks, x: Tensor, layers: Sequence[int], attended: Tensor | None) -> list[Tensor]:
        """Run the blocks and read layers, each (B, 1 + N, dim), through the final norm."""
        outputs: dict[int, Tensor] = {}
        done = 0
        for layer in sorted(set(layers)):
            x = run(x, range(done, layer + 1), attended)
            outputs[layer] = self.norm(x)
            done = layer + 1
        return [outputs[layer] for layer in layers]

    def _tokens(self, log_mel: Tensor) -> Tensor:
        """The class token, and what ``embed`` returns: (B, 1 + F * T, dim)."""
        if not self._has_kernel(log_mel):
            return self.with_class_token(self.embed(log_mel))
        projection = self.patch_embed.proj
        return native.make_tokens(log_mel, projection, self.cls_token, self.pos_embed, self.grid_size[1])

    def _has_kernel(self, log_mel: Tensor) -> bool:
        """Whether tokens are made by a kernel: not of a log-mel that PyTorch would refuse."""
        if type(self.patch_embed) is not PatchEmbed or not self.patch_embed.is_plain():
            return False
        projection = self.patch_embed.proj
        (height, width), (rows, columns) = projection.kernel_size, self.grid_size
        return (
            selection.chooses_native_tokens(log_mel, projection)
            and self.cls_token.dtype == self.pos_embed.dtype == torch.float32
            and log_mel.ndim == 4
            and log_mel.shape[1:3] == (1, rows * height)
            and log_mel.shape[3] % width == 0
            and 0 < log_mel.shape[3] <= columns * width
        )

    def _packed_blocks(self, x: Tensor) -> PackedBlocks | None:
        """What stands for the blocks, or None if these are called themselves."""
        if torch.compiler.is_compiling():
            return None
        threads.survive_forks()
        if self.training or x.device.type != "cpu":
            self._packed = None  # gives the memory back
            return None
        if selection.obstacle(x) is not None or x.dtype != torch.float32:
            return None
        if self._packed is None or not self._packed.is_current(self.blocks, self.norm, self.quantize):
            backend = selection.choose_backend(self, x)
            others = backend.engine != "modules"
            self._packed = PackedBlocks(self.blocks, self.norm, self.quantize, backend) if others else None
        return self._packed

    def forward(self, log_mel: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """Patch features of one window.

        Args:
            log_mel: (B, 1, mels, frames) normalised, ``frames`` a multiple of the patch and at most the window.
            layers: block indices; -1 is the last.

        Returns:
            One (B, F, T, dim) tensor a layer.
        """
        wanted, rows = resolve_layers(layers, len(self.blocks)), self.grid_size[0]
        x = self._tokens(log_mel)
        packed = self._packed_blocks(x)
        if packed is not None and packed.can_read:
            return [patches.transpose(1, 2) for patches in packed.features(x, wanted, rows)]
        features = self._read(packed or self._run_blocks, x, wanted, None)
        return [tokens[:, 1:].view(len(x), rows, -1, x.shape[-1]) for tokens in features]


def init_linears(module: nn.Module) -> None:
    """Draw Xavier-uniform matrices and zero biases for every ``nn.Linear`` inside a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def sincos_positions(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions (arXiv 2111.06377): half of the dimensions for the time column, half for the mel row.

    Args:
        dim: embedding size, a multiple of 4.
        grid_size: (F, T), rows in mel and columns in time.

    Returns:
        (1, 1 + F * T, dim) float32; the class token's position is zero.
    """
    rows, columns = grid_size
    quarter = dim // 4
    frequencies = 10_000.0 ** -(np.arange(quarter) / quarter)

    def encode(count: int) -> npt.NDArray[np.float64]:
        angles = np.arange(count)[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (count, dim / 2)

    positions = np.zeros((1, 1 + rows * columns, dim), dtype=np.float32)
    grid = positions[0, 1:].reshape(rows, columns, dim)  # a view
    grid[:, :, : dim // 2] = encode(columns)[None, :]
    grid[:, :, dim // 2 :] = encode(rows)[:, None]
    return torch.from_numpy(positions)
