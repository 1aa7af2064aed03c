"""The mean of the weights of models that went on from one another, or from one model: one model, at times a better one.

    python -m benchmarks.pretraining.average averaged runs/tiny-cpu-teachers-2/export runs/tiny-cpu-teachers-3/export

The average costs no more to run than one of them. That the weights of models near one another may be averaged, and why
it can help, is in Wortsman et al., "Model soups" (arXiv 2203.05482); probe it before it is used.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.pretraining.encoders import read_encoder
from m2d_embed.checkpoints.layouts import Checkpoint, write_native
from m2d_embed.config import ModelConfig

_MAY_DIFFER = ("name", "source", "license", "layers", "scene_pooling", "head", "clap")
_ALIKE = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _MAY_DIFFER]


def average(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """The mean of encoders of one shape and one front end, without heads, with the configuration of the first.

    Raises:
        SystemExit: if they differ in shape or front end; it says in what.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        unlike = [name for name in _ALIKE if getattr(other.config, name) != getattr(first.config, name)]
        if unlike:
            raise SystemExit(f"the mean of unlike models: {', '.join(unlike)} of {other.config} and {first.config}")
    tensors = {
        name: torch.stack([checkpoint.tensors[name].double() for checkpoint in checkpoints]).mean(dim=0).float()
        for name in first.tensors
        if name.startswith("encoder.")
    }
    return Checkpoint(dataclasses.replace(first.config, head=None, clap=None), tensors)


def main(
    out: Annotated[Path, typer.Argument(help="a folder to write")],
    models: Annotated[list[str], typer.Argument(help="names or folders, as load_model takes them")],
) -> None:
    """Write the mean of models."""
    out.mkdir(parents=True, exist_ok=True)
    write_native(out, average([read_encoder(model) for model in models]))


if __name__ == "__main__":
    typer.run(main)
