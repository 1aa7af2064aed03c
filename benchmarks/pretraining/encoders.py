"""Encoders of models that are there already, for what makes new ones of them."""

import torch

from m2d_embed.checkpoints import WEIGHT_FILES, Checkpoint, load_checkpoint
from m2d_embed.hub import HubOptions, locate


def read_encoder(model: str) -> Checkpoint:
    """The encoder of a model, as ``load_model`` finds it."""
    return load_checkpoint(locate(model, [WEIGHT_FILES[torch.float32]], [], HubOptions()))
