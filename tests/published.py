"""Checkpoints as they are published, in miniature, and what they must compute: an independent float64 implementation.

The state dicts use the published names. ``patch_features`` and its parts are written from the papers' description with
plain matrix products and share no code with the package.
"""

import functools
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from nnAudio.features import MelSpectrogram
from torch import Tensor

NAME = "m2d_vit_tiny-80x64p16x16-990101"
FINE_TUNED = "module.ar.runtime.backbone."

State = dict[str, Tensor]


# --- state dicts -------------------------------------------------------------------------------------------------


def draw(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_state(prefix: str, d_in: int, d_out: int, seed: int) -> State:
    return {
        f"{prefix}.weight": draw((d_out, d_in), seed, 1.4 / math.sqrt(d_in)),
        f"{prefix}.bias": draw((d_out,), seed + 1, 0.05),
    }


def norm_state(prefix: str, dim: int, seed: int) -> State:
    return {f"{prefix}.weight": 1 + draw((dim,), seed, 0.1), f"{prefix}.bias": draw((dim,), seed + 1, 0.05)}


def block_state(prefix: str, dim: int, mlp_dim: int, seed: int) -> State:
    return {
        **norm_state(f"{prefix}.norm1", dim, seed),
        **linear_state(f"{prefix}.attn.qkv", dim, 3 * dim, seed + 2),
        **linear_state(f"{prefix}.attn.proj", dim, dim, seed + 4),
        **norm_state(f"{prefix}.norm2", dim, seed + 6),
        **linear_state(f"{prefix}.mlp.fc1", dim, mlp_dim, seed + 8),
        **linear_state(f"{prefix}.mlp.fc2", mlp_dim, dim, seed + 10),
    }


@functools.lru_cache
def _encoder_state(dim: int, depth: int, patch: tuple[int, int], patches: int, seed: int) -> State:
    state = {
        "cls_token": draw((1, 1, dim), seed, 0.5),
        "pos_embed": draw((1, 1 + patches, dim), seed + 1, 0.5),
        "patch_embed.proj.weight": draw((dim, 1, *patch), seed + 2, 1.4 / math.sqrt(patch[0] * patch[1])),
        "patch_embed.proj.bias": draw((dim,), seed + 3, 0.05),
        **norm_state("norm", dim, seed + 4),
    }
    for index in range(depth):
        state |= block_state(f"blocks.{index}", dim, 4 * dim, seed + 100 * (index + 1))
    return state


def encoder_state(
    dim: int = 192, depth: int = 12, patch: tuple[int, int] = (16, 16), patches: int = 20, seed: int = 0
) -> State:
    """An encoder; the default is that of ``NAME``. A dict of its own, the tensors shared."""
    return dict(_encoder_state(dim, depth, patch, patches, seed))


def head_state(width: int, outputs: int = 527, seed: int = 50) -> State:
    """The head of a fine-tuned checkpoint, with the prefix it has there."""
    return {
        "module.head.norm.running_mean": draw((width,), seed, 0.3),
        "module.head.norm.running_var": 1 + draw((width,), seed + 1, 0.3).abs(),
        "module.head.norm.num_batches_tracked": torch.tensor(7),
        **linear_state("module.head.mlp.mlp.0", width, outputs, seed + 2),
    }


def semantic_state(dim: int, depth: int, seed: int = 60) -> State:
    """The "semantic" audio projector of CLAP: MLP ratio 1 up to depth 2, 2 beyond."""
    state = {"audio_proj.sem_token": draw((1, 1, dim), seed, 0.5), **norm_state("audio_proj.norm", dim, seed + 1)}
    for index in range(depth):
        mlp_dim = dim if depth <= 2 else 2 * dim
        state |= block_state(f"audio_proj.sem_blocks.{index}", dim, mlp_dim, seed + 100 * (index + 1))
    return state


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


# --- files -------------------------------------------------------------------------------------------------------


def save(folder: Path, content: Any, name: str = NAME, **options: Any) -> Path:
    """``<folder>/<name>/checkpoint-300.pth``."""
    file = folder / name / "checkpoint-300.pth"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file, **options)
    return file


