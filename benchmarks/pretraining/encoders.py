"""Encoders of models that are there already, for what makes new ones of them."""

import torch

from m2d_embed.checkpoints.hub import HubOptions, locate
from m2d_embed.checkpoints.layouts import WEIGHT_FILES, Checkpoint, load_checkpoint


def read_encoder(model: str) -> Checkpoint:
    """The encoder of a model, as ``load_model`` finds it."""
    return load_checkpoint(locate(model, [WEIGHT_FILES[torch.float32]], [], HubOptions()))
