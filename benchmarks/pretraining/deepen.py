"""An encoder with further blocks after its last, which at first change nothing.

    python -m benchmarks.pretraining.deepen weights 12 start        # the bundled ten blocks, to go on from

What is bundled lacks the blocks that served the objective more than its users. A stage that goes on from it gets new
ones in their place: their outputs are zero, so the residual stream passes them as it is.
"""

import dataclasses
from pathlib import Path

import torch
import typer

from m2d_embed.checkpoints import WEIGHT_FILES, Checkpoint, load_checkpoint, write_native
from m2d_embed.config import ModelConfig
from m2d_embed.encoder import Encoder
from m2d_embed.hub import HubOptions, locate


def deepen(checkpoint: Checkpoint, depth: int) -> Checkpoint:
    """The encoder with ``depth`` blocks; the new ones are drawn, but for the last layer of attention and of MLP."""
    config: ModelConfig = dataclasses.replace(checkpoint.config, depth=depth)
    encoder = Encoder(config)
    encoder.init_weights()
    drawn = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    for name, tensor in drawn.items():  # of the held blocks they are replaced below
        if ".blocks." in name and (".attn.proj." in name or ".mlp.fc2." in name):
            tensor.zero_()
    held = {name: tensor.float() for name, tensor in checkpoint.tensors.items()}
    return Checkpoint(config, drawn | held)


def main(model: Path, depth: int, output: Path) -> None:
    """Write a model with more blocks, in our layout."""
    checkpoint = load_checkpoint(locate(str(model), [WEIGHT_FILES[torch.float32]], [], HubOptions()))
    if depth <= checkpoint.config.depth:
        raise SystemExit(f"{model} has {checkpoint.config.depth} blocks already; give more than that.")
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    write_native(output, deepen(checkpoint, depth), [torch.float32])


if __name__ == "__main__":
    typer.run(main)
