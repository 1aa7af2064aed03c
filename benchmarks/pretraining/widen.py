"""A model twice as wide that computes the same, for a run to start from instead of from random weights.

python -m benchmarks.pretraining.widen weights wider

Every channel, hidden unit and head is there twice, and a matrix that reads doubled channels is divided between the two
(Chen et al., Net2Net, arXiv 1511.05641; for transformers Chen et al., bert2BERT, arXiv 2110.07143). The parts it is
divided into differ at random, so that gradients tell the copies apart from the first step on.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.pretraining.encoders import read_encoder
from m2d_embed.checkpoints.layouts import Checkpoint, write_native


def doubled(tensor: Tensor, dim: int = 0) -> Tensor:
    """What is written is written twice."""
    return torch.cat([tensor, tensor], dim)


def divided(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """(out, in) -> (out, 2 * in), two random parts whose sum is the matrix."""
    half = matrix / 2
    apart = torch.randn(matrix.shape, generator=generator) * half.square().mean().sqrt()
    return torch.cat([half + apart, half - apart], dim=1)


def widened(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """One tensor of an encoder for the encoder twice as wide."""
    if name.endswith(("cls_token", "pos_embed")):
        return doubled(tensor, dim=-1)
    if ".qkv." in name:
        parts = tensor.unflatten(0, (3, -1))  # queries, keys and values, (3, dim, ...)
        tensor = doubled(parts, dim=1).flatten(0, 1)
    else:
        tensor = doubled(tensor)
    is_matrix_of_block = tensor.ndim == 2
    return divided(tensor, generator) if is_matrix_of_block else tensor


def widen(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """The checkpoint of an encoder, without heads, twice as wide.

    Its positions are those of the narrower one twice, not the sin-cos ones of its own width.
    """
    config, generator = checkpoint.config, torch.Generator().manual_seed(seed)
    tensors = {
        name: widened(name, tensor.float(), generator)
        for name, tensor in sorted(checkpoint.tensors.items())
        if name.startswith("encoder.")
    }
    wider = dataclasses.replace(
        config,
        name=f"{config.name}-widened",
        embed_dim=2 * config.embed_dim,
        num_heads=2 * config.num_heads,
        source=f"{config.source}; widened to {2 * config.embed_dim} dimensions",
    )
    return Checkpoint(wider, tensors)


def main(
    model: Annotated[str, typer.Argument(help="a name or a folder, as load_model takes it")],
    out: Annotated[Path, typer.Argument(help="a folder to write")],
    seed: int = 0,
) -> None:
    """Write a model twice as wide that computes the same."""
    wider = widen(read_encoder(model), seed)
    out.mkdir(parents=True, exist_ok=True)
    write_native(out, wider)


if __name__ == "__main__":
    typer.run(main)