def write_zip(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


# --- what they compute -------------------------------------------------------------------------------------------


def log_mel(audio: Tensor, sample_rate: int = 16_000) -> Tensor:
    """(B, samples) -> (B, 80, frames), before normalisation, by nnAudio."""
    factor = sample_rate // 16_000
    transform = MelSpectrogram(
        sr=sample_rate,
        n_fft=400 * factor,
        win_length=400 * factor,
        hop_length=160 * factor,
        n_mels=80,
        fmin=50,
        fmax=sample_rate // 2,
        center=True,
        power=2,
        verbose=False,
    )
    return (transform(audio) + torch.finfo(torch.float32).eps).log()


def affine(x: Tensor, state: State, prefix: str) -> Tensor:
    return x @ state[f"{prefix}.weight"].double().T + state[f"{prefix}.bias"].double()


def layer_norm(x: Tensor, state: State, prefix: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    standard = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return standard * state[f"{prefix}.weight"].double() + state[f"{prefix}.bias"].double()


def transformer_block(x: Tensor, state: State, prefix: str, heads: int, eps: float) -> Tensor:
    batch, tokens, dim = x.shape
    qkv = affine(layer_norm(x, state, f"{prefix}.norm1", eps), state, f"{prefix}.attn.qkv")
    q, k, v = (part.view(batch, tokens, heads, -1).transpose(1, 2) for part in qkv.split(dim, dim=-1))
    attention = (q @ k.transpose(-1, -2) / math.sqrt(dim // heads)).softmax(-1)
    x = x + affine((attention @ v).transpose(1, 2).reshape(batch, tokens, dim), state, f"{prefix}.attn.proj")
    hidden = affine(layer_norm(x, state, f"{prefix}.norm2", eps), state, f"{prefix}.mlp.fc1")
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + affine(gelu, state, f"{prefix}.mlp.fc2")


def depth_of(state: State, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def patch_features(state: State, normalised: Tensor, heads: int = 3) -> Tensor:
    """One window, (B, mels, frames) of whole patches -> (B, F, T, d)."""
    kernel = state["patch_embed.proj.weight"].double()
    (rows, columns), dim = kernel.shape[2:], len(kernel)
    batch, mels, frames = normalised.shape
    grid = mels // rows, frames // columns
    cut = normalised.double().view(batch, grid[0], rows, grid[1], columns).transpose(2, 3)
    embedded = cut.flatten(3) @ kernel.flatten(1).T + state["patch_embed.proj.bias"].double()  # (B, F, T, d)
    positions = state["pos_embed"].double()
    x = embedded + positions[:, 1:].view(1, grid[0], -1, dim)[:, :, : grid[1]]
    cls_token = (state["cls_token"].double() + positions[:, :1]).expand(batch, -1, -1)
    x = torch.cat([cls_token, x.flatten(1, 2)], dim=1)
    for index in range(depth_of(state, "blocks.")):
        x = transformer_block(x, state, f"blocks.{index}", heads, 1e-6)
    return layer_norm(x, state, "norm", 1e-6)[:, 1:].view(batch, *grid, dim)


def semantic_projection(state: State, flat: Tensor) -> Tensor:
    """(B, N, d) patch features -> (B, d)."""
    x = torch.cat([state["audio_proj.sem_token"].double().expand(len(flat), -1, -1), flat.double()], dim=1)
    for index in range(depth_of(state, "audio_proj.sem_blocks.")):
        x = transformer_block(x, state, f"audio_proj.sem_blocks.{index}", 1, 1e-5)
    return layer_norm(x[:, 0], state, "audio_proj.norm", 1e-5)


def sincos(dim: int, rows: int, columns: int) -> Tensor:
    """Fixed positions: first half of the dimensions for the column, second for the row, sines before cosines."""
    table = torch.zeros(1, 1 + rows * columns, dim)
    quarter = dim // 4
    for token in range(rows * columns):
        for half, index in enumerate((token % columns, token // columns)):
            for i in range(quarter):
                angle = index / 10_000 ** (i / quarter)
                table[0, 1 + token, half * 2 * quarter + i] = math.sin(angle)
                table[0, 1 + token, half * 2 * quarter + quarter + i] = math.cos(angle)
    return table
